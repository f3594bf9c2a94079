//! Linkerd's rules, where they differ from Istio's.

mod common;

use common::*;
use sidestep_lab::{ServeOpts, Server, Talk};

/// The sidecar's user and group.
const LINKERD: u32 = 2102;

fn serve<const N: usize>(node: &Node, listen: [&str; N]) -> Server {
    let listen = listen.map(|at| at.parse().expect("an address"));
    let opts = ServeOpts { talk: Talk::OriginalDst, ..ServeOpts::on(listen) };
    Server::start(&node.a, ServeOpts { uid: LINKERD, gid: LINKERD, ..opts }).expect("a listener")
}

/// Outbound on localhost alone, inbound everywhere.
fn sidecar(node: &Node) -> [Server; 2] {
    [serve(node, ["127.0.0.1:4140", "[::1]:4140"]), serve(node, ["0.0.0.0:4143", "[::]:4143"])]
}

fn set(node: &Node, key: &str, text: &str) {
    let manifest = annotated(linkerd(&node.a), &format!("config.linkerd.io/{key}"), text);
    node.agent.add_manifest("a", &manifest).expect("a manifest");
}

#[test]
fn an_outbound_listener_on_localhost_alone_is_reached() {
    let node = Node::with_manifest("out", linkerd);
    let _sidecar = sidecar(&node);
    // Its group alone exempts nobody.
    for gid in [APP, LINKERD] {
        for (target, own) in remotes(&node.a, 80) {
            let answer = node.a.ask(APP, gid, target).expect("captured");
            assert_original(&answer, target);
            assert_eq!(answer.seen.peer.ip().to_canonical(), own, "the proxy's peer");
            assert_eq!(answer.peer, target, "the app's getpeername");
            let localhost = if own.is_ipv4() { "127.0.0.1" } else { "::1" };
            assert_eq!(answer.seen.local, addr(ip(localhost), 4140));
        }
    }
    assert_eq!(node.counter("linkerd", "captured_outbound"), 6);
    // Whoever dials the listener itself finds it where it is, and nowhere else.
    for own in addresses(&node.a, 4140) {
        node.a.ask(APP, APP, own).expect_err("not listening there");
    }
    for target in ["127.0.0.1", "::1"].map(|at| addr(ip(at), 4140)) {
        assert_original(&node.a.ask(APP, APP, target).expect("direct"), target);
    }
}

#[test]
fn an_outbound_listener_older_than_the_agent_is_reached() {
    let mut node = Node::new("older");
    let _sidecar = sidecar(&node);
    node.agent.add_manifest("a", &linkerd(&node.a)).expect("a manifest");
    node.agent.wait_enrolled(&node.a).expect("enrolled");
    for (target, _) in remotes(&node.a, 80) {
        assert_original(&node.a.ask(APP, APP, target).expect("captured"), target);
    }
}

#[test]
fn l3_l4_the_proxy_is_direct_and_so_is_its_own_pod() {
    let node = Node::with_manifest("proxy", linkerd);
    let _sidecar = sidecar(&node);
    for target in addresses(&node.a, 8080) {
        let app = node.a.serve(any(target, 8080), APP, APP).expect("app");
        let answer = node.a.ask(LINKERD, LINKERD, target).expect("direct");
        assert_eq!(answer.seen.orig, None, "answered by the app: {answer:?}");
        drop(app);
    }
    for (target, own) in remotes(&node.a, 80) {
        let server = node.remote(canonical(target));
        let answer = node.a.ask(LINKERD, LINKERD, target).expect("direct");
        assert_eq!(answer.seen.orig, None, "answered by the remote server: {answer:?}");
        assert_eq!(answer.seen.peer.ip(), own);
        drop(server);
    }
}

#[test]
fn skipped_outbound_ports_and_ranges() {
    let node = Node::with_manifest("skipout", linkerd);
    let _sidecar = sidecar(&node);
    // Nothing listens at the remote addresses: what is not captured is refused.
    for (target, _) in remotes(&node.a, 0) {
        node.lab.add_node_address(canonical(target).ip()).ok();
    }
    set(&node, "skip-outbound-ports", "443,8001-8006");
    for (port, direct) in
        [(443, true), (444, false), (8000, false), (8001, true), (8006, true), (8007, false)]
    {
        for (target, _) in remotes(&node.a, port) {
            node.becomes(&format!("{target} to be direct: {direct}"), || {
                node.a.ask(APP, APP, target).is_err() == direct
            });
        }
    }
}

#[test]
fn inbound_goes_to_the_proxy_but_for_skipped_ports_and_subnets() {
    let node = Node::with_manifest("skipin", linkerd);
    let _sidecar = sidecar(&node);
    let _app = node.a.serve(addr(ip("0.0.0.0"), 8080), APP, APP).expect("app");
    let target = addr(node.a.ipv4(), 8080);
    let steered = || {
        let pod = node.b.ask(0, 0, target).expect("answered").seen;
        let probe = node.lab.on_node(|| sidestep_lab::ask(target, None)).expect("runs");
        [pod, probe.expect("answered").seen].map(|seen| seen.orig.is_some())
    };
    assert_eq!(steered(), [true, true]);
    set(&node, "skip-subnets", "10.77.0.1/32");
    node.becomes("the node alone to be let through", || steered() == [true, false]);
    set(&node, "skip-inbound-ports", "8079-8081");
    node.becomes("the port to be let through", || steered() == [false, false]);
    set(&node, "skip-inbound-ports", "8081");
    node.becomes("another port to change nothing", || steered() == [true, true]);
}

#[test]
fn f11_an_id_that_is_not_above_zero_exempts_nobody() {
    let node = Node::with_manifest("zero", |a| {
        let manifest = annotated(linkerd(a), "config.linkerd.io/proxy-uid", "0");
        annotated(manifest, "config.linkerd.io/proxy-gid", "0")
    });
    let _sidecar = sidecar(&node);
    for (target, _) in remotes(&node.a, 80) {
        for id in [0, APP, LINKERD] {
            let answer = node.a.ask(id, id, target).expect("captured");
            assert_original(&answer, target);
            assert_eq!(answer.seen.local.port(), 4140, "user and group {id}");
        }
    }
    // -1 is the charts' word for no group, and no mistake.
    set(&node, "proxy-gid", "-1");
    node.lab.add_node_address(ip(REMOTE4)).expect("an address that refuses");
    node.becomes("the usual user to be direct again", || {
        node.a.ask(LINKERD, APP, addr(ip(REMOTE4), 80)).is_err()
    });
    assert!(!node.agent.log().contains("proxy-gid"), "{}", node.agent.log());
}

#[test]
fn f66_what_is_no_port_is_skipped_and_the_pod_is_told() {
    let node = Node::with_manifest("skipped", linkerd);
    let _sidecar = sidecar(&node);
    let _app: Vec<_> = [80, 443, 8080]
        .map(|port| node.a.serve(addr(ip("0.0.0.0"), port), APP, APP).expect("app"))
        .into();
    let steered = || {
        [80, 443, 8080].map(|port| {
            let target = addr(node.a.ipv4(), port);
            node.b.ask(0, 0, target).expect("answered").seen.orig.is_some()
        })
    };
    set(&node, "skip-inbound-ports", "80, 443,https,8080");
    node.becomes("the items that are ports to hold", || steered() == [false, true, false]);
    node.agent.wait_log("skip-inbound-ports").expect("said");
    let log = node.agent.log();
    let line = log.lines().find(|line| line.contains("skip-inbound-ports")).expect("a line");
    for named in ["pod lab/a", " 443", "https"] {
        assert!(line.contains(named), "{named} is not in {line}");
    }
}

/// L8 as Linkerd has it with IPv6 on: what linkerd-network-validator dials and listens on.
#[test]
fn l8_the_validator_of_a_dual_stack_mesh_reaches_itself() {
    let node = Node::with_manifest("validator", linkerd);
    let listen = ["[::]:4140".parse().expect("an address")];
    let opts = ServeOpts { uid: 65534, gid: 65534, ..ServeOpts::on(listen) };
    let _validator = Server::start(&node.a, ServeOpts { v6_only: false, ..opts }).expect("starts");
    for target in ["[fd00::1]:20001", "1.1.1.1:20001"].map(|at| at.parse().expect("an address")) {
        let answer = node.a.ask(65534, 65534, target).expect("reaches its own listener");
        assert_eq!(answer.seen.local.port(), 4140, "{target}");
    }
}
