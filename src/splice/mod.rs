//! Splicing: the decision which legs of the path are spliced, and resets of closed connections.
//! bpf/splice/ has the kernel's part, and docs/splice.md the whole picture.

mod decide;
mod rst;

pub use decide::{Found, Hazard, Hurts, Leg, LegState, Mode, against, decide};
pub use rst::Reset;
