//! Problems: each is logged once, counted in the metrics, and reported to its pod as an Event.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The reason of a problem. The names are those of Events and of the metrics' label.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Reason {
    /// A field or annotation is invalid: everything is captured, or nothing spliced.
    InvalidPolicy,
    /// The pod asks for a mode that is not implemented: it is left alone.
    Unsupported,
    /// The pod's object cannot be used at all.
    InvalidPod,
    /// The pod's network namespace cannot be found, entered or prepared.
    NetworkNamespace,
    /// The pod cannot be enrolled beside the others, or a map is full.
    Refused,
    /// The pod's inbound connections do not go to its sidecar.
    InboundNotIntercepted,
    /// All pods of a mesh on this node come with the mesh's own iptables rules.
    OwnIptables,
    /// The mesh's own rules in the pod cannot be made out, or its annotation does not fit them.
    OwnRules,
    /// The pod forwards packets of others, which nothing intercepts.
    Forwards,
    /// Another program sees connections before Sidestep's.
    NotFirst,
    /// Sidestep is being uninstalled, and the pod stays intercepted.
    StaysIntercepted,
    /// Somebody removed or changed a part of the data plane, and it was restored.
    Repaired,
    /// A Service or an EndpointSlice, or a part of it, is invalid: it is left to kube-proxy.
    InvalidService,
    /// A problem with a manifest, the API server, the CNI configuration or the kernel's maps.
    Node,
}

impl Reason {
    /// All reasons.
    pub const ALL: [Self; 14] = [
        Self::InvalidPolicy,
        Self::Unsupported,
        Self::InvalidPod,
        Self::NetworkNamespace,
        Self::Refused,
        Self::InboundNotIntercepted,
        Self::OwnIptables,
        Self::OwnRules,
        Self::Forwards,
        Self::NotFirst,
        Self::StaysIntercepted,
        Self::Repaired,
        Self::InvalidService,
        Self::Node,
    ];

    /// The reason's name in Events and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::InvalidPolicy => "InvalidPolicy",
            Self::Unsupported => "Unsupported",
            Self::InvalidPod => "InvalidPod",
            Self::NetworkNamespace => "NetworkNamespace",
            Self::Refused => "Refused",
            Self::InboundNotIntercepted => "InboundNotIntercepted",
            Self::OwnIptables => "OwnIptables",
            Self::OwnRules => "OwnRules",
            Self::Forwards => "Forwards",
            Self::NotFirst => "NotFirst",
            Self::StaysIntercepted => "StaysIntercepted",
            Self::Repaired => "Repaired",
            Self::InvalidService => "InvalidService",
            Self::Node => "Node",
        }
    }
}

/// A problem.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Problem {
    /// The problem's reason.
    pub reason: Reason,
    /// The pod concerned, as `namespace/name`, and its uid.
    pub pod: Option<(String, String)>,
    /// A sentence for people, which names the pod, the key and the offending text.
    pub text: String,
}

impl Problem {
    /// A problem that concerns no single pod.
    pub fn node(text: impl Into<String>) -> Self {
        Self { reason: Reason::Node, pod: None, text: text.into() }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_reason_has_a_name_of_its_own_that_the_docs_explain() {
        let docs = include_str!("../docs/metrics.md");
        let names = Reason::ALL.map(Reason::name);
        for (n, name) in names.iter().enumerate() {
            assert!(!names[..n].contains(name), "{name} is there twice");
            assert!(docs.contains(&format!("| `{name}` |")), "docs/metrics.md lacks {name}");
        }
    }
}
