//! The verdicts, and the table of them for people, for machines and for the documentation.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use serde::Serialize;

use crate::deliberate::{DELIBERATE, Deliberate};
use crate::observed::{Field, Observed};
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
    /// In which properties something differs.
    pub fields: BTreeSet<Field>,
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
        let mut fields = BTreeSet::new();
        let mut verdict = if sidestep.is_some() { Verdict::Equal } else { Verdict::OracleOnly };
        for (step, (ours, theirs)) in sidestep.iter().flatten().zip(&iptables).enumerate() {
            for (field, there, here) in theirs.differences(ours) {
                let known = DELIBERATE
                    .iter()
                    .position(|known| known.covers(&name, kind, field, theirs, ours));
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
                fields.insert(field);
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
            fields,
            differences,
            contradiction,
        }
    }

    fn bad(&self) -> bool {
        self.verdict == Verdict::Different || self.contradiction.is_some()
    }

    /// The columns of the table, but for the kind of address.
    fn cells(&self) -> [String; 4] {
        let show = |all: &Vec<Observed>| {
            let all: Vec<String> = all.iter().map(ToString::to_string).collect();
            all.join("; then ")
        };
        [
            self.row.clone(),
            show(&self.iptables),
            self.sidestep.as_ref().map_or_else(|| "-".to_owned(), show),
            [self.verdict.name().to_owned()]
                .into_iter()
                .chain(self.fields.iter().map(ToString::to_string))
                .collect::<Vec<_>>()
                .join(" "),
        ]
    }

    /// Whether the table may show both as one.
    fn like(&self, other: &Self) -> bool {
        self.cells() == other.cells()
            && self.contradiction == other.contradiction
            && (!self.bad() || self.differences == other.differences)
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

    /// The table for a terminal, of all rows or only of those that are not as they should be.
    pub fn table(&self, all: bool) -> String {
        let mut text = String::new();
        let mut groups = self.grouped();
        groups.retain(|(line, _)| all || line.bad());
        let rows = cells(&groups);
        let width = |column: usize| {
            rows.iter().map(|cells| cells[column].chars().count()).max().unwrap_or(0)
        };
        let widths = [0, 1, 2, 3].map(width);
        for (cells, (line, _)) in rows.iter().zip(groups) {
            for (cell, width) in cells.iter().zip(widths) {
                let _ = write!(text, "{cell:width$}  ");
            }
            let _ = writeln!(text, "{}", cells[4]);
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
        let groups = self.grouped();
        for (cells, (line, _)) in cells(&groups).iter().zip(&groups) {
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
        for Deliberate { rows, kinds, fields, why, .. } in DELIBERATE {
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
}

/// The columns of a table.
fn cells(groups: &[(&Line, Vec<&'static str>)]) -> Vec<[String; 5]> {
    let cells = |(line, kinds): &(&Line, Vec<&'static str>)| {
        let [row, iptables, sidestep, verdict] = line.cells();
        [row, kinds.join(" "), iptables, sidestep, verdict]
    };
    groups.iter().map(cells).collect()
}

/// A long list says nothing in a table.
fn shorten(annotations: &str) -> String {
    let short: String = annotations.chars().take(100).collect();
    if short.len() < annotations.len() { short + "..." } else { short }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rows::rows;

    fn line(ours: Option<Observed>, contradiction: Option<String>) -> Line {
        let row = rows().into_iter().find(|row| row.id == "T1").expect("a row");
        let theirs = Observed::new("outbound").with(Field::Orig, "remote:80");
        let mut used = vec![false; DELIBERATE.len()];
        let ours = ours.map(|ours| vec![ours]);
        Line::new(&row, Kind::V4, vec![theirs], contradiction, ours, &mut used)
    }

    fn verdict(line: Line) -> (Verdict, bool) {
        (line.verdict.clone(), Report::new(vec![line], None).good())
    }

    #[test]
    fn whatever_differs_fails_the_run() {
        let same = Observed::new("outbound").with(Field::Orig, "remote:80");
        assert_eq!(verdict(line(Some(same.clone()), None)), (Verdict::Equal, true));
        assert_eq!(verdict(line(None, None)), (Verdict::OracleOnly, true));
        for other in [
            Observed::new("remote"),
            Observed::new("outbound"),
            same.clone().with(Field::Orig, "remote:81"),
            same.clone().with(Field::Peer, "node:eph"),
        ] {
            assert_eq!(verdict(line(Some(other), None)), (Verdict::Different, false));
        }
        assert_eq!(verdict(line(Some(same), Some("wrong".into()))), (Verdict::Equal, false));
    }

    #[test]
    fn a_deliberate_difference_that_is_none_fails_the_run() {
        let mut used = vec![true; DELIBERATE.len()];
        assert!(Report::new(Vec::new(), Some(&used)).good());
        used[0] = false;
        assert!(!Report::new(Vec::new(), Some(&used)).good());
    }
}
