//! Kuma's rules, where they differ from Istio's. Its DNS is in dns.rs.

mod common;

use common::*;
use sidestep_lab::{Server, Talk, wait_for};

/// The sidecar's user and group.
const KUMA: u32 = 5678;

fn set(node: &Node, key: &str, text: &str) {
    node.agent.add_manifest("a", &annotated(kuma(&node.a), key, text)).expect("a manifest");
}

/// Whether the app's call to this port off the pod is captured. Nothing listens there: what is
/// not captured is refused.
fn captured(node: &Node, uid: u32, port: u16) -> bool {
    // A change of policy may come in between.
    wait_for("all kinds of address to agree", SOON, || {
        let all = remotes(&node.a, port).map(|(target, _)| {
            node.lab.add_node_address(canonical(target).ip()).ok();
            node.a.ask(uid, uid, target).is_ok()
        });
        (all[0] == all[1] && all[0] == all[2]).then_some(all[0])
    })
    .expect("one answer")
}

#[test]
fn the_app_is_captured_the_proxy_is_not_and_its_group_exempts_nobody() {
    let node = Node::with_manifest("rows", kuma);
    let _sidecar = Sidecar::start(&node.a);
    for (target, own) in remotes(&node.a, 80) {
        for gid in [APP, KUMA] {
            let answer = node.a.ask(APP, gid, target).expect("captured");
            assert_original(&answer, target);
            assert_eq!(answer.seen.peer.ip().to_canonical(), own);
            assert_eq!(answer.seen.local.port(), 15001);
        }
    }
    assert!(!captured(&node, KUMA, 80), "the proxy");
    for target in addresses(&node.a, 8080) {
        let answer = node.a.ask(KUMA, KUMA, target).expect("captured");
        assert_original(&answer, target);
        assert_eq!(answer.seen.local.port(), 15006, "its own pod");
    }
}

#[test]
fn excluded_ports_of_users() {
    let node = Node::with_manifest("users", kuma);
    let _sidecar = Sidecar::start(&node.a);
    assert!(captured(&node, 1000, 80));
    let key = "traffic.kuma.io/exclude-outbound-ports-for-uids";
    set(&node, key, "tcp:80-90,443:1000-1999;udp:81:3000;4000");
    node.becomes("port 80 of user 1000 to be excluded", || !captured(&node, 1000, 80));
    for (uid, port, expected) in [
        (1000, 90, false),
        (1999, 443, false),
        (1000, 91, true),
        (999, 80, true),
        (2000, 80, true),
        (3000, 81, true),
        (4000, 12345, false),
    ] {
        assert_eq!(captured(&node, uid, port), expected, "user {uid}, port {port}");
    }
    set(&node, key, "TCP:82:1000");
    node.becomes("port 82 alone to be excluded", || !captured(&node, 1000, 82));
    node.becomes("port 80 to be captured again", || captured(&node, 1000, 80));
}

#[test]
fn excluded_addresses_beat_the_way_back_to_the_pod_itself() {
    let node = Node::with_manifest("ips", kuma);
    let _sidecar = Sidecar::start(&node.a);
    let _app = node.a.serve(addr(ip("0.0.0.0"), 8080), APP, APP).expect("app");
    let own = addr(node.a.ipv4(), 8080);
    let comes_in = || node.a.ask(KUMA, KUMA, own).expect("answered").seen.orig.is_some();
    assert!(comes_in());
    set(&node, "traffic.kuma.io/exclude-outbound-ips", &format!("10.96.0.0/16,{}", own.ip()));
    node.becomes("the proxy's call to be direct", || !comes_in());
    node.lab.add_node_address(ip(REMOTE4)).expect("an address that refuses");
    node.a.ask(APP, APP, addr(ip(REMOTE4), 80)).expect_err("direct");
}

#[test]
fn inbound_with_exclusions_and_in_a_gateway() {
    let node = Node::with_manifest("inbound", kuma);
    let _sidecar = Sidecar::start(&node.a);
    let _app = node.a.serve(addr(ip("0.0.0.0"), 8080), APP, APP).expect("app");
    let target = addr(node.a.ipv4(), 8080);
    let steered = || {
        let pod = node.b.ask(0, 0, target).expect("answered").seen;
        let probe = node.lab.on_node(|| sidestep_lab::ask(target, None)).expect("runs");
        [pod, probe.expect("answered").seen].map(|seen| seen.orig.is_some())
    };
    for (key, text, expected) in [
        ("traffic.kuma.io/exclude-inbound-ips", "10.77.0.1", [true, false]),
        ("traffic.kuma.io/exclude-inbound-ports", "8081, 8080", [false, false]),
        ("traffic.kuma.io/exclude-inbound-ports", "8081", [true, true]),
        ("kuma.io/gateway", "enabled", [false, false]),
        ("kuma.io/gateway", "disabled", [true, true]),
    ] {
        set(&node, key, text);
        node.becomes(&format!("{key}={text}: {expected:?}"), || steered() == expected);
    }
}

/// Whether a call from the node (such as the kubelet's probe) to this port of the pod, IPv4 and
/// IPv6, comes to the sidecar.
fn probed(node: &Node, port: u16) -> [bool; 2] {
    [node.a.ipv4(), node.a.ipv6()].map(|ip| {
        let ask = || sidestep_lab::ask(addr(ip, port), None);
        let answer = node.lab.on_node(ask).expect("runs").expect("answered");
        answer.seen.orig.is_some() || answer.seen.orig6.is_some()
    })
}

#[test]
fn f60_the_probe_proxys_port_is_exempt() {
    let node = Node::with_manifest("probe", kuma);
    let _sidecar = Sidecar::start(&node.a);
    let ports = [9000, 9001, 9123, 9901];
    let _listeners: Vec<_> = ports
        .iter()
        .flat_map(|port| ["0.0.0.0", "::"].map(|at| addr(ip(at), *port)))
        .map(|at| node.a.serve(at, APP, APP).expect("a listener"))
        .collect();
    let all = || ports.map(|port| probed(&node, port));
    let (yes, no) = ([true; 2], [false; 2]);
    assert_eq!(all(), [yes, no, yes, no], "nothing is said");
    let key = "kuma.io/application-probe-proxy-port";
    for (text, expected) in [("9123", [yes, yes, no, no]), ("0", [yes, yes, yes, no])] {
        set(&node, key, text);
        node.becomes(&format!("{key}={text}: {expected:?}"), || all() == expected);
    }
}

#[test]
fn f61_dns_over_tcp_is_direct_and_the_proxys_comes_in() {
    let node =
        Node::with_manifest("tcpdns", |a| annotated(kuma(a), "kuma.io/builtin-dns", "enabled"));
    let _sidecar = Sidecar::start(&node.a);
    let _app = ["0.0.0.0", "::"].map(|at| node.a.serve(addr(ip(at), 53), APP, APP).expect("app"));
    let remote4 = node.remote(addr(ip(REMOTE4), 53));
    let remote6 = node.remote(addr(ip(REMOTE6), 53));
    for uid in [APP, KUMA] {
        for (target, own) in remotes(&node.a, 53) {
            let answer = node.a.ask(uid, uid, target).expect("a server off the pod");
            assert_eq!((answer.seen.orig, answer.seen.peer.ip()), (None, own), "{uid}: {target}");
        }
    }
    assert_eq!((remote4.seen().len(), remote6.seen().len()), (4, 2));
    for target in addresses(&node.a, 53) {
        assert_eq!(node.a.ask(APP, APP, target).expect("direct").seen.orig, None, "{target}");
        let answer = node.a.ask(KUMA, KUMA, target).expect("captured");
        assert_original(&answer, target);
        assert_eq!(answer.seen.local.port(), 15006, "{target}");
    }
}

#[test]
fn f63_the_configuration_of_kuma_3() {
    let key = "traffic.kuma.io/transparent-proxy-config";
    let config = "kumaDPUser: \"7777\"\nredirect:\n  inbound: {port: 15106, excludePorts: [9001]}\n  \
                  outbound: {port: 15101}\n";
    let node = Node::with_manifest("config", |a| annotated(kuma(a), key, config));
    let serve = |port, uid| {
        let listen = ["0.0.0.0", "::"].map(|at| addr(ip(at), port));
        let opts = sidestep_lab::ServeOpts { uid, gid: uid, ..sidestep_lab::ServeOpts::on(listen) };
        let talk = if uid == 7777 { Talk::OriginalDst } else { Talk::Greet };
        Server::start(&node.a, sidestep_lab::ServeOpts { talk, ..opts }).expect("a listener")
    };
    let _sidecar = [serve(15101, 7777), serve(15106, 7777)];
    let _app = [serve(9001, APP), serve(8080, APP)];
    for (target, _) in remotes(&node.a, 80) {
        for uid in [APP, KUMA] {
            let answer = node.a.ask(uid, uid, target).expect("captured");
            assert_original(&answer, target);
            assert_eq!(answer.seen.local.port(), 15101, "user {uid}");
        }
        node.lab.add_node_address(canonical(target).ip()).ok();
        node.a.ask(7777, 7777, target).expect_err("the proxy is direct, and nobody listens");
    }
    assert_eq!((probed(&node, 8080), probed(&node, 9001)), ([true; 2], [false; 2]));
    // With an insertion, TCP to 53 is TCP as any other though DNS is captured.
    let insert = format!("{config}  dns: {{enabled: true, captureAll: true}}\n")
        .replace("{port: 15101}", "{port: 15101, insertRedirectInsteadOfAppend: true}");
    set(&node, key, &insert);
    node.becomes("DNS to be captured", || {
        node.agent.status().expect("status")["pods"][0]["dns_port"] == 15053
    });
    for (target, _) in remotes(&node.a, 53) {
        let answer = node.a.ask(APP, APP, target).expect("captured");
        assert_original(&answer, target);
        assert_eq!(answer.seen.local.port(), 15101);
    }
    // What Kuma would refuse is named, and captures everything.
    set(&node, key, &insert.replace("[9001]", "[9001, nine]"));
    node.becomes("the exclusion to be void", || probed(&node, 9001) == [true; 2]);
    node.agent.wait_log("redirect.inbound.excludePorts").expect("said");
    let log = node.agent.log();
    let line = log.lines().find(|line| line.contains("excludePorts")).expect("a line");
    assert!(line.contains("pod lab/a") && line.contains("nine"), "{line}");
}
