//! A small kubelet: it runs the pods that the API server has for its node, and says how they do.
//! It restarts nothing, and knows no probes and no volumes.

mod config;
mod worker;

use std::collections::HashMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::pin::pin;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context as _, Result};
use futures_util::StreamExt as _;
use k8s_openapi::api::core::v1::Pod;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::runtime::watcher::{self, Error as WatchError, Event, watcher};
use kube::{Api, Client, Config, Error};
use tokio::runtime;
use tokio::sync::{oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::sleep;

use crate::cri::Cri;
use worker::Worker;

/// Between two tries of what failed.
const RETRY: Duration = Duration::from_millis(200);

/// What a kubelet has to know.
#[derive(Clone, Debug)]
pub struct KubeletOpts {
    /// The name of its node.
    pub node: String,
    /// The node's own address, which pods in the host's network have too.
    pub node_ip: IpAddr,
    /// How to reach the API server.
    pub kubeconfig: PathBuf,
    /// The container runtime's socket.
    pub socket: PathBuf,
    /// The cgroup below which pods get theirs, with a slash in front.
    pub cgroup_parent: String,
    /// Where containers' output goes, as `NAMESPACE_POD_UID/CONTAINER/0.log`.
    pub logs: PathBuf,
}

/// A running kubelet. On drop it stops; pods that run go on.
pub struct Kubelet {
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Kubelet {
    /// Starts it in the network namespace of the calling thread.
    pub fn start(opts: KubeletOpts) -> Result<Self> {
        let (stop, stopped) = oneshot::channel();
        let thread = thread::Builder::new()
            .name("kubelet".to_owned())
            .spawn(move || {
                let run = async {
                    tokio::select! {
                        ended = run(opts) => ended,
                        _ = stopped => Ok(()),
                    }
                };
                let runtime = runtime::Builder::new_current_thread().enable_all().build();
                let ended = runtime.context("making a runtime").and_then(|rt| rt.block_on(run));
                if let Err(err) = ended {
                    eprintln!("kubelet: {err:#}");
                }
            })
            .context("starting a thread")?;
        Ok(Self { stop: Some(stop), thread: Some(thread) })
    }
}

impl Drop for Kubelet {
    fn drop(&mut self) {
        self.stop = None;
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            eprintln!("e2e: the kubelet panicked");
        }
    }
}

/// What all workers need.
struct Context {
    opts: KubeletOpts,
    client: Client,
    cri: Cri,
}

async fn run(opts: KubeletOpts) -> Result<()> {
    let kubeconfig = Kubeconfig::read_from(&opts.kubeconfig)?;
    let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?;
    let client = Client::try_from(config)?;
    let cri = Cri::connect(&opts.socket).await?;
    let context = Arc::new(Context { opts, client, cri });
    let mut pods = Pods { context, workers: HashMap::new(), tasks: JoinSet::new() };
    loop {
        pods.follow().await;
    }
}

struct Pods {
    context: Arc<Context>,
    /// By uid. A worker is told each change of its pod, at last that there is none any more.
    workers: HashMap<String, watch::Sender<Option<Pod>>>,
    tasks: JoinSet<()>,
}

impl Pods {
    /// Follows the API server until the watch has to begin anew.
    async fn follow(&mut self) {
        let api: Api<Pod> = Api::all(self.context.client.clone());
        let fields = format!("spec.nodeName={}", self.context.opts.node);
        let mut events = pin!(watcher(api, watcher::Config::default().fields(&fields)));
        let mut listed = Vec::new();
        while let Some(event) = events.next().await {
            match event {
                Ok(Event::Init) => listed.clear(),
                Ok(Event::InitApply(pod)) => {
                    listed.extend(pod.metadata.uid.clone());
                    self.apply(pod);
                }
                Ok(Event::InitDone) => {
                    for (_, worker) in self.workers.iter().filter(|(uid, _)| !listed.contains(uid))
                    {
                        worker.send_replace(None);
                    }
                }
                Ok(Event::Apply(pod)) => self.apply(pod),
                Ok(Event::Delete(pod)) => {
                    let uid = pod.metadata.uid.unwrap_or_default();
                    if let Some(worker) = self.workers.get(&uid) {
                        worker.send_replace(None);
                    }
                }
                Err(err) => {
                    sleep(RETRY).await;
                    // A watcher never gets over this by itself.
                    if let WatchError::WatchStartFailed(Error::Api(status)) = &err
                        && status.code == 410
                    {
                        return;
                    }
                }
            }
            self.workers.retain(|_, worker| worker.receiver_count() > 0);
            while self.tasks.try_join_next().is_some() {}
        }
    }

    fn apply(&mut self, pod: Pod) {
        let uid = pod.metadata.uid.clone().unwrap_or_default();
        if let Some(worker) = self.workers.get(&uid) {
            worker.send_replace(Some(pod));
            return;
        }
        let (worker, changes) = watch::channel(Some(pod.clone()));
        self.workers.insert(uid, worker);
        self.tasks.spawn(Worker::new(self.context.clone(), pod, changes).run());
    }
}
