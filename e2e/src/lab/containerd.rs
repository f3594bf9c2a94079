//! containerd with directories of its own, on the lab's node.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use serde_json::{Value, json};
use sidestep_lab::{Lab, Service, wait_for};
use tokio::runtime::Runtime;
use tokio::time::timeout;

use crate::cri::Cri;

/// Where Debian has the CNI plugins.
const PLUGINS: &str = "/usr/lib/cni";
/// How long the removal of all pods may take.
const REMOVAL: Duration = Duration::from_secs(20);

/// A running containerd, and what it needs. On drop all its pods are removed and it ends.
pub struct Containerd {
    runtime: Runtime,
    dir: PathBuf,
    cri: Cri,
    service: Service,
}

impl Containerd {
    /// Starts it and waits until it is ready. `image` is what sandboxes are made of.
    pub fn start(lab: &Lab, image: &str) -> Result<Self> {
        let dir = lab.dir().join("containerd");
        for name in ["", "root", "state", "net.d", "bin", "ipam"] {
            fs::create_dir_all(dir.join(name)).context("making containerd's directories")?;
        }
        for plugin in ["bridge", "host-local", "loopback"] {
            let from = Path::new(PLUGINS).join(plugin);
            ensure!(from.is_file(), "there is no {}: run scripts/deps.sh --e2e", from.display());
            symlink(from, dir.join("bin").join(plugin)).context("linking a CNI plugin")?;
        }
        fs::write(dir.join("net.d/10-e2e.conflist"), format!("{:#}\n", network(&dir)))
            .context("writing the CNI configuration")?;
        let config = dir.join("config.toml");
        fs::write(&config, configuration(&dir, image)).context("writing containerd's settings")?;

        let mut service = lab
            .spawn_on_node("containerd", ["containerd".as_ref(), "--config".as_ref(), &*config])?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("making a runtime")?;
        let socket = dir.join("containerd.sock");
        let mut ended = false;
        let cri = wait_for("containerd to be ready", Duration::from_secs(30), || {
            ended = !service.is_running();
            let ready = runtime.block_on(async {
                let mut cri = Cri::connect(&socket).await.ok()?;
                cri.not_ready().await.ok()?.is_empty().then_some(cri)
            });
            match ready {
                _ if ended => Some(Err(anyhow!("containerd has ended"))),
                ready => ready.map(Ok),
            }
        })
        .and_then(|cri| cri)
        .with_context(|| service.log_tail())?;
        Ok(Self { runtime, dir, cri, service })
    }

    /// Its socket.
    pub fn socket(&self) -> PathBuf {
        self.dir.join("containerd.sock")
    }

    /// Where CNI's configuration is.
    pub fn cni_conf_dir(&self) -> PathBuf {
        self.dir.join("net.d")
    }

    /// Where CNI's plugins are.
    pub fn cni_bin_dir(&self) -> PathBuf {
        self.dir.join("bin")
    }

    /// Imports an image from an archive.
    pub fn import(&self, archive: &Path) -> Result<()> {
        let out = Command::new("ctr")
            .arg("--address")
            .arg(self.socket())
            // As kind does.
            .args(["--namespace", "k8s.io", "images", "import", "--all-platforms", "--digests"])
            .arg(archive)
            .output()
            .context("running ctr")?;
        let said = String::from_utf8_lossy(&out.stderr);
        ensure!(out.status.success(), "importing {}: {}", archive.display(), said.trim());
        Ok(())
    }

    /// Talks to it.
    pub fn with_cri<T>(&self, talk: impl AsyncFnOnce(Cri) -> T) -> T {
        self.runtime.block_on(talk(self.cri.clone()))
    }

    /// The end of what it said, for error messages.
    pub fn log_tail(&self) -> String {
        self.service.log_tail()
    }

    /// Removes all pods, as far as CNI allows.
    fn remove_sandboxes(&self) -> Result<()> {
        let remove = async |mut cri: Cri| -> Result<()> {
            for sandbox in cri.sandboxes(None).await? {
                let stopped = cri.stop_sandbox(&sandbox.id).await;
                let removed = cri.remove_sandbox(&sandbox.id).await;
                stopped.and(removed).map_err(|status| anyhow!("{}", status.message()))?;
            }
            Ok(())
        };
        let limited = self.with_cri(async |cri| timeout(REMOVAL, remove(cri)).await);
        limited.context("containerd takes too long to remove its pods")?
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        if let Err(err) = self.remove_sandboxes() {
            eprintln!("e2e: {err:#}");
        }
        // Its shims, and what is left in its pods, end with it.
    }
}

/// The pods' network: a bridge on the node, addresses from 10.88.0.0/16.
fn network(dir: &Path) -> Value {
    json!({
        "cniVersion": "1.0.0",
        "name": "e2e",
        "plugins": [{
            "type": "bridge",
            "bridge": "cni0",
            "isGateway": true,
            "hairpinMode": true,
            "ipam": {
                "type": "host-local",
                "dataDir": dir.join("ipam"),
                "ranges": [[{"subnet": "10.88.0.0/16"}]],
                "routes": [{"dst": "0.0.0.0/0"}],
            },
        }],
    })
}

fn configuration(dir: &Path, image: &str) -> String {
    let dir = dir.display();
    // restrict_oom_score_adj: without CAP_SYS_RESOURCE no process may get a better score.
    format!(
        r#"version = 2
root = "{dir}/root"
state = "{dir}/state"
disabled_plugins = [
    "io.containerd.internal.v1.opt",
    "io.containerd.snapshotter.v1.aufs",
    "io.containerd.snapshotter.v1.btrfs",
    "io.containerd.snapshotter.v1.devmapper",
    "io.containerd.snapshotter.v1.zfs",
]

[grpc]
address = "{dir}/containerd.sock"

[ttrpc]
address = "{dir}/containerd.ttrpc.sock"

[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{image}"
restrict_oom_score_adj = true
disable_apparmor = true
netns_mounts_under_state_dir = true

[plugins."io.containerd.grpc.v1.cri".cni]
conf_dir = "{dir}/net.d"
bin_dir = "{dir}/bin"
max_conf_num = 1
"#
    )
}
