//! Calls, and how long they take.

use std::{
    fs,
    io::{Read, Write},
    net::{IpAddr, SocketAddr, TcpStream, UdpSocket},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::resource::{UsageWho, getrusage};
use serde::Serialize;
use sidestep_figures::Spread;
use socket2::SockRef;

/// Longer than any answer takes.
const PATIENCE: Duration = Duration::from_secs(2);

/// Connects, and reads the byte that the server sends.
pub fn first_byte(target: SocketAddr) -> Result<u8> {
    let mut stream = TcpStream::connect_timeout(&target, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut byte = [0];
    stream.read_exact(&mut byte)?;
    reset(&stream)?;
    Ok(byte[0])
}

/// Whether a server answers, and whether the kernel has the connection as one to an endpoint, which
/// is what the socket layer makes of it.
pub fn reaches(target: SocketAddr, by_socket: bool) -> Result<bool> {
    let mut stream = TcpStream::connect_timeout(&target, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.read_exact(&mut [0])?;
    let port = format!(":{:04X}", stream.local_addr()?.port());
    let IpAddr::V4(ip) = target.ip() else { bail!("{target} is not IPv4") };
    let dialled = format!("{:08X}:{:04X}", u32::from_le_bytes(ip.octets()), target.port());
    let all = fs::read_to_string("/proc/thread-self/net/tcp")?;
    let mut rows = all.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let row = rows.find(|row| row.get(1).is_some_and(|local| local.ends_with(&port)));
    let to_endpoint = row.is_some_and(|row| row.get(2).is_some_and(|peer| *peer != dialled));
    reset(&stream)?;
    Ok(!by_socket || to_endpoint)
}

/// Leaves no connection in TIME_WAIT.
fn reset(stream: &TcpStream) -> Result<()> {
    Ok(SockRef::from(stream).set_linger(Some(Duration::ZERO))?)
}

/// Tries without pause.
pub fn spin<T>(patience: Duration, mut attempt: impl FnMut() -> Option<T>) -> Result<T> {
    let start = Instant::now();
    loop {
        if let Some(value) = attempt() {
            return Ok(value);
        }
        ensure!(start.elapsed() < patience, "waited in vain");
    }
}

/// What calls of one kind took.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Took {
    /// Median, in microseconds.
    pub p50_us: f64,
    /// CPU time of the client's thread for each, softirqs on its back included, in microseconds.
    pub cpu_us: f64,
}

/// Makes a call so many times; what it leaves is dropped after it was timed.
fn time<T>(count: usize, mut call: impl FnMut() -> Result<T>) -> Result<Took> {
    for _ in 0..count / 10 {
        call()?;
    }
    let cpu = cpu()?;
    let mut took = Vec::with_capacity(count);
    for _ in 0..count {
        let start = Instant::now();
        let left = call()?;
        took.push(start.elapsed().as_secs_f64() * 1e6);
        drop(left);
    }
    let cpu_us = (self::cpu()? - cpu).as_secs_f64() * 1e6 / count as f64;
    Ok(Took { p50_us: Spread::of(took).context("no calls")?.median, cpu_us })
}

fn cpu() -> Result<Duration> {
    let usage = getrusage(UsageWho::RUSAGE_THREAD)?;
    let of = |time: nix::sys::time::TimeVal| {
        Duration::from_secs(time.tv_sec().unsigned_abs())
            + Duration::from_micros(time.tv_usec().unsigned_abs())
    };
    Ok(of(usage.user_time()) + of(usage.system_time()))
}

/// connect() alone.
pub fn connects(target: SocketAddr, count: usize) -> Result<Took> {
    time(count, || {
        let stream = TcpStream::connect(target)?;
        reset(&stream)?;
        Ok(stream)
    })
}

/// Short connections: connect, ask, answer, close.
pub fn short(target: SocketAddr, count: usize) -> Result<Took> {
    time(count, || {
        let mut stream = TcpStream::connect(target)?;
        stream.write_all(&[1; 64])?;
        stream.read_exact(&mut [0; 64])?;
        reset(&stream)
    })
}

/// Questions on one connection.
pub fn kept_alive(target: SocketAddr, count: usize) -> Result<Took> {
    let mut stream = TcpStream::connect(target)?;
    stream.set_nodelay(true)?;
    time(count, || {
        stream.write_all(&[1; 64])?;
        Ok(stream.read_exact(&mut [0; 64])?)
    })
}

/// Datagrams by a socket that is not connected, as resolvers of some libraries send them.
pub fn datagrams(target: SocketAddr, count: usize) -> Result<Took> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    socket.set_read_timeout(Some(PATIENCE))?;
    time(count, || {
        socket.send_to(&[1; 64], target)?;
        let (_, from) = socket.recv_from(&mut [0; 64])?;
        ensure!(from == target, "an answer from {from}");
        Ok(())
    })
}
