//! `make torture`: thousands of connections between pods, with every way to read, to write and
//! to end, while the agent and pods come and go. Each byte is checked, and plain TCP is held to
//! the same rules.
#![forbid(unsafe_code)]

mod chaos;
mod end;
mod front;
mod memory;
mod plan;
mod traffic;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::PoisonError;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, bail, ensure};
use clap::{Parser, ValueEnum};
use fastrand::Rng;
use serde_json::Value;
use sidestep_lab::{APP, Agent, Lab, PROXY, Pod, PodNet, interrupted, stop_on_signals, wait_until};

use crate::chaos::Event;
use crate::plan::{Ending, LONG_TALKS, PODS};
use crate::traffic::{BROKEN_PIPE, Opts, Tally, Traffic};

/// Failures that are shown in full.
const SHOWN: usize = 20;
/// In each pod: counts what comes of a connection that connection tracking has forgotten. It does so
/// after [`REMEMBERED`] seconds without a packet, and sees none of what is spliced.
const TRACKING: &str = "table inet tracking {
    counter forgotten { }
    chain in {
        type filter hook input priority 0
        iifname != \"lo\" ct state new,invalid tcp flags & (syn | rst) == 0 counter name forgotten
    }
}";
/// Shorter than a long talk, and longer than any pause.
const REMEMBERED: &str = "5";
/// What a machine that stands still for so long forgets is not to be blamed on anybody.
const STILL: Duration = Duration::from_secs(2);
const MIB: u64 = 1 << 20;
/// Memory that each connection may take at most, on average, whether it is spliced or not.
const EACH: u64 = MIB;
/// Memory that may be left when all is over: other programs have sockets, too.
const LEFT: u64 = 4 * MIB;

/// Tortures spliced connections, and the same ones over plain TCP.
#[derive(Parser)]
struct Args {
    /// The agent's binary [default: `sidestep` next to this binary]
    #[arg(long, value_name = "PATH")]
    sidestep: Option<PathBuf>,
    /// How long, in all
    #[arg(long, default_value_t = 180, value_parser = clap::value_parser!(u64).range(3..=86400))]
    seconds: u64,
    /// What the connections follow from [default: another one each time]
    #[arg(long)]
    seed: Option<u64>,
    /// Play this one connection over and over
    #[arg(long, value_name = "NUMBER")]
    only: Option<u64>,
    /// Connections at the same time
    #[arg(long, default_value_t = 128, value_name = "N")]
    clients: usize,
    /// What the agent is told to splice, one after the other
    #[arg(long, value_enum, value_delimiter = ',', default_value = "off,sidecar,all")]
    modes: Vec<Mode>,
    /// All read as Tokio does: an edge-triggered epoll, and fewer bytes than asked for are taken
    /// for the last ones. Spliced connections stall then, on kernels where the self-test says so
    #[arg(long)]
    short_reads: bool,
    /// Leave the agent and the pods alone
    #[arg(long)]
    calm: bool,
    /// The agent's own: how often a spliced connection sends by TCP
    #[arg(long, default_value_t = 1, value_name = "SECONDS")]
    splice_refresh: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Mode {
    Off,
    Auto,
    Sidecar,
    All,
}

impl Mode {
    fn name(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Auto => "auto",
            Self::Sidecar => "sidecar",
            Self::All => "all",
        }
    }
}

fn main() -> ExitCode {
    let args = Args::parse();
    match stop_on_signals().and_then(|()| torture(&args)) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(_) if interrupted() => ExitCode::from(130),
        Err(err) => {
            eprintln!("torture: {err:#}");
            ExitCode::FAILURE
        }
    }
}

/// Whether all is as it should be.
fn torture(args: &Args) -> Result<bool> {
    let own = std::env::current_exe().context("finding this binary")?;
    let binary = args.sidestep.clone().unwrap_or_else(|| own.with_file_name("sidestep"));
    let seed = args.seed.unwrap_or_else(|| {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        now.as_micros() as u64 % 1_000_000
    });
    println!(
        "{} connections at a time, {} s, seed {seed}: repeat it with SEED={seed}",
        args.clients, args.seconds
    );
    let each = Duration::from_secs(args.seconds) / u32::try_from(args.modes.len())?;
    let mut runs = Vec::new();
    for &mode in &args.modes {
        let run = Run::new(args, mode, seed, &binary, each)
            .with_context(|| format!("with --splice {}", mode.name()))?;
        if interrupted() {
            bail!("interrupted");
        }
        runs.push(run);
    }
    print!("{}", report(&runs));
    let mut failures = 0;
    for run in &runs {
        let name = run.mode.name();
        let found = run.failures();
        for failure in found.iter().take(SHOWN) {
            println!("--splice {name}, seed {seed}: {failure}");
        }
        if found.len() > SHOWN {
            println!("--splice {name}: {} failures more", found.len() - SHOWN);
        }
        failures += found.len();
    }
    println!("{failures} failures");
    Ok(failures == 0)
}

/// The result of one mode's run.
struct Run {
    mode: Mode,
    clients: u64,
    took: Duration,
    tally: Tally,
    counters: BTreeMap<&'static str, u64>,
    events: BTreeMap<Event, u64>,
    memory: Memory,
    /// Packets of connections that connection tracking had forgotten.
    forgotten: u64,
    /// The longest time for which a thread that sleeps briefly was not woken.
    still: Duration,
    /// Whether a leg is on, so that something is spliced.
    spliced: bool,
}

/// Bytes that TCP had in its queues.
struct Memory {
    before: u64,
    most: u64,
    after: u64,
}

const COUNTERS: [&str; 3] = ["splice_messages", "splice_bytes", "splice_spilled"];

impl Run {
    fn new(args: &Args, mode: Mode, seed: u64, binary: &Path, time: Duration) -> Result<Self> {
        let lab = Lab::new("torture")?;
        let names = ["a", "b", "c"];
        let pods = names
            .into_iter()
            .map(|name| lab.pod(name, PodNet::DUAL))
            .collect::<Result<Vec<Pod>>>()?;
        debug_assert_eq!(pods.len(), PODS);
        for pod in &pods {
            pod.nft(TRACKING)?;
            pod.sysctl("net.netfilter.nf_conntrack_tcp_timeout_established", REMEMBERED)?;
            // Windows are not its business here.
            pod.sysctl("net.netfilter.nf_conntrack_tcp_be_liberal", "1")?;
        }
        let refresh = args.splice_refresh.to_string();
        let flags = ["--splice", mode.name(), "--splice-refresh", &refresh];
        let mut agent = Agent::start_flags(binary, &lab, &flags)?;
        for pod in &pods {
            agent.add_pod(pod)?;
        }
        for pod in &pods {
            agent.wait_enrolled(pod)?;
        }
        let mut rng = Rng::with_seed(seed);
        let spliced = mode != Mode::Off;
        let opts = Opts { seed, only: args.only, short_reads: args.short_reads, spliced };
        let traffic = Traffic::new(opts, &pods);
        let before = memory::tcp()?;
        let mut memory = Memory { before, most: before, after: before };
        let mut still = Duration::ZERO;
        let mut events = BTreeMap::new();
        let begin = Instant::now();
        let status = thread::scope(|scope| -> Result<Value> {
            let done = Stop(&traffic);
            for pod in &pods {
                for (uid, ports) in [(PROXY, front::SIDECAR), (APP, front::APP)] {
                    let listeners = pod.run(uid, uid, || front::listen(ports))??;
                    let traffic = &traffic;
                    scope.spawn(move || {
                        let served = pod.run(uid, uid, || front::serve(listeners, traffic));
                        if let Err(err) = served.and_then(|served| served) {
                            traffic.problem(format!("what listens in pod {}: {err:#}", pod.name()));
                        }
                    });
                }
            }
            let clients: Vec<_> =
                (0..args.clients).map(|_| scope.spawn(|| traffic.run(&pods))).collect();
            let sampler = scope.spawn(|| {
                let (mut most, mut still) = (0, Duration::ZERO);
                while !traffic.is_over() {
                    let begin = Instant::now();
                    most = memory::tcp().unwrap_or(0).max(most);
                    thread::sleep(Duration::from_millis(20));
                    still = begin.elapsed().max(still);
                }
                (most, still)
            });
            let mut conduct = || -> Result<()> {
                if args.calm {
                    thread::sleep(time);
                    return Ok(());
                }
                // Most of the time nothing happens.
                let turn = (time / 8).clamp(Duration::from_millis(500), Duration::from_secs(4));
                for event in Event::turns(&mut rng.fork()) {
                    if begin.elapsed() + turn >= time || interrupted() {
                        break;
                    }
                    thread::sleep(turn);
                    event.happen(&mut agent, &pods, &traffic, &mut rng)?;
                    *events.entry(event).or_default() += 1;
                }
                thread::sleep(time.saturating_sub(begin.elapsed()));
                Ok(())
            };
            let conducted = conduct();
            traffic.stop();
            let ended = clients.into_iter().all(|client| client.join().is_ok());
            drop(done);
            ensure!(ended, "a client panicked");
            (memory.most, still) = sampler.join().unwrap_or_default();
            conducted?;
            agent.status()
        })?;
        let took = begin.elapsed();
        let mut left = 0;
        let closed = wait_until("all sockets to be closed", Duration::from_secs(10), || {
            let sockets = |pod: &Pod| pod.run(0, 0, memory::sockets)?;
            left = pods.iter().filter_map(|pod| sockets(pod).ok()).sum();
            left == 0
        });
        if closed.is_err() {
            traffic.problem(format!("{left} sockets are still there after all were closed"));
        }
        let freed = || memory::tcp().is_ok_and(|now| now <= before + LEFT);
        let _ = wait_until("the memory to be freed", Duration::from_secs(5), freed);
        memory.after = memory::tcp()?;
        let forgotten = pods.iter().map(forgotten).sum::<Result<u64>>()?;
        let tally =
            std::mem::take(&mut *traffic.tally.lock().unwrap_or_else(PoisonError::into_inner));
        let counters = COUNTERS.into_iter().map(|name| (name, counter(&status, name))).collect();
        let legs = status["splice"]["legs"].as_object();
        let spliced = legs.is_some_and(|legs| legs.values().any(|leg| leg["on"] == true));
        let clients = args.clients as u64;
        Ok(Self { mode, clients, took, tally, counters, events, memory, forgotten, still, spliced })
    }

    /// The failures of the run.
    fn failures(&self) -> Vec<String> {
        let mut failures = self.tally.failures.clone();
        if self.mode != Mode::Off && !self.spliced {
            failures.push("no leg is on: nothing was tested".to_owned());
        }
        let redirected = self.counters["splice_messages"];
        if self.spliced == (redirected == 0) {
            failures.push(format!("{redirected} messages were redirected"));
        }
        let resets = self.tally.endings.iter().filter(|((how, _), _)| how.resets());
        let all: u64 = resets.clone().map(|(_, count)| *count).sum();
        let broken = resets.filter(|((_, kind), _)| *kind == BROKEN_PIPE);
        let broken: u64 = broken.map(|(_, count)| *count).sum();
        if broken > all.div_ceil(1000) {
            failures.push(format!("{broken} of {all} were told EPIPE alone"));
        }
        // F40: each long talk that is forgotten shows in a packet or more.
        if self.still < STILL && self.forgotten > LONG_TALKS / 2 {
            let (forgotten, talks) = (self.forgotten, self.tally.long_talks);
            failures
                .push(format!("connection tracking forgot: {forgotten} packets, {talks} talks"));
        }
        let Memory { before, most, after } = self.memory;
        if most > before + EACH * self.clients {
            failures.push(format!("TCP held {} KiB at a time", most >> 10));
        }
        if after > before + LEFT {
            failures.push(format!("TCP held {} KiB, and in the end {}", before >> 10, after >> 10));
        }
        failures
    }
}

/// Lets all threads end, also when something failed.
struct Stop<'a>(&'a Traffic);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.stop();
        self.0.end();
    }
}

/// What [`TRACKING`] has counted.
fn forgotten(pod: &Pod) -> Result<u64> {
    let text = pod.nft("list counter inet tracking forgotten")?;
    let mut words = text.split_whitespace().skip_while(|word| *word != "packets");
    let number = words.nth(1).and_then(|word| word.parse().ok());
    number.with_context(|| format!("nft said {text:?}"))
}

/// The sum over all meshes.
fn counter(status: &Value, name: &str) -> u64 {
    let meshes = status["counters"].as_object();
    meshes.into_iter().flatten().filter_map(|(_, counters)| counters[name].as_u64()).sum()
}

/// A table with a column for each mode.
fn report(runs: &[Run]) -> String {
    let mut rows: Vec<(String, Vec<u64>)> = Vec::new();
    let mut row = |name: &str, value: &dyn Fn(&Run) -> u64| {
        rows.push((name.to_owned(), runs.iter().map(value).collect()));
    };
    row("seconds", &|run| run.took.as_secs());
    row("connections", &|run| run.tally.connections);
    row("MiB that were checked", &|run| run.tally.bytes / MIB);
    row("long talks", &|run| run.tally.long_talks);
    row("packets of forgotten connections", &|run| run.forgotten);
    row("ms that the machine stood still", &|run| run.still.as_millis() as u64);
    row("messages redirected", &|run| run.counters["splice_messages"]);
    row("MiB redirected", &|run| run.counters["splice_bytes"] / MIB);
    row("messages spilled", &|run| run.counters["splice_spilled"]);
    row("KiB of TCP's memory before", &|run| run.memory.before >> 10);
    row("KiB of TCP's memory at most", &|run| run.memory.most >> 10);
    row("KiB of TCP's memory after", &|run| run.memory.after >> 10);
    for event in Event::ALL {
        row(event.name(), &|run| run.events.get(&event).copied().unwrap_or(0));
    }
    let endings: BTreeSet<(Ending, &str)> =
        runs.iter().flat_map(|run| run.tally.endings.keys().copied()).collect();
    for (ending, kind) in endings {
        let count = |run: &Run| run.tally.endings.get(&(ending, kind)).copied().unwrap_or(0);
        row(&format!("ending {ending:?}: {kind}"), &count);
    }
    row("failures", &|run| run.failures().len() as u64);
    let mut text = format!("{:38}", "--splice");
    runs.iter().for_each(|run| text += &format!("{:>10}", run.mode.name()));
    for (name, values) in rows {
        text += &format!("\n{name:38}");
        values.iter().for_each(|value| text += &format!("{value:>10}"));
    }
    text + "\n"
}
