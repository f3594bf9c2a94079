//! Simple clients. They use the namespace and the owner of the calling thread: call them
//! inside [`crate::Pod::run`] or [`crate::Lab::on_node`].

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use socket2::{Domain, Socket, Type};

use crate::seen::Seen;
use crate::wait::slowdown;

fn timeout() -> Duration {
    Duration::from_secs(3) * slowdown()
}

/// What a client learned from one connection.
#[derive(Clone, Debug)]
pub struct Answer {
    /// Its own address, from getsockname().
    pub local: SocketAddr,
    /// Its peer's address, from getpeername().
    pub peer: SocketAddr,
    /// What the server saw.
    pub seen: Seen,
}

/// Connects, optionally from a given address, with timeouts of three seconds on everything.
pub fn connect(target: SocketAddr, source: Option<IpAddr>) -> Result<TcpStream> {
    let socket = Socket::new(Domain::for_address(target), Type::STREAM, None)?;
    if let Some(ip) = source {
        socket.bind(&SocketAddr::new(ip, 0).into()).with_context(|| format!("binding to {ip}"))?;
    }
    socket
        .connect_timeout(&target.into(), timeout())
        .with_context(|| format!("connecting to {target}"))?;
    socket.set_read_timeout(Some(timeout()))?;
    socket.set_write_timeout(Some(timeout()))?;
    Ok(socket.into())
}

/// Connects and reads the server's greeting.
pub fn ask(target: SocketAddr, source: Option<IpAddr>) -> Result<Answer> {
    let stream = connect(target, source)?;
    let (local, peer) = (stream.local_addr()?, stream.peer_addr()?);
    let mut line = String::new();
    BufReader::new(&stream)
        .read_line(&mut line)
        .with_context(|| format!("reading what {target} greets with"))?;
    ensure!(!line.is_empty(), "{target} closed the connection before it said anything");
    Ok(Answer { local, peer, seen: line.trim_end().parse()? })
}

/// Asks a server of [`crate::Talk::Echo`] by HTTP for what it sees.
pub fn http_get(target: SocketAddr) -> Result<Answer> {
    let mut stream = connect(target, None)?;
    let (local, peer) = (stream.local_addr()?, stream.peer_addr()?);
    write!(stream, "GET / HTTP/1.1\r\nHost: {target}\r\nConnection: close\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text).with_context(|| format!("reading from {target}"))?;
    let (head, body) = text.split_once("\r\n\r\n").context("no HTTP answer")?;
    ensure!(head.starts_with("HTTP/1.1 200 "), "{target} answered {head:?}");
    Ok(Answer { local, peer, seen: body.trim_end().parse()? })
}
