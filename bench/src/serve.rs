//! The loop of the parts that serve: the application and the bare relay. One thread, non-blocking
//! sockets.

use std::io::{self, ErrorKind};
use std::net::SocketAddr;

use anyhow::{Context, Result};
use mio::event::Event;
use mio::net::{TcpListener, TcpStream};
use mio::{Events, Interest, Poll, Registry, Token};

/// What is done with connections. Their sockets have numbers, from 0 on.
pub trait Connections {
    /// What a listener is for.
    type Kind: Copy;

    /// A connection has come. What was wrong with this one is for the log alone.
    fn add(&mut self, stream: TcpStream, kind: Self::Kind, sockets: &Sockets<'_>) -> Result<()>;

    /// Something has happened to a socket, which may be gone already.
    fn go_on(&mut self, number: usize, event: &Event);
}

/// Where sockets are waited for.
pub struct Sockets<'a> {
    registry: &'a Registry,
    first: usize,
}

impl Sockets<'_> {
    /// Waits for a socket from now on, under that number.
    pub fn register(&self, stream: &mut TcpStream, number: usize) -> io::Result<()> {
        let interest = Interest::READABLE | Interest::WRITABLE;
        self.registry.register(stream, Token(self.first + number), interest)
    }
}

/// Listens on these addresses. Returns only when it fails.
pub fn serve<C: Connections>(
    addrs: impl IntoIterator<Item = (SocketAddr, C::Kind)>,
    connections: &mut C,
) -> Result<()> {
    let mut poll = Poll::new().context("making an epoll")?;
    let mut listeners = Vec::new();
    for (number, (addr, kind)) in addrs.into_iter().enumerate() {
        let mut listener =
            TcpListener::bind(addr).with_context(|| format!("listening on {addr}"))?;
        poll.registry().register(&mut listener, Token(number), Interest::READABLE)?;
        listeners.push((listener, kind));
    }
    let mut events = Events::with_capacity(1024);
    loop {
        match poll.poll(&mut events, None) {
            Err(err) if err.kind() == ErrorKind::Interrupted => continue,
            result => result?,
        }
        // First what is open: a number that becomes free may be given again below.
        for event in &events {
            if let Some(number) = event.token().0.checked_sub(listeners.len()) {
                connections.go_on(number, event);
            }
        }
        let sockets = Sockets { registry: poll.registry(), first: listeners.len() };
        for event in &events {
            let Some((listener, kind)) = listeners.get(event.token().0) else { continue };
            while let Some(stream) = accept(listener)? {
                if let Err(err) = connections.add(stream, *kind, &sockets) {
                    eprintln!("{err:#}");
                }
            }
        }
    }
}

/// The next connection, if one waits.
fn accept(listener: &TcpListener) -> io::Result<Option<TcpStream>> {
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                // A peer that is gone already is noticed at the first read.
                let _ = stream.set_nodelay(true);
                return Ok(Some(stream));
            }
            Err(err) if err.kind() == ErrorKind::WouldBlock => return Ok(None),
            Err(err)
                if matches!(err.kind(), ErrorKind::ConnectionAborted | ErrorKind::Interrupted) => {}
            Err(err) => return Err(err),
        }
    }
}
