//! Real test parts for Sidestep: pods as network namespaces on a bridge, servers and clients
//! with a chosen uid, a real Envoy with listeners shaped like Istio's, Istio's own iptables
//! rules, a load generator, and a handle on the agent's binary.
//!
//! Everything a [`Lab`] makes has the process id in its name and is removed when the lab is
//! dropped, also by a panic. What a killed run left over is found and removed by [`teardown`].
//! It needs root, `ip`, `nsenter`, `setpriv` and, for some parts, `iptables`, `nft` and Envoy.
#![forbid(unsafe_code)]

pub mod agent;
pub mod calls;
mod cgroup;
mod client;
mod cmd;
pub mod envoy;
pub mod iptables;
mod lab;
pub mod load;
mod netns;
pub mod pattern;
mod pod;
mod process;
mod seen;
mod server;
pub mod teardown;
mod wait;

use std::env;
use std::path::PathBuf;

pub use agent::Agent;
pub use cgroup::{ChildCgroup, MemoryCgroups};
pub use client::{Answer, ask, connect, http_get};
pub use cmd::feed;
pub use envoy::{Envoy, EnvoyOpts, Twin};
pub use lab::Lab;
pub use pod::{Pod, PodNet};
pub use process::Process;
pub use seen::Seen;
pub use server::{ServeOpts, Server, Talk};
pub use wait::{interrupted, slowdown, stop_on_signals, wait_for, wait_until};

/// The uid and gid of the lab's applications.
pub const APP: u32 = 1000;
/// The uid and gid of Istio's sidecar.
pub const PROXY: u32 = 1337;
/// The port that Istio's sidecar takes outbound connections on.
pub const OUTBOUND: u16 = 15001;
/// The port that Istio's sidecar takes inbound connections on.
pub const INBOUND: u16 = 15006;
/// The port that the sidecars of Istio and Kuma answer DNS on.
pub const DNS: u16 = 15053;

/// What `make deps` and the cluster's parts are below: $SIDESTEP_LAB_DIR, by default
/// /var/lib/sidestep-lab.
pub fn lab_dir() -> PathBuf {
    env::var_os("SIDESTEP_LAB_DIR").unwrap_or_else(|| "/var/lib/sidestep-lab".into()).into()
}
