//! One end of a connection plays its part.

use std::fmt;
use std::io::{self, ErrorKind, Read as _};
use std::net::{Shutdown, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv};
use sidestep_lab::calls::{self, Wait, Waiter};
use sidestep_lab::pattern::{Checker, Damage, Pattern};
use socket2::SockRef;
use std::os::fd::AsRawFd as _;

use crate::plan::{Part, Step};

/// Without a byte for so long, a connection is stalled.
pub const STALLED: Duration = Duration::from_secs(15);

/// How a part went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// As planned, to the end.
    Done,
    /// The connection was reset, at a step or where that was to be.
    Reset,
    /// The other's half ended too early, or where a reset was to come.
    Eof,
    /// More came than was sent.
    TooMuch,
    /// Nothing moved any more.
    Stalled,
    /// Another error.
    Failed(Option<Errno>),
    /// MSG_PEEK and read() differed.
    Peek,
}

/// What came of one end.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// How the end finished.
    pub how: How,
    /// The step at which it finished.
    pub step: usize,
    /// Bytes that its calls took.
    pub sent: u64,
    /// The number of bytes received.
    pub received: u64,
    /// What was wrong with them.
    pub damage: Option<Damage>,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { how, step, sent, received, damage } = self;
        write!(f, "{how:?} at step {step}, sent {sent}, received {received}")?;
        damage.map_or(Ok(()), |damage| write!(f, ", {damage}"))
    }
}

/// Plays `part` on a non-blocking socket and closes it.
pub fn play(stream: TcpStream, part: &Part, sends: Pattern, receives: Pattern) -> Outcome {
    let checker = Checker::new(receives);
    let waiter = match Waiter::new(&stream, part.wait) {
        Ok(waiter) => waiter,
        Err(err) => {
            let (how, received) = (of_error(&err), 0);
            return Outcome { how, step: 0, sent: 0, received, damage: None };
        }
    };
    let buffer = vec![0; part.read_size.max(part.write_size)];
    let mut end = End { part, sends, checker, sent: 0, waiter, empty: false, buffer };
    let mut step = 0;
    let mut how = How::Done;
    while how == How::Done && step < part.steps.len() {
        how = end.step(&stream, part.steps[step]).unwrap_or_else(|err| of_error(&err));
        // The reset was to come at this step.
        if how == How::Done {
            step += 1;
        }
    }
    // What else there is to say must be known before the socket goes.
    drop(stream);
    Outcome {
        how,
        step,
        sent: end.sent,
        received: end.checker.received(),
        damage: end.checker.damage(),
    }
}

fn of_error(err: &io::Error) -> How {
    match err.kind() {
        ErrorKind::ConnectionReset => How::Reset,
        ErrorKind::UnexpectedEof => How::Eof,
        ErrorKind::TimedOut => How::Stalled,
        ErrorKind::InvalidData => How::Peek,
        _ => How::Failed(err.raw_os_error().map(Errno::from_raw)),
    }
}

struct End<'a> {
    part: &'a Part,
    sends: Pattern,
    checker: Checker,
    sent: u64,
    waiter: Waiter,
    /// What its waiter said last: a reader of edges does not try before the next one.
    empty: bool,
    buffer: Vec<u8>,
}

impl End<'_> {
    fn step(&mut self, stream: &TcpStream, step: Step) -> io::Result<How> {
        match step {
            Step::Pause(time) => thread::sleep(time),
            Step::Move { send, receive } => {
                let (send, receive) = (self.sent + send, self.checker.received() + receive);
                self.exchange(stream, send, receive)?;
            }
            Step::Shutdown => stream.shutdown(Shutdown::Write)?,
            Step::Linger => SockRef::from(stream).set_linger(Some(Duration::ZERO))?,
            Step::Eof => return self.eof(stream),
            Step::Readable => loop {
                match recv(stream.as_raw_fd(), &mut [0], MsgFlags::MSG_PEEK) {
                    Ok(0) => return Ok(How::Eof),
                    Ok(_) => break,
                    Err(Errno::EAGAIN) => self.wait(stream, true, false)?,
                    Err(err) => return Err(err.into()),
                }
            },
            Step::Broken => match self.exchange(stream, self.sent, u64::MAX) {
                Ok(()) => return Ok(How::TooMuch),
                Err(err) => return Err(err),
            },
        }
        Ok(How::Done)
    }

    /// Until it has sent and received so many bytes since the begin.
    fn exchange(&mut self, stream: &TcpStream, send: u64, receive: u64) -> io::Result<()> {
        loop {
            if self.part.wait == Wait::EdgeShort
                && let Some(ready) = self.waiter.wait(stream, true, true, Duration::ZERO)?
            {
                // An event loop hears of what came before it lets anybody read.
                self.empty &= !ready.read;
            }
            let mut writes = self.sent < send;
            while writes {
                writes = self.write(stream, send)?;
            }
            let mut reads = self.checker.received() < receive && !self.empty;
            while reads {
                reads = self.read(stream, receive)?;
                // A stream both ways must not starve the one that it sends.
                if self.sent < send && reads {
                    break;
                }
            }
            let (to_write, to_read) = (self.sent < send, self.checker.received() < receive);
            if !to_write && !to_read {
                return Ok(());
            }
            if !reads {
                self.wait(stream, to_read, to_write)?;
            }
        }
    }

    /// Writes once; whether it is worth to try again.
    fn write(&mut self, stream: &TcpStream, send: u64) -> io::Result<bool> {
        let size = (self.part.write_size as u64).min(send - self.sent) as usize;
        let bytes = &mut self.buffer[..size];
        self.sends.fill(self.sent, bytes);
        match calls::write(stream, self.part.write, bytes) {
            Ok(n) => {
                self.sent += n as u64;
                Ok(self.sent < send)
            }
            Err(err) if err.kind() == ErrorKind::WouldBlock => Ok(false),
            Err(err) if err.kind() == ErrorKind::Interrupted => Ok(true),
            Err(err) => Err(err),
        }
    }

    /// Reads once; whether it is worth to try again.
    fn read(&mut self, stream: &TcpStream, receive: u64) -> io::Result<bool> {
        let left = receive - self.checker.received();
        let size = (self.part.read_size as u64).min(left) as usize;
        match calls::read(stream, self.part.read, &mut self.buffer[..size]) {
            Ok(0) => Err(ErrorKind::UnexpectedEof.into()),
            Ok(n) => {
                self.checker.check(&self.buffer[..n]);
                self.empty = self.waiter.is_short(n, size);
                Ok(self.checker.received() < receive && !self.empty)
            }
            Err(err) if err.kind() == ErrorKind::WouldBlock => Ok(false),
            Err(err) if err.kind() == ErrorKind::Interrupted => Ok(true),
            Err(err) => Err(err),
        }
    }

    fn eof(&mut self, mut stream: &TcpStream) -> io::Result<How> {
        loop {
            match stream.read(&mut [0; 64]) {
                Ok(0) => return Ok(How::Done),
                Ok(_) => return Ok(How::TooMuch),
                Err(err) if err.kind() == ErrorKind::WouldBlock => {
                    self.wait(stream, true, false)?;
                }
                Err(err) if err.kind() == ErrorKind::Interrupted => {}
                Err(err) => return Err(err),
            }
        }
    }

    fn wait(&mut self, stream: &TcpStream, read: bool, write: bool) -> io::Result<()> {
        let begin = Instant::now();
        while begin.elapsed() < STALLED {
            let limit = STALLED.saturating_sub(begin.elapsed());
            if let Some(ready) = self.waiter.wait(stream, read, write, limit)? {
                self.empty &= !ready.read;
                return Ok(());
            }
        }
        Err(ErrorKind::TimedOut.into())
    }
}
