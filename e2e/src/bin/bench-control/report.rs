//! The figures, as a table and as JSON.

use std::{
    collections::BTreeMap,
    fmt::{self, Display},
    fs,
    io::{IsTerminal, Write},
    time::Duration,
};

use anyhow::{Context, Result};
use hdrhistogram::Histogram;
use serde::Serialize;

use crate::{
    churn::{Added, Churned},
    kernel::LOOK,
    usage::Spent,
};

/// Where it was measured.
#[derive(Debug, Serialize)]
pub struct Environment {
    /// `uname -r`.
    pub kernel: String,
    /// Processors.
    pub cores: usize,
    /// /proc/loadavg when it began.
    pub load_at_start: String,
}

impl Environment {
    /// This machine, now.
    pub fn read() -> Result<Self> {
        let read = |path: &str| -> Result<String> {
            Ok(fs::read_to_string(path).with_context(|| path.to_owned())?.trim().to_owned())
        };
        let load = read("/proc/loadavg")?;
        Ok(Self {
            kernel: read("/proc/sys/kernel/osrelease")?,
            cores: std::thread::available_parallelism()?.get(),
            load_at_start: load.split(' ').take(3).collect::<Vec<_>>().join(" "),
        })
    }
}

/// What was asked for.
#[derive(Debug, Serialize)]
pub struct Settings {
    /// Pods of this node.
    pub pods: usize,
    /// Pods replaced in a second.
    pub rate: u32,
    /// The duration of the measurement.
    pub seconds: u64,
    /// How long the agent was watched at rest.
    pub rest_seconds: u64,
}

/// A distribution of times in milliseconds.
#[derive(Debug, Serialize)]
pub struct Times {
    /// How many there are.
    pub count: u64,
    /// The median.
    pub p50_ms: f64,
    /// One in a hundred is longer.
    pub p99_ms: f64,
    /// The maximum.
    pub max_ms: f64,
}

impl Times {
    /// One for microseconds up to ten minutes.
    pub fn histogram() -> Result<Histogram<u64>> {
        Ok(Histogram::new_with_bounds(1, 600_000_000, 3)?)
    }

    /// Adds a time.
    pub fn record(to: &mut Histogram<u64>, time: Duration) -> Result<()> {
        Ok(to.record(u64::try_from(time.as_micros())?.max(1))?)
    }

    /// Those of a histogram.
    pub fn of(histogram: &Histogram<u64>) -> Self {
        let ms = |micros: u64| micros as f64 / 1000.0;
        Self {
            count: histogram.len(),
            p50_ms: ms(histogram.value_at_quantile(0.5)),
            p99_ms: ms(histogram.value_at_quantile(0.99)),
            max_ms: ms(histogram.max()),
        }
    }
}

impl Display for Times {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = format!("{:.1} / {:.1} / {:.1}", self.p50_ms, self.p99_ms, self.max_ms);
        f.pad(&text)
    }
}

/// The figures of one agent's life.
#[derive(Debug, Serialize)]
pub struct Run {
    /// Pods of other nodes.
    pub others: usize,
    /// At rest, without pods.
    pub empty: Spent,
    /// All pods at once.
    pub filled: Added,
    /// At rest, with all pods.
    pub full: Spent,
    /// Pods that were replaced.
    pub churned: Churned,
    /// The agent's usage meanwhile.
    pub during: Spent,
    /// To the API server, from the filling to the end of the churn.
    pub requests: BTreeMap<String, usize>,
    /// Resident memory once the churn was over, with as many pods as before.
    pub rss_after_churn_kib: u64,
    /// Resident memory once all pods were gone.
    pub rss_emptied_kib: u64,
    /// From the last pod's end until the maps were empty.
    pub cleared_after_ms: f64,
    /// What was left in the maps once all pods were gone.
    pub left: BTreeMap<String, usize>,
    /// Warnings and errors in the agent's log.
    pub log: Vec<String>,
}

/// The whole report.
#[derive(Debug, Serialize)]
pub struct Report {
    /// The machine that was measured.
    pub environment: Environment,
    /// The settings of the benchmark.
    pub settings: Settings,
    /// The figures of each run.
    pub runs: Vec<Run>,
}

impl Report {
    /// What must not be.
    pub fn failures(&self) -> Vec<String> {
        let mut all = Vec::new();
        for run in &self.runs {
            for added in [&run.filled, &run.churned.added] {
                all.extend(added.failed.iter().cloned());
                if added.too_early > 0 {
                    all.push(format!("{} pods were let in too early", added.too_early));
                }
            }
            all.extend(run.churned.lost.iter().chain(&run.log).cloned());
            let left = run.left.iter().filter(|(_, count)| **count > 0);
            all.extend(left.map(|(map, count)| format!("{count} left in {map}")));
        }
        all
    }

    fn row(
        &self,
        f: &mut fmt::Formatter<'_>,
        name: &str,
        cell: impl Fn(&Run) -> String,
    ) -> fmt::Result {
        let cells: String = self.runs.iter().map(|run| format!(" {:>26}", cell(run))).collect();
        writeln!(f, "{name:<52}{cells}")
    }
}

fn mib(kib: u64) -> String {
    format!("{:.1}", kib as f64 / 1024.0)
}

impl Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Environment { kernel, cores, load_at_start } = &self.environment;
        let Settings { pods, rate, seconds, .. } = &self.settings;
        writeln!(f, "kernel {kernel}, {cores} cores, load average at the start {load_at_start}")?;
        writeln!(f, "{pods} pods, {rate} replaced in a second for {seconds} s")?;
        writeln!(f, "times: p50 / p99 / max, in ms\n")?;
        self.row(f, "pods of other nodes", |run| run.others.to_string())?;
        self.row(f, "all pods at once: s", |run| format!("{:.1}", run.filled.seconds))?;
        self.row(f, "  CNI ADD", |run| run.filled.add.to_string())?;
        self.row(f, "churn: CNI ADD", |run| run.churned.added.add.to_string())?;
        let look = format!("  annotation to the maps (+-{LOOK:?})");
        self.row(f, &look, |run| run.churned.changed.to_string())?;
        self.row(f, "  ADDs, changes", |run| {
            format!("{}, {}", run.churned.added.add.count, run.churned.changed.count)
        })?;
        self.row(f, "  pods replaced in a second", |run| format!("{:.1}", run.churned.rate))?;
        self.row(f, "  this program behind its schedule", |run| run.churned.behind.to_string())?;
        self.row(f, "  syncs, ms each", |run| {
            format!("{}, {:.1}", run.during.syncs, run.during.sync_mean_ms)
        })?;
        self.row(f, "failed ADDs, too early, changes lost", |run| {
            let (filled, churned) = (&run.filled, &run.churned);
            let failed = filled.failed.len() + churned.added.failed.len();
            let early = filled.too_early + churned.added.too_early;
            format!("{failed}, {early}, {}", churned.lost.len())
        })?;
        self.row(f, "warnings and errors logged", |run| run.log.len().to_string())?;
        self.row(f, "resident MiB: empty", |run| mib(run.empty.rss_kib))?;
        self.row(f, "  filled", |run| mib(run.full.rss_kib))?;
        self.row(f, "  after the churn", |run| mib(run.rss_after_churn_kib))?;
        self.row(f, "  emptied", |run| mib(run.rss_emptied_kib))?;
        self.row(f, "CPU, % of a core: empty", |run| format!("{:.1}", run.empty.cpu_percent))?;
        self.row(f, "  filled, at rest", |run| format!("{:.1}", run.full.cpu_percent))?;
        self.row(f, "  sync of everything, ms each", |run| {
            format!("{:.1}", run.full.sync_mean_ms)
        })?;
        self.row(f, "  during the churn", |run| format!("{:.1}", run.during.cpu_percent))?;
        self.row(f, "requests to the API server", |run| {
            run.requests.values().sum::<usize>().to_string()
        })?;
        self.row(f, "  KiB received during the churn", |run| {
            format!("{:.0}", run.during.received_bytes as f64 / 1024.0)
        })?;
        self.row(f, "maps empty after the last pod: s", |run| {
            format!("{:.1}", run.cleared_after_ms / 1000.0)
        })?;
        self.row(f, "entries left", |run| run.left.values().sum::<usize>().to_string())
    }
}

/// Says what happens, on a line that the next one replaces.
pub fn progress(what: &str) {
    if std::io::stderr().is_terminal() {
        eprint!("\r\x1b[K{what}");
        let _ = std::io::stderr().flush();
    }
}

/// Takes the line away.
pub fn clear_progress() {
    progress("");
}
