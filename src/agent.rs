//! The agent: wires the source, the pure core and the kernel together, and keeps them in step.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{Ipv4Addr, Ipv6Addr},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use k8s_openapi::api::core::v1::Pod;
use notify::Watcher;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::mpsc,
    time::{MissedTickBehavior, interval},
};
use tracing::{debug, error, info, warn};

use crate::{
    bpf::{self, Dataplane},
    bpffs,
    cgroup::Cgroup,
    check,
    desired::{Candidate, Desired, NetnsFacts, PodRow, desired},
    facts::{self, PodFacts},
    netns::{self, Netns},
    source::manifests::{Manifests, NETNS_ANNOTATION},
};

/// What the agent was told on the command line.
#[derive(Debug)]
pub struct Config {
    /// Directory of pod manifests.
    pub pods: PathBuf,
    /// Cgroup to attach to; none: the root.
    pub cgroup: Option<PathBuf>,
    /// Directory for pins.
    pub bpffs: PathBuf,
}

/// A namespace can appear, go or change its addresses with no change in the manifests.
const RESYNC: Duration = Duration::from_secs(3);
/// A burst of file events is one change.
const SETTLE: Duration = Duration::from_millis(20);
/// A pod whose proxy does not listen is looked at this often at most.
const SEARCH: Duration = Duration::from_millis(100);

/// Runs until SIGTERM or SIGINT, and leaves the data plane in force.
///
/// # Errors
/// Where the data plane can't be installed, or the directory of manifests can't be read at
/// start. A bad pod is no error: it is logged.
pub fn run(config: &Config) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(serve(config))
}

async fn serve(config: &Config) -> Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    check::privileges()?;
    let cgroup = Cgroup::open(config.cgroup.as_deref())?;
    let pins = bpffs::pins(&config.bpffs)?;
    let mut source = Manifests::new(&config.pods);
    source.read()?;
    let _lock = pins.lock()?;
    let (_watcher, mut changes) = watch(&config.pods)?;

    let mut dataplane = Dataplane::load(&pins)?;
    dataplane.attach(&cgroup)?;
    let events = dataplane.events()?;
    let records = dataplane.records()?;
    info!(cgroup = %cgroup, bpffs = %config.bpffs.display(), adopted = records.len(), "in force");

    let mut agent = Agent {
        dataplane,
        host: netns::host_cookies()?,
        owners: records.into_iter().map(|(cookie, record)| (cookie, record.pod)).collect(),
        applied: None,
        pods: BTreeMap::new(),
        searched: BTreeMap::new(),
        problems: BTreeSet::new(),
    };
    let mut resync = interval(RESYNC);
    resync.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            refused = events.next() => agent.find_listeners(&refused?),
            Some(()) = changes.recv() => {
                tokio::time::sleep(SETTLE).await;
                while changes.try_recv().is_ok() {}
                agent.sync(&mut source);
            }
            _ = resync.tick() => agent.sync(&mut source),
        }
    }
    info!("ends; the data plane stays in force (`sidestep unload` takes it away)");
    Ok(())
}

/// Tells of changes in a directory; a second one while the first is unread adds nothing.
fn watch(dir: &Path) -> Result<(notify::RecommendedWatcher, mpsc::Receiver<()>)> {
    let (changed, changes) = mpsc::channel(1);
    let mut watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
        // Reading a file is no change, and the agent itself reads them all.
        if event.is_ok_and(|event| !event.kind.is_access()) {
            let _ = changed.try_send(());
        }
    })?;
    watcher
        .watch(dir, notify::RecursiveMode::NonRecursive)
        .with_context(|| format!("cannot watch directory {}", dir.display()))?;
    Ok((watcher, changes))
}

/// An enrolled pod, as the agent last left it.
struct Enrolled {
    netns: NetnsFacts,
    row: PodRow,
}

/// The listeners that connections may have to be handed to: inbound, outbound, DNS.
fn steered_ports(row: &PodRow) -> [Option<u16>; 3] {
    let dns = Some(row.dns_port).filter(|port| *port != 0);
    [Some(row.in_port), Some(row.out_port).filter(|_| row.out_loopback), dns]
}

struct Agent {
    dataplane: Dataplane,
    host: BTreeSet<u64>,
    /// Which pod has which namespace, as the kernel's records say.
    owners: BTreeMap<u64, String>,
    /// What the maps hold, once this agent has written them, and whose entries were kept beside.
    applied: Option<(Desired, BTreeSet<u64>)>,
    /// By namespace cookie; holds only pods whose enrolment was completed by this agent.
    pods: BTreeMap<u64, Enrolled>,
    /// When a pod's listeners were last looked for.
    searched: BTreeMap<(u64, u16), Instant>,
    /// What was wrong at the last sync: said once, not every time.
    problems: BTreeSet<String>,
}

impl Agent {
    /// Brings the kernel in step with the source. Never fails: what can't be done is logged, and
    /// tried again at the next sync.
    fn sync(&mut self, source: &mut Manifests) {
        let mut problems = BTreeSet::new();
        if let Err(error) = self.try_sync(source, &mut problems) {
            problems.insert(format!("{error:#}"));
        }
        for problem in problems.difference(&self.problems) {
            error!("{problem}");
        }
        for problem in self.problems.difference(&problems) {
            info!("solved: {problem}");
        }
        self.problems = problems;
    }

    fn try_sync(&mut self, source: &mut Manifests, problems: &mut BTreeSet<String>) -> Result<()> {
        let snapshot = source.read()?;
        for (path, error) in &snapshot.errors {
            problems.insert(format!("{}: {error}", path.display()));
        }
        let mut seen: BTreeMap<String, PathBuf> = BTreeMap::new();
        let mut candidates = Vec::new();
        for found in &snapshot.pods {
            let origin = found.origin.display();
            let facts = match self.facts(&found.pod, problems) {
                Ok(Some(facts)) => facts,
                Ok(None) => continue,
                Err(error) => {
                    let name = facts::pod_name(&found.pod).unwrap_or_else(|_| "?".into());
                    problems.insert(format!("{origin}: pod {name}: {error:#}"));
                    continue;
                }
            };
            if let Some(first) = seen.get(&facts.name) {
                let first = first.display();
                problems.insert(format!("{origin}: pod {}: already in {first}", facts.name));
                continue;
            }
            seen.insert(facts.name.clone(), found.origin.clone());
            match self.netns(&found.pod, &facts) {
                Ok(netns) => candidates.push(Candidate { facts, netns }),
                Err(error) => {
                    problems.insert(format!("{origin}: pod {}: {error:#}", facts.name));
                }
            }
        }
        self.enrol(candidates, !snapshot.errors.is_empty(), problems)
    }

    /// A pod's facts, where it is in a mesh; a policy that can't be read is a problem, but no
    /// error.
    fn facts(&self, pod: &Pod, problems: &mut BTreeSet<String>) -> Result<Option<PodFacts>> {
        let Some(parsed) = facts::facts(pod)? else {
            return Ok(None);
        };
        if let Some(error) = parsed.policy_error {
            problems.insert(format!(
                "pod {}: everything is captured until this is mended: {error}",
                parsed.facts.name
            ));
        }
        Ok(Some(parsed.facts))
    }

    /// A pod's namespace, by its annotation. A path that is gone says nothing about the
    /// namespace: a terminating pod is intercepted for as long as that lives.
    fn netns(&self, pod: &Pod, facts: &PodFacts) -> Result<NetnsFacts> {
        let annotations = pod.metadata.annotations.as_ref();
        let path = annotations.and_then(|all| all.get(NETNS_ANNOTATION)).with_context(|| {
            format!("annotation {NETNS_ANNOTATION} is missing: it names the network namespace")
        })?;
        let found = Netns::open(Path::new(path)).and_then(|netns| {
            let mut found = netns.facts()?;
            if !facts.policy.exclude_interfaces.is_empty() {
                found.routes = netns.routes()?;
            }
            Ok(found)
        });
        let invalid = || format!("annotation {NETNS_ANNOTATION}: {path:?}");
        if found.is_ok() {
            return found.with_context(invalid);
        }
        let owned = self.owners.iter().find(|(_, owner)| **owner == facts.name);
        match owned.filter(|(cookie, _)| self.dataplane.netns_lives(**cookie)) {
            Some((cookie, _)) => Ok(self.pods.get(cookie).map_or_else(
                || NetnsFacts {
                    path: path.into(),
                    cookie: *cookie,
                    addresses: Vec::new(),
                    interfaces: BTreeMap::new(),
                    routes: Vec::new(),
                },
                |pod| pod.netns.clone(),
            )),
            None => found.with_context(invalid),
        }
    }

    fn enrol(
        &mut self,
        mut candidates: Vec<Candidate>,
        unreadable: bool,
        problems: &mut BTreeSet<String>,
    ) -> Result<()> {
        let limits = self.dataplane.limits();
        let mut goal = desired(&candidates, &self.host, &self.owners, &limits);
        // A pod whose namespace can't be prepared is not enrolled: its connections would get
        // lost. What it had before stays.
        let unprepared = self.prepare(&goal, problems);
        if !unprepared.is_empty() {
            candidates.retain(|candidate| !unprepared.contains(&candidate.netns.cookie));
            goal = desired(&candidates, &self.host, &self.owners, &limits);
        }
        for (pod, refusal) in &goal.refused {
            problems.insert(format!("pod {pod}: {refusal}"));
        }
        // A pod that an earlier agent enrolled, and that may be in what can't be read now.
        let keep: BTreeSet<u64> = self
            .owners
            .keys()
            .filter(|cookie| unreadable && !self.pods.contains_key(cookie))
            .filter(|cookie| {
                !goal.pods.contains_key(cookie) && self.dataplane.netns_lives(**cookie)
            })
            .copied()
            .collect();
        let state = (goal, keep);
        if self.applied.as_ref() != Some(&state) {
            // Whatever fails half-way is compared with the maps themselves next time.
            self.applied = None;
            let (written, deleted) = self.dataplane.apply(&state.0, &state.1)?;
            debug!(written, deleted, "maps");
            self.applied = Some(state.clone());
        }
        let (goal, keep) = state;
        self.link(&goal, &candidates, problems);
        for (cookie, owner) in &self.owners {
            if goal.pods.contains_key(cookie) || keep.contains(cookie) {
                continue;
            }
            info!(pod = %owner, "no longer enrolled");
            if let Some(pod) = self.pods.get(cookie) {
                // A namespace that is gone took its filter along.
                let _ = Netns::open(&pod.netns.path).and_then(|netns| bpf::detach_dns(&netns));
            }
        }
        self.owners.retain(|cookie, _| keep.contains(cookie));
        let enrolled = goal.pods.iter();
        self.owners.extend(enrolled.map(|(cookie, (_, record))| (*cookie, record.pod.clone())));
        self.pods.retain(|cookie, _| goal.pods.contains_key(cookie));
        self.searched.retain(|(cookie, _), _| goal.pods.contains_key(cookie));
        Ok(())
    }

    /// Prepares the namespaces of pods that are new or whose addresses changed; the cookies of
    /// those where that failed.
    fn prepare(&self, goal: &Desired, problems: &mut BTreeSet<String>) -> BTreeSet<u64> {
        let mut failed = BTreeSet::new();
        for (cookie, (row, record)) in &goal.pods {
            let addresses =
                |row: &PodRow| -> (Option<Ipv4Addr>, Option<Ipv6Addr>) { (row.ip4, row.ip6) };
            if self.pods.get(cookie).is_some_and(|p| addresses(&p.row) == addresses(row)) {
                continue;
            }
            let done = Netns::open(&record.netns).and_then(|ns| ns.prepare(row.ip4, row.ip6));
            if let Err(error) = done
                && !self.dataplane.netns_lives(*cookie)
            {
                problems.insert(format!("pod {}: {error:#}", record.pod));
                failed.insert(*cookie);
            }
        }
        failed
    }

    /// Links the inbound program of this build to every pod that this agent has not done yet.
    fn link(&mut self, goal: &Desired, candidates: &[Candidate], problems: &mut BTreeSet<String>) {
        for candidate in candidates {
            let cookie = candidate.netns.cookie;
            let Some((row, record)) = goal.pods.get(&cookie) else {
                continue;
            };
            if record.pod != candidate.facts.name {
                continue;
            }
            let enrolled = Enrolled { netns: candidate.netns.clone(), row: row.clone() };
            let known = self.pods.get(&cookie);
            if known.is_some_and(|known| steered_ports(&known.row) == steered_ports(row)) {
                self.pods.insert(cookie, enrolled);
                continue;
            }
            let linked = Netns::open(&record.netns).and_then(|netns| {
                for port in steered_ports(row).into_iter().flatten() {
                    self.dataplane.find_listeners(cookie, &netns, port)?;
                }
                if row.dns_port == 0 {
                    bpf::detach_dns(&netns)?;
                } else {
                    self.dataplane.attach_dns(&netns)?;
                }
                self.dataplane.attach_inbound(cookie, &netns)
            });
            match linked {
                Ok(()) => {
                    info!(pod = %record.pod, mesh = candidate.facts.mesh.name, netns = %record.netns.display(), "enrolled");
                    self.pods.insert(cookie, enrolled);
                }
                Err(_) if self.dataplane.netns_lives(cookie) && !record.netns.exists() => {}
                Err(error) => {
                    problems.insert(format!(
                        "pod {}: INBOUND IS NOT INTERCEPTED: {error:#}",
                        record.pod
                    ));
                }
            }
        }
    }

    /// Looks for listeners that were missed when a connection came.
    fn find_listeners(&mut self, missed: &BTreeSet<(u64, u16)>) {
        let now = Instant::now();
        for missing @ (cookie, port) in missed {
            let Some(pod) = self.pods.get(cookie) else {
                continue;
            };
            let last = self.searched.get(missing);
            if last.is_some_and(|last| now.duration_since(*last) < SEARCH) {
                continue;
            }
            self.searched.insert(*missing, now);
            let found = Netns::open(&pod.netns.path)
                .and_then(|ns| self.dataplane.find_listeners(*cookie, &ns, *port));
            if let Err(error) = found {
                warn!(netns = %pod.netns.path.display(), "cannot look for the proxy's listeners: {error:#}");
            }
        }
    }
}
