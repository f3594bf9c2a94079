//! Where Sidestep differs from the meshes' iptables on purpose, or cannot help it. Each entry
//! has to match a difference, or the suite fails: a list that has more than what is true hides
//! what is not.

use crate::observed::{Field, Observed};
use crate::row::{Kind, matches};

/// A difference that is known.
pub struct Deliberate {
    /// Pattern of `mesh/row`, with `*` for anything.
    pub rows: &'static str,
    /// In which kinds of address.
    pub kinds: &'static [Kind],
    /// In which properties, and no others.
    pub fields: &'static [Field],
    /// What must be so of the two observations, iptables' and Sidestep's.
    pub when: fn(&Observed, &Observed) -> bool,
    /// The reason for the difference.
    pub why: &'static str,
}

impl Deliberate {
    /// Whether it covers such a difference.
    pub fn covers(
        &self,
        row: &str,
        kind: Kind,
        field: Field,
        iptables: &Observed,
        sidestep: &Observed,
    ) -> bool {
        matches(self.rows, row)
            && self.kinds.contains(&kind)
            && self.fields.contains(&field)
            && (self.when)(iptables, sidestep)
    }
}

fn outcomes(iptables: &Observed, sidestep: &Observed, wanted: [&str; 2]) -> bool {
    [iptables, sidestep].map(|observed| observed.get(Field::Outcome)) == wanted.map(Some)
}

/// The list of deliberate differences.
pub const DELIBERATE: &[Deliberate] = &[
    Deliberate {
        rows: "*",
        kinds: Kind::ALL,
        fields: &[Field::Listener],
        when: |_, sidestep| {
            sidestep.get(Field::Outcome) == Some("inbound")
                && sidestep.get(Field::Listener) == sidestep.get(Field::Orig)
        },
        why: "A call to the pod is not translated: the proxy's accepted socket has the address \
              that was dialled. SO_ORIGINAL_DST, which is what proxies ask, says the same.",
    },
    Deliberate {
        rows: "*",
        kinds: Kind::ALL,
        fields: &[Field::Peer],
        when: |_, sidestep| {
            sidestep.get(Field::Outcome) == Some("dns")
                && sidestep.get(Field::From).is_some()
                && ["127.0.0.1", "::1", "spread"].map(Some).contains(&sidestep.get(Field::Peer))
        },
        why: "A UDP question of a socket that is not connected comes to the DNS listener from an \
              address of the pod's loopback: which one tells the servers apart that the socket asks. \
              The listener answers there, and looks at nothing else.",
    },
    Deliberate {
        rows: "*/E.dev",
        kinds: Kind::ALL,
        fields: &[Field::Outcome],
        when: |iptables, sidestep| outcomes(iptables, sidestep, ["timeout", "outbound"]),
        why: "Under iptables a socket that is bound to a device cannot reach the proxy at \
              localhost. Sidestep sends it to the pod's own address, which works.",
    },
    Deliberate {
        rows: "*/E.dev.own.proxy",
        kinds: Kind::ALL,
        fields: &[Field::Outcome],
        when: |iptables, sidestep| outcomes(iptables, sidestep, ["timeout", "inbound"]),
        why: "As E.dev: under iptables such a socket cannot reach the proxy.",
    },
    Deliberate {
        rows: "*/E.link",
        kinds: Kind::IPV6,
        fields: &[Field::Outcome],
        when: |iptables, sidestep| outcomes(iptables, sidestep, ["timeout", "outbound"]),
        why: "As E.dev: a link-local destination binds the socket to its device.",
    },
    Deliberate {
        rows: "*/T5.link",
        kinds: Kind::IPV6,
        fields: &[Field::Outcome],
        when: |iptables, sidestep| outcomes(iptables, sidestep, ["timeout", "inbound"]),
        why: "As E.dev: a link-local destination binds the socket to its device.",
    },
    Deliberate {
        rows: "*/E.unroutable",
        kinds: Kind::ALL,
        fields: &[Field::Outcome],
        when: |iptables, sidestep| outcomes(iptables, sidestep, ["EHOSTUNREACH", "outbound"]),
        why: "The kernel looks for a route before iptables sees a packet, but after connect() \
              was redirected: the app's call is accepted, and it is the proxy that finds no way.",
    },
];

/// Where Istio's native nftables rules decide otherwise than its iptables rules, which Sidestep
/// follows.
pub const NATIVE: &[Deliberate] = &[Deliberate {
    rows: "istio/FAM.*.6",
    kinds: Kind::IPV6,
    fields: &[Field::Outcome],
    when: |iptables, nftables| {
        [("remote", "outbound"), ("app", "inbound"), ("remote", "dns")]
            .into_iter()
            .any(|(there, here)| outcomes(iptables, nftables, [there, here]))
    },
    why: "Istio's nftables tables are of the family inet: where it captures IPv4 alone, the rules that \
          name no address take the pod's IPv6 as well.",
}];
