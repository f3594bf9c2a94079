//! The verdicts, and the table of them for people, for machines and for the documentation.

use std::fmt::Write as _;

use serde::Serialize;

use crate::deliberate::{DELIBERATE, Deliberate};
use crate::observed::Observed;
use crate::row::{Kind, Row};

/// What the comparison of a row came to.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// Nothing differs.
    Equal,
    /// All that differs is on the list.
    Deliberate,
    /// Something differs that is not.
    Different,
    /// Sidestep was not asked.
    OracleOnly,
}

impl Verdict {
    const fn name(&self) -> &'static str {
        match self {
            Self::Equal => "equal",
            Self::Deliberate => "deliberate",
            Self::Different => "DIFFERENT",
            Self::OracleOnly => "oracle only",
        }
    }
}

/// A row in one kind of address, and what became of it.
#[derive(Clone, Debug, Serialize)]
pub struct Line {
    pub row: String,
    pub says: &'static str,
    pub annotations: String,
    pub kind: Kind,
    pub iptables: Vec<Observed>,
    pub sidestep: Option<Vec<Observed>>,
    pub verdict: Verdict,
    /// What differs, in words.
    pub differences: Vec<String>,
    /// Where the mesh's own rules do what the contract does not say.
    pub contradiction: Option<String>,
}

impl Line {
    pub fn new(
        row: &Row,
        kind: Kind,
        iptables: Vec<Observed>,
        contradiction: Option<String>,
        sidestep: Option<Vec<Observed>>,
        used: &mut [bool],
    ) -> Self {
        let name = row.name();
        let mut differences = Vec::new();
        let mut verdict = if sidestep.is_some() { Verdict::Equal } else { Verdict::OracleOnly };
        for (step, (ours, theirs)) in sidestep.iter().flatten().zip(&iptables).enumerate() {
            for (field, there, here) in theirs.differences(ours) {
                let known = DELIBERATE.iter().position(|d| d.covers(&name, kind, field));
                if let Some(known) = known {
                    used[known] = true;
                }
                verdict = verdict.max(match known {
                    Some(_) => Verdict::Deliberate,
                    None => Verdict::Different,
                });
                let mark = if known.is_some() { "" } else { " (!)" };
                let step =
                    if iptables.len() > 1 { format!("#{} ", step + 1) } else { String::new() };
                differences.push(format!("{step}{field}: {there} -> {here}{mark}"));
            }
        }
        Self {
            row: name,
            says: row.says,
            annotations: row.annotations(),
            kind,
            iptables,
            sidestep,
            verdict,
            differences,
            contradiction,
        }
    }

    fn bad(&self) -> bool {
        self.verdict == Verdict::Different || self.contradiction.is_some()
    }

    /// Whether the table may show both as one.
    fn like(&self, other: &Self) -> bool {
        self.row == other.row
            && self.iptables == other.iptables
            && self.sidestep == other.sidestep
            && self.verdict == other.verdict
            && self.contradiction == other.contradiction
    }
}

/// A run.
#[derive(Debug, Serialize)]
pub struct Report {
    pub lines: Vec<Line>,
    /// Patterns of deliberate differences that matched none.
    pub stale: Vec<String>,
}

impl Report {
    /// `used` says which of the deliberate differences were met; `None` where not all rows ran.
    pub fn new(lines: Vec<Line>, used: Option<&[bool]>) -> Self {
        let name = |d: &Deliberate| format!("{} ({})", d.rows, d.why);
        let stale = used.into_iter().flatten().zip(DELIBERATE).filter(|(used, _)| !**used);
        let stale = stale.map(|(_, deliberate)| name(deliberate)).collect();
        Self { lines, stale }
    }

    pub fn good(&self) -> bool {
        self.stale.is_empty() && !self.lines.iter().any(Line::bad)
    }

    fn count(&self, verdict: &Verdict) -> usize {
        self.lines.iter().filter(|line| line.verdict == *verdict).count()
    }

    /// One sentence.
    pub fn summary(&self) -> String {
        let contradictions = self.lines.iter().filter(|line| line.contradiction.is_some()).count();
        format!(
            "{} observations: {} equal, {} deliberate, {} different, {} by the oracle alone; \
             {contradictions} contradict the contract; {} stale deliberate differences",
            self.lines.len(),
            self.count(&Verdict::Equal),
            self.count(&Verdict::Deliberate),
            self.count(&Verdict::Different),
            self.count(&Verdict::OracleOnly),
            self.stale.len(),
        )
    }

    /// The table for a terminal.
    pub fn table(&self) -> String {
        let mut text = String::new();
        let rows = self.cells();
        let width = |column: usize| {
            rows.iter().map(|cells| cells[column].chars().count()).max().unwrap_or(0)
        };
        let widths = [0, 1, 2, 3].map(width);
        for (cells, line) in rows.iter().zip(self.grouped()) {
            for (cell, width) in cells.iter().zip(widths) {
                let _ = write!(text, "{cell:width$}  ");
            }
            let _ = writeln!(text, "{}", cells[4]);
            let line = line.0;
            if line.bad() {
                let said = if line.annotations.is_empty() {
                    String::new()
                } else {
                    format!(" [{}]", line.annotations)
                };
                let _ = writeln!(text, "    {}{said}", line.says);
                let contradiction =
                    line.contradiction.iter().map(|text| format!("iptables: {text}"));
                for difference in line.differences.iter().cloned().chain(contradiction) {
                    let _ = writeln!(text, "    {difference}");
                }
            }
        }
        for stale in &self.stale {
            let _ = writeln!(text, "no difference is as the list says: {stale}");
        }
        let _ = writeln!(text, "\n{}", self.summary());
        text
    }

    /// The part of docs/conformance.md that a run writes.
    pub fn markdown(&self) -> String {
        let mut text = format!("{}\n\n", self.summary());
        text +=
            "| row | address | what | iptables | Sidestep | verdict |\n|---|---|---|---|---|---|\n";
        for (cells, (line, _)) in self.cells().iter().zip(self.grouped()) {
            let what = if line.annotations.is_empty() {
                line.says.to_owned()
            } else {
                format!("{}; `{}`", line.says, shorten(&line.annotations))
            };
            let [row, kinds, iptables, sidestep, verdict] = cells;
            let sidestep = if sidestep == iptables { "the same" } else { sidestep };
            let _ = writeln!(
                text,
                "| {row} | {kinds} | {what} | {iptables} | {sidestep} | {verdict} |"
            );
        }
        text += "\n## Deliberate differences\n\n| rows | address | property | why |\n|---|---|---|---|\n";
        for Deliberate { rows, kinds, fields, why } in DELIBERATE {
            let kinds: Vec<&str> = kinds.iter().map(|kind| kind.name()).collect();
            let fields: Vec<String> = fields.iter().map(ToString::to_string).collect();
            let (kinds, fields) = (kinds.join(" "), fields.join(" "));
            let _ = writeln!(text, "| `{rows}` | {kinds} | {fields} | {why} |");
        }
        text
    }

    /// Neighbours that are alike but for the kind of address, as one.
    fn grouped(&self) -> Vec<(&Line, Vec<&'static str>)> {
        let mut groups: Vec<(&Line, Vec<&'static str>)> = Vec::new();
        for line in &self.lines {
            match groups.iter_mut().rev().find(|(first, _)| first.like(line)) {
                Some((_, kinds)) => kinds.push(line.kind.name()),
                None => groups.push((line, vec![line.kind.name()])),
            }
        }
        groups
    }

    fn cells(&self) -> Vec<[String; 5]> {
        let show = |all: &Vec<Observed>| {
            let all: Vec<String> = all.iter().map(ToString::to_string).collect();
            all.join("; then ")
        };
        let cells = |(line, kinds): (&Line, Vec<&'static str>)| {
            [
                line.row.clone(),
                kinds.join(" "),
                show(&line.iptables),
                line.sidestep.as_ref().map_or_else(|| "-".to_owned(), show),
                line.verdict.name().to_owned(),
            ]
        };
        self.grouped().into_iter().map(cells).collect()
    }
}

/// A long list says nothing in a table.
fn shorten(annotations: &str) -> String {
    let short: String = annotations.chars().take(100).collect();
    if short.len() < annotations.len() { short + "..." } else { short }
}
