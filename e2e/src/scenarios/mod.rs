//! The scenarios: each on a node of its own.

mod birth;
mod changes;
mod faults;
mod plain;
mod pods;

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use sidestep_e2e::{Agent, Node};
use sidestep_lab::{interrupted, stop_on_signals};

/// What a scenario works with.
pub struct World {
    /// The agent's executable.
    pub binary: PathBuf,
    /// The node.
    pub node: Node,
    /// For how long the API server is away; none: for moments.
    pub away: Duration,
}

impl World {
    /// Starts the agent with its CNI plugin and waits until it is ready.
    pub fn agent(&self) -> Result<Agent<'_>> {
        self.node.agent(&self.binary, 30)
    }

    /// The same, with a plugin that waits for an agent that is away for a second only.
    pub fn impatient_agent(&self) -> Result<Agent<'_>> {
        self.node.agent(&self.binary, 1)
    }
}

/// Where scenarios run.
#[derive(Clone, Debug)]
pub enum Place {
    /// Each on a node of its own, without a cluster.
    Lab,
    /// In the kind cluster of this name.
    Kind(String),
}

/// What they run with.
pub struct Settings {
    /// Where.
    pub place: Place,
    /// The agent's executable, for the lab.
    pub binary: PathBuf,
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
    /// Why it takes the lab, if it does.
    pub lab_alone: Option<&'static str>,
    run: fn(&World) -> Result<()>,
}

/// All scenarios, in the order of their running.
pub fn all() -> Vec<Scenario> {
    let common = [birth::SCENARIOS, changes::SCENARIOS, faults::SCENARIOS].concat();
    let common = common.into_iter().map(|row| (row, None));
    let lab = plain::SCENARIOS.iter().chain(faults::LAB_SCENARIOS);
    let lab = lab.map(|(row, why)| (*row, Some(*why)));
    lab.chain(common)
        .map(|((name, doc, run), lab_alone)| Scenario { name, doc, lab_alone, run })
        .collect()
}

/// What the modules list: name, doc line, function.
type Row = (&'static str, &'static str, fn(&World) -> Result<()>);

/// Runs those whose names contain `only`, a line for each.
pub fn run(settings: &Settings, only: &str) -> Result<()> {
    stop_on_signals()?;
    let chosen: Vec<Scenario> =
        all().into_iter().filter(|scenario| scenario.name.contains(only)).collect();
    ensure!(!chosen.is_empty(), "no scenario's name contains {only:?}");
    let (mut passed, mut failed, mut elsewhere) = (0, 0, 0);
    for scenario in &chosen {
        if let (Place::Kind(_), Some(why)) = (&settings.place, scenario.lab_alone) {
            elsewhere += 1;
            println!("-      {:<24} not on this cluster: {why}", scenario.name);
            continue;
        }
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
    let elsewhere = match elsewhere {
        0 => String::new(),
        number => format!(", {number} not on this cluster"),
    };
    println!("{passed} passed, {failed} failed{elsewhere}");
    ensure!(failed == 0, "logs: {}", settings.logs.display());
    Ok(())
}

fn run_one(settings: &Settings, scenario: &Scenario) -> Result<()> {
    let node = match &settings.place {
        Place::Lab => Node::lab()?,
        Place::Kind(name) => Node::kind(name)?,
    };
    let world = World { binary: settings.binary.clone(), node, away: settings.away };
    let result = (scenario.run)(&world);
    if result.is_err() {
        let logs = settings.logs.join(scenario.name);
        let _ = fs::remove_dir_all(&logs);
        world.node.keep_logs(&logs)?;
    }
    result.with_context(|| scenario.doc.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Nothing else is left out, wherever the suite runs.
    #[test]
    fn what_takes_the_lab() {
        let names: Vec<&str> = all()
            .iter()
            .filter(|scenario| scenario.lab_alone.is_some())
            .map(|scenario| scenario.name)
            .collect();
        let own = ["smoke", "cni-refuses", "kubelet-alone", "pod-life"];
        assert_eq!(names, [&own[..], &["api-gone-status"]].concat());
        assert_eq!(all().len(), 22);
    }
}
