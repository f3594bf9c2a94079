//! Runs Sidestep's scenarios in Kubernetes mode.
#![forbid(unsafe_code)]

mod scenarios;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use clap::{Parser, Subcommand};
use sidestep_e2e::image;

use scenarios::Settings;

#[derive(Parser)]
#[command(about, version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the scenarios in a kind cluster, as e2e/kind/run.sh makes it
    Run {
        /// The kind cluster
        #[arg(long, value_name = "NAME", default_value = "sidestep-e2e")]
        kind_name: String,
        /// Only those whose names contain this
        #[arg(long, value_name = "NAME", default_value = "")]
        only: String,
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
        Command::Run { kind_name, only, logs, away } => {
            let away = Duration::from_secs(away);
            scenarios::run(&Settings { kind: kind_name, away, logs }, &only)
        }
        Command::Image { archive } => image::write_pods(&archive),
        Command::List => {
            for scenario in scenarios::all() {
                println!("{:<24} {}", scenario.name, scenario.doc);
            }
            Ok(())
        }
    }
}
