//! The meshes: what the agent has to know about each, one file a mesh, and how a pod's object
//! becomes the contents of the node's maps. Pure: no kernel, no files, no API.

use std::fmt;

use k8s_openapi::api::core::v1::{Container, Pod};

use self::{
    annotations::{FactsError, Reader},
    policy::{Ipv6, Policy, TcpDns},
};

pub mod annotations;
pub mod desired;
pub mod entries;
pub mod facts;
pub mod istio;
pub mod kuma;
pub mod linkerd;
pub mod mode;
pub mod policy;
pub mod quota;
pub mod rules;

pub use istio::ISTIO;
pub use kuma::KUMA;
pub use linkerd::LINKERD;

/// A mesh: its constants, as its own init container or CNI plugin programs them into iptables, and
/// how it reads a pod.
pub struct Mesh {
    /// Name in `status`, logs and metrics.
    pub name: &'static str,
    /// Index into the kernel's counters; unique, below `MAX_MESHES` of bpf/lib/counter.h.
    pub index: u16,
    /// Name of the sidecar's container.
    pub proxy_container: &'static str,
    /// Name of the init container that installs the mesh's iptables rules.
    pub init_container: &'static str,
    /// The mesh looks for that container among the others too.
    pub init_anywhere: bool,
    /// How the names of the chains begin in which the mesh's own rules are.
    pub chains: &'static [&'static str],
    /// The mesh has rules of its own in the kernel's chains too, not only jumps to its own chains.
    pub rules_in_hooks: bool,
    /// The sidecar's own calls to its pod's address go to the inbound listener.
    pub self_inbound: bool,
    /// Port that is never redirected from the sidecar to its own pod; 0: none.
    pub hbone_port: u16,
    /// Excluded outbound ports hold for UDP (so, for DNS) as well.
    pub udp_excludes: bool,
    /// Excluded destinations beat every other rule, not just the includes.
    pub cidrs_first: bool,
    /// The sidecar reads a socket until it is told that there is no more, as Envoy does: its
    /// connections may be spliced. One that takes a short read for the end may not.
    pub reads_until_empty: bool,
    /// Ports that are exempt inbound whatever the pod's annotations say.
    pub inbound_exempt: &'static [u16],
    /// Ports that are exempt inbound unless the pod lists the ports to include.
    pub inbound_excluded: &'static [u16],
    /// The annotation that exempts interfaces, where the mesh has one.
    pub exclude_interfaces: Option<&'static str>,
    /// Annotations that are taken from the pod's namespace where the pod's own are missing or
    /// empty.
    pub of_namespace: &'static [&'static str],
    /// Variables of the sidecar's environment that `settings` and `proxy_of` look at.
    pub env: &'static [&'static str],
    /// The sidecar of a pod that the mesh injected.
    pub(crate) proxy_of: for<'a> fn(&'a Pod) -> Option<&'a Container>,
    /// What the pod says; `None` where the mesh itself redirects nothing.
    pub(crate) settings: Settle,
}

/// Reads a pod and its sidecar. What cannot be read is told to the reader, and a default stands in
/// for it.
pub(crate) type Settle = fn(&Pod, &Container, &mut Reader) -> Result<Option<Settings>, FactsError>;

/// What a mesh's own annotations, labels and variables say about a pod.
pub(crate) struct Settings {
    pub proxy_uid: Option<u32>,
    pub proxy_gid: Option<u32>,
    pub outbound_port: u16,
    pub inbound_port: u16,
    pub dns_port: Option<u16>,
    pub tcp_dns: TcpDns,
    pub ipv6: Ipv6,
    pub policy: Policy,
}

impl PartialEq for Mesh {
    fn eq(&self, other: &Self) -> bool {
        self.index == other.index
    }
}

impl Eq for Mesh {}

impl fmt::Debug for Mesh {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

/// Every mesh that the agent knows.
pub const MESHES: &[&Mesh] = &[&ISTIO, &LINKERD, &KUMA];

/// The mesh with this index, if any.
pub fn by_index(index: u16) -> Option<&'static Mesh> {
    MESHES.iter().copied().find(|mesh| mesh.index == index)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_parser_never_panics_and_its_error_has_the_whole_text(text: String) {
            for error in [
                istio::parse_ports("key", &text).err(),
                istio::parse_ranges("key", &text).err(),
                istio::parse_interfaces("key", &text).err(),
                kuma::parse_ports("key", &text).err(),
                kuma::parse_ips("key", &text).err(),
                kuma::parse_uid_exclusions("key", &text).err(),
                linkerd::parse_subnets("key", &text).err(),
            ] {
                if let Some(FactsError::Invalid { text: told, .. }) = error {
                    prop_assert_eq!(&told, &text);
                }
            }
            let (ports, bad) = linkerd::parse_ports(&text);
            let items = if text.is_empty() { 0 } else { text.split(',').count() };
            prop_assert!(ports.len() + bad.len() <= items);
        }
    }

    #[test]
    fn an_index_names_one_mesh() {
        for mesh in MESHES {
            assert_eq!(by_index(mesh.index), Some(*mesh));
        }
    }
}
