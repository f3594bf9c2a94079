//! What goes wrong elsewhere: odd sockets, odd processes, odd moments.

#![allow(unsafe_code, reason = "what no safe wrapper has")]

mod common;

use std::{
    io::{self, Read, Write},
    net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream},
    os::fd::AsRawFd,
    path::Path,
    process::Command,
    time::Duration,
};

use common::{programs::Translation, *};
use libbpf_rs::libbpf_sys;
use nix::sys::socket::{getsockopt, sockopt::OriginalDst};
use sidestep_lab::{Agent, Lab, PodNet, Seen, wait_until};
use socket2::{Domain, SockAddr, Socket, Type};

fn socket(target: SocketAddr) -> Socket {
    Socket::new(Domain::for_address(target), Type::STREAM, None).expect("a socket")
}

fn original(seen: &Seen) -> Option<SocketAddr> {
    seen.original().map(canonical)
}

/// A3.
#[test]
fn a_reused_pod_ip_survives_the_late_delete_of_its_old_pod() {
    let mut node = Node::new("reuse");
    // The old pod's namespace still lives, with the address that the new one has now.
    node.agent.add_pod(&node.a).expect("the old pod");
    node.agent.wait_enrolled(&node.a).expect("enrolled");
    node.a.ip("link set eth0 down").expect("cut off");
    let address = node.a.ipv4();
    node.b.add_address(address, 16, "eth0", "").expect("reused");
    let mut manifest = node.b.manifest();
    manifest["status"]["podIPs"] = serde_json::json!([{ "ip": address }]);
    node.agent.add_manifest("b", &manifest).expect("the new pod");
    node.agent.wait_enrolled(&node.b).expect("enrolled");
    let _sidecar = Sidecar::start(&node.b);
    let target = addr(ip(REMOTE4), 80);
    let works = || {
        let out = node.b.ask(APP, APP, target).expect("captured");
        assert_original(&out, target);
        assert_eq!(out.seen.peer.ip(), address);
        let inbound = addr(address, 8080);
        let probe = node.lab.on_node(|| sidestep_lab::ask(inbound, None)).expect("runs");
        assert_original(&probe.expect("steered"), inbound);
    };
    works();
    node.agent.remove_pod(&node.a).expect("the late delete");
    node.agent.wait_gone(&node.a).expect("gone");
    works();
}

/// A8.
#[test]
fn a_connection_that_is_asked_about_late_or_that_idles_has_its_destination() {
    let node = Node::enrolled("late");
    let target = addr(ip(REMOTE4), 80);
    let (listener, listener_in) = node
        .a
        .run(PROXY, PROXY, || {
            (TcpListener::bind("0.0.0.0:15001"), TcpListener::bind("0.0.0.0:15006"))
        })
        .expect("runs");
    let listener = listener.expect("outbound listener");
    drop(listener_in);
    let client = node.a.run(APP, APP, || TcpStream::connect(target)).expect("runs");
    let client = client.expect("captured");
    // Many others come and go, accepted or not, before anybody asks.
    let others: Vec<_> = node
        .a
        .run(APP, APP, || {
            (0..100)
                .map(|n| TcpStream::connect(addr([10, 97, 0, n], 80)).expect("captured"))
                .collect()
        })
        .expect("runs");
    let (first, _) = listener.accept().expect("accepted");
    let asked = || {
        let answer = getsockopt(&first, OriginalDst).expect("an answer");
        SocketAddr::V4(nix::sys::socket::SockaddrIn::from(answer).into())
    };
    assert_eq!(asked(), target);
    drop(others);
    for _ in 0..100 {
        listener.accept().expect("accepted");
    }
    // Half-closed, still asked, still carrying bytes the other way.
    client.shutdown(Shutdown::Write).expect("half-closed");
    assert_eq!((&first).read(&mut [0; 8]).expect("end of file"), 0);
    assert_eq!(asked(), target);
    (&first).write_all(b"bytes").expect("sent");
    let mut bytes = [0; 5];
    (&client).read_exact(&mut bytes).expect("received");
    assert_eq!((&bytes, client.peer_addr().expect("a peer")), (b"bytes", target));
}

#[test]
fn af_unspec_and_another_connect() {
    let node = Node::enrolled("unspec");
    let _sidecar = Sidecar::start(&node.a);
    for kind in 0..3 {
        node.a
            .run(APP, APP, || {
                let targets = [80, 81].map(|port| remotes(&node.a, port)[kind].0);
                let socket = socket(targets[0]);
                for target in targets {
                    socket.connect(&target.into()).expect("captured");
                    let stream = TcpStream::from(socket.try_clone().expect("a clone"));
                    assert_eq!(original(&greeting(&stream)), Some(canonical(target)));
                    assert_eq!(stream.peer_addr().expect("a peer"), target);
                    let unspec =
                        libc::sockaddr { sa_family: libc::AF_UNSPEC as u16, sa_data: [0; 14] };
                    // SAFETY: the address lives across the call, and its length is its size.
                    let rc = unsafe {
                        libc::connect(
                            socket.as_raw_fd(),
                            &raw const unspec,
                            size_of::<libc::sockaddr>() as u32,
                        )
                    };
                    assert_eq!(rc, 0, "{}", std::io::Error::last_os_error());
                    assert!(stream.peer_addr().is_err(), "disconnected");
                }
            })
            .expect("runs");
    }
}

#[test]
fn io_uring_connect() {
    let node = Node::enrolled("uring");
    let _sidecar = Sidecar::start(&node.a);
    for (target, own) in remotes(&node.a, 80) {
        node.a
            .run(APP, APP, || {
                let socket = socket(target);
                let address = SockAddr::from(target);
                let mut ring = io_uring::IoUring::new(4).expect("a ring");
                let fd = io_uring::types::Fd(socket.as_raw_fd());
                let connect =
                    io_uring::opcode::Connect::new(fd, address.as_ptr().cast(), address.len())
                        .build();
                // SAFETY: the address and the socket live until the completion is reaped.
                unsafe { ring.submission().push(&connect) }.expect("pushed");
                ring.submit_and_wait(1).expect("submitted");
                let result = ring.completion().next().expect("a completion").result();
                assert_eq!(result, 0, "{}", std::io::Error::from_raw_os_error(-result));
                let stream = TcpStream::from(socket);
                let seen = greeting(&stream);
                assert_eq!(original(&seen), Some(canonical(target)));
                assert_eq!(seen.peer.ip().to_canonical(), own);
            })
            .expect("runs");
    }
}

#[test]
fn so_mark_changes_nothing() {
    let node = Node::enrolled("mark");
    let _sidecar = Sidecar::start(&node.a);
    for (target, own) in remotes(&node.a, 80) {
        node.a
            .run(APP, APP, || {
                let socket = socket(target);
                socket.set_mark(0x539).expect("SO_MARK");
                socket.connect(&target.into()).expect("captured");
                let seen = greeting(&TcpStream::from(socket));
                assert_eq!(original(&seen), Some(canonical(target)));
                assert_eq!(seen.peer.ip().to_canonical(), own);
            })
            .expect("runs");
    }
}

#[test]
fn forked_children_and_processes_that_enter_later() {
    let node = Node::enrolled("fork");
    let _sidecar = Sidecar::start(&node.a);
    let (host, port) = (REMOTE4, 80);
    // A shell that entered the namespace just now, and a child of its child.
    let script = format!(
        "( ( exec 3<>/dev/tcp/{host}/{port}; read -r line <&3; echo \"child $line\" ) )
         exec 3<>/dev/tcp/{host}/{port}; read -r line <&3; echo \"self $line\""
    );
    for (uid, gid) in [(APP, APP), (0, 0)] {
        let mut shell = node.a.spawn(uid, gid, ["bash", "-c", &script]).expect("a shell");
        assert!(shell.wait(Duration::from_secs(5)).expect("ends").success(), "{}", shell.log());
        let log = shell.log();
        for who in ["child ", "self "] {
            let line = log.lines().find_map(|line| line.strip_prefix(who)).expect(who);
            let seen: Seen = line.parse().expect("a greeting");
            assert_eq!(original(&seen), Some(addr(ip(host), port)), "{log}");
        }
    }
    // The proxy's user and group, by the process' real ids.
    node.lab.add_node_address(ip(host)).expect("an address that refuses");
    for (uid, gid) in [(PROXY, PROXY), (APP, PROXY)] {
        let mut shell = node.a.spawn(uid, gid, ["bash", "-c", &script]).expect("a shell");
        shell.wait(Duration::from_secs(5)).expect("ends");
        assert!(!shell.log().contains("orig="), "direct: {}", shell.log());
    }
}

#[test]
fn threads_connect_at_once() {
    let node = Node::enrolled("threads");
    let _sidecar = Sidecar::start(&node.a);
    std::thread::scope(|scope| {
        for thread in 0..8 {
            let a = &node.a;
            scope.spawn(move || {
                for n in 0..bulk(50) {
                    let target = addr([10, 96, thread, n as u8], 80);
                    assert_original(&a.ask(APP, APP, target).expect("captured"), target);
                }
            });
        }
    });
}

#[test]
fn a_pod_with_a_user_namespace_of_its_own() {
    // hostUsers: false. The sidecar is 1337 to the mesh, and something else to the node.
    let mut node = Node::new("userns");
    // It ends with the test, also when that fails.
    struct Sleeper(std::process::Child);
    impl Drop for Sleeper {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }
    let sleeper = Command::new("unshare").args(["--user", "--net", "sleep", "infinity"]).spawn();
    let sleeper = Sleeper(sleeper.expect("a process in a user namespace"));
    let pid = sleeper.0.id().to_string();
    let own = std::fs::read_link("/proc/self/ns/net").expect("a namespace");
    wait_until("a namespace", Duration::from_secs(3), || {
        std::fs::read_link(format!("/proc/{pid}/ns/net")).is_ok_and(|theirs| theirs != own)
    })
    .expect("unshared");
    // The sidecar's numbers are in the second range.
    let uids = "0 100000 1000\n1000 301000 64536";
    let gids = "0 200000 1000\n1000 401000 64536";
    std::fs::write(format!("/proc/{pid}/uid_map"), uids).expect("mapped");
    std::fs::write(format!("/proc/{pid}/gid_map"), gids).expect("mapped");
    // The lab's pod b, but with that namespace: its interface moves over.
    let inside = |args: &[&str]| {
        let status = Command::new("nsenter").args(["-t", &pid, "-n", "--"]).args(args).status();
        assert!(status.expect("runs").success(), "{args:?}");
    };
    node.b.ip(&format!("link set eth0 netns {pid}")).expect("moved");
    inside(&["ip", "link", "set", "lo", "up"]);
    inside(&["ip", "link", "set", "eth0", "up"]);
    inside(&["ip", "addr", "add", &format!("{}/16", node.b.ipv4()), "dev", "eth0"]);
    inside(&["ip", "route", "add", "default", "via", "10.77.0.1"]);
    let netns = std::fs::File::open(format!("/proc/{pid}/ns/net")).expect("a namespace");
    let run = |uid: u32, gid: u32, target: SocketAddr| {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                nix::sched::setns(&netns, nix::sched::CloneFlags::CLONE_NEWNET)?;
                nix::unistd::setfsgid(gid.into());
                nix::unistd::setfsuid(uid.into());
                sidestep_lab::ask(target, None)
            });
            thread.join().expect("no panic")
        })
    };
    let mut manifest = node.b.manifest();
    manifest["metadata"]["annotations"]["sidestep.io/netns"] = format!("/proc/{pid}/ns/net").into();
    manifest["status"]["podIPs"] = serde_json::json!([{ "ip": node.b.ipv4() }]);
    node.agent.add_manifest("b", &manifest).expect("a manifest");
    node.agent.wait_enrolled(&node.b).expect("enrolled");

    let remote = addr(ip(REMOTE4), 80);
    node.lab.add_node_address(remote.ip()).expect("an address");
    let _server = node
        .lab
        .on_node(|| sidestep_lab::Server::start_here(sidestep_lab::ServeOpts::on([remote])))
        .expect("runs")
        .expect("a remote server");
    let refused = |uid, gid| {
        let error = run(uid, gid, remote).expect_err("captured, and no proxy listens");
        format!("{error:#}").contains("refused")
    };
    assert!(refused(301_000, 401_000), "an app");
    assert!(refused(1337, 1337), "the number alone makes nobody the proxy");
    assert!(refused(101_337, 201_337), "nor does a number that is nobody's in the pod");
    assert!(refused(100_000, 200_000), "root of the pod");
    assert_eq!(run(301_337, 401_000, remote).expect("direct").seen.orig, None, "the proxy");
    assert_eq!(run(301_000, 401_337, remote).expect("direct").seen.orig, None, "its group");
}

/// A second data plane with a pod of its own at `cgroup`: before ours, after it, and gone again.
fn others_go_on_working(node: &mut Node, cgroup: &Path) {
    let _sidecar = Sidecar::start(&node.a);
    let target = addr(ip(REMOTE4), 80);
    node.lab.add_node_address(target.ip()).expect("an address that refuses");
    let other_pod = node.lab.pod("other", PodNet { v4: true, v6: true }).expect("a pod");
    let _other_sidecar = Sidecar::start(&other_pod);
    let works = |who: &sidestep_lab::Pod| {
        assert_original(&who.ask(APP, APP, target).expect("captured"), target);
        let inbound = addr(who.ipv4(), 8080);
        let probe = node.lab.on_node(|| sidestep_lab::ask(inbound, None)).expect("runs");
        assert_original(&probe.expect("steered"), inbound);
    };
    for _ in 0..2 {
        let mut other = Agent::start_on(binary(), &node.lab, cgroup, &[]).expect("another agent");
        other.add_pod(&other_pod).expect("a manifest");
        other.wait_enrolled(&other_pod).expect("enrolled");
        works(&node.a);
        works(&other_pod);
        // Ours leaves and comes back behind the other's.
        node.agent.terminate().expect("ends");
        node.agent.unload().expect("unloaded");
        works(&other_pod);
        node.a.ask(APP, APP, target).expect_err("direct, and refused");
        node.agent.restart().expect("starts");
        node.agent.wait_enrolled(&node.a).expect("enrolled");
        works(&node.a);
        works(&other_pod);
        drop(other);
        works(&node.a);
        other_pod.ask(APP, APP, target).expect_err("direct, and refused");
    }
}

/// A9.
#[test]
fn other_programs_at_the_same_cgroup_go_on_working() {
    let mut node = Node::enrolled("others");
    let cgroup = node.lab.cgroup().to_owned();
    others_go_on_working(&mut node, &cgroup);
}

/// A9.
#[test]
fn other_programs_at_a_child_cgroup_go_on_working() {
    let mut node = Node::enrolled("child");
    let child = node.lab.enter_child_cgroup().expect("a child cgroup");
    others_go_on_working(&mut node, child.dir());
}

#[test]
fn hundreds_of_pods_and_ten_thousand_connections() {
    let node = Node::enrolled("scale");
    let _sidecar = Sidecar::start(&node.a);
    let pods: Vec<_> = (0..248)
        .map(|n| node.lab.pod(&format!("p{n}"), PodNet { v4: true, v6: false }).expect("a pod"))
        .collect();
    let stop = std::sync::atomic::AtomicBool::new(false);
    let done = std::sync::atomic::AtomicUsize::new(0);
    use std::sync::atomic::Ordering::Relaxed;
    std::thread::scope(|scope| {
        // Traffic of one pod, while all the others come and go.
        let a = &node.a;
        let load = scope.spawn(|| {
            while !stop.load(Relaxed) {
                let n = done.fetch_add(1, Relaxed);
                let target = addr([10, 96, (n >> 8) as u8, n as u8], 80);
                let answer = a.ask(APP, APP, target);
                assert_original(
                    &answer.unwrap_or_else(|e| panic!("connection {n}: {e:#}")),
                    target,
                );
            }
        });
        struct Finish<'a>(&'a std::sync::atomic::AtomicBool);
        impl Drop for Finish<'_> {
            fn drop(&mut self) {
                self.0.store(true, Relaxed);
            }
        }
        let finish = Finish(&stop);
        for pod in &pods {
            node.agent.add_pod(pod).expect("a manifest");
        }
        wait_until("250 pods", Duration::from_secs(30), || {
            let status = node.agent.status().expect("status");
            let pods = status["pods"].as_array().expect("pods");
            pods.len() == 250 && pods.iter().all(|pod| pod["inbound"] == true)
        })
        .unwrap_or_else(|error| panic!("{error:#}; {}", node.agent.log_tail()));
        // Ten thousand open connections, from many of them.
        let sidecars: Vec<_> = pods[..40].iter().map(Sidecar::start).collect();
        let shells: Vec<_> = pods[..40]
            .iter()
            .enumerate()
            .map(|(n, pod)| {
                // In a process of its own: both ends are more than one may have open.
                let script = format!(
                    "for i in {{0..249}}; do exec {{fd}}<>/dev/tcp/10.98.{n}.$i/80; done
                     echo ready; exec sleep infinity"
                );
                pod.spawn(APP, APP, ["bash", "-c", &script]).expect("a shell")
            })
            .collect();
        for shell in &shells {
            wait_until("250 connections", Duration::from_secs(20), || {
                shell.log().contains("ready")
            })
            .unwrap_or_else(|error| panic!("{error:#}: {}", shell.log()));
        }
        for pod in &pods[40..] {
            node.agent.remove_pod(pod).expect("removed");
        }
        wait_until("42 pods", Duration::from_secs(30), || {
            node.agent.status().expect("status")["pods"].as_array().map(Vec::len) == Some(42)
        })
        .expect("removed");
        // Each is open still, and its sidecar knows where it was going.
        for (n, sidecar) in sidecars.iter().enumerate() {
            let seen = sidecar.outbound.wait_seen(250).expect("all came");
            let mut targets: Vec<_> = seen.iter().filter_map(original).collect();
            targets.sort();
            let wanted: Vec<_> = (0..250).map(|i| addr([10, 98, n as u8, i as u8], 80)).collect();
            assert_eq!(targets, wanted);
            assert_eq!(sidecar.outbound.open(), 250);
        }
        drop(finish);
        load.join().expect("no connection failed");
    });
    assert!(done.load(Relaxed) > 100, "the load went on: {}", done.load(Relaxed));
}

/// F17: the sidecar is to see the Service's address, whoever translates it.
#[test]
fn f17_another_programs_translation_comes_after() {
    let lab = Lab::new("first").expect("a lab");
    let a = lab.pod("a", PodNet::V4).expect("a pod");
    // Of no other test: they share a cgroup, and so what is translated there.
    let (service, endpoint) = (Ipv4Addr::new(10, 97, 0, 77), Ipv4Addr::new(10, 77, 200, 7));
    let target = addr(service, 80);
    let translates = |flags| Translation::attach(lab.cgroup(), service, endpoint, flags);
    let before = translates(0);
    let mut agent = Agent::start(binary(), &lab).expect("the agent");
    agent.add_pod(&a).expect("manifest a");
    agent.wait_enrolled(&a).expect("a is enrolled");
    let _sidecar = Sidecar::start(&a);
    let original = || a.ask(APP, APP, target).expect("captured").seen.original();
    if kernel_before(6, 15) {
        assert_eq!(original(), Some(addr(endpoint, 80)), "nothing can be done about it");
        return agent.wait_log("program \"another\"").expect("and it is said");
    }
    assert_eq!(original(), Some(target), "attached before the agent");
    let after = translates(0);
    assert_eq!(original(), Some(target), "attached after it");
    // What is not the mesh's is translated as ever.
    let direct = a.run(PROXY, PROXY, || {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
        let _ = socket.connect_timeout(&target.into(), Duration::from_millis(100));
        socket.local_addr().map(|_| socket)
    });
    drop((before, after, direct.expect("runs")));
    if kernel_before(6, 17) {
        return;
    }
    // One that gets in front is put behind, in the agent's next round.
    let first = libbpf_sys::BPF_F_PREORDER | libbpf_sys::BPF_F_BEFORE;
    let third = translates(first);
    let is_service = || original() == Some(target);
    wait_until("Sidestep to be first again", 2 * SOON, is_service)
        .unwrap_or_else(|error| panic!("{error:#}; {}", agent.log_tail()));
    // It is no fight: the next one is told of.
    let fourth = translates(first);
    agent.wait_log("runs before Sidestep's").expect("told");
    drop((third, fourth));
    agent.wait_log("resolved: program \"another\"").expect("over");
    assert_eq!(original(), Some(target));
}

/// A socket option as bytes.
fn set_option(socket: &Socket, level: i32, name: i32, value: &[u8]) -> io::Result<()> {
    let (at, len) = (value.as_ptr().cast(), value.len() as libc::socklen_t);
    // SAFETY: the kernel reads as many bytes as the value has.
    let rc = unsafe { libc::setsockopt(socket.as_raw_fd(), level, name, at, len) };
    if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Has the socket's packets go by this stop first; an AF_INET6 socket's that speaks IPv4 too.
fn set_route(socket: &Socket, stop: IpAddr) -> io::Result<()> {
    match stop {
        IpAddr::V4(stop) => {
            let mut options = vec![131, 7, 4]; // loose source route
            options.extend(stop.octets());
            options.push(1);
            set_option(socket, libc::SOL_IP, libc::IP_OPTIONS, &options)
        }
        IpAddr::V6(stop) => {
            // A segment routing header; the kernel puts the destination into the first place.
            let mut header = vec![0, 4, 4, 1, 1, 0, 0, 0];
            header.extend([0; 16]);
            header.extend(stop.octets());
            set_option(socket, libc::SOL_IPV6, libc::IPV6_RTHDR, &header)
        }
    }
}

/// F18: packets of a source route go to its first stop, whatever address the app connects to.
#[test]
fn f18_an_app_cannot_send_its_packets_by_another_way() {
    let mut node = Node::new("route");
    let stops = [node.b.ipv4(), node.b.ipv6(), node.b.ipv4()];
    let targets = addresses(&node.a, 8080);
    let arrive = "tcp dport 8080 counter accept";
    let chain = format!("type filter hook prerouting priority -300; {arrive};");
    node.b.nft(&format!("table inet seen {{ chain arrived {{ {chain} }}; }}")).expect("rules");
    let arrived = || -> u64 {
        let rules = sidestep_lab::iptables::ruleset(&node.b).expect("rules");
        let count = rules.split("packets ").nth(1).and_then(|rest| rest.split(' ').next());
        count.and_then(|count| count.parse().ok()).expect("a counter")
    };
    let routed = |n: usize| {
        let socket = Socket::new(Domain::for_address(targets[n]), Type::STREAM, None)?;
        socket.set_nonblocking(true)?;
        set_route(&socket, stops[n]).map(|()| socket)
    };
    let as_user = |uid, n| node.a.run(uid, uid, || routed(n)).expect("runs");
    // The kernel does so for anybody.
    let mut older = Vec::new();
    for (n, target) in targets.iter().enumerate() {
        let (before, socket) = (arrived(), as_user(APP, n).expect("a route"));
        let error = socket.connect(&(*target).into()).expect_err("under way");
        assert_eq!(error.raw_os_error(), Some(libc::EINPROGRESS), "{target}");
        wait_until("its SYN at the first stop", SOON, || arrived() > before)
            .expect("it goes there");
        older.push(as_user(APP, n).expect("a route"));
    }
    node.agent.add_pod(&node.a).expect("manifest a");
    node.agent.wait_enrolled(&node.a).expect("a is enrolled");
    let app = [targets[0], targets[1]].map(|at| node.a.serve(any(at, 8080), APP, APP));
    let before = arrived();
    for (n, target) in targets.iter().enumerate() {
        // What the pod's processes had set before.
        let error = older[n].connect(&(*target).into()).expect_err("refused");
        let right = if kernel_before(6, 1) { libc::EPERM } else { libc::EACCES };
        assert_eq!(error.raw_os_error(), Some(right), "{target}");
        let error = as_user(APP, n).expect_err("refused");
        assert_eq!(error.raw_os_error(), Some(libc::EPERM), "{target}");
        // Nor in the middle of a connection, nor by the older call for IPv6.
        let open = node.a.run(APP, APP, || {
            let socket = Socket::new(Domain::for_address(*target), Type::STREAM, None)?;
            socket.connect(&(*target).into())?;
            let route = set_route(&socket, stops[n]);
            let control = [0; 24];
            let older = set_option(&socket, libc::SOL_IPV6, libc::IPV6_2292PKTOPTIONS, &control);
            let none = set_option(&socket, libc::SOL_IP, libc::IP_OPTIONS, &[]);
            Ok::<_, io::Error>((route, older, none))
        });
        let (route, older, none) = open.expect("runs").expect("connected");
        assert_eq!(route.expect_err("refused").raw_os_error(), Some(libc::EPERM), "{target}");
        assert_eq!(older.expect_err("refused").raw_os_error(), Some(libc::EPERM), "{target}");
        none.expect("to have none is anybody's right");
        as_user(PROXY, n).expect("the sidecar's own business");
    }
    assert_eq!(arrived(), before);
    assert_eq!(node.counter("istio", "refused_source_route"), 3 + 3 * 3);
    drop(app);
}
