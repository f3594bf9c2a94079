//! The same script of events for the real kube-proxy and for the socket layer: after each event
//! every address of a Service leads to the same endpoints by both, from a pod and from the node.
//!
//! `SIDESTEP_TEST_SEED` repeats a script, and `SIDESTEP_TEST_EVENTS` says how long it is.

#[path = "../cluster/mod.rs"]
mod cluster;
#[path = "../../../tests/common/mod.rs"]
mod common;
mod dial;
mod script;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    env, fmt,
    net::{IpAddr, SocketAddr, UdpSocket},
    path::Path,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::Result;
use cluster::{Cluster, Parts, succeeds};
use common::*;
use dial::{Dial, Outcome, PATIENCE, RETRANSMISSION, Way, dial_all};
use fastrand::Rng;
use k8s_openapi::api::{
    core::v1::{Node as ApiNode, Service},
    discovery::v1::EndpointSlice,
};
use serde_json::{Value, json};
use sidestep_e2e::{
    Envtest,
    envtest::{KubeProxy, Mode},
};
use sidestep_lab::{Lab, Pod, PodNet, Seen, ServeOpts, Server, slowdown, wait_until};
use socket2::Socket;

use script::{Address, Api, Event, Key, Place, TARGETS, Target, World, ZONES, slice_object};

/// The script that runs where none is chosen.
const SEED: u64 = 16;
/// How often each target is dialled at a time, from each place and by each side.
const TRIES: usize = 6;
/// Rounds until the two sides have to agree. Which endpoint a dial gets is chance.
const ROUNDS: usize = 15;
/// After so many, what was seen before counts no more: it may be from before the event.
const AFRESH: usize = 4;
/// How long an event may take until it is in force.
const SOON: Duration = Duration::from_secs(20);
/// How many endpoints there are beside the two pods that dial, and the node.
const BACKENDS: [&str; 4] = ["one", "two", "three", "four"];

/// Where the two are meant to differ, and why. A difference is one of these exactly, or a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Difference {
    /// Row 7. `internalTrafficPolicy: Local`, and no endpoint here: kube-proxy drops, so the caller
    /// waits for its timeout, or is told EPERM where it sends UDP from the node; the socket layer
    /// refuses.
    LocalWithoutEndpoint,
    /// Row 6. The kernel tells an unconnected UDP socket nothing of an ICMP error, which is all that
    /// kube-proxy has; the socket layer refuses `sendto` itself.
    RefusedSendto,
    /// Row 6. The kernel answers who sends UDP from the node with EPERM where a rule of the node's
    /// rejects it.
    RejectedOnNode,
    /// Row 6. In iptables mode the rules that reject what goes to an outer address without endpoints
    /// are for packets that come in or pass through: the node's own leave it.
    OuterFromNode,
    /// Row 10. A client keeps its endpoint by both, each by its own choice.
    Affinity,
    /// Row 24. kube-proxy masquerades a pod that is led to itself; else it would answer itself.
    Hairpin,
    /// Rows 25, 27 and 28. kube-proxy masquerades what goes to an address that is known outside, since
    /// the answer might come by another way.
    Masquerade,
}

/// Who decides where a dial goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Side {
    KubeProxy,
    Socket,
}

/// From where it is dialled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum From {
    Pod,
    Node,
}

const COLUMNS: [(From, Side); 4] = [
    (From::Pod, Side::KubeProxy),
    (From::Pod, Side::Socket),
    (From::Node, Side::KubeProxy),
    (From::Node, Side::Socket),
];

/// A UDP server that says what it sees, as [`Server`] does for TCP.
struct Echo {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Echo {
    /// In the calling thread's namespace.
    fn start_here(name: &'static str, port: u16) -> Self {
        let socket = UdpSocket::bind(addr(ip("::"), port)).expect("bound");
        socket.set_read_timeout(Some(Duration::from_millis(100))).expect("a timeout");
        let local = socket.local_addr().expect("an address");
        let stop = Arc::<AtomicBool>::default();
        let ends = Arc::clone(&stop);
        let serve = move || {
            let mut buffer = [0; 64];
            while !ends.load(Ordering::Relaxed) {
                let Ok((_, peer)) = socket.recv_from(&mut buffer) else { continue };
                let by = Some(name.to_owned());
                let seen = Seen { by, peer, local, orig: None, orig6: None };
                let _ = socket.send_to(seen.to_string().as_bytes(), peer);
            }
        };
        Self { stop, thread: Some(thread::spawn(serve)) }
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// What listens at a place: TCP and UDP, both families, each of [`TARGETS`].
struct Servers {
    _tcp: Server,
    _udp: Vec<Echo>,
}

impl Servers {
    fn start_here(name: &'static str) -> Self {
        let listen = TARGETS.map(|port| addr(ip("::"), port));
        let opts = ServeOpts { v6_only: false, name, ..ServeOpts::on(listen) };
        let udp = TARGETS.map(|port| Echo::start_here(name, port));
        Self { _tcp: Server::start_here(opts).expect("a server"), _udp: udp.into() }
    }
}

/// Sockets of the node that no agent sees.
type Pool = HashMap<(bool, bool), Vec<Socket>>;

/// Both sides on one node. Pod `a` has said that kube-proxy is to decide for it, pod `b` has not.
struct Duel {
    mode: Mode,
    proxy: KubeProxy,
    _servers: Vec<Servers>,
    places: Vec<Place>,
    pool: Pool,
    written: BTreeMap<Key, Value>,
    world: World,
    /// The number of the event, which the sentinel tells.
    turn: u16,
    /// Differences that were met.
    met: BTreeSet<Difference>,
    _backends: Vec<Pod>,
    cluster: Cluster,
}

/// What was dialled how, from where.
type Asked = (usize, Way, From);

/// What became of all dials of a kind, by each side.
type Sides = BTreeMap<Side, BTreeSet<Outcome>>;

/// What a node has beside a bridge: it forwards, and knows a way to everywhere, on which nobody
/// answers.
fn prepare(lab: &Lab) {
    for (key, value) in [
        ("net.ipv4.ip_forward", "1"),
        ("net.ipv6.conf.all.forwarding", "1"),
        ("net.ipv4.conf.all.send_redirects", "0"),
        ("net.ipv4.conf.br0.send_redirects", "0"),
        // Each refusal is told, however many there are.
        ("net.ipv4.icmp_ratemask", "0"),
        ("net.ipv6.icmp.ratelimit", "0"),
        ("net.ipv6.icmp.ratemask", "\n"),
        ("net.ipv4.ip_local_port_range", "1024 65535"),
    ] {
        lab.sysctl_on_node(key, value).expect("set");
    }
    lab.ip_on_node(
        "neigh add 10.77.255.254 lladdr 02:00:00:00:00:99 dev br0\n\
         neigh add fd77::ffff lladdr 02:00:00:00:00:99 dev br0\n\
         route add default via 10.77.255.254 dev br0\n\
         route add default via fd77::ffff dev br0\n",
    )
    .expect("routes");
}

/// Has a pod send everything by way of the node, as pods of most networks do: what goes from pod to
/// pod over the bridge alone would not meet kube-proxy's rules on its way back.
fn route_by_node(pod: &Pod) {
    for (key, value) in [
        ("net.ipv4.conf.all.accept_redirects", "0"),
        ("net.ipv4.conf.eth0.accept_redirects", "0"),
        ("net.ipv6.conf.eth0.accept_redirects", "0"),
        ("net.ipv4.ip_local_port_range", "1024 65535"),
    ] {
        pod.sysctl(key, value).expect("set");
    }
    for command in [
        "route add 10.77.0.1/32 dev eth0 scope link",
        "route del 10.77.0.0/16 dev eth0",
        "route add fd77::1/128 dev eth0",
        "route del fd77::/64 dev eth0",
    ] {
        pod.ip(command).expect("a route");
    }
}

/// The object as it is created: merge patches have nulls for what is to go.
fn without_nulls(value: &Value) -> Value {
    match value {
        Value::Object(map) => {
            let some = map.iter().filter(|(_, value)| !value.is_null());
            some.map(|(key, value)| (key.clone(), without_nulls(value))).collect()
        }
        other => other.clone(),
    }
}

impl Duel {
    fn new(mode: Mode, rng: &mut Rng) -> Self {
        let tag = match mode {
            Mode::Iptables => "kp-iptables",
            Mode::Nftables => "kp-nftables",
        };
        let lab = Lab::new(tag).expect("a lab");
        prepare(&lab);
        let backends: Vec<Pod> =
            BACKENDS.iter().map(|name| lab.pod(name, PodNet::DUAL).expect("a pod")).collect();
        let node = Path::new("/run/netns").join(lab.node_name());
        let api = Envtest::start_in(&node, [10, 77, 0, 1].into()).expect("an API server");
        let mut parts = Parts::on(tag, api, lab);
        parts.run_agent_by(&format!("nsenter --net={} --", node.display()));
        let flags = ["--services", "--services-external-ips", "--splice", "off"];
        let cluster = parts.cluster(&flags, |_| {});
        let addresses = [("10.77.0.1", "InternalIP"), ("fd77::1", "InternalIP")];
        let addresses = addresses.map(|(ip, kind)| json!({"address": ip, "type": kind}));
        let status = json!({"addresses": addresses});
        cluster.api.patch_status::<ApiNode>("", &cluster.name, status).expect("patched");
        let proxy = cluster.api.kube_proxy(mode, &node, &cluster.name, "10.77.0.0/16,fd77::/64");
        let proxy = proxy.expect("kube-proxy");

        cluster.in_force();
        let off = annotated(cluster.plain(&cluster.a), "sidestep.io/services", "disabled");
        for (pod, object) in [(&cluster.a, off), (&cluster.b, cluster.plain(&cluster.b))] {
            succeeds(&cluster.plugin("ADD", pod, &cluster.create(object)));
        }
        let (mut servers, mut places) = (Vec::new(), Vec::new());
        let pods = [("off", &cluster.a), ("on", &cluster.b)];
        for (name, pod) in BACKENDS.iter().copied().zip(&backends).chain(pods) {
            route_by_node(pod);
            servers.push(pod.run(0, 0, || Servers::start_here(name)).expect("runs"));
            places.push(Place { name, v4: pod.ipv4(), v6: pod.ipv6() });
        }
        servers.push(cluster.lab.on_node(|| Servers::start_here("node")).expect("runs"));
        places.push(Place { name: "node", v4: ip("10.77.0.1"), v6: ip("fd77::1") });
        let world = World::new(rng, places.len());
        let duel = Self {
            mode,
            proxy,
            _servers: servers,
            places,
            pool: Pool::new(),
            written: BTreeMap::new(),
            world,
            turn: 0,
            met: BTreeSet::new(),
            _backends: backends,
            cluster,
        };
        duel.add_zone_sentinel();
        duel
    }

    /// Brings the API server in step with the world, what goes first. The last that it is told is the
    /// sentinel: a Service with another port each time, and slices with the other target port. Who
    /// follows it has followed all that came before it, since a watch keeps the order.
    fn write(&mut self) {
        let name = self.cluster.name.clone();
        let mut wanted = self.world.objects(&name, &name, &self.places);
        self.turn += 1;
        wanted.extend(self.sentinel());
        let api = &self.cluster.api;
        let mut anew = BTreeSet::new();
        for (key, before) in &self.written {
            let stays = wanted.get(key).is_some_and(|after| script::can_become(before, after));
            if stays {
                continue;
            }
            anew.insert(key.clone());
            match key.0 {
                Api::Service => api.delete::<Service>(&name, &key.1),
                Api::Slice => api.delete::<EndpointSlice>(&name, &key.1),
            }
            .expect("deleted");
        }
        for (key, after) in &wanted {
            let before = self.written.get(key).filter(|_| !anew.contains(key));
            if before == Some(after) {
                continue;
            }
            let Some(before) = before else {
                api.create(without_nulls(after)).unwrap_or_else(|error| {
                    panic!("{error:#}: {after:#}");
                });
                continue;
            };
            let mut patch = after.clone();
            patch["status"] = Value::Null;
            let patched = match key.0 {
                Api::Service => api.patch::<Service>(&name, &key.1, &patch),
                Api::Slice => api.patch::<EndpointSlice>(&name, &key.1, &patch),
            };
            patched.unwrap_or_else(|error| panic!("{error:#}: {before:#} to {after:#}"));
            if after["spec"]["type"] == "LoadBalancer" {
                let mut status = after["status"].clone();
                if status["loadBalancer"] == json!({}) {
                    status["loadBalancer"]["ingress"] = Value::Null;
                }
                api.patch_status::<Service>(&name, &key.1, status).expect("patched");
            }
        }
        self.written = wanted;
    }

    fn sentinel(&self) -> Vec<(Key, Value)> {
        let name = &self.cluster.name;
        let service = json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": {"name": "zz-sentinel", "namespace": name},
            "spec": {
                "clusterIP": "10.96.9.1", "clusterIPs": ["10.96.9.1", "fd96::9:1"],
                "ipFamilyPolicy": "RequireDualStack",
                "ports": [{"port": self.sentinel_port()}],
            },
        });
        let mut objects = vec![((Api::Service, "zz-sentinel".to_owned()), service)];
        for (family, at) in [("IPv4", self.places[0].v4), ("IPv6", self.places[0].v6)] {
            let slice = format!("zz-sentinel-{}", family.to_lowercase());
            let ports = [json!({"name": "", "port": self.sentinel_target()})];
            let endpoints = [json!({"addresses": [at]})];
            let object = slice_object(name, &slice, "zz-sentinel", family, &ports, &endpoints);
            objects.push(((Api::Slice, slice), object));
        }
        objects
    }

    fn sentinel_port(&self) -> u16 {
        20_000 + self.turn
    }

    fn sentinel_target(&self) -> u16 {
        TARGETS[usize::from(self.turn % 2)]
    }

    /// A Service whose endpoints are each hinted to a zone.
    fn add_zone_sentinel(&self) {
        let name = &self.cluster.name;
        self.cluster.create(json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": {"name": "zz-zone", "namespace": name},
            "spec": {"clusterIP": "10.96.9.2", "ports": [{"port": 80}]},
        }));
        let endpoint = |(zone, place): (&&str, &Place)| {
            let hints = json!({"forZones": [{"name": zone}]});
            json!({"addresses": [place.v4], "hints": hints})
        };
        let endpoints: Vec<Value> = ZONES.iter().zip(&self.places).map(endpoint).collect();
        let ports = [json!({"name": "", "port": TARGETS[0]})];
        let object = slice_object(name, "zz-zone-1", "zz-zone", "IPv4", &ports, &endpoints);
        self.cluster.create(object);
    }

    fn label_zone(&self) {
        let zone = self.world.zone.map(|zone| ZONES[zone]);
        let patch = json!({"metadata": {"labels": {"topology.kubernetes.io/zone": zone}}});
        self.cluster.api.patch::<ApiNode>("", &self.cluster.name, &patch).expect("patched");
    }

    /// Waits until both sides know of all that was written.
    fn in_step(&mut self) {
        let tcp = |to| Dial { to, way: Way::Tcp, mapped: false };
        let patience = Duration::from_millis(50);
        for side in [Side::KubeProxy, Side::Socket] {
            for (vip, at) in [("10.96.9.1", self.places[0].v4), ("fd96::9:1", self.places[0].v6)] {
                let (to, wanted) = (addr(ip(vip), self.sentinel_port()), self.sentinel_target());
                let follows = || {
                    if side == Side::Socket {
                        // What it does not know yet is answered by way of kube-proxy.
                        return self.backends(to, true) == Some([addr(at, wanted)].into());
                    }
                    let outcome = self.dial_from_pod(side, &[tcp(to)], patience);
                    matches!(&outcome[..], [Outcome::Answered { port, .. }] if *port == wanted)
                };
                let what = format!("{side:?} to follow");
                wait_until(&what, SOON, follows)
                    .unwrap_or_else(|error| panic!("{error:#}; {}", self.logs()));
            }
            let all = || BACKENDS[..ZONES.len()].iter().map(|name| (*name).to_owned());
            let wanted: BTreeSet<String> = match self.world.zone {
                Some(zone) => all().skip(zone).take(1).collect(),
                None => all().collect(),
            };
            let dials = [tcp(addr(ip("10.96.9.2"), 80)); 16];
            let follows = || {
                let names = self.dial_from_pod(side, &dials, PATIENCE).into_iter().map(|outcome| {
                    match outcome {
                        Outcome::Answered { by, .. } => by,
                        other => format!("{other:?}"),
                    }
                });
                names.collect::<BTreeSet<_>>() == wanted
            };
            wait_until(&format!("{side:?} to follow the node's zone"), SOON, follows)
                .unwrap_or_else(|error| panic!("{error:#}; {}", self.logs()));
        }
    }

    fn logs(&self) -> String {
        format!("{}\n{}", self.cluster.agent.log_tail(), self.proxy.log_tail())
    }

    fn dial_from_pod(&self, side: Side, dials: &[Dial], patience: Duration) -> Vec<Outcome> {
        let pod = if side == Side::KubeProxy { &self.cluster.a } else { &self.cluster.b };
        pod.run(APP, APP, || dial_all(dials, patience, dial::socket)).expect("runs")
    }

    /// Dials by all four columns at once.
    fn round(&mut self, dials: &[Dial], patience: Duration) -> Vec<Vec<Outcome>> {
        self.fill_pool(dials);
        let mut pool = std::mem::take(&mut self.pool);
        let (this, theirs) = (&*self, &mut pool);
        let outcomes = thread::scope(|scope| {
            let mut running = Vec::new();
            for side in [Side::KubeProxy, Side::Socket] {
                running.push(scope.spawn(move || this.dial_from_pod(side, dials, patience)));
            }
            let outside = move || {
                let take = |kind| Ok(theirs.get_mut(&kind).and_then(Vec::pop).expect("a socket"));
                this.cluster.lab.on_node(|| dial_all(dials, patience, take)).expect("runs")
            };
            running.push(scope.spawn(outside));
            let inside = || dial_all(dials, patience, dial::socket);
            running.push(scope.spawn(move || this.cluster.lab.on_node(inside).expect("runs")));
            running.into_iter().map(|one| one.join().expect("a column")).collect()
        });
        self.pool = pool;
        outcomes
    }

    /// Makes sockets for the node's dials that are kube-proxy's: they belong to the cgroup that this
    /// process was in when it made them.
    fn fill_pool(&mut self, dials: &[Dial]) {
        let mut needed: HashMap<(bool, bool), usize> = HashMap::new();
        for dial in dials {
            *needed.entry(dial.socket()).or_default() += 1;
        }
        let has = |kind: &(bool, bool)| self.pool.get(kind).map_or(0, Vec::len);
        if needed.iter().all(|(kind, count)| has(kind) >= *count) {
            return;
        }
        let pool = &mut self.pool;
        let fill = || {
            for (kind, count) in needed {
                let have = pool.entry(kind).or_default();
                while have.len() < count + 256 {
                    have.push(dial::socket(kind).expect("a socket"));
                }
            }
        };
        self.cluster.lab.on_node_outside(fill).expect("outside of the cgroup");
    }

    /// The agent's counters: translated or refused, and left to kube-proxy by the pod's own wish.
    fn counted(&self) -> (u64, u64) {
        let status = self.cluster.agent.status().expect("a status");
        let count = |name: &str| {
            let count = status["service_counters"][name].as_u64();
            count.unwrap_or_else(|| panic!("no {name}: {status}"))
        };
        let decided = ["tcp4", "tcp6", "udp4", "udp6", "refused"];
        let decided = decided.iter().map(|name| count(&format!("service_{name}"))).sum();
        (decided, count("service_passed"))
    }

    /// What the kernel's maps have behind an address; none: it is not translated.
    fn backends(&self, to: SocketAddr, tcp: bool) -> Option<BTreeSet<SocketAddr>> {
        let text = self.cluster.agent.command(&["status", "--services", "-o", "json"]);
        let status: Value = serde_json::from_str(&text.expect("a status")).expect("JSON");
        let protocol = if tcp { "TCP" } else { "UDP" };
        let found = status["services"]
            .as_array()
            .expect("services")
            .iter()
            .find(|one| one["address"] == to.to_string() && one["protocol"] == protocol);
        let backends = found?["backends"].as_array().expect("backends").iter();
        Some(backends.map(|one| one.as_str().expect("text").parse().expect("one")).collect())
    }

    fn targets(&self) -> Vec<Target> {
        self.world.targets(self.places.last().expect("the node"))
    }

    /// Dials everything until both sides agree.
    fn compare(&mut self, gone: &[Target], what: &dyn fmt::Display) {
        let mut targets = self.targets();
        for old in gone {
            if !targets.iter().any(|one| (one.to, one.tcp) == (old.to, old.tcp)) {
                targets.push(Target { translated: None, affinity: false, ..old.clone() });
            }
        }
        // A port that no Service has.
        if let Some(one) = targets.first().cloned() {
            let to = SocketAddr::new(one.to.ip(), 99);
            targets.push(Target { to, translated: None, affinity: false, ..one });
        }
        let mut pending: BTreeSet<Asked> = BTreeSet::new();
        for (n, target) in targets.iter().enumerate() {
            let ways: &[Way] = if target.tcp { &[Way::Tcp] } else { &[Way::Udp, Way::SendTo] };
            pending.extend(
                ways.iter().flat_map(|way| [From::Pod, From::Node].map(|from| (n, *way, from))),
            );
        }
        // Clients find their endpoint first.
        let sticky: Vec<Dial> = pending
            .iter()
            .filter(|(n, way, _)| targets[*n].affinity && *way != Way::SendTo)
            .map(|(n, way, _)| Dial { to: targets[*n].to, way: *way, mapped: false })
            .collect();
        for dial in &sticky {
            self.round(std::slice::from_ref(dial), PATIENCE);
        }
        let mut seen: BTreeMap<Asked, Sides> = BTreeMap::new();
        let mut patience = PATIENCE;
        for round in 0..ROUNDS {
            let mut asked: Vec<(usize, Way)> =
                pending.iter().map(|(n, way, _)| (*n, *way)).collect();
            asked.dedup();
            let mut dials = Vec::new();
            for (n, way) in &asked {
                let of = |mapped| Dial { to: targets[*n].to, way: *way, mapped };
                let is_v4 = targets[*n].to.is_ipv4();
                dials.extend((0..TRIES).map(|n| of(is_v4 && n % 2 > 0)));
            }
            let before = self.counted();
            let outcomes = self.round(&dials, patience);
            let after = self.counted();
            let is_ours = |n: &usize| targets[asked[*n / TRIES].0].translated.is_some();
            let ours: Vec<&Dial> = (0..dials.len()).filter(is_ours).map(|n| &dials[n]).collect();
            // Of a connected socket that names IPv4 as IPv6 the kernel asks again when it sends.
            let again = ours.iter().filter(|dial| dial.mapped && dial.way == Way::Udp).count();
            let wanted = (2 * ours.len() as u64, (ours.len() + again) as u64);
            let counted = (after.0 - before.0, after.1 - before.1);
            if counted != wanted {
                // What goes is taken away last, an instant after the sentinel is there.
                assert!(
                    round < AFRESH,
                    "{what}: the socket layer decided {} dials of {}, and left {} of {} alone as \
                     the pod asked for; {}",
                    counted.0,
                    wanted.0,
                    counted.1,
                    wanted.1,
                    self.logs()
                );
                seen.clear();
                continue;
            }
            for ((from, side), outcomes) in COLUMNS.iter().zip(outcomes) {
                for ((n, way), some) in asked.iter().zip(outcomes.chunks(TRIES)) {
                    let sides = seen.entry((*n, *way, *from)).or_default();
                    sides.entry(*side).or_default().extend(some.iter().cloned());
                }
            }
            let verdicts: Vec<(Asked, Result<BTreeSet<Difference>, String>)> = pending
                .iter()
                .map(|asked| (*asked, self.verdict(*asked, &targets[asked.0], &seen[asked])))
                .collect();
            let mut wrong = Vec::new();
            for (asked, verdict) in verdicts {
                match verdict {
                    Ok(differences) => {
                        self.met.extend(differences);
                        pending.remove(&asked);
                    }
                    Err(error) => wrong.push(error),
                }
            }
            if pending.is_empty() {
                return;
            }
            assert!(
                round + 1 < ROUNDS,
                "{what}: kube-proxy and the socket layer differ:\n{}\n{}",
                wrong.join("\n"),
                self.logs()
            );
            let is_silent =
                |sides: &Sides| sides.values().any(|outcomes| outcomes.contains(&Outcome::Silent));
            if patience == PATIENCE && pending.iter().any(|asked| is_silent(&seen[asked])) {
                patience = RETRANSMISSION;
                seen.retain(|_, sides| !is_silent(sides));
            }
            if round % AFRESH == AFRESH - 1 {
                seen.clear();
            }
        }
    }

    /// Whether both sides have done the same, or differ as they are meant to; else how they differ.
    fn verdict(
        &self,
        (_, way, from): Asked,
        target: &Target,
        sides: &Sides,
    ) -> Result<BTreeSet<Difference>, String> {
        let [theirs, ours] = [Side::KubeProxy, Side::Socket].map(|side| &sides[&side]);
        let wrong = |why: &str| {
            Err(format!("{target:?}, {way:?} from {from:?}: {why}: {theirs:?} and {ours:?}"))
        };
        let mut differences = BTreeSet::new();
        let is_only = |side: &BTreeSet<Outcome>, outcome: Outcome| side.iter().eq([&outcome]);
        let is_dropped = is_only(theirs, Outcome::Silent)
            || from == From::Node && way != Way::Tcp && is_only(theirs, Outcome::Dropped);
        if is_dropped && is_only(ours, Outcome::Refused) {
            let is_ours = target.translated.is_some();
            if is_ours && target.is_empty_here && !target.is_empty {
                differences.insert(Difference::LocalWithoutEndpoint);
                return Ok(differences);
            }
            let is_silent = is_only(theirs, Outcome::Silent);
            let is_outer = is_ours && target.translated != Some(Address::Cluster);
            let passes = self.mode == Mode::Iptables && from == From::Node && is_outer;
            if passes && target.is_empty && is_silent {
                differences.insert(Difference::OuterFromNode);
                return Ok(differences);
            }
            if is_ours && target.is_empty && (way == Way::SendTo || !is_silent) {
                differences.insert(match is_silent {
                    true => Difference::RefusedSendto,
                    false => Difference::RejectedOnNode,
                });
                return Ok(differences);
            }
            return wrong("silence and a refusal");
        }
        for (side, outcomes) in [(Side::KubeProxy, theirs), (Side::Socket, ours)] {
            for outcome in outcomes {
                let Outcome::Answered { by, saw, .. } = outcome else { continue };
                if self.is_caller(from, side, *saw) {
                    continue;
                }
                let is_self = by == self.caller(from, side);
                match (side, target.translated) {
                    (Side::KubeProxy, _) if is_self => {
                        differences.insert(Difference::Hairpin);
                    }
                    (Side::KubeProxy, Some(Address::Cluster)) | (Side::Socket, Some(_)) => {
                        return wrong("the endpoint saw somebody else");
                    }
                    // What both sides leave to kube-proxy's rules is an outer address as well.
                    _ => {
                        differences.insert(Difference::Masquerade);
                    }
                }
            }
        }
        let who = |outcomes: &BTreeSet<Outcome>| -> BTreeSet<String> {
            let text = |outcome: &Outcome| match outcome {
                Outcome::Answered { by, port, .. } => format!("{by}:{port}"),
                other => format!("{other:?}"),
            };
            outcomes.iter().map(text).collect()
        };
        if who(theirs) == who(ours) {
            return Ok(differences);
        }
        if target.affinity {
            let eligible = self.backends(target.to, target.tcp).unwrap_or_default();
            let of = |outcomes: &BTreeSet<Outcome>| match &who(outcomes).iter().collect::<Vec<_>>()
                [..]
            {
                [one] => eligible.iter().any(|at| self.name_of(*at).as_ref() == Some(*one)),
                _ => false,
            };
            if of(theirs) && of(ours) {
                differences.insert(Difference::Affinity);
                return Ok(differences);
            }
        }
        wrong("other endpoints")
    }

    fn name_of(&self, at: SocketAddr) -> Option<String> {
        let place = self.places.iter().find(|place| [place.v4, place.v6].contains(&at.ip()))?;
        Some(format!("{}:{}", place.name, at.port()))
    }

    fn caller(&self, from: From, side: Side) -> &'static str {
        match (from, side) {
            (From::Node, _) => "node",
            (From::Pod, Side::KubeProxy) => "off",
            (From::Pod, Side::Socket) => "on",
        }
    }

    fn is_caller(&self, from: From, side: Side, saw: IpAddr) -> bool {
        let name = self.caller(from, side);
        let place = self.places.iter().find(|place| place.name == name).expect("a place");
        [place.v4, place.v6].contains(&saw)
    }
}

/// Only one of the two at a time: sockets are made outside of the cgroup that both are in.
static ALONE: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn number(key: &str) -> Option<u64> {
    let text = env::var(key).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{key}={text} is no number")))
}

fn duel(mode: Mode) {
    let _alone = alone();
    let seed = number("SIDESTEP_TEST_SEED").unwrap_or(SEED);
    let mut rng = Rng::with_seed(seed);
    let mut duel = Duel::new(mode, &mut rng);
    duel.write();
    duel.in_step();
    let told = |n: usize, event: &dyn fmt::Debug| {
        format!("{mode:?}, SIDESTEP_TEST_SEED={seed}, event {n}, {event:?}")
    };
    duel.compare(&[], &told(0, &"none yet"));
    // Each kind of event twice, in an order of chance, and more endpoints, without which there is
    // little to tell apart.
    let mut deck: Vec<Event> = Event::ALL.into_iter().chain(Event::ALL).collect();
    deck.extend([Event::Add, Event::SliceComes, Event::Condition].repeat(2));
    rng.shuffle(&mut deck);
    let length = number("SIDESTEP_TEST_EVENTS").map_or(deck.len(), |n| n as usize);
    for (n, event) in deck.into_iter().cycle().take(length).enumerate() {
        let before = duel.targets();
        let zone = duel.world.zone;
        duel.world.apply(event, &mut rng);
        if duel.world.zone != zone {
            duel.label_zone();
        }
        duel.write();
        duel.in_step();
        duel.compare(&before, &told(n + 1, &event));
    }
    assert!(duel.proxy.is_running(), "{}", duel.proxy.log_tail());
    eprintln!("{mode:?}, SIDESTEP_TEST_SEED={seed}: differences met: {:?}", duel.met);
}

#[test]
fn the_socket_layer_leads_where_kube_proxy_leads_by_iptables() {
    duel(Mode::Iptables);
}

#[test]
fn the_socket_layer_leads_where_kube_proxy_leads_by_nftables() {
    duel(Mode::Nftables);
}

/// What was dialled at once: from when to when, and what became of it.
type Batch = (Instant, Instant, Vec<Outcome>);

/// Endpoints, by the time from which they may and until which they can be met.
type Met = (Instant, Option<Instant>, BTreeSet<&'static str>);

/// Row 13: while one endpoint stays no dial fails, but for connected UDP sockets whose endpoint goes
/// meanwhile (row 20), and none that begins a second after an event goes to an endpoint that it took
/// away.
#[test]
fn endpoints_come_and_go_under_load() {
    let _alone = alone();
    let seed = number("SIDESTEP_TEST_SEED").unwrap_or(SEED);
    let mut rng = Rng::with_seed(seed);
    let duel = Duel::new(Mode::Nftables, &mut rng);
    let (api, name) = (&duel.cluster.api, &duel.cluster.name);
    let vips = ["10.96.2.1", "fd96::2:1"];
    let ports = [("tcp", "TCP", 80), ("udp", "UDP", 80)]
        .map(|(name, protocol, port)| json!({"name": name, "protocol": protocol, "port": port}));
    duel.cluster.create(json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"name": "load", "namespace": name},
        "spec": {
            "clusterIP": vips[0], "clusterIPs": vips, "ipFamilyPolicy": "RequireDualStack",
            "ports": ports,
        },
    }));
    let slice = |v6: bool, endpoints: &BTreeSet<&str>| {
        let ports = ["tcp", "udp"]
            .map(|name| json!({"name": name, "protocol": name.to_uppercase(), "port": TARGETS[0]}));
        let places = duel.places.iter().filter(|place| endpoints.contains(place.name));
        let at = |place: &Place| if v6 { place.v6 } else { place.v4 };
        let endpoints: Vec<Value> = places.map(|place| json!({"addresses": [at(place)]})).collect();
        let family = if v6 { "IPv6" } else { "IPv4" };
        slice_object(name, &format!("load-{v6}"), "load", family, &ports, &endpoints)
    };
    let all: BTreeSet<&str> = BACKENDS.into();
    for v6 in [false, true] {
        duel.cluster.create(slice(v6, &all));
    }
    let mut dials = Vec::new();
    for (vip, mapped) in [(vips[0], false), (vips[0], true), (vips[1], false)] {
        let to = addr(ip(vip), 80);
        dials.extend([Way::Tcp, Way::Udp, Way::SendTo].map(|way| Dial { to, way, mapped }));
    }
    let dials = dials.repeat(3);
    let load = |from: From, patience: Duration| match from {
        From::Pod => duel.dial_from_pod(Side::Socket, &dials, patience),
        From::Node => {
            let work = || dial_all(&dials, patience, dial::socket);
            duel.cluster.lab.on_node(work).expect("runs")
        }
    };
    let is_answered = |outcome: &Outcome| matches!(outcome, Outcome::Answered { .. });
    for from in [From::Pod, From::Node] {
        duel.cluster
            .becomes("the Service to answer", || load(from, PATIENCE).iter().all(is_answered));
    }

    let stop = AtomicBool::new(false);
    let done: Mutex<Vec<(From, Batch)>> = Mutex::default();
    let dialled = || done.lock().unwrap_or_else(PoisonError::into_inner);
    let second = Duration::from_secs(1) * slowdown();
    let mut met: Vec<Met> = vec![(Instant::now(), None, all)];
    let changed = thread::scope(|scope| {
        for from in [From::Pod, From::Node] {
            let (stop, dialled, load) = (&stop, &dialled, &load);
            scope.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    let start = Instant::now();
                    let outcomes = load(from, SOON);
                    dialled().push((from, (start, Instant::now(), outcomes)));
                }
            });
        }
        let mut change = || -> Result<()> {
            for _ in 0..12 {
                for _ in 0..rng.usize(1..4) {
                    let mut endpoints: BTreeSet<&str> =
                        BACKENDS.into_iter().filter(|_| rng.bool()).collect();
                    endpoints.insert(BACKENDS[0]);
                    let before = Instant::now();
                    for v6 in [false, true] {
                        let slice = slice(v6, &endpoints);
                        api.patch::<EndpointSlice>(name, &format!("load-{v6}"), &slice)?;
                    }
                    met.last_mut().expect("some").1 = Some(Instant::now());
                    met.push((before, None, endpoints));
                }
                let last = Instant::now();
                wait_until("dials a second after the event", SOON, || {
                    let done = dialled();
                    let late = |wanted: From| {
                        let is_late = |(from, (start, ..)): &&(From, Batch)| {
                            *from == wanted && *start > last + second
                        };
                        done.iter().filter(is_late).count() > 2
                    };
                    late(From::Pod) && late(From::Node)
                })?;
            }
            Ok(())
        };
        let changed = change();
        stop.store(true, Ordering::Relaxed);
        changed
    });
    changed.expect("changed");

    let done = done.into_inner().unwrap_or_else(PoisonError::into_inner);
    let mut count = 0;
    for (from, (start, end, outcomes)) in &done {
        let now = |(since, until, _): &&Met| {
            since <= end && until.is_none_or(|until| until + second >= *start)
        };
        let now: Vec<&Met> = met.iter().filter(now).collect();
        let may: BTreeSet<&str> =
            now.iter().flat_map(|(.., endpoints)| endpoints).copied().collect();
        for (outcome, dial) in outcomes.iter().zip(&dials) {
            let is_right = match outcome {
                Outcome::Answered { by, .. } => may.contains(by.as_str()),
                // Its endpoint went between the call and the answer.
                Outcome::Aborted => dial.way == Way::Udp && now.len() > 1,
                _ => false,
            };
            assert!(
                is_right,
                "SIDESTEP_TEST_SEED={seed}: {dial:?} from {from:?}: {outcome:?}, where {may:?} \
                 may be met; {}",
                duel.logs()
            );
            count += 1;
        }
    }
    eprintln!("SIDESTEP_TEST_SEED={seed}: {count} dials, {} events", met.len() - 1);
}
