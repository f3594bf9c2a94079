//! The command line.

use std::{io::Write, net::SocketAddr, path::PathBuf, process::ExitCode, time::Duration};

use anyhow::{Context, Result};
use clap::{ArgGroup, Args, Parser, Subcommand, ValueEnum};

use crate::{
    agent::{self, Cluster, SourceConfig},
    cni::{self, OnAgentAway, conflist},
    dataplane::{self, bpffs},
    mesh::mode::PodsWithRules,
    ops::{
        check,
        status::{self, Shown},
        telemetry::{self, LogFormat},
    },
    service,
    source::kubernetes::{self, OnUninstall},
    splice,
};

/// Replaces a service mesh's iptables interception with eBPF programs at the socket layer.
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
    /// On SIGTERM or SIGINT the agent exits and its BPF programs stay attached, so pods stay
    /// intercepted; `sidestep unload` removes them. The next agent takes over what it finds.
    Run(Box<Run>),
    /// Check that this node has all that Sidestep needs; exits with 1 if anything is missing.
    Check(CheckArgs),
    /// Show the enrolled pods, the attached hooks and the counters, as the kernel has them.
    ///
    /// Works without a running agent. An agent that runs with --cni is also asked for the current
    /// problems of this node. docs/status.md describes the JSON.
    Status(StatusArgs),
    /// Remove all BPF programs, links, maps and pins, and the CNI plugin. Refused while an agent
    /// runs.
    ///
    /// Interception ends at once: the traffic of running mesh pods bypasses their sidecars from
    /// then on.
    Unload(Unload),
}

#[derive(Debug, Args)]
struct Paths {
    /// Directory for pinned maps and links, on a BPF file system (bpffs).
    #[arg(long, value_name = "DIR", default_value = bpffs::DEFAULT_ROOT, env = "SIDESTEP_BPFFS")]
    bpffs: PathBuf,
    /// Name of the map layout: for tests of upgrades to a build with another layout.
    #[arg(long, hide = true, default_value = dataplane::LAYOUT, value_parser = layout)]
    layout: String,
}

impl Paths {
    fn pins(&self) -> Result<dataplane::Pins> {
        bpffs::pins(&self.bpffs, &self.layout)
    }
}

/// Parses the name of a layout, a `v` and a number.
fn layout(text: &str) -> Result<String, String> {
    let number = text.strip_prefix('v').and_then(|number| number.parse::<u16>().ok());
    number.map(|_| text.to_owned()).ok_or_else(|| "expected v and a number, such as v7".into())
}

#[derive(Debug, Args)]
struct CgroupArgs {
    /// Cgroup v2 directory that the BPF programs attach to; they run for every process in it
    /// [default: the root of the hierarchy, which holds every process of the node].
    #[arg(long, value_name = "DIR", env = "SIDESTEP_CGROUP")]
    cgroup: Option<PathBuf>,
}

#[derive(Debug, Args)]
#[command(group(ArgGroup::new("source").required(true).args(["pods", "kubernetes"])))]
struct Run {
    /// Take pods from a directory of Kubernetes v1 Pod manifests (*.yaml, *.yml, *.json), watched
    /// for changes.
    ///
    /// The annotation sidestep.io/netns of a manifest is the absolute path of the pod's network
    /// namespace, such as /run/netns/NAME.
    #[arg(long, value_name = "DIR")]
    pods: Option<PathBuf>,
    /// Take this node's pods from the Kubernetes API server.
    ///
    /// The CNI plugin (--cni) reports their network namespaces; those of other pods are found
    /// through the pods' processes.
    #[arg(long, requires = "node_name")]
    kubernetes: bool,
    /// Which connections between processes of this node bypass the TCP/IP stack (splicing).
    ///
    /// At start, a self-test tries everything that is known to go wrong with spliced sockets on
    /// some kernel. `sidestep check` shows its result, `sidestep status` what is spliced.
    #[arg(long, value_name = "LEGS", value_enum, default_value = "auto", env = "SIDESTEP_SPLICE")]
    splice: splice::Mode,
    /// How often a spliced connection sends a message by TCP, in each direction.
    ///
    /// Connection tracking and network policies see the packets of that message only: a policy that
    /// forbids the connection takes effect within this time, and the conntrack entry of a connection
    /// in use does not expire.
    #[arg(
        long,
        value_name = "SECONDS",
        value_parser = clap::value_parser!(u32).range(1..),
        default_value = "1",
        env = "SIDESTEP_SPLICE_REFRESH"
    )]
    splice_refresh: u32,
    /// What becomes of pods in which the mesh's own rules are installed, by its init container or its
    /// CNI plugin. The rules are looked for in each pod's network namespace.
    ///
    /// A pod's annotation sidestep.io/mode comes first. Pods without such rules are not affected.
    #[arg(
        long,
        value_name = "WHAT",
        value_enum,
        default_value = "off",
        env = "SIDESTEP_PODS_WITH_RULES"
    )]
    pods_with_rules: PodsWithRules,
    /// Translate the virtual IPs of Services to endpoints in connect() and sendmsg(), for pods and for
    /// the node's own processes. kube-proxy's rules stay and serve what is not translated.
    ///
    /// With --kubernetes, the agent watches Services and EndpointSlices of the whole cluster, and this
    /// node's labels. The directory of --pods then has v1 Services and discovery.k8s.io/v1
    /// EndpointSlices too, and a v1 Node, which is this one.
    #[arg(long, env = "SIDESTEP_SERVICES")]
    services: bool,
    /// Translate spec.externalIPs too, whatever addresses these are: whoever may write Services can
    /// take over any address that way (CVE-2020-8554). Without it, only those that are this node's own.
    #[arg(long, requires = "services", env = "SIDESTEP_SERVICES_EXTERNAL_IPS")]
    services_external_ips: bool,
    /// At which of this node's addresses NodePorts are translated, for callers on this node: primary
    /// (the first of each family in the Node object), all, ranges such as 10.0.0.0/8, localhost
    /// (127.0.0.1, for the node's own processes only), several of these separated by commas, or none.
    ///
    /// kube-proxy has --nodeport-addresses for this, which is primary in nftables mode and all in
    /// iptables mode unless said otherwise, and --iptables-localhost-nodeports.
    #[arg(
        long,
        value_name = "ADDRESSES",
        default_value = "primary",
        requires = "services",
        env = "SIDESTEP_SERVICES_NODE_PORTS"
    )]
    services_node_ports: service::NodePorts,
    /// Serve /healthz, /readyz and /metrics on this address, such as 127.0.0.1:9465.
    #[arg(long, value_name = "ADDRESS:PORT", env = "SIDESTEP_HTTP")]
    http: Option<SocketAddr>,
    #[command(flatten)]
    cgroup: CgroupArgs,
    #[command(flatten)]
    paths: Paths,
    /// Format of log lines.
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
    /// Name of this node in the API server (spec.nodeName of its pods).
    #[arg(long, value_name = "NAME", env = "SIDESTEP_NODE_NAME")]
    node_name: Option<String>,
    /// Kubeconfig for the API server [default: the service account of the agent's own pod].
    #[arg(long, value_name = "FILE", env = "SIDESTEP_KUBECONFIG", requires = "kubernetes")]
    kubeconfig: Option<PathBuf>,
    /// Where the node's own procfs is mounted.
    #[arg(long, value_name = "DIR", env = "SIDESTEP_PROC", default_value = "/proc")]
    proc: PathBuf,
    /// Directory where the container runtime pins the network namespaces of pod sandboxes. Where a
    /// pod's processes are in several, the pinned one is the pod's.
    #[arg(long, value_name = "DIR", env = "SIDESTEP_NETNS_DIR", default_value = "/var/run/netns")]
    netns_dir: PathBuf,
    /// The agent's own DaemonSet. If it no longer exists when the agent is told to exit, Sidestep is
    /// being uninstalled.
    #[arg(
        long,
        value_name = "NAMESPACE/NAME",
        env = "SIDESTEP_DAEMONSET",
        value_parser = namespaced,
        requires = "kubernetes"
    )]
    daemonset: Option<(String, String)>,
    /// What happens to this node's mesh pods when Sidestep is uninstalled. The CNI plugin is removed
    /// in either case.
    #[arg(long, value_name = "WHAT", value_enum, default_value = "keep")]
    on_uninstall: OnUninstall,
    /// Remove the taint sidestep.io/agent-not-ready from this node once pods can be intercepted on
    /// it. A node that registers with this taint gets no pods before that.
    #[arg(long, requires = "kubernetes")]
    remove_startup_taint: bool,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "CNI, with --kubernetes")]
struct Cni {
    /// Install the CNI plugin, chained after the node's own, and serve it. A mesh pod then either is
    /// enrolled before its first process runs, or does not start.
    #[arg(long, requires = "kubernetes")]
    cni: bool,
    #[command(flatten)]
    paths: CniPaths,
    /// What happens to a new pod while the agent does not answer. This concerns every pod outside
    /// the excluded namespaces: without the agent nobody knows whether a pod is in a mesh.
    #[arg(long, value_name = "WHAT", value_enum, default_value = "refuse")]
    cni_on_agent_away: OnAgentAway,
    /// How long a new pod waits for the agent.
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
    /// Unix socket of the agent on this node.
    #[arg(long, value_name = "PATH", env = "SIDESTEP_CNI_SOCKET", default_value = cni::SOCKET)]
    cni_socket: PathBuf,
}

/// Parses `NAMESPACE/NAME`.
fn namespaced(text: &str) -> Result<(String, String), String> {
    match text.split_once('/') {
        Some((namespace, name))
            if !namespace.is_empty() && !name.is_empty() && !name.contains('/') =>
        {
            Ok((namespace.into(), name.into()))
        }
        _ => Err("expected NAMESPACE/NAME".into()),
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
                services: self.services,
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
    /// Text for people.
    Text,
    /// JSON for programs.
    Json,
}

#[derive(Debug, Args)]
struct OutputArgs {
    /// Output format.
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
    /// List each trial of the splice self-test that this kernel fails.
    #[arg(long, short)]
    verbose: bool,
}

#[derive(Debug, Args)]
struct StatusArgs {
    #[command(flatten)]
    paths: Paths,
    #[command(flatten)]
    socket: SocketArgs,
    #[command(flatten)]
    output: OutputArgs,
    /// List the addresses of Services that are translated, and their endpoints, as the kernel has them.
    ///
    /// An agent that runs with --cni is asked for the Services' names, and for what it wants the kernel
    /// to have: differences are listed.
    #[arg(long)]
    services: bool,
    /// The same for one Service; fails if none of its addresses is translated.
    #[arg(long, value_name = "NAMESPACE/NAME", value_parser = namespaced, conflicts_with = "services")]
    service: Option<(String, String)>,
}

#[derive(Debug, Args)]
struct Unload {
    #[command(flatten)]
    paths: Paths,
    #[command(flatten)]
    cni: CniPaths,
}

impl Cli {
    /// Runs the command.
    ///
    /// # Errors
    /// Any error of the command, for standard error.
    pub fn run(self) -> Result<ExitCode> {
        match self.command {
            Command::Run(args) => {
                telemetry::init(args.log_format);
                agent::run(&agent::Config {
                    cgroup: args.cgroup.cgroup.clone(),
                    pins: args.paths.pins()?,
                    http: args.http,
                    splice: args.splice,
                    services: args.services.then(|| service::Options {
                        external_ips: args.services_external_ips,
                        node_ports: args.services_node_ports.clone(),
                    }),
                    pods_with_rules: args.pods_with_rules,
                    splice_refresh: Duration::from_secs(args.splice_refresh.into()),
                    source: args.source(),
                })?;
                Ok(ExitCode::SUCCESS)
            }
            Command::Check(args) => {
                telemetry::init(LogFormat::Human);
                let report = check::check(args.cgroup.cgroup.as_deref(), &args.paths.bpffs);
                print(&args.output, &report, |report| report.text(args.verbose))?;
                Ok(if report.ok { ExitCode::SUCCESS } else { ExitCode::FAILURE })
            }
            Command::Status(args) => {
                telemetry::init(LogFormat::Human);
                let pins = args.paths.pins()?;
                let shown = match args.service {
                    Some((namespace, name)) => Shown::One(format!("{namespace}/{name}")),
                    None if args.services => Shown::All,
                    None => Shown::None,
                };
                let status = status::status(&pins, &args.socket.cni_socket, &shown)?;
                print(&args.output, &status, status::Status::text)?;
                Ok(ExitCode::SUCCESS)
            }
            Command::Unload(args) => {
                telemetry::init(LogFormat::Human);
                let pins = args.paths.pins()?;
                let root = args.paths.bpffs.display();
                let installed = args.paths.bpffs.exists();
                // Checked before anything is removed: a running agent would restore it.
                let _lock = installed.then(|| pins.lock()).transpose()?;
                let cni = &args.cni;
                let socket = &cni.socket.cni_socket;
                let changed = conflist::uninstall(&cni.cni_conf_dir, &cni.cni_bin_dir, socket)?;
                if changed > 0 {
                    println!("Removed the CNI plugin: {changed} files changed.");
                }
                if !installed {
                    println!("Nothing to unload: {root} does not exist.");
                    return Ok(ExitCode::SUCCESS);
                }
                let unloaded = dataplane::unload(&pins)?;
                println!("Unloaded from {root}: {unloaded}.");
                Ok(ExitCode::SUCCESS)
            }
        }
    }
}

fn print<T: serde::Serialize>(
    args: &OutputArgs,
    value: &T,
    text: impl FnOnce(&T) -> String,
) -> Result<()> {
    let text = match args.output {
        Output::Text => text(value),
        Output::Json => serde_json::to_string_pretty(value).context("cannot print JSON")? + "\n",
    };
    match std::io::stdout().write_all(text.as_bytes()) {
        // The reader has closed the pipe: `sidestep status | head`.
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

    #[test]
    fn a_service_is_named_by_its_namespace_and_name() {
        for wrong in ["web", "/web", "shop/", "shop/web/http", ""] {
            let parsed = Cli::try_parse_from(["sidestep", "status", "--service", wrong]);
            let error = parsed.expect_err(wrong).to_string();
            assert!(error.contains("expected NAMESPACE/NAME"), "{wrong}: {error}");
        }
        Cli::try_parse_from(["sidestep", "status", "--service", "shop/web"]).expect("parsed");
    }

    #[test]
    fn no_line_of_help_is_too_long() {
        let mut command = Cli::command();
        command.build();
        let helps = command.get_subcommands_mut().map(|one| one.render_long_help().to_string());
        let lines: Vec<String> =
            helps.flat_map(|help| help.lines().map(str::to_owned).collect::<Vec<_>>()).collect();
        let long: Vec<_> = lines.iter().filter(|line| line.len() > crate::text::WIDTH).collect();
        assert!(lines.len() > 100 && long.is_empty(), "{long:#?}");
    }
}
