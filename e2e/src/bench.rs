//! What a user gains under the real mesh: HTTP between two pods on one node, intercepted by the
//! mesh's own iptables rules and by Sidestep, in turns.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use serde_json::json;
use sidestep_e2e::image::PROGRAM_IMAGE;
use sidestep_e2e::mesh::{Cluster, ISTIO_SYSTEM, Istio, Mesh, Space};
use sidestep_e2e::shell::Shell;
use sidestep_figures::{Bars, Plot, Spread, Style};
use sidestep_lab::interrupted;

/// How the pods are intercepted: the first one is what the others are compared with.
const MODES: [&str; 4] = ["iptables", "off", "auto", "all"];
/// Of the plots, in the same order.
const COLOURS: [[u8; 3]; 4] =
    [[0xd5, 0x5e, 0x00], [0x9c, 0xd3, 0xf0], [0x37, 0x90, 0xc9], [0x00, 0x45, 0x8a]];
/// The revision of a second istiod, which gives its pods the mesh's own rules.
const REVISION: &str = "iptables";

/// A load: its name, what it is, and fortio's arguments.
struct Cell {
    name: &'static str,
    doc: &'static str,
    args: &'static [&'static str],
    path: &'static str,
}

const CELLS: [Cell; 4] = [
    Cell {
        name: "keepalive/16",
        doc: "16 connections, each with a request after the other",
        args: &["-c", "16"],
        path: "echo?size=64",
    },
    Cell { name: "keepalive/1", doc: "one connection", args: &["-c", "1"], path: "echo?size=64" },
    Cell {
        name: "connect/4",
        doc: "4 clients, with a connection for each request",
        args: &["-c", "4", "-keepalive=false"],
        path: "echo?size=64",
    },
    Cell {
        name: "1MB/4",
        doc: "4 connections, answers of 1 MB",
        // The other client takes no answer that is larger than its buffer.
        args: &["-c", "4", "-stdclient"],
        path: "echo?size=1048576",
    },
];

/// The figures of a sample, in the order of the report: name and words.
const FIGURES: [(&str, &str); 6] = [
    ("rate", "requests/s"),
    ("p50", "p50"),
    ("p99", "p99"),
    ("user", "proxies' user time for a request"),
    ("system", "system time for a request"),
    ("softirq", "softirq time for a request"),
];

/// What to run, and where the report goes.
pub struct Settings {
    /// Rounds: each takes every mode through every load.
    pub rounds: usize,
    /// How long each load lasts, in seconds.
    pub seconds: u32,
    /// `report.md`, `report.json` and the plots.
    pub out: PathBuf,
}

/// One load in one mode and round.
#[derive(Clone, Debug, Serialize)]
struct Sample {
    round: usize,
    mode: &'static str,
    cell: &'static str,
    /// `rate` in requests/s, `p50` and `p99` in seconds; `user`, `system` and `softirq` in seconds
    /// for a request.
    values: BTreeMap<&'static str, f64>,
    requests: u64,
    failed: u64,
}

/// Runs everything, and writes the report. Fails where a request did.
pub fn bench(settings: &Settings, kind: &str, istio: Istio) -> Result<()> {
    sidestep_figures::load_font()?;
    let cluster = Cluster::start(kind, Mesh::Istio(istio))?;
    own_rules(&cluster)?;
    fs::create_dir_all(&settings.out).context("making the report's directory")?;
    let write = |name: &str, text: String| {
        let file = settings.out.join(name);
        fs::write(&file, text).with_context(|| format!("writing {}", file.display()))
    };
    let mut samples = Vec::new();
    for round in 0..settings.rounds {
        for turn in 0..MODES.len() {
            let mode = MODES[(round + turn) % MODES.len()];
            samples.extend(measure(&cluster, settings, round, mode)?);
        }
        println!("round {} of {} is done", round + 1, settings.rounds);
        // Each time: what was measured is there whatever comes later.
        write("report.md", report(&samples))?;
        write("report.json", serde_json::to_string_pretty(&samples)?)?;
        plots(&samples, &settings.out)?;
    }
    print!("{}", report(&samples));
    let failed: u64 = samples.iter().map(|sample| sample.failed).sum();
    ensure!(failed == 0, "{failed} requests failed: {}", settings.out.display());
    Ok(())
}

/// A second control plane, which intercepts as the mesh does by itself.
fn own_rules(cluster: &Cluster) -> Result<()> {
    let istio = cluster.mesh.istio().context("this is for Istio")?;
    let set = format!("revision={REVISION},pilot.cni.enabled=false");
    let wait = ["--set", &set, "--wait", "--timeout", "180s"].map(str::to_owned);
    let args = [istio.chart("istiod")?, istio.values(), wait.to_vec()];
    let args: Vec<&[String]> = args.iter().map(Vec::as_slice).collect();
    let release = format!("istiod-{REVISION}");
    cluster.helm(ISTIO_SYSTEM, &["upgrade", "--install", &release], &args).map(drop)
}

/// All loads in one mode, by pods that are made for them, so that no connection is older.
fn measure(
    cluster: &Cluster,
    settings: &Settings,
    round: usize,
    mode: &'static str,
) -> Result<Vec<Sample>> {
    let own = mode == MODES[0];
    let name = format!("bench-{mode}");
    let space = if own {
        cluster.space_with(&name, json!({"labels": {"istio.io/rev": REVISION}}))?
    } else {
        cluster.install_agent(&["--set", &format!("splice={mode}")])?;
        cluster.space(&name)?
    };
    let node = cluster.worker(0)?;
    let edit = json!({"spec": {"containers": [{
        "name": "app",
        "image": PROGRAM_IMAGE,
        "args": ["server", "-http-port", "0.0.0.0:8080", "-grpc-port", "disabled",
            "-redirect-port", "disabled", "-tcp-port", "disabled", "-udp-port", "disabled",
            "-maxpayloadsizekb", "1024"],
    }]}});
    space.server("server", node, edit.clone())?;
    space.client("client", node, edit)?;
    for pod in ["server", "client"] {
        let object = space.wait_ready(pod)?;
        let inits = object["spec"]["initContainers"].to_string();
        let wanted = if own { cluster.mesh.init() } else { cluster.mesh.validator() };
        ensure!(inits.contains(wanted), "{pod} has no {wanted}: {inits}");
        if !own {
            space.wait_enrolled(pod, true)?;
        }
    }
    through_the_mesh(&space)?;
    let shell = cluster.shell(node);
    let proxies = ["server", "client"].map(|pod| -> Result<u32> {
        let uid = space.get_pod(pod)?["metadata"]["uid"].as_str().map(str::to_owned);
        shell.process_named(&uid.context("a pod without uid")?, "envoy")
    });
    let proxies = proxies.into_iter().collect::<Result<Vec<_>>>()?;
    let mut samples = Vec::new();
    for cell in &CELLS {
        // So that it is measured warm: connections are open, and those worth it spliced.
        load(&space, cell, 1)?;
        let before = Cpu::read(&shell, &proxies)?;
        let result = load(&space, cell, settings.seconds)?;
        let spent = Cpu::read(&shell, &proxies)?.since(&before);
        if interrupted() {
            bail!("interrupted");
        }
        samples.push(result.sample(round, mode, cell.name, &spent)?);
    }
    for pod in ["client", "server"] {
        space.delete_pod(pod)?;
    }
    Ok(samples)
}

/// Waits until the server's sidecar knows the client: by mutual TLS, through both sidecars.
fn through_the_mesh(space: &Space<'_>) -> Result<()> {
    space.cluster().soon("the server to know the client", || {
        let said = space.exec("client", &["/fortio", "curl", "-quiet", "http://server/debug"])?;
        ensure!(said.contains("/sa/client"), "it does not: {said}");
        Ok(())
    })
}

fn load(space: &Space<'_>, cell: &Cell, seconds: u32) -> Result<Fortio> {
    let url = format!("http://server/{}", cell.path);
    let time = format!("{seconds}s");
    let fixed =
        ["/fortio", "load", "-quiet", "-qps", "0", "-r", "0.00001", "-json", "-", "-t", &time];
    let said = space.exec("client", &[&fixed[..], cell.args, &[&url]].concat())?;
    serde_json::from_str(&said).with_context(|| format!("fortio said {said:?}"))
}

/// What fortio reports, as far as it is read here.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Fortio {
    #[serde(rename = "ActualQPS")]
    actual_qps: f64,
    duration_histogram: Histogram,
    ret_codes: BTreeMap<String, u64>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Histogram {
    percentiles: Vec<Percentile>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Percentile {
    percentile: f64,
    value: f64,
}

impl Fortio {
    fn sample(
        &self,
        round: usize,
        mode: &'static str,
        cell: &'static str,
        spent: &Cpu,
    ) -> Result<Sample> {
        let requests: u64 = self.ret_codes.values().sum();
        ensure!(requests > 0, "{cell} in mode {mode}: no request was made");
        let good = self.ret_codes.get("200").copied().unwrap_or_default();
        let percentile = |wanted: f64| {
            let mut all = self.duration_histogram.percentiles.iter();
            let found = all.find(|one| (one.percentile - wanted).abs() < 0.01);
            found.map(|one| one.value).with_context(|| format!("fortio has no p{wanted}"))
        };
        let each = |ticks: u64| ticks as f64 / TICKS / requests as f64;
        let values = [
            ("rate", self.actual_qps),
            ("p50", percentile(50.0)?),
            ("p99", percentile(99.0)?),
            ("user", each(spent.user)),
            ("system", each(spent.system)),
            ("softirq", each(spent.softirq)),
        ];
        Ok(Sample { round, mode, cell, values: values.into(), requests, failed: requests - good })
    }
}

/// What the kernel counts in: USER_HZ, which is the same on every architecture that Kubernetes has.
const TICKS: f64 = 100.0;

/// CPU time in ticks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Cpu {
    /// User time of both sidecars.
    user: u64,
    /// System time of the machine.
    system: u64,
    softirq: u64,
}

impl Cpu {
    fn read(shell: &Shell, proxies: &[u32]) -> Result<Self> {
        let files: Vec<String> = proxies.iter().map(|pid| format!("/proc/{pid}/stat")).collect();
        let argv: Vec<&str> = ["head", "-qn1", "/proc/stat"]
            .into_iter()
            .chain(files.iter().map(String::as_str))
            .collect();
        Self::parse(&shell.run(&argv)?, proxies.len())
    }

    /// From the first line of /proc/stat, and /proc/PID/stat of each sidecar.
    fn parse(text: &str, proxies: usize) -> Result<Self> {
        let mut lines = text.lines();
        let machine = lines.next().context("/proc/stat is empty")?;
        let ticks = |words: &[&str], place: usize| -> Result<u64> {
            let word = words.get(place).with_context(|| format!("too short: {words:?}"))?;
            word.parse().with_context(|| format!("{word:?} is no number of ticks"))
        };
        // "cpu user nice system idle iowait irq softirq ..."
        let words: Vec<&str> = machine.split_whitespace().collect();
        let mut cpu = Self {
            user: 0,
            system: ticks(&words, 3)?,
            softirq: ticks(&words, 6)? + ticks(&words, 7)?,
        };
        let mut seen = 0;
        for line in lines {
            // "pid (name) state ...", where utime is the 14th field.
            let (_, rest) =
                line.rsplit_once(") ").with_context(|| format!("not a stat: {line}"))?;
            let words: Vec<&str> = rest.split_whitespace().collect();
            cpu.user += ticks(&words, 11)?;
            seen += 1;
        }
        ensure!(seen == proxies, "{seen} of {proxies} sidecars are there");
        Ok(cpu)
    }

    fn since(&self, before: &Self) -> Self {
        Self {
            user: self.user.saturating_sub(before.user),
            system: self.system.saturating_sub(before.system),
            softirq: self.softirq.saturating_sub(before.softirq),
        }
    }
}

/// The figure of one round, or its ratio to the first mode in the same round.
fn spread(samples: &[Sample], cell: &str, mode: &str, figure: &str, ratio: bool) -> Option<Spread> {
    let of = |mode: &str, round: usize| {
        let mut all = samples.iter();
        let found = all.find(|s| s.cell == cell && s.mode == mode && s.round == round)?;
        found.values.get(figure).copied()
    };
    let rounds = samples.iter().map(|s| s.round).max()? + 1;
    Spread::of((0..rounds).filter_map(|round| {
        let value = of(mode, round)?;
        if !ratio {
            return Some(value);
        }
        of(MODES[0], round).filter(|base| *base > 0.0).map(|base| value / base)
    }))
}

/// The tables, as docs/performance.md has them.
fn report(samples: &[Sample]) -> String {
    let mut text = String::new();
    for cell in &CELLS {
        let heads: String = MODES[1..].iter().fold(String::new(), |mut text, mode| {
            let _ = write!(text, " `{mode}` |");
            text
        });
        let _ = writeln!(text, "**{}**: {}\n", cell.name, cell.doc);
        let _ = writeln!(
            text,
            "| | `{}` |{heads}\n|---|---|{}",
            MODES[0],
            "---|".repeat(MODES.len() - 1)
        );
        for (figure, words) in FIGURES {
            let base = spread(samples, cell.name, MODES[0], figure, false);
            let base = base.map_or_else(|| "-".to_owned(), |base| absolute(figure, base.median));
            let _ = write!(text, "| {words} | {base} |");
            for mode in &MODES[1..] {
                let ratio = spread(samples, cell.name, mode, figure, true);
                let ratio = ratio.map_or_else(
                    || "-".to_owned(),
                    |r| format!("{:.2} ({:.2}-{:.2})", r.median, r.low, r.high),
                );
                let _ = write!(text, " {ratio} |");
            }
            text.push('\n');
        }
        text.push('\n');
    }
    text
}

/// One for each figure: the ratio to the first mode, load by load.
fn plots(samples: &[Sample], dir: &Path) -> Result<()> {
    let styles = MODES.iter().zip(COLOURS);
    let styles: Vec<Style> =
        styles.map(|(mode, colour)| Style { label: (*mode).to_owned(), colour }).collect();
    for (figure, words) in FIGURES {
        let bar = |cell: &Cell, mode: usize| {
            Some((mode, spread(samples, cell.name, MODES[mode], figure, true)?))
        };
        let group = |cell: &Cell| Bars {
            label: cell.name.to_owned(),
            bars: (1..MODES.len()).filter_map(|mode| bar(cell, mode)).collect(),
        };
        let groups: Vec<Bars> = CELLS.iter().map(group).collect();
        let title = format!("HTTP under Istio, mutual TLS: {words}, {} = 1", MODES[0]);
        let plot = Plot::Bars { title: &title, groups: &groups, base: Some(0) };
        plot.write(&styles, dir, &format!("mesh-{figure}"))?;
    }
    Ok(())
}

fn absolute(figure: &str, value: f64) -> String {
    match figure {
        "rate" => format!("{value:.0}"),
        "p50" | "p99" => format!("{:.2} ms", value * 1e3),
        _ => format!("{:.0} us", value * 1e6),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_read() -> Result<()> {
        let text = "cpu  10 0 20 500 3 1 30 0 0 0\n\
                    7 (envoy) S 1 2 3 4 5 6 7 8 9 10 111 12 13\n\
                    8 (a (b) c) S 1 2 3 4 5 6 7 8 9 10 222 12 13\n";
        assert_eq!(Cpu::parse(text, 2)?, Cpu { user: 333, system: 20, softirq: 31 });
        assert!(Cpu::parse(text, 3).is_err());
        Ok(())
    }

    #[test]
    fn ratios_are_of_the_same_round() -> Result<()> {
        let said = r#"{"ActualQPS": 100.5, "RetCodes": {"200": 9, "503": 1}, "DurationHistogram":
            {"Percentiles": [{"Percentile": 50, "Value": 0.001}, {"Percentile": 99, "Value": 0.002}]}}"#;
        let mut fortio: Fortio = serde_json::from_str(said)?;
        let spent = Cpu { user: 10, system: 20, softirq: 0 };
        let mut samples = Vec::new();
        for (round, slow) in [(0, 1.0), (1, 3.0)] {
            for (mode, rate) in [("iptables", 50.0), ("all", 100.0)] {
                fortio.actual_qps = rate / slow;
                samples.push(fortio.sample(round, mode, "keepalive/1", &spent)?);
            }
        }
        assert_eq!((samples[0].requests, samples[0].failed), (10, 1));
        let ratio = spread(&samples, "keepalive/1", "all", "rate", true);
        assert_eq!(ratio.map(|r| (r.median, r.low, r.high)), Some((2.0, 2.0, 2.0)));
        let text = report(&samples);
        assert!(text.contains("| requests/s | 33 | - | - | 2.00 (2.00-2.00) |"), "{text}");
        assert!(text.contains("| system time for a request | 20000 us | - | - | 1.00"), "{text}");
        Ok(())
    }
}
