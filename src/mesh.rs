//! The mesh table: what the agent has to know about each mesh, one row a mesh.

/// Which mesh, where a rule can't be said in the table's columns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Istio, sidecar mode.
    Istio,
    /// Linkerd.
    Linkerd,
    /// Kuma.
    Kuma,
}

/// A mesh's constants, as its own init container or CNI plugin programs them into iptables.
#[derive(Debug, PartialEq, Eq)]
pub struct Mesh {
    /// Which one.
    pub kind: Kind,
    /// Name in `status`, logs and metrics.
    pub name: &'static str,
    /// Index into the kernel's counters; unique, below `MAX_MESHES` of bpf/maps.h.
    pub index: u16,
    /// Name of the sidecar's container, regular or a native sidecar.
    pub proxy_container: &'static str,
    /// Name of the init container that installs the mesh's own iptables rules.
    pub init_container: &'static str,
    /// The sidecar's user, where neither its container nor an annotation says otherwise.
    pub uid: u32,
    /// The sidecar's group, where its container does not say otherwise.
    pub gid: u32,
    /// Processes of the sidecar's group are exempt as well.
    pub gid_exempt: bool,
    /// The sidecar's listener for the pod's outbound connections.
    pub outbound_port: u16,
    /// The sidecar's listener for connections to the pod.
    pub inbound_port: u16,
    /// The sidecar's DNS listener, on localhost; none: DNS is never captured.
    pub dns_port: Option<u16>,
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
    /// Ports that are exempt outbound where the pod does not list any.
    pub outbound_excluded_default: &'static [u16],
    /// The names of its annotations.
    pub keys: Keys,
}

/// The names of a mesh's annotations; none: the mesh has no such thing.
#[derive(Debug, PartialEq, Eq)]
pub struct Keys {
    /// Ports never captured outbound.
    pub exclude_outbound_ports: &'static str,
    /// Ports captured outbound.
    pub include_outbound_ports: Option<&'static str>,
    /// Destinations never captured.
    pub exclude_outbound_ranges: Option<&'static str>,
    /// Destinations captured; `*`: all.
    pub include_outbound_ranges: Option<&'static str>,
    /// Ports never captured outbound for some users.
    pub exclude_outbound_for_uids: Option<&'static str>,
    /// Ports never captured inbound.
    pub exclude_inbound_ports: &'static str,
    /// Ports captured inbound; `*`: all.
    pub include_inbound_ports: Option<&'static str>,
    /// Sources never captured.
    pub exclude_inbound_ranges: Option<&'static str>,
    /// Interfaces never captured, either way.
    pub exclude_interfaces: Option<&'static str>,
    /// Ports may be ranges, `a-b`.
    pub port_ranges: bool,
    /// The sidecar's user.
    pub proxy_uid: Option<&'static str>,
    /// The sidecar's group; naming it exempts it.
    pub proxy_gid: Option<&'static str>,
    /// The sidecar's outbound listener.
    pub outbound_port: Option<&'static str>,
    /// The sidecar's inbound listener.
    pub inbound_port: Option<&'static str>,
    /// The sidecar's DNS listener.
    pub dns_port: Option<&'static str>,
    /// Those that are taken from the pod's namespace where the pod does not have them.
    pub of_namespace: &'static [&'static str],
    /// Annotations that change what is captured in ways that are not implemented: a pod that
    /// has one is refused.
    pub unsupported: &'static [&'static str],
}

/// Istio's sidecar mode, as its CNI plugin sets it up. Sources, all in istio/istio:
/// `tools/istio-iptables/pkg/capture/run.go` (rules and their order),
/// `tools/istio-iptables/pkg/constants` (ports, uid), `cni/pkg/plugin/sidecar_redirect.go`
/// (annotations and defaults: telemetry 15020 both ways, health 15021, Envoy's metrics 15090).
pub const ISTIO: Mesh = Mesh {
    kind: Kind::Istio,
    name: "istio",
    index: 0,
    proxy_container: "istio-proxy",
    init_container: "istio-init",
    uid: 1337,
    gid: 1337,
    gid_exempt: true,
    outbound_port: 15001,
    inbound_port: 15006,
    dns_port: Some(15053),
    self_inbound: true,
    hbone_port: 15008,
    udp_excludes: true,
    cidrs_first: false,
    reads_until_empty: true,
    inbound_exempt: &[15008],
    inbound_excluded: &[15020, 15021, 15090],
    outbound_excluded_default: &[15020],
    keys: Keys {
        exclude_outbound_ports: "traffic.sidecar.istio.io/excludeOutboundPorts",
        include_outbound_ports: Some("traffic.sidecar.istio.io/includeOutboundPorts"),
        exclude_outbound_ranges: Some("traffic.sidecar.istio.io/excludeOutboundIPRanges"),
        include_outbound_ranges: Some("traffic.sidecar.istio.io/includeOutboundIPRanges"),
        exclude_outbound_for_uids: None,
        exclude_inbound_ports: "traffic.sidecar.istio.io/excludeInboundPorts",
        include_inbound_ports: Some("traffic.sidecar.istio.io/includeInboundPorts"),
        exclude_inbound_ranges: None,
        exclude_interfaces: Some("traffic.sidecar.istio.io/excludeInterfaces"),
        port_ranges: false,
        proxy_uid: None,
        proxy_gid: None,
        outbound_port: None,
        inbound_port: None,
        dns_port: None,
        of_namespace: &[],
        unsupported: &[
            "traffic.sidecar.istio.io/kubevirtInterfaces",
            "istio.io/reroute-virtual-interfaces",
        ],
    },
};

/// Linkerd. Sources: linkerd/linkerd2-proxy-init, `internal/iptables/iptables.go` (rules and
/// their order) and `cni-plugin/main.go` (annotations); linkerd/linkerd2,
/// `charts/linkerd2-cni/values.yaml` (ports, uid).
pub const LINKERD: Mesh = Mesh {
    kind: Kind::Linkerd,
    name: "linkerd",
    index: 1,
    proxy_container: "linkerd-proxy",
    init_container: "linkerd-init",
    uid: 2102,
    gid: 2102,
    gid_exempt: false,
    outbound_port: 4140,
    inbound_port: 4143,
    dns_port: None,
    self_inbound: false,
    hbone_port: 0,
    udp_excludes: false,
    cidrs_first: false,
    reads_until_empty: false,
    inbound_exempt: &[],
    inbound_excluded: &[4190, 4191],
    outbound_excluded_default: &[],
    keys: Keys {
        exclude_outbound_ports: "config.linkerd.io/skip-outbound-ports",
        include_outbound_ports: None,
        exclude_outbound_ranges: None,
        include_outbound_ranges: None,
        exclude_outbound_for_uids: None,
        exclude_inbound_ports: "config.linkerd.io/skip-inbound-ports",
        include_inbound_ports: None,
        exclude_inbound_ranges: Some("config.linkerd.io/skip-subnets"),
        exclude_interfaces: None,
        port_ranges: true,
        proxy_uid: Some("config.linkerd.io/proxy-uid"),
        proxy_gid: Some("config.linkerd.io/proxy-gid"),
        outbound_port: Some("config.linkerd.io/outbound-port"),
        inbound_port: Some("config.linkerd.io/inbound-port"),
        dns_port: None,
        of_namespace: &[
            "config.linkerd.io/skip-inbound-ports",
            "config.linkerd.io/skip-outbound-ports",
            "config.linkerd.io/skip-subnets",
        ],
        unsupported: &[],
    },
};

/// Kuma. Sources, all in kumahq/kuma: `pkg/transparentproxy/iptables/builder` (rules and their
/// order), `pkg/transparentproxy/config` (ports, uid, formats),
/// `pkg/plugins/runtime/k8s/metadata/annotations.go`.
pub const KUMA: Mesh = Mesh {
    kind: Kind::Kuma,
    name: "kuma",
    index: 2,
    proxy_container: "kuma-sidecar",
    init_container: "kuma-init",
    uid: 5678,
    gid: 5678,
    gid_exempt: false,
    outbound_port: 15001,
    inbound_port: 15006,
    dns_port: Some(15053),
    self_inbound: true,
    hbone_port: 0,
    udp_excludes: false,
    cidrs_first: true,
    reads_until_empty: true,
    inbound_exempt: &[],
    inbound_excluded: &[],
    outbound_excluded_default: &[],
    keys: Keys {
        exclude_outbound_ports: "traffic.kuma.io/exclude-outbound-ports",
        include_outbound_ports: None,
        exclude_outbound_ranges: Some("traffic.kuma.io/exclude-outbound-ips"),
        include_outbound_ranges: None,
        exclude_outbound_for_uids: Some("traffic.kuma.io/exclude-outbound-ports-for-uids"),
        exclude_inbound_ports: "traffic.kuma.io/exclude-inbound-ports",
        include_inbound_ports: None,
        exclude_inbound_ranges: Some("traffic.kuma.io/exclude-inbound-ips"),
        exclude_interfaces: None,
        port_ranges: true,
        proxy_uid: Some("kuma.io/sidecar-uid"),
        proxy_gid: None,
        outbound_port: Some("kuma.io/transparent-proxying-outbound-port"),
        inbound_port: Some("kuma.io/transparent-proxying-inbound-port"),
        dns_port: Some("kuma.io/builtin-dns-port"),
        of_namespace: &[],
        unsupported: &["traffic.kuma.io/transparent-proxy-config"],
    },
};

/// Every mesh that the agent knows.
pub const MESHES: &[&Mesh] = &[&ISTIO, &LINKERD, &KUMA];

/// The mesh with this index, if any.
pub fn by_index(index: u16) -> Option<&'static Mesh> {
    MESHES.iter().copied().find(|mesh| mesh.index == index)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_index_names_one_mesh() {
        for mesh in MESHES {
            assert_eq!(by_index(mesh.index), Some(*mesh));
        }
    }
}
