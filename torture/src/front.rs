//! What listens in a pod: the sidecar, which relays, and the app, which answers.

use std::collections::HashMap;
use std::io::{self, ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use mio::net::{TcpListener, TcpStream};
use mio::{Events, Interest, Poll, Registry, Token};
use nix::sys::socket::sockopt::{Ip6tOriginalDst, OriginalDst};
use nix::sys::socket::{SockaddrIn, SockaddrIn6, getsockopt};
use sidestep_lab::{INBOUND, OUTBOUND};
use socket2::{Domain, SockRef, Socket, Type};

use crate::traffic::{IDLE, Traffic, ask_when_idle};

/// Where apps answer.
pub const APP_PORT: u16 = 8080;
/// The port of a pod whose connections its sidecar answers itself.
pub const SIDECAR_PORT: u16 = 9000;

/// What a relay is told when one of its connections was reset.
const RESET: [ErrorKind; 3] =
    [ErrorKind::ConnectionReset, ErrorKind::BrokenPipe, ErrorKind::NotConnected];

/// Bytes that a relay holds for each direction.
const HELD: usize = 64 << 10;

/// The Service address of pod `index`.
pub fn service(index: usize, v6: bool) -> SocketAddr {
    let number = u8::try_from(index + 10).unwrap_or(u8::MAX);
    let ip: IpAddr = if v6 {
        Ipv6Addr::new(0xfd96, 0, 0, 0, 0, 0, 0, number.into()).into()
    } else {
        Ipv4Addr::new(10, 96, 0, number).into()
    };
    SocketAddr::new(ip, APP_PORT)
}

/// The ports that someone listens on.
pub const SIDECAR: &[u16] = &[OUTBOUND, INBOUND];
/// The same for the app.
pub const APP: &[u16] = &[APP_PORT];

/// Listens on the ports, in the namespace and with the owner of the calling thread.
pub fn listen(ports: &[u16]) -> Result<Vec<(TcpListener, u16)>> {
    let mut listeners = Vec::new();
    for &port in ports {
        for ip in [IpAddr::from(Ipv4Addr::UNSPECIFIED), Ipv6Addr::UNSPECIFIED.into()] {
            let addr = SocketAddr::new(ip, port);
            let socket = Socket::new(Domain::for_address(addr), Type::STREAM, None)?;
            socket.set_reuse_address(true)?;
            if ip.is_ipv6() {
                socket.set_only_v6(true)?;
            }
            socket.set_nonblocking(true)?;
            socket.bind(&addr.into()).with_context(|| format!("binding to {addr}"))?;
            socket.listen(4096)?;
            listeners.push((TcpListener::from_std(socket.into()), port));
        }
    }
    Ok(listeners)
}

/// Serves until the traffic is to stop and no relay is left.
pub fn serve(mut listeners: Vec<(TcpListener, u16)>, traffic: &Arc<Traffic>) -> Result<()> {
    let mut poll = Poll::new().context("making an epoll")?;
    for (number, (listener, _)) in listeners.iter_mut().enumerate() {
        poll.registry().register(listener, Token(number), Interest::READABLE)?;
    }
    let mut events = Events::with_capacity(1024);
    let mut relays: HashMap<usize, Relay> = HashMap::new();
    // Two tokens for each relay.
    let mut next = listeners.len();
    let errors = |err: &io::Error| {
        if !RESET.contains(&err.kind()) {
            traffic.problem(format!("a relay: {err}"));
        }
    };
    while !traffic.is_over() {
        match poll.poll(&mut events, Some(Duration::from_millis(100))) {
            Err(err) if err.kind() == ErrorKind::Interrupted => continue,
            result => result?,
        }
        for event in &events {
            let Token(token) = event.token();
            if let Some((listener, port)) = listeners.get(token) {
                while let Some(stream) = accept(listener)? {
                    match answer(stream, *port, traffic, poll.registry(), next) {
                        Ok(Some(relay)) => {
                            relays.insert(next, relay);
                            next += 2;
                        }
                        Ok(None) => {}
                        Err(err) => errors(&err),
                    }
                }
                continue;
            }
            let number = token - (token - listeners.len()) % 2;
            let Some(relay) = relays.get_mut(&number) else { continue };
            match relay.pump() {
                Ok(false) => {}
                Ok(true) => drop(relays.remove(&number)),
                Err(err) => {
                    errors(&err);
                    relays.remove(&number).iter().for_each(Relay::abort);
                }
            }
        }
    }
    Ok(())
}

fn accept(listener: &TcpListener) -> io::Result<Option<TcpStream>> {
    loop {
        match listener.accept() {
            Ok((stream, _)) => return Ok(Some(stream)),
            Err(err) if err.kind() == ErrorKind::WouldBlock => return Ok(None),
            Err(err) if err.kind() == ErrorKind::ConnectionAborted => {}
            Err(err) => return Err(err),
        }
    }
}

/// Hands the connection to a server's end, or makes a relay of it.
fn answer(
    stream: TcpStream,
    port: u16,
    traffic: &Arc<Traffic>,
    registry: &Registry,
    number: usize,
) -> io::Result<Option<Relay>> {
    if port == APP_PORT {
        traffic.serve(stream.into());
        return Ok(None);
    }
    let target = original(&stream)?;
    if target.port() == SIDECAR_PORT {
        traffic.serve(stream.into());
        return Ok(None);
    }
    let (from, to) = if port == INBOUND {
        let localhost: IpAddr = match target {
            SocketAddr::V4(_) => Ipv4Addr::new(127, 0, 0, 6).into(),
            SocketAddr::V6(_) => Ipv6Addr::new(0, 0, 0, 0, 0, 0, 0, 6).into(),
        };
        (Some(localhost), target)
    } else {
        let to = traffic.pod_of(target).ok_or_else(|| {
            io::Error::other(format!("nobody dialled {target}, yet it is the destination"))
        })?;
        (None, to)
    };
    Relay::new(stream, from, to, registry, number).map(Some)
}

fn original(stream: &TcpStream) -> io::Result<SocketAddr> {
    Ok(match stream.local_addr()? {
        SocketAddr::V4(_) => {
            SocketAddr::V4(SockaddrIn::from(getsockopt(stream, OriginalDst)?).into())
        }
        SocketAddr::V6(_) => {
            SocketAddr::V6(SockaddrIn6::from(getsockopt(stream, Ip6tOriginalDst)?).into())
        }
    })
}

/// One way of a relay.
struct Way {
    held: Vec<u8>,
    written: usize,
    /// Its source has ended.
    ended: bool,
    /// That was passed on.
    passed: bool,
}

/// Two connections that are one.
struct Relay {
    sides: [TcpStream; 2],
    ways: [Way; 2],
}

impl Relay {
    fn new(
        stream: TcpStream,
        from: Option<IpAddr>,
        to: SocketAddr,
        registry: &Registry,
        number: usize,
    ) -> io::Result<Self> {
        let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
        socket.set_nonblocking(true)?;
        if let Some(ip) = from {
            socket.bind(&SocketAddr::new(ip, 0).into())?;
        }
        match socket.connect(&to.into()) {
            Err(err) if err.raw_os_error() == Some(nix::libc::EINPROGRESS) => {}
            result => result?,
        }
        let mut sides = [stream, TcpStream::from_std(socket.into())];
        for (side, stream) in sides.iter_mut().enumerate() {
            stream.set_nodelay(true)?;
            ask_when_idle(SockRef::from(&*stream), IDLE)?;
            let both = Interest::READABLE | Interest::WRITABLE;
            registry.register(stream, Token(number + side), both)?;
        }
        let way = || Way { held: Vec::new(), written: 0, ended: false, passed: false };
        Ok(Self { sides, ways: [way(), way()] })
    }

    /// Moves what can be moved; whether both ways have ended.
    fn pump(&mut self) -> io::Result<bool> {
        let mut moved = true;
        while moved {
            moved = false;
            for from in 0..2 {
                let (way, to) = (&mut self.ways[from], 1 - from);
                if way.held.is_empty() && !way.ended {
                    way.held.resize(HELD, 0);
                    let read = again(|| (&self.sides[from]).read(&mut way.held));
                    way.held.truncate(*read.as_ref().unwrap_or(&None).as_ref().unwrap_or(&0));
                    way.ended = read? == Some(0);
                    moved |= way.ended || !way.held.is_empty();
                }
                if !way.held.is_empty()
                    && let Some(n) = again(|| (&self.sides[to]).write(&way.held[way.written..]))?
                {
                    way.written += n;
                    moved = true;
                    if way.written == way.held.len() {
                        way.held.clear();
                        way.written = 0;
                    }
                }
                if way.ended && way.held.is_empty() && !way.passed {
                    self.sides[to].shutdown(Shutdown::Write)?;
                    way.passed = true;
                }
            }
        }
        Ok(self.ways.iter().all(|way| way.passed))
    }

    /// Resets both connections.
    fn abort(&self) {
        for side in &self.sides {
            let _ = SockRef::from(side).set_linger(Some(Duration::ZERO));
        }
    }
}

/// None: not now.
fn again(mut call: impl FnMut() -> io::Result<usize>) -> io::Result<Option<usize>> {
    loop {
        match call() {
            Ok(n) => return Ok(Some(n)),
            Err(err) if err.kind() == ErrorKind::WouldBlock => return Ok(None),
            Err(err) if err.kind() == ErrorKind::Interrupted => {}
            Err(err) => return Err(err),
        }
    }
}
