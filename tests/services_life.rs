//! Services while things end: endpoints, room in the maps, the agent, the programs. The rows are
//! those of docs/services.md.

mod common;

use std::{
    fs,
    io::{self, BufRead, BufReader, ErrorKind},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream, UdpSocket},
};

use common::{services::*, *};
use serde_json::{Value, json};
use sidestep_lab::{Agent, Lab, PodNet, wait_for};
use socket2::SockRef;

/// A UDP socket that is connected to a target.
fn connected(target: SocketAddr) -> UdpSocket {
    let socket = udp_socket(target);
    socket.connect(target).expect("connected");
    socket
}

/// Asks by a connected socket.
fn word(socket: &UdpSocket) -> io::Result<String> {
    socket.send(b"?")?;
    Ok(answer(socket)?.0)
}

/// What a socket was told meanwhile; asking takes that away.
fn aborted(socket: &UdpSocket) -> Option<()> {
    let error = socket.take_error().expect("asked")?;
    assert_eq!(error.kind(), ErrorKind::ConnectionAborted, "{error}");
    Some(())
}

#[test]
fn r20_r21_connected_udp_whose_endpoint_is_gone_is_closed_and_nothing_else() {
    let cluster = Cluster::new("s20");
    let _echoes =
        [Echo::start(&cluster.backends[0], "one"), Echo::start(&cluster.backends[1], "two")];
    let _servers = cluster.backends.each_ref().map(Cluster::tcp_on);
    let [leaves, stays] = cluster.backends.each_ref();
    let direct = addr(leaves.ipv4(), TARGET);
    let v4 = addr(ip(VIP4), PORT);
    // Sockets that the Service led to the first backend, and some that it did not.
    let led_to = |expected: &str, target: SocketAddr, in_pod: bool| {
        let make = || loop {
            let socket = connected(target);
            if word(&socket).expect("an answer") == expected {
                return socket;
            }
        };
        let made =
            if in_pod { cluster.client.run(APP, APP, make) } else { cluster.lab.on_node(make) };
        made.expect("runs")
    };
    let bound = led_to("one", v4, true);
    SockRef::from(&bound).bind_device(Some(b"eth0")).expect("SO_BINDTODEVICE");
    let mut stale: Vec<(String, UdpSocket)> = vips()
        .into_iter()
        .flat_map(|vip| [(vip, true), (vip, false)])
        .map(|(vip, in_pod)| (format!("{vip}, in the pod: {in_pod}"), led_to("one", vip, in_pod)))
        .collect();
    stale.push(("bound to a device".to_owned(), bound));
    let other = led_to("two", v4, true);
    let reconnected = led_to("one", v4, true);
    let (unconnected, dialled) = cluster
        .client
        .run(APP, APP, || {
            reconnected.connect(direct).expect("connected");
            let unconnected = udp_socket(v4);
            unconnected.send_to(b"?", v4).expect("sent");
            answer(&unconnected).expect("an answer");
            (unconnected, connected(direct))
        })
        .expect("runs");
    let tcp = cluster.client.run(APP, APP, || {
        let dial = || TcpStream::connect(v4).expect("connected");
        (0..8).map(|_| dial()).collect::<Vec<_>>()
    });
    let tcp = tcp.expect("runs");

    // It terminates and serves: conntrack's entries would stay, and so do the sockets.
    let ending = json!({"ready": false, "serving": true, "terminating": true});
    let mut slices =
        [("web-4", leaves.ipv4(), stays.ipv4()), ("web-6", leaves.ipv6(), stays.ipv6())].map(
            |(name, leaves, stays)| {
                let mut made = slice(name, "web", &[leaves, stays], &ready());
                made["endpoints"][0]["conditions"] = ending.clone();
                made
            },
        );
    let set = |slices: &[serde_json::Value; 2]| {
        cluster.set("web-4", &slices[0]);
        cluster.set("web-6", &slices[1]);
    };
    set(&slices);
    cluster.wait_backends(VIP4, 1);
    cluster.wait_backends(VIP6, 1);
    for (which, socket) in &stale {
        assert_eq!(word(socket).expect("an answer"), "one", "{which}");
    }

    // It is gone, though it answers.
    for slice in &mut slices {
        slice["endpoints"].as_array_mut().expect("endpoints").remove(0);
    }
    set(&slices);
    for (which, socket) in &stale {
        wait_for("the socket to be closed", SOON, || aborted(socket))
            .unwrap_or_else(|error| panic!("{which}: {error:#}; {}", cluster.agent.log_tail()));
        let error = socket.peer_addr().expect_err("connected to nothing");
        assert_eq!(error.kind(), ErrorKind::NotConnected, "{which}");
    }
    let closed = cluster.metric("sidestep_service_sockets_closed_total");
    assert_eq!(closed, stale.len() as f64);
    for (which, socket, expected) in [
        ("the other backend's", &other, "two"),
        ("reconnected", &reconnected, "one"),
        ("dialled by itself", &dialled, "one"),
    ] {
        assert_eq!(aborted(socket), None, "{which}");
        assert_eq!(word(socket).expect("an answer"), expected, "{which}");
    }
    assert_eq!(aborted(&unconnected), None);
    for stream in &tcp {
        assert_eq!(stream.peer_addr().expect("open"), v4);
        assert!(stream.take_error().expect("asked").is_none());
    }
    // The same socket dials anew.
    let (_, socket) = &stale[0];
    let again = cluster.client.run(APP, APP, || {
        socket.connect(vips()[0])?;
        word(socket)
    });
    assert_eq!(again.expect("runs").expect("an answer"), "two");
}

#[test]
fn r20_a_socket_stays_while_no_other_endpoint_serves() {
    let cluster = Cluster::new("s20n");
    let _echo = Echo::start(&cluster.backends[0], "one");
    cluster.endpoints(&[&cluster.backends[0]], &ready());
    cluster.wait_backends(VIP4, 1);
    let target = addr(ip(VIP4), PORT);
    let socket = cluster.client.run(APP, APP, || connected(target)).expect("runs");
    cluster.endpoints(&[], &ready());
    cluster.wait_backends(VIP4, 0);
    assert_eq!(word(&socket).expect("an answer"), "one");
    // Not even by a new agent. Once another endpoint serves, this one is gone.
    cluster.endpoints(&[&cluster.backends[1]], &ready());
    cluster.wait_backends(VIP4, 1);
    wait_for("the socket to be closed", SOON, || aborted(&socket)).expect("closed");
}

#[test]
fn r20_what_went_stale_without_an_agent_is_closed_by_the_next() {
    let mut cluster = Cluster::new("s20a");
    let _echo = Echo::start(&cluster.backends[0], "one");
    cluster.endpoints(&[&cluster.backends[0]], &ready());
    cluster.wait_backends(VIP4, 1);
    let target = addr(ip(VIP4), PORT);
    let socket = cluster.client.run(APP, APP, || connected(target)).expect("runs");
    cluster.agent.kill9();
    cluster.endpoints(&[&cluster.backends[1]], &ready());
    assert_eq!(word(&socket).expect("an answer"), "one");
    let Cluster { agent, lab, .. } = &mut cluster;
    lab.on_node(|| agent.restart()).expect("runs").expect("restarted");
    wait_for("the socket to be closed", SOON, || aborted(&socket)).expect("closed");
}

#[test]
fn r17_programs_that_reach_no_process_are_named() {
    let lab = Lab::new("s17").expect("a lab");
    let pod = lab.pod("pod", PodNet::DUAL).expect("a pod");
    let elsewhere = lab.cgroup().join("s17-elsewhere");
    fs::create_dir(&elsewhere).expect("a cgroup that no process is in");
    let start = || Agent::start_on(binary(), &lab, &elsewhere, &["--services", "--splice", "off"]);
    let agent = lab.on_node(start).expect("runs").expect("the agent");
    agent.add_manifest("pod", &plain(&pod)).expect("manifest");
    let pods = format!("Services are not translated in {}", pod.netns().display());
    for named in ["Services are not translated in the node's network namespace", &pods] {
        agent.wait_log(named).unwrap_or_else(|error| panic!("{named}: {error:#}"));
    }
    for named in ["IPv4 to 192.0.2.183", "s17-elsewhere"] {
        assert!(agent.log().contains(named), "{named}: {}", agent.log_tail());
    }
    drop(agent);
    fs::remove_dir(&elsewhere).expect("removed");
}

#[test]
fn r17_programs_that_translate_are_not_complained_about() {
    let cluster = Cluster::new("s17ok");
    // Three looks at everything, which dial from the node and the pod.
    let looks = || cluster.metric("sidestep_sync_seconds_count");
    let before = looks();
    wait_for("three looks", SOON, || (looks() >= before + 3.0).then_some(())).expect("three");
    let log = cluster.agent.log();
    assert!(!log.contains("are not translated in"), "{log}");
    assert_eq!(cluster.counter("service_udp4"), 0, "what the agent dials is not counted");
}

/// A Service of so many ports; its slice has so many endpoints.
fn filler(name: &str, addresses: &[String], ports: u16, endpoints: u32) -> [Value; 2] {
    let port = |n: u16, base: u16| json!({"name": format!("p{n}"), "port": base + n});
    let mut made = service(name, &["10.96.255.1"]);
    made["spec"]["ports"] = (0..ports).map(|n| port(n, 1)).collect();
    made["spec"]["externalIPs"] = json!(addresses);
    let ips: Vec<IpAddr> = (0..endpoints)
        .map(|n| Ipv4Addr::from_bits(0x0a80_0000 + n).into()) // 10.128.0.0 and up
        .collect();
    let mut slice = slice(&format!("{name}-4"), name, &ips, &ready());
    slice["ports"] = (0..ports).map(|n| port(n, 20_000)).collect();
    [made, slice]
}

fn numbered(net: &str, count: usize) -> Vec<String> {
    (1..=count).map(|n| format!("{net}.{}.{}", n / 250, n % 250 + 1)).collect()
}

/// Makes a map full, and sees what becomes of a Service that has no room: nothing of it is
/// translated until there is some, and it is named.
#[track_caller]
fn has_no_room(tag: &str, fill: &[Value; 2], late: &[Value; 2], count: usize) {
    let mut cluster = Cluster::new(tag);
    cluster.restart_with(&["--services", "--services-external-ips", "--splice", "off"]);
    let _servers = cluster.backends.each_ref().map(Cluster::tcp_on);
    let names = ["fill", "fill-4"];
    names.iter().zip(fill).for_each(|(name, object)| cluster.set(name, object));
    let named = "is left to kube-proxy until there is room";
    cluster.agent.wait_log(named).expect("the filler is larger than the map");
    ["late", "late-4"].iter().zip(late).for_each(|(name, object)| cluster.set(name, object));
    let named = "Service shop/late port \"p0\"/TCP, IPv4 is left to kube-proxy until there is room";
    cluster.agent.wait_log(named).expect("what has no room is named");
    let of_late = || {
        let all = cluster.status();
        let is_lates = |one: &&Value| one["address"].as_str().is_some_and(|at| at.ends_with(":1"));
        let late =
            |one: &&Value| one["address"].as_str().is_some_and(|at| at.starts_with("10.97."));
        all.iter().filter(is_lates).filter(late).cloned().collect::<Vec<_>>()
    };
    assert_eq!(of_late(), Vec::<Value>::new(), "not a part of it");
    // What was there goes on.
    cluster.dial(addr(ip(VIP4), PORT)).expect("a backend answers");
    cluster.remove("fill-4");
    cluster.remove("fill");
    let is_there = || {
        let late = of_late();
        let is_whole = |one: &Value| {
            one["backends"].as_array().is_some_and(|backends| backends.len() == count)
        };
        (!late.is_empty() && late.iter().all(is_whole)).then_some(())
    };
    wait_for("the Service to have room", SOON, is_there).expect("translated as a whole");
    wait_for("the problem to be over", SOON, || {
        cluster.agent.log().contains(&format!("resolved: {named}")).then_some(())
    })
    .expect("said");
}

#[test]
fn r26_a_service_whose_addresses_have_no_room_is_left_to_kube_proxy_as_a_whole() {
    // 131,072 entries: 16 addresses and a ClusterIP, 7,710 ports.
    let fill = filler("fill", &numbered("10.98", 16), 7_711, 0);
    has_no_room("s26a", &fill, &filler("late", &numbered("10.97", 20), 1, 3), 3);
}

#[test]
fn r26_a_service_whose_endpoints_have_no_room_is_left_to_kube_proxy_as_a_whole() {
    // 262,144 entries: 128 endpoints, 2,048 ports.
    let fill = filler("fill", &[], 2_048, 128);
    has_no_room("s26b", &fill, &filler("late", &numbered("10.97", 1), 1, 126), 126);
}

#[test]
fn r16_what_is_open_goes_on_without_the_programs() {
    let mut cluster = Cluster::new("s16");
    let _servers = cluster.backends.each_ref().map(Cluster::tcp_on);
    let _echoes =
        [Echo::start(&cluster.backends[0], "one"), Echo::start(&cluster.backends[1], "two")];
    let target = addr(ip(VIP4), PORT);
    let made = cluster.client.run(APP, APP, || {
        let unconnected = udp_socket(target);
        unconnected.send_to(b"?", target).expect("sent");
        (TcpStream::connect(target).expect("a backend"), connected(target), unconnected)
    });
    let (tcp, udp, unconnected) = made.expect("runs");
    cluster.agent.terminate().expect("ends");
    cluster.agent.unload().expect("unloaded");
    // They are ordinary connections to the endpoint, and say so from now on.
    let (line, at) = cluster
        .client
        .run(APP, APP, || {
            let mut line = String::new();
            BufReader::new(&tcp).read_line(&mut line).expect("a greeting");
            (line, tcp.peer_addr().expect("open"))
        })
        .expect("runs");
    assert!(!line.is_empty());
    assert!(cluster.number(at.ip()).is_some() && at.port() == TARGET, "{at}");
    let _ = word(&udp).expect("an answer");
    let (_, from) = answer(&unconnected).expect("an answer that was under way");
    // Read before or after the programs went.
    assert!(from == target || cluster.number(from.ip()).is_some(), "{from}");
    let error = cluster.dial(target).expect_err("nobody has the address any more");
    assert!(!error.contains("refused"), "{error}");
}

#[test]
fn r48_a_namespace_that_the_agent_does_not_know_is_left_alone() {
    let cluster = Cluster::new("s48");
    let _servers = cluster.backends.each_ref().map(Cluster::tcp_on);
    let guest = cluster.lab.pod("guest", PodNet::DUAL).expect("a pod that no object speaks of");
    let before = cluster.counter("service_passed");
    let error = guest.ask(APP, APP, addr(ip(VIP4), PORT)).expect_err("left to kube-proxy");
    assert!(!format!("{error:#}").contains("refused"), "{error:#}");
    assert!(cluster.counter("service_passed") > before, "a call to a Service's address");
}
