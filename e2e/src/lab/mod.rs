//! A node: containerd, runc and CNI in a network namespace and a cgroup of its own, with the
//! small API server and the small kubelet. Everything goes when it is dropped.

mod containerd;
mod image;
mod process;

use std::env;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use serde_json::json;
use sidestep_lab::Lab;

use crate::ApiServer;
use crate::kubelet::{Kubelet, KubeletOpts};
use crate::shell::{Shell, run};

pub use containerd::Containerd;
pub use process::Process;

/// The node's name.
pub const NODE: &str = "node-1";
/// The image with `e2e-pod`, which sandboxes are made of too.
pub const IMAGE: &str = "e2e.local/pod:1";
/// The node's own address.
const NODE_IP: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 77, 0, 1));

/// A node. Its API server has the namespaces `default`, `kube-system` and `shop`.
pub struct LabNode {
    // Dropped in this order.
    kubelet: Option<Kubelet>,
    containerd: Containerd,
    server: ApiServer,
    shell: Shell,
    lab: Lab,
}

impl LabNode {
    /// Makes a node, and waits until it takes pods. Needs root, containerd, runc and CNI's
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
        write_image(&archive)?;
        containerd.import(&archive)?;
        let net = format!("--net=/run/netns/{}", lab.node_name());
        let shell = Shell::new(&["nsenter", &net, "--"], Arc::new(run));
        let mut node = Self { kubelet: None, containerd, server, shell, lab };
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
            logs: self.pod_logs(),
        };
        self.kubelet = Some(self.lab.on_node(|| Kubelet::start(opts))??);
        Ok(())
    }

    /// For commands on the node.
    pub fn shell(&self) -> &Shell {
        &self.shell
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

    /// The directory of the pods' logs.
    pub fn pod_logs(&self) -> PathBuf {
        self.lab.dir().join("pods")
    }

    /// Of CNI: the configuration's, the plugins'.
    pub fn cni_dirs(&self) -> (String, String) {
        let text = |path: PathBuf| path.to_string_lossy().into_owned();
        (text(self.containerd.cni_conf_dir()), text(self.containerd.cni_bin_dir()))
    }

    /// The network namespace of the pod with this uid, as CNI was told it.
    pub fn netns(&self, uid: &str) -> Result<PathBuf> {
        let info = self.containerd.with_cri(async |mut cri| {
            let all = cri.sandboxes(Some(uid)).await?;
            let newest = all.iter().max_by_key(|sandbox| sandbox.created_at);
            cri.sandbox(&newest.context("the pod has no sandbox")?.id).await
        })?;
        info.netns.context("the pod is in the host's network")
    }

    /// Keeps the logs for a look: copies them to `dir`.
    pub fn keep_logs(&self, dir: &Path) -> Result<()> {
        copy_logs(self.lab.dir(), dir)
    }
}

/// Writes the image of the scenarios' pods, [`IMAGE`], as an archive for `ctr` or `kind`.
pub fn write_image(archive: &Path) -> Result<()> {
    image::write(archive, IMAGE, &pod_program()?, &["pause"])
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
        let pods = path.components().any(|part| part.as_os_str() == "pods");
        if path.is_dir() && pods {
            copy_logs(&path, &target)?;
        } else if path.extension().is_some_and(|extension| extension == "log") {
            fs::copy(&path, &target).with_context(|| format!("copying {}", path.display()))?;
        }
    }
    Ok(())
}
