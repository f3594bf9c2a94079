//! The agent under test: the `sidestep` binary.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{self, Command};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::mount::{MsFlags, mount};
use nix::sys::signal::Signal;
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};
use serde_json::Value;

use crate::cgroup;
use crate::lab::{Inner, Lab, LeafCgroup};
use crate::pod::Pod;
use crate::process::Process;
use crate::wait::{wait_for, wait_until};

/// Where nodes have the bpf file system.
pub(crate) const BPFFS: &str = "/sys/fs/bpf";

static COUNTER: AtomicU32 = AtomicU32::new(0);

/// A running agent, with a directory of pod manifests and pins of its own. On drop it is
/// terminated, unloaded, and its directories are removed.
pub struct Agent {
    binary: PathBuf,
    source: Vec<OsString>,
    flags: Vec<OsString>,
    layout: Option<String>,
    pods: PathBuf,
    bpffs: PathBuf,
    log: PathBuf,
    process: Option<Process>,
    cgroup: LeafCgroup,
    attached_to: PathBuf,
    lab: Arc<Inner>,
}

impl Agent {
    /// Starts `<binary> run` with no pods, on the lab's cgroup. It may not be ready yet.
    pub fn start(binary: &Path, lab: &Lab) -> Result<Self> {
        Self::make(binary, lab, lab.cgroup(), None, Vec::new(), None)
    }

    /// Like [`Agent::start`], with more flags for `run`, and with this directory for its pins,
    /// which is on a bpffs of the caller's.
    pub fn start_at(binary: &Path, lab: &Lab, pins: &Path, flags: &[&str]) -> Result<Self> {
        let flags = flags.iter().map(Into::into).collect();
        Self::make(binary, lab, lab.cgroup(), None, flags, Some(pins.to_owned()))
    }

    /// Like [`Agent::start`], on another cgroup than the lab's, with more flags for `run`.
    pub fn start_on(binary: &Path, lab: &Lab, cgroup: &Path, flags: &[&str]) -> Result<Self> {
        let flags = flags.iter().map(Into::into).collect();
        Self::make(binary, lab, cgroup, None, flags, None)
    }

    /// Like [`Agent::start`] with other pods than those of a directory of manifests: `source` is
    /// what `run` is told about that, such as `--kubernetes`.
    pub fn start_with(binary: &Path, lab: &Lab, source: Vec<OsString>) -> Result<Self> {
        Self::make(binary, lab, lab.cgroup(), Some(source), Vec::new(), None)
    }

    /// Like [`Agent::start`], with more flags for `run`; waits until it is decided what is spliced.
    pub fn start_flags(binary: &Path, lab: &Lab, flags: &[&str]) -> Result<Self> {
        let flags = flags.iter().map(Into::into).collect();
        let agent = Self::make(binary, lab, lab.cgroup(), None, flags, None)?;
        agent.wait_log("splice leg=\"app\"")?;
        Ok(agent)
    }

    fn make(
        binary: &Path,
        lab: &Lab,
        cgroup: &Path,
        source: Option<Vec<OsString>>,
        flags: Vec<OsString>,
        pins: Option<PathBuf>,
    ) -> Result<Self> {
        ensure!(binary.is_file(), "there is no agent at {}", binary.display());
        mount_bpffs()?;
        let attached_to = cgroup.to_owned();
        let lab = lab.inner().clone();
        let number = COUNTER.fetch_add(1, Ordering::Relaxed);
        let bpffs = pins.unwrap_or_else(|| {
            Path::new(BPFFS).join(format!("{}{}-{number}", cgroup::PREFIX, process::id()))
        });
        let pods = lab.new_path("pods", "d");
        fs::create_dir(&pods).with_context(|| format!("making {}", pods.display()))?;
        let log = lab.new_path("agent", "log");
        let cgroup = lab.leaf_cgroup(&format!("agent-{number}"))?;
        let binary = binary.to_owned();
        let source = source.unwrap_or_else(|| vec!["--pods".into(), pods.clone().into()]);
        let layout = None;
        let mut agent = Self {
            binary,
            source,
            flags,
            layout,
            pods,
            bpffs,
            log,
            process: None,
            cgroup,
            attached_to,
            lab,
        };
        agent.restart()?;
        Ok(agent)
    }

    /// Terminates the agent if it runs, and starts it again with the same directories.
    pub fn restart(&mut self) -> Result<()> {
        self.terminate()?;
        let script = "echo $$ >\"$1/cgroup.procs\" && shift && exec \"$@\"";
        let mut command = Command::new("sh");
        command
            .args(["-c", script, "sh"])
            .arg(&self.cgroup.0)
            .arg(&self.binary)
            .arg("run")
            .args(&self.source)
            .args(&self.flags)
            .arg("--cgroup")
            .arg(&self.attached_to)
            .arg("--bpffs")
            .arg(&self.bpffs)
            .args(self.layout.iter().flat_map(|layout| ["--layout", layout]));
        self.process = Some(Process::start("the agent", &mut command, self.log.clone())?);
        Ok(())
    }

    /// Starts it again with other flags than those of [`Agent::start_flags`].
    pub fn restart_with(&mut self, flags: &[&str]) -> Result<()> {
        self.flags = flags.iter().map(Into::into).collect();
        self.restart()
    }

    /// Starts it again as a build whose maps have another layout than its own, or as itself.
    pub fn upgrade_to(&mut self, layout: Option<&str>) -> Result<()> {
        self.terminate()?;
        self.layout = layout.map(str::to_owned);
        self.restart()
    }

    /// Hands the agent the pod's manifest.
    pub fn add_pod(&self, pod: &Pod) -> Result<()> {
        self.add_manifest(pod.name(), &pod.manifest())
    }

    /// Hands the agent a manifest, or a changed one, as the file `NAME.yaml`.
    pub fn add_manifest(&self, name: &str, manifest: &Value) -> Result<()> {
        let text = serde_saphyr::to_string(manifest).context("writing YAML")?;
        let (temporary, file) = (self.lab.new_path(name, "tmp"), self.manifest_path(name));
        fs::write(&temporary, text)
            .and_then(|()| fs::rename(&temporary, &file))
            .with_context(|| format!("writing {}", file.display()))
    }

    /// Takes the pod's manifest away.
    pub fn remove_pod(&self, pod: &Pod) -> Result<()> {
        let file = self.manifest_path(pod.name());
        fs::remove_file(&file).with_context(|| format!("removing {}", file.display()))
    }

    fn manifest_path(&self, name: &str) -> PathBuf {
        self.pods.join(format!("{name}.yaml"))
    }

    /// Waits, up to ten seconds, until the agent's status has the pod.
    pub fn wait_enrolled(&mut self, pod: &Pod) -> Result<()> {
        self.wait_pod(pod, true)
    }

    /// Waits until the agent's status has all of these pods: up to ten seconds, and a tenth more
    /// for each.
    pub fn wait_all_enrolled<'a>(&mut self, pods: impl IntoIterator<Item = &'a Pod>) -> Result<()> {
        let mut missing: BTreeSet<String> =
            pods.into_iter().map(|pod| format!("lab/{}", pod.name())).collect();
        let timeout = Duration::from_secs(10) + missing.len() as u32 * Duration::from_millis(100);
        let waited = wait_until("all pods to be enrolled", timeout, || {
            let Ok(status) = self.status() else { return !self.is_running() };
            for pod in status["pods"].as_array().into_iter().flatten() {
                if let (Some(name), true) = (pod["pod"].as_str(), is_in_force(pod)) {
                    missing.remove(name);
                }
            }
            missing.is_empty() || !self.is_running()
        });
        let enrolled = waited.and_then(|()| {
            ensure!(missing.is_empty(), "the agent has ended");
            Ok(())
        });
        enrolled.with_context(|| format!("without {} pods; {}", missing.len(), self.log_tail()))
    }

    /// Waits, up to ten seconds, until the agent's status has the pod no more.
    pub fn wait_gone(&mut self, pod: &Pod) -> Result<()> {
        self.wait_pod(pod, false)
    }

    fn wait_pod(&mut self, pod: &Pod, wanted: bool) -> Result<()> {
        let key = format!("lab/{}", pod.name());
        self.wait_named(&key, wanted)
    }

    /// Waits, up to ten seconds, until the agent's status has the pod `NAMESPACE/NAME`, or has it
    /// no more.
    pub fn wait_named(&mut self, key: &str, wanted: bool) -> Result<()> {
        let what = format!("{key} to be {}", if wanted { "enrolled" } else { "gone" });
        let mut ended = false;
        let mut last = Ok(Value::Null);
        let waited = wait_until(&what, Duration::from_secs(10), || {
            ended = !self.is_running();
            last = self.status();
            let Ok(status) = &last else { return ended };
            let pods = status["pods"].as_array();
            // The hooks in its namespace come last, and go first.
            let there = |pod: &Value| pod["pod"] == key && (is_in_force(pod) || !wanted);
            ended || pods.is_some_and(|pods| pods.iter().any(there) == wanted)
        });
        waited
            .and_then(|()| if ended { bail!("the agent has ended") } else { Ok(()) })
            .with_context(|| format!("its status: {last:?}; {}", self.log_tail()))
    }

    /// What `<binary> status --output json` says.
    pub fn status(&self) -> Result<Value> {
        let text = self.command(&["status", "--output", "json"])?;
        serde_json::from_str(&text).with_context(|| format!("the agent's status: {text}"))
    }

    /// Runs another command of the agent's binary on the same pins and gives its stdout.
    pub fn command(&self, args: &[&str]) -> Result<String> {
        let out = Command::new(&self.binary)
            // This machine's own CNI configuration is none of the lab's business.
            .env("SIDESTEP_CNI_CONF_DIR", &self.pods)
            .env("SIDESTEP_CNI_BIN_DIR", &self.pods)
            .args(args)
            .arg("--bpffs")
            .arg(&self.bpffs)
            .args(self.layout.iter().flat_map(|layout| ["--layout", layout]))
            .output()
            .with_context(|| format!("running {}", self.binary.display()))?;
        let (stdout, stderr) =
            (String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
        ensure!(out.status.success(), "sidestep {} failed: {}", args.join(" "), stderr.trim());
        Ok(stdout.into_owned())
    }

    /// Detaches all programs and removes the pins, with `<binary> unload`.
    pub fn unload(&self) -> Result<()> {
        self.command(&["unload"]).map(drop)
    }

    /// Whether the agent runs.
    pub fn is_running(&mut self) -> bool {
        self.process.as_mut().is_some_and(Process::is_running)
    }

    /// The process id, while there is one.
    pub fn pid(&self) -> Option<u32> {
        self.process.as_ref().map(Process::pid)
    }

    /// SIGKILL: the programs stay attached.
    pub fn kill9(&mut self) {
        self.process = None;
    }

    /// SIGTERM, and waits up to ten seconds for the end. The programs stay attached.
    pub fn terminate(&mut self) -> Result<()> {
        let Some(mut process) = self.process.take() else {
            return Ok(());
        };
        if !process.is_running() {
            return Ok(());
        }
        process.signal(Signal::SIGTERM)?;
        process.wait(Duration::from_secs(10)).map(drop).with_context(|| process.log_tail())
    }

    /// Where it serves health and metrics, with `--http 127.0.0.1:0`.
    pub fn http(&self) -> Result<SocketAddr> {
        self.wait_log("health and metrics")?;
        let log = self.log();
        // After a restart, the last one counts.
        let address = log.rsplit("health and metrics address=").next();
        let address = address.and_then(|rest| rest.split_whitespace().next());
        let address = address.context("no address in the agent's log")?;
        address.parse().with_context(|| format!("the agent's address {address:?}"))
    }

    /// What it answers to a GET: status and body; 0 where nobody listens.
    pub fn get(&self, path: &str) -> Result<(u16, String)> {
        let Ok(mut stream) = TcpStream::connect(self.http()?) else {
            return Ok((0, String::new()));
        };
        write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        let status = text.split(' ').nth(1).and_then(|code| code.parse().ok()).unwrap_or(0);
        let body = text.split_once("\r\n\r\n").map_or("", |(_, body)| body);
        Ok((status, body.to_owned()))
    }

    /// One of its metrics, by its name and labels; 0 where there is none.
    pub fn metric(&self, name: &str) -> Result<f64> {
        let (_, text) = self.get("/metrics")?;
        let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        Ok(value.and_then(|value| value.parse().ok()).unwrap_or(0.0))
    }

    /// Waits, up to fifteen seconds, until the agent's log has `text`.
    pub fn wait_log(&self, text: &str) -> Result<()> {
        let what = format!("{text:?} in the agent's log");
        wait_for(&what, Duration::from_secs(15), || self.log().contains(text).then_some(()))
            .with_context(|| self.log_tail())
    }

    /// What the agent has written, over all restarts.
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// The end of [`Agent::log`], for error messages.
    pub fn log_tail(&self) -> String {
        let log = self.log();
        let lines: Vec<&str> = log.lines().collect();
        format!("the agent said:\n  {}", lines[lines.len().saturating_sub(15)..].join("\n  "))
    }

    /// The directory of its pins.
    pub fn bpffs(&self) -> &Path {
        &self.bpffs
    }

    /// The directory of pod manifests.
    pub fn pods_dir(&self) -> &Path {
        &self.pods
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if let Err(err) = self.terminate() {
            eprintln!("lab: {err:#}");
        }
        self.process = None;
        if self.bpffs.exists() {
            if let Err(err) = self.unload() {
                eprintln!("lab: {err:#}");
            }
            // Removing pins detaches what they hold, should unload have left any.
            let _ = fs::remove_dir_all(&self.bpffs);
        }
        let _ = fs::remove_dir_all(&self.pods);
    }
}

/// Whether all that belongs to the pod is attached: beside the mesh's own rules nothing is inbound.
fn is_in_force(pod: &Value) -> bool {
    pod["inbound"] == true || pod["mode"] == "beside"
}

/// Mounts the bpf file system where nodes have it, if it is not there yet.
fn mount_bpffs() -> Result<()> {
    if statfs(BPFFS).is_ok_and(|fs| fs.filesystem_type() == BPF_FS_MAGIC) {
        return Ok(());
    }
    mount(Some("bpf"), BPFFS, Some("bpf"), MsFlags::empty(), None::<&str>)
        .with_context(|| format!("mounting {BPFFS}"))
}
