//! The verdicts, and the table of them for people, for machines and for the documentation.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::PathBuf;

use serde::Serialize;

use crate::Outcome;
use crate::deliberate::{DELIBERATE, Deliberate, NATIVE};
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
    pub says: String,
    pub annotations: String,
    pub kind: Kind,
    pub iptables: Vec<Observed>,
    /// Under the mesh's own native nftables rules, where it has such.
    pub nftables: Option<Vec<Observed>>,
    pub sidestep: Option<Vec<Observed>>,
    pub verdict: Verdict,
    /// In which properties something differs.
    pub fields: BTreeSet<Field>,
    /// What differs, in words.
    pub differences: Vec<String>,
    /// In what the mesh's nftables rules differ from its iptables rules, in words.
    pub native: Vec<String>,
    /// Whether something of that is not on the list.
    pub native_unknown: bool,
    /// Where the mesh's own rules do what the contract does not say.
    pub contradiction: Option<String>,
}

/// Which entries of the lists of differences were met.
#[derive(Debug)]
pub struct Used {
    deliberate: Vec<bool>,
    native: Vec<bool>,
}

impl Default for Used {
    fn default() -> Self {
        Self { deliberate: vec![false; DELIBERATE.len()], native: vec![false; NATIVE.len()] }
    }
}

/// A property in which two ways differ.
struct Difference {
    field: Field,
    known: bool,
    words: String,
}

/// In what the `others` differ from the first, and whether that is on a list, whose entries are
/// marked as used.
fn compare(
    row: &str,
    kind: Kind,
    first: &[Observed],
    others: &[Observed],
    list: &[Deliberate],
    used: &mut [bool],
) -> Vec<Difference> {
    let mut found = Vec::new();
    for (step, (there, here)) in first.iter().zip(others).enumerate() {
        for (field, before, after) in there.differences(here) {
            let known = list.iter().position(|known| known.covers(row, kind, field, there, here));
            if let Some(known) = known {
                used[known] = true;
            }
            let mark = if known.is_some() { "" } else { " (!)" };
            let step = if first.len() > 1 { format!("#{} ", step + 1) } else { String::new() };
            let words = format!("{step}{field}: {before} -> {after}{mark}");
            found.push(Difference { field, known: known.is_some(), words });
        }
    }
    found
}

impl Line {
    pub fn new(
        row: &Row,
        kind: Kind,
        oracle: Outcome,
        nftables: Option<Vec<Observed>>,
        sidestep: Option<Vec<Observed>>,
        used: &mut Used,
    ) -> Self {
        let name = row.name();
        let Outcome { observed: iptables, contradiction } = oracle;
        let compare = |others: &Option<Vec<Observed>>, list, used: &mut [bool]| {
            compare(&name, kind, &iptables, others.as_deref().unwrap_or_default(), list, used)
        };
        let native = compare(&nftables, NATIVE, &mut used.native);
        let differences = compare(&sidestep, DELIBERATE, &mut used.deliberate);
        let verdict = match &sidestep {
            None => Verdict::OracleOnly,
            Some(_) if differences.is_empty() => Verdict::Equal,
            Some(_) if differences.iter().all(|difference| difference.known) => Verdict::Deliberate,
            Some(_) => Verdict::Different,
        };
        let words = |all: Vec<Difference>| all.into_iter().map(|one| one.words).collect();
        Self {
            row: name,
            says: row.says.clone(),
            annotations: row.annotations(),
            kind,
            verdict,
            fields: differences.iter().map(|difference| difference.field).collect(),
            native_unknown: native.iter().any(|difference| !difference.known),
            native: words(native),
            differences: words(differences),
            iptables,
            nftables,
            sidestep,
            contradiction,
        }
    }

    fn bad(&self) -> bool {
        self.verdict == Verdict::Different || self.native_unknown || self.contradiction.is_some()
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
            && self.native == other.native
            && (!self.bad() || self.differences == other.differences)
    }
}

/// The results of a run.
#[derive(Debug, Serialize)]
pub struct Report {
    pub lines: Vec<Line>,
    /// Patterns of known differences that matched none.
    pub stale: Vec<String>,
    /// Files of the record of Istio's rules that its binary does not say the same of.
    pub stale_records: Vec<PathBuf>,
}

impl Report {
    /// `used` says which of the known differences were met; `None` where not all rows ran.
    pub fn new(lines: Vec<Line>, stale_records: Vec<PathBuf>, used: Option<&Used>) -> Self {
        let name = |d: &Deliberate| format!("{} ({})", d.rows, d.why);
        let mut stale = Vec::new();
        if let Some(Used { deliberate, native }) = used {
            let known = DELIBERATE.iter().chain(NATIVE);
            let unused = known.zip(deliberate.iter().chain(native)).filter(|(_, used)| !**used);
            stale.extend(unused.map(|(known, _)| name(known)));
        }
        Self { lines, stale, stale_records }
    }

    pub fn good(&self) -> bool {
        self.stale.is_empty() && self.stale_records.is_empty() && !self.lines.iter().any(Line::bad)
    }

    /// How many rows ran under a mesh's native nftables rules, and those that differ there.
    fn native(&self) -> (usize, Vec<&Line>) {
        let ran = self.lines.iter().filter(|line| line.nftables.is_some());
        (ran.clone().count(), ran.filter(|line| !line.native.is_empty()).collect())
    }

    fn count(&self, verdict: &Verdict) -> usize {
        self.lines.iter().filter(|line| line.verdict == *verdict).count()
    }

    /// The counts in one sentence.
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

    /// One sentence on native nftables.
    fn native_summary(&self) -> String {
        let (ran, differ) = self.native();
        format!(
            "{ran} observations under Istio's native nftables rules as well: {} as under its iptables \
             rules, {} known to differ, {} different",
            ran - differ.len(),
            differ.iter().filter(|line| !line.native_unknown).count(),
            differ.iter().filter(|line| line.native_unknown).count(),
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
                let native = line.native.iter().map(|text| format!("nftables: {text}"));
                let differences = line.differences.iter().cloned();
                for difference in differences.chain(native).chain(contradiction) {
                    let _ = writeln!(text, "    {difference}");
                }
            }
        }
        for stale in &self.stale {
            let _ = writeln!(text, "no difference is as the list says: {stale}");
        }
        for path in &self.stale_records {
            let path = path.display();
            let _ = writeln!(text, "{path} is not what pilot-agent says: `make records` writes it");
        }
        let _ = writeln!(text, "\n{}\n{}", self.summary(), self.native_summary());
        text
    }

    /// The part of docs/conformance.md that a run writes.
    pub fn markdown(&self) -> String {
        let counts = self.summary().replace("; ", ";\n");
        let mut text = format!("{counts}\n\n{}\n\n", self.native_summary().replace(": ", ":\n"));
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
        let lists = [
            ("Deliberate differences", DELIBERATE),
            ("Where Istio's native nftables rules differ from its iptables rules", NATIVE),
        ];
        for (title, list) in lists {
            let _ = writeln!(text, "\n## {title}\n\n| rows | address | property | why |");
            let _ = writeln!(text, "|---|---|---|---|");
            for Deliberate { rows, kinds, fields, why, .. } in list {
                let kinds: Vec<&str> = kinds.iter().map(|kind| kind.name()).collect();
                let fields: Vec<String> = fields.iter().map(ToString::to_string).collect();
                let (kinds, fields) = (kinds.join(" "), fields.join(" "));
                let _ = writeln!(text, "| `{rows}` | {kinds} | {fields} | {why} |");
            }
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
        let observed = vec![Observed::new("outbound").with(Field::Orig, "remote:80")];
        let oracle = Outcome { observed, contradiction };
        Line::new(&row, Kind::V4, oracle, None, ours.map(|ours| vec![ours]), &mut Used::default())
    }

    fn verdict(line: Line) -> (Verdict, bool) {
        (line.verdict.clone(), Report::new(vec![line], Vec::new(), None).good())
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
        let mut used = Used::default();
        used.deliberate.fill(true);
        used.native.fill(true);
        assert!(Report::new(Vec::new(), Vec::new(), Some(&used)).good());
        used.deliberate[0] = false;
        assert!(!Report::new(Vec::new(), Vec::new(), Some(&used)).good());
    }

    #[test]
    fn a_record_that_is_not_what_the_binary_says_fails_the_run() {
        assert!(!Report::new(Vec::new(), vec!["sidecar.v4".into()], None).good());
    }

    #[test]
    fn native_rules_that_decide_otherwise_fail_the_run() {
        let row = rows().into_iter().find(|row| row.id == "T1").expect("a row");
        for (native, good) in [("outbound", true), ("remote", false)] {
            let oracle = Outcome { observed: vec![Observed::new("outbound")], contradiction: None };
            let native = Some(vec![Observed::new(native)]);
            let line = Line::new(&row, Kind::V4, oracle, native, None, &mut Used::default());
            assert_eq!(Report::new(vec![line], Vec::new(), None).good(), good);
        }
    }
}
