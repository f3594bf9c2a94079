//! Linkerd. Sources: linkerd/linkerd2-proxy-init, `cni-plugin/main.go` (which pods, annotations),
//! `proxy-init/cmd/root.go` and `pkg/ports` (formats), `pkg/iptables/iptables.go` (rules and their
//! order), as linkerd2 2.18 to edge-26.8.3 have them; linkerd/linkerd2,
//! `charts/linkerd2-cni/values.yaml` (ports, uid).

use std::collections::BTreeSet;

use ipnet::IpNet;
use k8s_openapi::api::core::v1::{Container, Pod};

use super::{
    Mesh, Settings,
    annotations::{
        FactsError, Reader, annotation, container_id, digits, env, invalid, items, label,
        parse_range, port, sidecar, user,
    },
    policy::{Ipv6, Policy, PortRange, TcpDns},
};

/// Linkerd's row of the table of meshes.
pub const LINKERD: Mesh = Mesh {
    name: "linkerd",
    index: 1,
    proxy_container: "linkerd-proxy",
    init_container: "linkerd-init",
    init_anywhere: false,
    chains: &["PROXY_INIT_"],
    rules_in_hooks: false,
    self_inbound: false,
    hbone_port: 0,
    udp_excludes: false,
    cidrs_first: false,
    reads_until_empty: false,
    inbound_exempt: &[],
    inbound_excluded: &[4190, 4191],
    exclude_interfaces: None,
    of_namespace: &[SKIP_INBOUND, SKIP_OUTBOUND, SKIP_SUBNETS, PROXY_UID, PROXY_GID],
    env: &[OUTBOUND_LISTENERS],
    proxy_of,
    settings,
};

const SKIP_OUTBOUND: &str = "config.linkerd.io/skip-outbound-ports";
const SKIP_INBOUND: &str = "config.linkerd.io/skip-inbound-ports";
const SKIP_SUBNETS: &str = "config.linkerd.io/skip-subnets";
const PROXY_UID: &str = "config.linkerd.io/proxy-uid";
const PROXY_GID: &str = "config.linkerd.io/proxy-gid";
const OUTBOUND_PORT: &str = "config.linkerd.io/outbound-port";
const INBOUND_PORT: &str = "config.linkerd.io/inbound-port";
/// Label of Linkerd's own pods.
const COMPONENT: &str = "linkerd.io/control-plane-component";
const OUTBOUND_LISTENERS: &str = "LINKERD2_PROXY_OUTBOUND_LISTEN_ADDRS";

fn proxy_of(pod: &Pod) -> Option<&Container> {
    sidecar(pod, LINKERD.proxy_container)
}

fn settings(
    pod: &Pod,
    proxy: &Container,
    read: &mut Reader,
) -> Result<Option<Settings>, FactsError> {
    let policy = policy(pod, read);
    let policy = read.or(policy, Policy::default())?;
    let own_uid = read.or(container_id(proxy, "runAsUser"), None)?.unwrap_or(2102);
    let listens = env(proxy, OUTBOUND_LISTENERS).unwrap_or_default();
    Ok(Some(Settings {
        proxy_uid: read.or(exempt(pod, PROXY_UID), None)?.unwrap_or(Some(own_uid)),
        proxy_gid: read.or(exempt(pod, PROXY_GID), None)?.flatten(),
        outbound_port: read.or(port(pod, OUTBOUND_PORT), None)?.unwrap_or(4140),
        inbound_port: read.or(port(pod, INBOUND_PORT), None)?.unwrap_or(4143),
        dns_port: None,
        tcp_dns: TcpDns::Captured,
        // Its rules are installed for IPv6 where its listeners are opened for it.
        ipv6: if listens.contains('[') { Ipv6::Always } else { Ipv6::Never },
        policy,
    }))
}

fn policy(pod: &Pod, read: &mut Reader) -> Result<Policy, FactsError> {
    let text = |key: &str| annotation(pod, key).unwrap_or_default();
    let mut ports = |key: &str| {
        let (ports, bad) = parse_ports(text(key));
        read.skipped(key, text(key), &bad, "expected ports or port ranges, without spaces");
        ports
    };
    let mut exclude_outbound_ports = ports(SKIP_OUTBOUND);
    let exclude_inbound_ports = ports(SKIP_INBOUND);
    // Its control plane talks to the API server directly.
    if label(pod, COMPONENT).is_some_and(|name| !name.is_empty()) {
        exclude_outbound_ports.extend([443, 6443].map(PortRange::one));
    }
    Ok(Policy {
        exclude_outbound_ports,
        exclude_inbound_ports,
        exclude_inbound_ranges: parse_subnets(SKIP_SUBNETS, text(SKIP_SUBNETS))?,
        ..Policy::default()
    })
}

/// The id that an annotation exempts: none at all where it is not above zero, which is how
/// Linkerd's charts say "nobody". The outer `None`: nothing is said.
fn exempt(pod: &Pod, key: &str) -> Result<Option<Option<u32>>, FactsError> {
    let Some(text) = annotation(pod, key).filter(|text| !text.is_empty()) else {
        return Ok(None);
    };
    let bad = || invalid(key, text, "expected a 32-bit id; 0 or less exempts nobody");
    match text.strip_prefix('-').and_then(digits::<i64>) {
        Some(_) => Ok(Some(None)),
        None => match text.strip_prefix('+').unwrap_or(text) {
            id if digits(id) == Some(0u32) => Ok(Some(None)),
            id => user(id).map(|id| Some(Some(id))).ok_or_else(bad),
        },
    }
}

/// Ports and ranges `a-b` separated by commas, and the items that are neither: Linkerd skips those,
/// and takes a blank for a part of the item. Empty: none.
pub fn parse_ports(text: &str) -> (BTreeSet<PortRange>, Vec<&str>) {
    // Go's strconv.Atoi takes a sign.
    let number = |text: &str| digits(text.strip_prefix('+').unwrap_or(text));
    let range = |item: &str| {
        let (first, last) = item.split_once('-').unwrap_or((item, item));
        let range = PortRange { first: number(first)?, last: number(last)? };
        (range.first <= range.last).then_some(range)
    };
    let mut bad = Vec::new();
    let ports = items(text).filter_map(|item| {
        let range = range(item);
        if range.is_none() {
            bad.push(item);
        }
        range
    });
    (ports.collect(), bad)
}

/// `10.0.0.0/8, fd00::/8`: ranges separated by commas, blanks around them allowed; empty: none.
///
/// # Errors
/// Names the item that is no range; Linkerd sets up no pod that has one.
pub fn parse_subnets(key: &str, text: &str) -> Result<BTreeSet<IpNet>, FactsError> {
    let range = |item: &str| {
        let range = Some(item.trim()).filter(|item| item.contains('/')).and_then(parse_range);
        range.ok_or_else(|| {
            invalid(
                key,
                text,
                &format!(
                    "{item:?} is not a CIDR range such as \
                                                         10.0.0.0/8"
                ),
            )
        })
    };
    items(text).map(range).collect()
}
