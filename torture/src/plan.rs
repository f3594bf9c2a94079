//! What one connection does: all of it follows from the seed and the connection's number.

use std::fmt;
use std::time::Duration;

use fastrand::Rng;
use sidestep_lab::calls::{ReadCall, Wait, WriteCall};
use sidestep_lab::pattern::{Pattern, mix};

/// How many pods there are; the last one comes and goes.
pub const PODS: usize = 3;

/// The pause after each question of a talk, and how many questions it has: some four seconds of them.
const THINKING: Duration = Duration::from_millis(25);
const TALK: usize = 160;
/// The same for a long talk, which connection tracking would forget: eight seconds, or more.
const LONG_TALK: usize = 2 * TALK;
/// The first connections of so many are long talks: the first of all, so that a short run has some,
/// and does not end later for them.
const ROUND: u64 = 512;
/// How many long talks a run has at least.
pub const LONG_TALKS: u64 = 8;

/// Which way a connection takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Path {
    /// A sidecar dials another pod, whose sidecar keeps the connection: one leg.
    Sidecars,
    /// An app dials, two sidecars relay, an app answers: three legs.
    Apps,
}

/// How a connection ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Ending {
    /// One end closes when everything was said and read.
    Close,
    /// One end shuts down its half; the other reads that, says more, and closes.
    Half,
    /// Both shut down their halves at the same time.
    Both,
    /// One end closes right behind a last burst that the other does not read yet.
    Queued,
    /// One end aborts (SO_LINGER 0) right behind a burst that the other does not read yet.
    ResetQueued,
    /// One end aborts while both send.
    Reset,
    /// One end closes with bytes that it has not read.
    Unread,
}

impl Ending {
    /// Whether the connection is reset, so that the other end may miss bytes at its end.
    pub fn resets(self) -> bool {
        matches!(self, Self::ResetQueued | Self::Reset | Self::Unread)
    }
}

/// What an end does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Neither reads nor writes.
    Pause(Duration),
    /// Sends and receives so many bytes, whichever goes.
    Move {
        /// To send.
        send: u64,
        /// To receive, no more.
        receive: u64,
    },
    /// Shuts down its half.
    Shutdown,
    /// Reads the end of the other's half, and not a byte before it.
    Eof,
    /// Waits until there is something to read, and leaves it.
    Readable,
    /// Reads what is left until the connection is reset.
    Broken,
    /// SO_LINGER 0, for the close that follows.
    Linger,
}

/// The part of one end in a connection.
#[derive(Clone, Debug)]
pub struct Part {
    /// What it does; then it closes.
    pub steps: Vec<Step>,
    /// The way that it waits.
    pub wait: Wait,
    /// The way that it reads.
    pub read: ReadCall,
    /// The way that it writes.
    pub write: WriteCall,
    /// The most bytes of one write.
    pub write_size: usize,
    /// The most bytes of one read.
    pub read_size: usize,
    /// Bytes of SO_SNDBUF and SO_RCVBUF, where they are set.
    pub buffers: Option<usize>,
}

/// The plan of a connection.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The connection's number.
    pub number: u64,
    /// Index of the pod that dials.
    pub from: usize,
    /// Index of the pod that is dialled.
    pub to: usize,
    /// Whether it uses IPv6.
    pub v6: bool,
    /// The path that it takes.
    pub path: Path,
    /// A long talk between sidecars: small messages that never go by TCP by themselves.
    pub long_talk: bool,
    /// The ending.
    pub ending: Ending,
    /// The client's part.
    pub client: Part,
    /// The server's part.
    pub server: Part,
    key: u64,
}

impl Plan {
    /// The plan of connection `number`.
    pub fn new(seed: u64, number: u64) -> Self {
        let key = mix(mix(seed) ^ number);
        let rng = &mut Rng::with_seed(key);
        let long_talk = number % ROUND < LONG_TALKS;
        // Not with the pod that comes and goes: it waits for its connections to end.
        let among = if long_talk { PODS - 1 } else { PODS };
        let from = rng.usize(..among);
        let to = (from + rng.usize(1..among)) % among;
        let ending = [
            Ending::Close,
            Ending::Half,
            Ending::Both,
            Ending::Queued,
            Ending::ResetQueued,
            Ending::Reset,
            Ending::Unread,
        ][rng.usize(..7)];
        let mut ends = [part(rng), part(rng)];
        if long_talk {
            talk(rng, &mut ends, LONG_TALK);
        } else if from.max(to) < PODS - 1 && rng.u8(..16) == 0 {
            talk(rng, &mut ends, TALK);
        } else {
            body(rng, &mut ends);
        }
        // Either end may be the one that ends it.
        let by = rng.usize(..2);
        finish(rng, ending, by, &mut ends);
        let [client, server] = ends;
        // A relay's sockets do not know whose they are, and ask too often for a talk.
        let path = if !long_talk && rng.u8(..3) == 0 { Path::Apps } else { Path::Sidecars };
        Self { number, from, to, v6: rng.bool(), path, long_talk, ending, client, server, key }
    }

    /// The same, and both ends read as Tokio does.
    pub fn with_short_reads(mut self) -> Self {
        (self.client.wait, self.server.wait) = (Wait::EdgeShort, Wait::EdgeShort);
        self
    }

    /// What the client sends.
    pub fn request(&self) -> Pattern {
        Pattern::new(self.key)
    }

    /// What the server sends.
    pub fn response(&self) -> Pattern {
        Pattern::new(!self.key)
    }
}

/// A part with no steps yet.
fn part(rng: &mut Rng) -> Part {
    Part {
        steps: Vec::new(),
        wait: Wait::ALL[rng.usize(..Wait::ALL.len())],
        read: ReadCall::ALL[rng.usize(..ReadCall::ALL.len())],
        write: WriteCall::ALL[rng.usize(..WriteCall::ALL.len())],
        write_size: [16, 1 << 10, 4 << 10, 16 << 10, 64 << 10, 256 << 10][rng.usize(..6)],
        read_size: [100, 1 << 10, 16 << 10, 64 << 10, 256 << 10][rng.usize(..5)],
        buffers: (rng.u8(..4) == 0).then(|| [8 << 10, 32 << 10, 256 << 10][rng.usize(..3)]),
    }
}

/// Phases of request and response, of bulk and of both, with pauses between and within.
fn body(rng: &mut Rng, ends: &mut [Part; 2]) {
    // Most live on until the agent has seen them, and then some more.
    if rng.u8(..4) != 0 {
        exchange(rng, ends, 1);
        let wait = Duration::from_millis(rng.u64(300..2500));
        ends[rng.usize(..2)].steps.push(Step::Pause(wait));
    }
    for _ in 0..rng.usize(2..8) {
        match rng.u8(..7) {
            0 | 1 => {
                let rounds = rng.usize(1..40);
                exchange(rng, ends, rounds);
            }
            2 => {
                let bytes = [size(rng, ends), size(rng, ends)];
                both(ends, bytes);
            }
            3 => {
                // One end sends while the other does not read yet.
                let sender = rng.usize(..2);
                let pause = Duration::from_millis(rng.u64(1..300));
                ends[1 - sender].steps.push(Step::Pause(pause));
                let bytes = size(rng, ends);
                one_way(ends, sender, bytes);
            }
            4 => {
                // More than a queue takes, while nobody reads.
                let sender = rng.usize(..2);
                let pause = Duration::from_millis(rng.u64(20..200));
                ends[1 - sender].steps.push(Step::Pause(pause));
                let bytes = rng.u64(70 << 10..400 << 10).min(limit(ends));
                one_way(ends, sender, bytes);
            }
            5 => {
                let sender = rng.usize(..2);
                for _ in 0..rng.usize(1..10) {
                    let bytes = rng.u64(1..4096);
                    one_way(ends, sender, bytes);
                    ends[sender].steps.push(Step::Pause(Duration::from_millis(rng.u64(..5))));
                }
            }
            _ => {
                let sender = rng.usize(..2);
                let bytes = size(rng, ends);
                one_way(ends, sender, bytes);
            }
        }
    }
}

/// Small messages and nothing else, for longer than any event takes: so small that none goes by TCP
/// for want of room.
fn talk(rng: &mut Rng, ends: &mut [Part; 2], questions: usize) {
    for _ in 0..questions {
        for sender in [0, 1] {
            let bytes = rng.u64(1..=16);
            one_way(ends, sender, bytes);
        }
        ends[0].steps.push(Step::Pause(THINKING));
    }
}

/// The most bytes that go in a while: small calls must not become too many, and through a buffer
/// that is smaller than a segment TCP gets a few kilobytes each 200 ms.
fn limit(ends: &[Part; 2]) -> u64 {
    let call = ends.iter().map(|end| end.write_size.min(end.read_size)).min().unwrap_or(1);
    let tiny = ends.iter().any(|end| end.buffers.is_some_and(|bytes| bytes < 256 << 10));
    (call as u64 * 1000).clamp(16 << 10, if tiny { 32 << 10 } else { 2 << 20 })
}

/// Small ones are many.
fn size(rng: &mut Rng, ends: &[Part; 2]) -> u64 {
    let limit = limit(ends);
    let bits = rng.u32(0..=limit.ilog2());
    1 + rng.u64(..1 << bits)
}

fn one_way(ends: &mut [Part; 2], sender: usize, bytes: u64) {
    ends[sender].steps.push(Step::Move { send: bytes, receive: 0 });
    ends[1 - sender].steps.push(Step::Move { send: 0, receive: bytes });
}

fn both(ends: &mut [Part; 2], bytes: [u64; 2]) {
    for side in 0..2 {
        ends[side].steps.push(Step::Move { send: bytes[side], receive: bytes[1 - side] });
    }
}

fn exchange(rng: &mut Rng, ends: &mut [Part; 2], rounds: usize) {
    let first = rng.usize(..2);
    for _ in 0..rounds {
        let small = |rng: &mut Rng| {
            let bits = rng.u32(0..13);
            1 + rng.u64(..1 << bits)
        };
        let request = small(rng);
        one_way(ends, first, request);
        let response = small(rng);
        one_way(ends, 1 - first, response);
    }
}

fn finish(rng: &mut Rng, ending: Ending, by: usize, ends: &mut [Part; 2]) {
    let pause = Step::Pause(Duration::from_millis(rng.u64(1..200)));
    let bytes = size(rng, ends);
    // What fits into the socket of the end that does not read.
    let burst = rng.u64(1..4096);
    let mut add = |end: usize, steps: &[Step]| ends[end].steps.extend_from_slice(steps);
    let send = |send| Step::Move { send, receive: 0 };
    let receive = |receive| Step::Move { send: 0, receive };
    let other = 1 - by;
    match ending {
        Ending::Close => add(other, &[Step::Eof]),
        Ending::Half => {
            add(by, &[Step::Shutdown, receive(bytes), Step::Eof]);
            add(other, &[Step::Eof, pause, send(bytes)]);
        }
        Ending::Both => {
            add(by, &[Step::Shutdown, Step::Eof]);
            add(other, &[Step::Shutdown, Step::Eof]);
        }
        Ending::Queued => {
            add(by, &[send(bytes)]);
            add(other, &[pause, receive(bytes), Step::Eof]);
        }
        Ending::ResetQueued => {
            add(by, &[send(burst), Step::Linger]);
            add(other, &[pause, Step::Broken]);
        }
        Ending::Reset => {
            let part = rng.u64(0..=bytes);
            add(by, &[Step::Move { send: part, receive: part }, Step::Linger]);
            add(other, &[Step::Move { send: bytes, receive: bytes + 1 }, Step::Broken]);
        }
        Ending::Unread => {
            add(by, &[Step::Readable]);
            add(other, &[send(burst), Step::Broken]);
        }
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = |index: usize| char::from(b'a' + index as u8);
        write!(
            f,
            "connection {}: {} -> {} IPv{} {:?}, ending {:?}",
            self.number,
            name(self.from),
            name(self.to),
            if self.v6 { 6 } else { 4 },
            self.path,
            self.ending
        )?;
        for (who, part) in [("client", &self.client), ("server", &self.server)] {
            write!(
                f,
                "; {who}: {:?} {:?}({}) {:?}({}) {} steps",
                part.wait,
                part.read,
                part.read_size,
                part.write,
                part.write_size,
                part.steps.len()
            )?;
            if let Some(bytes) = part.buffers {
                write!(f, ", buffers of {bytes}")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn moved(part: &Part) -> [u64; 2] {
        part.steps.iter().fold([0, 0], |[sent, received], step| match step {
            Step::Move { send, receive } => [sent + send, received + receive],
            _ => [sent, received],
        })
    }

    #[test]
    fn a_plan_follows_from_its_seed_and_both_ends_agree() {
        let mut endings = std::collections::BTreeSet::new();
        for number in 0..1000 {
            let plan = Plan::new(3, number);
            assert_eq!(format!("{plan:?}"), format!("{:?}", Plan::new(3, number)));
            assert_ne!(plan.from, plan.to);
            assert!(!plan.long_talk || plan.from.max(plan.to) < PODS - 1);
            endings.insert(plan.ending);
            if !plan.ending.resets() {
                let [sent, received] = moved(&plan.client);
                assert_eq!(moved(&plan.server), [received, sent], "{plan}");
            }
        }
        assert_eq!(endings.len(), 7);
        assert_ne!(Plan::new(4, 0).to_string(), Plan::new(3, 0).to_string());
    }
}
