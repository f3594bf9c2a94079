//! Two mesh pods on one node, each with a process that plays the sidecar, and the agent.

#![allow(dead_code, reason = "each test file uses its part")]

pub mod load;
pub mod programs;
pub mod services;
pub mod splicing;

use std::{
    io::{BufRead, BufReader, ErrorKind},
    net::{IpAddr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket},
    path::{Path, PathBuf},
    process::Command,
    sync::LazyLock,
    time::Duration,
};

use libbpf_rs::MapHandle;
use serde_json::{Value, json};
use sidestep::dataplane::LAYOUT;
use sidestep_lab::{
    Agent, Answer, Lab, Pod, PodNet, Seen, ServeOpts, Server, slowdown, wait_for, wait_until,
};
use socket2::{Domain, Protocol, Socket, Type};

/// An app's user.
pub const APP: u32 = 1000;
/// The sidecar's user and group.
pub const PROXY: u32 = 1337;
/// A destination off the pod that nobody has.
pub const REMOTE4: &str = "10.96.0.10";
/// The same for IPv6.
pub const REMOTE6: &str = "fd96::10";

/// The binary under test: `$SIDESTEP_BIN`, or the one that cargo built with the tests.
pub fn binary() -> &'static Path {
    static BINARY: LazyLock<PathBuf> = LazyLock::new(|| {
        let with_tests = option_env!("CARGO_BIN_EXE_sidestep").map(PathBuf::from);
        std::env::var_os("SIDESTEP_BIN").map(PathBuf::from).or(with_tests).unwrap_or_else(built)
    });
    &BINARY
}

/// For tests of another package, with which cargo builds no binary of this one.
fn built() -> PathBuf {
    let mut cargo = Command::new(env!("CARGO"));
    cargo.args(["build", "--quiet", "--package", "sidestep", "--bin", "sidestep"]);
    assert!(cargo.status().expect("cargo").success(), "cargo built no binary");
    let test = std::env::current_exe().expect("this test's binary");
    test.ancestors().nth(2).expect("the directory of binaries").join("sidestep")
}

/// What may take a moment, on a machine that is busy as well.
pub const SOON: Duration = Duration::from_secs(10);

/// How long a socket may be silent.
pub fn patience() -> Duration {
    Duration::from_secs(3) * slowdown()
}

/// The line with which a server of the lab greets its client.
pub fn greeting(stream: &TcpStream) -> Seen {
    stream.set_read_timeout(Some(patience())).expect("timeout");
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).expect("a greeting");
    line.trim_end().parse().expect("a greeting")
}

/// Whether the running kernel is older than that version. For what a kernel cannot do at all: the
/// agent itself never asks for versions.
pub fn kernel_before(major: u32, minor: u32) -> bool {
    let uname = nix::sys::utsname::uname().expect("uname");
    let release = uname.release().to_string_lossy().into_owned();
    let mut numbers = release.split(['.', '-']).map(|part| part.parse::<u32>().expect("a number"));
    let mut next = || numbers.next().expect("two numbers");
    (next(), next()) < (major, minor)
}

/// A UDP socket at an address that may have been bound a moment ago: a child that another test is
/// just starting has a copy of that socket until it executes.
pub fn udp(at: SocketAddr) -> UdpSocket {
    let bind = || match UdpSocket::bind(at) {
        Err(error) if error.kind() == ErrorKind::AddrInUse => None,
        result => Some(result),
    };
    wait_for(&format!("{at} to be free"), SOON, bind).expect("free").expect("a UDP socket")
}

/// A test's bulk: less where the machine is emulated.
pub fn bulk(count: u16) -> u16 {
    count / u16::try_from(slowdown()).expect("a small number")
}

/// A node with two dual-stack mesh pods. Fields are dropped in this order.
pub struct Node {
    pub agent: Agent,
    pub a: Pod,
    pub b: Pod,
    pub lab: Lab,
}

impl Node {
    pub fn new(tag: &str) -> Self {
        let lab = Lab::new(tag).expect("a lab");
        let net = PodNet { v4: true, v6: true };
        let a = lab.pod("a", net).expect("pod a");
        let b = lab.pod("b", net).expect("pod b");
        let agent = Agent::start(binary(), &lab).expect("the agent");
        Self { agent, a, b, lab }
    }

    /// With both pods enrolled.
    pub fn enrolled(tag: &str) -> Self {
        let mut node = Self::new(tag);
        node.agent.add_pod(&node.a).expect("manifest a");
        node.agent.add_pod(&node.b).expect("manifest b");
        node.agent.wait_enrolled(&node.a).expect("a is enrolled");
        node.agent.wait_enrolled(&node.b).expect("b is enrolled");
        node
    }
}

impl Node {
    /// With pod a alone enrolled, by this manifest.
    pub fn with_manifest(tag: &str, manifest: impl FnOnce(&Pod) -> Value) -> Self {
        let mut node = Self::new(tag);
        let manifest = manifest(&node.a);
        node.agent.add_manifest("a", &manifest).expect("manifest a");
        node.agent.wait_enrolled(&node.a).expect("a is enrolled");
        node
    }

    /// One of a mesh's counters.
    pub fn counter(&self, mesh: &str, name: &str) -> u64 {
        let status = self.agent.status().expect("status");
        status["counters"][mesh][name].as_u64().unwrap_or_else(|| panic!("no {name}: {status}"))
    }

    /// The cookie of a pod's namespace.
    pub fn cookie(&self, pod: &Pod) -> u64 {
        let (status, name) = (self.agent.status().expect("status"), format!("lab/{}", pod.name()));
        let pods = status["pods"].as_array().expect("pods");
        let found = pods.iter().find(|found| found["pod"] == name).expect("the pod");
        found["netns_cookie"].as_str().and_then(|cookie| cookie.parse().ok()).expect("a cookie")
    }

    /// A map of the agent's.
    pub fn map(&self, name: &str) -> MapHandle {
        MapHandle::from_pinned_path(self.agent.bpffs().join(LAYOUT).join("maps").join(name))
            .expect("a pinned map")
    }

    /// A server off the pods, on the node itself.
    pub fn remote(&self, at: SocketAddr) -> Server {
        self.lab.add_node_address(at.ip()).ok();
        self.lab
            .on_node(|| Server::start_here(ServeOpts::on([at])))
            .expect("runs")
            .expect("a remote server")
    }

    /// Waits until the agent has brought a changed manifest into force.
    pub fn becomes(&self, what: &str, condition: impl FnMut() -> bool) {
        wait_until(what, Duration::from_secs(3), condition)
            .unwrap_or_else(|error| panic!("{error:#}; {}", self.agent.log_tail()));
    }
}

/// The pod's manifest with one more annotation.
pub fn annotated(mut manifest: Value, key: &str, text: &str) -> Value {
    manifest["metadata"]["annotations"][key] = text.into();
    manifest
}

/// An Istio pod whose second address, an IPv6 one, is not captured: no dual stack.
pub fn istio_v4_first(pod: &Pod) -> Value {
    let mut manifest = pod.manifest();
    let env = manifest["spec"]["containers"][1]["env"].as_array_mut().expect("env");
    env.retain(|variable| variable["name"] != "ISTIO_DUAL_STACK");
    manifest
}

/// The pod as Linkerd's injector would have it.
pub fn linkerd(pod: &Pod) -> Value {
    let mut manifest = pod.manifest();
    manifest["metadata"]["annotations"] = json!({"sidestep.io/netns": pod.netns()});
    let listens = "127.0.0.1:4140,[::1]:4140";
    manifest["spec"]["containers"][1] = json!({
        "name": "linkerd-proxy",
        "env": [{"name": "LINKERD2_PROXY_OUTBOUND_LISTEN_ADDRS", "value": listens}],
    });
    manifest
}

/// The pod as Kuma's injector would have it.
pub fn kuma(pod: &Pod) -> Value {
    let mut manifest = pod.manifest();
    manifest["metadata"]["annotations"] =
        json!({"sidestep.io/netns": pod.netns(), "kuma.io/sidecar-injected": "true"});
    manifest["spec"]["containers"][1] = json!({"name": "kuma-sidecar"});
    manifest
}

/// The sidecar's two listeners.
pub struct Sidecar {
    pub outbound: Server,
    pub inbound: Server,
}

impl Sidecar {
    pub fn start(pod: &Pod) -> Self {
        Self {
            outbound: pod.fake_proxy(15001).expect("outbound listener"),
            inbound: pod.fake_proxy(15006).expect("inbound listener"),
        }
    }
}

/// A listener of the proxy's, of MPTCP.
pub fn mptcp_listener(pod: &Pod, at: SocketAddr) -> Socket {
    let listen = || -> std::io::Result<Socket> {
        let socket = Socket::new(Domain::for_address(at), Type::STREAM, Some(Protocol::MPTCP))?;
        socket.set_reuse_address(true)?;
        socket.bind(&at.into())?;
        socket.listen(16)?;
        Ok(socket)
    };
    pod.run(PROXY, PROXY, listen).expect("runs").expect("an MPTCP listener")
}

pub fn addr(ip: impl Into<IpAddr>, port: u16) -> SocketAddr {
    SocketAddr::new(ip.into(), port)
}

pub fn ip(text: &str) -> IpAddr {
    text.parse().expect("an IP address")
}

/// The address as an AF_INET6 socket names it.
pub fn mapped(target: SocketAddr) -> SocketAddr {
    match target.ip() {
        IpAddr::V4(v4) => addr(v4.to_ipv6_mapped(), target.port()),
        IpAddr::V6(_) => target,
    }
}

/// The three kinds of address that a destination off the pod can have, and the pod's own
/// address that the proxy must see as its peer.
pub fn remotes(pod: &Pod, port: u16) -> [(SocketAddr, IpAddr); 3] {
    let v4 = addr(ip(REMOTE4), port);
    [(v4, pod.ipv4()), (addr(ip(REMOTE6), port), pod.ipv6()), (mapped(v4), pod.ipv4())]
}

/// A pod's own address in its three kinds.
pub fn addresses(pod: &Pod, port: u16) -> [SocketAddr; 3] {
    let v4 = addr(pod.ipv4(), port);
    [v4, addr(pod.ipv6(), port), mapped(v4)]
}

pub fn canonical(address: SocketAddr) -> SocketAddr {
    addr(address.ip().to_canonical(), address.port())
}

/// Any address, of the family of `like`.
pub fn any(like: SocketAddr, port: u16) -> SocketAddr {
    if canonical(like).is_ipv4() {
        addr([0, 0, 0, 0], port)
    } else {
        addr(Ipv6Addr::UNSPECIFIED, port)
    }
}

/// The kernel told the server this original destination.
#[track_caller]
pub fn assert_original(answer: &Answer, target: SocketAddr) {
    assert_eq!(
        answer.seen.original().map(canonical),
        Some(canonical(target)),
        "original destination: {answer:?}"
    );
}
