//! The goals, and whether the samples reach them.

use serde::Serialize;
use sidestep_figures::Spread;

use crate::mode::{Mode, Proxy};
use crate::sample::Samples;

/// What a goal is about.
struct Goal {
    what: &'static str,
    proxy: Proxy,
    cell: &'static str,
    value: &'static str,
    mode: Mode,
    base: Mode,
    limit: Limit,
}

#[derive(Clone, Copy)]
enum Limit {
    AtLeast(f64),
    AtMost(f64),
    /// No measurement failed.
    NoFailure,
}

const fn goal(
    what: &'static str,
    (proxy, cell, value): (Proxy, &'static str, &'static str),
    (mode, base): (Mode, Mode),
    limit: Limit,
) -> Goal {
    Goal { what, proxy, cell, value, mode, base, limit }
}

const KEEPALIVE_16: (Proxy, &str, &str) = (Proxy::Envoy, "keepalive/64B/16", "rate");
const KEEPALIVE_1: (Proxy, &str, &str) = (Proxy::Envoy, "keepalive/64B/1", "p50_us");
const CONNECT_1: (Proxy, &str, &str) = (Proxy::Envoy, "connect/1", "rate");
const CONNECT_8: (Proxy, &str, &str) = (Proxy::Envoy, "connect/8", "rate");
const UP: (Proxy, &str, &str) = (Proxy::Envoy, "bulk/up", "gbps");
const DOWN: (Proxy, &str, &str) = (Proxy::Envoy, "bulk/down", "gbps");
const STOPPED: (Proxy, &str, &str) = (Proxy::Envoy, "stopped/64K", "bytes");
const STOPPED_SMALL: (Proxy, &str, &str) = (Proxy::Envoy, "stopped/1K", "bytes");

const AGAINST_IPTABLES: (Mode, Mode) = (Mode::All, Mode::Iptables);
const AGAINST_EXPLICIT: (Mode, Mode) = (Mode::All, Mode::Explicit);
const AGAINST_OFF: (Mode, Mode) = (Mode::All, Mode::Off);

const GOALS: &[Goal] = &[
    goal(
        "keep-alive 64 B, 16 connections, requests/s",
        KEEPALIVE_16,
        AGAINST_IPTABLES,
        Limit::AtLeast(2.0),
    ),
    goal("keep-alive 64 B, 1 connection, p50", KEEPALIVE_1, AGAINST_IPTABLES, Limit::AtMost(0.6)),
    goal("connections/s, 1 client", CONNECT_1, AGAINST_IPTABLES, Limit::AtLeast(1.15)),
    goal("connections/s, 8 clients", CONNECT_8, AGAINST_IPTABLES, Limit::AtLeast(1.15)),
    goal("connections/s, 1 client", CONNECT_1, AGAINST_EXPLICIT, Limit::AtLeast(0.97)),
    goal("connections/s, 8 clients", CONNECT_8, AGAINST_EXPLICIT, Limit::AtLeast(0.97)),
    goal("bulk to the server", UP, AGAINST_IPTABLES, Limit::AtLeast(1.15)),
    goal("bulk to the client", DOWN, AGAINST_IPTABLES, Limit::AtLeast(1.15)),
    goal("bulk to the server", UP, AGAINST_OFF, Limit::AtLeast(1.0)),
    goal("bulk to the client", DOWN, AGAINST_OFF, Limit::AtLeast(1.0)),
    goal("bulk to the server, failures", UP, AGAINST_IPTABLES, Limit::NoFailure),
    goal("bulk to the client, failures", DOWN, AGAINST_IPTABLES, Limit::NoFailure),
    goal("stopped reader, 64 KB writes, bytes", STOPPED, AGAINST_IPTABLES, Limit::AtMost(4.0)),
    goal("stopped reader, 1 KB writes, bytes", STOPPED_SMALL, AGAINST_IPTABLES, Limit::AtMost(4.0)),
];

/// A goal and what was measured.
#[derive(Debug, Serialize)]
pub struct Verdict {
    /// What it is about.
    pub what: String,
    /// What passed the bytes on.
    pub proxy: Proxy,
    /// The mode that the goal is for.
    pub mode: Mode,
    /// The mode that it is compared with.
    pub base: Mode,
    /// The limit, for people.
    pub wanted: String,
    /// The median of the paired ratios and their spread, or the number of failures.
    pub measured: Option<Spread>,
    /// Whether it is reached; `None`: it was not measured.
    pub met: Option<bool>,
}

/// All goals, for each of these proxies that was measured.
pub fn evaluate(samples: &Samples) -> Vec<Verdict> {
    let mut verdicts = Vec::new();
    for proxy in [Proxy::Envoy, Proxy::Http, Proxy::Relay] {
        verdicts.extend(GOALS.iter().map(|goal| Goal { proxy, ..*goal }.verdict(samples)));
    }
    // Of HTTP not all cells are measured.
    verdicts.retain(|verdict| verdict.proxy != Proxy::Http || verdict.met.is_some());
    verdicts
}

impl Goal {
    fn verdict(&self, samples: &Samples) -> Verdict {
        let Self { what, proxy, cell, value, mode, base, limit } = *self;
        let ratio = samples.ratio(proxy, cell, mode, base, value);
        let (wanted, measured, met) = match limit {
            Limit::AtLeast(limit) => {
                (format!("at least {limit}x"), ratio, ratio.map(|ratio| ratio.median >= limit))
            }
            Limit::AtMost(limit) => {
                (format!("at most {limit}x"), ratio, ratio.map(|ratio| ratio.median <= limit))
            }
            Limit::NoFailure => {
                let (made, failed) = samples.counts(proxy, cell, mode);
                let measured = (made > 0).then_some(failed as f64);
                ("0".to_owned(), Spread::of(measured), measured.map(|_| failed == 0))
            }
        };
        Verdict { what: what.to_owned(), proxy, mode, base, wanted, measured, met }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample::tests::sample;

    fn verdict(samples: &Samples, what: &str, base: Mode) -> (Option<bool>, Option<f64>) {
        let all = evaluate(samples);
        let found = all
            .iter()
            .find(|v| v.proxy == Proxy::Relay && v.what == what && v.base == base)
            .expect("such a goal");
        (found.met, found.measured.map(|measured| measured.median))
    }

    #[test]
    fn a_limit_is_met_from_its_own_value_on() {
        for (ours, met) in [(199.0, false), (200.0, true), (300.0, true)] {
            let cell = "keepalive/64B/16";
            let all = Samples(vec![
                sample(0, Mode::Iptables, cell, "rate", 100.0),
                sample(0, Mode::All, cell, "rate", ours),
            ]);
            let what = "keep-alive 64 B, 16 connections, requests/s";
            assert_eq!(verdict(&all, what, Mode::Iptables), (Some(met), Some(ours / 100.0)));
        }
        for (ours, met) in [(40.0, true), (41.0, false)] {
            let all = Samples(vec![
                sample(0, Mode::Iptables, "stopped/64K", "bytes", 10.0),
                sample(0, Mode::All, "stopped/64K", "bytes", ours),
            ]);
            let what = "stopped reader, 64 KB writes, bytes";
            assert_eq!(verdict(&all, what, Mode::Iptables).0, Some(met));
        }
    }

    #[test]
    fn what_was_not_measured_is_neither_met_nor_missed() {
        let all = Samples(vec![sample(0, Mode::All, "connect/8", "rate", 1.0)]);
        let what = "connections/s, 8 clients";
        assert_eq!(verdict(&all, what, Mode::Iptables), (None, None));
        assert_eq!(verdict(&all, "bulk to the server, failures", Mode::Iptables), (None, None));
    }

    #[test]
    fn one_failure_misses_the_goal_of_none() {
        let mut failed = sample(0, Mode::All, "bulk/up", "gbps", 1.0);
        let what = "bulk to the server, failures";
        let all = Samples(vec![failed.clone()]);
        assert_eq!(verdict(&all, what, Mode::Iptables), (Some(true), Some(0.0)));
        failed.error = Some("ENOMEM".to_owned());
        assert_eq!(verdict(&Samples(vec![failed]), what, Mode::Iptables), (Some(false), Some(1.0)));
    }
}
