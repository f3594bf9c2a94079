//! The scenarios: each on a node of its own.

mod birth;
mod changes;
mod faults;
mod plain;
mod pods;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use sidestep_e2e::lab::{Agent, AgentOpts, Node};
use sidestep_lab::{interrupted, stop_on_signals};

/// What a scenario works with.
pub struct World {
    /// The agent's executable.
    pub binary: PathBuf,
    /// The node; gone when a scenario took it down itself.
    pub node: Node,
    /// For how long the API server is away; none: for moments.
    pub away: Duration,
}

impl World {
    /// Starts the agent with its CNI plugin and waits until it is ready.
    pub fn agent(&self) -> Result<Agent> {
        self.agent_with(&[])
    }

    /// The same, with more arguments.
    pub fn agent_with(&self, args: &[&str]) -> Result<Agent> {
        let args = args.iter().map(|arg| (*arg).to_owned()).collect();
        Agent::start(&self.binary, &self.node, AgentOpts { cni: true, args })
    }
}

/// One scenario.
pub struct Scenario {
    /// For `--only`.
    pub name: &'static str,
    /// What it shows, in a line.
    pub doc: &'static str,
    run: fn(&mut World) -> Result<()>,
}

/// All scenarios, in the order of their running.
pub fn all() -> Vec<Scenario> {
    [plain::SCENARIOS, birth::SCENARIOS, changes::SCENARIOS, faults::SCENARIOS]
        .concat()
        .into_iter()
        .map(|(name, doc, run)| Scenario { name, doc, run })
        .collect()
}

/// What the modules list: name, doc line, function.
type Row = (&'static str, &'static str, fn(&mut World) -> Result<()>);

/// Runs those whose names contain `only`, a line for each. Logs of failures are kept in `logs`.
pub fn run(binary: &Path, only: &str, logs: &Path, away: Duration) -> Result<()> {
    stop_on_signals()?;
    let chosen: Vec<Scenario> =
        all().into_iter().filter(|scenario| scenario.name.contains(only)).collect();
    ensure!(!chosen.is_empty(), "no scenario's name contains {only:?}");
    let mut failed = 0;
    for scenario in &chosen {
        let start = Instant::now();
        let result = run_one(binary, scenario, &logs.join(scenario.name), away);
        let seconds = start.elapsed().as_secs_f64();
        match &result {
            Ok(()) => println!("ok     {:<24} {seconds:5.1} s", scenario.name),
            Err(err) => {
                failed += 1;
                println!("FAILED {:<24} {seconds:5.1} s\n{err:#}", scenario.name);
            }
        }
        if interrupted() {
            bail!("interrupted");
        }
    }
    println!("{} passed, {failed} failed", chosen.len() - failed);
    ensure!(failed == 0, "logs: {}", logs.display());
    Ok(())
}

fn run_one(binary: &Path, scenario: &Scenario, logs: &Path, away: Duration) -> Result<()> {
    let mut world = World { binary: binary.to_owned(), node: Node::start()?, away };
    let result = (scenario.run)(&mut world);
    if result.is_err() {
        let _ = fs::remove_dir_all(logs);
        world.node.keep_logs(logs)?;
    }
    result.with_context(|| scenario.doc.to_owned())
}
