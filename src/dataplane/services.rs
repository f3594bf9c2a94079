//! Services in the kernel: lists of endpoints, and which address leads to which.
//!
//! One endpoint's change writes the same few entries, however many Services and endpoints there
//! are. bpf/service/lookup.h says in which order things are written, and why.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use anyhow::{Context, Result};
use libbpf_rs::{ErrorKind, MapCore, MapFlags};

use super::{
    abi::{self, Wire},
    skel::sidestep::SidestepMaps,
    table,
};
use crate::{
    node::{ConnectedUdp, NetnsCookie},
    service::{Family, Frontend, List, ListKey, Protocol},
};

/// A port of a Service in one family: what its lists share.
type PortKey = (Arc<str>, Arc<str>, Protocol, Family);

/// A list as the kernel has it.
#[derive(Debug, Default)]
struct Held {
    number: u32,
    frontends: BTreeSet<Frontend>,
    /// By slot.
    backends: Vec<SocketAddr>,
    /// Its row, once there is one: how many endpoints, the key of affinity, its seconds.
    row: Option<(u32, u32, u32)>,
}

/// What the kernel has of Services.
#[derive(Debug, Default)]
pub(super) struct Services {
    lists: HashMap<ListKey, Held>,
    /// Which list an address leads to.
    leads: HashMap<Frontend, u32>,
    /// By the port: what its clients' affinity goes by. Another one where it was off in between.
    affinities: HashMap<PortKey, u32>,
    /// What could not be written, for want of room.
    failed: BTreeMap<ListKey, List>,
    /// Numbers are never used again: somebody may be reading.
    last_number: u32,
    /// The kernel's maps hold nothing but what is in `lists`.
    is_pruned: bool,
}

/// What became of a change.
#[derive(Debug, Default)]
pub struct ServicesApplied {
    /// Entries that were written or deleted.
    pub changed: usize,
    /// Lists that the maps have no room for, and the kernel's word: their addresses are
    /// kube-proxy's.
    pub failed: BTreeMap<ListKey, String>,
}

/// A connected UDP socket whose endpoint its Service has not any more, or not for this node.
#[derive(Debug)]
pub struct StalePeer {
    /// The socket's network namespace.
    pub netns: NetnsCookie,
    /// The socket; its peer is the endpoint.
    pub socket: ConnectedUdp,
    /// What it dialled.
    pub frontend: Frontend,
}

impl From<abi::stale_peer> for StalePeer {
    fn from(found: abi::stale_peer) -> Self {
        let abi::dialled_service { vip, backend, vip_port, .. } = found.to;
        Self {
            netns: NetnsCookie(found.netns),
            socket: ConnectedUdp {
                cookie: found.socket,
                local: SocketAddr::new(found.local.into(), found.local_port),
                peer: backend.into(),
                device: found.device,
            },
            frontend: Frontend { ip: vip.into(), port: vip_port, protocol: Protocol::Udp },
        }
    }
}

impl Services {
    /// What an earlier agent left: a list is known by the addresses that lead to it.
    pub(super) fn adopt(
        maps: &SidestepMaps<'_>,
        goal: &BTreeMap<ListKey, Option<List>>,
    ) -> Result<Self> {
        let mut found = Self::default();
        for (frontend, number) in table::read_as::<abi::frontend, u32>(&maps.services)? {
            found.last_number = found.last_number.max(number);
            if let Some(frontend) = frontend_from(&frontend) {
                found.leads.insert(frontend, number);
            }
        }
        let mut backends: HashMap<u32, BTreeMap<u32, SocketAddr>> = HashMap::new();
        for (key, backend) in table::read_as::<abi::backend_key, abi::backend>(&maps.backends)? {
            found.last_number = found.last_number.max(key.list);
            backends.entry(key.list).or_default().insert(key.slot, backend.into());
        }
        let mut rows = HashMap::new();
        for (number, row) in table::read_as::<u32, abi::service_list>(&maps.service_lists)? {
            found.last_number = found.last_number.max(number).max(row.affinity);
            rows.insert(number, (row.count, row.affinity, row.timeout));
        }
        let mut taken = BTreeSet::new();
        for (key, list) in goal {
            let Some(list) = list else { continue };
            let mut numbers = list.frontends.iter().filter_map(|one| found.leads.get(one));
            let Some(&number) = numbers.find(|number| !taken.contains(*number)) else { continue };
            let Some(&row) = rows.get(&number) else { continue };
            let slots = backends.remove(&number).unwrap_or_default();
            // An agent that was stopped half-way left something else than a whole list.
            if slots.keys().copied().ne(0..row.0) {
                continue;
            }
            taken.insert(number);
            if row.1 != 0 {
                found.affinities.insert(port_of(key), row.1);
            }
            let leads = found.leads.iter().filter(|(_, led)| **led == number);
            let frontends = leads.map(|(frontend, _)| *frontend).collect();
            let backends = slots.into_values().collect();
            found.lists.insert(key.clone(), Held { number, frontends, backends, row: Some(row) });
        }
        Ok(found)
    }

    fn next(&mut self) -> u32 {
        self.last_number += 1;
        self.last_number
    }

    /// The key of the affinity of a list's port; 0: it has none.
    fn affinity_of(&mut self, key: &ListKey, list: &List) -> u32 {
        let port = port_of(key);
        if list.affinity.is_none() {
            self.affinities.remove(&port);
            return 0;
        }
        if let Some(known) = self.affinities.get(&port) {
            return *known;
        }
        let number = self.next();
        self.affinities.insert(port, number);
        number
    }
}

/// Writes to maps, and counts.
struct Writer<'a, 'map> {
    maps: &'a SidestepMaps<'map>,
    changed: usize,
}

impl Writer<'_, '_> {
    fn put<K: Wire, V: Wire>(&mut self, map: &impl MapCore, key: &K, value: &V) -> Result<()> {
        let done = map.update(abi::as_bytes(key), abi::as_bytes(value), MapFlags::ANY);
        self.changed += 1;
        done.with_context(|| {
            format!("cannot write to map {:?} ({} entries at most)", map.name(), map.max_entries())
        })
    }

    fn drop<K: Wire>(&mut self, map: &impl MapCore, key: &K) -> Result<()> {
        match map.delete(abi::as_bytes(key)) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            done => {
                self.changed += 1;
                done.with_context(|| format!("cannot delete from map {:?}", map.name()))
            }
        }
    }

    /// An endpoint into a slot.
    fn place(&mut self, list: u32, slot: usize, backend: SocketAddr) -> Result<()> {
        let slot = u32::try_from(slot).context("too many endpoints")?;
        let backend = abi::backend::from(backend);
        self.put(&self.maps.backends, &abi::backend_key { list, slot }, &backend)?;
        self.put(&self.maps.service_members, &abi::member { list, backend }, &slot)
    }

    fn row(&mut self, held: &mut Held, affinity: u32, timeout: u32) -> Result<()> {
        let count = u32::try_from(held.backends.len()).context("too many endpoints")?;
        let row = (count, affinity, timeout);
        if held.row != Some(row) {
            let value = abi::service_list { count, affinity, timeout };
            self.put(&self.maps.service_lists, &held.number, &value)?;
            held.row = Some(row);
        }
        Ok(())
    }

    /// Makes a list hold these endpoints: new ones take the slots of those that go, the last slots
    /// fill what is left.
    fn fill(&mut self, held: &mut Held, list: &List, affinity: u32) -> Result<()> {
        let timeout = list.affinity.unwrap_or_default();
        let had: BTreeSet<SocketAddr> = held.backends.iter().copied().collect();
        let mut added = list.backends.iter().copied().filter(|new| !had.contains(new));
        let mut gone: Vec<usize> = Vec::new();
        for (slot, backend) in held.backends.iter().enumerate() {
            if list.backends.binary_search(backend).is_err() {
                gone.push(slot);
            }
        }
        let number = held.number;
        // From the end, so that what fills a slot is none of those that go.
        while let Some(slot) = gone.pop() {
            let former = held.backends[slot];
            let member = abi::member { list: number, backend: former.into() };
            self.drop(&self.maps.service_members, &member)?;
            if let Some(new) = added.next() {
                self.place(number, slot, new)?;
                held.backends[slot] = new;
                continue;
            }
            let last = held.backends.len() - 1;
            if slot != last {
                self.place(number, slot, held.backends[last])?;
            }
            held.backends.swap_remove(slot);
            self.row(held, affinity, timeout)?;
            let key = abi::backend_key { list: number, slot: u32::try_from(last)? };
            self.drop(&self.maps.backends, &key)?;
        }
        for new in added {
            self.place(number, held.backends.len(), new)?;
            held.backends.push(new);
        }
        self.row(held, affinity, timeout)
    }

    /// Makes addresses lead to a list.
    fn lead(&mut self, services: &mut Services, key: &ListKey, list: &List) -> Result<()> {
        let Some(held) = services.lists.get_mut(key) else { return Ok(()) };
        for frontend in &list.frontends {
            if services.leads.get(frontend) != Some(&held.number) {
                let maps = self.maps;
                self.put(&maps.services, &abi::frontend::from(*frontend), &held.number)?;
                services.leads.insert(*frontend, held.number);
            }
            held.frontends.insert(*frontend);
        }
        Ok(())
    }

    /// Takes away the addresses that lead to a list and should not.
    fn unlead(
        &mut self,
        services: &mut Services,
        key: &ListKey,
        stay: impl Fn(&Frontend) -> bool,
    ) -> Result<()> {
        let Some(held) = services.lists.get_mut(key) else { return Ok(()) };
        let gone: Vec<Frontend> = held.frontends.iter().copied().filter(|one| !stay(one)).collect();
        for frontend in gone {
            // Another list may have it by now.
            if services.leads.get(&frontend) == Some(&held.number) {
                let maps = self.maps;
                self.drop(&maps.services, &abi::frontend::from(frontend))?;
                services.leads.remove(&frontend);
            }
            held.frontends.remove(&frontend);
        }
        Ok(())
    }

    /// Takes a list away to which nothing leads.
    fn empty(&mut self, held: &Held) -> Result<()> {
        let list = held.number;
        let maps = self.maps;
        self.drop(&maps.service_lists, &list)?;
        for (slot, backend) in held.backends.iter().enumerate() {
            let member = abi::member { list, backend: (*backend).into() };
            self.drop(&maps.service_members, &member)?;
            self.drop(&maps.backends, &abi::backend_key { list, slot: u32::try_from(slot)? })?;
        }
        Ok(())
    }

    /// Takes away what belongs to no list that is known.
    fn prune(&mut self, services: &mut Services) -> Result<()> {
        let maps = self.maps;
        let known: BTreeSet<u32> = services.lists.values().map(|held| held.number).collect();
        for (frontend, number) in table::read_as::<abi::frontend, u32>(&maps.services)? {
            if !known.contains(&number) {
                self.drop(&maps.services, &frontend)?;
            }
        }
        services.leads.retain(|_, number| known.contains(number));
        for (number, _) in table::read_as::<u32, abi::service_list>(&maps.service_lists)? {
            if !known.contains(&number) {
                self.drop(&maps.service_lists, &number)?;
            }
        }
        for (member, _) in table::read_as::<abi::member, u32>(&maps.service_members)? {
            if !known.contains(&member.list) {
                self.drop(&maps.service_members, &member)?;
            }
        }
        for (key, _) in table::read_as::<abi::backend_key, abi::backend>(&maps.backends)? {
            if !known.contains(&key.list) {
                self.drop(&maps.backends, &key)?;
            }
        }
        Ok(())
    }
}

impl Services {
    /// Makes the maps hold the lists that have changed; the first time these are all there are, and
    /// what an earlier agent left and is not among them goes.
    ///
    /// Additions come before what leads to them, removals after. A list for which there is no room
    /// is taken away as a whole, and tried again next time.
    pub(super) fn apply(
        &mut self,
        maps: &SidestepMaps<'_>,
        mut changes: BTreeMap<ListKey, Option<List>>,
    ) -> Result<ServicesApplied> {
        for (key, list) in std::mem::take(&mut self.failed) {
            changes.entry(key).or_insert(Some(list));
        }
        let mut writer = Writer { maps, changed: 0 };
        let mut applied = ServicesApplied::default();
        // Room first: what goes for good, where nothing else takes its addresses.
        let claimed: BTreeSet<Frontend> =
            changes.values().flatten().flat_map(|list| list.frontends.iter().copied()).collect();
        for (key, _) in changes.iter().filter(|(_, list)| list.is_none()) {
            let other = ListKey { is_local: !key.is_local, ..key.clone() };
            let stays = match changes.get(&other) {
                Some(list) => list.is_some(),
                None => self.lists.contains_key(&other),
            };
            if !stays {
                self.affinities.remove(&port_of(key));
            }
            writer.unlead(self, key, |one| claimed.contains(one))?;
            let is_unled = self.lists.get(key).is_some_and(|held| held.frontends.is_empty());
            if is_unled && let Some(held) = self.lists.remove(key) {
                writer.empty(&held)?;
            }
        }
        for (key, list) in &changes {
            let Some(list) = list else { continue };
            let affinity = self.affinity_of(key, list);
            let mut held = match self.lists.remove(key) {
                Some(held) => held,
                None => Held { number: self.next(), ..Held::default() },
            };
            let filled = writer.fill(&mut held, list, affinity);
            self.lists.insert(key.clone(), held);
            let done = filled.and_then(|()| writer.lead(self, key, list));
            if let Err(error) = done {
                writer.unlead(self, key, |_| false)?;
                self.lists.remove(key);
                // Its slots are not what `held` says, where the write failed: by number.
                self.is_pruned = false;
                self.failed.insert(key.clone(), list.clone());
                applied.failed.insert(key.clone(), format!("{error:#}"));
            }
        }
        for (key, list) in &changes {
            match list {
                Some(list) => {
                    let stays = |one: &Frontend| list.frontends.binary_search(one).is_ok();
                    writer.unlead(self, key, stays)?;
                }
                None => {
                    writer.unlead(self, key, |_| false)?;
                    if let Some(held) = self.lists.remove(key) {
                        writer.empty(&held)?;
                    }
                }
            }
        }
        if !self.is_pruned {
            writer.prune(self)?;
            self.is_pruned = true;
        }
        applied.changed = writer.changed;
        Ok(applied)
    }
}

fn port_of(key: &ListKey) -> PortKey {
    (key.service.clone(), key.port.clone(), key.protocol, key.family)
}

const TCP: u8 = libc::IPPROTO_TCP as u8;
const UDP: u8 = libc::IPPROTO_UDP as u8;

impl From<Frontend> for abi::frontend {
    fn from(frontend: Frontend) -> Self {
        let protocol = match frontend.protocol {
            Protocol::Tcp => TCP,
            Protocol::Udp => UDP,
        };
        Self { addr: frontend.ip.into(), port: frontend.port, protocol, pad: 0 }
    }
}

/// None: another build's.
pub(super) fn frontend_from(frontend: &abi::frontend) -> Option<Frontend> {
    let protocol = match frontend.protocol {
        TCP => Protocol::Tcp,
        UDP => Protocol::Udp,
        _ => return None,
    };
    Some(Frontend { ip: frontend.addr.into(), port: frontend.port, protocol })
}

impl From<SocketAddr> for abi::backend {
    fn from(at: SocketAddr) -> Self {
        Self { addr: at.ip().into(), port: at.port(), pad: 0 }
    }
}

impl From<abi::backend> for SocketAddr {
    fn from(backend: abi::backend) -> Self {
        Self::new(IpAddr::from(backend.addr), backend.port)
    }
}
