//! What must hold for whatever people write: nothing panics, a mistake is named with the whole
//! text and its key, nothing that was accepted is dropped on the way into the maps.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

use ipnet::{IpNet, Ipv6Net};
use k8s_openapi::api::core::v1::Pod;
use sidestep::{
    mesh::{
        annotations::FactsError,
        desired::{Candidate, Desired, desired},
        entries::{PodEntries, RuleSet},
        facts::{PodFacts, facts},
        istio, kuma, linkerd,
        policy::{PortRange, Ports, Protocol, Ranges, UidExclusion},
        quota::Limits,
    },
    node::{NetnsCookie, NetnsFacts},
};

const KEY: &str = "example.org/key";

/// As many as the kernel's maps have.
const LIMITS: Limits = Limits {
    pods: 1024,
    locals: 16384,
    port_rules: 65536,
    cidr_rules: 65536,
    uid_rules: 16384,
    excluded_ifs: 4096,
    tells_interface: true,
};
/// So few that much is refused.
const TIGHT: Limits = Limits {
    pods: 1,
    locals: 3,
    port_rules: 6,
    cidr_rules: 2,
    uid_rules: 2,
    excluded_ifs: 1,
    tells_interface: false,
};

/// Every parser of lists, on the same text.
pub fn check_lists(text: &str) {
    let trimmed = || items(text.trim()).map(str::trim);
    if let Some(ports) = told(istio::parse_ports(KEY, text), text) {
        assert_eq!(ports, trimmed().map(port).collect(), "{text:?}");
    }
    if let Some(ports) = told(kuma::parse_ports(KEY, text), text) {
        let expected: BTreeSet<PortRange> =
            trimmed().filter(|item| !item.is_empty()).map(port).collect();
        assert!(ports.iter().all(|port| port.first != 0), "{text:?}");
        assert_eq!(ports, expected, "{text:?}");
    }
    let (ports, bad) = linkerd::parse_ports(text);
    let mut good = items(text).filter(|item| !bad.contains(item));
    assert_eq!(ports, good.by_ref().map(signed_range).collect(), "{text:?}");
    if let Some(ranges) = told(istio::parse_ranges(KEY, text), text) {
        assert_eq!(ranges, items(text).map(ip_range).collect(), "{text:?}");
    }
    if let Some(ranges) = told(kuma::parse_ips(KEY, text), text) {
        assert_eq!(ranges, text.split(',').map(str::trim).map(ip_range).collect(), "{text:?}");
    }
    if let Some(ranges) = told(linkerd::parse_subnets(KEY, text), text) {
        assert_eq!(ranges, items(text).map(str::trim).map(ip_range).collect(), "{text:?}");
    }
    if let Some(names) = told(istio::parse_interfaces(KEY, text), text) {
        let expected: BTreeSet<String> = items(text).map(|item| item.trim().to_owned()).collect();
        assert_eq!(names, expected, "{text:?}");
        assert!(names.iter().all(|name| !name.is_empty() && name.len() < 16), "{text:?}");
    }
    if let Some(exclusions) = told(kuma::parse_uid_exclusions(KEY, text), text) {
        let expected: Vec<UidExclusion> = text.split(';').map(uid_exclusion).collect();
        assert_eq!(exclusions, expected, "{text:?}");
    }
}

/// What was parsed; an error must name the key and the whole text.
fn told<T>(parsed: Result<T, FactsError>, whole: &str) -> Option<T> {
    match parsed {
        Ok(value) => Some(value),
        Err(FactsError::Invalid { key, text, why }) => {
            assert_eq!((key.as_str(), text.as_str()), (KEY, whole));
            assert!(!why.is_empty());
            None
        }
        Err(other) => panic!("{other}"),
    }
}

// A second reading of what the parsers accept, as simple as can be: it may panic, and then a
// parser took what it should not have.

fn items(text: &str) -> impl Iterator<Item = &str> {
    text.split(',').filter(move |_| !text.is_empty())
}

fn number(text: &str) -> u32 {
    assert!(!text.is_empty() && text.bytes().all(|b| b.is_ascii_digit()), "no number: {text:?}");
    text.parse().expect("a number")
}

fn port(item: &str) -> PortRange {
    PortRange::one(u16::try_from(number(item)).expect("a port"))
}

fn port_range(item: &str) -> PortRange {
    let (first, last) = item.split_once('-').unwrap_or((item, item));
    let range = PortRange { first: port(first).first, last: port(last).last };
    assert!(range.first <= range.last, "{item:?}");
    range
}

/// Each number may have a sign.
fn signed_range(item: &str) -> PortRange {
    let (first, last) = item.split_once('-').unwrap_or((item, item));
    let bare = |text: &str| text.strip_prefix('+').unwrap_or(text).to_owned();
    port_range(&format!("{}-{}", bare(first), bare(last)))
}

fn ip_range(item: &str) -> IpNet {
    let (ip, bits) = item.split_once('/').map_or((item, None), |(ip, bits)| (ip, Some(bits)));
    let ip: IpAddr = ip.parse().expect("an address");
    bits.map_or(IpNet::from(ip), |bits| {
        let bits = u8::try_from(number(bits)).expect("a prefix length");
        IpNet::new(ip, bits).expect("a prefix length")
    })
}

fn uid_exclusion(item: &str) -> UidExclusion {
    let mut fields = item.rsplit(':');
    let uids = fields.next().expect("uids");
    let ports = fields.next().unwrap_or("*");
    let protocols = fields.next().unwrap_or_default().to_ascii_lowercase();
    let named: BTreeSet<&str> = protocols.split(',').map(str::trim).collect();
    let protocol = match Vec::from_iter(named)[..] {
        ["tcp"] => Protocol::Tcp,
        ["udp"] => Protocol::Udp,
        ["" | "*"] | ["tcp", "udp"] => Protocol::Both,
        ref other => panic!("no protocol: {other:?}"),
    };
    assert_eq!(fields.next(), None, "{item:?}");
    let ports = match ports {
        "" | "*" => [PortRange::ALL].into(),
        ports => ports.split(',').map(port_range).collect(),
    };
    let (first, last) = uids.split_once('-').unwrap_or((uids, uids));
    UidExclusion { protocol, ports, first_uid: number(first), last_uid: number(last) }
}

/// Pods -> facts -> what the maps should hold, each pod in a namespace of its own.
pub fn check_pods(pods: &[Pod]) {
    let mut candidates = Vec::new();
    for (pod, cookie) in pods.iter().zip(1..) {
        let parsed = match facts(pod) {
            Ok(Some(parsed)) => parsed,
            Ok(None) => continue,
            Err(error) => {
                assert_named(pod, &error);
                continue;
            }
        };
        assert_eq!(facts(pod), Ok(Some(parsed.clone())), "the same pod, the same facts");
        if let Some(error) = &parsed.policy_error {
            assert_named(pod, error);
            assert_eq!(parsed.facts.policy, Default::default(), "all its traffic is captured");
        }
        let addresses = vec![(IpAddr::from([10, 0, 0, 7]), 2)];
        let path = format!("/run/netns/{cookie}").into();
        let interfaces = BTreeMap::from([("lo".into(), 1), ("eth0".into(), 2), ("net1".into(), 3)]);
        let net = |text: &str| text.parse().expect("a range");
        let routes = vec![(net("0.0.0.0/0"), 2), (net("10.1.0.0/16"), 3), (net("::/0"), 2)];
        let (more_addresses, route_localnet) = (false, false);
        let netns = NetnsFacts {
            path,
            cookie: NetnsCookie(cookie),
            addresses,
            more_addresses,
            interfaces,
            routes,
            route_localnet,
            own_nat: false,
            rules: Ok(Vec::new()),
            forwarded: 0,
        };
        let (facts, netns) = (Arc::new(parsed.facts), Arc::new(netns));
        candidates.push(Candidate { facts, netns, beside: None });
    }
    for limits in [LIMITS, TIGHT] {
        let out = check_limits(&candidates, &limits);
        for candidate in &candidates {
            check_complete(candidate, &out);
        }
    }
}

/// The error names an annotation or a field of this pod, with all of its text; or a field of an
/// annotation that has such.
fn assert_named(pod: &Pod, error: &FactsError) {
    let (FactsError::Invalid { key, text, .. } | FactsError::Unsupported { key, text }) = error
    else {
        return;
    };
    if key.contains(": ") {
        return;
    }
    let whole = pod.metadata.annotations.as_ref().and_then(|all| all.get(key));
    assert!(whole.is_none_or(|whole| whole == text), "{error}: not all of {whole:?}");
    let everything = serde_json::to_value(pod).expect("a pod is JSON");
    assert!(holds(&everything, text), "{error}: the pod says no such thing");
}

fn holds(value: &serde_json::Value, text: &str) -> bool {
    match value {
        serde_json::Value::String(string) => string == text,
        serde_json::Value::Number(number) => number.to_string() == text,
        serde_json::Value::Array(values) => values.iter().any(|value| holds(value, text)),
        serde_json::Value::Object(fields) => fields.values().any(|value| holds(value, text)),
        _ => false,
    }
}

fn check_limits(candidates: &[Candidate], limits: &Limits) -> Desired {
    let of =
        |candidates: &[Candidate]| desired(candidates, &BTreeSet::new(), &BTreeMap::new(), limits);
    let out = of(candidates);
    assert_eq!(of(candidates), out, "the same pods, the same maps");
    assert_eq!(out.pods.len() + out.refused.len(), candidates.len(), "every pod has its answer");
    for (len, limit) in [
        (out.pods.len(), limits.pods),
        (out.used[0], limits.locals),
        (out.used[1], limits.port_rules),
        (out.used[2], limits.cidr_rules),
        (out.used[3], limits.uid_rules),
        (out.used[4], limits.excluded_ifs),
    ] {
        assert!(len <= limit, "{len} entries in a map of {limit}");
    }
    let names: BTreeSet<_> = candidates.iter().map(|one| &one.facts.name).collect();
    if names.len() == candidates.len() {
        let reversed: Vec<_> = candidates.iter().rev().cloned().collect();
        assert_eq!(of(&reversed), out, "their order is nothing");
    }
    out
}

/// Everything that an enrolled pod's policy names is in the rules, and nothing else.
fn check_complete(Candidate { facts, netns, .. }: &Candidate, out: &Desired) {
    let cookie = netns.cookie;
    let Some(PodEntries { row, excluded_ifs, .. }) = out.pods.get(&cookie).map(|pod| &**pod) else {
        return;
    };
    let policy = &facts.policy;
    let ports = |set| covered(out, cookie, set);
    assert_eq!(ports(RuleSet::OutExcludePorts), merged(&policy.exclude_outbound_ports));
    assert_eq!(ports(RuleSet::OutIncludePorts), merged(&policy.include_outbound_ports));
    let cidrs = |set| -> BTreeSet<(bool, Ipv6Net)> {
        let mine = out.cidr_rules().filter(|(rule, _)| (rule.cookie, rule.set) == (cookie, set));
        mine.map(|(rule, member)| {
            assert!(member, "{rule:?}");
            (rule.v6, rule.net)
        })
        .collect()
    };
    assert_eq!(cidrs(RuleSet::OutExcludeCidrs), mapped(&policy.exclude_outbound_ranges));
    assert_eq!(cidrs(RuleSet::InExcludeCidrs), mapped(&policy.exclude_inbound_ranges));
    match &policy.include_outbound_ranges {
        Ranges::All => assert!(row.out_all),
        Ranges::Only(only) => {
            assert!(!row.out_all);
            assert_eq!(cidrs(RuleSet::OutIncludeCidrs), mapped(only));
        }
    }
    let one = |ports: &'static [u16]| ports.iter().copied().map(PortRange::one);
    match &policy.include_inbound_ports {
        Ports::All => {
            let mut excluded = policy.exclude_inbound_ports.clone();
            excluded.extend(one(facts.mesh.inbound_exempt).chain(one(facts.mesh.inbound_excluded)));
            assert_eq!((row.in_all, ports(RuleSet::InExcludePorts)), (true, merged(&excluded)));
        }
        Ports::Only(only) => {
            let mut left = merged(only);
            for port in facts.mesh.inbound_exempt {
                left[usize::from(*port)] = false;
            }
            assert_eq!((row.in_all, ports(RuleSet::InIncludePorts)), (false, left));
        }
    }
    let exempt =
        netns.interfaces.iter().filter(|(name, _)| policy.exclude_interfaces.contains(*name));
    let exempt: BTreeSet<_> = exempt.map(|(_, index)| *index).collect();
    assert_eq!(row.exclude_ifs, !exempt.is_empty());
    assert!(exempt.is_subset(excluded_ifs));
    check_users(facts, cookie, out);
}

/// The edges of every exclusion's users, and their neighbours, have the ports of all exclusions
/// that name them.
fn check_users(facts: &PodFacts, cookie: NetnsCookie, out: &Desired) {
    let exclusions = &facts.policy.exclude_outbound_for_uids;
    // Quadratic: a few are as good as many.
    for edge in exclusions.iter().take(4).flat_map(|one| [one.first_uid, one.last_uid]) {
        for uid in [edge.wrapping_sub(1), edge, edge.wrapping_add(1)] {
            let same = |rule: u32, bits: u8| {
                let shift = 32 - u32::from(bits);
                uid.checked_shr(shift) == rule.checked_shr(shift)
            };
            let mine = out.uid_rules().filter(|rule| rule.cookie == cookie);
            let classes: Vec<u32> =
                mine.filter(|rule| same(rule.uid, rule.bits)).map(|rule| rule.class).collect();
            assert!(classes.len() <= 1, "a trie finds one entry: {uid} is in {classes:?}");
            for (other, set) in [
                (Protocol::Udp, RuleSet::OutExcludeTcpUids as fn(u32) -> RuleSet),
                (Protocol::Tcp, RuleSet::OutExcludeUdpUids),
            ] {
                let names = |one: &&UidExclusion| {
                    one.protocol != other && (one.first_uid..=one.last_uid).contains(&uid)
                };
                let wanted: BTreeSet<PortRange> =
                    exclusions.iter().filter(names).flat_map(|one| one.ports.clone()).collect();
                let got = match classes.first() {
                    Some(class) => covered(out, cookie, set(*class)),
                    None => merged(&BTreeSet::new()),
                };
                assert_eq!(got, merged(&wanted), "uid {uid}, not {other:?}");
            }
        }
    }
}

/// Which ports a list of the maps covers.
fn covered(out: &Desired, cookie: NetnsCookie, set: RuleSet) -> Vec<bool> {
    let mut all = vec![false; 1 << 16];
    for rule in out.port_rules().filter(|rule| (rule.cookie, rule.set) == (cookie, set)) {
        let first = usize::from(rule.port);
        let size = 1 << (16 - rule.bits);
        assert_eq!(first % size, 0, "{rule:?} is not aligned");
        all[first..first + size].fill(true);
    }
    all
}

/// Which ports a list of the policy names.
fn merged(ranges: &BTreeSet<PortRange>) -> Vec<bool> {
    let mut all = vec![false; 1 << 16];
    for range in ranges {
        all[usize::from(range.first)..=usize::from(range.last)].fill(true);
    }
    all
}

/// In v4-mapped form, and whether it was IPv6 already.
fn mapped(ranges: &BTreeSet<IpNet>) -> BTreeSet<(bool, Ipv6Net)> {
    let one = |range: &IpNet| match range {
        IpNet::V4(v4) => {
            let net = Ipv6Net::new(v4.addr().to_ipv6_mapped(), 96 + v4.prefix_len());
            (false, net.expect("a prefix length").trunc())
        }
        IpNet::V6(v6) => (true, v6.trunc()),
    };
    ranges.iter().map(one).collect()
}
