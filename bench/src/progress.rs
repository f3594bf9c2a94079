//! What is being measured: a bar on a terminal, lines elsewhere.

use std::io::{IsTerminal as _, stderr};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::cells::{Group, Step};

/// How far the run is.
pub struct Progress {
    bar: ProgressBar,
    terminal: bool,
}

impl Progress {
    /// Of that many steps.
    pub fn new(steps: usize) -> Self {
        let bar = ProgressBar::with_draw_target(Some(steps as u64), ProgressDrawTarget::stderr());
        let style = ProgressStyle::with_template(
            "{bar:24} {pos}/{len}  {msg}  {elapsed} (about {eta} left)",
        );
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        Self { bar, terminal: stderr().is_terminal() }
    }

    /// This one begins. It draws now and not while it is measured.
    pub fn step(&self, step: &Step) {
        let Step { round, proxy, groups, mode, turn, pods } = step;
        let groups: Vec<String> = groups.iter().map(Group::to_string).collect();
        let group = groups.join(" and ");
        let pods = if *pods > 2 { format!(" ({pods} pods)") } else { String::new() };
        if self.terminal {
            self.bar.set_message(format!("round {}: {group}{pods}, {proxy}, {mode}", round + 1));
            self.bar.inc(1);
        } else if *turn == 0 {
            let taken = self.bar.elapsed().as_secs();
            eprintln!("bench: {taken:>4} s: round {}: {group}{pods}, {proxy}", round + 1);
        }
    }

    /// All is done.
    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }
}
