//! What runs in the pods: it serves, asks, or only waits. Everything that it learns goes to its
//! stdout, a line for each thing.
#![forbid(unsafe_code)]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::process::{self, ExitCode};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::{Parser, ValueEnum};
use nix::sys::signal::{SigSet, Signal};
use sidestep_e2e::web;
use sidestep_lab::{
    INBOUND, OUTBOUND, Seen, ServeOpts, Server, Talk, ask, interrupted, stop_on_signals, wait_until,
};

/// Between two connections of `loop`.
const PAUSE: Duration = Duration::from_millis(20);

#[derive(Parser)]
enum Mode {
    /// Wait for SIGTERM
    Pause,
    /// Serve TCP: greet each client with a line that says what is seen of it, then echo
    Serve {
        /// Where to listen
        #[arg(required = true)]
        addrs: Vec<SocketAddr>,
        /// What to call itself
        #[arg(long, default_value = "app")]
        name: String,
    },
    /// Play a sidecar: greet with `outbound` or `inbound`, and the original destination. Istio's
    /// own arguments are `proxy sidecar`
    Proxy {
        /// Whose
        role: Role,
    },
    /// Connect again and again until SIGTERM, a line for each: `ok LINE` or `failed ERROR`. The
    /// exit status is 1 when the last failed: the first may be too early for a sidecar
    Loop {
        /// Where to connect to
        target: SocketAddr,
        /// Stop by itself after so many seconds
        #[arg(long)]
        seconds: Option<u64>,
    },
    /// Connect once and print `ok LINE` or `failed ERROR`, the exit status 0 or 1
    Once {
        /// Where to connect to
        target: SocketAddr,
    },
    /// Serve HTTP: answer each request with what the server's sidecar says of the client
    Http {
        /// Where to listen
        addr: SocketAddr,
    },
    /// Ask by HTTP once and print the status and the body; the exit status is 1 without an answer
    Get {
        /// What to ask for
        url: String,
    },
    /// Ask by HTTP again and again until SIGTERM, a line for each request
    Load {
        /// What to ask for, without the request's number
        url: String,
        /// Between two requests
        #[arg(long, value_name = "MILLISECONDS", default_value_t = 10)]
        pause: u64,
    },
    /// Connect once, and see to it that it is not NAME who answers: the exit status is 1 if it is
    Avoid {
        /// Where to connect to
        target: SocketAddr,
        /// Who must not answer
        name: String,
    },
}

#[derive(Clone, Copy, ValueEnum)]
enum Role {
    /// Istio's
    Sidecar,
    /// Linkerd's
    Linkerd,
}

fn main() -> Result<ExitCode> {
    match Mode::parse() {
        Mode::Pause => wait_for_sigterm(|| Ok(()))?,
        Mode::Serve { addrs, name } => wait_for_sigterm(|| {
            // It lives as long as the process.
            let name = String::leak(name);
            let addrs = addrs.into_iter().map(of_the_pod);
            Server::start_here(ServeOpts { name, ..ServeOpts::on(addrs) })
        })?,
        Mode::Proxy { role } => wait_for_sigterm(|| play(role))?,
        Mode::Loop { target, seconds } => {
            stop_on_signals()?;
            return Ok(keep_asking(target, seconds.map(Duration::from_secs)));
        }
        Mode::Http { addr } => wait_for_sigterm(|| {
            thread::spawn(move || {
                let Err(err) = web::serve(of_the_pod(addr)) else { return };
                eprintln!("{err:#}");
                process::exit(1);
            });
            Ok(())
        })?,
        Mode::Get { url } => return Ok(u8::from(get_once(&url).is_none()).into()),
        Mode::Load { url, pause } => {
            stop_on_signals()?;
            web::load(&url, Duration::from_millis(pause));
        }
        Mode::Once { target } => return Ok(u8::from(ask_once(target).is_none()).into()),
        Mode::Avoid { target, name } => {
            let answered = ask_once(target).is_some_and(|seen| seen.by == Some(name));
            return Ok(u8::from(answered).into());
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// As the first process of a container: such a one has no signal's default action.
fn wait_for_sigterm<T>(start: impl FnOnce() -> Result<T>) -> Result<()> {
    let signals = SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT]);
    // Before the first thread, so that all have it.
    signals.thread_block().context("blocking SIGTERM")?;
    let _running = start()?;
    signals.wait().context("waiting for SIGTERM")?;
    Ok(())
}

fn keep_asking(target: SocketAddr, limit: Option<Duration>) -> ExitCode {
    let (start, mut failed) = (Instant::now(), false);
    while !interrupted() && limit.is_none_or(|limit| start.elapsed() < limit) {
        failed = ask_once(target).is_none();
        let next = Instant::now() + PAUSE;
        let _ = wait_until("the next one", PAUSE, || Instant::now() >= next);
    }
    u8::from(failed).into()
}

fn ask_once(target: SocketAddr) -> Option<Seen> {
    match ask(target, None) {
        Ok(answer) => {
            println!("ok {}", answer.seen);
            Some(answer.seen)
        }
        Err(err) => {
            println!("failed {err:#}");
            None
        }
    }
}

fn get_once(url: &str) -> Option<()> {
    match web::get(url) {
        Ok((status, body)) => {
            println!("{status} {body}");
            Some(())
        }
        Err(err) => {
            println!("failed {err:#}");
            None
        }
    }
}

/// Where to listen in a pod of either family: that of an IPv6 cluster has no IPv4 address.
fn of_the_pod(addr: SocketAddr) -> SocketAddr {
    let IpAddr::V4(ip) = addr.ip() else { return addr };
    // A route is what is asked for; nothing is sent.
    let has_ipv4 = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))
        .and_then(|socket| socket.connect((Ipv4Addr::new(192, 0, 2, 1), 9)))
        .is_ok();
    let v6 = if ip.is_loopback() { Ipv6Addr::LOCALHOST } else { Ipv6Addr::UNSPECIFIED };
    if has_ipv4 { addr } else { SocketAddr::new(v6.into(), addr.port()) }
}

fn play(role: Role) -> Result<[Server; 2]> {
    let (any, localhost) = (Ipv4Addr::UNSPECIFIED, Ipv4Addr::LOCALHOST);
    let [outbound, inbound] = match role {
        Role::Sidecar => [(any, OUTBOUND), (any, INBOUND)],
        Role::Linkerd => [(localhost, 4140), (any, 4143)],
    };
    let serve = |addr: (Ipv4Addr, u16), name| {
        let opts = ServeOpts::on([of_the_pod(addr.into())]);
        Server::start_here(ServeOpts { talk: Talk::OriginalDst, name, ..opts })
    };
    Ok([serve(outbound, "outbound")?, serve(inbound, "inbound")?])
}
