//! A pod's policy as entries of maps: ranges of ports, addresses and users become prefixes.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::{IpNet, Ipv6Net};

use super::{
    Mesh,
    entries::{CidrRule, PortRule, RuleSet, UidRule},
    policy::{Policy, PortRange, Ports, Protocol, Ranges, UidExclusion},
    quota::{CIDR_RULES, PORT_RULES, Quota, Refusal, UID_RULES},
};
use crate::node::NetnsCookie;

/// How many exclusions for users are looked at: they are compared with each other.
const EXCLUSIONS: usize = 256;

/// The rules of one pod; they end soon after there are too many.
#[derive(Default)]
pub(super) struct Rules {
    pub cookie: NetnsCookie,
    pub ports: BTreeSet<PortRule>,
    pub cidrs: BTreeMap<CidrRule, bool>,
    pub uids: BTreeSet<UidRule>,
    pub too_many_users: bool,
}

impl Rules {
    pub fn of_policy(cookie: NetnsCookie, policy: &Policy, mesh: &Mesh) -> Self {
        let mut rules = Self { cookie, ..Self::default() };
        rules.ports(RuleSet::OutExcludePorts, &policy.exclude_outbound_ports);
        rules.ports(RuleSet::OutIncludePorts, &policy.include_outbound_ports);
        rules.ranges(RuleSet::OutExcludeCidrs, &policy.exclude_outbound_ranges);
        rules.ranges(RuleSet::InExcludeCidrs, &policy.exclude_inbound_ranges);
        rules.users(&policy.exclude_outbound_for_uids);
        if let Ranges::Only(ranges) = &policy.include_outbound_ranges {
            rules.ranges(RuleSet::OutIncludeCidrs, ranges);
        }
        match &policy.include_inbound_ports {
            Ports::All => {
                let exempt = mesh.inbound_exempt.iter().chain(mesh.inbound_excluded);
                let exempt = exempt.copied().map(PortRange::one).collect();
                rules.ports(RuleSet::InExcludePorts, &exempt);
                rules.ports(RuleSet::InExcludePorts, &policy.exclude_inbound_ports);
            }
            Ports::Only(ports) => {
                let ports = without(ports, mesh.inbound_exempt);
                rules.ports(RuleSet::InIncludePorts, &ports);
            }
        }
        rules
    }

    /// Whether they are more than a pod may have.
    pub fn excess(&self) -> Result<(), Refusal> {
        for (quota, wanted) in [
            (PORT_RULES, self.ports.len()),
            (CIDR_RULES, self.cidrs.len()),
            (UID_RULES, if self.too_many_users { usize::MAX } else { self.uids.len() }),
        ] {
            let Quota { map, most, .. } = quota;
            if wanted > most {
                return Err(Refusal::TooMany { map, most });
            }
        }
        Ok(())
    }

    pub fn ports(&mut self, set: RuleSet, ranges: &BTreeSet<PortRange>) {
        let cookie = self.cookie;
        for range in ranges {
            if self.ports.len() > PORT_RULES.most {
                return;
            }
            for (port, bits) in aligned(range.first.into(), range.last.into(), 16) {
                self.ports.insert(PortRule { cookie, set, port: port as u16, bits });
            }
        }
    }

    pub fn ranges(&mut self, set: RuleSet, ranges: &BTreeSet<IpNet>) {
        for range in ranges.iter().take(CIDR_RULES.most + 1) {
            self.range(set, *range, true);
        }
    }

    pub fn range(&mut self, set: RuleSet, range: IpNet, member: bool) {
        let v6 = matches!(range, IpNet::V6(_));
        let rule = CidrRule { cookie: self.cookie, set, net: mapped(range), v6 };
        self.cidrs.insert(rule, member);
    }

    /// Ports of users. Ranges of users may overlap, and a trie finds one entry: so users are
    /// put into classes, of which each has the ports of all the exclusions that name it.
    pub fn users(&mut self, exclusions: &[UidExclusion]) {
        let cookie = self.cookie;
        if exclusions.len() > EXCLUSIONS {
            self.too_many_users = true;
            return;
        }
        let edges: BTreeSet<u64> = exclusions
            .iter()
            .flat_map(|one| [u64::from(one.first_uid), u64::from(one.last_uid) + 1])
            .collect();
        let intervals = edges.iter().zip(edges.iter().skip(1));
        for (class, (first, next)) in (1..).zip(intervals) {
            let of_class = |one: &&UidExclusion| {
                u64::from(one.first_uid) <= *first && *next <= u64::from(one.last_uid) + 1
            };
            let mut any = false;
            for exclusion in exclusions.iter().filter(of_class) {
                any = true;
                if exclusion.protocol != Protocol::Udp {
                    self.ports(RuleSet::OutExcludeTcpUids(class), &exclusion.ports);
                }
                if exclusion.protocol != Protocol::Tcp {
                    self.ports(RuleSet::OutExcludeUdpUids(class), &exclusion.ports);
                }
            }
            if any {
                for (uid, bits) in aligned(*first, *next - 1, 32) {
                    self.uids.insert(UidRule { cookie, uid: uid as u32, bits, class });
                }
            }
        }
    }

    pub fn sets(&self) -> BTreeSet<RuleSet> {
        self.ports.iter().map(|rule| rule.set).chain(self.cidrs.keys().map(|r| r.set)).collect()
    }
}

/// The ports of `ranges` but for `exempt`.
pub(super) fn without(ranges: &BTreeSet<PortRange>, exempt: &[u16]) -> BTreeSet<PortRange> {
    let mut left = ranges.clone();
    for port in exempt.iter().copied() {
        left = left
            .into_iter()
            .flat_map(|range| {
                if !(range.first..=range.last).contains(&port) {
                    return vec![range];
                }
                let below =
                    (range.first < port).then(|| PortRange { first: range.first, last: port - 1 });
                let above =
                    (port < range.last).then(|| PortRange { first: port + 1, last: range.last });
                below.into_iter().chain(above).collect()
            })
            .collect();
    }
    left
}

/// A range of `width`-bit numbers as aligned powers of two, `(first, prefix bits)`: at most
/// twice `width` of them.
pub(super) fn aligned(first: u64, last: u64, width: u32) -> Vec<(u64, u8)> {
    let mut parts = Vec::new();
    let (mut next, end) = (first, last + 1);
    while next < end {
        let align = if next == 0 { width } else { next.trailing_zeros().min(width) };
        let size = align.min((end - next).ilog2());
        parts.push((next, (width - size) as u8));
        next += 1 << size;
    }
    parts
}

/// A range in v4-mapped form, its host bits cleared.
fn mapped(range: IpNet) -> Ipv6Net {
    match range.trunc() {
        IpNet::V4(v4) => Ipv6Net::new_assert(v4.addr().to_ipv6_mapped(), 96 + v4.prefix_len()),
        IpNet::V6(v6) => v6,
    }
}
