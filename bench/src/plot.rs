//! Which plots there are, and of what.

use std::path::Path;

use anyhow::Result;
use sidestep_figures::{Bars, Line, Plot, Spread, Style};

use crate::cells::Settings;
use crate::mode::{Mode, Proxy};
use crate::sample::Samples;

/// Draws all that there are samples for.
pub fn all(samples: &Samples, settings: &Settings, dir: &Path) -> Result<()> {
    let Settings { connections, sizes, clients, open, pods, .. } = settings;
    let proxies = &settings.proxies;
    let ratio = |label: String, proxy, cell: &str, value: &str| Bars {
        label,
        bars: compared(samples)
            .filter_map(|mode| {
                Some((mode as usize, samples.ratio(proxy, cell, mode, Mode::Iptables, value)?))
            })
            .collect(),
    };
    let each = |cells: &[(String, String)], value: &str| -> Vec<Bars> {
        let pairs = proxies.iter().flat_map(|p| cells.iter().map(move |cell| (*p, cell)));
        pairs.map(|(p, (label, cell))| ratio(format!("{p}\n{label}"), p, cell, value)).collect()
    };
    let cells = |list: &[usize], label: &str, cell: &str| -> Vec<(String, String)> {
        let one =
            |n: &usize| (label.replace("{}", &n.to_string()), cell.replace("{}", &n.to_string()));
        list.iter().map(one).collect()
    };
    let keepalive = cells(connections, "{} conn.", "keepalive/64B/{}");
    let by_size: Vec<_> = sizes
        .iter()
        .map(|size| {
            let name = crate::cells::size_name(*size);
            (name.clone(), format!("keepalive/{name}/16"))
        })
        .collect();
    let connect = cells(clients, "{} clients", "connect/{}");
    let bulk = ["up", "down"].map(|way| (way.to_owned(), format!("bulk/{way}")));
    let cost: Vec<_> = cells(&[1, 16], "{} conn.", "keepalive/64B/{}")
        .into_iter()
        .chain(cells(&[8], "connect", "connect/{}"))
        .collect();

    bars(
        dir,
        "keepalive",
        "Keep-alive, 64 B: requests/s, iptables = 1",
        &each(&keepalive, "rate"),
    )?;
    bars(dir, "keepalive-p50", "Keep-alive, 64 B: p50, iptables = 1", &each(&keepalive, "p50_us"))?;
    bars(dir, "keepalive-p99", "Keep-alive, 64 B: p99, iptables = 1", &each(&keepalive, "p99_us"))?;
    bars(
        dir,
        "keepalive-sizes",
        "Keep-alive, 16 connections: requests/s, iptables = 1",
        &each(&by_size, "rate"),
    )?;
    bars(
        dir,
        "connect",
        "A connection for each 64 B: rate, iptables = 1",
        &each(&connect, "rate"),
    )?;
    bars(dir, "bulk", "Bulk, one connection: throughput, iptables = 1", &each(&bulk, "gbps"))?;
    bars(dir, "cpu", "CPU per request or connection, iptables = 1", &each(&cost, "cpu_us"))?;

    let absolute = |cells: &[(&str, &str)], value: &str, unit: f64| -> Vec<Bars> {
        let pairs = proxies.iter().flat_map(|p| cells.iter().map(move |cell| (*p, *cell)));
        let group = |(p, (label, cell)): (Proxy, (&str, &str))| Bars {
            label: format!("{p}\n{label}"),
            bars: samples
                .modes()
                .into_iter()
                .filter_map(|m| {
                    Some((m as usize, scaled(samples.spread(p, cell, m, value)?, unit)))
                })
                .collect(),
        };
        pairs.map(group).collect()
    };
    let stopped = [("64 KB writes", "stopped/64K"), ("1 KB writes", "stopped/1K")];
    bars(dir, "stopped", "Written to a stopped reader, MB", &absolute(&stopped, "bytes", 1e6))?;
    bars(
        dir,
        "memory",
        "Kernel memory for each idle connection, KB",
        &absolute(&[("", "memory")], "kernel_bytes", 1e3),
    )?;

    let Some(first) = proxies.first() else { return Ok(()) };
    for (name, levels, what) in
        [("connections", open, "open connections"), ("pods", pods, "enrolled pods")]
    {
        for (way, value, title) in [
            ("keepalive", "p50_us", "Keep-alive, 64 B, 10 at work: p50, us"),
            ("connect", "rate", "Connections per second, 8 clients"),
        ] {
            let line = |mode: Mode| -> Line {
                let at = |level: &usize| {
                    let cell = format!("{name}/{level}/{way}");
                    Some((*level as f64, samples.spread(*first, &cell, mode, value)?))
                };
                (mode as usize, levels.iter().filter_map(at).collect())
            };
            let all: Vec<_> = samples.modes().into_iter().map(line).collect();
            let title = format!("{title}, beside more {what} ({first})");
            Plot::Lines { title: &title, across: what, lines: &all }.write(
                &styles(),
                dir,
                &format!("{name}-{way}"),
            )?;
        }
    }
    Ok(())
}

/// Those that have a bar beside iptables: what has no sidecar would make all others small.
fn compared(samples: &Samples) -> impl Iterator<Item = Mode> {
    let modes = samples.modes().into_iter();
    modes.filter(|mode| ![Mode::Direct, Mode::Iptables].contains(mode))
}

fn scaled(spread: Spread, unit: f64) -> Spread {
    let Spread { median, low, high, count } = spread;
    Spread { median: median / unit, low: low / unit, high: high / unit, count }
}

fn colour(mode: Mode) -> [u8; 3] {
    match mode {
        Mode::Direct => [0x55, 0x55, 0x55],
        Mode::Explicit => [0xaa, 0xaa, 0xaa],
        Mode::Iptables => [0xd5, 0x5e, 0x00],
        Mode::Nftables => [0xe6, 0x9f, 0x00],
        Mode::Off => [0x9c, 0xd3, 0xf0],
        Mode::Sidecar => [0x37, 0x90, 0xc9],
        Mode::All => [0x00, 0x45, 0x8a],
    }
}

fn styles() -> Vec<Style> {
    let style = |mode: Mode| Style { label: label(mode), colour: colour(mode) };
    Mode::EVERY.into_iter().map(style).collect()
}

fn label(mode: Mode) -> String {
    match mode.splice() {
        Some(splice) => format!("splice {splice}"),
        None => mode.to_string(),
    }
}

fn bars(dir: &Path, name: &str, title: &str, groups: &[Bars]) -> Result<()> {
    let base = title.contains("iptables = 1").then_some(Mode::Iptables as usize);
    Plot::Bars { title, groups, base }.write(&styles(), dir, name)
}
