//! Runs Sidestep's scenarios in Kubernetes mode.
#![forbid(unsafe_code)]

mod bench;
mod judge;
mod scenarios;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use clap::{Parser, Subcommand, ValueEnum};
use sidestep_e2e::image;
use sidestep_e2e::mesh::{Istio, Mesh};

use judge::{Suite, Tests};
use scenarios::{QUICK, Settings};

#[derive(Parser)]
#[command(about, version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the scenarios in a kind cluster, as e2e/cluster/cluster.sh makes it
    Run {
        /// The kind cluster
        #[arg(long, value_name = "NAME", default_value = "sidestep-e2e")]
        kind_name: String,
        /// The mesh that scenarios run under; without one, those that take a mesh are left out
        #[arg(long, value_enum)]
        mesh: Option<MeshName>,
        /// Where Istio comes from, as `e2e/cluster/cluster.sh istio` writes it; the published one
        /// unless given
        #[arg(long, value_name = "DIR")]
        istio: Option<PathBuf>,
        /// Only those whose names contain one of these, separated by commas
        #[arg(long, value_name = "NAMES", value_delimiter = ',', conflicts_with = "quick")]
        only: Vec<String>,
        /// Only those that say most in little time
        #[arg(long)]
        quick: bool,
        /// Where the logs of failed scenarios are kept
        #[arg(long, value_name = "DIR", default_value = "target/e2e-logs")]
        logs: PathBuf,
        /// For how long the API server is away in the scenario api-away, in seconds; an hour is
        /// 3600
        #[arg(long, value_name = "SECONDS", default_value_t = 0)]
        away: u64,
    },
    /// Run Kubernetes' own tests of the network, without the agent and a mesh and then with both, and
    /// compare what passes
    Judge {
        /// The kind cluster, with no agent and no mesh
        #[arg(long, value_name = "NAME", default_value = "sidestep-e2e")]
        kind_name: String,
        /// The mesh
        #[arg(long, value_enum)]
        mesh: MeshName,
        /// As for `run`
        #[arg(long, value_name = "DIR")]
        istio: Option<PathBuf>,
        /// Kubernetes' e2e.test
        #[arg(long, value_name = "PATH")]
        program: PathBuf,
        /// What it takes by KUBE_TEST_REPO_LIST
        #[arg(long, value_name = "PATH")]
        repositories: PathBuf,
        /// Which tests
        #[arg(long, value_enum, default_value_t = Suite::Conformance)]
        suite: Suite,
        /// In place of the suite's tests, those whose names match this regular expression of Go's
        #[arg(long, value_name = "REGEX")]
        focus: Option<String>,
        /// Where its logs and reports go
        #[arg(long, value_name = "DIR", default_value = "target/e2e-kubernetes")]
        out: PathBuf,
    },
    /// Measure HTTP under a real Istio, intercepted by its own rules and by Sidestep, in turns
    Bench {
        /// The kind cluster
        #[arg(long, value_name = "NAME", default_value = "sidestep-e2e")]
        kind_name: String,
        /// As for `run`
        #[arg(long, value_name = "DIR")]
        istio: Option<PathBuf>,
        /// How often each mode is taken through all loads
        #[arg(long, default_value_t = 5)]
        rounds: usize,
        /// How long each load lasts
        #[arg(long, default_value_t = 5)]
        seconds: u32,
        /// Where report.md, report.json and the plots go
        #[arg(long, value_name = "DIR", default_value = "bench-out/mesh")]
        out: PathBuf,
    },
    /// Say what each scenario shows; those of --quick have a star
    List,
    /// Write the image of the scenarios' pods, as an OCI archive
    Image {
        /// Where
        archive: PathBuf,
        /// The image of this program in place of theirs, for `bench`
        program: Option<PathBuf>,
    },
}

#[derive(Clone, Copy, ValueEnum)]
enum MeshName {
    Istio,
    Linkerd,
    Kuma,
}

impl MeshName {
    fn with(self, istio: Option<PathBuf>) -> Mesh {
        match self {
            Self::Istio => Mesh::Istio(Istio { dir: istio }),
            Self::Linkerd => Mesh::Linkerd,
            Self::Kuma => Mesh::Kuma,
        }
    }
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(err) => {
            eprintln!("{err:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    match Cli::parse().command {
        Command::Run { kind_name, mesh, istio, only, quick, logs, away } => {
            let mesh = mesh.map(|mesh| mesh.with(istio));
            let away = Duration::from_secs(away);
            let settings = Settings { kind: kind_name, mesh, away, logs };
            scenarios::run(&settings, |scenario| {
                if quick {
                    return QUICK.contains(&scenario.name);
                }
                only.is_empty() || only.iter().any(|name| scenario.name.contains(name.as_str()))
            })
        }
        Command::Judge { kind_name, mesh, istio, program, repositories, suite, focus, out } => {
            let tests = Tests { program, repositories, out, suite, focus };
            judge::judge(&tests, &kind_name, mesh.with(istio))
        }
        Command::Bench { kind_name, istio, rounds, seconds, out } => {
            let settings = bench::Settings { rounds, seconds, out };
            bench::bench(&settings, &kind_name, Istio { dir: istio })
        }
        Command::Image { archive, program: None } => image::write_pods(&archive),
        Command::Image { archive, program: Some(program) } => {
            image::write_program(&archive, &program, &["version"])
        }
        Command::List => {
            for scenario in scenarios::all() {
                let quick = if QUICK.contains(&scenario.name) { "*" } else { " " };
                println!("{quick} {:<22} {}", scenario.name, scenario.doc);
            }
            Ok(())
        }
    }
}
