//! `make bench-services`: calls to Services by kube-proxy and by Sidestep, beside calls straight to
//! an endpoint.

#[path = "../../tests/cluster/mod.rs"]
mod cluster;
#[path = "../../../tests/common/mod.rs"]
mod common;
mod measure;
mod report;
mod world;

use std::{num::NonZeroUsize, path::PathBuf, process::ExitCode};

use anyhow::Result;
use clap::Parser;
use sidestep_e2e::envtest::Mode;
use sidestep_lab::stop_on_signals;

use crate::{
    measure::Took,
    report::{Cell, Report, Scale},
    world::{PORTS, Way, World},
};

/// Measures calls to Services: straight to an endpoint, by the real kube-proxy, and by Sidestep. Etcd,
/// the API server and kube-proxy are real; all is in network namespaces and a cgroup that it makes.
/// The agent is $SIDESTEP_BIN.
#[derive(Parser)]
struct Args {
    /// Services in the cluster, one number after the other
    #[arg(long, value_delimiter = ',', default_value = "10,1000,5000,10000,30000")]
    services: Vec<usize>,
    /// How often each way is taken through all calls, at each number of Services
    #[arg(long, default_value = "5")]
    rounds: NonZeroUsize,
    /// Calls of a kind in a round
    #[arg(long, default_value = "2000")]
    calls: NonZeroUsize,
    /// Changes of an endpoint that are followed, with the most Services
    #[arg(long, default_value = "100")]
    changes: NonZeroUsize,
    /// Where report.md, report.json and the plots go
    #[arg(long, value_name = "DIR", default_value = "bench-out/services")]
    out: PathBuf,
    /// What `cargo bench` says
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> ExitCode {
    match bench(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench-services: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// A kind of call: its name, how it is made, and to which port.
type Call = (&'static str, fn(std::net::SocketAddr, usize) -> Result<Took>, u16);

const CALLS: [Call; 4] = [
    ("connect", measure::connects, PORTS[0]),
    ("short connections", measure::short, PORTS[1]),
    ("keep-alive", measure::kept_alive, PORTS[1]),
    ("UDP", measure::datagrams, PORTS[1]),
];

/// Without kube-proxy.
const ALONE: &str = "none";

/// Calls of all kinds, the ways in turns.
fn measure(
    world: &World,
    args: &Args,
    ways: &[Way],
    (mode, services): (&'static str, usize),
    cells: &mut Vec<Cell>,
) -> Result<()> {
    for round in 0..args.rounds.get() {
        for (call, make, port) in CALLS {
            for turn in 0..ways.len() {
                let way = ways[(turn + round) % ways.len()];
                let target = world.target(way, port);
                let took = world.by(way, || make(target, args.calls.get()))??;
                cells.push(Cell { mode, services, call, way, round, took });
            }
        }
    }
    Ok(())
}

const WAYS: [Way; 3] = [Way::Direct, Way::KubeProxy, Way::Sidestep];

fn bench(args: &Args) -> Result<()> {
    stop_on_signals()?;
    sidestep_figures::load_font()?;
    let mut report = Report::new(&args.services, args.rounds.get(), args.calls.get())?;
    for mode in [Mode::Iptables, Mode::Nftables] {
        let name = if mode == Mode::Iptables { "iptables" } else { "nftables" };
        let say = |what: &str| eprintln!("kube-proxy with {name}: {what}");
        say("starting");
        let mut world = World::start(mode)?;
        for services in &args.services {
            say(&format!("{services} Services"));
            world.grow(*services)?;
            measure(&world, args, &WAYS, (name, *services), &mut report.cells)?;
        }
        for way in [Way::KubeProxy, Way::Sidestep] {
            say(&format!("changes, {way:?}"));
            let changes_ms = world.changes(way, args.changes.get())?;
            say(&format!("from cold, {way:?}"));
            let cold_s = world.cold(way)?.as_secs_f64();
            let maps_bytes = if way == Way::Sidestep { world.maps()? } else { 0 };
            let memory_kib = world.memory(way)?;
            report.scales.push(Scale {
                mode: name,
                way,
                changes_ms,
                cold_s,
                memory_kib,
                maps_bytes,
            });
        }
        // Its rules are gone with it: what a packet is spared where nobody needs them.
        if mode == Mode::Iptables {
            say("gone");
            let most = args.services.last().copied().unwrap_or_default();
            let alone = [Way::Direct, Way::Sidestep];
            measure(&world, args, &alone, (ALONE, most), &mut report.cells)?;
        }
    }
    report.finish()?;
    print!("{}", report.text());
    report.write(&args.out)
}
