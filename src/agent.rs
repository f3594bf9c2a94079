//! The agent: makes the source and the data plane, and goes round between what may happen.

use std::{
    collections::BTreeSet,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    thread,
    time::Duration,
};

use anyhow::{Context, Result};
use notify::Watcher;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::{mpsc, oneshot},
    time::{Instant, MissedTickBehavior, interval, sleep},
};
use tracing::{info, warn};

use crate::{
    bpf::{self, Dataplane, Pins},
    cgroup::Cgroup,
    check,
    cni::{
        self, Reply, Request,
        conflist::{self, Installer},
        server::Asked,
    },
    http,
    metrics::Metrics,
    places::Places,
    problem::Problem,
    reconciler::{AddError, Look, Reconciler, Source},
    source::{
        kubernetes::{self, Kubernetes},
        manifests::Manifests,
    },
    splice,
};

/// What the agent was told on the command line.
#[derive(Debug)]
pub struct Config {
    /// Where pods come from.
    pub source: SourceConfig,
    /// Cgroup to attach to; none: the root.
    pub cgroup: Option<PathBuf>,
    /// Where maps and links are pinned.
    pub pins: Pins,
    /// What is spliced.
    pub splice: splice::Mode,
    /// How long a spliced connection's messages may do without TCP.
    pub splice_refresh: Duration,
    /// Where health and metrics are served; none: nowhere.
    pub http: Option<SocketAddr>,
}

/// Where pods come from.
#[derive(Debug)]
pub enum SourceConfig {
    /// A directory of manifests.
    Manifests(PathBuf),
    /// The API server.
    Kubernetes(Box<Cluster>),
}

/// A node of a cluster.
#[derive(Debug)]
pub struct Cluster {
    /// How to reach the API server.
    pub api: kubernetes::Config,
    /// The node's procfs.
    pub proc: PathBuf,
    /// The CNI plugin; none: it is not installed.
    pub cni: Option<cni::Config>,
}

/// A namespace can appear, go or change its addresses with no change in the source.
const RESYNC: Duration = Duration::from_secs(3);
/// A burst of changes is one change.
const SETTLE: Duration = Duration::from_millis(20);
/// Requests of the CNI plugin that may wait.
const REQUESTS: usize = 64;

/// Runs until SIGTERM or SIGINT, and leaves the data plane in force, unless Sidestep is being
/// uninstalled.
///
/// # Errors
/// Where the data plane can't be installed, the directory of manifests can't be read at start,
/// or the configuration of the API server can't be used. A bad pod is no error: it is logged.
pub fn run(config: &Config) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(serve(config))
}

async fn serve(config: &Config) -> Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    check::privileges()?;
    let cgroup = Cgroup::open(config.cgroup.as_deref())?;
    let pins = &config.pins;
    let (changed, mut changes) = mpsc::channel(1);
    let mut watchers = Vec::new();
    let (asked, mut requests) = mpsc::channel(REQUESTS);
    let mut installer = None;

    let source = match &config.source {
        SourceConfig::Manifests(dir) => {
            let mut manifests = Manifests::new(dir);
            manifests.read()?;
            watchers.push(watch(dir, &changed)?);
            Source::Manifests(manifests)
        }
        SourceConfig::Kubernetes(cluster) => {
            let kubernetes = Kubernetes::start(&cluster.api, changed.clone()).await?;
            Source::Kubernetes(Box::new(kubernetes), Places::new(&cluster.proc))
        }
    };
    let _lock = pins.lock()?;
    let mut dataplane = Dataplane::load(pins, config.splice_refresh)?;
    dataplane.attach(&cgroup)?;
    let events = dataplane.events()?;
    let metrics = Arc::new(Metrics::new(pins, cgroup.id()));
    let mut reconciler = Reconciler::new(source, dataplane, cgroup, Arc::clone(&metrics))?;
    let adopted = reconciler.adopted();
    info!(cgroup = %reconciler.cgroup(), %pins, adopted, "in force");

    if let Some(address) = config.http {
        let address = http::serve(address, Arc::clone(&metrics)).await?;
        info!(%address, "health and metrics");
    }
    let cni = match &config.source {
        SourceConfig::Kubernetes(cluster) => cluster.cni.as_ref(),
        SourceConfig::Manifests(_) => None,
    };
    if let (Some(cni), Source::Kubernetes(kubernetes, _)) = (cni, reconciler.source()) {
        let found = Installer::new(cni);
        found.install_plugin()?;
        cni::server::serve(&cni.socket, kubernetes.api().clone(), asked.clone())?;
        watchers.push(watch(&cni.conf_dir, &changed)?);
        installer = Some(found);
    }

    let mut tried = try_splices(config.splice);
    let mut resync = interval(RESYNC);
    resync.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let sweep = sleep(Duration::ZERO);
    tokio::pin!(sweep);
    let mut more = BTreeSet::new();
    let settle = sleep(Duration::ZERO);
    tokio::pin!(settle);
    let mut settling = false;
    loop {
        metrics.turned();
        tokio::select! {
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            seen = events.next() => {
                let seen = seen?;
                reconciler.find_listeners(&seen.missed);
                reconciler.reset(&seen.unread);
                if seen.bulk {
                    sweep.as_mut().reset(reconciler.take_bulk_out().into());
                }
            }
            Some(first) = requests.recv() => {
                // Whatever waits meanwhile shares a sync with it.
                let mut batch = vec![first];
                while let Ok(asked) = requests.try_recv() {
                    batch.push(asked);
                }
                answer(&mut reconciler, batch, &metrics, &more);
                // Those who wrote to the socket, and the watches, have their turn.
                tokio::task::yield_now().await;
            }
            // A sandbox does not wait for it.
            Some(()) = changes.recv(), if !settling => {
                settle.as_mut().reset(Instant::now() + SETTLE);
                settling = true;
            }
            () = &mut settle, if settling => {
                settling = false;
                while changes.try_recv().is_ok() {}
                more = chain(installer.as_ref());
                reconciler.sync(Look::Changes, &more);
            }
            Ok(found) = &mut tried, if !tried.is_terminated() => {
                reconciler.splice(config.splice, &found);
                reconciler.sync(Look::Changes, &more);
            }
            () = &mut sweep => sweep.as_mut().reset(reconciler.sweep_splices().into()),
            _ = resync.tick() => {
                more = chain(installer.as_ref());
                reconciler.sync(Look::Everything, &more);
            }
        }
    }
    if let Source::Kubernetes(kubernetes, _) = reconciler.source()
        && let Some(why) = kubernetes.api().removed().await
    {
        info!("{why}: everything is taken away");
        return unload(pins, cni.map(|cni| (cni.conf_dir.as_path(), cni.bin_dir.as_path())));
    }
    info!("ends; the data plane stays in force (`sidestep unload` takes it away)");
    Ok(())
}

/// Tries what this kernel does to spliced sockets. No pod waits for that: until it is known, what an
/// earlier agent decided stands, or nothing is spliced.
fn try_splices(mode: splice::Mode) -> oneshot::Receiver<splice::Found> {
    let (tell, told) = oneshot::channel();
    thread::spawn(move || {
        // Nothing is to be known where nothing is asked for.
        let found = match mode {
            splice::Mode::Off => Ok(Vec::new()),
            _ => bpf::self_test().map_err(|error| format!("{error:#}")),
        };
        let _ = tell.send(found);
    });
    told
}

/// Takes the plugin and the data plane away.
fn unload(pins: &Pins, cni: Option<(&Path, &Path)>) -> Result<()> {
    // The plugin first: no new pod should wait for an agent that is gone.
    if let Some((conf_dir, bin_dir)) = cni {
        conflist::uninstall(conf_dir, bin_dir)?;
    }
    info!("unloaded: {}", bpf::unload(pins)?);
    Ok(())
}

/// Sees to the CNI configuration; what is wrong with it.
fn chain(installer: Option<&Installer>) -> BTreeSet<Problem> {
    let wrong = installer.and_then(|installer| installer.ensure().err());
    wrong.map(|error| Problem::node(format!("{error:#}"))).into_iter().collect()
}

/// Answers the CNI plugin.
fn answer(
    reconciler: &mut Reconciler,
    batch: Vec<Asked>,
    metrics: &Metrics,
    more: &BTreeSet<Problem>,
) {
    let reply = |verb, answer: oneshot::Sender<Reply>, result: Result<(), AddError>| {
        metrics.cni(verb, result.is_ok());
        let retry = result == Err(AddError::NotYet);
        let error = result.err().map(|error| error.to_string());
        if answer.send(Reply { error, retry }).is_err() {
            warn!("the CNI plugin did not wait for its answer");
        }
    };
    let mut announced = Vec::new();
    for Asked { request, pod, answer } in batch {
        let verb = request.verb();
        let result = match (request, pod) {
            (Request::Add(sandbox), Some(pod)) => match reconciler.announce(pod, &sandbox) {
                Ok(Some(pod)) => {
                    announced.push((pod, verb, answer));
                    continue;
                }
                Ok(None) => Ok(()),
                Err(error) => Err(error),
            },
            (Request::Check(sandbox), Some(pod)) => reconciler.check(&pod, &sandbox),
            (Request::Add(_) | Request::Check(_), None) => Err(AddError::NotYet),
            (Request::Del { container }, _) => {
                reconciler.delete(&container);
                Ok(())
            }
            (Request::Gc { containers }, _) => {
                reconciler.keep_only(&containers);
                Ok(())
            }
        };
        reply(verb, answer, result);
    }
    if announced.is_empty() {
        return;
    }
    reconciler.sync(Look::Changes, more);
    for (pod, verb, answer) in announced {
        reply(verb, answer, reconciler.admitted(&pod));
    }
}

/// Tells of changes in a directory; a second one while the first is unread adds nothing.
fn watch(dir: &Path, changed: &mpsc::Sender<()>) -> Result<notify::RecommendedWatcher> {
    let changed = changed.clone();
    let mut watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
        // Reading a file is no change, and the agent itself reads them all.
        if event.is_ok_and(|event| !event.kind.is_access()) {
            let _ = changed.try_send(());
        }
    })?;
    watcher
        .watch(dir, notify::RecursiveMode::NonRecursive)
        .with_context(|| format!("cannot watch directory {}", dir.display()))?;
    Ok(watcher)
}
