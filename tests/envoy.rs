//! The main job, with the real Envoy: every byte through both sidecars, no iptables rule.

mod common;

use std::net::{IpAddr, SocketAddr};

use common::*;
use sidestep_lab::{Envoy, EnvoyOpts, ServeOpts, Server, Talk, http_get, iptables, wait_for};

struct Mesh {
    node: Node,
    a: Envoy,
    b: Envoy,
    app: Server,
}

fn mesh(tag: &str) -> Mesh {
    let node = Node::enrolled(tag);
    let a = Envoy::start(&node.a, EnvoyOpts::default()).expect("Envoy a");
    let b = Envoy::start(&node.b, EnvoyOpts::default()).expect("Envoy b");
    let listen = ["0.0.0.0:8080", "[::]:8080"].map(|at| at.parse().expect("an address"));
    let opts = ServeOpts { talk: Talk::Echo, uid: APP, gid: APP, ..ServeOpts::on(listen) };
    let app = Server::start(&node.b, opts).expect("app");
    Mesh { node, a, b, app }
}

/// One request from pod a to the app in pod b, and what every hop saw of it.
fn call_is_seen_by_both(mesh: &Mesh, target: SocketAddr, passthrough: &str) {
    let from = &mesh.node.a;
    let answer = from.run(APP, APP, || http_get(target)).expect("runs").expect("answered");
    assert_eq!(answer.peer, target, "the client is told what it dialled");
    let dialled = canonical(target);
    let client = canonical(answer.local);
    let own: IpAddr = if dialled.is_ipv4() { from.ipv4() } else { from.ipv6() };
    assert_eq!(client.ip(), own);

    // An earlier call may have had one of its ports; all of them, none had.
    let (out, inbound) = wait_for("the call in both sidecars", SOON, || {
        let inbound = mesh.b.access_log().expect("a log of lines");
        let mut outs = mesh.a.access_log().expect("a log of lines").into_iter();
        outs.find_map(|out| {
            let hop = out.upstream_local.map(canonical)?;
            let it = inbound.iter().find(|line| {
                canonical(line.downstream_remote) == hop
                    && line.upstream_local.map(canonical) == Some(answer.seen.peer)
            })?;
            (canonical(out.downstream_remote) == client).then(|| (out, it.clone()))
        })
    })
    .unwrap_or_else(|error| {
        panic!("{error:#}: {answer:?}: {:?}, {:?}", mesh.a.access_log(), mesh.b.access_log())
    });
    assert_eq!(out.listener, "virtualOutbound");
    assert_eq!(canonical(out.downstream_local), dialled, "the original destination");
    assert_eq!(out.upstream_host.map(canonical), Some(dialled));
    let hop = out.upstream_local.map(canonical).expect("an upstream connection");
    assert_eq!(hop.ip(), own, "the sidecar calls from the pod's address");
    assert_eq!(inbound.listener, "virtualInbound");
    assert_eq!(canonical(inbound.downstream_local), dialled, "the original destination");
    assert_eq!(answer.seen.peer.ip(), ip(passthrough), "the app is called by its sidecar");
}

#[test]
fn a_call_passes_both_sidecars() {
    let mesh = mesh("envoy");
    let b = &mesh.node.b;
    for _ in 0..20 {
        call_is_seen_by_both(&mesh, addr(b.ipv4(), 8080), "127.0.0.6");
        call_is_seen_by_both(&mesh, addr(b.ipv6(), 8080), "::6");
        call_is_seen_by_both(&mesh, mapped(addr(b.ipv4(), 8080)), "127.0.0.6");
    }
    assert_eq!(mesh.app.seen().len(), 60);
    for pod in [&mesh.node.a, b] {
        let rules = iptables::ruleset(pod).expect("rules");
        assert!(!rules.contains("-A ") && !rules.contains("chain"), "{rules}");
    }
}

#[test]
fn the_sidecars_call_to_its_own_pod_comes_back_in() {
    // T5, then T6: from the sidecar's user to the pod's own address.
    let mesh = mesh("self");
    let b = &mesh.node.b;
    for (target, passthrough) in [
        (addr(b.ipv4(), 8080), "127.0.0.6"),
        (addr(b.ipv6(), 8080), "::6"),
        (mapped(addr(b.ipv4(), 8080)), "127.0.0.6"),
    ] {
        let answer = b.run(PROXY, PROXY, || http_get(target)).expect("runs");
        let answer = answer.unwrap_or_else(|error| {
            let status = mesh.node.agent.status();
            panic!("{target}: {error:#}: {:?}, {status:?}", mesh.b.access_log())
        });
        assert_eq!(answer.seen.peer.ip(), ip(passthrough), "the app is called by its sidecar");
        let client = canonical(answer.local);
        assert_eq!(client.ip(), target.ip().to_canonical());
        let line = mesh
            .b
            .wait_log("the call in the sidecar", |l| canonical(l.downstream_remote) == client)
            .expect("logged");
        assert_eq!(line.listener, "virtualInbound");
        assert_eq!(canonical(line.downstream_local), canonical(target));
    }
}

#[test]
fn a_sidecar_that_is_killed_and_comes_back() {
    let mut mesh = mesh("killed");
    let target = addr(mesh.node.b.ipv4(), 8080);
    for _ in 0..2 {
        call_is_seen_by_both(&mesh, target, "127.0.0.6");
        let served = mesh.app.seen().len();
        mesh.b.kill();
        let error = mesh
            .node
            .lab
            .on_node(|| http_get(target))
            .expect("runs")
            .expect_err("refused, not plain text to the app");
        assert!(format!("{error:#}").contains("refused"), "{error:#}");
        assert_eq!(mesh.app.seen().len(), served);
        mesh.b = Envoy::start(&mesh.node.b, EnvoyOpts::default()).expect("Envoy b");
    }
    call_is_seen_by_both(&mesh, target, "127.0.0.6");
}

#[test]
fn a_sidecar_older_than_the_agent() {
    let mut node = Node::new("older");
    let a = Envoy::start(&node.a, EnvoyOpts::default()).expect("Envoy a");
    let b = Envoy::start(&node.b, EnvoyOpts::default()).expect("Envoy b");
    let listen = ["0.0.0.0:8080", "[::]:8080"].map(|at| at.parse().expect("an address"));
    let opts = ServeOpts { talk: Talk::Echo, uid: APP, gid: APP, ..ServeOpts::on(listen) };
    let app = Server::start(&node.b, opts).expect("app");
    for pod in [&node.a, &node.b] {
        node.agent.add_pod(pod).expect("a manifest");
    }
    node.agent.wait_enrolled(&node.a).expect("enrolled");
    node.agent.wait_enrolled(&node.b).expect("enrolled");
    let mesh = Mesh { node, a, b, app };
    call_is_seen_by_both(&mesh, addr(mesh.node.b.ipv4(), 8080), "127.0.0.6");
    call_is_seen_by_both(&mesh, addr(mesh.node.b.ipv6(), 8080), "::6");
}
