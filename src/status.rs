//! What is in force on this node, read from the kernel, and what the agent says that is wrong.
//! docs/status.md describes the JSON.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::IpAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::Result;
use serde::Serialize;

use crate::{
    bpf::{self, Pins},
    cni::{Request, plugin},
    problem::Problem,
    splice::{Leg, LegState},
};

/// How long an agent may take to say what is wrong.
const ANSWER: Duration = Duration::from_secs(2);

/// The state of the node's data plane.
#[derive(Debug, Serialize)]
pub struct Status {
    /// Version of this structure; moves when a field is renamed or removed.
    pub version: u32,
    /// Whether a data plane is installed at all.
    pub installed: bool,
    /// Enrolled pods, by name.
    pub pods: Vec<PodStatus>,
    /// Which connections skip the TCP/IP stack.
    pub splice: SpliceStatus,
    /// The node's hooks, one for each program.
    pub hooks: Vec<HookStatus>,
    /// Counters since the maps were made: mesh -> name -> value.
    pub counters: BTreeMap<&'static str, BTreeMap<&'static str, u64>>,
    /// What is wrong, says the agent; null: none answers.
    pub problems: Option<Vec<ProblemStatus>>,
}

/// An enrolled pod.
#[derive(Debug, Serialize)]
pub struct PodStatus {
    /// `namespace/name`.
    pub pod: String,
    /// `metadata.uid`, may be empty.
    pub uid: String,
    /// Name of its mesh.
    pub mesh: &'static str,
    /// Path of its network namespace.
    pub netns: PathBuf,
    /// The kernel's identity of the namespace, in decimal: JSON numbers can't hold all of it.
    pub netns_cookie: String,
    /// The pod's address of each family that is captured.
    pub captured: Vec<IpAddr>,
    /// Whether the inbound program is attached to the namespace.
    pub inbound: bool,
    /// Inbound listeners of the proxy that are known (of each SO_REUSEPORT group, up to 16).
    pub listeners: usize,
    /// The sidecar's DNS listener; null: the pod's DNS is not captured.
    pub dns_port: Option<u16>,
}

/// Something that is wrong.
#[derive(Debug, Serialize)]
pub struct ProblemStatus {
    /// Of which kind: docs/metrics.md has them.
    pub reason: &'static str,
    /// The pod it is about, as `namespace/name`; null: no single one.
    pub pod: Option<String>,
    /// For people.
    pub text: String,
}

/// What is spliced.
#[derive(Debug, Default, Serialize)]
pub struct SpliceStatus {
    /// By name, `sidecar` and `app`: whether it is on, and why not.
    pub legs: BTreeMap<&'static str, LegState>,
    /// Sockets that are spliced now; a connection has two.
    pub sockets: usize,
}

/// A hook of the node.
#[derive(Debug, Serialize)]
pub struct HookStatus {
    /// Name of the program.
    pub name: &'static str,
    /// Attached to a cgroup that exists.
    pub attached: bool,
    /// That cgroup's id: the inode number of its directory. 0: not attached.
    pub cgroup_id: u64,
}

/// Reads the state of the data plane below these pins, and asks the agent at `socket`, where there
/// is one, what is wrong.
///
/// # Errors
/// Where a pinned map can't be read.
pub fn status(pins: &Pins, socket: &Path) -> Result<Status> {
    let problems = problems(socket);
    if !pins.exist() {
        return Ok(Status {
            version: 1,
            installed: false,
            pods: Vec::new(),
            splice: SpliceStatus::default(),
            hooks: Vec::new(),
            counters: BTreeMap::new(),
            problems,
        });
    }
    let mut pods: Vec<PodStatus> = bpf::enrolled(pins)?
        .into_iter()
        .map(|pod| PodStatus {
            pod: pod.record.pod,
            uid: pod.record.uid,
            mesh: pod.mesh,
            netns: pod.record.netns,
            netns_cookie: pod.cookie.to_string(),
            captured: pod.captured,
            inbound: pod.inbound,
            listeners: pod.listeners,
            dns_port: pod.dns_port,
        })
        .collect();
    pods.sort_by(|a, b| a.pod.cmp(&b.pod));
    let hooks = bpf::hook_states(pins)
        .into_iter()
        .map(|hook| HookStatus {
            name: hook.name,
            attached: hook.attached,
            cgroup_id: hook.cgroup_id,
        })
        .collect();
    let (legs, sockets) = bpf::spliced(pins)?;
    let legs = Leg::ALL.iter().map(|leg| leg.name()).zip(legs).collect();
    let splice = SpliceStatus { legs, sockets };
    let counters = bpf::counters(pins)?;
    Ok(Status { version: 1, installed: true, pods, splice, hooks, counters, problems })
}

/// What an agent says that listens there.
fn problems(socket: &Path) -> Option<Vec<ProblemStatus>> {
    let reply = plugin::ask(socket, &Request::Problems, ANSWER).ok()?;
    let told = |problem: Problem| ProblemStatus {
        reason: problem.reason.name(),
        pod: problem.pod.map(|(name, _)| name),
        text: problem.text,
    };
    Some(reply.problems?.into_iter().map(told).collect())
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for problem in self.problems.iter().flatten() {
            writeln!(f, "PROBLEM {}: {}", problem.reason, problem.text)?;
        }
        if !self.installed {
            return writeln!(f, "Nothing is installed: no agent has run on these pins.");
        }
        writeln!(f, "Pods enrolled: {}", self.pods.len())?;
        let width = self.pods.iter().map(|pod| pod.pod.len()).max().unwrap_or(0);
        for pod in &self.pods {
            let ips: Vec<String> = pod.captured.iter().map(IpAddr::to_string).collect();
            writeln!(
                f,
                "  {:width$}  {:8}  {}  inbound {}, {}{}",
                pod.pod,
                pod.mesh,
                ips.join(" "),
                if pod.inbound { "attached" } else { "NOT ATTACHED" },
                match pod.listeners {
                    0 => "proxy does not listen".to_owned(),
                    1 => "1 listener".to_owned(),
                    n => format!("{n} listeners"),
                },
                pod.dns_port.map(|port| format!(", DNS to {port}")).unwrap_or_default(),
            )?;
        }
        let attached = self.hooks.iter().filter(|hook| hook.attached).count();
        writeln!(f, "Hooks attached: {attached} of {}", self.hooks.len())?;
        for hook in self.hooks.iter().filter(|hook| !hook.attached) {
            writeln!(f, "  NOT ATTACHED: {}", hook.name)?;
        }
        writeln!(f, "Spliced sockets: {}", self.splice.sockets)?;
        for (name, leg) in &self.splice.legs {
            let line = format!("  {name:8} {:4} {}", if leg.on { "on" } else { "off" }, leg.why);
            writeln!(f, "{}", line.trim_end())?;
        }
        write!(f, "{:24}", "Counters")?;
        for mesh in self.counters.keys() {
            write!(f, "{mesh:>14}")?;
        }
        writeln!(f)?;
        let names: BTreeSet<_> = self.counters.values().flat_map(BTreeMap::keys).collect();
        for name in names {
            write!(f, "  {name:22}")?;
            for counters in self.counters.values() {
                write!(f, "{:>14}", counters.get(name).copied().unwrap_or(0))?;
            }
            writeln!(f)?;
        }
        Ok(())
    }
}
