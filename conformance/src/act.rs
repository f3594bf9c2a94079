//! Does what a row says, and records what happens.

use std::io::{self, BufRead as _, BufReader, ErrorKind, IoSlice, IoSliceMut};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, SockaddrStorage, recvmsg, sendmsg};
use sidestep_lab::Seen;
use socket2::{Domain, Socket, Type};

use crate::observed::{Field, Observed};
use crate::row::{Act, Dial, Kind, Manner, Mesh, Place, Who};
use crate::validator;
use crate::world::Stage;

/// Does it once, with addresses of this kind; what takes longer than `patience` is a timeout.
pub fn perform(
    stage: &Stage<'_>,
    mesh: Mesh,
    act: &Act,
    kind: Kind,
    patience: Duration,
) -> Result<Vec<Observed>> {
    match act {
        Act::Tcp(dial) => Ok(vec![tcp(stage, mesh, dial, kind, patience)?]),
        Act::Udp { who, port, manner, source, .. } => {
            let targets: Vec<SocketAddr> = Stage::targets(act)
                .into_iter()
                .map(|place| stage.address(place, kind, *port, *who))
                .collect::<Result<_>>()?;
            let source = source.map(|place| stage.address(place, kind, 0, *who)).transpose()?;
            let answers = stage.run(mesh, *who, || udp(&targets, *manner, source, patience))??;
            Ok(answers.into_iter().map(|answer| answer.observed(stage)).collect())
        }
        Act::Validate => Ok(vec![validator::run(stage, mesh, kind)?]),
    }
}

fn tcp(
    stage: &Stage<'_>,
    mesh: Mesh,
    dial: &Dial,
    kind: Kind,
    patience: Duration,
) -> Result<Observed> {
    let target = stage.address(dial.to, kind, dial.port, dial.who)?;
    let source = dial.source.map(|place| stage.address(place, kind, 0, dial.who)).transpose()?;
    let maker = dial.maker.unwrap_or(dial.who);
    let socket = stage.run(mesh, maker, || make(target, source, dial))??;
    let (result, local, peer) = stage.run(mesh, dial.who, || greet(socket, target, patience))??;
    let with_port =
        |address: SocketAddr| format!("{}:{}", stage.name(address.ip()), address.port());
    let seen = match result {
        Ok(seen) => seen,
        Err(outcome) => return Ok(Observed::new(outcome)),
    };
    let mut observed = Observed::new(seen.by.as_deref().unwrap_or("?"))
        .with(Field::Source, stage.name(local.ip()))
        .with(Field::Dialled, with_port(peer))
        .with(Field::Listener, with_port(seen.local));
    // Translating must not change the client's port.
    let port = if seen.peer.port() == local.port() { "eph" } else { "other" };
    observed = observed.with(Field::Peer, format!("{}:{port}", stage.name(seen.peer.ip())));
    if seen.orig.is_some() || seen.orig6.is_some() {
        let orig = match seen.original() {
            Some(address) => with_port(address),
            None => "none".to_owned(),
        };
        observed = observed.with(Field::Orig, orig);
    }
    Ok(observed)
}

fn make(target: SocketAddr, source: Option<SocketAddr>, dial: &Dial) -> Result<Socket> {
    let socket = Socket::new(Domain::for_address(target), Type::STREAM, None)?;
    if let Some(device) = dial.device {
        socket.bind_device(Some(device.as_bytes())).with_context(|| format!("to {device}"))?;
    }
    if let Some(mark) = dial.mark {
        socket.set_mark(mark).context("marking a socket")?;
    }
    if let Some(source) = source {
        socket.bind(&source.into()).with_context(|| format!("binding to {source}"))?;
    }
    Ok(socket)
}

/// What the server said, or why there is none; and the client's own and its peer's address.
pub type Greeting = (Result<Seen, String>, SocketAddr, SocketAddr);

pub fn greet(socket: Socket, target: SocketAddr, patience: Duration) -> Result<Greeting> {
    if let Err(err) = socket.connect_timeout(&target.into(), patience) {
        return Ok((Err(error_name(&err)), target, target));
    }
    socket.set_read_timeout(Some(patience))?;
    let stream = TcpStream::from(socket);
    let (local, peer) = (stream.local_addr()?, stream.peer_addr()?);
    let mut line = String::new();
    let seen = match BufReader::new(&stream).read_line(&mut line) {
        Ok(0) => Err("closed".to_owned()),
        Ok(_) => Ok(line.trim_end().parse()?),
        Err(err) if err.kind() == ErrorKind::ConnectionReset => Err("closed".to_owned()),
        Err(err) => Err(error_name(&err)),
    };
    Ok((seen, local, peer))
}

fn error_name(err: &io::Error) -> String {
    match err.kind() {
        ErrorKind::ConnectionRefused => "refused".to_owned(),
        ErrorKind::TimedOut | ErrorKind::WouldBlock => "timeout".to_owned(),
        _ => err
            .raw_os_error()
            .map_or_else(|| err.to_string(), |raw| format!("{:?}", Errno::from_raw(raw))),
    }
}

/// What came back for a datagram.
struct UdpAnswer {
    result: Result<(SocketAddr, String), String>,
    /// getsockname and getpeername, of a connected socket.
    connected: Option<[SocketAddr; 2]>,
}

impl UdpAnswer {
    fn observed(&self, stage: &Stage<'_>) -> Observed {
        let with_port =
            |address: SocketAddr| format!("{}:{}", stage.name(address.ip()), address.port());
        let mut observed = match &self.result {
            Err(outcome) => Observed::new(outcome),
            Ok((from, text)) => {
                let (by, client) = text.split_once(' ').unwrap_or((text, ""));
                let peer = client.parse::<SocketAddr>().map(|client| stage.name(client.ip()));
                Observed::new(by)
                    .with(Field::From, with_port(*from))
                    .with(Field::Peer, peer.unwrap_or_else(|_| client.to_owned()))
            }
        };
        if let Some([source, dialled]) = self.connected {
            observed = observed
                .with(Field::Source, stage.name(source.ip()))
                .with(Field::Dialled, with_port(dialled));
        }
        observed
    }
}

/// Sends one datagram to each target, then waits for as many answers.
fn udp(
    targets: &[SocketAddr],
    manner: Manner,
    source: Option<SocketAddr>,
    patience: Duration,
) -> Result<Vec<UdpAnswer>> {
    let first = *targets.first().context("a target")?;
    let any = match first {
        SocketAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        SocketAddr::V6(_) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    };
    let socket = UdpSocket::bind(source.unwrap_or((any, 0).into()))?;
    socket.set_read_timeout(Some(patience))?;
    let mut connected = None;
    let sent: io::Result<()> = match manner {
        Manner::Connected => socket.connect(first).and_then(|()| {
            connected = Some([socket.local_addr()?, socket.peer_addr()?]);
            socket.send(b"?").map(drop)
        }),
        Manner::Unconnected | Manner::Several => {
            targets.iter().try_for_each(|target| socket.send_to(b"?", target).map(drop))
        }
        Manner::Message => {
            let to = SockaddrStorage::from(first);
            sendmsg(socket.as_raw_fd(), &[IoSlice::new(b"?")], &[], MsgFlags::empty(), Some(&to))
                .map(drop)
                .map_err(io::Error::from)
        }
    };
    if let Err(err) = sent {
        return Ok(vec![UdpAnswer { result: Err(error_name(&err)), connected }]);
    }
    let mut answers: Vec<UdpAnswer> = targets
        .iter()
        .map(|_| UdpAnswer {
            result: receive(&socket, manner).map_err(|err| error_name(&err)),
            connected,
        })
        .collect();
    // The order of arrival says nothing.
    answers.sort_by_key(|answer| {
        let from = answer.result.as_ref().ok().map(|(from, _)| from.ip().to_canonical());
        targets.iter().position(|target| Some(target.ip().to_canonical()) == from)
    });
    Ok(answers)
}

fn receive(socket: &UdpSocket, manner: Manner) -> io::Result<(SocketAddr, String)> {
    let mut buffer = [0; 512];
    let (length, from) = match manner {
        Manner::Message => {
            let mut parts = [IoSliceMut::new(&mut buffer)];
            let flags = MsgFlags::empty();
            let got = recvmsg::<SockaddrStorage>(socket.as_raw_fd(), &mut parts, None, flags)?;
            let length = got.bytes;
            let from = got.address.and_then(|address| {
                let v4 = address.as_sockaddr_in().map(|sin| SocketAddr::V4((*sin).into()));
                v4.or_else(|| address.as_sockaddr_in6().map(|sin| SocketAddr::V6((*sin).into())))
            });
            (length, from.ok_or(ErrorKind::InvalidData)?)
        }
        Manner::Connected | Manner::Unconnected | Manner::Several => {
            socket.recv_from(&mut buffer)?
        }
    };
    Ok((from, String::from_utf8_lossy(&buffer[..length]).into_owned()))
}

/// The name of what a row dials, with its port.
pub fn target_name(stage: &Stage<'_>, place: Place, kind: Kind, port: u16) -> Result<String> {
    let address = stage.address(place, kind, port, Who::App)?;
    Ok(format!("{}:{port}", stage.name(address.ip())))
}
