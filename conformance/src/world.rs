//! Where rows run: a node with servers off the pod and a pod that is in no mesh, and on it, for
//! each setup, a fresh pod under the mesh's own rules or under Sidestep.

use std::collections::BTreeSet;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::net::if_::if_nametoindex;
use sidestep_lab::iptables::{self, Annotations, Backend, Istio, Kuma, Linkerd, PilotAgent};
use sidestep_lab::{
    APP, Agent, DNS, INBOUND, Lab, OUTBOUND, PROXY, Pod, PodNet, ServeOpts, Server, Talk, wait_for,
};

use crate::manifest::manifest;
use crate::row::{
    Act, Addresses, Kind, Listeners, Manner, Mesh, Opened, PROBE, Place, Row, Setup, Who,
};
use crate::udp::UdpServer;

/// Ports of a pod that are not its application's.
const PROXY_PORTS: [u16; 5] = [OUTBOUND, INBOUND, DNS, Linkerd::OUTBOUND, Linkerd::INBOUND];
/// The user of `linkerd-network-validator`.
pub const VALIDATOR: u32 = 65534;
/// How long a pod may take to get a link-local address.
const LINK_PATIENCE: Duration = Duration::from_secs(10);

/// Whose work the interception is.
#[derive(Clone, Copy, Debug)]
pub enum Way<'a> {
    /// The mesh's own rules.
    Rules(Backend),
    /// An agent of this binary.
    Sidestep(&'a Path),
}

impl Way<'_> {
    pub const fn name(self) -> &'static str {
        match self {
            Self::Rules(Backend::Iptables) => "iptables",
            Self::Rules(Backend::Nftables) => "nftables",
            Self::Sidestep(_) => "sidestep",
        }
    }
}

/// A node.
pub struct World {
    // Dropped in this order.
    agent: Option<Agent>,
    backend: Backend,
    pilot_agent: Option<PilotAgent>,
    _udp: Vec<UdpServer>,
    _servers: Vec<Server>,
    peer: Pod,
    peer_link: Link,
    lab: Lab,
    pods: usize,
}

impl World {
    /// With servers for all that the rows may reach off the pod. Rows of Istio need its binary.
    pub fn new(
        tag: &str,
        way: Way<'_>,
        pilot_agent: Option<&PilotAgent>,
        rows: &[Row],
    ) -> Result<Self> {
        let lab = Lab::new(tag)?;
        let peer = lab.pod("peer", PodNet::DUAL)?;
        let peer_link = Link::of(&peer)?;
        let ports: BTreeSet<u16> = rows.iter().map(|row| row.act.target().1).collect();
        let udp: BTreeSet<u16> = rows
            .iter()
            .filter(|row| matches!(row.act, Act::Udp { .. }))
            .map(|row| row.act.target().1)
            .collect();
        let mut servers = Vec::new();
        let mut udp_servers = Vec::new();
        for place in [Place::Remote, Place::Far, Place::Node] {
            let ips = [Kind::V4, Kind::V6].map(|kind| fixed(place, kind));
            if place != Place::Node {
                ips.into_iter().flatten().try_for_each(|ip| lab.add_node_address(ip))?;
            }
            let on = |ports: &BTreeSet<u16>| cross(ips.into_iter().flatten(), ports);
            let opts = ServeOpts { name: fixed_name(place), ..ServeOpts::on(on(&ports)) };
            servers.push(lab.on_node(|| Server::start_here(opts))??);
            if place != Place::Node {
                let start = || UdpServer::start_here(fixed_name(place), &on(&udp));
                udp_servers.push(lab.on_node(start)??);
            }
        }
        let opts = ServeOpts { name: "peer", ..ServeOpts::on(cross(ANY, &ports)) };
        servers.push(Server::start(&peer, opts)?);
        let (agent, backend) = match way {
            Way::Rules(backend) => (None, backend),
            Way::Sidestep(binary) => (Some(Agent::start(binary, &lab)?), Backend::Iptables),
        };
        Ok(Self {
            agent,
            backend,
            pilot_agent: pilot_agent.cloned(),
            _udp: udp_servers,
            _servers: servers,
            peer,
            peer_link,
            lab,
            pods: 0,
        })
    }

    /// A fresh pod for these rows, which all have this setup.
    pub fn stage(&mut self, setup: &Setup, rows: &[&Row]) -> Result<Stage<'_>> {
        self.pods += 1;
        let net = match setup.addresses {
            Addresses::Dual => PodNet::DUAL,
            Addresses::V4 | Addresses::V4Link => PodNet::V4,
            Addresses::V6 => PodNet::V6,
        };
        let pod = self.lab.pod(&format!("pod{}", self.pods), net)?;
        let mut secondary = Vec::new();
        if setup.addresses == Addresses::Dual {
            secondary = vec![secondary4(pod.ipv4())?, secondary6(pod.ipv6())?];
            pod.add_address(secondary[0], 32, "eth0", "")?;
            pod.add_address(secondary[1], 128, "eth0", "preferred_lft 0")?;
            for kind in [Kind::V4, Kind::V6] {
                let to = fixed(Place::Unroutable, kind).context("an address")?;
                pod.ip(&format!("route add unreachable {to}"))?;
            }
        }
        let mut link = None;
        if setup.addresses != Addresses::V4 {
            pod.sysctl("net.ipv6.conf.eth0.disable_ipv6", "0")?;
            link = Some(wait_for("a link-local address", LINK_PATIENCE, || Link::of(&pod).ok())?);
        }
        let mut stage = Stage {
            udp: Vec::new(),
            servers: Vec::new(),
            pod,
            secondary,
            link,
            setup: setup.clone(),
            world: self,
        };
        stage.start_app(rows)?;
        let before = matches!(setup.listeners, Listeners::At(_, Opened::Before));
        if before {
            stage.start_proxy()?;
        }
        stage.intercept()?;
        if !before && setup.listeners != Listeners::Late {
            stage.start_proxy()?;
        }
        Ok(stage)
    }
}

/// A fresh pod under test. Leaves no trace when dropped.
pub struct Stage<'a> {
    // Dropped in this order.
    udp: Vec<UdpServer>,
    servers: Vec<Server>,
    pod: Pod,
    secondary: Vec<IpAddr>,
    link: Option<Link>,
    setup: Setup,
    world: &'a mut World,
}

impl Stage<'_> {
    pub fn pod(&self) -> &Pod {
        &self.pod
    }

    /// Whether the pod has an address of IPv6 but `lo`'s.
    pub fn has_v6(&self) -> bool {
        self.link.is_some()
    }

    /// Istio's binary, and what it is told for this pod.
    pub fn istio(&self) -> Result<(&PilotAgent, Istio)> {
        let Setup { dns, v4_only, addresses, .. } = self.setup;
        let annotations: Annotations = self.setup.annotations.iter().cloned().collect();
        let istio = Istio::new(&annotations, dns, addresses == Addresses::Dual && !v4_only);
        let pilot_agent = self.world.pilot_agent.as_ref().context("no pilot-agent")?;
        Ok((pilot_agent, istio))
    }

    /// Has the pod's traffic intercepted.
    fn intercept(&mut self) -> Result<()> {
        if let Some(agent) = &mut self.world.agent {
            agent.add_manifest(self.pod.name(), &manifest(&self.pod, &self.setup))?;
            return agent.wait_enrolled(&self.pod);
        }
        let annotations: Annotations = self.setup.annotations.iter().cloned().collect();
        let v6 = self.has_v6() && !self.setup.v4_only;
        match self.setup.mesh {
            Mesh::Istio => {
                let (pilot_agent, istio) = self.istio()?;
                pilot_agent.install(&self.pod, &istio, self.world.backend)
            }
            Mesh::Linkerd => iptables::install(&self.pod, &Linkerd::new(&annotations), v6),
            Mesh::Kuma => {
                iptables::install(&self.pod, &Kuma::new(&annotations, self.setup.dns), v6)
            }
        }
    }

    fn start_app(&mut self, rows: &[&Row]) -> Result<()> {
        let mut tcp = BTreeSet::new();
        let mut udp = BTreeSet::new();
        for row in rows {
            match row.act {
                Act::Tcp(dial) => tcp.insert(dial.port),
                Act::Udp { port, to: Place::Own, .. } => udp.insert(port),
                Act::Udp { .. } | Act::Validate => false,
            };
        }
        // To the validation's port nobody must listen.
        for port in PROXY_PORTS.into_iter().chain([PROBE]) {
            tcp.remove(&port);
        }
        let opts = ServeOpts::on(cross(ANY, &tcp));
        if !tcp.is_empty() {
            let opts = ServeOpts { name: "app", uid: APP, gid: APP, ..opts };
            self.servers.push(Server::start(&self.pod, opts)?);
        }
        let listen = cross(self.pod.ips(), &udp);
        let start = || UdpServer::start_here("app", &listen);
        self.udp.push(self.pod.run(APP, APP, start)??);
        Ok(())
    }

    /// Starts the proxy's listeners.
    pub fn start_proxy(&mut self) -> Result<()> {
        let Setup { mesh, listeners, dns, .. } = self.setup;
        if listeners == Listeners::None {
            return Ok(());
        }
        let (uid, gid) = owner(mesh, Who::Proxy);
        let base = ServeOpts { uid, gid, talk: Talk::OriginalDst, ..ServeOpts::on([]) };
        let listen = |ips: &[IpAddr], port| cross(ips.iter().copied(), &BTreeSet::from([port]));
        let all: Vec<ServeOpts> = match (mesh, listeners) {
            (_, Listeners::Validator) => {
                let listen = listen(&ANY, Linkerd::OUTBOUND);
                let (uid, talk) = (VALIDATOR, Talk::Greet);
                vec![ServeOpts { name: "validator", listen, uid, gid: uid, talk, ..base }]
            }
            (mesh, Listeners::At(place, _)) => self.proxy_at(mesh, place, &base)?,
            (mesh, Listeners::Squatted) => {
                let squatter = ServeOpts { uid: APP, gid: APP, ..base.clone() };
                let mut all = self.proxy_at(mesh, Place::Loopback, &squatter)?;
                all.iter_mut().for_each(|opts| opts.name = "squatter");
                all.extend(self.proxy_at(mesh, Place::Localhost, &base)?);
                all
            }
            (Mesh::Linkerd, _) => {
                let base = ServeOpts { talk: Talk::OriginalDstOrHangUp, ..base };
                let out = listen(&LOCALHOST, Linkerd::OUTBOUND);
                let inn = listen(&ANY, Linkerd::INBOUND);
                vec![
                    ServeOpts { name: "outbound", listen: out, ..base.clone() },
                    ServeOpts { name: "inbound", listen: inn, ..base },
                ]
            }
            (_, listeners) => {
                let dual = listeners == Listeners::DualStack;
                [("outbound", OUTBOUND), ("inbound", INBOUND)]
                    .into_iter()
                    .map(|(name, port)| {
                        let mut listen = listen(&ANY, port);
                        if dual {
                            listen.retain(SocketAddr::is_ipv6);
                        }
                        ServeOpts { name, listen, v6_only: !dual, ..base.clone() }
                    })
                    .collect()
            }
        };
        for opts in all {
            self.servers.push(Server::start(&self.pod, opts)?);
        }
        if dns {
            let listen = listen(&LOCALHOST, DNS);
            let start = || UdpServer::start_here("dns", &listen);
            self.udp.push(self.pod.run(uid, gid, start)??);
            let opts = ServeOpts { uid, gid, name: "dns", ..ServeOpts::on(listen) };
            self.servers.push(Server::start(&self.pod, opts)?);
        }
        Ok(())
    }

    /// The proxy's listeners at this place alone.
    fn proxy_at(&self, mesh: Mesh, place: Place, base: &ServeOpts) -> Result<Vec<ServeOpts>> {
        let (out, inn) = match mesh {
            Mesh::Linkerd => (Linkerd::OUTBOUND, Linkerd::INBOUND),
            Mesh::Istio | Mesh::Kuma => (OUTBOUND, INBOUND),
        };
        let at = |port| -> Result<Vec<SocketAddr>> {
            let kinds: &[Kind] = match place {
                Place::OwnLink => Kind::IPV6,
                Place::Loopback => &[Kind::V4],
                _ => &[Kind::V4, Kind::V6],
            };
            kinds.iter().map(|kind| self.address(place, *kind, port, Who::Proxy)).collect()
        };
        Ok(vec![
            ServeOpts { name: "outbound", listen: at(out)?, ..base.clone() },
            ServeOpts { name: "inbound", listen: at(inn)?, ..base.clone() },
        ])
    }

    /// Forgets tracked connections, where there are such.
    pub fn clean(&self) -> Result<()> {
        match self.world.agent {
            None => iptables::forget_connections(&self.pod),
            Some(_) => Ok(()),
        }
    }

    /// Runs `work` where, and as whom, `who` is.
    pub fn run<T: Send>(&self, mesh: Mesh, who: Who, work: impl FnOnce() -> T + Send) -> Result<T> {
        let (uid, gid) = owner(mesh, who);
        match who {
            Who::Host => self.world.lab.on_node(work),
            Who::Peer => self.world.peer.run(uid, gid, work),
            _ => self.pod.run(uid, gid, work),
        }
    }

    /// The address of a place, as `who` would name it in a socket of this kind.
    pub fn address(&self, place: Place, kind: Kind, port: u16, who: Who) -> Result<SocketAddr> {
        let (pod, peer) = (&self.pod, &self.world.peer);
        let ip = match (place, kind) {
            (Place::Own, Kind::V6) => pod.ipv6(),
            (Place::Own, _) => pod.ipv4(),
            (Place::Peer, Kind::V6) => peer.ipv6(),
            (Place::Peer, _) => peer.ipv4(),
            (Place::Secondary, _) => *self
                .secondary
                .get(usize::from(kind == Kind::V6))
                .context("no second address in this pod")?,
            (Place::OwnLink, _) => self.own_link()?.ip.into(),
            (Place::PeerLink, _) => self.world.peer_link.ip.into(),
            _ => fixed(place, kind).with_context(|| format!("no {place:?} in {kind:?}"))?,
        };
        Ok(match ip {
            IpAddr::V4(v4) if kind == Kind::Mapped => {
                SocketAddr::new(v4.to_ipv6_mapped().into(), port)
            }
            IpAddr::V6(v6) if v6.is_unicast_link_local() => {
                let link = if who == Who::Peer { &self.world.peer_link } else { self.own_link()? };
                SocketAddrV6::new(v6, port, 0, link.index).into()
            }
            ip => SocketAddr::new(ip, port),
        })
    }

    fn own_link(&self) -> Result<&Link> {
        self.link.as_ref().context("no link-local address in this pod")
    }

    /// A name for the address that is the same in every run.
    pub fn name(&self, ip: IpAddr) -> String {
        let ip = ip.to_canonical();
        let own = |name: &str, ips: &[IpAddr]| ips.contains(&ip).then(|| name.to_owned());
        own("pod", &self.pod.ips())
            .or_else(|| own("pod2", &self.secondary))
            .or_else(|| own("pod-link", &self.link.iter().map(|l| l.ip.into()).collect::<Vec<_>>()))
            .or_else(|| own("peer", &self.world.peer.ips()))
            .or_else(|| own("peer-link", &[self.world.peer_link.ip.into()]))
            .or_else(|| {
                [Place::Remote, Place::Far, Place::Node]
                    .into_iter()
                    .find(|place| {
                        [Kind::V4, Kind::V6].iter().any(|k| fixed(*place, *k) == Some(ip))
                    })
                    .map(|place| fixed_name(place).to_owned())
            })
            .unwrap_or_else(|| match ip {
                // One of the many addresses that stand for one listener.
                IpAddr::V4(v4) if matches!(v4.octets(), [127, 128 | 129, ..]) => {
                    "spread".to_owned()
                }
                IpAddr::V6(v6) if v6.segments()[..4] == [0xfd53, 0x6964, 0x6573, 0x7465] => {
                    "spread".to_owned()
                }
                ip => ip.to_string(),
            })
    }

    /// The name of a place's address.
    pub fn place_name(&self, place: Place, kind: Kind) -> String {
        match self.address(place, kind, 0, Who::App) {
            Ok(address) => self.name(address.ip()),
            Err(_) => format!("{place:?}"),
        }
    }

    /// All places that the act asks at once.
    pub fn targets(act: &Act) -> Vec<Place> {
        match act {
            Act::Udp { manner: Manner::Several, .. } => vec![Place::Remote, Place::Far],
            act => vec![act.target().0],
        }
    }
}

/// The user and group of a process of the pod.
fn owner(mesh: Mesh, who: Who) -> (u32, u32) {
    let proxy = match mesh {
        Mesh::Istio => PROXY,
        Mesh::Linkerd => Linkerd::UID,
        Mesh::Kuma => Kuma::UID,
    };
    match who {
        Who::App => (APP, APP),
        Who::Proxy => (proxy, proxy),
        Who::ProxyUser => (proxy, APP),
        Who::ProxyGroup => (APP, proxy),
        Who::User(uid) => (uid, uid),
        Who::Peer | Who::Host => (0, 0),
    }
}

const ANY: [IpAddr; 2] = [IpAddr::V4(Ipv4Addr::UNSPECIFIED), IpAddr::V6(Ipv6Addr::UNSPECIFIED)];
const LOCALHOST: [IpAddr; 2] = [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)];

/// The address of a place that is the same in every run.
fn fixed(place: Place, kind: Kind) -> Option<IpAddr> {
    let text = match (place, kind) {
        (Place::Remote, Kind::V6) => "fd96::10",
        (Place::Remote, _) => "10.96.0.10",
        (Place::Far, Kind::V6) => "2001:db8::10",
        (Place::Far, _) => "192.0.2.10",
        (Place::Node, Kind::V6) => "fd77::1",
        (Place::Node, _) => "10.77.0.1",
        (Place::Localhost, Kind::V6) => "::1",
        (Place::Localhost, _) => "127.0.0.1",
        (Place::Loopback, Kind::V4 | Kind::Mapped) => "127.0.0.2",
        (Place::Passthrough, Kind::V6) => "::6",
        (Place::Passthrough, _) => "127.0.0.6",
        (Place::Unspecified, Kind::V6) => "::",
        (Place::Unspecified, _) => "0.0.0.0",
        (Place::Multicast, Kind::V6) => "ff0e::1",
        (Place::Multicast, _) => "224.0.0.1",
        (Place::Broadcast, Kind::V4 | Kind::Mapped) => "255.255.255.255",
        (Place::Unroutable, Kind::V6) => "2001:db8:dead::1",
        (Place::Unroutable, _) => "198.51.100.1",
        _ => return None,
    };
    text.parse().ok()
}

const fn fixed_name(place: Place) -> &'static str {
    match place {
        Place::Remote => "remote",
        Place::Far => "far",
        _ => "node",
    }
}

fn cross(ips: impl IntoIterator<Item = IpAddr>, ports: &BTreeSet<u16>) -> Vec<SocketAddr> {
    ips.into_iter()
        .flat_map(|ip| ports.iter().map(move |port| SocketAddr::new(ip, *port)))
        .collect()
}

/// An address of the pod's own net that no other pod of the run gets.
fn secondary4(ip: IpAddr) -> Result<IpAddr> {
    let IpAddr::V4(v4) = ip else { anyhow::bail!("{ip} is not IPv4") };
    let [a, b, c, d] = v4.octets();
    // A lab's 1,000 pods have all their own addresses below 10.77.4.0.
    ensure!(c < 128, "{ip} is not a pod's own address");
    Ok(Ipv4Addr::new(a, b, c + 128, d).into())
}

fn secondary6(ip: IpAddr) -> Result<IpAddr> {
    let IpAddr::V6(v6) = ip else { anyhow::bail!("{ip} is not IPv6") };
    Ok(Ipv6Addr::from(u128::from(v6) + 0x1000).into())
}

/// A link-local address, and the interface that it is on.
struct Link {
    ip: Ipv6Addr,
    index: u32,
}

impl Link {
    fn of(pod: &Pod) -> Result<Self> {
        pod.run(0, 0, || {
            let text = fs::read_to_string("/proc/thread-self/net/if_inet6")?;
            // "address index prefix scope flags name", all but the name in hexadecimal
            let ip = text
                .lines()
                .filter(|line| line.starts_with("fe80") && line.ends_with(" eth0"))
                .find_map(|line| u128::from_str_radix(line.split(' ').next()?, 16).ok())
                .context("eth0 has no link-local address")?;
            Ok(Self { ip: ip.into(), index: if_nametoindex("eth0")? })
        })?
    }
}
