//! Services while things end: endpoints, room in the maps, the agent, the programs. The rows are
//! those of docs/services.md.

mod common;

use std::{
    io::{self, ErrorKind},
    net::{SocketAddr, TcpStream, UdpSocket},
};

use common::{services::*, *};
use serde_json::json;
use sidestep_lab::wait_for;

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
    let stale: Vec<(String, UdpSocket)> = vips()
        .into_iter()
        .flat_map(|vip| [(vip, true), (vip, false)])
        .map(|(vip, in_pod)| (format!("{vip}, in the pod: {in_pod}"), led_to("one", vip, in_pod)))
        .collect();
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
