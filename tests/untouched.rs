//! What is in no mesh is left alone, and so is every getsockopt but SO_ORIGINAL_DST.

#![allow(unsafe_code, reason = "getsockopt with any option and length")]

mod common;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{TcpListener, TcpStream, UdpSocket},
    os::{
        fd::{AsRawFd, OwnedFd, RawFd},
        unix::net::UnixStream,
    },
};

use common::*;
use sidestep_lab::{Agent, Lab, Pod, PodNet};

const SO_ORIGINAL_DST: i32 = 80;

/// Error or 0, the length that came back, and the bytes.
type Answer = (i32, u32, Vec<u8>);

fn ask(fd: RawFd, level: i32, option: i32, len: u32) -> Answer {
    let mut buffer = vec![0xa5u8; len as usize + 8];
    let mut returned = len;
    // SAFETY: the buffer is longer than the length that the kernel is told.
    let rc = unsafe {
        libc::getsockopt(fd, level, option, buffer.as_mut_ptr().cast(), &raw mut returned)
    };
    let errno =
        if rc == 0 { 0 } else { std::io::Error::last_os_error().raw_os_error().unwrap_or(-1) };
    (errno, returned, buffer)
}

/// The answers to every option that exists, and many that do not, with buffers of many lengths.
fn all_answers(sockets: &[OwnedFd]) -> BTreeMap<(usize, i32, i32, u32), Answer> {
    let levels = [libc::SOL_SOCKET, libc::SOL_IP, libc::SOL_IPV6, libc::SOL_TCP, libc::SOL_UDP];
    let mut answers = BTreeMap::new();
    for (n, fd) in sockets.iter().enumerate() {
        for level in levels {
            for option in 0..100 {
                for len in [0, 1, 4, 8, 16, 28, 300, 4096, 4097, 5000, 70000] {
                    answers
                        .insert((n, level, option, len), ask(fd.as_raw_fd(), level, option, len));
                }
            }
        }
    }
    answers
}

/// A socket of each kind, made inside the pod.
fn sockets(pod: &Pod) -> Vec<OwnedFd> {
    pod.run(0, 0, || {
        // An answer of more than a page: the peer's groups.
        let groups: Vec<_> = (0..3000).map(nix::unistd::Gid::from_raw).collect();
        let own = nix::unistd::getgroups().expect("groups");
        nix::unistd::setgroups(&groups).expect("groups");
        let (unix, peer) = UnixStream::pair().expect("a pair");
        nix::unistd::setgroups(&own).expect("groups");
        let listener = TcpListener::bind("127.0.0.1:0").expect("listens");
        let listener6 = TcpListener::bind("[::1]:0").expect("listens");
        let [client, client6] = [&listener, &listener6]
            .map(|to| TcpStream::connect(to.local_addr().expect("address")).expect("connects"));
        let udp = UdpSocket::bind("127.0.0.1:0").expect("UDP");
        let connected = UdpSocket::bind("127.0.0.1:0").expect("UDP");
        connected.connect(udp.local_addr().expect("address")).expect("connects");
        let idle = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None);
        vec![
            unix.into(),
            peer.into(),
            listener.into(),
            listener6.into(),
            udp.into(),
            connected.into(),
            idle.expect("a socket").into(),
            client.into(),
            client6.into(),
        ]
    })
    .expect("runs")
}

fn assert_no_answer_changes(enroll: bool) {
    let lab = Lab::new("untouched").expect("a lab");
    let pod = lab.pod("a", PodNet { v4: true, v6: true }).expect("a pod");
    let sockets = sockets(&pod);
    let clients = sockets.len() - 2..sockets.len();
    let page = ask(sockets[0].as_raw_fd(), libc::SOL_SOCKET, libc::SO_PEERGROUPS, 70000);
    assert_eq!((page.0, page.1), (0, 12000), "the test has an answer of more than a page");
    let before = all_answers(&sockets);
    let again = all_answers(&sockets);
    let mut agent = Agent::start(binary(), &lab).expect("the agent");
    agent.wait_log("BPF programs attached").expect("starts");
    if enroll {
        agent.add_pod(&pod).expect("a manifest");
        agent.wait_enrolled(&pod).expect("enrolled");
    }
    let during = all_answers(&sockets);
    drop(agent);
    let after = all_answers(&sockets);
    // Clocks and counters differ from call to call, though not in each of their bytes.
    let moving: BTreeSet<_> = before
        .iter()
        .filter(|(key, answer)| again[key] != **answer || after[key] != **answer)
        .map(|((socket, level, option, _), _)| (*socket, *level, *option))
        .collect();
    let mut compared = 0;
    for (key, answer) in &before {
        // A connected TCP socket of a mesh pod does get an answer to SO_ORIGINAL_DST.
        let (socket, level, option, _) = *key;
        let original = option == SO_ORIGINAL_DST && [libc::SOL_IP, libc::SOL_IPV6].contains(&level);
        if enroll && clients.contains(&socket) && original {
            continue;
        }
        if !moving.contains(&(socket, level, option)) {
            assert_eq!(&during[key], answer, "socket, level, option, length: {key:?}");
            compared += 1;
        }
    }
    assert!(compared * 100 > before.len() * 99, "{compared} of {}", before.len());
}

/// A2.
#[test]
fn no_getsockopt_changes_outside_the_mesh() {
    assert_no_answer_changes(false);
}

/// A2.
#[test]
fn no_getsockopt_changes_in_a_mesh_pod() {
    assert_no_answer_changes(true);
}

/// A1.
#[test]
fn a_pod_in_no_mesh_is_untouched() {
    let mut node = Node::enrolled("nomesh");
    let lab = &node.lab;
    let plain = lab.pod("plain", PodNet { v4: true, v6: true }).expect("a pod");
    let mut manifest = plain.manifest();
    manifest["metadata"]["annotations"]
        .as_object_mut()
        .expect("annotations")
        .remove("sidecar.istio.io/status");
    node.agent.add_manifest("plain", &manifest).expect("a manifest");
    // A change behind it: once that is seen, the plain pod has been looked at.
    node.agent.remove_pod(&node.b).expect("removed");
    node.agent.wait_gone(&node.b).expect("gone");
    let _trap = Sidecar::start(&plain);
    let app = plain.serve(any(addr(plain.ipv4(), 0), 8080), APP, APP).expect("app");
    for from in [&node.b, &plain] {
        let answer = from.ask(APP, APP, addr(plain.ipv4(), 8080)).expect("direct");
        assert_eq!(answer.seen.orig, None);
    }
    assert_eq!(app.seen().len(), 2);
    let node_side = node.lab.on_node(|| sidestep_lab::ask(addr(plain.ipv4(), 8080), None));
    assert_eq!(node_side.expect("runs").expect("direct").seen.orig, None);
}

#[test]
fn so_original_dst_fails_outside_the_mesh_as_the_kernel_has_it() {
    let node = Node::enrolled("kernel");
    let plain = node.lab.pod("plain", PodNet { v4: true, v6: true }).expect("a pod");
    let proxy = plain.fake_proxy(15001).expect("listens");
    let answer = plain.ask(APP, APP, addr(plain.ipv4(), 15001)).expect("direct");
    assert!(matches!(answer.seen.orig, Some(Err(_))), "{answer:?}");
    assert!(matches!(answer.seen.orig6, Some(Err(_))), "{answer:?}");
    drop(proxy);
}

#[test]
fn any_other_connected_socket_of_a_mesh_pod_answers_its_own_address() {
    // As iptables does for a tracked connection that it did not translate.
    let node = Node::enrolled("own");
    for target in addresses(&node.a, 7070) {
        let proxy = node.a.fake_proxy(7070).expect("listens");
        let answer = node.a.ask(APP, APP, target).expect("direct");
        assert_original(&answer, target);
        drop(proxy);
    }
}
