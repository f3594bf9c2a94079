//! What a pod may take of the maps that all pods share, and why a pod is not enrolled.

use std::path::PathBuf;

use thiserror::Error;

use super::entries::PodEntries;
use crate::node::ADDRESSES;

/// Why a pod with valid facts cannot be enrolled.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Refusal {
    /// A pod's namespace cannot be the node's own: every process of the node would be captured.
    #[error("network namespace {0} is the node's own: hostNetwork pods are never enrolled")]
    HostNetns(PathBuf),
    /// Two pods name the same namespace.
    #[error("network namespace {netns} is already claimed by pod {owner}")]
    Claimed {
        /// The namespace.
        netns: PathBuf,
        /// The pod that has it.
        owner: String,
    },
    /// Nothing to intercept.
    #[error("the pod has no IP address, neither in status.podIPs nor in network namespace {0}")]
    NoAddress(PathBuf),
    /// The record of a pod has room for so much only.
    #[error("{what} {text:?} is longer than {limit} bytes")]
    TooLong {
        /// Which text.
        what: &'static str,
        /// The text.
        text: String,
        /// How long it may be.
        limit: usize,
    },
    /// The kernel's maps are full, but for what every other pod may need.
    #[error("the {map} map is full: it has {limit} entries, and {share} are reserved for each pod")]
    Full {
        /// The map.
        map: &'static str,
        /// Its size.
        limit: usize,
        /// What is there for each pod.
        share: usize,
    },
    /// The pod asks for more than any may have.
    #[error("its policy needs more than the {most} entries of the {map} map that a pod may have")]
    TooMany {
        /// The map.
        map: &'static str,
        /// What a pod may have.
        most: usize,
    },
    /// The pod exempts interfaces, and the kernel has no way to know one.
    #[error(
        "{key} {names:?}: this kernel cannot tell by which interface a connection arrives; \
         excluding interfaces needs Linux 5.17 or later"
    )]
    Interfaces {
        /// The annotation.
        key: &'static str,
        /// The interfaces.
        names: String,
    },
}

/// What the kernel can do: the sizes of its maps, and what not every kernel has.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Pods.
    pub pods: usize,
    /// Addresses of all pods.
    pub locals: usize,
    /// Port rules of all pods.
    pub port_rules: usize,
    /// Address rules of all pods.
    pub cidr_rules: usize,
    /// User rules of all pods.
    pub uid_rules: usize,
    /// Exempt interfaces of all pods.
    pub excluded_ifs: usize,
    /// Whether it tells from which interface a new connection comes.
    pub tells_interface: bool,
}

/// What a pod may take of a map that all pods share.
#[derive(Debug, Clone, Copy)]
pub struct Quota {
    /// The map.
    pub map: &'static str,
    /// No pod has more.
    pub most: usize,
    /// As much is there for every pod that may come, whatever others have.
    pub share: usize,
    /// How many entries a pod takes.
    pub entries: fn(&PodEntries) -> usize,
    /// How many the map has room for.
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
    /// Whether it is about the pod's policy alone: the pod can be enrolled without.
    pub(super) fn is_about_policy(&self) -> bool {
        match self {
            Self::TooMany { .. } => true,
            Self::Full { map, .. } => *map != LOCALS.map && *map != "pods",
            _ => false,
        }
    }
}
