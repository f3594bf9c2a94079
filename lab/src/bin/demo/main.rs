//! `make demo`: two pods with real sidecars, a call's path through them with Sidestep in the
//! place of iptables, and a comparison of the two.
#![forbid(unsafe_code)]

mod compare;
mod out;
mod side;

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{self, Command, ExitCode};
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use nix::unistd::geteuid;
use sidestep_lab::envoy::{self, LogLine};
use sidestep_lab::{
    APP, Agent, Envoy, INBOUND, Lab, OUTBOUND, PROXY, ServeOpts, Server, Talk, http_get,
    interrupted, iptables, stop_on_signals, teardown,
};

use crate::compare::compare;
use crate::out::Out;
use crate::side::{PORT, Side};

/// Shows what Sidestep does: two pods with real Envoy sidecars and no iptables rule. Everything
/// happens in network namespaces and cgroups that the demo makes, and removes at its end.
#[derive(Parser)]
struct Args {
    /// The agent's binary [default: `sidestep` next to this binary]
    #[arg(long, value_name = "PATH")]
    sidestep: Option<PathBuf>,
    /// Leave everything running at the end, and say how to look around
    #[arg(long)]
    keep: bool,
    /// Seconds for each slice of the comparison (there are 54)
    #[arg(long, default_value_t = 0.6, value_name = "N")]
    seconds: f64,
    /// Only remove what demos and tests that no longer run have left behind
    #[arg(long)]
    teardown: bool,
    /// Be the application of a pod
    #[arg(long, hide = true, num_args = 1.., value_name = "ADDR")]
    serve: Vec<SocketAddr>,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let done = if !args.serve.is_empty() {
        serve(&args.serve)
    } else if args.teardown {
        remove_leftovers()
    } else {
        stop_on_signals().and_then(|()| demo(&args))
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) if interrupted() => {
            eprintln!("\ndemo: interrupted; everything it had created was removed");
            ExitCode::from(130)
        }
        Err(err) => {
            eprintln!("\ndemo: {err:#}");
            ExitCode::FAILURE
        }
    }
}

fn serve(listen: &[SocketAddr]) -> Result<()> {
    let opts = ServeOpts { talk: Talk::Echo, ..ServeOpts::on(listen.iter().copied()) };
    let _server = Server::start_here(opts)?;
    loop {
        thread::park();
    }
}

fn remove_leftovers() -> Result<()> {
    ensure!(geteuid().is_root(), "this needs root");
    let found = teardown::find()?;
    for leftover in &found {
        let what = format!(
            "process {}: {} namespaces, {} directories",
            leftover.pid,
            leftover.namespaces.len(),
            leftover.directories.len()
        );
        if leftover.alive {
            println!("still running, so not removed: {what}");
        } else {
            teardown::remove(leftover)?;
            println!("removed the remains of {what}");
        }
    }
    if found.is_empty() {
        println!("no demo or test has left anything behind");
    }
    Ok(())
}

fn demo(args: &Args) -> Result<()> {
    let sidestep = check_parts(args)?;
    let out = Out::new();
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let began = Instant::now();

    let lab = Lab::new("demo")?;
    out.step("Two pods, each with an application and a real Envoy as its sidecar")?;
    let a = Side::new(&lab, "app-a", true)?;
    let b = Side::new(&lab, "app-b", true)?;
    for side in [&a, &b] {
        let ips: Vec<_> = side.pod.ips().iter().map(IpAddr::to_string).collect();
        out.row(side.pod.name(), "addresses", ips.join("  "));
        out.row("", "namespace", side.pod.netns().display());
        out.row("", "application", format!("uid {APP}, serves on {PORT}"));
        let envoy = side.envoy()?;
        let version = version(envoy).unwrap_or_default();
        out.row(
            "",
            "sidecar",
            format!("Envoy {version}, uid {PROXY}, on {OUTBOUND} and {INBOUND}"),
        );
    }

    out.step("Sidestep starts and enrolls both pods")?;
    let start = Instant::now();
    let mut agent = Agent::start(&sidestep, &lab)?;
    for side in [&a, &b] {
        agent.add_pod(&side.pod)?;
    }
    for side in [&a, &b] {
        agent.wait_enrolled(&side.pod)?;
    }
    out.row("agent", "binary", sidestep.display());
    out.row("", "kernel", kernel.trim());
    out.row(
        "",
        "enrolled",
        format!("both pods, {} ms after the agent's start", start.elapsed().as_millis()),
    );

    out.step("A call from app-a to app-b over IPv4, hop by hop")?;
    show_call(&out, &a, &b, b.pod.ipv4(), "127.0.0.6").with_context(|| agent.log_tail())?;
    out.step("The same over IPv6")?;
    show_call(&out, &a, &b, b.pod.ipv6(), "::6").with_context(|| agent.log_tail())?;

    out.step("Packet filter rules in these pods")?;
    for side in [&a, &b] {
        let rules = iptables::ruleset(&side.pod)?;
        ensure!(rules.is_empty(), "there are rules in {}:\n{rules}", side.pod.name());
        for command in ["iptables-save", "ip6tables-save", "nft list ruleset"] {
            let name = if command == "iptables-save" { side.pod.name() } else { "" };
            out.row(name, command, out.good("nothing"));
        }
    }

    out.step("Side by side: no mesh, Istio's iptables rules, Sidestep")?;
    let modes = [
        ("no mesh", Side::new(&lab, "plain-a", false)?, Side::new(&lab, "plain-b", false)?),
        ("iptables", Side::new(&lab, "ipt-a", true)?, Side::new(&lab, "ipt-b", true)?),
        ("Sidestep", a, b),
    ];
    for side in [&modes[1].1, &modes[1].2] {
        iptables::install_istio(&side.pod)?;
    }
    compare(&out, &modes, args.seconds)?;
    let [_, _, (_, a, b)] = &modes;

    if args.keep {
        keep(&out, &lab, &agent, [a, b], &sidestep)?;
        // Nothing is dropped.
        process::exit(0);
    }
    drop(agent);
    drop(modes);
    drop(lab);
    println!("\nEverything was removed again. The demo took {} s.", began.elapsed().as_secs());
    Ok(())
}

/// Says clearly what is missing, before anything is made. Gives the agent's binary.
fn check_parts(args: &Args) -> Result<PathBuf> {
    ensure!(
        geteuid().is_root(),
        "this needs root: it creates network namespaces and loads eBPF programs"
    );
    ensure!((0.05..=60.0).contains(&args.seconds), "--seconds must be between 0.05 and 60");
    envoy::binary()?;
    for tool in ["ip", "nsenter", "setpriv", "iptables-save", "nft"] {
        let found = Command::new(tool).arg("--version").output();
        ensure!(found.is_ok(), "`{tool}` is not in PATH: run `make deps`");
    }
    let sidestep = match &args.sidestep {
        Some(path) => path.clone(),
        None => std::env::current_exe().context("finding this binary")?.with_file_name("sidestep"),
    };
    ensure!(
        sidestep.is_file(),
        "there is no agent at {}: run `make`, or name its path with --sidestep",
        sidestep.display()
    );
    sidestep.canonicalize().with_context(|| format!("finding {}", sidestep.display()))
}

fn version(envoy: &Envoy) -> Option<String> {
    let info: serde_json::Value = serde_json::from_str(&envoy.admin("/server_info").ok()?).ok()?;
    Some(info["version"].as_str()?.split('/').nth(1)?.to_owned())
}

/// One call, checked and shown from all four places that saw it.
fn show_call(out: &Out, a: &Side, b: &Side, ip: IpAddr, six: &str) -> Result<()> {
    let target = SocketAddr::new(ip, PORT);
    let call = a.pod.run(APP, APP, || http_get(target))?.context("the call failed")?;
    let of_call = |line: &LogLine| line.downstream_remote == call.local;
    let near = a.envoy()?.wait_log("the call", of_call)?;
    let of_near = |line: &LogLine| Some(line.downstream_remote) == near.upstream_local;
    let far = b.envoy()?.wait_log("the call", of_near)?;

    out.row("app-a  application", "connects to", target);
    out.row("", "getsockname", call.local);
    out.row("", "getpeername", out.check(call.peer, target)?);
    for (name, line, listener) in
        [("app-a  Envoy", &near, "virtualOutbound"), ("app-b  Envoy", &far, "virtualInbound")]
    {
        ensure!(line.listener == listener, "the call came to {}", line.listener);
        out.row(name, "accepts from", line.downstream_remote);
        out.row("", "original dest.", out.check(line.downstream_local, target)?);
        let from = line.upstream_local.context("Envoy made no connection")?;
        let to = line.upstream_host.context("Envoy made no connection")?;
        out.row("", "forwards", format!("{from} -> {}", out.check(to, target)?));
    }
    ensure!(far.upstream_local == Some(call.seen.peer), "another connection reached app-b");
    let peer = call.seen.peer;
    ensure!(peer.ip() == six.parse::<IpAddr>()?, "app-b sees {peer} and not {six}");
    out.row("app-b  application", "accepts from", out.good(peer));
    Ok(())
}

fn keep(out: &Out, lab: &Lab, agent: &Agent, sides: [&Side; 2], sidestep: &Path) -> Result<()> {
    out.step("Left running: how to look around (as root)")?;
    let [a, b] = sides;
    let (cgroup, netns) = (a.pod.cgroup().display(), a.pod.netns());
    let own = std::env::current_exe().context("finding this binary")?;
    println!(
        "  a shell in app-a as the application's user, in the pod's cgroup:\n    \
           sh -c 'echo $$ >{cgroup}/cgroup.procs; exec nsenter --net={} \\\n        \
           setpriv --reuid={APP} --regid={APP} --clear-groups sh'\n  \
         and in it:\n    \
           curl http://{}/",
        netns.display(),
        SocketAddr::new(b.pod.ipv4(), PORT),
    );
    println!("  what the sidecars saw:");
    for side in [a, b] {
        println!("    tail -f {}", side.envoy()?.access_log_path().display());
    }
    println!("  the agent, its log, and the manifests that it watches:");
    println!("    {} status --bpffs {}", sidestep.display(), agent.bpffs().display());
    println!("    ls {}", lab.dir().display());
    println!("  remove all of it:\n    {} --teardown", own.display());
    Ok(())
}
