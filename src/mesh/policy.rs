//! What a mesh's rules say about a pod's traffic, whichever the mesh and however the pod says so.

use std::collections::BTreeSet;

use ipnet::IpNet;

/// What becomes of DNS over TCP in a pod whose DNS is captured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TcpDns {
    /// It goes to the sidecar's DNS listener.
    Captured,
    /// The app's is never captured; the sidecar's is as to any port.
    Direct,
    /// It is TCP as to any port.
    AsAnyPort,
}

/// When a pod's IPv6 is captured, given that it has an IPv6 address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ipv6 {
    /// In any case.
    Always,
    /// Where its first address is an IPv6 one.
    WhereFirst,
    /// Never.
    Never,
}

/// What an exclusion is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// TCP alone.
    Tcp,
    /// UDP alone.
    Udp,
    /// Both.
    Both,
}

/// Ports never captured for some users.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UidExclusion {
    /// Of this protocol.
    pub protocol: Protocol,
    /// These ports.
    pub ports: BTreeSet<PortRange>,
    /// From this user,
    pub first_uid: u32,
    /// to this one, both included.
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
    /// `*`
    All,
    /// These only; may be none.
    Only(BTreeSet<PortRange>),
}

/// Included address ranges.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ranges {
    /// `*`
    All,
    /// These only; may be none.
    Only(BTreeSet<IpNet>),
}

/// What is captured, in the terms of the mesh's own rules.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    /// Beats everything outbound.
    pub exclude_outbound_ports: BTreeSet<PortRange>,
    /// Beats the outbound includes.
    pub exclude_outbound_ranges: BTreeSet<IpNet>,
    /// Adds to `include_outbound_ranges`.
    pub include_outbound_ports: BTreeSet<PortRange>,
    /// Adds to `include_outbound_ports`.
    pub include_outbound_ranges: Ranges,
    /// With `Only`, `exclude_inbound_ports` is ignored.
    pub include_inbound_ports: Ports,
    /// Added to the mesh's own.
    pub exclude_inbound_ports: BTreeSet<PortRange>,
    /// Sources never captured.
    pub exclude_inbound_ranges: BTreeSet<IpNet>,
    /// Ports of users; beat everything outbound.
    pub exclude_outbound_for_uids: Vec<UidExclusion>,
    /// Names of interfaces whose traffic is never captured, either way.
    pub exclude_interfaces: BTreeSet<String>,
}

impl Default for Policy {
    /// Everything is captured, but for what the mesh itself exempts.
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
