//! The many calls by which programs reach a Service and hear from it. The rows are those of
//! docs/services.md.

#![allow(unsafe_code, reason = "io_uring")]

mod common;

use std::{
    collections::BTreeSet,
    io::{BufRead, BufReader, IoSlice, IoSliceMut},
    net::{SocketAddr, TcpStream, UdpSocket},
    os::fd::AsRawFd,
    thread,
    time::Duration,
};

use common::{services::*, *};
use nix::{
    libc,
    sys::socket::{
        ControlMessage, MsgFlags, MultiHeaders, SockaddrStorage, recvmmsg, recvmsg, sendmsg, sendto,
    },
};
use serde_json::{Value, json};
use sidestep_lab::{ServeOpts, Server, ask, wait_for};
use socket2::{Domain, SockAddr, Socket, Type};

fn storage(of: SocketAddr) -> SockaddrStorage {
    SockaddrStorage::from(of)
}

fn address(of: Option<SockaddrStorage>) -> SocketAddr {
    let of = of.expect("an address");
    let v4 = of.as_sockaddr_in().map(|v4| SocketAddr::from(std::net::SocketAddrV4::from(*v4)));
    let v6 = of.as_sockaddr_in6().map(|v6| SocketAddr::from(std::net::SocketAddrV6::from(*v6)));
    v4.or(v6).expect("IPv4 or IPv6")
}

/// A submission is carried out; its result.
fn uring(entry: &io_uring::squeue::Entry) -> i32 {
    let mut ring = io_uring::IoUring::new(4).expect("a ring");
    // SAFETY: what the entry points to outlives this call, which ends with its completion.
    unsafe { ring.submission().push(entry) }.expect("pushed");
    ring.submit_and_wait(1).expect("submitted");
    ring.completion().next().expect("a completion").result()
}

/// A way to hear an answer: the word, and whom it is from.
type Hear = fn(&UdpSocket) -> (String, SocketAddr);

fn by_recvfrom(socket: &UdpSocket) -> (String, SocketAddr) {
    answer(socket).expect("an answer")
}

fn by_peek(socket: &UdpSocket) -> (String, SocketAddr) {
    let mut buffer = [0; 64];
    let (_, peeked) = socket.peek_from(&mut buffer).expect("an answer");
    let (word, from) = answer(socket).expect("the same answer");
    assert_eq!(peeked, from, "by MSG_PEEK");
    (word, from)
}

fn by_recvmsg(socket: &UdpSocket) -> (String, SocketAddr) {
    let mut buffer = [0; 64];
    let mut slices = [IoSliceMut::new(&mut buffer)];
    let heard =
        recvmsg::<SockaddrStorage>(socket.as_raw_fd(), &mut slices, None, MsgFlags::empty());
    let (len, from) = heard.map(|heard| (heard.bytes, heard.address)).expect("an answer");
    (String::from_utf8_lossy(&buffer[..len]).into_owned(), address(from))
}

fn by_recvmmsg(socket: &UdpSocket) -> (String, SocketAddr) {
    let mut buffer = [0; 64];
    let mut messages = [[IoSliceMut::new(&mut buffer)]];
    let mut headers = MultiHeaders::<SockaddrStorage>::preallocate(1, None);
    let flags = MsgFlags::empty();
    let heard = recvmmsg(socket.as_raw_fd(), &mut headers, &mut messages, flags, None);
    let heard: Vec<_> =
        heard.expect("an answer").map(|heard| (heard.bytes, heard.address)).collect();
    let [(len, from)] = heard[..] else { panic!("{} answers", heard.len()) };
    (String::from_utf8_lossy(&buffer[..len]).into_owned(), address(from))
}

fn by_io_uring(socket: &UdpSocket) -> (String, SocketAddr) {
    let (mut buffer, mut slice) =
        ([0_u8; 64], [libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 64 }]);
    slice[0].iov_base = buffer.as_mut_ptr().cast();
    // SAFETY: plain integers and pointers, of which all zeros are valid.
    let (mut header, mut name): (libc::msghdr, libc::sockaddr_storage) =
        unsafe { (std::mem::zeroed(), std::mem::zeroed()) };
    header.msg_iov = slice.as_mut_ptr();
    header.msg_iovlen = 1;
    header.msg_name = (&raw mut name).cast();
    header.msg_namelen = size_of::<libc::sockaddr_storage>() as u32;
    let fd = io_uring::types::Fd(socket.as_raw_fd());
    let result = uring(&io_uring::opcode::RecvMsg::new(fd, &raw mut header).build());
    let len = usize::try_from(result).unwrap_or_else(|_| panic!("{result}"));
    // SAFETY: the kernel wrote an address of that length there.
    let from = unsafe { SockAddr::new(std::mem::transmute_copy(&name), header.msg_namelen) };
    (String::from_utf8_lossy(&buffer[..len]).into_owned(), from.as_socket().expect("an address"))
}

const HEARS: [(&str, Hear); 5] = [
    ("recvfrom", by_recvfrom),
    ("MSG_PEEK", by_peek),
    ("recvmsg", by_recvmsg),
    ("recvmmsg", by_recvmmsg),
    ("io_uring", by_io_uring),
];

/// A way to send a question by a socket that is not connected.
type Say = fn(&UdpSocket, SocketAddr);

fn by_sendto(socket: &UdpSocket, to: SocketAddr) {
    socket.send_to(b"?", to).expect("sent");
}

fn by_sendmsg(socket: &UdpSocket, to: SocketAddr) {
    let (slices, none): (_, [ControlMessage<'_>; 0]) = ([IoSlice::new(b"?")], []);
    let to = storage(to);
    let sent = sendmsg(socket.as_raw_fd(), &slices, &none, MsgFlags::empty(), Some(&to));
    assert_eq!(sent, Ok(1));
}

fn by_io_uring_send(socket: &UdpSocket, to: SocketAddr) {
    let to = SockAddr::from(to);
    let mut slice = libc::iovec { iov_base: b"?".as_ptr().cast_mut().cast(), iov_len: 1 };
    // SAFETY: plain integers and pointers, of which all zeros are valid.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = &raw mut slice;
    header.msg_iovlen = 1;
    header.msg_name = to.as_ptr().cast_mut().cast();
    header.msg_namelen = to.len();
    let fd = io_uring::types::Fd(socket.as_raw_fd());
    assert_eq!(uring(&io_uring::opcode::SendMsg::new(fd, &raw const header).build()), 1);
}

const SAYS: [(&str, Say); 3] =
    [("sendto", by_sendto), ("sendmsg", by_sendmsg), ("io_uring", by_io_uring_send)];

#[test]
fn r5_answers_come_from_the_service_by_each_call() {
    let cluster = Cluster::new("s5k");
    let _echoes =
        [Echo::start(&cluster.backends[0], "one"), Echo::start(&cluster.backends[1], "two")];
    for target in vips() {
        for (say, by) in SAYS {
            for (hear, hears) in HEARS {
                for is_connected in [false, true] {
                    let heard = cluster.client.run(APP, APP, || {
                        let socket = udp_socket(target);
                        if is_connected {
                            socket.connect(target).expect("connected");
                            socket.send(b"?").expect("sent");
                        } else {
                            by(&socket, target);
                        }
                        hears(&socket)
                    });
                    let (word, from) = heard.expect("runs");
                    assert_eq!(from, target, "{say}, {hear}, connected: {is_connected}");
                    assert!(["one", "two"].contains(&&*word), "{word:?}");
                }
            }
        }
    }
}

/// A connected socket that sends elsewhere reaches that, and hears whom it asked.
#[test]
fn r5_r22_a_connected_socket_sends_to_another_service() {
    let cluster = Cluster::new("s5o");
    let _echoes =
        [Echo::start(&cluster.backends[0], "one"), Echo::start(&cluster.backends[1], "two")];
    cluster.endpoints(&[&cluster.backends[0]], &ready());
    cluster.wait_backends(VIP4, 1);
    cluster.set("other", &service("other", &[OTHER4]));
    cluster.set("other-4", &slice("other-4", "other", &[cluster.backends[1].ipv4()], &ready()));
    cluster.wait_backends(OTHER4, 1);
    let (one, two) = (addr(ip(VIP4), PORT), addr(ip(OTHER4), PORT));
    for (one, two) in [(one, two), (mapped(one), mapped(two))] {
        cluster
            .client
            .run(APP, APP, || {
                let socket = udp_socket(one);
                socket.connect(one).expect("connected");
                // Its peer alone can be heard by it; to the other, it can speak.
                socket.send(b"?").expect("sent");
                assert_eq!(answer(&socket).expect("an answer"), ("one".to_owned(), one));
                let sent = sendto(socket.as_raw_fd(), b"?", &storage(two), MsgFlags::empty());
                assert_eq!(sent, Ok(1), "to another Service");
                socket.send(b"?").expect("sent");
                assert_eq!(answer(&socket).expect("an answer"), ("one".to_owned(), one));
                assert_eq!(socket.peer_addr().expect("connected"), one);
            })
            .expect("runs");
    }
    assert!(cluster.counter("service_udp4") >= 4, "the other was translated too");
}

/// A way to connect a stream to a target.
type Dial = fn(&Socket, SocketAddr);

fn plainly(socket: &Socket, to: SocketAddr) {
    socket.connect(&to.into()).expect("connected");
}

fn without_blocking(socket: &Socket, to: SocketAddr) {
    socket.connect_timeout(&to.into(), patience()).expect("connected");
}

fn by_uring(socket: &Socket, to: SocketAddr) {
    let to = SockAddr::from(to);
    let fd = io_uring::types::Fd(socket.as_raw_fd());
    let connect = io_uring::opcode::Connect::new(fd, to.as_ptr().cast(), to.len()).build();
    assert_eq!(uring(&connect), 0);
}

/// TCP Fast Open by sendto(): the connection is made with the first bytes.
fn by_fast_open(socket: &Socket, to: SocketAddr) {
    let flags = MsgFlags::from_bits_retain(libc::MSG_FASTOPEN);
    let sent = sendto(socket.as_raw_fd(), b"\n", &storage(to), flags);
    assert_eq!(sent, Ok(1), "with the first bytes");
}

/// TCP Fast Open by a socket option: connect() answers at once where a cookie is known.
fn by_fast_open_connect(socket: &Socket, to: SocketAddr) {
    nix::sys::socket::setsockopt(socket, nix::sys::socket::sockopt::TcpFastOpenConnect, &true)
        .expect("TCP_FASTOPEN_CONNECT");
    plainly(socket, to);
}

fn from_a_port(socket: &Socket, to: SocketAddr) {
    let any = if to.is_ipv4() { "0.0.0.0" } else { "::" };
    socket.set_reuse_address(true).expect("SO_REUSEADDR");
    socket.bind(&addr(ip(any), 40_404).into()).expect("bound");
    plainly(socket, to);
}

fn from_a_device(socket: &Socket, to: SocketAddr) {
    socket.bind_device(Some(b"eth0")).expect("SO_BINDTODEVICE");
    plainly(socket, to);
}

const DIALS: [(&str, Dial); 7] = [
    ("connect", plainly),
    ("connect without blocking", without_blocking),
    ("io_uring", by_uring),
    ("MSG_FASTOPEN", by_fast_open),
    ("TCP_FASTOPEN_CONNECT", by_fast_open_connect),
    ("from a port", from_a_port),
    ("from a device", from_a_device),
];

#[test]
fn r44_each_way_to_connect_is_led_to_a_backend() {
    let cluster = Cluster::new("s44");
    let _servers = cluster.backends.each_ref().map(Cluster::tcp_on);
    for target in vips() {
        for (name, dial) in DIALS {
            let made = cluster.client.run(APP, APP, || {
                let domain = Domain::for_address(target);
                let socket = Socket::new(domain, Type::STREAM, None).expect("a socket");
                dial(&socket, target);
                let stream = TcpStream::from(socket);
                stream.set_read_timeout(Some(patience())).expect("a timeout");
                let mut line = String::new();
                BufReader::new(&stream).read_line(&mut line).expect("a greeting");
                (line, stream.peer_addr().expect("a peer"))
            });
            let (line, peer) = made.expect("runs");
            let seen: sidestep_lab::Seen = line.trim_end().parse().expect("a greeting");
            assert!(cluster.number(seen.local.ip()).is_some(), "{target} by {name}: {seen:?}");
            assert_eq!(peer, target, "{name}");
        }
    }
}

#[test]
fn r44_a_socket_that_is_bound_to_an_address_keeps_it() {
    let cluster = Cluster::new("s44b");
    let _servers = cluster.backends.each_ref().map(Cluster::tcp_on);
    let own = [cluster.client.ipv4(), cluster.client.ipv6()];
    for target in vips() {
        let from = own[usize::from(target.is_ipv6() && target.ip().to_canonical().is_ipv6())];
        let bound = if target.is_ipv6() { mapped(addr(from, 0)) } else { addr(from, 0) };
        let line = cluster.client.run(APP, APP, || {
            let socket = Socket::new(Domain::for_address(target), Type::STREAM, None);
            let socket = socket.expect("a socket");
            socket.bind(&bound.into()).expect("bound");
            plainly(&socket, target);
            let mut line = String::new();
            BufReader::new(TcpStream::from(socket)).read_line(&mut line).expect("a greeting");
            line
        });
        let seen: sidestep_lab::Seen = line.expect("runs").trim_end().parse().expect("a greeting");
        assert_eq!(seen.peer.ip().to_canonical(), from, "{target}");
    }
}

#[test]
fn r10_affinity_ends_with_its_time_and_is_shared_by_a_ports_addresses() {
    let cluster = Cluster::new("s10t");
    let _servers = cluster.backends.each_ref().map(Cluster::tcp_on);
    let sticky = |seconds: u32| {
        let mut sticky = service("web", &[VIP4, VIP6]);
        sticky["spec"]["type"] = "LoadBalancer".into();
        sticky["status"] = json!({"loadBalancer": {"ingress": [{"ip": OTHER4, "ipMode": "VIP"}]}});
        sticky["spec"]["sessionAffinity"] = "ClientIP".into();
        sticky["spec"]["sessionAffinityConfig"] = json!({"clientIP": {"timeoutSeconds": seconds}});
        cluster.set("web", &sticky);
    };
    sticky(600);
    cluster.wait_backends_of("TCP", OTHER4, 2);
    let land = |vip: &str| {
        let answer = cluster.dial(addr(ip(vip), PORT)).expect("a backend answers");
        cluster.number(answer.seen.local.ip()).expect("a backend")
    };
    let first = land(VIP4);
    for _ in 0..8 {
        assert_eq!((land(OTHER4), land(VIP4)), (first, first), "one port's addresses");
    }
    // The families are apart: IPv6 has an affinity of its own, to either backend.
    let other_family = land(VIP6);
    assert_eq!(land(VIP6), other_family);
    // A shorter time holds for the affinity that is there. Only quiet ends it.
    sticky(1);
    let elsewhere = || {
        thread::sleep(Duration::from_millis(2100)); // it is counted in whole seconds
        (land(VIP4) != first).then_some(())
    };
    wait_for("the end of affinity", 4 * SOON, elsewhere).expect("another backend");
    let met: BTreeSet<usize> = (0..10).map(|_| land(VIP4)).collect();
    assert_eq!(met.len(), 1, "and then that one, without quiet");
}

/// The node's addresses, which its object has; it has others.
const NODE_IPS: [&str; 2] = ["10.77.0.1", "fd77::1"];
const NODE_PORT: u16 = 30_080;

/// The Service `web` has node ports, and may serve by endpoints of this node only; they are of another.
fn with_node_ports(cluster: &Cluster) {
    let addresses = NODE_IPS.map(|at| json!({"type": "InternalIP", "address": at}));
    let node = json!({
        "apiVersion": "v1", "kind": "Node", "metadata": {"name": NODE},
        "status": {"addresses": addresses},
    });
    cluster.set("node", &node);
    let mut web = service("web", &[VIP4, VIP6]);
    web["spec"]["type"] = "NodePort".into();
    web["spec"]["externalTrafficPolicy"] = "Local".into();
    for port in web["spec"]["ports"].as_array_mut().expect("ports") {
        port["nodePort"] = NODE_PORT.into();
    }
    cluster.set("web", &web);
    for v6 in [false, true] {
        let name = if v6 { "web-6" } else { "web-4" };
        let ips: Vec<_> = cluster.backends.iter().map(|pod| pod.ips()[usize::from(v6)]).collect();
        let mut made = slice(name, "web", &ips, &ready());
        for endpoint in made["endpoints"].as_array_mut().expect("endpoints") {
            endpoint["nodeName"] = "elsewhere".into();
        }
        cluster.set(name, &made);
    }
}

/// How many endpoints the kernel has behind an address; none: it is not translated.
fn behind(cluster: &Cluster, at: SocketAddr) -> Option<usize> {
    let all = cluster.status();
    let is_it = |one: &&Value| one["address"] == at.to_string() && one["protocol"] == "TCP";
    all.iter().find(is_it).and_then(|one| one["backends"].as_array()).map(Vec::len)
}

#[track_caller]
fn wait_behind(cluster: &Cluster, at: SocketAddr, count: Option<usize>) {
    let has = || (behind(cluster, at) == count).then_some(());
    wait_for(&format!("{count:?} endpoints of {at}"), SOON, has)
        .unwrap_or_else(|error| panic!("{error:#}: {}", cluster.agent.log_tail()));
}

#[test]
fn r27_a_node_port_of_this_node_leads_to_an_endpoint() {
    let cluster = Cluster::new("s27");
    let _servers = cluster.backends.each_ref().map(Cluster::tcp_on);
    let _echoes =
        [Echo::start(&cluster.backends[0], "one"), Echo::start(&cluster.backends[1], "two")];
    with_node_ports(&cluster);
    let [v4, v6] = NODE_IPS.map(|at| addr(ip(at), NODE_PORT));
    wait_behind(&cluster, v4, Some(2));
    wait_behind(&cluster, v6, Some(2));
    let word = |target: SocketAddr| {
        let connected = udp_socket(target);
        connected.connect(target).expect("connected");
        connected.send(b"?").expect("sent");
        let unconnected = udp_socket(target);
        unconnected.send_to(b"?", target).expect("sent");
        [answer(&connected).expect("an answer"), answer(&unconnected).expect("an answer")]
    };
    for target in [v4, v6, mapped(v4)] {
        let from_pod = cluster.dial(target).expect("an endpoint answers");
        assert!(cluster.client.ips().contains(&from_pod.seen.peer.ip().to_canonical()));
        let from_node = cluster.lab.on_node(|| ask(target, None)).expect("runs");
        for answer in [from_pod, from_node.expect("an endpoint answers")] {
            assert_eq!(answer.peer, target, "getpeername");
            assert!(cluster.number(answer.seen.local.ip()).is_some(), "{answer:?}");
            assert_eq!(answer.seen.local.port(), TARGET);
        }
        let heard =
            [cluster.client.run(APP, APP, || word(target)), cluster.lab.on_node(|| word(target))];
        for (_, from) in heard.into_iter().flat_map(|heard| heard.expect("runs")) {
            assert_eq!(from, target);
        }
    }
    // Another node's address is that node's, and localhost is not asked for.
    let elsewhere = addr(cluster.backends[0].ipv4(), NODE_PORT);
    let missed = cluster.counter("service_missed");
    let refused = cluster.dial(elsewhere).expect_err("nobody listens there");
    assert!(refused.contains("refused"), "{refused}");
    assert!(cluster.counter("service_missed") > missed);
    for localhost in ["127.0.0.1", "::1"].map(|at| addr(ip(at), NODE_PORT)) {
        let refused = cluster.lab.on_node(|| ask(localhost, None)).expect("runs");
        let refused = format!("{:#}", refused.expect_err("nobody listens there"));
        assert!(refused.contains("refused"), "{refused}");
    }
}

#[test]
fn r27_localhost_is_the_nodes_own_and_only_where_asked_for() {
    let mut cluster = Cluster::new("s27l");
    let asked = ["--services", "--services-node-ports", "primary,localhost", "--splice", "off"];
    cluster.restart_with(&asked);
    let _servers = cluster.backends.each_ref().map(Cluster::tcp_on);
    with_node_ports(&cluster);
    let at = addr(ip("127.0.0.1"), NODE_PORT);
    wait_behind(&cluster, at, Some(2));
    for target in [at, mapped(at)] {
        let answer = cluster.lab.on_node(|| ask(target, None)).expect("runs");
        let answer = answer.expect("an endpoint answers");
        assert_eq!(answer.peer, target, "getpeername");
        assert!(cluster.number(answer.seen.local.ip()).is_some(), "{answer:?}");
        // One that is bound to localhost gets what it would get without the agent.
        let bound = cluster.lab.on_node(|| ask(target, Some(target.ip())));
        let refused = format!("{:#}", bound.expect("runs").expect_err("nobody listens there"));
        assert!(refused.contains("refused"), "{refused}");
        // A pod's localhost is its own.
        let own = cluster.client.run(APP, APP, || Server::start_here(ServeOpts::on([at])));
        let own = own.expect("runs").expect("a server");
        let answer = cluster.dial(target).expect("its own server answers");
        assert_eq!(answer.seen.local.ip().to_canonical(), at.ip(), "{answer:?}");
        drop(own);
        let refused = cluster.dial(target).expect_err("nobody listens there");
        assert!(refused.contains("refused"), "{refused}");
    }
    assert_eq!(behind(&cluster, addr(ip("::1"), NODE_PORT)), None, "as kube-proxy");
}

#[test]
fn r27_r38_the_chosen_addresses_are_those_that_the_node_has_now() {
    let mut cluster = Cluster::new("s27a");
    with_node_ports(&cluster);
    let primary = addr(ip(NODE_IPS[0]), NODE_PORT);
    wait_behind(&cluster, primary, Some(2));
    // The ClusterIP is an address of the node as well, and another is none of its object's.
    let (other, vip) = (ip("192.0.2.77"), ip(VIP4));
    cluster.lab.add_node_address(other).expect("an address");
    cluster.lab.add_node_address(vip).expect("an address");
    wait_behind(&cluster, addr(vip, PORT), None);
    assert_eq!(behind(&cluster, addr(other, NODE_PORT)), None);
    for (choice, wanted) in [
        ("all", [Some(2), Some(2), Some(2)]),
        ("192.0.2.0/24", [None, Some(2), None]),
        ("none", [None, None, None]),
    ] {
        let flags = ["--services", "--services-node-ports", choice, "--splice", "off"];
        cluster.restart_with(&flags);
        let all = [primary, addr(other, NODE_PORT), addr(vip, NODE_PORT)];
        for (at, count) in all.into_iter().zip(wanted) {
            wait_behind(&cluster, at, count);
        }
        assert_eq!(behind(&cluster, addr(vip, PORT)), None, "the ClusterIP is the node's own");
    }
}
