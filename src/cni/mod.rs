//! The chained CNI plugin: a pod of a mesh is enrolled before its first process runs. The plugin is
//! this same binary, started by the container runtime; it asks the agent over a socket.

pub mod conflist;
pub mod plugin;
pub mod server;

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
};

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::{node::Sandbox, problem::Problem, service::Wanted};

/// The plugin's name in CNI configurations, and its file's in the directory of plugins.
pub const PLUGIN: &str = "sidestep-cni";
/// The supported versions of the specification, oldest first: all that libcni knows. The rules for
/// a chained plugin are the same in all. A configuration without a version has the first. Source:
/// containernetworking/cni `pkg/version/version.go`.
pub const VERSIONS: [&str; 7] = ["0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];
/// The default path of the agent's socket.
pub const SOCKET: &str = "/run/sidestep/cni.sock";

/// The treatment of a new pod while the agent does not answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum OnAgentAway {
    /// The pod does not start; the kubelet retries.
    Refuse,
    /// The pod starts, without interception until the agent finds it.
    Allow,
}

/// The settings for installing and serving the plugin.
#[derive(Debug, Clone)]
pub struct Config {
    /// Directory of CNI configurations.
    pub conf_dir: PathBuf,
    /// Directory of CNI plugins.
    pub bin_dir: PathBuf,
    /// The path of the agent's socket.
    pub socket: PathBuf,
    /// The plugin's part of the CNI configuration.
    pub settings: Settings,
}

/// The plugin's own part of the CNI configuration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Settings {
    /// The path of the agent's socket.
    pub socket: PathBuf,
    /// The treatment of a pod while no agent answers.
    #[serde(default = "refuse")]
    pub on_agent_away: OnAgentAway,
    /// The number of seconds that a pod waits for an agent.
    #[serde(default = "timeout_seconds")]
    pub timeout_seconds: u64,
    /// Namespaces whose pods start in any case.
    #[serde(default)]
    pub exclude_namespaces: Vec<String>,
}

fn refuse() -> OnAgentAway {
    OnAgentAway::Refuse
}

fn timeout_seconds() -> u64 {
    30
}

/// A request to the agent: one line of JSON, answered by one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "verb", rename_all = "lowercase")]
pub enum Request {
    /// May the pod of this new sandbox start?
    Add(Sandbox),
    /// Is the pod still enrolled as it was added?
    Check(Sandbox),
    /// The runtime removes a sandbox.
    Del {
        /// The sandbox's id.
        container: String,
    },
    /// The runtime's complete list of sandboxes.
    Gc {
        /// The sandboxes' ids.
        containers: BTreeSet<String>,
    },
    /// Which problems does this node have? `sidestep status` asks.
    Problems,
    /// Which addresses of Services should the kernel have? `sidestep status` asks.
    Services,
}

impl Request {
    /// The request's name in metrics.
    pub fn verb(&self) -> &'static str {
        match self {
            Self::Add(_) => "add",
            Self::Check(_) => "check",
            Self::Del { .. } => "del",
            Self::Gc { .. } => "gc",
            Self::Problems => "problems",
            Self::Services => "services",
        }
    }
}

/// The agent's answer.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reply {
    /// The error, if the request failed.
    pub error: Option<String>,
    /// Whether a retry may succeed soon.
    #[serde(default)]
    pub retry: bool,
    /// The node's problems, if the request asked for them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problems: Option<BTreeSet<Problem>>,
    /// The addresses of Services, if the request asked for them and the agent has read them all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub services: Option<Vec<Wanted>>,
    /// The mesh pods that are left alone, each with its mesh, if the request asked for problems.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub left_alone: Option<BTreeMap<String, String>>,
}

impl Reply {
    /// A failure with this error.
    pub fn refusal(error: String, retry: bool) -> Self {
        Self { error: Some(error), retry, ..Self::default() }
    }
}
