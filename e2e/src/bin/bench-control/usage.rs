//! What the agent's process uses.

use std::{
    fs, thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use serde::Serialize;
use sidestep_e2e::usage;
use sidestep_lab::interrupted;

use crate::node::Node;

/// The process at one moment.
pub struct Usage {
    at: Instant,
    cpu: Duration,
    syncs: f64,
    sync_seconds: f64,
    received: u64,
    pub rss_kib: u64,
}

/// The process over a time.
#[derive(Debug, Serialize)]
pub struct Spent {
    /// How long that was.
    pub seconds: f64,
    /// User and system time, in percent of one processor.
    pub cpu_percent: f64,
    /// Syncs, by the agent's own count.
    pub syncs: f64,
    /// What one took in the mean, by the agent's own clock.
    pub sync_mean_ms: f64,
    /// From the API server, by its connections that are open at the end.
    pub received_bytes: u64,
    /// Resident memory at the end.
    pub rss_kib: u64,
}

impl Usage {
    /// The present usage.
    pub fn now(node: &Node) -> Result<Self> {
        let pid = node.agent.pid().context("the agent has ended")?;
        let read = |file: &str| {
            fs::read_to_string(format!("/proc/{pid}/{file}"))
                .with_context(|| format!("the agent's {file}"))
        };
        let used = usage::Usage::parse(&read("stat")?, &read("status")?)?;
        let metrics = node.metrics()?;
        let metric = |name: &str| -> Result<f64> {
            let line = metrics.lines().find_map(|line| line.strip_prefix(name));
            line.with_context(|| format!("no {name}"))?.trim().parse().context("no number")
        };
        Ok(Self {
            at: Instant::now(),
            cpu: used.cpu,
            syncs: metric("sidestep_sync_seconds_count ")?,
            sync_seconds: metric("sidestep_sync_seconds_sum ")?,
            received: node.received(pid)?,
            rss_kib: used.rss_kib,
        })
    }

    /// What was used from here until `end`.
    pub fn until(&self, end: &Self) -> Spent {
        let seconds = (end.at - self.at).as_secs_f64();
        let syncs = end.syncs - self.syncs;
        Spent {
            seconds,
            cpu_percent: (end.cpu - self.cpu).as_secs_f64() / seconds * 100.0,
            syncs,
            sync_mean_ms: (end.sync_seconds - self.sync_seconds) / syncs.max(1.0) * 1000.0,
            received_bytes: end.received.saturating_sub(self.received),
            rss_kib: end.rss_kib,
        }
    }

    /// What is used while nothing happens.
    pub fn over(node: &Node, time: Duration) -> Result<Spent> {
        let start = Self::now(node)?;
        while start.at.elapsed() < time {
            ensure!(!interrupted(), "interrupted");
            thread::sleep(Duration::from_millis(50));
        }
        Ok(start.until(&Self::now(node)?))
    }
}
