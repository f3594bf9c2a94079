//! Rows T1 to T13: what connect() in an enrolled pod does, seen from both ends.

mod common;

use std::time::Duration;

use common::*;
use sidestep_lab::{Pod, PodNet, Seen, wait_for, wait_until};

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
        let (localhost, other) = if own.is_ipv4() {
            ("127.0.0.1", &answer.seen.orig6)
        } else {
            ("::1", &answer.seen.orig)
        };
        assert_eq!(answer.seen.local, addr(ip(localhost), 15001), "the proxy's getsockname");
        assert!(matches!(other, Some(Err(_))), "of the other family: {answer:?}");
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
    for (target, localhost) in
        [("0.0.0.0", "127.0.0.1"), ("::", "::1"), ("::ffff:0.0.0.0", "127.0.0.1")]
    {
        let app = node.a.serve(addr(ip(localhost), 8080), APP, APP).expect("app");
        for uid in [APP, PROXY] {
            let answer = node.a.ask(uid, uid, addr(ip(target), 8080)).expect("direct");
            assert_eq!(answer.seen.orig, None, "answered by the app: {answer:?}");
        }
        drop(app);
    }
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
fn t5_the_unspecified_address_is_the_one_that_the_proxy_is_bound_to() {
    let node = Node::enrolled("t5any");
    let _sidecar = Sidecar::start(&node.a);
    for (own, unspecified) in [(node.a.ipv4(), "0.0.0.0"), (node.a.ipv6(), "::")] {
        let answer = node
            .a
            .run(PROXY, PROXY, || sidestep_lab::ask(addr(ip(unspecified), 8080), Some(own)))
            .expect("runs")
            .expect("captured");
        assert_original(&answer, addr(own, 8080));
        assert_eq!(answer.seen.local.port(), 15006);
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
    // What calls ::6 and is not bound calls from there.
    let app = node.a.serve(addr(ip("::"), 8080), APP, APP).expect("app");
    let answer = node.a.ask(PROXY, PROXY, addr(ip("::6"), 8080)).expect("direct");
    assert_eq!((answer.seen.orig, answer.seen.peer.ip()), (None, ip("::6")));
    drop(app);
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
        let server = node.lab.on_node(|| udp(canonical)).expect("runs");
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

/// A7.
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

/// A6.
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
        sidestep_lab::wait_until(&what, SOON, || captured(node, target) == wanted)
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
        if key == "excludeInterfaces" && kernel_before(5, 17) {
            continue; // refused there: inbound.rs
        }
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

#[test]
fn nothing_but_the_kernel_answers_for_multicast() {
    let node = Node::enrolled("multicast");
    let _sidecar = Sidecar::start(&node.a);
    for target in ["224.0.0.1", "239.1.2.3", "255.255.255.255", "ff02::1", "::ffff:224.0.0.1"] {
        node.a.ask(APP, APP, addr(ip(target), 80)).expect_err("TCP cannot connect there");
    }
}

#[test]
fn a_family_that_is_not_captured_is_direct() {
    let node = Node::with_manifest("family", istio_v4_first);
    let _sidecar = Sidecar::start(&node.a);
    let [(v4, _), (v6, _), (mapped, _)] = remotes(&node.a, 80);
    let _remote = node.remote(v6);
    assert_eq!(node.a.ask(APP, APP, v6).expect("direct").seen.orig, None);
    for target in [v4, mapped] {
        assert_original(&node.a.ask(APP, APP, target).expect("captured"), target);
    }
}

#[test]
fn a_socket_bound_to_lo_is_direct() {
    let node = Node::enrolled("lo");
    let _sidecar = Sidecar::start(&node.a);
    // Behind lo, and yet no address of the pod's.
    node.a.ip("route add local 10.99.0.0/24 dev lo").expect("a route");
    let _app = node.a.serve(addr(ip("0.0.0.0"), 8080), APP, APP).expect("app");
    let target = addr(ip("10.99.0.1"), 8080);
    let bound = |uid| {
        node.a
            .run(uid, uid, || {
                let socket =
                    socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None)
                        .expect("a socket");
                socket.bind_device(Some(b"lo")).expect("SO_BINDTODEVICE");
                socket.connect(&target.into()).expect("connected");
                greeting(&std::net::TcpStream::from(socket))
            })
            .expect("runs")
    };
    assert_eq!(bound(APP).orig, None, "answered by the app");
    assert_original_seen(&bound(PROXY), target);
    // The same call of the proxy from a socket that is not bound is no call over lo to policy,
    // but it comes from the very address that it goes to.
    assert_eq!(node.a.ask(PROXY, PROXY, target).expect("direct").seen.orig, None);
}

#[track_caller]
fn assert_original_seen(seen: &Seen, target: std::net::SocketAddr) {
    assert_eq!(seen.original(), Some(target), "{seen}");
}

#[test]
fn loopback_is_captured_where_the_include_ranges_name_it() {
    let key = "traffic.sidecar.istio.io/includeOutboundIPRanges";
    let manifest = |pod: &Pod| annotated(pod.manifest(), key, "127.0.0.0/8");
    let node = Node::with_manifest("included", manifest);
    let _sidecar = Sidecar::start(&node.a);
    let target = addr(ip("127.0.0.2"), 8080);
    let answer = node.a.ask(APP, APP, target).expect("captured");
    assert_original(&answer, target);
    assert_eq!(answer.seen.local.port(), 15001);
    // But never localhost itself.
    let _app = node.a.serve(addr(ip("127.0.0.1"), 8080), APP, APP).expect("app");
    let answer = node.a.ask(APP, APP, addr(ip("127.0.0.1"), 8080)).expect("direct");
    assert_eq!(answer.seen.orig, None);
    // The proxy's group is then treated as the proxy is.
    let own = addr(node.a.ipv4(), 8080);
    let answer = node.a.ask(APP, PROXY, own).expect("captured");
    assert_original(&answer, own);
    assert_eq!(answer.seen.local.port(), 15006);
}

#[test]
fn included_ports_add_to_the_included_ranges() {
    let prefix = "traffic.sidecar.istio.io/";
    let node = Node::with_manifest("ports", |pod| {
        let ranges = annotated(pod.manifest(), &format!("{prefix}includeOutboundIPRanges"), "");
        annotated(ranges, &format!("{prefix}includeOutboundPorts"), "80,443")
    });
    let _sidecar = Sidecar::start(&node.a);
    for (port, expected) in [(80, true), (443, true), (81, false), (20480, false)] {
        for (target, _) in remotes(&node.a, port) {
            node.lab.add_node_address(canonical(target).ip()).ok();
            assert_eq!(node.a.ask(APP, APP, target).is_ok(), expected, "{target}");
        }
    }
}

#[test]
fn a_redirect_without_its_state_gets_no_answer() {
    // The addresses that captured connections are sent to, dialled by hand.
    let node = Node::enrolled("lost");
    let _sidecar = Sidecar::start(&node.a);
    for (uid, via) in [(APP, "127.128.1.1"), (PROXY, "fd53:6964:6573:7465::1:1")] {
        let answer = node.a.ask(uid, uid, addr(ip(via), 15001)).expect("direct");
        assert_eq!(answer.seen.original(), None, "{answer:?}");
    }
    // Who calls the listener by its own address has lost nothing.
    node.a.ask(APP, APP, addr(ip("127.0.0.1"), 15001)).expect("direct");
    assert_eq!(node.counter("istio", "handover_missed"), 2);
}

#[test]
fn every_decision_is_counted() {
    let node = Node::enrolled("counted");
    let _sidecar = Sidecar::start(&node.a);
    let counters = [
        "captured_outbound",
        "captured_self",
        "captured_dns",
        "direct",
        "steered_inbound",
        "refused_no_listener",
        "origdst_answered",
    ];
    let count = || counters.map(|name| node.counter("istio", name));
    let (before, passed) = (count(), node.counter("istio", "passed_inbound"));
    let own = addr(node.a.ipv4(), 8080);
    node.a.ask(APP, APP, addr(ip(REMOTE4), 80)).expect("captured");
    node.a.ask(PROXY, PROXY, own).expect("captured");
    node.a.ask(APP, APP, own).expect_err("direct, and nothing listens");
    let probe = |port| node.lab.on_node(|| sidestep_lab::ask(addr(own.ip(), port), None));
    probe(8080).expect("runs").expect("steered");
    probe(15021).expect("runs").expect_err("exempt, and nothing listens");
    // Each accepted connection is asked in both families, and one of them answers.
    let expected = [1, 1, 0, 1, 1, 0, 3];
    for (n, (name, after)) in counters.iter().zip(count()).enumerate() {
        assert_eq!(after - before[n], expected[n], "{name}");
    }
    // From the pod itself: one redirected, one to its own port, one refused; and one exempt.
    assert!(node.counter("istio", "passed_inbound") >= passed + 4);
}

#[test]
fn a_call_within_the_pod_leaves_by_lo_whatever_the_routes_say() {
    let key = "traffic.sidecar.istio.io/excludeInterfaces";
    let node = Node::with_manifest("within", |pod| annotated(pod.manifest(), key, "eth0"));
    let _sidecar = Sidecar::start(&node.a);
    for target in addresses(&node.a, 8080) {
        let answer = node.a.ask(PROXY, PROXY, target).expect("captured");
        assert_original(&answer, target);
        assert_eq!(answer.seen.local.port(), 15006);
    }
}

#[test]
fn a_call_from_loopback_off_the_pod_fails_as_the_kernel_has_it() {
    let node = Node::enrolled("martian");
    let _sidecar = Sidecar::start(&node.a);
    for (source, target) in
        [("127.0.0.1", addr(ip(REMOTE4), 80)), ("::ffff:127.0.0.1", mapped(addr(ip(REMOTE4), 80)))]
    {
        let asked = node.a.run(APP, APP, || sidestep_lab::ask(target, Some(ip(source))));
        let error = asked.expect("runs").expect_err("no such source out there");
        assert!(format!("{error:#}").contains("Invalid argument"), "{error:#}");
    }
}

/// F71: the kernel sends packets from loopback off the pod where this sysctl is set.
#[test]
fn f71_a_call_from_loopback_off_the_pod_is_captured_where_the_kernel_lets_it_out() {
    for device in ["all", "eth0"] {
        let node = Node::new(&format!("localnet-{device}"));
        let key = format!("net.ipv4.conf.{device}.route_localnet");
        node.a.sysctl(&key, "1").expect("a sysctl");
        let mut node = node;
        node.agent.add_pod(&node.a).expect("manifest a");
        node.agent.wait_enrolled(&node.a).expect("enrolled");
        let _sidecar = Sidecar::start(&node.a);
        let target = addr(ip(REMOTE4), 80);
        let ask = |target, source| {
            node.a.run(APP, APP, || sidestep_lab::ask(target, Some(ip(source)))).expect("runs")
        };
        for (source, target) in
            [("127.0.0.1", target), ("127.0.0.9", target), ("::ffff:127.0.0.1", mapped(target))]
        {
            let answer = ask(target, source).expect("captured");
            assert_original(&answer, target);
            assert_eq!(answer.seen.local.port(), 15001);
            assert_eq!(answer.seen.peer.ip().to_canonical(), ip(source).to_canonical());
        }
        // Within a round of the agent's the kernel has the last word again.
        node.a.sysctl(&key, "0").expect("a sysctl");
        wait_until("127.0.0.1 to stay within the pod", SOON, || ask(target, "127.0.0.1").is_err())
            .expect("refused");
    }
}
