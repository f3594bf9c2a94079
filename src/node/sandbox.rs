//! The container runtime's description of a pod.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// A pod's sandbox, as the container runtime made it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sandbox {
    /// The sandbox's id.
    pub container: String,
    /// The path of its network namespace.
    pub netns: PathBuf,
    /// The Kubernetes namespace of its pod.
    pub namespace: String,
    /// The pod's name.
    pub pod: String,
    /// The pod's uid, if the runtime passes it.
    pub uid: Option<String>,
}
