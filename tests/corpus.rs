//! What the meshes make of pods, and what we make of them: tests/corpus has a pod a line.
//!
//! Istio's verdicts are its own code's: `make corpus` asks it. Linkerd's and Kuma's were read from
//! their sources, which src/mesh names. Takes no kernel.

use std::{collections::BTreeSet, sync::Arc};

use ipnet::IpNet;
use k8s_openapi::{api::core::v1::Pod, apimachinery::pkg::apis::meta::v1::ObjectMeta};
use serde_json::{Map, Value, json};
use sidestep::mesh::{
    annotations::FactsError,
    facts::{PodFacts, facts, inherit},
    policy::{Ipv6, Policy, PortRange, Ports, Protocol, Ranges},
};

/// The lines of a file.
fn lines(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).expect(line)).collect()
}

/// A verdict in words: `out`, `refused` (the mesh's plugin fails, and here everything is captured),
/// `unsupported`, or the settings of a pod that is `taken`.
#[derive(Debug, PartialEq)]
struct Verdict {
    word: &'static str,
    settings: Map<String, Value>,
    told: Vec<String>,
}

impl Verdict {
    fn word(word: &'static str) -> Self {
        Self { word, settings: Map::new(), told: Vec::new() }
    }
}

fn ours(pod: &Pod) -> Verdict {
    match facts(pod) {
        Ok(None) => Verdict::word("out"),
        // The mesh's plugin leaves such a pod to the init container.
        Ok(Some(parsed)) if parsed.facts.brings_rules => Verdict::word("out"),
        Err(FactsError::Unsupported { .. }) => Verdict::word("unsupported"),
        Err(error) => panic!("{error}"),
        Ok(Some(parsed)) => {
            if let Some(error) = parsed.policy_error {
                assert_eq!(parsed.facts.policy, Policy::default(), "all its traffic is captured");
                assert!(matches!(error, FactsError::Invalid { .. }), "{error}");
                return Verdict::word("refused");
            }
            let told = parsed.warnings.iter().map(ToString::to_string).collect();
            Verdict { word: "taken", settings: settings(&parsed.facts), told }
        }
    }
}

fn settings(facts: &PodFacts) -> Map<String, Value> {
    let policy = &facts.policy;
    let users = policy.exclude_outbound_for_uids.iter().map(|one| {
        let protocol = match one.protocol {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
            Protocol::Both => "both",
        };
        let all = one.ports == [PortRange::ALL].into();
        let ports = if all { "*".into() } else { ports(&one.ports) };
        format!("{protocol}:{ports}:{}", range(one.first_uid, one.last_uid))
    });
    // The mesh's own are no pod's setting, named or not.
    let mut in_exclude = policy.exclude_inbound_ports.clone();
    in_exclude.retain(|port| {
        port.first != port.last || !facts.mesh.inbound_excluded.contains(&port.first)
    });
    let value = json!({
        "uid": facts.proxy_uid,
        "gid": facts.proxy_gid,
        "outbound_port": facts.outbound_port,
        "inbound_port": facts.inbound_port,
        "dns_port": facts.dns_port,
        "tcp_dns": format!("{:?}", facts.tcp_dns),
        "ipv6": format!("{:?}", facts.ipv6),
        "in": match &policy.include_inbound_ports {
            Ports::All => "*".into(),
            Ports::Only(only) => ports(only),
        },
        "in_exclude": ports(&in_exclude),
        "in_exclude_ips": ranges(&policy.exclude_inbound_ranges),
        "out_ports": ports(&policy.include_outbound_ports),
        "out_ips": match &policy.include_outbound_ranges {
            Ranges::All => "*".into(),
            Ranges::Only(only) => ranges(only),
        },
        "out_exclude": ports(&policy.exclude_outbound_ports),
        "out_exclude_ips": ranges(&policy.exclude_outbound_ranges),
        "users": users.collect::<Vec<_>>(),
        "interfaces": policy.exclude_interfaces,
    });
    let Value::Object(settings) = value else { unreachable!() };
    settings
}

fn range(first: impl ToString + PartialEq, last: impl ToString + PartialEq) -> String {
    let (first, last) = (first.to_string(), last.to_string());
    if first == last { first } else { format!("{first}-{last}") }
}

fn ports(ports: &BTreeSet<PortRange>) -> String {
    let all = ports.iter().map(|port| range(port.first, port.last));
    all.collect::<Vec<_>>().join(",")
}

fn ranges(ranges: &BTreeSet<IpNet>) -> String {
    ranges.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
}

/// Istio's plugin's fields, in the same words.
fn of_istio(redirect: &Value) -> Verdict {
    let text = |name: &str| redirect[name].as_str().expect(name);
    if text("redirectMode") == "TPROXY" || !text("rerouteVirtualInterfaces").is_empty() {
        return Verdict::word("unsupported");
    }
    let number = |name: &str| text(name).parse::<u32>().expect(name);
    let items = |name| text(name).split(',').map(str::trim).filter(|item| !item.is_empty());
    let port_set = |name| -> BTreeSet<PortRange> {
        items(name).map(|item| PortRange::one(item.parse().expect(item))).collect()
    };
    let range_set = |name| ranges(&items(name).map(|item| item.parse().expect(item)).collect());
    // Those that the plugin adds to every pod's are the mesh's own here.
    let mut in_exclude = port_set("excludeInboundPorts");
    in_exclude.retain(|port| ![15020, 15021, 15090].contains(&port.first));
    let all_or = |name, some: &dyn Fn() -> String| match text(name) {
        "*" => "*".to_owned(),
        _ => some(),
    };
    let on = |name: &str| redirect[name].as_bool().expect(name);
    let value = json!({
        "uid": number("noRedirectUID"),
        "gid": number("noRedirectGID"),
        "outbound_port": text("targetPort").parse::<u16>().expect("a port"),
        "inbound_port": 15006,
        "dns_port": on("dnsRedirect").then_some(15053),
        "tcp_dns": "Captured",
        "ipv6": format!("{:?}", if on("dualStack") { Ipv6::Always } else { Ipv6::WhereFirst }),
        "in": all_or("includeInboundPorts", &|| ports(&port_set("includeInboundPorts"))),
        "in_exclude": ports(&in_exclude),
        "in_exclude_ips": "",
        "out_ports": ports(&port_set("includeOutboundPorts")),
        "out_ips": all_or("includeIPCidrs", &|| range_set("includeIPCidrs")),
        "out_exclude": ports(&port_set("excludeOutboundPorts")),
        "out_exclude_ips": range_set("excludeIPCidrs"),
        "users": [],
        "interfaces": items("excludeInterfaces").collect::<BTreeSet<_>>(),
    });
    let Value::Object(settings) = value else { unreachable!() };
    Verdict { word: "taken", settings, told: Vec::new() }
}

/// Where we differ from Istio's plugin on purpose: the pod, what we say instead, and why.
const NOT_AS_ISTIO: &[(&str, &str, &str)] = &[
    ("interceptionMode \"NONE\"", "out", "the plugin fails, though Istio documents it"),
    ("status port \"15030\"", "taken", "the injector puts it into excludeInboundPorts"),
    ("status port \"15030,15031\"", "taken", "the same"),
    ("kubevirtInterfaces=\"a/b\"", "unsupported", "refused by name, whatever it says"),
    ("reroute \"a b\"", "unsupported", "the same"),
];

#[test]
fn istio_as_its_own_code_has_it() {
    let pods = lines(include_str!("corpus/istio.pods.jsonl"));
    let verdicts = lines(include_str!("corpus/istio.verdicts.jsonl"));
    let (version, verdicts) = verdicts.split_first().expect("a version");
    assert!(version["istio"].is_string(), "{version}");
    assert_eq!(pods.len(), verdicts.len(), "`make corpus` asks Istio anew");
    assert!(pods.len() >= 150);
    let mut wrong = Vec::new();
    let mut differ = 0;
    for (asked, verdict) in pods.into_iter().zip(verdicts) {
        let name = asked["name"].as_str().expect("a name").to_owned();
        assert_eq!(asked["name"], verdict["name"], "`make corpus` asks Istio anew");
        let theirs = match verdict["verdict"].as_str() {
            Some("out") => Verdict::word("out"),
            Some("refused") => Verdict::word("refused"),
            _ => of_istio(&verdict["redirect"]),
        };
        let mut ours = ours(&serde_json::from_value(asked["pod"].clone()).expect("a pod"));
        if let Some((_, word, _)) = NOT_AS_ISTIO.iter().find(|(pod, ..)| *pod == name) {
            differ += 1;
            if ours.word != *word || ours == theirs {
                wrong.push(format!("{name}: not the difference that was meant: {ours:?}"));
            }
            continue;
        }
        // What Istio does not care for it logs; that we tell the pod is src/mesh/facts.rs'.
        ours.told.clear();
        if ours != theirs {
            wrong.push(format!("{name}:\n  Istio {theirs:?}\n  ours  {ours:?}"));
        }
    }
    assert!(wrong.is_empty(), "{} differ:\n{}", wrong.len(), wrong.join("\n"));
    assert_eq!(differ, NOT_AS_ISTIO.len(), "a difference that is none any more");
}

/// A line's pod in its namespace: what it does not say is as usual.
fn pod_of(line: &Value, proxy: &str) -> Arc<Pod> {
    let texts = |names: &Value| -> Vec<String> {
        let names = names.as_array().into_iter().flatten();
        names.map(|name| name.as_str().expect("a name").to_owned()).collect()
    };
    let container = |name: String| match name == proxy {
        true => {
            let env = line["env"].as_object().into_iter().flatten();
            let env: Vec<Value> =
                env.map(|(name, value)| json!({"name": name, "value": value})).collect();
            json!({"name": name, "env": env, "securityContext": line["sc"]})
        }
        false => json!({"name": name}),
    };
    let mut containers = texts(&line["containers"]);
    if line["containers"].is_null() {
        containers = vec!["app".into(), proxy.into()];
    }
    let pod = json!({
        "metadata": {"name": "pod", "annotations": line["annotations"], "labels": line["labels"]},
        "spec": {
            "containers": containers.into_iter().map(container).collect::<Vec<_>>(),
            "initContainers": texts(&line["init"]).into_iter().map(container).collect::<Vec<_>>(),
        },
    });
    let namespace = json!({"annotations": line["namespace"]});
    let namespace: ObjectMeta = serde_json::from_value(namespace).expect("metadata");
    inherit(Arc::new(serde_json::from_value(pod).expect("a pod")), &namespace)
}

/// Each line against what we make of it; `usual` are the settings that it does not name.
fn check(text: &str, proxy: &str, usual: &Value) {
    let lines = lines(text);
    assert!(lines.len() >= 150);
    let mut wrong = Vec::new();
    for line in lines {
        let ours = ours(&pod_of(&line, proxy));
        let mut word = line["verdict"].as_str().expect("a verdict");
        let mut expected = usual.as_object().expect("settings").clone();
        let named = line.as_object().expect("a line").iter();
        expected.extend(
            named
                .filter(|(key, _)| usual.get(key.as_str()).is_some())
                .map(|(k, v)| (k.clone(), v.clone())),
        );
        // What differs on purpose says why.
        match &line["ours"] {
            Value::String(on_purpose) => word = on_purpose,
            Value::Object(on_purpose) => expected.extend(on_purpose.clone()),
            _ => {}
        }
        assert_eq!(line["ours"].is_null(), line["why"].is_null(), "{line}");
        let told: Vec<&str> =
            line["told"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        let is_told = match told.is_empty() {
            true => ours.told.is_empty(),
            false => told.iter().all(|told| ours.told.iter().any(|warning| warning.contains(told))),
        };
        if ours.word != word || (word == "taken" && (ours.settings != expected || !is_told)) {
            let differ = |(key, value): &(&String, &Value)| ours.settings.get(*key) != Some(value);
            let differ: Vec<_> = expected.iter().filter(differ).collect();
            wrong.push(format!("{line}:\n  ours {} {:?}\n  not {differ:?}", ours.word, ours.told));
        }
    }
    assert!(wrong.is_empty(), "{} differ:\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn linkerd_as_its_plugin_reads_pods() {
    let usual = json!({
        "uid": 2102, "gid": null, "outbound_port": 4140, "inbound_port": 4143, "dns_port": null,
        "tcp_dns": "Captured", "ipv6": "Never", "in": "*", "in_exclude": "", "in_exclude_ips": "",
        "out_ports": "", "out_ips": "*", "out_exclude": "", "out_exclude_ips": "", "users": [],
        "interfaces": [],
    });
    check(include_str!("corpus/linkerd.jsonl"), "linkerd-proxy", &usual);
}

#[test]
fn kuma_as_its_plugin_reads_pods() {
    let usual = json!({
        "uid": 5678, "gid": null, "outbound_port": 15001, "inbound_port": 15006, "dns_port": null,
        "tcp_dns": "Direct", "ipv6": "Always", "in": "*", "in_exclude": "9001,9901",
        "in_exclude_ips": "", "out_ports": "", "out_ips": "*", "out_exclude": "9901",
        "out_exclude_ips": "", "users": [], "interfaces": [],
    });
    check(include_str!("corpus/kuma.jsonl"), "kuma-sidecar", &usual);
}
