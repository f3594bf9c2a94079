//! The scenarios: each begins with an empty node, or with a namespace of its own in a cluster that
//! has the agent on each node and a mesh.

mod birth;
mod changes;
mod faults;
mod life;
mod load;
mod mesh;
mod pods;
mod services;
mod switch;

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use sidestep_e2e::mesh::{Cluster, Mesh};
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
    /// The mesh; none: without the scenarios that take one.
    pub mesh: Option<Mesh>,
    /// For how long the API server is away; none: for moments.
    pub away: Duration,
    /// Where the logs of those that fail are kept.
    pub logs: PathBuf,
}

/// A scenario.
pub struct Scenario {
    /// The name that `--only` selects by.
    pub name: &'static str,
    /// What it shows, in a line.
    pub doc: &'static str,
    run: Body,
}

#[derive(Clone, Copy)]
enum Body {
    /// With a node of its own, and an agent there if it starts one.
    Agent(fn(&World) -> Result<()>),
    /// In the cluster that all of its kind share, under these meshes.
    Mesh(Of, fn(&Cluster) -> Result<()>),
}

/// Which meshes a scenario is about.
#[derive(Clone, Copy)]
pub enum Of {
    /// Whichever there is.
    All,
    /// What it needs only Istio has.
    Istio,
    /// Istio with Gateway API.
    GatewayApi,
}

impl Of {
    /// Why it is not for this mesh, if it is not.
    fn refuses(self, mesh: Option<&Mesh>) -> Option<&'static str> {
        let Some(mesh) = mesh else { return Some("without a mesh") };
        match (self, mesh.istio()) {
            (Self::Istio | Self::GatewayApi, None) => Some("it is about Istio"),
            (Self::GatewayApi, Some(istio)) if istio.gateway_api().is_none() => {
                Some("without Gateway API")
            }
            _ => None,
        }
    }
}

/// All scenarios, in the order of their running.
pub fn all() -> Vec<Scenario> {
    let alone = [birth::SCENARIOS, changes::SCENARIOS, faults::SCENARIOS].concat();
    let alone = alone.into_iter().map(|(name, doc, run)| (name, doc, Body::Agent(run)));
    let mesh =
        [mesh::SCENARIOS, load::SCENARIOS, switch::SCENARIOS, services::SCENARIOS, life::SCENARIOS]
            .concat();
    let mesh = mesh.into_iter().map(|(name, doc, of, run)| (name, doc, Body::Mesh(of, run)));
    alone.chain(mesh).map(|(name, doc, run)| Scenario { name, doc, run }).collect()
}

/// Those that say most in little time: `make test` has some minutes for them.
pub const QUICK: &[&str] = &[
    "mesh-start",
    "mesh-mtls",
    "mesh-annotation",
    "mesh-dns",
    "mesh-inits",
    "load-reinstall",
    "life-sandbox",
    "life-static",
];

/// What the modules list: name, doc line, function.
type Row = (&'static str, &'static str, fn(&World) -> Result<()>);
/// The same for what shares a cluster with a mesh.
type MeshRow = (&'static str, &'static str, Of, fn(&Cluster) -> Result<()>);

/// Runs those for which `chosen` holds, a line for each.
pub fn run(settings: &Settings, chosen: impl Fn(&Scenario) -> bool) -> Result<()> {
    stop_on_signals()?;
    let chosen: Vec<Scenario> = all().into_iter().filter(chosen).collect();
    ensure!(!chosen.is_empty(), "no scenario has such a name: see `e2e list`");
    // Made for the first that wants it.
    let mut cluster = None;
    let (mut passed, mut failed, mut left_out) = (0, 0, 0);
    for scenario in &chosen {
        if let Body::Mesh(of, _) = scenario.run
            && let Some(why) = of.refuses(settings.mesh.as_ref())
        {
            left_out += 1;
            println!("-      {:<24} {why}", scenario.name);
            continue;
        }
        let start = Instant::now();
        let result = run_one(settings, &mut cluster, scenario);
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
    println!("{passed} passed, {failed} failed, {left_out} left out");
    ensure!(failed == 0, "logs: {}", settings.logs.display());
    Ok(())
}

fn run_one(settings: &Settings, cluster: &mut Option<Cluster>, scenario: &Scenario) -> Result<()> {
    let logs = settings.logs.join(scenario.name);
    let _ = fs::remove_dir_all(&logs);
    let result = match (scenario.run, &settings.mesh) {
        (Body::Mesh(_, run), Some(mesh)) => {
            let start = Instant::now();
            let cluster = match cluster {
                Some(cluster) => cluster,
                None => {
                    let made = Cluster::start(&settings.kind, mesh.clone())?;
                    let seconds = start.elapsed().as_secs_f64();
                    println!("       {} and the agents are ready: {seconds:.1} s", mesh.name());
                    cluster.insert(made)
                }
            };
            let result = run(cluster);
            cluster.end(result.is_err(), &logs);
            result
        }
        (Body::Mesh(..), None) => bail!("without a mesh"),
        (Body::Agent(run), _) => {
            let world = World { node: Node::new(&settings.kind)?, away: settings.away };
            let result = run(&world);
            if result.is_err() {
                world.node.keep_logs(&logs);
            }
            result
        }
    };
    result.with_context(|| scenario.doc.to_owned())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn quick_ones_exist_and_names_are_unique() {
        let all = all();
        let names: BTreeSet<&str> = all.iter().map(|scenario| scenario.name).collect();
        assert_eq!(names.len(), all.len());
        for name in QUICK {
            assert!(names.contains(name), "there is no scenario {name}");
        }
    }
}
