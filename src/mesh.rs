//! The mesh table: what the agent has to know about each mesh, one row a mesh.

/// A mesh's constants, as its own init container or CNI plugin programs them into iptables.
#[derive(Debug, PartialEq, Eq)]
pub struct Mesh {
    /// Name in `status`, logs and metrics.
    pub name: &'static str,
    /// Index into the kernel's counters; unique, below `MAX_MESHES` of bpf/maps.h.
    pub index: u16,
    /// Name of the sidecar's container, regular or a native sidecar.
    pub proxy_container: &'static str,
    /// Name of the init container that installs the mesh's own iptables rules.
    pub init_container: &'static str,
    /// The sidecar's user, where its container does not say otherwise.
    pub uid: u32,
    /// The sidecar's group, where its container does not say otherwise.
    pub gid: u32,
    /// Whether processes of the sidecar's group are exempt as well.
    pub gid_exempt: bool,
    /// The sidecar's listener for the pod's outbound connections.
    pub outbound_port: u16,
    /// The sidecar's listener for connections to the pod.
    pub inbound_port: u16,
    /// Whether the sidecar's own calls to its pod's address go to the inbound listener.
    pub self_inbound: bool,
    /// Port that is never redirected from the sidecar to its own pod; 0: none.
    pub hbone_port: u16,
    /// Ports that are exempt inbound whatever the pod's annotations say.
    pub inbound_exempt: &'static [u16],
    /// Ports that are exempt inbound unless the pod lists the ports to include.
    pub inbound_excluded: &'static [u16],
}

/// Istio's sidecar mode. Sources, all in istio/istio: `tools/istio-iptables/pkg/capture/run.go`
/// (rules and their order), `tools/istio-iptables/pkg/constants` (ports, uid), and
/// `manifests/charts/istio-control/istio-discovery/files/injection-template.yaml` (defaults of
/// the excluded ports: telemetry 15020, health 15021, Envoy's Prometheus 15090).
pub const ISTIO: Mesh = Mesh {
    name: "istio",
    index: 0,
    proxy_container: "istio-proxy",
    init_container: "istio-init",
    uid: 1337,
    gid: 1337,
    gid_exempt: true,
    outbound_port: 15001,
    inbound_port: 15006,
    self_inbound: true,
    hbone_port: 15008,
    inbound_exempt: &[15008],
    inbound_excluded: &[15020, 15021, 15090],
};

/// Every mesh that the agent knows.
pub const MESHES: &[&Mesh] = &[&ISTIO];

/// The mesh with this index, if any.
pub fn by_index(index: u16) -> Option<&'static Mesh> {
    MESHES.iter().copied().find(|mesh| mesh.index == index)
}
