//! Istio's sidecar mode, as its CNI plugin sets it up. Sources, all in istio/istio, as of 1.31 and
//! of master in August 2026: `cni/pkg/plugin/plugin.go` (which pods),
//! `cni/pkg/plugin/sidecar_redirect.go` (annotations and defaults: telemetry 15020 both ways, health
//! 15021, Envoy's metrics 15090), `tools/istio-iptables/pkg/capture/run.go` (rules and their
//! order),
//! `tools/istio-iptables/pkg/constants` (ports, uid).

use std::collections::BTreeSet;

use ipnet::IpNet;
use k8s_openapi::api::core::v1::{Container, Pod};

use super::{
    Mesh, Settings,
    annotations::{
        FactsError, Reader, annotation, container_id, digits, env, invalid, items, label,
    },
    policy::{Ipv6, Policy, PortRange, Ports, Ranges, TcpDns},
};

/// Istio's row of the table of meshes.
pub const ISTIO: Mesh = Mesh {
    name: "istio",
    index: 0,
    proxy_container: "istio-proxy",
    init_container: "istio-init",
    init_anywhere: true,
    chains: &["ISTIO_", "istio-"],
    rules_in_hooks: false,
    self_inbound: true,
    hbone_port: 15008,
    udp_excludes: true,
    cidrs_first: false,
    reads_until_empty: true,
    inbound_exempt: &[15008],
    inbound_excluded: &[15020, 15021, 15090],
    exclude_interfaces: Some(EXCLUDE_INTERFACES),
    of_namespace: &[],
    env: &[DISABLE_ENVOY, DNS_CAPTURE, DUAL_STACK],
    proxy_of,
    settings,
};

const STATUS: &str = "sidecar.istio.io/status";
const INJECT: &str = "sidecar.istio.io/inject";
const MODE: &str = "sidecar.istio.io/interceptionMode";
const HEALTH_PORT: &str = "status.sidecar.istio.io/port";
const EXCLUDE_OUTBOUND_PORTS: &str = "traffic.sidecar.istio.io/excludeOutboundPorts";
const INCLUDE_OUTBOUND_PORTS: &str = "traffic.sidecar.istio.io/includeOutboundPorts";
const EXCLUDE_OUTBOUND_RANGES: &str = "traffic.sidecar.istio.io/excludeOutboundIPRanges";
const INCLUDE_OUTBOUND_RANGES: &str = "traffic.sidecar.istio.io/includeOutboundIPRanges";
const EXCLUDE_INBOUND_PORTS: &str = "traffic.sidecar.istio.io/excludeInboundPorts";
const INCLUDE_INBOUND_PORTS: &str = "traffic.sidecar.istio.io/includeInboundPorts";
const EXCLUDE_INTERFACES: &str = "traffic.sidecar.istio.io/excludeInterfaces";
/// The first that is there counts.
const VIRTUAL_INTERFACES: [&str; 2] =
    ["istio.io/reroute-virtual-interfaces", "traffic.sidecar.istio.io/kubevirtInterfaces"];
const DISABLE_ENVOY: &str = "DISABLE_ENVOY";
const DNS_CAPTURE: &str = "ISTIO_META_DNS_CAPTURE";
const DUAL_STACK: &str = "ISTIO_DUAL_STACK";

/// The sidecar's user and group, where its container does not say otherwise.
const PROXY: u32 = 1337;

/// Init containers first, as Istio has them: a native sidecar is one.
fn containers(pod: &Pod) -> impl Iterator<Item = &Container> {
    let spec = pod.spec.iter();
    spec.clone()
        .flat_map(|spec| spec.init_containers.iter().flatten())
        .chain(spec.flat_map(|spec| &spec.containers))
}

/// The tests, and their order, are those of Istio's plugin. So `istio-proxy` is the sidecar
/// whatever its args, unless they are `proxy` and a kind of proxy that is none.
fn proxy_of(pod: &Pod) -> Option<&Container> {
    let proxy = containers(pod).filter(|one| one.name == ISTIO.proxy_container).last()?;
    let kind = match proxy.args.as_deref() {
        Some([mode, kind, ..]) if mode == "proxy" => kind,
        _ => "",
    };
    // What is no boolean says nothing.
    let inject = label(pod, INJECT).or_else(|| annotation(pod, INJECT)).and_then(go_bool);
    let taken = env(proxy, DISABLE_ENVOY).and_then(go_bool) != Some(true)
        && matches!(kind, "" | "sidecar")
        && inject != Some(false)
        && annotation(pod, STATUS).is_some();
    taken.then_some(proxy)
}

fn settings(
    pod: &Pod,
    proxy: &Container,
    read: &mut Reader,
) -> Result<Option<Settings>, FactsError> {
    if !read.or(redirects(pod), true)? {
        return Ok(None);
    }
    let virtual_interfaces =
        VIRTUAL_INTERFACES.iter().find_map(|key| Some((*key, annotation(pod, key)?)));
    if let Some((key, text)) = virtual_interfaces.filter(|(_, text)| !text.is_empty()) {
        return Err(FactsError::Unsupported { key: key.into(), text: text.into() });
    }
    let policy = policy(pod, read);
    let policy = read.or(policy, Policy::default())?;
    let captures_dns = on(proxy, DNS_CAPTURE, read);
    let dual_stack = on(proxy, DUAL_STACK, read);
    Ok(Some(Settings {
        proxy_uid: Some(read.or(container_id(proxy, "runAsUser"), None)?.unwrap_or(PROXY)),
        proxy_gid: Some(read.or(container_id(proxy, "runAsGroup"), None)?.unwrap_or(PROXY)),
        outbound_port: 15001,
        inbound_port: 15006,
        dns_port: captures_dns.then_some(15053),
        tcp_dns: TcpDns::Captured,
        ipv6: if dual_stack { Ipv6::Always } else { Ipv6::WhereFirst },
        policy,
    }))
}

/// Whether Istio redirects this pod at all.
fn redirects(pod: &Pod) -> Result<bool, FactsError> {
    match annotation(pod, MODE) {
        None | Some("REDIRECT") => Ok(true),
        Some("NONE") => Ok(false),
        Some("TPROXY") => Err(FactsError::Unsupported { key: MODE.into(), text: "TPROXY".into() }),
        Some(mode) => Err(invalid(MODE, mode, "expected REDIRECT, TPROXY or NONE")),
    }
}

/// A switch in the sidecar's environment. Istio takes what is no boolean for "off".
fn on(proxy: &Container, name: &str, read: &mut Reader) -> bool {
    let text = env(proxy, name).unwrap_or_default();
    go_bool(text).unwrap_or_else(|| {
        if !text.is_empty() {
            let key = format!("istio-proxy's env {name}");
            read.warn(&key, text, "expected true or false; Istio reads this as false");
        }
        false
    })
}

/// Parses a boolean as Go's strconv.ParseBool does.
fn go_bool(text: &str) -> Option<bool> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Some(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Some(false),
        _ => None,
    }
}

fn policy(pod: &Pod, read: &mut Reader) -> Result<Policy, FactsError> {
    let text = |key: &str| annotation(pod, key).unwrap_or_default();
    let ports = |key: &str| parse_ports(key, text(key));
    let ranges = |key: &str| parse_ranges(key, text(key));
    let mut exclude_inbound_ports = ports(EXCLUDE_INBOUND_PORTS)?;
    // The injector has put it into the annotation above; the plugin does not look at it.
    match ports(HEALTH_PORT) {
        Ok(health) => exclude_inbound_ports.extend(health.iter().filter(|port| port.first != 0)),
        Err(_) => read.warn(HEALTH_PORT, text(HEALTH_PORT), "not a port: ignored, as Istio does"),
    }
    Ok(Policy {
        exclude_outbound_ports: match annotation(pod, EXCLUDE_OUTBOUND_PORTS) {
            Some(_) => ports(EXCLUDE_OUTBOUND_PORTS)?,
            None => [PortRange::one(15020)].into(),
        },
        exclude_outbound_ranges: ranges(EXCLUDE_OUTBOUND_RANGES)?,
        include_outbound_ports: ports(INCLUDE_OUTBOUND_PORTS)?,
        include_outbound_ranges: match annotation(pod, INCLUDE_OUTBOUND_RANGES) {
            None | Some("*") => Ranges::All,
            Some(_) => Ranges::Only(ranges(INCLUDE_OUTBOUND_RANGES)?),
        },
        include_inbound_ports: match annotation(pod, INCLUDE_INBOUND_PORTS) {
            None | Some("*") => Ports::All,
            Some(_) => Ports::Only(ports(INCLUDE_INBOUND_PORTS)?),
        },
        exclude_inbound_ports,
        exclude_interfaces: parse_interfaces(EXCLUDE_INTERFACES, text(EXCLUDE_INTERFACES))?,
        ..Policy::default()
    })
}

/// `80, 443`: ports separated by commas, blanks around them allowed; empty: none.
///
/// # Errors
/// Names the item that is no port.
pub fn parse_ports(key: &str, text: &str) -> Result<BTreeSet<PortRange>, FactsError> {
    let port = |item: &str| {
        let port = digits(item.trim()).map(PortRange::one);
        port.ok_or_else(|| invalid(key, text, &format!("{item:?} is not a port from 0 to 65535")))
    };
    items(text.trim()).map(port).collect()
}

/// `10.0.0.0/8,fd00::/8`: ranges separated by commas, without blanks; empty: none. What Go's
/// netip.ParsePrefix takes.
///
/// # Errors
/// Names the item that is no range.
pub fn parse_ranges(key: &str, text: &str) -> Result<BTreeSet<IpNet>, FactsError> {
    let range = |item: &str| {
        let (address, bits) = item.split_once('/')?;
        let bits = Some(bits).filter(|bits| bits.len() == 1 || !bits.starts_with('0'))?;
        IpNet::new(address.parse().ok()?, digits(bits)?).ok()
    };
    let named = |item: &str| {
        let why = || format!("{item:?} is not a CIDR range such as 10.0.0.0/8, without spaces");
        range(item).ok_or_else(|| invalid(key, text, &why()))
    };
    items(text).map(named).collect()
}

/// `net1, net2`: names of interfaces, separated by commas; empty: none.
///
/// # Errors
/// Names the item that is no interface's name.
pub fn parse_interfaces(key: &str, text: &str) -> Result<BTreeSet<String>, FactsError> {
    let is_name = |name: &str| {
        name.len() < 16
            && name.starts_with(|first: char| first.is_ascii_alphabetic())
            && name.chars().all(|c| c.is_ascii_alphanumeric() || "_.-".contains(c))
    };
    let named = |item: &str| {
        let bad = || invalid(key, text, &format!("{item:?} is not an interface name"));
        Some(item.trim().to_owned()).filter(|name| is_name(name)).ok_or_else(bad)
    };
    items(text).map(named).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_read_whole() {
        let all = parse_ports("key", " 80 ,443,0 ").expect("ports");
        assert_eq!(all, [0, 80, 443].map(PortRange::one).into());
        assert_eq!(parse_ports("key", "  "), Ok(BTreeSet::new()));
        for text in ["80,,81", "80,", "+80", "65536", "80-81", "*", "-1", "0x50", "8 0"] {
            assert!(parse_ports("key", text).is_err(), "{text}");
        }
    }

    #[test]
    fn ranges_are_written_one_way() {
        let range = |text: &str| text.parse::<IpNet>().expect("a range");
        let all = parse_ranges("key", "10.0.0.0/8,fd00::/8").expect("ranges");
        assert_eq!(all, [range("10.0.0.0/8"), range("fd00::/8")].into());
        for text in [
            "010.0.0.0/8",
            "10.0.0.0/08",
            "10.0.0.0/33",
            "10.0.0.0/",
            "/8",
            "10.0.0.0/+8",
            "192.0.2.1",
            "10.0.0.0/8, fd00::/8",
            " 10.0.0.0/8",
            "fe80::1%eth0/64",
        ] {
            assert!(parse_ranges("key", text).is_err(), "{text}");
        }
    }

    #[test]
    fn interfaces_are_names() {
        assert_eq!(
            parse_interfaces("key", "net1, eth0.5"),
            Ok(["net1".to_owned(), "eth0.5".to_owned()].into())
        );
        for text in ["net1,,net2", "a/b", "a b", "sixteen-letters-", "1net", " ", "net+"] {
            assert!(parse_interfaces("key", text).is_err(), "{text}");
        }
    }
}
