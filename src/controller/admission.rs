//! Answers the CNI plugin: may a sandbox start, and is its pod still enrolled?

use std::{collections::BTreeSet, sync::Arc};

use k8s_openapi::api::core::v1::Pod;
use thiserror::Error;

use super::{Controller, Source};
use crate::{
    mesh::facts,
    node::{Netns, NetnsCookie, PodNetns, Sandbox},
    problem::Problem,
};

/// A pod whose sandbox was just made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Announced {
    uid: String,
    cookie: NetnsCookie,
    /// Whether the pod is in a mesh; a pod in none may run in any case.
    is_in_mesh: bool,
}

/// The reason why a sandbox may not start yet.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum AddError {
    /// The agent has just started.
    #[error("the agent has just started and does not know all of this node's pods yet")]
    NotYet,
    /// The pod is in a mesh and cannot be enrolled.
    #[error("{0}")]
    Refused(String),
}

impl Controller {
    /// Adds a pod whose sandbox was just made to the next sync; `None` if it is in no mesh and
    /// needs nothing.
    ///
    /// # Errors
    /// If its namespace cannot be entered, or the source has no complete list yet.
    pub fn announce(
        &mut self,
        pod: Arc<Pod>,
        sandbox: &Sandbox,
    ) -> Result<Option<Announced>, AddError> {
        let refused = |error: anyhow::Error| AddError::Refused(format!("{error:#}"));
        let Source::Kubernetes(kubernetes, namespaces) = &mut self.source else {
            return Err(AddError::Refused("this agent takes its pods from manifests".into()));
        };
        if !kubernetes.is_ready() {
            return Err(AddError::NotYet);
        }
        let pod = kubernetes.inherit(pod);
        // The sync reports problems of the pod itself.
        let is_in_mesh = facts::is_in_mesh(&pod);
        if !is_in_mesh && (self.services.is_none() || !facts::is_no_meshs(&pod)) {
            return Ok(None);
        }
        let uid = facts::pod_uid(&pod).to_owned();
        let cookie = Netns::open(&sandbox.netns).and_then(|ns| ns.cookie()).map_err(refused)?;
        let container = Some(sandbox.container.clone());
        namespaces.remember(&uid, PodNetns { path: sandbox.netns.clone(), cookie, container });
        kubernetes.expect(pod);
        Ok(Some(Announced { uid, cookie, is_in_mesh }))
    }

    /// Whether an announced pod is enrolled, after a sync.
    ///
    /// # Errors
    /// If it is in a mesh and cannot be enrolled: then it must not run.
    pub fn admitted(&self, announced: &Announced) -> Result<(), AddError> {
        let Announced { uid, cookie, is_in_mesh } = announced;
        if !is_in_mesh {
            return Ok(());
        }
        if self.dataplane.is_taking_over() {
            return Err(AddError::NotYet);
        }
        if self.left.get(cookie).is_some_and(|left| left.uid == *uid) {
            return Ok(());
        }
        self.enrolled(uid, *cookie)
    }

    /// Whether this pod is enrolled with this namespace.
    fn enrolled(&self, uid: &str, cookie: NetnsCookie) -> Result<(), AddError> {
        let owner = self.owners.get(&cookie);
        let is_enrolled =
            self.pods.contains_key(&cookie) && owner.is_some_and(|owner| owner.uid == uid);
        verdict(is_enrolled, uid, &self.problems)
    }

    /// Whether a pod of a mesh is still enrolled as it was added.
    ///
    /// # Errors
    /// If it is not.
    pub fn check(&mut self, pod: &Arc<Pod>, sandbox: &Sandbox) -> Result<(), AddError> {
        let Source::Kubernetes(kubernetes, _) = &mut self.source else {
            return Ok(());
        };
        if !facts::is_in_mesh(&kubernetes.inherit(Arc::clone(pod))) {
            return Ok(());
        }
        let cookie = Netns::open(&sandbox.netns).and_then(|netns| netns.cookie());
        let cookie = cookie.map_err(|error| AddError::Refused(format!("{error:#}")))?;
        let uid = facts::pod_uid(pod);
        if self.left.get(&cookie).is_some_and(|left| left.uid == uid) {
            return Ok(());
        }
        self.enrolled(uid, cookie)
    }

    /// The container runtime removes a sandbox. Its pod stays intercepted until the namespace is
    /// gone.
    pub fn delete(&mut self, container: &str) {
        if let Source::Kubernetes(_, namespaces) = &mut self.source {
            namespaces.forget(container);
        }
    }

    /// The container runtime's complete list of sandboxes.
    pub fn keep_only(&mut self, containers: &BTreeSet<String>) {
        if let Source::Kubernetes(_, namespaces) = &mut self.source {
            namespaces.keep_only(containers);
        }
    }
}

/// A pod that is not enrolled must not run: its problems are the reason.
fn verdict(is_enrolled: bool, uid: &str, problems: &BTreeSet<Problem>) -> Result<(), AddError> {
    if is_enrolled {
        return Ok(());
    }
    let of_pod = |problem: &&Problem| problem.pod.as_ref().is_some_and(|(_, id)| id == uid);
    let why: Vec<&str> =
        problems.iter().filter(of_pod).map(|problem| problem.text.as_str()).collect();
    let why = if why.is_empty() { "it is not enrolled".into() } else { why.join("; ") };
    Err(AddError::Refused(why))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::problem::Reason;

    #[test]
    fn a_refusal_says_what_is_wrong_with_that_pod_alone() {
        let about = |uid: &str, text: &str| Problem {
            reason: Reason::Refused,
            pod: Some(("shop/a".into(), uid.into())),
            text: text.into(),
        };
        let problems = [
            about("u-1", "the first"),
            about("u-2", "another's"),
            about("u-1", "the second"),
            Problem::node("the node's"),
        ];
        let problems = BTreeSet::from(problems);
        let refused = |why: &str| Err(AddError::Refused(why.into()));
        assert_eq!(verdict(false, "u-1", &problems), refused("the first; the second"));
        assert_eq!(verdict(false, "u-3", &problems), refused("it is not enrolled"));
        assert_eq!(verdict(true, "u-1", &problems), Ok(()), "a warning keeps no pod from running");
    }
}
