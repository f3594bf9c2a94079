//! The Services of a cluster, and what happens to them: events at random, the same ones for the same
//! seed, and the objects that the API server has after each.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
};

use fastrand::Rng;
use serde_json::{Value, json};

use super::common::ip;

/// Ports that the endpoints' servers listen on, TCP and UDP.
pub const TARGETS: [u16; 2] = [8080, 8081];
/// Zones, as labels and hints have them.
pub const ZONES: [&str; 2] = ["east", "west"];
/// Slices that a Service may have in each family.
const SLICES: usize = 2;

/// Where endpoints can be: the name of a server, and its addresses.
pub struct Place {
    pub name: &'static str,
    pub v4: IpAddr,
    pub v6: IpAddr,
}

/// What a Service is now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    ClusterIp,
    NodePort,
    LoadBalancer,
    Headless,
    ExternalName,
    Gone,
}

/// Those with addresses.
const KINDS: [Kind; 3] = [Kind::ClusterIp, Kind::NodePort, Kind::LoadBalancer];

/// What an EndpointSlice says of an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Ready,
    /// No condition is set, which means ready.
    Unsaid,
    NotReady,
    /// It terminates, and serves still.
    Draining,
    /// It terminates, and serves no more.
    Ended,
    /// It terminates, and is ready all the same: `publishNotReadyAddresses`.
    Published,
}

impl State {
    const ALL: [Self; 6] =
        [Self::Ready, Self::Unsaid, Self::NotReady, Self::Draining, Self::Ended, Self::Published];

    fn is_usable(self) -> bool {
        !matches!(self, Self::NotReady | Self::Ended)
    }

    fn conditions(self) -> Value {
        let all = |ready: bool, serving: bool, terminating: bool| json!({"ready": ready, "serving": serving, "terminating": terminating});
        match self {
            Self::Ready => all(true, true, false),
            Self::Unsaid => json!({}),
            Self::NotReady => all(false, false, false),
            Self::Draining => all(false, true, true),
            Self::Ended => all(false, false, true),
            Self::Published => all(true, false, true),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Endpoint {
    place: usize,
    /// On this node, on another; none: the slice does not say.
    here: Option<bool>,
    state: State,
    zones: Vec<usize>,
    /// Hints for nodes: this one, or another.
    hinted_here: Option<bool>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Slice {
    exists: bool,
    target: u16,
    endpoints: Vec<Endpoint>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Port {
    name: &'static str,
    tcp: bool,
    number: u16,
}

impl Port {
    /// The number at its Service's addresses, or its node port for the Service of this id: TCP and UDP
    /// have one number each time, as a Service's first two ports have.
    fn dialled(&self, node_port_of: Option<u16>) -> u16 {
        let Some(id) = node_port_of else { return self.number };
        let of_service = match self.name {
            "metrics" => 1,
            "extra" => 2,
            _ => 0,
        };
        30_000 + 10 * id + of_service
    }
}

#[derive(Clone, Debug)]
struct Service {
    name: &'static str,
    /// Of its node ports.
    id: u16,
    /// Of its addresses.
    number: u8,
    kind: Kind,
    /// Of its ClusterIPs, the first of them first: whether it is IPv6.
    families: Vec<bool>,
    ports: Vec<Port>,
    internal_local: bool,
    external_local: bool,
    affinity: bool,
    external_ips: bool,
    /// By `ipMode`: VIP, Proxy.
    ingress: Option<bool>,
    /// Source ranges, and whether they have the callers.
    ranges: Option<bool>,
    other_proxy: bool,
    /// [`SLICES`] of IPv4, then as many of IPv6.
    slices: Vec<Slice>,
}

/// Which address of a Service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Address {
    Cluster,
    LoadBalancer,
    External,
    NodePort,
}

/// What is dialled, and what the objects say of it.
#[derive(Clone, Debug)]
pub struct Target {
    pub to: SocketAddr,
    pub tcp: bool,
    /// None: no Service's, or left to kube-proxy.
    pub translated: Option<Address>,
    pub affinity: bool,
    /// No endpoint can take a connection.
    pub is_empty: bool,
    /// `internalTrafficPolicy: Local`, and no endpoint of this node can take one.
    pub is_empty_here: bool,
}

/// What can happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    Add,
    Remove,
    Clear,
    Condition,
    AllTerminate,
    Node,
    GivenOutAgain,
    Twice,
    Hints,
    Zone,
    TargetPort,
    SliceComes,
    SliceGoes,
    InternalPolicy,
    ExternalPolicy,
    Affinity,
    Ports,
    Type,
    MadeAnew,
    Families,
    ExternalIps,
    Ingress,
    Ranges,
    OtherProxy,
    AddressMoves,
}

impl Event {
    pub const ALL: [Self; 25] = [
        Self::Add,
        Self::Remove,
        Self::Clear,
        Self::Condition,
        Self::AllTerminate,
        Self::Node,
        Self::GivenOutAgain,
        Self::Twice,
        Self::Hints,
        Self::Zone,
        Self::TargetPort,
        Self::SliceComes,
        Self::SliceGoes,
        Self::InternalPolicy,
        Self::ExternalPolicy,
        Self::Affinity,
        Self::Ports,
        Self::Type,
        Self::MadeAnew,
        Self::Families,
        Self::ExternalIps,
        Self::Ingress,
        Self::Ranges,
        Self::OtherProxy,
        Self::AddressMoves,
    ];
}

/// The Services of a cluster.
#[derive(Clone)]
pub struct World {
    pub zone: Option<usize>,
    services: Vec<Service>,
    places: usize,
}

fn vip(v6: bool, number: u8) -> IpAddr {
    ip(&if v6 { format!("fd96::1:{number}") } else { format!("10.96.1.{number}") })
}

fn ingress(v6: bool, number: u8) -> IpAddr {
    ip(&if v6 { format!("fd98::{number}") } else { format!("198.51.100.{number}") })
}

fn external(v6: bool, number: u8) -> IpAddr {
    ip(&if v6 { format!("fd99::{number}") } else { format!("203.0.113.{number}") })
}

fn chance(rng: &mut Rng, of: usize) -> bool {
    rng.usize(..of) == 0
}

fn one_of<T: Copy>(rng: &mut Rng, all: &[T]) -> T {
    all[rng.usize(..all.len())]
}

impl World {
    /// Four Services, with endpoints at some of so many places.
    pub fn new(rng: &mut Rng, places: usize) -> Self {
        let port = |name, tcp, number| Port { name, tcp, number };
        let service = |name, number, families: &[bool], ports: &[Port]| Service {
            name,
            id: u16::from(number),
            number,
            kind: Kind::ClusterIp,
            families: families.to_vec(),
            ports: ports.to_vec(),
            internal_local: false,
            external_local: false,
            affinity: false,
            external_ips: false,
            ingress: None,
            ranges: None,
            other_proxy: false,
            slices: vec![
                Slice { exists: false, target: TARGETS[0], endpoints: Vec::new() };
                2 * SLICES
            ],
        };
        let dns = [port("dns", false, 53), port("dns-tcp", true, 53), port("metrics", true, 9153)];
        let mut services = vec![
            service("web", 1, &[false, true], &[port("http", true, 80), port("quic", false, 80)]),
            service("plain", 2, &[false], &[port("", true, 80)]),
            service("dns", 3, &[true, false], &dns),
            service("front", 4, &[false, true], &[port("https", true, 443), port("u", false, 443)]),
        ];
        services[1].kind = Kind::NodePort;
        services[3].kind = Kind::LoadBalancer;
        services[3].ingress = Some(true);
        let mut world = Self { zone: None, services, places };
        for at in 0..world.services.len() {
            for v6 in [false, true] {
                let endpoints = (0..2).map(|_| world.endpoint(rng)).collect();
                let slice = &mut world.services[at].slices[usize::from(v6) * SLICES];
                (slice.exists, slice.endpoints) = (true, endpoints);
            }
        }
        world.settle();
        world
    }

    fn endpoint(&self, rng: &mut Rng) -> Endpoint {
        let here = one_of(rng, &[Some(true), Some(false), Some(false), None]);
        let state = one_of(rng, &[State::Ready, State::Ready, State::Ready, State::Unsaid]);
        let place = rng.usize(..self.places);
        Endpoint { place, here, state, zones: Vec::new(), hinted_here: None }
    }

    /// Makes the event happen to one of the Services where it can; whether it could.
    pub fn apply(&mut self, event: Event, rng: &mut Rng) -> bool {
        if event == Event::Zone {
            let others: Vec<Option<usize>> =
                [None, Some(0), Some(1)].into_iter().filter(|zone| *zone != self.zone).collect();
            self.zone = one_of(rng, &others);
            return true;
        }
        let mut order: Vec<usize> = (0..self.services.len()).collect();
        rng.shuffle(&mut order);
        // What was left comes back, so that most of the script is about Services that are there.
        for service in &mut self.services {
            if !service.serves() && event != Event::MadeAnew && chance(rng, 3) {
                service.kind = one_of(rng, &KINDS);
            }
            if service.other_proxy && event != Event::OtherProxy && chance(rng, 2) {
                service.other_proxy = false;
            }
        }
        self.settle();
        let before: Vec<String> = self.services.iter().map(|one| format!("{one:?}")).collect();
        for at in order {
            self.happen(event, at, rng);
            self.settle();
            let now = self.services.iter().map(|one| format!("{one:?}"));
            if !now.eq(before.iter().cloned()) {
                return true;
            }
        }
        false
    }

    fn happen(&mut self, event: Event, at: usize, rng: &mut Rng) {
        let fresh = self.endpoint(rng);
        let other = rng.usize(..self.services.len());
        let taken = self.services[other].number;
        let service = &mut self.services[at];
        let serves = service.serves();
        let mut slices: Vec<usize> =
            (0..2 * SLICES).filter(|n| service.slices[*n].exists).collect();
        rng.shuffle(&mut slices);
        let of_slice = slices.first().copied();
        let of_endpoint = slices.into_iter().find(|n| !service.slices[*n].endpoints.is_empty());
        match event {
            Event::Zone => {}
            Event::Add => {
                if let Some(n) = of_slice {
                    service.slices[n].endpoints.push(fresh);
                }
            }
            Event::Remove => {
                if let Some(n) = of_endpoint {
                    let endpoints = &mut service.slices[n].endpoints;
                    endpoints.remove(rng.usize(..endpoints.len()));
                }
            }
            Event::Clear => {
                service.slices.iter_mut().for_each(|slice| slice.endpoints.clear());
            }
            Event::Condition => {
                if let Some(n) = of_endpoint {
                    let endpoints = &mut service.slices[n].endpoints;
                    let one = rng.usize(..endpoints.len());
                    endpoints[one].state = one_of(rng, &State::ALL);
                }
            }
            Event::AllTerminate => {
                for slice in &mut service.slices {
                    for endpoint in &mut slice.endpoints {
                        endpoint.state =
                            one_of(rng, &[State::Draining, State::Draining, State::Ended]);
                    }
                }
            }
            Event::Node => {
                if let Some(n) = of_endpoint {
                    let endpoints = &mut service.slices[n].endpoints;
                    let one = rng.usize(..endpoints.len());
                    endpoints[one].here = one_of(rng, &[Some(true), Some(false), None]);
                }
            }
            // The address is that of a new pod, while the old one is in another slice still.
            Event::GivenOutAgain => {
                if let Some(n) = of_endpoint {
                    let here = chance(rng, 2);
                    let one = rng.usize(..service.slices[n].endpoints.len());
                    let old = &mut service.slices[n].endpoints[one];
                    (old.state, old.here) = (State::Draining, Some(here));
                    let (place, target) = (old.place, service.slices[n].target);
                    // The family's other slice.
                    let next = &mut service.slices[n ^ 1];
                    (next.exists, next.target) = (true, target);
                    next.endpoints.retain(|other| other.place != place);
                    let here = Some(!here);
                    next.endpoints.push(Endpoint { place, here, state: State::Ready, ..fresh });
                }
            }
            // A slice has the address twice.
            Event::Twice => {
                if let Some(n) = of_endpoint {
                    let endpoints = &mut service.slices[n].endpoints;
                    let place = endpoints[rng.usize(..endpoints.len())].place;
                    let state = one_of(rng, &State::ALL);
                    endpoints.push(Endpoint { place, state, ..fresh });
                }
            }
            Event::Hints => {
                let how = rng.usize(..4);
                let sloppy = chance(rng, 3);
                for slice in &mut service.slices {
                    for endpoint in &mut slice.endpoints {
                        let forgotten = sloppy && chance(rng, 3);
                        let zones = how & 1 > 0 && !forgotten;
                        let both = zones && chance(rng, 4);
                        let zone = rng.usize(..ZONES.len());
                        endpoint.zones = match (zones, both) {
                            (false, _) => Vec::new(),
                            (true, true) => (0..ZONES.len()).collect(),
                            (true, false) => vec![zone],
                        };
                        endpoint.hinted_here = (how & 2 > 0 && !forgotten).then(|| chance(rng, 2));
                    }
                }
            }
            Event::TargetPort => {
                if let Some(n) = of_slice {
                    let target = &mut service.slices[n].target;
                    *target = if *target == TARGETS[0] { TARGETS[1] } else { TARGETS[0] };
                }
            }
            Event::SliceComes => {
                let gone: Vec<usize> =
                    (0..2 * SLICES).filter(|n| !service.slices[*n].exists).collect();
                if !gone.is_empty() {
                    let slice = &mut service.slices[one_of(rng, &gone)];
                    (slice.exists, slice.target) = (true, one_of(rng, &TARGETS));
                    slice.endpoints.push(fresh);
                }
            }
            Event::SliceGoes => {
                if let Some(n) = of_slice {
                    service.slices[n].exists = false;
                    service.slices[n].endpoints.clear();
                }
            }
            Event::InternalPolicy if serves => service.internal_local ^= true,
            Event::ExternalPolicy if service.has_node_ports() => {
                service.external_local ^= true;
            }
            Event::Affinity if serves => service.affinity ^= true,
            Event::Ports if serves && !service.ports[0].name.is_empty() => {
                let extra = Port { name: "extra", tcp: chance(rng, 2), number: 8000 };
                let before = service.ports.len();
                service.ports.retain(|port| port.name != "extra");
                if before == service.ports.len() {
                    service.ports.push(extra);
                }
            }
            Event::Type => {
                let kinds = KINDS.into_iter().chain([Kind::Headless, Kind::ExternalName]);
                let others: Vec<Kind> = kinds.filter(|kind| *kind != service.kind).collect();
                // Back, if it was left.
                service.kind = if serves { one_of(rng, &others) } else { one_of(rng, &KINDS) };
            }
            Event::MadeAnew => {
                service.kind = match service.kind {
                    Kind::Gone => one_of(rng, &KINDS),
                    _ => Kind::Gone,
                };
            }
            Event::Families if serves => {
                let first = service.families[0];
                service.families =
                    if service.families.len() == 1 { vec![first, !first] } else { vec![first] };
            }
            Event::ExternalIps if serves => service.external_ips ^= true,
            Event::Ingress if service.kind == Kind::LoadBalancer => {
                let modes = [None, Some(true), Some(false)];
                service.ingress = one_of(rng, &modes);
            }
            Event::Ranges if service.kind == Kind::LoadBalancer => {
                service.ranges = match service.ranges {
                    None => Some(chance(rng, 2)),
                    Some(_) => None,
                };
            }
            Event::OtherProxy => service.other_proxy ^= true,
            // Two Services exchange their addresses.
            Event::AddressMoves if other != at => {
                let mine = std::mem::replace(&mut service.number, taken);
                self.services[other].number = mine;
            }
            _ => {}
        }
    }

    /// What cannot be, or what kube-proxy leaves to chance, is made otherwise.
    fn settle(&mut self) {
        for service in &mut self.services {
            if service.kind != Kind::LoadBalancer {
                service.ranges = None;
            }
            if !service.has_node_ports() {
                service.external_local = false;
            }
            // Of two slices that say different things of one endpoint, the one that says that it is
            // on this node counts. Which one where both or none do is the order of a Go map.
            for n in [0, SLICES] {
                let first = service.slices[n].clone();
                let second = &mut service.slices[n + 1];
                if first.target != second.target {
                    continue;
                }
                for place in 0..self.places {
                    let (Some(one), Some(two)) = (first.counts(place), second.counts(place)) else {
                        continue;
                    };
                    if one.is_here() == two.is_here() && one != two {
                        let one = one.clone();
                        second.endpoints.retain(|other| other.place != place);
                        second.endpoints.push(one);
                    }
                }
            }
        }
    }

    /// The objects, by kind and name.
    pub fn objects(&self, namespace: &str, node: &str, places: &[Place]) -> BTreeMap<Key, Value> {
        let mut objects = BTreeMap::new();
        for service in &self.services {
            if service.kind != Kind::Gone {
                let object = service.object(namespace);
                objects.insert((Api::Service, service.name.to_owned()), object);
            }
            for (n, slice) in service.slices.iter().enumerate().filter(|(_, one)| one.exists) {
                let v6 = n >= SLICES;
                let endpoints: Vec<Value> =
                    slice.endpoints.iter().map(|one| one.object(v6, node, places)).collect();
                let port = |port: &Port| {
                    let protocol = if port.tcp { "TCP" } else { "UDP" };
                    json!({"name": port.name, "protocol": protocol, "port": slice.target})
                };
                let ports: Vec<Value> = service.ports.iter().map(port).collect();
                let name = format!("{}-{n}", service.name);
                let family = if v6 { "IPv6" } else { "IPv4" };
                let object =
                    slice_object(namespace, &name, service.name, family, &ports, &endpoints);
                objects.insert((Api::Slice, name), object);
            }
        }
        objects
    }

    /// What the objects say can be dialled.
    pub fn targets(&self, node: &Place) -> Vec<Target> {
        let mut targets = Vec::new();
        for service in &self.services {
            if service.other_proxy || !service.serves() {
                continue;
            }
            for v6 in service.families.iter().copied() {
                let mut addresses = vec![(vip(v6, service.number), Some(Address::Cluster))];
                if service.kind == Kind::LoadBalancer && service.ingress == Some(true) {
                    let is_ours = service.ranges.is_none();
                    let to = ingress(v6, service.number);
                    addresses.push((to, is_ours.then_some(Address::LoadBalancer)));
                }
                if service.external_ips {
                    addresses.push((external(v6, service.number), Some(Address::External)));
                }
                if service.has_node_ports() {
                    let to = if v6 { node.v6 } else { node.v4 };
                    addresses.push((to, Some(Address::NodePort)));
                }
                for (to, translated) in addresses {
                    let of_node = translated == Some(Address::NodePort);
                    for port in &service.ports {
                        let usable = |here: bool| service.is_usable(v6, here);
                        let is_cluster = translated == Some(Address::Cluster);
                        targets.push(Target {
                            to: SocketAddr::new(to, port.dialled(of_node.then_some(service.id))),
                            tcp: port.tcp,
                            translated,
                            affinity: service.affinity,
                            is_empty: !usable(false),
                            is_empty_here: service.internal_local && is_cluster && !usable(true),
                        });
                    }
                }
            }
        }
        targets
    }
}

/// Which objects.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Api {
    Service,
    Slice,
}

pub type Key = (Api, String);

/// An EndpointSlice.
pub fn slice_object(
    namespace: &str,
    name: &str,
    of: &str,
    family: &str,
    ports: &[Value],
    endpoints: &[Value],
) -> Value {
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {
            "name": name, "namespace": namespace, "labels": {"kubernetes.io/service-name": of},
        },
        "addressType": family,
        "ports": ports,
        "endpoints": endpoints,
    })
}

impl Slice {
    /// What it says of a place: the first, or else the last that is on this node.
    fn counts(&self, place: usize) -> Option<&Endpoint> {
        let all = || self.endpoints.iter().filter(|one| one.place == place);
        all().rfind(|one| one.is_here()).or_else(|| all().next())
    }
}

impl Endpoint {
    fn is_here(&self) -> bool {
        self.here == Some(true)
    }

    fn object(&self, v6: bool, node: &str, places: &[Place]) -> Value {
        let place = &places[self.place];
        let node_of = |here: bool| if here { node } else { "elsewhere" };
        let mut hints = json!({});
        if !self.zones.is_empty() {
            let zones: Vec<Value> =
                self.zones.iter().map(|zone| json!({"name": ZONES[*zone]})).collect();
            hints["forZones"] = zones.into();
        }
        if let Some(here) = self.hinted_here {
            hints["forNodes"] = json!([{"name": node_of(here)}]);
        }
        let mut object = json!({
            "addresses": [if v6 { place.v6 } else { place.v4 }],
            "conditions": self.state.conditions(),
        });
        if let Some(here) = self.here {
            object["nodeName"] = node_of(here).into();
        }
        if hints != json!({}) {
            object["hints"] = hints;
        }
        object
    }
}

impl Service {
    fn serves(&self) -> bool {
        KINDS.contains(&self.kind)
    }

    fn has_node_ports(&self) -> bool {
        matches!(self.kind, Kind::NodePort | Kind::LoadBalancer)
    }

    /// Whether an endpoint of a family, of this node alone or of any, can take a connection.
    fn is_usable(&self, v6: bool, here: bool) -> bool {
        let from = usize::from(v6) * SLICES;
        let mut counts: BTreeMap<(u16, usize), &Endpoint> = BTreeMap::new();
        for slice in &self.slices[from..from + SLICES] {
            for one in &slice.endpoints {
                let known = counts.entry((slice.target, one.place)).or_insert(one);
                if one.is_here() {
                    *known = one;
                }
            }
        }
        counts.values().any(|one| one.state.is_usable() && (!here || one.is_here()))
    }

    fn object(&self, namespace: &str) -> Value {
        let label = self.other_proxy.then_some("other");
        let port = |port: &Port| {
            let protocol = if port.tcp { "TCP" } else { "UDP" };
            let mut object = json!({
                "name": port.name, "protocol": protocol, "port": port.number,
                "targetPort": TARGETS[0],
            });
            if self.has_node_ports() {
                object["nodePort"] = port.dialled(Some(self.id)).into();
            }
            object
        };
        let of = |address: fn(bool, u8) -> IpAddr| -> Vec<String> {
            [false, true].map(|v6| address(v6, self.number).to_string()).into()
        };
        let families: Vec<&str> =
            self.families.iter().map(|v6| if *v6 { "IPv6" } else { "IPv4" }).collect();
        let ips: Vec<String> = match self.kind {
            Kind::Headless => vec!["None".to_owned()],
            _ => self.families.iter().map(|v6| vip(*v6, self.number).to_string()).collect(),
        };
        let is_outer = self.has_node_ports() || self.external_ips;
        let policy = |local: bool| if local { "Local" } else { "Cluster" };
        let dual = if families.len() > 1 { "RequireDualStack" } else { "SingleStack" };
        let mut spec = json!({
            "type": "ClusterIP",
            "ports": self.ports.iter().map(port).collect::<Vec<_>>(),
            "clusterIP": ips[0], "clusterIPs": ips,
            "ipFamilies": families, "ipFamilyPolicy": dual,
            "internalTrafficPolicy": policy(self.internal_local),
            "externalTrafficPolicy": is_outer.then(|| policy(self.external_local)),
            "externalIPs": if self.external_ips { of(external) } else { Vec::new() },
            "externalName": null,
            "loadBalancerSourceRanges": null,
            "sessionAffinity": if self.affinity { "ClientIP" } else { "None" },
            "sessionAffinityConfig": null,
        });
        let mut status = json!({"loadBalancer": {}});
        if self.kind == Kind::NodePort {
            spec["type"] = "NodePort".into();
        }
        if self.kind == Kind::LoadBalancer {
            spec["type"] = "LoadBalancer".into();
            spec["loadBalancerSourceRanges"] = match self.ranges {
                None => Value::Null,
                Some(true) => json!(["10.77.0.0/16", "fd77::/64"]),
                Some(false) => json!(["192.0.2.0/24", "2001:db8::/64"]),
            };
            if let Some(is_vip) = self.ingress {
                let mode = if is_vip { "VIP" } else { "Proxy" };
                let one = |ip: String| json!({"ip": ip, "ipMode": mode});
                let all: Vec<Value> = of(ingress).into_iter().map(one).collect();
                status = json!({"loadBalancer": {"ingress": all}});
            }
        }
        if self.affinity {
            spec["sessionAffinityConfig"] = json!({"clientIP": {"timeoutSeconds": 3600}});
        }
        if self.kind == Kind::ExternalName {
            spec["type"] = "ExternalName".into();
            spec["externalName"] = "elsewhere.test".into();
            for key in [
                "clusterIP",
                "clusterIPs",
                "ipFamilies",
                "ipFamilyPolicy",
                "internalTrafficPolicy",
                "externalTrafficPolicy",
            ] {
                spec[key] = Value::Null;
            }
            spec["externalIPs"] = json!([]);
        }
        json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": {
                "name": self.name, "namespace": namespace,
                "labels": {"service.kubernetes.io/service-proxy-name": label},
            },
            "spec": spec,
            "status": status,
        })
    }
}

/// Whether an object can become another one, or has to be made anew: an address stays, but for a
/// Service that has none meanwhile.
pub fn can_become(before: &Value, after: &Value) -> bool {
    let of = |object: &Value| object["spec"]["clusterIP"].as_str().map(str::to_owned);
    match (of(before), of(after)) {
        (Some(before), Some(after)) => before == after,
        (None, None) => true,
        (Some(one), None) | (None, Some(one)) => one != "None",
    }
}
