//! Decides which legs of the path are spliced, by the requested mode and the self-test's findings
//! on this kernel. Pure. docs/splice.md has the whole picture.

use std::fmt;

use clap::ValueEnum;
use serde::Serialize;

/// The requested mode of splicing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum Mode {
    /// Each leg on which the self-test finds no fault.
    #[default]
    Auto,
    /// No leg; all data uses TCP.
    Off,
    /// Connections between sidecars only, if the self-test finds nothing wrong.
    Sidecar,
    /// Connections between apps and their sidecars too, although this kernel misbehaves towards
    /// apps that use sockets in unusual ways (`sidestep check -v` lists them). Never where data is
    /// at risk.
    All,
}

/// A part of the path of a connection that stays on the node; `enum splice_leg` of
/// bpf/splice/types.h.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Leg {
    /// A pod's sidecar to another pod's sidecar.
    Sidecar,
    /// An app to its pod's sidecar, either way.
    App,
}

impl Leg {
    /// All legs, in the order of the kernel's map.
    pub const ALL: [Self; 2] = [Self::Sidecar, Self::App];

    /// The leg's name in flags, `status` and `check`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Sidecar => "sidecar",
            Self::App => "app",
        }
    }
}

/// The programs that a hazard affects.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hurts {
    /// All programs: bytes, their order or their end are wrong. Nothing is spliced.
    Everybody,
    /// Programs that use a socket in other ways than a sidecar does.
    Apps,
}

/// A fault of spliced sockets on this kernel, found by the self-test.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hazard {
    /// The name of the trial.
    pub name: &'static str,
    /// The programs that it affects.
    pub hurts: Hurts,
    /// The observed behaviour.
    pub found: String,
}

impl fmt::Display for Hazard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.name, self.found)
    }
}

/// The self-test's findings, or the error that prevented it.
pub type Found = Result<Vec<Hazard>, String>;

/// Whether a leg is spliced, and the reason.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct LegState {
    /// Whether the leg is on.
    pub on: bool,
    /// The reason why it is off, or the known hazards if it is on. May be empty.
    pub why: String,
}

/// The decision for each leg, in the order of [`Leg::ALL`].
pub fn decide(mode: Mode, found: &Found) -> [LegState; 2] {
    Leg::ALL.map(|leg| decide_leg(mode, leg, found))
}

fn decide_leg(mode: Mode, leg: Leg, found: &Found) -> LegState {
    let off = |why: String| LegState { on: false, why };
    match (mode, leg) {
        (Mode::Off, _) => return off("--splice off".into()),
        (Mode::Sidecar, Leg::App) => return off("--splice sidecar".into()),
        _ => {}
    }
    let hazards = match found {
        Err(error) => return off(format!("the self-test could not run: {error}")),
        Ok(hazards) => hazards,
    };
    let against = against(leg, hazards);
    if against.is_empty() {
        return LegState { on: true, why: String::new() };
    }
    let named = against.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ");
    let failed = format!("this kernel fails the self-test: {named}");
    if mode == Mode::All && against.iter().all(|hazard| hazard.hurts == Hurts::Apps) {
        return LegState { on: true, why: format!("by --splice all, although {failed}") };
    }
    off(failed)
}

/// The reason against splicing this leg: a hazard for all programs; without one, a hazard for the
/// programs at the leg's ends.
pub fn against(leg: Leg, hazards: &[Hazard]) -> Vec<&Hazard> {
    let that_hurt = |whom| hazards.iter().filter(move |hazard| hazard.hurts == whom).collect();
    match (that_hurt(Hurts::Everybody), leg) {
        (everybody, Leg::Sidecar) => everybody,
        (everybody, Leg::App) if everybody.is_empty() => that_hurt(Hurts::Apps),
        (everybody, Leg::App) => everybody,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hazard(hurts: Hurts) -> Hazard {
        Hazard { name: "reading", hurts, found: "a byte too many".into() }
    }

    fn on(mode: Mode, hazards: &[Hurts]) -> [bool; 2] {
        let found = hazards.iter().copied().map(hazard).collect();
        decide(mode, &Ok(found)).map(|state| state.on)
    }

    #[test]
    fn a_leg_is_on_where_it_is_asked_for_and_safe() {
        assert_eq!(on(Mode::Auto, &[]), [true, true]);
        assert_eq!(on(Mode::Auto, &[Hurts::Apps]), [true, false]);
        assert_eq!(on(Mode::Sidecar, &[]), [true, false]);
        assert_eq!(on(Mode::All, &[Hurts::Apps]), [true, true]);
        assert_eq!(on(Mode::Off, &[]), [false, false]);
    }

    #[test]
    fn nothing_is_spliced_where_bytes_are_at_risk_or_nobody_knows() {
        for mode in [Mode::Auto, Mode::Off, Mode::Sidecar, Mode::All] {
            assert_eq!(on(mode, &[Hurts::Apps, Hurts::Everybody]), [false, false]);
            let unknown = decide(mode, &Err("no namespace".into()));
            assert_eq!(unknown.map(|state| state.on), [false, false]);
        }
    }

    #[test]
    fn it_is_said_why() {
        let [sidecar, app] = decide(Mode::Auto, &Ok(vec![hazard(Hurts::Apps)]));
        assert_eq!(sidecar.why, "");
        assert_eq!(app.why, "this kernel fails the self-test: reading: a byte too many");
        let [_, app] = decide(Mode::All, &Ok(vec![hazard(Hurts::Apps)]));
        assert!(app.why.starts_with("by --splice all"), "{}", app.why);
        let [_, app] = decide(Mode::Sidecar, &Ok(vec![]));
        assert_eq!(app.why, "--splice sidecar");
    }
}
