//! Where pods come from.

pub mod kubernetes;
pub mod manifests;

use std::{collections::BTreeMap, path::PathBuf, sync::Arc};

use anyhow::Result;
use k8s_openapi::api::core::v1::Pod;

use crate::{
    mesh::facts::{self, pod_name},
    problem::{Problem, Reason},
};

/// A pod and where it was found.
#[derive(Debug, Clone)]
pub struct SourcePod {
    /// The object.
    pub pod: Arc<Pod>,
    /// The file it is in; none: the API server has it.
    pub origin: Option<PathBuf>,
}

impl SourcePod {
    /// What is wrong with this pod: names the file, where there is one, and the pod.
    pub fn problem(&self, reason: Reason, text: &str) -> Problem {
        let name = self.name();
        let text = match &self.origin {
            Some(file) => format!("{}: pod {name}: {text}", file.display()),
            None => format!("pod {name}: {text}"),
        };
        Problem { reason, pod: Some((name, self.uid().to_owned())), text }
    }

    /// `namespace/name`.
    pub fn name(&self) -> String {
        pod_name(&self.pod).unwrap_or_else(|_| "?".into())
    }

    /// What the node knows the pod by, see [`facts::pod_uid`]; may be empty.
    pub fn uid(&self) -> &str {
        facts::pod_uid(&self.pod)
    }
}

/// The label of a Node that names its zone.
pub const ZONE: &str = "topology.kubernetes.io/zone";

/// What a source knows at one moment.
#[derive(Debug, Default)]
pub struct Snapshot {
    /// All pods that could be read.
    pub pods: Vec<SourcePod>,
    /// What is wrong with the source itself.
    pub errors: Vec<Problem>,
    /// Some pods may be in what could not be read.
    pub incomplete: bool,
    /// A pod that is missing may still run, as one does after `kubectl delete --force`: it leaves
    /// when its network namespace does.
    pub missing_may_run: bool,
}

/// Where pods come from.
pub trait PodSource {
    /// What the source knows now; none before it has spoken.
    ///
    /// # Errors
    /// Where the source as a whole cannot be read. What is wrong with a part of it is in the
    /// snapshot.
    fn snapshot(&mut self) -> Result<Option<Snapshot>>;

    /// What is wrong with reaching the source now.
    fn problems(&self) -> Vec<Problem> {
        Vec::new()
    }

    /// How often the source did not do what was asked, by what that was.
    fn errors(&self) -> BTreeMap<&'static str, u64> {
        BTreeMap::new()
    }

    /// Tells a pod what is wrong with it, and the node what is no pod's, where the source can.
    fn event(&self, _: &Problem) {}

    /// Whether Sidestep is being uninstalled, and leaves this node's mesh pods intercepted.
    fn leaves_pods_behind(&self) -> bool {
        false
    }
}
