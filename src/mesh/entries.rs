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

/// Everything that the maps should hold for one pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodEntries {
    /// Its row, by which its connections are captured.
    pub row: PodRow,
    /// Who it is.
    pub record: Record,
    /// Its own addresses.
    pub locals: BTreeSet<IpAddr>,
    /// Those of them by which other pods of the node may be spliced with it.
    pub spliced: BTreeSet<IpAddr>,
    /// Where iptables' REDIRECT would lead what comes in by a device: the first address that it
    /// has, by the device's index.
    pub device_addrs: BTreeMap<(u32, DeviceFamily), IpAddr>,
    /// Port lists.
    pub port_rules: BTreeSet<PortRule>,
    /// Address lists, and whether a range is a member: the longest that matches decides.
    pub cidr_rules: BTreeMap<CidrRule, bool>,
    /// Users with ports of their own.
    pub uid_rules: BTreeSet<UidRule>,
    /// Exempt interfaces, by index.
    pub excluded_ifs: BTreeSet<u32>,
}

/// The row of the kernel's `pods` map; see `struct pod` of bpf/lib/pod.h.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodRow {
    /// The sidecar's user, which is exempt; none: no user is.
    pub proxy_uid: Option<u32>,
    /// The sidecar's group, where it is exempt as well.
    pub proxy_gid: Option<u32>,
    /// The pod's IPv4 address; none: it has none.
    pub ip4: Option<Ipv4Addr>,
    /// The pod's IPv6 address, a link-local one where it has no other; none: it has none.
    pub ip6: Option<Ipv6Addr>,
    /// IPv4 is captured: within the pod also where it has no such address.
    pub capture_v4: bool,
    /// IPv6 is captured.
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
    /// What is bound to 127.0.0.0/8 may call off the pod.
    pub route_localnet: bool,
    /// The pod's own rules translate what comes in.
    pub own_nat: bool,
    /// DNS over TCP, where DNS is captured.
    pub tcp_dns: TcpDns,
    /// The lists that have entries.
    pub sets: BTreeSet<RuleSet>,
    /// The sidecar's outbound listener.
    pub out_port: u16,
    /// The sidecar's inbound listener.
    pub in_port: u16,
    /// Port never redirected from the sidecar to its own pod; 0: none.
    pub hbone_port: u16,
    /// The sidecar's DNS listener; 0: DNS is not captured.
    pub dns_port: u16,
    /// Index into the counters.
    pub mesh: u16,
    /// The device that has its address, by index; 0: it is not known.
    pub device: u32,
    /// Where captured DNS goes, by each device.
    pub dns_routes: Vec<DnsRoute>,
}

impl PodRow {
    /// What it takes of the pod's lo.
    pub fn needs_of_lo(&self) -> lo::Needs {
        lo::Needs {
            ip4: self.ip4,
            ip6: self.ip6,
            capture_v6: self.capture_v6,
            dns_routes: self.dns_routes.clone(),
        }
    }
}

/// A kind of addresses of which a device has a first one; `enum device_family` of
/// bpf/mesh/inbound.h.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum DeviceFamily {
    /// IPv4.
    V4,
    /// IPv6, whatever its scope: the kernel lists what is global first.
    V6,
    /// IPv6, link-local.
    V6Link,
}

/// What userspace remembers about an enrolled pod, beside its row.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Record {
    /// `namespace/name`.
    pub pod: String,
    /// `metadata.uid`.
    pub uid: String,
    /// Path of the network namespace.
    pub netns: PathBuf,
}

/// Which list a rule belongs to; `enum rule_set` of bpf/mesh/rules.h.
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
    /// Every route of the pod; a member leads to an interface that is exempt.
    OutExcludeRoutes,
}

/// An aligned power-of-two range of ports: all that share the first `bits` bits with `port`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct PortRule {
    /// The pod.
    pub cookie: NetnsCookie,
    /// The list.
    pub set: RuleSet,
    /// First port of the range.
    pub port: u16,
    /// 16 for one port, 0 for all.
    pub bits: u8,
}

/// An aligned power-of-two range of users: all that share the first `bits` bits with `uid`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct UidRule {
    /// The pod.
    pub cookie: NetnsCookie,
    /// First user of the range.
    pub uid: u32,
    /// 32 for one user, 0 for all.
    pub bits: u8,
    /// Which class these users are in, from 1.
    pub class: u32,
}

/// An address range, IPv4 in v4-mapped form.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct CidrRule {
    /// The pod.
    pub cookie: NetnsCookie,
    /// The list.
    pub set: RuleSet,
    /// The range; its host bits are zero.
    pub net: Ipv6Net,
    /// It is one of IPv6 itself.
    pub v6: bool,
}

/// How long the texts of a [`Record`] may be; `struct pod_record` of bpf/lib/records.h.
pub const MAX_POD: usize = 320;
/// See [`MAX_POD`].
pub const MAX_UID: usize = 64;
/// See [`MAX_POD`].
pub const MAX_NETNS: usize = 256;
