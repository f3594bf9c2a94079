//! The agent under test, as its pod would run it: in the node's network namespace.

use std::ffi::OsString;
use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;
use sidestep_lab::agent::{BPFFS, mount_bpffs};
use sidestep_lab::{Service, wait_until};

use super::{NODE, Node};
use crate::usage::Usage;

/// Where the agent answers `/readyz` and `/metrics`.
const HTTP: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 9465);

/// How to run it.
#[derive(Clone, Debug, Default)]
pub struct AgentOpts {
    /// Whether it installs its CNI plugin.
    pub cni: bool,
    /// More arguments of `sidestep run`.
    pub args: Vec<String>,
}

/// An agent, running or not, with pins of its own. On drop it ends and everything is unloaded.
pub struct Agent {
    binary: PathBuf,
    opts: AgentOpts,
    bpffs: PathBuf,
    /// As arguments. Also those that don't need them must not find the machine's own.
    cni_dirs: [OsString; 4],
    /// Name of its maps' layout, where it is not its own.
    layout: Option<String>,
    service: Option<Service>,
}

impl Agent {
    /// Starts it and waits until it is ready.
    pub fn start(binary: &Path, node: &Node, opts: AgentOpts) -> Result<Self> {
        ensure!(binary.is_file(), "there is no agent at {}", binary.display());
        mount_bpffs()?;
        let name = node.lab().cgroup().file_name().context("the lab's cgroup has no name")?;
        let bpffs = Path::new(BPFFS).join(format!("{}-e2e", name.to_string_lossy()));
        let cni_dirs = [
            "--cni-conf-dir".into(),
            node.containerd().cni_conf_dir().into(),
            "--cni-bin-dir".into(),
            node.containerd().cni_bin_dir().into(),
        ];
        let binary = binary.to_owned();
        let mut agent = Self { binary, opts, bpffs, cni_dirs, layout: None, service: None };
        agent.launch(node)?;
        agent.wait_ready(node)?;
        Ok(agent)
    }

    /// Starts it again after [`Agent::kill9`] or [`Agent::terminate`].
    pub fn launch(&mut self, node: &Node) -> Result<()> {
        let mut argv: Vec<OsString> = vec![self.binary.clone().into()];
        argv.extend(["run", "--kubernetes", "--node-name", NODE, "--http"].map(OsString::from));
        argv.push(HTTP.to_string().into());
        argv.extend(["--kubeconfig".into(), node.kubeconfig().into()]);
        argv.extend(["--cgroup".into(), node.lab().cgroup().into()]);
        argv.extend(self.pins());
        if self.opts.cni {
            argv.push("--cni".into());
            argv.extend(self.cni_dirs.clone());
            argv.extend(["--cni-socket".into(), node.lab().dir().join("cni.sock").into()]);
        }
        argv.extend(self.opts.args.iter().map(OsString::from));
        self.service = Some(node.lab().spawn_on_node("agent", argv)?);
        Ok(())
    }

    /// Replaces it by a build whose maps have another layout than its own, or by itself.
    pub fn upgrade_to(&mut self, node: &Node, layout: Option<&str>) -> Result<()> {
        self.terminate()?;
        self.layout = layout.map(str::to_owned);
        self.launch(node)
    }

    fn pins(&self) -> Vec<OsString> {
        let mut args = vec!["--bpffs".into(), self.bpffs.clone().into()];
        args.extend(self.layout.iter().flat_map(|layout| ["--layout".into(), layout.into()]));
        args
    }

    /// Waits until `/readyz` says so. Fails with its last words when it ends.
    pub fn wait_ready(&mut self, node: &Node) -> Result<()> {
        let mut ended = false;
        let waited = wait_until("the agent to be ready", Duration::from_secs(30), || {
            ended = !self.is_running();
            ended || self.get(node, "/readyz").is_ok_and(|(code, _)| code == 200)
        });
        waited.with_context(|| self.log_tail())?;
        ensure!(!ended, "the agent has ended; {}", self.log_tail());
        Ok(())
    }

    /// Asks it by HTTP: the status and the body.
    pub fn get(&self, node: &Node, path: &str) -> Result<(u16, String)> {
        let text = node.lab().on_node(|| -> Result<String> {
            let mut stream = TcpStream::connect(HTTP)?;
            stream.set_read_timeout(Some(Duration::from_secs(5)))?;
            write!(stream, "GET {path} HTTP/1.1\r\nHost: {HTTP}\r\nConnection: close\r\n\r\n")?;
            let mut text = String::new();
            stream.read_to_string(&mut text)?;
            Ok(text)
        })??;
        let (head, body) = text.split_once("\r\n\r\n").context("no HTTP answer")?;
        let code = head.split(' ').nth(1).and_then(|code| code.parse().ok());
        Ok((code.with_context(|| format!("no HTTP status in {head:?}"))?, body.to_owned()))
    }

    /// Waits until its status has the pod with its inbound hook, or has it no more.
    pub fn wait_enrolled(&mut self, pod: &str, wanted: bool) -> Result<()> {
        let key = format!("shop/{pod}");
        let what = format!("{key} to be {}", if wanted { "enrolled" } else { "gone" });
        let mut last = Ok(Value::Null);
        wait_until(&what, Duration::from_secs(15), || {
            last = self.status();
            let Ok(status) = &last else { return false };
            let pods = status["pods"].as_array();
            let there = |pod: &Value| pod["pod"] == *key && (pod["inbound"] == true || !wanted);
            pods.is_some_and(|pods| pods.iter().any(there) == wanted)
        })
        .with_context(|| format!("its status: {last:?}; {}", self.log_tail()))
    }

    /// What `sidestep status --output json` says.
    pub fn status(&self) -> Result<Value> {
        let text = self.command(&["status".into(), "--output".into(), "json".into()])?;
        serde_json::from_str(&text).with_context(|| format!("the agent's status: {text}"))
    }

    /// Ends it and takes everything away, with `sidestep unload`.
    pub fn unload(&mut self) -> Result<()> {
        self.terminate()?;
        self.command_unload()
    }

    fn command_unload(&self) -> Result<()> {
        let mut args = vec!["unload".into()];
        args.extend(self.cni_dirs.clone());
        self.command(&args).map(drop)
    }

    fn command(&self, args: &[OsString]) -> Result<String> {
        let out = Command::new(&self.binary)
            .args(args)
            .args(self.pins())
            .output()
            .with_context(|| format!("running {}", self.binary.display()))?;
        let said = String::from_utf8_lossy(&out.stderr);
        ensure!(out.status.success(), "sidestep {args:?} failed: {}", said.trim());
        Ok(String::from_utf8_lossy(&out.stdout).into_owned())
    }

    /// Whether it runs.
    pub fn is_running(&mut self) -> bool {
        self.service.as_mut().is_some_and(|service| service.is_running())
    }

    /// What its process uses.
    pub fn usage(&self) -> Result<Usage> {
        let pid = self.service.as_ref().context("the agent does not run")?.pid();
        let read = |file: &str| {
            let path = format!("/proc/{pid}/{file}");
            fs::read_to_string(&path).with_context(|| format!("reading {path}"))
        };
        Usage::parse(&read("stat")?, &read("status")?)
    }

    /// All that it has written since it was started first.
    pub fn log(&self) -> String {
        self.service.as_ref().map(|service| service.log()).unwrap_or_default()
    }

    /// SIGKILL: the programs stay attached.
    pub fn kill9(&mut self) {
        self.service = None;
    }

    /// SIGTERM, and waits up to ten seconds for the end. The programs stay attached.
    pub fn terminate(&mut self) -> Result<()> {
        let Some(mut service) = self.service.take() else {
            return Ok(());
        };
        if service.is_running() {
            service.signal(Signal::SIGTERM)?;
            service.wait(Duration::from_secs(10)).with_context(|| service.log_tail())?;
        }
        Ok(())
    }

    /// The directory of its pins.
    pub fn bpffs(&self) -> &Path {
        &self.bpffs
    }

    /// The end of what it has written since it was started last.
    pub fn log_tail(&self) -> String {
        self.service.as_ref().map_or_else(|| "the agent does not run".to_owned(), |s| s.log_tail())
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if let Err(err) = self.terminate() {
            eprintln!("e2e: {err:#}");
        }
        if self.bpffs.exists() {
            if let Err(err) = self.command_unload() {
                eprintln!("e2e: {err:#}");
            }
            // Removing pins detaches what they hold, should unload have left any.
            let _ = fs::remove_dir_all(&self.bpffs);
        }
    }
}
