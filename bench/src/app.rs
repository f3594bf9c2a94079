//! The application: a process with one thread and non-blocking sockets, that speaks as the
//! port says that was dialled.

use std::io::{self, ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, Shutdown};

use anyhow::Result;
use mio::event::Event;
use mio::net::TcpStream;
use slab::Slab;

use crate::serve::{self, Connections, Sockets};

/// What it does on a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Service {
    /// Sends back what comes.
    Echo,
    /// Answers `GET /N` with N bytes.
    Http,
    /// Takes all that comes, and says how much it was when that ends.
    Sink,
    /// Sends without end, once something has come.
    Source,
    /// Never reads.
    Stopped,
}

impl Service {
    /// All services.
    pub const EVERY: [Self; 5] = [Self::Echo, Self::Http, Self::Sink, Self::Source, Self::Stopped];

    /// The application's port for it.
    pub const fn port(self) -> u16 {
        match self {
            Self::Echo => 8080,
            Self::Http => 8081,
            Self::Sink => 8082,
            Self::Source => 8083,
            Self::Stopped => 8084,
        }
    }
}

/// A new connection says so much first, a small message each way at a time, in every mode: it is
/// what makes one worth splicing (`SPLICE_TALK` of bpf/splice/mark.h, and some).
pub const TALK: usize = 24;
/// Bytes that are read or written at once.
const CHUNK: usize = 128 << 10;

/// Serves on all ports of this address. Returns only when it fails.
pub fn serve(ip: IpAddr) -> Result<()> {
    let addrs = Service::EVERY.map(|service| ((ip, service.port()).into(), service));
    serve::serve(addrs, &mut App { conns: Slab::new(), buffer: vec![0; CHUNK] })
}

struct App {
    conns: Slab<Conn>,
    buffer: Vec<u8>,
}

impl Connections for App {
    type Kind = Service;

    fn add(
        &mut self,
        mut stream: TcpStream,
        service: Service,
        sockets: &Sockets<'_>,
    ) -> Result<()> {
        let entry = self.conns.vacant_entry();
        sockets.register(&mut stream, entry.key())?;
        entry.insert(Conn { stream, service, state: State::default() });
        Ok(())
    }

    fn go_on(&mut self, number: usize, event: &Event) {
        let Some(conn) = self.conns.get_mut(number) else { return };
        if conn.go_on(event, &mut self.buffer).is_err() {
            self.conns.remove(number);
        }
    }
}

struct Conn {
    stream: TcpStream,
    service: Service,
    state: State,
}

#[derive(Default)]
struct State {
    out: Vec<u8>,
    written: usize,
    /// Of an HTTP request that is not complete.
    head: Vec<u8>,
    /// Of [`TALK`] bytes, which come back.
    talked: usize,
    received: u64,
    ending: bool,
}

impl Conn {
    /// Writes and reads as long as either goes on. An error, also the regular end, means that the
    /// connection is over.
    fn go_on(&mut self, event: &Event, buffer: &mut [u8]) -> io::Result<()> {
        match self.service {
            Service::Source if self.state.received > 0 => return self.send_without_end(buffer),
            Service::Stopped if event.is_read_closed() || event.is_error() => {
                return Err(ErrorKind::UnexpectedEof.into());
            }
            Service::Stopped if self.state.talked == TALK => return Ok(()),
            _ => {}
        }
        let state = &mut self.state;
        loop {
            while state.written < state.out.len() {
                let Some(n) = would_block(self.stream.write(&state.out[state.written..]))? else {
                    return Ok(());
                };
                state.written += n;
            }
            state.out.clear();
            state.written = 0;
            if state.ending {
                self.stream.shutdown(Shutdown::Write)?;
                return Err(ErrorKind::UnexpectedEof.into());
            }
            match would_block(self.stream.read(buffer))? {
                None => return Ok(()),
                Some(0) => {
                    state.ending = true;
                    if self.service == Service::Sink {
                        state.out.extend_from_slice(&state.received.to_be_bytes());
                    }
                }
                Some(n) => match self.service {
                    Service::Echo => state.out.extend_from_slice(&buffer[..n]),
                    Service::Http => state.answer(&buffer[..n])?,
                    _ if state.talked < TALK => state.talk(&buffer[..n])?,
                    Service::Source => {
                        state.received += n as u64;
                        return self.send_without_end(buffer);
                    }
                    Service::Sink | Service::Stopped => state.received += n as u64,
                },
            }
        }
    }

    fn send_without_end(&mut self, buffer: &[u8]) -> io::Result<()> {
        while would_block(self.stream.write(buffer))?.is_some() {}
        Ok(())
    }
}

impl State {
    fn talk(&mut self, data: &[u8]) -> io::Result<()> {
        self.talked += data.len();
        self.out.extend_from_slice(data);
        if self.talked > TALK {
            return Err(io::Error::other("more came than was answered"));
        }
        Ok(())
    }

    fn answer(&mut self, data: &[u8]) -> io::Result<()> {
        self.head.extend_from_slice(data);
        loop {
            let mut headers = [httparse::EMPTY_HEADER; 32];
            let mut request = httparse::Request::new(&mut headers);
            let parsed = request.parse(&self.head).map_err(io::Error::other)?;
            let httparse::Status::Complete(length) = parsed else { return Ok(()) };
            let path = request.path.unwrap_or_default();
            let size: usize = path.trim_start_matches('/').parse().map_err(io::Error::other)?;
            let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {size}\r\n\r\n");
            self.out.extend_from_slice(head.as_bytes());
            self.out.resize(self.out.len() + size, b'x');
            self.head.drain(..length);
        }
    }
}

/// `None` where the socket would block.
pub fn would_block<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(err) if matches!(err.kind(), ErrorKind::WouldBlock) => Ok(None),
        Err(err) => Err(err),
    }
}
