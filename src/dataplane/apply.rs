//! Writes the desired contents into the maps: only differences, pod by pod. An unchanged pod costs
//! nothing.

use std::{
    collections::{BTreeMap, BTreeSet},
    os::fd::AsFd,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use anyhow::Result;
use libbpf_rs::MapCore;

use super::{
    abi,
    inbound::remove_inbound,
    iter::visit,
    services::{Services, ServicesApplied, StalePeer},
    skel::sidestep::SidestepMaps,
    state::Dataplane,
    table::{self, Diff, Entries},
    tables::{self, ALL, Held, TABLES},
};
use crate::{
    mesh::{
        desired::Desired,
        entries::{PodEntries, PodRow},
    },
    node::NetnsCookie,
    service::{List, ListKey},
};

/// The time after which the maps are read again if a write has failed.
const READ_AGAIN: Duration = Duration::from_secs(60);

/// The time that a handshake within a pod takes at most, unless its sidecar is overloaded.
pub(super) const HANDSHAKE: Duration = Duration::from_millis(50);

/// The result of a write.
#[derive(Debug, Default)]
pub struct Applied {
    /// The number of written entries.
    pub written: usize,
    /// The number of deleted entries.
    pub deleted: usize,
    /// The pods whose entries could not be written, by cookie.
    pub failed: BTreeMap<NetnsCookie, Failure>,
}

/// The reason why a pod's entries could not be written.
#[derive(Debug)]
pub struct Failure {
    /// The kernel's error.
    pub error: anyhow::Error,
    /// Whether the pod has a row that captures all of its traffic.
    pub is_captured: bool,
}

impl Dataplane {
    /// Makes the maps hold the lists of Services that have changed; the first time these are all
    /// there are, and what an earlier agent left and is not among them goes. A list for which there
    /// is no room is taken away as a whole, and tried again next time.
    ///
    /// # Errors
    /// If a map cannot be read, or an entry cannot be deleted: what the maps hold is not known
    /// then, and the next call needs all lists.
    pub fn apply_services(
        &mut self,
        changes: BTreeMap<ListKey, Option<List>>,
    ) -> Result<ServicesApplied> {
        let maps = &self.skel.maps;
        let mut services = match self.services.take() {
            Some(services) => services,
            None => Services::adopt(maps, &changes)?,
        };
        let applied = services.apply(maps, changes)?;
        self.services = Some(services);
        Ok(applied)
    }

    /// The connected UDP sockets, in all network namespaces, whose endpoint is not eligible any
    /// more for what they dialled. Those that dialled what is no Service's by now are not among
    /// them.
    ///
    /// # Errors
    /// If the iterator fails.
    pub fn stale_peers(&self) -> Result<Vec<StalePeer>> {
        let progs = &self.skel.progs;
        let peers = self.skel.maps.service_peers.as_fd();
        let written = visit(&progs.find_stale_peers, &progs.find_stale_peers_by_file, peers)?;
        // By files, a socket is found once for each process that has it open.
        let found: BTreeSet<&[u8]> = written.chunks_exact(size_of::<abi::stale_peer>()).collect();
        found.into_iter().map(|one| Ok(abi::from_bytes::<abi::stale_peer>(one)?.into())).collect()
    }

    /// Sets the namespaces whose calls are translated; `nodes` are the node's own.
    ///
    /// # Errors
    /// If the map cannot be written.
    pub fn translate_for(
        &mut self,
        namespaces: &BTreeSet<NetnsCookie>,
        nodes: &BTreeSet<NetnsCookie>,
    ) -> Result<()> {
        let map = &self.skel.maps.service_netns;
        let mut holds = table::read(map)?;
        let whose = |cookie| if nodes.contains(cookie) { abi::OF_NODE } else { abi::OF_POD };
        let goal = namespaces.iter().map(|cookie| table::entry(cookie, &whose(cookie))).collect();
        let diff = table::diff(&holds, goal);
        let mut table = table::Table { map, holds: &mut holds };
        // Who is not to be translated any more comes first.
        table.delete(&diff)?;
        table.upsert(&diff)
    }

    /// Writes the desired contents into the maps, pod by pod: a fault of one pod does not affect
    /// another. Pods that leave come first, their rows before their rules; for the others,
    /// additions come before the rows that need them, removals after. Entries of the namespaces in
    /// `keep` are not removed.
    ///
    /// # Errors
    /// If a map cannot be read or written, named.
    pub fn apply(&mut self, desired: &Desired, keep: &BTreeSet<NetnsCookie>) -> Result<Applied> {
        let mut held = match self.known.take() {
            Some(held) => held,
            None => {
                self.read = Instant::now();
                Held::read(&self.skel.maps)?
            }
        };
        let pods: BTreeSet<NetnsCookie> = desired.pods.keys().chain(keep).copied().collect();
        self.share_out(&pods)?;
        let applied = self.change(&mut held, desired, pods);
        // Another program may have added entries that take the room.
        let is_failed = applied.as_ref().map_or(true, |applied| !applied.failed.is_empty());
        if !is_failed || self.read.elapsed() < READ_AGAIN {
            self.known = Some(held);
        }
        let applied = applied?;
        if applied.written + applied.deleted > 0 {
            // A changed pod may have open connections that are spliced.
            self.want_sweep(true)?;
        }
        Ok(applied)
    }

    /// See [`Dataplane::apply`]; `pods` are those that remain.
    fn change(
        &mut self,
        held: &mut Held,
        desired: &Desired,
        pods: BTreeSet<NetnsCookie>,
    ) -> Result<Applied> {
        // An inbound program without its pod's row would pass everything, so it goes first.
        for cookie in self.links.steered() {
            if !pods.contains(&cookie) {
                remove_inbound(&mut self.links, &self.pins, cookie)?;
            }
        }
        if self.filtering.borrow().as_ref() != Some(&pods) {
            let none_left = self.remove_filters(|cookie| pods.contains(&cookie))?;
            self.filtering.replace(none_left.then(|| pods.clone()));
        }
        let loaded = &self.skel.maps;
        let mut applied = Applied::default();
        let is_leaving =
            |cookie: &&NetnsCookie| **cookie != NetnsCookie::NONE && !pods.contains(cookie);
        let leaving: Vec<NetnsCookie> = held.pods.keys().filter(is_leaving).copied().collect();
        self.let_go(held, &leaving)?;
        for cookie in leaving {
            held.written.remove(&cookie);
            if let Some(holds) = held.pods.get_mut(&cookie) {
                let diffs = differences(holds, Default::default());
                delete(loaded, holds, &diffs)?;
                applied.count(&diffs);
            }
            held.pods.remove(&cookie);
        }
        if held.spliced.as_ref() != Some(&desired.spliced) {
            held.spliced = None;
            let holds = held.pods.entry(NetnsCookie::NONE).or_default();
            let diffs = differences(holds, tables::shared(&desired.spliced));
            let change = upsert(loaded, holds, &diffs).and_then(|()| delete(loaded, holds, &diffs));
            match change {
                Ok(()) => held.spliced = Some(desired.spliced.clone()),
                Err(error) => {
                    let failure = Failure { error, is_captured: false };
                    applied.failed.insert(NetnsCookie::NONE, failure);
                }
            }
            applied.count(&diffs);
        }
        for (cookie, pod) in &desired.pods {
            if held.written.get(cookie) == Some(pod) {
                continue;
            }
            held.written.remove(cookie);
            let holds = held.pods.entry(*cookie).or_default();
            let diffs = differences(holds, tables::of_pod(*cookie, pod)?);
            applied.count(&diffs);
            let change = upsert(loaded, holds, &diffs).and_then(|()| delete(loaded, holds, &diffs));
            if change.is_ok() {
                held.written.insert(*cookie, Arc::clone(pod));
                continue;
            }
            // Removing the pod's former rules makes room. Until then everything is captured.
            let is_captured = upsert(loaded, holds, &row_of(*cookie, &closed(pod))?).is_ok();
            let again = delete(loaded, holds, &diffs)
                .and_then(|()| upsert(loaded, holds, &diffs))
                .and_then(|()| upsert(loaded, holds, &row_of(*cookie, pod)?));
            match again {
                Ok(()) => {
                    held.written.insert(*cookie, Arc::clone(pod));
                }
                Err(error) => {
                    applied.failed.insert(*cookie, Failure { error, is_captured });
                }
            }
        }
        Ok(applied)
    }

    /// Takes no more connections of pods that leave and have the mesh's own rules, and waits for
    /// those that are under way: only a pod's row lets the sidecar's side of a handshake be found,
    /// and no rule would tell where the connection was to go.
    fn let_go(&self, held: &mut Held, leaving: &[NetnsCookie]) -> Result<()> {
        let mut is_any = false;
        for cookie in leaving {
            let Some(pod) = held.written.get(cookie).filter(|pod| pod.row.beside) else { continue };
            is_any = true;
            let diffs = row_of(*cookie, &closed(pod))?;
            if let Some(holds) = held.pods.get_mut(cookie) {
                upsert(&self.skel.maps, holds, &diffs)?;
            }
        }
        if is_any {
            thread::sleep(HANDSHAKE);
        }
        Ok(())
    }

    /// Gives these pods a quota in the maps that count a pod's sockets, and takes it from others
    /// once none of their sockets is in use: a pod that has left may still have some.
    fn share_out(&mut self, pods: &BTreeSet<NetnsCookie>) -> Result<()> {
        if self.sharing.as_ref() == Some(pods) {
            return Ok(());
        }
        self.sharing = None;
        let mut are_all_gone = true;
        for map in [&self.skel.maps.handover_shares, &self.skel.maps.splice_shares] {
            are_all_gone &= share_out(map, pods)?;
        }
        self.sharing = are_all_gone.then(|| pods.clone());
        Ok(())
    }
}

/// Returns whether no other pods have a quota any more.
fn share_out(map: &impl MapCore, pods: &BTreeSet<NetnsCookie>) -> Result<bool> {
    let mut shares = table::read(map)?;
    let mut wanted: Entries = pods.iter().map(|cookie| table::entry(cookie, &0u32)).collect();
    let mut unused = Vec::new();
    for (cookie, used) in &shares {
        if wanted.remove(cookie).is_none() && abi::from_bytes::<u32>(used)? == 0 {
            unused.push(cookie.clone());
        }
    }
    let diff = Diff { upserts: wanted, deletes: unused };
    let mut table = table::Table { map, holds: &mut shares };
    table.delete(&diff)?;
    table.upsert(&diff)?;
    Ok(shares.len() == pods.len())
}

impl Applied {
    fn count(&mut self, diffs: &[Diff; TABLES]) {
        for diff in diffs {
            self.written += diff.upserts.len();
            self.deleted += diff.deletes.len();
        }
    }
}

fn differences(holds: &[Entries; TABLES], goal: [Entries; TABLES]) -> [Diff; TABLES] {
    let mut diffs: [Diff; TABLES] = Default::default();
    for ((diff, holds), goal) in diffs.iter_mut().zip(holds).zip(goal) {
        *diff = table::diff(holds, goal);
    }
    diffs
}

/// Writes to the maps in their order.
fn upsert(
    loaded: &SidestepMaps<'_>,
    holds: &mut [Entries; TABLES],
    diffs: &[Diff; TABLES],
) -> Result<()> {
    let mut all = ALL.iter().zip(holds).zip(diffs);
    all.try_for_each(|((table, holds), diff)| {
        table::Table { map: (table.map)(loaded), holds }.upsert(diff)
    })
}

/// Deletes from the maps, in reverse order.
fn delete(
    loaded: &SidestepMaps<'_>,
    holds: &mut [Entries; TABLES],
    diffs: &[Diff; TABLES],
) -> Result<()> {
    let mut all = ALL.iter().zip(holds).zip(diffs).rev();
    all.try_for_each(|((table, holds), diff)| {
        table::Table { map: (table.map)(loaded), holds }.delete(diff)
    })
}

/// A row that captures all of a pod's traffic, whatever its lists hold; beside the mesh's own rules
/// one that leaves all of it to them.
fn closed(pod: &PodEntries) -> PodEntries {
    let row = PodRow {
        capture_v4: pod.row.capture_v4 && !pod.row.beside,
        capture_v6: pod.row.capture_v6 && !pod.row.beside,
        out_all: true,
        in_all: true,
        loopback_included: false,
        exclude_ifs: false,
        sets: BTreeSet::new(),
        ..pod.row.clone()
    };
    PodEntries { row, ..pod.clone() }
}

/// The writes of a pod's record and row, which come last.
fn row_of(cookie: NetnsCookie, pod: &PodEntries) -> Result<[Diff; TABLES]> {
    let mut diffs: [Diff; TABLES] = Default::default();
    for (table, diff) in ALL.iter().zip(&mut diffs).skip(TABLES - 2) {
        diff.upserts = (table.rows)(cookie, pod)?;
    }
    Ok(diffs)
}
