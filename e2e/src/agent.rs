//! The agent under test, as scenarios see it: the chart's pod.

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use sidestep_lab::wait_until;

use crate::Node;
use crate::kind::Release;
use crate::usage::Usage;

/// An agent, running or not. On drop it ends, and everything is taken away.
pub struct Agent<'a> {
    node: &'a Node,
    release: Release<'a>,
}

impl<'a> Agent<'a> {
    /// Starts it and waits until it is ready.
    pub fn start(node: &'a Node, release: Release<'a>) -> Result<Self> {
        let mut agent = Self { node, release };
        agent.launch()?;
        agent.wait_ready()?;
        Ok(agent)
    }

    /// Starts it again after [`Agent::kill9`] or [`Agent::terminate`].
    pub fn launch(&mut self) -> Result<()> {
        self.release.launch()
    }

    /// Kills it, and sees to it that it stays away. The programs stay attached.
    pub fn kill9(&mut self) -> Result<()> {
        self.release.kill9()
    }

    /// Ends it as for a new version. The programs stay attached.
    pub fn terminate(&mut self) -> Result<()> {
        self.release.terminate()
    }

    /// Replaces it by a build whose maps have another layout than its own, or by itself.
    pub fn upgrade_to(&mut self, layout: Option<&str>) -> Result<()> {
        self.release.upgrade_to(layout)
    }

    /// Ends it and takes everything away.
    pub fn uninstall(&mut self) -> Result<()> {
        self.release.uninstall()
    }

    /// Ends it because its DaemonSet is deleted.
    pub fn delete_daemonset(&mut self) -> Result<()> {
        self.release.delete_daemonset()
    }

    /// Waits until `/readyz` says so.
    pub fn wait_ready(&mut self) -> Result<()> {
        let ready = || self.get("/readyz").is_ok_and(|(code, _)| code == 200);
        let waited = wait_until("the agent to be ready", self.node.patience(), ready);
        waited.with_context(|| self.log_tail())
    }

    /// Asks it by HTTP: the status and the body.
    pub fn get(&self, path: &str) -> Result<(u16, String)> {
        self.node.shell().http(path)
    }

    /// How often the API server has refused one of its watches, by its own count.
    pub fn refusals(&self, watch: &str) -> Result<u64> {
        let (_, text) = self.get("/metrics")?;
        let name = format!("sidestep_api_errors_total{{request=\"{watch}\"}} ");
        let count = text.lines().find_map(|line| line.strip_prefix(&name));
        count.map_or(Ok(0), |count| count.parse().with_context(|| format!("{name}{count}")))
    }

    /// Waits until its status has the pod with its inbound hook, or has it no more.
    pub fn wait_enrolled(&mut self, pod: &str, wanted: bool) -> Result<()> {
        let what = format!("{pod} to be {}", if wanted { "enrolled" } else { "gone" });
        let mut last = Ok(Value::Null);
        wait_until(&what, self.node.patience(), || {
            last = self.status();
            let Ok(status) = &last else { return false };
            let entry = entry(status, pod);
            entry.is_some_and(|entry| entry["inbound"] == true || !wanted) == wanted
        })
        .with_context(|| format!("its status: {last:?}; {}", self.log_tail()))
    }

    /// The path of a pod's network namespace, by the agent's status.
    pub fn netns(&mut self, pod: &str) -> Result<String> {
        let status = self.status()?;
        let netns = entry(&status, pod).and_then(|entry| entry["netns"].as_str());
        netns.map(str::to_owned).with_context(|| format!("{pod} is not in {status:#}"))
    }

    /// What `sidestep status --output json` says.
    pub fn status(&mut self) -> Result<Value> {
        let text = self.release.sidestep(&["status", "--output", "json"])?;
        serde_json::from_str(&text).with_context(|| format!("the agent's status: {text}"))
    }

    /// Whether it runs.
    pub fn is_running(&mut self) -> bool {
        self.release.pid().is_some()
    }

    /// What its process uses.
    pub fn usage(&mut self) -> Result<Usage> {
        let pid = self.release.pid().context("the agent does not run")?;
        let read = |file: &str| self.node.shell().read(&format!("/proc/{pid}/{file}"));
        Usage::parse(&read("stat")?, &read("status")?)
    }

    /// What it has written.
    pub fn log(&self) -> String {
        self.release.log()
    }

    /// The end of that, for error messages.
    pub fn log_tail(&self) -> String {
        let log = self.log();
        let lines: Vec<&str> = log.lines().collect();
        let tail = &lines[lines.len().saturating_sub(15)..];
        format!("the agent said:\n  {}", tail.join("\n  "))
    }

    /// Fails when there are pins on the node.
    pub fn ensure_no_pins(&self) -> Result<()> {
        let dir = self.release.bpffs();
        ensure!(!self.node.shell().exists(&dir)?, "{dir} is left on the node");
        Ok(())
    }
}

impl Drop for Agent<'_> {
    fn drop(&mut self) {
        if let Err(err) = self.release.uninstall() {
            eprintln!("e2e: {err:#}");
        }
    }
}

/// A pod of the scenarios in the agent's status.
fn entry<'s>(status: &'s Value, pod: &str) -> Option<&'s Value> {
    let key = format!("shop/{pod}");
    status["pods"].as_array()?.iter().find(|entry| entry["pod"] == key)
}
