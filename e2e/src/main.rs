//! Runs Sidestep's scenarios in Kubernetes mode, or single parts of them by hand.
#![forbid(unsafe_code)]

mod by_hand;
mod scenarios;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use clap::{Parser, Subcommand, ValueEnum};
use sidestep_e2e::lab;

use scenarios::{Place, Settings};

#[derive(Parser)]
#[command(about, version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the scenarios, as root
    Run {
        /// Where: on nodes of the lab's, one for each, or in a kind cluster, as e2e/kind/run.sh
        /// makes it
        #[arg(long, value_enum, default_value = "lab")]
        cluster: Cluster,
        /// The kind cluster
        #[arg(long, value_name = "NAME", default_value = "sidestep-e2e")]
        kind_name: String,
        /// Only those whose names contain this
        #[arg(long, value_name = "NAME", default_value = "")]
        only: String,
        /// The agent, for the lab
        #[arg(long, value_name = "PATH", default_value = "target/debug/sidestep")]
        binary: PathBuf,
        /// Where the logs of failed scenarios are kept
        #[arg(long, value_name = "DIR", default_value = "target/e2e-logs")]
        logs: PathBuf,
        /// For how long the API server is away in the scenario api-away, in seconds; an hour is
        /// 3600
        #[arg(long, value_name = "SECONDS", default_value_t = 0)]
        away: u64,
    },
    /// Say what each scenario shows
    List,
    /// Write the image of the scenarios' pods, as an OCI archive
    Image {
        /// Where
        archive: PathBuf,
    },
    /// Run the API server alone, until Ctrl-C
    Apiserver {
        /// Where to listen; a port 0 means any
        #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:0")]
        listen: SocketAddr,
        /// Write a kubeconfig there
        #[arg(long, value_name = "FILE")]
        kubeconfig: PathBuf,
        /// Begin with the objects in this directory's YAML and JSON files
        #[arg(long, value_name = "DIR")]
        load: Option<PathBuf>,
    },
}

#[derive(Clone, Copy, ValueEnum)]
enum Cluster {
    Lab,
    Kind,
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
        Command::Run { cluster, kind_name, only, binary, logs, away } => {
            let place = match cluster {
                Cluster::Lab => Place::Lab,
                Cluster::Kind => Place::Kind(kind_name),
            };
            scenarios::run(
                &Settings { place, binary, away: Duration::from_secs(away), logs },
                &only,
            )
        }
        Command::Image { archive } => lab::write_image(&archive),
        Command::List => {
            for scenario in scenarios::all() {
                println!("{:<24} {}", scenario.name, scenario.doc);
            }
            Ok(())
        }
        Command::Apiserver { listen, kubeconfig, load } => {
            by_hand::apiserver(listen, &kubeconfig, load.as_deref())
        }
    }
}
