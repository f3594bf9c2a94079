//! Pods from the API server: those of this node, and the metadata of namespaces.

mod api;
mod errors;
mod events;
mod services;
mod watch;

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{Arc, Mutex},
};

use anyhow::Result;
use clap::ValueEnum;
use futures_util::FutureExt;
use k8s_openapi::api::{
    apps::v1::DaemonSet,
    core::v1::{Namespace, ObjectReference, Pod},
};
use kube::{
    Api,
    core::PartialObjectMeta,
    runtime::{
        WatchStreamExt,
        reflector::{self, ObjectRef, Store},
        watcher,
    },
};
use tokio::{sync::mpsc, task, time::timeout};
use tracing::warn;

pub use self::api::{ApiServer, Removed};
use self::{
    api::{Own, client, find_node},
    errors::{ANSWER, Failing},
    events::{EVENTS, node_object, publish, recorder},
    services::Services,
    watch::{follow, keep_needed, relisting},
};
use super::{PodSource, Snapshot, SourcePod};
use crate::{
    mesh::facts,
    problem::{Problem, Reason},
    service::Catalog,
};

/// The access to the API server, and this node's name.
#[derive(Debug, Clone)]
pub struct Config {
    /// `spec.nodeName` of the pods to look after.
    pub node: String,
    /// The kubeconfig; without one, the service account of the agent's own pod.
    pub kubeconfig: Option<PathBuf>,
    /// The namespace and name of the agent's own DaemonSet.
    pub daemonset: Option<(String, String)>,
    /// The treatment of this node's mesh pods when the DaemonSet is gone.
    pub on_uninstall: OnUninstall,
    /// Whether Services are watched as well.
    pub services: bool,
}

/// The treatment of intercepted pods when Sidestep is uninstalled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum OnUninstall {
    /// They stay intercepted until they terminate or a new agent takes them over. On a node without
    /// intercepted pods, everything is removed.
    Keep,
    /// Everything is removed at once: their traffic bypasses their sidecars from then on.
    Unload,
}

/// This node's part of the API server's state.
pub struct Kubernetes {
    api: ApiServer,
    namespaces: Store<PartialObjectMeta<Namespace>>,
    /// The watches of Services, if these are translated.
    services: Option<Services>,
    on_uninstall: OnUninstall,
    /// The publisher of Events; `None` once no more are sent.
    events: Option<mpsc::Sender<(Problem, ObjectReference)>>,
    publisher: task::JoinHandle<()>,
    /// Pods of CNI requests that the watch has not delivered yet, by uid.
    ahead: BTreeMap<String, Arc<Pod>>,
}

impl Kubernetes {
    /// Starts watching; `changed` is notified of every change, and of the first complete state.
    ///
    /// # Errors
    /// If the configuration cannot be read, or the API server knows no such node. An API server
    /// that cannot be reached is not an error: requests are retried for ever.
    pub async fn start(config: &Config, changed: mpsc::Sender<()>) -> Result<Self> {
        let client = client(config).await?;
        find_node(&client, &config.node).await?;
        let failing = Arc::new(Mutex::new(Failing::default()));

        let (pods, writer) = reflector::store();
        let only = watcher::Config::default().fields(&format!("spec.nodeName={}", config.node));
        let api = Api::<Pod>::all(client.clone());
        let watch = relisting(move || watcher(api.clone(), only.clone())).modify(keep_needed);
        follow("pods", watch.reflect(writer), &failing, &changed);

        let (namespaces, writer) = reflector::store();
        let all = Api::<PartialObjectMeta<Namespace>>::all(client.clone());
        let watch = relisting(move || watcher(all.clone(), watcher::Config::default()));
        let watch = watch.modify(|namespace| namespace.metadata.managed_fields = None);
        follow("namespaces", watch.reflect(writer), &failing, &changed);

        let daemonset = config.daemonset.clone().map(|(namespace, name)| {
            let (watched, writer) = reflector::store();
            let api = Api::<PartialObjectMeta<DaemonSet>>::namespaced(client.clone(), &namespace);
            let only = watcher::Config::default().fields(&format!("metadata.name={name}"));
            let watch = relisting(move || watcher(api.clone(), only.clone()));
            follow("daemonsets", watch.reflect(writer), &failing, &changed);
            Arc::new(Own { namespace, name, watched })
        });

        let services =
            config.services.then(|| Services::start(&client, &config.node, &failing, &changed));

        let (events, queue) = mpsc::channel(EVENTS);
        let recorder = recorder(&client, &config.node);
        let publisher = task::spawn(publish(recorder, queue, Arc::clone(&failing)));
        let api = ApiServer { client, node: config.node.clone(), daemonset, pods, failing };
        Ok(Self {
            api,
            namespaces,
            services,
            on_uninstall: config.on_uninstall,
            events: Some(events),
            publisher,
            ahead: BTreeMap::new(),
        })
    }

    /// The client for requests about single objects.
    pub fn api(&self) -> &ApiServer {
        &self.api
    }

    /// Passes changes of Services to the catalog. Returns false until their lists are complete.
    pub fn feed(&self, catalog: &mut Catalog) -> bool {
        self.services.as_ref().is_some_and(|services| services.feed(catalog))
    }

    /// Whether pods and namespaces have had their first complete list.
    pub fn is_ready(&self) -> bool {
        let pods = self.api.pods.wait_until_ready().now_or_never();
        let namespaces = self.namespaces.wait_until_ready().now_or_never();
        matches!((pods, namespaces), (Some(Ok(())), Some(Ok(()))))
    }

    /// The pod, with the settings that it inherits from its namespace.
    pub fn inherit(&self, pod: Arc<Pod>) -> Arc<Pod> {
        let name = pod.metadata.namespace.as_deref().unwrap_or("default");
        match self.namespaces.get(&ObjectRef::new(name)) {
            Some(namespace) => facts::inherit(pod, &namespace.metadata),
            None => pod,
        }
    }

    /// Adds a pod that the watch may not have delivered yet.
    pub fn expect(&mut self, pod: Arc<Pod>) {
        self.ahead.insert(facts::pod_uid(&pod).to_owned(), pod);
    }

    /// Forgets the pods that the watch never delivered, except those that are alive.
    pub fn forget(&mut self, alive: impl Fn(&str) -> bool) {
        self.ahead.retain(|uid, _| alive(uid));
    }

    /// Sends the waiting Events, within a short time limit.
    pub async fn send_events(&mut self) {
        self.events = None;
        let _ = timeout(2 * ANSWER, &mut self.publisher).await;
    }
}

impl PodSource for Kubernetes {
    fn snapshot(&mut self) -> Result<Option<Snapshot>> {
        if !self.is_ready() {
            return Ok(None);
        }
        let (mut pods, errors) = by_uid(self.api.pods.state());
        self.ahead.retain(|uid, _| !pods.contains_key(uid));
        pods.extend(self.ahead.iter().map(|(uid, pod)| (uid.clone(), Arc::clone(pod))));
        let pods = pods.into_values().map(|pod| SourcePod { pod: self.inherit(pod), origin: None });
        Ok(Some(Snapshot {
            pods: pods.collect(),
            errors,
            incomplete: false,
            missing_may_run: true,
        }))
    }

    fn problems(&self) -> Vec<Problem> {
        self.api.failing().now.values().map(Problem::node).collect()
    }

    fn errors(&self) -> BTreeMap<&'static str, u64> {
        self.api.failing().counts.clone()
    }

    fn event(&self, problem: &Problem) {
        let object = match &problem.pod {
            Some((name, uid)) => {
                let (namespace, name) = name.split_once('/').unwrap_or(("default", name));
                ObjectReference {
                    kind: Some("Pod".into()),
                    namespace: Some(namespace.into()),
                    uid: Some(uid.clone()),
                    ..node_object(name)
                }
            }
            None => node_object(&self.api.node),
        };
        if let Some(queue) = &self.events
            && queue.try_send((problem.clone(), object)).is_err()
        {
            warn!("too many Events are waiting for the API server; dropped: {problem}");
        }
    }

    fn leaves_pods_behind(&self) -> bool {
        let is_gone = self.api.daemonset.as_ref().is_some_and(|own| own.is_gone());
        is_gone && self.on_uninstall == OnUninstall::Keep
    }
}

/// Pods by the uid that the node uses for them, and objects that claim another pod's. The mark of a
/// static pod's mirror is an annotation, which anybody can write who may create pods: so a pod
/// whose own uid it is comes first, then the older object.
fn by_uid(mut known: Vec<Arc<Pod>>) -> (BTreeMap<String, Arc<Pod>>, Vec<Problem>) {
    known.sort_by_key(|pod| {
        (facts::static_uid(pod).is_some(), pod.metadata.creation_timestamp.clone())
    });
    let (mut pods, mut errors) = (BTreeMap::<String, Arc<Pod>>::new(), Vec::new());
    for pod in known {
        let uid = facts::pod_uid(&pod).to_owned();
        let Some(first) = pods.get(&uid) else {
            pods.insert(uid, pod);
            continue;
        };
        let first = facts::pod_name(first).unwrap_or_default();
        let text = format!("its annotations name uid {uid:?}, which belongs to pod {first}");
        // Reported to the object itself, not to the pod that it claims to be.
        let own = pod.metadata.uid.clone().unwrap_or_default();
        let name = facts::pod_name(&pod).unwrap_or_default();
        let text = format!("pod {name}: {text}: the pod is not intercepted");
        errors.push(Problem { reason: Reason::InvalidPod, pod: Some((name, own)), text });
    }
    (pods, errors)
}
