//! Brings the kernel in step with what the source knows: facts -> desired -> diff -> maps.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::IpAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use k8s_openapi::api::core::v1::Pod;
use thiserror::Error;
use tracing::{debug, error, info, warn};

use crate::{
    bpf::{Ahead, Dataplane, Repair},
    cni::Sandbox,
    mesh::{
        self,
        annotations::FactsError,
        desired::{self, Candidate, Desired, Planner},
        entries::{PodEntries, PodRow, Record},
        facts::{self, PodFacts},
        policy::Policy,
    },
    metrics::{Fill, Metrics},
    node::{self, ADDRESSES, Cgroup, LO, Lo, Netns, NetnsCookie, NetnsFacts, Place, Places},
    pace::{Backoff, Pace},
    problem::{Problem, Reason},
    reset::Reset,
    source::{
        Snapshot, SourcePod,
        kubernetes::Kubernetes,
        manifests::{Manifests, NETNS_ANNOTATION},
    },
    splice::{self, Leg},
};

/// How long the pods of an agent with other maps may be missing.
const TAKE_OVER: Duration = Duration::from_secs(15);
/// A pod that starts or ends may have no process for a moment, or its object may lag behind: that
/// none is found is said at this look at everything.
const MISSES: u32 = 2;
/// The agent spends one part of so many on looking at connections to splice, at most.
const SWEEP_SHARE: u32 = 20;
/// How often it does so.
const SWEEP: Duration = Duration::from_millis(100);
/// How soon it looks again at those that are on their way out of the map; then twice that, and so
/// on: a reader that has stopped keeps its connection there.
const LEAVING: Duration = Duration::from_millis(1);
/// A pod whose proxy does not listen is looked at this often at most, and ever more seldom,
const SEARCH: Duration = Duration::from_millis(100);
/// to this.
const SEARCH_AGAIN: Duration = Duration::from_secs(3);
/// How many changes of a pod are taken in at once,
const CHANGES: u32 = 4;
/// and how soon there is room for one more; what is above that waits for the next such round.
const CHANGES_AGAIN: Duration = Duration::from_secs(10);
/// See [`CHANGES_AGAIN`].
const ROUND: Duration = Duration::from_secs(1);

/// An enrolled pod, as the agent last left it.
struct Enrolled {
    netns: Arc<NetnsFacts>,
    entries: Arc<PodEntries>,
    /// Devices with the filter for spliced connections, by index.
    filtered: Vec<u32>,
}

impl Enrolled {
    /// The devices that spliced connections have on these legs: apps and their sidecars talk over
    /// lo, sidecars with each other over the others.
    fn spliced_devices(&self, legs: &BTreeMap<Leg, bool>) -> Vec<u32> {
        let leg = |device| if device == LO { Leg::App } else { Leg::Sidecar };
        let devices = self.netns.interfaces.values().copied();
        devices
            .filter(|device| self.entries.row.splice && legs.get(&leg(*device)) == Some(&true))
            .collect()
    }
}

/// The listeners that connections are handed to: inbound, outbound, DNS.
fn steered_ports(row: &PodRow) -> [Option<u16>; 3] {
    let dns = Some(row.dns_port).filter(|port| *port != 0);
    [Some(row.in_port), Some(row.out_port), dns]
}

/// What listeners may be bound to that connections are handed to.
fn redirected_to(pod: &PodEntries) -> BTreeSet<IpAddr> {
    let fixed = node::ANY.into_iter().chain(node::LOCALHOST);
    fixed.chain(pod.device_addrs.values().copied()).collect()
}

/// Where pods come from, and what tells their network namespaces.
pub enum Source {
    /// A directory; an annotation names the namespace.
    Manifests(Manifests),
    /// The API server; the container runtime or the pod's processes show the namespace.
    Kubernetes(Box<Kubernetes>, Places),
}

/// What is to be looked at again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Look {
    /// What the source says, where that is new.
    Source,
    /// What is new to the agent.
    Changes,
    /// Every pod's namespace, which may have changed its addresses or be gone.
    Everything,
}

/// The agent's hold on the data plane.
pub struct Reconciler {
    source: Source,
    dataplane: Dataplane,
    cgroup: Cgroup,
    metrics: Arc<Metrics>,
    host: BTreeSet<NetnsCookie>,
    /// Which pod has which namespace, as the kernel's records say.
    owners: BTreeMap<NetnsCookie, Record>,
    /// What the maps hold, once this agent has written them, and whose entries were kept beside.
    applied: Option<(Desired, BTreeSet<NetnsCookie>)>,
    /// What the maps should hold, pod by pod, as it was last reckoned.
    planner: Planner,
    /// By namespace cookie; holds only pods whose enrollment was completed by this agent.
    pods: BTreeMap<NetnsCookie, Enrolled>,
    /// When a pod's listeners may be looked for.
    searched: BTreeMap<(NetnsCookie, u16), Backoff>,
    /// The pods' objects as they were last read.
    read: BTreeMap<Key, Read>,
    /// When pods that change all the time have their turn.
    round: Instant,
    /// Some of them wait for it.
    is_waited_for: bool,
    /// What else the last sync went by.
    beside: Option<Beside>,
    /// How long the last sync took.
    took: Duration,
    /// Which legs are spliced; empty: that is not known yet.
    legs: BTreeMap<Leg, bool>,
    /// When connections to splice may be looked at again.
    next_sweep: Instant,
    /// How long to wait if some are leaving still.
    leaving: Duration,
    /// Since when an agent with other maps could be taken over from.
    taking_over: Option<Instant>,
    /// What the namespaces said when they were last visited, by the pod's uid.
    visited: BTreeMap<String, Arc<NetnsFacts>>,
    /// What the pods' lo had when they were last visited or prepared.
    lo: BTreeMap<NetnsCookie, Lo>,
    /// Pods whose namespace was looked for in vain, by uid; at how many looks at everything.
    missing: BTreeMap<String, u32>,
    /// Pods whose processes do not show their namespace, by uid, and why.
    disputed: BTreeMap<String, String>,
    /// Devices where dialled ports are noted, by the namespace's cookie.
    noted: BTreeMap<NetnsCookie, Vec<u32>>,
    /// How many packets the pods' namespaces have forwarded, by cookie.
    forwarded: BTreeMap<NetnsCookie, u64>,
    /// Others' programs that come before Sidestep's.
    ahead: BTreeSet<Problem>,
    /// What was not in force at the last look at everything.
    repaired: BTreeSet<Problem>,
    /// What was wrong at the last sync: said once, not every time.
    problems: BTreeSet<Problem>,
}

impl Reconciler {
    /// Takes over what the kernel holds.
    ///
    /// # Errors
    /// Where the kernel's records or the node's own namespace can't be read.
    pub fn new(
        mut source: Source,
        dataplane: Dataplane,
        cgroup: Cgroup,
        metrics: Arc<Metrics>,
    ) -> Result<Self> {
        let owners = dataplane.records()?;
        if let Source::Kubernetes(_, places) = &mut source {
            for (cookie, record) in &owners {
                let path = record.netns.clone();
                places.remember(&record.uid, Place { path, cookie: *cookie, container: None });
            }
        }
        Ok(Self {
            source,
            dataplane,
            cgroup,
            metrics,
            host: node::host_cookies()?,
            owners,
            applied: None,
            planner: Planner::default(),
            pods: BTreeMap::new(),
            searched: BTreeMap::new(),
            read: BTreeMap::new(),
            round: Instant::now(),
            is_waited_for: false,
            beside: None,
            took: Duration::ZERO,
            legs: BTreeMap::new(),
            next_sweep: Instant::now(),
            leaving: LEAVING,
            taking_over: None,
            visited: BTreeMap::new(),
            lo: BTreeMap::new(),
            missing: BTreeMap::new(),
            disputed: BTreeMap::new(),
            noted: BTreeMap::new(),
            forwarded: BTreeMap::new(),
            ahead: BTreeSet::new(),
            repaired: BTreeSet::new(),
            problems: BTreeSet::new(),
        })
    }

    /// How many pods an earlier agent left.
    pub fn adopted(&self) -> usize {
        self.owners.len()
    }

    /// What the hooks are attached to.
    pub fn cgroup(&self) -> &Cgroup {
        &self.cgroup
    }

    /// The source.
    pub fn source(&mut self) -> &mut Source {
        &mut self.source
    }

    /// Brings the kernel in step with the source; `more` is what else is wrong on this node.
    /// Never fails: what can't be done is logged, and tried again at the next sync.
    pub fn sync(&mut self, look: Look, more: &BTreeSet<Problem>) {
        let start = Instant::now();
        let mut problems = more.clone();
        // A spliced socket may have begun to block: nothing but a look tells.
        if look == Look::Everything
            && let Err(error) = self.dataplane.want_sweep(true)
        {
            problems.insert(Problem::node(format!("{error:#}")));
        }
        if look == Look::Everything {
            self.repaired = self.repair();
        }
        problems.extend(self.repaired.iter().cloned());
        let synced = self.try_sync(look, &mut problems);
        self.took = start.elapsed();
        match synced {
            Ok(Synced::Unchanged) => return,
            Ok(Synced::Done) => self.metrics.synced(self.took),
            Ok(Synced::NotYet) => {}
            Err(error) => {
                self.beside = None;
                problems.insert(Problem::node(format!("{error:#}")));
            }
        }
        for problem in problems.difference(&self.problems) {
            error!("{problem}");
            if let Source::Kubernetes(kubernetes, _) = &self.source {
                kubernetes.event(problem);
            }
        }
        for problem in self.problems.difference(&problems) {
            info!("resolved: {problem}");
        }
        self.problems = problems;
        self.report();
    }

    /// Looks in the kernel whether what this agent and those before it put in force is in force, and
    /// puts back what is not; what that was.
    fn repair(&mut self) -> BTreeSet<Problem> {
        let mut found = BTreeSet::new();
        let mut broken = None;
        for repair in self.dataplane.repair(&self.cgroup) {
            let problem = self.repaired(&repair, Reason::Node, None);
            if repair.done.is_err() {
                broken.get_or_insert_with(|| problem.text.clone());
            }
            found.insert(problem);
        }
        self.metrics.broken(broken);
        for (cookie, owner) in &self.owners {
            let inbound = self.dataplane.repair_inbound(*cookie, &owner.netns);
            let filters = self.pods.get(cookie).map(|pod| {
                let devices = pod.netns.interfaces.values();
                let devices = devices.filter(|device| pod.filtered.contains(device));
                let devices: Vec<u32> = devices.copied().collect();
                let dns = pod.entries.row.dns_port != 0;
                let path = &pod.netns.path;
                let mut filters = self.dataplane.repair_filters(*cookie, path, dns, &devices);
                let noted = pod.netns.interfaces.values();
                let noted: Vec<u32> =
                    noted.copied().filter(|device| self.notes(*cookie, *device)).collect();
                filters.extend(self.dataplane.repair_dialled(*cookie, path, &noted));
                filters
            });
            for (repair, reason) in inbound
                .into_iter()
                .map(|repair| (repair, Reason::InboundNotIntercepted))
                .chain(filters.into_iter().flatten().map(|one| (one, Reason::NetworkNamespace)))
            {
                found.insert(self.repaired(&repair, reason, Some(owner)));
            }
        }
        found
    }

    /// What was not in force, as a problem: of this reason where it could not be put back.
    fn repaired(&self, repair: &Repair, reason: Reason, owner: Option<&Record>) -> Problem {
        let (reason, text) = match &repair.done {
            Ok(()) => {
                self.metrics.repaired(repair.what);
                (Reason::Repaired, format!("{}: Sidestep restored it", repair.text))
            }
            Err(error) => {
                (reason, format!("{}, and Sidestep cannot restore it: {error:#}", repair.text))
            }
        };
        match owner {
            Some(owner) => problem(reason, owner, &text),
            None => Problem { reason, pod: None, text },
        }
    }

    /// Decides which legs are spliced, given what the self-test found.
    pub fn splice(&mut self, mode: splice::Mode, found: &splice::Found) {
        let states = splice::decide(mode, found);
        for (leg, state) in Leg::ALL.iter().zip(&states) {
            info!(leg = leg.name(), on = state.on, why = state.why, "splice");
            self.legs.insert(*leg, state.on);
        }
        if let Err(error) = self.dataplane.set_legs(&states) {
            error!("cannot set which legs are spliced: {error:#}");
        }
    }

    /// A spliced connection is better off without.
    pub fn take_bulk_out(&mut self) -> Instant {
        self.leaving = LEAVING;
        self.sweep_splices()
    }

    /// Splices connections that have settled, where there are any. Says when to do so again.
    pub fn sweep_splices(&mut self) -> Instant {
        let start = Instant::now();
        if start < self.next_sweep {
            return self.next_sweep;
        }
        let mut wait = SWEEP;
        if self.dataplane.wants_sweep() {
            let swept = self.dataplane.sweep();
            let complain = |error: &_| warn!("cannot look at connections to splice: {error:#}");
            let unfinished = swept.inspect_err(complain).unwrap_or_default();
            if unfinished.leaving {
                wait = self.leaving;
                self.leaving = SWEEP.min(self.leaving * 2);
            } else {
                self.leaving = LEAVING;
            }
            self.wake_writers(&unfinished.stuck);
        }
        let end = Instant::now();
        let spent = (end - start) * SWEEP_SHARE;
        // An event may ask for it before.
        self.next_sweep = end + spent;
        end + spent.max(wait)
    }

    /// A namespace with spliced connections: of a pod, or of one that has left. Where a process
    /// leads to it, that of an enrolled pod is the younger one.
    fn spliced(&self, cookie: NetnsCookie) -> Result<Netns> {
        match self.pods.get(&cookie) {
            Some(pod) => Netns::open_as(&pod.netns.path, cookie),
            None => self.dataplane.filtered(cookie),
        }
    }

    /// Wakes writers in these namespaces.
    fn wake_writers(&self, cookies: &BTreeSet<NetnsCookie>) {
        for cookie in cookies {
            let netns = self.spliced(*cookie);
            if let Err(error) = netns.and_then(|netns| self.dataplane.wake_writers(&netns)) {
                warn!(cookie = cookie.0, "cannot wake writers: {error:#}");
            }
        }
    }

    /// Resets connections that were closed with unread bytes; by the namespace of that end.
    pub fn reset(&self, unread: &BTreeMap<NetnsCookie, Vec<Reset>>) {
        for (cookie, resets) in unread {
            let complain = |error| {
                warn!(
                    cookie = cookie.0,
                    "cannot reset a connection that was \
                                                             closed with unread data: {error:#}"
                )
            };
            let send = || resets.iter().filter_map(|reset| reset.send().err()).for_each(complain);
            let netns = self.spliced(*cookie);
            if let Err(error) = netns.and_then(|netns| netns.inside(send)) {
                complain(error);
            }
        }
    }

    /// Says how things stand to whoever asks the metrics.
    fn report(&self) {
        let meshes = self.pods.values().map(|pod| pod.entries.row.mesh);
        let fills = self.applied.as_ref().map(|(goal, _)| {
            let limits = self.dataplane.limits();
            Fill::all(goal, &limits)
        });
        let api = match &self.source {
            Source::Kubernetes(kubernetes, _) => kubernetes.errors(),
            Source::Manifests(_) => BTreeMap::new(),
        };
        self.metrics.set(meshes, &self.problems, &fills.unwrap_or_default(), &api);
    }

    /// How long the last sync took.
    pub fn took(&self) -> Duration {
        self.took
    }

    /// When a pod that changes all the time has its turn, where one waits for that.
    pub fn waited_for(&self) -> Option<Instant> {
        self.is_waited_for.then_some(self.round)
    }

    /// Reads the objects of pods that are new or have changed. One that changes all the time waits
    /// for the next round, with those like it: until then it is as it was. Says whether there is
    /// something new.
    fn read(&mut self, snapshot: &Snapshot) -> bool {
        let now = Instant::now();
        let is_round = now >= self.round;
        self.is_waited_for = false;
        let (mut reads, mut had_turn) = (0, false);
        let mut last = std::mem::take(&mut self.read);
        for found in &snapshot.pods {
            let key = (found.uid().to_owned(), found.name(), found.origin.clone());
            let read = match last.remove(&key) {
                Some(read) if Arc::ptr_eq(&read.pod, &found.pod) || read.pod == found.pod => {
                    Read { pod: Arc::clone(&found.pod), ..read }
                }
                known => {
                    let mut known = known;
                    let passes = known.as_mut().is_none_or(|read| read.pace.pass(now));
                    match known {
                        Some(read) if !passes && !is_round => {
                            self.is_waited_for = true;
                            read
                        }
                        known => {
                            had_turn |= !passes;
                            reads += 1;
                            let none = Pace::new(CHANGES_AGAIN, CHANGES);
                            Read::of(found, known.map_or(none, |read| read.pace))
                        }
                    }
                }
            };
            self.read.insert(key, read);
        }
        if had_turn {
            self.round = now + ROUND;
        }
        self.metrics.read_pods(reads);
        reads > 0 || !last.is_empty()
    }

    /// Brings the kernel in step with the source, where that has spoken.
    fn try_sync(&mut self, look: Look, problems: &mut BTreeSet<Problem>) -> Result<Synced> {
        let snapshot = match &mut self.source {
            Source::Manifests(manifests) => Some(manifests.read()?),
            Source::Kubernetes(kubernetes, _) => {
                problems.extend(kubernetes.problems());
                kubernetes.read()
            }
        };
        let Some(snapshot) = snapshot else {
            return Ok(Synced::NotYet);
        };
        problems.extend(snapshot.errors.iter().cloned());
        let leaves_pods_behind = match &self.source {
            Source::Kubernetes(kubernetes, _) => kubernetes.leaves_pods_behind(),
            Source::Manifests(_) => false,
        };
        let beside = Some((problems.clone(), snapshot.incomplete, leaves_pods_behind));
        let is_new = self.read(&snapshot);
        if look == Look::Source && !is_new && beside == self.beside && self.applied.is_some() {
            return Ok(Synced::Unchanged);
        }
        self.beside = beside;
        let mut seen: BTreeMap<String, &Path> = BTreeMap::new();
        let mut mesh_pods = Vec::new();
        for found in &snapshot.pods {
            let key = (found.uid().to_owned(), found.name(), found.origin.clone());
            let Some(read) = self.read.get(&key) else {
                continue;
            };
            problems.extend(read.problems.iter().cloned());
            let Some(facts) = read.facts.clone() else {
                continue;
            };
            // Of the API server's pods, one that ends and its successor have the same name.
            if let Some(file) = &found.origin {
                if let Some(first) = seen.get(&facts.name) {
                    let text = format!("the pod is already defined in {}", first.display());
                    problems.insert(found.problem(Reason::InvalidPod, &text));
                    continue;
                }
                seen.insert(facts.name.clone(), file);
            }
            mesh_pods.push((found, facts));
        }
        self.search(look, &mesh_pods, problems);
        let mut candidates = Vec::new();
        for (found, facts) in mesh_pods {
            match self.netns(look, found, &facts) {
                Ok(Some(netns)) => {
                    if netns.more_addresses {
                        let text = format!(
                            "its network namespace has more than {ADDRESSES} addresses of a \
                             family: further ones are not treated as the pod's own"
                        );
                        problems.insert(found.problem(Reason::NetworkNamespace, &text));
                    }
                    let before = self.forwarded.insert(netns.cookie, netns.forwarded);
                    let more = netns.forwarded.saturating_sub(before.unwrap_or(netns.forwarded));
                    self.metrics.forwarded(more);
                    if netns.forwarded > 0 {
                        let text = "it forwards packets (of a container or virtual machine inside \
                                    it, say): forwarded packets bypass its sidecar in both \
                                    directions; docs/meshes.md says what to do";
                        problems.insert(found.problem(Reason::Forwards, text));
                    }
                    candidates.push(Candidate { facts, netns });
                }
                Ok(None) => {}
                Err(error) => {
                    let text = format!("{error:#}");
                    problems.insert(found.problem(Reason::NetworkNamespace, &text));
                }
            }
        }
        self.enroll(candidates, &snapshot, problems)?;
        problems.extend(self.own_iptables(&snapshot));
        problems.extend(self.left_behind());
        self.take_over(problems)?;
        if look == Look::Everything {
            self.tidy(&snapshot);
            self.dataplane.retire()?;
            let ahead = self.dataplane.keep_first(&self.cgroup)?;
            self.ahead = ahead.iter().map(|ahead| comes_before(ahead, &self.cgroup)).collect();
        }
        problems.extend(self.ahead.iter().cloned());
        Ok(Synced::Done)
    }

    /// Meshes of which this node has pods, all with the mesh's own iptables rules: somebody has
    /// installed Sidestep and not told the mesh.
    fn own_iptables(&self, snapshot: &Snapshot) -> Vec<Problem> {
        let mut found: BTreeMap<u16, Vec<&SourcePod>> = BTreeMap::new();
        for pod in snapshot.pods.iter().filter(|found| !is_done(&found.pod)) {
            if let Some(mesh) = facts::own_iptables(&pod.pod) {
                found.entry(mesh.index).or_default().push(pod);
            }
        }
        let enrolled: BTreeSet<u16> = self.pods.values().map(|pod| pod.entries.row.mesh).collect();
        found.retain(|mesh, _| !enrolled.contains(mesh));
        let report = |(mesh, pods): (u16, Vec<&SourcePod>)| {
            let (mesh, first) = (mesh::by_index(mesh)?, pods.iter().map(|pod| pod.name()).min()?);
            // No number of pods: it would be another problem with each that comes or goes.
            let text = format!(
                "every pod of {} on this node has the init container {}, which installs iptables \
                 rules (pod {first}, for one), so Sidestep intercepts none of them: turn off the \
                 mesh's own interception as docs/install.md describes, and restart the pods",
                mesh.name, mesh.init_container
            );
            Some(Problem { reason: Reason::OwnIptables, pod: None, text })
        };
        found.into_iter().filter_map(report).collect()
    }

    /// The pods that stay intercepted while Sidestep is being uninstalled.
    fn left_behind(&self) -> Vec<Problem> {
        let Source::Kubernetes(kubernetes, _) = &self.source else {
            return Vec::new();
        };
        if !kubernetes.leaves_pods_behind() {
            return Vec::new();
        }
        let text = "Sidestep is being uninstalled: the pod stays intercepted until it terminates, \
                    with no agent looking after it; a new installation takes it over, and \
                    `sidestep unload` on its node ends interception at once";
        self.owners.values().map(|owner| problem(Reason::StaysIntercepted, owner, text)).collect()
    }

    /// How many pods are intercepted whose network namespaces live.
    pub fn living(&self) -> usize {
        self.owners.keys().filter(|cookie| self.lives(**cookie)).count()
    }

    /// Whether a pod's namespace lives: its inbound link tells, where nobody has detached that.
    fn lives(&self, cookie: NetnsCookie) -> bool {
        let leads = |owner: &Record| Netns::open_as(&owner.netns, cookie).is_ok();
        self.dataplane.netns_lives(cookie) || self.owners.get(&cookie).is_some_and(leads)
    }

    /// Takes over from an agent whose maps have another layout once all its pods are enrolled
    /// here, or after a while: one of them may have left the mesh meanwhile.
    fn take_over(&mut self, problems: &mut BTreeSet<Problem>) -> Result<()> {
        if !self.dataplane.is_taking_over() {
            return Ok(());
        }
        let missing = self.dataplane.not_taken_over()?;
        let since = *self.taking_over.get_or_insert_with(Instant::now);
        if missing > 0 && since.elapsed() < TAKE_OVER {
            problems.insert(Problem::node(format!(
                "{missing} pods of an agent with another map layout have not been found yet: that \
                 agent's programs stay in charge"
            )));
            return Ok(());
        }
        self.dataplane.take_over(&self.cgroup)?;
        info!(missing, "took over from an agent with another map layout");
        Ok(())
    }

    /// Looks for the namespaces of pods that the container runtime told nothing about, by their
    /// processes: once when a pod is new, then whenever everything is looked at.
    fn search(
        &mut self,
        look: Look,
        pods: &[(&SourcePod, Arc<PodFacts>)],
        problems: &mut BTreeSet<Problem>,
    ) {
        let Source::Kubernetes(_, places) = &mut self.source else {
            return;
        };
        let unknown = pods.iter().filter(|(found, _)| places.get(found.uid()).is_none());
        let unknown: BTreeSet<String> = unknown.map(|(found, _)| found.uid().to_owned()).collect();
        let again = look == Look::Everything;
        let wanted: BTreeSet<String> = unknown
            .iter()
            .filter(|uid| again || !self.missing.contains_key(*uid))
            .cloned()
            .collect();
        match places.search(&wanted, &self.host) {
            Ok(found) => self.disputed.extend(found),
            Err(error) => {
                problems.insert(Problem::node(format!("{error:#}")));
            }
        }
        self.disputed.retain(|uid, _| unknown.contains(uid) && places.get(uid).is_none());
        for (found, _) in pods {
            if let Some(why) = self.disputed.get(found.uid()) {
                problems.insert(found.problem(Reason::NetworkNamespace, why));
            }
        }
        self.missing.retain(|uid, _| unknown.contains(uid) && places.get(uid).is_none());
        for uid in wanted.into_iter().filter(|uid| places.get(uid).is_none()) {
            *self.missing.entry(uid).or_default() += u32::from(again);
        }
    }

    /// A pod's namespace. None: there is none yet, or no more. A path that is gone says nothing
    /// about the namespace: a terminating pod is intercepted for as long as that lives.
    fn netns(
        &mut self,
        look: Look,
        found: &SourcePod,
        facts: &PodFacts,
    ) -> Result<Option<Arc<NetnsFacts>>> {
        let annotations = found.pod.metadata.annotations.as_ref();
        let (path, cookie, what) = match &self.source {
            Source::Manifests(_) => {
                let path = annotations.and_then(|all| all.get(NETNS_ANNOTATION));
                let path = path.with_context(|| {
                    format!(
                        "annotation {NETNS_ANNOTATION} is missing: it names the network namespace"
                    )
                })?;
                (
                    Some(PathBuf::from(path)),
                    None,
                    format!("annotation {NETNS_ANNOTATION}: {path:?}"),
                )
            }
            Source::Kubernetes(_, places) => {
                let place = places.get(found.uid());
                let what = "its network namespace".to_owned();
                (place.map(|place| place.path.clone()), place.map(|place| place.cookie), what)
            }
        };
        if look != Look::Everything
            && let Some(visited) = self.visited.get(found.uid())
            && cookie == Some(visited.cookie)
        {
            return Ok(Some(Arc::clone(visited)));
        }
        let visit = path.as_ref().map(|path| visit(path, cookie, facts));
        let visit = match visit {
            Some(Ok((netns, lo))) => {
                let netns = match self.visited.get(found.uid()) {
                    Some(visited) if **visited == netns => Arc::clone(visited),
                    _ => Arc::new(netns),
                };
                if cookie.is_some() {
                    self.visited.insert(found.uid().to_owned(), Arc::clone(&netns));
                }
                self.lo.insert(netns.cookie, lo);
                return Ok(Some(netns));
            }
            Some(Err(error)) => Some(error),
            None => None,
        };
        if let (Source::Kubernetes(_, places), true) = (&mut self.source, path.is_some()) {
            places.lost(found.uid());
        }
        let owned = self
            .owners
            .iter()
            .find(|(_, owner)| owner.pod == facts.name && owner.uid == facts.uid)
            .filter(|(cookie, _)| self.dataplane.netns_lives(**cookie));
        if let Some((cookie, owner)) = owned {
            return Ok(Some(self.pods.get(cookie).map_or_else(
                || {
                    Arc::new(NetnsFacts {
                        path: path.unwrap_or_else(|| owner.netns.clone()),
                        cookie: *cookie,
                        addresses: Vec::new(),
                        more_addresses: false,
                        interfaces: BTreeMap::new(),
                        routes: Vec::new(),
                        route_localnet: false,
                        own_nat: false,
                        forwarded: 0,
                    })
                },
                |pod| Arc::clone(&pod.netns),
            )));
        }
        match visit {
            // Its processes are gone, or it has another namespace by now: it is looked for again.
            Some(error) if cookie.is_some() && is_gone(&error) => Ok(None),
            Some(error) => Err(error.context(what)),
            None if is_running(&found.pod)
                && self.missing.get(found.uid()) >= Some(&MISSES)
                && !self.disputed.contains_key(found.uid()) =>
            {
                Err(anyhow::anyhow!(
                    "none of its processes can be found on this node, so its network namespace is \
                     unknown (is --proc the node's own procfs, and is --node-name this node?)"
                ))
            }
            None => Ok(None),
        }
    }

    /// Forgets what is about pods that are gone.
    fn tidy(&mut self, snapshot: &Snapshot) {
        let Source::Kubernetes(kubernetes, places) = &mut self.source else {
            return;
        };
        let dataplane = &self.dataplane;
        kubernetes
            .forget(|uid| places.get(uid).is_some_and(|place| dataplane.netns_lives(place.cookie)));
        let uids: BTreeSet<String> =
            snapshot.pods.iter().map(|found| found.uid().to_owned()).collect();
        places.retain(&uids);
        self.visited.retain(|uid, _| uids.contains(uid));
        self.missing.retain(|uid, _| uids.contains(uid));
    }

    /// Takes in a pod whose sandbox was just made, for the next sync; none where it is in no mesh
    /// and needs nothing.
    ///
    /// # Errors
    /// Where its namespace can't be entered, or the source has not spoken yet.
    pub fn announce(
        &mut self,
        pod: Arc<Pod>,
        sandbox: &Sandbox,
    ) -> Result<Option<Announced>, AddError> {
        let refused = |error: anyhow::Error| AddError::Refused(format!("{error:#}"));
        let Source::Kubernetes(kubernetes, places) = &mut self.source else {
            return Err(AddError::Refused("this agent takes its pods from manifests".into()));
        };
        if kubernetes.read().is_none() {
            return Err(AddError::NotYet);
        }
        let pod = kubernetes.inherit(pod);
        // What is wrong with the pod itself, the sync says.
        if !facts::is_in_mesh(&pod) {
            return Ok(None);
        }
        let uid = facts::pod_uid(&pod).to_owned();
        let cookie = Netns::open(&sandbox.netns).and_then(|ns| ns.cookie()).map_err(refused)?;
        let container = Some(sandbox.container.clone());
        places.remember(&uid, Place { path: sandbox.netns.clone(), cookie, container });
        kubernetes.expect(pod);
        Ok(Some(Announced { uid, cookie }))
    }

    /// Whether an announced pod is enrolled, after a sync.
    ///
    /// # Errors
    /// Where it is in a mesh and can't be enrolled: it must not run then.
    pub fn admitted(&self, Announced { uid, cookie }: &Announced) -> Result<(), AddError> {
        if self.dataplane.is_taking_over() {
            return Err(AddError::NotYet);
        }
        self.enrolled(uid, *cookie)
    }

    /// Whether this pod is enrolled with this namespace.
    fn enrolled(&self, uid: &str, cookie: NetnsCookie) -> Result<(), AddError> {
        let owner = self.owners.get(&cookie);
        if self.pods.contains_key(&cookie) && owner.is_some_and(|owner| owner.uid == uid) {
            return Ok(());
        }
        let of_pod = |problem: &&Problem| problem.pod.as_ref().is_some_and(|(_, id)| id == uid);
        let why: Vec<&str> =
            self.problems.iter().filter(of_pod).map(|problem| problem.text.as_str()).collect();
        let why = if why.is_empty() { "it is not enrolled".into() } else { why.join("; ") };
        Err(AddError::Refused(why))
    }

    /// Whether a pod of a mesh is still enrolled as it was added.
    ///
    /// # Errors
    /// Where it is not.
    pub fn check(&mut self, pod: &Arc<Pod>, sandbox: &Sandbox) -> Result<(), AddError> {
        let Source::Kubernetes(kubernetes, _) = &mut self.source else {
            return Ok(());
        };
        if !facts::is_in_mesh(&kubernetes.inherit(Arc::clone(pod))) {
            return Ok(());
        }
        let cookie = Netns::open(&sandbox.netns).and_then(|netns| netns.cookie());
        let cookie = cookie.map_err(|error| AddError::Refused(format!("{error:#}")))?;
        self.enrolled(facts::pod_uid(pod), cookie)
    }

    /// The container runtime removes a sandbox. Its pod stays intercepted until the namespace is
    /// gone.
    pub fn delete(&mut self, container: &str) {
        if let Source::Kubernetes(_, places) = &mut self.source {
            places.forget(container);
        }
    }

    /// The container runtime has these sandboxes and no others.
    pub fn keep_only(&mut self, containers: &BTreeSet<String>) {
        if let Source::Kubernetes(_, places) = &mut self.source {
            places.keep_only(containers);
        }
    }

    /// What is wrong now.
    pub fn problems(&self) -> &BTreeSet<Problem> {
        &self.problems
    }

    fn enroll(
        &mut self,
        mut candidates: Vec<Candidate>,
        snapshot: &Snapshot,
        problems: &mut BTreeSet<Problem>,
    ) -> Result<()> {
        let limits = self.dataplane.limits();
        let mut goal = self.planner.desired(&candidates, &self.host, &self.owners, &limits);
        // A pod whose namespace can't be prepared is not enrolled: its connections would get
        // lost. What it had before stays.
        let unprepared = self.prepare(&goal, problems);
        if !unprepared.is_empty() {
            candidates.retain(|candidate| !unprepared.contains(&candidate.netns.cookie));
            goal = self.planner.desired(&candidates, &self.host, &self.owners, &limits);
        }
        for (pod, refusal) in &goal.refused {
            let record = of(&candidates, pod);
            problems.insert(problem(Reason::Refused, &record, &refusal.to_string()));
        }
        for (pod, refusal) in &goal.closed {
            let text = format!("all its traffic is captured until there is room: {refusal}");
            problems.insert(problem(Reason::Refused, &of(&candidates, pod), &text));
        }
        // A pod that an earlier agent enrolled, and that may be in what can't be read now.
        // Or one that runs on though its object is gone, or that nothing is known of for now.
        let refused: BTreeSet<&str> = goal.refused.iter().map(|(pod, _)| pod.as_str()).collect();
        let present: BTreeSet<&str> = snapshot.pods.iter().map(SourcePod::uid).collect();
        let keep: BTreeSet<NetnsCookie> = self
            .owners
            .iter()
            .filter(|(cookie, owner)| {
                let unread = snapshot.incomplete && !self.pods.contains_key(cookie);
                unread
                    || refused.contains(owner.pod.as_str())
                    || (snapshot.missing_may_run && !present.contains(owner.uid.as_str()))
            })
            .map(|(cookie, _)| *cookie)
            .filter(|cookie| !goal.pods.contains_key(cookie) && self.lives(*cookie))
            .collect();
        self.note_dialled(&candidates, problems);
        let state = (goal, keep);
        let mut failed = BTreeMap::new();
        if self.applied.as_ref() != Some(&state) {
            // Whatever fails half-way is compared with the maps themselves next time.
            self.applied = None;
            let applied = self.dataplane.apply(&state.0, &state.1)?;
            self.metrics.wrote(applied.written + applied.deleted);
            debug!(applied.written, applied.deleted, "maps");
            if applied.failed.is_empty() {
                self.applied = Some(state.clone());
            }
            failed = applied.failed;
        }
        let (mut goal, keep) = state;
        for (cookie, failure) in &failed {
            let Some(PodEntries { record, .. }) = goal.pods.get(cookie).map(|pod| &**pod) else {
                problems.insert(Problem::node(format!("{:#}", failure.error)));
                continue;
            };
            let (meanwhile, error) = if failure.is_captured {
                ("all its traffic is captured until then", &failure.error)
            } else {
                ("it is not enrolled", &failure.error)
            };
            let text = format!("{meanwhile}: {error:#}");
            problems.insert(problem(Reason::Refused, record, &text));
        }
        goal.pods.retain(|cookie, _| failed.get(cookie).is_none_or(|failure| failure.is_captured));
        self.link(&goal, &candidates, problems);
        for (cookie, owner) in &self.owners {
            if goal.pods.contains_key(cookie) || keep.contains(cookie) {
                continue;
            }
            info!(pod = %owner.pod, "no longer enrolled");
        }
        self.owners.retain(|cookie, _| keep.contains(cookie));
        for (cookie, pod) in &goal.pods {
            if self.owners.get(cookie) != Some(&pod.record) {
                self.owners.insert(*cookie, pod.record.clone());
            }
        }
        let stays = |cookie: &NetnsCookie| goal.pods.contains_key(cookie) || keep.contains(cookie);
        self.pods.retain(|cookie, _| stays(cookie));
        self.lo.retain(|cookie, _| stays(cookie));
        self.searched.retain(|(cookie, _), _| stays(cookie));
        self.forwarded.retain(|cookie, _| stays(cookie));
        self.noted.retain(|cookie, _| stays(cookie));
        self.filter(problems);
        Ok(())
    }

    /// Prepares the namespaces of pods that are new or whose addresses changed, and of those that
    /// have lost what they were given; the cookies of those that can't be enrolled because that
    /// failed.
    fn prepare(
        &mut self,
        goal: &Desired,
        problems: &mut BTreeSet<Problem>,
    ) -> BTreeSet<NetnsCookie> {
        let mut failed = BTreeSet::new();
        for (cookie, pod) in &goal.pods {
            let PodEntries { row, record, .. } = &**pod;
            let serves = self.lo.get(cookie).is_some_and(|lo| lo.serves(&row.needs_of_lo()));
            let known = self.pods.get(cookie);
            let dns_is_new =
                row.dns_port != 0 && known.is_none_or(|pod| pod.entries.row.dns_port == 0);
            if serves && !dns_is_new {
                continue;
            }
            let done = Netns::open_as(&record.netns, *cookie).and_then(|netns| {
                if !serves {
                    netns.prepare(&row.needs_of_lo())?;
                }
                // Before any question is captured, which gets nowhere without.
                if dns_is_new { self.dataplane.attach_dns(*cookie, &netns) } else { Ok(()) }
            });
            let given = |row: &PodRow| (row.ip4, row.ip6, row.capture_v6, row.dns_routes.clone());
            let was_prepared =
                !serves && known.is_some_and(|pod| given(&pod.entries.row) == given(row));
            match done {
                Ok(()) => {
                    self.lo.insert(*cookie, Lo::prepared(&row.needs_of_lo()));
                    if was_prepared {
                        let text = "routes or addresses were removed from lo";
                        let repair = Repair { what: "lo", text: text.into(), done: Ok(()) };
                        let told = self.repaired(&repair, Reason::NetworkNamespace, Some(record));
                        self.repaired.insert(told.clone());
                        problems.insert(told);
                    }
                }
                Err(_) if self.dataplane.netns_lives(*cookie) && !record.netns.exists() => {}
                Err(error) => {
                    let text = format!("{error:#}");
                    problems.insert(problem(Reason::NetworkNamespace, record, &text));
                    // What is enrolled already stays so: it must not get past its proxy.
                    if !self.dataplane.netns_lives(*cookie) {
                        failed.insert(*cookie);
                    }
                }
            }
        }
        failed
    }

    /// Links the inbound program of this build to every pod that this agent has not done yet.
    fn link(&mut self, goal: &Desired, candidates: &[Candidate], problems: &mut BTreeSet<Problem>) {
        for candidate in candidates {
            let cookie = candidate.netns.cookie;
            let Some(entries) = goal.pods.get(&cookie) else {
                continue;
            };
            let PodEntries { row, record, .. } = &**entries;
            if record.pod != candidate.facts.name {
                continue;
            }
            let known = self.pods.get(&cookie);
            let enrolled = Enrolled {
                netns: Arc::clone(&candidate.netns),
                entries: Arc::clone(entries),
                filtered: known.map(|known| known.filtered.clone()).unwrap_or_default(),
            };
            if known.is_some_and(|known| steered_ports(&known.entries.row) == steered_ports(row)) {
                self.pods.insert(cookie, enrolled);
                continue;
            }
            let linked = Netns::open_as(&record.netns, cookie).and_then(|netns| {
                let at = redirected_to(entries);
                for port in steered_ports(row).into_iter().flatten() {
                    self.dataplane.find_listeners(cookie, &netns, port, &at)?;
                }
                if row.dns_port == 0 {
                    self.dataplane.detach_dns(cookie, &netns)?;
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
                    let text = format!("INBOUND IS NOT INTERCEPTED: {error:#}");
                    problems.insert(problem(Reason::InboundNotIntercepted, record, &text));
                }
            }
        }
    }

    /// Puts the filter in force that spliced connections need when they end, on devices that do
    /// not have it yet. It stays for as long as the pod: some may be spliced still.
    fn filter(&mut self, problems: &mut BTreeSet<Problem>) {
        for (cookie, pod) in &mut self.pods {
            let devices = pod.spliced_devices(&self.legs);
            let fresh: Vec<u32> =
                devices.into_iter().filter(|device| !pod.filtered.contains(device)).collect();
            if fresh.is_empty() {
                continue;
            }
            let done = Netns::open_as(&pod.netns.path, *cookie)
                .and_then(|netns| self.dataplane.attach_reset(*cookie, &netns, &fresh));
            match done {
                Ok(()) => pod.filtered.extend(fresh),
                Err(_) if !pod.netns.path.exists() => {}
                Err(error) => {
                    if let Some(record) = self.owners.get(cookie) {
                        let text = format!("{error:#}");
                        problems.insert(problem(Reason::NetworkNamespace, record, &text));
                    }
                }
            }
        }
    }

    /// Whether dialled ports are noted on this device.
    fn notes(&self, cookie: NetnsCookie, device: u32) -> bool {
        self.noted.get(&cookie).is_some_and(|devices| devices.contains(&device))
    }

    /// Has the ports noted that connections into pods with NAT rules of their own are dialled to,
    /// before those decide. It goes on for as long as the pod: the rules may come back.
    fn note_dialled(&mut self, candidates: &[Candidate], problems: &mut BTreeSet<Problem>) {
        for Candidate { facts, netns } in candidates.iter().filter(|one| one.netns.own_nat) {
            let noted = self.noted.entry(netns.cookie).or_default();
            let devices = netns.interfaces.values().copied();
            let fresh: Vec<u32> =
                devices.filter(|device| *device != LO && !noted.contains(device)).collect();
            if fresh.is_empty() {
                continue;
            }
            let done = Netns::open_as(&netns.path, netns.cookie)
                .and_then(|open| self.dataplane.attach_dialled(netns.cookie, &open, &fresh));
            match done {
                Ok(()) => noted.extend(fresh),
                Err(_) if !netns.path.exists() => {}
                Err(error) => {
                    let record = of(candidates, &facts.name);
                    let text = format!(
                        "it has NAT rules of its own, and Sidestep cannot see which port a \
                         connection was dialled to, so all its inbound ports are captured: \
                         {error:#}"
                    );
                    problems.insert(problem(Reason::NetworkNamespace, &record, &text));
                }
            }
        }
    }

    /// Looks for listeners that were missed when a connection came.
    pub fn find_listeners(&mut self, missed: &BTreeSet<(NetnsCookie, u16)>) {
        let now = Instant::now();
        for missing @ (cookie, port) in missed {
            let Some(pod) = self.pods.get(cookie) else {
                continue;
            };
            let fresh = Backoff::new(SEARCH, SEARCH_AGAIN);
            if !self.searched.entry(*missing).or_insert(fresh).pass(now) {
                continue;
            }
            self.metrics.searched();
            let found = Netns::open_as(&pod.netns.path, *cookie).and_then(|ns| {
                let at = redirected_to(&pod.entries);
                self.dataplane.find_listeners(*cookie, &ns, *port, &at)
            });
            if let Err(error) = found {
                warn!(netns = %pod.netns.path.display(), "cannot look for the proxy's listeners: {error:#}");
            }
        }
    }
}

/// Uid, name and file of a pod's object.
type Key = (String, String, Option<PathBuf>);

/// What else than pods a sync goes by: what is wrong outside, whether the source is incomplete, and
/// whether pods are left behind.
type Beside = (BTreeSet<Problem>, bool, bool);

/// What a sync did.
enum Synced {
    /// The source has not spoken yet.
    NotYet,
    /// It says nothing new.
    Unchanged,
    /// All that could be done.
    Done,
}

/// A pod's object as it was last read.
struct Read {
    pod: Arc<Pod>,
    /// None: there is nothing to do for it.
    facts: Option<Arc<PodFacts>>,
    /// What is wrong with it.
    problems: BTreeSet<Problem>,
    /// Its changes.
    pace: Pace,
}

impl Read {
    fn of(found: &SourcePod, pace: Pace) -> Self {
        let mut problems = BTreeSet::new();
        let facts = facts_of(found, &mut problems).unwrap_or_else(|error| {
            let reason = match error {
                FactsError::Unsupported { .. } | FactsError::Ambient => Reason::Unsupported,
                _ => Reason::InvalidPod,
            };
            problems.insert(found.problem(reason, &error.to_string()));
            None
        });
        Self { pod: Arc::clone(&found.pod), facts, problems, pace }
    }
}

/// A pod whose sandbox was just made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Announced {
    uid: String,
    cookie: NetnsCookie,
}

/// Why a sandbox may not start yet.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum AddError {
    /// The agent has just started.
    #[error("the agent has just started and does not know all of this node's pods yet")]
    NotYet,
    /// The pod is in a mesh and can't be enrolled.
    #[error("{0}")]
    Refused(String),
}

/// A pod's facts, where it is in a mesh; a policy that can't be read is a problem, but no
/// error.
fn facts_of(
    found: &SourcePod,
    problems: &mut BTreeSet<Problem>,
) -> Result<Option<Arc<PodFacts>>, FactsError> {
    let Some(mut parsed) = facts::facts(&found.pod)? else {
        return Ok(None);
    };
    if let Some(excess) = desired::excess(&parsed.facts) {
        parsed.facts.policy = Policy::default();
        let text = format!("all its traffic is captured until this is fixed: {excess}");
        problems.insert(found.problem(Reason::InvalidPolicy, &text));
    }
    let name = &parsed.facts.name;
    for warning in &parsed.warnings {
        problems.insert(Problem {
            text: format!("pod {name}: {warning}"),
            ..found.problem(Reason::InvalidPolicy, "")
        });
    }
    for (error, meanwhile) in [
        (parsed.policy_error, "all its traffic is captured"),
        (parsed.splice_error, "nothing is spliced"),
    ] {
        if let Some(error) = error {
            problems.insert(Problem {
                text: format!("pod {name}: {meanwhile} until this is fixed: {error}"),
                ..found.problem(Reason::InvalidPolicy, "")
            });
        }
    }
    Ok(Some(Arc::new(parsed.facts)))
}

/// What the namespace says about itself, if it is the expected one.
fn visit(path: &Path, cookie: Option<NetnsCookie>, facts: &PodFacts) -> Result<(NetnsFacts, Lo)> {
    let with_routes = !facts.policy.exclude_interfaces.is_empty();
    let (found, lo) = Netns::open(path)?.look(with_routes, facts.dns_port.is_some())?;
    if cookie.is_some_and(|cookie| cookie != found.cookie) {
        let moved = io::Error::from(io::ErrorKind::NotFound);
        return Err(moved)
            .with_context(|| format!("{} is now another network namespace", path.display()));
    }
    Ok((found, lo))
}

/// Whether there is nothing any more where a namespace was.
fn is_gone(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().map(io::Error::kind) == Some(io::ErrorKind::NotFound)
}

/// Whether the pod's object says that its containers run and shall go on: one that is being
/// deleted has none soon, and its object may stay for a while.
fn is_running(pod: &Pod) -> bool {
    let deleted = pod.metadata.deletion_timestamp.is_some();
    !deleted && pod.status.as_ref().and_then(|status| status.phase.as_deref()) == Some("Running")
}

/// Whether all containers of the pod have ended for good.
fn is_done(pod: &Pod) -> bool {
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    matches!(phase, Some("Succeeded" | "Failed"))
}

fn comes_before(ahead: &Ahead, cgroup: &Cgroup) -> Problem {
    let text = format!(
        "{ahead} on {cgroup} runs before Sidestep's: where it translates a Service's address, \
         sidecars see the endpoint's address instead (docs/install.md)"
    );
    Problem { reason: Reason::NotFirst, pod: None, text }
}

fn problem(reason: Reason, record: &Record, text: &str) -> Problem {
    Problem {
        reason,
        pod: Some((record.pod.clone(), record.uid.clone())),
        text: format!("pod {}: {text}", record.pod),
    }
}

/// The record of the candidate with this name.
fn of(candidates: &[Candidate], name: &str) -> Record {
    let found = candidates.iter().find(|candidate| candidate.facts.name == name);
    let uid = found.map(|candidate| candidate.facts.uid.clone()).unwrap_or_default();
    Record { pod: name.to_owned(), uid, netns: PathBuf::new() }
}
