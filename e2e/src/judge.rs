//! Kubernetes' own conformance tests of the network judge: with the agent and a mesh in the cluster
//! they pass what they pass without.

use std::collections::BTreeSet;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;
use sidestep_e2e::mesh::{Cluster, Mesh};

/// What is run: 45 specs of Kubernetes 1.34.
const FOCUS: &str = r"\[sig-network\].*\[Conformance\]";
/// With fewer that pass it is the cluster that is broken, and a comparison says nothing.
const ENOUGH: usize = 40;

/// Where the tests are, and where their logs go.
pub struct Tests {
    /// `e2e.test`, as `e2e/cluster/parts.sh` builds it.
    pub program: PathBuf,
    /// Its `KUBE_TEST_REPO_LIST`, as `e2e/cluster/kubernetes-tests.sh` writes it.
    pub repositories: PathBuf,
    /// Logs and reports: `without.log`, `without.json`, `with.log`, `with.json`.
    pub out: PathBuf,
}

/// What a spec can come to, of what Ginkgo reports.
#[derive(Debug, Default, PartialEq, Eq)]
struct Verdicts {
    passed: BTreeSet<String>,
    failed: BTreeSet<String>,
}

/// Runs the tests without the agent and the mesh, then with both, and compares.
pub fn judge(tests: &Tests, kind: &str, mesh: Mesh) -> Result<()> {
    fs::create_dir_all(&tests.out).with_context(|| format!("making {}", tests.out.display()))?;
    let without = tests.run("without")?;
    let passed = without.passed.len();
    ensure!(passed >= ENOUGH, "without Sidestep only {passed} specs pass: {:#?}", without.failed);
    let name = mesh.name();
    let cluster = Cluster::start(kind, mesh)?;
    let with = tests.run("with")?;
    drop(cluster);
    let broken: Vec<_> = without.passed.difference(&with.passed).collect();
    let mended: Vec<_> = with.passed.difference(&without.passed).collect();
    ensure!(
        broken.is_empty() && mended.is_empty(),
        "with Sidestep and {name} other specs pass: broken: {broken:#?}, passed only then: {mended:#?}"
    );
    println!("{passed} specs pass, with Sidestep and {name} and without");
    if !without.failed.is_empty() {
        println!("these fail either way: {:#?}", without.failed);
    }
    Ok(())
}

impl Tests {
    fn run(&self, name: &str) -> Result<Verdicts> {
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
        println!("{FOCUS} {name} Sidestep and a mesh: {}", log.display());
        let start = Instant::now();
        // It fails when a spec does: the report says which.
        Command::new(&self.program)
            .args(["--provider=skeleton", "--ginkgo.no-color"])
            .arg(format!("--ginkgo.focus={FOCUS}"))
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
}
