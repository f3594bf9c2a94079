//! T11: an app's DNS goes to the sidecar's DNS listener, and answers come from whom it asked.

mod common;

use std::{
    collections::BTreeMap,
    io,
    net::{IpAddr, Ipv6Addr, SocketAddr, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use common::*;
use libbpf_rs::MapCore;
use sidestep_lab::{
    Pod, ServeOpts, Server, Talk,
    iptables::{self, Record},
    slowdown, wait_for, wait_until,
};
use socket2::{Domain, Socket, Type};

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
        Self::start_in(&node.a, PROXY)
    }

    fn start_in(pod: &Pod, uid: u32) -> Self {
        let localhosts = ["127.0.0.1:15053", "[::1]:15053"].map(|at| at.parse().expect("address"));
        let udp = localhosts.map(|at: SocketAddr| {
            let socket = pod.run(uid, uid, || udp(at)).expect("runs");
            Responder::start(socket, <[u8]>::to_vec)
        });
        let opts = ServeOpts { talk: Talk::OriginalDst, ..ServeOpts::on(localhosts) };
        let tcp = Server::start(pod, ServeOpts { uid, gid: uid, ..opts });
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

/// F55: Istio's is a socket of MPTCP, as Go makes them, which no map takes.
#[test]
fn f55_tcp_reaches_a_listener_of_mptcp() {
    let node = with_dns("mptcp");
    for server in servers(1) {
        let is4 = canonical(server).is_ipv4();
        let at = addr(ip(if is4 { "127.0.0.1" } else { "::1" }), 15053);
        let listener = mptcp_listener(&node.a, at);
        let call = || -> std::io::Result<(Socket, SocketAddr, SocketAddr)> {
            let socket = Socket::new(Domain::for_address(server), Type::STREAM, None)?;
            socket.connect_timeout(&server.into(), patience())?;
            let named = |at: socket2::SockAddr| at.as_socket().expect("an IP address");
            let (own, peer) = (named(socket.local_addr()?), named(socket.peer_addr()?));
            Ok((socket, own, peer))
        };
        let (_socket, own, peer) = node
            .a
            .run(APP, APP, call)
            .expect("runs")
            .unwrap_or_else(|error| panic!("{server}: {error}"));
        let (_, from) = listener.accept().expect("accepted");
        let pod = if is4 { node.a.ipv4() } else { node.a.ipv6() };
        assert_eq!(peer, server);
        assert_eq!(own.ip().to_canonical(), pod);
        assert_eq!(from.as_socket().map(|from| from.ip().to_canonical()), Some(pod));
    }
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
fn f61_f62_kumas_exclusions_and_dns() {
    let with_dns = |node: &Node| annotated(kuma(&node.a), "kuma.io/builtin-dns", "enabled");
    let node = Node::with_manifest("kuma", kuma);
    let _resolver = Resolver::start_in(&node.a, 5678);
    let _remote = remote_servers(&node);
    let _remotes: Vec<_> = servers(1)[..2].iter().map(|server| node.remote(*server)).collect();
    let both = |uid, server| (captured(&node, uid, uid, server), captured_tcp(&node, uid, server));
    let all = |uid| {
        let [v4, v6, mapped] = [0, 1, 2].map(|n| both(uid, servers(1)[n]));
        [v4, mapped, v6]
    };
    // F62: where nothing says that DNS is captured, it is not. (TCP then goes to the outbound
    // listener.)
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
            "127.129.128.64",
            ["127.129.128.65", "127.129.128.128"],
        ),
        (
            "fd96::53:1",
            "::1",
            [&own6; 2],
            "fd53:6964:6573:7465:0:1::8040",
            ["fd53:6964:6573:7465:0:1::8041", "fd53:6964:6573:7465:0:1::8080"],
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

/// Answers at this address, in capitals, on the node.
fn remote_at(node: &Node, at: SocketAddr) -> Responder {
    let socket = node.lab.on_node(|| udp(at)).expect("runs");
    Responder::start(socket, |_| b"REMOTE".to_vec())
}

/// What `tests/dns/sockets.py` sees in a pod.
fn sockets(pod: &Pod) -> Vec<String> {
    // As text, and Debian's: an app's user may not be able to reach the tree, or another Python.
    let script = include_str!("dns/sockets.py");
    let mut argv = ["/usr/bin/python3", "-c", script].map(str::to_owned).to_vec();
    argv.extend(own_addresses(pod).iter().map(|(name, ip)| format!("{name}={ip}")));
    argv.push(format!("patience={}", 0.7 * f64::from(slowdown())));
    let mut process = pod.spawn(APP, APP, argv).expect("python3");
    let status = process.wait(Duration::from_secs(60) * slowdown()).expect("it ends");
    assert!(status.success(), "{}", process.log_tail());
    process.log().lines().map(str::to_owned).collect()
}

fn own_addresses(pod: &Pod) -> [(&'static str, IpAddr); 4] {
    let second = |own: IpAddr| match own {
        IpAddr::V4(v4) => IpAddr::from((u32::from(v4) + 0x8000).to_be_bytes()),
        IpAddr::V6(v6) => IpAddr::from((u128::from(v6) + 0x8000).to_be_bytes()),
    };
    let (own4, own6) = (pod.ipv4(), pod.ipv6());
    [("own4", own4), ("second4", second(own4)), ("own6", own6), ("second6", second(own6))]
}

/// F50, F51: beside Istio's own rules, in a pod of its own.
#[test]
fn f50_f51_sockets_see_what_they_see_beside_istios_rules() {
    let mut node = Node::new("oracle");
    for pod in [&node.a, &node.b] {
        let [_, (_, second4), _, (_, second6)] = own_addresses(pod);
        pod.add_address(second4, 32, "eth0", "").expect("an address");
        pod.add_address(second6, 128, "eth0", "preferred_lft 0").expect("an address");
    }
    set(&node, dns_env);
    node.agent.wait_enrolled(&node.a).expect("a is enrolled");
    iptables::install(&node.b, &Record::DNS, true).expect("Istio's rules");
    let _resolvers = [&node.a, &node.b].map(|pod| Resolver::start_in(pod, PROXY));
    let real = servers(2).into_iter().filter(|server| canonical(*server) == *server);
    let _remotes: Vec<Responder> = real
        .map(|server| {
            node.lab.add_node_address(server.ip()).expect("an address");
            remote_at(&node, addr(server.ip(), 123))
        })
        .collect();
    let (ours, rules) = (sockets(&node.a), sockets(&node.b));
    assert_eq!(ours.len(), 25 * 3, "{ours:#?}");
    for (ours, rules) in ours.iter().zip(&rules) {
        // Under iptables such a socket does not reach localhost, as it is with TCP.
        if ours.starts_with("bound_to_device") {
            assert!(ours.contains("asked from") && !ours.contains("nothing"), "{ours}");
        } else {
            assert_eq!(ours, rules, "Sidestep, then Istio's rules");
        }
    }
}

/// F52: conntrack knows an answer by what came before.
#[test]
fn f52_what_a_server_of_the_pod_answers_is_no_question() {
    let node = with_dns("server");
    let _resolver = Resolver::start(&node);
    for (client, other, own) in
        [("10.96.53.8", "10.96.53.9", node.a.ipv4()), ("fd96::53:8", "fd96::53:9", node.a.ipv6())]
    {
        let (client, other) = (addr(ip(client), 53), addr(ip(other), 53));
        node.lab.add_node_address(client.ip()).expect("an address");
        let asks = node.lab.on_node(|| udp(client)).expect("runs");
        asks.set_read_timeout(Some(patience())).expect("timeout");
        for (port, connects) in [(53, false), (5300, false), (5301, true)] {
            let server = node.a.run(APP, APP, || udp(any(client, port))).expect("runs");
            server.set_read_timeout(Some(patience())).expect("timeout");
            let mut text = [0; 64];
            for _ in 0..3 {
                asks.send_to(b"what?", addr(own, port)).expect("sent");
                let (_, from) = server.recv_from(&mut text).expect("a question");
                assert_eq!(from, client);
                if connects {
                    server.connect(client).expect("connects");
                    server.send(b"that").expect("sent");
                } else {
                    server.send_to(b"that", client).expect("sent");
                }
                let (len, from) = asks.recv_from(&mut text).expect("the server's own answer");
                assert_eq!((&text[..len], from), (&b"that"[..], addr(own, port)));
            }
            // What it asks others itself is a question.
            if !connects {
                server.send_to(b"question", other).expect("sent");
                let (len, from) = server.recv_from(&mut text).expect("the sidecar's answer");
                assert_eq!((&text[..len], from), (&b"question"[..], other));
            }
        }
    }
}

#[test]
fn a_question_that_nobody_listens_for_is_refused() {
    let node = with_dns("nobody");
    for server in servers(1) {
        let error = node.a.run(APP, APP, || {
            let socket = unconnected(server);
            socket.connect(server).expect("connects");
            socket.send(b"question").expect("sent");
            socket.recv(&mut [0; 64]).expect_err("nobody answers")
        });
        assert_eq!(error.expect("runs").kind(), io::ErrorKind::ConnectionRefused, "{server}");
    }
}

/// A UDP socket of this user that has this address, whether the pod has it or not.
fn impostor(pod: &Pod, uid: u32, at: SocketAddr) -> UdpSocket {
    pod.run(uid, uid, || {
        let socket = Socket::new(Domain::for_address(at), Type::DGRAM, None)?;
        if at.is_ipv6() {
            socket.set_freebind_v6(true)?;
        }
        socket.bind(&at.into())?;
        io::Result::Ok(socket.into())
    })
    .expect("runs")
    .unwrap_or_else(|error| panic!("{at}: {error}"))
}

/// F53: nobody but the sidecar, from its listener's address, speaks for a server.
#[test]
fn f53_nobody_else_is_taken_for_the_dns_listener() {
    let node = with_dns("forged");
    let resolver = Resolver::start(&node);
    let mut victims = Vec::new();
    for (server, localhost, range) in [
        ("10.96.53.1", "127.0.0.1", "127.129."),
        ("fd96::53:1", "::1", "fd53:6964:6573:7465:0:1::"),
    ] {
        let server = addr(ip(server), 53);
        let number = |alone, token| {
            ip(&format!("{range}{}", if range.contains(':') { token } else { alone }))
        };
        let (alone, token) = (number("0.0", "0"), number("128.64", "8040"));
        let own = if server.is_ipv4() { node.a.ipv4() } else { node.a.ipv6() };
        for connects in [false, true] {
            let socket = node.a.run(APP, APP, || {
                let socket = unconnected(server);
                let mut text = [0; 64];
                if connects {
                    socket.connect(server).expect("connects");
                    socket.send(b"question").expect("sent");
                } else {
                    socket.send_to(b"question", server).expect("sent");
                }
                assert_eq!(socket.recv_from(&mut text).expect("answered").1, server);
                socket
            });
            let socket = socket.expect("runs");
            let port = socket.local_addr().expect("an address").port();
            victims.push((socket, ip(localhost), own, alone, token, port));
        }
    }
    let forged = || node.counter("istio", "dns_forged");
    let tell = |from: &UdpSocket, ip: IpAddr, port: u16| {
        // Where nobody may listen, the kernel may say so at once.
        let _ = from.send_to(b"forged", addr(ip, port));
    };
    for (_, localhost, own, alone, token, port) in &victims {
        let (before, mut sent) = (forged(), 0);
        for uid in [APP, PROXY] {
            for from in [*alone, *token] {
                for from_port in [15053, 0] {
                    let socket = impostor(&node.a, uid, addr(from, from_port));
                    tell(&socket, *own, *port);
                    sent += 1;
                }
            }
            // From elsewhere it comes as what it is, if at all.
            for to in [*own, *token, *alone] {
                tell(&impostor(&node.a, uid, addr(*localhost, 0)), to, *port);
            }
        }
        assert_eq!(forged() - before, sent, "told of what was dropped");
    }
    // Not even at the listener's own address, once that is free.
    drop(resolver);
    for (_, localhost, own, _, token, port) in &victims {
        let before = forged();
        let socket = impostor(&node.a, APP, addr(*localhost, 15053));
        for to in [*own, *token] {
            tell(&socket, to, *port);
        }
        assert_eq!(forged() - before, 2);
    }
    for (socket, localhost, ..) in &victims {
        socket.set_nonblocking(true).expect("non-blocking");
        let mut text = [0; 64];
        while let Ok((_, from)) = socket.recv_from(&mut text) {
            assert_eq!(from.ip(), *localhost, "as what it is");
            assert_ne!(from.port(), 15053);
        }
    }
}

/// F54: every answer has the right source, or there is no question.
#[test]
fn f54_more_servers_than_can_be_told_apart_are_refused() {
    let node = with_dns("crowd");
    let _resolver = Resolver::start(&node);
    let crowd: Vec<_> = servers(100);
    for kind in 0..3 {
        let servers: Vec<_> = crowd.iter().copied().skip(kind).step_by(3).collect();
        let ask = |socket: &UdpSocket| {
            let mut open = BTreeMap::new();
            for server in &servers {
                match socket.send_to(server.to_string().as_bytes(), *server) {
                    Ok(_) => drop(open.insert(server.to_string(), *server)),
                    Err(error) if !kernel_before(6, 1) => {
                        assert_eq!(error.raw_os_error(), Some(libc::ENOBUFS), "{server}");
                    }
                    Err(error) => assert_eq!(error.kind(), io::ErrorKind::PermissionDenied),
                }
            }
            let asked = open.len();
            for _ in 0..asked {
                let mut text = [0; 64];
                let (len, from) = socket.recv_from(&mut text).expect("answered");
                let question = String::from_utf8_lossy(&text[..len]).into_owned();
                assert_eq!(open.remove(&question), Some(from), "{question}");
            }
            asked
        };
        let own = addresses(&node.a, 0)[kind];
        for (bound, expected) in [(any(own, 0), 64), (own, 64)] {
            let asked = node.a.run(APP, APP, || {
                let socket = UdpSocket::bind(if kind == 2 && bound.ip().is_unspecified() {
                    addr(Ipv6Addr::UNSPECIFIED, 0)
                } else {
                    bound
                });
                let socket = socket.expect("bound");
                socket.set_read_timeout(Some(patience())).expect("timeout");
                // Those that it knows it may ask again.
                (ask(&socket), ask(&socket))
            });
            assert_eq!(asked.expect("runs"), (expected, expected), "{bound}");
        }
        // Where the answers come to another of the pod's addresses, one server at a time.
        let [_, (_, second4), _, (_, second6)] = own_addresses(&node.a);
        let second = if kind == 1 { second6 } else { second4 };
        let added = node.a.add_address(second, if kind == 1 { 128 } else { 32 }, "eth0", "");
        assert!(added.is_ok() || kind == 2, "{added:?}");
        let second = if kind == 2 { mapped(addr(second, 0)) } else { addr(second, 0) };
        let asked = node.a.run(APP, APP, || {
            let socket = UdpSocket::bind(second).expect("bound");
            socket.set_read_timeout(Some(patience())).expect("timeout");
            ask(&socket)
        });
        assert_eq!(asked.expect("runs"), 1, "{second}");
    }
}

#[test]
fn a_second_device_that_is_down_is_no_obstacle() {
    let mut node = Node::new("down");
    node.a.ip("link add net1 type veth peer name net2").expect("a device");
    node.a.ip("address add 10.88.0.5/24 dev net1").expect("an address");
    set(&node, dns_env);
    node.agent.wait_enrolled(&node.a).expect("a is enrolled");
    let _resolver = Resolver::start(&node);
    for server in servers(1) {
        assert!(node.a.ask(APP, APP, server).is_ok(), "{server}");
    }
}
