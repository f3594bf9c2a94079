//! The scenarios: each begins with an empty node.

mod birth;
mod changes;
mod faults;
mod pods;

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use sidestep_e2e::{Agent, Node};
use sidestep_lab::{interrupted, stop_on_signals};

/// What a scenario works with.
pub struct World {
    /// The node.
    pub node: Node,
    /// For how long the API server is away; none: for moments.
    pub away: Duration,
}

impl World {
    /// Starts the agent with its CNI plugin and waits until it is ready.
    pub fn agent(&self) -> Result<Agent<'_>> {
        self.node.agent(30)
    }

    /// The same, with a plugin that waits for an agent that is away for a second only.
    pub fn impatient_agent(&self) -> Result<Agent<'_>> {
        self.node.agent(1)
    }
}

/// What they run with.
pub struct Settings {
    /// The kind cluster's name.
    pub kind: String,
    /// For how long the API server is away; none: for moments.
    pub away: Duration,
    /// Where the logs of those that fail are kept.
    pub logs: PathBuf,
}

/// One scenario.
pub struct Scenario {
    /// For `--only`.
    pub name: &'static str,
    /// What it shows, in a line.
    pub doc: &'static str,
    run: fn(&World) -> Result<()>,
}

/// All scenarios, in the order of their running.
pub fn all() -> Vec<Scenario> {
    let all = [birth::SCENARIOS, changes::SCENARIOS, faults::SCENARIOS].concat();
    all.into_iter().map(|(name, doc, run)| Scenario { name, doc, run }).collect()
}

/// What the modules list: name, doc line, function.
type Row = (&'static str, &'static str, fn(&World) -> Result<()>);

/// Runs those whose names contain `only`, a line for each.
pub fn run(settings: &Settings, only: &str) -> Result<()> {
    stop_on_signals()?;
    let chosen: Vec<Scenario> =
        all().into_iter().filter(|scenario| scenario.name.contains(only)).collect();
    ensure!(!chosen.is_empty(), "no scenario's name contains {only:?}");
    let (mut passed, mut failed) = (0, 0);
    for scenario in &chosen {
        let start = Instant::now();
        let result = run_one(settings, scenario);
        let seconds = start.elapsed().as_secs_f64();
        match &result {
            Ok(()) => {
                passed += 1;
                println!("ok     {:<24} {seconds:5.1} s", scenario.name);
            }
            Err(err) => {
                failed += 1;
                println!("FAILED {:<24} {seconds:5.1} s\n{err:#}", scenario.name);
            }
        }
        if interrupted() {
            bail!("interrupted");
        }
    }
    println!("{passed} passed, {failed} failed");
    ensure!(failed == 0, "logs: {}", settings.logs.display());
    Ok(())
}

fn run_one(settings: &Settings, scenario: &Scenario) -> Result<()> {
    let world = World { node: Node::new(&settings.kind)?, away: settings.away };
    let result = (scenario.run)(&world);
    if result.is_err() {
        let logs = settings.logs.join(scenario.name);
        let _ = fs::remove_dir_all(&logs);
        world.node.keep_logs(&logs)?;
    }
    result.with_context(|| scenario.doc.to_owned())
}
