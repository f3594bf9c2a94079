//! Beside the mesh's own rules: connect() takes outbound connections over, the rules do the rest,
//! and go on alone when Sidestep goes.

mod common;

use std::{
    net::{Ipv4Addr, Ipv6Addr, TcpStream},
    process::Command,
    sync::atomic::AtomicBool,
    thread,
};

use common::{
    load::{Finish, Load},
    *,
};
use libbpf_rs::MapCore;
use serde_json::Value;
use sidestep_lab::{
    Agent, Lab, Pod, PodNet, ServeOpts, Server, Talk,
    iptables::{self, Annotations, Kuma, Linkerd, Record},
    slowdown, wait_until,
};
use socket2::{Domain, Socket, Type};

const BESIDE: &[&str] = &["--pods-with-rules", "beside"];

/// A mesh's rules, and the pod and its sidecar that belong to them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rules {
    Istio,
    IstioLegacy,
    IstioNft,
    IstioDns,
    Linkerd,
    Kuma,
}

impl Rules {
    const ALL: [Self; 6] =
        [Self::Istio, Self::IstioLegacy, Self::IstioNft, Self::IstioDns, Self::Linkerd, Self::Kuma];

    fn install(self, pod: &Pod) {
        let annotations = Annotations::new();
        match self {
            Self::Istio => iptables::install_istio(pod),
            Self::IstioLegacy => iptables::install_legacy(pod, &Record::SIDECAR, true),
            Self::IstioNft => iptables::install_istio_nftables(pod),
            Self::IstioDns => iptables::install(pod, &Record::DNS, true),
            Self::Linkerd => iptables::install(pod, &Linkerd::new(&annotations), true),
            Self::Kuma => iptables::install(pod, &Kuma::new(&annotations, false), true),
        }
        .unwrap_or_else(|error| panic!("{self:?}: {error:#}"));
    }

    fn manifest(self, pod: &Pod) -> Value {
        match self {
            Self::Linkerd => linkerd(pod),
            Self::Kuma => kuma(pod),
            Self::IstioDns => {
                let mut manifest = pod.manifest();
                let env = &mut manifest["spec"]["containers"][1]["env"];
                let on = serde_json::json!({"name": "ISTIO_META_DNS_CAPTURE", "value": "true"});
                env.as_array_mut().expect("env").push(on);
                manifest
            }
            _ => pod.manifest(),
        }
    }

    /// Its name, the sidecar's user, and the ports of its listeners.
    fn mesh(self) -> (&'static str, u32, u16, u16) {
        match self {
            Self::Linkerd => ("linkerd", Linkerd::UID, Linkerd::OUTBOUND, Linkerd::INBOUND),
            Self::Kuma => ("kuma", Kuma::UID, 15001, 15006),
            _ => ("istio", PROXY, 15001, 15006),
        }
    }

    /// Whether connections of IPv6 are taken over: its sidecar listens at more than ::1.
    fn takes_v6(self) -> bool {
        self != Self::Linkerd
    }

    /// The sidecar: of IPv4 its outbound listener is where REDIRECT leads, and nowhere else;
    /// Linkerd's is so with IPv6 too.
    fn sidecar(self, pod: &Pod) -> Sidecar {
        let (_, _, outbound, inbound) = self.mesh();
        let v6 = if self.takes_v6() { Ipv6Addr::UNSPECIFIED } else { Ipv6Addr::LOCALHOST };
        let local = [addr(Ipv4Addr::LOCALHOST, outbound), addr(v6, outbound)];
        let opts = ServeOpts { talk: Talk::OriginalDst, ..ServeOpts::on(local) };
        Sidecar {
            outbound: Server::start(pod, opts).expect("outbound listener"),
            inbound: pod.fake_proxy(inbound).expect("inbound listener"),
        }
    }
}

/// A node with a pod that has these rules, taken in beside them, and another pod without an agent.
fn node(tag: &str, rules: Rules, flags: &[&str]) -> Node {
    let lab = Lab::new(tag).expect("a lab");
    let net = PodNet { v4: true, v6: true };
    let (a, b) = (lab.pod("a", net).expect("pod a"), lab.pod("b", net).expect("pod b"));
    rules.install(&a);
    let agent = Agent::start_on(binary(), &lab, lab.cgroup(), flags).expect("the agent");
    agent.add_manifest("a", &rules.manifest(&a)).expect("manifest a");
    Node { agent, a, b, lab }
}

/// The pod's mode, if it is enrolled.
fn mode(node: &Node) -> Option<String> {
    let status = node.agent.status().ok()?;
    let pod = status["pods"].as_array()?.iter().find(|pod| pod["pod"] == "lab/a")?.clone();
    Some(pod["mode"].as_str()?.to_owned())
}

#[track_caller]
fn becomes(node: &Node, wanted: Option<&str>) {
    let what = format!("the mode to be {wanted:?}");
    wait_until(&what, SOON * slowdown(), || mode(node).as_deref() == wanted)
        .unwrap_or_else(|error| panic!("{error:#}; {}", node.agent.log_tail()));
}

/// Everything of the pod that Sidestep might change, without the rules' counts.
fn state_of(pod: &Pod) -> String {
    let mut all = iptables::ruleset(pod).expect("rules");
    let netns = pod.netns();
    let name = netns.file_name().expect("a name");
    for what in ["addr show", "rule show", "-4 route show table all", "-6 route show table all"] {
        let mut ip = Command::new("ip");
        ip.arg("-n").arg(name).args(what.split(' '));
        let output = ip.output().expect("runs");
        assert!(output.status.success(), "{what}: {}", String::from_utf8_lossy(&output.stderr));
        all += &String::from_utf8_lossy(&output.stdout);
    }
    let mut is_count = false;
    let words = all.split_inclusive([' ', '\n']).filter(|word| {
        let was_count = std::mem::replace(&mut is_count, ["packets ", "bytes "].contains(word));
        !was_count && !word.starts_with('[')
    });
    words.collect()
}

#[test]
fn b1_b2_outbound_is_taken_over_and_the_rest_is_the_rules() {
    for rules in Rules::ALL {
        let mut node = node("b1", rules, BESIDE);
        let (mesh, proxy, ..) = rules.mesh();
        let before = state_of(&node.a);
        node.agent.wait_enrolled(&node.a).unwrap_or_else(|error| panic!("{rules:?}: {error:#}"));
        assert_eq!(mode(&node).as_deref(), Some("beside"), "{rules:?}");
        let sidecar = rules.sidecar(&node.a);
        let mut taken = 0;
        for (target, source) in remotes(&node.a, 80) {
            taken += u64::from(rules.takes_v6() || canonical(target).is_ipv4());
            let connect = || {
                let stream = sidestep_lab::connect(target, None).expect("captured");
                (greeting(&stream), stream.peer_addr().expect("a peer"))
            };
            let (seen, peer) = node.a.run(APP, APP, connect).expect("runs");
            let what = format!("{rules:?} {target}: {seen:?}");
            assert_eq!(seen.original().map(canonical), Some(canonical(target)), "{what}");
            assert_eq!((seen.peer.ip().to_canonical(), peer), (source, target), "{what}");
            assert_eq!(node.counter(mesh, "captured_outbound"), taken, "{what}");
        }
        // Inbound, and the sidecar's calls to its own pod: conntrack answers, not Sidestep.
        let answered = node.counter(mesh, "origdst_answered");
        for target in addresses(&node.a, 8080) {
            let answer = node.b.ask(APP, APP, target).expect("redirected by the rules");
            assert_original(&answer, target);
            if rules != Rules::Linkerd {
                let own = node.a.ask(proxy, proxy, target).expect("redirected by the rules");
                assert_original(&own, target);
            }
        }
        if rules == Rules::IstioDns {
            let _dns = node.a.fake_proxy(15053).expect("DNS listener");
            for (target, _) in remotes(&node.a, 53) {
                let answer = node.a.ask(APP, APP, target).expect("redirected by the rules");
                assert_eq!(answer.seen.local.port(), 15053);
                assert_original(&answer, target);
            }
        }
        if rules == Rules::IstioDns {
            let at = addr(Ipv4Addr::LOCALHOST, 15053);
            let resolver = node.a.run(proxy, proxy, || udp(at)).expect("runs");
            resolver.set_read_timeout(Some(patience())).expect("set");
            let asked = addr(ip(REMOTE4), 53);
            for is_connected in [true, false] {
                let ask = || {
                    let socket = udp(addr([0, 0, 0, 0], 0));
                    socket.set_read_timeout(Some(patience())).expect("set");
                    if is_connected {
                        socket.connect(asked).expect("connected");
                        socket.send(b"question").expect("sent");
                    } else {
                        socket.send_to(b"question", asked).expect("sent");
                    }
                    socket
                };
                let app = node.a.run(APP, APP, ask).expect("runs");
                let mut bytes = [0; 16];
                let (_, from) = resolver.recv_from(&mut bytes).expect("redirected by the rules");
                resolver.send_to(b"answer", from).expect("sent");
                let (len, source) = app.recv_from(&mut bytes).expect("an answer");
                assert_eq!((&bytes[..len], source), (&b"answer"[..], asked));
            }
        }
        assert_eq!(node.counter(mesh, "origdst_answered"), answered, "{rules:?}");
        for name in ["steered_inbound", "captured_self", "captured_dns"] {
            assert_eq!(node.counter(mesh, name), 0, "{rules:?} {name}");
        }
        assert_eq!(state_of(&node.a), before, "{rules:?}: while it runs");
        node.agent.terminate().expect("ends");
        node.agent.unload().expect("unloads");
        assert_eq!(state_of(&node.a), before, "{rules:?}: afterwards");
        let (target, source) = remotes(&node.a, 82)[0];
        let answer = node.a.ask(APP, APP, target).expect("the rules do it");
        assert_original(&answer, target);
        assert_eq!(answer.seen.peer.ip(), source);
        drop(sidecar);
    }
}

/// A socket with a port of its own is the rules', and reaches the sidecar all the same.
#[test]
fn b2_a_socket_with_a_port_of_its_own_is_the_rules() {
    let mut node = node("b2", Rules::Istio, BESIDE);
    node.agent.wait_enrolled(&node.a).expect("enrolled");
    let _sidecar = Rules::Istio.sidecar(&node.a);
    for (port, (target, source)) in (4567..).zip(remotes(&node.a, 80)) {
        let seen = node.a.run(APP, APP, || {
            let socket = Socket::new(Domain::for_address(target), Type::STREAM, None);
            let socket = socket.expect("a socket");
            let at = if target.is_ipv4() {
                any(target, port)
            } else {
                addr(Ipv6Addr::UNSPECIFIED, port)
            };
            socket.bind(&at.into()).expect("bound");
            socket.connect(&target.into()).expect("redirected by the rules");
            greeting(&TcpStream::from(socket))
        });
        let seen = seen.expect("runs");
        assert_eq!(seen.original().map(canonical), Some(canonical(target)), "{target}");
        assert_eq!(canonical(seen.peer), addr(source, port), "{target}");
    }
    assert_eq!(node.counter("istio", "captured_outbound"), 0);
}

#[test]
fn b3_traffic_does_not_notice_that_sidestep_comes_dies_and_goes() {
    for rules in [Rules::Istio, Rules::Linkerd] {
        let mut node = node("b3", rules, BESIDE);
        let (mesh, ..) = rules.mesh();
        let before = state_of(&node.a);
        let _sidecar = rules.sidecar(&node.a);
        let stop = AtomicBool::new(false);
        let loads =
            ["outbound", "outbound v6", "inbound", "inbound v6"].map(|name| Load::new(name, &stop));
        let (a, b) = (&node.a, &node.b);
        let paths = [
            (a, addr(ip(REMOTE4), 80)),
            (a, addr(ip(REMOTE6), 80)),
            (b, addr(a.ipv4(), 8080)),
            (b, addr(a.ipv6(), 8080)),
        ];
        let more = |n| loads.iter().for_each(|load| load.wait_more(bulk(n)));
        let manifest = rules.manifest(&node.a);
        thread::scope(|scope| {
            for (load, (from, target)) in loads.iter().zip(paths) {
                scope.spawn(move || load.run(from, target));
            }
            let finish = Finish(&stop);
            node.agent.wait_enrolled(&node.a).expect("enrolled");
            more(50);
            node.agent.kill9();
            more(50);
            node.agent.restart().expect("starts");
            more(50);
            // Off and on again.
            for wanted in ["off", "beside", "off", "beside"] {
                let asks = annotated(manifest.clone(), "sidestep.io/mode", wanted);
                node.agent.add_manifest("a", &asks).expect("asks");
                let enrolled = Some(wanted).filter(|wanted| *wanted == "beside");
                wait_until("its mode", SOON * slowdown(), || {
                    let status = node.agent.status().expect("status");
                    let pods = status["pods"].as_array().expect("pods");
                    pods.first().and_then(|pod| pod["mode"].as_str()) == enrolled
                })
                .expect("changed");
                more(30);
            }
            let status = node.agent.status().expect("status");
            let taken = status["counters"][mesh]["captured_outbound"].as_u64();
            assert!(taken >= Some(u64::from(bulk(100))), "{status}");
            node.agent.terminate().expect("ends");
            node.agent.unload().expect("unloads");
            more(100);
            drop(finish);
        });
        assert_eq!(state_of(&node.a), before, "{rules:?}");
    }
}

#[test]
fn b4_rules_annotation_and_flag_choose_the_mode() {
    let mut node = node("b4", Rules::Istio, &[]);
    let plain = node.a.manifest();
    let asks = |node: &Node, text: &str| {
        let manifest = annotated(plain.clone(), "sidestep.io/mode", text);
        node.agent.add_manifest("a", &manifest).expect("a manifest");
    };
    // By default a pod with rules is left alone, and the node is told.
    node.agent.wait_log("has the mesh's own rules").expect("told");
    assert_eq!(mode(&node), None);
    asks(&node, "beside");
    becomes(&node, Some("beside"));
    // What cannot be.
    asks(&node, "instead");
    becomes(&node, None);
    let told = "pod lab/a: sidestep.io/mode: \"instead\" is not possible: its network namespace has \
                the mesh's own rules, so its mode is \"off\"";
    node.agent.wait_log(told).expect("told");
    // What is no mode, and what will be one.
    for text in ["Beside", "shadow", ""] {
        asks(&node, text);
        let told = format!("sidestep.io/mode: {text:?}: expected off, instead or beside");
        node.agent.wait_log("pod lab/a: its mode is").expect("the pod is named");
        node.agent.wait_log(&told).expect("told");
        becomes(&node, None);
    }
    // A wrong value opens no hole where the pod has no rules.
    iptables::remove(&node.a).expect("removed");
    becomes(&node, Some("instead"));
    asks(&node, "beside");
    node.agent.wait_log("so Sidestep decides everything").expect("told");
    becomes(&node, Some("instead"));
    asks(&node, "off");
    becomes(&node, None);
    // Rules that appear and go.
    node.agent.restart_with(BESIDE).expect("starts");
    node.agent.add_manifest("a", &plain).expect("a manifest");
    becomes(&node, Some("instead"));
    node.agent.wait_enrolled(&node.a).expect("enrolled");
    // Its lo has what was added to it, so IPv4 will do.
    iptables::install(&node.a, &Record::SIDECAR, false).expect("rules");
    becomes(&node, Some("beside"));
    let _sidecar = Rules::Istio.sidecar(&node.a);
    let inbound = addr(node.a.ipv4(), 8080);
    let steered = node.counter("istio", "steered_inbound");
    assert_original(&node.b.ask(APP, APP, inbound).expect("by the rules"), inbound);
    assert_eq!(node.counter("istio", "steered_inbound"), steered);
    node.a.nft("delete table ip nat\n").expect("removed");
    becomes(&node, Some("instead"));
    node.agent.wait_enrolled(&node.a).expect("enrolled");
    assert_original(&node.b.ask(APP, APP, inbound).expect("steered"), inbound);
    assert_eq!(node.counter("istio", "steered_inbound"), steered + 1);
}

#[test]
fn b5_rules_that_cannot_be_made_out_are_left_alone() {
    let spoil: [(&str, &str, &str); 4] = [
        (
            "foreign",
            "insert rule ip nat OUTPUT ip daddr 192.0.2.1 tcp dport 80 dnat to 192.0.2.2:80\n",
            "chain OUTPUT of table nat (IPv4) has a rule that is not istio's",
        ),
        ("half", "flush chain ip nat PREROUTING\n", "none leads inbound connections to port 15006"),
        (
            "two",
            "add chain ip nat PROXY_INIT_OUTPUT\n",
            "it has rules of istio and linkerd at once",
        ),
        (
            "port",
            "flush chain ip nat ISTIO_REDIRECT\nadd rule ip nat ISTIO_REDIRECT \
             meta l4proto tcp redirect to :15101\n",
            "it redirects to port 15101",
        ),
    ];
    for (tag, rules, why) in spoil {
        let node = node(tag, Rules::Istio, BESIDE);
        becomes(&node, Some("beside"));
        node.a.nft(rules).unwrap_or_else(|error| panic!("{tag}: {error:#}"));
        becomes(&node, None);
        node.agent.wait_log(why).unwrap_or_else(|error| panic!("{tag}: {error:#}"));
    }
    let twice = node("twice", Rules::Istio, BESIDE);
    becomes(&twice, Some("beside"));
    iptables::install_legacy(&twice.a, &Record::SIDECAR, false).expect("legacy rules");
    becomes(&twice, None);
    twice.agent.wait_log("in nf_tables and in iptables' legacy tables").expect("told");
}

/// The init container says that rules will come: until then the pod is nobody's.
#[test]
fn b6_a_pod_whose_init_container_brings_rules_waits_for_them() {
    let lab = Lab::new("b6").expect("a lab");
    let net = PodNet { v4: true, v6: true };
    let (a, b) = (lab.pod("a", net).expect("pod a"), lab.pod("b", net).expect("pod b"));
    let agent = Agent::start_on(binary(), &lab, lab.cgroup(), BESIDE).expect("the agent");
    let mut manifest = a.manifest();
    manifest["spec"]["initContainers"] = serde_json::json!([{"name": "istio-init"}]);
    agent.add_manifest("a", &manifest).expect("manifest a");
    agent.add_pod(&b).expect("manifest b");
    let mut node = Node { agent, a, b, lab };
    node.agent.wait_enrolled(&node.b).expect("b is enrolled");
    assert_eq!(mode(&node), None, "not yet");
    Rules::Istio.install(&node.a);
    becomes(&node, Some("beside"));
}

/// A connection that nobody takes gives its place among the pod's handshakes back.
#[test]
fn b7_what_nobody_takes_leaves_room_for_others() {
    let mut node = node("b7", Rules::Istio, BESIDE);
    node.agent.wait_enrolled(&node.a).expect("enrolled");
    let target = addr(ip(REMOTE4), 80);
    let refuse = || {
        for _ in 0..600 {
            sidestep_lab::connect(target, None).expect_err("nobody listens");
        }
    };
    node.a.run(APP, APP, refuse).expect("runs");
    assert_eq!(node.counter("istio", "captured_outbound"), 600, "more than a pod may have");
    assert_eq!(node.map("handovers").keys().count(), 0);
}
