//! The chained CNI plugin: a pod of a mesh is enrolled before its first process runs. The plugin
//! is this same binary, started by the container runtime; it asks the agent over a socket.

pub mod conflist;
pub mod plugin;
pub mod server;

use std::{collections::BTreeSet, path::PathBuf};

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::{node::Sandbox, problem::Problem};

/// The plugin's name in CNI configurations, and its file's in the directory of plugins.
pub const PLUGIN: &str = "sidestep-cni";
/// The versions of the specification that the plugin takes, oldest first: all that libcni knows.
/// What they ask of a chained plugin is the same in all. A configuration that names none has the
/// first. Source: containernetworking/cni `pkg/version/version.go`.
pub const VERSIONS: [&str; 7] = ["0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];
/// Where the agent listens unless a flag says otherwise.
pub const SOCKET: &str = "/run/sidestep/cni.sock";

/// What happens to a new pod while the agent does not answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum OnAgentAway {
    /// It does not start; the kubelet retries.
    Refuse,
    /// It starts, without interception until the agent finds it.
    Allow,
}

/// How the agent installs and serves the plugin.
#[derive(Debug, Clone)]
pub struct Config {
    /// Directory of CNI configurations.
    pub conf_dir: PathBuf,
    /// Directory of CNI plugins.
    pub bin_dir: PathBuf,
    /// Where the agent listens.
    pub socket: PathBuf,
    /// What the plugin is told.
    pub settings: Settings,
}

/// The plugin's own part of its configuration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Settings {
    /// Where the agent listens.
    pub socket: PathBuf,
    /// What becomes of a pod while no agent answers.
    #[serde(default = "refuse")]
    pub on_agent_away: OnAgentAway,
    /// Seconds that a pod waits for an agent.
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

/// What the plugin asks the agent: one line of JSON, answered by one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "verb", rename_all = "lowercase")]
pub enum Request {
    /// A sandbox was made: may it start?
    Add(Sandbox),
    /// Is it as it was when it was added?
    Check(Sandbox),
    /// It is being removed.
    Del {
        /// Its id.
        container: String,
    },
    /// These are all that there are.
    Gc {
        /// Their ids.
        containers: BTreeSet<String>,
    },
    /// What is wrong on this node? `sidestep status` asks.
    Problems,
}

impl Request {
    /// Its name in metrics.
    pub fn verb(&self) -> &'static str {
        match self {
            Self::Add(_) => "add",
            Self::Check(_) => "check",
            Self::Del { .. } => "del",
            Self::Gc { .. } => "gc",
            Self::Problems => "problems",
        }
    }
}

/// The agent's answer.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reply {
    /// What is wrong; none: nothing.
    pub error: Option<String>,
    /// It may be right in a moment.
    #[serde(default)]
    pub retry: bool,
    /// What is wrong on this node, where that was the question.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problems: Option<BTreeSet<Problem>>,
}

impl Reply {
    /// Something is wrong.
    pub fn refusal(error: String, retry: bool) -> Self {
        Self { error: Some(error), retry, problems: None }
    }
}
