//! A node: containerd, runc and CNI in a network namespace and a cgroup of its own, with the
//! small API server and the small kubelet. Everything goes when it is dropped.

mod agent;
mod containerd;
mod image;

use std::env;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use sidestep_lab::{Answer, Lab, Seen, ask, wait_for};

use crate::ApiServer;
use crate::kubelet::{Kubelet, KubeletOpts};

pub use agent::{Agent, AgentOpts};
pub use containerd::Containerd;

/// The node's name.
pub const NODE: &str = "node-1";
/// The image with `e2e-pod`, which sandboxes are made of too.
pub const IMAGE: &str = "e2e.local/pod:1";
/// The node's own address.
const NODE_IP: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 77, 0, 1));
/// How long a pod may take to come up or go.
const POD: Duration = Duration::from_secs(20);

/// A node. Its API server has the namespaces `default`, `kube-system` and `shop`.
pub struct Node {
    // Dropped in this order.
    kubelet: Option<Kubelet>,
    containerd: Containerd,
    server: ApiServer,
    lab: Lab,
}

impl Node {
    /// Makes a node and waits until it takes pods. Needs root, containerd, runc and CNI's
    /// plugins.
    pub fn start() -> Result<Self> {
        let lab = Lab::new("e2e")?;
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, 6443));
        let server = lab.on_node(|| ApiServer::start(address))??;
        server.put(json!({
            "apiVersion": "v1",
            "kind": "Namespace",
            "metadata": {"name": "shop"},
        }))?;
        server.put(json!({
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {"name": NODE, "labels": {"kubernetes.io/hostname": NODE}},
        }))?;
        let containerd = Containerd::start(&lab, IMAGE)?;
        let archive = lab.dir().join("image.tar");
        image::write(&archive, IMAGE, &pod_program()?, &["pause"])?;
        containerd.import(&archive)?;
        let mut node = Self { kubelet: None, containerd, server, lab };
        node.server.write_kubeconfig(&node.kubeconfig())?;
        node.start_kubelet()?;
        Ok(node)
    }

    fn start_kubelet(&mut self) -> Result<()> {
        let cgroup = self.lab.cgroup().file_name().context("the lab's cgroup has no name")?;
        let opts = KubeletOpts {
            node: NODE.to_owned(),
            node_ip: NODE_IP,
            kubeconfig: self.kubeconfig(),
            socket: self.containerd.socket(),
            cgroup_parent: format!("/{}", cgroup.to_string_lossy()),
            logs: self.lab.dir().join("pods"),
        };
        self.kubelet = Some(self.lab.on_node(|| Kubelet::start(opts))??);
        Ok(())
    }

    /// The API server.
    pub fn server(&self) -> &ApiServer {
        &self.server
    }

    /// The container runtime.
    pub fn containerd(&self) -> &Containerd {
        &self.containerd
    }

    /// The node's namespace, cgroup and files.
    pub fn lab(&self) -> &Lab {
        &self.lab
    }

    /// A kubeconfig for the API server.
    pub fn kubeconfig(&self) -> PathBuf {
        self.lab.dir().join("kubeconfig")
    }

    /// Creates a pod, which is for this node, in the namespace `shop`. `metadata` and `spec` are
    /// merged over what all pods here have; containers without an image get [`IMAGE`].
    pub fn create_pod(&self, name: &str, metadata: Value, mut spec: Value) -> Result<()> {
        for list in ["initContainers", "containers"] {
            for container in spec[list].as_array_mut().into_iter().flatten() {
                if container["image"].is_null() {
                    container["image"] = json!(IMAGE);
                }
            }
        }
        let mut pod = json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": metadata,
            "spec": spec,
        });
        pod["metadata"]["name"] = json!(name);
        pod["metadata"]["namespace"] = json!("shop");
        pod["spec"]["nodeName"] = json!(NODE);
        pod["spec"]["terminationGracePeriodSeconds"] = json!(1);
        self.server.put(pod).map(drop)
    }

    /// The pod as the API server has it. Fails when it has none.
    pub fn pod(&self, name: &str) -> Result<Value> {
        self.server.get("pods", "shop", name)?.with_context(|| format!("there is no pod {name}"))
    }

    /// Waits until the pod is in a phase, and gives it. Fails with the events when it gets into
    /// another final one.
    pub fn wait_phase(&self, name: &str, phase: &str) -> Result<Value> {
        let what = format!("the pod {name} to be {phase}");
        let waited = wait_for(&what, POD, || {
            let pod = self.pod(name).ok()?;
            match pod["status"]["phase"].as_str() {
                Some(now) if now == phase => Some(Ok(pod)),
                Some(now @ ("Succeeded" | "Failed")) => Some(Err(anyhow::anyhow!("it is {now}"))),
                _ => None,
            }
        });
        waited
            .and_then(|pod| pod.context(what))
            .with_context(|| format!("events: {:#?}", self.events(name)))
    }

    /// Waits until the pod runs, and gives its address.
    pub fn wait_running(&self, name: &str) -> Result<IpAddr> {
        let pod = self.wait_phase(name, "Running")?;
        let ip = pod["status"]["podIP"].as_str().unwrap_or_default();
        ip.parse().with_context(|| format!("the address of the pod {name}: {ip:?}"))
    }

    /// Deletes the pod as a user would, and waits until it is gone.
    pub fn delete_pod(&self, name: &str) -> Result<()> {
        let now = json!({"metadata": {
            "deletionTimestamp": "2026-01-01T00:00:00Z",
            "deletionGracePeriodSeconds": 1,
        }});
        self.server.patch("pods", "shop", name, &now)?;
        wait_for(&format!("the pod {name} to be gone"), POD, || {
            self.pod(name).is_err().then_some(())
        })
        .with_context(|| format!("events: {:#?}", self.events(name)))
    }

    /// What was said of a pod in events: `REASON: NOTE`.
    pub fn events(&self, name: &str) -> Vec<String> {
        let events = self.server.list("events.events.k8s.io").unwrap_or_default();
        let about = events.iter().filter(|event| event["regarding"]["name"] == name);
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        about.map(|event| format!("{}: {}", text(&event["reason"]), text(&event["note"]))).collect()
    }

    /// What a container has written to its stdout so far.
    pub fn log(&self, pod: &str, container: &str) -> String {
        let file = self.lab.dir().join(format!("pods/shop_{pod}/{container}.log"));
        let text = fs::read_to_string(file).unwrap_or_default();
        // "TIME STREAM F TEXT"
        let lines = text.lines().filter_map(|line| line.splitn(4, ' ').nth(3));
        lines.map(|line| format!("{line}\n")).collect()
    }

    /// The pod's network namespace, as CNI was told it.
    pub fn netns(&self, name: &str) -> Result<PathBuf> {
        let info = self.sandbox(name)?;
        info.netns.with_context(|| format!("the pod {name} is in the host's network"))
    }

    /// The pod's pause process.
    pub fn pid(&self, name: &str) -> Result<u64> {
        self.sandbox(name)?.pid.with_context(|| format!("the pod {name} has no process"))
    }

    fn sandbox(&self, name: &str) -> Result<crate::cri::SandboxInfo> {
        let pod = self.pod(name)?;
        let uid = pod["metadata"]["uid"].as_str().unwrap_or_default();
        self.containerd.with_cri(async |mut cri| {
            let all = cri.sandboxes(Some(uid)).await?;
            let newest = all.iter().max_by_key(|sandbox| sandbox.created_at);
            let newest = newest.with_context(|| format!("the pod {name} has no sandbox"))?;
            cri.sandbox(&newest.id).await
        })
    }

    /// Waits until somebody on this address answers the node.
    pub fn wait_answer(&self, target: SocketAddr) -> Result<Seen> {
        self.lab.on_node(|| {
            wait_for(&format!("an answer of {target}"), POD, || {
                ask(target, None).ok().map(|answer| answer.seen)
            })
        })?
    }

    /// Connects from inside the pod as `uid` and reads the greeting.
    pub fn ask(&self, pod: &str, uid: u32, target: SocketAddr) -> Result<Answer> {
        Lab::in_netns(&self.netns(pod)?, uid, uid, || ask(target, None))?
            .with_context(|| format!("uid {uid} of {pod} asking {target}"))
    }

    /// Keeps the logs for a look: copies them to `dir`.
    pub fn keep_logs(&self, dir: &Path) -> Result<()> {
        copy_logs(self.lab.dir(), dir)
    }
}

/// The program for the pods, which is built beside this one.
fn pod_program() -> Result<PathBuf> {
    let own = env::current_exe().context("looking for this very program")?;
    // Tests are one directory further down.
    for dir in own.ancestors().skip(1).take(2) {
        let program = dir.join("e2e-pod");
        if program.is_file() {
            return Ok(program);
        }
    }
    bail!("there is no e2e-pod beside {}: run cargo build -p sidestep-e2e", own.display())
}

fn copy_logs(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to).with_context(|| format!("making {}", to.display()))?;
    let entries = fs::read_dir(from).with_context(|| format!("reading {}", from.display()))?;
    for entry in entries.flatten() {
        let (path, target) = (entry.path(), to.join(entry.file_name()));
        let pods = path.strip_prefix(from).is_ok_and(|path| path == Path::new("pods"));
        if path.is_dir() && (pods || from.ends_with("pods")) {
            copy_logs(&path, &target)?;
        } else if path.extension().is_some_and(|extension| extension == "log") {
            fs::copy(&path, &target).with_context(|| format!("copying {}", path.display()))?;
        }
    }
    Ok(())
}
