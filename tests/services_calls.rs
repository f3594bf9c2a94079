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
use serde_json::json;
use sidestep_lab::wait_for;
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
