//! A cluster of kind's, which `e2e/cluster/cluster.sh` makes: its worker is the node, and the chart
//! brings the agent.

use std::cell::RefCell;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::{Node as ApiNode, Pod};
use k8s_openapi::api::rbac::v1::ClusterRole;
use kube::Api;
use kube::api::{ListParams, Patch, PatchParams};
use serde_json::{Value, json};
use sidestep_lab::wait_until;

use crate::Node;
use crate::shell::{Shell, text_of};

/// The release, its namespace, and so the names of what the chart makes.
const RELEASE: &str = "sidestep";
/// The DaemonSet, as [`Node`] names objects.
const DAEMONSET: &str = "sidestep/sidestep";
/// The label of nodes that are to have an agent: `charts/sidestep/ci/e2e.yaml`.
const LABEL: &str = "sidestep-e2e";
/// Where the kubelet starts the API server from, and a place beside it.
const MANIFEST: &str = "/etc/kubernetes/manifests/kube-apiserver.yaml";
const ASIDE: &str = "/etc/kubernetes/kube-apiserver.yaml";

/// The cluster.
pub struct Kind {
    node: String,
    shell: Shell,
    control_plane: Shell,
    /// This machine, which has helm.
    here: Shell,
    /// What the last agent wrote that was uninstalled.
    agent_log: RefCell<String>,
}

impl Kind {
    /// The cluster with this name.
    pub fn new(name: &str) -> Self {
        let (node, other) = (format!("{name}-worker"), format!("{name}-control-plane"));
        let exec = |node: &str| Shell::new(&["docker", "exec", "--privileged", "-i", node]);
        Self {
            shell: exec(&node),
            control_plane: exec(&other),
            here: Shell::new(&[]),
            agent_log: RefCell::default(),
            node,
        }
    }

    /// The name of the node.
    pub fn node(&self) -> &str {
        &self.node
    }

    /// For commands on the node.
    pub fn shell(&self) -> &Shell {
        &self.shell
    }

    /// Takes the API server from its kubelet.
    pub fn stop_api(&self) -> Result<()> {
        self.control_plane.run(&["mv", MANIFEST, ASIDE]).map(drop)
    }

    /// Gives it back, if it was taken.
    pub fn resume_api(&self) -> Result<()> {
        let script = "if [ -e \"$1\" ]; then mv \"$1\" \"$2\"; fi";
        self.control_plane.script(script, &[ASIDE, MANIFEST]).map(drop)
    }

    /// Whether the agent may list pods, by its ClusterRole.
    pub fn allow_lists(&self, node: &Node, allowed: bool) -> Result<()> {
        node.api(async |client| {
            let roles = Api::<ClusterRole>::all(client);
            let mut rules = roles.get(RELEASE).await?.rules.unwrap_or_default();
            for rule in &mut rules {
                if rule.resources.iter().flatten().any(|resource| resource == "pods") {
                    rule.verbs.retain(|verb| verb != "list");
                    rule.verbs.extend(allowed.then(|| "list".to_owned()));
                }
            }
            let patch = json!({"rules": rules});
            roles.patch(RELEASE, &PatchParams::default(), &Patch::Merge(&patch)).await.map(drop)
        })
    }

    /// Writes what there is to know of the scenario's pods, and the agent's, to files in `dir`.
    pub fn keep_logs(&self, dir: &Path) {
        keep_logs(&self.here, &["shop"], dir);
        keep(dir, "agent.log", &self.agent_log.borrow());
    }
}

/// Writes what Kubernetes knows of these namespaces to files in `dir`, a scenario having failed
/// there. What cannot be had is said in its place: it must not hide why the scenario failed.
pub fn keep_logs(here: &Shell, namespaces: &[&str], dir: &Path) {
    let kubectl = |args: &[&str]| {
        let said = here.run(&[&["kubectl"], args].concat());
        said.unwrap_or_else(|err| format!("{err:#}\n"))
    };
    keep(dir, "pods.txt", &kubectl(&["get", "pods", "-A", "-o", "wide"]));
    for namespace in namespaces {
        let about = kubectl(&["-n", namespace, "describe", "pods"]);
        let events = kubectl(&["-n", namespace, "get", "events", "--sort-by=.lastTimestamp"]);
        keep(dir, &format!("{namespace}.txt"), &format!("{about}\n{events}"));
        let mut logs = String::new();
        for pod in kubectl(&["-n", namespace, "get", "pods", "-o", "name"]).lines() {
            let all = ["--all-containers", "--prefix", "--timestamps", "--tail=2000"];
            logs += &kubectl(&[&["-n", namespace, "logs", pod], &all[..]].concat());
        }
        keep(dir, &format!("{namespace}.log"), &logs);
    }
}

fn keep(dir: &Path, name: &str, text: &str) {
    let file = dir.join(name);
    if let Err(err) = fs::create_dir_all(dir).and_then(|()| fs::write(&file, text)) {
        eprintln!("e2e: writing {}: {err}", file.display());
    }
}

/// The chart's release. The node's label decides whether its agent is there: when it goes, the
/// DaemonSet ends its pod as for a new version. Nothing here waits until the agent is ready.
pub struct Release<'a> {
    node: &'a Node,
    kind: &'a Kind,
    cni_timeout: u32,
    installed: bool,
    layout: Option<String>,
}

impl<'a> Release<'a> {
    /// One that is still to be installed.
    pub fn new(node: &'a Node, kind: &'a Kind, cni_timeout: u32) -> Self {
        Self { node, kind, cni_timeout, installed: false, layout: None }
    }

    fn helm(&self, verb: &str, args: &[&str]) -> Result<()> {
        let common = ["helm", "--namespace", RELEASE, verb, RELEASE];
        self.kind.here.run(&[&common, args, &["--wait", "--timeout", "180s"]].concat()).map(drop)
    }

    fn label(&self, value: Option<&str>) -> Result<()> {
        let patch = json!({"metadata": {"labels": {LABEL: value}}});
        let (name, params, patch) =
            (self.kind.node(), PatchParams::default(), Patch::Merge(&patch));
        self.node.api(async |client| {
            Api::<ApiNode>::all(client).patch(name, &params, &patch).await.map(drop)
        })
    }

    fn wait_gone(&self) -> Result<()> {
        let agents = ListParams::default()
            .labels("app.kubernetes.io/name=sidestep")
            .fields(&format!("spec.nodeName={}", self.kind.node));
        let gone = || {
            let pods = self
                .node
                .api(async |client| Api::<Pod>::namespaced(client, RELEASE).list(&agents).await);
            pods.is_ok_and(|pods| pods.items.is_empty())
        };
        wait_until("the agent's pod to be gone", self.node.patience(), gone)
    }

    /// Starts it, for the first time or after it was ended.
    pub fn launch(&mut self) -> Result<()> {
        self.label(Some("here"))?;
        if !self.installed {
            // Before it is: what fails half way is to be removed as well.
            self.installed = true;
            let timeout = format!("cni.timeoutSeconds={}", self.cni_timeout);
            let values = ["--values", "charts/sidestep/ci/e2e.yaml", "--set", &timeout];
            self.helm(
                "install",
                &[&["charts/sidestep", "--create-namespace"][..], &values].concat(),
            )?;
        }
        Ok(())
    }

    /// SIGKILL; it stays away. The programs stay attached.
    pub fn kill9(&mut self) -> Result<()> {
        let pid = self.pid().context("the agent does not run")?;
        self.kind.shell.run(&["kill", "-9", &pid.to_string()])?;
        // Or the kubelet starts it again.
        self.terminate()
    }

    /// Ends it as for a new version, and waits for the end. The programs stay attached.
    pub fn terminate(&mut self) -> Result<()> {
        self.label(None)?;
        self.wait_gone()
    }

    /// Replaces it by a build whose maps have another layout than its own, or by itself.
    pub fn upgrade_to(&mut self, layout: Option<&str>) -> Result<()> {
        self.layout = layout.map(str::to_owned);
        let daemonset = self.node.get::<DaemonSet>(DAEMONSET)?.context("there is no DaemonSet")?;
        let template = daemonset.spec.context("a DaemonSet without spec")?.template;
        let containers = with_layout(json!(template.spec.unwrap_or_default().containers), layout);
        let patch = json!({"spec": {"template": {"spec": {"containers": containers}}}});
        self.node.patch::<DaemonSet>(DAEMONSET, &patch)?;
        wait_until("the agent to be replaced", self.node.patience(), || {
            let daemonset = self.node.get::<DaemonSet>(DAEMONSET);
            daemonset.is_ok_and(|daemonset| daemonset.is_some_and(|one| is_rolled_out(&one)))
        })
    }

    /// Ends it and takes everything away. Nothing where that has been done.
    pub fn uninstall(&mut self) -> Result<()> {
        if !self.installed {
            return Ok(());
        }
        // It goes with the pod. What has never run has no log.
        let about = self.kind.here.run(&["kubectl", "-n", RELEASE, "describe", "pods"]);
        let about = about.unwrap_or_else(|err| format!("{err:#}"));
        self.kind.agent_log.replace(format!("{about}\n{}", self.log()));
        // A scenario may have failed while the API server was away.
        self.node.resume_api()?;
        self.helm("uninstall", &["--ignore-not-found"])?;
        self.wait_gone()?;
        self.installed = false;
        self.label(None)
    }

    /// Deletes its DaemonSet, and waits until it has ended.
    pub fn delete_daemonset(&mut self) -> Result<()> {
        self.node.delete::<DaemonSet>(DAEMONSET)?;
        self.wait_gone()
    }

    /// Its process on the node, where it runs.
    pub fn pid(&mut self) -> Option<u32> {
        self.kind.shell.run(&["pgrep", "-o", "-x", "sidestep"]).ok()?.trim().parse().ok()
    }

    /// Runs a command of its binary where it runs.
    pub fn sidestep(&mut self, args: &[&str]) -> Result<String> {
        let pid = self.pid().context("the agent does not run")?.to_string();
        let mut argv = vec!["nsenter", "-t", &pid, "--mount", "--", "/sidestep"];
        argv.extend(args);
        argv.extend(self.layout.iter().flat_map(|layout| ["--layout", layout]));
        self.kind.shell.run(&argv)
    }

    /// What it has written.
    pub fn log(&self) -> String {
        let log = self.kind.shell.script("cat /var/log/pods/sidestep_*/agent/*.log", &[]);
        log.map_or_else(|err| format!("{err:#}"), |log| text_of(&log))
    }

    /// The directory of its pins on the node.
    pub fn bpffs(&self) -> String {
        "/sys/fs/bpf/sidestep".to_owned()
    }
}

/// Containers of the DaemonSet, whose agent is to use that layout; none: its own.
fn with_layout(mut containers: Value, layout: Option<&str>) -> Value {
    if let Some(args) = containers[0]["args"].as_array_mut() {
        args.retain(|arg| !arg.as_str().is_some_and(|arg| arg.starts_with("--layout=")));
        args.extend(layout.map(|layout| json!(format!("--layout={layout}"))));
    }
    containers
}

/// Whether all its pods are of its last version, and ready.
fn is_rolled_out(daemonset: &DaemonSet) -> bool {
    let Some(status) = &daemonset.status else { return false };
    let wanted = status.desired_number_scheduled;
    status.observed_generation == daemonset.metadata.generation
        && status.updated_number_scheduled == Some(wanted)
        && status.number_available == Some(wanted)
}
