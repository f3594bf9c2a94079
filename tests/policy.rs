//! The policy's verdicts and their reasons: the program of bpf/policy.bpf.c decides, for pods as
//! the meshes' injectors leave them. No namespace, no traffic: what a verdict does is for others.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use k8s_openapi::api::core::v1::Pod;
use serde_json::{Value, json};
use sidestep::{
    dataplane::{Call, Policy, Question},
    mesh::{
        desired::{Candidate, Desired, desired},
        facts::facts,
        quota::Limits,
    },
    node::{NetnsCookie, NetnsFacts},
};

/// Cookie of the pod's namespace.
const COOKIE: NetnsCookie = NetnsCookie(7);
const APP: u32 = 1000;
/// The users and groups of the meshes' sidecars.
const ISTIO: u32 = 1337;
const KUMA: u32 = 5678;
const LINKERD: u32 = 2102;
/// The pod's devices, by index.
const ETH0: u32 = 2;
const NET1: u32 = 3;

fn ip(text: &str) -> IpAddr {
    text.parse().expect("an IP address")
}

fn manifest(container: Value, annotations: &[(&str, &str)]) -> Value {
    let annotations: BTreeMap<_, _> = annotations.iter().copied().collect();
    json!({
        "metadata": {"name": "pod", "namespace": "test", "uid": "u", "annotations": annotations},
        "spec": {"containers": [{"name": "app"}, container]},
        "status": {"podIPs": [{"ip": "10.0.0.7"}, {"ip": "fd00::7"}]},
    })
}

/// Captures DNS and, unless it says otherwise, both families.
fn istio(annotations: &[(&str, &str)]) -> Value {
    let env = ["ISTIO_META_DNS_CAPTURE", "ISTIO_DUAL_STACK"];
    let env = env.map(|name| json!({"name": name, "value": "true"}));
    let proxy = json!({"name": "istio-proxy", "args": ["proxy", "sidecar"], "env": env});
    manifest(proxy, &[&[("sidecar.istio.io/status", "{}")][..], annotations].concat())
}

fn single_stack() -> Value {
    let mut pod = istio(&[]);
    pod["spec"]["containers"][1]["env"][1]["value"] = "false".into();
    pod
}

fn kuma(annotations: &[(&str, &str)]) -> Value {
    let injected = [("kuma.io/sidecar-injected", "true")];
    let dns = [("kuma.io/builtin-dns", "enabled"), ("kuma.io/builtin-dns-port", "15053")];
    manifest(json!({"name": "kuma-sidecar"}), &[&injected[..], &dns[..], annotations].concat())
}

fn linkerd(annotations: &[(&str, &str)]) -> Value {
    let listens = "127.0.0.1:4140,[::1]:4140";
    let env = json!([{"name": "LINKERD2_PROXY_OUTBOUND_LISTEN_ADDRS", "value": listens}]);
    manifest(json!({"name": "linkerd-proxy", "env": env}), annotations)
}

/// The namespace: a device to everywhere, and one to 10.9.0.0/16.
fn netns(addresses: &[&str]) -> NetnsFacts {
    NetnsFacts {
        path: "/run/netns/pod".into(),
        cookie: COOKIE,
        addresses: addresses.iter().map(|address| (ip(address), ETH0)).collect(),
        more_addresses: false,
        interfaces: BTreeMap::from([("eth0".into(), ETH0), ("net1".into(), NET1)]),
        routes: vec![
            ("0.0.0.0/0".parse().expect("a range"), ETH0),
            ("10.9.0.0/16".parse().expect("a range"), NET1),
        ],
        route_localnet: false,
        own_nat: false,
        rules: Ok(Vec::new()),
        forwarded: 0,
    }
}

fn enrolled(pod: Value, netns: NetnsFacts) -> Desired {
    let pod: Pod = serde_json::from_value(pod).expect("a pod");
    let parsed = facts(&pod).expect("readable").expect("in a mesh");
    assert!(parsed.policy_error.is_none(), "{:?}", parsed.policy_error);
    let limits = Limits {
        pods: 10,
        locals: 100,
        port_rules: 1000,
        cidr_rules: 1000,
        uid_rules: 1000,
        excluded_ifs: 10,
        tells_interface: true,
    };
    let candidate = Candidate { facts: parsed.facts.into(), netns: netns.into(), beside: None };
    let desired = desired(&[candidate], &BTreeSet::new(), &BTreeMap::new(), &limits);
    assert!(desired.refused.is_empty() && desired.closed.is_empty(), "{desired:?}");
    desired
}

/// A call of an app, by a socket that is not bound.
fn connect(to: &str, port: u16) -> Question {
    let destination = ip(to);
    Question {
        cookie: COOKIE,
        call: Call::Connect,
        source: ip(if destination.is_ipv4() { "0.0.0.0" } else { "::" }),
        destination,
        port,
        uid: APP,
        gid: APP,
        device: 0,
    }
}

fn send(to: &str, port: u16) -> Question {
    Question { call: Call::Send, ..connect(to, port) }
}

/// A connection from another pod to this one's address.
fn arrive(port: u16) -> Question {
    Question { call: Call::Arrive, source: ip("10.0.0.9"), ..connect("10.0.0.7", port) }
}

trait By {
    fn by(self, uid: u32) -> Question;
    fn bound(self, source: &str) -> Question;
    fn device(self, device: u32) -> Question;
}

impl By for Question {
    /// Of this user, whose group has the same number.
    fn by(self, uid: u32) -> Question {
        Question { uid, gid: uid, ..self }
    }

    fn bound(self, source: &str) -> Question {
        Question { source: ip(source), ..self }
    }

    fn device(self, device: u32) -> Question {
        Question { device, ..self }
    }
}

fn check(desired: &Desired, question: &Question, verdict: &str, reason: &str) {
    let policy = Policy::of(desired).expect("the kernel takes the program");
    let decision = policy.ask(question).expect("an answer");
    assert_eq!((decision.verdict.as_str(), decision.reason.as_str()), (verdict, reason));
}

/// `name: pod, question => verdict, reason;` is a test.
macro_rules! cases {
    ($($name:ident: $pod:expr, $question:expr => $verdict:literal, $reason:literal;)*) => {
        $(
            #[test]
            fn $name() {
                let desired = enrolled($pod, netns(&["10.0.0.7", "fd00::7"]));
                check(&desired, &$question, $verdict, $reason);
            }
        )*
    };
}

const OUT_PORTS: &str = "traffic.sidecar.istio.io/excludeOutboundPorts";
const OUT_RANGES: &str = "traffic.sidecar.istio.io/excludeOutboundIPRanges";
const ONLY_RANGES: &str = "traffic.sidecar.istio.io/includeOutboundIPRanges";
const ONLY_PORTS: &str = "traffic.sidecar.istio.io/includeOutboundPorts";
const INTERFACES: &str = "traffic.sidecar.istio.io/excludeInterfaces";
const IN_PORTS: &str = "traffic.sidecar.istio.io/excludeInboundPorts";
const ONLY_IN_PORTS: &str = "traffic.sidecar.istio.io/includeInboundPorts";
const KUMA_OUT_PORTS: &str = "traffic.kuma.io/exclude-outbound-ports";
const KUMA_OUT_RANGES: &str = "traffic.kuma.io/exclude-outbound-ips";
const KUMA_IN_RANGES: &str = "traffic.kuma.io/exclude-inbound-ips";
const KUMA_USERS: &str = "traffic.kuma.io/exclude-outbound-ports-for-uids";

cases! {
    // Whose it is.
    a_namespace_of_no_pod: istio(&[]), Question { cookie: NetnsCookie(8), ..connect("10.96.0.10", 80) }
        => "direct", "not_enrolled";
    a_family_that_is_not_captured: single_stack(), connect("fd96::10", 80)
        => "direct", "other_family";
    multicast: istio(&[]), connect("224.0.0.1", 80) => "direct", "multicast";
    broadcast: istio(&[]), connect("255.255.255.255", 80) => "direct", "multicast";
    multicast_v6: istio(&[]), connect("ff02::1", 80) => "direct", "multicast";
    // The app.
    t1_off_the_pod: istio(&[]), connect("10.96.0.10", 80) => "outbound", "all_included";
    t1_off_the_pod_v6: istio(&[]), connect("fd96::10", 80) => "outbound", "all_included";
    root_is_an_app: istio(&[]), connect("10.96.0.10", 80).by(0) => "outbound", "all_included";
    the_app_within_the_pod: istio(&[]), connect("10.0.0.7", 80) => "direct", "within_pod";
    the_app_to_localhost: istio(&[]), connect("127.0.0.1", 80) => "direct", "within_pod";
    by_the_loopback_device: istio(&[]), connect("10.96.0.10", 80).device(1)
        => "direct", "within_pod";
    from_localhost: istio(&[]), connect("10.96.0.10", 80).bound("127.0.0.1")
        => "direct", "from_loopback";
    // The sidecar.
    t8_the_proxy_off_the_pod: istio(&[]), connect("10.96.0.10", 80).by(ISTIO)
        => "direct", "from_proxy";
    t9_its_group: istio(&[]), Question { uid: APP, ..connect("10.96.0.10", 80).by(ISTIO) }
        => "direct", "from_proxy";
    t4_the_proxy_to_its_own_pod: istio(&[]), connect("10.0.0.7", 80).by(ISTIO)
        => "inbound", "proxy_to_pod";
    t7_the_proxy_to_localhost: istio(&[]), connect("127.0.0.1", 80).by(ISTIO)
        => "direct", "proxy_to_pod";
    t13_the_proxys_hbone: istio(&[]), connect("10.0.0.7", 15008).by(ISTIO)
        => "direct", "proxy_to_pod";
    the_proxy_to_its_app: istio(&[]), connect("10.0.0.7", 80).by(ISTIO).bound("127.0.0.6")
        => "direct", "from_passthrough";
    linkerds_proxy_to_its_own_pod: linkerd(&[]), connect("10.0.0.7", 80).by(LINKERD)
        => "direct", "proxy_to_pod";
    linkerds_group_alone: linkerd(&[]), Question { uid: APP, ..connect("10.96.0.10", 80).by(LINKERD) }
        => "outbound", "all_included";
    kumas_group_alone: kuma(&[]), Question { uid: APP, ..connect("10.96.0.10", 80).by(KUMA) }
        => "outbound", "all_included";
    // Lists.
    an_excluded_port: istio(&[(OUT_PORTS, "5432")]), connect("10.96.0.10", 5432)
        => "direct", "excluded_port";
    the_port_beside_it: istio(&[(OUT_PORTS, "5432")]), connect("10.96.0.10", 5433)
        => "outbound", "all_included";
    an_excluded_range: istio(&[(OUT_RANGES, "10.96.0.0/16")]), connect("10.96.0.10", 80)
        => "direct", "excluded_range";
    all_of_ipv6_is_not_ipv4: istio(&[(OUT_RANGES, "::/0")]), connect("10.96.0.10", 80)
        => "outbound", "all_included";
    a_range_that_is_included: istio(&[(ONLY_RANGES, "10.96.0.0/16")]), connect("10.96.0.10", 80)
        => "outbound", "included_range";
    a_range_that_is_not: istio(&[(ONLY_RANGES, "10.96.0.0/16")]), connect("10.97.0.10", 80)
        => "direct", "not_included";
    a_port_that_is_included: istio(&[(ONLY_RANGES, "10.96.0.0/16"), (ONLY_PORTS, "80")]),
        connect("10.97.0.10", 80) => "outbound", "included_port";
    loopback_that_is_included: istio(&[(ONLY_RANGES, "127.0.0.0/8")]), connect("127.0.0.2", 80)
        => "outbound", "included_range";
    localhost_never_is: istio(&[(ONLY_RANGES, "127.0.0.0/8")]), connect("127.0.0.1", 80)
        => "direct", "to_localhost";
    an_excluded_interface: istio(&[(INTERFACES, "net1")]), connect("10.96.0.10", 80).device(NET1)
        => "direct", "excluded_interface";
    by_the_route: istio(&[(INTERFACES, "net1")]), connect("10.9.0.1", 80)
        => "direct", "excluded_interface";
    another_route: istio(&[(INTERFACES, "net1")]), connect("10.96.0.10", 80)
        => "outbound", "all_included";
    kumas_user_port: kuma(&[(KUMA_USERS, "tcp:80:1000")]), connect("10.96.0.10", 80)
        => "direct", "excluded_user_port";
    kumas_other_user: kuma(&[(KUMA_USERS, "tcp:80:1000")]), connect("10.96.0.10", 80).by(1001)
        => "outbound", "all_included";
    kumas_user_port_of_udp: kuma(&[(KUMA_USERS, "udp:80:1000")]), connect("10.96.0.10", 80)
        => "outbound", "all_included";
    kumas_range_beats_its_own_pod: kuma(&[(KUMA_OUT_RANGES, "10.0.0.0/8")]),
        connect("10.0.0.7", 80).by(KUMA) => "direct", "excluded_range";
    istios_range_does_not: istio(&[(OUT_RANGES, "10.0.0.0/8")]), connect("10.0.0.7", 80).by(ISTIO)
        => "inbound", "proxy_to_pod";
    // DNS.
    t11_a_question: istio(&[]), send("10.96.0.10", 53) => "dns", "dns";
    t11_a_question_over_tcp: istio(&[]), connect("10.96.0.10", 53) => "dns", "dns";
    a_question_to_localhost: istio(&[]), connect("127.0.0.53", 53) => "dns", "dns";
    kuma_leaves_dns_over_tcp: kuma(&[]), connect("10.96.0.10", 53) => "direct", "dns_over_tcp";
    other_datagrams: istio(&[]), send("10.96.0.10", 54) => "direct", "not_dns";
    where_no_dns_is_captured: linkerd(&[]), send("10.96.0.10", 53) => "direct", "not_dns";
    the_proxys_question: istio(&[]), send("10.96.0.10", 53).by(ISTIO) => "direct", "from_proxy";
    the_proxys_question_to_its_pod: istio(&[]), connect("10.0.0.7", 53).by(ISTIO)
        => "direct", "from_proxy";
    an_excluded_port_53: istio(&[(OUT_PORTS, "53")]), connect("10.96.0.10", 53)
        => "direct", "excluded_port";
    kumas_excluded_port_53_over_udp: kuma(&[(KUMA_OUT_PORTS, "53")]), send("10.96.0.10", 53)
        => "dns", "dns";
    kumas_user_of_port_53: kuma(&[(KUMA_USERS, "udp:53:1000")]), send("10.96.0.10", 53)
        => "direct", "excluded_user_port";
    // What comes in.
    i1_from_another_pod: istio(&[]), arrive(80) => "inbound", "all_included";
    a_port_of_the_meshs_own: istio(&[]), arrive(15021) => "direct", "excluded_port";
    an_excluded_inbound_port: istio(&[(IN_PORTS, "9000")]), arrive(9000)
        => "direct", "excluded_port";
    an_included_inbound_port: istio(&[(ONLY_IN_PORTS, "80")]), arrive(80)
        => "inbound", "included_port";
    an_inbound_port_that_is_not: istio(&[(ONLY_IN_PORTS, "80")]), arrive(81)
        => "direct", "not_included";
    a_port_that_is_not_known: istio(&[(ONLY_IN_PORTS, "80")]), arrive(0)
        => "inbound", "port_unknown";
    by_an_excluded_interface: istio(&[(INTERFACES, "net1")]), arrive(80).device(NET1)
        => "direct", "excluded_interface";
    an_excluded_source: kuma(&[(KUMA_IN_RANGES, "10.0.0.9/32")]), arrive(80)
        => "direct", "excluded_range";
    inbound_of_another_family: single_stack(),
        Question { destination: ip("fd00::7"), source: ip("fd00::9"), ..arrive(80) }
        => "direct", "other_family";
}

/// The kernel has no route, and says so itself.
#[test]
fn off_the_pod_without_an_address_of_the_family() {
    let desired = enrolled(istio(&[]), netns(&["fd00::7"]));
    check(&desired, &connect("10.96.0.10", 80), "nowhere", "no_address");
    check(&desired, &send("10.96.0.10", 53), "direct", "no_address");
}

#[test]
fn a_link_local_address_leads_to_its_link_alone() {
    let desired = enrolled(istio(&[]), netns(&["10.0.0.7", "fe80::7"]));
    check(&desired, &connect("fd96::10", 80), "nowhere", "no_address");
    check(&desired, &connect("fe80::9", 80), "outbound", "all_included");
}

/// The kernel lets 127.0.0.1 call off the pod where it is told to.
#[test]
fn route_localnet_is_minded() {
    let netns = NetnsFacts { route_localnet: true, ..netns(&["10.0.0.7"]) };
    let question = connect("10.96.0.10", 80).bound("127.0.0.1");
    check(&enrolled(istio(&[]), netns), &question, "outbound", "all_included");
}
