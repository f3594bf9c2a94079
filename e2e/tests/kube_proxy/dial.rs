//! Many dials at a time, and what became of each.

use std::{
    io::{self, ErrorKind},
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use sidestep_lab::{Seen, slowdown};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::{
    net::{TcpSocket, UdpSocket},
    runtime,
    sync::Semaphore,
    time::timeout,
};

use super::common::mapped;

/// Who says nothing for so long is silent.
pub const PATIENCE: Duration = Duration::from_millis(400);
/// The kernel drops an ICMP error that comes while the socket is in the system call, which it does
/// where the rule is on the same machine: TCP is told when it sends its SYN again, after a second.
pub const RETRANSMISSION: Duration = Duration::from_millis(1500);
/// So many at a time: what waits for its turn is not silent.
const AT_A_TIME: usize = 64;

/// How a process asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Way {
    /// TCP.
    Tcp,
    /// UDP, by a connected socket.
    Udp,
    /// UDP, by an unconnected one.
    SendTo,
}

/// One dial.
#[derive(Clone, Copy, Debug)]
pub struct Dial {
    pub to: SocketAddr,
    pub way: Way,
    /// An IPv4 address by an AF_INET6 socket.
    pub mapped: bool,
}

impl Dial {
    /// Which socket it takes: of IPv6, of TCP.
    pub fn socket(&self) -> (bool, bool) {
        (self.mapped || self.to.is_ipv6(), self.way == Way::Tcp)
    }
}

/// What became of a dial.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Outcome {
    /// Which server answered, at which port, and whom it saw.
    Answered { by: String, port: u16, saw: IpAddr },
    /// ECONNREFUSED.
    Refused,
    /// Nobody says anything.
    Silent,
    /// EPERM: what a rule drops on its way out of the sender's own namespace.
    Dropped,
    /// The endpoint of a connected UDP socket is gone (row 20): ECONNABORTED where it waits, and
    /// EDESTADDRREQ where it sends.
    Aborted,
    /// Anything else.
    Odd(String),
}

/// A socket of the calling thread's namespace.
pub fn socket((v6, tcp): (bool, bool)) -> io::Result<Socket> {
    let domain = if v6 { Domain::IPV6 } else { Domain::IPV4 };
    let (kind, protocol) =
        if tcp { (Type::STREAM, Protocol::TCP) } else { (Type::DGRAM, Protocol::UDP) };
    let socket = Socket::new(domain, kind, Some(protocol))?;
    socket.set_nonblocking(true)?;
    if tcp {
        // No TIME_WAIT, neither in the kernel's table nor in conntrack's.
        socket.set_linger(Some(Duration::ZERO))?;
    }
    Ok(socket)
}

/// Dials them all, each with the socket that `take` has for it, and gives the outcomes in order.
pub fn dial_all(
    dials: &[Dial],
    patience: Duration,
    mut take: impl FnMut((bool, bool)) -> io::Result<Socket>,
) -> Vec<Outcome> {
    let runtime = runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let turns = Arc::new(Semaphore::new(AT_A_TIME));
    runtime.block_on(async {
        let mut running = Vec::new();
        for dial in dials.iter().copied() {
            let turn = Arc::clone(&turns).acquire_owned().await.expect("a turn");
            let socket = take(dial.socket()).expect("a socket");
            running.push(tokio::spawn(async move {
                let outcome = match timeout(patience * slowdown(), ask(socket, dial)).await {
                    Err(_) => Outcome::Silent,
                    Ok(Err(error)) => match error.kind() {
                        ErrorKind::ConnectionRefused => Outcome::Refused,
                        ErrorKind::PermissionDenied => Outcome::Dropped,
                        ErrorKind::ConnectionAborted => Outcome::Aborted,
                        _ if error.raw_os_error() == Some(libc::EDESTADDRREQ) => Outcome::Aborted,
                        _ => Outcome::Odd(error.to_string()),
                    },
                    Ok(Ok((text, from))) => answered(&text, from, dial),
                };
                drop(turn);
                outcome
            }));
        }
        let mut outcomes = Vec::new();
        for one in running {
            outcomes.push(one.await.expect("a dial"));
        }
        outcomes
    })
}

/// What the server says, and where the caller is told that this comes from.
async fn ask(socket: Socket, dial: Dial) -> io::Result<(String, SocketAddr)> {
    let to = if dial.mapped { mapped(dial.to) } else { dial.to };
    let mut buffer = [0; 256];
    if dial.way == Way::Tcp {
        let stream = TcpSocket::from_std_stream(socket.into()).connect(to).await?;
        let mut text = String::new();
        while !text.ends_with('\n') {
            stream.readable().await?;
            match stream.try_read(&mut buffer) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(n) => text += &String::from_utf8_lossy(&buffer[..n]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
        return Ok((text, stream.peer_addr()?));
    }
    let socket = UdpSocket::from_std(socket.into())?;
    let (n, from) = if dial.way == Way::Udp {
        socket.connect(to).await?;
        socket.send(b"?").await?;
        (socket.recv(&mut buffer).await?, socket.peer_addr()?)
    } else {
        socket.send_to(b"?", to).await?;
        socket.recv_from(&mut buffer).await?
    };
    Ok((String::from_utf8_lossy(&buffer[..n]).into_owned(), from))
}

fn answered(text: &str, from: SocketAddr, dial: Dial) -> Outcome {
    let from = SocketAddr::new(from.ip().to_canonical(), from.port());
    if from != dial.to {
        return Outcome::Odd(format!("an answer of {from}"));
    }
    match text.trim_end().parse::<Seen>() {
        Ok(Seen { by: Some(by), peer, local, .. }) => {
            Outcome::Answered { by, port: local.port(), saw: peer.ip().to_canonical() }
        }
        _ => Outcome::Odd(format!("the answer {text:?}")),
    }
}
