//! Bytes that say where in a stream they belong, so that what is lost, out of order or there
//! twice can be told apart.

use std::fmt;

/// How far around a wrong byte is looked for where it belongs.
const NEARBY: u64 = 4 << 20;
/// So many bytes belong to one place only.
const TELLING: usize = 16;

/// The endless stream of bytes of one direction of one connection.
#[derive(Clone, Copy, Debug)]
pub struct Pattern {
    key: u64,
}

impl Pattern {
    /// Each key has a stream of its own.
    pub fn new(key: u64) -> Self {
        Self { key: mix(key) }
    }

    /// The bytes from `position` on.
    pub fn fill(self, position: u64, buffer: &mut [u8]) {
        let (mut index, skip) = (position / 8, (position % 8) as usize);
        let head = (8 - skip).min(buffer.len());
        let (first, rest) = buffer.split_at_mut(head);
        first.copy_from_slice(&self.word(index)[skip..skip + head]);
        for part in rest.chunks_mut(8) {
            index += 1;
            part.copy_from_slice(&self.word(index)[..part.len()]);
        }
    }

    /// `len` bytes from `position` on.
    pub fn bytes(self, position: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.fill(position, &mut bytes);
        bytes
    }

    fn word(self, index: u64) -> [u8; 8] {
        mix(self.key ^ index).to_ne_bytes()
    }
}

/// The finalizer of SplitMix64: each bit of the result depends on each bit of `x`.
pub fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// Reads a stream and notices where it is not its pattern.
#[derive(Debug)]
pub struct Checker {
    pattern: Pattern,
    /// Of the pattern; goes on where the stream does when bytes are missing or come again.
    position: u64,
    received: u64,
    expected: Vec<u8>,
    damage: Option<Damage>,
}

/// What is wrong with a stream, as far as its first two irregularities tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Damage {
    /// These bytes are missing.
    Lost {
        /// The position of the first missing byte.
        from: u64,
        /// The first that is there again.
        to: u64,
    },
    /// Bytes came later than those behind them.
    Reordered {
        /// The position of the late byte.
        from: u64,
        /// The first that came too early.
        to: u64,
    },
    /// Bytes were repeated.
    Duplicated {
        /// The position of the first repeated byte.
        from: u64,
        /// Where the stream had been.
        to: u64,
    },
    /// Bytes that belong nowhere near.
    Corrupt {
        /// The position of the first such byte.
        at: u64,
    },
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Lost { from, to } => write!(f, "{} bytes lost at {from}", to - from),
            Self::Reordered { from, to } => {
                write!(f, "reordered: bytes {from}..{to} came after those behind them")
            }
            Self::Duplicated { from, to } => {
                write!(f, "duplicated: at {to} the stream began again from {from}")
            }
            Self::Corrupt { at } => write!(f, "corrupt at {at}"),
        }
    }
}

impl Checker {
    /// Expects the stream from its begin.
    pub fn new(pattern: Pattern) -> Self {
        Self { pattern, position: 0, received: 0, expected: Vec::new(), damage: None }
    }

    /// The next bytes that were received.
    pub fn check(&mut self, mut bytes: &[u8]) {
        self.received += bytes.len() as u64;
        while !bytes.is_empty() && !matches!(self.damage, Some(Damage::Corrupt { .. })) {
            self.expected.resize(bytes.len(), 0);
            self.pattern.fill(self.position, &mut self.expected);
            let same = bytes.iter().zip(&self.expected).take_while(|(a, b)| a == b).count();
            self.position += same as u64;
            bytes = &bytes[same..];
            if !bytes.is_empty() {
                self.resume(bytes);
            }
        }
    }

    /// Finds where in the stream the bytes belong.
    fn resume(&mut self, bytes: &[u8]) {
        let at = self.position;
        let wanted = &bytes[..bytes.len().min(TELLING)];
        let start = at.saturating_sub(NEARBY);
        let around = self.pattern.bytes(start, 2 * NEARBY as usize);
        let found = (wanted.len() >= 4)
            .then(|| around.windows(wanted.len()).position(|window| window == wanted))
            .flatten();
        let Some(found) = found.map(|offset| start + offset as u64) else {
            self.damage.get_or_insert(Damage::Corrupt { at });
            // Whatever follows says nothing more.
            self.damage = self.damage.map(|damage| match damage {
                Damage::Lost { .. } => damage,
                _ => Damage::Corrupt { at },
            });
            self.position += bytes.len() as u64;
            return;
        };
        self.damage = Some(match self.damage {
            None if found > at => Damage::Lost { from: at, to: found },
            None => Damage::Duplicated { from: found, to: at },
            // What was missing comes after all.
            Some(Damage::Lost { from, to }) if (from..to).contains(&found) => {
                Damage::Reordered { from, to }
            }
            Some(damage) => damage,
        });
        self.position = found;
    }

    /// How many bytes came, right ones or wrong.
    pub fn received(&self) -> u64 {
        self.received
    }

    /// What is wrong, if anything.
    pub fn damage(&self) -> Option<Damage> {
        self.damage
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATTERN: fn() -> Pattern = || Pattern::new(7);

    fn damage(parts: &[std::ops::Range<u64>]) -> Option<Damage> {
        let mut checker = Checker::new(PATTERN());
        for part in parts {
            checker.check(&PATTERN().bytes(part.start, (part.end - part.start) as usize));
        }
        let bytes: u64 = parts.iter().map(|part| part.end - part.start).sum();
        assert_eq!(checker.received(), bytes);
        checker.damage()
    }

    #[test]
    fn any_part_of_the_stream_is_the_same() {
        let all = PATTERN().bytes(0, 100);
        for from in 0..40_usize {
            for len in 0..40 {
                assert_eq!(PATTERN().bytes(from as u64, len), all[from..][..len]);
            }
        }
        assert_ne!(Pattern::new(8).bytes(0, 16), all[..16]);
    }

    #[test]
    fn what_is_wrong_is_told_apart() {
        assert_eq!(damage(&[0..10, 10..1000, 1000..1001]), None);
        assert_eq!(damage(&[0..10, 30..1000]), Some(Damage::Lost { from: 10, to: 30 }));
        assert_eq!(damage(&[0..50, 20..1000]), Some(Damage::Duplicated { from: 20, to: 50 }));
        let reordered = Damage::Reordered { from: 10, to: 30 };
        assert_eq!(damage(&[0..10, 30..100, 10..30, 100..200]), Some(reordered));
        let mut checker = Checker::new(PATTERN());
        checker.check(&[0; 100]);
        assert_eq!(checker.damage(), Some(Damage::Corrupt { at: 0 }));
    }
}
