//! Kinds of sockets, and states of a pod, that interception must not break.

mod common;

use std::{
    io::{BufRead, BufReader, ErrorKind, Write},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use common::*;
use libbpf_rs::{MapCore, MapFlags};
use nix::sys::socket::sockopt::TcpFastOpenConnect;
use sidestep_lab::{Seen, Server};
use socket2::{Domain, Protocol, Socket, Type};

fn socket(target: SocketAddr, protocol: Protocol) -> Socket {
    Socket::new(Domain::for_address(target), Type::STREAM, Some(protocol)).expect("a socket")
}

/// Connects, and gives what the server greets with.
fn greeted(socket: Socket, target: SocketAddr) -> Result<(TcpStream, Seen), String> {
    socket
        .connect_timeout(&target.into(), patience())
        .map_err(|error| format!("{target}: {error}"))?;
    let stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(patience())).expect("timeout");
    let mut line = String::new();
    BufReader::new(&stream).read_line(&mut line).map_err(|error| error.to_string())?;
    let seen = line.trim_end().parse().map_err(|error| format!("{line:?}: {error:#}"))?;
    Ok((stream, seen))
}

/// The server saw a captured connection to `target` from the pod's address, and the client is
/// told what it dialled.
#[track_caller]
fn assert_truthful(stream: &TcpStream, seen: &Seen, target: SocketAddr, own: std::net::IpAddr) {
    assert_eq!(seen.original().map(canonical), Some(canonical(target)), "{seen}");
    assert_eq!(seen.peer.ip().to_canonical(), own, "{seen}");
    assert_eq!(stream.peer_addr().expect("a peer"), target);
    assert_eq!(canonical(stream.local_addr().expect("an address")), canonical(seen.peer));
}

#[test]
fn mptcp_sockets_are_captured_and_told_the_truth() {
    let node = Node::enrolled("mptcp");
    let _sidecar = Sidecar::start(&node.a);
    for (target, own) in remotes(&node.a, 80) {
        node.a
            .run(APP, APP, || {
                let (stream, seen) =
                    greeted(socket(target, Protocol::MPTCP), target).expect("captured");
                assert_truthful(&stream, &seen, target, own);
            })
            .expect("runs");
    }
}

#[test]
fn sockets_bound_beforehand_are_captured_from_where_they_are_bound() {
    let node = Node::enrolled("bound");
    let _sidecar = Sidecar::start(&node.a);
    for (n, (target, own)) in remotes(&node.a, 80).into_iter().enumerate() {
        let own_as_bound = if target.is_ipv4() { own } else { mapped(addr(own, 0)).ip() };
        let port = 30000 + n as u16 * 10;
        for (ip, port) in [(own_as_bound, 0), (own_as_bound, port), (any(target, 0).ip(), port + 1)]
        {
            let bound = if target.is_ipv6() && ip.is_ipv4() {
                addr(ip6_any(), port)
            } else {
                addr(ip, port)
            };
            node.a
                .run(APP, APP, || {
                    let socket = socket(target, Protocol::TCP);
                    socket.bind(&bound.into()).expect("bound");
                    let (stream, seen) = greeted(socket, target).expect("captured");
                    assert_truthful(&stream, &seen, target, own);
                    if port != 0 {
                        assert_eq!(seen.peer.port(), port, "the port that was bound");
                    }
                })
                .expect("runs");
        }
    }
}

fn ip6_any() -> std::net::IpAddr {
    std::net::Ipv6Addr::UNSPECIFIED.into()
}

#[test]
fn one_bound_port_serves_several_destinations_at_once() {
    let node = Node::enrolled("shared");
    let _sidecar = Sidecar::start(&node.a);
    node.a
        .run(APP, APP, || {
            let mut open = Vec::new();
            for n in 10..20 {
                let target = addr([10, 96, 0, n], 80);
                let socket = socket(target, Protocol::TCP);
                socket.set_reuse_address(true).expect("SO_REUSEADDR");
                socket.bind(&addr([0, 0, 0, 0], 31000).into()).expect("bound");
                let (stream, seen) = greeted(socket, target).expect("captured");
                assert_truthful(&stream, &seen, target, node.a.ipv4());
                open.push(stream);
            }
        })
        .expect("runs");
}

#[test]
fn sockets_bound_to_a_device_are_captured() {
    let node = Node::enrolled("device");
    let _sidecar = Sidecar::start(&node.a);
    for (target, own) in remotes(&node.a, 80) {
        node.a
            .run(APP, APP, || {
                let socket = socket(target, Protocol::TCP);
                socket.bind_device(Some(b"eth0")).expect("SO_BINDTODEVICE");
                let (stream, seen) = greeted(socket, target).expect("captured");
                assert_truthful(&stream, &seen, target, own);
            })
            .expect("runs");
    }
}

#[test]
fn sockets_bound_to_an_exempt_device_are_direct() {
    let key = "traffic.sidecar.istio.io/excludeInterfaces";
    let node = Node::with_manifest("exempt", |pod| annotated(pod.manifest(), key, "eth0"));
    let _sidecar = Sidecar::start(&node.a);
    for (target, own) in remotes(&node.a, 80) {
        let server = node.remote(canonical(target));
        node.a
            .run(APP, APP, || {
                let socket = socket(target, Protocol::TCP);
                socket.bind_device(Some(b"eth0")).expect("SO_BINDTODEVICE");
                let (_, seen) = greeted(socket, target).expect("direct");
                assert_eq!((seen.orig, seen.peer.ip()), (None, own));
            })
            .expect("runs");
        drop(server);
    }
}

#[test]
fn a_socket_bound_to_the_proxys_uid_by_its_creator_keeps_it() {
    // iptables' owner match looks at the socket's creator, not at who connects.
    let node = Node::enrolled("creator");
    let _sidecar = Sidecar::start(&node.a);
    let target = addr(ip(REMOTE4), 80);
    let made = node.a.run(APP, APP, || socket(target, Protocol::TCP)).expect("runs");
    let answer = node.a.run(PROXY, PROXY, || greeted(made, target)).expect("runs");
    let (_, seen) = answer.expect("captured: the app made the socket");
    assert_eq!(seen.original(), Some(target));
}

#[test]
fn nonblocking_connect_is_captured() {
    let node = Node::enrolled("nonblock");
    let _sidecar = Sidecar::start(&node.a);
    for (target, own) in remotes(&node.a, 80) {
        node.a
            .run(APP, APP, || {
                let socket = socket(target, Protocol::TCP);
                socket.set_nonblocking(true).expect("non-blocking");
                if let Err(error) = socket.connect(&target.into()) {
                    assert_eq!(error.raw_os_error(), Some(libc::EINPROGRESS), "{error}");
                }
                sidestep_lab::wait_until("the connection", SOON, || socket.peer_addr().is_ok())
                    .expect("connected");
                socket.set_nonblocking(false).expect("blocking");
                let stream = TcpStream::from(socket);
                let seen = greeting(&stream);
                assert_truthful(&stream, &seen, target, own);
            })
            .expect("runs");
    }
}

#[test]
fn a_second_connect_after_a_failed_one_goes_where_it_says() {
    let node = Node::enrolled("second");
    let (target, _) = remotes(&node.a, 80)[0];
    let app = node.a.serve(addr(ip("127.0.0.1"), 8080), APP, APP).expect("app");
    node.a
        .run(APP, APP, || {
            let socket = socket(target, Protocol::TCP);
            let error = socket.connect(&target.into()).expect_err("nothing listens");
            assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
            // The same socket, now to the pod itself: no trace of the capture may be left.
            let local = app.addr();
            socket.connect(&local.into()).expect("direct");
            let stream = TcpStream::from(socket);
            assert_eq!(stream.peer_addr().expect("a peer"), local);
            assert_eq!(stream.local_addr().expect("an address").ip(), ip("127.0.0.1"));
        })
        .expect("runs");
    assert_eq!(app.wait_seen(1).expect("came")[0].peer.ip(), ip("127.0.0.1"));
}

/// Connects where nothing listens, so that the socket can be used again.
fn refused(socket: &Socket, target: SocketAddr) {
    let error = socket.connect(&target.into()).expect_err("nothing listens");
    assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{target}");
}

#[test]
fn what_a_failed_connect_was_meant_for_is_not_told_of_the_next() {
    let node = Node::enrolled("stale");
    for (kind, (target, own)) in remotes(&node.a, 80).into_iter().enumerate() {
        let own = if kind == 2 { mapped(addr(own, 0)).ip() } else { own };
        let localhost = ["127.0.0.1", "::1", "::ffff:127.0.0.1"].map(ip)[kind];
        // To another address than before, and to the same with another port: a socket that is
        // bound to a device is sent to the pod's own address.
        for (device, next) in
            [(None, addr(localhost, 15001)), (Some(&b"eth0"[..]), addr(own, 15006))]
        {
            node.a
                .run(APP, APP, || {
                    let socket = socket(target, Protocol::TCP);
                    socket.bind_device(device).expect("SO_BINDTODEVICE");
                    refused(&socket, target);
                    let _sidecar = Sidecar::start(&node.a);
                    let (stream, seen) = greeted(socket, next).expect("direct");
                    assert_eq!(seen.original().map(canonical), Some(canonical(next)));
                    assert_eq!(stream.peer_addr().expect("a peer"), next);
                })
                .expect("runs");
        }
    }
}

#[test]
fn a_failed_call_to_its_own_pod_does_not_rename_the_proxys_next_peer() {
    let node = Node::enrolled("peer");
    for target in addresses(&node.a, 8080) {
        let app = node.a.serve(any(target, 15008), APP, APP).expect("app");
        node.a
            .run(PROXY, PROXY, || {
                let socket = socket(target, Protocol::TCP);
                refused(&socket, target);
                // The same address, at the port that is never redirected.
                let next = addr(target.ip(), 15008);
                socket.connect(&next.into()).expect("direct");
                assert_eq!(TcpStream::from(socket).peer_addr().expect("a peer"), next);
            })
            .expect("runs");
        drop(app);
    }
}

#[test]
fn handovers_are_for_handshakes_only() {
    let node = Node::enrolled("handovers");
    let handovers = node.map("handovers");
    let none = || handovers.keys().next().is_none();
    for (target, _) in remotes(&node.a, 80) {
        node.a.ask(APP, APP, target).expect_err("nothing listens");
        sidestep_lab::wait_until("no handover", SOON, none).expect("withdrawn");
    }
    let sidecar = Sidecar::start(&node.a);
    for (target, _) in remotes(&node.a, 80) {
        let open = node.a.run(APP, APP, || sidestep_lab::connect(target, None));
        let _open = open.expect("runs").expect("captured");
        sidecar.outbound.wait_seen(1).expect("accepted");
        assert!(none(), "{target}: taken, and the connection is open");
        sidecar.outbound.clear();
    }
}

/// How many connections a pod may have that its sidecar has yet to accept; `HANDSHAKES` of
/// bpf/mesh/handover.h.
const HANDSHAKES: usize = 512;

/// F72: the errno of a connect that is refused with this one, where the kernel lets a program say so.
fn refusal(errno: i32) -> i32 {
    if kernel_before(6, 1) { libc::EPERM } else { errno }
}

/// F30: a process that keeps connections under way for ever takes its own pod's share of the
/// node's map, and no more.
#[test]
fn f30_f72_a_pod_with_too_many_handshakes_under_way_fails_alone() {
    let node = Node::enrolled("hostile");
    let _victims = Sidecar::start(&node.b);
    // A queue that is full drops SYNs: their senders wait.
    let deaf = |port| {
        let socket = socket(addr(ip6_any(), port), Protocol::TCP);
        socket.bind(&addr(ip6_any(), port).into()).expect("bound");
        socket.listen(0).expect("listens");
        socket
    };
    let proxy = node.a.run(PROXY, PROXY, || deaf(15001)).expect("runs");
    let handovers = node.map("handovers");
    let fill = || {
        let mut open = Vec::new();
        for n in 0..2 * HANDSHAKES {
            let (target, _) = remotes(&node.a, 80)[n % 3];
            let socket = socket(target, Protocol::TCP);
            socket.set_nonblocking(true).expect("non-blocking");
            let error = socket.connect(&target.into()).expect_err("under way, or refused");
            if error.raw_os_error() != Some(libc::EINPROGRESS) {
                return (open, error.raw_os_error());
            }
            open.push(socket);
        }
        (open, None)
    };
    let (open, error) = node.a.run(APP, APP, fill).expect("runs");
    assert_eq!(error, Some(refusal(libc::EAGAIN)), "{} are under way", open.len());
    assert_eq!(handovers.keys().count(), HANDSHAKES);
    assert_eq!(node.counter("istio", "refused_busy"), 1);
    for (target, _) in remotes(&node.b, 80) {
        assert_original(&node.b.ask(APP, APP, target).expect("captured"), target);
    }
    // The pod's own calls go on once the others are given up.
    drop((open, proxy));
    let none = || handovers.keys().next().is_none();
    sidestep_lab::wait_until("no handover", SOON, none).expect("withdrawn");
    let _sidecar = Sidecar::start(&node.a);
    for (target, _) in remotes(&node.a, 80) {
        assert_original(&node.a.ask(APP, APP, target).expect("captured"), target);
    }
    // Connections that the sidecar has accepted do not count.
    let (target, _) = remotes(&node.a, 80)[0];
    let open = || -> Result<Vec<_>, _> {
        (0..2 * HANDSHAKES).map(|_| greeted(socket(target, Protocol::TCP), target)).collect()
    };
    node.a.run(APP, APP, open).expect("runs").expect("all of them are captured");
}

/// Sets how many handshakes the pod is said to have under way.
fn set_handshakes(node: &Node, pod: &sidestep_lab::Pod, count: usize) {
    let cookie = node.cookie(pod).to_ne_bytes();
    let count = u32::try_from(count).expect("a small number").to_ne_bytes();
    node.map("handover_shares").update(&cookie, &count, MapFlags::ANY).expect("written");
}

/// Has the kernel keep track of the pod's connections, as many a rule of its own would.
fn track_connections(pod: &sidestep_lab::Pod) {
    let rule = "ct state new counter accept";
    pod.nft(&format!(
        "table inet track {{
    chain sent {{ type filter hook output priority 0; {rule}; }}
    chain received {{ type filter hook input priority 0; {rule}; }}
}}"
    ))
    .expect("rules");
}

/// F21, F30: a connection whose SYN leaves after the others have taken the share. With conntrack in
/// the pod, the kernel has an answer of its own: where the connection really went.
#[test]
fn f21_f30_with_no_room_for_handovers_the_sidecar_is_told_nothing_rather_than_something_wrong() {
    use std::io::Write;
    let node = Node::enrolled("full");
    node.a.sysctl("net.ipv4.tcp_fastopen", "1543").expect("server and client, no cookie needed");
    let _sidecar = Sidecar::start(&node.a);
    let late = || {
        for (target, _) in remotes(&node.a, 80) {
            set_handshakes(&node, &node.a, 0);
            let connect = || {
                let socket = socket(target, Protocol::TCP);
                nix::sys::socket::setsockopt(&socket, TcpFastOpenConnect, &true)
                    .expect("fast open");
                socket.connect(&target.into()).expect("deferred");
                TcpStream::from(socket)
            };
            let mut stream = node.a.run(APP, APP, connect).expect("runs");
            set_handshakes(&node, &node.a, HANDSHAKES);
            stream.set_read_timeout(Some(patience())).expect("timeout");
            stream.write_all(b"early").expect("sent in the SYN");
            let seen = greeting(&stream);
            assert_eq!(seen.original(), None, "{target}: {seen}");
        }
    };
    late();
    assert_eq!(node.counter("istio", "handover_full"), 3);
    track_connections(&node.a);
    late();
    assert_eq!(node.counter("istio", "handover_full"), 6);
    // What was not redirected is answered as ever.
    set_handshakes(&node, &node.a, 0);
    for target in addresses(&node.a, 8080) {
        let answer = node.lab.on_node(|| sidestep_lab::ask(canonical(target), None));
        assert_original(&answer.expect("runs").expect("steered"), target);
    }
}

#[test]
fn sockets_that_are_neither_tcp_nor_udp_are_untouched() {
    let node = Node::enrolled("ping");
    node.a.sysctl("net.ipv4.ping_group_range", "0 2147483647").expect("anybody may ping");
    for (target, own) in &remotes(&node.a, 0)[..2] {
        node.lab.add_node_address(target.ip()).expect("an address");
        let (domain, protocol, echo) = if own.is_ipv4() {
            (Domain::IPV4, Protocol::ICMPV4, 8)
        } else {
            (Domain::IPV6, Protocol::ICMPV6, 128)
        };
        node.a
            .run(APP, APP, || {
                let socket = Socket::new(domain, Type::DGRAM, Some(protocol)).expect("a socket");
                socket.set_read_timeout(Some(Duration::from_millis(100))).expect("timeout");
                socket.connect(&(*target).into()).expect("connected");
                sidestep_lab::wait_until("an echo", Duration::from_secs(5), || {
                    socket.send(&[echo, 0, 0, 0, 0, 0, 0, 1]).expect("sent");
                    let from = socket.recv_from(&mut [std::mem::MaybeUninit::uninit(); 64]);
                    from.is_ok_and(|(_, from)| {
                        from.as_socket().expect("an address").ip() == target.ip()
                    })
                })
                .expect("answered by whom it asked");
            })
            .expect("runs");
    }
}

#[test]
fn tcp_fast_open_is_captured() {
    use std::io::Write;
    let node = Node::enrolled("fastopen");
    node.a.sysctl("net.ipv4.tcp_fastopen", "1543").expect("server and client, no cookie needed");
    let _sidecar = Sidecar::start(&node.a);
    for (target, own) in remotes(&node.a, 80) {
        node.a
            .run(APP, APP, || {
                let socket = socket(target, Protocol::TCP);
                nix::sys::socket::setsockopt(&socket, TcpFastOpenConnect, &true)
                    .expect("fast open");
                // The SYN leaves with the first bytes, not here.
                socket.connect(&target.into()).expect("deferred");
                let mut stream = TcpStream::from(socket);
                stream.set_read_timeout(Some(patience())).expect("timeout");
                stream.write_all(b"early").expect("sent in the SYN");
                let seen = greeting(&stream);
                assert_truthful(&stream, &seen, target, own);
            })
            .expect("runs");
    }
}

#[test]
fn a_hundred_ports_carry_four_hundred_connections() {
    let node = Node::enrolled("ports");
    let ports = bulk(100);
    let range = format!("20000 {}", 20000 + ports - 1);
    node.a.sysctl("net.ipv4.ip_local_port_range", &range).expect("a small range");
    let sidecar = Sidecar::start(&node.a);
    for kind in 0..3 {
        node.a
            .run(APP, APP, || {
                let mut open = Vec::new();
                for n in 0..4 * ports {
                    let (target, _) = remotes(&node.a, 80 + n % 4)[kind];
                    let (stream, seen) = greeted(socket(target, Protocol::TCP), target)
                        .unwrap_or_else(|error| panic!("connection {n}: {error}"));
                    assert_eq!(seen.original().map(canonical), Some(canonical(target)));
                    open.push(stream);
                }
            })
            .expect("runs");
    }
    assert_eq!(sidecar.outbound.seen().len(), 3 * 4 * usize::from(ports));
}

/// What is captured goes to one port, but each connection has a destination of its own.
#[test]
fn one_source_port_reaches_three_hundred_destinations() {
    let node = Node::enrolled("source-port");
    let sidecar = Sidecar::start(&node.a);
    for (from, to) in [(node.a.ipv4(), ip(REMOTE4)), (node.a.ipv6(), ip(REMOTE6))] {
        node.a
            .run(APP, APP, || {
                let mut open = Vec::new();
                for port in 1000..1300 {
                    let socket = socket(addr(to, port), Protocol::TCP);
                    socket.set_reuse_address(true).expect("SO_REUSEADDR");
                    socket.bind(&addr(from, 7000).into()).expect("bound");
                    let (stream, seen) = greeted(socket, addr(to, port)).expect("connected");
                    assert_eq!(seen.original(), Some(addr(to, port)));
                    assert_eq!(seen.peer, addr(from, 7000));
                    open.push(stream);
                }
            })
            .expect("runs");
    }
    assert_eq!(sidecar.outbound.seen().len(), 600);
}

#[test]
fn twenty_thousand_short_connections_leave_ports_to_spare() {
    let node = Node::enrolled("timewait");
    // A tenth of the connections would use up the ports, did TIME_WAIT keep them.
    let ports = bulk(2000);
    let range = format!("20000 {}", 20000 + ports - 1);
    node.a.sysctl("net.ipv4.ip_local_port_range", &range).expect("a small range");
    node.a.sysctl("net.ipv4.tcp_tw_reuse", "0").expect("no help from the kernel");
    let _sidecar = Sidecar::start(&node.a);
    for target in [addr(ip(REMOTE4), 80), addr(ip(REMOTE6), 80)] {
        node.a
            .run(APP, APP, || {
                for n in 0..10 * ports {
                    // The client closes first: TIME_WAIT stays on its side.
                    TcpStream::connect(target).unwrap_or_else(|e| panic!("connection {n}: {e}"));
                }
            })
            .expect("runs");
    }
    // TCP remembers each pair of addresses. For captured connections there are 64 of either family,
    // and each is seen from both ends.
    let remembered = node.a.ip("tcp_metrics show").expect("what TCP remembers").lines().count();
    assert!((2..=4 * 64 + 8).contains(&remembered), "{remembered} pairs of addresses");
}

#[test]
fn many_pods_at_once_never_see_each_others_destinations() {
    let mut node = Node::enrolled("many");
    let count = bulk(100) as u8;
    let net = sidestep_lab::PodNet { v4: true, v6: true };
    let pods: Vec<_> =
        (0..8).map(|n| node.lab.pod(&format!("p{n}"), net).expect("a pod")).collect();
    for pod in &pods {
        node.agent.add_pod(pod).expect("a manifest");
    }
    for pod in &pods {
        node.agent.wait_enrolled(pod).expect("enrolled");
    }
    let sidecars: Vec<_> = pods.iter().map(Sidecar::start).collect();
    std::thread::scope(|scope| {
        for (n, pod) in pods.iter().enumerate() {
            scope.spawn(move || {
                for i in 0..count {
                    let target = addr([10, 96, n as u8, i], 80);
                    assert_original(&pod.ask(APP, APP, target).expect("captured"), target);
                }
            });
        }
    });
    for (n, sidecar) in sidecars.iter().enumerate() {
        let seen = sidecar.outbound.seen();
        assert_eq!(seen.len(), usize::from(count));
        for one in seen {
            assert_eq!(one.peer.ip(), pods[n].ipv4());
            assert!(
                one.original()
                    .is_some_and(|o| o.ip().to_string().starts_with(&format!("10.96.{n}.")))
            );
        }
    }
}

/// A8.
#[test]
fn a_reused_client_port_gives_the_right_destination_after_a_reset() {
    let node = Node::enrolled("reset");
    let sidecar = Sidecar::start(&node.a);
    node.a
        .run(APP, APP, || {
            for n in 1..50 {
                let target = addr([10, 96, 1, n], 80);
                let socket = socket(target, Protocol::TCP);
                socket.set_reuse_address(true).expect("SO_REUSEADDR");
                socket.set_linger(Some(Duration::ZERO)).expect("closes with RST");
                socket.bind(&addr([0, 0, 0, 0], 32000).into()).expect("bound");
                let (_, seen) = greeted(socket, target).expect("captured");
                assert_eq!(seen.original(), Some(target));
            }
        })
        .expect("runs");
    assert_eq!(sidecar.outbound.seen().len(), 49);
}

/// A4: both ways, and whoever made the connection.
#[test]
fn what_was_open_before_enrollment_goes_on() {
    let mut node = Node::new("open");
    let target = addr(ip(REMOTE4), 80);
    node.lab.add_node_address(target.ip()).expect("an address");
    let _remote = remote(&node, target);
    let inbound = addr(node.a.ipv4(), 8080);
    let _app = node.a.serve(inbound, APP, APP).expect("app");
    let call = |target| greeted(socket(target, Protocol::TCP), target).expect("direct").0;
    let out = node.a.run(APP, APP, || call(target)).expect("runs");
    let into = node.lab.on_node(|| call(inbound)).expect("runs");
    node.agent.add_pod(&node.a).expect("added");
    node.agent.wait_enrolled(&node.a).expect("enrolled");
    let _sidecar = Sidecar::start(&node.a);
    for (mut stream, peer) in [(out, target), (into, inbound)] {
        stream.write_all(b"still here\n").expect("sent");
        let mut echo = String::new();
        BufReader::new(&stream).read_line(&mut echo).expect("echoed");
        assert_eq!((echo.as_str(), stream.peer_addr().ok()), ("still here\n", Some(peer)));
    }
    assert_original(&node.a.ask(APP, APP, target).expect("captured"), target);
}

#[test]
fn a_pod_leaves_and_comes_back() {
    let mut node = Node::enrolled("leave");
    let _sidecar = Sidecar::start(&node.a);
    let target = addr(ip(REMOTE4), 80);
    node.lab.add_node_address(target.ip()).expect("an address");
    let _remote = remote(&node, target);
    let before = node.a.ask(APP, APP, target).expect("captured");
    assert_original(&before, target);
    node.agent.remove_pod(&node.a).expect("removed");
    node.agent.wait_gone(&node.a).expect("gone");
    assert_eq!(node.a.ask(APP, APP, target).expect("direct").seen.orig, None);
    node.agent.add_pod(&node.a).expect("added");
    node.agent.wait_enrolled(&node.a).expect("enrolled");
    assert_original(&node.a.ask(APP, APP, target).expect("captured"), target);
}

fn remote(node: &Node, at: SocketAddr) -> Server {
    node.lab
        .on_node(|| Server::start_here(sidestep_lab::ServeOpts::on([at])))
        .expect("runs")
        .expect("a remote server")
}
