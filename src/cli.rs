//! The command line.

use std::{io::Write, path::PathBuf, process::ExitCode};

use anyhow::{Context, Result};
use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::{
    agent, bpf, bpffs, check, status,
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
    /// Run the agent: enrol the node's mesh pods and keep them enrolled.
    ///
    /// Ends on SIGTERM or SIGINT and leaves the data plane in force; `sidestep unload` takes it
    /// away. A new agent adopts what an earlier one left.
    Run(Run),
    /// Say what this kernel and machine offer and what is missing; exits with 1 if anything is.
    Check(CheckArgs),
    /// Show the enrolled pods, the hooks and the counters, from the kernel alone.
    ///
    /// Needs no running agent. The JSON is described in docs/status.md.
    Status(StatusArgs),
    /// Take every link, program, map and pin away. Refuses while an agent runs.
    Unload(Unload),
}

#[derive(Debug, Args)]
struct Paths {
    /// Directory for pins, on a bpffs.
    #[arg(long, value_name = "DIR", default_value = bpffs::DEFAULT_ROOT, env = "SIDESTEP_BPFFS")]
    bpffs: PathBuf,
}

#[derive(Debug, Args)]
struct CgroupArgs {
    /// Cgroup v2 directory whose processes are looked at [default: the root of the hierarchy].
    #[arg(long, value_name = "DIR", env = "SIDESTEP_CGROUP")]
    cgroup: Option<PathBuf>,
}

#[derive(Debug, Args)]
struct Run {
    /// Directory of Kubernetes v1 Pod manifests (*.yaml, *.yml, *.json), watched for changes.
    ///
    /// The pods' network namespaces come from the annotation sidestep.io/netns, an absolute path
    /// such as /run/netns/NAME.
    #[arg(long, value_name = "DIR")]
    pods: PathBuf,
    #[command(flatten)]
    cgroup: CgroupArgs,
    #[command(flatten)]
    paths: Paths,
    /// How log lines look.
    #[arg(long, value_name = "FORMAT", value_enum, default_value = "human")]
    log_format: LogFormat,
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
    output: OutputArgs,
}

#[derive(Debug, Args)]
struct Unload {
    #[command(flatten)]
    paths: Paths,
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
                    pods: args.pods,
                    cgroup: args.cgroup.cgroup,
                    bpffs: args.paths.bpffs,
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
                let status = status::status(&bpffs::pins(&args.paths.bpffs)?)?;
                print(&args.output, &status)?;
                Ok(ExitCode::SUCCESS)
            }
            Command::Unload(args) => {
                telemetry::init(LogFormat::Human);
                let pins = bpffs::pins(&args.paths.bpffs)?;
                let root = args.paths.bpffs.display();
                if !args.paths.bpffs.exists() {
                    println!("Nothing to unload: {root} does not exist.");
                    return Ok(ExitCode::SUCCESS);
                }
                let _lock = pins.lock()?;
                let removed = bpf::unload(&pins)?;
                println!("Unloaded: {removed} pins removed from {root}.");
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
