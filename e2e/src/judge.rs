//! Kubernetes' own tests of the network judge: with the agent and a mesh in the cluster they pass what
//! they pass without.

use std::collections::BTreeSet;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;
use serde::Deserialize;
use sidestep_e2e::mesh::{Cluster, Mesh};

/// What is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Suite {
    /// The conformance tests of the network, without the agent and a mesh, and with both: 45 specs
    /// of Kubernetes 1.34.
    Conformance,
    /// All tests that need no cloud of Services and of what leads to them: without the agent and
    /// a mesh; with both, and Services translated beside kube-proxy; and without kube-proxy.
    Services,
}

impl Suite {
    fn focus(self) -> &'static str {
        match self {
            Self::Conformance => r"\[sig-network\].*\[Conformance\]",
            Self::Services => {
                r"\[sig-network\] (Services|Networking|DNS|Conntrack|EndpointSlice|Traffic Distribution|HostPort|Proxy)"
            }
        }
    }
}

/// Specs that are not run: features that a cluster has to be made for, and what breaks it for others.
const SKIP: &str = r"\[Feature:|\[Disruptive\]";

/// With a smaller part of the specs passing it is the cluster that is broken, and a comparison says
/// nothing.
const ENOUGH: f64 = 0.85;

/// What only kube-proxy does: parts of the names of specs that fail without it, and why.
const BY_KUBE_PROXY: &[(&str, &str)] = &[
    ("functioning NodePort service", NODE_PORT),
    ("session affinity work for NodePort service", NODE_PORT),
    ("switch session affinity for NodePort service", NODE_PORT),
    ("from ExternalName to NodePort", NODE_PORT),
];
/// Why some fail.
const NODE_PORT: &str =
    "they dial the NodePorts of all nodes, and Sidestep leaves other nodes' to kube-proxy";

/// Where the tests are, and where their logs go.
pub struct Tests {
    /// `e2e.test`, as `e2e/cluster/parts.sh` builds it.
    pub program: PathBuf,
    /// Its `KUBE_TEST_REPO_LIST`, as `e2e/cluster/kubernetes-tests.sh` writes it.
    pub repositories: PathBuf,
    /// Logs and reports: `without.log`, `without.json`, `with.log`, `with.json`, and of Services
    /// `alone.log`, `alone.json`.
    pub out: PathBuf,
    /// What is run.
    pub suite: Suite,
    /// In place of the suite's own, which specs: a regular expression of Go's.
    pub focus: Option<String>,
}

/// What a spec can come to, of what Ginkgo reports.
#[derive(Debug, Default, PartialEq, Eq)]
struct Verdicts {
    passed: BTreeSet<String>,
    failed: BTreeSet<String>,
}

/// Runs the tests without the agent and the mesh, then with both, and compares; Services also
/// without kube-proxy.
pub fn judge(tests: &Tests, kind: &str, mesh: Mesh) -> Result<()> {
    fs::create_dir_all(&tests.out).with_context(|| format!("making {}", tests.out.display()))?;
    let without = tests.run("without", "without Sidestep and a mesh")?;
    let (passed, failed) = (without.passed.len(), without.failed.len());
    let is_enough = passed as f64 >= ENOUGH * (passed + failed) as f64 && passed > 0;
    ensure!(is_enough, "without Sidestep only {passed} specs pass: {:#?}", without.failed);
    let name = mesh.name();
    let cluster = Cluster::start(kind, mesh)?;
    if tests.suite == Suite::Services {
        cluster.install_agent(&["--set", "services.enabled=true"])?;
    }
    let with = tests.run("with", "with both")?;
    let mut differences = without.differences(&with, &format!("with Sidestep and {name}"), &[]);
    if tests.suite == Suite::Services {
        let workers = cluster.workers().iter().map(String::as_str);
        let nodes: Vec<&str> = workers.chain([cluster.control_plane()]).collect();
        let direct = cluster.direct_api()?;
        let values =
            [&["--set", "services.enabled=true"], &direct.each_ref().map(String::as_str)[..]];
        cluster.install_agent(&values.concat())?;
        cluster.kube_proxy(&nodes, false)?;
        let alone = tests.run("alone", "with both, and no kube-proxy")?;
        cluster.kube_proxy(&nodes, true)?;
        differences.extend(without.differences(&alone, "without kube-proxy", BY_KUBE_PROXY));
    }
    drop(cluster);
    ensure!(differences.is_empty(), "{}", differences.join("\n"));
    println!("{passed} specs pass, with Sidestep and {name} and without");
    if !without.failed.is_empty() {
        println!("these fail either way: {:#?}", without.failed);
    }
    Ok(())
}

impl Verdicts {
    /// What passes here and not there, or the other way round, but for what is `known` to fail
    /// there.
    fn differences(&self, there: &Self, name: &str, known: &[(&str, &str)]) -> Vec<String> {
        let is_known = |spec: &&String| known.iter().any(|(part, _)| spec.contains(part));
        let broken = self.passed.difference(&there.passed).filter(|spec| !is_known(spec));
        let mended = there.passed.difference(&self.passed);
        let known = there.passed.iter().filter(is_known);
        broken
            .map(|spec| format!("{name}, this fails: {spec}"))
            .chain(mended.map(|spec| format!("{name}, this passes, and else not: {spec}")))
            .chain(known.map(|spec| format!("{name}, this passes, and is known to fail: {spec}")))
            .collect()
    }
}

impl Tests {
    fn run(&self, name: &str, how: &str) -> Result<Verdicts> {
        let log = self.out.join(format!("{name}.log"));
        let report = self.out.join(format!("{name}.json"));
        let file = fs::File::create(&log).with_context(|| format!("making {}", log.display()))?;
        // One of an earlier run would be taken for this one's, where this one leaves none.
        match fs::remove_file(&report) {
            Err(err) if err.kind() != ErrorKind::NotFound => {
                return Err(err).with_context(|| format!("removing {}", report.display()));
            }
            _ => {}
        }
        let focus = self.focus.as_deref().unwrap_or(self.suite.focus());
        println!("{focus} {how}: {}", log.display());
        let start = Instant::now();
        // It fails when a spec does: the report says which.
        Command::new(&self.program)
            .args(["--provider=skeleton", "--ginkgo.no-color"])
            .arg(format!("--ginkgo.focus={focus}"))
            .arg(format!("--ginkgo.skip={SKIP}"))
            .arg(format!("--ginkgo.json-report={}", absolute(&report)?.display()))
            .env("KUBE_TEST_REPO_LIST", absolute(&self.repositories)?)
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .status()
            .with_context(|| format!("running {}", self.program.display()))?;
        let text = fs::read_to_string(&report)
            .with_context(|| format!("it left no report, and in {} it says why", log.display()))?;
        let verdicts = verdicts(&text)?;
        let (passed, failed) = (verdicts.passed.len(), verdicts.failed.len());
        println!("       {passed} passed, {failed} failed, {} s", start.elapsed().as_secs());
        Ok(verdicts)
    }
}

fn absolute(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path).with_context(|| format!("finding {}", path.display()))
}

/// Ginkgo's report, as far as it is read here.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Report {
    #[serde(default)]
    spec_reports: Vec<Spec>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Spec {
    /// Null for what is no spec: the set-up of all.
    container_hierarchy_texts: Option<Vec<String>>,
    leaf_node_text: String,
    state: String,
}

fn verdicts(report: &str) -> Result<Verdicts> {
    let suites: Vec<Report> = serde_json::from_str(report).context("reading Ginkgo's report")?;
    let mut verdicts = Verdicts::default();
    for spec in suites.into_iter().flat_map(|suite| suite.spec_reports) {
        let mut words = spec.container_hierarchy_texts.unwrap_or_default();
        words.push(spec.leaf_node_text);
        let name = words.join(" ");
        match spec.state.as_str() {
            "skipped" | "pending" => {}
            // The set-up that passes has no name.
            "passed" if words.len() == 1 => {}
            "passed" => drop(verdicts.passed.insert(name)),
            _ => drop(verdicts.failed.insert(name)),
        }
    }
    Ok(verdicts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_is_read() -> Result<()> {
        let report = r#"[{"SuiteSucceeded": false, "SpecReports": [
            {"ContainerHierarchyTexts": null, "LeafNodeText": "", "State": "passed"},
            {"ContainerHierarchyTexts": ["a", "b"], "LeafNodeText": "c", "State": "passed"},
            {"ContainerHierarchyTexts": ["a"], "LeafNodeText": "d", "State": "timedout"},
            {"ContainerHierarchyTexts": ["a"], "LeafNodeText": "e", "State": "skipped"}
        ]}]"#;
        let set = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        let wanted = Verdicts { passed: set(&["a b c"]), failed: set(&["a d"]) };
        assert_eq!(verdicts(report)?, wanted);
        Ok(())
    }

    #[test]
    fn differences_are_named_but_for_those_that_are_known() {
        let passing = |names: &[&str]| Verdicts {
            passed: names.iter().map(|name| (*name).to_owned()).collect(),
            failed: BTreeSet::new(),
        };
        let here = passing(&["a", "b NodePort", "c"]);
        let known = [("NodePort", "kube-proxy's")];
        assert!(here.differences(&here, "there", &[]).is_empty());
        assert!(here.differences(&passing(&["a", "c"]), "there", &known).is_empty());
        assert_eq!(here.differences(&passing(&["a", "c"]), "there", &[]).len(), 1, "it fails");
        assert_eq!(here.differences(&here, "there", &known).len(), 1, "it passes after all");
        let others = passing(&["a", "c", "d"]);
        assert_eq!(here.differences(&others, "there", &known).len(), 1, "it passes there alone");
    }
}
