//! What a row of the suite is made of. The rows themselves are in `rows.rs`.

use serde::Serialize;

/// A service mesh.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Mesh {
    Istio,
    Linkerd,
    Kuma,
}

impl Mesh {
    pub const fn name(self) -> &'static str {
        match self {
            Self::Istio => "istio",
            Self::Linkerd => "linkerd",
            Self::Kuma => "kuma",
        }
    }
}

/// How the client names its destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// An IPv4 address on an AF_INET socket.
    V4,
    /// An IPv6 address on an AF_INET6 socket.
    V6,
    /// An IPv4 address as `::ffff:a.b.c.d` on an AF_INET6 socket.
    Mapped,
}

impl Kind {
    pub const ALL: &'static [Self] = &[Self::V4, Self::V6, Self::Mapped];
    pub const IPV4: &'static [Self] = &[Self::V4, Self::Mapped];
    pub const IPV6: &'static [Self] = &[Self::V6];
    pub const ONE_V4: &'static [Self] = &[Self::V4];
    pub const FAMILIES: &'static [Self] = &[Self::V4, Self::V6];

    pub const fn name(self) -> &'static str {
        match self {
            Self::V4 => "v4",
            Self::V6 => "v6",
            Self::Mapped => "mapped",
        }
    }
}

/// Who makes the call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Who {
    /// The application.
    App,
    /// The sidecar, by user and group.
    Proxy,
    /// A process with the sidecar's user, but another group.
    ProxyUser,
    /// A process with the sidecar's group, but another user.
    ProxyGroup,
    /// Any other process of the pod.
    User(u32),
    /// A pod that is in no mesh.
    Peer,
    /// The node itself, such as the kubelet's probe.
    Host,
}

/// A kind of address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place {
    /// Off the pod: 10.96.0.10 and fd96::10.
    Remote,
    /// Off the pod, elsewhere: 192.0.2.10 and 2001:db8::10.
    Far,
    /// The pod's own address.
    Own,
    /// Another address of the pod, which its status does not name.
    Secondary,
    /// The pod's link-local address.
    OwnLink,
    /// 127.0.0.1 and ::1.
    Localhost,
    /// 127.0.0.2; there is no such thing in IPv6.
    Loopback,
    /// 127.0.0.6 and ::6.
    Passthrough,
    /// 0.0.0.0 and ::
    Unspecified,
    /// The pod that is in no mesh.
    Peer,
    /// That pod's link-local address.
    PeerLink,
    /// The node.
    Node,
    /// 224.0.0.1 and ff0e::1.
    Multicast,
    /// 255.255.255.255; there is no such thing in IPv6.
    Broadcast,
    /// An address for which the pod's routes say: unreachable.
    Unroutable,
}

/// A TCP connection.
#[derive(Clone, Copy, Debug)]
pub struct Dial {
    pub who: Who,
    pub to: Place,
    pub port: u16,
    /// Where the socket is bound to first.
    pub source: Option<Place>,
    /// The device for SO_BINDTODEVICE.
    pub device: Option<&'static str>,
    /// The value for SO_MARK.
    pub mark: Option<u32>,
    /// Who made the socket, when that is another than who connects it.
    pub maker: Option<Who>,
}

/// How a datagram is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Manner {
    /// connect(), send().
    Connected,
    /// sendto().
    Unconnected,
    /// sendmsg() and recvmsg().
    Message,
    /// sendto() to `Remote` and `Far` from one socket, before any answer is read.
    Several,
}

/// The action that a row is about.
#[derive(Clone, Copy, Debug)]
pub enum Act {
    Tcp(Dial),
    Udp {
        who: Who,
        to: Place,
        port: u16,
        manner: Manner,
        source: Option<Place>,
    },
    /// The mesh's own init container looks whether the pod's traffic is intercepted.
    Validate,
}

impl Act {
    /// Where to, and which port.
    pub const fn target(&self) -> (Place, u16) {
        match self {
            Self::Tcp(Dial { to, port, .. }) | Self::Udp { to, port, .. } => (*to, *port),
            Self::Validate => (Place::Passthrough, PROBE),
        }
    }
}

/// The port that `istio-validation` dials, where nobody must listen (`DefaultIptablesProbePort` in
/// Istio's tools/istio-iptables/pkg/constants).
pub const PROBE: u16 = 15002;

/// What the contract says will be observed of one connection.
#[derive(Clone, Copy, Debug, Default)]
pub struct Expect {
    /// Who accepts or answers, or why nobody does. `None`: the contract does not say.
    pub outcome: Option<&'static str>,
    /// The original destination is what was dialled.
    pub orig: bool,
    /// The peer that the server sees.
    pub peer: Option<Place>,
    /// A UDP answer appears to come from what was asked.
    pub from: bool,
}

/// The proxy's listeners in the pod.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Listeners {
    /// One for each family.
    #[default]
    Usual,
    /// One on `[::]` that takes both families.
    DualStack,
    /// None at first. All rows run, then the usual ones start, and all rows run again.
    Late,
    /// Linkerd's `linkerd-network-validator` in the proxy's place.
    Validator,
    /// None, not even later.
    None,
    /// All at this place alone.
    At(Place, Opened),
    /// On localhost alone, after another user has begun to listen on their ports at 127.0.0.2.
    Squatted,
}

/// When the proxy begins to listen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Opened {
    /// Before the pod's traffic is captured.
    Before,
    /// After that.
    After,
}

/// The addresses of a pod.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Addresses {
    /// Both families, with a second address of each.
    #[default]
    Dual,
    /// IPv4 alone, not even a link-local address of IPv6.
    V4,
    /// IPv4, and a link-local address of IPv6.
    V4Link,
    /// IPv6 alone.
    V6,
}

/// All that rows must agree on to share a pod.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Setup {
    pub mesh: Mesh,
    pub annotations: Vec<(String, String)>,
    pub dns: bool,
    /// The mesh was told of IPv4 alone, though the pod has both.
    pub v4_only: bool,
    pub addresses: Addresses,
    pub listeners: Listeners,
}

/// A row of the suite, for one mesh.
#[derive(Clone, Debug)]
pub struct Row {
    pub id: String,
    pub says: String,
    pub setup: Setup,
    pub act: Act,
    pub kinds: &'static [Kind],
    /// One for each observation; the last one stands for the rest.
    pub expect: Vec<Expect>,
}

impl Row {
    /// The row's name, as `mesh/id`.
    pub fn name(&self) -> String {
        format!("{}/{}", self.setup.mesh.name(), self.id)
    }

    /// What is expected of the observation with this number.
    pub fn expected(&self, step: usize) -> Expect {
        self.expect.get(step).or(self.expect.last()).copied().unwrap_or_default()
    }

    pub fn annotations(&self) -> String {
        let pairs: Vec<String> =
            self.setup.annotations.iter().map(|(key, value)| format!("{key}={value:?}")).collect();
        pairs.join(" ")
    }
}

/// Whether `text` is what `pattern`, with `*` for anything, describes.
pub fn matches(pattern: &str, text: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == text,
        Some((start, rest)) => text.strip_prefix(start).is_some_and(|tail| {
            (0..=tail.len())
                .filter(|at| tail.is_char_boundary(*at))
                .any(|at| matches(rest, &tail[at..]))
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::matches;

    #[test]
    fn patterns() {
        assert!(matches("istio/T1", "istio/T1") && !matches("istio/T1", "istio/T10"));
        assert!(matches("*/T1*", "istio/T10") && matches("*", "x") && matches("a*b*c", "aXbYc"));
        assert!(!matches("a*b", "aXc"));
    }
}
