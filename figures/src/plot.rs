//! Plots, each as SVG and as PNG.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use anyhow::{Context, Error, Result, anyhow};
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use plotters::style::{FontStyle, register_font};

use crate::Spread;

const FONT: &str = "/usr/share/fonts/truetype/dejavu/DejaVuSans.ttf";
const SIZE: (u32, u32) = (1100, 560);
/// Of the width, for the legend.
const LEGEND: u32 = 150;

/// Loads the font that letters are drawn with: before the first plot. Fails when it is not
/// installed.
pub fn load_font() -> Result<()> {
    let font = fs::read(FONT).with_context(|| format!("{FONT}: run `make deps`"))?;
    register_font("sans-serif", FontStyle::Normal, font.leak())
        .map_err(|_| anyhow!("{FONT} is no font"))
}

/// What stands for one of the things that are compared.
#[derive(Clone, Debug)]
pub struct Style {
    /// Its words in the legend.
    pub label: String,
    /// Red, green and blue.
    pub colour: [u8; 3],
}

impl Style {
    fn colour(&self) -> RGBColor {
        let [red, green, blue] = self.colour;
        RGBColor(red, green, blue)
    }
}

/// Bars beside each other, each of the style with that index.
pub struct Bars {
    /// Below them; may have two lines.
    pub label: String,
    /// The style's index, and the height: a bar to the median, a whisker over the middle half.
    pub bars: Vec<(usize, Spread)>,
}

/// A line of the style with that index: its value at each place.
pub type Line = (usize, Vec<(f64, Spread)>);

/// A picture.
pub enum Plot<'a> {
    /// Groups of bars.
    Bars {
        /// Above.
        title: &'a str,
        /// Those without bars are left out.
        groups: &'a [Bars],
        /// The style that is 1, drawn as a line across.
        base: Option<usize>,
    },
    /// Lines over a logarithmic axis.
    Lines {
        /// Above.
        title: &'a str,
        /// What the places are.
        across: &'a str,
        /// Those without points are left out.
        lines: &'a [Line],
    },
}

impl Plot<'_> {
    /// Writes NAME.svg and NAME.png into `dir`; nothing where there is nothing to draw.
    pub fn write(&self, styles: &[Style], dir: &Path, name: &str) -> Result<()> {
        let nothing = match self {
            Self::Bars { groups, .. } => groups.iter().all(|group| group.bars.is_empty()),
            Self::Lines { lines, .. } => lines.iter().all(|(_, points)| points.is_empty()),
        };
        if nothing {
            return Ok(());
        }
        let path = dir.join(format!("{name}.svg"));
        self.draw(styles, &SVGBackend::new(&path, SIZE).into_drawing_area())
            .with_context(|| format!("drawing {}", path.display()))?;
        let path = dir.join(format!("{name}.png"));
        self.draw(styles, &BitMapBackend::new(&path, SIZE).into_drawing_area())
            .with_context(|| format!("drawing {}", path.display()))
    }

    fn draw<B: DrawingBackend>(
        &self,
        styles: &[Style],
        area: &DrawingArea<B, Shift>,
    ) -> Result<()> {
        area.fill(&WHITE).map_err(failed)?;
        match self {
            Self::Bars { title, groups, base } => draw_bars(area, styles, title, groups, *base)?,
            Self::Lines { title, across, lines } => draw_lines(area, styles, title, across, lines)?,
        }
        area.present().map_err(failed)
    }
}

fn failed(err: impl std::fmt::Display) -> Error {
    Error::msg(err.to_string())
}

fn draw_bars<B: DrawingBackend>(
    area: &DrawingArea<B, Shift>,
    styles: &[Style],
    title: &str,
    groups: &[Bars],
    base: Option<usize>,
) -> Result<()> {
    let groups: Vec<&Bars> = groups.iter().filter(|group| !group.bars.is_empty()).collect();
    let all = || groups.iter().flat_map(|group| &group.bars);
    // One round that went wild does not make all bars small: its whisker leaves the picture.
    let median = all().map(|(_, spread)| spread.median).fold(1.0, f64::max);
    let highest = all().map(|(_, spread)| spread.high).fold(1.0, f64::max).min(median * 1.5);
    let shown: BTreeSet<usize> = all().map(|(style, _)| *style).collect();
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
    if let Some(base) = base {
        let line = [(0.0, 1.0), (groups.len() as f64, 1.0)];
        chart
            .draw_series(LineSeries::new(line, styles[base].colour().stroke_width(2)))
            .map_err(failed)?;
    }
    let width = 0.84 / shown.len() as f64;
    for (place, style) in shown.iter().enumerate() {
        let of_style = groups.iter().enumerate().filter_map(|(number, group)| {
            let (_, spread) = group.bars.iter().find(|(other, _)| other == style)?;
            Some((number as f64 + 0.08 + place as f64 * width, *spread))
        });
        let of_style: Vec<(f64, Spread)> = of_style.collect();
        let rectangles = of_style.iter().map(|(left, spread)| {
            let corners = [(*left, 0.0), (left + width * 0.92, spread.median)];
            Rectangle::new(corners, styles[*style].colour().filled())
        });
        chart.draw_series(rectangles).map_err(failed)?;
        let whiskers = of_style.iter().map(|(left, spread)| {
            let middle = left + width * 0.46;
            PathElement::new(
                [(middle, spread.low), (middle, spread.high.min(highest * 1.15))],
                BLACK,
            )
        });
        chart.draw_series(whiskers).map_err(failed)?;
    }
    let shown = shown.into_iter().filter(|style| Some(*style) != base);
    draw_legend(area, base.into_iter().chain(shown).map(|style| &styles[style]))?;
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
    styles: &[Style],
    title: &str,
    across: &str,
    lines: &[Line],
) -> Result<()> {
    let lines: Vec<&Line> = lines.iter().filter(|(_, points)| !points.is_empty()).collect();
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
    for (style, points) in &lines {
        let colour = styles[*style].colour();
        let line = points.iter().map(|(x, spread)| (*x, spread.median));
        let dots = line.clone().map(|at| Circle::new(at, 4, colour.filled()));
        chart.draw_series(LineSeries::new(line, colour.stroke_width(2))).map_err(failed)?;
        chart.draw_series(dots).map_err(failed)?;
    }
    draw_legend(area, lines.iter().map(|(style, _)| &styles[*style]))
}

/// To the right of what is drawn, where there is nothing else.
fn draw_legend<'a, B: DrawingBackend>(
    area: &DrawingArea<B, Shift>,
    styles: impl Iterator<Item = &'a Style>,
) -> Result<()> {
    let left = SIZE.0 as i32 - LEGEND as i32 + 16;
    let text = ("sans-serif", 14).into_text_style(area);
    for (row, style) in styles.enumerate() {
        let top = 70 + 24 * row as i32;
        let sign = [(left, top), (left + 12, top + 12)];
        area.draw(&Rectangle::new(sign, style.colour().filled())).map_err(failed)?;
        area.draw_text(&style.label, &text, (left + 20, top)).map_err(failed)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plot_shows_what_it_compares() -> Result<()> {
        load_font()?;
        let dir = tempfile::tempdir()?;
        let style = |label: &str| Style { label: label.to_owned(), colour: [10, 20, 30] };
        let styles = ["ours", "theirs", "nobody's"].map(style);
        let spread = |median| Spread { median, low: median, high: median, count: 1 };
        let group = |label: &str, bars| Bars { label: label.to_owned(), bars };
        let groups = [group("one\nload", vec![(0, spread(2.0))]), group("empty", Vec::new())];
        let plot = Plot::Bars { title: "Requests", groups: &groups, base: Some(1) };
        plot.write(&styles, dir.path(), "bars")?;
        let svg = fs::read_to_string(dir.path().join("bars.svg"))?;
        for words in ["Requests", "ours", "theirs", "load"] {
            assert!(svg.contains(words), "{words}");
        }
        assert!(!svg.contains("nobody's") && !svg.contains("empty"));
        assert!(dir.path().join("bars.png").exists());
        let lines = [(0, vec![(10.0, spread(1.0)), (1000.0, spread(3.0))]), (2, Vec::new())];
        let plot = Plot::Lines { title: "Rate", across: "Services", lines: &lines };
        plot.write(&styles, dir.path(), "lines")?;
        let svg = fs::read_to_string(dir.path().join("lines.svg"))?;
        assert!(svg.contains("Services") && svg.contains("ours") && !svg.contains("nobody's"));
        let nothing = Plot::Lines { title: "Rate", across: "Services", lines: &[] };
        nothing.write(&styles, dir.path(), "nothing")?;
        assert!(!dir.path().join("nothing.svg").exists());
        Ok(())
    }
}
