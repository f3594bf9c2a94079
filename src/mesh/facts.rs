//! Facts about a pod, parsed once from the Pod object. Pure.

use std::{net::IpAddr, sync::Arc};

use k8s_openapi::{
    api::core::v1::{Container, Pod},
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};

use super::{
    MESHES, Mesh,
    annotations::{
        AMBIENT, DATAPLANE_MODE, FactsError, Reader, annotation, init_containers, invalid, label,
        sidecar, switch,
    },
    mode::{self, MODE, Mode},
    policy::{Ipv6, Policy, TcpDns},
};

/// A pod in a mesh.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodFacts {
    /// The pod, as `namespace/name`.
    pub name: String,
    /// Its uid, see [`pod_uid`]; may be empty.
    pub uid: String,
    /// The pod's mesh.
    pub mesh: &'static Mesh,
    /// The sidecar's user, which is exempt, if any.
    pub proxy_uid: Option<u32>,
    /// The sidecar's group, if it is exempt as well.
    pub proxy_gid: Option<u32>,
    /// The port of the sidecar's outbound listener.
    pub outbound_port: u16,
    /// The port of the sidecar's inbound listener.
    pub inbound_port: u16,
    /// The port of the sidecar's DNS listener, if DNS is captured.
    pub dns_port: Option<u16>,
    /// The treatment of DNS over TCP, if DNS is captured.
    pub tcp_dns: TcpDns,
    /// The addresses in `status.podIPs`; may be empty.
    pub ips: Vec<IpAddr>,
    /// The condition for capturing IPv6.
    pub ipv6: Ipv6,
    /// The includes and excludes of its annotations.
    pub policy: Policy,
    /// The policy cannot be read, so it is the one that captures everything.
    pub is_policy_unread: bool,
    /// Whether its connections within the node may bypass the TCP/IP stack.
    pub splice: bool,
    /// The mode that it asks for.
    pub asked: Option<Mode>,
    /// An init container installs the mesh's own rules.
    pub brings_rules: bool,
}

/// A pod's facts, and the errors in its annotations.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parsed {
    /// The pod's facts.
    pub facts: PodFacts,
    /// A field or annotation is invalid. The policy then captures everything: a pod whose
    /// exclusions are unknown must not send anything past its proxy.
    pub policy_error: Option<FactsError>,
    /// Items that the mesh itself skips or ignores, as Sidestep does; the rest of the policy
    /// applies.
    pub warnings: Vec<FactsError>,
    /// `sidestep.io/splice` is invalid. The pod's connections then stay on TCP.
    pub splice_error: Option<FactsError>,
    /// `sidestep.io/mode` is invalid. The pod is then treated as if it did not have it.
    pub mode_error: Option<FactsError>,
}

/// The pod's name as `namespace/name`, with Kubernetes' default namespace.
pub fn pod_name(pod: &Pod) -> Result<String, FactsError> {
    let name = pod.metadata.name.as_deref().filter(|name| !name.is_empty());
    let namespace = pod.metadata.namespace.as_deref().unwrap_or("default");
    Ok(format!("{namespace}/{}", name.ok_or(FactsError::Missing("metadata.name"))?))
}

/// Annotations that the kubelet writes into the mirror of a static pod: the uid that it uses for
/// the pod itself, in cgroups and in CNI's `K8S_POD_UID`. Source: kubernetes
/// `pkg/kubelet/types/pod_update.go`.
const STATIC_UID: [&str; 2] = ["kubernetes.io/config.mirror", "kubernetes.io/config.hash"];

/// The uid that the node uses for a pod: `metadata.uid`, or for a static pod's mirror the static
/// pod's. May be empty.
pub fn pod_uid(pod: &Pod) -> &str {
    static_uid(pod).or(pod.metadata.uid.as_deref()).unwrap_or_default()
}

/// The uid of the static pod whose mirror this object claims to be.
pub fn static_uid(pod: &Pod) -> Option<&str> {
    STATIC_UID.iter().find_map(|key| annotation(pod, key)).filter(|uid| !uid.is_empty())
}

/// Whether a uid has the form that a kubelet gives to a static pod, the MD5 sum of its manifest:
/// the API server's uids have dashes.
pub fn is_static_uid(uid: &str) -> bool {
    uid.len() == 32 && uid.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// The mesh of a pod that comes with the mesh's own iptables rules: an init container installs
/// them.
pub fn own_iptables(pod: &Pod) -> Option<&'static Mesh> {
    let has = |mesh: &&Mesh| {
        let is_init = |one: &Container| one.name == mesh.init_container;
        let among_others = || mesh.init_anywhere && sidecar(pod, mesh.init_container).is_some();
        init_containers(pod).iter().any(is_init) || among_others()
    };
    MESHES.iter().copied().find(has)
}

/// `sidestep.io/intercept`: `disabled` excludes a pod from Sidestep, `enabled` includes it although
/// its namespace is excluded. A pod's annotation, a namespace's label.
pub const INTERCEPT: &str = "sidestep.io/intercept";

/// `sidestep.io/splice`: `disabled` keeps the pod's connections on TCP, `enabled` is the default.
/// A pod's annotation, a namespace's label.
pub const SPLICE: &str = "sidestep.io/splice";

/// `sidestep.io/services`: `disabled` leaves the pod's calls to Services to kube-proxy, `enabled` is
/// the default. A pod's annotation, a namespace's label.
pub const SERVICES: &str = "sidestep.io/services";

/// The pod, completed by the settings of its namespace that the pod does not set itself. Of a
/// mesh's annotations, only those are inherited that the mesh inherits ([`Mesh::of_namespace`]).
pub fn inherit(mut pod: Arc<Pod>, namespace: &ObjectMeta) -> Arc<Pod> {
    for key in [INTERCEPT, SPLICE, SERVICES, MODE] {
        let value = namespace.labels.as_ref().and_then(|labels| labels.get(key));
        if let Some(value) = value.filter(|_| annotation(&pod, key).is_none()) {
            annotate(&mut pod, key, value);
        }
    }
    for key in MESHES.iter().flat_map(|mesh| mesh.of_namespace) {
        let value = namespace.annotations.as_ref().and_then(|annotations| annotations.get(*key));
        if let Some(value) = value.filter(|_| annotation(&pod, key).is_none_or(str::is_empty)) {
            annotate(&mut pod, key, value);
        }
    }
    // In a namespace of ambient mode, every pod is ambient that does not say "none".
    let mode = namespace.labels.as_ref().and_then(|labels| labels.get(DATAPLANE_MODE));
    if mode.is_some_and(|mode| mode == AMBIENT)
        && !matches!(label(&pod, DATAPLANE_MODE), Some(AMBIENT | "none"))
    {
        let labels = &mut Arc::make_mut(&mut pod).metadata.labels;
        labels.get_or_insert_default().insert(DATAPLANE_MODE.into(), AMBIENT.into());
    }
    pod
}

fn annotate(pod: &mut Arc<Pod>, key: &str, value: &str) {
    let annotations = &mut Arc::make_mut(pod).metadata.annotations;
    annotations.get_or_insert_default().insert(key.into(), value.into());
}

/// The facts of a pod in a mesh; `None` for a pod in no mesh, or excluded from Sidestep. A pod with
/// an init container that installs the mesh's own rules, and with settings that Sidestep does not
/// support, is the mesh's alone.
pub fn facts(pod: &Pod) -> Result<Option<Parsed>, FactsError> {
    let name = pod_name(pod)?;
    if pod.spec.as_ref().is_some_and(|spec| spec.host_network == Some(true)) {
        return Ok(None);
    }
    for mesh in MESHES {
        if let Some(proxy) = (mesh.proxy_of)(pod) {
            return match facts_of(mesh, name, pod, proxy) {
                Err(FactsError::Unsupported { .. }) if own_iptables(pod).is_some() => Ok(None),
                facts => facts,
            };
        }
    }
    if is_ambient(pod) { Err(FactsError::Ambient) } else { Ok(None) }
}

/// Whether the pod must not run before Sidestep has handled it: it is in a mesh, or its mesh
/// settings are invalid, and it does not come with the mesh's own rules.
pub fn is_in_mesh(pod: &Pod) -> bool {
    own_iptables(pod).is_none() && !matches!(facts(pod), Ok(None) | Err(FactsError::Ambient))
}

/// Whether the pod belongs to no mesh: it has no sidecar, no mesh rules of its own, and the node's
/// proxy does not serve it. A pod that is excluded from Sidestep still belongs to its mesh.
pub fn is_no_meshs(pod: &Pod) -> bool {
    let has_proxy = MESHES.iter().any(|mesh| (mesh.proxy_of)(pod).is_some());
    let redirection = annotation(pod, "ambient.istio.io/redirection");
    let is_ambient = label(pod, DATAPLANE_MODE) == Some(AMBIENT) || redirection == Some("enabled");
    !has_proxy && own_iptables(pod).is_none() && !is_ambient
}

/// Whether the pod's annotation allows translating its calls to Services.
///
/// # Errors
/// If the annotation cannot be read: they are not translated then.
pub fn translates_services(pod: &Pod) -> Result<bool, FactsError> {
    annotation(pod, SERVICES).map_or(Ok(true), |text| switch(SERVICES, text))
}

/// Whether Istio should redirect the pod's traffic to the node's proxy, the pod runs, and Istio's
/// CNI agent has not redirected it. Source: istio/istio `cni/pkg/util/podutil.go`.
fn is_ambient(pod: &Pod) -> bool {
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    label(pod, DATAPLANE_MODE) == Some(AMBIENT)
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
    // An invalid value must not open a hole: the mesh's default replaces it, and the policy
    // captures everything.
    let mut read = Reader::default();
    let intercept = annotation(pod, INTERCEPT);
    if !read.or(intercept.map_or(Ok(true), |text| switch(INTERCEPT, text)), true)? {
        return Ok(None);
    }
    let Some(settings) = (mesh.settings)(pod, proxy, &mut read)? else {
        return Ok(None);
    };
    let ips = read.or(pod_ips(pod), Vec::new())?;
    let splice = annotation(pod, SPLICE).map_or(Ok(true), |text| switch(SPLICE, text));
    let asked = mode::asked(pod);
    let facts = PodFacts {
        name,
        uid: pod_uid(pod).to_owned(),
        mesh,
        proxy_uid: settings.proxy_uid,
        proxy_gid: settings.proxy_gid,
        outbound_port: settings.outbound_port,
        inbound_port: settings.inbound_port,
        dns_port: settings.dns_port,
        tcp_dns: settings.tcp_dns,
        ips,
        ipv6: settings.ipv6,
        policy: if read.error.is_some() { Policy::default() } else { settings.policy },
        is_policy_unread: read.error.is_some(),
        splice: *splice.as_ref().unwrap_or(&false) && mesh.reads_until_empty,
        asked: asked.as_ref().ok().copied().flatten(),
        brings_rules: own_iptables(pod).is_some(),
    };
    Ok(Some(Parsed {
        facts,
        policy_error: read.error,
        warnings: read.warnings,
        splice_error: splice.err(),
        mode_error: asked.err(),
    }))
}

/// Whether any mesh reads this variable.
pub(crate) fn reads_env(name: &str) -> bool {
    MESHES.iter().any(|mesh| mesh.env.contains(&name))
}

fn pod_ips(pod: &Pod) -> Result<Vec<IpAddr>, FactsError> {
    let status = pod.status.as_ref();
    let ips = status.and_then(|status| status.pod_ips.as_deref()).unwrap_or_default();
    ips.iter()
        .map(|ip| {
            ip.ip.parse().map_err(|_| invalid("status.podIPs", &ip.ip, "expected an IP address"))
        })
        .collect()
}

#[cfg(test)]
pub(crate) mod tests {
    use ipnet::IpNet;
    use serde_json::{Value, json};

    use std::collections::BTreeSet;

    use super::*;
    use crate::mesh::policy::{PortRange, Ports, Ranges};

    pub(crate) fn pod(patch: impl FnOnce(&mut Value)) -> Pod {
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
        assert_eq!((facts.proxy_uid, facts.proxy_gid), (Some(1337), Some(1337)));
        assert_eq!((facts.mesh.name, facts.dns_port), ("istio", None));
        let by_default =
            Policy { exclude_outbound_ports: [PortRange::one(15020)].into(), ..Policy::default() };
        assert_eq!(facts.policy, by_default);
    }

    #[test]
    fn what_makes_a_pod_no_mesh_pod() {
        assert!(parsed(|p| p["metadata"]["annotations"] = json!({})).is_none());
        assert!(parsed(|p| p["spec"]["containers"][1]["args"][1] = "router".into()).is_none());
        assert!(parsed(|p| p["spec"]["containers"][1]["name"] = "envoy".into()).is_none());
        let inits = json!([{"name": "istio-init"}]);
        let brings = parsed(|p| p["spec"]["initContainers"] = inits.clone()).expect("in the mesh");
        assert!(brings.facts.brings_rules && !parsed(|_| {}).expect("in").facts.brings_rules);
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
    fn f12_the_sidecar_is_known_by_its_name() {
        let args = |args: Value| move |p: &mut Value| p["spec"]["containers"][1]["args"] = args;
        for taken in
            [json!(null), json!([]), json!(["proxy"]), json!(["wait"]), json!(["wait", "router"])]
        {
            assert!(parsed(args(taken.clone())).is_some(), "{taken}");
        }
        for kind in ["router", "waypoint", "ztunnel"] {
            assert!(parsed(args(json!(["proxy", kind]))).is_none(), "{kind}");
        }
        // Whether it is a native sidecar or is said not to restart says nothing, in no mesh.
        let init = |proxy: &'static str, restart: Value| {
            move |p: &mut Value| {
                p["metadata"]["annotations"]["kuma.io/sidecar-injected"] = "true".into();
                p["spec"]["containers"] = json!([{"name": "app"}]);
                p["spec"]["initContainers"] = json!([{"name": proxy, "restartPolicy": restart}]);
            }
        };
        for mesh in MESHES {
            for restart in [json!("Always"), json!(null)] {
                let parsed = parsed(init(mesh.proxy_container, restart)).expect("in the mesh");
                assert_eq!(parsed.facts.mesh, *mesh);
            }
        }
    }

    #[test]
    fn f64_gos_booleans_and_the_last_of_an_environment() {
        let env = |env: Value| move |p: &mut Value| p["spec"]["containers"][1]["env"] = env;
        let one = |name: &str, value: &str| json!({"name": name, "value": value});
        for on in ["1", "t", "T", "true", "TRUE", "True"] {
            assert!(parsed(env(json!([one("DISABLE_ENVOY", on)]))).is_none(), "{on}");
            let dns = parsed(env(json!([one("ISTIO_META_DNS_CAPTURE", on)]))).expect("in");
            assert_eq!(dns.facts.dns_port, Some(15053), "{on}");
        }
        for off in ["0", "f", "F", "false", "FALSE", "False"] {
            assert_eq!(annotated("sidecar.istio.io/inject", off), Ok(None), "{off}");
            assert!(parsed(env(json!([one("DISABLE_ENVOY", off)]))).is_some(), "{off}");
        }
        for unreadable in ["yes", "no", "", "tRUE", " true"] {
            assert!(annotated("sidecar.istio.io/inject", unreadable).expect("facts").is_some());
            assert!(parsed(env(json!([one("DISABLE_ENVOY", unreadable)]))).is_some());
        }
        let twice = |first, last| {
            let dns = |value| one("ISTIO_META_DNS_CAPTURE", value);
            parsed(env(json!([dns(first), dns(last)]))).expect("in").facts.dns_port
        };
        assert_eq!((twice("true", "false"), twice("false", "true")), (None, Some(15053)));
        for name in ["ISTIO_META_DNS_CAPTURE", "ISTIO_DUAL_STACK"] {
            let parsed = parsed(env(json!([one(name, "on")]))).expect("in the mesh");
            assert_eq!((parsed.facts.dns_port, parsed.facts.ipv6), (None, Ipv6::WhereFirst));
            assert_eq!(parsed.policy_error, None, "Istio goes on");
            let warning = parsed.warnings[0].to_string();
            assert!(warning.contains(name) && warning.contains("\"on\""), "{warning}");
        }
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
        assert_eq!((facts.proxy_uid, facts.proxy_gid), (Some(4000), Some(7)));
        assert_eq!(parsed(user(0)).expect("in the mesh").facts.proxy_uid, Some(1337));
        let negative = parsed(user(-1)).expect("in the mesh");
        assert_eq!(negative.facts.proxy_uid, Some(1337));
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
            ("istio.io/reroute-virtual-interfaces", "net1"),
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
        assert_eq!(of(json!({DATAPLANE_MODE: "other"})), Err(FactsError::Ambient), "other");
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
        assert_eq!(
            (facts.mesh.name, facts.proxy_uid, facts.proxy_gid),
            ("linkerd", Some(2102), None)
        );
        assert_eq!((facts.outbound_port, facts.inbound_port, facts.dns_port), (4140, 4143, None));
        assert_eq!((facts.ipv6, facts.policy), (Ipv6::Never, Policy::default()));
        let init = |p: &mut Value| p["spec"]["initContainers"] = json!([{"name": "linkerd-init"}]);
        assert!(linkerd(init).expect("in the mesh").facts.brings_rules);
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
    fn f11_an_id_that_is_not_above_zero_exempts_nobody() {
        let of = |key, text| linkerd(note(key, text)).expect("in");
        for nobody in ["0", "-1", "-0", "+0", "-2102"] {
            let parsed = of("config.linkerd.io/proxy-uid", nobody);
            assert_eq!((parsed.facts.proxy_uid, parsed.policy_error), (None, None), "{nobody}");
            let parsed = of("config.linkerd.io/proxy-gid", nobody);
            assert_eq!((parsed.facts.proxy_gid, parsed.policy_error), (None, None), "{nobody}");
        }
        let gid = of("config.linkerd.io/proxy-gid", "7").facts;
        assert_eq!((gid.proxy_uid, gid.proxy_gid), (Some(2102), Some(7)));
        assert_eq!(of("config.linkerd.io/proxy-uid", "7").facts.proxy_uid, Some(7));
        for bad in ["4294967295", "4294967296", "x", " 7", "1.5", "--1", "+-1"] {
            let parsed = of("config.linkerd.io/proxy-uid", bad);
            assert_eq!(parsed.facts.proxy_uid, Some(2102), "{bad}");
            let error = parsed.policy_error.expect("an error").to_string();
            assert!(error.contains("proxy-uid") && error.contains(bad), "{error}");
        }
    }

    #[test]
    fn f66_linkerd_skips_what_is_no_port_and_the_pod_is_told() {
        let key = "config.linkerd.io/skip-inbound-ports";
        let text = "80, 443,8000-8100,x,9-1,+90,-1,70000,,1-2-3";
        let parsed = linkerd(note(key, text)).expect("in");
        let ports = ranges([(80, 80), (90, 90), (8000, 8100)]);
        assert_eq!((parsed.facts.policy.exclude_inbound_ports, parsed.policy_error), (ports, None));
        let [warning] = &parsed.warnings[..] else { panic!("{:?}", parsed.warnings) };
        let warning = warning.to_string();
        for named in [key, text, "\" 443\"", "\"x\"", "\"9-1\"", "\"-1\"", "\"\"", "\"1-2-3\""] {
            assert!(warning.contains(named), "{named}: {warning}");
        }
        let many = Box::leak(vec!["x"; 100_000].join(",").into_boxed_str());
        let [warning] = &linkerd(note(key, many)).expect("in").warnings[..] else { panic!() };
        assert!(warning.to_string().contains("and 99992 more"), "how many is said, and not each");
        // A subnet that is none is not skipped: Linkerd sets up no such pod.
        let parsed = linkerd(note("config.linkerd.io/skip-subnets", "10.0.0.0/8,x")).expect("in");
        assert!(parsed.policy_error.is_some() && parsed.facts.policy == Policy::default());
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
    fn f60_f62_a_kuma_pod_without_a_configuration() {
        let facts = kuma(|_| {}).expect("in the mesh").facts;
        assert_eq!((facts.mesh.name, facts.proxy_uid, facts.proxy_gid), ("kuma", Some(5678), None));
        assert_eq!((facts.inbound_port, facts.tcp_dns), (15006, TcpDns::Direct));
        let policy = Policy {
            exclude_inbound_ports: ranges([(9001, 9001), (9901, 9901)]),
            exclude_outbound_ports: ranges([(9901, 9901)]),
            ..Policy::default()
        };
        assert_eq!((facts.ipv6, facts.policy), (Ipv6::Always, policy), "F60");
        assert_eq!(facts.dns_port, None, "F62");
        assert!(kuma(note("kuma.io/sidecar-injected", "false")).is_none());
        let facts = kuma(note("kuma.io/sidecar-uid", "7")).expect("in").facts;
        assert_eq!(facts.proxy_uid, Some(7));
        let facts = kuma(note("kuma.io/builtin-dns", "ENABLED")).expect("in").facts;
        assert_eq!(facts.dns_port, Some(15053));
        let key = "kuma.io/transparent-proxying-ip-family-mode";
        assert_eq!(kuma(note(key, "IPv4")).expect("in").facts.ipv6, Ipv6::Never);
        let gateway = kuma(note("kuma.io/gateway", "enabled")).expect("in").facts;
        assert_eq!(gateway.policy.include_inbound_ports, Ports::Only([].into()));
        let map =
            kuma(note("traffic.kuma.io/transparent-proxy-configmap-name", "mine")).expect("in");
        assert!(map.policy_error.is_none() && map.warnings[0].to_string().contains("\"mine\""));
    }

    #[test]
    fn f60_the_probe_proxys_port_is_exempt() {
        let of = |text| {
            let parsed = kuma(note("kuma.io/application-probe-proxy-port", text)).expect("in");
            (parsed.facts.policy.exclude_inbound_ports, parsed.policy_error.is_some())
        };
        assert_eq!(of("9123"), (ranges([(9123, 9123), (9901, 9901)]), false));
        assert_eq!(of("0"), (ranges([(9901, 9901)]), false));
        assert_eq!(of("x"), (BTreeSet::new(), true));
        let both = kuma(|p| {
            p["metadata"]["annotations"]["traffic.kuma.io/exclude-inbound-ports"] = "7070".into();
            p["metadata"]["annotations"]["traffic.kuma.io/exclude-outbound-ports"] = "".into();
        });
        let policy = both.expect("in").facts.policy;
        assert_eq!(policy.exclude_inbound_ports, ranges([(7070, 7070), (9001, 9001)]));
        assert_eq!(policy.exclude_outbound_ports, BTreeSet::new());
    }

    /// A pod with this `transparent-proxy-config`.
    fn configured(text: &str) -> Parsed {
        let text = text.to_owned();
        let key = "traffic.kuma.io/transparent-proxy-config";
        kuma(|p| p["metadata"]["annotations"][key] = text.into()).expect("in the mesh")
    }

    #[test]
    fn f63_kumas_configuration_is_the_whole_of_it() {
        let injected = configured(
            "cniMode: true\nipFamilyMode: dualstack\nkumaDPUser: \"7777\"\nredirect:\n  dns: \
             {captureAll: true, enabled: true, port: 15053, resolvConfigPath: /etc/resolv.conf, \
             skipConntrackZoneSplit: false}\n  inbound: {enabled: true, excludePorts: [9001], port: \
             15106}\n  outbound: {enabled: true, port: 15101}\nretry: {maxRetries: 4, \
             sleepBetweenRetries: 2s}\nwait: 5\nwaitInterval: 0\n",
        );
        assert_eq!((injected.policy_error, injected.warnings), (None, Vec::new()));
        let facts = injected.facts;
        assert_eq!((facts.proxy_uid, facts.dns_port), (Some(7777), Some(15053)));
        assert_eq!((facts.outbound_port, facts.inbound_port), (15101, 15106));
        let only = Policy { exclude_inbound_ports: ranges([(9001, 9001)]), ..Policy::default() };
        assert_eq!((facts.policy, facts.tcp_dns), (only, TcpDns::Direct));

        let of = |text| configured(text).facts.policy;
        let off = of("redirect: {inbound: {enabled: false}, outbound: {enabled: false}}");
        assert_eq!(off.include_inbound_ports, Ports::Only([].into()));
        assert_eq!(off.exclude_outbound_ports, [PortRange::ALL].into());
        let inn = of("redirect: {inbound: {includePorts: [80], excludePorts: [80]}}");
        assert_eq!(inn.include_inbound_ports, Ports::Only(ranges([(80, 80)])));
        let out = of("redirect: {outbound: {includePorts: \"80,443\", excludePorts: 80}}");
        assert_eq!(out.include_outbound_ports, ranges([(80, 80), (443, 443)]));
        assert_eq!(out.include_outbound_ranges, Ranges::Only([].into()));
        assert!(out.exclude_outbound_ports.is_empty());
        let ips =
            of("redirect: {outbound: {excludePortsForIPs: [\"10.0.0.0/8, fd00::/8\", 192.0.2.1]}}");
        assert_eq!(ips.exclude_outbound_ranges.len(), 3);
        let insert = configured("redirect: {outbound: {insertRedirectInsteadOfAppend: true}}");
        assert_eq!(insert.facts.tcp_dns, TcpDns::AsAnyPort);
        for text in ["{}", "null", " ", "# nothing", "{unknown: {field: 1}}", "{redirect: null}"] {
            let parsed = configured(text);
            assert_eq!(
                (parsed.facts.policy, parsed.policy_error),
                (Policy::default(), None),
                "{text}"
            );
            assert_eq!((parsed.facts.proxy_uid, parsed.facts.dns_port), (Some(5678), None));
        }
        // The pod's other annotations are in it already, and do not count.
        let both = kuma(|p| {
            for (key, text) in [
                ("traffic.kuma.io/transparent-proxy-config", "{}"),
                ("traffic.kuma.io/exclude-outbound-ports", "80"),
                ("kuma.io/sidecar-uid", "7"),
                ("kuma.io/builtin-dns", "enabled"),
                ("kuma.io/gateway", "enabled"),
            ] {
                p["metadata"]["annotations"][key] = text.into();
            }
        });
        assert_eq!(both, Some(configured("{}")));
    }

    #[test]
    fn f63_what_kuma_would_refuse_captures_everything() {
        for (text, named) in [
            ("ipFamilyMode: ipv6", "ipFamilyMode: \"ipv6\""),
            ("redirect: {inbound: {port: 0}}", "redirect.inbound.port: \"0\""),
            ("redirect: {outbound: {port: \"15001\"}}", "redirect.outbound.port: \"15001\""),
            ("redirect: {dns: {enabled: true, port: 0}}", "redirect.dns.port: \"0\""),
            ("redirect: {inbound: {excludePorts: [a]}}", "redirect.inbound.excludePorts: \"a\""),
            ("redirect: {inbound: {excludePorts: [80-90]}}", "\"80-90\""),
            ("redirect: {inbound: {excludePorts: {a: 1}}}", "redirect.inbound.excludePorts"),
            ("redirect: {outbound: {excludePortsForIPs: [\"\"]}}", "outbound.excludePortsForIPs"),
            ("redirect: {outbound: {excludePortsForUIDs: [\"70000\"]}}", "\"70000\""),
            ("redirect: {outbound: {excludePorts: [80]}, inbound: {includePorts: x}}", "\"x\""),
            ("kumaDPUser: kuma-dp", "kumaDPUser: \"kuma-dp\""),
            ("not: [yaml", "traffic.kuma.io/transparent-proxy-config"),
            ("text", "traffic.kuma.io/transparent-proxy-config"),
            ("redirect: {inbound: {enabled: maybe}}", "traffic.kuma.io/transparent-proxy-config"),
        ] {
            let parsed = configured(text);
            assert_eq!(parsed.facts.policy, Policy::default(), "{text}");
            let error = parsed.policy_error.expect(text).to_string();
            assert!(error.contains(named), "{text}: {error}");
        }
        assert_eq!(configured("[").facts.dns_port, Some(15053), "DNS as well");
        assert_eq!(configured("redirect: {dns: {port: 0}}").policy_error, None, "it is off");
    }

    #[test]
    fn f63_a_configuration_of_aliases_of_aliases_is_refused() {
        let mut text = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
        for n in 1..12 {
            let all = vec![format!("*a{}", n - 1); 10].join(", ");
            text += &format!("a{n}: &a{n} [{all}]\n");
        }
        assert!(configured(&text).policy_error.is_some(), "10^12 items");
    }

    #[test]
    fn f63_what_we_cannot_do_or_see_is_said() {
        let key = "traffic.kuma.io/transparent-proxy-config";
        let vnet = "redirect: {vnet: {networks: [\"docker0:172.17.0.0/16\"]}}";
        let pod = pod(|p| {
            p["metadata"]["annotations"] = json!({"kuma.io/sidecar-injected": "true", key: vnet});
            p["spec"]["containers"] = json!([{ "name": "kuma-sidecar" }]);
        });
        let error = facts(&pod).expect_err("refused").to_string();
        assert!(error.contains("redirect.vnet.networks") && error.contains("docker0"), "{error}");
        let uids = configured("redirect: {inbound: {excludePortsForUIDs: [\"1000\"]}}");
        assert_eq!(uids.facts.policy.include_inbound_ports, Ports::Only([].into()));
        assert!(uids.warnings[0].to_string().contains("\"1000\""));
        let some = configured("redirect: {dns: {enabled: true}}");
        assert_eq!(some.facts.dns_port, Some(15053));
        assert!(some.warnings[0].to_string().contains("captureAll"));
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
            "config.linkerd.io/proxy-gid": "8",
            "traffic.sidecar.istio.io/excludeOutboundPorts": "1",
        }}));
        let inherited = inherit(Arc::clone(&pod), &of);
        let own = facts(&inherited).expect("facts").expect("in a mesh").facts;
        assert_eq!((own.proxy_uid, own.proxy_gid), (Some(7), Some(8)), "F66");
        let policy = own.policy;
        assert_eq!(policy.exclude_outbound_ports, [PortRange::one(25)].into(), "the pod's own");
        assert!(policy.exclude_inbound_ports.contains(&PortRange::one(9000)), "the namespace's");
        let keys = inherited.metadata.annotations.as_ref().expect("annotations");
        assert_eq!(keys.len(), 4, "nothing else is taken: {keys:?}");
        let mut empty = Pod::clone(&pod);
        let annotations = empty.metadata.annotations.as_mut().expect("annotations");
        annotations.insert("config.linkerd.io/skip-outbound-ports".into(), String::new());
        let policy =
            facts(&inherit(Arc::new(empty), &of)).expect("facts").expect("in").facts.policy;
        assert_eq!(policy.exclude_outbound_ports, [PortRange::one(3306)].into(), "F66: empty");
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
