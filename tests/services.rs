//! Services at the socket layer, through real sockets: what a process that dials a Service's
//! address gets, and what it is told. The rows are those of docs/services.md.

mod common;

use std::{
    collections::BTreeSet,
    io::{self, ErrorKind},
    net::TcpStream,
};

use common::{services::*, *};
use serde_json::{Value, json};
use sidestep_lab::{Agent, Lab, Pod, PodNet, ServeOpts, Server, wait_for};

#[test]
fn r2_r3_r4_tcp_lands_on_a_backend_and_getpeername_says_the_service() {
    let cluster = Cluster::new("s2");
    let _servers = cluster.backends.each_ref().map(Cluster::tcp_on);
    for target in vips() {
        let mut met = BTreeSet::new();
        for _ in 0..40 {
            let answer = cluster.dial(target).expect("a backend answers");
            assert_eq!(answer.peer, target, "getpeername");
            let at = answer.seen.local;
            assert_eq!(at.port(), TARGET);
            met.extend(cluster.number(at.ip()));
            let own = [cluster.client.ipv4(), cluster.client.ipv6()];
            assert!(own.contains(&answer.seen.peer.ip().to_canonical()), "no NAT: {answer:?}");
        }
        assert_eq!(met, [0, 1].into(), "{target}: both backends have a share");
    }
    assert!(cluster.counter("service_tcp4") >= 80 && cluster.counter("service_tcp6") >= 40);
}

#[test]
fn r23_the_nodes_own_processes_reach_services() {
    let cluster = Cluster::new("s23");
    let _servers = cluster.backends.each_ref().map(Cluster::tcp_on);
    for target in vips() {
        let answer = cluster.lab.on_node(|| sidestep_lab::ask(target, None)).expect("runs");
        let answer = answer.expect("a backend answers");
        assert_eq!(answer.peer, target);
        assert!(cluster.number(answer.seen.local.ip()).is_some(), "{answer:?}");
    }
}

#[test]
fn r1_a_captured_socket_keeps_the_services_address() {
    let cluster = Cluster::with("s1", Pod::manifest);
    let _sidecar = Sidecar::start(&cluster.client);
    let _servers = cluster.backends.each_ref().map(Cluster::tcp_on);
    for target in vips() {
        let answer = cluster.client.ask(APP, APP, target).expect("captured");
        assert_original(&answer, target);
        assert_eq!(answer.seen.local.port(), 15001, "by the sidecar's listener");
        // The sidecar's own call is not captured, and translated.
        let answer = cluster.client.ask(PROXY, PROXY, target).expect("a backend answers");
        assert_eq!(answer.peer, target);
        assert!(cluster.number(answer.seen.local.ip()).is_some(), "{answer:?}");
    }
}

#[test]
fn r5_connected_udp_keeps_its_backend_and_is_told_the_service() {
    let cluster = Cluster::new("s5c");
    let _echoes =
        [Echo::start(&cluster.backends[0], "one"), Echo::start(&cluster.backends[1], "two")];
    for target in vips() {
        let talk = || {
            let socket = udp_socket(target);
            socket.connect(target).expect("connected");
            assert_eq!(socket.peer_addr().expect("a peer"), target);
            let mut words = BTreeSet::new();
            for _ in 0..10 {
                socket.send(b"?").expect("sent");
                let (word, from) = answer(&socket).expect("an answer");
                assert_eq!(from, target, "where it comes from");
                words.insert(word);
            }
            words
        };
        let mut met = BTreeSet::new();
        for _ in 0..20 {
            let words = cluster.client.run(APP, APP, talk).expect("runs");
            assert_eq!(words.len(), 1, "one backend for one connection: {words:?}");
            met.extend(words);
        }
        assert_eq!(met.len(), 2, "{target}: both have a share");
    }
}

#[test]
fn r5_unconnected_udp_keeps_a_backend_for_each_service() {
    let cluster = Cluster::new("s5u");
    let _echoes =
        [Echo::start(&cluster.backends[0], "one"), Echo::start(&cluster.backends[1], "two")];
    let mut met = BTreeSet::new();
    for target in vips() {
        for _ in 0..12 {
            let words = cluster.client.run(APP, APP, || {
                let socket = udp_socket(target);
                let mut words = BTreeSet::new();
                for _ in 0..5 {
                    socket.send_to(b"?", target).expect("sent");
                    let (word, from) = answer(&socket).expect("an answer");
                    assert_eq!(from, target, "where it comes from");
                    words.insert(word);
                }
                words
            });
            let words = words.expect("runs");
            assert_eq!(words.len(), 1, "{words:?}");
            met.extend(words);
        }
    }
    assert_eq!(met.len(), 2);
}

#[test]
fn r5_one_socket_asks_two_ports_of_a_service_and_knows_who_answers() {
    let cluster = Cluster::new("s5t");
    let _echoes =
        [Echo::start(&cluster.backends[0], "one"), Echo::start(&cluster.backends[1], "two")];
    let mut web = service("web", &[VIP4, VIP6]);
    let more = json!({"name": "more", "protocol": "UDP", "port": PORT + 1});
    web["spec"]["ports"].as_array_mut().expect("ports").push(more);
    let mut others = slice("web-more", "web", &[cluster.backends[1].ipv4()], &ready());
    others["ports"] = json!([{"name": "more", "protocol": "UDP", "port": TARGET}]);
    cluster.endpoints(&[&cluster.backends[0]], &ready());
    cluster.set("web", &web);
    cluster.set("web-more", &others);
    let targets = [PORT, PORT + 1].map(|port| addr(ip(VIP4), port));
    cluster.wait_backends(VIP4, 1);
    let second = || {
        let all = cluster.status();
        let one = all.iter().find(|one| one["address"] == targets[1].to_string())?;
        (one["backends"].as_array()?.len() == 1).then_some(())
    };
    wait_for("the second port", SOON, second).expect("its endpoint");
    let answers = cluster.client.run(APP, APP, || {
        let socket = udp_socket(targets[0]);
        // Both are asked before the first answer is read.
        for target in targets {
            socket.send_to(b"?", target).expect("sent");
        }
        targets.map(|_| answer(&socket).expect("an answer"))
    });
    let mut answers = answers.expect("runs");
    answers.sort();
    assert_eq!(answers, [("one".into(), targets[0]), ("two".into(), targets[1])]);
}

#[test]
fn r5_an_unconnected_socket_leaves_a_backend_that_is_not_eligible() {
    let cluster = Cluster::new("s5g");
    let _echoes =
        [Echo::start(&cluster.backends[0], "one"), Echo::start(&cluster.backends[1], "two")];
    let target = addr(ip(VIP4), PORT);
    let socket = cluster.client.run(APP, APP, || udp_socket(target)).expect("runs");
    socket.send_to(b"?", target).expect("sent");
    let (first, _) = answer(&socket).expect("an answer");
    let stays = usize::from(first == "one");
    cluster.endpoints(&[&cluster.backends[stays]], &ready());
    cluster.wait_backends(VIP4, 1);
    socket.send_to(b"?", target).expect("sent");
    let (second, from) = answer(&socket).expect("an answer");
    assert_ne!(first, second, "its backend was gone");
    assert_eq!(from, target);
}

#[test]
fn r6_a_service_without_endpoints_refuses_at_once() {
    let cluster = Cluster::new("s6");
    cluster.endpoints(&[], &ready());
    cluster.wait_backends(VIP4, 0);
    cluster.wait_backends(VIP6, 0);
    for target in vips() {
        let outcome = cluster.client.run(APP, APP, || {
            let tcp = TcpStream::connect_timeout(&target, patience()).err();
            let udp = udp_socket(target);
            (tcp, udp.connect(target).err(), udp_socket(target).send_to(b"?", target).err())
        });
        let (tcp, connected, sent) = outcome.expect("runs");
        let kind = |error: Option<io::Error>| error.expect("refused").kind();
        assert_eq!(kind(tcp), ErrorKind::ConnectionRefused, "{target}: TCP");
        if !kernel_before(5, 18) {
            assert_eq!(kind(connected), ErrorKind::ConnectionRefused, "{target}: UDP");
            assert_eq!(kind(sent), ErrorKind::ConnectionRefused, "{target}: sendto");
        }
    }
    assert!(cluster.counter("service_refused") >= 3);
}

#[test]
fn r13_r14_backends_come_and_go() {
    let cluster = Cluster::new("s13");
    let _servers = cluster.backends.each_ref().map(Cluster::tcp_on);
    let target = addr(ip(VIP4), PORT);
    let landed = |n: usize| {
        for _ in 0..20 {
            let answer = cluster.dial(target).expect("a backend answers");
            assert_eq!(cluster.number(answer.seen.local.ip()), Some(n), "{answer:?}");
        }
    };
    let open = cluster.client.run(APP, APP, || TcpStream::connect(target)).expect("runs");
    let open = open.expect("connected");
    for n in [0, 1, 0] {
        cluster.endpoints(&[&cluster.backends[n]], &ready());
        let only = json!([addr(cluster.backends[n].ipv4(), TARGET)]);
        let has = |service: &Value| service["backends"] == only && service["protocol"] == "TCP";
        let is_it = || cluster.status().iter().any(has).then_some(());
        wait_for("that backend alone", SOON, is_it).expect("that backend alone");
        landed(n);
    }
    // One that terminates and serves has what is new only where none is ready.
    let ending = json!({"ready": false, "serving": true, "terminating": true});
    cluster.endpoints(&[&cluster.backends[1]], &ending);
    let there = || {
        let answer = cluster.dial(target).ok()?;
        (cluster.number(answer.seen.local.ip()) == Some(1)).then_some(())
    };
    wait_for("the backend that terminates to be used", SOON, there).expect("used");
    assert_eq!(open.peer_addr().expect("open still"), target);
}

#[test]
fn r12_a_service_is_deleted_and_its_address_given_to_another() {
    let cluster = Cluster::new("s12");
    let _servers = cluster.backends.each_ref().map(Cluster::tcp_on);
    let target = addr(ip(VIP4), PORT);
    cluster.remove("web");
    let is_gone = || cluster.status().is_empty().then_some(());
    wait_for("the Service to go", SOON, is_gone).expect("gone");
    let error = cluster.dial(target).expect_err("nobody has the address");
    assert!(!error.contains("refused"), "left as it is: {error}");
    cluster.set("next", &service("next", &[VIP4]));
    let to = slice("next-4", "next", &[cluster.backends[1].ipv4()], &ready());
    cluster.set("next-4", &to);
    cluster.wait_backends(VIP4, 1);
    let answer = cluster.dial(target).expect("the new Service answers");
    assert_eq!(cluster.number(answer.seen.local.ip()), Some(1));
}

#[test]
fn r10_affinity_binds_a_client_to_its_backend() {
    let cluster = Cluster::new("s10");
    let _servers = cluster.backends.each_ref().map(Cluster::tcp_on);
    let mut sticky = service("web", &[VIP4, VIP6]);
    sticky["spec"]["sessionAffinity"] = "ClientIP".into();
    sticky["spec"]["sessionAffinityConfig"] = json!({"clientIP": {"timeoutSeconds": 600}});
    cluster.set("web", &sticky);
    let target = addr(ip(VIP4), PORT);
    let land = || {
        let answer = cluster.dial(target).expect("a backend answers");
        cluster.number(answer.seen.local.ip()).expect("a backend")
    };
    let affine = || {
        let met: BTreeSet<usize> = (0..12).map(|_| land()).collect();
        (met.len() == 1).then(|| met.into_iter().next().unwrap_or_default())
    };
    let n = wait_for("affinity", SOON, affine).expect("one backend for the client");
    // It is forgotten where the backend is not eligible any more, and not taken up again after.
    cluster.endpoints(&[&cluster.backends[1 - n]], &ready());
    cluster.wait_backends(VIP4, 1);
    assert_eq!(land(), 1 - n);
    cluster.endpoints(&cluster.backends.each_ref(), &ready());
    cluster.wait_backends(VIP4, 2);
    for _ in 0..10 {
        assert_eq!(land(), 1 - n, "the client's last backend");
    }
    cluster.set("web", &service("web", &[VIP4, VIP6]));
    let free = || {
        let met: BTreeSet<usize> = (0..20).map(|_| land()).collect();
        (met.len() == 2).then_some(())
    };
    wait_for("the end of affinity", SOON, free).expect("both backends again");
}

#[test]
fn r15_a_new_agent_takes_over_what_the_last_one_wrote() {
    let mut cluster = Cluster::new("s15");
    let _servers = cluster.backends.each_ref().map(Cluster::tcp_on);
    let target = addr(ip(VIP4), PORT);
    cluster.agent.kill9();
    cluster.dial(target).expect("the programs stay");
    // What changes meanwhile is in force once the next agent has read it.
    cluster.endpoints(&[&cluster.backends[1]], &ready());
    let Cluster { agent, lab, .. } = &mut cluster;
    lab.on_node(|| agent.restart()).expect("runs").expect("restarted");
    cluster.wait_backends(VIP4, 1);
    for _ in 0..10 {
        let answer = cluster.dial(target).expect("a backend answers");
        assert_eq!(cluster.number(answer.seen.local.ip()), Some(1));
    }
    assert_eq!(cluster.status().len(), 4, "{:?}", cluster.status());
}

#[test]
fn r18_r39_what_is_no_services_goes_on_as_it_is() {
    let cluster = Cluster::new("s18");
    let direct = addr(cluster.backends[0].ipv4(), TARGET);
    let _servers = cluster.backends.each_ref().map(Cluster::tcp_on);
    let answer = cluster.dial(direct).expect("a pod answers");
    assert_eq!((answer.peer, canonical(answer.seen.local)), (direct, direct));
    let error = cluster.dial(addr(ip(VIP4), PORT + 1)).expect_err("an unknown port");
    assert!(!error.contains("refused"), "left to kube-proxy: {error}");
    assert!(cluster.counter("service_missed") >= 2);
}

#[test]
fn r18_a_port_is_one_protocols_alone() {
    let cluster = Cluster::new("s18p");
    let _apps = cluster.backends.each_ref().map(Cluster::tcp_on);
    let _echo = Echo::start(&cluster.backends[0], "udp");
    let target = addr(ip(VIP4), PORT);
    let mut web = service("web", &[VIP4, VIP6]);
    web["spec"]["ports"].as_array_mut().expect("ports").remove(0);
    cluster.endpoints(&[&cluster.backends[0]], &ready());
    cluster.set("web", &web);
    let is_udps = || {
        let of: Vec<Value> =
            cluster.status().into_iter().map(|one| one["protocol"].clone()).collect();
        (of == ["UDP", "UDP"]).then_some(())
    };
    wait_for("the port to be UDP's alone", SOON, is_udps).expect("UDP's alone");
    cluster.wait_backends_of("UDP", VIP4, 1);
    let error = cluster.dial(target).expect_err("nobody has it over TCP");
    assert!(!error.contains("refused"), "left to kube-proxy: {error}");
    let asked = cluster.client.run(APP, APP, || {
        let socket = udp_socket(target);
        socket.send_to(b"?", target).expect("sent");
        let sent = answer(&socket);
        socket.connect(target).expect("connected");
        socket.send(b"?").expect("sent");
        (sent, answer(&socket))
    });
    let (sent, connected) = asked.expect("runs");
    assert_eq!(sent.expect("an answer to sendto"), ("udp".into(), target));
    assert_eq!(connected.expect("an answer to send").0, "udp");
}

#[test]
fn r19_a_pod_that_opts_out_is_left_to_kube_proxy_at_once() {
    let cluster = Cluster::new("s19");
    let _servers = cluster.backends.each_ref().map(Cluster::tcp_on);
    let target = addr(ip(VIP4), PORT);
    cluster.dial(target).expect("translated");
    cluster.set("client", &annotated(plain(&cluster.client), "sidestep.io/services", "disabled"));
    let passes = || {
        cluster.dial(target).err()?;
        Some(())
    };
    wait_for("the pod to be left alone", SOON, passes).expect("left alone");
    assert!(cluster.counter("service_passed") >= 1);
    cluster.set("client", &plain(&cluster.client));
    let back = || cluster.dial(target).ok();
    wait_for("the pod to be translated again", SOON, back).expect("translated");
    cluster.set("client", &annotated(plain(&cluster.client), "sidestep.io/services", "maybe"));
    cluster.agent.wait_log("sidestep.io/services").expect("the key is named");
    cluster.agent.wait_log("maybe").expect("the text is named");
}

#[test]
fn r22_what_a_socket_dialled_is_compared_with_its_peer() {
    let cluster = Cluster::new("s22");
    let _echoes =
        [Echo::start(&cluster.backends[0], "one"), Echo::start(&cluster.backends[1], "two")];
    let target = addr(ip(VIP4), PORT);
    let directs = cluster.backends.each_ref().map(|pod| addr(pod.ipv4(), TARGET));
    let told = cluster.client.run(APP, APP, || {
        let socket = udp_socket(target);
        socket.connect(target).expect("connected");
        let first = socket.peer_addr().expect("a peer");
        // Straight to each backend, the one that the Service had led to among them.
        let direct = directs.map(|direct| {
            socket.connect(direct).expect("connected");
            let peer = socket.peer_addr().expect("a peer");
            socket.send(b"?").expect("sent");
            (peer, answer(&socket).expect("an answer").1)
        });
        socket.connect(target).expect("connected");
        (first, direct, socket.peer_addr().expect("a peer"))
    });
    let (first, direct, last) = told.expect("runs");
    assert_eq!((first, last), (target, target));
    assert_eq!(direct, directs.map(|at| (at, at)), "dialled by themselves");
}

#[test]
fn r24_a_pod_reaches_itself_by_its_own_service() {
    let cluster = Cluster::new("s24");
    let _server = Cluster::tcp_on(&cluster.client);
    cluster.endpoints(&[&cluster.client], &ready());
    cluster.wait_backends(VIP4, 1);
    for target in vips() {
        let answer = cluster.dial(target).expect("the pod itself answers");
        assert!(cluster.client.ips().contains(&answer.seen.peer.ip().to_canonical()), "{answer:?}");
        assert_eq!(answer.peer, target);
    }
}

#[test]
fn r37_a_pod_whose_own_rules_translate_is_left_alone() {
    let cluster = Cluster::new("s37");
    let _servers = cluster.backends.each_ref().map(Cluster::tcp_on);
    let target = addr(ip(VIP4), PORT);
    cluster.dial(target).expect("translated");
    let rules = "table ip mesh { chain out { type nat hook output priority -100; \
                 ip daddr 192.0.2.1 dnat to 192.0.2.2; }; }\n";
    cluster.client.nft(rules).expect("rules");
    wait_for("the pod to be left alone", SOON, || cluster.dial(target).err()).expect("left alone");
    cluster.client.nft("delete table ip mesh\n").expect("deleted");
    wait_for("the pod to be translated", SOON, || cluster.dial(target).ok()).expect("translated");
}

#[test]
fn r38_an_address_of_the_node_itself_is_not_translated() {
    let cluster = Cluster::new("s38");
    let _servers = cluster.backends.each_ref().map(Cluster::tcp_on);
    let at = addr(ip(VIP4), PORT);
    cluster.lab.add_node_address(at.ip()).expect("an address");
    let cache = cluster.lab.on_node(|| Server::start_here(ServeOpts::on([at]))).expect("runs");
    let _cache = cache.expect("a server on the node");
    let own = || {
        let answer = cluster.dial(at).ok()?;
        (answer.seen.local == at).then_some(())
    };
    wait_for("the node's own server to answer", SOON, own).expect("it answers");
}

#[test]
fn r41_an_address_that_two_services_claim_is_the_older_ones() {
    let cluster = Cluster::new("s41");
    let mut rival = service("rival", &[OTHER4]);
    rival["metadata"]["creationTimestamp"] = "2026-02-01T00:00:00Z".into();
    rival["spec"]["type"] = "LoadBalancer".into();
    rival["status"] = json!({"loadBalancer": {"ingress": [{"ip": VIP4, "ipMode": "VIP"}]}});
    cluster.set("rival", &rival);
    cluster.agent.wait_log("shop/rival").expect("the rival is named");
    cluster.wait_backends(VIP4, 2);
}

#[test]
fn r40_r43_bad_endpoints_and_ports_are_named_and_the_rest_goes_on() {
    let cluster = Cluster::new("s40");
    let _servers = cluster.backends.each_ref().map(Cluster::tcp_on);
    let mut odd = service("odd", &[OTHER4]);
    odd["spec"]["ports"]
        .as_array_mut()
        .expect("ports")
        .push(json!({"name": "sctp", "protocol": "SCTP", "port": 81}));
    cluster.set("odd", &odd);
    let ips = [ip("127.0.0.1"), ip("169.254.169.254"), cluster.backends[0].ipv4()];
    cluster.set("odd-4", &slice("odd-4", "odd", &ips, &ready()));
    cluster.wait_backends(OTHER4, 1);
    for named in ["127.0.0.1", "169.254.169.254", "shop/odd-4"] {
        cluster.agent.wait_log(named).unwrap_or_else(|error| panic!("{named}: {error:#}"));
    }
    let answer = cluster.dial(addr(ip(OTHER4), PORT)).expect("the good endpoint answers");
    assert_eq!(cluster.number(answer.seen.local.ip()), Some(0));
}

#[test]
fn a_document_that_is_neither_pod_nor_service_is_named() {
    let cluster = Cluster::new("sbad");
    cluster.set("bad", &json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s"}}));
    cluster.agent.wait_log("found v1 Secret").expect("the kind is named");
    cluster.wait_backends(VIP4, 2);
}

#[test]
fn without_the_flag_nothing_is_translated() {
    let lab = Lab::new("soff").expect("a lab");
    let client = lab.pod("client", PodNet::DUAL).expect("a client");
    let agent = Agent::start(binary(), &lab).expect("the agent");
    agent.add_manifest("client", &plain(&client)).expect("manifest");
    agent.add_manifest("web", &service("web", &[VIP4])).expect("manifest");
    agent.wait_log("expected a v1 Pod, found v1 Service").expect("named");
    let error = client.ask(APP, APP, addr(ip(VIP4), PORT)).expect_err("nobody has the address");
    assert!(!format!("{error:#}").contains("refused"), "{error:#}");
}
