//! A kind cluster with the agent on every node and a mesh.

use std::cell::RefCell;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::{Node as ApiNode, Pod};
use kube::Api;
use kube::api::ListParams;
use serde_json::{Value, json};
use sidestep_lab::{interrupted, slowdown};

use super::{Mesh, Space, owned};
use crate::Node;
use crate::kind::keep_logs;
use crate::shell::Shell;

/// The agent's release, its namespace, its DaemonSet.
pub const AGENT: &str = "sidestep";
/// A node with this label has no kube-proxy.
const NO_KUBE_PROXY: &str = "sidestep-e2e/no-kube-proxy";
/// Takes kube-proxy's rules away, in either mode: it leaves them when it goes.
const CLEAN: &str = "\
    for table in iptables ip6tables; do\n\
        $table-save | grep -v KUBE | $table-restore || exit\n\
    done\n\
    for family in ip ip6; do nft delete table $family kube-proxy 2>/dev/null; done; true";
/// Between two tries of something that takes a while.
const PAUSE: Duration = Duration::from_millis(300);
/// How long helm waits, for its own `--timeout`.
const HELM: &str = "180s";

/// Kubernetes, the agent on each node, and a mesh beside it. What scenarios make is in a
/// [`Space`] of each.
pub struct Cluster {
    /// For the API server.
    pub node: Node,
    /// The installed mesh.
    pub mesh: Mesh,
    workers: Vec<String>,
    control_plane: String,
    here: Shell,
    /// The namespaces of the scenario that runs.
    spaces: RefCell<Vec<String>>,
}

impl Cluster {
    /// The kind cluster of this name: installs the agent first, as Linkerd's control plane is
    /// intercepted too, and then the mesh.
    pub fn start(name: &str, mesh: Mesh) -> Result<Self> {
        let node = Node::new(name)?;
        let nodes = node
            .api(async |client| Api::<ApiNode>::all(client).list(&ListParams::default()).await)?;
        let names = nodes.items.into_iter().filter_map(|node| node.metadata.name);
        let (control_plane, workers): (Vec<String>, Vec<String>) =
            names.partition(|name| name.ends_with("-control-plane"));
        ensure!(workers.len() >= 2, "the scenarios take two workers, and have {workers:?}");
        let control_plane = control_plane.into_iter().next().context("no control plane")?;
        let here = Shell::new(&[]);
        let spaces = RefCell::default();
        let cluster = Self { node, mesh, workers, control_plane, here, spaces };
        cluster.mesh.check(&cluster)?;
        cluster.install_agent(&[])?;
        cluster.mesh.install(&cluster)?;
        Ok(cluster)
    }

    /// A command on this machine.
    pub fn here(&self, argv: &[&str]) -> Result<String> {
        self.here.run(argv)
    }

    /// kubectl, as whoever the kubeconfig in use is about.
    pub fn kubectl(&self, args: &[&str]) -> Result<String> {
        self.here.run(&[&["kubectl"], args].concat())
    }

    /// Applies objects in YAML or JSON.
    pub fn apply_text(&self, text: &str) -> Result<()> {
        self.here.feed(&["kubectl", "apply", "-f", "-"], text).map(drop)
    }

    /// Applies objects.
    pub fn apply(&self, objects: &[Value]) -> Result<()> {
        let list = json!({"apiVersion": "v1", "kind": "List", "items": objects});
        self.apply_text(&list.to_string())
    }

    /// helm in a namespace.
    pub fn helm(&self, namespace: &str, verb: &[&str], args: &[&[String]]) -> Result<String> {
        let args = args.concat();
        let mut argv = vec!["helm", "--namespace", namespace];
        argv.extend(verb);
        argv.extend(args.iter().map(String::as_str));
        self.here.run(&argv)
    }

    /// Installs the agent on all nodes, or changes its values, and waits until it is ready.
    pub fn install_agent(&self, values: &[&str]) -> Result<()> {
        let common = ["charts/sidestep", "--create-namespace", "--set", "image.pullPolicy=Never"];
        let wait = ["--wait", "--timeout", HELM];
        let args = [&owned(&common)[..], &owned(values), &owned(&wait)];
        self.helm(AGENT, &["upgrade", "--install", AGENT], &args)?;
        self.agents_ready()
    }

    /// Uninstalls the agent, and waits until its pods are gone.
    pub fn uninstall_agent(&self) -> Result<()> {
        let args = owned(&["--ignore-not-found", "--wait", "--timeout", HELM]);
        self.helm(AGENT, &["uninstall", AGENT], &[&args])?;
        // helm 4 returns while nodes still unload.
        self.soon("the agents to be gone", || {
            let left = self.agents()?.len();
            ensure!(left == 0, "{left} are left");
            Ok(())
        })
    }

    /// helm's arguments for an agent that does without the API server's Service.
    pub fn direct_api(&self) -> Result<[String; 4]> {
        let jsonpath = "jsonpath={.items[0].endpoints[0].addresses[0]} {.items[0].ports[0].port}";
        let of = "kubernetes.io/service-name=kubernetes";
        let args = ["-n", "default", "get", "endpointslices", "-l", of, "-o", jsonpath];
        let said = self.kubectl(&args)?;
        let (host, port) = said.split_once(' ').with_context(|| format!("kubectl: {said:?}"))?;
        let set = || "--set".to_owned();
        Ok([set(), format!("apiServer.host={host}"), set(), format!("apiServer.port={port}")])
    }

    /// Takes kube-proxy and its rules from nodes, or has it come back there.
    pub fn kube_proxy(&self, nodes: &[&str], is_wanted: bool) -> Result<()> {
        let expression = json!({"key": NO_KUBE_PROXY, "operator": "DoesNotExist"});
        let terms = json!([{"matchExpressions": [expression]}]);
        let affinity = json!({"nodeAffinity": {
            "requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms},
        }});
        let affinity = if is_wanted { Value::Null } else { affinity };
        let patch = json!({"spec": {"template": {"spec": {"affinity": affinity}}}}).to_string();
        let label = format!("{NO_KUBE_PROXY}{}", if is_wanted { "-" } else { "=" });
        self.kubectl(&[&["label", "--overwrite", "node"], nodes, &[&label]].concat())?;
        let kubectl = |args: &[&str]| self.kubectl(&[&["-n", "kube-system"], args].concat());
        let daemonset = ["daemonset", "kube-proxy"];
        let by = ["--type", "merge", "--patch", &patch];
        kubectl(&[&["patch"], &daemonset[..], &by].concat())?;
        kubectl(&[&["rollout", "status"], &daemonset[..], &["--timeout", HELM]].concat())?;
        if is_wanted {
            return Ok(());
        }
        let format = "jsonpath={.items[*].spec.nodeName}";
        self.soon("kube-proxy to be gone", || {
            let left = kubectl(&["get", "pods", "-l", "k8s-app=kube-proxy", "-o", format])?;
            let is_left = left.split_whitespace().any(|node| nodes.contains(&node));
            ensure!(!is_left, "it is on {left}");
            Ok(())
        })?;
        for node in nodes {
            let cleaned = self.shell(node).script(CLEAN, &[]);
            cleaned.with_context(|| format!("taking kube-proxy's rules from {node}"))?;
        }
        Ok(())
    }

    /// Waits until each node has an agent that is ready.
    pub fn agents_ready(&self) -> Result<()> {
        let args = ["-n", AGENT, "rollout", "status", "daemonset", AGENT, "--timeout", HELM];
        self.kubectl(&args).map(drop)
    }

    fn agents(&self) -> Result<Vec<Pod>> {
        let ours = ListParams::default().labels("app.kubernetes.io/name=sidestep");
        let listed =
            self.node.api(async |client| Api::<Pod>::namespaced(client, AGENT).list(&ours).await);
        Ok(listed?.items)
    }

    /// The name of the agent's pod on a node.
    pub fn agent_on(&self, node: &str) -> Result<String> {
        let on_node = |pod: &Pod| {
            let spec = pod.spec.as_ref();
            spec.is_some_and(|spec| spec.node_name.as_deref() == Some(node))
                && pod.metadata.deletion_timestamp.is_none()
        };
        let pod = self.agents()?.into_iter().find(on_node);
        let pod = pod.with_context(|| format!("{node} has no agent"))?;
        pod.metadata.name.context("a pod without a name")
    }

    /// What `sidestep status` says on a node.
    pub fn status(&self, node: &str) -> Result<Value> {
        let agent = self.agent_on(node)?;
        let args = ["-n", AGENT, "exec", &agent, "--", "/sidestep", "status", "--output", "json"];
        let text = self.kubectl(&args)?;
        serde_json::from_str(&text).with_context(|| format!("the agent's status: {text}"))
    }

    /// The pod `NAMESPACE/NAME` in that, where the agent has it.
    pub fn enrolled(&self, node: &str, pod: &str) -> Result<Option<Value>> {
        let status = self.status(node)?;
        let pods = status["pods"].as_array().context("a status without pods")?;
        Ok(pods.iter().find(|entry| entry["pod"] == pod).cloned())
    }

    /// A namespace for a scenario's objects, whose pods get sidecars. It goes with the scenario.
    pub fn space(&self, name: &str) -> Result<Space<'_>> {
        self.space_with(name, self.mesh.injected())
    }

    /// The same, with pods as they are.
    pub fn plain_space(&self, name: &str) -> Result<Space<'_>> {
        self.space_with(name, json!({}))
    }

    /// The same, with this metadata of the namespace.
    pub fn space_with(&self, name: &str, metadata: Value) -> Result<Space<'_>> {
        self.spaces.borrow_mut().push(name.to_owned());
        Space::new(self, name, metadata)
    }

    /// Ends a scenario: takes its namespaces away, and all is as it was for the next. Where it has
    /// failed, `logs` gets what there is to know.
    pub fn end(&self, failed: bool, logs: &Path) {
        let spaces = self.spaces.take();
        if failed {
            let all = spaces.iter().map(String::as_str);
            let all = all.chain([AGENT, self.mesh.control_plane().0]);
            keep_logs(&self.here, &all.collect::<Vec<_>>(), logs);
            if let Err(err) = self.install_agent(&[]) {
                eprintln!("e2e: {err:#}");
            }
        }
        for space in spaces {
            let delete = ["delete", "namespace", &space, "--ignore-not-found", "--wait=false"];
            if let Err(err) = self.kubectl(&delete) {
                eprintln!("e2e: {err:#}");
            }
        }
    }

    /// A node that pods run on, by its number.
    pub fn worker(&self, number: usize) -> Result<&str> {
        let worker = self.workers.get(number);
        worker.map(String::as_str).with_context(|| format!("there is no worker {number}"))
    }

    /// The workers, by name.
    pub fn workers(&self) -> &[String] {
        &self.workers
    }

    /// The control plane's node, by name.
    pub fn control_plane(&self) -> &str {
        &self.control_plane
    }

    /// For commands on a node.
    pub fn shell(&self, node: &str) -> Shell {
        Shell::new(&["docker", "exec", "--privileged", "-i", node])
    }

    /// How long a pod may take to come up or to go.
    pub fn patience(&self) -> Duration {
        self.node.patience()
    }

    /// Waits until all Deployments of a namespace, or one, are as they should be.
    pub fn rolled_out(&self, namespace: &str, name: &str) -> Result<()> {
        let what = format!("deployment/{name}");
        let what = if name.is_empty() { "deployment" } else { &what };
        let args = ["-n", namespace, "rollout", "status", what, "--timeout", HELM];
        self.kubectl(&args).map(drop)
    }

    /// Tries until it succeeds; then fails with the last reason.
    pub fn soon<T>(&self, what: &str, attempt: impl FnMut() -> Result<T>) -> Result<T> {
        self.within(self.patience(), what, attempt)
    }

    /// The same, for so long.
    pub fn within<T>(
        &self,
        patience: Duration,
        what: &str,
        mut attempt: impl FnMut() -> Result<T>,
    ) -> Result<T> {
        let end = Instant::now() + patience * slowdown();
        loop {
            match attempt() {
                Ok(value) => return Ok(value),
                Err(err) if interrupted() => return Err(err.context("interrupted")),
                Err(err) if Instant::now() >= end => {
                    return Err(err.context(format!("waited for {what}")));
                }
                // Each try may take a program or several.
                Err(_) => thread::sleep(PAUSE),
            }
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if let Err(err) = self.uninstall_agent() {
            eprintln!("e2e: {err:#}");
        }
    }
}
