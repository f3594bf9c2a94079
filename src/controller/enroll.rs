//! Applies a pod's desired state to its namespace and the maps: lo, filters, the inbound program.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::Result;
use tracing::{debug, info, warn};

use super::{Controller, problem};
use crate::{
    dataplane::Repair,
    mesh::{
        desired::{Candidate, Desired},
        entries::{PodEntries, PodRow, Record},
        mode::{Families, Mode},
    },
    node::{self, LO, Lo, Netns, NetnsCookie, NetnsFacts},
    pace::Backoff,
    problem::{Problem, Reason},
    source::{Snapshot, SourcePod},
    splice::Leg,
};

/// The first pause between searches for the listener of a pod whose proxy does not listen.
const SEARCH: Duration = Duration::from_millis(100);
/// The longest one: pauses grow.
const SEARCH_AGAIN: Duration = Duration::from_secs(3);

/// An enrolled pod, as the agent last left it.
pub(super) struct Enrolled {
    pub netns: Arc<NetnsFacts>,
    pub entries: Arc<PodEntries>,
    /// See [`Candidate::beside`].
    pub beside: Option<Families>,
    /// The indices of devices with the filter for spliced connections.
    pub reset_devices: Vec<u32>,
}

impl Enrolled {
    /// The devices that spliced connections use on these legs: apps and their sidecars talk over
    /// lo, sidecars with each other over the others.
    fn spliced_devices(&self, legs: &BTreeMap<Leg, bool>) -> Vec<u32> {
        let leg = |device| if device == LO { Leg::App } else { Leg::Sidecar };
        let devices = self.netns.interfaces.values().copied();
        devices
            .filter(|device| self.entries.row.splice && legs.get(&leg(*device)) == Some(&true))
            .collect()
    }
}

/// The ports of the listeners that connections are handed to: inbound, outbound, DNS.
fn steered_ports(row: &PodRow) -> [Option<u16>; 3] {
    let dns = Some(row.dns_port).filter(|port| *port != 0);
    [Some(row.in_port), Some(row.out_port), dns]
}

/// The addresses that such listeners may be bound to.
fn redirected_to(pod: &PodEntries) -> BTreeSet<IpAddr> {
    let fixed = node::ANY.into_iter().chain(node::LOCALHOST);
    fixed.chain(pod.device_addrs.values().copied()).collect()
}

/// The record of the candidate with this name.
fn of(candidates: &[Candidate], name: &str) -> Record {
    let found = candidates.iter().find(|candidate| candidate.facts.name == name);
    let uid = found.map(|candidate| candidate.facts.uid.clone()).unwrap_or_default();
    Record { pod: name.to_owned(), uid, netns: PathBuf::new() }
}

impl Controller {
    pub(super) fn enroll(
        &mut self,
        mut candidates: Vec<Candidate>,
        snapshot: &Snapshot,
        problems: &mut BTreeSet<Problem>,
    ) -> Result<()> {
        let limits = self.dataplane.limits();
        let mut goal = self.planner.desired(&candidates, &self.host, &self.owners, &limits);
        // A pod whose namespace cannot be prepared is not enrolled: its connections would get lost.
        // Its earlier state stays.
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
        // An earlier agent has enrolled this pod, which may be in an unreadable part of the source.
        // Or it runs on although its object is gone, or the source knows nothing of it for now.
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
            // After a failure, the next round compares with the maps themselves.
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

    /// Prepares the namespaces of pods that are new, whose addresses have changed, or that have
    /// lost their additions. Returns the cookies of those for which that failed and that cannot be
    /// enrolled.
    pub(super) fn prepare(
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
                row.captures_dns() && known.is_none_or(|pod| !pod.entries.row.captures_dns());
            if serves && !dns_is_new {
                continue;
            }
            let done = Netns::open_as(&record.netns, *cookie).and_then(|netns| {
                if !serves {
                    netns.prepare(&row.needs_of_lo())?;
                }
                // Before any query is captured, which would get nowhere without it.
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
                    // An enrolled pod stays so: its traffic must not bypass its proxy.
                    if !self.dataplane.netns_lives(*cookie) {
                        failed.insert(*cookie);
                    }
                }
            }
        }
        failed
    }

    /// Links the inbound program of this build to every pod that this agent has not handled yet.
    pub(super) fn link(
        &mut self,
        goal: &Desired,
        candidates: &[Candidate],
        problems: &mut BTreeSet<Problem>,
    ) {
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
                beside: candidate.beside,
                reset_devices: known.map(|known| known.reset_devices.clone()).unwrap_or_default(),
            };
            let is_as_it_was = |known: &Enrolled| {
                let known = &known.entries.row;
                known.beside == row.beside && steered_ports(known) == steered_ports(row)
            };
            if known.is_some_and(is_as_it_was) {
                self.pods.insert(cookie, enrolled);
                continue;
            }
            let linked = Netns::open_as(&record.netns, cookie).and_then(|netns| {
                if row.beside {
                    // What connect has to know of the outbound listener.
                    let at = node::ANY.into();
                    self.dataplane.find_listeners(cookie, &netns, row.out_port, &at)?;
                    self.dataplane.detach_dns(cookie, &netns)?;
                    return self.dataplane.detach_inbound(cookie);
                }
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
                    let mode = if row.beside { Mode::Beside } else { Mode::Instead };
                    info!(pod = %record.pod, mesh = candidate.facts.mesh.name, mode = mode.name(), netns = %record.netns.display(), "enrolled");
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

    /// Attaches the filter that spliced connections need when they end, to devices that do not have
    /// it yet. It stays as long as the pod: some connections may still be spliced.
    pub(super) fn filter(&mut self, problems: &mut BTreeSet<Problem>) {
        for (cookie, pod) in &mut self.pods {
            let devices = pod.spliced_devices(&self.legs);
            let fresh: Vec<u32> =
                devices.into_iter().filter(|device| !pod.reset_devices.contains(device)).collect();
            if fresh.is_empty() {
                continue;
            }
            let done = Netns::open_as(&pod.netns.path, *cookie)
                .and_then(|netns| self.dataplane.attach_reset(*cookie, &netns, &fresh));
            match done {
                Ok(()) => pod.reset_devices.extend(fresh),
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
    pub(super) fn notes(&self, cookie: NetnsCookie, device: u32) -> bool {
        self.noted.get(&cookie).is_some_and(|devices| devices.contains(&device))
    }

    /// Attaches the program that notes the dialled ports of connections into pods with NAT rules of
    /// their own, before those rules apply. It stays as long as the pod: the rules may come back.
    pub(super) fn note_dialled(
        &mut self,
        candidates: &[Candidate],
        problems: &mut BTreeSet<Problem>,
    ) {
        let own_nat = |one: &&Candidate| one.netns.own_nat && one.beside.is_none();
        for Candidate { facts, netns, .. } in candidates.iter().filter(own_nat) {
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

    /// Searches for listeners that connections have missed.
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mesh::desired::tests::{candidate, plain};

    fn enrolled() -> Enrolled {
        let mut pod = candidate("ns/a", 7, "10.0.0.7");
        let interfaces = [("lo", LO), ("eth0", 2)].map(|(name, index)| (name.into(), index));
        Arc::make_mut(&mut pod.netns).interfaces = interfaces.into();
        let entries = Arc::clone(&plain(std::slice::from_ref(&pod)).pods[&pod.netns.cookie]);
        Enrolled { netns: pod.netns, entries, beside: None, reset_devices: Vec::new() }
    }

    #[test]
    fn splicing_needs_filters_on_the_devices_of_its_legs() {
        let mut pod = enrolled();
        let legs = |app, sidecar| BTreeMap::from([(Leg::App, app), (Leg::Sidecar, sidecar)]);
        assert_eq!(pod.spliced_devices(&legs(true, false)), [LO]);
        assert_eq!(pod.spliced_devices(&legs(false, true)), [2]);
        assert_eq!(pod.spliced_devices(&BTreeMap::new()), [0_u32; 0], "not decided yet");
        Arc::make_mut(&mut pod.entries).row.splice = false;
        assert_eq!(pod.spliced_devices(&legs(true, true)), [0_u32; 0]);
    }

    #[test]
    fn listeners_are_looked_for_where_connections_are_led_to() {
        let pod = enrolled();
        let mut row = pod.entries.row.clone();
        assert_eq!(steered_ports(&row), [Some(15006), Some(15001), None]);
        row.dns_port = 15053;
        assert_eq!(steered_ports(&row)[2], Some(15053));
        let at = redirected_to(&pod.entries);
        for ip in ["0.0.0.0", "::", "127.0.0.1", "::1", "10.0.0.7"] {
            assert!(at.contains(&ip.parse().expect("an address")), "{ip}");
        }
        assert_eq!(at.len(), 5);
    }

    #[test]
    fn a_problem_names_its_candidate() {
        let candidates = [candidate("ns/a", 7, "10.0.0.7")];
        assert_eq!(of(&candidates, "ns/a").uid, "uid-ns/a");
        let gone = of(&candidates, "ns/b");
        assert_eq!((gone.pod.as_str(), gone.uid.as_str()), ("ns/b", ""));
    }
}
