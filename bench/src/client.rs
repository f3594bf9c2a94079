//! The client: one thread, non-blocking sockets, the same in every mode. Closed loop: a
//! connection's next request follows its last answer.

use std::io::{self, ErrorKind, Read as _, Write as _};
use std::net::{Shutdown, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use hdrhistogram::Histogram;
use mio::event::Event;
use mio::net::TcpStream;
use mio::{Events, Interest, Poll, Token};
use sidestep_lab::interrupted;

use crate::app::{TALK, would_block};

/// What hangs for so long has failed.
const PATIENCE: Duration = Duration::from_secs(5);
/// Connections that are being opened at the same time.
const OPENING: usize = 32;
/// More than that in one slice would use up the client's ports.
const MOST_CONNECTS: u64 = 20_000;
/// More than any socket's buffers would hold: a writer that got so far is not held at all.
const MOST_STOPPED: u64 = 512 << 20;

/// How requests and answers look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// The request comes back.
    Echo,
    /// HTTP/1.1: a GET, and a body of that size.
    Http,
}

/// What came of a slice of load.
#[derive(Debug)]
pub struct Tally {
    /// Nanoseconds of each operation.
    pub times: Histogram<u64>,
    /// How long it took.
    pub elapsed: Duration,
}

impl Tally {
    fn new() -> Result<Self> {
        // Up to a minute, to three digits.
        let times = Histogram::new_with_max(60_000_000_000, 3)?;
        Ok(Self { times, elapsed: Duration::ZERO })
    }

    fn record(&mut self, began: Instant) {
        self.times.saturating_record(began.elapsed().as_nanos().try_into().unwrap_or(u64::MAX));
    }

    /// Operations per second.
    pub fn rate(&self) -> f64 {
        self.times.len() as f64 / self.elapsed.as_secs_f64()
    }

    /// A quantile of the times, in microseconds.
    pub fn micros(&self, quantile: f64) -> f64 {
        self.times.value_at_quantile(quantile) as f64 / 1000.0
    }
}

/// A request's bytes, and how its answer ends.
struct Request {
    bytes: Vec<u8>,
    protocol: Protocol,
    size: usize,
}

impl Request {
    fn new(protocol: Protocol, size: usize) -> Self {
        let bytes = match protocol {
            Protocol::Echo => vec![b'x'; size],
            Protocol::Http => format!("GET /{size} HTTP/1.1\r\nhost: bench\r\n\r\n").into_bytes(),
        };
        Self { bytes, protocol, size }
    }
}

/// A connection and where its request is.
struct Conn {
    stream: TcpStream,
    connected: bool,
    sent: usize,
    /// Bytes of the answer's body that are still to come; unknown before an HTTP head is over.
    missing: Option<usize>,
    head: Vec<u8>,
    began: Instant,
    /// Requests that were answered while it was opened.
    talked: usize,
}

impl Conn {
    fn dial(target: SocketAddr, poll: &Poll, token: usize) -> Result<Self> {
        let began = Instant::now();
        let mut stream =
            TcpStream::connect(target).with_context(|| format!("connecting to {target}"))?;
        let interest = Interest::READABLE | Interest::WRITABLE;
        poll.registry().register(&mut stream, Token(token), interest)?;
        Ok(Self {
            stream,
            connected: false,
            sent: 0,
            missing: None,
            head: Vec::new(),
            began,
            talked: 0,
        })
    }

    /// Begins the next request.
    fn ask(&mut self, request: &Request) -> io::Result<()> {
        self.began = Instant::now();
        self.again(request);
        // The answer is announced by an event of its own.
        self.send(request)
    }

    fn again(&mut self, request: &Request) {
        self.sent = 0;
        self.missing = (request.protocol == Protocol::Echo).then_some(request.size);
        self.head.clear();
    }

    fn send(&mut self, request: &Request) -> io::Result<()> {
        while self.sent < request.bytes.len() {
            let Some(n) = would_block(self.stream.write(&request.bytes[self.sent..]))? else {
                break;
            };
            self.sent += n;
        }
        Ok(())
    }

    /// After an event: whether the answer is complete.
    fn go_on(&mut self, event: &Event, request: &Request, buffer: &mut [u8]) -> io::Result<bool> {
        if !self.connected {
            if let Some(err) = self.stream.take_error()? {
                return Err(err);
            }
            if !event.is_writable() {
                return Ok(false);
            }
            self.connected = true;
            self.stream.set_nodelay(true)?;
            self.again(request);
            return self.send(request).map(|()| false);
        }
        if self.sent < request.bytes.len() {
            self.send(request)?;
        }
        while self.missing != Some(0) {
            match would_block(self.stream.read(buffer))? {
                None => return Ok(false),
                Some(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Some(n) => self.take(&buffer[..n])?,
            }
        }
        Ok(true)
    }

    fn take(&mut self, data: &[u8]) -> io::Result<()> {
        let mut body = data.len();
        if self.missing.is_none() {
            self.head.extend_from_slice(data);
            let mut headers = [httparse::EMPTY_HEADER; 32];
            let mut answer = httparse::Response::new(&mut headers);
            let parsed = answer.parse(&self.head).map_err(io::Error::other)?;
            let httparse::Status::Complete(length) = parsed else { return Ok(()) };
            if answer.code != Some(200) {
                return Err(io::Error::other(format!("HTTP status {:?}", answer.code)));
            }
            let size =
                answer.headers.iter().find(|h| h.name.eq_ignore_ascii_case("content-length"));
            let size = size.and_then(|h| std::str::from_utf8(h.value).ok()?.parse().ok());
            self.missing = Some(size.ok_or_else(|| io::Error::other("no content-length"))?);
            body = self.head.len() - length;
        }
        let missing = self.missing.unwrap_or(0);
        let left = missing.checked_sub(body);
        self.missing =
            Some(left.ok_or_else(|| io::Error::other("more bytes than the answer has"))?);
        Ok(())
    }
}

/// Connections to one target that stay open.
pub struct Client {
    poll: Poll,
    events: Events,
    buffer: Vec<u8>,
    conns: Vec<Conn>,
    target: SocketAddr,
    protocol: Protocol,
}

impl Client {
    /// None yet.
    pub fn new(target: SocketAddr, protocol: Protocol) -> Result<Self> {
        Ok(Self {
            poll: Poll::new().context("making an epoll")?,
            events: Events::with_capacity(1024),
            buffer: vec![0; 64 << 10],
            conns: Vec::new(),
            target,
            protocol,
        })
    }

    /// Opens connections until there are `count`, each with its first requests and answers.
    pub fn open(&mut self, count: usize) -> Result<()> {
        let request = Request::new(self.protocol, 64);
        let mut pending = 0;
        let mut progress = Instant::now();
        while self.conns.len() < count || pending > 0 {
            while pending < OPENING && self.conns.len() < count {
                self.conns.push(Conn::dial(self.target, &self.poll, self.conns.len())?);
                pending += 1;
            }
            poll_events(&mut self.poll, &mut self.events)?;
            for event in &self.events {
                let Some(conn) = self.conns.get_mut(event.token().0) else { continue };
                if conn.missing == Some(0) {
                    continue; // answered already
                }
                let done = conn.go_on(event, &request, &mut self.buffer);
                let done =
                    done.with_context(|| format!("opening connection {}", event.token().0 + 1))?;
                if !done {
                    continue;
                }
                progress = Instant::now();
                conn.talked += 1;
                if conn.talked == TALK {
                    pending -= 1;
                } else {
                    conn.ask(&request).context("a first request")?;
                }
            }
            ensure!(
                progress.elapsed() < PATIENCE,
                "{pending} of {count} connections hang while they are opened"
            );
        }
        Ok(())
    }

    /// Requests of that size on the first `active` connections.
    pub fn ask(&mut self, active: usize, size: usize, duration: Duration) -> Result<Tally> {
        let request = Request::new(self.protocol, size);
        let mut tally = Tally::new()?;
        let conns = self.conns.get_mut(..active).context("there are fewer connections")?;
        let start = Instant::now();
        for conn in conns.iter_mut() {
            conn.ask(&request).context("the first request")?;
        }
        let mut pending = active;
        let mut progress = start;
        while pending > 0 {
            poll_events(&mut self.poll, &mut self.events)?;
            let now = Instant::now();
            let over = now - start >= duration;
            for event in &self.events {
                let Some(conn) = conns.get_mut(event.token().0) else {
                    bail!("an idle connection has ended, or said something");
                };
                if conn.missing == Some(0) {
                    continue; // it can be written to again, or nothing is asked any more
                }
                let done = conn.go_on(event, &request, &mut self.buffer);
                if !done.with_context(|| format!("after {} requests", tally.times.len()))? {
                    continue;
                }
                tally.record(conn.began);
                progress = now;
                if over {
                    pending -= 1;
                } else {
                    conn.ask(&request)
                        .with_context(|| format!("after {} requests", tally.times.len()))?;
                }
            }
            ensure!(now - progress < PATIENCE, "{pending} requests of {active} hang");
        }
        tally.elapsed = start.elapsed();
        Ok(tally)
    }
}

/// Waits for events, for a tenth of a second at most.
fn poll_events(poll: &mut Poll, events: &mut Events) -> Result<()> {
    ensure!(!interrupted(), "interrupted");
    match poll.poll(events, Some(Duration::from_millis(100))) {
        Err(err) if err.kind() == ErrorKind::Interrupted => Ok(()),
        result => result.context("waiting for events"),
    }
}

/// A connection for each request of 64 bytes, `concurrent` at the same time.
pub fn churn(
    target: SocketAddr,
    protocol: Protocol,
    concurrent: usize,
    duration: Duration,
) -> Result<Tally> {
    let request = Request::new(protocol, 64);
    let mut poll = Poll::new().context("making an epoll")?;
    let mut events = Events::with_capacity(1024);
    let mut buffer = vec![0; 64 << 10];
    let mut tally = Tally::new()?;
    let start = Instant::now();
    let mut conns = Vec::new();
    for token in 0..concurrent {
        conns.push(Some(Conn::dial(target, &poll, token)?));
    }
    let mut progress = start;
    while conns.iter().any(Option::is_some) {
        poll_events(&mut poll, &mut events)?;
        let now = Instant::now();
        for event in &events {
            let token = event.token().0;
            let Some(conn) = conns[token].as_mut() else { continue };
            let done = conn.go_on(event, &request, &mut buffer);
            if !done.with_context(|| format!("after {} connections", tally.times.len()))? {
                continue;
            }
            let began = conn.began;
            conns[token] = None;
            tally.record(began);
            progress = now;
            if now - start < duration && tally.times.len() < MOST_CONNECTS {
                conns[token] = Some(Conn::dial(target, &poll, token)?);
            }
        }
        ensure!(now - progress < PATIENCE, "connections hang");
    }
    tally.elapsed = start.elapsed();
    Ok(tally)
}

/// What a transfer came to.
#[derive(Debug)]
pub struct Moved {
    /// The number of bytes that arrived.
    pub bytes: u64,
    /// The duration of the transfer.
    pub elapsed: Duration,
}

/// One connection for a transfer.
pub struct Bulk {
    poll: Poll,
    events: Events,
    stream: TcpStream,
}

impl Bulk {
    /// Connects, and talks for a little.
    pub fn open(target: SocketAddr) -> Result<Self> {
        let mut poll = Poll::new().context("making an epoll")?;
        let mut events = Events::with_capacity(16);
        let Conn { stream, .. } = Conn::dial(target, &poll, 0)?;
        let start = Instant::now();
        loop {
            poll_events(&mut poll, &mut events)?;
            if let Some(err) = stream.take_error()? {
                return Err(err).with_context(|| format!("connecting to {target}"));
            }
            if stream.peer_addr().is_ok() {
                break;
            }
            ensure!(start.elapsed() < PATIENCE, "connecting to {target} hangs");
        }
        stream.set_nodelay(true)?;
        let mut bulk = Self { poll, events, stream };
        for _ in 0..TALK {
            bulk.talk().context("talking")?;
        }
        Ok(bulk)
    }

    /// A byte there and back.
    fn talk(&mut self) -> Result<()> {
        let sent = self.stream.write(b".").context("sending")?;
        ensure!(sent == 1, "a byte could not be sent");
        let start = Instant::now();
        loop {
            match would_block(self.stream.read(&mut [0; 2])).context("receiving")? {
                Some(1) => return Ok(()),
                Some(n) => bail!("{n} bytes came back of 1"),
                None => self.wait(start, Duration::ZERO)?,
            }
        }
    }

    /// Sends, and hears at the end from [`crate::app::Service::Sink`] how much has arrived.
    pub fn send(mut self, duration: Duration) -> Result<Moved> {
        let chunk = vec![b'x'; 128 << 10];
        let (mut sent, start) = (0_u64, Instant::now());
        while start.elapsed() < duration {
            match would_block(self.stream.write(&chunk)).context("sending")? {
                Some(n) => sent += n as u64,
                None => self.wait(start, duration)?,
            }
        }
        self.stream.shutdown(Shutdown::Write).context("ending the transfer")?;
        let mut count = Vec::new();
        let mut buffer = [0; 64];
        while count.len() < 8 {
            match would_block(self.stream.read(&mut buffer)).context("hearing what arrived")? {
                Some(0) => bail!("the connection ended before it was said what arrived"),
                Some(n) => count.extend_from_slice(&buffer[..n]),
                None => self.wait(start, duration)?,
            }
        }
        let elapsed = start.elapsed();
        let arrived: [u8; 8] = count.as_slice().try_into().context("more than a number came")?;
        let bytes = u64::from_be_bytes(arrived);
        ensure!(bytes == sent, "{sent} bytes were sent, {bytes} arrived");
        Ok(Moved { bytes, elapsed })
    }

    /// Receives from [`crate::app::Service::Source`].
    pub fn receive(mut self, duration: Duration) -> Result<Moved> {
        let mut buffer = vec![0; 128 << 10];
        let (mut bytes, start) = (0_u64, Instant::now());
        let asked = self.stream.write(b"x").context("asking for the transfer")?;
        ensure!(asked == 1, "the transfer could not be asked for");
        while start.elapsed() < duration {
            match would_block(self.stream.read(&mut buffer)).context("receiving")? {
                Some(0) => bail!("the transfer ended after {bytes} bytes"),
                Some(n) => bytes += n as u64,
                None => self.wait(start, duration)?,
            }
        }
        ensure!(bytes > 0, "nothing came");
        Ok(Moved { bytes, elapsed: start.elapsed() })
    }

    /// Writes `chunk` bytes at a time until nothing could be written for `quiet`: what
    /// [`crate::app::Service::Stopped`] can be sent.
    pub fn stuff(mut self, chunk: usize, quiet: Duration) -> Result<u64> {
        let chunk = vec![b'x'; chunk];
        let (mut sent, mut progress) = (0, Instant::now());
        while progress.elapsed() < quiet && sent < MOST_STOPPED {
            match would_block(self.stream.write(&chunk)).context("writing")? {
                Some(n) => {
                    sent += n as u64;
                    progress = Instant::now();
                }
                None => poll_events(&mut self.poll, &mut self.events)?,
            }
        }
        Ok(sent)
    }

    fn wait(&mut self, start: Instant, duration: Duration) -> Result<()> {
        ensure!(start.elapsed() < duration + PATIENCE, "the transfer hangs");
        poll_events(&mut self.poll, &mut self.events)
    }
}
