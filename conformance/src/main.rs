//! `make conformance`: every row of interception, once under the mesh's own iptables rules and
//! once under Sidestep, and what differs.
#![forbid(unsafe_code)]

mod act;
mod deliberate;
mod manifest;
mod observed;
mod report;
mod row;
mod rows;
mod udp;
mod validator;
mod world;

use std::collections::{BTreeMap, VecDeque};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use sidestep_lab::iptables::{Backend, PilotAgent, Record};
use sidestep_lab::{interrupted, stop_on_signals};

use crate::observed::Observed;
use crate::report::{Line, Report, Used};
use crate::row::{Kind, Listeners, Mesh, Row, Setup, matches};
use crate::world::{Stage, Way, World};

/// What follows in a file of documentation is written by a run.
const MARKER: &str = "<!-- What follows is written by a run. -->";

/// Each has a node of its own.
const THREADS: usize = 2;

/// How long a row's connections may take at the first look, and at further ones where that was too
/// short for what the contract says. Nothing here is far away.
const PATIENCE: [Duration; 3] =
    [Duration::from_millis(1500), Duration::from_secs(5), Duration::from_secs(15)];

/// Compares what the meshes' iptables rules do with what Sidestep does, row by row.
#[derive(Parser)]
struct Args {
    /// The agent's binary [default: `sidestep` next to this binary]
    #[arg(long, value_name = "PATH")]
    sidestep: Option<PathBuf>,
    /// Only rows of this mesh
    #[arg(long)]
    mesh: Option<Mesh>,
    /// Only rows whose name matches, such as `T1` or `istio/T1*`
    #[arg(long, value_name = "PATTERN")]
    row: Option<String>,
    /// Only run the meshes' own rules, and hold them against the contract
    #[arg(long)]
    oracle_only: bool,
    /// Istio's binary [default: parts/bin/pilot-agent below $SIDESTEP_LAB_DIR, or below
    /// /var/lib/sidestep-lab]
    #[arg(long, value_name = "PATH")]
    pilot_agent: Option<PathBuf>,
    /// Run nothing, but write what Istio's binary installs into lab/records/istio
    #[arg(long)]
    record: bool,
    /// Write all observations as JSON
    #[arg(long, value_name = "PATH")]
    json: Option<PathBuf>,
    /// Write the table into this file of documentation, below its marker
    #[arg(long, value_name = "PATH")]
    markdown: Option<PathBuf>,
    /// Only show rows that are not as they should be
    #[arg(long, short)]
    quiet: bool,
}

fn main() -> ExitCode {
    let args = Args::parse();
    match stop_on_signals().and_then(|()| conformance(&args)) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(_) if interrupted() => ExitCode::from(130),
        Err(err) => {
            eprintln!("conformance: {err:#}");
            ExitCode::FAILURE
        }
    }
}

/// Runs everything; whether all is as it should be.
fn conformance(args: &Args) -> Result<bool> {
    let start = Instant::now();
    if args.record {
        return record(&pilot_agent(args)?).map(|()| true);
    }
    let filtered = args.mesh.is_some() || args.row.is_some() || args.oracle_only;
    let mut rows = rows::rows();
    rows.retain(|row| {
        let named = |pattern: &String| matches(pattern, &row.id) || matches(pattern, &row.name());
        args.mesh.is_none_or(|mesh| mesh == row.setup.mesh) && args.row.as_ref().is_none_or(named)
    });
    ensure!(!rows.is_empty(), "no row is called so");
    let istio: Vec<Row> =
        rows.iter().filter(|row| row.setup.mesh == Mesh::Istio).cloned().collect();
    let pilot_agent = if istio.is_empty() { None } else { Some(pilot_agent(args)?) };
    let run = |way, rows: &[Row]| run(way, pilot_agent.as_ref(), rows);
    // The oracles first and alone: nothing of Sidestep is loaded while they run.
    let iptables = run(Way::Rules(Backend::Iptables), &rows)?;
    let oracle = start.elapsed();
    let nftables = match istio[..] {
        [] => Outcomes::new(),
        _ => run(Way::Rules(Backend::Nftables), &istio)?,
    };
    let oracles = start.elapsed();
    let sidestep =
        if args.oracle_only { Outcomes::new() } else { run(Way::Sidestep(&binary(args)?), &rows)? };

    let mut used = Used::default();
    let mut lines = Vec::new();
    for row in &rows {
        for kind in row.kinds {
            let key = (row.name(), *kind);
            let theirs = iptables.get(&key).cloned().context("a row did not run")?;
            let observed = |all: &Outcomes| all.get(&key).map(|outcome| outcome.observed.clone());
            let (native, ours) = (observed(&nftables), observed(&sidestep));
            lines.push(Line::new(row, *kind, theirs, native, ours, &mut used));
        }
    }
    let stale = pilot_agent.as_ref().map(Record::stale).transpose()?.unwrap_or_default();
    let stale = stale.into_iter().map(|(path, _)| path).collect();
    let report = Report::new(lines, stale, (!filtered).then_some(&used));
    print!("{}", report.table(!args.quiet));
    println!(
        "{:.0} s, of which {:.0} s for iptables and {:.0} s for Istio's nftables",
        start.elapsed().as_secs_f64(),
        oracle.as_secs_f64(),
        (oracles - oracle).as_secs_f64()
    );
    let write = |path: &Path, text: String| {
        fs::write(path, text).with_context(|| format!("writing {}", path.display()))
    };
    if let Some(path) = &args.json {
        write(path, serde_json::to_string_pretty(&report)?)?;
    }
    if let Some(path) = &args.markdown {
        let text =
            fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
        let (head, _) = text
            .split_once(MARKER)
            .with_context(|| format!("{} has no line {MARKER}", path.display()))?;
        write(path, format!("{head}{MARKER}\n\n{}", report.markdown()))?;
    }
    Ok(report.good())
}

fn binary(args: &Args) -> Result<PathBuf> {
    if let Some(path) = &args.sidestep {
        return Ok(path.clone());
    }
    let own = std::env::current_exe().context("finding this binary")?;
    Ok(own.with_file_name("sidestep"))
}

fn pilot_agent(args: &Args) -> Result<PilotAgent> {
    args.pilot_agent.as_deref().map_or_else(PilotAgent::find, PilotAgent::at)
}

/// Writes the record of Istio's rules anew.
fn record(pilot_agent: &PilotAgent) -> Result<()> {
    for (path, text) in Record::stale(pilot_agent)? {
        fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
        println!("wrote {}", path.display());
    }
    Ok(())
}

/// What was observed of a row, and where that contradicts the contract.
#[derive(Clone, Default)]
pub struct Outcome {
    observed: Vec<Observed>,
    contradiction: Option<String>,
}

type Outcomes = BTreeMap<(String, Kind), Outcome>;

/// Runs the rows in one way, those that can share a pod together.
fn run(way: Way<'_>, pilot_agent: Option<&PilotAgent>, rows: &[Row]) -> Result<Outcomes> {
    let mut groups: BTreeMap<&Setup, Vec<&Row>> = BTreeMap::new();
    for row in rows {
        groups.entry(&row.setup).or_default().push(row);
    }
    let queue = Mutex::new(groups.into_iter().collect::<VecDeque<_>>());
    let outcomes = Mutex::new(Outcomes::new());
    let worker = |number: usize| -> Result<()> {
        let name = way.name();
        let mut world = World::new(&format!("{name}-{number}"), way, pilot_agent, rows)?;
        loop {
            let next = queue.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
            let Some((setup, rows)) = next else { return Ok(()) };
            let done =
                group(&mut world, setup, &rows).with_context(|| format!("{name}, {setup:?}"))?;
            outcomes.lock().unwrap_or_else(PoisonError::into_inner).extend(done);
            if interrupted() {
                bail!("interrupted");
            }
        }
    };
    thread::scope(|scope| {
        let worker = &worker;
        let threads: Vec<_> =
            (0..THREADS).map(|number| scope.spawn(move || worker(number))).collect();
        threads.into_iter().try_for_each(|thread| match thread.join() {
            Ok(done) => done,
            Err(panic) => std::panic::resume_unwind(panic),
        })
    })?;
    Ok(outcomes.into_inner().unwrap_or_else(PoisonError::into_inner))
}

/// Runs rows in a fresh pod.
fn group(world: &mut World, setup: &Setup, rows: &[&Row]) -> Result<Outcomes> {
    let mut stage = world.stage(setup, rows)?;
    let mut outcomes = Outcomes::new();
    let passes = if setup.listeners == Listeners::Late { 2 } else { 1 };
    for pass in 0..passes {
        if pass > 0 {
            stage.start_proxy()?;
        }
        for row in rows {
            stage.clean()?;
            for kind in row.kinds {
                let name = || format!("{} {}", row.name(), kind.name());
                let look = |patience| -> Result<_> {
                    let observed = act::perform(&stage, setup.mesh, &row.act, *kind, patience)
                        .with_context(name)?;
                    let contradiction = contradiction(&stage, row, *kind, pass, &observed)?;
                    Ok((observed, contradiction))
                };
                let (mut observed, mut contradiction) = look(PATIENCE[0])?;
                // A busy machine may have lost a packet, or not have run the server.
                for patience in &PATIENCE[1..] {
                    if contradiction.is_none() || !observed.iter().any(Observed::timed_out) {
                        break;
                    }
                    stage.clean()?;
                    (observed, contradiction) = look(*patience)?;
                }
                let outcome = outcomes.entry((row.name(), *kind)).or_default();
                outcome.contradiction = outcome.contradiction.take().or(contradiction);
                outcome.observed.extend(observed);
            }
        }
    }
    Ok(outcomes)
}

/// What in these observations the contract does not say.
fn contradiction(
    stage: &Stage<'_>,
    row: &Row,
    kind: Kind,
    pass: usize,
    observed: &[Observed],
) -> Result<Option<String>> {
    let expect = row.expected(pass);
    for (place, observed) in Stage::targets(&row.act).into_iter().zip(observed) {
        let mut target = act::target_name(stage, place, kind, row.act.target().1)?;
        if place == row::Place::Unspecified {
            target = act::target_name(stage, row::Place::Localhost, kind, row.act.target().1)?;
        }
        let found = observed.contradicts(&expect, &target, |place| stage.place_name(place, kind));
        if found.is_some() {
            return Ok(found);
        }
    }
    Ok(None)
}
