//! A pod's quota in the maps that all pods share, and the reasons for not enrolling a pod.

use std::path::PathBuf;

use thiserror::Error;

use super::entries::PodEntries;
use crate::node::ADDRESSES;

/// The reason why a pod with valid facts cannot be enrolled.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Refusal {
    /// The namespace is the node's own: every process of the node would be captured.
    #[error("network namespace {0} is the node's own: hostNetwork pods are never enrolled")]
    HostNetns(PathBuf),
    /// Two pods name the same namespace.
    #[error("network namespace {netns} is already claimed by pod {owner}")]
    Claimed {
        /// The namespace's path.
        netns: PathBuf,
        /// The pod that owns it.
        owner: String,
    },
    /// The pod has no address, so there is nothing to intercept.
    #[error("the pod has no IP address, neither in status.podIPs nor in network namespace {0}")]
    NoAddress(PathBuf),
    /// A text does not fit into the pod's record.
    #[error("{what} {text:?} is longer than {limit} bytes")]
    TooLong {
        /// The name of the text.
        what: &'static str,
        /// The text itself.
        text: String,
        /// Its maximum length.
        limit: usize,
    },
    /// A map is full, except for the entries reserved for other pods.
    #[error("the {map} map is full: it has {limit} entries, and {share} are reserved for each pod")]
    Full {
        /// The map's name.
        map: &'static str,
        /// The map's capacity.
        limit: usize,
        /// The number of entries reserved for each pod.
        share: usize,
    },
    /// The pod asks for more entries than any pod may have.
    #[error("its policy needs more than the {most} entries of the {map} map that a pod may have")]
    TooMany {
        /// The map's name.
        map: &'static str,
        /// The maximum for a pod.
        most: usize,
    },
    /// The pod exempts interfaces, but the kernel does not tell programs the interface.
    #[error(
        "{key} {names:?}: this kernel cannot tell by which interface a connection arrives; \
         excluding interfaces needs Linux 5.17 or later"
    )]
    Interfaces {
        /// The annotation that names the interfaces.
        key: &'static str,
        /// The names of the interfaces.
        names: String,
    },
}

/// The kernel's limits: the capacities of the maps, and a feature that not every kernel has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Capacity for pods.
    pub pods: usize,
    /// Capacity for addresses of all pods.
    pub locals: usize,
    /// Capacity for port rules of all pods.
    pub port_rules: usize,
    /// Capacity for address rules of all pods.
    pub cidr_rules: usize,
    /// Capacity for user rules of all pods.
    pub uid_rules: usize,
    /// Capacity for exempt interfaces of all pods.
    pub excluded_ifs: usize,
    /// Whether programs see the interface of a new connection.
    pub tells_interface: bool,
}

/// A pod's quota in a map that all pods share.
#[derive(Debug, Clone, Copy)]
pub struct Quota {
    /// The map's name.
    pub map: &'static str,
    /// The maximum for a pod.
    pub most: usize,
    /// The number of entries reserved for every pod, whatever the others have.
    pub share: usize,
    /// Counts a pod's entries.
    pub entries: fn(&PodEntries) -> usize,
    /// The map's capacity.
    pub limit: fn(&Limits) -> usize,
}

/// The maps that all pods share, a row each.
pub const QUOTAS: [Quota; 5] = [LOCALS, PORT_RULES, CIDR_RULES, UID_RULES, EXCLUDED_IFS];

const LOCALS: Quota = Quota {
    map: "locals",
    most: 4 * ADDRESSES,
    share: 8,
    entries: |pod| pod.locals.len() + pod.spliced.len(),
    limit: |limits| limits.locals,
};
pub(super) const PORT_RULES: Quota = Quota {
    map: "port_rules",
    most: 4096,
    share: 32,
    entries: |pod| pod.port_rules.len(),
    limit: |limits| limits.port_rules,
};
pub(super) const CIDR_RULES: Quota = Quota {
    map: "cidr_rules",
    most: 4096,
    share: 32,
    entries: |pod| pod.cidr_rules.len(),
    limit: |limits| limits.cidr_rules,
};
pub(super) const UID_RULES: Quota = Quota {
    map: "uid_rules",
    most: 1024,
    share: 8,
    entries: |pod| pod.uid_rules.len(),
    limit: |limits| limits.uid_rules,
};
const EXCLUDED_IFS: Quota = Quota {
    map: "excluded_ifs",
    most: 64,
    share: 2,
    entries: |pod| pod.excluded_ifs.len(),
    limit: |limits| limits.excluded_ifs,
};

impl Quota {
    /// Whether `wanted` more entries go into a map of `limit`, of which `used` are taken and which
    /// `others` more pods may need.
    pub fn take(
        self,
        wanted: usize,
        used: usize,
        limit: usize,
        others: usize,
    ) -> Result<(), Refusal> {
        let Self { map, most, share, .. } = self;
        if wanted > most {
            return Err(Refusal::TooMany { map, most });
        }
        if wanted <= share || used + wanted + share * others <= limit {
            // What is within the share has room, unless the map is smaller than all shares.
            if used + wanted <= limit {
                return Ok(());
            }
        }
        Err(Refusal::Full { map, limit, share })
    }
}

impl Refusal {
    /// Whether the refusal concerns only the pod's policy, so that the pod can be enrolled without
    /// it.
    pub(super) fn is_about_policy(&self) -> bool {
        match self {
            Self::TooMany { .. } => true,
            Self::Full { map, .. } => *map != LOCALS.map && *map != "pods",
            _ => false,
        }
    }
}
