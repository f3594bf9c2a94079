//! Rows T1 to T13: what connect() in an enrolled pod does, seen from both ends.

mod common;

use std::time::Duration;

use common::*;
use sidestep_lab::{Pod, PodNet, wait_for};

/// A call of the app off its pod came to the outbound listener, and both ends were told the
/// truth.
#[track_caller]
fn assert_outbound(pod: &Pod, uid: u32, gid: u32, port: u16) {
    for (target, own) in remotes(pod, port) {
        let answer = pod.ask(uid, gid, target).expect("captured");
        assert_original(&answer, target);
        assert_eq!(answer.seen.peer.ip().to_canonical(), own, "the proxy's peer");
        assert_eq!(answer.peer, target, "the app's getpeername");
        assert_eq!(canonical(answer.local), canonical(answer.seen.peer), "the app's getsockname");
        let listener = answer.seen.local;
        assert!(listener.ip().to_canonical().is_loopback(), "the proxy's getsockname: {listener}");
        assert_eq!(listener.port(), 15001);
    }
}

#[test]
fn t1_a_call_off_the_pod_goes_to_the_outbound_listener() {
    let node = Node::enrolled("t1");
    let _sidecar = Sidecar::start(&node.a);
    assert_outbound(&node.a, APP, APP, 80);
}

#[test]
fn t2_own_address_is_direct() {
    let node = Node::enrolled("t2");
    let _sidecar = Sidecar::start(&node.a);
    for target in addresses(&node.a, 8080) {
        let app = node.a.serve(any(target, 8080), APP, APP).expect("app");
        let answer = node.a.ask(APP, APP, target).expect("direct");
        assert_eq!(answer.seen.orig, None, "answered by the app: {answer:?}");
        assert_eq!(answer.seen.local.ip(), target.ip().to_canonical());
        drop(app);
    }
}

#[test]
fn t3_loopback_is_direct() {
    let node = Node::enrolled("t3");
    let _sidecar = Sidecar::start(&node.a);
    for target in ["127.0.0.1", "127.0.0.2", "::1", "::ffff:127.0.0.1"].map(ip) {
        let app = node.a.serve(addr(target.to_canonical(), 8080), APP, APP).expect("app");
        let answer = node.a.ask(APP, APP, addr(target, 8080)).expect("direct");
        assert_eq!(answer.seen.orig, None, "answered by the app: {answer:?}");
        drop(app);
    }
    // The unspecified address is loopback too.
    let app = node.a.serve(addr(ip("127.0.0.1"), 8080), APP, APP).expect("app");
    assert_eq!(node.a.ask(APP, APP, addr(ip("0.0.0.0"), 8080)).expect("direct").seen.orig, None);
    drop(app);
}

#[test]
fn t4_t5_own_service_by_way_of_the_proxy_comes_back_in() {
    let node = Node::enrolled("t4");
    let _sidecar = Sidecar::start(&node.a);
    let _app = node.a.serve(addr(ip("0.0.0.0"), 8080), APP, APP).expect("app");
    assert_outbound(&node.a, APP, APP, 80);
    for target in addresses(&node.a, 8080) {
        let answer = node.a.ask(PROXY, PROXY, target).expect("captured");
        assert_original(&answer, target);
        assert_eq!(answer.seen.peer.ip(), target.ip().to_canonical(), "source is the pod's");
        assert_eq!(answer.seen.local.port(), 15006);
        assert_eq!(answer.peer, target, "the proxy's getpeername");
    }
}

#[test]
fn t6_the_proxys_passthrough_source_reaches_the_app() {
    let node = Node::enrolled("t6");
    let _sidecar = Sidecar::start(&node.a);
    for (source, target) in [
        ("127.0.0.6", addr(node.a.ipv4(), 8080)),
        ("::6", addr(node.a.ipv6(), 8080)),
        ("::ffff:127.0.0.6", mapped(addr(node.a.ipv4(), 8080))),
    ] {
        let app = node.a.serve(any(target, 8080), APP, APP).expect("app");
        let answer = node
            .a
            .run(PROXY, PROXY, || sidestep_lab::ask(target, Some(ip(source))))
            .expect("runs")
            .expect("direct");
        assert_eq!(answer.seen.orig, None, "answered by the app: {answer:?}");
        assert_eq!(answer.seen.peer.ip(), ip(source).to_canonical());
        drop(app);
    }
}

#[test]
fn t7_the_proxy_reaches_localhost() {
    let node = Node::enrolled("t7");
    let _sidecar = Sidecar::start(&node.a);
    for target in ["127.0.0.1", "::1", "::ffff:127.0.0.1"].map(ip) {
        let app = node.a.serve(addr(target.to_canonical(), 8080), APP, APP).expect("app");
        let answer = node.a.ask(PROXY, PROXY, addr(target, 8080)).expect("direct");
        assert_eq!(answer.seen.orig, None, "answered by the app: {answer:?}");
        drop(app);
    }
}

/// Calls from the pod's proxy, or its group, go straight to the node.
#[track_caller]
fn assert_direct(node: &Node, uid: u32, gid: u32) {
    for (target, own) in remotes(&node.a, 80) {
        let canonical = canonical(target);
        node.lab.add_node_address(canonical.ip()).ok();
        let server = node
            .lab
            .on_node(|| sidestep_lab::Server::start_here(sidestep_lab::ServeOpts::on([canonical])))
            .expect("runs")
            .expect("a remote server");
        let answer = node.a.ask(uid, gid, target).expect("direct");
        assert_eq!(answer.seen.orig, None, "answered by the remote server: {answer:?}");
        assert_eq!(answer.seen.peer.ip(), own);
        assert_eq!(answer.seen.local, canonical);
        drop(server);
    }
}

#[test]
fn t8_the_proxy_goes_straight_to_the_network() {
    let node = Node::enrolled("t8");
    let _sidecar = Sidecar::start(&node.a);
    assert_direct(&node, PROXY, PROXY);
}

#[test]
fn t9_the_proxys_group_goes_straight_to_the_network() {
    let node = Node::enrolled("t9");
    let _sidecar = Sidecar::start(&node.a);
    assert_direct(&node, APP, PROXY);
}

#[test]
fn t10_istios_validation_reaches_the_inbound_listener() {
    let node = Node::enrolled("t10");
    let _sidecar = Sidecar::start(&node.a);
    for (source, target) in [
        (Some("127.0.0.1"), "127.0.0.6"),
        (None, "127.0.0.6"),
        (Some("::1"), "::6"),
        (Some("::ffff:127.0.0.1"), "::ffff:127.0.0.6"),
    ] {
        let target = addr(ip(target), 15002);
        let answer = node
            .a
            .run(PROXY, PROXY, || sidestep_lab::ask(target, source.map(ip)))
            .expect("runs")
            .expect("captured");
        assert_original(&answer, target);
        assert_eq!(answer.seen.local.port(), 15006);
        let loopback = if canonical(target).is_ipv4() { "127.0.0.1" } else { "::1" };
        assert_eq!(answer.seen.peer.ip(), ip(loopback));
    }
}

#[test]
fn t12_udp_is_untouched() {
    let node = Node::enrolled("t12");
    for (target, own) in remotes(&node.a, 443) {
        let canonical = canonical(target);
        node.lab.add_node_address(canonical.ip()).ok();
        let server = node.lab.on_node(|| std::net::UdpSocket::bind(canonical)).expect("runs");
        let server = server.expect("a UDP server");
        server.set_read_timeout(Some(Duration::from_millis(100))).expect("timeout");
        let from = node.a.run(APP, APP, || {
            let any = if target.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
            let socket = std::net::UdpSocket::bind(any).expect("a socket");
            socket.connect(target).expect("connected");
            assert_eq!(socket.peer_addr().expect("a peer"), target);
            // A datagram may get lost on its way: the first ones wait for the neighbour.
            wait_for("a datagram", Duration::from_secs(5), || {
                socket.send(b"x").expect("sent");
                server.recv_from(&mut [0; 8]).ok()
            })
        });
        let (_, from) = from.expect("runs").expect("arrived");
        assert_eq!(from.ip(), own);
    }
}

#[test]
fn t13_hbone_is_exempt_inbound_only() {
    let node = Node::enrolled("t13");
    let _sidecar = Sidecar::start(&node.a);
    assert_outbound(&node.a, APP, APP, 15008);
    // From the proxy to its own pod it is never redirected.
    for target in addresses(&node.a, 15008) {
        let app = node.a.serve(any(target, 15008), PROXY, PROXY).expect("HBONE listener");
        assert_eq!(node.a.ask(PROXY, PROXY, target).expect("direct").seen.orig, None);
        drop(app);
    }
}

#[test]
fn a_proxy_that_does_not_listen_refuses_and_is_found_a_moment_later() {
    let node = Node::enrolled("refused");
    for (target, _) in remotes(&node.a, 80) {
        let error = node.a.ask(APP, APP, target).expect_err("refused");
        assert!(format!("{error:#}").contains("Connection refused"), "{error:#}");
    }
    let _sidecar = Sidecar::start(&node.a);
    assert_outbound(&node.a, APP, APP, 80);
}

#[test]
fn annotations_decide_and_changes_take_effect_on_the_next_connection() {
    let mut node = Node::enrolled("annotations");
    let _sidecar = Sidecar::start(&node.a);
    let set = |node: &mut Node, key: &str, value: &str| {
        let mut manifest = node.a.manifest();
        manifest["metadata"]["annotations"][format!("traffic.sidecar.istio.io/{key}")] =
            value.into();
        node.agent.add_manifest("a", &manifest).expect("a manifest");
    };
    let captured = |node: &Node, target| node.a.ask(APP, APP, target).is_ok();
    let becomes = |node: &Node, target, wanted: bool| {
        let what = format!("{target} to be captured: {wanted}");
        let timeout = Duration::from_secs(1);
        sidestep_lab::wait_until(&what, timeout, || captured(node, target) == wanted)
            .unwrap_or_else(|error| panic!("{error:#}; {}", node.agent.log_tail()));
    };
    // Nothing listens at the remote addresses: what is not captured is refused.
    for (target, _) in remotes(&node.a, 80) {
        node.lab.add_node_address(canonical(target).ip()).ok();
    }
    for (key, value, direct) in [
        ("excludeOutboundPorts", "443, 80", 0..3),
        ("excludeOutboundIPRanges", "10.96.0.0/16", 0..1),
        ("excludeOutboundIPRanges", "fd96::/64", 1..2),
        ("excludeOutboundIPRanges", "::/0", 1..2),
        ("includeOutboundIPRanges", "::/0", 0..1),
        ("excludeInterfaces", "eth0", 0..3),
        ("includeOutboundIPRanges", "fd96::/64", 0..1),
        ("includeOutboundIPRanges", "", 0..3),
    ] {
        set(&mut node, key, value);
        for (n, (target, _)) in remotes(&node.a, 80).into_iter().enumerate() {
            let mapped_as_v4 = n == 2 && direct.contains(&0);
            becomes(&node, target, !(direct.contains(&n) || mapped_as_v4));
        }
        node.agent.add_pod(&node.a).expect("a manifest");
        for (target, _) in remotes(&node.a, 80) {
            becomes(&node, target, true);
        }
    }
}

#[test]
fn pods_of_one_family() {
    let mut node = Node::enrolled("family");
    for (v4, v6) in [(true, false), (false, true)] {
        let name = if v4 { "four" } else { "six" };
        let pod = node.lab.pod(name, PodNet { v4, v6 }).expect("a pod");
        node.agent.add_pod(&pod).expect("a manifest");
        node.agent.wait_enrolled(&pod).expect("enrolled");
        let _sidecar = Sidecar::start(&pod);
        let own = if v4 { pod.ipv4() } else { pod.ipv6() };
        let target = addr(ip(if v4 { REMOTE4 } else { REMOTE6 }), 80);
        let answer = pod.ask(APP, APP, target).expect("captured");
        assert_original(&answer, target);
        assert_eq!(answer.seen.peer.ip(), own);
        let inbound = addr(own, 8080);
        let probe = node.lab.on_node(|| sidestep_lab::ask(inbound, None)).expect("runs");
        assert_original(&probe.expect("steered"), inbound);
        // What the pod has no address for fails at once, as it does without a mesh.
        let other = addr(ip(if v4 { REMOTE6 } else { REMOTE4 }), 80);
        let error = pod.ask(APP, APP, other).expect_err("no route");
        assert!(format!("{error:#}").contains("unreachable"), "{error:#}");
    }
}
