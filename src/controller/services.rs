//! Services into the kernel, and whose calls to them are translated.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

use anyhow::{Result, ensure};
use tracing::{debug, info};

use super::{Controller, Look, Source, is_done};
use crate::{
    dataplane::StalePeer,
    mesh::facts,
    node::{self, Nat, Netns, NetnsCookie, udp},
    problem::{Problem, Reason},
    service::{Catalog, Options, Wanted, canary},
    source::{Snapshot, SourcePod, manifests::NETNS_ANNOTATION},
};

/// What is known of Services, and what is wrong with them.
pub(super) struct Services {
    catalog: Catalog,
    /// What the source says that is wrong.
    source: BTreeSet<Problem>,
    /// Lists that the maps have no room for.
    full: BTreeSet<Problem>,
    /// The maps hold what the catalog says, but for what is in `full`.
    is_applied: bool,
    /// Namespaces whose calls are translated, and whether the map has them.
    namespaces: BTreeSet<NetnsCookie>,
    are_namespaces_written: bool,
    /// Pods of no mesh, by uid and name.
    plain: BTreeMap<(String, String), Plain>,
    /// Why connected UDP sockets whose endpoint is gone stay open.
    cannot_close: Option<Problem>,
    /// What is not translated, though it should be, by the node's namespace and by that of a pod.
    dead: [Option<Problem>; 2],
    /// The pod's.
    dialled_in: NetnsCookie,
    /// What was wrong at the last sync: said once.
    problems: BTreeSet<Problem>,
}

/// A pod that no mesh has to do with.
#[derive(Debug, Clone)]
struct Plain {
    cookie: NetnsCookie,
    netns: PathBuf,
    /// Rules of its own translate what it sends.
    has_own_nat: bool,
}

impl Services {
    fn new(options: Options) -> Self {
        Self {
            catalog: Catalog::new(options),
            source: BTreeSet::new(),
            full: BTreeSet::new(),
            is_applied: false,
            namespaces: BTreeSet::new(),
            are_namespaces_written: false,
            plain: BTreeMap::new(),
            cannot_close: None,
            dead: [None, None],
            dialled_in: NetnsCookie::NONE,
            problems: BTreeSet::new(),
        }
    }
}

impl Controller {
    /// Translates Services as well.
    #[must_use]
    pub fn with_services(self, options: Option<Options>) -> Self {
        Self { services: options.map(Services::new), ..self }
    }

    /// What is wrong with Services.
    pub(super) fn service_problems(&self) -> impl Iterator<Item = &Problem> {
        self.services.iter().flat_map(|services| &services.problems)
    }

    /// The addresses of Services that the kernel should have; `None` if they are not translated, or the
    /// source has not spoken of all of them yet.
    #[must_use]
    pub fn wanted_services(&self) -> Option<Vec<Wanted>> {
        let services = self.services.as_ref().filter(|services| services.is_applied)?;
        Some(services.catalog.wanted())
    }

    /// Brings the kernel in step with what the source says of Services, where it has spoken of all of
    /// them. The mesh's pods do not wait for that, nor it for them.
    pub(super) fn sync_services(&mut self, look: Look) {
        let Some(mut services) = self.services.take() else { return };
        let before = std::mem::take(&mut services.problems);
        match self.try_sync_services(look, &mut services) {
            Ok(true) => {
                if look == Look::Everything {
                    self.dial_canaries(&mut services);
                }
                self.close_stale(&mut services);
            }
            Ok(false) => {}
            Err(error) => {
                services.problems.insert(Problem::node(format!("Services: {error:#}")));
            }
        }
        let more = services.source.iter().chain(&services.full).chain(&services.cannot_close);
        let more = more.chain(services.dead.iter().flatten());
        services.problems.extend(more.cloned());
        services.problems.extend(services.catalog.problems());
        self.say(&before, &services.problems);
        let is_new = before != services.problems;
        self.services = Some(services);
        if is_new {
            self.report();
        }
    }

    /// Whether there is something new: a change that was applied, or a look at everything.
    fn try_sync_services(&mut self, look: Look, services: &mut Services) -> Result<bool> {
        if !services.are_namespaces_written && !services.namespaces.is_empty() {
            self.dataplane.translate_for(&services.namespaces, &self.host)?;
            services.are_namespaces_written = true;
        }
        match &mut self.source {
            Source::Manifests(manifests) => {
                if let Some(problems) = manifests.feed(&mut services.catalog) {
                    services.source = problems.into_iter().collect();
                }
            }
            Source::Kubernetes(kubernetes, _) => {
                if !kubernetes.feed(&mut services.catalog) {
                    return Ok(false);
                }
            }
        }
        if look == Look::Everything || !services.is_applied {
            services.catalog.set_node_addresses(node::own_addresses()?);
        }
        let mut changes = services.catalog.changes();
        if services.is_applied {
            let again = look == Look::Everything && !services.full.is_empty();
            if changes.is_empty() && !again {
                // A namespace may have become known since the last change.
                return Ok(look == Look::Everything);
            }
        } else {
            let all = services.catalog.lists().map(|(key, list)| (key.clone(), list.clone()));
            changes = all.chain(canary::lists()).map(|(key, list)| (key, Some(list))).collect();
        }
        let lists = changes.len();
        services.is_applied = false;
        let applied = self.dataplane.apply_services(changes)?;
        services.is_applied = true;
        debug!(lists, applied.changed, "maps of Services");
        let full = applied.failed.into_iter().map(|(list, error)| {
            let text = format!("Service {list} is left to kube-proxy until there is room: {error}");
            Problem { reason: Reason::InvalidService, pod: None, text }
        });
        services.full = full.collect();
        Ok(true)
    }

    /// Sees that calls are translated, from the node's namespace and from that of one pod after the
    /// other: that the programs are attached, and to what, proves nothing.
    fn dial_canaries(&self, services: &mut Services) {
        let dead = |from: &str, dialled: Result<()>| {
            let error = dialled.err()?;
            Some(Problem::node(format!(
                "Services are not translated in {from}: {error:#}; another program may come \
                 first, or cgroup {} may not be the one that processes are in",
                self.cgroup
            )))
        };
        if !services.are_namespaces_written {
            return;
        }
        services.dead[0] = dead("the node's network namespace", canary::dial(udp::connect));
        let pods = || services.namespaces.difference(&self.host).copied();
        let next = pods().find(|cookie| *cookie > services.dialled_in).or_else(|| pods().next());
        services.dialled_in = next.unwrap_or(NetnsCookie::NONE);
        services.dead[1] = next.and_then(|cookie| {
            let path = self.netns_path(services, cookie)?;
            // One that is gone is found out elsewhere.
            let dialled =
                Netns::open_as(path, cookie).ok()?.inside(|| canary::dial(udp::connect)).ok()?;
            dead(&format!("{}", path.display()), dialled)
        });
    }

    /// Where the namespace of a pod is, if its pod is known.
    fn netns_path<'a>(&'a self, services: &'a Services, cookie: NetnsCookie) -> Option<&'a Path> {
        let mesh = self.pods.get(&cookie).map(|pod| &*pod.netns.path);
        mesh.or_else(|| {
            let plain = services.plain.values().find(|pod| pod.cookie == cookie);
            plain.map(|pod| &*pod.netns)
        })
    }

    /// Closes the connected UDP sockets whose endpoint is gone: nothing else would tell them, and
    /// what they send is lost. Between the look and the kernel's own comparison a socket can only
    /// have gone, or have another peer.
    fn close_stale(&self, services: &mut Services) {
        services.cannot_close = None;
        if let Err(error) = self.try_close_stale(services) {
            let text = format!(
                "Services: connected UDP sockets may stay connected to endpoints that are gone: \
                 {error:#}"
            );
            services.cannot_close = Some(Problem::node(text));
        }
    }

    /// One namespace's failure does not keep the others' sockets open: the last one is returned.
    fn try_close_stale(&self, services: &Services) -> Result<()> {
        let mut gone: BTreeMap<NetnsCookie, Vec<StalePeer>> = BTreeMap::new();
        for found in self.dataplane.stale_peers()? {
            if services.catalog.is_gone(found.socket.peer, found.frontend) {
                gone.entry(found.netns).or_default().push(found);
            }
        }
        if gone.is_empty() {
            return Ok(());
        }
        ensure!(
            udp::can_close()?,
            "this kernel has no CONFIG_INET_UDP_DIAG or no CONFIG_INET_DIAG_DESTROY"
        );
        let mut result = Ok(());
        for (cookie, sockets) in gone {
            let close = || -> Vec<_> { sockets.iter().map(|one| one.socket.close()).collect() };
            let closed = if self.host.contains(&cookie) {
                close()
            } else {
                let Some(path) = self.netns_path(services, cookie) else { continue };
                match Netns::open_as(path, cookie).and_then(|netns| netns.inside(close)) {
                    Ok(closed) => closed,
                    Err(error) => {
                        result = Err(error);
                        continue;
                    }
                }
            };
            let mut count = 0;
            for (found, closed) in sockets.iter().zip(closed) {
                let StalePeer { frontend, socket, .. } = found;
                match closed {
                    Ok(true) => {
                        count += 1;
                        debug!(%cookie, ?socket, service = %frontend, "closed a UDP socket");
                    }
                    Ok(false) => {}
                    Err(error) => {
                        result = Err(error.context(format!(
                            "cannot close the one from {} to {}, an endpoint of {frontend}",
                            socket.local, socket.peer
                        )));
                    }
                }
            }
            if count > 0 {
                self.metrics.closed_udp(count);
                let netns = cookie.0;
                info!(netns, count, "closed connected UDP sockets whose endpoint is gone");
            }
        }
        result
    }

    /// Whose calls are translated: the node's own, enrolled pods', and those of pods that no mesh has
    /// to do with. Not those of pods that say no, and of those whose own rules translate what they
    /// send: somebody else's proxy has to see there what was dialled.
    pub(super) fn choose_namespaces(
        &mut self,
        look: Look,
        snapshot: &Snapshot,
        mesh: &BTreeMap<NetnsCookie, bool>,
        problems: &mut BTreeSet<Problem>,
    ) {
        let pods: Vec<&SourcePod> = self.plain_pods(snapshot).collect();
        let Some(mut services) = self.services.take() else { return };
        let enrolled = self.pods.keys().filter(|cookie| mesh.get(cookie).is_none_or(|on| *on));
        let mut chosen: BTreeSet<NetnsCookie> = self.host.iter().chain(enrolled).copied().collect();
        let mut plain = BTreeMap::new();
        for found in pods {
            let is_on = translates(found, problems);
            let key = (found.uid().to_owned(), found.name());
            let known = services.plain.get(&key).cloned();
            let seen = match known.filter(|_| look != Look::Everything) {
                Some(known) => Ok(Some(known)),
                None => self.visit_plain(found),
            };
            match seen {
                Ok(Some(pod)) => {
                    if is_on && !pod.has_own_nat && !self.host.contains(&pod.cookie) {
                        chosen.insert(pod.cookie);
                    }
                    plain.insert(key, pod);
                }
                Ok(None) => {}
                Err(_) if !is_on => {}
                Err(error) => {
                    let text = format!("its calls to Services are left to kube-proxy: {error:#}");
                    problems.insert(found.problem(Reason::NetworkNamespace, &text));
                }
            }
        }
        services.plain = plain;
        if services.namespaces != chosen {
            services.namespaces = chosen;
            services.are_namespaces_written = false;
        }
        self.services = Some(services);
    }

    /// The pods that no mesh has to do with and whose calls may be translated.
    pub(super) fn plain_pods<'a>(
        &self,
        snapshot: &'a Snapshot,
    ) -> impl Iterator<Item = &'a SourcePod> + use<'a> {
        let on = self.services.is_some();
        snapshot.pods.iter().filter(move |found| {
            let spec = found.pod.spec.as_ref();
            let is_nodes = spec.is_some_and(|spec| spec.host_network == Some(true));
            on && !is_nodes && !is_done(&found.pod) && facts::is_no_meshs(&found.pod)
        })
    }

    /// Looks into the namespace of a pod of no mesh. None: it is not known yet.
    fn visit_plain(&self, found: &SourcePod) -> Result<Option<Plain>> {
        let (path, cookie) = match &self.source {
            Source::Manifests(_) => {
                let annotations = found.pod.metadata.annotations.as_ref();
                let path = annotations.and_then(|all| all.get(NETNS_ANNOTATION)).map(PathBuf::from);
                (path, None)
            }
            Source::Kubernetes(_, places) => {
                let place = places.get(found.uid());
                (place.map(|place| place.path.clone()), place.map(|place| place.cookie))
            }
        };
        let Some(path) = path else { return Ok(None) };
        let netns = Netns::open(&path)?;
        let (at, nat) = netns.inside(|| -> Result<(NetnsCookie, Nat)> {
            Ok((NetnsCookie::current()?, node::nat()?))
        })??;
        let pod = Plain { cookie: at, netns: path, has_own_nat: nat.outbound };
        Ok((cookie.is_none_or(|cookie| cookie == at)).then_some(pod))
    }
}

/// Whether a pod's calls to Services may be translated, as it says itself.
pub(super) fn translates(found: &SourcePod, problems: &mut BTreeSet<Problem>) -> bool {
    facts::translates_services(&found.pod).unwrap_or_else(|error| {
        let text =
            format!("its calls to Services are left to kube-proxy until this is fixed: {error}");
        problems.insert(found.problem(Reason::InvalidPolicy, &text));
        false
    })
}
