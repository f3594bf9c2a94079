//! A node with a Service, for the tests of Services.

use std::io;

use super::*;

/// Addresses of Services: nobody has them.
pub const VIP4: &str = "10.96.1.1";
pub const VIP6: &str = "fd96::1:1";
pub const OTHER4: &str = "10.96.1.2";
/// What is dialled, and where it leads.
pub const PORT: u16 = 80;
pub const TARGET: u16 = 8080;
/// This node, as slices name it.
pub const NODE: &str = "lab";

/// A node with a client and two backends, none of them in a mesh.
pub struct Cluster {
    pub agent: Agent,
    pub client: Pod,
    pub backends: [Pod; 2],
    pub lab: Lab,
}

/// A pod of no mesh.
pub fn plain(pod: &Pod) -> Value {
    let mut manifest = pod.manifest();
    manifest["metadata"]["annotations"] = json!({"sidestep.io/netns": pod.netns()});
    manifest["metadata"]["labels"] = json!({});
    manifest["spec"]["containers"] = json!([{"name": "app", "image": "app"}]);
    manifest
}

pub fn service(name: &str, vips: &[&str]) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"name": name, "namespace": "shop", "creationTimestamp": "2026-01-01T00:00:00Z"},
        "spec": {
            "type": "ClusterIP", "clusterIP": vips[0], "clusterIPs": vips,
            "ports": [
                {"name": "http", "protocol": "TCP", "port": PORT},
                {"name": "udp", "protocol": "UDP", "port": PORT},
            ],
        },
    })
}

/// A slice with one endpoint for each address; `conditions` is of all.
pub fn slice(name: &str, of: &str, ips: &[IpAddr], conditions: &Value) -> Value {
    let kind = if ips.iter().any(IpAddr::is_ipv6) { "IPv6" } else { "IPv4" };
    let endpoints: Vec<Value> = ips
        .iter()
        .map(|ip| json!({"addresses": [ip], "conditions": conditions, "nodeName": NODE}))
        .collect();
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {
            "name": name, "namespace": "shop", "labels": {"kubernetes.io/service-name": of},
        },
        "addressType": kind,
        "ports": [
            {"name": "http", "protocol": "TCP", "port": TARGET},
            {"name": "udp", "protocol": "UDP", "port": TARGET},
        ],
        "endpoints": endpoints,
    })
}

pub fn ready() -> Value {
    json!({"ready": true})
}

impl Cluster {
    /// With a Service of both families whose endpoints are the two backends.
    pub fn new(tag: &str) -> Self {
        Self::with(tag, plain)
    }

    pub fn with(tag: &str, client_manifest: impl FnOnce(&Pod) -> Value) -> Self {
        let lab = Lab::new(tag).expect("a lab");
        let client = lab.pod("client", PodNet::DUAL).expect("a client");
        let backends = ["b1", "b2"].map(|name| lab.pod(name, PodNet::DUAL).expect("a backend"));
        let flags = ["--services", "--splice", "off", "--http", "127.0.0.1:0"];
        // In the node's network namespace, as on a real one.
        let agent = lab.on_node(|| Agent::start_flags(binary(), &lab, &flags)).expect("runs");
        let agent = agent.expect("the agent");
        agent.add_manifest("client", &client_manifest(&client)).expect("manifest");
        let node = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": NODE}});
        agent.add_manifest("node", &node).expect("manifest");
        let cluster = Self { agent, client, backends, lab };
        cluster.serve_both();
        cluster
    }

    /// Another agent, in the node's network namespace as well.
    pub fn restart_with(&mut self, flags: &[&str]) {
        let Self { agent, lab, .. } = self;
        lab.on_node(|| agent.restart_with(flags)).expect("runs").expect("restarted");
    }

    pub fn set(&self, file: &str, object: &Value) {
        self.agent.add_manifest(file, object).expect("manifest");
    }

    pub fn remove(&self, file: &str) {
        std::fs::remove_file(self.agent.pods_dir().join(format!("{file}.yaml"))).expect("removed");
    }

    /// The Service `web` leads to both backends.
    pub fn serve_both(&self) {
        self.set("web", &service("web", &[VIP4, VIP6]));
        self.endpoints(&self.backends.each_ref(), &ready());
        self.wait_backends(VIP4, 2);
        self.wait_backends(VIP6, 2);
    }

    pub fn endpoints(&self, pods: &[&Pod], conditions: &Value) {
        let v4: Vec<IpAddr> = pods.iter().map(|pod| pod.ipv4()).collect();
        let v6: Vec<IpAddr> = pods.iter().map(|pod| pod.ipv6()).collect();
        self.set("web-4", &slice("web-4", "web", &v4, conditions));
        let mut v6 = slice("web-6", "web", &v6, conditions);
        v6["addressType"] = "IPv6".into();
        self.set("web-6", &v6);
    }

    /// Waits until the kernel has so many backends behind an address, for both protocols.
    #[track_caller]
    pub fn wait_backends(&self, vip: &str, count: usize) {
        self.wait_backends_of("TCP", vip, count);
        self.wait_backends_of("UDP", vip, count);
    }

    #[track_caller]
    pub fn wait_backends_of(&self, protocol: &str, vip: &str, count: usize) {
        let behind = || {
            let found = self.status().into_iter().find(|service| {
                let at = SocketAddr::new(ip(vip), PORT);
                service["address"] == at.to_string() && service["protocol"] == protocol
            })?;
            Some(found["backends"].as_array().expect("backends").len())
        };
        let has = || (behind() == Some(count)).then_some(());
        wait_for(&format!("{count} backends of {vip}"), SOON, has).unwrap_or_else(|error| {
            panic!("{error:#}: {:?}; {}", self.status(), self.agent.log_tail())
        });
    }

    /// What the kernel has of Services.
    pub fn status(&self) -> Vec<Value> {
        let text = self.agent.command(&["status", "--services", "-o", "json"]).expect("status");
        let status: Value = serde_json::from_str(&text).expect("JSON");
        status["services"].as_array().expect("services").clone()
    }

    pub fn counter(&self, name: &str) -> u64 {
        let status = self.agent.status().expect("status");
        status["service_counters"][name].as_u64().unwrap_or_else(|| panic!("no {name}: {status}"))
    }

    /// One of the agent's metrics.
    pub fn metric(&self, name: &str) -> f64 {
        self.lab.on_node(|| self.agent.metric(name)).expect("runs").expect("a metric")
    }

    /// Greets over TCP on the backends' port, for both families.
    pub fn tcp_on(pod: &Pod) -> Server {
        let listen = [addr(ip("::"), TARGET)];
        Server::start(pod, ServeOpts { v6_only: false, ..ServeOpts::on(listen) }).expect("a server")
    }

    /// Which backend has this address.
    pub fn number(&self, at: IpAddr) -> Option<usize> {
        self.backends.iter().position(|pod| pod.ips().contains(&at.to_canonical()))
    }

    pub fn dial(&self, target: SocketAddr) -> Result<Answer, String> {
        self.client.ask(APP, APP, target).map_err(|error| format!("{error:#}"))
    }
}

/// A Service's address in its three kinds.
pub fn vips() -> [SocketAddr; 3] {
    let v4 = addr(ip(VIP4), PORT);
    [v4, addr(ip(VIP6), PORT), mapped(v4)]
}

/// A UDP server that answers each datagram with a word.
pub struct Echo {
    socket: UdpSocket,
}

impl Echo {
    pub fn start(pod: &Pod, word: &'static str) -> Self {
        let socket = pod.run(0, 0, || UdpSocket::bind(addr(ip("::"), TARGET))).expect("runs");
        let socket = socket.expect("bound");
        let theirs = socket.try_clone().expect("a copy");
        theirs.set_read_timeout(Some(Duration::from_millis(200))).expect("a timeout");
        std::thread::spawn(move || {
            let mut buffer = [0; 64];
            loop {
                match theirs.recv_from(&mut buffer) {
                    Ok((0, _)) => return,
                    Ok((_, from)) => drop(theirs.send_to(word.as_bytes(), from)),
                    Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                    Err(_) => return,
                }
            }
        });
        Self { socket }
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        // An empty datagram ends it.
        let _ = self.socket.send_to(&[], addr(ip("::1"), TARGET));
    }
}

pub fn udp_socket(target: SocketAddr) -> UdpSocket {
    let domain = Domain::for_address(target);
    let socket = Socket::new(domain, Type::DGRAM, Some(Protocol::UDP)).expect("a socket");
    if target.is_ipv6() {
        socket.set_only_v6(false).expect("both families");
    }
    let unspecified = if target.is_ipv4() { "0.0.0.0" } else { "::" };
    socket.bind(&addr(ip(unspecified), 0).into()).expect("bound");
    socket.set_read_timeout(Some(patience())).expect("a timeout");
    socket.into()
}

pub fn answer(socket: &UdpSocket) -> io::Result<(String, SocketAddr)> {
    let mut buffer = [0; 64];
    let (len, from) = socket.recv_from(&mut buffer)?;
    Ok((String::from_utf8_lossy(&buffer[..len]).into_owned(), from))
}
