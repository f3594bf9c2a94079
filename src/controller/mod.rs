//! Brings the kernel in step with what the source knows: facts -> desired -> diff -> maps.

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
        self,
        annotations::FactsError,
        desired::{self, Candidate, Desired, Planner},
        entries::Record,
        facts::{self, PodFacts},
        policy::Policy,
    },
    node::{self, ADDRESSES, Cgroup, Lo, Netns, NetnsCookie, NetnsFacts, Place, Places},
    ops::metrics::{Fill, Metrics},
    pace::{Backoff, Pace},
    problem::{Problem, Reason},
    source::{PodSource, Snapshot, SourcePod, kubernetes::Kubernetes, manifests::Manifests},
    splice::Leg,
};

/// How long the pods of an agent with other maps may be missing.
const TAKE_OVER: Duration = Duration::from_secs(15);
/// How many changes of a pod are taken in at once,
const CHANGES: u32 = 4;
/// and how soon there is room for one more; what is above that waits for the next such round.
const CHANGES_AGAIN: Duration = Duration::from_secs(10);
/// See [`CHANGES_AGAIN`].
const ROUND: Duration = Duration::from_secs(1);

/// Where pods come from, and what tells their network namespaces.
pub enum Source {
    /// A directory; an annotation names the namespace.
    Manifests(Manifests),
    /// The API server; the container runtime or the pod's processes show the namespace.
    Kubernetes(Box<Kubernetes>, Places),
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
pub struct Controller {
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
    /// When connections to splice are looked at.
    sweeps: Sweeps,
    /// Since when an agent with other maps could be taken over from.
    taking_over: Option<Instant>,
    /// What the namespaces said when they were last visited, by the pod's uid.
    visited: BTreeMap<String, Arc<NetnsFacts>>,
    /// What the pods' lo had when they were last visited or prepared.
    lo: BTreeMap<NetnsCookie, Lo>,
    /// Pods whose namespace is looked for.
    search: Search,
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
    /// Services; none: they are not translated.
    services: Option<Services>,
}

impl Controller {
    /// Takes over what the kernel holds.
    ///
    /// # Errors
    /// Where the kernel's records or the node's own namespace cannot be read.
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
        })
    }

    /// How many pods an earlier agent left.
    pub fn adopted(&self) -> usize {
        self.owners.len()
    }

    /// The source.
    pub fn source(&mut self) -> &mut Source {
        &mut self.source
    }

    /// Brings the kernel in step with the source; `more` is what else is wrong on this node.
    /// Never fails: what cannot be done is logged, and tried again at the next sync.
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
        self.sync_services(look);
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
        self.say(&self.problems, &problems);
        self.problems = problems;
        self.report();
    }

    /// Says what is wrong now and was not, and the other way round.
    fn say(&self, before: &BTreeSet<Problem>, now: &BTreeSet<Problem>) {
        for problem in now.difference(before) {
            error!("{problem}");
            self.source.pods().event(problem);
        }
        for problem in before.difference(now) {
            info!("resolved: {problem}");
        }
    }

    /// Looks in the kernel whether what this agent and those before it put in force is in force,
    /// and puts back what is not; what that was.
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

    /// Says how things stand to whoever asks the metrics.
    fn report(&self) {
        let meshes = self.pods.values().map(|pod| pod.entries.row.mesh);
        let fills = self.applied.as_ref().map(|(goal, _)| {
            let limits = self.dataplane.limits();
            Fill::all(goal, &limits)
        });
        let api = self.source.pods().errors();
        self.metrics.set(meshes, &self.problems(), &fills.unwrap_or_default(), &api);
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
        let plain = self.plain_pods(&snapshot).filter(|found| !found.uid().is_empty());
        let located = mesh_pods.iter().map(|(found, _)| *found).chain(plain).collect::<Vec<_>>();
        self.search(look, &located, problems);
        let mut candidates = Vec::new();
        let mut translated = BTreeMap::new();
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
                    if self.services.is_some() {
                        let on = services::translates(found, problems);
                        translated.insert(netns.cookie, on);
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
        if !self.source.pods().leaves_pods_behind() {
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
        self.search.retain(&uids);
    }

    /// What is wrong now.
    pub fn problems(&self) -> BTreeSet<Problem> {
        self.problems.iter().chain(self.service_problems()).cloned().collect()
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

/// A pod's facts, where it is in a mesh; a policy that cannot be read is a problem, but no
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
