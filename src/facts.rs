//! What a Pod object says about itself, parsed once. Pure.

use std::{collections::BTreeSet, net::IpAddr};

use ipnet::IpNet;
use k8s_openapi::api::core::v1::{Container, Pod};
use thiserror::Error;

use crate::mesh::{ISTIO, Mesh};

/// A pod that is in a mesh.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodFacts {
    /// `namespace/name`.
    pub name: String,
    /// `metadata.uid`, may be empty.
    pub uid: String,
    /// Its mesh.
    pub mesh: &'static Mesh,
    /// The sidecar's user.
    pub proxy_uid: u32,
    /// The sidecar's group.
    pub proxy_gid: u32,
    /// `status.podIPs`, may be empty.
    pub ips: Vec<IpAddr>,
    /// IPv6 is captured though it is not the pod's first family.
    pub dual_stack: bool,
    /// What its annotations include and exclude.
    pub policy: Policy,
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
}

/// A pod's facts, and what is wrong with its annotations.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parsed {
    /// The facts.
    pub facts: PodFacts,
    /// An annotation that can't be parsed. The policy then captures everything: a pod whose
    /// exclusions are unknown must not send anything past its proxy.
    pub policy_error: Option<FactsError>,
}

/// `namespace/name`, with Kubernetes' default namespace.
pub fn pod_name(pod: &Pod) -> Result<String, FactsError> {
    let name = pod.metadata.name.as_deref().filter(|name| !name.is_empty());
    let namespace = pod.metadata.namespace.as_deref().unwrap_or("default");
    Ok(format!("{namespace}/{}", name.ok_or(FactsError::Missing("metadata.name"))?))
}

/// The facts of a pod that is in a mesh; `None` for one that is not.
pub fn facts(pod: &Pod) -> Result<Option<Parsed>, FactsError> {
    let name = pod_name(pod)?;
    if pod.spec.as_ref().is_some_and(|spec| spec.host_network == Some(true)) {
        return Ok(None);
    }
    let Some(proxy) = istio_proxy(pod) else {
        return Ok(None);
    };
    match annotation(pod, "sidecar.istio.io/interceptionMode") {
        None | Some("REDIRECT") => {}
        Some("NONE") => return Ok(None),
        Some(mode) => {
            let key = "sidecar.istio.io/interceptionMode".to_owned();
            let text = mode.to_owned();
            return Err(if mode == "TPROXY" {
                FactsError::Unsupported { key, text }
            } else {
                FactsError::Invalid { key, text, why: "REDIRECT, TPROXY or NONE expected".into() }
            });
        }
    }
    for key in UNSUPPORTED {
        if let Some(text) = annotation(pod, key).filter(|text| !text.trim().is_empty()) {
            return Err(FactsError::Unsupported { key: (*key).into(), text: text.into() });
        }
    }
    let ips = pod_ips(pod)?;
    let (policy, policy_error) = match istio_policy(pod) {
        Ok(policy) => (policy, None),
        Err(error) => (Policy::default(), Some(error)),
    };
    let facts = PodFacts {
        name,
        uid: pod.metadata.uid.clone().unwrap_or_default(),
        mesh: &ISTIO,
        proxy_uid: proxy_id(pod, proxy, ISTIO.uid, "runAsUser")?,
        proxy_gid: proxy_id(pod, proxy, ISTIO.gid, "runAsGroup")?,
        ips,
        dual_stack: env(proxy, "ISTIO_DUAL_STACK") == Some("true"),
        policy,
    };
    Ok(Some(Parsed { facts, policy_error }))
}

/// Annotations that change what is captured in ways the agent does not implement.
const UNSUPPORTED: &[&str] = &[
    "traffic.sidecar.istio.io/excludeInterfaces",
    "traffic.sidecar.istio.io/kubevirtInterfaces",
    "istio.io/reroute-virtual-interfaces",
];

fn annotation<'a>(pod: &'a Pod, key: &str) -> Option<&'a str> {
    pod.metadata.annotations.as_ref()?.get(key).map(String::as_str)
}

/// A container's literal environment variable.
fn env<'a>(container: &'a Container, name: &str) -> Option<&'a str> {
    let variables = container.env.as_deref().unwrap_or_default();
    variables.iter().find(|variable| variable.name == name)?.value.as_deref()
}

/// The sidecar of an injected pod, by the rule of Istio's CNI plugin
/// (`cni/pkg/plugin/plugin.go`): the container is there, runs a proxy in sidecar mode, was
/// injected and not opted out, and no init container installs iptables rules.
fn istio_proxy(pod: &Pod) -> Option<&Container> {
    let spec = pod.spec.as_ref()?;
    let inits = spec.init_containers.as_deref().unwrap_or_default();
    if inits.iter().any(|container| container.name == ISTIO.init_container) {
        return None;
    }
    annotation(pod, "sidecar.istio.io/status")?;
    let label = pod.metadata.labels.as_ref().and_then(|l| l.get("sidecar.istio.io/inject"));
    let inject = label.map(String::as_str).or_else(|| annotation(pod, "sidecar.istio.io/inject"));
    if inject == Some("false") {
        return None;
    }
    let native = inits.iter().filter(|c| c.restart_policy.as_deref() == Some("Always"));
    let proxy = spec.containers.iter().chain(native).find(|c| c.name == ISTIO.proxy_container)?;
    let args = proxy.args.as_deref().unwrap_or_default();
    let sidecar = args.first().is_some_and(|mode| mode == "proxy")
        && args.get(1).is_none_or(|kind| kind.is_empty() || kind == "sidecar");
    (sidecar && env(proxy, "DISABLE_ENVOY") != Some("true")).then_some(proxy)
}

/// The sidecar's user or group: its container's where that is set and not zero, else the mesh's.
fn proxy_id(pod: &Pod, proxy: &Container, default: u32, field: &str) -> Result<u32, FactsError> {
    let of_container = proxy.security_context.as_ref().and_then(|context| match field {
        "runAsUser" => context.run_as_user,
        _ => context.run_as_group,
    });
    let Some(id) = of_container.filter(|id| *id != 0) else {
        return Ok(default);
    };
    u32::try_from(id).map_err(|_| FactsError::Invalid {
        key: format!("containers[{}].securityContext.{field}", proxy.name),
        text: id.to_string(),
        why: format!("a number from 0 to {} expected (pod {:?})", u32::MAX, pod.metadata.name),
    })
}

fn pod_ips(pod: &Pod) -> Result<Vec<IpAddr>, FactsError> {
    let status = pod.status.as_ref();
    let ips = status.and_then(|status| status.pod_ips.as_deref()).unwrap_or_default();
    ips.iter()
        .map(|ip| {
            ip.ip.parse().map_err(|_| FactsError::Invalid {
                key: "status.podIPs".into(),
                text: ip.ip.clone(),
                why: "an IP address expected".into(),
            })
        })
        .collect()
}

/// Istio's annotations, by `tools/istio-iptables/pkg/capture/run.go` and the CNI plugin's
/// `cni/pkg/plugin/sidecar_redirect.go`.
fn istio_policy(pod: &Pod) -> Result<Policy, FactsError> {
    let key = |name: &str| format!("traffic.sidecar.istio.io/{name}");
    let list = |name: &str| annotation(pod, &key(name)).unwrap_or_default();
    let ports = |name: &str| parse_ports(&key(name), list(name));
    let mut exclude_inbound_ports = ports("excludeInboundPorts")?;
    if let Some(text) = annotation(pod, "status.sidecar.istio.io/port") {
        // Zero switches the health port off.
        exclude_inbound_ports.extend(
            parse_ports("status.sidecar.istio.io/port", text)?.iter().filter(|p| p.first != 0),
        );
    }
    Ok(Policy {
        exclude_outbound_ports: ports("excludeOutboundPorts")?,
        include_outbound_ports: ports("includeOutboundPorts")?,
        exclude_outbound_ranges: parse_ranges(
            &key("excludeOutboundIPRanges"),
            list("excludeOutboundIPRanges"),
        )?,
        include_outbound_ranges: match annotation(pod, &key("includeOutboundIPRanges")) {
            None => Ranges::All,
            Some(text) if text.trim() == "*" => Ranges::All,
            Some(text) => Ranges::Only(parse_ranges(&key("includeOutboundIPRanges"), text)?),
        },
        include_inbound_ports: match annotation(pod, &key("includeInboundPorts")) {
            None => Ports::All,
            Some(text) if text.trim() == "*" => Ports::All,
            Some(text) => Ports::Only(parse_ports(&key("includeInboundPorts"), text)?),
        },
        exclude_inbound_ports,
    })
}

/// `80, 443`: comma-separated ports, blanks around them allowed; empty: none.
pub fn parse_ports(key: &str, text: &str) -> Result<BTreeSet<PortRange>, FactsError> {
    items(text)
        .map(|item| {
            item.parse().map(PortRange::one).map_err(|_| FactsError::Invalid {
                key: key.into(),
                text: text.into(),
                why: format!("{item:?} is not a port from 0 to 65535"),
            })
        })
        .collect()
}

/// `10.0.0.0/8, fd00::/8, 192.0.2.1`: comma-separated ranges or addresses; empty: none.
pub fn parse_ranges(key: &str, text: &str) -> Result<BTreeSet<IpNet>, FactsError> {
    items(text)
        .map(|item| {
            item.parse::<IpNet>().or_else(|_| item.parse::<IpAddr>().map(IpNet::from)).map_err(
                |_| FactsError::Invalid {
                    key: key.into(),
                    text: text.into(),
                    why: format!("{item:?} is not an IP range"),
                },
            )
        })
        .collect()
}

fn items(text: &str) -> impl Iterator<Item = &str> {
    // A single empty item is an empty list; an empty item among others is an error.
    let empty = text.trim().is_empty();
    text.split(',').map(str::trim).filter(move |_| !empty)
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
        assert_eq!(facts.policy, Policy::default());
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
        let error = super::facts(&pod(user(-1))).expect_err("negative").to_string();
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
        for text in ["80,,81", "80;81", "x", "65536", "80,"] {
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
        assert!(annotated("sidecar.istio.io/interceptionMode", "redirect").is_err());
    }

    proptest! {
        #[test]
        fn every_port_list_is_read_whole(ports: BTreeSet<u16>, blanks in "[ ]{0,3}") {
            let text = ports.iter().map(u16::to_string).collect::<Vec<_>>()
                .join(&format!("{blanks},{blanks}"));
            let parsed = parse_ports("key", &text).expect("valid");
            prop_assert_eq!(parsed, ports.into_iter().map(PortRange::one).collect());
        }

        #[test]
        fn parsers_never_panic(text: String) {
            for error in [parse_ports("key", &text).err(), parse_ranges("key", &text).err()] {
                if let Some(FactsError::Invalid { text: told, .. }) = error {
                    prop_assert_eq!(&told, &text);
                }
            }
        }
    }
}
