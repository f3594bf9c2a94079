//! What of a Service and of an EndpointSlice matters here, as kube-proxy reads them, and what is
//! wrong with them. Small: they are kept, for each of the cluster.

use std::{
    collections::{BTreeMap, HashMap},
    net::IpAddr,
    sync::Arc,
};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use thiserror::Error;

use super::{
    Family, Protocol,
    endpoints::{Endpoint, Policies},
    object,
};

/// Whoever has this label on a Service sees to it; and to its slices, which inherit it.
const PROXY_NAME: &str = "service.kubernetes.io/service-proxy-name";
/// A Service without virtual IPs; its slices inherit it.
const HEADLESS: &str = "service.kubernetes.io/headless";
/// A node's zone.
const ZONE: &str = "topology.kubernetes.io/zone";
/// A slice's Service.
const SERVICE_NAME: &str = "kubernetes.io/service-name";
/// The Services and slices that are translated: a selector for a list or a watch, kube-proxy's.
pub const SELECTOR: &str =
    "!service.kubernetes.io/service-proxy-name,!service.kubernetes.io/headless";
/// `sessionAffinityConfig.clientIP.timeoutSeconds` where it is not set: the API's default, and what
/// it allows.
const AFFINITY: u32 = 10_800;
const AFFINITY_MAX: u32 = 86_400;
/// So much that is wrong with an object is said; the rest is counted.
const NAMED: usize = 8;

/// An object that cannot be told from others.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("metadata.name is missing")]
pub struct NoName;

/// `namespace/name`, with Kubernetes' default namespace.
///
/// # Errors
/// Where there is no name.
pub fn name_of(metadata: &ObjectMeta) -> Result<Arc<str>, NoName> {
    let name = metadata.name.as_deref().filter(|name| !name.is_empty()).ok_or(NoName)?;
    Ok(format!("{}/{name}", namespace_of(metadata)).into())
}

fn namespace_of(metadata: &ObjectMeta) -> &str {
    metadata.namespace.as_deref().unwrap_or("default")
}

/// Where an address of a Service comes from. The order is that of who has one that several claim:
/// the API server gives a ClusterIP to one Service only.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// `spec.clusterIPs`.
    Cluster,
    /// `status.loadBalancer.ingress`.
    LoadBalancer,
    /// `spec.externalIPs`.
    External,
    /// An address of this node, with one of `spec.ports[].nodePort`.
    NodePort,
}

/// A Service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServiceFacts {
    /// `namespace/name`.
    pub name: Arc<str>,
    /// When it was made, in seconds since 1970; `i64::MAX` where it does not say.
    pub created: i64,
    /// Its addresses, in families of which it has a ClusterIP.
    pub addresses: Box<[(IpAddr, Kind)]>,
    /// Its ports: no name twice with a protocol, and no number.
    pub ports: Box<[Port]>,
    /// `internalTrafficPolicy: Local`.
    pub internal_local: bool,
    /// `externalTrafficPolicy: Local`, of a Service that can be reached from outside.
    pub external_local: bool,
    /// `loadBalancerSourceRanges` is set: kube-proxy applies that to pods as well.
    pub has_source_ranges: bool,
    /// `sessionAffinity: ClientIP`, in seconds.
    pub affinity: Option<u32>,
    /// What is wrong with it.
    pub problems: Box<[String]>,
}

/// A port of a Service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Port {
    /// May be "".
    pub name: Arc<str>,
    /// TCP or UDP.
    pub protocol: Protocol,
    /// Its number.
    pub number: u16,
    /// Its node port.
    pub node_port: Option<u16>,
}

/// This node.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NodeFacts {
    /// The zone that it is in.
    pub zone: Option<String>,
    /// The addresses that kube-proxy takes for the node's primary ones: the first of each family,
    /// internal ones before external ones.
    pub primary: Vec<IpAddr>,
}

/// An EndpointSlice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SliceFacts {
    /// `namespace/name`.
    pub name: Arc<str>,
    /// Its Service, as `namespace/name`.
    pub service: Option<Arc<str>>,
    /// Those of all of its endpoints.
    pub ports: Box<[SlicePort]>,
    /// Addresses of one family, and what is said of each.
    pub endpoints: Box<[(IpAddr, Endpoint)]>,
    /// What is wrong with it.
    pub problems: Box<[String]>,
}

/// A port of a slice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SlicePort {
    /// That of the Service's port.
    pub name: Box<str>,
    /// TCP or UDP.
    pub protocol: Protocol,
    /// The number that the endpoints listen on.
    pub number: u16,
}

/// Gathers what is wrong with an object.
struct Told {
    object: String,
    all: Vec<String>,
    more: usize,
}

impl Told {
    fn new(kind: &str, name: &str) -> Self {
        Self { object: format!("{kind} {name}"), all: Vec::new(), more: 0 }
    }

    /// Something is wrong with a field.
    fn say(&mut self, key: &str, what: &str) {
        if self.all.len() < NAMED {
            self.all.push(format!("{}: {key}: {what}", self.object));
        } else {
            self.more += 1;
        }
    }

    fn finish(mut self) -> Box<[String]> {
        if self.more > 0 {
            self.all.push(format!("{}: {} more fields are ignored", self.object, self.more));
        }
        self.all.into()
    }
}

/// Reads a Service; none: it has no virtual IP, or is somebody else's.
///
/// # Errors
/// Where it has no name.
pub fn service(object: &object::Service) -> Result<Option<ServiceFacts>, NoName> {
    let name = name_of(&object.metadata)?;
    let nothing = object::ServiceSpec::default();
    let spec = object.spec.as_ref().unwrap_or(&nothing);
    let listed = spec.cluster_ips.as_deref().unwrap_or_default();
    let (key, cluster_ips) = match &spec.cluster_ip {
        Some(one) if listed.is_empty() => ("spec.clusterIP", std::slice::from_ref(one)),
        _ => ("spec.clusterIPs", listed),
    };
    let first = cluster_ips.first().map_or("", String::as_str);
    if is_left_alone(&object.metadata)
        || spec.type_.as_deref() == Some("ExternalName")
        || first.is_empty()
        || first == "None"
    {
        return Ok(None);
    }

    let mut told = Told::new("Service", &name);
    let mut addresses: Vec<(IpAddr, Kind)> = Vec::new();
    for (n, text) in cluster_ips.iter().enumerate() {
        let key = format!("{key}[{n}]");
        let Some(ip) = address(&mut told, &key, text) else { continue };
        let family = Family::of(ip);
        if addresses.iter().any(|(other, _)| Family::of(*other) == family) {
            told.say(&key, &format!("{text:?} is a second {family} address: it is ignored"));
        } else {
            addresses.push((ip, Kind::Cluster));
        }
    }
    let families: Vec<Family> = addresses.iter().map(|(ip, _)| Family::of(*ip)).collect();
    for (key, text, kind) in outer_ips(object, &mut told) {
        let Some(ip) = address(&mut told, &key, &text) else { continue };
        let family = Family::of(ip);
        if !families.contains(&family) {
            told.say(
                &key,
                &format!("{text:?} is ignored, since the Service has no {family} ClusterIP"),
            );
        } else if !addresses.contains(&(ip, kind)) {
            addresses.push((ip, kind));
        }
    }

    let is_external =
        spec.type_.as_deref().is_some_and(|t| ["LoadBalancer", "NodePort"].contains(&t))
            || spec.external_ips.as_ref().is_some_and(|ips| !ips.is_empty());
    let internal_local =
        is_local(&mut told, "spec.internalTrafficPolicy", spec.internal_traffic_policy.as_deref());
    let external_local =
        is_local(&mut told, "spec.externalTrafficPolicy", spec.external_traffic_policy.as_deref());
    Ok(Some(ServiceFacts {
        created: object.metadata.creation_timestamp.as_ref().map_or(i64::MAX, |t| t.0.as_second()),
        addresses: addresses.into(),
        ports: ports(spec, &mut told),
        internal_local,
        external_local: external_local && is_external,
        has_source_ranges: spec.load_balancer_source_ranges.as_ref().is_some_and(|r| !r.is_empty()),
        affinity: affinity(spec, &mut told),
        problems: told.finish(),
        name,
    }))
}

/// Reads the Node.
pub fn node(object: &object::Node) -> NodeFacts {
    let labels = object.metadata.labels.as_ref();
    let zone = labels.and_then(|labels| labels.get(ZONE)).filter(|zone| !zone.is_empty()).cloned();
    let addresses = object.status.as_ref().and_then(|status| status.addresses.as_deref());
    let addresses = addresses.unwrap_or_default();
    let of = |kind: &'static str| {
        let those = addresses.iter().filter(move |one| one.type_ == kind);
        those.filter_map(|one| one.address.parse::<IpAddr>().ok())
    };
    let mut primary: Vec<IpAddr> = Vec::new();
    for ip in of("InternalIP").chain(of("ExternalIP")) {
        if !primary.iter().any(|other| Family::of(*other) == Family::of(ip)) {
            primary.push(ip);
        }
    }
    NodeFacts { zone, primary }
}

impl ServiceFacts {
    /// Whether it has a ClusterIP of a family.
    pub fn has_family(&self, family: Family) -> bool {
        let is_it =
            |(ip, kind): &(IpAddr, Kind)| *kind == Kind::Cluster && Family::of(*ip) == family;
        self.addresses.iter().any(is_it)
    }

    /// Which of its ports an address and port of a kind belongs to, by the port's own number.
    pub fn number_of(&self, kind: Kind, dialled: u16, protocol: Protocol) -> u16 {
        let is_it = |port: &&Port| port.node_port == Some(dialled) && port.protocol == protocol;
        let of_node = || self.ports.iter().find(is_it).map(|port| port.number);
        if kind == Kind::NodePort { of_node().unwrap_or_default() } else { dialled }
    }

    /// What decides which lists one of its ports has in a family.
    pub fn policies(&self, port: &Port, family: Family) -> Policies {
        let is_outer =
            |(ip, kind): &(IpAddr, Kind)| *kind != Kind::Cluster && Family::of(*ip) == family;
        Policies {
            internal_local: self.internal_local,
            external_local: self.external_local,
            is_reachable_from_outside: port.node_port.is_some()
                || self.addresses.iter().any(is_outer),
        }
    }
}

fn is_left_alone(metadata: &ObjectMeta) -> bool {
    let labels = metadata.labels.as_ref();
    labels.is_some_and(|l| l.contains_key(PROXY_NAME) || l.contains_key(HEADLESS))
}

/// The IPs of load balancers, and the external ones, with their fields. One of a load balancer that
/// sees to the traffic itself (`ipMode: Proxy`) is none of a Service.
fn outer_ips(object: &object::Service, told: &mut Told) -> Vec<(String, String, Kind)> {
    let mut found = Vec::new();
    let balancer = object.status.as_ref().and_then(|status| status.load_balancer.as_ref());
    let ingress = balancer.and_then(|balancer| balancer.ingress.as_deref()).unwrap_or_default();
    for (n, one) in ingress.iter().enumerate() {
        let Some(ip) = one.ip.as_ref().filter(|ip| !ip.is_empty()) else { continue };
        let key = format!("status.loadBalancer.ingress[{n}].ip");
        match one.ip_mode.as_deref() {
            None | Some("VIP") => found.push((key, ip.clone(), Kind::LoadBalancer)),
            Some("Proxy") => {}
            Some(other) => {
                told.say(&format!("{key}Mode"), &format!("{other:?} is unknown: {ip} is ignored"));
            }
        }
    }
    let external = object.spec.as_ref().and_then(|spec| spec.external_ips.as_deref());
    for (n, ip) in external.unwrap_or_default().iter().enumerate() {
        found.push((format!("spec.externalIPs[{n}]"), ip.clone(), Kind::External));
    }
    found
}

/// An address that may be a Service's or an endpoint's. The API server refuses the others (for
/// endpoints since CVE-2021-25737), but not in every field, and not in manifests.
fn address(told: &mut Told, key: &str, text: &str) -> Option<IpAddr> {
    let Ok(ip) = text.parse::<IpAddr>() else {
        told.say(key, &format!("{text:?} is not an IP address: it is ignored"));
        return None;
    };
    let kind = match ip {
        _ if ip.is_loopback() => "a loopback address",
        _ if ip.is_unspecified() => "the unspecified address",
        _ if ip.is_multicast() => "a multicast address",
        IpAddr::V4(v4) if v4.is_link_local() => "a link-local address",
        IpAddr::V4(v4) if v4.is_broadcast() => "the broadcast address",
        IpAddr::V6(v6) if v6.is_unicast_link_local() => "a link-local address",
        IpAddr::V6(v6) if v6.to_ipv4_mapped().is_some() => "an IPv4-mapped IPv6 address",
        _ => return Some(ip),
    };
    told.say(key, &format!("{text:?} is {kind}: it is ignored"));
    None
}

/// The protocol of a port; none: it is not translated.
fn protocol(told: &mut Told, key: &str, text: Option<&str>) -> Option<Protocol> {
    match text {
        None | Some("TCP") => return Some(Protocol::Tcp),
        Some("UDP") => return Some(Protocol::Udp),
        Some("SCTP") => told.say(key, "\"SCTP\" is not translated: the port is left to kube-proxy"),
        Some(other) => told.say(key, &format!("{other:?} is not TCP or UDP: the port is ignored")),
    }
    None
}

/// The number of a port, which is not 0.
fn number(told: &mut Told, key: &str, number: Option<i64>) -> Option<u16> {
    let Some(number) = number else {
        told.say(key, "it is missing: the port is ignored");
        return None;
    };
    let found = u16::try_from(number).ok().filter(|port| *port > 0);
    if found.is_none() {
        told.say(key, &format!("{number} is not between 1 and 65535: the port is ignored"));
    }
    found
}

fn ports(spec: &object::ServiceSpec, told: &mut Told) -> Box<[Port]> {
    let mut found = Vec::new();
    let (mut names, mut numbers) = (BTreeMap::new(), BTreeMap::new());
    for (n, port) in spec.ports.as_deref().unwrap_or_default().iter().enumerate() {
        let key = format!("spec.ports[{n}]");
        let Some(protocol) = protocol(told, &format!("{key}.protocol"), port.protocol.as_deref())
        else {
            continue;
        };
        let Some(number) = number(told, &format!("{key}.port"), port.port) else { continue };
        let name = port.name.as_deref().unwrap_or_default();
        if let Some(first) = numbers.get(&(number, protocol)) {
            told.say(
                &key,
                &format!("{number}/{protocol} is spec.ports[{first}] already: the port is ignored"),
            );
            continue;
        }
        if let Some(first) = names.get(&(name, protocol)) {
            told.say(
                &format!("{key}.name"),
                &format!("{name:?} is that of spec.ports[{first}] already: the port is ignored"),
            );
            continue;
        }
        numbers.insert((number, protocol), n);
        names.insert((name, protocol), n);
        let node_port = node_port(told, &key, port.node_port);
        found.push(Port { name: name.into(), protocol, number, node_port });
    }
    found.into()
}

fn node_port(told: &mut Told, key: &str, number: Option<i64>) -> Option<u16> {
    let number = number.filter(|number| *number != 0)?;
    let found = u16::try_from(number).ok();
    if found.is_none() {
        let what = format!("{number} is not between 1 and 65535: it is ignored");
        told.say(&format!("{key}.nodePort"), &what);
    }
    found
}

fn is_local(told: &mut Told, key: &str, policy: Option<&str>) -> bool {
    match policy {
        Some("Local") => return true,
        None | Some("" | "Cluster") => {}
        Some(other) => {
            told.say(key, &format!("{other:?} is neither Cluster nor Local: taken for Cluster"));
        }
    }
    false
}

fn affinity(spec: &object::ServiceSpec, told: &mut Told) -> Option<u32> {
    match spec.session_affinity.as_deref() {
        Some("ClientIP") => {}
        None | Some("" | "None") => return None,
        Some(other) => {
            let what = format!("{other:?} is neither None nor ClientIP: taken for None");
            told.say("spec.sessionAffinity", &what);
            return None;
        }
    }
    let client = spec.session_affinity_config.as_ref().and_then(|config| config.client_ip.as_ref());
    let Some(asked) = client.and_then(|client| client.timeout_seconds) else {
        return Some(AFFINITY);
    };
    let seconds = u32::try_from(asked).ok().filter(|s| (1..=AFFINITY_MAX).contains(s));
    if seconds.is_none() {
        told.say(
            "spec.sessionAffinityConfig.clientIP.timeoutSeconds",
            &format!("{asked} is not between 1 and {AFFINITY_MAX}: taken for {AFFINITY}"),
        );
    }
    seconds.or(Some(AFFINITY))
}

/// Reads a slice, as `node` sees it; none: it is of a Service that is left alone.
///
/// # Errors
/// Where it has no name.
pub fn slice(object: &object::EndpointSlice, node: &str) -> Result<Option<SliceFacts>, NoName> {
    let name = name_of(&object.metadata)?;
    if is_left_alone(&object.metadata) {
        return Ok(None);
    }
    let mut told = Told::new("EndpointSlice", &name);
    let labels = object.metadata.labels.as_ref();
    let service = labels.and_then(|labels| labels.get(SERVICE_NAME)).filter(|s| !s.is_empty());
    let mut facts = SliceFacts {
        name,
        service: None,
        ports: [].into(),
        endpoints: [].into(),
        problems: [].into(),
    };
    let family = match object.address_type.as_deref() {
        Some("IPv4") => Some(Family::V4),
        Some("IPv6") => Some(Family::V6),
        Some(other) => {
            let what = format!("{other:?} is neither IPv4 nor IPv6: the slice is ignored");
            told.say("addressType", &what);
            None
        }
        None => {
            told.say("addressType", "it is missing: the slice is ignored");
            None
        }
    };
    if service.is_none() {
        told.say(
            &format!("metadata.labels[{SERVICE_NAME:?}]"),
            "it is missing: the slice is ignored",
        );
    }
    if let (Some(service), Some(family)) = (service, family) {
        facts.service = Some(format!("{}/{service}", namespace_of(&object.metadata)).into());
        facts.ports = slice_ports(object, &mut told);
        facts.endpoints = endpoints(object, family, node, &mut told);
    }
    facts.problems = told.finish();
    Ok(Some(facts))
}

fn slice_ports(object: &object::EndpointSlice, told: &mut Told) -> Box<[SlicePort]> {
    let mut found: Vec<SlicePort> = Vec::new();
    for (n, port) in object.ports.as_deref().unwrap_or_default().iter().enumerate() {
        // The Service's port has said it.
        if port.protocol.as_deref() == Some("SCTP") {
            continue;
        }
        let Some(protocol) =
            protocol(told, &format!("ports[{n}].protocol"), port.protocol.as_deref())
        else {
            continue;
        };
        let Some(number) = number(told, &format!("ports[{n}].port"), port.port) else { continue };
        let name = port.name.as_deref().unwrap_or_default().into();
        found.push(SlicePort { name, protocol, number });
    }
    found.into()
}

fn endpoints(
    object: &object::EndpointSlice,
    family: Family,
    node: &str,
    told: &mut Told,
) -> Box<[(IpAddr, Endpoint)]> {
    let mut found: Vec<(IpAddr, Endpoint)> = Vec::new();
    let mut known: HashMap<IpAddr, usize> = HashMap::new();
    for (n, endpoint) in object.endpoints.as_deref().unwrap_or_default().iter().enumerate() {
        // The others mean the same endpoint; no consumer reads them.
        let key = format!("endpoints[{n}].addresses[0]");
        let Some(text) = endpoint.addresses.as_deref().and_then(<[String]>::first) else {
            told.say(&key, "it is missing: the endpoint is ignored");
            continue;
        };
        let Some(ip) = address(told, &key, text) else { continue };
        if Family::of(ip) != family {
            told.say(&key, &format!("{text:?} is not an {family} address: it is ignored"));
            continue;
        }
        let conditions = endpoint.conditions.clone().unwrap_or_default();
        let hints = endpoint.hints.as_ref();
        let nodes = hints.and_then(|hints| hints.for_nodes.as_deref()).unwrap_or_default();
        let zones = hints.and_then(|hints| hints.for_zones.as_deref()).unwrap_or_default();
        let is_here = |name: &str| !node.is_empty() && name == node;
        let endpoint = Endpoint {
            is_local: endpoint.node_name.as_deref().is_some_and(is_here),
            stays: conditions.terminating != Some(true),
            is_ready: conditions.ready != Some(false),
            is_serving: conditions.serving != Some(false),
            node_hint: (!nodes.is_empty()).then(|| nodes.iter().any(|n| is_here(&n.name))),
            zone_hints: zones.iter().map(|zone| zone.name.as_str().into()).collect(),
        };
        let Some(&first) = known.get(&ip) else {
            known.insert(ip, found.len());
            found.push((ip, endpoint));
            continue;
        };
        // As in kube-proxy the first counts, or else the last that is on this node.
        let (_, counts) = &mut found[first];
        if counts.stays && endpoint.stays && *counts != endpoint {
            let what = "is there already, and not the same: the first counts, or else the last \
                        that is on this node";
            told.say(&key, &format!("{text:?} {what}"));
        }
        if endpoint.is_local {
            *counts = endpoint;
        }
    }
    found.into()
}
