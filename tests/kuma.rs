//! Kuma's rules, where they differ from Istio's. Its DNS is in dns.rs.

mod common;

use common::*;
use sidestep_lab::wait_for;

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
        ("traffic.kuma.io/exclude-inbound-ports", "8080-8081", [false, false]),
        ("traffic.kuma.io/exclude-inbound-ports", "8081", [true, true]),
        ("kuma.io/gateway", "enabled", [false, false]),
        ("kuma.io/gateway", "disabled", [true, true]),
    ] {
        set(&node, key, text);
        node.becomes(&format!("{key}={text}: {expected:?}"), || steered() == expected);
    }
}
