//! T11: an app's DNS goes to the sidecar's DNS listener, and answers come from whom it asked.

mod common;

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use common::*;
use libbpf_rs::MapCore;
use sidestep_lab::{ServeOpts, Server, Talk, wait_for, wait_until};

/// Answers datagrams until it is dropped.
struct Responder {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Responder {
    fn start(socket: UdpSocket, answer: impl Fn(&[u8]) -> Vec<u8> + Send + 'static) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&stop);
        socket.set_read_timeout(Some(Duration::from_millis(50))).expect("timeout");
        let thread = thread::spawn(move || {
            let mut question = [0; 512];
            while !told.load(Ordering::Relaxed) {
                if let Ok((len, client)) = socket.recv_from(&mut question) {
                    socket.send_to(&answer(&question[..len]), client).expect("answered");
                }
            }
        });
        Self { stop, thread: Some(thread) }
    }
}

impl Drop for Responder {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.join().expect("its thread");
        }
    }
}

/// The sidecar's DNS listener: on localhost alone, as Istio's agent has it. Echoes.
struct Resolver {
    _udp: [Responder; 2],
    tcp: Server,
}

impl Resolver {
    fn start(node: &Node) -> Self {
        let localhosts = ["127.0.0.1:15053", "[::1]:15053"].map(|at| at.parse().expect("address"));
        let udp = localhosts.map(|at: SocketAddr| {
            let socket = node.a.run(PROXY, PROXY, || udp(at)).expect("runs");
            Responder::start(socket, <[u8]>::to_vec)
        });
        let opts = ServeOpts { talk: Talk::OriginalDst, ..ServeOpts::on(localhosts) };
        let tcp = Server::start(&node.a, ServeOpts { uid: PROXY, gid: PROXY, ..opts });
        Self { _udp: udp, tcp: tcp.expect("a TCP resolver") }
    }
}

/// A node whose first pod has its DNS captured.
fn with_dns(tag: &str) -> Node {
    let mut node = Node::new(tag);
    set(&node, dns_env);
    node.agent.wait_enrolled(&node.a).expect("a is enrolled");
    node
}

fn set(node: &Node, change: impl FnOnce(&mut serde_json::Value)) {
    let mut manifest = node.a.manifest();
    change(&mut manifest);
    node.agent.add_manifest("a", &manifest).expect("a manifest");
}

fn unconnected(like: SocketAddr) -> UdpSocket {
    let any = if like.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let socket = UdpSocket::bind(any).expect("a socket");
    socket.set_read_timeout(Some(patience())).expect("timeout");
    socket
}

fn servers(n: u8) -> Vec<SocketAddr> {
    (1..=n)
        .flat_map(|n| {
            let v4 = addr([10, 96, 53, n], 53);
            [v4, addr(ip(&format!("fd96::53:{n}")), 53), mapped(v4)]
        })
        .collect()
}

#[test]
fn t11_a_connected_socket_is_answered_by_whom_it_asked() {
    let node = with_dns("connected");
    let _resolver = Resolver::start(&node);
    for server in servers(1) {
        node.a
            .run(APP, APP, || {
                let socket = unconnected(server);
                socket.connect(server).expect("connects");
                assert_eq!(socket.peer_addr().expect("a peer"), server);
                let mut answer = [0; 64];
                for _ in 0..3 {
                    socket.send(b"question").expect("sent");
                    let (len, from) = socket.recv_from(&mut answer).expect("answered");
                    assert_eq!((&answer[..len], from), (&b"question"[..], server));
                    socket.send(b"question").expect("sent");
                    assert_eq!(socket.recv(&mut answer).expect("answered"), 8);
                }
            })
            .expect("runs");
    }
}

#[test]
fn t11_an_unconnected_socket_is_answered_by_each_that_it_asked() {
    let node = with_dns("unconnected");
    let _resolver = Resolver::start(&node);
    for kind in 0..3 {
        let servers: Vec<_> = servers(5).into_iter().skip(kind).step_by(3).collect();
        node.a
            .run(APP, APP, || {
                let socket = unconnected(servers[0]);
                // All at once, and again in another order: each answer says whose it is.
                for round in 0..3 {
                    let mut asked: BTreeMap<String, SocketAddr> = BTreeMap::new();
                    for n in 0..servers.len() {
                        let server = servers[(n * (round + 1)) % servers.len()];
                        let question = format!("{round} {server}");
                        socket.send_to(question.as_bytes(), server).expect("sent");
                        asked.insert(question, server);
                    }
                    let mut answer = [0; 64];
                    while !asked.is_empty() {
                        let (len, from) = socket.recv_from(&mut answer).expect("answered");
                        let question = String::from_utf8_lossy(&answer[..len]).into_owned();
                        assert_eq!(asked.remove(&question), Some(from), "{question}");
                    }
                }
            })
            .expect("runs");
    }
}

#[test]
fn sendmmsg_and_more_servers_than_are_remembered() {
    let node = with_dns("many");
    let _resolver = Resolver::start(&node);
    let servers: Vec<_> = servers(12).into_iter().filter(SocketAddr::is_ipv4).collect();
    node.a
        .run(APP, APP, || {
            use nix::sys::socket::{MsgFlags, MultiHeaders, SockaddrIn, sendmmsg};
            use std::{io::IoSlice, os::fd::AsRawFd};
            let socket = unconnected(servers[0]);
            // Twice as many questions as are sent in one go; two servers in each call.
            for pair in servers.chunks(2) {
                let texts: Vec<String> = pair.iter().map(ToString::to_string).collect();
                let slices: Vec<_> =
                    texts.iter().map(|text| [IoSlice::new(text.as_bytes())]).collect();
                let to: Vec<_> = pair
                    .iter()
                    .map(|server| match server {
                        SocketAddr::V4(v4) => Some(SockaddrIn::from(*v4)),
                        SocketAddr::V6(_) => None,
                    })
                    .collect();
                let mut headers = MultiHeaders::preallocate(pair.len(), None);
                let sent =
                    sendmmsg(socket.as_raw_fd(), &mut headers, &slices, to, [], MsgFlags::empty());
                assert_eq!(sent.expect("sent").count(), pair.len());
                let mut answer = [0; 64];
                for _ in pair {
                    let (len, from) = socket.recv_from(&mut answer).expect("answered");
                    assert_eq!(String::from_utf8_lossy(&answer[..len]), from.to_string());
                }
            }
        })
        .expect("runs");
}

#[test]
fn a_socket_that_is_bound_to_an_address_is_answered_too() {
    let node = with_dns("bound");
    let _resolver = Resolver::start(&node);
    for server in servers(2) {
        let own: IpAddr = match canonical(server).ip() {
            IpAddr::V4(_) if server.is_ipv4() => node.a.ipv4(),
            IpAddr::V4(_) => mapped(addr(node.a.ipv4(), 0)).ip(),
            IpAddr::V6(_) => node.a.ipv6(),
        };
        node.a
            .run(APP, APP, || {
                let socket = UdpSocket::bind(addr(own, 0)).expect("bound");
                socket.set_read_timeout(Some(patience())).expect("timeout");
                socket.send_to(b"question", server).expect("sent");
                let (_, from) = socket.recv_from(&mut [0; 64]).expect("answered");
                assert_eq!(from, server);
            })
            .expect("runs");
    }
}

#[test]
fn t11_tcp_goes_there_too_though_it_listens_on_localhost_alone() {
    let node = with_dns("tcp");
    let resolver = Resolver::start(&node);
    for server in servers(2) {
        let answer = node.a.ask(APP, APP, server).expect("captured");
        assert_original(&answer, server);
        assert_eq!(answer.peer, server);
        let own = if canonical(server).is_ipv4() { node.a.ipv4() } else { node.a.ipv6() };
        assert_eq!(answer.seen.peer.ip().to_canonical(), own);
    }
    assert_eq!(resolver.tcp.seen().len(), 6);
}

#[test]
fn a_resolver_older_than_the_agent_is_found() {
    let mut node = Node::new("older");
    let _resolver = Resolver::start(&node);
    set(&node, |manifest| {
        let env = &mut manifest["spec"]["containers"][1]["env"];
        let capture = serde_json::json!({"name": "ISTIO_META_DNS_CAPTURE", "value": "1"});
        env.as_array_mut().expect("env").push(capture);
    });
    node.agent.wait_enrolled(&node.a).expect("enrolled");
    for server in servers(1) {
        assert_original(&node.a.ask(APP, APP, server).expect("captured"), server);
    }
}

/// Whether a question of this user to `server` is answered by the pod's sidecar, as opposed to
/// the server itself, which answers in capitals.
fn captured(node: &Node, uid: u32, gid: u32, server: SocketAddr) -> bool {
    let ask = |connect: bool| {
        node.a
            .run(uid, gid, || {
                let socket = unconnected(server);
                if connect {
                    socket.connect(server).expect("connects");
                    socket.send(b"question").expect("sent");
                } else {
                    socket.send_to(b"question", server).expect("sent");
                }
                let mut answer = [0; 64];
                let (len, from) = socket.recv_from(&mut answer).expect("answered");
                assert_eq!(from, server);
                match &answer[..len] {
                    b"question" => true,
                    b"REMOTE" => false,
                    other => panic!("{other:?}"),
                }
            })
            .expect("runs")
    };
    // A change of policy may come between the two.
    wait_for("both ways of asking to agree", SOON, || {
        let connected = ask(true);
        (ask(false) == connected).then_some(connected)
    })
    .expect("one answer")
}

/// Servers off the pod that answer for themselves.
fn remote_servers(node: &Node) -> Vec<Responder> {
    let own = servers(1).into_iter().map(canonical).take(2);
    own.map(|server| {
        node.lab.add_node_address(server.ip()).expect("an address");
        let socket = node.lab.on_node(|| udp(server)).expect("runs");
        Responder::start(socket, |_| b"REMOTE".to_vec())
    })
    .collect()
}

#[test]
fn the_proxy_its_group_and_excluded_ports_are_direct() {
    let node = with_dns("direct");
    let _resolver = Resolver::start(&node);
    let _remote = remote_servers(&node);
    for server in servers(1) {
        assert!(captured(&node, APP, APP, server));
        assert!(!captured(&node, PROXY, PROXY, server));
        assert!(!captured(&node, APP, PROXY, server));
    }
    set(&node, |manifest| {
        dns_env(manifest);
        manifest["metadata"]["annotations"]["traffic.sidecar.istio.io/excludeOutboundPorts"] =
            "53".into();
    });
    wait_until("port 53 to be excluded", SOON, || {
        servers(1).into_iter().all(|server| !captured(&node, APP, APP, server))
    })
    .expect("excluded");
    // Capture switched off, live.
    set(&node, |_| {});
    wait_until("DNS to be left alone", SOON, || {
        node.agent.status().expect("status")["pods"][0]["dns_port"].is_null()
    })
    .expect("off");
    for server in servers(1) {
        assert!(!captured(&node, APP, APP, server));
    }
}

/// Whether a TCP connection to `server` came to the sidecar's DNS listener, as opposed to the
/// server itself.
fn captured_tcp(node: &Node, uid: u32, server: SocketAddr) -> bool {
    let seen = node.a.ask(uid, uid, server).expect("answered").seen;
    assert!(seen.orig.is_none() || seen.local.port() == 15053, "{seen}");
    seen.orig.is_some()
}

fn dns_env(manifest: &mut serde_json::Value) {
    let env = &mut manifest["spec"]["containers"][1]["env"];
    let capture = serde_json::json!({"name": "ISTIO_META_DNS_CAPTURE", "value": "true"});
    env.as_array_mut().expect("env").push(capture);
}

#[test]
fn what_is_no_dns_is_captured_as_ever() {
    let node = with_dns("others");
    let _resolver = Resolver::start(&node);
    let _sidecar = Sidecar::start(&node.a);
    for (target, _) in remotes(&node.a, 80) {
        let answer = node.a.ask(APP, APP, target).expect("captured");
        assert_original(&answer, target);
        assert_eq!(answer.seen.local.port(), 15001);
    }
}

#[test]
fn istios_excluded_ranges_are_not_about_dns() {
    let node = with_dns("ranges");
    let _resolver = Resolver::start(&node);
    let _sidecar = Sidecar::start(&node.a);
    let _remote = remote_servers(&node);
    let _remotes: Vec<_> = servers(1)[..2].iter().map(|server| node.remote(*server)).collect();
    set(&node, |manifest| {
        dns_env(manifest);
        manifest["metadata"]["annotations"]["traffic.sidecar.istio.io/excludeOutboundIPRanges"] =
            "10.96.53.0/24,fd96::/64".into();
    });
    let web = addr(servers(1)[0].ip(), 80);
    node.becomes("the range to be excluded", || node.a.ask(APP, APP, web).is_err());
    for server in servers(1) {
        assert!(captured(&node, APP, APP, server));
        assert!(captured_tcp(&node, APP, server));
        assert!(!captured_tcp(&node, PROXY, server));
    }
}

#[test]
fn kumas_exclusions_and_dns() {
    let with_dns = |node: &Node| annotated(kuma(&node.a), "kuma.io/builtin-dns", "enabled");
    let node = Node::with_manifest("kuma", kuma);
    let _resolver = Resolver::start(&node);
    let _remote = remote_servers(&node);
    let _remotes: Vec<_> = servers(1)[..2].iter().map(|server| node.remote(*server)).collect();
    let both = |uid, server| (captured(&node, uid, uid, server), captured_tcp(&node, uid, server));
    let all = |uid| {
        let [v4, v6, mapped] = [0, 1, 2].map(|n| both(uid, servers(1)[n]));
        [v4, mapped, v6]
    };
    // F62: where nothing says that DNS is captured, it is not. (TCP then goes to the outbound listener.)
    for server in servers(1) {
        assert!(!captured(&node, APP, APP, server), "{server}");
    }
    node.agent.add_manifest("a", &with_dns(&node)).expect("a manifest");
    node.becomes("UDP to be captured", || captured(&node, APP, APP, servers(1)[0]));
    // F61: nobody listens for DNS over TCP, which goes straight out.
    assert_eq!(all(APP), [(true, false); 3]);
    assert_eq!(all(5678), [(false, false); 3], "the proxy");
    // UDP and TCP, asked for IPv4 and IPv6.
    for (key, text, [v4, v6]) in [
        ("exclude-outbound-ips", "10.96.53.1", [(false, false), (true, false)]),
        ("exclude-outbound-ips", "fd96::/64", [(true, false), (false, false)]),
        ("exclude-outbound-ports", "53", [(true, false); 2]),
        ("exclude-outbound-ports-for-uids", "udp:53:1000", [(false, false); 2]),
        ("exclude-outbound-ports-for-uids", "tcp:53:1000", [(true, false); 2]),
        ("exclude-outbound-ports-for-uids", "53:999;54:1000", [(true, false); 2]),
        ("exclude-outbound-ports-for-uids", "TCP,udp:53:1000", [(false, false); 2]),
    ] {
        let manifest = annotated(with_dns(&node), &format!("traffic.kuma.io/{key}"), text);
        node.agent.add_manifest("a", &manifest).expect("a manifest");
        node.becomes(&format!("{key}={text}: {v4:?} {v6:?}"), || all(APP) == [v4, v4, v6]);
    }
}

#[test]
fn a_family_that_is_not_captured_is_asked_directly() {
    let mut node = Node::new("family");
    let mut manifest = istio_v4_first(&node.a);
    dns_env(&mut manifest);
    node.agent.add_manifest("a", &manifest).expect("a manifest");
    node.agent.wait_enrolled(&node.a).expect("enrolled");
    let _resolver = Resolver::start(&node);
    let _remote = remote_servers(&node);
    for (server, expected) in servers(1).into_iter().zip([true, false, true]) {
        assert_eq!(captured(&node, APP, APP, server), expected, "{server}");
    }
}

#[test]
fn a_server_on_localhost_is_asked_through_the_sidecar() {
    let node = with_dns("localhost");
    let _resolver = Resolver::start(&node);
    for server in ["127.0.0.1", "::1", "127.0.0.53"].map(|at| addr(ip(at), 53)) {
        let answer = node.a.ask(APP, APP, server).expect("captured");
        assert_original(&answer, server);
        assert_eq!(answer.seen.local.port(), 15053);
        assert!(answer.seen.peer.ip().is_loopback(), "as for the server: {answer:?}");
        assert!(captured(&node, APP, APP, server));
    }
    // But the proxy asks a server in its own pod directly.
    let own = addr(node.a.ipv4(), 53);
    let _server = node.a.serve(own, APP, APP).expect("a server");
    assert_eq!(node.a.ask(PROXY, PROXY, own).expect("direct").seen.orig, None);
}

#[test]
fn answers_that_wait_are_told_apart_however_many_questions_there_were() {
    let node = with_dns("wait");
    for (listener, servers) in [
        ("127.0.0.1:15053", ["10.96.53.1", "10.96.53.2"]),
        ("[::1]:15053", ["fd96::53:1", "fd96::53:2"]),
    ] {
        let [first, second] = servers.map(|server| addr(ip(server), 53));
        let listener = node.a.run(PROXY, PROXY, || UdpSocket::bind(listener)).expect("runs");
        let listener = listener.expect("a listener");
        listener.set_read_timeout(Some(patience())).expect("timeout");
        node.a
            .run(APP, APP, || {
                let socket = unconnected(first);
                socket.send_to(b"question", first).expect("sent");
                for _ in 0..20 {
                    socket.send_to(b"question", second).expect("sent");
                }
                for n in 0..21 {
                    let (len, client) = listener.recv_from(&mut [0; 64]).expect("a question");
                    listener.send_to(&[b'x'; 64][..len], client).expect("answered");
                    let (_, from) = socket.recv_from(&mut [0; 64]).expect("an answer");
                    assert_eq!(from, if n == 0 { first } else { second });
                }
            })
            .expect("runs");
    }
}

#[test]
fn datagrams_that_are_no_answers_keep_their_source() {
    let node = with_dns("source");
    let _resolver = Resolver::start(&node);
    let (own4, own6) = (node.a.ipv4().to_string(), node.a.ipv6().to_string());
    // Of each family: a server, other sources than the listener's address, and the addresses
    // that answers come to: of the server that was asked, and of some that never were.
    for (server, localhost, sources, asked, never) in [
        (
            "10.96.53.1",
            "127.0.0.1",
            ["127.0.0.2", &own4],
            "127.128.255.1",
            ["127.128.255.5", "127.128.255.200"],
        ),
        (
            "fd96::53:1",
            "::1",
            [&own6; 2],
            "fd53:6964:6573:7465::1",
            ["fd53:6964:6573:7465::5", "fd53:6964:6573:7465::c8"],
        ),
    ] {
        let from_localhost =
            [localhost, never[0], never[1]].map(|to| (addr(ip(localhost), 0), ip(to)));
        // From the listener's port as well.
        let from_others = sources
            .into_iter()
            .flat_map(|from| [0, 15053].map(|port| addr(ip(from), port)))
            .flat_map(|from| [(from, ip(localhost)), (from, ip(asked))]);
        let server = addr(ip(server), 53);
        node.a
            .run(APP, APP, || {
                let socket = unconnected(server);
                socket.send_to(b"question", server).expect("sent");
                let (_, from) = socket.recv_from(&mut [0; 64]).expect("answered");
                assert_eq!(from, server);
                let port = socket.local_addr().expect("an address").port();
                for (from, to) in from_localhost.into_iter().chain(from_others) {
                    let other = udp(from);
                    other.send_to(b"hello", addr(to, port)).expect("sent");
                    let told = socket.recv_from(&mut [0; 64]).map(|(_, from)| from);
                    let told = told.unwrap_or_else(|error| panic!("{from} to {to}: {error}"));
                    assert_eq!(told, other.local_addr().expect("an address"), "to {to}");
                }
            })
            .expect("runs");
    }
}

#[test]
fn a_socket_that_is_connected_again_tells_its_new_peer() {
    let node = with_dns("again");
    let _resolver = Resolver::start(&node);
    for (server, listener) in
        [("10.96.53.1", "127.0.0.1"), ("fd96::53:1", "::1")].map(|(a, b)| (ip(a), ip(b)))
    {
        let (server, listener) = (addr(server, 53), addr(listener, 15053));
        node.a
            .run(APP, APP, || {
                let socket = unconnected(server);
                socket.connect(server).expect("connects");
                socket.connect(listener).expect("connects");
                assert_eq!(socket.peer_addr().expect("a peer"), listener);
                socket.send(b"question").expect("sent");
                let (_, from) = socket.recv_from(&mut [0; 64]).expect("answered");
                assert_eq!(from, listener);
            })
            .expect("runs");
    }
}

#[test]
fn nothing_is_left_behind_when_sockets_close() {
    let node = with_dns("left");
    let _resolver = Resolver::start(&node);
    let _sidecar = Sidecar::start(&node.a);
    node.a
        .run(APP, APP, || {
            for _ in 0..50 {
                let socket = unconnected(servers(1)[0]);
                for server in servers(3).into_iter().filter(SocketAddr::is_ipv4) {
                    socket.send_to(b"question", server).expect("sent");
                }
            }
            // And TCP connections that nobody answers, or that are answered.
            for n in 0..50 {
                let target = if n % 2 == 0 { servers(1)[0] } else { addr(ip(REMOTE4), 80) };
                sidestep_lab::ask(target, None).expect("captured");
            }
        })
        .expect("runs");
    let handovers = node.map("handovers");
    wait_until("no handover to be left", SOON, || handovers.keys().next().is_none())
        .expect("none is left");
}
