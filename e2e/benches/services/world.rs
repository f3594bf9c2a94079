//! A node with the real kube-proxy and the agent: one pod leaves its calls to kube-proxy, the other
//! has them translated by Sidestep.

use std::{
    io::{Read, Write},
    net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, TcpListener, UdpSocket},
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::{core::v1::Node as ApiNode, discovery::v1::EndpointSlice};
use serde::Serialize;
use serde_json::{Value, json};
use sidestep_e2e::{
    Envtest,
    envtest::{KubeProxy, Mode},
};
use sidestep_lab::{Lab, Pod, PodNet, wait_for};

use crate::{
    cluster::{Cluster, Parts, succeeds},
    measure,
};

/// The port that accepts and says which endpoint it is, and the one that echoes.
pub const PORTS: [u16; 2] = [8080, 8081];
/// Endpoints of the Service that is measured: the shape of the original proposal.
pub const ENDPOINTS: u8 = 12;
/// Objects that are created at a time.
const CREATORS: usize = 8;
/// How long kube-proxy may take to follow.
const SOON: Duration = Duration::from_secs(180);

/// Who decides where a call goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Way {
    /// Straight to an endpoint.
    Direct,
    /// kube-proxy, in one of its modes.
    KubeProxy,
    /// The socket layer.
    Sidestep,
}

/// Dropped in this order.
pub struct World {
    proxy: Option<KubeProxy>,
    mode: Mode,
    pub cluster: Cluster,
    /// Kept for its namespace.
    _backend: Pod,
    node: PathBuf,
    /// The measured Service's address.
    vip: IpAddr,
    /// How many Services there are beside it.
    fillers: usize,
}

fn endpoint(n: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 77, 50, n + 1)
}

impl World {
    pub fn start(mode: Mode) -> Result<Self> {
        let name = if mode == Mode::Iptables { "bench-iptables" } else { "bench-nftables" };
        let lab = Lab::new(name)?;
        for (key, value) in [
            ("net.ipv4.ip_forward", "1"),
            ("net.ipv4.conf.all.send_redirects", "0"),
            ("net.ipv4.conf.br0.send_redirects", "0"),
        ] {
            lab.sysctl_on_node(key, value)?;
        }
        let backend = lab.pod("backend", PodNet::DUAL)?;
        let node = Path::new("/run/netns").join(lab.node_name());
        let api = Envtest::start_in(&node, [10, 77, 0, 1].into())?;
        let mut parts = Parts::on(name, api, lab);
        parts.run_agent_by(&format!("nsenter --net={} --", node.display()));
        let mut cluster = parts.cluster(&["--services", "--splice", "off"], |_| {});
        let address = json!([{"address": "10.77.0.1", "type": "InternalIP"}]);
        let status = json!({"addresses": address});
        cluster.api.patch_status::<ApiNode>("", &cluster.name, status)?;
        cluster.in_force();
        let mut objects = Vec::new();
        for (pod, annotations) in
            [(&cluster.a, json!({"sidestep.io/services": "disabled"})), (&cluster.b, json!({}))]
        {
            let mut object = cluster.pending(pod);
            object["metadata"]["annotations"] = annotations;
            object["metadata"]["labels"] = json!({});
            object["spec"]["containers"] = json!([{"name": "app", "image": "app"}]);
            let object = cluster.create(object);
            succeeds(&cluster.plugin("ADD", pod, &object));
            objects.push(object);
        }
        // By their processes an agent finds the pods that the plugin told nothing.
        cluster.runs(|cluster| &cluster.a, &objects[0]);
        cluster.runs(|cluster| &cluster.b, &objects[1]);
        for n in 0..ENDPOINTS {
            backend.add_address(endpoint(n).into(), 16, "eth0", "")?;
        }
        for pod in [&backend, &cluster.a, &cluster.b] {
            by_the_node(pod)?;
        }
        serve(&backend)?;
        let service = cluster.api.create(json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": {"name": "web", "namespace": cluster.name},
            "spec": {"ports": [
                {"name": "accept", "port": PORTS[0]}, {"name": "echo", "port": PORTS[1]},
                {"name": "udp", "protocol": "UDP", "port": PORTS[1]},
            ]},
        }))?;
        let vip = service["spec"]["clusterIP"].as_str().context("no address")?.parse()?;
        let all: Vec<u8> = (0..ENDPOINTS).collect();
        let slice = cluster.slice("web", &all);
        cluster.api.create(slice)?;
        let mut world =
            Self { proxy: None, mode, cluster, _backend: backend, node, vip, fillers: 0 };
        world.start_proxy()?;
        world.follow("web")?;
        Ok(world)
    }

    fn start_proxy(&mut self) -> Result<()> {
        let Self { cluster, node, mode, .. } = self;
        let proxy = cluster.api.kube_proxy(*mode, node, &cluster.name, "10.77.0.0/16")?;
        self.proxy = Some(proxy);
        Ok(())
    }

    /// Where calls of a kind go: by a way, to a port.
    pub fn target(&self, way: Way, port: u16) -> SocketAddr {
        let ip = if way == Way::Direct { endpoint(0).into() } else { self.vip };
        SocketAddr::new(ip, port)
    }

    /// Does `work` as a process of the pod whose calls go that way.
    pub fn by<T: Send>(&self, way: Way, work: impl FnOnce() -> T + Send) -> Result<T> {
        let pod = if way == Way::KubeProxy { &self.cluster.a } else { &self.cluster.b };
        pod.run(1000, 1000, work)
    }

    /// Makes it so many Services in all, of two endpoints each, which both sides follow; how long
    /// each took after the last of them was created.
    pub fn grow(&mut self, services: usize) -> Result<()> {
        let wanted = services.saturating_sub(1);
        let (from, cluster) = (self.fillers, &self.cluster);
        thread::scope(|scope| {
            let create = |nth: usize| {
                for n in (from..wanted).skip(nth).step_by(CREATORS) {
                    cluster.filler(n)?;
                }
                Ok(())
            };
            let creators: Vec<_> =
                (0..CREATORS).map(|nth| scope.spawn(move || create(nth))).collect();
            creators.into_iter().try_for_each(|creator| creator.join().expect("no panic"))
        })
        .map_err(|error: anyhow::Error| error)?;
        self.fillers = wanted;
        self.follow(&format!("size-{services}")).map(drop)
    }

    /// A new Service is followed by both; how long each took.
    fn follow(&self, name: &str) -> Result<()> {
        let name = format!("sentinel-{name}");
        let vip = self.cluster.service(&name, &[0])?;
        for way in [Way::Sidestep, Way::KubeProxy] {
            self.reached(way, vip)?;
        }
        Ok(())
    }

    fn reached(&self, way: Way, vip: IpAddr) -> Result<()> {
        let target = SocketAddr::new(vip, PORTS[0]);
        // kube-proxy serves what Sidestep does not translate.
        let by_socket = way == Way::Sidestep;
        let dial = || measure::reaches(target, by_socket).ok()?.then_some(());
        let reached = self.by(way, || wait_for("the Service to answer", SOON, dial))?;
        reached.with_context(|| format!("{way:?}: {}", self.cluster.agent.log_tail())).map(drop)
    }

    /// From nothing: how long after its start all Services are in force.
    pub fn cold(&mut self, way: Way) -> Result<Duration> {
        let vip = self.cluster.service(&format!("cold-{way:?}").to_lowercase(), &[0])?;
        let start = match way {
            Way::KubeProxy => {
                self.proxy = None;
                self.clean()?;
                let start = Instant::now();
                self.start_proxy()?;
                start
            }
            _ => {
                self.proxy = None;
                self.clean()?;
                self.cluster.agent.terminate()?;
                self.cluster.agent.unload()?;
                let start = Instant::now();
                self.cluster.agent.restart()?;
                start
            }
        };
        self.reached(way, vip)?;
        Ok(start.elapsed())
    }

    /// Takes kube-proxy's rules away.
    fn clean(&self) -> Result<()> {
        let clean = "nft flush ruleset; iptables -t nat -F; iptables -F; true";
        let netns = format!("--net={}", self.node.display());
        let done = std::process::Command::new("nsenter").args([&netns, "sh", "-c", clean]).status();
        ensure!(done?.success(), "kube-proxy's rules stay");
        Ok(())
    }

    /// Resident memory of the process that decides, in KiB.
    pub fn memory(&self, way: Way) -> Result<u64> {
        let pid = match way {
            Way::KubeProxy => self.proxy.as_ref().map(KubeProxy::pid),
            _ => self.cluster.agent.pid(),
        };
        let status =
            std::fs::read_to_string(format!("/proc/{}/status", pid.context("no process")?))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib = line.and_then(|line| line.trim().strip_suffix(" kB")).context("no VmRSS")?;
        Ok(kib.trim().parse()?)
    }

    /// What the kernel holds of Services for the agent, in bytes, by the maps' own account.
    pub fn maps(&self) -> Result<u64> {
        let maps = self.cluster.agent.bpffs().join(sidestep::dataplane::LAYOUT).join("maps");
        let mut bytes = 0;
        for name in ["services", "service_lists", "backends", "service_members", "affinities"] {
            let map = libbpf_rs::MapHandle::from_pinned_path(maps.join(name))
                .with_context(|| format!("map {name} in {}", maps.display()))?;
            let fd = std::os::fd::AsRawFd::as_raw_fd(&std::os::fd::AsFd::as_fd(&map));
            let text = std::fs::read_to_string(format!("/proc/self/fdinfo/{fd}"))?;
            let line = text.lines().find_map(|line| line.strip_prefix("memlock:"));
            bytes += line.context("no memlock")?.trim().parse::<u64>()?;
        }
        Ok(bytes)
    }

    /// One endpoint of a Service takes another's place, again and again: how long it takes from the
    /// API server's answer until a call gets to the new one.
    pub fn changes(&self, way: Way, count: usize) -> Result<Vec<f64>> {
        let name = format!("flip-{way:?}").to_lowercase();
        let vip = self.cluster.service(&name, &[0])?;
        self.reached(way, vip)?;
        let target = SocketAddr::new(vip, PORTS[0]);
        let mut took = Vec::new();
        for n in 0..count {
            let next = u8::try_from((n + 1) % 2)?;
            let endpoints = json!({"endpoints": self.cluster.endpoints(&[next])});
            self.cluster.api.patch::<EndpointSlice>(&self.cluster.name, &name, &endpoints)?;
            let answered = Instant::now();
            let arrived = self.by(way, || {
                let there = || (measure::first_byte(target).ok()? == next).then(Instant::now);
                measure::spin(SOON, there)
            })?;
            took.push((arrived? - answered).as_secs_f64() * 1e3);
            thread::sleep(Duration::from_millis(50)); // changes apart from each other
        }
        Ok(took)
    }
}

impl Cluster {
    fn endpoints(&self, endpoints: &[u8]) -> Value {
        let one = |n: &u8| json!({"addresses": [endpoint(*n)], "nodeName": self.name, "conditions": {"ready": true}});
        endpoints.iter().map(one).collect()
    }

    fn slice(&self, service: &str, endpoints: &[u8]) -> Value {
        json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {
                "name": service, "namespace": self.name,
                "labels": {"kubernetes.io/service-name": service},
            },
            "ports": [
                {"name": "accept", "port": PORTS[0]}, {"name": "echo", "port": PORTS[1]},
                {"name": "udp", "protocol": "UDP", "port": PORTS[1]},
            ],
            "endpoints": self.endpoints(endpoints),
        })
    }

    /// A Service of one port; its address.
    fn service(&self, name: &str, endpoints: &[u8]) -> Result<IpAddr> {
        let service = self.api.create(json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": {"name": name, "namespace": self.name},
            "spec": {"ports": [{"name": "accept", "port": PORTS[0]}]},
        }))?;
        self.api.create(self.slice(name, endpoints))?;
        Ok(service["spec"]["clusterIP"].as_str().context("no address")?.parse()?)
    }

    /// One of many that nobody dials.
    fn filler(&self, n: usize) -> Result<()> {
        let n = u8::try_from(n % usize::from(ENDPOINTS - 1))?;
        let name = format!("filler-{}", fastrand::u64(..));
        self.service(&name, &[n, n + 1]).map(drop)
    }
}

/// Has a pod send everything by way of the node, as pods of most networks do: else answers would
/// not meet kube-proxy's rules.
fn by_the_node(pod: &Pod) -> Result<()> {
    for (key, value) in [
        ("net.ipv4.conf.all.accept_redirects", "0"),
        ("net.ipv4.conf.eth0.accept_redirects", "0"),
        ("net.ipv4.ip_local_port_range", "1024 65535"),
    ] {
        pod.sysctl(key, value)?;
    }
    pod.ip("route add 10.77.0.1/32 dev eth0 scope link")?;
    pod.ip("route del 10.77.0.0/16 dev eth0").map(drop)
}

/// The endpoints: each connection to the first port is told which one it has got, and closed; the
/// second one echoes.
fn serve(backend: &Pod) -> Result<()> {
    let any = |port| SocketAddr::from((Ipv4Addr::UNSPECIFIED, port));
    let bind = || -> Result<_> {
        let [accepts, echoes] = PORTS.map(|port| TcpListener::bind(any(port)));
        // By the wildcard's socket, all would answer from the pod's first address.
        let udp = (0..ENDPOINTS).map(|n| UdpSocket::bind((endpoint(n), PORTS[1])));
        Ok((accepts?, echoes?, udp.collect::<Result<Vec<_>, _>>()?))
    };
    let (accepts, echoes, udp) = backend.run(0, 0, bind)??;
    thread::spawn(move || {
        for stream in accepts.incoming() {
            let Ok(mut stream) = stream else { continue };
            let Ok(SocketAddr::V4(local)) = stream.local_addr() else { continue };
            let _ = stream.write_all(&[local.ip().octets()[3].wrapping_sub(1)]);
        }
    });
    thread::spawn(move || {
        for stream in echoes.incoming() {
            let Ok(mut stream) = stream else { continue };
            let _ = stream.set_nodelay(true);
            thread::spawn(move || {
                let mut buffer = [0; 64];
                while stream.read_exact(&mut buffer).is_ok() && stream.write_all(&buffer).is_ok() {}
                let _ = stream.shutdown(Shutdown::Both);
            });
        }
    });
    for udp in udp {
        thread::spawn(move || {
            let mut buffer = [0; 64];
            while let Ok((len, from)) = udp.recv_from(&mut buffer) {
                let _ = udp.send_to(&buffer[..len], from);
            }
        });
    }
    Ok(())
}
