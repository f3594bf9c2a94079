//! What the maps hold for one pod, in the agent's own types.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::PathBuf,
};

use ipnet::Ipv6Net;

use super::policy::TcpDns;
use crate::node::{
    NetnsCookie,
    lo::{self, DnsRoute},
};

/// The desired contents of the maps for one pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodEntries {
    /// The row in `pods`, which makes the pod's connections captured.
    pub row: PodRow,
    /// The pod's name, uid and namespace path.
    pub record: Record,
    /// The pod's own addresses.
    pub locals: BTreeSet<IpAddr>,
    /// The addresses by which other pods of the node may be spliced with this one.
    pub spliced: BTreeSet<IpAddr>,
    /// The target of iptables' REDIRECT for packets that a device receives: the device's first
    /// address, by the device's index.
    pub device_addrs: BTreeMap<(u32, DeviceFamily), IpAddr>,
    /// The port lists.
    pub port_rules: BTreeSet<PortRule>,
    /// The address lists, and whether a range is a member: the longest match decides.
    pub cidr_rules: BTreeMap<CidrRule, bool>,
    /// The users with port exclusions of their own.
    pub uid_rules: BTreeSet<UidRule>,
    /// The indices of exempt interfaces.
    pub excluded_ifs: BTreeSet<u32>,
}

/// The row of the kernel's `pods` map; see `struct pod` of bpf/lib/pod.h.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodRow {
    /// The sidecar's user, which is exempt, if any.
    pub proxy_uid: Option<u32>,
    /// The sidecar's group, if it is exempt as well.
    pub proxy_gid: Option<u32>,
    /// The pod's IPv4 address, if it has one.
    pub ip4: Option<Ipv4Addr>,
    /// The pod's IPv6 address, if it has one; a link-local one only if it has no other.
    pub ip6: Option<Ipv6Addr>,
    /// The mesh's own rules are in the pod, and do what Sidestep leaves.
    pub beside: bool,
    /// Whether IPv4 is captured; within the pod that is possible without an IPv4 address.
    pub capture_v4: bool,
    /// Whether IPv6 is captured.
    pub capture_v6: bool,
    /// The sidecar's calls to its own pod go to the inbound listener.
    pub self_inbound: bool,
    /// Every outbound connection is included.
    pub out_all: bool,
    /// Every inbound connection is included.
    pub in_all: bool,
    /// The include ranges name loopback: the app's calls over lo are not exempt.
    pub loopback_included: bool,
    /// Excluded outbound ports hold for UDP as well.
    pub udp_excludes: bool,
    /// Excluded destinations beat every other rule.
    pub cidrs_first: bool,
    /// Some of the pod's interfaces are exempt.
    pub exclude_ifs: bool,
    /// Its connections within the node may skip the TCP/IP stack.
    pub splice: bool,
    /// Whether sockets bound to 127.0.0.0/8 may call off the pod.
    pub route_localnet: bool,
    /// Whether the pod's own rules translate incoming connections.
    pub own_nat: bool,
    /// The treatment of DNS over TCP, if DNS is captured.
    pub tcp_dns: TcpDns,
    /// The lists that are not empty.
    pub sets: BTreeSet<RuleSet>,
    /// The port of the sidecar's outbound listener.
    pub out_port: u16,
    /// The port of the sidecar's inbound listener.
    pub in_port: u16,
    /// The port that is never redirected from the sidecar to its own pod; 0 for none.
    pub hbone_port: u16,
    /// The port of the sidecar's DNS listener; 0 if DNS is not captured.
    pub dns_port: u16,
    /// The mesh's index into the counters.
    pub mesh: u16,
    /// The index of the device with the pod's address; 0 if unknown.
    pub device: u32,
    /// The routes for captured DNS, one per device.
    pub dns_routes: Vec<DnsRoute>,
}

impl PodRow {
    /// Whether Sidestep itself captures DNS.
    pub fn captures_dns(&self) -> bool {
        self.dns_port != 0 && !self.beside
    }

    /// The additions to the pod's lo that this row needs.
    pub fn needs_of_lo(&self) -> lo::Needs {
        if self.beside {
            return lo::Needs::default();
        }
        lo::Needs {
            ip4: self.ip4,
            ip6: self.ip6,
            capture_v6: self.capture_v6,
            dns_routes: self.dns_routes.clone(),
        }
    }
}

/// A kind of address, of which each device has a first one; `enum device_family` of
/// bpf/mesh/inbound.h.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum DeviceFamily {
    /// IPv4.
    V4,
    /// IPv6 of any scope: the kernel lists global addresses first.
    V6,
    /// IPv6 link-local.
    V6Link,
}

/// The agent's record of an enrolled pod, beside its row.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Record {
    /// The pod, as `namespace/name`.
    pub pod: String,
    /// Its `metadata.uid`.
    pub uid: String,
    /// The path of its network namespace.
    pub netns: PathBuf,
}

/// The list that a rule belongs to; `enum rule_set` of bpf/mesh/rules.h.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum RuleSet {
    /// Destination ports never captured outbound.
    OutExcludePorts,
    /// Destination ports captured outbound.
    OutIncludePorts,
    /// Ports of the pod never captured inbound.
    InExcludePorts,
    /// Ports of the pod captured inbound.
    InIncludePorts,
    /// Destinations never captured outbound.
    OutExcludeCidrs,
    /// Destinations captured outbound.
    OutIncludeCidrs,
    /// Sources never captured inbound.
    InExcludeCidrs,
    /// TCP ports never captured outbound for this class of users.
    OutExcludeTcpUids(u32),
    /// UDP ports never captured outbound for this class of users.
    OutExcludeUdpUids(u32),
    /// Every route of the pod; a member leads to an exempt interface.
    OutExcludeRoutes,
}

/// An aligned power-of-two range of ports: all that share the first `bits` bits with `port`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct PortRule {
    /// The pod's namespace.
    pub cookie: NetnsCookie,
    /// The list that the rule belongs to.
    pub set: RuleSet,
    /// The first port of the range.
    pub port: u16,
    /// The prefix length: 16 for one port, 0 for all.
    pub bits: u8,
}

/// An aligned power-of-two range of users: all that share the first `bits` bits with `uid`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct UidRule {
    /// The pod's namespace.
    pub cookie: NetnsCookie,
    /// The first user of the range.
    pub uid: u32,
    /// The prefix length: 32 for one user, 0 for all.
    pub bits: u8,
    /// The class of these users, from 1.
    pub class: u32,
}

/// An address range, IPv4 in v4-mapped form.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct CidrRule {
    /// The pod's namespace.
    pub cookie: NetnsCookie,
    /// The list that the range belongs to.
    pub set: RuleSet,
    /// The range; its host bits are zero.
    pub net: Ipv6Net,
    /// Whether it is a range of IPv6 itself.
    pub v6: bool,
}

/// The maximum lengths of the texts of a [`Record`]; `struct pod_record` of bpf/lib/records.h.
pub const MAX_POD: usize = 320;
/// See [`MAX_POD`].
pub const MAX_UID: usize = 64;
/// See [`MAX_POD`].
pub const MAX_NETNS: usize = 256;
