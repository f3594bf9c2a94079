//! All Services of the cluster. What changes is read once, and computes the lists of one Service
//! anew, whatever the cluster's size.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use super::{
    Family, Frontend, List, ListKey, Protocol, Wanted,
    endpoints::{Endpoint, eligible},
    facts::{Kind, NodeFacts, ServiceFacts, SliceFacts},
    node_ports::NodePorts,
};
use crate::problem::{Problem, Reason};

/// What the agent was told about Services.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// `spec.externalIPs` are translated. Whoever may write a Service can take any address over
    /// that way (CVE-2020-8554), so without this only the node's own addresses are.
    pub external_ips: bool,
    /// At which of this node's addresses NodePorts are translated.
    pub node_ports: NodePorts,
}

/// A Service's wish for a frontend. The first of a frontend's claims has it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Claim {
    frontend: Frontend,
    kind: Kind,
    created: i64,
    service: Arc<str>,
}

/// A Service's lists.
type Lists = Box<[(ListKey, List)]>;

/// What is known by one name: the Service itself, its slices, and what came of them.
#[derive(Debug, Default)]
struct Entry {
    facts: Option<ServiceFacts>,
    slices: BTreeSet<Arc<str>>,
    claims: Box<[Claim]>,
    lists: Lists,
}

/// What something is wrong with.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Subject {
    Service(Arc<str>),
    Slice(Arc<str>),
}

/// All Services, their slices, and the lists that follow from them.
#[derive(Debug, Default)]
pub struct Catalog {
    options: Options,
    node: NodeFacts,
    node_addresses: BTreeSet<IpAddr>,
    /// Those of them at which NodePorts are translated.
    node_port_addresses: BTreeSet<IpAddr>,
    services: HashMap<Arc<str>, Entry>,
    slices: HashMap<Arc<str>, SliceFacts>,
    claims: BTreeSet<Claim>,
    problems: BTreeMap<Subject, Box<[String]>>,
    /// Services whose lists may be other ones.
    stale: HashSet<Arc<str>>,
}

impl Catalog {
    /// Nothing is known yet.
    pub fn new(options: Options) -> Self {
        Self { options, ..Self::default() }
    }

    /// Takes a Service in, as it is now.
    pub fn set_service(&mut self, facts: ServiceFacts) {
        let name = Arc::clone(&facts.name);
        let entry = self.services.entry(Arc::clone(&name)).or_default();
        if entry.facts.as_ref() != Some(&facts) {
            entry.facts = Some(facts);
            self.stale.insert(name);
        }
    }

    /// A Service, by `namespace/name`, is gone, or somebody else's.
    pub fn remove_service(&mut self, name: &str) {
        if let Some(entry) = self.services.get_mut(name)
            && let Some(facts) = entry.facts.take()
        {
            self.stale.insert(facts.name);
        }
    }

    /// Takes a slice in, as it is now.
    pub fn set_slice(&mut self, facts: SliceFacts) {
        if self.slices.get(&facts.name) == Some(&facts) {
            return;
        }
        // It may have been another Service's.
        self.remove_slice(&facts.name);
        if let Some(service) = &facts.service {
            let entry = self.services.entry(Arc::clone(service)).or_default();
            entry.slices.insert(Arc::clone(&facts.name));
            self.stale.insert(Arc::clone(service));
        }
        self.tell(Subject::Slice(Arc::clone(&facts.name)), facts.problems.clone());
        self.slices.insert(Arc::clone(&facts.name), facts);
    }

    /// A slice, by `namespace/name`, is gone.
    pub fn remove_slice(&mut self, name: &str) {
        let Some(facts) = self.slices.remove(name) else { return };
        self.tell(Subject::Slice(facts.name), [].into());
        if let Some(service) = facts.service
            && let Some(entry) = self.services.get_mut(&service)
        {
            entry.slices.remove(name);
            self.stale.insert(service);
        }
    }

    /// These are all Services.
    pub fn replace_services(&mut self, all: impl IntoIterator<Item = ServiceFacts>) {
        let known = self.services.values().filter_map(|entry| entry.facts.as_ref());
        let mut gone: HashSet<Arc<str>> = known.map(|facts| Arc::clone(&facts.name)).collect();
        for facts in all {
            gone.remove(&facts.name);
            self.set_service(facts);
        }
        gone.iter().for_each(|name| self.remove_service(name));
    }

    /// These are all slices.
    pub fn replace_slices(&mut self, all: impl IntoIterator<Item = SliceFacts>) {
        let mut gone: HashSet<Arc<str>> = self.slices.keys().cloned().collect();
        for facts in all {
            gone.remove(&facts.name);
            self.set_slice(facts);
        }
        gone.iter().for_each(|name| self.remove_slice(name));
    }

    /// This node's object is so now.
    pub fn set_node(&mut self, node: NodeFacts) {
        let before = std::mem::replace(&mut self.node, node);
        if before.zone != self.node.zone {
            let hinted = self.slices.values().filter(|slice| {
                slice.endpoints.iter().any(|(_, endpoint)| !endpoint.zone_hints.is_empty())
            });
            self.stale.extend(hinted.filter_map(|slice| slice.service.clone()));
        }
        self.choose_node_port_addresses();
    }

    /// Chooses at which addresses NodePorts are translated.
    fn choose_node_port_addresses(&mut self) {
        let chosen = self.options.node_ports.addresses(&self.node_addresses, &self.node.primary);
        if self.node_port_addresses != chosen {
            self.node_port_addresses = chosen;
            let known = self.services.values().filter_map(|entry| entry.facts.as_ref());
            let with = known.filter(|facts| facts.ports.iter().any(|p| p.node_port.is_some()));
            self.stale.extend(with.map(|facts| Arc::clone(&facts.name)));
        }
    }

    /// The node's own addresses, but for those of kube-proxy's `kube-ipvs0`. What is a ClusterIP as
    /// well, as NodeLocal DNSCache has kube-dns's, is the node's.
    pub fn set_node_addresses(&mut self, addresses: BTreeSet<IpAddr>) {
        let other: HashSet<IpAddr> =
            self.node_addresses.symmetric_difference(&addresses).copied().collect();
        if other.is_empty() {
            return;
        }
        self.node_addresses = addresses;
        for (name, entry) in &self.services {
            let has =
                |facts: &ServiceFacts| facts.addresses.iter().any(|(ip, _)| other.contains(ip));
            if entry.facts.as_ref().is_some_and(has) {
                self.stale.insert(Arc::clone(name));
            }
        }
        self.choose_node_port_addresses();
    }

    /// The lists that are other ones than when this was asked last; none: there is no such list any
    /// more. A frontend that moves leaves one list and enters another in the same answer.
    pub fn changes(&mut self) -> BTreeMap<ListKey, Option<List>> {
        let mut stale = std::mem::take(&mut self.stale);
        // Whoever claims what one of these claims or has claimed has it now, or not any more.
        let mut touched = BTreeSet::new();
        for name in &stale {
            let Some(entry) = self.services.get(name) else { continue };
            let wanted = self.claimed_by(entry);
            if wanted == entry.claims {
                continue;
            }
            for claim in &entry.claims {
                self.claims.remove(claim);
            }
            self.claims.extend(wanted.iter().cloned());
            touched.extend(entry.claims.iter().chain(&wanted).map(|claim| claim.frontend));
            if let Some(entry) = self.services.get_mut(name) {
                entry.claims = wanted;
            }
        }
        let rivals = touched.iter().flat_map(|frontend| self.claims_of(*frontend));
        stale.extend(rivals.map(|rival| Arc::clone(&rival.service)));

        let mut changes = BTreeMap::new();
        for name in stale {
            let Some(entry) = self.services.get(&name) else { continue };
            let (lists, problems) = self.lists_of(entry);
            let is_gone = entry.facts.is_none() && entry.slices.is_empty();
            let before: BTreeMap<&ListKey, &List> =
                entry.lists.iter().map(|(key, list)| (key, list)).collect();
            let mut gone: BTreeSet<&ListKey> = before.keys().copied().collect();
            for (key, list) in &lists {
                gone.remove(key);
                if before.get(key) != Some(&list) {
                    changes.insert(key.clone(), Some(list.clone()));
                }
            }
            changes.extend(gone.into_iter().map(|key| (key.clone(), None)));
            self.tell(Subject::Service(Arc::clone(&name)), problems);
            if is_gone {
                self.services.remove(&name);
            } else if let Some(entry) = self.services.get_mut(&name) {
                entry.lists = lists;
            }
        }
        changes
    }

    /// All lists, as of the last [`Self::changes`].
    pub fn lists(&self) -> impl Iterator<Item = (&ListKey, &List)> {
        self.services.values().flat_map(|entry| entry.lists.iter().map(|(key, list)| (key, list)))
    }

    /// The addresses that lead to a list, as of the last [`Self::changes`].
    pub fn wanted(&self) -> Vec<Wanted> {
        let of_list = |(key, list): (&ListKey, &List)| {
            let port = key.port_name();
            let backends: BTreeSet<SocketAddr> = list.backends.iter().copied().collect();
            let all = list.frontends.iter().map(move |frontend| Wanted {
                frontend: *frontend,
                port: port.clone(),
                backends: backends.clone(),
            });
            all.collect::<Vec<_>>()
        };
        self.lists().flat_map(of_list).collect()
    }

    /// Whether an endpoint has gone from what was dialled, by kube-proxy's rule for the entries of
    /// conntrack: it does not serve any more, and another endpoint does. As of the last
    /// [`Self::changes`].
    pub fn is_gone(&self, endpoint: SocketAddr, dialled: Frontend) -> bool {
        let owner = self.claims_of(dialled).next();
        let lists = owner.and_then(|claim| self.services.get(&claim.service));
        lists.iter().flat_map(|entry| &entry.lists).any(|(_, list)| {
            list.frontends.contains(&dialled)
                && !list.serving.is_empty()
                && !list.serving.contains(&endpoint)
        })
    }

    /// What is wrong with Services, as of the last [`Self::changes`], and with slices.
    pub fn problems(&self) -> BTreeSet<Problem> {
        let texts = self.problems.values().flatten();
        texts
            .map(|text| Problem { reason: Reason::InvalidService, pod: None, text: text.clone() })
            .collect()
    }

    /// Nothing is kept: not a name.
    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        self.services.is_empty() && self.slices.is_empty() && self.claims.is_empty()
    }

    fn tell(&mut self, subject: Subject, problems: Box<[String]>) {
        if problems.is_empty() {
            self.problems.remove(&subject);
        } else {
            self.problems.insert(subject, problems);
        }
    }

    /// Whether an address of a Service is one that this node translates.
    fn is_translated(&self, facts: &ServiceFacts, ip: IpAddr, kind: Kind) -> bool {
        let is_own = self.node_addresses.contains(&ip);
        match kind {
            Kind::Cluster => !is_own,
            Kind::LoadBalancer => !is_own && !facts.has_source_ranges,
            Kind::External => is_own || self.options.external_ips,
            Kind::NodePort => self.node_port_addresses.contains(&ip),
        }
    }

    /// The frontends that a Service claims.
    fn claimed_by(&self, entry: &Entry) -> Box<[Claim]> {
        let Some(facts) = &entry.facts else { return [].into() };
        let mut claims = BTreeSet::new();
        for (ip, kind) in &facts.addresses {
            if !self.is_translated(facts, *ip, *kind) {
                continue;
            }
            for port in &facts.ports {
                let frontend = Frontend { ip: *ip, port: port.number, protocol: port.protocol };
                let (created, service) = (facts.created, Arc::clone(&facts.name));
                claims.insert(Claim { frontend, kind: *kind, created, service });
            }
        }
        let with_node_ports = facts.ports.iter().filter_map(|port| Some((port, port.node_port?)));
        for (port, number) in with_node_ports {
            let ips = self.node_port_addresses.iter().copied();
            for ip in ips.filter(|ip| facts.has_family(Family::of(*ip))) {
                let frontend = Frontend { ip, port: number, protocol: port.protocol };
                let (created, service) = (facts.created, Arc::clone(&facts.name));
                claims.insert(Claim { frontend, kind: Kind::NodePort, created, service });
            }
        }
        claims.into_iter().collect()
    }

    /// Who claims a frontend; the first has it.
    fn claims_of(&self, frontend: Frontend) -> impl Iterator<Item = &Claim> {
        let service = "".into();
        let first = Claim { frontend, kind: Kind::Cluster, created: i64::MIN, service };
        self.claims.range(first..).take_while(move |claim| claim.frontend == frontend)
    }

    /// The lists of a Service, and what is wrong with it.
    fn lists_of(&self, entry: &Entry) -> (Lists, Box<[String]>) {
        let Some(facts) = &entry.facts else { return ([].into(), [].into()) };
        let mut problems = facts.problems.to_vec();
        let mut frontends = self.frontends_of(facts, entry, &mut problems);
        let endpoints = self.endpoints_of(facts, entry, &mut problems);
        let mut lists = Vec::new();
        let none = BTreeMap::new();
        for port in &facts.ports {
            for family in Family::ALL {
                let group = (port.protocol, port.number, family);
                let (cluster, local) = (
                    frontends.remove(&(group, false)).unwrap_or_default(),
                    frontends.remove(&(group, true)).unwrap_or_default(),
                );
                if cluster.is_empty() && local.is_empty() {
                    continue;
                }
                let all = endpoints.get(&(&*port.name, port.protocol, family)).unwrap_or(&none);
                let all: Vec<_> = all.iter().map(|(address, one)| (*address, *one)).collect();
                let serving = all.iter().filter(|(_, one)| one.is_serving);
                let serving: Box<[SocketAddr]> = serving.map(|(address, _)| *address).collect();
                let found = eligible(&all, facts.policies(port, family), self.node.zone.as_deref());
                for (is_local, frontends, backends) in
                    [(false, cluster, found.cluster), (true, local, found.local)]
                {
                    if frontends.is_empty() {
                        continue;
                    }
                    let (service, name) = (Arc::clone(&facts.name), Arc::clone(&port.name));
                    let protocol = port.protocol;
                    lists.push((
                        ListKey { service, port: name, protocol, family, is_local },
                        List {
                            frontends: frontends.into_iter().collect(),
                            backends: backends.unwrap_or_default().into(),
                            serving: serving.clone(),
                            affinity: facts.affinity,
                        },
                    ));
                }
            }
        }
        (lists.into(), problems.into())
    }
}

/// A port's protocol, number and family.
type Group = (Protocol, u16, Family);
/// The endpoints of ports, by the ports' names.
type Endpoints<'a> = HashMap<(&'a str, Protocol, Family), BTreeMap<SocketAddr, &'a Endpoint>>;

impl Catalog {
    /// The frontends that a Service has, by port and by whether only local endpoints are behind
    /// them: for callers of this node, whom the policy for traffic from outside does not concern,
    /// that is for ClusterIPs alone.
    fn frontends_of(
        &self,
        facts: &ServiceFacts,
        entry: &Entry,
        problems: &mut Vec<String>,
    ) -> BTreeMap<(Group, bool), BTreeSet<Frontend>> {
        let mut found: BTreeMap<_, BTreeSet<_>> = BTreeMap::new();
        let mut lost: BTreeMap<(IpAddr, &str), Vec<String>> = BTreeMap::new();
        for Claim { frontend, kind, .. } in &entry.claims {
            let Some(owner) = self.claims_of(*frontend).next() else { continue };
            if owner.service != facts.name {
                let ports = lost.entry((frontend.ip, &owner.service)).or_default();
                ports.push(format!("{}/{}", frontend.port, frontend.protocol));
            } else if owner.kind == *kind {
                let number = facts.number_of(*kind, frontend.port, frontend.protocol);
                let group = (frontend.protocol, number, Family::of(frontend.ip));
                let is_local = *kind == Kind::Cluster && facts.internal_local;
                found.entry((group, is_local)).or_default().insert(*frontend);
            }
        }
        for ((ip, owner), ports) in lost {
            problems.push(format!(
                "Service {}: {ip}: ports {} are not translated for it, since Service {owner} has \
                 this address too and comes first",
                facts.name,
                named(&ports),
            ));
        }
        for (ip, kind) in &facts.addresses {
            if *kind == Kind::External && !self.is_translated(facts, *ip, *kind) {
                problems.push(format!(
                    "Service {}: spec.externalIPs: {ip} is left to kube-proxy: external IPs are \
                     not translated unless asked for, and it is not an address of this node",
                    facts.name
                ));
            }
        }
        found
    }

    /// What the slices say of the endpoints of a Service's ports.
    fn endpoints_of<'a>(
        &'a self,
        facts: &'a ServiceFacts,
        entry: &'a Entry,
        problems: &mut Vec<String>,
    ) -> Endpoints<'a> {
        let mut found: Endpoints<'a> = HashMap::new();
        let known: HashSet<(&str, Protocol)> =
            facts.ports.iter().map(|port| (&*port.name, port.protocol)).collect();
        let mut contradictions = BTreeSet::new();
        for slice in entry.slices.iter().filter_map(|name| self.slices.get(name)) {
            for port in &slice.ports {
                let Some(&(name, protocol)) = known.get(&(&*port.name, port.protocol)) else {
                    continue;
                };
                for (ip, endpoint) in &slice.endpoints {
                    let address = SocketAddr::new(*ip, port.number);
                    let port = found.entry((name, protocol, Family::of(*ip))).or_default();
                    let first = port.entry(address).or_insert(endpoint);
                    if first.stays && endpoint.stays && *first != endpoint {
                        contradictions.insert(address);
                    }
                    *first = endpoint.max(first);
                }
            }
        }
        if !contradictions.is_empty() {
            let addresses: Vec<String> = contradictions.iter().map(ToString::to_string).collect();
            problems.push(format!(
                "Service {}: its EndpointSlices say different things of {}: an endpoint that is \
                 this node's, or else one that is ready, counts",
                facts.name,
                named(&addresses),
            ));
        }
        found
    }
}

/// The first of them, and how many more there are.
fn named(all: &[String]) -> String {
    const NAMED: usize = 8;
    let first = all[..all.len().min(NAMED)].join(", ");
    match all.len().saturating_sub(NAMED) {
        0 => first,
        more => format!("{first} and {more} more"),
    }
}
