//! Tables for people, the same as Markdown, and JSON with every sample.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde::Serialize;
use sidestep_figures::Spread;

use crate::cells::Settings;
use crate::environment::Environment;
use crate::goals::{self, Verdict};
use crate::mode::{Mode, Proxy};
use crate::plot;
use crate::sample::Samples;

/// The results of a run.
#[derive(Debug, Serialize)]
pub struct Report {
    /// The version of this structure.
    version: u32,
    environment: Environment,
    settings: Settings,
    goals: Vec<Verdict>,
    /// Every sample.
    pub samples: Samples,
}

/// A figure that has a table.
struct Figure {
    value: &'static str,
    title: &'static str,
    /// What it is divided by where it is shown, and the digits after its point.
    unit: f64,
    digits: usize,
    /// Whether its ratios are of use.
    ratios: bool,
}

const fn figure(value: &'static str, title: &'static str, unit: f64, digits: usize) -> Figure {
    Figure { value, title, unit, digits, ratios: true }
}

const FIGURES: &[Figure] = &[
    figure("rate", "Requests or connections per second", 1.0, 0),
    figure("p50_us", "p50, us", 1.0, 0),
    figure("p99_us", "p99, us", 1.0, 0),
    figure("p999_us", "p99.9, us", 1.0, 0),
    figure("cpu_us", "CPU per request or connection, us", 1.0, 1),
    figure("gbps", "Bulk, Gbit/s", 1.0, 2),
    figure("cpu_us_per_mb", "CPU per MB, us", 1.0, 0),
    figure("bytes", "Written to a stopped reader, MB", 1e6, 2),
    figure("kernel_bytes", "Kernel memory for each connection, KB", 1e3, 1),
    Figure {
        ratios: false,
        ..figure("tracked_client", "conntrack entries for each connection, client's pod", 1.0, 2)
    },
    Figure {
        ratios: false,
        ..figure("tracked_server", "conntrack entries for each connection, server's pod", 1.0, 2)
    },
];

impl Report {
    /// What the samples say.
    pub fn new(environment: Environment, settings: Settings, samples: Samples) -> Self {
        let goals = goals::evaluate(&samples);
        Self { version: 1, environment, settings, goals, samples }
    }

    /// For the terminal: goals and ratios.
    pub fn text(&self) -> String {
        let mut text = format!("\n{}\n", self.heading());
        for table in [self.goals()].into_iter().chain(self.ratios()) {
            text += &table.text();
        }
        text += &self.failures();
        text
    }

    /// Goals, ratios and absolute figures.
    fn markdown(&self) -> String {
        let mut text = format!("{}\n", self.heading());
        let tables = [self.goals()].into_iter().chain(self.ratios()).chain(self.absolutes());
        for table in tables {
            text += &table.markdown();
        }
        text += &self.failures();
        text
    }

    /// Writes report.json, report.md and the plots into `dir`.
    pub fn write(&self, dir: &Path) -> Result<()> {
        fs::create_dir_all(dir).with_context(|| format!("making {}", dir.display()))?;
        let json = serde_json::to_string_pretty(self)? + "\n";
        for (name, text) in [("report.json", json), ("report.md", self.markdown())] {
            let path = dir.join(name);
            fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
        }
        plot::all(&self.samples, &self.settings, dir)
    }

    fn heading(&self) -> String {
        let Environment { date, command, kernel, cpu, cores, memory_mib, clock, .. } =
            &self.environment;
        let Environment { load_before, load_after, seconds, versions, .. } = &self.environment;
        let Settings { rounds, few_rounds, seconds: slice, .. } = &self.settings;
        format!(
            "{date}: `{command}`, {seconds} s; kernel {kernel}, {cores} cores ({cpu}), \
             {memory_mib} MiB, clock {clock};\nload average before {load_before}, after \
             {load_after}; {}.\n{rounds} rounds of {slice} s slices ({few_rounds} of stopped \
             readers, memory and growth).\n\nRatios are of the same round: median (middle half of \
             the rounds). direct: no sidecar. explicit: sidecars that are dialled.\noff, sidecar, \
             all: Sidestep with that --splice.\n{}",
            versions.join(", "),
            self.environment.doubt().map(|doubt| format!("\n{doubt}\n")).unwrap_or_default(),
        )
    }

    fn goals(&self) -> Table {
        let mut table = Table::new("Goals", ["", "through", "", "wanted", "measured", "met"]);
        for verdict in &self.goals {
            let Verdict { what, proxy, mode, base, wanted, measured, met } = verdict;
            let failures = wanted == "0";
            table.rows.push(vec![
                what.clone(),
                proxy.to_string(),
                if failures { mode.to_string() } else { format!("{mode} / {base}") },
                wanted.clone(),
                match measured {
                    Some(count) if failures => format!("{:.0}", count.median),
                    Some(ratio) => ratio_text(*ratio),
                    None => "-".to_owned(),
                },
                match met {
                    Some(true) => "yes",
                    Some(false) => "NO",
                    None => "not measured",
                }
                .to_owned(),
            ]);
        }
        table
    }

    fn ratios(&self) -> Vec<Table> {
        let figures = FIGURES.iter().filter(|figure| figure.ratios);
        let table = |figure: &Figure| {
            let title = format!("{}: ratio to iptables", figure.title);
            let modes: Vec<_> =
                self.samples.modes().into_iter().filter(|mode| *mode != Mode::Iptables).collect();
            self.table(figure.value, &title, &modes, |proxy, cell, mode| {
                let samples = &self.samples;
                samples.ratio(proxy, cell, mode, Mode::Iptables, figure.value).map(ratio_text)
            })
        };
        figures.map(table).filter(Table::has_figures).collect()
    }

    fn absolutes(&self) -> Vec<Table> {
        let table = |figure: &Figure| {
            let title = format!("{}: medians", figure.title);
            self.table(figure.value, &title, &self.samples.modes(), |proxy, cell, mode| {
                let median = self.samples.spread(proxy, cell, mode, figure.value)?.median;
                Some(format!("{:.*}", figure.digits, median / figure.unit))
            })
        };
        FIGURES.iter().map(table).filter(Table::has_figures).collect()
    }

    fn table(
        &self,
        value: &str,
        title: &str,
        modes: &[Mode],
        text: impl Fn(Proxy, &str, Mode) -> Option<String>,
    ) -> Table {
        let head = [String::new()].into_iter().chain(modes.iter().map(Mode::to_string));
        let mut table = Table::new(title, head);
        for (proxy, cell) in self.samples.cells(value) {
            let mut row = vec![format!("{proxy} {cell}")];
            row.extend(modes.iter().map(|mode| text(proxy, cell, *mode).unwrap_or("-".into())));
            table.rows.push(row);
        }
        table
    }

    fn failures(&self) -> String {
        let failures = self.samples.failures();
        if failures.is_empty() {
            return String::new();
        }
        format!("\nFailed measurements: {}\n\n- {}\n", failures.len(), failures.join("\n- "))
    }
}

/// Formats a ratio, as `1.23 (1.20-1.31)`.
fn ratio_text(ratio: Spread) -> String {
    let Spread { median, low, high, .. } = ratio;
    let digits = if median < 10.0 { 2 } else { 1 };
    format!("{median:.digits$} ({low:.digits$}-{high:.digits$})")
}

struct Table {
    title: String,
    head: Vec<String>,
    rows: Vec<Vec<String>>,
}

impl Table {
    fn new(title: &str, head: impl IntoIterator<Item = impl Into<String>>) -> Self {
        let head = head.into_iter().map(Into::into).collect();
        Self { title: title.to_owned(), head, rows: Vec::new() }
    }

    fn has_figures(&self) -> bool {
        self.rows.iter().any(|row| row.iter().skip(1).any(|cell| cell != "-"))
    }

    fn text(&self) -> String {
        let mut widths = vec![0; self.head.len()];
        for row in [&self.head].into_iter().chain(&self.rows) {
            for (width, cell) in widths.iter_mut().zip(row) {
                *width = cell.chars().count().max(*width);
            }
        }
        let mut text = format!("\n{}\n", self.title);
        for row in [&self.head].into_iter().chain(&self.rows) {
            let mut line = String::new();
            for (cell, width) in row.iter().zip(&widths) {
                let _ = write!(line, "  {cell:<width$}");
            }
            text += line.trim_end();
            text.push('\n');
        }
        text
    }

    fn markdown(&self) -> String {
        let mut text = format!("\n### {}\n\n", self.title);
        let line = |row: &[String]| format!("| {} |\n", row.join(" | "));
        text += &line(&self.head);
        text += &format!("|{}\n", "---|".repeat(self.head.len()));
        for row in &self.rows {
            text += &line(row);
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> Table {
        let mut table = Table::new("T", ["", "one"]);
        table.rows.push(vec!["longer".to_owned(), "1".to_owned()]);
        table
    }

    #[test]
    fn columns_are_aligned() {
        assert_eq!(table().text(), "\nT\n          one\n  longer  1\n");
    }

    #[test]
    fn the_markdown_has_a_rule_below_its_head() {
        assert_eq!(table().markdown(), "\n### T\n\n|  | one |\n|---|---|\n| longer | 1 |\n");
    }

    #[test]
    fn a_table_without_figures_is_told() {
        let mut table = table();
        assert!(table.has_figures());
        table.rows[0][1] = "-".to_owned();
        assert!(!table.has_figures());
    }

    #[test]
    fn small_ratios_have_two_digits() {
        let spread = |median| Spread { median, low: 1.0, high: 20.0, count: 3 };
        assert_eq!(ratio_text(spread(1.234)), "1.23 (1.00-20.00)");
        assert_eq!(ratio_text(spread(12.34)), "12.3 (1.0-20.0)");
    }
}
