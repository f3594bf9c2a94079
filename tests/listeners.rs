//! Which of the proxy's listeners a captured connection comes to: those, and only those, that the
//! mesh's REDIRECT leads to. That is localhost for what the pod itself sends, and the first address
//! of the device for what comes in. `make conformance` has the same beside iptables (LN rows).

mod common;

use std::{net::IpAddr, time::Duration};

use common::*;
use libbpf_rs::MapCore;
use nix::errno::Errno;
use serde_json::Value;
use sidestep_lab::{Agent, Answer, Lab, Pod, PodNet, ServeOpts, Server, Talk, wait_until};
use socket2::{Domain, Socket, Type};

/// Kuma's sidecar's user and group.
const KUMA: u32 = 5678;
const LOCALHOST: [&str; 2] = ["127.0.0.1", "::1"];

/// A listener of this user on each of these addresses alone.
fn listen(pod: &Pod, uid: u32, port: u16, at: &[IpAddr]) -> Server {
    let listen = at.iter().map(|ip| addr(*ip, port));
    let opts = ServeOpts { talk: Talk::OriginalDst, ..ServeOpts::on(listen) };
    Server::start(pod, ServeOpts { uid, gid: uid, ..opts }).expect("a listener")
}

fn ask(pod: &Pod, uid: u32, to: IpAddr, port: u16, from: Option<&str>) -> anyhow::Result<Answer> {
    let from = from.map(ip);
    pod.run(uid, uid, || sidestep_lab::ask(addr(to, port), from)).expect("runs")
}

#[track_caller]
fn assert_refused(answer: anyhow::Result<Answer>, what: &str) {
    let error = format!("{:#}", answer.expect_err(what));
    assert!(error.contains("Connection refused"), "{what}: {error}");
}

/// What istio-validation and kuma-validation do in their family: listen on localhost alone, call
/// 127.0.0.6 or ::6 from localhost, and want to hear which port that was.
#[track_caller]
fn assert_validates(pod: &Pod, uid: u32, v6: bool, what: &str) {
    let (from, to) = if v6 { ("::1", "::6") } else { ("127.0.0.1", "127.0.0.6") };
    let answer = ask(pod, uid, ip(to), 15002, Some(from));
    let answer = answer.unwrap_or_else(|error| panic!("{what}, {to}: {error:#}"));
    assert_original(&answer, addr(ip(to), 15002));
    assert_eq!(answer.seen.peer.ip().to_canonical(), ip(from), "{what}");
}

/// F1, F2: the meshes' validators, in every kind of pod, whoever comes first.
#[test]
fn f1_f2_validators_reach_their_own_listeners() {
    let lab = Lab::new("validate").expect("a lab");
    let mut agent = Agent::start(binary(), &lab).expect("the agent");
    let kinds = [
        ("v4", PodNet::V4, false, [true, false]),
        ("link", PodNet::V4, true, [true, true]),
        ("v6", PodNet::V6, false, [true, true]),
        ("dual", PodNet::DUAL, false, [true, true]),
    ];
    let istio: fn(&Pod) -> Value = Pod::manifest;
    for (name, net, link, kuma_validates) in kinds {
        for (mesh, uid, manifest) in [("istio", PROXY, istio), ("kuma", KUMA, kuma)] {
            for before in [true, false] {
                let what = format!("{mesh}-{name}-{before}");
                let pod = lab.pod(&what, net).expect("a pod");
                if link {
                    pod.sysctl("net.ipv6.conf.eth0.disable_ipv6", "0").expect("IPv6");
                    let has = || pod.ip("addr show dev eth0").is_ok_and(|t| t.contains("fe80"));
                    wait_until("a link-local address", SOON, has).expect("one");
                }
                let start =
                    || [15001, 15006].map(|port| listen(&pod, uid, port, &LOCALHOST.map(ip)));
                let early = before.then(start);
                agent.add_manifest(pod.name(), &manifest(&pod)).expect("a manifest");
                agent.wait_enrolled(&pod).expect("enrolled");
                let late = (!before).then(start);
                // Istio validates the family of the first address, Kuma IPv4 always.
                let validates = match mesh {
                    "istio" => [name != "v6", name == "v6"],
                    _ => kuma_validates,
                };
                for (v6, validates) in [false, true].into_iter().zip(validates) {
                    if validates {
                        assert_validates(&pod, uid, v6, &what);
                    }
                }
                drop((early, late));
            }
        }
    }
}

/// F1 under the real Istio: Go makes its listeners sockets of MPTCP, which no map takes.
#[test]
fn f1_a_validator_of_mptcp_reaches_its_own_listeners() {
    let lab = Lab::new("mpvalidate").expect("a lab");
    let mut agent = Agent::start(binary(), &lab).expect("the agent");
    for before in [true, false] {
        let pod = lab.pod(&format!("mptcp-{before}"), PodNet::DUAL).expect("a pod");
        let at = |port| LOCALHOST.map(|at| mptcp_listener(&pod, addr(ip(at), port)));
        let start = || [15001, 15006].map(at);
        let early = before.then(start);
        agent.add_pod(&pod).expect("a manifest");
        agent.wait_enrolled(&pod).expect("enrolled");
        let listeners = early.unwrap_or_else(start);
        for (n, (from, to)) in [("127.0.0.1", "127.0.0.6"), ("::1", "::6")].into_iter().enumerate()
        {
            let call = || {
                let socket = Socket::new(Domain::for_address(addr(ip(to), 0)), Type::STREAM, None)?;
                socket.bind(&addr(ip(from), 0).into())?;
                socket.connect_timeout(&addr(ip(to), 15002).into(), patience())?;
                socket.peer_addr()
            };
            let peer = pod.run(PROXY, PROXY, call).expect("runs");
            let peer = peer.unwrap_or_else(|error| panic!("{to}, before: {before}: {error}"));
            assert_eq!(peer.as_socket(), Some(addr(ip(to), 15002)));
            let (accepted, from_addr) = listeners[1][n].accept().expect("accepted at 15006");
            assert_eq!(from_addr.as_socket().map(|a| a.ip()), Some(ip(from)));
            let original = if to.contains(':') {
                accepted.original_dst_v6()
            } else {
                accepted.original_dst_v4()
            };
            let original = original.expect("an original destination").as_socket();
            assert_eq!(original, Some(addr(ip(to), 15002)));
        }
    }
}

/// F1, the reverse: localhost is nobody's off the pod, and the pod's address is not where its own
/// calls are led.
#[test]
fn f1_a_listener_is_reached_by_those_that_redirect_leads_to_it() {
    let mut node = Node::new("reached");
    let own = [node.a.ipv4(), node.a.ipv6()];
    // The kernel lists the first IPv4 address first, but the last IPv6 one.
    let second = [ip("10.77.250.9"), node.a.ipv6()];
    node.a.add_address(second[0], 16, "eth0", "").expect("a second address");
    let localhost = LOCALHOST.map(ip);
    let any = [ip("0.0.0.0"), ip("::")];
    let mut early = Some([15001, 15006].map(|port| listen(&node.a, PROXY, port, &localhost)));
    node.agent.add_pod(&node.a).expect("manifest a");
    node.agent.wait_enrolled(&node.a).expect("a is enrolled");
    for (what, at, within, off) in [
        ("localhost, before", localhost, true, false),
        ("localhost", localhost, true, false),
        ("the pod's address", own, false, true),
        ("all addresses", any, true, true),
    ] {
        let listeners = early
            .take()
            .unwrap_or_else(|| [15001, 15006].map(|port| listen(&node.a, PROXY, port, &at)));
        for n in 0..2 {
            let calls = [
                (&node.a, APP, ip([REMOTE4, REMOTE6][n]), within, "the app's call off the pod"),
                (&node.a, PROXY, own[n], within, "the proxy's call to its own pod"),
                (&node.a, PROXY, second[n], within, "to its second address"),
                (&node.b, APP, own[n], off, "a call to the pod"),
                (&node.b, APP, second[n], off, "a call to its second address"),
            ];
            for (pod, uid, to, reached, call) in calls {
                let what = format!("{what}: {call}, {to}");
                let answer = ask(pod, uid, to, 8080, None);
                if reached {
                    let answer = answer.unwrap_or_else(|e| panic!("{what}: {e:#}"));
                    assert_original(&answer, addr(to, 8080));
                } else {
                    assert_refused(answer, &what);
                }
            }
        }
        drop(listeners);
        // A child that another test is just starting may hold the sockets for a moment.
        let free = |port| std::net::TcpListener::bind(addr(any[1], port)).is_ok();
        wait_until("the ports to be free", SOON, || {
            node.a.run(0, 0, || free(15001) && free(15006)).expect("runs")
        })
        .expect("free");
    }
}

/// F30: the kernel's list is every pod's: only listeners that calls may be led to are in it,
/// whether the hooks saw them or the agent looked for them, so that no pod fills it.
#[test]
fn f30_only_listeners_that_calls_are_led_to_are_remembered() {
    let mut node = Node::new("remembered");
    // IP_FREEBIND takes no right.
    let bind = |at: &str| {
        let at = addr(ip(at), 15006);
        node.a.run(APP, APP, || {
            let socket =
                socket2::Socket::new(socket2::Domain::for_address(at), socket2::Type::STREAM, None)
                    .expect("a socket");
            if at.is_ipv4() {
                socket.set_freebind_v4(true).expect("IP_FREEBIND");
            } else {
                socket.set_freebind_v6(true).expect("IPV6_FREEBIND");
            }
            socket.bind(&at.into()).expect("bound");
            socket.listen(1).expect("listens");
            socket
        })
    };
    let own = node.a.ipv4().to_string();
    let wanted = ["127.0.0.1", "::1", &own];
    let second = "10.77.250.9";
    node.a.add_address(ip(second), 16, "eth0", "").expect("a second address");
    let others = ["127.0.0.2", "127.128.0.1", "192.0.2.1", "2001:db8::1", second];
    let all = || wanted.iter().chain(&others).map(|at| bind(at).expect("runs")).collect::<Vec<_>>();
    let known = |node: &Node| node.map("listeners").keys().count();
    let before = all();
    node.agent.add_pod(&node.a).expect("manifest a");
    node.agent.wait_enrolled(&node.a).expect("a is enrolled");
    assert_eq!(known(&node), wanted.len(), "older than the agent");
    drop(before);
    wait_until("all to be closed", SOON, || known(&node) == 0).expect("closed");
    let _after = all();
    assert_eq!(known(&node), wanted.len(), "newer than the agent");
}

/// F20: whoever listens elsewhere on the proxy's port is handed nothing, though he came first.
#[test]
fn f20_a_listener_elsewhere_on_loopback_is_handed_nothing() {
    let node = Node::with_manifest("squat", linkerd);
    let elsewhere = (0..64).map(|n| ip(&format!("127.128.0.{n}"))).chain([ip("127.0.0.2")]);
    let squatter = listen(&node.a, APP + 1, 4140, &elsewhere.collect::<Vec<_>>());
    let _proxy = listen(&node.a, 2102, 4140, &LOCALHOST.map(ip));
    for (target, _) in remotes(&node.a, 80) {
        for _ in 0..70 {
            let answer = node.a.ask(APP, APP, target).expect("the proxy");
            assert_original(&answer, target);
        }
    }
    assert!(squatter.seen().is_empty(), "{:?}", squatter.seen());
}

/// F2: a family that the pod has no address of is captured within the pod, but is not there off
/// it: the app is to go on with the other one.
#[test]
fn f2_f10_a_family_without_an_address_leads_nowhere() {
    let lab = Lab::new("nowhere").expect("a lab");
    let mut agent = Agent::start(binary(), &lab).expect("the agent");
    let pod = lab.pod("a", PodNet::V6).expect("a pod");
    agent.add_manifest("a", &kuma(&pod)).expect("a manifest");
    agent.wait_enrolled(&pod).expect("enrolled");
    let _sidecar = [15001, 15006].map(|port| listen(&pod, KUMA, port, &LOCALHOST.map(ip)));
    let error = ask(&pod, APP, ip(REMOTE4), 80, None).expect_err("no IPv4");
    let errno = error.downcast_ref::<std::io::Error>().and_then(std::io::Error::raw_os_error);
    let right = if kernel_before(6, 1) { Errno::EPERM } else { Errno::ENETUNREACH };
    assert_eq!(errno.map(Errno::from_raw), Some(right), "{error:#}");
    assert_original(&ask(&pod, APP, ip(REMOTE6), 80, None).expect("IPv6"), addr(ip(REMOTE6), 80));
    // F10: an address that the API server knows nothing of is one.
    pod.add_address(ip("169.254.172.5"), 22, "eth0", "").expect("an address");
    pod.ip("route add default via 169.254.172.1 dev eth0").expect("a route");
    let captured = || ask(&pod, APP, ip(REMOTE4), 80, None);
    wait_until("IPv4 to be captured", Duration::from_secs(20), || captured().is_ok())
        .unwrap_or_else(|error| panic!("{error:#}; {}", agent.log_tail()));
    let answer = captured().expect("captured");
    assert_original(&answer, addr(ip(REMOTE4), 80));
    assert_eq!(answer.seen.peer.ip().to_canonical(), ip("169.254.172.5"));
}
