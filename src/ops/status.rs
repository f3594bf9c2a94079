//! What is in force on this node, read from the kernel, and what the agent says that is wrong.
//! docs/status.md describes the JSON.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Result, anyhow, bail};
use serde::Serialize;

use crate::{
    cni::{Request, plugin},
    dataplane::{self, Pins},
    mesh::mode::Mode,
    problem::Problem,
    service::{Frontend, Wanted},
    splice::{Leg, LegState},
    text::beside,
};

/// The time limit for the agent's answer.
const ANSWER: Duration = Duration::from_secs(2);

/// Longer names of pods get a line of their own.
const NAME: usize = 34;
/// The width of the column of counter names.
const COUNTER: usize = 24;

/// The state of the node's data plane.
#[derive(Debug, Serialize)]
pub struct Status {
    /// The version of this structure; it changes when a field is renamed or removed.
    pub version: u32,
    /// Whether a data plane is installed at all.
    pub installed: bool,
    /// Enrolled pods, by name.
    pub pods: Vec<PodStatus>,
    /// The mesh pods that are left alone (mode `off`), each with its mesh; null without an agent that
    /// runs with --cni.
    pub left_alone: Option<BTreeMap<String, String>>,
    /// Which connections skip the TCP/IP stack.
    pub splice: SpliceStatus,
    /// The node's hooks, one for each program.
    pub hooks: Vec<HookStatus>,
    /// Counters since the maps were made: mesh -> name -> value.
    pub counters: BTreeMap<&'static str, BTreeMap<&'static str, u64>>,
    /// Counters of Services since the maps were made: name -> value.
    pub service_counters: BTreeMap<&'static str, u64>,
    /// The addresses of Services; only if they are asked for.
    #[serde(flatten)]
    pub services: Option<Services>,
    /// The problems that the agent reports; null without an agent.
    pub problems: Option<Vec<ProblemStatus>>,
}

/// The addresses of Services that are shown.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Shown {
    /// None.
    None,
    /// All that the kernel translates.
    All,
    /// Those of this Service, `namespace/name`.
    One(String),
}

impl Shown {
    /// Whether an address of this Service's port is shown.
    fn has(&self, port: Option<&str>) -> bool {
        match self {
            Self::None => false,
            Self::All => true,
            Self::One(service) => {
                let rest = port.and_then(|port| port.strip_prefix(service.as_str()));
                rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(':'))
            }
        }
    }
}

/// The addresses of Services.
#[derive(Debug, Default, Serialize)]
pub struct Services {
    /// In the kernel's maps.
    pub services: Vec<ServiceStatus>,
    /// Where the kernel's maps are not what the agent wants them to be; null if it did not say.
    pub service_drift: Option<Vec<Drift>>,
    /// Why it did not.
    #[serde(skip)]
    pub unnamed: Option<String>,
}

/// An address of which the kernel's maps and the agent say different things.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Drift {
    /// The dialled address: `IP:port`.
    pub address: SocketAddr,
    /// The protocol, TCP or UDP.
    pub protocol: String,
    /// The port of the Service that should have it, `namespace/name:port`; null: none should.
    pub service: Option<String>,
    /// The endpoints in the kernel; null: the address is not translated.
    pub kernel: Option<BTreeSet<SocketAddr>>,
    /// The endpoints that the agent wants there; null: it wants no such address.
    pub agent: Option<BTreeSet<SocketAddr>>,
}

/// An address that is translated to endpoints.
#[derive(Debug, Serialize)]
pub struct ServiceStatus {
    /// The Service's port, `namespace/name:port`; null if no agent says it.
    pub service: Option<String>,
    /// The dialled address: `IP:port`.
    pub address: SocketAddr,
    /// The protocol, TCP or UDP.
    pub protocol: String,
    /// The endpoints; if the list is empty, connections are refused.
    pub backends: BTreeSet<SocketAddr>,
}

/// An enrolled pod.
#[derive(Debug, Serialize)]
pub struct PodStatus {
    /// The pod, as `namespace/name`.
    pub pod: String,
    /// `metadata.uid`, may be empty.
    pub uid: String,
    /// The name of its mesh.
    pub mesh: &'static str,
    /// `instead`: Sidestep decides everything. `beside`: the mesh's own rules do what it leaves.
    pub mode: &'static str,
    /// The path of its network namespace.
    pub netns: PathBuf,
    /// The kernel's identity of the namespace, in decimal: JSON numbers cannot hold all of it.
    pub netns_cookie: String,
    /// The pod's address of each family that is captured.
    pub captured: Vec<IpAddr>,
    /// Whether the inbound program is attached to the namespace.
    pub inbound: bool,
    /// The number of known inbound listeners of the proxy (of each SO_REUSEPORT group, up to 16).
    pub listeners: usize,
    /// The port of the sidecar's DNS listener; null if the pod's DNS is not captured.
    pub dns_port: Option<u16>,
}

/// A problem.
#[derive(Debug, Serialize)]
pub struct ProblemStatus {
    /// Of which kind: docs/metrics.md has them.
    pub reason: &'static str,
    /// The pod concerned, as `namespace/name`; null if it is not a single one.
    pub pod: Option<String>,
    /// A sentence for people.
    pub text: String,
}

/// The state of splicing.
#[derive(Debug, Default, Serialize)]
pub struct SpliceStatus {
    /// The legs by name, `sidecar` and `app`: whether each is on, and why not.
    pub legs: BTreeMap<&'static str, LegState>,
    /// The number of spliced sockets; a connection has two.
    pub sockets: usize,
}

/// A hook of the node.
#[derive(Debug, Serialize)]
pub struct HookStatus {
    /// The name of the program.
    pub name: &'static str,
    /// Whether it is attached to an existing cgroup.
    pub attached: bool,
    /// That cgroup's id: the inode number of its directory. 0: not attached.
    pub cgroup_id: u64,
}

/// Reads the state of the data plane below these pins, and asks the agent at `socket`, where there
/// is one, what is wrong.
///
/// # Errors
/// If a pinned map cannot be read, or the one Service that is asked for is not translated.
pub fn status(pins: &Pins, socket: &Path, shown: &Shown) -> Result<Status> {
    let (problems, left_alone) = ask(socket).unzip();
    if !pins.exist() {
        if let Shown::One(service) = shown {
            bail!("Service {service}: nothing is installed: no agent has used these pins");
        }
        return Ok(Status {
            version: 1,
            installed: false,
            pods: Vec::new(),
            left_alone,
            splice: SpliceStatus::default(),
            hooks: Vec::new(),
            counters: BTreeMap::new(),
            service_counters: BTreeMap::new(),
            services: (*shown != Shown::None).then(Services::default),
            problems,
        });
    }
    let mut pods: Vec<PodStatus> = dataplane::enrolled(pins)?
        .into_iter()
        .map(|pod| PodStatus {
            pod: pod.record.pod,
            uid: pod.record.uid,
            mesh: pod.mesh,
            mode: if pod.beside { Mode::Beside } else { Mode::Instead }.name(),
            netns: pod.record.netns,
            netns_cookie: pod.cookie.to_string(),
            captured: pod.captured,
            inbound: pod.inbound,
            listeners: pod.listeners,
            dns_port: pod.dns_port,
        })
        .collect();
    pods.sort_by(|a, b| a.pod.cmp(&b.pod));
    let hooks = dataplane::hook_states(pins)
        .into_iter()
        .map(|hook| HookStatus {
            name: hook.name,
            attached: hook.attached,
            cgroup_id: hook.cgroup_id,
        })
        .collect();
    let (legs, sockets) = dataplane::spliced(pins)?;
    let legs = Leg::ALL.iter().map(|leg| leg.name()).zip(legs).collect();
    let splice = SpliceStatus { legs, sockets };
    let counters = dataplane::counters(pins)?;
    let service_counters = dataplane::service_counters(pins)?;
    let services = match shown {
        Shown::None => None,
        shown => Some(services(pins, socket, shown, problems.as_deref().unwrap_or_default())?),
    };
    Ok(Status {
        version: 1,
        installed: true,
        pods,
        left_alone,
        splice,
        hooks,
        counters,
        service_counters,
        services,
        problems,
    })
}

/// What the kernel's maps hold.
type Held = BTreeMap<Frontend, BTreeSet<SocketAddr>>;

/// Reads the addresses of Services from the kernel's maps, and compares them with what the agent
/// wants. An agent that changes the maps meanwhile causes no difference that two looks would see.
fn services(
    pins: &Pins,
    socket: &Path,
    shown: &Shown,
    problems: &[ProblemStatus],
) -> Result<Services> {
    let look = || -> Result<(Result<Vec<Wanted>>, Held)> {
        Ok((wanted(socket), dataplane::services(pins)?))
    };
    let (wanted, held) = look()?;
    let wanted = match (wanted, shown) {
        (Ok(wanted), _) => wanted,
        (Err(error), Shown::One(service)) => {
            return Err(error.context(format!("cannot tell which addresses Service {service} has")));
        }
        (Err(error), _) => {
            let services = held
                .into_iter()
                .map(|(frontend, backends)| ServiceStatus::new(frontend, None, backends));
            let unnamed = Some(format!("{error:#}"));
            return Ok(Services { services: services.collect(), service_drift: None, unnamed });
        }
    };
    let mut drift = drift(&wanted, &held);
    if !drift.is_empty() {
        let (again, held) = look()?;
        let again = self::drift(&again?, &held);
        drift.retain(|one| again.contains(one));
    }
    drift.retain(|one| shown.has(one.service.as_deref()));
    let names: BTreeMap<Frontend, String> =
        wanted.into_iter().map(|one| (one.frontend, one.port)).collect();
    let services: Vec<ServiceStatus> = held
        .into_iter()
        .map(|(frontend, backends)| {
            ServiceStatus::new(frontend, names.get(&frontend).cloned(), backends)
        })
        .filter(|one| shown.has(one.service.as_deref()))
        .collect();
    if let Shown::One(service) = shown
        && services.is_empty()
        && drift.is_empty()
    {
        let of_it = format!("Service {service}: ");
        let said = problems.iter().map(|problem| &problem.text).filter(|t| t.contains(&of_it));
        let why: String = said.map(|text| format!("\n{text}")).collect();
        bail!(
            "no address of a Service {service} is translated: there is no such Service, or it has \
             no virtual IP, or another proxy's label, or its addresses are left to kube-proxy{why}"
        );
    }
    Ok(Services { services, service_drift: Some(drift), unnamed: None })
}

/// Asks the agent that listens there which addresses of Services it wants in the kernel.
fn wanted(socket: &Path) -> Result<Vec<Wanted>> {
    let reply = plugin::ask(socket, &Request::Services, ANSWER)?;
    let why = reply.error.unwrap_or_else(|| {
        "the agent does not translate Services, or has not read all of them yet".into()
    });
    reply.services.ok_or_else(|| anyhow!(why))
}

/// Where the maps do not hold what the agent wants.
fn drift(wanted: &[Wanted], held: &Held) -> Vec<Drift> {
    let wanted: BTreeMap<Frontend, &Wanted> =
        wanted.iter().map(|one| (one.frontend, one)).collect();
    let all: BTreeSet<&Frontend> = wanted.keys().chain(held.keys()).collect();
    let compare = |frontend: &Frontend| {
        let (agent, kernel) = (wanted.get(frontend), held.get(frontend));
        let service = agent.map(|wanted| wanted.port.clone());
        let agent = agent.map(|wanted| &wanted.backends);
        (agent != kernel).then(|| Drift {
            address: SocketAddr::new(frontend.ip, frontend.port),
            protocol: frontend.protocol.to_string(),
            service,
            kernel: kernel.cloned(),
            agent: agent.cloned(),
        })
    };
    all.into_iter().filter_map(compare).collect()
}

impl ServiceStatus {
    fn new(frontend: Frontend, service: Option<String>, backends: BTreeSet<SocketAddr>) -> Self {
        let address = SocketAddr::new(frontend.ip, frontend.port);
        Self { service, address, protocol: frontend.protocol.to_string(), backends }
    }
}

impl Services {
    fn text(&self) -> String {
        let endpoints = |backends: &BTreeSet<SocketAddr>| -> String {
            if backends.is_empty() {
                return "no endpoints: connections are refused".into();
            }
            backends.iter().map(SocketAddr::to_string).collect::<Vec<_>>().join(", ")
        };
        let label = |address: &SocketAddr, protocol: &str, service: &Option<String>| {
            let service = service.as_ref().map(|name| format!(" {name}")).unwrap_or_default();
            format!("  {address} {protocol}{service}  ")
        };
        let mut text = format!("Addresses of Services: {}\n", self.services.len());
        for one in &self.services {
            let label = label(&one.address, &one.protocol, &one.service);
            text += &beside(&label, &endpoints(&one.backends));
        }
        if let Some(why) = &self.unnamed {
            text += &beside("Names and differences are unknown: ", why);
        }
        if let Some(drift) = &self.service_drift {
            text += &format!("Addresses that differ from what the agent wants: {}\n", drift.len());
            for one in drift {
                let side = |found: &Option<BTreeSet<SocketAddr>>| {
                    found.as_ref().map_or("not translated".into(), endpoints)
                };
                let both = format!("kernel: {}; agent: {}", side(&one.kernel), side(&one.agent));
                text += &beside(&label(&one.address, &one.protocol, &one.service), &both);
            }
        }
        text
    }
}

/// Asks the agent that listens there for its problems, and for the mesh pods that it leaves alone.
fn ask(socket: &Path) -> Option<(Vec<ProblemStatus>, BTreeMap<String, String>)> {
    let reply = plugin::ask(socket, &Request::Problems, ANSWER).ok()?;
    let told = |problem: Problem| ProblemStatus {
        reason: problem.reason.name(),
        pod: problem.pod.map(|(name, _)| name),
        text: problem.text,
    };
    let problems = reply.problems?.into_iter().map(told).collect();
    Some((problems, reply.left_alone.unwrap_or_default()))
}

impl Status {
    /// The report for people, in lines of at most [`crate::text::WIDTH`] columns.
    pub fn text(&self) -> String {
        let mut text = String::new();
        for problem in self.problems.iter().flatten() {
            text += &beside("", &format!("PROBLEM {}: {}", problem.reason, problem.text));
        }
        if !self.installed {
            return text + "Nothing is installed: no agent has used these pins.\n";
        }
        text += &format!("Pods enrolled: {}\n", self.pods.len());
        let names = self.pods.iter().map(|pod| pod.pod.len());
        let width = names.filter(|width| *width <= NAME).max().unwrap_or(0);
        for pod in &self.pods {
            let label = format!("  {:width$}  {:8}  ", pod.pod, pod.mesh);
            let mut about: Vec<String> = pod.captured.iter().map(IpAddr::to_string).collect();
            if pod.mode == Mode::Beside.name() {
                about.push("outbound alone, beside the mesh's own rules".into());
                text += &beside(&label, &about.join(", "));
                continue;
            }
            about
                .push(if pod.inbound { "inbound attached" } else { "inbound NOT ATTACHED" }.into());
            about.push(match pod.listeners {
                0 => "proxy does not listen".to_owned(),
                1 => "1 listener".to_owned(),
                n => format!("{n} listeners"),
            });
            about.extend(pod.dns_port.map(|port| format!("DNS to {port}")));
            text += &beside(&label, &about.join(", "));
        }
        for (pod, mesh) in self.left_alone.iter().flatten() {
            text += &beside(&format!("  {pod:width$}  {mesh:8}  "), "left alone (mode off)");
        }
        let attached = self.hooks.iter().filter(|hook| hook.attached).count();
        text += &format!("Hooks attached: {attached} of {}\n", self.hooks.len());
        for hook in self.hooks.iter().filter(|hook| !hook.attached) {
            text += &beside("  NOT ATTACHED: ", hook.name);
        }
        text += &format!("Spliced sockets: {}\n", self.splice.sockets);
        for (name, leg) in &self.splice.legs {
            text +=
                &beside(&format!("  {name:8} {:4} ", if leg.on { "on" } else { "off" }), &leg.why);
        }
        text += &self.counters_text();
        if self.service_counters.values().any(|count| *count > 0) {
            text += "Services\n";
            for (name, count) in &self.service_counters {
                let _ = writeln!(text, "{:COUNTER$}{count:>14}", format!("  {name}"));
            }
        }
        if let Some(services) = &self.services {
            text += &services.text();
        }
        text
    }

    /// A column for each mesh.
    fn counters_text(&self) -> String {
        let mut text = format!("{:COUNTER$}", "Counters");
        let values = self.counters.values().flat_map(BTreeMap::values);
        let width = values.max().map_or(0, |most| most.to_string().len() + 2).max(14);
        // Writing to a String does not fail.
        for mesh in self.counters.keys() {
            let _ = write!(text, "{mesh:>width$}");
        }
        text.push('\n');
        let names: BTreeSet<_> = self.counters.values().flat_map(BTreeMap::keys).collect();
        for name in names {
            let _ = write!(text, "{:COUNTER$}", format!("  {name}"));
            for counters in self.counters.values() {
                let _ = write!(text, "{:>width$}", counters.get(name).copied().unwrap_or(0));
            }
            text.push('\n');
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{mesh::MESHES, text::WIDTH};

    fn pod(name: String) -> PodStatus {
        PodStatus {
            pod: name,
            uid: "0f4cf7ba-6b2a-4e25-a0f8-54d3b8b1f0c5".into(),
            mesh: "linkerd",
            mode: "instead",
            netns: "/var/run/netns/cni-0f4cf7ba-6b2a-4e25-a0f8-54d3b8b1f0c5".into(),
            netns_cookie: u64::MAX.to_string(),
            captured: ["192.168.100.100", "fd00:1111:2222:3333:4444:5555:6666:7777"]
                .map(|ip| ip.parse().expect("an address"))
                .into(),
            inbound: false,
            listeners: 16,
            dns_port: Some(15053),
        }
    }

    fn counters() -> BTreeMap<&'static str, u64> {
        ["direct", "captured_outbound", "splice_kept_by_memory"].map(|name| (name, u64::MAX)).into()
    }

    #[test]
    fn no_line_is_too_long_and_nothing_is_cut_off() {
        let longest = format!("{}/{}", "n".repeat(63), "p".repeat(253));
        let text = "a-word-of-an-annotation,".repeat(60);
        let off = LegState { on: false, why: "the self-test could not run ".repeat(10) };
        let port = format!("{}/{}:{}", "n".repeat(63), "s".repeat(63), "p".repeat(63));
        let address = "[fd00:1111:2222:3333:4444:5555:6666:7777]:65535".parse().expect("it");
        let backends: BTreeSet<SocketAddr> =
            (0..9).map(|n| SocketAddr::new([10, 244, 100, n].into(), 8080)).collect();
        let status = Status {
            version: 1,
            installed: true,
            pods: vec![pod("shop/cart".into()), pod(longest.clone())],
            left_alone: Some([(longest.clone(), "istio".to_owned())].into()),
            splice: SpliceStatus {
                legs: Leg::ALL.iter().map(|leg| (leg.name(), off.clone())).collect(),
                sockets: usize::MAX,
            },
            hooks: vec![HookStatus { name: "find_listeners", attached: false, cgroup_id: 0 }],
            counters: MESHES.iter().map(|mesh| (mesh.name, counters())).collect(),
            service_counters: BTreeMap::from([("service_missed", u64::MAX)]),
            services: Some(Services {
                services: vec![ServiceStatus {
                    service: Some(port.clone()),
                    address,
                    protocol: "UDP".into(),
                    backends: backends.clone(),
                }],
                service_drift: Some(vec![Drift {
                    address,
                    protocol: "UDP".into(),
                    service: Some(port.clone()),
                    kernel: Some(backends),
                    agent: None,
                }]),
                unnamed: Some("a word ".repeat(30)),
            }),
            problems: Some(vec![ProblemStatus {
                reason: "InboundNotIntercepted",
                pod: Some(longest.clone()),
                text: text.clone(),
            }]),
        };
        let printed = status.text();
        let long: Vec<&str> = printed.lines().filter(|line| line.len() > WIDTH).collect();
        assert!(long.is_empty(), "{long:#?}");
        let joined = printed.replace(['\n', ' '], "");
        for whole in [longest, port, text, off.why.replace(' ', "")] {
            assert!(joined.contains(&whole), "{printed}");
        }
        let last = u64::MAX.to_string();
        let is_whole = |line: &str| line.contains("shop/cart") && line.contains("192.168.100.100");
        assert!(printed.lines().any(is_whole), "{printed}");
        assert!(printed.contains(&format!(" {last}  {last}")), "columns are apart: {printed}");
    }

    #[test]
    fn drift_is_what_the_two_do_not_say_alike() {
        let frontend = |port| Frontend {
            ip: [10, 96, 0, 1].into(),
            port,
            protocol: crate::service::Protocol::Tcp,
        };
        let at = |n: u8| SocketAddr::new([10, 0, 0, n].into(), 8080);
        let wanted = |port, backends: &[SocketAddr]| Wanted {
            frontend: frontend(port),
            port: format!("shop/web:p{port}"),
            backends: backends.iter().copied().collect(),
        };
        let wanted = [wanted(1, &[at(1)]), wanted(2, &[at(1), at(2)]), wanted(3, &[])];
        let held = |port, backends: &[SocketAddr]| {
            (frontend(port), backends.iter().copied().collect::<BTreeSet<_>>())
        };
        let held: Held = [held(1, &[at(1)]), held(2, &[at(1)]), held(4, &[at(4)])].into();
        let found = drift(&wanted, &held);
        let brief = |one: &Drift| {
            let count = |side: &Option<BTreeSet<SocketAddr>>| side.as_ref().map(BTreeSet::len);
            (one.address.port(), one.service.clone(), count(&one.kernel), count(&one.agent))
        };
        let expected = [
            (2, Some("shop/web:p2".to_owned()), Some(1), Some(2)),
            (3, Some("shop/web:p3".to_owned()), None, Some(0)),
            (4, None, Some(1), None),
        ];
        assert_eq!(found.iter().map(brief).collect::<Vec<_>>(), expected);
    }

    #[test]
    fn one_service_is_shown_with_all_of_its_ports_and_no_other() {
        let one = Shown::One("shop/web".into());
        for (port, is_shown) in [
            (Some("shop/web"), true),
            (Some("shop/web:http"), true),
            (Some("shop/web2:http"), false),
            (Some("shop/we:http"), false),
            (None, false),
        ] {
            assert_eq!(one.has(port), is_shown, "{port:?}");
        }
    }
}
