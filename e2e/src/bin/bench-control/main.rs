//! `make bench-control`: what Kubernetes mode costs on a node with many pods that come and go.
#![forbid(unsafe_code)]

mod churn;
mod kernel;
mod node;
mod pod;
mod report;
mod usage;

use std::{
    collections::BTreeSet,
    fs,
    num::NonZeroU32,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use sidestep_lab::{interrupted, stop_on_signals};

use crate::{
    churn::{churn, fill},
    node::Node,
    report::{Environment, Report, Run, Settings},
    usage::Usage,
};

/// Measures the agent in Kubernetes mode: pods of one node that churn, with and without
/// thousands of pods on other nodes. Everything happens in network namespaces and a cgroup that
/// it makes, and removes at its end.
#[derive(Parser)]
struct Args {
    /// The agent's binary
    #[arg(long, value_name = "PATH")]
    sidestep: PathBuf,
    /// Pods of this node
    #[arg(long, default_value_t = 250)]
    pods: usize,
    /// Pods of other nodes, in the second run; 0: there is none
    #[arg(long, default_value_t = 5000)]
    others: usize,
    /// Pods replaced in a second
    #[arg(long, default_value_t = NonZeroU32::new(20).expect("not 0"))]
    rate: NonZeroU32,
    /// How long pods are replaced, in seconds
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// How long the agent is watched while nothing happens, in seconds
    #[arg(long, default_value_t = 20)]
    rest: u64,
    /// Where the figures go, as JSON
    #[arg(long, default_value = "bench-out/control.json", value_name = "FILE")]
    out: PathBuf,
}

fn main() -> ExitCode {
    match bench(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench-control: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn bench(args: &Args) -> Result<()> {
    ensure!(args.pods > 0, "--pods: at least one");
    stop_on_signals()?;
    let settings = Settings {
        pods: args.pods,
        rate: args.rate.get(),
        seconds: args.seconds,
        rest_seconds: args.rest,
    };
    let mut report = Report { environment: Environment::read()?, settings, runs: Vec::new() };
    for others in BTreeSet::from([0, args.others]) {
        let run = measure(&args.sidestep, others, &report.settings);
        report.runs.push(run.with_context(|| format!("with {others} pods of other nodes"))?);
    }
    report::clear_progress();
    print!("{report}");
    if let Some(dir) = args.out.parent() {
        fs::create_dir_all(dir).with_context(|| format!("making {}", dir.display()))?;
    }
    let text = serde_json::to_string_pretty(&report)?;
    fs::write(&args.out, text + "\n").with_context(|| args.out.display().to_string())?;
    println!("\nall figures: {}", args.out.display());
    let failed = report.failures();
    ensure!(failed.is_empty(), "{}", failed.join("; "));
    Ok(())
}

/// One agent's life: empty, filled, at rest, churning, emptied.
fn measure(sidestep: &Path, others: usize, settings: &Settings) -> Result<Run> {
    let progress = |what: &str| report::progress(&format!("{others} pods elsewhere: {what}"));
    progress("starting");
    let node = Node::start(sidestep, others)?;
    let rest = Duration::from_secs(settings.rest_seconds);
    progress("an empty node at rest");
    let empty = Usage::over(&node, rest)?;
    node.clear_requests()?;

    progress("filling");
    let (pods, filled) = fill(&node, settings.pods)?;
    progress("a full node at rest");
    node.settle()?;
    let full = Usage::over(&node, rest)?;

    let before = Usage::now(&node)?;
    let (pods, churned) = churn(&node, pods, settings, progress)?;
    let during = before.until(&Usage::now(&node)?);
    let requests = node.requests()?;
    node.settle()?;
    let after_churn = Usage::now(&node)?.rss_kib;

    progress("emptying");
    let (cleared_after, left) = node.empty(pods.into_vec())?;
    ensure!(!interrupted(), "interrupted");
    Ok(Run {
        others,
        empty,
        filled,
        full,
        churned,
        during,
        requests,
        rss_after_churn_kib: after_churn,
        rss_emptied_kib: Usage::now(&node)?.rss_kib,
        cleared_after_ms: cleared_after,
        left,
        log: node.complaints(),
    })
}
