//! The command line.

use std::{io::Write, net::SocketAddr, path::PathBuf, process::ExitCode, time::Duration};

use anyhow::{Context, Result};
use clap::{ArgGroup, Args, Parser, Subcommand, ValueEnum};

use crate::{
    agent::{self, Cluster, SourceConfig},
    bpf, bpffs, check,
    cni::{self, OnAgentAway, conflist},
    source::kubernetes::{self, OnUninstall},
    splice, status,
    telemetry::{self, LogFormat},
};

/// Takes over a service mesh's traffic interception from iptables, with eBPF at the socket
/// layer.
#[derive(Debug, Parser)]
#[command(version, max_term_width = 100)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the agent: enroll the node's mesh pods and keep them enrolled.
    ///
    /// Ends on SIGTERM or SIGINT and leaves the data plane in force; `sidestep unload` takes it
    /// away. A new agent adopts what an earlier one left.
    Run(Box<Run>),
    /// Say what this kernel and machine offer and what is missing; exits with 1 if anything is.
    Check(CheckArgs),
    /// Show the enrolled pods, the hooks and the counters, from the kernel alone.
    ///
    /// Needs no running agent; one that runs with --cni is asked what is wrong on this node as
    /// well. The JSON is described in docs/status.md.
    Status(StatusArgs),
    /// Take every link, program, map and pin away, and the CNI plugin out of the node's
    /// configuration. Refuses while an agent runs.
    ///
    /// Mesh pods that run are not intercepted from then on: their traffic gets past their sidecars.
    Unload(Unload),
}

#[derive(Debug, Args)]
struct Paths {
    /// Directory for pins, on a bpffs.
    #[arg(long, value_name = "DIR", default_value = bpffs::DEFAULT_ROOT, env = "SIDESTEP_BPFFS")]
    bpffs: PathBuf,
    /// Name of the maps' layout: for tests of upgrades to a build with another one.
    #[arg(long, hide = true, default_value = bpf::LAYOUT, value_parser = layout)]
    layout: String,
}

impl Paths {
    fn pins(&self) -> Result<bpf::Pins> {
        bpffs::pins(&self.bpffs, &self.layout)
    }
}

/// A `v` and a number.
fn layout(text: &str) -> Result<String, String> {
    let number = text.strip_prefix('v').and_then(|number| number.parse::<u16>().ok());
    number.map(|_| text.to_owned()).ok_or_else(|| "a v and a number expected".into())
}

#[derive(Debug, Args)]
struct CgroupArgs {
    /// Cgroup v2 directory whose processes are looked at [default: the root of the hierarchy].
    #[arg(long, value_name = "DIR", env = "SIDESTEP_CGROUP")]
    cgroup: Option<PathBuf>,
}

#[derive(Debug, Args)]
#[command(group(ArgGroup::new("source").required(true).args(["pods", "kubernetes"])))]
struct Run {
    /// Directory of Kubernetes v1 Pod manifests (*.yaml, *.yml, *.json), watched for changes.
    ///
    /// The pods' network namespaces come from the annotation sidestep.io/netns, an absolute path
    /// such as /run/netns/NAME.
    #[arg(long, value_name = "DIR")]
    pods: Option<PathBuf>,
    /// This node's pods come from the API server.
    ///
    /// Their network namespaces come from the CNI plugin (--cni), or are found by the pods'
    /// processes.
    #[arg(long, requires = "node_name")]
    kubernetes: bool,
    /// Which connections within the node skip the TCP/IP stack.
    ///
    /// A self-test at start tries what is known to go wrong with such sockets on this kernel;
    /// `sidestep check` tells what it finds, `sidestep status` what is on.
    #[arg(long, value_name = "LEGS", value_enum, default_value = "auto", env = "SIDESTEP_SPLICE")]
    splice: splice::Mode,
    /// Seconds after which a message of a spliced connection goes by TCP, in each direction.
    ///
    /// Its packets are what connection tracking and network policies see: a policy that forbids the
    /// connection stops it within this time, and conntrack does not forget it while it talks.
    #[arg(
        long,
        value_name = "SECONDS",
        value_parser = clap::value_parser!(u32).range(1..),
        default_value = "1",
        env = "SIDESTEP_SPLICE_REFRESH"
    )]
    splice_refresh: u32,
    /// Serve /healthz, /readyz and /metrics on this address, such as 127.0.0.1:9465.
    #[arg(long, value_name = "ADDRESS:PORT", env = "SIDESTEP_HTTP")]
    http: Option<SocketAddr>,
    #[command(flatten)]
    cgroup: CgroupArgs,
    #[command(flatten)]
    paths: Paths,
    /// How log lines look.
    #[arg(long, value_name = "FORMAT", value_enum, default_value = "human")]
    log_format: LogFormat,
    #[command(flatten)]
    cluster: ClusterArgs,
    #[command(flatten)]
    cni: Cni,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "With --kubernetes")]
struct ClusterArgs {
    /// This node's name in the API server (spec.nodeName of its pods).
    #[arg(long, value_name = "NAME", env = "SIDESTEP_NODE_NAME")]
    node_name: Option<String>,
    /// How to reach the API server [default: the service account of the agent's own pod].
    #[arg(long, value_name = "FILE", env = "SIDESTEP_KUBECONFIG", requires = "kubernetes")]
    kubeconfig: Option<PathBuf>,
    /// The node's own procfs.
    #[arg(long, value_name = "DIR", env = "SIDESTEP_PROC", default_value = "/proc")]
    proc: PathBuf,
    /// Where the container runtime keeps sandboxes' network namespaces by mounts: of those that a
    /// pod's processes are in, one that is there is the pod's.
    #[arg(long, value_name = "DIR", env = "SIDESTEP_NETNS_DIR", default_value = "/var/run/netns")]
    netns_dir: PathBuf,
    /// The agent's own DaemonSet: where that is gone when the agent is told to end, Sidestep has
    /// been uninstalled.
    #[arg(
        long,
        value_name = "NAMESPACE/NAME",
        env = "SIDESTEP_DAEMONSET",
        value_parser = namespaced,
        requires = "kubernetes"
    )]
    daemonset: Option<(String, String)>,
    /// What becomes of this node's mesh pods when Sidestep is uninstalled. The CNI plugin goes in
    /// either case.
    #[arg(long, value_name = "WHAT", value_enum, default_value = "keep")]
    on_uninstall: OnUninstall,
    /// Take the taint sidestep.io/agent-not-ready off this node whenever pods can be intercepted
    /// here: no pod is scheduled to a fresh node before.
    #[arg(long, requires = "kubernetes")]
    remove_startup_taint: bool,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "CNI, with --kubernetes")]
struct Cni {
    /// Install the CNI plugin, chained behind the node's own, and serve it: a pod of a mesh is
    /// enrolled before its first process runs, or does not start.
    #[arg(long, requires = "kubernetes")]
    cni: bool,
    #[command(flatten)]
    paths: CniPaths,
    /// What becomes of a new pod while no agent answers: any that is in no excluded namespace,
    /// since nobody knows then whether it is in a mesh.
    #[arg(long, value_name = "WHAT", value_enum, default_value = "refuse")]
    cni_on_agent_away: OnAgentAway,
    /// How long a new pod waits for an agent.
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    cni_timeout: u64,
    /// Namespaces whose pods never wait for the agent.
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    cni_exclude_namespaces: Vec<String>,
}

#[derive(Debug, Args)]
struct CniPaths {
    /// Directory of CNI configurations.
    #[arg(
        long,
        value_name = "DIR",
        env = "SIDESTEP_CNI_CONF_DIR",
        default_value = "/etc/cni/net.d"
    )]
    cni_conf_dir: PathBuf,
    /// Directory of CNI plugins.
    #[arg(long, value_name = "DIR", env = "SIDESTEP_CNI_BIN_DIR", default_value = "/opt/cni/bin")]
    cni_bin_dir: PathBuf,
    #[command(flatten)]
    socket: SocketArgs,
}

#[derive(Debug, Args)]
struct SocketArgs {
    /// Where the agent is reached on this node.
    #[arg(long, value_name = "PATH", env = "SIDESTEP_CNI_SOCKET", default_value = cni::SOCKET)]
    cni_socket: PathBuf,
}

/// `NAMESPACE/NAME`.
fn namespaced(text: &str) -> Result<(String, String), String> {
    match text.split_once('/') {
        Some((namespace, name)) if !namespace.is_empty() && !name.is_empty() => {
            Ok((namespace.into(), name.into()))
        }
        _ => Err("NAMESPACE/NAME expected".into()),
    }
}

impl Run {
    fn source(self) -> SourceConfig {
        if let Some(pods) = self.pods {
            return SourceConfig::Manifests(pods);
        }
        let cni = self.cni;
        SourceConfig::Kubernetes(Box::new(Cluster {
            api: kubernetes::Config {
                node: self.cluster.node_name.unwrap_or_default(),
                kubeconfig: self.cluster.kubeconfig,
                daemonset: self.cluster.daemonset,
                on_uninstall: self.cluster.on_uninstall,
            },
            proc: self.cluster.proc,
            netns_dir: self.cluster.netns_dir,
            remove_startup_taint: self.cluster.remove_startup_taint,
            cni: cni.cni.then(|| cni::Config {
                conf_dir: cni.paths.cni_conf_dir,
                bin_dir: cni.paths.cni_bin_dir,
                socket: cni.paths.socket.cni_socket.clone(),
                settings: cni::Settings {
                    socket: cni.paths.socket.cni_socket,
                    on_agent_away: cni.cni_on_agent_away,
                    timeout_seconds: cni.cni_timeout,
                    exclude_namespaces: cni.cni_exclude_namespaces,
                },
            }),
        }))
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Output {
    /// For people.
    Text,
    /// For programs.
    Json,
}

#[derive(Debug, Args)]
struct OutputArgs {
    /// How the answer is printed.
    #[arg(long, short, value_name = "FORMAT", value_enum, default_value = "text")]
    output: Output,
}

#[derive(Debug, Args)]
struct CheckArgs {
    #[command(flatten)]
    cgroup: CgroupArgs,
    #[command(flatten)]
    paths: Paths,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Debug, Args)]
struct StatusArgs {
    #[command(flatten)]
    paths: Paths,
    #[command(flatten)]
    socket: SocketArgs,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Debug, Args)]
struct Unload {
    #[command(flatten)]
    paths: Paths,
    #[command(flatten)]
    cni: CniPaths,
}

impl Cli {
    /// Does what the command line says.
    ///
    /// # Errors
    /// Whatever keeps the command from being done, for standard error.
    pub fn run(self) -> Result<ExitCode> {
        match self.command {
            Command::Run(args) => {
                telemetry::init(args.log_format);
                agent::run(&agent::Config {
                    cgroup: args.cgroup.cgroup.clone(),
                    pins: args.paths.pins()?,
                    http: args.http,
                    splice: args.splice,
                    splice_refresh: Duration::from_secs(args.splice_refresh.into()),
                    source: args.source(),
                })?;
                Ok(ExitCode::SUCCESS)
            }
            Command::Check(args) => {
                telemetry::init(LogFormat::Human);
                let report = check::check(args.cgroup.cgroup.as_deref(), &args.paths.bpffs);
                print(&args.output, &report)?;
                Ok(if report.ok { ExitCode::SUCCESS } else { ExitCode::FAILURE })
            }
            Command::Status(args) => {
                telemetry::init(LogFormat::Human);
                let status = status::status(&args.paths.pins()?, &args.socket.cni_socket)?;
                print(&args.output, &status)?;
                Ok(ExitCode::SUCCESS)
            }
            Command::Unload(args) => {
                telemetry::init(LogFormat::Human);
                let pins = args.paths.pins()?;
                let root = args.paths.bpffs.display();
                let installed = args.paths.bpffs.exists();
                // Before anything is touched: an agent that runs would put it back.
                let _lock = installed.then(|| pins.lock()).transpose()?;
                let cni = &args.cni;
                let socket = &cni.socket.cni_socket;
                let changed = conflist::uninstall(&cni.cni_conf_dir, &cni.cni_bin_dir, socket)?;
                if changed > 0 {
                    println!("The CNI plugin is removed: {changed} files changed.");
                }
                if !installed {
                    println!("Nothing to unload: {root} does not exist.");
                    return Ok(ExitCode::SUCCESS);
                }
                let unloaded = bpf::unload(&pins)?;
                println!("Unloaded from {root}: {unloaded}.");
                Ok(ExitCode::SUCCESS)
            }
        }
    }
}

fn print<T: serde::Serialize + std::fmt::Display>(args: &OutputArgs, value: &T) -> Result<()> {
    let text = match args.output {
        Output::Text => value.to_string(),
        Output::Json => serde_json::to_string_pretty(value).context("cannot print JSON")? + "\n",
    };
    match std::io::stdout().write_all(text.as_bytes()) {
        // The reader has seen enough: `sidestep status | head`.
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        other => other.context("cannot print"),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
