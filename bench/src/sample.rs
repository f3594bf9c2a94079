//! What was measured, and what the rounds say of it. All pure.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;
use sidestep_figures::Spread;

use crate::mode::{Mode, Proxy};

/// One measurement: a cell in a mode, in one round.
#[derive(Clone, Debug, Serialize)]
pub struct Sample {
    /// The round, counted from 0.
    pub round: usize,
    /// The mode's place in this round, from 0: the order rotates.
    pub turn: usize,
    /// What passed the bytes on.
    pub proxy: Proxy,
    /// What was measured, such as `keepalive/64B/16`.
    pub cell: String,
    /// How connections came to the sidecars.
    pub mode: Mode,
    /// Sockets that were spliced, in the modes that splice.
    pub spliced: Option<usize>,
    /// The figures, by name; none where it failed.
    pub values: BTreeMap<&'static str, f64>,
    /// The reason why it failed.
    pub error: Option<String>,
}

/// All samples of a run.
#[derive(Debug, Default, Serialize)]
#[serde(transparent)]
pub struct Samples(pub Vec<Sample>);

impl Samples {
    /// One figure of each round.
    fn rounds(&self, proxy: Proxy, cell: &str, mode: Mode, value: &str) -> BTreeMap<usize, f64> {
        let of_it = self.0.iter().filter(|s| s.proxy == proxy && s.cell == cell && s.mode == mode);
        of_it.filter_map(|s| Some((s.round, *s.values.get(value)?))).collect()
    }

    /// Median and spread of a figure.
    pub fn spread(&self, proxy: Proxy, cell: &str, mode: Mode, value: &str) -> Option<Spread> {
        Spread::of(self.rounds(proxy, cell, mode, value).into_values())
    }

    /// The ratio of two modes in each round that has both: median and spread of these ratios.
    pub fn ratio(
        &self,
        proxy: Proxy,
        cell: &str,
        mode: Mode,
        base: Mode,
        value: &str,
    ) -> Option<Spread> {
        let base = self.rounds(proxy, cell, base, value);
        let ours = self.rounds(proxy, cell, mode, value);
        let pairs = ours.iter().filter_map(|(round, ours)| Some((*ours, *base.get(round)?)));
        Spread::of(pairs.filter(|(_, base)| *base > 0.0).map(|(ours, base)| ours / base))
    }

    /// Measurements that were made, and those that failed.
    pub fn counts(&self, proxy: Proxy, cell: &str, mode: Mode) -> (usize, usize) {
        let of_it = self.0.iter().filter(|s| s.proxy == proxy && s.cell == cell && s.mode == mode);
        of_it.fold((0, 0), |(all, failed), s| (all + 1, failed + usize::from(s.error.is_some())))
    }

    /// What failed: proxy, cell, mode, round and reason.
    pub fn failures(&self) -> Vec<String> {
        let line = |s: &Sample| {
            let error = s.error.as_ref()?;
            Some(format!("{} {} {}, round {}: {error}", s.mode, s.proxy, s.cell, s.round + 1))
        };
        self.0.iter().filter_map(line).collect()
    }

    /// Proxies and cells that have this figure, in the order of their first sample.
    pub fn cells(&self, value: &str) -> Vec<(Proxy, &str)> {
        let mut seen = BTreeSet::new();
        let with = self.0.iter().filter(|s| s.values.contains_key(value));
        let cells = with.map(|s| (s.proxy, s.cell.as_str()));
        let mut cells: Vec<_> = cells.filter(|cell| seen.insert(*cell)).collect();
        cells.sort_by_key(|(proxy, _)| *proxy);
        cells
    }

    /// The modes that there are samples of.
    pub fn modes(&self) -> Vec<Mode> {
        let modes: BTreeSet<Mode> = self.0.iter().map(|s| s.mode).collect();
        modes.into_iter().collect()
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// A sample with one figure.
    pub fn sample(round: usize, mode: Mode, cell: &str, name: &'static str, value: f64) -> Sample {
        Sample {
            round,
            turn: 0,
            proxy: Proxy::Relay,
            cell: cell.to_owned(),
            mode,
            spliced: None,
            values: [(name, value)].into(),
            error: None,
        }
    }

    /// Rounds of which one is three times slower for both: the ratio of medians would differ.
    #[test]
    fn ratios_are_of_the_same_round() {
        let rows = [(0, 10.0, 20.0), (1, 30.0, 60.0), (2, 10.0, 20.0)];
        let mut all = Samples::default();
        for (round, base, ours) in rows {
            all.0.push(sample(round, Mode::Iptables, "c", "rate", base));
            all.0.push(sample(round, Mode::All, "c", "rate", ours));
        }
        // Without a partner: it takes part in no ratio.
        all.0.push(sample(3, Mode::All, "c", "rate", 1000.0));
        let ratio = all.ratio(Proxy::Relay, "c", Mode::All, Mode::Iptables, "rate");
        assert_eq!(ratio, Some(Spread { median: 2.0, low: 2.0, high: 2.0, count: 3 }));
        assert_eq!(all.ratio(Proxy::Envoy, "c", Mode::All, Mode::Iptables, "rate"), None);
        assert_eq!(all.modes(), [Mode::Iptables, Mode::All]);
        assert_eq!(all.cells("rate"), [(Proxy::Relay, "c")]);
    }

    #[test]
    fn failures_are_named_and_counted() {
        let mut failed = sample(1, Mode::All, "bulk/up", "gbps", 1.0);
        failed.values.clear();
        failed.error = Some("ENOMEM".to_owned());
        let all = Samples(vec![failed, sample(0, Mode::All, "bulk/up", "gbps", 1.0)]);
        assert_eq!(all.failures(), ["all relay bulk/up, round 2: ENOMEM"]);
        assert_eq!(all.counts(Proxy::Relay, "bulk/up", Mode::All), (2, 1));
    }
}
