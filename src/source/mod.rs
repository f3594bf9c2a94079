//! Sources of pods.

pub mod kubernetes;
pub mod manifests;

use std::{collections::BTreeMap, path::PathBuf, sync::Arc};

use anyhow::Result;
use k8s_openapi::api::core::v1::Pod;

use crate::{
    mesh::facts::{self, pod_name},
    problem::{Problem, Reason},
};

/// A pod and its origin.
#[derive(Debug, Clone)]
pub struct SourcePod {
    /// The pod's object.
    pub pod: Arc<Pod>,
    /// The file with the pod; `None` if it is from the API server.
    pub origin: Option<PathBuf>,
}

impl SourcePod {
    /// An error of this pod: names the file, if there is one, and the pod.
    pub fn problem(&self, reason: Reason, text: &str) -> Problem {
        let name = self.name();
        let text = match &self.origin {
            Some(file) => format!("{}: pod {name}: {text}", file.display()),
            None => format!("pod {name}: {text}"),
        };
        Problem { reason, pod: Some((name, self.uid().to_owned())), text }
    }

    /// The pod's name, as `namespace/name`.
    pub fn name(&self) -> String {
        pod_name(&self.pod).unwrap_or_else(|_| "?".into())
    }

    /// The uid that the node uses for the pod, see [`facts::pod_uid`]; may be empty.
    pub fn uid(&self) -> &str {
        facts::pod_uid(&self.pod)
    }
}

/// A source's state at one moment.
#[derive(Debug, Default)]
pub struct Snapshot {
    /// All pods that could be read.
    pub pods: Vec<SourcePod>,
    /// The source's own errors.
    pub errors: Vec<Problem>,
    /// Whether some pods may be in a part that could not be read.
    pub incomplete: bool,
    /// Whether a missing pod may still run, as after `kubectl delete --force`: it leaves when its
    /// network namespace does.
    pub missing_may_run: bool,
}

/// A source of pods.
pub trait PodSource {
    /// The source's present state; `None` before its first complete list.
    ///
    /// # Errors
    /// If the source as a whole cannot be read. Errors in a part of it are in the snapshot.
    fn snapshot(&mut self) -> Result<Option<Snapshot>>;

    /// Present problems in reaching the source.
    fn problems(&self) -> Vec<Problem> {
        Vec::new()
    }

    /// The number of failed requests to the source, by kind.
    fn errors(&self) -> BTreeMap<&'static str, u64> {
        BTreeMap::new()
    }

    /// Reports a problem to its pod, or to the node if it concerns no pod, where the source can.
    fn event(&self, _: &Problem) {}

    /// Whether Sidestep is being uninstalled, and leaves this node's mesh pods intercepted.
    fn leaves_pods_behind(&self) -> bool {
        false
    }
}
