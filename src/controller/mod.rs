//! Synchronizes the kernel with the source: facts -> desired -> diff -> maps.

mod admission;
mod enroll;
mod locate;
mod services;
mod splicer;

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::Result;
use k8s_openapi::api::core::v1::Pod;
use tracing::{error, info};

pub use self::admission::{AddError, Announced};
use self::{enroll::Enrolled, locate::Search, services::Services, splicer::Sweeps};
use crate::{
    dataplane::{Ahead, Dataplane, Repair},
    mesh::{
        self, Mesh,
        annotations::{FactsError, annotation},
        desired::{self, Candidate, Desired, Planner},
        entries::Record,
        facts::{self, PodFacts},
        mode::{self, Choice, Families, Found, MODE, Mode, PodsWithRules},
        policy::Policy,
    },
    node::{self, ADDRESSES, Cgroup, Lo, Netns, NetnsCookie, NetnsFacts, PodNamespaces, PodNetns},
    ops::metrics::{Fill, Metrics},
    pace::{Backoff, Pace},
    problem::{Problem, Reason},
    source::{PodSource, Snapshot, SourcePod, kubernetes::Kubernetes, manifests::Manifests},
    splice::Leg,
};

/// The time for which pods of an agent with another layout may be missing.
const TAKE_OVER: Duration = Duration::from_secs(15);
/// The number of changes of a pod that are applied at once,
const CHANGES: u32 = 4;
/// and the time after which one more is allowed; further changes wait for the next such round.
const CHANGES_AGAIN: Duration = Duration::from_secs(10);
/// See [`CHANGES_AGAIN`].
const ROUND: Duration = Duration::from_secs(1);

/// The source of pods, and of their network namespaces.
pub enum Source {
    /// A directory; an annotation names the namespace.
    Manifests(Manifests),
    /// The API server; the container runtime or the pod's processes show the namespace.
    Kubernetes(Box<Kubernetes>, PodNamespaces),
}

impl Source {
    fn pods(&self) -> &dyn PodSource {
        match self {
            Self::Manifests(manifests) => manifests,
            Self::Kubernetes(kubernetes, _) => &**kubernetes,
        }
    }

    fn pods_mut(&mut self) -> &mut dyn PodSource {
        match self {
            Self::Manifests(manifests) => manifests,
            Self::Kubernetes(kubernetes, _) => &mut **kubernetes,
        }
    }
}

/// The extent of a sync.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Look {
    /// The changes of the source.
    Source,
    /// The changes that the agent does not know yet.
    Changes,
    /// Every pod's namespace, which may have changed its addresses or be gone.
    Everything,
}

/// The agent's hold on the data plane.
pub struct Controller {
    source: Source,
    dataplane: Dataplane,
    cgroup: Cgroup,
    metrics: Arc<Metrics>,
    host: BTreeSet<NetnsCookie>,
    /// The pod of each namespace, from the kernel's records.
    owners: BTreeMap<NetnsCookie, Record>,
    /// The contents of the maps once this agent has written them, and the namespaces whose entries
    /// were kept.
    applied: Option<(Desired, BTreeSet<NetnsCookie>)>,
    /// The desired contents of the maps, pod by pod, as last computed.
    planner: Planner,
    /// The enrolled pods, by namespace cookie; only those whose enrollment this agent has
    /// completed.
    pods: BTreeMap<NetnsCookie, Enrolled>,
    /// The rate limits of searches for pods' listeners.
    searched: BTreeMap<(NetnsCookie, u16), Backoff>,
    /// The pods' objects as they were last read.
    read: BTreeMap<Key, Read>,
    /// The rate limit of pods that change constantly.
    round: Instant,
    /// Whether some of them wait for their turn.
    is_waited_for: bool,
    /// The other inputs of the last sync.
    beside: Option<Beside>,
    /// The legs that are spliced; empty until that is decided.
    legs: BTreeMap<Leg, bool>,
    /// The schedule of sweeps.
    sweeps: Sweeps,
    /// The time since which an agent with another layout could be replaced.
    taking_over: Option<Instant>,
    /// The namespaces' states at the last visit, by the pod's uid.
    visited: BTreeMap<String, Arc<NetnsFacts>>,
    /// The states of the pods' lo at the last visit or preparation.
    lo: BTreeMap<NetnsCookie, Lo>,
    /// The pods whose namespace is searched for.
    search: Search,
    /// The devices where dialled ports are noted, by the namespace's cookie.
    noted: BTreeMap<NetnsCookie, Vec<u32>>,
    /// The number of packets that the pods' namespaces have forwarded, by cookie.
    forwarded: BTreeMap<NetnsCookie, u64>,
    /// The programs of others that run before Sidestep's.
    ahead: BTreeSet<Problem>,
    /// The parts that were not in force at the last full round.
    repaired: BTreeSet<Problem>,
    /// The problems of the last sync, so that each is reported once.
    problems: BTreeSet<Problem>,
    /// The state of Services, if they are translated.
    services: Option<Services>,
    /// The mode of pods that have the mesh's own rules and do not name one.
    pods_with_rules: PodsWithRules,
    /// Pods of a mesh that are left alone, by the namespace's cookie.
    left: BTreeMap<NetnsCookie, Left>,
    /// The namespaces whose rules cannot be made out, since the last full round.
    unclear: BTreeSet<NetnsCookie>,
}

impl Controller {
    /// Adopts the kernel's state.
    ///
    /// # Errors
    /// If the kernel's records or the node's own namespace cannot be read.
    pub fn new(
        mut source: Source,
        dataplane: Dataplane,
        cgroup: Cgroup,
        metrics: Arc<Metrics>,
    ) -> Result<Self> {
        let owners = dataplane.records()?;
        if let Source::Kubernetes(_, namespaces) = &mut source {
            for (cookie, record) in &owners {
                let path = record.netns.clone();
                namespaces
                    .remember(&record.uid, PodNetns { path, cookie: *cookie, container: None });
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
            legs: BTreeMap::new(),
            sweeps: Sweeps::new(Instant::now()),
            taking_over: None,
            visited: BTreeMap::new(),
            lo: BTreeMap::new(),
            search: Search::default(),
            noted: BTreeMap::new(),
            forwarded: BTreeMap::new(),
            ahead: BTreeSet::new(),
            repaired: BTreeSet::new(),
            problems: BTreeSet::new(),
            services: None,
            pods_with_rules: PodsWithRules::default(),
            left: BTreeMap::new(),
            unclear: BTreeSet::new(),
        })
    }

    /// Sets the mode of pods that have the mesh's own rules and do not name one.
    #[must_use]
    pub fn with_rules(self, pods_with_rules: PodsWithRules) -> Self {
        Self { pods_with_rules, ..self }
    }

    /// The number of pods that an earlier agent left.
    pub fn adopted(&self) -> usize {
        self.owners.len()
    }

    /// The source.
    pub fn source(&mut self) -> &mut Source {
        &mut self.source
    }

    /// Synchronizes the kernel with the source; `more` are the node's other problems. Never fails:
    /// errors are logged, and retried at the next sync.
    pub fn sync(&mut self, look: Look, more: &BTreeSet<Problem>) {
        let start = Instant::now();
        let mut problems = more.clone();
        // A spliced socket may have become blocking, which only a sweep notices.
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
        self.sync_services(look);
        let took = start.elapsed();
        match synced {
            Ok(Synced::Unchanged) => return,
            Ok(Synced::Done) => self.metrics.synced(took),
            Ok(Synced::NotYet) => {}
            Err(error) => {
                self.beside = None;
                problems.insert(Problem::node(format!("{error:#}")));
            }
        }
        self.say(&self.problems, &problems);
        self.problems = problems;
        self.report();
    }

    /// Reports new problems, and those that have ended.
    fn say(&self, before: &BTreeSet<Problem>, now: &BTreeSet<Problem>) {
        for problem in now.difference(before) {
            error!("{problem}");
            self.source.pods().event(problem);
        }
        for problem in before.difference(now) {
            info!("resolved: {problem}");
        }
    }

    /// Asks the kernel whether everything that this agent and earlier ones attached and wrote is in
    /// force, restores what is not, and returns it.
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
                let devices = devices.filter(|device| pod.reset_devices.contains(device));
                let devices: Vec<u32> = devices.copied().collect();
                let dns = pod.entries.row.captures_dns();
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

    /// A missing part as a problem, with this reason if it could not be restored.
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

    /// Updates the metrics.
    fn report(&self) {
        let meshes = self.pods.values().map(|pod| pod.entries.row.mesh);
        let fills = self.applied.as_ref().map(|(goal, _)| {
            let limits = self.dataplane.limits();
            Fill::all(goal, &limits)
        });
        let api = self.source.pods().errors();
        self.metrics.set(meshes, &self.problems(), &fills.unwrap_or_default(), &api);
    }

    /// The time of the next turn of pods that change constantly, if one waits.
    pub fn waited_for(&self) -> Option<Instant> {
        self.is_waited_for.then_some(self.round)
    }

    /// Reads the objects of pods that are new or have changed. One that changes constantly waits
    /// for the next round, with those like it, and keeps its state until then. Returns whether
    /// anything is new.
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

    /// Synchronizes the kernel with the source, if the source has its first complete list.
    fn try_sync(&mut self, look: Look, problems: &mut BTreeSet<Problem>) -> Result<Synced> {
        let pods = self.source.pods_mut();
        problems.extend(pods.problems());
        let Some(snapshot) = pods.snapshot()? else {
            return Ok(Synced::NotYet);
        };
        problems.extend(snapshot.errors.iter().cloned());
        let leaves_pods_behind = pods.leaves_pods_behind();
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
            // What the namespace of such a pod holds makes no difference, nor do its settings.
            let names_mode = annotation(&found.pod, MODE).is_some();
            let is_offered = self.pods_with_rules == PodsWithRules::Beside || names_mode;
            if !is_offered && read.facts.as_ref().is_some_and(|facts| facts.brings_rules) {
                continue;
            }
            problems.extend(read.problems.iter().cloned());
            let Some(facts) = read.facts.clone() else {
                continue;
            };
            // In the API server, a pod that ends and its successor have the same name.
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
        let plain = self.plain_pods(&snapshot).filter(|found| !found.uid().is_empty());
        let located = mesh_pods.iter().map(|(found, _)| *found).chain(plain).collect::<Vec<_>>();
        self.search(look, &located, problems);
        let mut candidates = Vec::new();
        let mut translated = BTreeMap::new();
        let mut left = BTreeMap::new();
        let unclear = std::mem::take(&mut self.unclear);
        for (found, facts) in mesh_pods {
            match self.netns(look, found, &facts) {
                Ok(Some(netns)) => {
                    let Some(choice) = self.choose(look, &facts, &netns, &unclear) else {
                        // As it was, until it is clear.
                        match self.pods.get(&netns.cookie) {
                            Some(pod) => {
                                let beside = pod.beside;
                                candidates.push(Candidate { facts, netns, beside });
                            }
                            None => drop(left.insert(netns.cookie, Left::of(&facts))),
                        }
                        continue;
                    };
                    if let Some(told) = &choice.told {
                        problems.insert(found.problem(Reason::OwnRules, told));
                    }
                    let mut beside = (choice.mode == Mode::Beside).then_some(choice.families);
                    if choice.mode == Mode::Off && self.holds_on(look, netns.cookie) {
                        beside = Some(Families::default());
                    } else if choice.mode == Mode::Off {
                        left.insert(netns.cookie, Left::of(&facts));
                        continue;
                    }
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
                    if self.services.is_some() {
                        let on = services::translates(found, problems) && beside.is_none();
                        translated.insert(netns.cookie, on);
                    }
                    candidates.push(Candidate { facts, netns, beside });
                }
                Ok(None) => {}
                Err(error) => {
                    let text = format!("{error:#}");
                    problems.insert(found.problem(Reason::NetworkNamespace, &text));
                }
            }
        }
        self.left = left;
        self.enroll(candidates, &snapshot, problems)?;
        self.choose_namespaces(look, &snapshot, &translated, problems);
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

    /// A pod's mode, by the rules in its namespace. `None`: these cannot be made out, which may be
    /// because they are being installed or removed; so it counts once two full rounds in a row find
    /// the same.
    fn choose(
        &mut self,
        look: Look,
        facts: &PodFacts,
        netns: &NetnsFacts,
        unclear: &BTreeSet<NetnsCookie>,
    ) -> Option<Choice> {
        let found = mode::found(facts, &netns.rules);
        if matches!(found, Found::Unclear(_)) && facts.asked != Some(Mode::Off) {
            let was = unclear.contains(&netns.cookie);
            if was || look == Look::Everything {
                self.unclear.insert(netns.cookie);
            }
            if !was {
                return None;
            }
        }
        Some(mode::choose(facts, &found, self.pods_with_rules))
    }

    /// Whether a pod that is to be left to its own rules stays enrolled for now, and nothing more is
    /// taken over: a handshake under way needs its row. It leaves in the full round after that.
    fn holds_on(&self, look: Look, cookie: NetnsCookie) -> bool {
        let beside = self.pods.get(&cookie).and_then(|pod| pod.beside);
        beside.is_some_and(|families| families.v4 || families.v6 || look != Look::Everything)
    }

    /// The meshes whose pods on this node all have the mesh's own rules and are left alone: Sidestep
    /// is installed, but the mesh does not use it.
    fn own_iptables(&self, snapshot: &Snapshot) -> Vec<Problem> {
        let mut found: BTreeMap<u16, BTreeSet<String>> = BTreeMap::new();
        for pod in snapshot.pods.iter().filter(|found| !is_done(&found.pod)) {
            if let Some(mesh) = facts::own_iptables(&pod.pod) {
                found.entry(mesh.index).or_default().insert(pod.name());
            }
        }
        for left in self.left.values().filter(|left| !left.is_asked) {
            found.entry(left.mesh.index).or_default().insert(left.name.clone());
        }
        let enrolled: BTreeSet<u16> = self.pods.values().map(|pod| pod.entries.row.mesh).collect();
        found.retain(|mesh, _| !enrolled.contains(mesh));
        let report = |(mesh, pods): (u16, BTreeSet<String>)| {
            let (mesh, first) = (mesh::by_index(mesh)?, pods.first()?);
            // The text has no number of pods, which would make a new problem with each pod that
            // comes or goes.
            let text = format!(
                "every pod of {} on this node (pod {first}, for one) has the mesh's own rules, from \
                 the init container {} or the mesh's CNI plugin, so Sidestep intercepts none of \
                 them: turn off the mesh's own interception as docs/install.md describes, and \
                 restart the pods; or let Sidestep work beside these rules (--pods-with-rules)",
                mesh.name, mesh.init_container
            );
            Some(Problem { reason: Reason::OwnIptables, pod: None, text })
        };
        found.into_iter().filter_map(report).collect()
    }

    /// The pods of meshes that are left alone, each with its mesh.
    pub fn left_alone(&self) -> BTreeMap<String, String> {
        let named = |left: &Left| (left.name.clone(), left.mesh.name.to_owned());
        self.left.values().map(named).collect()
    }

    /// The pods that stay intercepted while Sidestep is being uninstalled.
    fn left_behind(&self) -> Vec<Problem> {
        if !self.source.pods().leaves_pods_behind() {
            return Vec::new();
        }
        let text = "Sidestep is being uninstalled: the pod stays intercepted until it terminates, \
                    with no agent looking after it; a new installation takes it over, and \
                    `sidestep unload` on its node ends interception at once";
        self.owners.values().map(|owner| problem(Reason::StaysIntercepted, owner, text)).collect()
    }

    /// The number of intercepted pods whose network namespaces are alive.
    pub fn living(&self) -> usize {
        self.owners.keys().filter(|cookie| self.lives(**cookie)).count()
    }

    /// Whether a pod's namespace is alive, by its inbound link, unless somebody has detached that.
    fn lives(&self, cookie: NetnsCookie) -> bool {
        let leads = |owner: &Record| Netns::open_as(&owner.netns, cookie).is_ok();
        self.dataplane.netns_lives(cookie) || self.owners.get(&cookie).is_some_and(leads)
    }

    /// Takes over from an agent whose maps have another layout once all its pods are enrolled here,
    /// or after a while, because one of them may have left the mesh.
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

    /// Forgets the state of pods that are gone.
    fn tidy(&mut self, snapshot: &Snapshot) {
        let Source::Kubernetes(kubernetes, namespaces) = &mut self.source else {
            return;
        };
        let dataplane = &self.dataplane;
        kubernetes.forget(|uid| {
            namespaces.get(uid).is_some_and(|place| dataplane.netns_lives(place.cookie))
        });
        let uids: BTreeSet<String> =
            snapshot.pods.iter().map(|found| found.uid().to_owned()).collect();
        namespaces.retain(&uids);
        self.visited.retain(|uid, _| uids.contains(uid));
        self.search.retain(&uids);
    }

    /// The present problems.
    pub fn problems(&self) -> BTreeSet<Problem> {
        self.problems.iter().chain(self.service_problems()).cloned().collect()
    }
}

/// A pod of a mesh that is left alone.
struct Left {
    uid: String,
    name: String,
    mesh: &'static Mesh,
    /// It asks to be left alone.
    is_asked: bool,
}

impl Left {
    fn of(facts: &PodFacts) -> Self {
        Self {
            uid: facts.uid.clone(),
            name: facts.name.clone(),
            mesh: facts.mesh,
            is_asked: facts.asked == Some(Mode::Off),
        }
    }
}

/// The uid, name and file of a pod's object.
type Key = (String, String, Option<PathBuf>);

/// The inputs of a sync other than pods: the outer problems, whether the source is incomplete, and
/// whether pods are left behind.
type Beside = (BTreeSet<Problem>, bool, bool);

/// The result of a sync.
enum Synced {
    /// The source has no complete list yet.
    NotYet,
    /// The source has no changes.
    Unchanged,
    /// Everything that was possible is done.
    Done,
}

/// A pod's object as it was last read.
struct Read {
    pod: Arc<Pod>,
    /// The pod's facts, if the pod needs anything.
    facts: Option<Arc<PodFacts>>,
    /// The object's problems.
    problems: BTreeSet<Problem>,
    /// The rate limit of its changes.
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

/// A pod's facts, if it is in a mesh; an invalid policy is a problem, not an error.
fn facts_of(
    found: &SourcePod,
    problems: &mut BTreeSet<Problem>,
) -> Result<Option<Arc<PodFacts>>, FactsError> {
    let Some(mut parsed) = facts::facts(&found.pod)? else {
        return Ok(None);
    };
    if let Some(excess) = desired::excess(&parsed.facts) {
        parsed.facts.policy = Policy::default();
        parsed.facts.is_policy_unread = true;
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
        (parsed.mode_error, "its mode is what it would be without this annotation"),
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

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::mesh::facts::tests::pod;

    fn read(patch: impl FnOnce(&mut Value)) -> Read {
        let found = SourcePod { pod: Arc::new(pod(patch)), origin: None };
        Read::of(&found, Pace::new(CHANGES_AGAIN, CHANGES))
    }

    #[test]
    fn a_pod_is_told_what_is_wrong_with_it_and_what_that_means() {
        let right = read(|_| {});
        assert!(right.facts.is_some() && right.problems.is_empty());

        let key = "traffic.sidecar.istio.io/excludeOutboundPorts";
        let slip = read(|pod| pod["metadata"]["annotations"][key] = "80,x".into());
        assert_eq!(slip.facts.expect("in the mesh").policy, Policy::default());
        let [problem] = &slip.problems.iter().collect::<Vec<_>>()[..] else { panic!("one") };
        assert_eq!(problem.reason, Reason::InvalidPolicy);
        for text in ["shop/a", key, "80,x", "all its traffic is captured"] {
            assert!(problem.text.contains(text), "{text}: {problem}");
        }

        let mode = "sidecar.istio.io/interceptionMode";
        let other = read(|pod| pod["metadata"]["annotations"][mode] = "TPROXY".into());
        assert!(other.facts.is_none());
        assert_eq!(other.problems.first().map(|one| one.reason), Some(Reason::Unsupported));
    }

    #[test]
    fn a_pod_in_no_mesh_needs_nothing() {
        let plain = read(|pod| pod["spec"]["containers"] = json!([{ "name": "app" }]));
        assert!(plain.facts.is_none() && plain.problems.is_empty());
    }

    #[test]
    fn a_pod_is_done_once_its_containers_have_ended() {
        let phase = |phase: &str| pod(|pod| pod["status"]["phase"] = phase.into());
        for (text, done) in [("Succeeded", true), ("Failed", true), ("Running", false)] {
            assert_eq!(is_done(&phase(text)), done, "{text}");
        }
        assert!(!is_done(&pod(|pod| pod["status"] = json!({}))));
    }
}
