//! `make bench`: what interception and splicing win and cost, against iptables and against no
//! interception at all. docs/performance.md says how to read it.
#![forbid(unsafe_code)]

mod app;
mod cells;
mod client;
mod environment;
mod goals;
mod mode;
mod plot;
mod progress;
mod relay;
mod report;
mod sample;
mod serve;
mod usage;
mod world;

use std::net::IpAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::{Parser, Subcommand};
use nix::sys::resource::{Resource, getrlimit};
use nix::unistd::geteuid;
use sidestep_lab::{interrupted, stop_on_signals};

use crate::cells::{Group, Settings};
use crate::environment::Environment;
use crate::mode::{Mode, Proxy};
use crate::progress::Progress;
use crate::relay::TwinArg;
use crate::report::Report;
use crate::world::World;

/// Measures the ways from an application to another through two sidecars on one node, all in
/// one run, paired by round. It makes network namespaces and a cgroup of its own, and removes
/// them at its end.
#[derive(Debug, Parser)]
#[command(
    max_term_width = 100,
    subcommand_negates_reqs = true,
    args_conflicts_with_subcommands = true
)]
struct Args {
    /// The agent's binary [default: beside this one]
    #[arg(long, value_name = "PATH")]
    sidestep: Option<PathBuf>,
    /// A few minutes: fewer and shorter measurements
    #[arg(long)]
    quick: bool,
    /// Seconds: whether all of it works, with a bare relay alone
    #[arg(long, conflicts_with = "quick")]
    smoke: bool,
    /// Only these measurements
    #[arg(long, value_name = "GROUP", value_delimiter = ',')]
    only: Vec<Group>,
    /// Only these modes; ratios need iptables
    #[arg(long, value_name = "MODE", value_delimiter = ',')]
    modes: Vec<Mode>,
    /// Only through these
    #[arg(long, value_name = "PROXY", value_delimiter = ',')]
    proxies: Vec<Proxy>,
    /// Rounds; each rotates the modes
    #[arg(long, value_name = "N")]
    rounds: Option<usize>,
    /// How long one measurement lasts
    #[arg(long, value_name = "SECONDS")]
    seconds: Option<f64>,
    /// Where JSON, tables and plots go
    #[arg(long, default_value = "bench-out", value_name = "DIR")]
    out: PathBuf,
    #[command(subcommand)]
    part: Option<Part>,
}

/// What this binary is in the pods.
#[derive(Debug, Subcommand)]
enum Part {
    /// The application
    #[command(hide = true)]
    App { ip: IpAddr },
    /// The bare relay
    #[command(hide = true)]
    Relay {
        #[arg(long)]
        twin: Vec<TwinArg>,
    },
}

fn main() -> ExitCode {
    let args = Args::parse();
    let done = match &args.part {
        Some(Part::App { ip }) => app::serve(*ip),
        Some(Part::Relay { twin }) => relay::relay(twin),
        None => bench(&args),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) if interrupted() => {
            eprintln!("bench: interrupted; all that it had made is gone");
            ExitCode::from(130)
        }
        Err(err) => {
            eprintln!("bench: {err:#}");
            ExitCode::FAILURE
        }
    }
}

fn bench(args: &Args) -> Result<()> {
    ensure!(geteuid().is_root(), "this needs root: it makes network namespaces and loads eBPF");
    let settings = settings(args)?;
    let sidestep = match &args.sidestep {
        Some(path) => path.clone(),
        None => std::env::current_exe().context("finding this binary")?.with_file_name("sidestep"),
    };
    let sidestep = sidestep.canonicalize().with_context(|| {
        format!("there is no agent at {}: --sidestep says where it is", sidestep.display())
    })?;
    sidestep_figures::load_font()?;
    let mut environment = Environment::read(&sidestep)?;
    stop_on_signals()?;
    let start = Instant::now();
    let progress = Progress::new(settings.plan().len());
    let mut world = World::new(&sidestep)?;
    let (samples, result) = cells::run(&settings, &mut world, &progress);
    drop(world);
    environment.load_after = environment::load()?;
    environment.seconds = start.elapsed().as_secs();
    if samples.0.is_empty() {
        return result.and_then(|()| anyhow::bail!("nothing was to be measured"));
    }
    // Also when it was interrupted: what is measured is measured.
    let report = Report::new(environment, settings, samples);
    print!("{}", report.text());
    report.write(&args.out)?;
    println!("\nevery sample, tables and plots: {}", args.out.display());
    result?;
    let failures = report.samples.failures();
    ensure!(failures.is_empty(), "{} measurements failed, see above", failures.len());
    Ok(())
}

/// 10,000, or as many as a relay may have open, which takes two files for each.
fn most_connections() -> Result<usize> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).context("the limit of open files")?;
    Ok(usize::try_from(hard.saturating_sub(200) / 2)?.min(10_000))
}

fn settings(args: &Args) -> Result<Settings> {
    let mut settings = if args.smoke {
        Settings {
            rounds: 1,
            seconds: 0.05,
            groups: Group::EVERY.to_vec(),
            modes: Mode::EVERY.to_vec(),
            proxies: vec![Proxy::Relay],
            sizes: vec![64],
            connections: vec![1, 4],
            clients: vec![2],
            idle: 20,
            open: vec![20],
            pods: vec![3],
            stuck: 0.1,
            few_rounds: 1,
            at_once: true,
        }
    } else if args.quick {
        Settings {
            rounds: 3,
            seconds: 0.4,
            groups: vec![Group::Keepalive, Group::Connect, Group::Bulk, Group::Stopped],
            modes: Mode::EVERY.to_vec(),
            proxies: vec![Proxy::Relay, Proxy::Envoy],
            sizes: vec![64],
            connections: vec![1, 16],
            clients: vec![1, 8],
            idle: 200,
            open: vec![10, 1000],
            pods: vec![2, 30],
            stuck: 0.5,
            few_rounds: 1,
            at_once: false,
        }
    } else {
        Settings {
            rounds: 5,
            seconds: 0.8,
            groups: Group::EVERY.to_vec(),
            modes: Mode::EVERY.to_vec(),
            proxies: vec![Proxy::Relay, Proxy::Envoy, Proxy::Http],
            sizes: vec![64, 1 << 10, 16 << 10],
            connections: vec![1, 16, 64],
            clients: vec![1, 8],
            idle: 1000,
            open: vec![10, 100, 1000, most_connections()?],
            pods: vec![2, 50, 250],
            stuck: 1.0,
            few_rounds: 2,
            at_once: false,
        }
    };
    if let Some(rounds) = args.rounds {
        settings.rounds = rounds;
        settings.few_rounds = settings.few_rounds.min(rounds);
    }
    if let Some(seconds) = args.seconds {
        settings.seconds = seconds;
    }
    ensure!((1..=1000).contains(&settings.rounds), "--rounds must be between 1 and 1000");
    ensure!((0.01..=60.0).contains(&settings.seconds), "--seconds must be between 0.01 and 60");
    fn replace<T: Clone>(all: &mut Vec<T>, only: &[T]) {
        if !only.is_empty() {
            *all = only.to_vec();
        }
    }
    replace(&mut settings.groups, &args.only);
    replace(&mut settings.modes, &args.modes);
    replace(&mut settings.proxies, &args.proxies);
    Ok(settings)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    fn parsed(args: &[&str]) -> Result<Settings> {
        settings(&Args::try_parse_from([&["bench"], args].concat())?)
    }

    #[test]
    fn the_command_line_is_sound() {
        Args::command().debug_assert();
    }

    #[test]
    fn what_is_named_is_all_that_is_measured() {
        let args = ["--only", "bulk,stopped", "--modes", "iptables,all", "--rounds", "9"];
        let settings = parsed(&args).expect("settings");
        assert_eq!(settings.groups, [Group::Bulk, Group::Stopped]);
        assert_eq!(settings.modes, [Mode::Iptables, Mode::All]);
        assert_eq!(settings.rounds, 9);
        assert!(parsed(&["--only", "nothing"]).is_err());
        assert!(parsed(&["--rounds", "0"]).is_err());
        assert!(parsed(&["--seconds", "inf"]).is_err());
    }
}
