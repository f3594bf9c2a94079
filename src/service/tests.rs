//! From objects to lists: the rows of the contract, bad input, and properties of any script of
//! events.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
};

use proptest::prelude::*;
use serde_json::{Value, json};

use super::{
    Catalog, List, ListKey, Options,
    facts::{self, NodeFacts, ServiceFacts, SliceFacts},
};

const HERE: &str = "here";

fn service(object: Value) -> Option<ServiceFacts> {
    facts::service(&serde_json::from_value(object).expect("a Service")).expect("a name")
}

fn slice(object: Value) -> Option<SliceFacts> {
    facts::slice(&serde_json::from_value(object).expect("a slice"), HERE).expect("a name")
}

/// The node, in a zone.
fn in_zone(zone: Option<&str>) -> NodeFacts {
    let labels = zone.map(|zone| json!({"topology.kubernetes.io/zone": zone}));
    let node = json!({"metadata": {"name": HERE, "labels": labels}});
    facts::node(&serde_json::from_value(node).expect("a Node"))
}

/// A Service of the namespace `n`.
fn svc(name: &str, spec: Value) -> Value {
    json!({"metadata": {"name": name, "namespace": "n"}, "spec": spec})
}

/// One that listens on 80, at the port "http".
fn web(name: &str, ip: &str) -> Value {
    svc(name, json!({"clusterIP": ip, "clusterIPs": [ip], "ports": [{"name": "http", "port": 80}]}))
}

/// A slice of the Service's port "http", 8080.
fn web_slice(name: &str, of: &str, endpoints: Value) -> Value {
    slice_of(name, of, json!([{"name": "http", "protocol": "TCP", "port": 8080}]), endpoints)
}

fn slice_of(name: &str, of: &str, ports: Value, endpoints: Value) -> Value {
    let labels = json!({"kubernetes.io/service-name": of});
    json!({
        "metadata": {"name": name, "namespace": "n", "labels": labels},
        "addressType": "IPv4", "ports": ports, "endpoints": endpoints,
    })
}

fn ready(ips: &[&str]) -> Value {
    ips.iter().map(|ip| json!({"addresses": [ip]})).collect()
}

/// A catalog, and what its changes add up to.
#[derive(Default)]
struct Node {
    catalog: Catalog,
    lists: BTreeMap<ListKey, List>,
}

impl Node {
    fn with(options: Options, services: &[Value], slices: &[Value]) -> Self {
        let mut node = Self { catalog: Catalog::new(options), ..Self::default() };
        node.catalog.replace_services(services.iter().cloned().filter_map(service));
        node.catalog.replace_slices(slices.iter().cloned().filter_map(slice));
        node.catch_up();
        node
    }

    fn of(services: &[Value], slices: &[Value]) -> Self {
        Self::with(Options::default(), services, slices)
    }

    /// Whose lists have changed.
    fn catch_up(&mut self) -> BTreeSet<String> {
        let mut whose = BTreeSet::new();
        for (key, list) in self.catalog.changes() {
            whose.insert(key.service.to_string());
            match list {
                Some(list) => {
                    let before = self.lists.insert(key, list.clone());
                    assert_ne!(before, Some(list), "told without having changed");
                }
                None => assert!(self.lists.remove(&key).is_some(), "gone, but never told of"),
            }
        }
        let mut seen = BTreeSet::new();
        for (key, list) in &self.lists {
            assert!(!list.frontends.is_empty(), "{key}");
            for sorted in [&list.backends, &list.serving] {
                assert!(sorted.is_sorted_by(|a, b| a < b), "{key}: {sorted:?}");
            }
            for frontend in &list.frontends {
                assert!(seen.insert(*frontend), "{frontend} is in two lists");
            }
        }
        whose
    }

    fn list(&self, vip: &str, udp: bool) -> Option<&List> {
        let wanted: SocketAddr = vip.parse().expect("an address");
        let is_it = |list: &&List| {
            list.frontends.iter().any(|frontend| {
                let protocol = if udp { super::Protocol::Udp } else { super::Protocol::Tcp };
                SocketAddr::new(frontend.ip, frontend.port) == wanted
                    && frontend.protocol == protocol
            })
        };
        self.lists.values().find(is_it)
    }

    /// The backends behind a VIP over TCP; none: it is not translated.
    fn backends(&self, vip: &str) -> Option<Vec<String>> {
        self.list(vip, false).map(|list| list.backends.iter().map(ToString::to_string).collect())
    }

    fn problems(&self) -> Vec<String> {
        self.catalog.problems().into_iter().map(|problem| problem.text).collect()
    }

    /// Exactly these problems, by what each one's text contains.
    fn says(&self, wanted: &[&[&str]]) {
        let told = self.problems();
        for parts in wanted {
            let said = told.iter().filter(|text| parts.iter().all(|part| text.contains(part)));
            assert_eq!(said.count(), 1, "{parts:?} in {told:#?}");
        }
        assert_eq!(told.len(), wanted.len(), "{told:#?}");
    }
}

fn some(backends: &[&str]) -> Option<Vec<String>> {
    Some(backends.iter().map(|backend| (*backend).to_owned()).collect())
}

#[test]
fn ports_slices_and_protocols_are_merged() {
    // Row 9; the port without a name is 53/TCP, that of the same number "dns" over UDP.
    let ports = json!([
        {"port": 53, "protocol": "TCP"},
        {"name": "dns", "port": 53, "protocol": "UDP", "targetPort": "named"},
    ]);
    let spec = json!({"clusterIP": "10.96.0.10", "ports": ports, "sessionAffinity": "ClientIP"});
    let of_tcp = json!([{"protocol": "TCP", "port": 1053}]);
    let of_both =
        json!([{"name": "", "port": 5353}, {"name": "dns", "protocol": "UDP", "port": 53}]);
    let node = Node::of(
        &[svc("dns", spec)],
        &[
            slice_of("a", "dns", of_tcp, ready(&["10.0.0.1", "10.0.0.2"])),
            slice_of("b", "dns", of_both, ready(&["10.0.0.2", "10.0.0.3"])),
        ],
    );
    // Row 47: each slice has its own port.
    let tcp = ["10.0.0.1:1053", "10.0.0.2:1053", "10.0.0.2:5353", "10.0.0.3:5353"];
    assert_eq!(node.backends("10.96.0.10:53"), some(&tcp));
    let udp = node.list("10.96.0.10:53", true).expect("a list");
    assert_eq!(udp.backends, udp.serving);
    assert_eq!((udp.backends.len(), udp.affinity), (2, Some(10_800)));
    assert_eq!(node.backends("10.96.0.10:54"), None, "row 39");
    node.says(&[]);
}

#[test]
fn of_one_address_twice_the_endpoint_that_stays_counts() {
    let old = json!([{"addresses": ["10.0.0.1"], "conditions":
        {"ready": false, "serving": true, "terminating": true}}]);
    let new = ready(&["10.0.0.1"]);
    for (a, b) in [(&old, &new), (&new, &old)] {
        let slices = [web_slice("a", "w", a.clone()), web_slice("b", "w", b.clone())];
        let node = Node::of(&[web("w", "10.96.0.1")], &slices);
        assert_eq!(node.backends("10.96.0.1:80"), some(&["10.0.0.1:8080"]));
        node.says(&[]);
    }
    // Two that stay contradict each other.
    let other = json!([{"addresses": ["10.0.0.1"], "conditions": {"ready": false}}]);
    let slices = [web_slice("a", "w", other), web_slice("b", "w", new)];
    let node = Node::of(&[web("w", "10.96.0.1")], &slices);
    assert_eq!(node.backends("10.96.0.1:80"), some(&["10.0.0.1:8080"]));
    node.says(&[&["n/w", "EndpointSlices", "10.0.0.1:8080"]]);
}

#[test]
fn of_one_address_in_two_slices_the_endpoint_on_this_node_counts() {
    // Row 9, as kube-proxy has it: also where it terminates, and the other one does not.
    let ending = json!({"ready": false, "serving": true, "terminating": true});
    let here = json!([{"addresses": ["10.0.0.1"], "nodeName": HERE, "conditions": ending}]);
    let there = json!([{"addresses": ["10.0.0.1"], "nodeName": "there"}]);
    for (a, b) in [(&here, &there), (&there, &here)] {
        let other = web_slice("c", "w", ready(&["10.0.0.2"]));
        let slices = [web_slice("a", "w", a.clone()), web_slice("b", "w", b.clone()), other];
        let node = Node::of(&[web("w", "10.96.0.1")], &slices);
        assert_eq!(node.backends("10.96.0.1:80"), some(&["10.0.0.2:8080"]));
        let node = Node::of(&[web("w", "10.96.0.1")], &slices[..2]);
        assert_eq!(node.backends("10.96.0.1:80"), some(&["10.0.0.1:8080"]), "it stands in");
        node.says(&[]);
    }
}

#[test]
fn of_one_address_twice_in_a_slice_the_first_counts_or_the_last_on_this_node() {
    // Row 9, as kube-proxy has it.
    let one = |node: &str, ready: bool| {
        let conditions = json!({"ready": ready});
        json!({"addresses": ["10.0.0.1"], "nodeName": node, "conditions": conditions})
    };
    for (all, counts) in [
        ([("there", false), ("there", true), ("there", true)], false),
        ([("there", true), ("there", false), ("there", false)], true),
        ([("there", true), (HERE, false), ("there", true)], false),
        ([(HERE, false), (HERE, true), ("there", false)], true),
        ([(HERE, true), (HERE, false), ("there", true)], false),
    ] {
        let endpoints = all.iter().map(|(node, ready)| one(node, *ready)).collect();
        let node = Node::of(&[web("w", "10.96.0.1")], &[web_slice("a", "w", endpoints)]);
        let wanted: &[&str] = if counts { &["10.0.0.1:8080"] } else { &[] };
        assert_eq!(node.backends("10.96.0.1:80"), some(wanted), "{all:?}");
        let told = node.problems();
        assert!(told.iter().all(|text| text.contains("10.0.0.1") && text.contains("n/a")));
        assert!(!told.is_empty(), "{all:?}");
    }
}

#[test]
fn conditions_that_are_not_set_mean_ready() {
    // Row 42: kubernetes.default's slice, publishNotReadyAddresses, and one that terminates.
    let all = json!([
        {"addresses": ["192.0.2.1"]},
        {"addresses": ["192.0.2.2"], "conditions": {}},
        {"addresses": ["192.0.2.3"], "conditions":
            {"ready": true, "serving": false, "terminating": true}},
        {"addresses": ["192.0.2.4"], "conditions":
            {"ready": false, "serving": true, "terminating": true}},
        {"addresses": ["192.0.2.5"], "conditions": {"ready": false, "serving": false}},
    ]);
    let mut node = Node::of(&[web("w", "10.96.0.1")], &[web_slice("a", "w", all.clone())]);
    let list = node.list("10.96.0.1:80", false).expect("a list");
    let ips = |some: &[SocketAddr]| some.iter().map(|a| a.ip().to_string()).collect::<Vec<_>>();
    assert_eq!(ips(&list.backends), ["192.0.2.1", "192.0.2.2", "192.0.2.3"]);
    assert_eq!(ips(&list.serving), ["192.0.2.1", "192.0.2.2", "192.0.2.4"]);
    // Row 14: none is ready any more.
    let left = json!([all[3], all[4]]);
    node.catalog.set_slice(slice(web_slice("a", "w", left)).expect("read"));
    node.catch_up();
    assert_eq!(node.backends("10.96.0.1:80"), some(&["192.0.2.4:8080"]));
}

/// A catalog that translates NodePorts at these addresses, on a node that has some.
fn with_node_ports(choice: &str, services: &[Value], slices: &[Value]) -> Node {
    let node_ports = choice.parse().expect(choice);
    let mut node = Node::with(Options { node_ports, ..Options::default() }, services, slices);
    let ip = |text: &str| text.parse().expect("an address");
    let own = ["127.0.0.1", "::1", "192.0.2.1", "192.0.2.9", "2001:db8::1"].map(ip);
    node.catalog.set_node_addresses(own.into());
    let address = |kind: &str, at: &str| json!({"type": kind, "address": at});
    let addresses = [
        address("Hostname", "node"),
        address("ExternalIP", "192.0.2.9"),
        address("InternalIP", "192.0.2.1"),
        address("InternalIP", "2001:db8::1"),
    ];
    let object = json!({"metadata": {"name": HERE}, "status": {"addresses": addresses}});
    node.catalog.set_node(facts::node(&serde_json::from_value(object).expect("a Node")));
    node.catch_up();
    node
}

/// Row 27.
fn with_node_port(name: &str, ip: &str, number: u16) -> Value {
    let mut object = web(name, ip);
    object["spec"]["type"] = "NodePort".into();
    object["spec"]["ports"][0]["nodePort"] = number.into();
    object
}

#[test]
fn node_ports_lead_to_all_endpoints_whatever_the_policies_are() {
    let mut object = with_node_port("w", "10.96.0.1", 30_080);
    object["spec"]["internalTrafficPolicy"] = "Local".into();
    object["spec"]["externalTrafficPolicy"] = "Local".into();
    let elsewhere = json!([{"addresses": ["10.0.0.1"], "nodeName": "there"}]);
    let slices = [web_slice("a", "w", elsewhere)];
    let mut node = with_node_ports("primary", &[object], &slices);
    assert_eq!(node.backends("192.0.2.1:30080"), some(&["10.0.0.1:8080"]));
    assert_eq!(node.backends("10.96.0.1:80"), some(&[]), "no endpoint is here");
    for not in ["192.0.2.9:30080", "192.0.2.1:80", "127.0.0.1:30080", "10.96.0.1:30080"] {
        assert_eq!(node.backends(not), None, "{not}");
    }
    assert_eq!(node.list("192.0.2.1:30080", true), None, "another protocol");
    assert_eq!(node.backends("[2001:db8::1]:30080"), None, "the Service has no IPv6 ClusterIP");
    node.says(&[]);
    // The node loses the address, and gets it back.
    node.catalog.set_node_addresses(BTreeSet::new());
    node.catch_up();
    assert_eq!(node.backends("192.0.2.1:30080"), None);
    assert_eq!(node.backends("10.96.0.1:80"), some(&[]));
    node.catalog.set_node_addresses(["192.0.2.1".parse().expect("an address")].into());
    node.catch_up();
    assert_eq!(node.backends("192.0.2.1:30080"), some(&["10.0.0.1:8080"]));
    // Its object has no address.
    node.catalog.set_node(NodeFacts::default());
    node.catch_up();
    assert_eq!(node.backends("192.0.2.1:30080"), None);
}

#[test]
fn node_ports_are_translated_at_the_chosen_addresses() {
    let object = with_node_port("w", "10.96.0.1", 30_080);
    for (choice, wanted) in [
        ("none", &[][..]),
        ("primary", &["192.0.2.1"]),
        ("all", &["192.0.2.1", "192.0.2.9"]),
        ("192.0.2.8/31,localhost", &["192.0.2.9", "127.0.0.1"]),
    ] {
        let node = with_node_ports(choice, std::slice::from_ref(&object), &[]);
        for at in ["192.0.2.1", "192.0.2.9", "127.0.0.1"] {
            let found = node.backends(&format!("{at}:30080")).is_some();
            assert_eq!(found, wanted.contains(&at), "{choice}: {at}");
        }
    }
}

#[test]
fn node_ports_that_collide_or_are_no_ports_are_named() {
    let mut late = with_node_port("late", "10.96.0.2", 30_080);
    late["metadata"]["creationTimestamp"] = "2026-02-01T00:00:00Z".into();
    let mut early = with_node_port("early", "10.96.0.1", 30_080);
    early["metadata"]["creationTimestamp"] = "2026-01-01T00:00:00Z".into();
    let mut odd = with_node_port("odd", "10.96.0.3", 1);
    odd["spec"]["ports"][0]["nodePort"] = 70_000.into();
    let slices = [web_slice("a", "early", ready(&["10.0.0.1"]))];
    let node = with_node_ports("primary", &[late, early, odd], &slices);
    assert_eq!(node.backends("192.0.2.1:30080"), some(&["10.0.0.1:8080"]));
    assert_eq!(node.backends("10.96.0.3:80"), some(&[]), "its other address works");
    node.says(&[
        &["Service n/late", "192.0.2.1", "30080/TCP", "n/early"],
        &["Service n/odd", "spec.ports[0].nodePort", "70000"],
    ]);
}

#[test]
fn an_endpoint_is_gone_where_it_does_not_serve_and_another_does() {
    // Row 20.
    let slice_with = |endpoints: Value| [web_slice("a", "w", endpoints)];
    let ending = json!({"ready": false, "serving": true, "terminating": true});
    let dead = json!({"ready": false, "serving": false});
    let one = |ip: &str, conditions: &Value| json!({"addresses": [ip], "conditions": conditions});
    let asked: SocketAddr = "192.0.2.1:8080".parse().expect("an address");
    let vip = |ip: &str, port| super::Frontend {
        ip: ip.parse().expect("an address"),
        port,
        protocol: super::Protocol::Tcp,
    };
    let rows = [
        (json!([one("192.0.2.1", &json!({})), one("192.0.2.2", &json!({}))]), false),
        (json!([one("192.0.2.1", &ending), one("192.0.2.2", &json!({}))]), false),
        (json!([one("192.0.2.1", &dead), one("192.0.2.2", &json!({}))]), true),
        (json!([one("192.0.2.1", &dead), one("192.0.2.2", &ending)]), true),
        (json!([one("192.0.2.2", &json!({}))]), true),
        (json!([one("192.0.2.1", &dead), one("192.0.2.2", &dead)]), false),
        (json!([]), false),
    ];
    for (endpoints, is_gone) in rows {
        let node = Node::of(&[web("w", "10.96.0.1")], &slice_with(endpoints.clone()));
        let told = node.catalog.is_gone(asked, vip("10.96.0.1", 80));
        assert_eq!(told, is_gone, "{endpoints}");
        // What was dialled is no Service's any more, or never was.
        assert!(!node.catalog.is_gone(asked, vip("10.96.0.2", 80)));
        assert!(!node.catalog.is_gone(asked, vip("10.96.0.1", 81)));
    }
}

#[test]
fn a_canary_that_is_not_led_to_localhost_is_named() {
    // Row 17.
    let at = |ip: &str, port| SocketAddr::new(ip.parse().expect("an address"), port);
    let led = |to: SocketAddr| {
        let localhost = if to.is_ipv4() { "127.0.0.1" } else { "::1" };
        Ok((at(localhost, 40_000), to))
    };
    let stays = |to: SocketAddr| match to.ip() {
        ip if ip.is_loopback() => Ok((to, to)),
        std::net::IpAddr::V4(_) => Ok((at("10.0.0.7", 40_000), to)),
        std::net::IpAddr::V6(_) => led(to),
    };
    let unreachable = |to: SocketAddr| match to.ip().is_loopback() {
        true => Ok((to, to)),
        false => Err(std::io::ErrorKind::NetworkUnreachable.into()),
    };
    // A family that the namespace does not have.
    let nothing = |_| Err(std::io::ErrorKind::AddrNotAvailable.into());
    assert!(super::canary::dial(led).is_ok());
    assert!(super::canary::dial(nothing).is_ok());
    let told = |dialled: anyhow::Result<()>| format!("{:#}", dialled.expect_err("not translated"));
    let text = told(super::canary::dial(stays));
    assert!(text.contains("IPv4 to 192.0.2.183") && text.contains("10.0.0.7"), "{text}");
    let text = told(super::canary::dial(unreachable));
    assert!(text.contains("IPv4 to 192.0.2.183 failed"), "{text}");
}

#[test]
fn a_local_policy_has_this_nodes_endpoints_or_refuses() {
    // Rows 7 and 28: a load balancer's address from inside is the cluster's list all the same.
    let mut object = web("w", "10.96.0.1");
    object["spec"]["internalTrafficPolicy"] = "Local".into();
    object["spec"]["externalTrafficPolicy"] = "Local".into();
    object["spec"]["type"] = "LoadBalancer".into();
    let ingress = json!([
        {"ip": "203.0.113.1"}, {"ip": "203.0.113.2", "ipMode": "Proxy"}, {"hostname": "x"},
        {"ip": "203.0.113.3", "ipMode": "VIP"}, {"ip": ""},
    ]);
    object["status"] = json!({"loadBalancer": {"ingress": ingress}});
    let there = json!([{"addresses": ["10.0.0.1"], "nodeName": "there"}]);
    let mut node = Node::of(&[object.clone()], &[web_slice("a", "w", there.clone())]);
    assert_eq!(node.backends("10.96.0.1:80"), some(&[]));
    for vip in ["203.0.113.1:80", "203.0.113.3:80"] {
        assert_eq!(node.backends(vip), some(&["10.0.0.1:8080"]));
    }
    assert_eq!(node.backends("203.0.113.2:80"), None);
    let local: Vec<bool> = node.lists.keys().map(|key| key.is_local).collect();
    assert_eq!(local, [false, true]);
    let here = json!([there[0], {"addresses": ["10.0.0.2"], "nodeName": HERE}]);
    node.catalog.set_slice(slice(web_slice("a", "w", here)).expect("read"));
    node.catch_up();
    assert_eq!(node.backends("10.96.0.1:80"), some(&["10.0.0.2:8080"]));
    assert_eq!(node.backends("203.0.113.1:80"), some(&["10.0.0.1:8080", "10.0.0.2:8080"]));
    // Source ranges are kube-proxy's to apply.
    object["spec"]["loadBalancerSourceRanges"] = json!(["192.0.2.0/24"]);
    node.catalog.set_service(service(object).expect("read"));
    node.catch_up();
    assert_eq!(node.backends("203.0.113.1:80"), None);
    assert_eq!(node.backends("10.96.0.1:80"), some(&["10.0.0.2:8080"]));
    node.says(&[]);
}

#[test]
fn hints_follow_the_nodes_zone() {
    // Row 29.
    let hinted = json!([
        {"addresses": ["10.0.0.1"], "hints": {"forZones": [{"name": "a"}]}},
        {"addresses": ["10.0.0.2"], "hints": {"forZones": [{"name": "b"}, {"name": "c"}]}},
    ]);
    let services = [web("w", "10.96.0.1"), web("v", "10.96.0.2")];
    let slices = [web_slice("a", "w", hinted), web_slice("b", "v", ready(&["10.0.0.3"]))];
    let mut node = Node::of(&services, &slices);
    for (zone, wanted) in [
        (Some("c"), &["10.0.0.2:8080"][..]),
        (Some("a"), &["10.0.0.1:8080"]),
        (Some(""), &["10.0.0.1:8080", "10.0.0.2:8080"]),
        (Some("b"), &["10.0.0.2:8080"]),
        (None, &["10.0.0.1:8080", "10.0.0.2:8080"]),
    ] {
        node.catalog.set_node(in_zone(zone));
        assert_eq!(node.catch_up(), BTreeSet::from(["n/w".to_owned()]));
        assert_eq!(node.backends("10.96.0.1:80"), some(wanted), "{zone:?}");
    }
    // A hint to this node comes first.
    let nodes = json!([
        {"addresses": ["10.0.0.1"], "hints": {"forNodes": [{"name": HERE}]}},
        {"addresses": ["10.0.0.2"], "hints": {"forNodes": [{"name": "there"}]}},
    ]);
    node.catalog.set_slice(slice(web_slice("a", "w", nodes)).expect("read"));
    node.catch_up();
    assert_eq!(node.backends("10.96.0.1:80"), some(&["10.0.0.1:8080"]));
}

#[test]
fn services_without_a_virtual_ip_or_of_somebody_else_are_ignored() {
    // Row 11.
    let slices = [web_slice("a", "w", ready(&["10.0.0.1"]))];
    let mut left = Vec::new();
    for ip in ["None", ""] {
        left.push(web("w", ip));
    }
    left.push(svc("w", json!({"ports": [{"port": 80}]})));
    left.push(svc(
        "w",
        json!({"type": "ExternalName", "clusterIP": "10.96.0.1",
        "externalName": "x.test", "ports": [{"port": 80}]}),
    ));
    for label in ["service.kubernetes.io/service-proxy-name", "service.kubernetes.io/headless"] {
        for value in ["", "x"] {
            let mut object = web("w", "10.96.0.1");
            object["metadata"]["labels"] = json!({label: value});
            left.push(object);
        }
    }
    for object in &left {
        let node = Node::of(std::slice::from_ref(object), &slices);
        assert!(node.lists.is_empty(), "{object}");
        node.says(&[]);
    }
    let mut labelled = slices[0].clone();
    labelled["metadata"]["labels"]["service.kubernetes.io/service-proxy-name"] = "x".into();
    assert_eq!(slice(labelled), None);
}

#[test]
fn a_service_that_is_made_anew_leaves_nothing_behind() {
    // Row 12: other ports; then its address is another's, and then it has another type.
    let mut node = Node::of(&[web("w", "10.96.0.1")], &[web_slice("a", "w", ready(&["10.0.0.1"]))]);
    let ports = json!([{"name": "http", "port": 81}]);
    node.catalog.remove_service("n/w");
    let anew = svc("w", json!({"clusterIP": "10.96.0.1", "ports": ports}));
    node.catalog.set_service(service(anew).expect("read"));
    node.catch_up();
    assert_eq!(node.backends("10.96.0.1:80"), None);
    assert_eq!(node.backends("10.96.0.1:81"), some(&["10.0.0.1:8080"]));
    node.catalog.set_service(service(web("w", "10.96.0.2")).expect("read"));
    node.catalog.set_service(service(web("v", "10.96.0.1")).expect("read"));
    node.catch_up();
    assert_eq!(node.backends("10.96.0.1:80"), some(&[]));
    assert_eq!(node.backends("10.96.0.1:81"), None);
    assert_eq!(node.backends("10.96.0.2:80"), some(&["10.0.0.1:8080"]));
    node.catalog.remove_service("n/w");
    node.catalog.remove_service("n/v");
    node.catch_up();
    assert!(node.lists.is_empty() && node.catalog.lists().next().is_none());
    // Its slices were there all the time.
    node.catalog.set_service(service(web("w", "10.96.0.1")).expect("read"));
    node.catch_up();
    assert_eq!(node.backends("10.96.0.1:80"), some(&["10.0.0.1:8080"]));
}

#[test]
fn families_are_apart_and_come_and_go() {
    // Rows 3 and 46.
    let spec = |ips: &[&str]| json!({"clusterIP": ips[0], "clusterIPs": ips, "ports": [{"name": "http", "port": 80}]});
    let mut v6 = web_slice("b", "w", ready(&["fd00::1"]));
    v6["addressType"] = "IPv6".into();
    let slices = [web_slice("a", "w", ready(&["10.0.0.1"])), v6];
    let mut node = Node::of(&[svc("w", spec(&["10.96.0.1"]))], &slices);
    assert_eq!(node.lists.len(), 1);
    for ips in [["10.96.0.1", "fd01::1"], ["fd01::1", "10.96.0.1"]] {
        node.catalog.set_service(service(svc("w", spec(&ips))).expect("read"));
        node.catch_up();
        assert_eq!(node.backends("10.96.0.1:80"), some(&["10.0.0.1:8080"]));
        assert_eq!(node.backends("[fd01::1]:80"), some(&["[fd00::1]:8080"]));
    }
    node.catalog.remove_slice("n/b");
    node.catch_up();
    assert_eq!(node.backends("[fd01::1]:80"), some(&[]), "refused, whatever IPv4 has");
    node.catalog.set_service(service(svc("w", spec(&["10.96.0.1"]))).expect("read"));
    node.catch_up();
    assert_eq!(node.backends("[fd01::1]:80"), None);
    node.says(&[]);
}

#[test]
fn the_nodes_own_addresses_are_no_frontends() {
    // Row 38; and row 25 for external IPs.
    let mut object = web("w", "10.96.0.10");
    object["spec"]["externalIPs"] = json!(["198.51.100.1"]);
    object["status"] = json!({"loadBalancer": {"ingress": [{"ip": "203.0.113.1"}]}});
    let mut node = Node::of(&[object.clone()], &[web_slice("a", "w", ready(&["10.0.0.1"]))]);
    assert!(node.backends("10.96.0.10:80").is_some() && node.backends("203.0.113.1:80").is_some());
    assert_eq!(node.backends("198.51.100.1:80"), None);
    node.says(&[&["n/w", "spec.externalIPs", "198.51.100.1"]]);
    let own = ["10.96.0.10", "203.0.113.1", "198.51.100.1", "192.0.2.1"];
    let own = own.map(|ip| ip.parse().expect("an IP"));
    node.catalog.set_node_addresses(own.into());
    node.catch_up();
    assert_eq!(node.backends("10.96.0.10:80"), None);
    assert_eq!(node.backends("203.0.113.1:80"), None);
    assert!(node.backends("198.51.100.1:80").is_some());
    node.says(&[]);
    node.catalog.set_node_addresses([own[3]].into());
    node.catch_up();
    assert!(node.backends("10.96.0.10:80").is_some());
    let asked = Options { external_ips: true, ..Options::default() };
    let node = Node::with(asked, &[object], &[]);
    assert!(node.backends("198.51.100.1:80").is_some());
    node.says(&[]);
}

#[test]
fn of_two_services_with_one_address_the_older_has_it() {
    // Row 41.
    let balanced = |name: &str, ip: &str, at: &str| {
        let mut object = web(name, ip);
        object["metadata"]["creationTimestamp"] = at.into();
        object["status"] = json!({"loadBalancer": {"ingress": [{"ip": "203.0.113.1"}]}});
        object
    };
    let (young, old) = ("2026-02-01T00:00:00Z", "2026-01-01T00:00:00Z");
    let services = [balanced("a", "10.96.0.1", young), balanced("b", "10.96.0.2", old)];
    let slices =
        [web_slice("a", "a", ready(&["10.0.0.1"])), web_slice("b", "b", ready(&["10.0.0.2"]))];
    let mut node = Node::of(&services, &slices);
    assert_eq!(node.backends("203.0.113.1:80"), some(&["10.0.0.2:8080"]));
    assert_eq!(node.backends("10.96.0.1:80"), some(&["10.0.0.1:8080"]));
    node.says(&[&["Service n/a", "203.0.113.1", "80/TCP", "n/b"]]);
    // It moves in one answer when the older one goes, and back.
    node.catalog.remove_service("n/b");
    assert_eq!(node.catch_up(), ["n/a", "n/b"].map(str::to_owned).into());
    assert_eq!(node.backends("203.0.113.1:80"), some(&["10.0.0.1:8080"]));
    node.says(&[]);
    node.catalog.set_service(service(services[1].clone()).expect("read"));
    node.catch_up();
    assert_eq!(node.backends("203.0.113.1:80"), some(&["10.0.0.2:8080"]));
    // A ClusterIP is its Service's, whoever is older; of the same age, names decide.
    let taken = web("z", "203.0.113.1");
    node.catalog.set_service(service(taken).expect("read"));
    node.catalog.set_service(service(balanced("a", "10.96.0.1", old)).expect("read"));
    node.catch_up();
    assert_eq!(node.backends("203.0.113.1:80"), some(&[]));
    node.catalog.remove_service("n/z");
    node.catch_up();
    assert_eq!(node.backends("203.0.113.1:80"), some(&["10.0.0.1:8080"]));
}

#[test]
fn bad_fields_of_a_service_are_named_and_the_rest_works() {
    let cases = [
        ("/clusterIPs", json!(["10.96.0.1", "10.96.0.2"]), &["clusterIPs[1]", "10.96.0.2"]),
        ("/clusterIPs", json!(["10.96.0.1", "x"]), &["clusterIPs[1]", "\"x\""]),
        ("/clusterIPs", json!(["10.96.0.1", "::1"]), &["clusterIPs[1]", "loopback"]),
        ("/clusterIPs", json!(["10.96.0.1", "fe80::1"]), &["clusterIPs[1]", "link-local"]),
        ("/clusterIPs", json!(["10.96.0.1", "::ffff:10.0.0.1"]), &["clusterIPs[1]", "mapped"]),
        ("/clusterIPs", json!(["10.96.0.1", "fd00::1%eth0"]), &["clusterIPs[1]", "%eth0"]),
        ("/ports/1", json!({"name": "b", "port": 0}), &["ports[1].port", "0 is not"]),
        ("/ports/1", json!({"name": "b", "port": 65536}), &["ports[1].port", "65536"]),
        ("/ports/1", json!({"name": "b", "port": -1}), &["ports[1].port", "-1"]),
        ("/ports/1", json!({"name": "b"}), &["ports[1].port", "missing"]),
        (
            "/ports/1",
            json!({"name": "b", "port": 81, "protocol": "SCTP"}),
            &["ports[1].protocol", "SCTP"],
        ),
        (
            "/ports/1",
            json!({"name": "b", "port": 81, "protocol": "tcp"}),
            &["ports[1].protocol", "\"tcp\""],
        ),
        ("/ports/1", json!({"name": "b", "port": 80}), &["ports[1]", "80/TCP"]),
        ("/ports/1", json!({"name": "http", "port": 81}), &["ports[1].name", "http"]),
        ("/internalTrafficPolicy", json!("Far"), &["internalTrafficPolicy", "Far"]),
        ("/externalTrafficPolicy", json!("Far"), &["externalTrafficPolicy", "Far"]),
        ("/sessionAffinity", json!("Cookie"), &["sessionAffinity", "Cookie"]),
        ("/externalIPs", json!(["fd00::1"]), &["externalIPs[0]", "no IPv6 ClusterIP"]),
        ("/externalIPs", json!(["127.0.0.1"]), &["externalIPs[0]", "loopback"]),
        ("/externalIPs", json!(["0.0.0.0"]), &["externalIPs[0]", "unspecified"]),
        ("/externalIPs", json!(["224.0.0.1"]), &["externalIPs[0]", "multicast"]),
        ("/externalIPs", json!(["255.255.255.255"]), &["externalIPs[0]", "broadcast"]),
        ("/externalIPs", json!(["169.254.169.254"]), &["externalIPs[0]", "link-local"]),
        ("/externalIPs", json!(["010.0.0.1"]), &["externalIPs[0]", "010.0.0.1"]),
    ];
    for (at, value, wanted) in cases {
        let mut object = web("w", "10.96.0.1");
        object["spec"]["ports"] =
            json!([{"name": "http", "port": 80}, {"name": "other", "port": 9090}]);
        let (parent, field) = at.rsplit_once('/').expect("a path");
        let parent = object["spec"].pointer_mut(parent).expect("a parent");
        match field.parse::<usize>() {
            Ok(n) => parent[n] = value.clone(),
            Err(_) => parent[field] = value.clone(),
        }
        let node = Node::of(&[object], &[web_slice("a", "w", ready(&["10.0.0.1"]))]);
        assert_eq!(node.backends("10.96.0.1:80"), some(&["10.0.0.1:8080"]), "{at} {value}");
        node.says(&[&["Service n/w", wanted[0], wanted[1]]]);
    }
    for (asked, affinity) in [(0, 10_800), (86_401, 10_800), (-1, 10_800), (86_400, 86_400), (1, 1)]
    {
        let mut object = web("w", "10.96.0.1");
        object["spec"]["sessionAffinity"] = "ClientIP".into();
        object["spec"]["sessionAffinityConfig"] = json!({"clientIP": {"timeoutSeconds": asked}});
        let node = Node::of(&[object], &[]);
        let list = node.list("10.96.0.1:80", false).expect("a list");
        assert_eq!(list.affinity, Some(affinity));
        assert_eq!(node.problems().len(), usize::from(affinity == 10_800), "{asked}");
    }
    let unnamed = json!({"metadata": {}, "spec": {"clusterIP": "10.96.0.1"}});
    facts::service(&serde_json::from_value(unnamed).expect("a Service")).expect_err("no name");
}

#[test]
fn a_service_with_no_address_that_can_be_one_has_no_list() {
    for ip in ["127.0.0.1", "0.0.0.0", "224.0.0.1", "::", "x", "10.96.0.256"] {
        let node = Node::of(&[web("w", ip)], &[]);
        assert!(node.lists.is_empty());
        node.says(&[&["n/w", "clusterIPs[0]", ip]]);
    }
}

#[test]
fn bad_fields_of_a_slice_are_named_and_the_rest_works() {
    // Rows 40 and 43.
    let ips = ["127.0.0.1", "0.0.0.0", "169.254.1.1", "224.0.0.1", "10.0.0", "", "fd00::1"];
    for ip in ips {
        let slices = [web_slice("a", "w", ready(&[ip, "10.0.0.1"]))];
        let node = Node::of(&[web("w", "10.96.0.1")], &slices);
        assert_eq!(node.backends("10.96.0.1:80"), some(&["10.0.0.1:8080"]));
        node.says(&[&["EndpointSlice n/a", "endpoints[0].addresses[0]", &format!("{ip:?}")]]);
    }
    for ip in ["::1", "::", "fe80::1", "ff02::1", "::ffff:127.0.0.1", "10.0.0.1"] {
        let mut object = web_slice("a", "w", ready(&[ip, "fd00::1"]));
        object["addressType"] = "IPv6".into();
        let node = Node::of(&[web("w", "fd01::1")], &[object]);
        assert_eq!(node.backends("[fd01::1]:80"), some(&["[fd00::1]:8080"]));
        node.says(&[&["EndpointSlice n/a", "endpoints[0].addresses[0]", &format!("{ip:?}")]]);
    }
    let good = json!({"name": "http", "port": 8080});
    let ports = [
        (json!({"name": "http"}), &["ports[0].port", "missing"]),
        (json!({"name": "http", "port": 0}), &["ports[0].port", "0 is not"]),
        (json!({"name": "http", "port": 70_000}), &["ports[0].port", "70000"]),
        (json!({"name": "x", "port": 1, "protocol": "ICMP"}), &["ports[0].protocol", "ICMP"]),
    ];
    for (port, wanted) in ports {
        let slices = [slice_of("a", "w", json!([port, good]), ready(&["10.0.0.1"]))];
        let node = Node::of(&[web("w", "10.96.0.1")], &slices);
        assert_eq!(node.backends("10.96.0.1:80"), some(&["10.0.0.1:8080"]));
        node.says(&[&["EndpointSlice n/a", wanted[0], wanted[1]]]);
    }
    // Whole slices, beside a good one.
    let good = web_slice("z", "w", ready(&["10.0.0.1"]));
    let cases: [(&str, Value, &[&str]); 5] = [
        ("/addressType", json!("FQDN"), &["n/a", "addressType", "FQDN"]),
        ("/addressType", Value::Null, &["n/a", "addressType", "missing"]),
        ("/metadata/labels", json!({}), &["n/a", "kubernetes.io/service-name", "missing"]),
        ("/endpoints", json!([{"addresses": []}]), &["n/a", "endpoints[0].addresses[0]"]),
        ("/endpoints", json!([{}]), &["n/a", "endpoints[0].addresses[0]", "missing"]),
    ];
    for (at, value, wanted) in cases {
        let mut object = web_slice("a", "w", ready(&["10.0.0.9"]));
        *object.pointer_mut(at).expect("a field") = value;
        let mut node = Node::of(&[web("w", "10.96.0.1")], &[object, good.clone()]);
        assert_eq!(node.backends("10.96.0.1:80"), some(&["10.0.0.1:8080"]), "{at}");
        node.says(&[wanted]);
        node.catalog.remove_slice("n/a");
        node.catch_up();
        node.says(&[]);
    }
    // What Go writes for lists that are empty.
    let node = Node::of(&[], &[slice_of("a", "w", Value::Null, Value::Null)]);
    node.says(&[]);
}

#[test]
fn much_that_is_wrong_is_counted() {
    let bad: Value = (0..5000).map(|n| json!({"name": format!("p{n}"), "port": 0})).collect();
    let spec = json!({"clusterIP": "10.96.0.1", "ports": bad});
    let node = Node::of(&[svc("w", spec)], &[]);
    let told = node.problems();
    assert_eq!(told.len(), 9);
    assert!(told.iter().any(|text| text.contains("n/w") && text.contains("4992 more")), "{told:?}");
    // Ports without end, which are all good.
    let good: Value = (1..=5000).map(|n| json!({"name": format!("p{n}"), "port": n})).collect();
    let spec = json!({"clusterIP": "10.96.0.1", "ports": good});
    let mut node = Node::of(&[svc("w", spec)], &[slice_of("a", "w", good, ready(&["10.0.0.1"]))]);
    assert_eq!(node.lists.len(), 5000);
    assert_eq!(node.backends("10.96.0.1:4711"), some(&["10.0.0.1:4711"]));
    // A slice of one of them changes one list.
    let one = json!([{"name": "p7", "port": 7}]);
    node.catalog.set_slice(slice(slice_of("b", "w", one, ready(&["10.0.0.2"]))).expect("read"));
    assert_eq!(node.catalog.changes().len(), 1);
}

/// What may happen to a node's picture of the cluster.
#[derive(Debug, Clone)]
enum Event {
    Service(usize, Option<Value>),
    Slice(usize, Option<Value>),
    Zone(Option<String>),
    Addresses(Vec<String>),
    /// The watch lists again: nothing has changed.
    Relist,
}

/// The addresses and ports are few, so that they meet.
fn any_service(name: usize) -> impl Strategy<Value = Value> {
    let port = |names: &'static [&'static str]| {
        let number = prop_oneof![8 => 80..82i64, 1 => Just(0i64)];
        (prop::sample::select(names), number, prop::sample::select(vec!["TCP", "UDP", "SCTP"]))
            .prop_map(
                |(name, port, protocol)| json!({"name": name, "port": port, "protocol": protocol}),
            )
    };
    let ips = prop::sample::select(vec![
        json!(["10.96.0.1"]),
        json!(["10.96.0.2"]),
        json!(["10.96.0.3", "fd01::1"]),
        json!(["fd01::2", "10.96.0.1"]),
        json!(["127.0.0.1", "fd01::1"]),
        json!(["None"]),
    ]);
    let outer = prop::sample::subsequence(vec!["203.0.113.1", "fd02::1", "10.96.0.2"], 0..3);
    (
        (ips, prop::collection::vec(port(&["a", "b"]), 0..4), outer.clone(), outer),
        (any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>(), 0..3, any::<u8>()),
    )
        .prop_map(move |((ips, ports, balanced, external), rest)| {
            let (internal, outside, sticky, ranges, day, label) = rest;
            let policy = |local| if local { "Local" } else { "Cluster" };
            let ingress: Vec<_> = balanced.iter().map(|ip| json!({"ip": ip})).collect();
            let mut object = svc(
                &format!("s{name}"),
                json!({
                    "type": "LoadBalancer", "clusterIPs": ips, "ports": ports,
                    "externalIPs": external,
                    "internalTrafficPolicy": policy(internal),
                    "externalTrafficPolicy": policy(outside),
                    "sessionAffinity": if sticky { "ClientIP" } else { "None" },
                    "loadBalancerSourceRanges": if ranges && sticky { vec!["::/0"] } else { vec![] },
                }),
            );
            object["status"] = json!({"loadBalancer": {"ingress": ingress}});
            if day > 0 {
                object["metadata"]["creationTimestamp"] = format!("2026-01-0{day}T00:00:00Z").into();
            }
            if label < 20 {
                let label = "service.kubernetes.io/service-proxy-name";
                object["metadata"]["labels"] = json!({label: ""});
            }
            object
        })
}

fn any_slice(name: usize) -> impl Strategy<Value = Value> {
    let endpoint = (
        prop::sample::select(vec!["1", "2", "3", "254"]),
        any::<[Option<bool>; 3]>(),
        prop::sample::select(vec![HERE, "there"]),
        prop::sample::subsequence(vec!["x", "y"], 0..=2),
        prop::sample::subsequence(vec![HERE, "there"], 0..=2),
    );
    let port = (prop::sample::select(vec!["a", "b"]), 8080..8082, any::<bool>());
    (
        0..4usize,
        any::<bool>(),
        prop::collection::vec(port, 0..3),
        prop::collection::vec(endpoint, 0..4),
    )
        .prop_map(move |(of, v6, ports, endpoints)| {
            let names = |all: Vec<&str>| all.iter().map(|n| json!({"name": n})).collect::<Value>();
            let ports = ports.into_iter().map(|(name, port, udp)| {
                json!({"name": name, "port": port, "protocol": if udp { "UDP" } else { "TCP" }})
            });
            let endpoints = endpoints.into_iter().map(|(ip, conditions, node, zones, nodes)| {
                let ip = match (ip, v6) {
                    ("254", _) => "169.254.0.1".to_owned(),
                    (_, true) => format!("fd00::{ip}"),
                    (_, false) => format!("10.0.0.{ip}"),
                };
                let [ready, serving, terminating] = conditions;
                json!({
                    "addresses": [ip], "nodeName": node,
                    "conditions":
                        {"ready": ready, "serving": serving, "terminating": terminating},
                    "hints": {"forZones": names(zones), "forNodes": names(nodes)},
                })
            });
            let (ports, endpoints) = (ports.collect(), endpoints.collect());
            let mut object = slice_of(&format!("e{name}"), &format!("s{of}"), ports, endpoints);
            object["addressType"] = if v6 { "IPv6" } else { "IPv4" }.into();
            object
        })
}

fn any_event() -> impl Strategy<Value = Event> {
    let service = (0..4usize).prop_flat_map(|n| {
        prop::option::weighted(0.8, any_service(n)).prop_map(move |s| Event::Service(n, s))
    });
    let slice = (0..6usize).prop_flat_map(|n| {
        prop::option::weighted(0.8, any_slice(n)).prop_map(move |s| Event::Slice(n, s))
    });
    let zone = prop::option::of(prop::sample::select(vec!["x", "y", ""]));
    let own = vec!["10.96.0.1", "fd01::1", "203.0.113.1", "192.0.2.1"];
    let own = prop::sample::subsequence(own, 0..3);
    let owned = |all: Vec<&str>| all.into_iter().map(str::to_owned).collect();
    prop_oneof![
        6 => service,
        8 => slice,
        1 => zone.prop_map(|zone| Event::Zone(zone.map(str::to_owned))),
        1 => own.prop_map(move |own| Event::Addresses(owned(own))),
        1 => Just(Event::Relist),
    ]
}

/// What the API server would have after a script.
#[derive(Default)]
struct World {
    services: BTreeMap<usize, Value>,
    slices: BTreeMap<usize, Value>,
    zone: Option<String>,
    addresses: Vec<String>,
}

impl World {
    fn apply(&mut self, event: &Event) {
        fn put(all: &mut BTreeMap<usize, Value>, n: usize, object: &Option<Value>) {
            match object {
                Some(object) => drop(all.insert(n, object.clone())),
                None => drop(all.remove(&n)),
            }
        }
        match event {
            Event::Service(n, object) => put(&mut self.services, *n, object),
            Event::Slice(n, object) => put(&mut self.slices, *n, object),
            Event::Zone(zone) => self.zone = zone.clone(),
            Event::Addresses(own) => self.addresses = own.clone(),
            Event::Relist => {}
        }
    }

    fn addresses(&self) -> BTreeSet<std::net::IpAddr> {
        self.addresses.iter().map(|ip| ip.parse().expect("an IP")).collect()
    }

    fn services(&self) -> Vec<ServiceFacts> {
        self.services.values().cloned().filter_map(service).collect()
    }

    fn slices(&self) -> Vec<SliceFacts> {
        self.slices.values().cloned().filter_map(slice).collect()
    }

    /// All of it, told to a new catalog, last things first where that is asked for.
    fn scratch(&self, options: Options, backwards: bool) -> Node {
        let mut node = Node { catalog: Catalog::new(options.clone()), ..Node::default() };
        let (mut services, mut slices) = (self.services(), self.slices());
        if backwards {
            services.reverse();
            slices.reverse();
            slices.into_iter().for_each(|slice| node.catalog.set_slice(slice));
            node.catch_up();
            services.into_iter().for_each(|service| node.catalog.set_service(service));
            node.catch_up();
            node.catalog.set_node(in_zone(self.zone.as_deref()));
            node.catalog.set_node_addresses(self.addresses());
        } else {
            node.catalog.set_node_addresses(self.addresses());
            node.catalog.set_node(in_zone(self.zone.as_deref()));
            node.catalog.replace_services(services);
            node.catalog.replace_slices(slices);
        }
        node.catch_up();
        node
    }
}

/// The Services that an event may concern: the slice's before and after.
fn concerned(world: &World, event: &Event) -> Option<BTreeSet<String>> {
    let Event::Slice(n, object) = event else { return None };
    let of = |object: &Value| {
        let name = &object["metadata"]["labels"]["kubernetes.io/service-name"];
        format!("n/{}", name.as_str().unwrap_or_default())
    };
    Some(object.iter().chain(world.slices.get(n)).map(of).collect())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn any_script_ends_where_a_new_catalog_starts(
        script in prop::collection::vec((any_event(), any::<bool>()), 1..40),
        external_ips in any::<bool>(),
    ) {
        let options = Options { external_ips, ..Options::default() };
        let mut node = Node { catalog: Catalog::new(options.clone()), ..Node::default() };
        let mut world = World::default();
        let mut is_flushed = true;
        for (event, flush) in &script {
            let concerned = concerned(&world, event);
            world.apply(event);
            match event {
                Event::Service(n, object) => match object.clone().and_then(service) {
                    Some(facts) => node.catalog.set_service(facts),
                    None => node.catalog.remove_service(&format!("n/s{n}")),
                },
                Event::Slice(n, object) => match object.clone().and_then(slice) {
                    Some(facts) => node.catalog.set_slice(facts),
                    None => node.catalog.remove_slice(&format!("n/e{n}")),
                },
                Event::Zone(zone) => node.catalog.set_node(in_zone(zone.as_deref())),
                Event::Addresses(_) => node.catalog.set_node_addresses(world.addresses()),
                Event::Relist => {
                    node.catalog.replace_services(world.services());
                    node.catalog.replace_slices(world.slices());
                }
            }
            if *flush {
                let whose = node.catch_up();
                if let (true, Some(concerned)) = (is_flushed, concerned) {
                    prop_assert!(whose.is_subset(&concerned), "{:?} {:?}", whose, concerned);
                }
                if let (true, Event::Relist) = (is_flushed, event) {
                    prop_assert!(whose.is_empty(), "{:?}", whose);
                }
            }
            is_flushed = *flush;
        }
        node.catch_up();
        let kept = node.catalog.lists().map(|(key, list)| (key.clone(), list.clone()));
        prop_assert_eq!(&node.lists, &kept.collect::<BTreeMap<_, _>>());
        for backwards in [false, true] {
            let scratch = world.scratch(options.clone(), backwards);
            prop_assert_eq!(&node.lists, &scratch.lists);
            prop_assert_eq!(node.problems(), scratch.problems());
        }
        // All of it goes.
        node.catalog.replace_services([]);
        node.catalog.replace_slices([]);
        node.catch_up();
        prop_assert!(node.lists.is_empty() && node.problems().is_empty());
        prop_assert!(node.catalog.is_empty(), "{:?}", node.catalog);
    }
}
