//! What is recorded of a connection, in terms that do not depend on the run.

use std::collections::BTreeMap;
use std::fmt::{self, Display, Formatter};

use serde::Serialize;

use crate::row::{Expect, Place};

/// A property of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Field {
    /// Who accepted or answered; or `refused`, `timeout`, `closed`, or the name of an error.
    Outcome,
    /// SO_ORIGINAL_DST, from a proxy's accepted socket.
    Orig,
    /// The client, as the server sees it.
    Peer,
    /// Where a UDP answer came from.
    From,
    /// The client's own address, by getsockname.
    Source,
    /// The client's peer, by getpeername.
    Dialled,
    /// The accepted socket's own address, by getsockname.
    Listener,
}

impl Display for Field {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Outcome => "outcome",
            Self::Orig => "orig",
            Self::Peer => "peer",
            Self::From => "from",
            Self::Source => "source",
            Self::Dialled => "dialled",
            Self::Listener => "listener",
        })
    }
}

/// What was observed of one connection.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct Observed(BTreeMap<Field, String>);

impl Observed {
    /// Whether nobody said anything in time.
    pub fn timed_out(&self) -> bool {
        self.0.get(&Field::Outcome).is_some_and(|outcome| outcome == "timeout")
    }

    pub fn new(outcome: impl Into<String>) -> Self {
        Self::default().with(Field::Outcome, outcome)
    }

    pub fn with(mut self, field: Field, value: impl Into<String>) -> Self {
        self.0.insert(field, value.into());
        self
    }

    pub fn get(&self, field: Field) -> Option<&str> {
        self.0.get(&field).map(String::as_str)
    }

    /// The fields in which the two differ, with both values.
    pub fn differences(&self, other: &Self) -> Vec<(Field, String, String)> {
        // Where the outcomes differ, the rest says nothing more.
        if self.get(Field::Outcome) != other.get(Field::Outcome) {
            return vec![(Field::Outcome, self.to_string(), other.to_string())];
        }
        let keys: std::collections::BTreeSet<Field> =
            self.0.keys().chain(other.0.keys()).copied().collect();
        let text = |value: Option<&str>| value.unwrap_or("-").to_owned();
        keys.into_iter()
            .filter(|key| self.get(*key) != other.get(*key))
            .map(|key| (key, text(self.get(key)), text(other.get(key))))
            .collect()
    }

    /// What contradicts `expect`, of a connection to `target`.
    pub fn contradicts(
        &self,
        expect: &Expect,
        target: &str,
        name: impl Fn(Place) -> String,
    ) -> Option<String> {
        let outcome = expect.outcome?;
        let wrong = |field, wanted: &str| {
            let got = self.get(field).unwrap_or("-");
            // A peer is an address and a word on its port.
            let same = got == wanted || got.strip_suffix(":eph").is_some_and(|ip| ip == wanted);
            (!same).then(|| format!("{field} is {got}, the contract says {wanted}"))
        };
        wrong(Field::Outcome, outcome)
            .or_else(|| expect.orig.then(|| wrong(Field::Orig, target))?)
            .or_else(|| expect.from.then(|| wrong(Field::From, target))?)
            .or_else(|| wrong(Field::Peer, &name(expect.peer?)))
    }
}

impl Display for Observed {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(self.get(Field::Outcome).unwrap_or("-"))?;
        for field in [Field::Orig, Field::Peer, Field::From] {
            if let Some(value) = self.get(field) {
                write!(f, ", {field} {}", value.trim_end_matches(":eph"))?;
            }
        }
        Ok(())
    }
}
