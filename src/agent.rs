//! The agent: creates the source and the data plane, and runs the event loop.

use std::{
    collections::BTreeSet, net::SocketAddr, path::PathBuf, sync::Arc, thread, time::Duration,
};

use anyhow::Result;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::{mpsc, oneshot},
    task,
    time::{Instant, MissedTickBehavior, interval, sleep, sleep_until},
};
use tracing::{info, warn};

use crate::{
    cni::{
        self, Reply, Request,
        conflist::{self, Installer},
        server::Asked,
    },
    controller::{AddError, Controller, Look, Source},
    dataplane::{self, Dataplane, Pins},
    mesh::mode::PodsWithRules,
    node::{Cgroup, PodNamespaces},
    ops::{check, http, metrics::Metrics},
    problem::Problem,
    service,
    source::{
        kubernetes::{self, ApiServer, Kubernetes, OnUninstall, Removed},
        manifests::Manifests,
    },
    splice,
    watches::Watches,
};

/// The agent's settings from the command line.
#[derive(Debug)]
pub struct Config {
    /// The source of pods.
    pub source: SourceConfig,
    /// The cgroup to attach to; the root by default.
    pub cgroup: Option<PathBuf>,
    /// The directory for pins.
    pub pins: Pins,
    /// The requested mode of splicing.
    pub splice: splice::Mode,
    /// The longest time that a spliced connection's messages bypass TCP without a message by TCP.
    pub splice_refresh: Duration,
    /// The settings of Services, if their addresses are translated.
    pub services: Option<service::Options>,
    /// The mode of pods that have the mesh's own rules and do not name one.
    pub pods_with_rules: PodsWithRules,
    /// The address for health and metrics, if they are served.
    pub http: Option<SocketAddr>,
}

/// The source of pods.
#[derive(Debug)]
pub enum SourceConfig {
    /// A directory of manifests.
    Manifests(PathBuf),
    /// The API server.
    Kubernetes(Box<Cluster>),
}

/// The settings of a node of a cluster.
#[derive(Debug)]
pub struct Cluster {
    /// The access to the API server.
    pub api: kubernetes::Config,
    /// The mount point of the node's procfs.
    pub proc: PathBuf,
    /// The directory where the container runtime mounts network namespaces.
    pub netns_dir: PathBuf,
    /// The CNI plugin's settings, if it is installed.
    pub cni: Option<cni::Config>,
    /// Whether the node's startup taint is removed.
    pub remove_startup_taint: bool,
}

/// The interval of full rounds: a namespace can appear, vanish or change its addresses without a
/// change in the source.
const RESYNC: Duration = Duration::from_secs(3);
/// The time for which the first change after a pause waits for others that were made with it.
const FIRST: Duration = Duration::from_millis(1);
/// The shortest interval between syncs for changes: a burst is one change, after its first.
const SETTLE: Duration = Duration::from_millis(20);
/// The share of its time that the agent spends on changes of the source, one part in this many.
const SHARE: u32 = 10;
/// The longest time that a change waits for that.
const LONGEST: Duration = Duration::from_millis(500);
/// The shortest interval between looks at events about missing listeners: a refused client may
/// retry all the time.
const MISSED: Duration = Duration::from_millis(10);
/// The interval at which the agent retries to remove the startup taint, and at which it checks the
/// taint once it is removed.
const TAINT_RETRY: Duration = Duration::from_secs(2);
/// See [`TAINT_RETRY`].
const TAINT_AGAIN: Duration = Duration::from_secs(60);
/// The maximum of waiting requests of the CNI plugin.
const REQUESTS: usize = 64;
/// The number of descriptors that the agent asks for, and the number that it needs with its pods,
/// connections and requests at once.
const OPEN_FILES: u64 = 65_536;
/// See [`OPEN_FILES`].
const FEW_FILES: u64 = 1024;
/// The time that an exiting agent waits for spliced connections to return to TCP.
const LEAVE: Duration = Duration::from_secs(10);

/// Runs until SIGTERM or SIGINT. The data plane stays in force, unless Sidestep is being
/// uninstalled.
///
/// # Errors
/// If the data plane cannot be installed, the directory of manifests cannot be read at start, or
/// the configuration of the API server cannot be used. A bad pod is not an error: it is logged.
pub fn run(config: &Config) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(serve(config))
}

async fn serve(config: &Config) -> Result<()> {
    let terminate = signal(SignalKind::terminate())?;
    let interrupt = signal(SignalKind::interrupt())?;
    check::privileges()?;
    let cgroup = Cgroup::open(config.cgroup.as_deref());
    if let Ok(cgroup) = &cgroup {
        let whose = if cgroup.is_root() { "of this node" } else { "in it" };
        let on = match config.services {
            Some(_) => "enrolled pods and calls to Services only",
            None => "enrolled pods only",
        };
        info!(
            "attaching BPF programs to {cgroup}: they run for every process {whose} and act on {on}"
        );
    }
    raise_open_files();
    let (changed, changes) = mpsc::channel(1);
    let mut watches = Watches::new(changed.clone());
    let source = match &config.source {
        SourceConfig::Manifests(dir) => {
            let mut manifests = Manifests::new(dir).with_services(config.services.is_some());
            manifests.read()?;
            watches.add(dir);
            Source::Manifests(manifests)
        }
        SourceConfig::Kubernetes(cluster) => {
            let kubernetes = Kubernetes::start(&cluster.api, changed.clone()).await?;
            Source::Kubernetes(
                Box::new(kubernetes),
                PodNamespaces::new(&cluster.proc, &cluster.netns_dir),
            )
        }
    };
    let api = match &source {
        Source::Kubernetes(kubernetes, _) => Some(kubernetes.api().clone()),
        Source::Manifests(_) => None,
    };
    let events = Happenings { terminate, interrupt, changes, watches };
    let done = intercept(config, cgroup, source, events).await;
    if let (Err(error), Some(api)) = (&done, api) {
        api.tell_node(&format!("Sidestep cannot intercept pods on this node: {error:#}")).await;
    }
    done
}

/// Raises the limit of descriptors to the maximum. The descriptors that others can make the agent
/// open are bounded far below that: see `http.rs` and `cni/server.rs`.
fn raise_open_files() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE).and_then(|(soft, hard)| {
        let wanted = hard.min(OPEN_FILES).max(soft);
        setrlimit(Resource::RLIMIT_NOFILE, wanted, hard).map(|()| wanted)
    });
    match raised {
        Ok(limit) if limit < FEW_FILES => {
            warn!(
                limit,
                "the agent's limit of open files is low: raise it (ulimit -n, LimitNOFILE=)"
            );
        }
        Ok(_) => {}
        Err(error) => warn!("cannot raise the agent's limit of open files: {error}"),
    }
}

/// The inputs of the event loop, except the data plane's and the CNI plugin's.
struct Happenings {
    terminate: Signal,
    interrupt: Signal,
    changes: mpsc::Receiver<()>,
    watches: Watches,
}

/// Intercepts the source's pods until the agent is told to exit.
async fn intercept(
    config: &Config,
    cgroup: Result<Cgroup>,
    source: Source,
    happenings: Happenings,
) -> Result<()> {
    let Happenings { mut terminate, mut interrupt, mut changes, mut watches } = happenings;
    let cgroup = cgroup?;
    let pins = &config.pins;
    let (asked, mut requests) = mpsc::channel(REQUESTS);
    let mut installer = None;
    let mut dataplane = Dataplane::load(pins, config.splice_refresh, config.services.is_some())?;
    dataplane.attach(&cgroup)?;
    let events = dataplane.events()?;
    let metrics = Arc::new(Metrics::new(pins, cgroup.id()));
    let controller = Controller::new(source, dataplane, cgroup, Arc::clone(&metrics))?;
    let controller = controller.with_services(config.services.clone());
    let mut controller = controller.with_rules(config.pods_with_rules);
    let adopted = controller.adopted();
    info!(%pins, adopted, "BPF programs attached; interception is in force");

    if let Some(address) = config.http {
        let address = http::serve(address, Arc::clone(&metrics)).await?;
        info!(%address, "health and metrics");
    }
    let cni = match &config.source {
        SourceConfig::Kubernetes(cluster) => cluster.cni.as_ref(),
        SourceConfig::Manifests(_) => None,
    };
    if let (Some(cni), Source::Kubernetes(kubernetes, _)) = (cni, controller.source()) {
        let found = Installer::new(cni);
        found.install_plugin()?;
        cni::server::serve(&cni.socket, kubernetes.api().clone(), asked.clone())?;
        watches.add(&cni.conf_dir);
        installer = Some(found);
    }
    if let (SourceConfig::Kubernetes(cluster), Source::Kubernetes(kubernetes, _)) =
        (&config.source, controller.source())
        && cluster.remove_startup_taint
    {
        task::spawn(remove_startup_taint(kubernetes.api().clone(), Arc::clone(&metrics)));
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
    // The last sync for changes: when it ended, and how long it took.
    let (mut synced, mut took) = (Instant::now(), Duration::ZERO);
    let pause = sleep(Duration::ZERO);
    tokio::pin!(pause);
    let mut pausing = false;
    let round = sleep(Duration::ZERO);
    tokio::pin!(round);
    loop {
        metrics.turned();
        let waited_for = controller.waited_for();
        if let Some(at) = waited_for {
            round.as_mut().reset(at.into());
        }
        tokio::select! {
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            () = &mut pause, if pausing => pausing = false,
            seen = events.next(), if !pausing => {
                let seen = seen?;
                if !seen.missed.is_empty() {
                    pause.as_mut().reset(Instant::now() + MISSED);
                    pausing = true;
                }
                controller.find_listeners(&seen.missed);
                controller.reset(&seen.unread);
                if seen.bulk {
                    sweep.as_mut().reset(controller.take_bulk_out().into());
                }
            }
            Some(first) = requests.recv() => {
                // Requests that wait in the meantime share a sync with it.
                let mut batch = vec![first];
                while let Ok(asked) = requests.try_recv() {
                    batch.push(asked);
                }
                answer(&mut controller, batch, &metrics, &more);
                // Clients of the socket, and the watches, get their turn.
                task::yield_now().await;
            }
            // A sandbox does not wait for the interval.
            Some(()) = changes.recv(), if !settling => {
                let wait = LONGEST.min(took * (SHARE - 1)).max(SETTLE);
                settle.as_mut().reset((synced + wait).max(Instant::now() + FIRST));
                settling = true;
            }
            () = &mut settle, if settling => {
                settling = false;
                while changes.try_recv().is_ok() {}
                more = look_after(&mut watches, installer.as_mut(), &metrics);
                let start = Instant::now();
                controller.sync(Look::Source, &more);
                synced = Instant::now();
                took = synced - start;
            }
            () = &mut round, if waited_for.is_some() => controller.sync(Look::Source, &more),
            Ok(found) = &mut tried, if !tried.is_terminated() => {
                controller.splice(config.splice, &found);
                controller.sync(Look::Changes, &more);
            }
            () = &mut sweep => sweep.as_mut().reset(controller.sweep_splices().into()),
            _ = resync.tick() => {
                more = look_after(&mut watches, installer.as_mut(), &metrics);
                controller.sync(Look::Everything, &more);
            }
        }
    }
    let removed = match controller.source() {
        Source::Kubernetes(kubernetes, _) => kubernetes.api().removed().await,
        Source::Manifests(_) => None,
    };
    let Some(removed) = removed else {
        info!("shutting down; BPF programs stay attached (`sidestep unload` removes them)");
        return Ok(());
    };
    // The plugin first: no new pod should wait for an agent that is gone.
    if let Some(cni) = cni {
        conflist::uninstall(&cni.conf_dir, &cni.bin_dir, &cni.socket)?;
    }
    match removed {
        Removed::Uninstalled(why) if keeps_pods(&config.source) => {
            // Pods that have ended in the meantime are forgotten.
            controller.sync(Look::Everything, &BTreeSet::new());
            let living = controller.living();
            if living > 0 {
                leave(&mut controller, pins).await;
                warn!(
                    "{why}: {living} mesh pods stay intercepted until they terminate (`sidestep \
                     unload` ends that)"
                );
                return Ok(());
            }
            info!(
                "{why}, and no intercepted pods are left: removing all BPF programs, maps and \
                   pins"
            );
        }
        Removed::Uninstalled(why) | Removed::TakenOut(why) => {
            info!("{why}: removing all BPF programs, maps and pins");
        }
    }
    info!("unloaded: {}", dataplane::unload(pins)?);
    Ok(())
}

/// Removes the startup taint from the node whenever pods can be intercepted there. A node that has
/// registered again may have it again.
async fn remove_startup_taint(api: ApiServer, metrics: Arc<Metrics>) {
    loop {
        let done = metrics.can_intercept() && api.remove_startup_taint().await;
        sleep(if done { TAINT_AGAIN } else { TAINT_RETRY }).await;
    }
}

/// Whether mesh pods stay intercepted when Sidestep is uninstalled.
fn keeps_pods(source: &SourceConfig) -> bool {
    match source {
        SourceConfig::Kubernetes(cluster) => cluster.api.on_uninstall == OnUninstall::Keep,
        SourceConfig::Manifests(_) => true,
    }
}

/// Leaves the data plane without an agent for good. Spliced connections need an agent when they
/// end, so they return to TCP first.
async fn leave(controller: &mut Controller, pins: &Pins) {
    controller.splice(splice::Mode::Off, &Ok(Vec::new()));
    let start = Instant::now();
    let is_splicing = || dataplane::spliced(pins).is_ok_and(|(_, sockets)| sockets > 0);
    while is_splicing() && start.elapsed() < LEAVE {
        sleep_until(controller.sweep_splices().into()).await;
    }
    if let Source::Kubernetes(kubernetes, _) = controller.source() {
        kubernetes.send_events().await;
    }
}

/// Tests this kernel's behaviour towards spliced sockets. No pod waits for the result: until it is
/// known, an earlier agent's decision stands, or nothing is spliced.
fn try_splices(mode: splice::Mode) -> oneshot::Receiver<splice::Found> {
    let (tell, told) = oneshot::channel();
    thread::spawn(move || {
        // No self-test is needed if nothing is to be spliced.
        let found = match mode {
            splice::Mode::Off => Ok(Vec::new()),
            _ => dataplane::self_test().map_err(|error| format!("{error:#}")),
        };
        let _ = tell.send(found);
    });
    told
}

/// Maintains the watches of directories and the CNI configuration, and returns their problems.
fn look_after(
    watches: &mut Watches,
    installer: Option<&mut Installer>,
    metrics: &Metrics,
) -> BTreeSet<Problem> {
    let mut problems = watches.ensure();
    let wrong = installer.and_then(|installer| installer.ensure().err());
    metrics.chained(wrong.is_none());
    problems.extend(wrong.map(|error| Problem::node(format!("{error:#}"))));
    problems
}

/// Answers the CNI plugin.
fn answer(
    controller: &mut Controller,
    batch: Vec<Asked>,
    metrics: &Metrics,
    more: &BTreeSet<Problem>,
) {
    let reply = |verb, answer: oneshot::Sender<Reply>, result: Result<(), AddError>| {
        metrics.cni(verb, result.is_ok());
        let reply = match result {
            Ok(()) => Reply::default(),
            Err(error) => Reply::refusal(error.to_string(), error == AddError::NotYet),
        };
        if answer.send(reply).is_err() {
            warn!("the CNI plugin disconnected before it was answered");
        }
    };
    let mut announced = Vec::new();
    for Asked { request, pod, answer } in batch {
        let verb = request.verb();
        let result = match (request, pod) {
            (Request::Add(sandbox), Some(pod)) => match controller.announce(pod, &sandbox) {
                Ok(Some(pod)) => {
                    announced.push((pod, verb, answer));
                    continue;
                }
                Ok(None) => Ok(()),
                Err(error) => Err(error),
            },
            (Request::Check(sandbox), Some(pod)) => controller.check(&pod, &sandbox),
            (Request::Add(_) | Request::Check(_), None) => Ok(()),
            (Request::Problems, _) => {
                let problems = Some(controller.problems());
                let left_alone = Some(controller.left_alone());
                let _ = answer.send(Reply { problems, left_alone, ..Reply::default() });
                continue;
            }
            (Request::Services, _) => {
                let services = controller.wanted_services();
                let _ = answer.send(Reply { services, ..Reply::default() });
                continue;
            }
            (Request::Del { container }, _) => {
                controller.delete(&container);
                Ok(())
            }
            (Request::Gc { containers }, _) => {
                controller.keep_only(&containers);
                Ok(())
            }
        };
        reply(verb, answer, result);
    }
    if announced.is_empty() {
        return;
    }
    controller.sync(Look::Changes, more);
    for (pod, verb, answer) in announced {
        reply(verb, answer, controller.admitted(&pod));
    }
}
