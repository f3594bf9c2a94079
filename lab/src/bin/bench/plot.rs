//! Plots, each as SVG and as PNG.

use std::fs;
use std::path::Path;

use anyhow::{Context, Error, Result, anyhow};
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use plotters::style::{FontStyle, register_font};
use sidestep_lab::Spread;

use crate::cells::Settings;
use crate::mode::{Mode, Proxy};
use crate::sample::Samples;

const FONT: &str = "/usr/share/fonts/truetype/dejavu/DejaVuSans.ttf";
const SIZE: (u32, u32) = (1100, 560);
/// Of the width, for the legend.
const LEGEND: u32 = 150;

/// Loads the font that letters are drawn with. Fails when it is not installed.
pub fn font() -> Result<()> {
    let font = fs::read(FONT).with_context(|| format!("{FONT}: run `make deps`"))?;
    register_font("sans-serif", FontStyle::Normal, font.leak())
        .map_err(|_| anyhow!("{FONT} is no font"))
}

/// Bars beside each other.
struct Bars {
    label: String,
    bars: Vec<(Mode, Spread)>,
}

/// A mode's line: value at each place.
type Line = (Mode, Vec<(f64, Spread)>);

/// Draws all that there are samples for.
pub fn all(samples: &Samples, settings: &Settings, dir: &Path) -> Result<()> {
    let Settings { connections, sizes, clients, open, pods, .. } = settings;
    let proxies = &settings.proxies;
    let ratio = |label: String, proxy, cell: &str, value: &str| Bars {
        label,
        bars: compared(samples)
            .filter_map(|mode| {
                Some((mode, samples.ratio(proxy, cell, mode, Mode::Iptables, value)?))
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
                .filter_map(|m| Some((m, scaled(samples.spread(p, cell, m, value)?, unit))))
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
                (mode, levels.iter().filter_map(at).collect())
            };
            let all: Vec<_> = samples.modes().into_iter().map(line).collect();
            let title = format!("{title}, beside more {what} ({first})");
            lines(dir, &format!("{name}-{way}"), &title, what, &all)?;
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

fn colour(mode: Mode) -> RGBColor {
    match mode {
        Mode::Direct => RGBColor(0x55, 0x55, 0x55),
        Mode::Explicit => RGBColor(0xaa, 0xaa, 0xaa),
        Mode::Iptables => RGBColor(0xd5, 0x5e, 0x00),
        Mode::Nftables => RGBColor(0xe6, 0x9f, 0x00),
        Mode::Off => RGBColor(0x9c, 0xd3, 0xf0),
        Mode::Sidecar => RGBColor(0x37, 0x90, 0xc9),
        Mode::All => RGBColor(0x00, 0x45, 0x8a),
    }
}

fn label(mode: Mode) -> String {
    match mode.splice() {
        Some(splice) => format!("splice {splice}"),
        None => mode.to_string(),
    }
}

fn bars(dir: &Path, name: &str, title: &str, groups: &[Bars]) -> Result<()> {
    let groups: Vec<&Bars> = groups.iter().filter(|group| !group.bars.is_empty()).collect();
    if groups.is_empty() {
        return Ok(());
    }
    Chart::Bars { title, groups }.write(dir, name)
}

fn lines(dir: &Path, name: &str, title: &str, across: &str, all: &[Line]) -> Result<()> {
    let lines: Vec<&Line> = all.iter().filter(|(_, points)| !points.is_empty()).collect();
    if lines.is_empty() {
        return Ok(());
    }
    Chart::Lines { title, across, lines }.write(dir, name)
}

enum Chart<'a> {
    Bars { title: &'a str, groups: Vec<&'a Bars> },
    Lines { title: &'a str, across: &'a str, lines: Vec<&'a Line> },
}

impl Chart<'_> {
    fn write(&self, dir: &Path, name: &str) -> Result<()> {
        let path = dir.join(format!("{name}.svg"));
        self.draw(&SVGBackend::new(&path, SIZE).into_drawing_area())
            .with_context(|| format!("drawing {}", path.display()))?;
        let path = dir.join(format!("{name}.png"));
        self.draw(&BitMapBackend::new(&path, SIZE).into_drawing_area())
            .with_context(|| format!("drawing {}", path.display()))
    }

    fn draw<B: DrawingBackend>(&self, area: &DrawingArea<B, Shift>) -> Result<()> {
        area.fill(&WHITE).map_err(failed)?;
        match self {
            Self::Bars { title, groups } => draw_bars(area, title, groups)?,
            Self::Lines { title, across, lines } => draw_lines(area, title, across, lines)?,
        }
        area.present().map_err(failed)
    }
}

fn failed(err: impl std::fmt::Display) -> Error {
    Error::msg(err.to_string())
}

fn draw_bars<B: DrawingBackend>(
    area: &DrawingArea<B, Shift>,
    title: &str,
    groups: &[&Bars],
) -> Result<()> {
    let all = || groups.iter().flat_map(|group| &group.bars);
    // One round that went wild does not make all bars small: its whisker leaves the picture.
    let median = all().map(|(_, spread)| spread.median).fold(1.0, f64::max);
    let highest = all().map(|(_, spread)| spread.high).fold(1.0, f64::max).min(median * 1.5);
    let modes: std::collections::BTreeSet<Mode> = all().map(|(mode, _)| *mode).collect();
    let mut chart = ChartBuilder::on(area)
        .caption(title, ("sans-serif", 22))
        .margin(16)
        .margin_right(LEGEND)
        .x_label_area_size(50)
        .y_label_area_size(60)
        .build_cartesian_2d(0.0..groups.len() as f64, 0.0..highest * 1.15)
        .map_err(failed)?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .x_labels(0)
        .y_label_style(("sans-serif", 14))
        .light_line_style(WHITE)
        .draw()
        .map_err(failed)?;
    let base = title.contains("iptables = 1").then_some(Mode::Iptables);
    if base.is_some() {
        let line = [(0.0, 1.0), (groups.len() as f64, 1.0)];
        chart
            .draw_series(LineSeries::new(line, colour(Mode::Iptables).stroke_width(2)))
            .map_err(failed)?;
    }
    let width = 0.84 / modes.len() as f64;
    for (place, mode) in modes.iter().enumerate() {
        let of_mode = groups.iter().enumerate().filter_map(|(number, group)| {
            let (_, spread) = group.bars.iter().find(|(other, _)| other == mode)?;
            Some((number as f64 + 0.08 + place as f64 * width, *spread))
        });
        let of_mode: Vec<(f64, Spread)> = of_mode.collect();
        let rectangles = of_mode.iter().map(|(left, spread)| {
            let corners = [(*left, 0.0), (left + width * 0.92, spread.median)];
            Rectangle::new(corners, colour(*mode).filled())
        });
        chart.draw_series(rectangles).map_err(failed)?;
        let whiskers = of_mode.iter().map(|(left, spread)| {
            let middle = left + width * 0.46;
            PathElement::new(
                [(middle, spread.low), (middle, spread.high.min(highest * 1.15))],
                BLACK,
            )
        });
        chart.draw_series(whiskers).map_err(failed)?;
    }
    let legend: Vec<Mode> = base.into_iter().chain(modes.iter().copied()).collect();
    draw_legend(area, &legend)?;
    let centred = Pos::new(HPos::Center, VPos::Top);
    let style = ("sans-serif", 14).into_text_style(area).pos(centred);
    for (number, group) in groups.iter().enumerate() {
        let (x, y) = chart.plotting_area().map_coordinate(&(number as f64 + 0.5, 0.0));
        for (row, text) in group.label.lines().enumerate() {
            let at = (x, y + 8 + 18 * row as i32);
            area.draw_text(text, &style, at).map_err(failed)?;
        }
    }
    Ok(())
}

fn draw_lines<B: DrawingBackend>(
    area: &DrawingArea<B, Shift>,
    title: &str,
    across: &str,
    lines: &[&Line],
) -> Result<()> {
    let points = || lines.iter().flat_map(|(_, points)| points);
    let least = points().map(|(x, _)| *x).fold(f64::MAX, f64::min);
    let most = points().map(|(x, _)| *x).fold(least * 2.0, f64::max);
    let highest = points().map(|(_, spread)| spread.high).fold(1.0, f64::max);
    let mut chart = ChartBuilder::on(area)
        .caption(title, ("sans-serif", 22))
        .margin(16)
        .margin_right(LEGEND)
        .x_label_area_size(45)
        .y_label_area_size(80)
        .build_cartesian_2d((least..most).log_scale(), 0.0..highest * 1.05)
        .map_err(failed)?;
    chart
        .configure_mesh()
        .x_desc(across)
        .x_label_formatter(&|x| format!("{x:.0}"))
        .y_label_formatter(&|y| format!("{y:.0}"))
        .label_style(("sans-serif", 14))
        .light_line_style(WHITE)
        .draw()
        .map_err(failed)?;
    for (mode, points) in lines {
        let line = points.iter().map(|(x, spread)| (*x, spread.median));
        let dots = line.clone().map(|at| Circle::new(at, 4, colour(*mode).filled()));
        chart.draw_series(LineSeries::new(line, colour(*mode).stroke_width(2))).map_err(failed)?;
        chart.draw_series(dots).map_err(failed)?;
    }
    draw_legend(area, &lines.iter().map(|(mode, _)| *mode).collect::<Vec<_>>())
}

/// To the right of what is drawn, where there is nothing else.
fn draw_legend<B: DrawingBackend>(area: &DrawingArea<B, Shift>, modes: &[Mode]) -> Result<()> {
    let left = SIZE.0 as i32 - LEGEND as i32 + 16;
    let style = ("sans-serif", 14).into_text_style(area);
    for (row, mode) in modes.iter().enumerate() {
        let top = 70 + 24 * row as i32;
        let sign = [(left, top), (left + 12, top + 12)];
        area.draw(&Rectangle::new(sign, colour(*mode).filled())).map_err(failed)?;
        area.draw_text(&label(*mode), &style, (left + 20, top)).map_err(failed)?;
    }
    Ok(())
}
