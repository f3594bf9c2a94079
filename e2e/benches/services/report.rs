//! Tables for people, the same as Markdown, JSON with every sample, and plots. Ratios are of one
//! round each: what is compared was measured in turns.

use std::{fmt::Write as _, fs, path::Path, time::Instant};

use anyhow::{Context, Result};
use serde::Serialize;
use sidestep_figures::{Line, Plot, Spread, Style};

use crate::{measure::Took, world::Way};

/// What one kind of call took, by one way, in one round.
#[derive(Debug, Serialize)]
pub struct Cell {
    pub mode: &'static str,
    pub services: usize,
    pub call: &'static str,
    pub way: Way,
    pub round: usize,
    #[serde(flatten)]
    pub took: Took,
}

/// What the largest number of Services costs.
#[derive(Debug, Serialize)]
pub struct Scale {
    pub mode: &'static str,
    pub way: Way,
    /// From the API server's answer until a call gets to the new endpoint.
    pub changes_ms: Vec<f64>,
    /// From the start of the process, with nothing in the kernel, until all Services are in force.
    pub cold_s: f64,
    /// Resident memory after that.
    pub memory_kib: u64,
    /// BPF maps.
    pub maps_bytes: u64,
}

#[derive(Debug, Serialize)]
pub struct Report {
    version: u32,
    kernel: String,
    cores: usize,
    load_before: String,
    load_after: String,
    seconds: u64,
    sizes: Vec<usize>,
    rounds: usize,
    calls: usize,
    pub cells: Vec<Cell>,
    pub scales: Vec<Scale>,
    #[serde(skip)]
    start: Instant,
}

/// The columns: kube-proxy in its modes, Sidestep beside it, and Sidestep without it.
const COLUMNS: [(&str, &str, Way); 5] = [
    ("kube-proxy, iptables", "iptables", Way::KubeProxy),
    ("kube-proxy, nftables", "nftables", Way::KubeProxy),
    ("Sidestep, beside iptables", "iptables", Way::Sidestep),
    ("Sidestep, beside nftables", "nftables", Way::Sidestep),
    ("Sidestep alone", crate::ALONE, Way::Sidestep),
];

const COLOURS: [[u8; 3]; 5] =
    [[200, 80, 60], [220, 150, 60], [40, 110, 180], [90, 160, 210], [60, 140, 80]];

fn load() -> Result<String> {
    let text = fs::read_to_string("/proc/loadavg")?;
    Ok(text.split_whitespace().take(3).collect::<Vec<_>>().join(" "))
}

impl Report {
    pub fn new(sizes: &[usize], rounds: usize, calls: usize) -> Result<Self> {
        Ok(Self {
            version: 1,
            kernel: fs::read_to_string("/proc/sys/kernel/osrelease")?.trim().to_owned(),
            cores: std::thread::available_parallelism()?.get(),
            load_before: load()?,
            load_after: String::new(),
            seconds: 0,
            sizes: sizes.to_vec(),
            rounds,
            calls,
            cells: Vec::new(),
            scales: Vec::new(),
            start: Instant::now(),
        })
    }

    pub fn finish(&mut self) -> Result<()> {
        self.load_after = load()?;
        self.seconds = self.start.elapsed().as_secs();
        Ok(())
    }

    fn cell(&self, round: usize, at: (&str, usize, &str), way: Way) -> Option<&Cell> {
        self.cells.iter().find(|cell| {
            (cell.round, cell.way) == (round, way) && (cell.mode, cell.services, cell.call) == at
        })
    }

    /// A value of all rounds.
    fn value(&self, at: (&str, usize, &str), way: Way, value: fn(&Took) -> f64) -> Option<Spread> {
        let cells = (0..self.rounds).filter_map(|round| self.cell(round, at, way));
        Spread::of(cells.map(|cell| value(&cell.took)))
    }

    /// As many times what it is straight to an endpoint, in the same round.
    fn ratio(&self, at: (&str, usize, &str), way: Way, value: fn(&Took) -> f64) -> Option<Spread> {
        let ratios = (0..self.rounds).filter_map(|round| {
            let [this, direct] = [way, Way::Direct].map(|way| self.cell(round, at, way));
            Some(value(&this?.took) / value(&direct?.took))
        });
        Spread::of(ratios)
    }

    /// Markdown, which reads well on a terminal too.
    pub fn text(&self) -> String {
        let mut text = format!(
            "{} processors, Linux {}; load {} before, {} after; {} rounds of {} calls, {} s in all\n",
            self.cores,
            self.kernel,
            self.load_before,
            self.load_after,
            self.rounds,
            self.calls,
            self.seconds,
        );
        let heads: Vec<&str> = COLUMNS.iter().map(|(head, ..)| *head).collect();
        let ruler = "|---".repeat(COLUMNS.len());
        for (call, ..) in crate::CALLS {
            for (what, value) in VALUES {
                let _ = writeln!(
                    text,
                    "\n{call}, {what}: times that of a call straight to an endpoint in the same round, \
                     median (middle half); in brackets that call's microseconds\n\n\
                     | Services | {} | direct: beside iptables, nftables, alone |\n|---{ruler}|---|",
                    heads.join(" | ")
                );
                for services in &self.sizes {
                    let ratios = COLUMNS.map(|(_, mode, way)| {
                        let ratio = self.ratio((mode, *services, call), way, value);
                        ratio.map_or("-".to_owned(), shown)
                    });
                    let direct = ["iptables", "nftables", crate::ALONE].map(|mode| {
                        let direct = self.value((mode, *services, call), Way::Direct, value);
                        direct.map_or("-".to_owned(), |direct| format!("{:.1}", direct.median))
                    });
                    let direct = direct.join(", ");
                    let _ = writeln!(text, "| {services} | {} | [{direct}] |", ratios.join(" | "));
                }
            }
        }
        let _ = writeln!(
            text,
            "\nWith {} Services\n\n| | one endpoint's change, ms: median, p99 | from cold, s | process, MB | \
             maps, MB |\n|---|---|---|---|---|",
            self.sizes.iter().max().unwrap_or(&0)
        );
        for scale in &self.scales {
            let name =
                COLUMNS.iter().find(|(_, mode, way)| (*mode, *way) == (scale.mode, scale.way));
            let mut changes = scale.changes_ms.clone();
            changes.sort_by(f64::total_cmp);
            let at = |share: f64| changes[((changes.len() - 1) as f64 * share) as usize];
            let _ = writeln!(
                text,
                "| {} | {:.1}, {:.1} | {:.2} | {:.1} | {} |",
                name.map_or("?", |(head, ..)| head),
                at(0.5),
                at(0.99),
                scale.cold_s,
                scale.memory_kib as f64 / 1e3,
                match scale.maps_bytes {
                    0 => "-".to_owned(),
                    bytes => format!("{:.1}", bytes as f64 / 1e6),
                },
            );
        }
        text
    }

    pub fn write(&self, dir: &Path) -> Result<()> {
        fs::create_dir_all(dir).with_context(|| format!("making {}", dir.display()))?;
        fs::write(dir.join("report.md"), self.text())?;
        fs::write(dir.join("report.json"), serde_json::to_string_pretty(self)? + "\n")?;
        let styles: Vec<Style> = COLUMNS
            .iter()
            .zip(COLOURS)
            .map(|((label, ..), colour)| Style { label: (*label).to_owned(), colour })
            .collect();
        for (call, ..) in crate::CALLS {
            let lines: Vec<Line> = COLUMNS
                .iter()
                .enumerate()
                .map(|(n, (_, mode, way))| {
                    let points = self.sizes.iter().filter_map(|services| {
                        let ratio =
                            self.ratio((mode, *services, call), *way, |took| took.p50_us)?;
                        Some((*services as f64, ratio))
                    });
                    (n, points.collect())
                })
                .collect();
            let title = format!("{call}: latency, times that of a call straight to an endpoint");
            let plot = Plot::Lines { title: &title, across: "Services", lines: &lines };
            plot.write(&styles, dir, &call.replace(' ', "-"))?;
        }
        println!("\nreport and plots: {}", dir.display());
        Ok(())
    }
}

type Value = fn(&Took) -> f64;

const VALUES: [(&str, Value); 2] =
    [("latency", |took| took.p50_us), ("CPU time of the client's thread", |took| took.cpu_us)];

fn shown(ratio: Spread) -> String {
    format!("{:.2} ({:.2} to {:.2})", ratio.median, ratio.low, ratio.high)
}
