//! The bare relay: the least that a sidecar can be. One thread, non-blocking sockets, one read
//! and one write for each piece of data; it never uses splice(2).

use std::io::{self, Read as _, Write as _};
use std::net::{Ipv4Addr, Shutdown, SocketAddr};
use std::str::FromStr;

use anyhow::{Context, Result};
use mio::event::Event;
use mio::net::TcpStream;
use nix::sys::socket::{SockaddrIn, getsockopt, setsockopt, sockopt};
use sidestep_lab::{INBOUND, OUTBOUND, Twin};
use slab::Slab;
use socket2::{Domain, Socket, Type};

use crate::app::would_block;
use crate::serve::{Connections, Sockets, serve};

/// Where it dials its own application from, as Istio's sidecar does.
const PASSTHROUGH: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 6);

const CHUNK: usize = 64 << 10;

/// A [`Twin`] on the command line: `LISTEN=UPSTREAM`, or `LISTEN=UPSTREAM=in` for the
/// application's side.
#[derive(Clone, Debug)]
pub struct TwinArg(pub Twin);

impl TwinArg {
    /// The text of one.
    pub fn text(twin: &Twin) -> String {
        format!("{}={}{}", twin.listen, twin.upstream, if twin.inbound { "=in" } else { "" })
    }
}

impl FromStr for TwinArg {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let (pair, inbound) = match text.strip_suffix("=in") {
            Some(pair) => (pair, true),
            None => (text, false),
        };
        let (listen, upstream) = pair.split_once('=').context("LISTEN=UPSTREAM expected")?;
        let (listen, upstream) = (listen.parse()?, upstream.parse()?);
        Ok(Self(Twin { listen, upstream, inbound, http: false }))
    }
}

/// Where a listener's connections go.
#[derive(Clone, Copy)]
struct Route {
    /// `None`: where they were meant to.
    upstream: Option<SocketAddr>,
    inbound: bool,
}

/// Relays what comes to the sidecar's two ports, and to the twins. Returns only when it fails.
pub fn relay(twins: &[TwinArg]) -> Result<()> {
    let any = |port| SocketAddr::from((Ipv4Addr::UNSPECIFIED, port));
    let mut routes = vec![
        (any(OUTBOUND), Route { upstream: None, inbound: false }),
        (any(INBOUND), Route { upstream: None, inbound: true }),
    ];
    routes.extend(twins.iter().map(|TwinArg(twin)| {
        (twin.listen, Route { upstream: Some(twin.upstream), inbound: twin.inbound })
    }));
    serve(routes, &mut Relay { pairs: Slab::new(), buffer: vec![0; CHUNK] })
}

struct Relay {
    pairs: Slab<Pair>,
    buffer: Vec<u8>,
}

impl Connections for Relay {
    type Kind = Route;

    fn add(&mut self, near: TcpStream, route: Route, sockets: &Sockets<'_>) -> Result<()> {
        let far = dial(&near, route).context("relay")?;
        let entry = self.pairs.vacant_entry();
        let first = 2 * entry.key();
        let pair = entry.insert(Pair::new(near, far));
        for (side, end) in pair.ends.iter_mut().enumerate() {
            sockets.register(end, first + side)?;
        }
        Ok(())
    }

    fn go_on(&mut self, number: usize, event: &Event) {
        let (key, side) = (number / 2, number % 2);
        // The other end's event of the same batch may have removed the pair.
        let Some(pair) = self.pairs.get_mut(key) else { return };
        let more = pair.go_on(side, event.is_readable(), event.is_writable(), &mut self.buffer);
        // An end that was reset is over, also while the other one takes nothing.
        if event.is_error() || !more.unwrap_or(false) {
            self.pairs.remove(key);
        }
    }
}

fn dial(near: &TcpStream, route: Route) -> Result<TcpStream> {
    let upstream = match route.upstream {
        Some(upstream) => upstream,
        None => {
            let raw = getsockopt(near, sockopt::OriginalDst).context("SO_ORIGINAL_DST")?;
            SocketAddr::V4(SockaddrIn::from(raw).into())
        }
    };
    let socket = Socket::new(Domain::for_address(upstream), Type::STREAM.nonblocking(), None)?;
    socket.set_tcp_nodelay(true)?;
    if route.inbound {
        // As Envoy does: the port is chosen when the peer is known.
        setsockopt(&socket, sockopt::IpBindAddressNoPort, &true)?;
        socket.bind(&SocketAddr::from((PASSTHROUGH, 0)).into())?;
    }
    match socket.connect(&upstream.into()) {
        Err(err) if err.raw_os_error() != Some(nix::libc::EINPROGRESS) => {
            return Err(err).with_context(|| format!("connecting to {upstream}"));
        }
        _ => {}
    }
    Ok(TcpStream::from_std(socket.into()))
}

/// One direction of a relayed connection.
#[derive(Default)]
struct Way {
    /// Read, and not written yet.
    rest: Vec<u8>,
    written: usize,
    ended: bool,
    shut: bool,
}

struct Pair {
    ends: [TcpStream; 2],
    /// From that end to the other.
    ways: [Way; 2],
    connected: bool,
}

impl Pair {
    fn new(near: TcpStream, far: TcpStream) -> Self {
        Self { ends: [near, far], ways: Default::default(), connected: false }
    }

    /// Whether the pair has anything left to do.
    fn go_on(
        &mut self,
        side: usize,
        readable: bool,
        writable: bool,
        buffer: &mut [u8],
    ) -> io::Result<bool> {
        if !self.connected {
            if side == 0 {
                return Ok(true);
            }
            if let Some(err) = self.ends[1].take_error()? {
                return Err(err);
            }
            if !writable {
                return Ok(true);
            }
            self.connected = true;
            self.pump(0, buffer)?;
        }
        if readable {
            self.pump(side, buffer)?;
        }
        if writable && !self.ways[1 - side].rest.is_empty() {
            self.pump(1 - side, buffer)?;
        }
        Ok(!self.ways.iter().all(|way| way.shut))
    }

    /// Moves what comes from one end to the other, until either would block.
    fn pump(&mut self, from: usize, buffer: &mut [u8]) -> io::Result<()> {
        let [first, second] = &mut self.ends;
        let (source, sink) = if from == 0 { (first, second) } else { (second, first) };
        let way = &mut self.ways[from];
        loop {
            while way.written < way.rest.len() {
                let Some(n) = would_block(sink.write(&way.rest[way.written..]))? else {
                    return Ok(());
                };
                way.written += n;
            }
            way.rest.clear();
            way.written = 0;
            if way.ended {
                if !way.shut {
                    way.shut = true;
                    sink.shutdown(Shutdown::Write)?;
                }
                return Ok(());
            }
            match would_block(source.read(buffer))? {
                None => return Ok(()),
                Some(0) => way.ended = true,
                Some(n) => {
                    let done = would_block(sink.write(&buffer[..n]))?.unwrap_or(0);
                    way.rest.extend_from_slice(&buffer[done..n]);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_twin_is_read_as_it_is_written() {
        for inbound in [false, true] {
            let [listen, upstream] =
                ["127.0.0.1:9080", "10.77.0.11:8080"].map(|text| text.parse().expect("an address"));
            let twin = Twin { listen, upstream, inbound, http: false };
            let TwinArg(read) = TwinArg::text(&twin).parse().expect("a twin");
            assert_eq!((read.listen, read.upstream, read.inbound), (listen, upstream, inbound));
        }
        assert!("127.0.0.1:9080".parse::<TwinArg>().is_err());
    }
}
