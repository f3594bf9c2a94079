//! Services, pure: from their objects to the lists of backends that the hooks choose from.
//!
//! [`object`] is what the API server and manifests say, [`facts`] what of it matters here,
//! [`endpoints`] which endpoints are eligible, [`node_ports`] where NodePorts are translated, and [`catalog`] all Services of the cluster.

pub mod canary;
pub mod catalog;
pub mod endpoints;
pub mod facts;
pub mod node_ports;
pub mod object;
#[cfg(test)]
mod tests;

use std::{
    collections::BTreeSet,
    fmt,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use serde::{Deserialize, Serialize};

pub use catalog::{Catalog, Options};
pub use node_ports::NodePorts;

/// What Services are translated for; SCTP is kube-proxy's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Protocol {
    /// TCP, MPTCP included.
    Tcp,
    /// UDP.
    Udp,
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
        })
    }
}

/// A family of addresses. A Service's two are apart: an IPv6 address has IPv6 endpoints only.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// Both.
    pub const ALL: [Self; 2] = [Self::V4, Self::V6];

    /// That of an address.
    pub fn of(ip: IpAddr) -> Self {
        if ip.is_ipv4() { Self::V4 } else { Self::V6 }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        })
    }
}

/// What processes dial.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Frontend {
    /// A ClusterIP, a load balancer's or external IP of a Service, or an address of this node.
    pub ip: IpAddr,
    /// The Service's port, or its node port.
    pub port: u16,
    /// Its protocol.
    pub protocol: Protocol,
}

impl fmt::Display for Frontend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", SocketAddr::new(self.ip, self.port), self.protocol)
    }
}

/// Which list of backends: that of one port of a Service, in one family, under one policy.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ListKey {
    /// `namespace/name`.
    pub service: Arc<str>,
    /// The port's name; a Service's only port may have none, which is "".
    pub port: Arc<str>,
    /// The port's protocol.
    pub protocol: Protocol,
    /// That of frontends and backends.
    pub family: Family,
    /// Only this node's endpoints (`internalTrafficPolicy: Local`).
    pub is_local: bool,
}

impl ListKey {
    /// The Service's port as kube-proxy names it: `namespace/name:port`, without the port's name if it
    /// has none.
    pub fn port_name(&self) -> String {
        let Self { service, port, .. } = self;
        if port.is_empty() { service.to_string() } else { format!("{service}:{port}") }
    }
}

impl fmt::Display for ListKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { service, port, protocol, family, is_local } = self;
        let local = if *is_local { ", this node's endpoints" } else { "" };
        write!(f, "{service} port {port:?}/{protocol}, {family}{local}")
    }
}

/// A list of backends, and what leads there. Its slices are sorted, and have everything once: small
/// sets, of which a cluster has tens of thousands.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct List {
    /// What is dialled. Never empty, and in no other list.
    pub frontends: Box<[Frontend]>,
    /// The endpoints that are eligible now. None: connections are refused.
    pub backends: Box<[SocketAddr]>,
    /// All of the port's endpoints that serve, whether eligible here or not, ready or not. A
    /// connected UDP socket whose backend is not among them is stale, unless there is none at all:
    /// kube-proxy's rule for conntrack entries, `pkg/proxy/conntrack/cleanup.go`.
    pub serving: Box<[SocketAddr]>,
    /// `sessionAffinity: ClientIP`: for so many seconds.
    pub affinity: Option<u32>,
}

/// An address of a Service as the agent wants it in the kernel: what it tells `sidestep status`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wanted {
    /// What is dialled.
    pub frontend: Frontend,
    /// [`ListKey::port_name`].
    pub port: String,
    /// The endpoints that are eligible.
    pub backends: BTreeSet<SocketAddr>,
}
