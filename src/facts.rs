//! What a Pod object says about itself, parsed once. Pure.

use std::{collections::BTreeSet, net::IpAddr, str::FromStr, sync::Arc};

use ipnet::IpNet;
use k8s_openapi::{
    api::core::v1::{Container, Pod},
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use thiserror::Error;

use crate::mesh::{Kind, MESHES, Mesh};

/// A pod that is in a mesh.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodFacts {
    /// `namespace/name`.
    pub name: String,
    /// See [`pod_uid`]; may be empty.
    pub uid: String,
    /// Its mesh.
    pub mesh: &'static Mesh,
    /// The sidecar's user.
    pub proxy_uid: u32,
    /// The sidecar's group.
    pub proxy_gid: u32,
    /// The sidecar's group is exempt as well.
    pub gid_exempt: bool,
    /// The sidecar's outbound listener.
    pub outbound_port: u16,
    /// The sidecar's inbound listener.
    pub inbound_port: u16,
    /// The sidecar's DNS listener, where DNS is captured.
    pub dns_port: Option<u16>,
    /// `status.podIPs`, may be empty.
    pub ips: Vec<IpAddr>,
    /// When IPv6 is captured.
    pub ipv6: Ipv6,
    /// What its annotations include and exclude.
    pub policy: Policy,
    /// Its connections within the node may skip the TCP/IP stack.
    pub splice: bool,
}

/// When a pod's IPv6 is captured, given that it has an IPv6 address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ipv6 {
    /// In any case.
    Always,
    /// Where its first address is an IPv6 one.
    WhereFirst,
    /// Never.
    Never,
}

/// What an exclusion is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// TCP alone.
    Tcp,
    /// UDP alone.
    Udp,
    /// Both.
    Both,
}

/// Ports never captured for some users.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UidExclusion {
    /// Of this protocol.
    pub protocol: Protocol,
    /// These ports.
    pub ports: BTreeSet<PortRange>,
    /// From this user,
    pub first_uid: u32,
    /// to this one, both included.
    pub last_uid: u32,
}

/// Ports from `first` to `last`, both included.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct PortRange {
    /// First port.
    pub first: u16,
    /// Last port, not below `first`.
    pub last: u16,
}

impl PortRange {
    /// A single port.
    pub const fn one(port: u16) -> Self {
        Self { first: port, last: port }
    }

    /// Every port.
    pub const ALL: Self = Self { first: 0, last: u16::MAX };
}

/// Included ports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ports {
    /// `*`
    All,
    /// These only; may be none.
    Only(BTreeSet<PortRange>),
}

/// Included address ranges.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ranges {
    /// `*`
    All,
    /// These only; may be none.
    Only(BTreeSet<IpNet>),
}

/// What is captured, in the terms of the mesh's own rules.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    /// Beats everything outbound.
    pub exclude_outbound_ports: BTreeSet<PortRange>,
    /// Beats the outbound includes.
    pub exclude_outbound_ranges: BTreeSet<IpNet>,
    /// Adds to `include_outbound_ranges`.
    pub include_outbound_ports: BTreeSet<PortRange>,
    /// Adds to `include_outbound_ports`.
    pub include_outbound_ranges: Ranges,
    /// With `Only`, `exclude_inbound_ports` is ignored.
    pub include_inbound_ports: Ports,
    /// Added to the mesh's own.
    pub exclude_inbound_ports: BTreeSet<PortRange>,
    /// Sources never captured.
    pub exclude_inbound_ranges: BTreeSet<IpNet>,
    /// Ports of users; beat everything outbound.
    pub exclude_outbound_for_uids: Vec<UidExclusion>,
    /// Names of interfaces whose traffic is never captured, either way.
    pub exclude_interfaces: BTreeSet<String>,
}

impl Default for Policy {
    /// Everything is captured, but for what the mesh itself exempts.
    fn default() -> Self {
        Self {
            exclude_outbound_ports: BTreeSet::new(),
            exclude_outbound_ranges: BTreeSet::new(),
            include_outbound_ports: BTreeSet::new(),
            include_outbound_ranges: Ranges::All,
            include_inbound_ports: Ports::All,
            exclude_inbound_ports: BTreeSet::new(),
            exclude_inbound_ranges: BTreeSet::new(),
            exclude_outbound_for_uids: Vec::new(),
            exclude_interfaces: BTreeSet::new(),
        }
    }
}

/// What is wrong with a Pod object.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum FactsError {
    /// A required field is missing.
    #[error("{0} is missing")]
    Missing(&'static str),
    /// A field that can't be read.
    #[error("{key}: {text:?}: {why}")]
    Invalid {
        /// The annotation or field.
        key: String,
        /// The offending text.
        text: String,
        /// What was expected.
        why: String,
    },
    /// A mode of the mesh that is not implemented.
    #[error("{key}: {text:?} is not supported yet: the pod is left alone")]
    Unsupported {
        /// The annotation.
        key: String,
        /// Its value.
        text: String,
    },
    /// A pod of Istio's ambient mode that Istio's own agents have not taken.
    #[error(
        "{DATAPLANE_MODE}: \"ambient\" is not supported yet, and Istio's own agents did not \
         redirect it: the pod is left alone"
    )]
    Ambient,
}

/// A pod's facts, and what is wrong with its annotations.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parsed {
    /// The facts.
    pub facts: PodFacts,
    /// A field or annotation that can't be read. The policy then captures everything: a pod
    /// whose exclusions are unknown must not send anything past its proxy.
    pub policy_error: Option<FactsError>,
    /// `sidestep.io/splice` can't be read. The pod's connections then stay with TCP.
    pub splice_error: Option<FactsError>,
}

/// `namespace/name`, with Kubernetes' default namespace.
pub fn pod_name(pod: &Pod) -> Result<String, FactsError> {
    let name = pod.metadata.name.as_deref().filter(|name| !name.is_empty());
    let namespace = pod.metadata.namespace.as_deref().unwrap_or("default");
    Ok(format!("{namespace}/{}", name.ok_or(FactsError::Missing("metadata.name"))?))
}

/// The kubelet writes these into the mirror of a static pod: what it calls the pod itself, as its
/// cgroups and `K8S_POD_UID` of CNI do. Source: kubernetes `pkg/kubelet/types/pod_update.go`.
const STATIC_UID: [&str; 2] = ["kubernetes.io/config.mirror", "kubernetes.io/config.hash"];

/// The uid that the node knows a pod by: `metadata.uid`, and of a static pod's mirror that of the
/// static pod. May be empty.
pub fn pod_uid(pod: &Pod) -> &str {
    static_uid(pod).or(pod.metadata.uid.as_deref()).unwrap_or_default()
}

/// The uid of the static pod whose mirror this object says that it is.
pub fn static_uid(pod: &Pod) -> Option<&str> {
    STATIC_UID.iter().find_map(|key| annotation(pod, key)).filter(|uid| !uid.is_empty())
}

/// Whether a uid is one that a kubelet gives to a static pod, the MD5 sum of its manifest: the API
/// server's have dashes.
pub fn is_static_uid(uid: &str) -> bool {
    uid.len() == 32 && uid.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// The mesh of a pod that comes with the mesh's own iptables rules: an init container installs
/// them, and Sidestep leaves the pod alone.
pub fn own_iptables(pod: &Pod) -> Option<&'static Mesh> {
    let spec = pod.spec.as_ref()?;
    let inits = spec.init_containers.as_deref().unwrap_or_default();
    let has = |name: &str| inits.iter().any(|container| container.name == name);
    MESHES.iter().copied().find(|mesh| has(mesh.init_container))
}

/// `sidestep.io/intercept`: `disabled` takes a pod out of Sidestep's hands, `enabled` keeps it
/// there though its namespace says otherwise. A pod's annotation, a namespace's label.
pub const INTERCEPT: &str = "sidestep.io/intercept";

/// `sidestep.io/splice`: `disabled` keeps the pod's connections on TCP, `enabled` is the default.
/// A pod's annotation, a namespace's label.
pub const SPLICE: &str = "sidestep.io/splice";

/// Istio's label for pods without sidecars, a pod's or its namespace's.
const DATAPLANE_MODE: &str = "istio.io/dataplane-mode";

/// The pod as its namespace makes it: what the namespace says and the pod itself does not. Of a
/// mesh's annotations that is what the mesh itself takes from there ([`Keys::of_namespace`]).
///
/// [`Keys::of_namespace`]: crate::mesh::Keys::of_namespace
pub fn inherit(mut pod: Arc<Pod>, namespace: &ObjectMeta) -> Arc<Pod> {
    let mut add = |key: &str, value: Option<&String>| {
        if let Some(value) = value
            && annotation(&pod, key).is_none()
        {
            let annotations = &mut Arc::make_mut(&mut pod).metadata.annotations;
            annotations.get_or_insert_default().insert(key.into(), value.clone());
        }
    };
    for key in [INTERCEPT, SPLICE] {
        add(key, namespace.labels.as_ref().and_then(|labels| labels.get(key)));
    }
    if let Some(annotations) = &namespace.annotations {
        for key in MESHES.iter().flat_map(|mesh| mesh.keys.of_namespace) {
            add(key, annotations.get(*key));
        }
    }
    let mode = namespace.labels.as_ref().and_then(|labels| labels.get(DATAPLANE_MODE));
    if let Some(mode) = mode
        && label(&pod, DATAPLANE_MODE).is_none()
    {
        let labels = &mut Arc::make_mut(&mut pod).metadata.labels;
        labels.get_or_insert_default().insert(DATAPLANE_MODE.into(), mode.clone());
    }
    pod
}

/// The facts of a pod that is in a mesh; `None` for one that is not, or that was taken out of
/// Sidestep's hands.
pub fn facts(pod: &Pod) -> Result<Option<Parsed>, FactsError> {
    let name = pod_name(pod)?;
    if pod.spec.as_ref().is_some_and(|spec| spec.host_network == Some(true)) {
        return Ok(None);
    }
    for mesh in MESHES {
        if let Some(proxy) = proxy_of(mesh, pod) {
            return facts_of(mesh, name, pod, proxy);
        }
    }
    if is_ambient(pod) { Err(FactsError::Ambient) } else { Ok(None) }
}

/// Whether Sidestep has something to do for the pod: it is in a mesh, or says so in a way that
/// can't be read.
pub fn is_in_mesh(pod: &Pod) -> bool {
    !matches!(facts(pod), Ok(None) | Err(FactsError::Ambient))
}

/// A pod whose traffic Istio means to go through the node's proxy, that runs, and that Istio's own
/// CNI agent did not redirect. Source: istio/istio `cni/pkg/util/podutil.go`.
fn is_ambient(pod: &Pod) -> bool {
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    label(pod, DATAPLANE_MODE) == Some("ambient")
        && annotation(pod, INTERCEPT) != Some("disabled")
        && annotation(pod, "sidecar.istio.io/status").is_none()
        && annotation(pod, "ambient.istio.io/redirection") != Some("enabled")
        && matches!(phase, None | Some("Running"))
}

fn facts_of(
    mesh: &'static Mesh,
    name: String,
    pod: &Pod,
    proxy: &Container,
) -> Result<Option<Parsed>, FactsError> {
    // What can't be read must not open a hole: the mesh's default stands in for it, and the
    // policy captures everything.
    let mut error = None;
    let mut read = Reader { error: &mut error };
    let intercept = annotation(pod, INTERCEPT);
    if !read.or(intercept.map_or(Ok(true), |text| switch(INTERCEPT, text)), true)? {
        return Ok(None);
    }
    if mesh.kind == Kind::Istio && !read.or(istio_mode(pod), true)? {
        return Ok(None);
    }
    let keys = &mesh.keys;
    for key in keys.unsupported {
        if let Some(text) = annotation(pod, key).filter(|text| !text.trim().is_empty()) {
            return Err(FactsError::Unsupported { key: (*key).into(), text: text.into() });
        }
    }
    let policy = read.or(policy(mesh, pod), Policy::default())?;
    let uid = read.or(container_id(proxy, "runAsUser"), None)?.unwrap_or(mesh.uid);
    let gid = read.or(container_id(proxy, "runAsGroup"), None)?.unwrap_or(mesh.gid);
    let named_uid = read.or(number(pod, keys.proxy_uid), None)?;
    let named_gid = read.or(number(pod, keys.proxy_gid), None)?;
    let outbound = read.or(number(pod, keys.outbound_port), None)?;
    let inbound = read.or(number(pod, keys.inbound_port), None)?;
    let dns_port = read.or(dns_port(mesh, pod, proxy), None)?;
    let ips = read.or(pod_ips(pod), Vec::new())?;
    let ipv6 = read.or(ipv6(mesh, pod, proxy), Ipv6::Always)?;
    let mut splice_error = None;
    let splice = annotation(pod, SPLICE).map_or(Ok(true), |text| switch(SPLICE, text));
    let splice = Reader { error: &mut splice_error }.or(splice, false)?;
    let facts = PodFacts {
        name,
        uid: pod_uid(pod).to_owned(),
        mesh,
        proxy_uid: named_uid.unwrap_or(uid),
        proxy_gid: named_gid.unwrap_or(gid),
        gid_exempt: mesh.gid_exempt || named_gid.is_some(),
        outbound_port: outbound.unwrap_or(mesh.outbound_port),
        inbound_port: inbound.unwrap_or(mesh.inbound_port),
        dns_port,
        ips,
        ipv6,
        policy: if error.is_some() { Policy::default() } else { policy },
        splice: splice && mesh.reads_until_empty,
    };
    Ok(Some(Parsed { facts, policy_error: error, splice_error }))
}

/// Keeps the first thing that can't be read.
struct Reader<'a> {
    error: &'a mut Option<FactsError>,
}

impl Reader<'_> {
    /// The value, or `default` where it is invalid. What is not supported stays an error.
    fn or<T>(&mut self, read: Result<T, FactsError>, default: T) -> Result<T, FactsError> {
        match read {
            Err(error @ FactsError::Invalid { .. }) => {
                self.error.get_or_insert(error);
                Ok(default)
            }
            other => other,
        }
    }
}

/// Whether Istio redirects this pod at all.
fn istio_mode(pod: &Pod) -> Result<bool, FactsError> {
    let key = "sidecar.istio.io/interceptionMode";
    match annotation(pod, key) {
        None | Some("REDIRECT") => Ok(true),
        Some("NONE") => Ok(false),
        Some("TPROXY") => Err(FactsError::Unsupported { key: key.into(), text: "TPROXY".into() }),
        Some(mode) => Err(invalid(key, mode, "REDIRECT, TPROXY or NONE expected")),
    }
}

/// The port that DNS goes to, where it is captured: Istio's proxies say so in their environment,
/// Kuma's do it unless an annotation says otherwise.
fn dns_port(mesh: &Mesh, pod: &Pod, proxy: &Container) -> Result<Option<u16>, FactsError> {
    let captured = match mesh.kind {
        Kind::Istio => match env(proxy, "ISTIO_META_DNS_CAPTURE") {
            None => false,
            Some(text) => go_bool("istio-proxy's env ISTIO_META_DNS_CAPTURE", text)?,
        },
        Kind::Kuma => {
            let key = "kuma.io/builtin-dns";
            annotation(pod, key).map_or(Ok(true), |text| kuma_bool(key, text))?
        }
        Kind::Linkerd => false,
    };
    let port = number(pod, mesh.keys.dns_port)?.or(mesh.dns_port);
    Ok(port.filter(|_| captured))
}

/// When IPv6 is captured, by what the mesh told its proxy.
fn ipv6(mesh: &Mesh, pod: &Pod, proxy: &Container) -> Result<Ipv6, FactsError> {
    Ok(match mesh.kind {
        Kind::Istio => match env(proxy, "ISTIO_DUAL_STACK") {
            Some(text) if go_bool("istio-proxy's env ISTIO_DUAL_STACK", text)? => Ipv6::Always,
            _ => Ipv6::WhereFirst,
        },
        Kind::Kuma => {
            let key = "kuma.io/transparent-proxying-ip-family-mode";
            match annotation(pod, key) {
                None | Some("dualstack" | "ipv6") => Ipv6::Always,
                Some("ipv4") => Ipv6::Never,
                Some(text) => return Err(invalid(key, text, "dualstack, ipv4 or ipv6 expected")),
            }
        }
        // Its rules are installed for IPv6 where its listeners are opened for it.
        Kind::Linkerd => {
            let listens = env(proxy, "LINKERD2_PROXY_OUTBOUND_LISTEN_ADDRS");
            if listens.is_some_and(|all| all.contains('[')) { Ipv6::Always } else { Ipv6::Never }
        }
    })
}

fn annotation<'a>(pod: &'a Pod, key: &str) -> Option<&'a str> {
    pod.metadata.annotations.as_ref()?.get(key).map(String::as_str)
}

fn label<'a>(pod: &'a Pod, key: &str) -> Option<&'a str> {
    pod.metadata.labels.as_ref()?.get(key).map(String::as_str)
}

/// A container's literal environment variable.
fn env<'a>(container: &'a Container, name: &str) -> Option<&'a str> {
    let variables = container.env.as_deref().unwrap_or_default();
    variables.iter().find(|variable| variable.name == name)?.value.as_deref()
}

fn invalid(key: &str, text: &str, why: &str) -> FactsError {
    FactsError::Invalid { key: key.into(), text: text.into(), why: why.into() }
}

/// An annotation's number, where the mesh has the annotation and the pod sets it.
fn number<T: FromStr>(pod: &Pod, key: Option<&str>) -> Result<Option<T>, FactsError> {
    let Some((key, text)) = key.and_then(|key| Some((key, annotation(pod, key)?))) else {
        return Ok(None);
    };
    let why = format!("a number of {} bits expected", 8 * size_of::<T>());
    digits(text.trim()).map(Some).ok_or_else(|| invalid(key, text, &why))
}

/// A number as the meshes write it: FromStr takes a sign as well.
fn digits<T: FromStr>(text: &str) -> Option<T> {
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok())?
}

/// What Go's strconv.ParseBool takes.
fn go_bool(key: &str, text: &str) -> Result<bool, FactsError> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" | "" => Ok(false),
        _ => Err(invalid(key, text, "true or false expected")),
    }
}

/// Sidestep's own switch.
fn switch(key: &str, text: &str) -> Result<bool, FactsError> {
    match text {
        "enabled" => Ok(true),
        "disabled" => Ok(false),
        _ => Err(invalid(key, text, "enabled or disabled expected")),
    }
}

/// What Kuma takes for a switch.
fn kuma_bool(key: &str, text: &str) -> Result<bool, FactsError> {
    match text {
        "enabled" | "true" | "yes" => Ok(true),
        "disabled" | "false" | "no" => Ok(false),
        _ => Err(invalid(key, text, "enabled or disabled expected")),
    }
}

/// The sidecar of a pod that the mesh injected, and where no init container installs iptables
/// rules instead. Sources: istio/istio `cni/pkg/plugin/plugin.go`, linkerd/linkerd2-proxy-init
/// `cni-plugin/main.go`, kumahq/kuma `app/cni/pkg/cni/main.go`; native sidecars beside.
fn proxy_of<'a>(mesh: &Mesh, pod: &'a Pod) -> Option<&'a Container> {
    let spec = pod.spec.as_ref()?;
    let inits = spec.init_containers.as_deref().unwrap_or_default();
    if inits.iter().any(|container| container.name == mesh.init_container) {
        return None;
    }
    let native = inits.iter().filter(|c| c.restart_policy.as_deref() == Some("Always"));
    let proxy = spec.containers.iter().chain(native).find(|c| c.name == mesh.proxy_container)?;
    let injected = match mesh.kind {
        Kind::Istio => istio_injected(pod, proxy),
        Kind::Linkerd => true,
        Kind::Kuma => annotation(pod, "kuma.io/sidecar-injected") == Some("true"),
    };
    injected.then_some(proxy)
}

/// The proxy runs as a sidecar, was injected, and is not opted out.
fn istio_injected(pod: &Pod, proxy: &Container) -> bool {
    let key = "sidecar.istio.io/inject";
    let args = proxy.args.as_deref().unwrap_or_default();
    annotation(pod, "sidecar.istio.io/status").is_some()
        && label(pod, key).or_else(|| annotation(pod, key)) != Some("false")
        && args.first().is_some_and(|mode| mode == "proxy")
        && args.get(1).is_none_or(|kind| kind.is_empty() || kind == "sidecar")
        && env(proxy, "DISABLE_ENVOY") != Some("true")
}

/// A container's user or group, where it is set and not zero.
fn container_id(proxy: &Container, field: &str) -> Result<Option<u32>, FactsError> {
    let id = proxy.security_context.as_ref().and_then(|context| match field {
        "runAsUser" => context.run_as_user,
        _ => context.run_as_group,
    });
    let Some(id) = id.filter(|id| *id != 0) else {
        return Ok(None);
    };
    let key = format!("containers[{}].securityContext.{field}", proxy.name);
    u32::try_from(id)
        .map(Some)
        .map_err(|_| invalid(&key, &id.to_string(), "a number of 32 bits expected"))
}

fn pod_ips(pod: &Pod) -> Result<Vec<IpAddr>, FactsError> {
    let status = pod.status.as_ref();
    let ips = status.and_then(|status| status.pod_ips.as_deref()).unwrap_or_default();
    ips.iter()
        .map(|ip| {
            ip.ip.parse().map_err(|_| invalid("status.podIPs", &ip.ip, "an IP address expected"))
        })
        .collect()
}

/// What the pod's annotations include and exclude.
fn policy(mesh: &Mesh, pod: &Pod) -> Result<Policy, FactsError> {
    let keys = &mesh.keys;
    let text = |key: Option<&str>| key.and_then(|key| annotation(pod, key)).unwrap_or_default();
    let ports =
        |key: Option<&str>| parse_ports(key.unwrap_or_default(), text(key), keys.port_ranges);
    let ranges = |key: Option<&str>| parse_ranges(key.unwrap_or_default(), text(key));

    let mut exclude_inbound_ports = ports(Some(keys.exclude_inbound_ports))?;
    let mut exclude_outbound_ports = match annotation(pod, keys.exclude_outbound_ports) {
        Some(_) => ports(Some(keys.exclude_outbound_ports))?,
        None => mesh.outbound_excluded_default.iter().copied().map(PortRange::one).collect(),
    };
    let set = |key: Option<&'static str>| key.filter(|key| annotation(pod, key).is_some());
    let mut include_inbound_ports = match set(keys.include_inbound_ports) {
        Some(key) if text(Some(key)).trim() != "*" => Ports::Only(ports(Some(key))?),
        _ => Ports::All,
    };
    match mesh.kind {
        Kind::Istio => {
            // The health port; zero switches it off.
            let key = "status.sidecar.istio.io/port";
            let health = parse_ports(key, text(Some(key)), false)?;
            exclude_inbound_ports.extend(health.iter().filter(|port| port.first != 0));
        }
        Kind::Linkerd => {
            // Its control plane talks to the API server directly.
            let component = label(pod, "linkerd.io/control-plane-component");
            if component.is_some_and(|name| !name.is_empty()) {
                exclude_outbound_ports.extend([443, 6443].map(PortRange::one));
            }
        }
        Kind::Kuma => {
            // A gateway takes connections itself.
            let key = "kuma.io/gateway";
            if annotation(pod, key).map_or(Ok(false), |text| kuma_bool(key, text))? {
                include_inbound_ports = Ports::Only(BTreeSet::new());
            }
        }
    }
    Ok(Policy {
        exclude_outbound_ports,
        exclude_outbound_ranges: ranges(keys.exclude_outbound_ranges)?,
        include_outbound_ports: ports(keys.include_outbound_ports)?,
        include_outbound_ranges: match set(keys.include_outbound_ranges) {
            Some(key) if text(Some(key)).trim() != "*" => Ranges::Only(ranges(Some(key))?),
            _ => Ranges::All,
        },
        include_inbound_ports,
        exclude_inbound_ports,
        exclude_inbound_ranges: ranges(keys.exclude_inbound_ranges)?,
        exclude_outbound_for_uids: match keys.exclude_outbound_for_uids {
            Some(key) => parse_uid_exclusions(key, text(Some(key)))?,
            None => Vec::new(),
        },
        exclude_interfaces: match keys.exclude_interfaces {
            Some(key) => parse_interfaces(key, text(Some(key)))?,
            None => BTreeSet::new(),
        },
    })
}

/// `net1, net2`: comma-separated names of interfaces; empty: none.
pub fn parse_interfaces(key: &str, text: &str) -> Result<BTreeSet<String>, FactsError> {
    let is_name = |name: &str| {
        (1..16).contains(&name.len()) && !name.contains(|c: char| c == '/' || c.is_whitespace())
    };
    items(text, ',')
        .map(|item| {
            let bad = || invalid(key, text, &format!("{item:?} is not an interface's name"));
            Some(item.to_owned()).filter(|name| is_name(name)).ok_or_else(bad)
        })
        .collect()
}

/// `80, 443` and, where the mesh has `ranges`, `8000-8100`: comma-separated ports, blanks around
/// them allowed; empty: none.
pub fn parse_ports(key: &str, text: &str, ranges: bool) -> Result<BTreeSet<PortRange>, FactsError> {
    let range = |item: &str| -> Option<PortRange> {
        if let Some(port) = digits(item) {
            return Some(PortRange::one(port));
        }
        let (first, last) = item.split_once('-').filter(|_| ranges)?;
        let (first, last) = (digits(first.trim())?, digits(last.trim())?);
        (first <= last).then_some(PortRange { first, last })
    };
    let wanted = if ranges { "a port or a range of ports" } else { "a port" };
    items(text, ',')
        .map(|item| {
            range(item).ok_or_else(|| {
                invalid(key, text, &format!("{item:?} is not {wanted} from 0 to 65535"))
            })
        })
        .collect()
}

/// Kuma's `[[tcp|udp:]PORTS:]UIDS;...`, where PORTS is `*`, or ports and ranges `a-b` separated
/// by commas, and UIDS a user or a range `a-b`; no protocol: both; no ports: all.
pub fn parse_uid_exclusions(key: &str, text: &str) -> Result<Vec<UidExclusion>, FactsError> {
    items(text, ';')
        .map(|item| {
            let bad = |why: &str| invalid(key, text, &format!("{item:?}: {why}"));
            let fields: Vec<&str> = item.split(':').map(str::trim).collect();
            let (protocol, ports, uids) = match fields[..] {
                [uids] => ("", "*", uids),
                [ports, uids] => ("", ports, uids),
                [protocol, ports, uids] => (protocol, ports, uids),
                _ => return Err(bad("[[tcp|udp:]PORTS:]UIDS expected")),
            };
            let protocol = match protocol {
                "tcp" => Protocol::Tcp,
                "udp" => Protocol::Udp,
                "" | "*" => Protocol::Both,
                _ => return Err(bad("the protocol is tcp or udp")),
            };
            let ports = match ports {
                "" | "*" => [PortRange::ALL].into(),
                ports => parse_ports(key, ports, true).map_err(|e| bad(&e.to_string()))?,
            };
            let (first, last) = uids.split_once('-').unwrap_or((uids, uids));
            match (digits(first.trim()), digits(last.trim())) {
                (Some(first_uid), Some(last_uid)) if first_uid <= last_uid => {
                    Ok(UidExclusion { protocol, ports, first_uid, last_uid })
                }
                _ => Err(bad("a user or a range of users expected at the end")),
            }
        })
        .collect()
}

/// `10.0.0.0/8, fd00::/8, 192.0.2.1`: comma-separated ranges or addresses; empty: none.
pub fn parse_ranges(key: &str, text: &str) -> Result<BTreeSet<IpNet>, FactsError> {
    // By parts: the library's own parser takes leading zeros, and reads them as decimal.
    let range = |item: &str| -> Option<IpNet> {
        let Some((address, bits)) = item.split_once('/') else {
            return item.parse::<IpAddr>().ok().map(IpNet::from);
        };
        IpNet::new(address.parse().ok()?, digits(bits)?).ok()
    };
    items(text, ',')
        .map(|item| {
            let bad = || invalid(key, text, &format!("{item:?} is not an IP range"));
            range(item).ok_or_else(bad)
        })
        .collect()
}

fn items(text: &str, separator: char) -> impl Iterator<Item = &str> {
    // A single empty item is an empty list; an empty item among others is an error.
    let empty = text.trim().is_empty();
    text.split(separator).map(str::trim).filter(move |_| !empty)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    fn pod(patch: impl FnOnce(&mut Value)) -> Pod {
        let mut value = json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {
                "name": "a", "namespace": "shop", "uid": "u-1", "labels": {},
                "annotations": { "sidecar.istio.io/status": "{}" }
            },
            "spec": { "containers": [
                { "name": "app" },
                { "name": "istio-proxy", "args": ["proxy", "sidecar"] }
            ]},
            "status": { "podIPs": [{ "ip": "10.0.0.7" }] }
        });
        patch(&mut value);
        serde_json::from_value(value).expect("a pod")
    }

    fn parsed(patch: impl FnOnce(&mut Value)) -> Option<Parsed> {
        facts(&pod(patch)).expect("valid")
    }

    fn annotated(key: &str, text: &str) -> Result<Option<Parsed>, FactsError> {
        facts(&pod(|p| p["metadata"]["annotations"][key] = text.into()))
    }

    #[test]
    fn an_injected_pod() {
        let facts = parsed(|_| {}).expect("in the mesh").facts;
        assert_eq!((facts.name.as_str(), facts.uid.as_str()), ("shop/a", "u-1"));
        assert_eq!((facts.proxy_uid, facts.proxy_gid), (1337, 1337));
        assert_eq!((facts.mesh.name, facts.dns_port), ("istio", None));
        let by_default =
            Policy { exclude_outbound_ports: [PortRange::one(15020)].into(), ..Policy::default() };
        assert_eq!(facts.policy, by_default);
    }

    #[test]
    fn what_makes_a_pod_no_mesh_pod() {
        assert!(parsed(|p| p["metadata"]["annotations"] = json!({})).is_none());
        assert!(parsed(|p| p["spec"]["containers"][1]["args"] = json!(["wait"])).is_none());
        assert!(parsed(|p| p["spec"]["containers"][1]["args"][1] = "router".into()).is_none());
        assert!(parsed(|p| p["spec"]["containers"][1]["name"] = "envoy".into()).is_none());
        assert!(
            parsed(|p| p["spec"]["initContainers"] = json!([{"name": "istio-init"}])).is_none()
        );
        assert!(parsed(|p| p["spec"]["hostNetwork"] = true.into()).is_none());
        let disabled = json!([{"name": "DISABLE_ENVOY", "value": "true"}]);
        assert!(parsed(|p| p["spec"]["containers"][1]["env"] = disabled).is_none());
        assert_eq!(annotated("sidecar.istio.io/inject", "false"), Ok(None));
        assert_eq!(annotated("sidecar.istio.io/interceptionMode", "NONE"), Ok(None));
    }

    #[test]
    fn the_inject_label_beats_the_annotation() {
        let both = |p: &mut Value| {
            p["metadata"]["labels"]["sidecar.istio.io/inject"] = "true".into();
            p["metadata"]["annotations"]["sidecar.istio.io/inject"] = "false".into();
        };
        assert!(parsed(both).is_some());
    }

    #[test]
    fn a_native_sidecar_counts_and_a_plain_init_container_does_not() {
        let init = |restart: Value| {
            move |p: &mut Value| {
                p["spec"]["containers"] = json!([{"name": "app"}]);
                p["spec"]["initContainers"] =
                    json!([{"name": "istio-proxy", "args": ["proxy"], "restartPolicy": restart}]);
            }
        };
        assert!(parsed(init("Always".into())).is_some());
        assert!(parsed(init(Value::Null)).is_none());
    }

    #[test]
    fn the_proxys_user_comes_from_its_container() {
        let user = |uid: i64| {
            move |p: &mut Value| {
                p["spec"]["containers"][1]["securityContext"] =
                    json!({"runAsUser": uid, "runAsGroup": 7});
            }
        };
        let facts = parsed(user(4000)).expect("in the mesh").facts;
        assert_eq!((facts.proxy_uid, facts.proxy_gid), (4000, 7));
        assert_eq!(parsed(user(0)).expect("in the mesh").facts.proxy_uid, 1337);
        let negative = parsed(user(-1)).expect("in the mesh");
        assert_eq!(negative.facts.proxy_uid, 1337);
        let error = negative.policy_error.expect("an error").to_string();
        assert!(error.contains("runAsUser") && error.contains("-1"), "{error}");
    }

    #[test]
    fn annotations_become_policy() {
        let key = "traffic.sidecar.istio.io/includeInboundPorts";
        let policy = |key, text| annotated(key, text).expect("ok").expect("in").facts.policy;
        assert_eq!(policy(key, "*").include_inbound_ports, Ports::All);
        assert_eq!(policy(key, "").include_inbound_ports, Ports::Only([].into()));
        let two = [PortRange::one(80), PortRange::one(81)];
        assert_eq!(policy(key, "80, 81").include_inbound_ports, Ports::Only(two.into()));
        let all: IpNet = "0.0.0.0/0".parse().expect("a range");
        let excluded = policy("traffic.sidecar.istio.io/excludeOutboundIPRanges", "0.0.0.0/0");
        assert_eq!(excluded.exclude_outbound_ranges, [all].into());
        let health = policy("status.sidecar.istio.io/port", "15030");
        assert_eq!(health.exclude_inbound_ports, [PortRange::one(15030)].into());
    }

    #[test]
    fn a_bad_annotation_captures_everything_and_names_key_and_text() {
        for text in ["80,,81", "80;81", "x", "65536", "80,", "+80"] {
            let key = "traffic.sidecar.istio.io/excludeOutboundPorts";
            let parsed = annotated(key, text).expect("facts").expect("in the mesh");
            assert_eq!(parsed.facts.policy, Policy::default());
            let error = parsed.policy_error.expect("an error").to_string();
            assert!(error.contains(key) && error.contains(text), "{error}");
        }
    }

    #[test]
    fn modes_that_are_not_implemented_are_refused() {
        for (key, text) in [
            ("sidecar.istio.io/interceptionMode", "TPROXY"),
            ("traffic.sidecar.istio.io/kubevirtInterfaces", "net1"),
        ] {
            let error = annotated(key, text).expect_err("refused").to_string();
            assert!(error.contains(key) && error.contains(text), "{error}");
        }
        let unknown = annotated("sidecar.istio.io/interceptionMode", "redirect").expect("facts");
        assert!(unknown.expect("captured").policy_error.is_some(), "fails closed");
    }

    #[test]
    fn ambient_pods_are_refused_where_nobody_else_has_them() {
        let ambient = |patch: fn(&mut Value)| {
            facts(&pod(|p| {
                p["metadata"]["annotations"] = json!({});
                p["metadata"]["labels"] = json!({"istio.io/dataplane-mode": "ambient"});
                p["spec"]["containers"] = json!([{ "name": "app" }]);
                p["status"]["phase"] = "Running".into();
                patch(p);
            }))
        };
        let error = ambient(|_| {}).expect_err("refused").to_string();
        assert!(error.contains("istio.io/dataplane-mode") && error.contains("ambient"), "{error}");
        let left_alone: [fn(&mut Value); 6] = [
            |p| p["metadata"]["labels"]["istio.io/dataplane-mode"] = "none".into(),
            |p| p["metadata"]["annotations"]["ambient.istio.io/redirection"] = "enabled".into(),
            |p| p["metadata"]["annotations"]["sidecar.istio.io/status"] = "{}".into(),
            |p| p["metadata"]["annotations"][INTERCEPT] = "disabled".into(),
            |p| p["spec"]["hostNetwork"] = true.into(),
            // Istio's own agent has not had its turn yet.
            |p| p["status"]["phase"] = "Pending".into(),
        ];
        for patch in left_alone {
            assert_eq!(ambient(patch), Ok(None));
        }
        // A sidecar, of whichever mesh, decides; and a pod's label beats its namespace's.
        assert!(parsed(|p| p["metadata"]["labels"][DATAPLANE_MODE] = "ambient".into()).is_some());
        let namespace: ObjectMeta =
            serde_json::from_value(json!({"labels": {DATAPLANE_MODE: "ambient"}})).expect("meta");
        let of = |labels: Value| {
            let plain = pod(|p| {
                p["metadata"]["annotations"] = json!({});
                p["metadata"]["labels"] = labels;
            });
            facts(&inherit(Arc::new(plain), &namespace))
        };
        assert_eq!(of(json!({})), Err(FactsError::Ambient));
        assert_eq!(of(json!({DATAPLANE_MODE: "none"})), Ok(None));
    }

    fn linkerd(patch: impl FnOnce(&mut Value)) -> Option<Parsed> {
        parsed(|p| {
            p["metadata"]["annotations"] = json!({});
            p["spec"]["containers"] = json!([{ "name": "app" }, { "name": "linkerd-proxy" }]);
            patch(p);
        })
    }

    fn kuma(patch: impl FnOnce(&mut Value)) -> Option<Parsed> {
        parsed(|p| {
            p["metadata"]["annotations"] = json!({ "kuma.io/sidecar-injected": "true" });
            p["spec"]["containers"] = json!([{ "name": "app" }, { "name": "kuma-sidecar" }]);
            patch(p);
        })
    }

    fn note(key: &'static str, text: &'static str) -> impl FnOnce(&mut Value) {
        move |p| p["metadata"]["annotations"][key] = text.into()
    }

    fn ranges<const N: usize>(ports: [(u16, u16); N]) -> BTreeSet<PortRange> {
        ports.into_iter().map(|(first, last)| PortRange { first, last }).collect()
    }

    #[test]
    fn a_linkerd_pod() {
        let facts = linkerd(|_| {}).expect("in the mesh").facts;
        assert_eq!((facts.mesh.name, facts.proxy_uid, facts.gid_exempt), ("linkerd", 2102, false));
        assert_eq!((facts.outbound_port, facts.inbound_port, facts.dns_port), (4140, 4143, None));
        assert_eq!((facts.ipv6, facts.policy), (Ipv6::Never, Policy::default()));
        let init = |p: &mut Value| p["spec"]["initContainers"] = json!([{"name": "linkerd-init"}]);
        assert!(linkerd(init).is_none(), "its own rules are there");
    }

    #[test]
    fn linkerds_annotations() {
        let policy = |key, text| linkerd(note(key, text)).expect("in").facts.policy;
        let key = "config.linkerd.io/skip-inbound-ports";
        let ports = ranges([(80, 80), (8000, 8100)]);
        assert_eq!(policy(key, "80, 8000-8100").exclude_inbound_ports, ports);
        let key = "config.linkerd.io/skip-outbound-ports";
        assert_eq!(policy(key, "80,8000-8100").exclude_outbound_ports, ports);
        let subnet: IpNet = "10.1.0.0/16".parse().expect("a range");
        let skipped = policy("config.linkerd.io/skip-subnets", "10.1.0.0/16");
        assert_eq!(skipped.exclude_inbound_ranges, [subnet].into());
        let facts = linkerd(note("config.linkerd.io/proxy-gid", "7")).expect("in").facts;
        assert_eq!((facts.proxy_gid, facts.gid_exempt), (7, true));
        let facts = linkerd(note("config.linkerd.io/proxy-uid", "7")).expect("in").facts;
        assert_eq!(facts.proxy_uid, 7);
        let component = |p: &mut Value| {
            p["metadata"]["labels"]["linkerd.io/control-plane-component"] = "destination".into();
        };
        let policy = linkerd(component).expect("in").facts.policy;
        assert_eq!(policy.exclude_outbound_ports, ranges([(443, 443), (6443, 6443)]));
        let v6 = |p: &mut Value| {
            p["spec"]["containers"][1]["env"] = json!([
                {"name": "LINKERD2_PROXY_OUTBOUND_LISTEN_ADDRS", "value": "127.0.0.1:4140,[::1]:4140"}
            ]);
        };
        assert_eq!(linkerd(v6).expect("in").facts.ipv6, Ipv6::Always);
    }

    #[test]
    fn a_bad_range_captures_everything() {
        for text in ["8100-8000", "80-", "-80", "1-65536", "80--81", "80-+81"] {
            let key = "config.linkerd.io/skip-inbound-ports";
            let parsed = linkerd(|p| p["metadata"]["annotations"][key] = text.into()).expect("in");
            assert_eq!(parsed.facts.policy, Policy::default());
            let error = parsed.policy_error.expect("an error").to_string();
            assert!(error.contains(key) && error.contains(text), "{error}");
        }
    }

    #[test]
    fn a_slip_about_splicing_costs_that_alone() {
        let parsed = kuma(|p| {
            p["metadata"]["annotations"][SPLICE] = "off".into();
            p["metadata"]["annotations"]["traffic.kuma.io/exclude-outbound-ports"] = "80".into();
        });
        let parsed = parsed.expect("in the mesh");
        assert!(!parsed.facts.splice, "what it asks for is not known");
        assert_eq!(parsed.facts.policy.exclude_outbound_ports, ranges([(80, 80)]));
        assert_eq!(parsed.policy_error, None);
        let error = parsed.splice_error.expect("an error").to_string();
        assert!(error.contains(SPLICE) && error.contains("off"), "{error}");
    }

    #[test]
    fn a_kuma_pod() {
        let facts = kuma(|_| {}).expect("in the mesh").facts;
        assert_eq!((facts.mesh.name, facts.proxy_uid, facts.gid_exempt), ("kuma", 5678, false));
        assert_eq!((facts.inbound_port, facts.dns_port), (15006, Some(15053)));
        assert_eq!((facts.ipv6, facts.policy), (Ipv6::Always, Policy::default()));
        let injected = "kuma.io/sidecar-injected";
        assert!(kuma(note(injected, "false")).is_none());
        let facts = kuma(note("kuma.io/sidecar-uid", "7")).expect("in").facts;
        assert_eq!(facts.proxy_uid, 7);
        let facts = kuma(note("kuma.io/builtin-dns", "disabled")).expect("in").facts;
        assert_eq!(facts.dns_port, None);
        let key = "kuma.io/transparent-proxying-ip-family-mode";
        assert_eq!(kuma(note(key, "ipv4")).expect("in").facts.ipv6, Ipv6::Never);
        let gateway = kuma(note("kuma.io/gateway", "enabled")).expect("in").facts;
        assert_eq!(gateway.policy.include_inbound_ports, Ports::Only([].into()));
    }

    #[test]
    fn kumas_ports_for_users() {
        let key = "traffic.kuma.io/exclude-outbound-ports-for-uids";
        let text = "tcp:22,80-90:1000;udp:53:1000-1001; *:7 ;8";
        let all = kuma(note(key, text)).expect("in").facts.policy.exclude_outbound_for_uids;
        let one = |protocol, ports, first_uid, last_uid| UidExclusion {
            protocol,
            ports,
            first_uid,
            last_uid,
        };
        assert_eq!(
            all,
            [
                one(Protocol::Tcp, ranges([(22, 22), (80, 90)]), 1000, 1000),
                one(Protocol::Udp, ranges([(53, 53)]), 1000, 1001),
                one(Protocol::Both, [PortRange::ALL].into(), 7, 7),
                one(Protocol::Both, [PortRange::ALL].into(), 8, 8),
            ]
        );
        for text in ["icmp:1:2", "tcp:x:2", "tcp:1:b", "tcp:1:3-2", "1:2:3:4", ";", "1:+2"] {
            assert!(parse_uid_exclusions(key, text).is_err(), "{text}");
        }
    }

    #[test]
    fn ranges_are_written_one_way() {
        let range = |text: &str| text.parse::<IpNet>().expect("a range");
        let all = parse_ranges("key", "10.0.0.0/8, fd00::/8, 192.0.2.1").expect("ranges");
        assert_eq!(all, [range("10.0.0.0/8"), range("fd00::/8"), range("192.0.2.1/32")].into());
        for text in ["010.0.0.0/8", "10.0.0.0/08x", "10.0.0.0/33", "10.0.0.0/", "/8", "10.0.0.0/+8"]
        {
            assert!(parse_ranges("key", text).is_err(), "{text}");
        }
    }

    #[test]
    fn interfaces_are_names() {
        assert_eq!(
            parse_interfaces("key", "net1, eth0.5"),
            Ok(["net1".to_owned(), "eth0.5".to_owned()].into())
        );
        for text in ["net1,,net2", "a/b", "a b", "sixteen-letters-"] {
            assert!(parse_interfaces("key", text).is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn every_port_list_is_read_whole(ports: BTreeSet<u16>, blanks in "[ ]{0,3}") {
            let text = ports.iter().map(u16::to_string).collect::<Vec<_>>()
                .join(&format!("{blanks},{blanks}"));
            let parsed = parse_ports("key", &text, false).expect("valid");
            prop_assert_eq!(parsed, ports.into_iter().map(PortRange::one).collect());
        }

        #[test]
        fn parsers_never_panic(text: String) {
            for error in [
                parse_ports("key", &text, false).err(),
                parse_ports("key", &text, true).err(),
                parse_ranges("key", &text).err(),
                parse_uid_exclusions("key", &text).err(),
            ] {
                if let Some(FactsError::Invalid { text: told, .. }) = error {
                    prop_assert_eq!(&told, &text);
                }
            }
        }
    }

    fn namespace(value: serde_json::Value) -> ObjectMeta {
        serde_json::from_value(value).expect("metadata")
    }

    #[test]
    fn a_namespace_says_what_its_pods_leave_open() {
        let linkerd = json!({
            "metadata": {"name": "p", "annotations": {"config.linkerd.io/skip-outbound-ports": "25"}},
            "spec": {"containers": [{"name": "linkerd-proxy"}]},
        });
        let pod = Arc::new(serde_json::from_value::<Pod>(linkerd).expect("a pod"));
        let of = namespace(json!({"annotations": {
            "config.linkerd.io/skip-outbound-ports": "3306",
            "config.linkerd.io/skip-inbound-ports": "9000",
            "config.linkerd.io/proxy-uid": "7",
            "traffic.sidecar.istio.io/excludeOutboundPorts": "1",
        }}));
        let inherited = inherit(Arc::clone(&pod), &of);
        let policy = facts(&inherited).expect("facts").expect("in a mesh").facts.policy;
        assert_eq!(policy.exclude_outbound_ports, [PortRange::one(25)].into(), "the pod's own");
        assert!(policy.exclude_inbound_ports.contains(&PortRange::one(9000)), "the namespace's");
        let keys = inherited.metadata.annotations.as_ref().expect("annotations");
        assert_eq!(keys.len(), 2, "nothing else is taken: {keys:?}");
        assert_eq!(*inherit(Arc::clone(&pod), &namespace(json!({}))), *pod);
    }

    #[test]
    fn a_pod_or_a_namespace_can_be_taken_out_of_our_hands() {
        let with = |annotation: Option<&str>, label: Option<&str>| {
            let mut pod = json!({
                "metadata": {"name": "p", "annotations": {"sidecar.istio.io/status": "{}"}},
                "spec": {"containers": [{"name": "istio-proxy", "args": ["proxy", "sidecar"]}]},
            });
            if let Some(text) = annotation {
                pod["metadata"]["annotations"][INTERCEPT] = text.into();
            }
            let pod = Arc::new(serde_json::from_value::<Pod>(pod).expect("a pod"));
            let of = label.map_or(json!({}), |text| json!({"labels": {INTERCEPT: text}}));
            facts(&inherit(pod, &namespace(of))).expect("facts")
        };
        assert!(with(None, None).is_some());
        assert!(with(Some("disabled"), None).is_none());
        assert!(with(None, Some("disabled")).is_none());
        assert!(with(Some("enabled"), Some("disabled")).is_some(), "the pod has the last word");
        // A slip of the pen opens nothing.
        let error = with(Some("off"), None).expect("captured").policy_error.expect("an error");
        assert!(error.to_string().contains(INTERCEPT) && error.to_string().contains("off"));
    }
}
