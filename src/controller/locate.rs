//! Finds each pod's network namespace, and reads its state.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Context, Result};
use k8s_openapi::api::core::v1::Pod;

use super::{Controller, Look, Source};
use crate::{
    dataplane::read_legacy_nat,
    mesh::facts::PodFacts,
    node::{Lo, Netns, NetnsCookie, NetnsFacts},
    problem::{Problem, Reason},
    source::{SourcePod, manifests::NETNS_ANNOTATION},
};

/// The number of full rounds after which a pod without processes is reported: one that starts or
/// ends may have none for a moment, or its object may lag behind.
const MISSES: u32 = 2;

/// The search for namespaces that the container runtime has not named, by their pods' uids.
#[derive(Debug, Default)]
pub(super) struct Search {
    /// The number of full rounds in which the pod was not found.
    missing: BTreeMap<String, u32>,
    /// The reason why the pod's processes do not show the namespace.
    disputed: BTreeMap<String, String>,
}

impl Search {
    /// The unknown pods to search for: once when a pod is new, then in every full round.
    fn wanted(&self, unknown: &BTreeSet<String>, again: bool) -> BTreeSet<String> {
        let wanted = unknown.iter().filter(|uid| again || !self.missing.contains_key(*uid));
        wanted.cloned().collect()
    }

    /// Records the results of a search.
    fn done(
        &mut self,
        unknown: &BTreeSet<String>,
        wanted: &BTreeSet<String>,
        again: bool,
        disputed: BTreeMap<String, String>,
        is_found: impl Fn(&str) -> bool,
    ) {
        self.disputed.extend(disputed);
        self.disputed.retain(|uid, _| unknown.contains(uid) && !is_found(uid));
        self.missing.retain(|uid, _| unknown.contains(uid) && !is_found(uid));
        for uid in wanted.iter().filter(|uid| !is_found(uid)) {
            *self.missing.entry(uid.clone()).or_default() += u32::from(again);
        }
    }

    /// Whether a pod was searched for often enough to report that it has no process here.
    fn is_lost(&self, uid: &str) -> bool {
        self.missing.get(uid) >= Some(&MISSES) && !self.disputed.contains_key(uid)
    }

    /// Forgets all pods except these.
    pub fn retain(&mut self, uids: &BTreeSet<String>) {
        self.missing.retain(|uid, _| uids.contains(uid));
    }
}

impl Controller {
    /// Searches for the namespaces of pods that the container runtime has not named, by their
    /// processes: once when a pod is new, then in every full round.
    pub(super) fn search(
        &mut self,
        look: Look,
        pods: &[&SourcePod],
        problems: &mut BTreeSet<Problem>,
    ) {
        let Source::Kubernetes(_, namespaces) = &mut self.source else {
            return;
        };
        let unknown = pods.iter().filter(|found| namespaces.get(found.uid()).is_none());
        let unknown: BTreeSet<String> = unknown.map(|found| found.uid().to_owned()).collect();
        let again = look == Look::Everything;
        let wanted = self.search.wanted(&unknown, again);
        let disputed = match namespaces.search(&wanted, &self.host) {
            Ok(disputed) => disputed,
            Err(error) => {
                problems.insert(Problem::node(format!("{error:#}")));
                BTreeMap::new()
            }
        };
        self.search.done(&unknown, &wanted, again, disputed, |uid| namespaces.get(uid).is_some());
        for found in pods {
            if let Some(why) = self.search.disputed.get(found.uid()) {
                problems.insert(found.problem(Reason::NetworkNamespace, why));
            }
        }
    }

    /// A pod's namespace; `None` if there is none yet, or no more. A path that is gone says nothing
    /// about the namespace: a terminating pod is intercepted while its namespace lives.
    pub(super) fn netns(
        &mut self,
        look: Look,
        found: &SourcePod,
        facts: &PodFacts,
    ) -> Result<Option<Arc<NetnsFacts>>> {
        let annotations = found.pod.metadata.annotations.as_ref();
        let (path, cookie, what) = match &self.source {
            Source::Manifests(_) => {
                let path = annotations.and_then(|all| all.get(NETNS_ANNOTATION));
                let path = path.with_context(|| {
                    format!(
                        "annotation {NETNS_ANNOTATION} is missing: it names the network namespace"
                    )
                })?;
                (
                    Some(PathBuf::from(path)),
                    None,
                    format!("annotation {NETNS_ANNOTATION}: {path:?}"),
                )
            }
            Source::Kubernetes(_, namespaces) => {
                let place = namespaces.get(found.uid());
                let what = "its network namespace".to_owned();
                (place.map(|place| place.path.clone()), place.map(|place| place.cookie), what)
            }
        };
        if look != Look::Everything
            && let Some(visited) = self.visited.get(found.uid())
            && cookie == Some(visited.cookie)
        {
            return Ok(Some(Arc::clone(visited)));
        }
        let visit = path.as_ref().map(|path| visit(path, cookie, facts));
        let visit = match visit {
            Some(Ok((netns, lo))) => {
                let netns = match self.visited.get(found.uid()) {
                    Some(visited) if **visited == netns => Arc::clone(visited),
                    _ => Arc::new(netns),
                };
                if cookie.is_some() {
                    self.visited.insert(found.uid().to_owned(), Arc::clone(&netns));
                }
                self.lo.insert(netns.cookie, lo);
                return Ok(Some(netns));
            }
            Some(Err(error)) => Some(error),
            None => None,
        };
        if let (Source::Kubernetes(_, namespaces), true) = (&mut self.source, path.is_some()) {
            namespaces.lost(found.uid());
        }
        let owned = self
            .owners
            .iter()
            .find(|(_, owner)| owner.pod == facts.name && owner.uid == facts.uid)
            .filter(|(cookie, _)| self.dataplane.netns_lives(**cookie));
        if let Some((cookie, owner)) = owned {
            return Ok(Some(self.pods.get(cookie).map_or_else(
                || {
                    Arc::new(NetnsFacts {
                        path: path.unwrap_or_else(|| owner.netns.clone()),
                        cookie: *cookie,
                        addresses: Vec::new(),
                        more_addresses: false,
                        interfaces: BTreeMap::new(),
                        routes: Vec::new(),
                        route_localnet: false,
                        own_nat: false,
                        rules: Ok(Vec::new()),
                        forwarded: 0,
                    })
                },
                |pod| Arc::clone(&pod.netns),
            )));
        }
        match visit {
            // Its processes are gone, or it has another namespace by now: it is searched for again.
            Some(error) if cookie.is_some() && is_gone(&error) => Ok(None),
            Some(error) => Err(error.context(what)),
            None if is_running(&found.pod) && self.search.is_lost(found.uid()) => {
                Err(anyhow::anyhow!(
                    "none of its processes can be found on this node, so its network namespace is \
                     unknown (is --proc the node's own procfs, and is --node-name this node?)"
                ))
            }
            None => Ok(None),
        }
    }
}

/// The namespace's state, if it is the expected one.
fn visit(path: &Path, cookie: Option<NetnsCookie>, facts: &PodFacts) -> Result<(NetnsFacts, Lo)> {
    let with_routes = !facts.policy.exclude_interfaces.is_empty();
    let (found, lo) =
        Netns::open(path)?.look(with_routes, facts.dns_port.is_some(), read_legacy_nat)?;
    if cookie.is_some_and(|cookie| cookie != found.cookie) {
        let moved = io::Error::from(io::ErrorKind::NotFound);
        return Err(moved)
            .with_context(|| format!("{} is now another network namespace", path.display()));
    }
    Ok((found, lo))
}

/// Whether nothing exists any more at a namespace's path.
fn is_gone(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().map(io::Error::kind) == Some(io::ErrorKind::NotFound)
}

/// Whether the pod's object says that its containers run and will go on: a pod that is being
/// deleted soon has none, and its object may stay for a while.
fn is_running(pod: &Pod) -> bool {
    let deleted = pod.metadata.deletion_timestamp.is_some();
    !deleted && pod.status.as_ref().and_then(|status| status.phase.as_deref()) == Some("Running")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn uids(all: &[&str]) -> BTreeSet<String> {
        all.iter().map(|uid| (*uid).to_owned()).collect()
    }

    #[test]
    fn a_new_pod_is_looked_for_at_once_and_then_with_everything() {
        let mut search = Search::default();
        let both = uids(&["a", "b"]);
        assert_eq!(search.wanted(&both, false), both);
        search.done(&both, &both, false, BTreeMap::new(), |uid| uid == "b");
        let a = uids(&["a"]);
        assert_eq!(search.wanted(&a, false), uids(&[]), "not with each change");
        assert_eq!(search.wanted(&a, true), a);
        for is_lost in [false, true] {
            search.done(&a, &a, true, BTreeMap::new(), |_| false);
            assert_eq!(search.is_lost("a"), is_lost, "it may have just started");
        }
        search.done(&a, &a, true, BTreeMap::new(), |uid| uid == "a");
        assert!(!search.is_lost("a") && !search.is_lost("b"));
        assert_eq!(search.wanted(&a, false), a, "its namespace was replaced: it is as new");
    }

    #[test]
    fn what_is_in_dispute_is_not_missing() {
        let mut search = Search::default();
        let a = uids(&["a"]);
        for _ in 0..MISSES {
            let disputed = BTreeMap::from([("a".to_owned(), "two namespaces".to_owned())]);
            search.done(&a, &a, true, disputed, |_| false);
        }
        assert!(!search.is_lost("a") && search.disputed.contains_key("a"));
        search.done(&a, &a, true, BTreeMap::new(), |_| true);
        assert!(search.disputed.is_empty(), "it is settled");
    }

    #[test]
    fn a_pod_that_ends_need_not_have_processes() {
        let pod = |value| serde_json::from_value(value).expect("a pod");
        let running = serde_json::json!({"status": {"phase": "Running"}});
        let mut deleted = running.clone();
        deleted["metadata"] = serde_json::json!({"deletionTimestamp": "2026-01-01T00:00:00Z"});
        assert!(is_running(&pod(running)) && !is_running(&pod(deleted)));
        assert!(!is_running(&pod(serde_json::json!({"status": {"phase": "Succeeded"}}))));
    }
}
