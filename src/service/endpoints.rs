//! Which endpoints of a Service's port are eligible: what kube-proxy's `CategorizeEndpoints` says
//! (`pkg/proxy/topology.go`).

use std::net::SocketAddr;

/// What an EndpointSlice says of an endpoint. The order is that of who counts where several slices
/// say something of one address: the greatest. As in kube-proxy that is the one on this node. Among
/// the others kube-proxy leaves it to chance (`pkg/proxy/endpointslicecache.go` goes through a map):
/// here one that stays counts before one that terminates, whose address was given out again.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Endpoint {
    /// It is on this node.
    pub is_local: bool,
    /// It stays, as far as is known.
    pub stays: bool,
    /// It takes new connections.
    pub is_ready: bool,
    /// It would, were it not for its terminating.
    pub is_serving: bool,
    /// Whether the hints for nodes name this one; none: it has no such hints.
    pub node_hint: Option<bool>,
    /// The zones that it is hinted to.
    pub zone_hints: Box<[Box<str>]>,
}

impl Endpoint {
    /// It can stand in where none is ready.
    fn stands_in(&self) -> bool {
        self.is_serving && !self.stays
    }

    fn is_hinted_to(&self, zone: &str) -> bool {
        self.zone_hints.iter().any(|hint| **hint == *zone)
    }
}

/// What decides which lists a port of a Service has.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Policies {
    /// `internalTrafficPolicy: Local`.
    pub internal_local: bool,
    /// `externalTrafficPolicy: Local`.
    pub external_local: bool,
    /// It has a node port, or an IP of a load balancer or an external one in its family.
    pub is_reachable_from_outside: bool,
}

impl Policies {
    fn uses_cluster(self) -> bool {
        !self.internal_local || self.is_reachable_from_outside
    }

    fn uses_local(self) -> bool {
        self.internal_local || (self.external_local && self.is_reachable_from_outside)
    }
}

/// The endpoints that are eligible, in the order in which they were given.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Eligible {
    /// By the policy Cluster; none where no frontend of the port has it.
    pub cluster: Option<Vec<SocketAddr>>,
    /// By the policy Local; none where no frontend of the port has it.
    pub local: Option<Vec<SocketAddr>>,
}

/// The eligible ones of a port's endpoints, for a node in `zone`, if it says in which it is.
pub fn eligible(
    all: &[(SocketAddr, &Endpoint)],
    policies: Policies,
    zone: Option<&str>,
) -> Eligible {
    let those = |wanted: &dyn Fn(&Endpoint) -> bool| -> Vec<SocketAddr> {
        all.iter().filter(|(_, one)| wanted(one)).map(|(address, _)| *address).collect()
    };
    // Where none is ready, those that terminate and serve still; hints are for ready ones.
    let or_stand_ins = |ready: Vec<SocketAddr>, wanted: &dyn Fn(&Endpoint) -> bool| {
        if ready.is_empty() { those(&|one| one.stands_in() && wanted(one)) } else { ready }
    };
    let cluster = || {
        let ready = || all.iter().map(|(_, one)| *one).filter(|one| one.is_ready);
        let preferred: &dyn Fn(&Endpoint) -> bool = if ready().all(|one| one.node_hint.is_some())
            && ready().any(|one| one.node_hint == Some(true))
        {
            &|one| one.node_hint == Some(true)
        } else if let Some(zone) = zone
            && ready().all(|one| !one.zone_hints.is_empty())
            && ready().any(|one| one.is_hinted_to(zone))
        {
            &|one| one.is_hinted_to(zone)
        } else {
            &|_| true
        };
        or_stand_ins(those(&|one| one.is_ready && preferred(one)), &|_| true)
    };
    let local = || or_stand_ins(those(&|one| one.is_ready && one.is_local), &|one| one.is_local);
    Eligible {
        cluster: policies.uses_cluster().then(cluster),
        local: policies.uses_local().then(local),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    type Set = BTreeSet<usize>;

    /// Every way in which an endpoint can stand to this node and its zone, "z".
    fn kinds() -> Vec<Endpoint> {
        let zones: [&[&str]; 3] = [&[], &["z", "y"], &["y"]];
        let mut kinds = Vec::new();
        for (is_ready, is_serving, stays) in
            [(true, true, true), (false, true, false), (false, false, true)]
        {
            for node_hint in [None, Some(true), Some(false)] {
                for zones in zones {
                    for is_local in [true, false] {
                        let zone_hints = zones.iter().map(|zone| (*zone).into()).collect();
                        kinds.push(Endpoint {
                            stays,
                            is_local,
                            is_ready,
                            is_serving,
                            node_hint,
                            zone_hints,
                        });
                    }
                }
            }
        }
        kinds
    }

    /// The algorithm once more, in sets: of several of them in the order of preference, the first
    /// that is not empty.
    fn stated(all: &[&Endpoint], policies: Policies, has_zone: bool) -> [Option<Set>; 2] {
        let set = |has: fn(&Endpoint) -> bool| -> Set {
            (0..all.len()).filter(|n| has(all[*n])).collect()
        };
        let first = |sets: Vec<Set>| sets.into_iter().find(|set| !set.is_empty());
        let zone_here: fn(&Endpoint) -> bool = |one| one.zone_hints.contains(&"z".into());
        let ready = set(|one| one.is_ready);
        let draining = &set(|one| one.is_serving) - &set(|one| one.stays);
        let local = set(|one| one.is_local);
        let with_node_hint = set(|one| one.node_hint.is_some());
        let with_zone_hint = set(|one| !one.zone_hints.is_empty());

        let mut cluster = Vec::new();
        if ready.is_subset(&with_node_hint) {
            cluster.push(&ready & &set(|one| one.node_hint == Some(true)));
        }
        if has_zone && ready.is_subset(&with_zone_hint) {
            cluster.push(&ready & &set(zone_here));
        }
        cluster.extend([ready.clone(), draining.clone()]);
        let cluster = first(cluster).unwrap_or_default();
        let local = first(vec![&ready & &local, &draining & &local]).unwrap_or_default();

        let outside = policies.is_reachable_from_outside;
        let no_cluster = policies.internal_local && !outside;
        let some_local = policies.internal_local || policies.external_local && outside;
        [(!no_cluster).then_some(cluster), some_local.then_some(local)]
    }

    /// Row 8 of the contract: every set of up to three endpoints, under every policy.
    #[test]
    fn the_choice_is_kube_proxys_over_the_whole_truth_table() {
        let kinds = kinds();
        assert_eq!(kinds.len(), 54);
        let address = |n: usize| SocketAddr::from(([10, 0, 0, 1], 1 + n as u16));
        let mut cases = 0;
        let mut check = |of: &[usize]| {
            let all: Vec<&Endpoint> = of.iter().map(|kind| &kinds[*kind]).collect();
            let given: Vec<_> = all.iter().enumerate().map(|(n, one)| (address(n), *one)).collect();
            for bits in 0..16 {
                let policies = Policies {
                    internal_local: bits & 1 > 0,
                    external_local: bits & 2 > 0,
                    is_reachable_from_outside: bits & 4 > 0,
                };
                let zone = (bits & 8 > 0).then_some("z");
                let Eligible { cluster, local } = eligible(&given, policies, zone);
                let indices = |list: Vec<SocketAddr>| -> Set {
                    list.iter().map(|address| usize::from(address.port()) - 1).collect()
                };
                let found = [cluster.map(indices), local.map(indices)];
                let stated = stated(&all, policies, zone.is_some());
                assert_eq!(found, stated, "{all:#?} {policies:?} {zone:?}");
                cases += 1;
            }
        };
        check(&[]);
        for a in 0..kinds.len() {
            check(&[a]);
            for b in a..kinds.len() {
                check(&[a, b]);
                for c in b..kinds.len() {
                    check(&[a, b, c]);
                }
            }
        }
        assert_eq!(cases, 16 * (1 + 54 + 1485 + 27_720));
    }
}
