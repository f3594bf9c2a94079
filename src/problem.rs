//! What is wrong: said once in the log, counted in the metrics, told to a pod as an Event.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Why something is not as it should be. The names are those of Events and of the metrics' label.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Reason {
    /// A field or annotation cannot be read: everything is captured, or nothing spliced.
    InvalidPolicy,
    /// What the pod asks for is not implemented: it is left alone.
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
    /// The pod forwards packets of others, which nothing intercepts.
    Forwards,
    /// Another's program sees connections before Sidestep's.
    NotFirst,
    /// Sidestep is being uninstalled, and the pod stays intercepted.
    StaysIntercepted,
    /// Somebody took away or changed what the agent had put in force, and it was put back.
    Repaired,
    /// A Service or an EndpointSlice, or a part of it, cannot be used: it is left to kube-proxy.
    InvalidService,
    /// A manifest, the API server, the CNI configuration or the kernel's maps.
    Node,
}

impl Reason {
    /// All of them.
    pub const ALL: [Self; 13] = [
        Self::InvalidPolicy,
        Self::Unsupported,
        Self::InvalidPod,
        Self::NetworkNamespace,
        Self::Refused,
        Self::InboundNotIntercepted,
        Self::OwnIptables,
        Self::Forwards,
        Self::NotFirst,
        Self::StaysIntercepted,
        Self::Repaired,
        Self::InvalidService,
        Self::Node,
    ];

    /// Its name in Events and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::InvalidPolicy => "InvalidPolicy",
            Self::Unsupported => "Unsupported",
            Self::InvalidPod => "InvalidPod",
            Self::NetworkNamespace => "NetworkNamespace",
            Self::Refused => "Refused",
            Self::InboundNotIntercepted => "InboundNotIntercepted",
            Self::OwnIptables => "OwnIptables",
            Self::Forwards => "Forwards",
            Self::NotFirst => "NotFirst",
            Self::StaysIntercepted => "StaysIntercepted",
            Self::Repaired => "Repaired",
            Self::InvalidService => "InvalidService",
            Self::Node => "Node",
        }
    }
}

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Problem {
    /// Of which kind.
    pub reason: Reason,
    /// The pod it is about, as `namespace/name`, and its uid.
    pub pod: Option<(String, String)>,
    /// For people; names the pod, the key and the offending text.
    pub text: String,
}

impl Problem {
    /// Something that is about no single pod.
    pub fn node(text: impl Into<String>) -> Self {
        Self { reason: Reason::Node, pod: None, text: text.into() }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}
