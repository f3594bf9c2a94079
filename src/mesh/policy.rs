//! The policy of a mesh's rules for a pod's traffic, independent of the mesh and of the
//! annotations' syntax.

use std::collections::BTreeSet;

use ipnet::IpNet;

/// The treatment of DNS over TCP in a pod whose DNS is captured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TcpDns {
    /// DNS over TCP goes to the sidecar's DNS listener.
    Captured,
    /// The app's DNS over TCP is never captured; the sidecar's is treated as TCP to any other port.
    Direct,
    /// Port 53 is treated as any other TCP port.
    AsAnyPort,
}

/// The condition for capturing IPv6 in a pod that has an IPv6 address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ipv6 {
    /// IPv6 is always captured.
    Always,
    /// IPv6 is captured if the pod's first address is an IPv6 one.
    WhereFirst,
    /// IPv6 is never captured.
    Never,
}

/// The protocols of an exclusion.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// Only TCP.
    Tcp,
    /// Only UDP.
    Udp,
    /// TCP and UDP.
    Both,
}

/// Ports that are never captured for some users.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UidExclusion {
    /// The protocols of the exclusion.
    pub protocol: Protocol,
    /// The excluded ports.
    pub ports: BTreeSet<PortRange>,
    /// The first user of the range.
    pub first_uid: u32,
    /// The last user of the range, included.
    pub last_uid: u32,
}

/// Ports from `first` to `last`, both included.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct PortRange {
    /// First port.
    pub first: u16,
    /// Last port, not below `first`.
    pub last: u16,
}

impl PortRange {
    /// A single port.
    pub const fn one(port: u16) -> Self {
        Self { first: port, last: port }
    }

    /// Every port.
    pub const ALL: Self = Self { first: 0, last: u16::MAX };
}

/// Included ports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ports {
    /// All ports: `*`.
    All,
    /// Only these ports; the list may be empty.
    Only(BTreeSet<PortRange>),
}

/// Included address ranges.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ranges {
    /// All ranges: `*`.
    All,
    /// Only these ranges; the list may be empty.
    Only(BTreeSet<IpNet>),
}

/// The mesh's rules: which traffic of a pod is captured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    /// Excluded destination ports; they beat every other outbound rule.
    pub exclude_outbound_ports: BTreeSet<PortRange>,
    /// Excluded destination ranges; they beat the outbound includes.
    pub exclude_outbound_ranges: BTreeSet<IpNet>,
    /// Included destination ports, added to `include_outbound_ranges`.
    pub include_outbound_ports: BTreeSet<PortRange>,
    /// Included destination ranges, added to `include_outbound_ports`.
    pub include_outbound_ranges: Ranges,
    /// Included ports of the pod; with `Only`, `exclude_inbound_ports` is ignored.
    pub include_inbound_ports: Ports,
    /// Excluded ports of the pod, added to the mesh's own.
    pub exclude_inbound_ports: BTreeSet<PortRange>,
    /// Sources that are never captured.
    pub exclude_inbound_ranges: BTreeSet<IpNet>,
    /// Excluded ports of users; they beat every other outbound rule.
    pub exclude_outbound_for_uids: Vec<UidExclusion>,
    /// Names of interfaces whose traffic is never captured, in either direction.
    pub exclude_interfaces: BTreeSet<String>,
}

impl Default for Policy {
    /// Captures everything that the mesh itself does not exempt.
    fn default() -> Self {
        Self {
            exclude_outbound_ports: BTreeSet::new(),
            exclude_outbound_ranges: BTreeSet::new(),
            include_outbound_ports: BTreeSet::new(),
            include_outbound_ranges: Ranges::All,
            include_inbound_ports: Ports::All,
            exclude_inbound_ports: BTreeSet::new(),
            exclude_inbound_ranges: BTreeSet::new(),
            exclude_outbound_for_uids: Vec::new(),
            exclude_interfaces: BTreeSet::new(),
        }
    }
}
