//! Where Sidestep differs from the meshes' iptables on purpose, or can't help it. Each entry
//! has to match a difference, or the suite fails: a list that has more than what is true hides
//! what is not.

use crate::observed::Field;
use crate::row::{Kind, matches};

/// A difference that is known.
pub struct Deliberate {
    /// Pattern of `mesh/row`, with `*` for anything.
    pub rows: &'static str,
    /// In which kinds of address.
    pub kinds: &'static [Kind],
    /// In which properties, and no others.
    pub fields: &'static [Field],
    /// The reason.
    pub why: &'static str,
}

impl Deliberate {
    /// Whether it covers such a difference.
    pub fn covers(&self, row: &str, kind: Kind, field: Field) -> bool {
        matches(self.rows, row) && self.kinds.contains(&kind) && self.fields.contains(&field)
    }
}

/// The list.
pub const DELIBERATE: &[Deliberate] = &[];
