//! What the container runtime tells of a pod.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// A pod's sandbox, as the container runtime made it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sandbox {
    /// Its id.
    pub container: String,
    /// Its network namespace.
    pub netns: PathBuf,
    /// The pod's namespace.
    pub namespace: String,
    /// The pod's name.
    pub pod: String,
    /// The pod's uid, where the runtime tells it.
    pub uid: Option<String>,
}
