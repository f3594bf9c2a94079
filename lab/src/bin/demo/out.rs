//! What the demo prints.

use std::cell::Cell;
use std::env;
use std::fmt::Display;
use std::io::{self, IsTerminal as _, Write as _};
use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use sidestep_lab::interrupted;

/// What goes to the terminal: aligned, with colours only where they can be seen.
pub struct Out {
    terminal: bool,
    colour: bool,
    steps: Cell<u32>,
}

impl Out {
    pub fn new() -> Self {
        let terminal = io::stdout().is_terminal();
        let colour = terminal && env::var_os("NO_COLOR").is_none();
        Self { terminal, colour, steps: 0.into() }
    }

    fn paint(&self, code: &str, text: impl Display) -> String {
        if self.colour { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_string() }
    }

    pub fn good(&self, text: impl Display) -> String {
        self.paint("32", text)
    }

    pub fn dim(&self, text: impl Display) -> String {
        self.paint("2", text)
    }

    /// The heading of the next step. Fails when Ctrl-C was pressed.
    pub fn step(&self, title: &str) -> Result<()> {
        ensure!(!interrupted(), "interrupted");
        self.steps.set(self.steps.get() + 1);
        println!("\n{}", self.paint("1", format!("{}. {title}", self.steps.get())));
        Ok(())
    }

    pub fn row(&self, name: &str, what: &str, value: impl Display) {
        println!("  {name:<20}{} {value}", self.dim(format!("{what:<16}")));
    }

    /// `got` in green, when it is what was wanted.
    pub fn check(&self, got: SocketAddr, wanted: SocketAddr) -> Result<String> {
        ensure!(got == wanted, "{got} where {wanted} was expected");
        Ok(self.good(got))
    }

    /// A line that the next one replaces; nothing when this is no terminal.
    pub fn progress(&self, text: &str) -> Result<()> {
        if self.terminal {
            print!("\r\x1b[K{}", self.dim(format!("  {text}")));
            io::stdout().flush().context("writing to the terminal")?;
        }
        Ok(())
    }
}
