//! The comparison of the modes.

use std::thread;
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use sidestep_lab::load::{self, LoadOpts, Mode, Report};
use sidestep_lab::{APP, interrupted};

use crate::out::Out;
use crate::side::{PORT, Side};

/// Many short rounds: what else the machine does changes within seconds.
const ROUNDS: usize = 9;

/// The mode that the others are compared with.
const BASE: &str = "iptables";

/// A way of getting from one pod to another: its name, the client's and the server's side.
pub type Way = (&'static str, Side, Side);

/// Compares the ways, each slice of load lasting `seconds`.
pub fn compare(out: &Out, ways: &[Way; 3], seconds: f64) -> Result<()> {
    let duration = Duration::from_secs_f64(seconds);
    for (title, mode, connections) in [
        ("keep-alive, 16 connections", Mode::KeepAlive, 16),
        ("a connection for each request, 8 at a time", Mode::Connect, 8),
    ] {
        let opts = LoadOpts { connections, duration, mode, ..LoadOpts::default() };
        let reports = measure(out, ways, title, opts)?;
        println!("  {} bytes there and back, {title}", opts.payload);
        print_table(out, ways, &reports);
    }
    println!(
        "\n  Medians of {ROUNDS} rounds. Ratios are of the same round: median (middle half of the rounds).\n  \
         Clients, servers and Envoys share this machine's {} CPUs, so the numbers are noisy, and\n  \
         only the ratios of one run mean something; two equal ways can differ by 10 %.",
        thread::available_parallelism().map_or(1, usize::from)
    );
    Ok(())
}

/// Rounds that rotate the ways, so that what else the machine does hits all of them alike.
fn measure(out: &Out, ways: &[Way; 3], title: &str, opts: LoadOpts) -> Result<[Vec<Report>; 3]> {
    let mut reports: [Vec<Report>; 3] = Default::default();
    for round in 0..ROUNDS {
        for turn in 0..ways.len() {
            let number = (round + turn) % ways.len();
            let (name, client, server) = &ways[number];
            out.progress(&format!("round {} of {ROUNDS}: {name}, {title}", round + 1))?;
            let report = load::run(&client.pod, APP, (server.pod.ipv4(), PORT).into(), opts)?;
            ensure!(!interrupted(), "interrupted");
            if let Some(error) = report.first_error {
                bail!("{name}, {title}: {} errors, the first: {error}", report.errors);
            }
            reports[number].push(report);
        }
    }
    out.progress("")?;
    Ok(reports)
}

fn print_table(out: &Out, ways: &[Way; 3], reports: &[Vec<Report>; 3]) {
    let head = format!("{:14}{:>10}{:>11}{:>11}   req/s : {BASE}", "", "req/s", "p50", "p99");
    println!("{}", out.dim(head));
    let base = ways.iter().position(|(name, ..)| *name == BASE).unwrap_or(0);
    for ((name, ..), own) in ways.iter().zip(reports) {
        let pairs = own.iter().zip(&reports[base]);
        let ratios = sorted(pairs.map(|(own, base)| own.rps / base.rps));
        let rates = sorted(own.iter().map(|report| report.rps));
        let halves = sorted(own.iter().map(|report| micros(report.p50)));
        let tails = sorted(own.iter().map(|report| micros(report.p99)));
        let ratio = if *name == BASE {
            "1".to_owned()
        } else {
            let (low, middle, high) =
                (ratios[ROUNDS / 4], ratios[ROUNDS / 2], ratios[ROUNDS * 3 / 4]);
            format!("{middle:.2}  ({low:.2} to {high:.2})")
        };
        println!(
            "    {name:<10}{:>10.0}{:>8.0} us{:>8.0} us   {ratio}",
            rates[ROUNDS / 2],
            halves[ROUNDS / 2],
            tails[ROUNDS / 2]
        );
    }
}

fn micros(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e6
}

/// One value for each round, the lowest first.
fn sorted(values: impl Iterator<Item = f64>) -> [f64; ROUNDS] {
    let mut all = [f64::NAN; ROUNDS];
    for (slot, value) in all.iter_mut().zip(values) {
        *slot = value;
    }
    all.sort_by(f64::total_cmp);
    all
}
