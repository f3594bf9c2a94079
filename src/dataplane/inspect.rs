//! The state that the pins alone show, without an agent, for `status` and the metrics.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::{IpAddr, SocketAddr},
};

use anyhow::{Context, Result};
use libbpf_rs::{Link, MapCore, MapFlags, MapHandle};

use super::{
    abi,
    hooks::{Attach, HOOKS},
    inbound::listeners,
    links::{cgroup_of, steer_lives},
    pins::Pins,
    records::records,
    services::frontend_from,
    splice, table,
};
use crate::{
    mesh::{self, entries::Record},
    node::{self, NetnsCookie},
    service::{Frontend, canary::CANARIES},
    splice::LegState,
};

/// The names of the mesh's counters, in the order of `enum mesh_counter`.
pub(super) const MESH_COUNTERS: [&str; 16] = [
    "captured_outbound",
    "captured_self",
    "captured_dns",
    "direct",
    "steered_inbound",
    "passed_inbound",
    "refused_no_listener",
    "refused_no_state",
    "refused_no_address",
    "refused_busy",
    "refused_source_route",
    "handover_full",
    "handover_missed",
    "origdst_answered",
    "dns_refused",
    "dns_forged",
];

/// The names of splicing's counters, in the order of `enum splice_counter`.
pub(super) const SPLICE_COUNTERS: [&str; 13] = [
    "splice_sockets",
    "splice_not_safe",
    "splice_not_proxy",
    "splice_left",
    "splice_map_full",
    "splice_in_other_map",
    "splice_messages",
    "splice_bytes",
    "splice_spilled",
    "splice_bulk",
    "splice_refresh",
    "splice_unread",
    "splice_no_peer",
];

/// The names of the counters of Services, in the order of `enum service_counter`.
pub(super) const SERVICE_COUNTERS: [&str; 11] = [
    "service_tcp4",
    "service_tcp6",
    "service_udp4",
    "service_udp6",
    "service_missed",
    "service_refused",
    "service_passed",
    "service_no_state",
    "service_torn",
    "service_affinity",
    "service_forgotten",
];

/// An enrolled pod, as the kernel's maps describe it.
#[derive(Debug, Clone)]
pub struct Enrolled {
    /// The network namespace's cookie.
    pub cookie: NetnsCookie,
    /// The pod's name, uid and namespace path.
    pub record: Record,
    /// The name of its mesh.
    pub mesh: &'static str,
    /// The addresses whose families are captured.
    pub captured: Vec<IpAddr>,
    /// Whether the mesh's own rules are in the pod, and do what Sidestep leaves.
    pub beside: bool,
    /// Whether the inbound program is linked to a namespace that still exists.
    pub inbound: bool,
    /// The number of known inbound listeners.
    pub listeners: usize,
    /// The port of the DNS listener, if DNS is captured.
    pub dns_port: Option<u16>,
}

/// A hook of the node, and whether it is attached.
#[derive(Debug, Clone)]
pub struct HookState {
    /// The program's name.
    pub name: &'static str,
    /// Whether it is attached to a cgroup that still exists.
    pub attached: bool,
    /// The cgroup's id (its inode number); 0 if not attached.
    pub cgroup_id: u64,
}

/// The enrolled pods, from the pins alone: no agent is needed.
///
/// # Errors
/// If a pinned map cannot be read.
pub fn enrolled(pins: &Pins) -> Result<Vec<Enrolled>> {
    let (pods, listening) = (pins.open_map("pods")?, pins.open_map("listeners")?);
    let mut landings: BTreeMap<NetnsCookie, BTreeSet<IpAddr>> = BTreeMap::new();
    for (key, ip) in table::read_as::<abi::device_key, abi::addr>(&pins.open_map("device_addrs")?)?
    {
        landings.entry(NetnsCookie(key.netns)).or_default().insert(ip.into());
    }
    let records = records(&pins.open_map("pod_records")?)?;
    let rows = table::read_as::<NetnsCookie, abi::pod>(&pods)?;
    Ok(rows
        .into_iter()
        .map(|(cookie, row)| Enrolled {
            cookie,
            record: records.get(&cookie).cloned().unwrap_or_default(),
            mesh: mesh::by_index(row.mesh).map_or("unknown", |mesh| mesh.name),
            captured: [
                (row.ip4, abi::pod_flag::POD_CAPTURE_V4),
                (row.ip6, abi::pod_flag::POD_CAPTURE_V6),
            ]
            .into_iter()
            .filter(|(address, family)| address.w != [0; 4] && row.flags.0 & family.0 != 0)
            .map(|(address, _)| IpAddr::from(address))
            .collect(),
            beside: row.flags.0 & abi::pod_flag::POD_BESIDE.0 != 0,
            inbound: steer_lives(pins, cookie),
            listeners: landings
                .remove(&cookie)
                .unwrap_or_default()
                .into_iter()
                .chain(node::ANY)
                .map(|at| listeners(&listening, cookie, at, row.in_port))
                .sum(),
            dns_port: Some(row.dns_port)
                .filter(|port| *port != 0 && row.flags.0 & abi::pod_flag::POD_BESIDE.0 == 0),
        })
        .collect())
}

/// The legs, each with the reason if it is off, and the number of spliced sockets, read from the
/// pins alone.
///
/// # Errors
/// If a pinned map cannot be read.
pub fn spliced(pins: &Pins) -> Result<(Vec<LegState>, usize)> {
    splice::state(pins)
}

/// The node's hooks, from the pins alone.
pub fn hook_states(pins: &Pins) -> Vec<HookState> {
    HOOKS
        .iter()
        .filter(|hook| hook.attach == Attach::Cgroup)
        .map(|hook| {
            let link = Link::open(pins.link(hook.program)).map_err(anyhow::Error::from);
            let cgroup_id = link.and_then(|link| cgroup_of(&link)).unwrap_or(0);
            HookState { name: hook.program, attached: cgroup_id != 0, cgroup_id }
        })
        .collect()
}

/// The kernel's counters, by mesh and name, summed over the processors.
///
/// # Errors
/// If the pinned map cannot be read.
pub fn counters(pins: &Pins) -> Result<BTreeMap<&'static str, BTreeMap<&'static str, u64>>> {
    let mut all: BTreeMap<_, BTreeMap<_, _>> = BTreeMap::new();
    for (map, names) in
        [("mesh_counters", &MESH_COUNTERS[..]), ("splice_counters", &SPLICE_COUNTERS[..])]
    {
        let at = pins.open_map(map)?;
        for mesh in mesh::MESHES {
            let of_mesh = all.entry(mesh.name).or_default();
            for (n, name) in names.iter().enumerate() {
                let index = u32::from(mesh.index) * names.len() as u32 + n as u32;
                of_mesh.insert(*name, count(&at, index, name)?);
            }
        }
    }
    Ok(all)
}

/// A counter's value, summed over the processors.
fn count(map: &MapHandle, index: u32, name: &str) -> Result<u64> {
    let values = map.lookup_percpu(&index.to_ne_bytes(), MapFlags::ANY)?;
    let values = values.with_context(|| format!("no counter {name}"))?;
    values.iter().map(|value| abi::from_bytes::<u64>(value)).sum()
}

/// The Services in the kernel's maps, without the agent's canaries: each address that can be
/// dialled, and its endpoints. `None` if an older build made the maps, which knows no Services.
///
/// # Errors
/// If a pinned map cannot be read.
pub fn services(pins: &Pins) -> Result<BTreeMap<Frontend, BTreeSet<SocketAddr>>> {
    if !pins.map("services").exists() {
        return Ok(BTreeMap::new());
    }
    let mut lists: HashMap<u32, BTreeSet<SocketAddr>> = HashMap::new();
    let backends = pins.open_map("backends")?;
    for (key, backend) in table::read_as::<abi::backend_key, abi::backend>(&backends)? {
        lists.entry(key.list).or_default().insert(backend.into());
    }
    let services = table::read_as::<abi::frontend, u32>(&pins.open_map("services")?)?;
    let found = services.into_iter().filter_map(|(frontend, number)| {
        let frontend = frontend_from(&frontend).filter(|one| !CANARIES.contains(&one.ip))?;
        Some((frontend, lists.get(&number).cloned().unwrap_or_default()))
    });
    Ok(found.collect())
}

/// The counters of Services, by name, summed over the processors. `None` as for [`services`].
///
/// # Errors
/// If the pinned map cannot be read.
pub fn service_counters(pins: &Pins) -> Result<BTreeMap<&'static str, u64>> {
    if !pins.map("service_counts").exists() {
        return Ok(BTreeMap::new());
    }
    let map = pins.open_map("service_counts")?;
    let counters = (0..).zip(SERVICE_COUNTERS);
    counters.map(|(index, name)| Ok((name, count(&map, index, name)?))).collect()
}
