//! The agent in the lab: a process in the node's network namespace, started with the flags of its
//! pod.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::json;
use sidestep_lab::Service;
use sidestep_lab::agent::{BPFFS, mount_bpffs};

use super::{LabNode, NODE};
use crate::agent::Install;
use crate::shell::{HTTP, Shell, run};

/// The agent's binary, and its process while it runs. It has pins of its own.
pub struct Process<'a> {
    lab: &'a LabNode,
    binary: PathBuf,
    cni_timeout: u32,
    bpffs: PathBuf,
    /// Name of its maps' layout, where it is not its own.
    layout: Option<String>,
    service: Option<Service>,
}

impl<'a> Process<'a> {
    /// One that is still to be started.
    pub fn new(lab: &'a LabNode, binary: &Path, cni_timeout: u32) -> Result<Self> {
        ensure!(binary.is_file(), "there is no agent at {}", binary.display());
        mount_bpffs()?;
        let name = lab.lab().cgroup().file_name().context("the lab's cgroup has no name")?;
        let bpffs = Path::new(BPFFS).join(format!("{}-e2e", name.to_string_lossy()));
        lab.server().put(json!({
            "apiVersion": "apps/v1",
            "kind": "DaemonSet",
            "metadata": {"name": "sidestep", "namespace": "kube-system"},
        }))?;
        let binary = binary.to_owned();
        Ok(Self { lab, binary, cni_timeout, bpffs, layout: None, service: None })
    }

    fn pins(&self) -> Vec<String> {
        let layout = self.layout.iter().flat_map(|name| ["--layout".to_owned(), name.clone()]);
        ["--bpffs".to_owned(), text(&self.bpffs)].into_iter().chain(layout).collect()
    }

    /// Also commands that don't need them must not find the machine's own.
    fn cni_dirs(&self) -> [String; 4] {
        let (conf, bin) = self.lab.cni_dirs();
        ["--cni-conf-dir".to_owned(), conf, "--cni-bin-dir".to_owned(), bin]
    }
}

impl Install for Process<'_> {
    fn launch(&mut self) -> Result<()> {
        let lab = self.lab.lab();
        let mut argv = vec![text(&self.binary), "run".to_owned(), "--kubernetes".to_owned()];
        for (name, value) in [
            ("--node-name", NODE.to_owned()),
            ("--daemonset", "kube-system/sidestep".to_owned()),
            ("--http", HTTP.to_owned()),
            ("--kubeconfig", text(&self.lab.kubeconfig())),
            ("--cgroup", text(lab.cgroup())),
            ("--cni-socket", text(&lab.dir().join("cni.sock"))),
            ("--cni-timeout", self.cni_timeout.to_string()),
            ("--cni-exclude-namespaces", "kube-system".to_owned()),
        ] {
            argv.extend([name.to_owned(), value]);
        }
        argv.push("--cni".to_owned());
        argv.extend(self.cni_dirs());
        argv.extend(self.pins());
        self.service = Some(lab.spawn_on_node("agent", argv)?);
        Ok(())
    }

    fn kill9(&mut self) -> Result<()> {
        self.service = None;
        Ok(())
    }

    fn terminate(&mut self) -> Result<()> {
        let Some(mut service) = self.service.take() else {
            return Ok(());
        };
        if service.is_running() {
            service.signal(Signal::SIGTERM)?;
            service.wait(Duration::from_secs(10)).with_context(|| service.log_tail())?;
        }
        Ok(())
    }

    fn upgrade_to(&mut self, layout: Option<&str>) -> Result<()> {
        self.terminate()?;
        self.layout = layout.map(str::to_owned);
        self.launch()
    }

    fn uninstall(&mut self) -> Result<()> {
        let ended = self.terminate();
        if !self.bpffs.exists() {
            return ended;
        }
        let dirs = self.cni_dirs();
        let args = ["unload"].into_iter().chain(dirs.iter().map(String::as_str));
        let unloaded = self.sidestep(&args.collect::<Vec<_>>());
        ended.and(unloaded.map(drop))
    }

    fn delete_daemonset(&mut self) -> Result<()> {
        self.lab.server().delete("daemonsets.apps", "kube-system", "sidestep")?;
        self.terminate()
    }

    fn pid(&mut self) -> Option<u32> {
        let service = self.service.as_mut()?;
        service.is_running().then(|| service.pid())
    }

    fn sidestep(&mut self, args: &[&str]) -> Result<String> {
        let pins = self.pins();
        let (binary, pins) = (text(&self.binary), pins.iter().map(String::as_str));
        let all: Vec<&str> = args.iter().copied().chain(pins).collect();
        Shell::new(&[&binary], Arc::new(run)).run(&all)
    }

    fn log(&self) -> String {
        self.service.as_ref().map_or_else(|| "it does not run".to_owned(), |s| s.log())
    }

    fn bpffs(&self) -> String {
        text(&self.bpffs)
    }
}

impl Drop for Process<'_> {
    fn drop(&mut self) {
        // Removing pins detaches what they hold, should unload have left any.
        let _ = std::fs::remove_dir_all(&self.bpffs);
    }
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}
