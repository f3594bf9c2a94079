//! Facts -> the exact contents that the node's maps should have. Pure: no kernel, no API.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
};

use super::{
    entries::{
        CidrRule, DeviceFamily, MAX_NETNS, MAX_POD, MAX_UID, PodEntries, PodRow, PortRule, Record,
        RuleSet, UidRule,
    },
    facts::PodFacts,
    mode::Families,
    policy::{Ipv6, Policy, Ports, Ranges},
    quota::{CIDR_RULES, Limits, QUOTAS, Refusal},
    rules::Rules,
};
use crate::node::{
    LO, NetnsCookie, NetnsFacts,
    lo::{DnsRoute, PASSTHROUGH_V6},
};

/// A pod with its namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    /// What the Pod object says.
    pub facts: Arc<PodFacts>,
    /// What the namespace says.
    pub netns: Arc<NetnsFacts>,
    /// The families that the mesh's own rules in the pod redirect, where Sidestep works beside them.
    pub beside: Option<Families>,
}

/// Everything that the maps should hold.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Desired {
    /// By network namespace cookie.
    pub pods: BTreeMap<NetnsCookie, Arc<PodEntries>>,
    /// Addresses of pods of the node that may be spliced with.
    pub spliced: BTreeSet<IpAddr>,
    /// Pods that are not enrolled, and why.
    pub refused: Vec<(String, Refusal)>,
    /// Pods whose policy there is no room for: everything of theirs is captured.
    pub closed: Vec<(String, Refusal)>,
    /// How many entries the pods have of each map of [`QUOTAS`].
    pub used: [usize; QUOTAS.len()],
}

impl Desired {
    /// All pods' port lists.
    pub fn port_rules(&self) -> impl Iterator<Item = &PortRule> {
        self.pods.values().flat_map(|pod| &pod.port_rules)
    }

    /// All pods' address lists.
    pub fn cidr_rules(&self) -> impl Iterator<Item = (&CidrRule, &bool)> {
        self.pods.values().flat_map(|pod| &pod.cidr_rules)
    }

    /// All pods' users with ports of their own.
    pub fn uid_rules(&self) -> impl Iterator<Item = &UidRule> {
        self.pods.values().flat_map(|pod| &pod.uid_rules)
    }
}

/// Why a policy is more than any pod may have, whatever there is room for.
pub fn excess(facts: &PodFacts) -> Option<Refusal> {
    let rules = Rules::of_policy(NetnsCookie::NONE, &facts.policy, facts.mesh);
    rules.excess().err()
}

/// Makes [`Desired`] of pods, and remembers what it made of each: a pod that stays as it is costs
/// next to nothing.
#[derive(Debug, Default)]
pub struct Planner(BTreeMap<NetnsCookie, Plan>);

#[derive(Debug)]
struct Plan {
    of: Candidate,
    /// The policy is the pod's own.
    own_policy: bool,
    entries: Arc<PodEntries>,
}

/// [`Planner::desired`] of a new planner.
pub fn desired(
    candidates: &[Candidate],
    host: &BTreeSet<NetnsCookie>,
    owners: &BTreeMap<NetnsCookie, Record>,
    limits: &Limits,
) -> Desired {
    Planner::default().desired(candidates, host, owners, limits)
}

impl Planner {
    /// What the maps should hold for these pods.
    ///
    /// `host` are the cookies of the namespaces that cannot be a pod's; `owners` says which pod (as
    /// `namespace/name`) has a namespace now: of two pods that claim one, the owner keeps it, and
    /// where there is none, the first by name gets it.
    pub fn desired(
        &mut self,
        candidates: &[Candidate],
        host: &BTreeSet<NetnsCookie>,
        owners: &BTreeMap<NetnsCookie, Record>,
        limits: &Limits,
    ) -> Desired {
        let mut sorted: Vec<&Candidate> = candidates.iter().collect();
        sorted.sort_by_cached_key(|c| {
            let owns = owners.get(&c.netns.cookie).is_some_and(|owner| owner.pod == c.facts.name);
            (!owns, c.facts.name.as_str())
        });
        let mut out = Desired::default();
        for candidate in sorted {
            let name = &candidate.facts.name;
            match self.enroll(&mut out, candidate, true, host, limits) {
                Ok(()) => {}
                // Beside them, the mesh's own rules do what there is no room for.
                Err(refusal) if refusal.is_about_policy() && candidate.beside.is_none() => {
                    // Nothing of the pod's must get past its proxy for want of room.
                    match self.enroll(&mut out, candidate, false, host, limits) {
                        Ok(()) => out.closed.push((name.clone(), refusal)),
                        Err(refusal) => out.refused.push((name.clone(), refusal)),
                    }
                }
                Err(refusal) => out.refused.push((name.clone(), refusal)),
            }
        }
        self.0.retain(|cookie, _| out.pods.contains_key(cookie));
        out
    }

    fn enroll(
        &mut self,
        out: &mut Desired,
        candidate: &Candidate,
        own_policy: bool,
        host: &BTreeSet<NetnsCookie>,
        limits: &Limits,
    ) -> Result<(), Refusal> {
        let netns = &candidate.netns;
        let cookie = netns.cookie;
        if host.contains(&cookie) {
            return Err(Refusal::HostNetns(netns.path.clone()));
        }
        if let Some(owner) = out.pods.get(&cookie) {
            let owner = owner.record.pod.clone();
            return Err(Refusal::Claimed { netns: netns.path.clone(), owner });
        }
        let entries = self.entries(candidate, own_policy, limits)?;
        if out.pods.len() >= limits.pods {
            return Err(Refusal::Full { map: "pods", limit: limits.pods, share: 1 });
        }
        let others = limits.pods - out.pods.len() - 1;
        let wanted = QUOTAS.map(|quota| (quota.entries)(&entries));
        for ((quota, wanted), used) in QUOTAS.iter().zip(wanted).zip(out.used) {
            quota.take(wanted, used, (quota.limit)(limits), others)?;
        }
        for (used, wanted) in out.used.iter_mut().zip(wanted) {
            *used += wanted;
        }
        out.spliced.extend(&entries.spliced);
        out.pods.insert(cookie, entries);
        Ok(())
    }

    /// What the maps should hold for a pod; as it was where the pod is as it was.
    fn entries(
        &mut self,
        candidate: &Candidate,
        own_policy: bool,
        limits: &Limits,
    ) -> Result<Arc<PodEntries>, Refusal> {
        let cookie = candidate.netns.cookie;
        let last = self.0.get(&cookie);
        if let Some(last) = last
            && last.own_policy == own_policy
            && last.of == *candidate
        {
            return Ok(Arc::clone(&last.entries));
        }
        let all = Policy::default();
        let policy = if own_policy { &candidate.facts.policy } else { &all };
        let entries = Arc::new(entries_of(candidate, policy, limits)?);
        // A pod may change in what no map holds.
        let entries = match last {
            Some(last) if last.entries == entries => Arc::clone(&last.entries),
            _ => entries,
        };
        let plan = Plan { of: candidate.clone(), own_policy, entries: Arc::clone(&entries) };
        self.0.insert(cookie, plan);
        Ok(entries)
    }
}

fn entries_of(
    Candidate { facts, netns, beside }: &Candidate,
    policy: &Policy,
    limits: &Limits,
) -> Result<PodEntries, Refusal> {
    let cookie = netns.cookie;
    let path = netns.path.to_string_lossy();
    for (what, text, limit) in [
        ("pod name", facts.name.as_str(), MAX_POD),
        ("metadata.uid", &facts.uid, MAX_UID),
        ("network namespace path", &path, MAX_NETNS),
    ] {
        if text.len() > limit {
            return Err(Refusal::TooLong { what, text: text.into(), limit });
        }
    }
    let ips = addresses(facts, netns);
    let routable = |ip: &&IpAddr| !is_link_local(**ip);
    if !ips.iter().any(|ip| ip.is_ipv4() || !is_link_local(*ip)) {
        return Err(Refusal::NoAddress(netns.path.clone()));
    }
    let ip4 = ips.iter().find_map(|ip| match ip {
        IpAddr::V4(v4) => Some(*v4),
        IpAddr::V6(_) => None,
    });
    let ip6 = ips.iter().find_map(|ip| match ip {
        IpAddr::V6(v6) => Some(*v6),
        IpAddr::V4(_) => None,
    });
    let capture_v6 = ip6.is_some()
        && match facts.ipv6 {
            Ipv6::Always => true,
            // By the addresses of the namespace, whatever order the API server has.
            Ipv6::WhereFirst => {
                let listed = netns.addresses.iter().map(|(ip, _)| ip).find(routable);
                listed.or(facts.ips.first()).is_some_and(IpAddr::is_ipv6)
            }
            Ipv6::Never => false,
        };

    let mut locals: BTreeSet<IpAddr> = ips.iter().copied().collect();
    if capture_v6 {
        locals.insert(PASSTHROUGH_V6.into());
    }
    let splice = facts.splice && beside.is_none();
    let dns_here = facts.dns_port.filter(|_| beside.is_none());
    let families = beside.unwrap_or(Families { v4: true, v6: true });
    let spliced = ips.iter().filter(routable).filter(|_| splice).copied().collect();

    let mut rules = Rules::of_policy(cookie, policy, facts.mesh);
    if let Some(key) = facts.mesh.exclude_interfaces
        && !policy.exclude_interfaces.is_empty()
        && !limits.tells_interface
    {
        let names = Vec::from_iter(policy.exclude_interfaces.iter().cloned()).join(",");
        return Err(Refusal::Interfaces { key, names });
    }
    // An interface that is not there yet is exempt once it is: namespaces are looked at again.
    let excluded_ifs: BTreeSet<u32> = policy
        .exclude_interfaces
        .iter()
        .filter_map(|name| netns.interfaces.get(name).copied())
        .collect();
    if !excluded_ifs.is_empty() {
        for (net, ifindex) in netns.routes.iter().take(CIDR_RULES.most + 1) {
            rules.range(RuleSet::OutExcludeRoutes, *net, excluded_ifs.contains(ifindex));
        }
    }
    let (out_all, loopback_included) = match &policy.include_outbound_ranges {
        Ranges::All => (true, false),
        Ranges::Only(ranges) => (false, ranges.iter().any(|range| range.addr().is_loopback())),
    };
    let in_all = matches!(policy.include_inbound_ports, Ports::All);
    rules.excess()?;
    let row = PodRow {
        proxy_uid: facts.proxy_uid,
        proxy_gid: facts.proxy_gid,
        ip4,
        ip6,
        beside: beside.is_some(),
        capture_v4: families.v4,
        capture_v6: capture_v6 && families.v6,
        self_inbound: facts.mesh.self_inbound,
        out_all,
        in_all,
        loopback_included,
        udp_excludes: facts.mesh.udp_excludes,
        cidrs_first: facts.mesh.cidrs_first,
        exclude_ifs: !excluded_ifs.is_empty(),
        splice,
        route_localnet: netns.route_localnet,
        own_nat: netns.own_nat,
        tcp_dns: facts.tcp_dns,
        sets: rules.sets(),
        out_port: facts.outbound_port,
        in_port: facts.inbound_port,
        hbone_port: facts.mesh.hbone_port,
        dns_port: facts.dns_port.unwrap_or(0),
        mesh: facts.mesh.index,
        device: ips.first().and_then(|own| device_of(netns, *own)).unwrap_or(0),
        dns_routes: match dns_here {
            Some(_) => dns_routes(netns, ip4, ip6.filter(|_| capture_v6)),
            None => Vec::new(),
        },
    };
    let record =
        Record { pod: facts.name.clone(), uid: facts.uid.clone(), netns: netns.path.clone() };
    Ok(PodEntries {
        row,
        record,
        locals,
        spliced,
        // Where listeners are looked for, which its rules find by themselves.
        device_addrs: if beside.is_some() { BTreeMap::new() } else { device_addrs(netns) },
        port_rules: rules.ports,
        cidr_rules: rules.cidrs,
        uid_rules: rules.uids,
        excluded_ifs,
    })
}

/// The pod's own addresses, that which stands for it first: those that its namespace has, in the
/// pod's order where its status names them, link-local ones last. A status may name what an earlier
/// sandbox had, so it is believed only where the namespace says nothing.
fn addresses(facts: &PodFacts, netns: &NetnsFacts) -> Vec<IpAddr> {
    let named = facts.ips.iter().map(IpAddr::to_canonical);
    if netns.addresses.is_empty() {
        return named.collect();
    }
    let has = |ip: &IpAddr| netns.addresses.iter().any(|(own, _)| own == ip);
    let mut ips: Vec<IpAddr> = named.filter(has).collect();
    let (link, global): (Vec<IpAddr>, Vec<IpAddr>) =
        netns.addresses.iter().map(|(ip, _)| *ip).partition(|ip| is_link_local(*ip));
    ips.extend(global.into_iter().chain(link));
    ips
}

/// How many addresses of devices listeners are remembered at; `LANDINGS` of bpf/mesh/inbound.h has
/// these, any and localhost, so that one pod with many devices leaves room for the others.
pub(crate) const MAX_LANDINGS: usize = 6;

/// The first address of each kind that each device has, in the order of the kernel's list: of more
/// than [`MAX_LANDINGS`] addresses, those that come first.
/// Source: Linux `net/netfilter/nf_nat_redirect.c`.
pub fn device_addrs(netns: &NetnsFacts) -> BTreeMap<(u32, DeviceFamily), IpAddr> {
    let mut first = BTreeMap::new();
    for (ip, device) in &netns.addresses {
        let landings: BTreeSet<IpAddr> = first.values().copied().collect();
        if landings.len() >= MAX_LANDINGS && !landings.contains(ip) {
            continue;
        }
        let families: &[DeviceFamily] = match ip {
            IpAddr::V4(_) => &[DeviceFamily::V4],
            IpAddr::V6(v6) if v6.is_unicast_link_local() => {
                &[DeviceFamily::V6, DeviceFamily::V6Link]
            }
            IpAddr::V6(_) => &[DeviceFamily::V6],
        };
        for family in families {
            first.entry((*device, *family)).or_insert(*ip);
        }
    }
    first
}

/// The device that has this address.
fn device_of(netns: &NetnsFacts, of: IpAddr) -> Option<u32> {
    netns.addresses.iter().find(|(ip, _)| *ip == of).map(|(_, device)| *device)
}

/// For each device and family: from the pod's own address, or the device's first.
fn dns_routes(netns: &NetnsFacts, ip4: Option<Ipv4Addr>, ip6: Option<Ipv6Addr>) -> Vec<DnsRoute> {
    let mut routes: Vec<DnsRoute> = Vec::new();
    for own in [ip4.map(IpAddr::V4), ip6.map(IpAddr::V6)].into_iter().flatten() {
        let home = device_of(netns, own).map(|device| (own, device));
        let (link, global): (Vec<_>, Vec<_>) = netns
            .addresses
            .iter()
            .copied()
            .filter(|(ip, _)| ip.is_ipv4() == own.is_ipv4())
            .partition(|(ip, _)| is_link_local(*ip));
        for (source, device) in home.into_iter().chain(global).chain(link) {
            let has = |route: &DnsRoute| {
                route.device == device && route.source.is_ipv4() == source.is_ipv4()
            };
            if device != LO && !routes.iter().any(has) {
                routes.push(DnsRoute { device, source, own: source == own });
            }
        }
    }
    routes
}

/// Whether the address is the pod's own, but none that others know it by.
fn is_link_local(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use ipnet::IpNet;
    use proptest::prelude::*;

    use super::*;
    use crate::{
        mesh::{
            ISTIO, MESHES,
            policy::{PortRange, Protocol, TcpDns, UidExclusion},
            quota::PORT_RULES,
            rules::{aligned, without},
        },
        node::ADDRESSES,
    };

    const LIMITS: Limits = Limits {
        pods: 4,
        locals: 64,
        port_rules: 64,
        cidr_rules: 64,
        uid_rules: 64,
        excluded_ifs: 4,
        tells_interface: true,
    };

    /// Those of the headers of bpf/.
    pub(crate) const NODE: Limits = Limits {
        pods: 1024,
        locals: 1024 * 16,
        port_rules: 1024 * 64,
        cidr_rules: 1024 * 64,
        uid_rules: 1024 * 16,
        excluded_ifs: 1024 * 4,
        tells_interface: true,
    };

    pub(crate) fn candidate(name: &str, cookie: u64, ip: &str) -> Candidate {
        let ip: IpAddr = ip.parse().expect("an address");
        Candidate {
            facts: Arc::new(PodFacts {
                name: name.into(),
                uid: format!("uid-{name}"),
                mesh: &ISTIO,
                proxy_uid: Some(1337),
                proxy_gid: Some(1337),
                ips: vec![ip],
                ipv6: Ipv6::WhereFirst,
                outbound_port: 15001,
                inbound_port: 15006,
                dns_port: None,
                tcp_dns: TcpDns::Captured,
                policy: Policy::default(),
                is_policy_unread: false,
                splice: true,
                asked: None,
                brings_rules: false,
            }),
            netns: Arc::new(NetnsFacts {
                path: format!("/run/netns/{name}").into(),
                cookie: NetnsCookie(cookie),
                addresses: vec![(ip, 2)],
                more_addresses: false,
                interfaces: BTreeMap::from([("eth0".into(), 2), ("net1".into(), 3)]),
                routes: vec![
                    ("0.0.0.0/0".parse().expect("a range"), 2),
                    ("10.9.0.0/16".parse().expect("a range"), 3),
                ],
                route_localnet: false,
                own_nat: false,
                rules: Ok(Vec::new()),
                forwarded: 0,
            }),
            beside: None,
        }
    }

    pub(crate) fn plain(candidates: &[Candidate]) -> Desired {
        desired(candidates, &BTreeSet::new(), &BTreeMap::new(), &LIMITS)
    }

    #[test]
    fn an_istio_pod_with_no_annotations() {
        let out = plain(&[candidate("ns/a", 7, "10.0.0.7")]);
        let PodEntries { row, record, .. } = &*out.pods[&NetnsCookie(7)];
        assert_eq!((row.out_port, row.in_port, row.hbone_port), (15001, 15006, 15008));
        assert!(row.out_all && row.in_all && row.self_inbound);
        assert_eq!((row.proxy_uid, row.proxy_gid), (Some(1337), Some(1337)));
        assert_eq!((row.ip4, row.ip6), (Some([10, 0, 0, 7].into()), None));
        assert_eq!(record.pod, "ns/a");
        let exempt: Vec<u16> = out.port_rules().map(|rule| rule.port).collect();
        assert_eq!(exempt, [15008, 15020, 15021, 15090]);
        assert!(out.port_rules().all(|rule| rule.set == RuleSet::InExcludePorts));
        assert_eq!(row.sets, BTreeSet::from([RuleSet::InExcludePorts]));
    }

    #[test]
    fn f65_ipv6_is_captured_where_istio_would() {
        let mut dual = candidate("ns/a", 7, "10.0.0.7");
        let v6: IpAddr = "fd00::7".parse().expect("an address");
        Arc::make_mut(&mut dual.netns).addresses.push((v6, 2));
        let captured =
            |pod: &Candidate| plain(std::slice::from_ref(pod)).pods[&NetnsCookie(7)].row.capture_v6;
        assert!(!captured(&dual), "second address, not dual stack");
        // F65: the kernel lists IPv4 first, whatever the API server does.
        Arc::make_mut(&mut dual.facts).ips.insert(0, v6);
        assert!(!captured(&dual), "first in podIPs");
        Arc::make_mut(&mut dual.facts).ipv6 = Ipv6::Always;
        assert!(captured(&dual));
        assert!(plain(&[dual]).pods[&NetnsCookie(7)].locals.contains(&PASSTHROUGH_V6.into()));
        assert!(captured(&candidate("ns/b", 7, "fd00::8")), "the only one");
        let mut unknown = candidate("ns/b", 7, "fd00::8");
        Arc::make_mut(&mut unknown.netns).addresses.clear();
        assert!(captured(&unknown), "by podIPs where the namespace is not known");
    }

    #[test]
    fn f2_f10_families_are_those_of_the_namespace() {
        let ip = |text: &str| -> IpAddr { text.parse().expect("an address") };
        // F10: an IPv6 pod of EKS has an IPv4 address that the API server does not know.
        let mut eks = candidate("ns/a", 7, "fd00::7");
        Arc::make_mut(&mut eks.netns).addresses.insert(0, (ip("169.254.172.3"), 3));
        let row = plain(&[eks]).pods[&NetnsCookie(7)].row.clone();
        assert!(row.capture_v4 && row.capture_v6, "link-local IPv4 is not looked at by Istio");
        assert_eq!(row.ip4, Some([169, 254, 172, 3].into()));
        // F2: Kuma captures IPv6 where there is any, and validates it.
        let mut kuma = candidate("ns/b", 8, "10.0.0.8");
        Arc::make_mut(&mut kuma.facts).ipv6 = Ipv6::Always;
        assert!(
            !plain(std::slice::from_ref(&kuma)).pods[&NetnsCookie(8)].row.capture_v6,
            "there is none"
        );
        Arc::make_mut(&mut kuma.netns).addresses.push((ip("fe80::8"), 2));
        let out = plain(std::slice::from_ref(&kuma));
        assert!(out.pods[&NetnsCookie(8)].row.capture_v6);
        assert!(out.pods[&NetnsCookie(8)].locals.contains(&PASSTHROUGH_V6.into()));
        Arc::make_mut(&mut kuma.netns).addresses.push((ip("fd00::8"), 3));
        assert_eq!(
            plain(&[kuma]).pods[&NetnsCookie(8)].row.ip6.map(IpAddr::from),
            Some(ip("fd00::8"))
        );
        // And IPv4 always, within a pod that has no such address.
        let v6 = plain(&[candidate("ns/c", 9, "fd00::9")]).pods[&NetnsCookie(9)].row.clone();
        assert!(v6.capture_v4 && v6.ip4.is_none());
    }

    #[test]
    fn a_status_from_before_the_sandbox_is_not_believed() {
        // F5: the address of the sandbox before, which may be another pod's by now.
        let mut pod = candidate("ns/a", 7, "10.0.0.7");
        Arc::make_mut(&mut pod.facts).ips = vec!["10.0.0.6".parse().expect("an address")];
        let out = plain(&[pod]);
        assert_eq!(out.pods[&NetnsCookie(7)].row.ip4, Some([10, 0, 0, 7].into()));
        let locals = &out.pods[&NetnsCookie(7)].locals;
        assert!(locals.iter().all(|ip| ip.to_string() == "10.0.0.7"), "{locals:?}");
    }

    #[test]
    fn the_first_address_of_each_device() {
        let mut pod = candidate("ns/a", 7, "10.0.0.7");
        let all =
            [("10.0.0.9", 2), ("10.1.0.7", 3), ("fd00::7", 2), ("fe80::7", 2), ("fe80::8", 3)];
        let all = all.map(|(ip, device)| (ip.parse().expect("an address"), device));
        Arc::make_mut(&mut pod.netns).addresses.extend(all);
        let found = plain(&[pod]).pods[&NetnsCookie(7)].device_addrs.clone();
        let found: Vec<_> =
            found.iter().map(|((device, family), ip)| (*device, *family, ip.to_string())).collect();
        use DeviceFamily::{V4, V6, V6Link};
        let right = [
            (2, V4, "10.0.0.7"),
            (2, V6, "fd00::7"),
            (2, V6Link, "fe80::7"),
            (3, V4, "10.1.0.7"),
            (3, V6, "fe80::8"),
            (3, V6Link, "fe80::8"),
        ];
        assert_eq!(found, right.map(|(device, family, ip)| (device, family, ip.to_owned())));
    }

    #[test]
    fn a_pod_with_many_devices_has_no_more_than_its_share_of_addresses_for_listeners() {
        let mut pod = candidate("ns/a", 7, "10.0.0.7");
        let more = (3..20).map(|device| (IpAddr::from([10, 1, 0, device as u8]), device));
        Arc::make_mut(&mut pod.netns).addresses.extend(more);
        let found = plain(&[pod]).pods[&NetnsCookie(7)].device_addrs.clone();
        let devices: Vec<u32> = found.keys().map(|(device, _)| *device).collect();
        assert_eq!(devices, [2, 3, 4, 5, 6, 7], "the first of them");
    }

    #[test]
    fn addresses_come_from_the_namespace_where_the_pod_names_none() {
        let mut pod = candidate("ns/a", 7, "10.0.0.7");
        Arc::make_mut(&mut pod.facts).ips.clear();
        assert_eq!(plain(&[pod.clone()]).pods[&NetnsCookie(7)].row.ip4, Some([10, 0, 0, 7].into()));
        let link_local: IpAddr = "fe80::7".parse().expect("an address");
        Arc::make_mut(&mut pod.netns).addresses = vec![(link_local, 2)];
        assert!(matches!(plain(&[pod]).refused[..], [(_, Refusal::NoAddress(_))]));
    }

    #[test]
    fn the_hosts_own_namespace_is_refused() {
        let pods = [candidate("ns/a", 7, "10.0.0.7"), candidate("ns/b", 8, "10.0.0.8")];
        let out = desired(&pods, &BTreeSet::from([NetnsCookie(7)]), &BTreeMap::new(), &LIMITS);
        assert!(matches!(&out.refused[..], [(name, Refusal::HostNetns(_))] if name == "ns/a"));
        assert!(out.pods.contains_key(&NetnsCookie(8)), "the other pod goes on");
    }

    #[test]
    fn of_two_pods_in_one_namespace_the_owner_keeps_it() {
        let pods = [candidate("ns/a", 7, "10.0.0.7"), candidate("ns/b", 7, "10.0.0.7")];
        assert_eq!(plain(&pods).pods[&NetnsCookie(7)].record.pod, "ns/a");
        let owner = Record { pod: "ns/b".into(), ..Record::default() };
        let owners = BTreeMap::from([(NetnsCookie(7), owner)]);
        let out = desired(&pods, &BTreeSet::new(), &owners, &LIMITS);
        assert_eq!(out.pods[&NetnsCookie(7)].record.pod, "ns/b");
        assert!(
            matches!(&out.refused[..], [(a, Refusal::Claimed { owner, .. })] if a == "ns/a" && owner == "ns/b")
        );
    }

    #[test]
    fn a_name_that_is_too_long_is_a_refusal() {
        let mut pods = [
            candidate(&"n".repeat(MAX_POD + 1), 7, "10.0.0.7"),
            candidate(&"n".repeat(200), 8, "10.0.0.8"),
        ];
        pods.iter_mut().for_each(|pod| Arc::make_mut(&mut pod.facts).uid.truncate(MAX_UID));
        let out = plain(&pods);
        assert!(matches!(&out.refused[..], [(_, Refusal::TooLong { limit: MAX_POD, .. })]));
        assert!(out.pods.contains_key(&NetnsCookie(8)), "the other pod goes on");
    }

    #[test]
    fn a_full_map_is_a_refusal() {
        let pods: Vec<_> =
            (1..=5).map(|n| candidate(&format!("ns/{n}"), n, &format!("10.0.0.{n}"))).collect();
        let out = plain(&pods);
        assert_eq!(out.pods.len(), 4);
        assert!(matches!(out.refused[..], [(_, Refusal::Full { map: "pods", limit: 4, .. })]));
    }

    #[test]
    fn exempt_interfaces_take_a_kernel_that_tells_them() {
        let mut pod = candidate("ns/a", 7, "10.0.0.7");
        Arc::make_mut(&mut pod.facts).policy.exclude_interfaces = ["net1".to_owned()].into();
        let limits = Limits { tells_interface: false, ..LIMITS };
        let other = candidate("ns/b", 8, "10.0.0.8");
        let out = desired(&[pod, other], &BTreeSet::new(), &BTreeMap::new(), &limits);
        assert_eq!(out.pods.keys().collect::<Vec<_>>(), [&NetnsCookie(8)]);
        let [(pod, refusal)] = &out.refused[..] else { panic!("{:?}", out.refused) };
        let text = refusal.to_string();
        assert!(pod == "ns/a" && text.contains("excludeInterfaces \"net1\""), "{pod}: {text}");
    }

    #[test]
    fn an_exempt_interface_takes_its_routes_along() {
        let mut pod = candidate("ns/a", 7, "10.0.0.7");
        Arc::make_mut(&mut pod.facts).policy.exclude_interfaces =
            ["net1".to_owned(), "later0".to_owned()].into();
        let out = plain(&[pod]);
        assert_eq!(out.pods[&NetnsCookie(7)].excluded_ifs, [3].into());
        assert!(out.pods[&NetnsCookie(7)].row.exclude_ifs);
        let members: Vec<_> = out.cidr_rules().map(|(r, m)| (r.net.prefix_len(), *m)).collect();
        assert_eq!(members, [(96, false), (112, true)], "the longest match decides");
    }

    #[test]
    fn included_inbound_ports_leave_the_exempt_one_out() {
        let mut pod = candidate("ns/a", 7, "10.0.0.7");
        Arc::make_mut(&mut pod.facts).policy.include_inbound_ports =
            Ports::Only([PortRange { first: 15007, last: 15009 }].into());
        let out = plain(&[pod]);
        let ports: Vec<_> = out.port_rules().map(|rule| (rule.port, rule.set)).collect();
        assert_eq!(ports, [(15007, RuleSet::InIncludePorts), (15009, RuleSet::InIncludePorts)]);
        assert!(!out.pods[&NetnsCookie(7)].row.in_all);
    }

    proptest! {
        #[test]
        fn aligned_parts_cover_exactly_the_range(a: u32, b: u32) {
            let (first, last) = (u64::from(a.min(b)), u64::from(a.max(b)));
            let parts = aligned(first, last, 32);
            prop_assert!(parts.len() <= 64);
            let mut next = first;
            for (start, bits) in parts {
                let size = 1u64 << (32 - bits);
                prop_assert_eq!(start, next);
                prop_assert_eq!(next % size, 0);
                next += size;
            }
            prop_assert_eq!(next, last + 1);
        }

        #[test]
        fn a_users_ports_are_those_of_every_exclusion_that_names_it(
            seed in proptest::collection::vec((0u32..20, 0u32..20, 0u16..6), 0..6), probe in 0u32..20, port in 0u16..6,
        ) {
            let exclusions: Vec<_> = seed.iter().map(|(a, b, port)| UidExclusion {
                protocol: Protocol::Tcp,
                ports: [PortRange::one(*port)].into(),
                first_uid: *a.min(b),
                last_uid: *a.max(b),
            }).collect();
            let mut rules = Rules { cookie: NetnsCookie(7), ..Rules::default() };
            rules.users(&exclusions);
            // As the kernel does: the class of the user, then the port in the class.
            let class = rules.uids.iter().find(|r| probe >> (32 - r.bits) == r.uid >> (32 - r.bits));
            let excluded = class.is_some_and(|rule| rules.ports.iter().any(|p| {
                p.set == RuleSet::OutExcludeTcpUids(rule.class) && p.port == port
            }));
            let named = exclusions.iter().any(|one| {
                (one.first_uid..=one.last_uid).contains(&probe) && one.ports.contains(&PortRange::one(port))
            });
            prop_assert_eq!(excluded, named);
        }

        #[test]
        fn without_removes_just_the_exempt(first: u16, last: u16, exempt: u16, probe: u16) {
            let range = PortRange { first: first.min(last), last: first.max(last) };
            let left = without(&[range].into(), &[exempt]);
            let inside = left.iter().any(|r| (r.first..=r.last).contains(&probe));
            prop_assert_eq!(inside, probe != exempt && (range.first..=range.last).contains(&probe));
        }

        #[test]
        fn order_of_pods_changes_nothing(seed in proptest::collection::vec((0u64..6, 0u8..6), 0..8)) {
            let mut pods: Vec<_> = seed.iter().enumerate()
                .map(|(n, (cookie, ip))| candidate(&format!("ns/{n}"), *cookie, &format!("10.0.0.{ip}")))
                .collect();
            let forward = plain(&pods);
            pods.reverse();
            prop_assert_eq!(&forward, &plain(&pods));
            prop_assert_eq!(forward.pods.len() + forward.refused.len(), pods.len());
        }
    }

    /// F31: a pod that wants more than any may have is known at once, whatever it is that it wants.
    #[test]
    fn f31_a_policy_that_is_too_much_is_named() {
        let odd = |limit: u32| (1..limit).step_by(2);
        let ports: BTreeSet<PortRange> = odd(65_536).map(|p| PortRange::one(p as u16)).collect();
        let range = |n: u32| IpNet::from(IpAddr::from(Ipv4Addr::from(n)));
        let ranges: BTreeSet<IpNet> = odd(20_000).map(range).collect();
        let uid = |n: u32| UidExclusion {
            protocol: Protocol::Tcp,
            ports: [PortRange::one(80)].into(),
            first_uid: n,
            last_uid: n + 1_000_000,
        };
        let none = Policy::default;
        for (map, policy) in [
            ("port_rules", Policy { exclude_outbound_ports: ports.clone(), ..none() }),
            ("port_rules", Policy { include_inbound_ports: Ports::Only(ports), ..none() }),
            ("cidr_rules", Policy { exclude_outbound_ranges: ranges.clone(), ..none() }),
            ("cidr_rules", Policy { include_outbound_ranges: Ranges::Only(ranges), ..none() }),
            (
                "uid_rules",
                Policy { exclude_outbound_for_uids: odd(20_000).map(uid).collect(), ..none() },
            ),
        ] {
            let mut pod = candidate("shop/a", 1, "10.0.0.1");
            Arc::make_mut(&mut pod.facts).policy = policy;
            let excess = excess(&pod.facts).expect("too much");
            assert!(matches!(excess, Refusal::TooMany { map: of, .. } if of == map), "{excess}");
            let out = desired(&[pod], &BTreeSet::new(), &BTreeMap::new(), &NODE);
            assert!(
                out.pods[&NetnsCookie(1)].row.out_all && out.pods[&NetnsCookie(1)].row.in_all,
                "all its traffic is captured"
            );
            assert_eq!((out.closed.len(), out.refused.len()), (1, 0));
        }
        assert_eq!(excess(&candidate("shop/a", 1, "10.0.0.1").facts), None);
    }

    /// F31: however many pods take as much as one may, the next has its share.
    #[test]
    fn f31_greedy_pods_leave_every_other_its_share() {
        let ports = |count: u16| (0..count).map(|n| PortRange::one(2 * n + 1)).collect();
        let pod = |n: u64, count: u16| {
            let ip = Ipv4Addr::from(0x0a00_0000 + n as u32).to_string();
            let mut pod = candidate(&format!("shop/p{n:04}"), n, &ip);
            Arc::make_mut(&mut pod.facts).policy.exclude_outbound_ports = ports(count);
            pod
        };
        let greedy = (1..=30).map(|n| pod(n, 4000));
        let modest = (31..=NODE.pods as u64).map(|n| pod(n, 20));
        let pods: Vec<Candidate> = greedy.chain(modest).collect();
        let out = desired(&pods, &BTreeSet::new(), &BTreeMap::new(), &NODE);
        assert_eq!((out.pods.len(), out.refused.len()), (NODE.pods, 0));
        assert!(out.closed.len() > 10 && out.closed.len() < 30, "{}", out.closed.len());
        for (name, refusal) in &out.closed {
            assert!(name.as_str() <= "shop/p0030", "{name}: {refusal}");
            assert!(matches!(refusal, Refusal::Full { map: "port_rules", .. }), "{refusal}");
        }
        assert!(out.port_rules().count() <= NODE.port_rules);
    }

    /// F31: what every pod needs, whatever its policy, is less than its share.
    #[test]
    fn f31_the_meshs_own_rules_fit_into_a_share() {
        for mesh in MESHES {
            let rules = Rules::of_policy(NetnsCookie(1), &Policy::default(), mesh);
            assert!(rules.ports.len() + 8 < PORT_RULES.share, "{}", mesh.name);
        }
        for quota in QUOTAS {
            assert!(quota.share * NODE.pods <= (quota.limit)(&NODE) / 2, "{}", quota.map);
        }
    }

    #[test]
    fn f31_addresses_beyond_the_quota_do_not_count_and_no_family_is_lost() {
        let v4 = (0..1000u32).map(|n| IpAddr::from(Ipv4Addr::from(0x0a00_0001 + n)));
        let addresses = v4.chain(["fd00::1".parse().expect("an address")]).map(|ip| (ip, 2));
        let mut netns = NetnsFacts::clone(&candidate("shop/a", 1, "10.0.0.1").netns);
        netns.addresses = addresses.collect();
        let bound = netns.bound();
        assert!(bound.more_addresses);
        assert_eq!(bound.addresses.len(), ADDRESSES + 1);
        assert!(!bound.bound().more_addresses);
    }
}
