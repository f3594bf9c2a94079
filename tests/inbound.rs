//! Rows I1 to I4: who accepts a connection to an enrolled pod.

mod common;

use std::{
    net::{SocketAddr, TcpListener},
    os::fd::OwnedFd,
    process::{Child, Command},
    time::Duration,
};

use common::*;
use libbpf_rs::MapCore;
use sidestep::dataplane::LAYOUT;
use sidestep_lab::{Agent, Answer, Lab, Pod, PodNet, ServeOpts, Server, Talk, wait_until};

/// Asks from a pod that is in no mesh, and from the node itself (a kubelet's probe).
fn from_outside(node: &Node, target: SocketAddr) -> Vec<anyhow::Result<Answer>> {
    let peer = node.b.ask(0, 0, target);
    let probe = node.lab.on_node(|| sidestep_lab::ask(target, None)).expect("runs");
    vec![peer, probe]
}

/// A node whose first pod alone is enrolled.
fn one_enrolled(tag: &str) -> Node {
    let mut node = Node::new(tag);
    node.agent.add_pod(&node.a).expect("manifest a");
    node.agent.wait_enrolled(&node.a).expect("a is enrolled");
    node
}

fn listener(node: &Node, listen: &str, reuse_port: bool, v6_only: bool) -> Server {
    let listen = [listen.parse().expect("an address")];
    let opts = ServeOpts { talk: Talk::OriginalDst, reuse_port, v6_only, ..ServeOpts::on(listen) };
    Server::start(&node.a, ServeOpts { uid: PROXY, gid: PROXY, ..opts }).expect("a listener")
}

/// Waits until the kernel knows just so many inbound listeners. A socket that was closed here
/// can live on for a moment in a child that another test of this process is just forking.
fn wait_listeners(node: &Node, n: u64) {
    wait_until(&format!("{n} listeners"), SOON, || {
        node.agent.status().expect("status")["pods"][0]["listeners"] == n
    })
    .unwrap_or_else(|error| panic!("{error:#}; {}", node.agent.log_tail()));
}

#[track_caller]
fn assert_steered(node: &Node, target: SocketAddr) {
    for answer in from_outside(node, target) {
        let answer = answer.unwrap_or_else(|e| panic!("{e:#}; {}", node.agent.log_tail()));
        assert_original(&answer, target);
        assert_eq!(canonical(answer.seen.local), canonical(target), "it is its own address");
        assert_eq!(canonical(answer.seen.peer), canonical(answer.local), "the true peer");
        assert_eq!(answer.peer, target);
    }
}

#[test]
fn i1_a_call_to_the_pod_goes_to_the_inbound_listener() {
    let node = one_enrolled("i1");
    let _sidecar = Sidecar::start(&node.a);
    for target in addresses(&node.a, 8080) {
        assert_steered(&node, target);
        let app = node.a.serve(any(target, 8080), APP, APP).expect("app");
        assert_steered(&node, target);
        assert!(app.seen().is_empty(), "nothing came to the app itself");
    }
}

#[test]
fn i2_exempt_ports_are_untouched() {
    let node = one_enrolled("i2");
    let _sidecar = Sidecar::start(&node.a);
    for port in [15008, 15020, 15021, 15090] {
        for target in addresses(&node.a, port) {
            let server = node.a.serve(any(target, port), PROXY, PROXY).expect("a server");
            for answer in from_outside(&node, target) {
                assert_eq!(answer.expect("direct").seen.orig, None, "answered by {port} itself");
            }
            drop(server);
        }
    }
}

#[test]
fn i3_udp_is_untouched() {
    let node = one_enrolled("i3");
    for target in addresses(&node.a, 8080) {
        let server = node.a.run(APP, APP, || udp(any(target, 8080))).expect("runs");
        server.set_read_timeout(Some(Duration::from_millis(100))).expect("timeout");
        let from = if target.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        let socket = node.lab.on_node(|| std::net::UdpSocket::bind(from)).expect("runs");
        let socket = socket.expect("a socket");
        // A datagram may get lost on its way: the first ones wait for the neighbour.
        wait_until("a datagram", Duration::from_secs(5), || {
            socket.send_to(b"x", target).expect("sent");
            server.recv_from(&mut [0; 8]).is_ok()
        })
        .expect("arrived");
    }
}

#[test]
fn i4_with_no_listener_the_call_is_refused_and_never_reaches_the_app() {
    let node = one_enrolled("i4");
    for target in addresses(&node.a, 8080) {
        let app = node.a.serve(any(target, 8080), APP, APP).expect("app");
        for answer in from_outside(&node, target) {
            let error = answer.expect_err("refused");
            assert!(format!("{error:#}").contains("Connection refused"), "{error:#}");
        }
        assert!(app.seen().is_empty());
    }
    let refused = node.agent.status().expect("status")["counters"]["istio"]["refused_no_listener"]
        .as_u64()
        .expect("a counter");
    assert!(refused >= 6, "{refused}");
}

#[test]
fn a_listener_older_than_the_agent_is_found() {
    let mut node = Node::new("older");
    let _sidecar = Sidecar::start(&node.a);
    node.agent.add_pod(&node.a).expect("manifest a");
    node.agent.wait_enrolled(&node.a).expect("a is enrolled");
    for target in addresses(&node.a, 8080) {
        assert_steered(&node, target);
    }
}

#[test]
fn each_of_a_group_older_than_the_agent_is_found() {
    let mut node = Node::new("group");
    let mut workers: Vec<Server> = ["0.0.0.0:15006", "[::]:15006"]
        .into_iter()
        .flat_map(|any| [any; 3])
        .map(|any| listener(&node, any, true, true))
        .collect();
    node.agent.add_pod(&node.a).expect("manifest a");
    node.agent.wait_enrolled(&node.a).expect("a is enrolled");
    wait_listeners(&node, 6);
    // Whichever of a family goes, the others are known: nobody has to be refused first.
    for left in [5, 4] {
        drop(workers.remove(0));
        wait_listeners(&node, left);
        assert_steered(&node, addr(node.a.ipv4(), 8080));
    }
    assert_steered(&node, addr(node.a.ipv6(), 8080));
}

#[test]
fn a_listener_that_many_processes_have_open_is_one_listener() {
    // As many as one address has slots. Where the agent looks through the files of all processes
    // (before Linux 6.4), it comes to the socket once for each.
    const PROCESSES: usize = 8;
    let mut node = Node::new("shared");
    let shared = node
        .a
        .run(PROXY, PROXY, || TcpListener::bind("0.0.0.0:15006"))
        .expect("enters the pod")
        .expect("a listener");
    let mut processes: Vec<Child> = (0..PROCESSES)
        .map(|_| {
            let listener = OwnedFd::from(shared.try_clone().expect("a file"));
            Command::new("sleep").arg("1000").stdin(listener).spawn().expect("sleep")
        })
        .collect();
    let _other = listener(&node, "[::]:15006", true, true);
    node.agent.add_pod(&node.a).expect("manifest a");
    node.agent.wait_enrolled(&node.a).expect("a is enrolled");
    let known = node.agent.status().expect("status")["pods"][0]["listeners"].clone();
    for process in &mut processes {
        process.kill().and_then(|()| process.wait()).expect("is killed");
    }
    assert_eq!(known, 2, "{}", node.agent.log_tail());
}

#[test]
fn a_proxy_that_restarts_is_found_at_once() {
    let node = one_enrolled("restart");
    for _ in 0..5 {
        let sidecar = Sidecar::start(&node.a);
        for target in addresses(&node.a, 8080) {
            assert_steered(&node, target);
        }
        drop(sidecar);
        wait_listeners(&node, 0);
        for answer in from_outside(&node, addr(node.a.ipv4(), 8080)) {
            answer.expect_err("refused while the proxy is away");
        }
    }
}

#[test]
fn a_reuseport_group_shares_the_load_and_survives_any_member() {
    let node = one_enrolled("reuseport");
    for (any, target) in
        [("0.0.0.0:15006", addr(node.a.ipv4(), 8080)), ("[::]:15006", addr(node.a.ipv6(), 8080))]
    {
        wait_listeners(&node, 0);
        let mut workers: Vec<Server> = (0..3).map(|_| listener(&node, any, true, true)).collect();
        for _ in 0..100 {
            assert_steered(&node, target);
        }
        for worker in &workers {
            let share = worker.seen().len();
            assert!(share > 30, "200 connections over 3 workers, one got {share}");
        }
        // The first is the one that is remembered first.
        while workers.len() > 1 {
            drop(workers.remove(0));
            wait_listeners(&node, workers.len() as u64);
            for _ in 0..10 {
                assert_steered(&node, target);
            }
        }
    }
}

#[test]
fn one_dual_stack_listener_takes_both_families() {
    let node = one_enrolled("dual");
    let _inbound = listener(&node, "[::]:15006", false, false);
    for target in addresses(&node.a, 8080) {
        assert_steered(&node, target);
    }
}

#[test]
fn a_listener_that_the_hooks_never_saw_is_found_after_a_refusal() {
    // More workers than are remembered: when all of those close, the rest has to be found.
    let node = one_enrolled("many");
    let target = addr(node.a.ipv4(), 8080);
    let mut workers: Vec<Server> =
        (0..20).map(|_| listener(&node, "0.0.0.0:15006", true, true)).collect();
    assert_steered(&node, target);
    workers.drain(..16);
    wait_until("the last workers to be found", SOON, || node.b.ask(0, 0, target).is_ok())
        .unwrap_or_else(|error| panic!("{error:#}; {}", node.agent.log_tail()));
    assert_steered(&node, target);
}

#[test]
fn a_family_that_is_not_captured_comes_to_the_app() {
    let node = Node::with_manifest("family", istio_v4_first);
    let _sidecar = Sidecar::start(&node.a);
    let [v4, v6, _] = addresses(&node.a, 8080);
    let _app = node.a.serve(v6, APP, APP).expect("app");
    assert_steered(&node, v4);
    for answer in from_outside(&node, v6) {
        assert_eq!(answer.expect("direct").seen.orig, None);
    }
}

#[test]
fn a_listener_for_ipv6_alone_does_not_let_ipv4_through() {
    let node = one_enrolled("v6only");
    let _inbound = listener(&node, "[::]:15006", false, true);
    let [v4, v6, _] = addresses(&node.a, 8080);
    let app = node.a.serve(any(v4, 8080), APP, APP).expect("app");
    assert_steered(&node, v6);
    for answer in from_outside(&node, v4) {
        let error = answer.expect_err("refused");
        assert!(format!("{error:#}").contains("Connection refused"), "{error:#}");
    }
    assert!(app.seen().is_empty());
}

#[test]
fn only_the_proxys_listeners_are_remembered() {
    let mut node = Node::new("remembered");
    // Older than the agent: the proxy's, one of its connections, and somebody else's.
    let sidecar = Sidecar::start(&node.a);
    let _before = node.a.serve(addr(ip("0.0.0.0"), 8080), APP, APP).expect("app");
    let dialled = addr(ip("127.0.0.1"), 15006);
    let _open = node.a.run(APP, APP, || sidestep_lab::connect(dialled, None)).expect("runs");
    sidecar.inbound.wait_seen(1).expect("accepted");
    node.agent.add_pod(&node.a).expect("manifest a");
    node.agent.wait_enrolled(&node.a).expect("a is enrolled");
    // Newer.
    let _after = node.a.serve(addr(ip("0.0.0.0"), 9090), APP, APP).expect("app");
    assert_steered(&node, addr(node.a.ipv4(), 8080));
    assert_eq!(node.map("listeners").keys().count(), 4, "outbound and inbound, of each family");
    assert_eq!(node.agent.status().expect("status")["pods"][0]["listeners"], 2);
}

#[test]
fn excluded_and_included_inbound_ports() {
    let node = one_enrolled("ports");
    let _sidecar = Sidecar::start(&node.a);
    let _app = node.a.serve(any(addr(node.a.ipv4(), 0), 8080), APP, APP).expect("app");
    let _other = node.a.serve(any(addr(node.a.ipv4(), 0), 9090), APP, APP).expect("app");
    let steered = |port| {
        let answer = node.b.ask(0, 0, addr(node.a.ipv4(), port)).expect("answered");
        answer.seen.orig.is_some()
    };
    for (key, value, expected) in [
        ("excludeInboundPorts", "9090", [true, false]),
        ("excludeInboundPorts", "9090,8080", [false, false]),
        ("includeInboundPorts", "8080", [true, false]),
        ("includeInboundPorts", "", [false, false]),
        ("includeInboundPorts", "*", [true, true]),
    ] {
        annotate(&node, key, value);
        let what = format!("{key}={value:?}: {expected:?}");
        wait_until(&what, SOON, || [steered(8080), steered(9090)] == expected)
            .unwrap_or_else(|error| panic!("{error:#}; {}", node.agent.log_tail()));
    }
}

fn annotate(node: &Node, key: &str, value: &str) {
    let mut manifest = node.a.manifest();
    manifest["metadata"]["annotations"][format!("traffic.sidecar.istio.io/{key}")] = value.into();
    node.agent.add_manifest("a", &manifest).expect("a manifest");
}

#[test]
fn excluded_interfaces() {
    let node = one_enrolled("ifs");
    let _sidecar = Sidecar::start(&node.a);
    let _app = node.a.serve(any(addr(node.a.ipv4(), 0), 8080), APP, APP).expect("app");
    let steered = || {
        let answer = node.b.ask(0, 0, addr(node.a.ipv4(), 8080)).expect("answered");
        answer.seen.orig.is_some()
    };
    if kernel_before(5, 17) {
        annotate(&node, "excludeInterfaces", "eth0");
        node.agent
            .wait_log("excludeInterfaces \"eth0\": this kernel cannot tell")
            .expect("refused");
        assert!(steered(), "as it was");
        return;
    }
    for (value, expected) in [("lo,eth0", false), ("eth1", true)] {
        annotate(&node, "excludeInterfaces", value);
        wait_until(&format!("{value:?}: {expected}"), SOON, || steered() == expected)
            .unwrap_or_else(|error| panic!("{error:#}; {}", node.agent.log_tail()));
    }
}

/// F16: the port that was dialled decides, whatever the pod's own rules make of it.
#[test]
fn f16_nat_rules_of_the_pod_do_not_change_which_ports_are_excluded() {
    let key = "traffic.sidecar.istio.io/excludeInboundPorts";
    let mut node = Node::new("nat");
    let own_rules = |pod: &Pod| {
        let to = "tcp dport 80 redirect to :8080; tcp dport 9080 redirect to :9090;";
        let chain = format!("type nat hook prerouting priority -100; {to}");
        pod.nft(&format!("table inet own {{ chain arrives {{ {chain} }}; }}")).expect("rules");
    };
    own_rules(&node.a);
    for pod in [&node.a, &node.b] {
        let manifest = annotated(pod.manifest(), key, "80,9090");
        node.agent.add_manifest(pod.name(), &manifest).expect("a manifest");
    }
    node.agent.wait_enrolled(&node.a).expect("a is enrolled");
    node.agent.wait_enrolled(&node.b).expect("b is enrolled");
    let ask = |to| node.lab.on_node(|| sidestep_lab::ask(to, None)).expect("runs").expect("heard");
    for pod in [&node.a, &node.b] {
        let _sidecar = Sidecar::start(pod);
        let _apps = [8080, 9090].map(|port| {
            [0, 1].map(|n| pod.serve(any(addresses(pod, 0)[n], port), APP, APP).expect("an app"))
        });
        if pod.name() == "b" {
            // Rules that come while the pod runs.
            own_rules(pod);
            let to = addr(pod.ipv4(), 80);
            // The agent looks for such rules every three seconds.
            wait_until("port 80 to be let through", 2 * SOON, || ask(to).seen.orig.is_none())
                .unwrap_or_else(|error| panic!("{error:#}; {}", node.agent.log_tail()));
        }
        for ip in pod.ips() {
            for excluded in [80, 9090] {
                let seen = ask(addr(ip, excluded)).seen;
                assert_eq!(seen.orig, None, "{ip}, port {excluded}: {seen}");
            }
            for captured in [8080, 9080] {
                assert_original(&ask(addr(ip, captured)), addr(ip, captured));
            }
        }
        if kernel_before(6, 6) {
            continue; // there, the filter is no link that a pin holds
        }
        // Not known: captured. And it is put back.
        let links = node.agent.bpffs().join(LAYOUT).join("links");
        let name = format!("dialled-{:x}-", node.cookie(pod));
        let pins = std::fs::read_dir(&links).expect("links").map(|pin| pin.expect("a pin").path());
        let is_filter = |pin: &std::path::PathBuf| pin.to_string_lossy().contains(&name);
        let removed = pins.filter(is_filter).map(std::fs::remove_file).collect::<Vec<_>>();
        assert_eq!(removed.len(), 1, "eth0's: {removed:?}");
        let is_captured = || ask(addr(pod.ipv4(), 80)).seen.orig.is_some();
        wait_until("port 80 to be captured", SOON, is_captured).expect("captured");
        wait_until("the filter to be put back", 2 * SOON, || !is_captured())
            .unwrap_or_else(|error| panic!("{error:#}; {}", node.agent.log_tail()));
    }
}

/// F15: nothing intercepts what a pod forwards for others: it has no socket there. It is told.
#[test]
fn f15_a_pod_that_forwards_packets_is_told_so() {
    let lab = Lab::new("forwards").expect("a lab");
    let [a, inner] = ["a", "inner"].map(|name| lab.pod(name, PodNet::V4).expect("a pod"));
    let agent = Agent::start_flags(binary(), &lab, &["--http", "127.0.0.1:0"]);
    let mut agent = agent.expect("the agent");
    agent.add_pod(&a).expect("manifest a");
    agent.wait_enrolled(&a).expect("a is enrolled");
    // A container in the pod, behind a bridge of the pod's.
    let netns = inner.netns();
    let netns = netns.file_name().and_then(|name| name.to_str()).expect("a name");
    a.ip(&format!("link add docker0 type veth peer name inner0 netns {netns}")).expect("a link");
    for (pod, ip, device) in [(&a, "172.17.0.1", "docker0"), (&inner, "172.17.0.2", "inner0")] {
        pod.add_address(self::ip(ip), 16, device, "").expect("an address");
        pod.ip(&format!("link set {device} up")).expect("up");
    }
    inner.ip("route replace default via 172.17.0.1").expect("a route");
    a.nft("table ip own { chain leaves { type nat hook postrouting priority 100; masquerade; }; }")
        .expect("rules");
    a.sysctl("net.ipv4.ip_forward", "1").expect("forwards");
    let target = addr(ip(REMOTE4), 80);
    lab.add_node_address(target.ip()).expect("an address");
    let _remote = lab.on_node(|| Server::start_here(ServeOpts::on([target]))).expect("runs");
    let seen = inner.ask(APP, APP, target).expect("direct").seen;
    assert_eq!((seen.orig, seen.peer.ip()), (None, a.ipv4()));
    agent.wait_log("pod lab/a: it forwards packets").expect("told");
    let counted = || agent.metric("sidestep_forwarded_packets_total").expect("a metric") > 2.0;
    wait_until("them to be counted", SOON, counted).expect("counted");
}
