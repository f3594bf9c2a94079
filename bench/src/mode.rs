//! The ways between two pods that are compared.

use std::fmt::{self, Display};

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// How connections get to the sidecars, if at all.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, ValueEnum, Serialize, Deserialize,
)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// No sidecar
    Direct,
    /// The application dials a sidecar that has a fixed upstream, and so does that sidecar: the
    /// limit of what an interception can reach
    Explicit,
    /// Istio's rules
    Iptables,
    /// What the same plugin installs with `--native-nftables`
    Nftables,
    /// Sidestep with --splice off
    Off,
    /// Sidestep with --splice sidecar
    Sidecar,
    /// Sidestep with --splice all
    All,
}

impl Mode {
    /// All modes.
    pub const EVERY: [Self; 7] = [
        Self::Direct,
        Self::Explicit,
        Self::Iptables,
        Self::Nftables,
        Self::Off,
        Self::Sidecar,
        Self::All,
    ];

    /// What the agent's `--splice` is, where there is an agent.
    pub fn splice(self) -> Option<&'static str> {
        match self {
            Self::Off => Some("off"),
            Self::Sidecar => Some("sidecar"),
            Self::All => Some("all"),
            _ => None,
        }
    }

    /// How many sockets of one connection through two sidecars are spliced.
    pub fn spliced(self) -> usize {
        match self {
            Self::Sidecar => 2,
            Self::All => 6,
            _ => 0,
        }
    }
}

impl Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Direct => "direct",
            Self::Explicit => "explicit",
            Self::Iptables => "iptables",
            Self::Nftables => "nftables",
            Self::Off => "off",
            Self::Sidecar => "sidecar",
            Self::All => "all",
        })
    }
}

/// What passes the bytes on.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, ValueEnum, Serialize, Deserialize,
)]
#[serde(rename_all = "lowercase")]
pub enum Proxy {
    /// A bare relay of TCP
    Relay,
    /// Envoy's tcp_proxy
    Envoy,
    /// Envoy's HTTP connection manager
    Http,
}

impl Display for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Relay => "relay",
            Self::Envoy => "envoy",
            Self::Http => "http",
        })
    }
}
