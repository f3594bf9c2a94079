//! TCP servers: one thread with epoll, thousands of connections.

use std::collections::HashMap;
use std::io::{self, ErrorKind, Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener as StdListener};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use mio::net::{TcpListener, TcpStream};
use mio::{Events, Interest, Poll, Token, Waker};
use socket2::{Domain, SockRef, Socket, Type};

use crate::netns;
use crate::pod::Pod;
use crate::seen::Seen;
use crate::wait::wait_for;

const WAKE: Token = Token(usize::MAX);

/// How a server speaks. All of them echo what they receive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Talk {
    /// Says nothing first. Answers `GET` with the line of [`Seen`] as an HTTP body.
    Echo,
    /// Greets with a line: peer and local address.
    Greet,
    /// Greets with a line: original destinations, peer and local address.
    OriginalDst,
    /// Like `OriginalDst`, but as Linkerd's proxy does it: asks by the family of the accepted
    /// socket alone, and hangs up without a word when the kernel does not answer.
    OriginalDstOrHangUp,
}

/// The settings of a server.
#[derive(Clone, Debug)]
pub struct ServeOpts {
    /// Where to listen. A port 0 means any.
    pub listen: Vec<SocketAddr>,
    /// The protocol that it speaks.
    pub talk: Talk,
    /// What it calls itself in its greeting; empty: nothing.
    pub name: &'static str,
    /// The owner of the sockets.
    pub uid: u32,
    /// The group of the sockets.
    pub gid: u32,
    /// SO_REUSEPORT on the listeners.
    pub reuse_port: bool,
    /// IPV6_V6ONLY on IPv6 listeners; without it `[::]` takes IPv4 too, as `::ffff:a.b.c.d`.
    pub v6_only: bool,
}

impl ServeOpts {
    /// Greets on these addresses, as root.
    pub fn on(listen: impl IntoIterator<Item = SocketAddr>) -> Self {
        Self {
            listen: listen.into_iter().collect(),
            talk: Talk::Greet,
            name: "",
            uid: 0,
            gid: 0,
            reuse_port: false,
            v6_only: true,
        }
    }
}

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    open: AtomicUsize,
    seen: Mutex<Vec<Seen>>,
}

/// A running server. Stops, closing all its sockets, on drop.
pub struct Server {
    addrs: Vec<SocketAddr>,
    shared: Arc<Shared>,
    waker: Arc<Waker>,
    thread: Option<JoinHandle<io::Result<()>>>,
}

impl Server {
    /// Starts a server in a thread inside the pod. It listens when this returns.
    pub fn start(pod: &Pod, opts: ServeOpts) -> Result<Self> {
        let netns = pod.netns();
        Self::launch(opts, move |opts| netns::enter(&netns, opts.uid, opts.gid))
    }

    /// Starts a server in the namespace of the calling thread, such as inside
    /// [`crate::Lab::on_node`] or in a process of its own. The uid and gid are not used.
    pub fn start_here(opts: ServeOpts) -> Result<Self> {
        Self::launch(opts, |_| Ok(()))
    }

    fn launch(
        opts: ServeOpts,
        enter: impl FnOnce(&ServeOpts) -> Result<()> + Send + 'static,
    ) -> Result<Self> {
        ensure!(!opts.listen.is_empty(), "a server needs an address to listen on");
        let poll = Poll::new().context("making an epoll")?;
        let waker = Arc::new(Waker::new(poll.registry(), WAKE).context("making a waker")?);
        let shared = Arc::new(Shared::default());
        let (report, ready) = mpsc::channel();
        let theirs = shared.clone();
        let thread = thread::Builder::new()
            .name("server".to_owned())
            .spawn(move || {
                let bound = enter(&opts).and_then(|()| bind(&poll, &opts));
                let (listeners, addrs) = match bound {
                    Ok(bound) => bound.into_iter().unzip(),
                    Err(err) => {
                        let _ = report.send(Err(err));
                        return Ok(());
                    }
                };
                let _ = report.send(Ok(addrs));
                Loop { poll, talk: opts.talk, name: opts.name, listeners, shared: theirs }.run()
            })
            .context("starting a thread")?;
        let addrs: Vec<SocketAddr> = ready.recv().context("the server's thread ended")??;
        Ok(Self { addrs, shared, waker, thread: Some(thread) })
    }

    /// The first address that it listens on, with its real port.
    pub fn addr(&self) -> SocketAddr {
        self.addrs[0]
    }

    /// What it saw of all connections so far, in the order of their coming.
    pub fn seen(&self) -> Vec<Seen> {
        self.shared.seen.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Waits until `n` connections have come, up to fifteen seconds, and gives what it saw.
    pub fn wait_seen(&self, n: usize) -> Result<Vec<Seen>> {
        let what = format!("{n} connections to {}", self.addr());
        wait_for(&what, Duration::from_secs(15), || {
            let seen = self.seen();
            (seen.len() >= n).then_some(seen)
        })
    }

    /// How many connections are open now.
    pub fn open(&self) -> usize {
        self.shared.open.load(Ordering::Relaxed)
    }

    /// Forgets what it saw.
    pub fn clear(&self) {
        self.shared.seen.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        let _ = self.waker.wake();
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(Err(err))) => eprintln!("lab: the server on {}: {err}", self.addrs[0]),
            Some(Err(_)) => eprintln!("lab: the server on {} panicked", self.addrs[0]),
            _ => {}
        }
    }
}

fn bind(poll: &Poll, opts: &ServeOpts) -> Result<Vec<(TcpListener, SocketAddr)>> {
    opts.listen
        .iter()
        .enumerate()
        .map(|(number, addr)| {
            let listener = listen(*addr, opts).with_context(|| format!("listening on {addr}"))?;
            let real = listener.local_addr()?;
            let mut listener = TcpListener::from_std(listener);
            poll.registry().register(&mut listener, Token(number), Interest::READABLE)?;
            Ok((listener, real))
        })
        .collect()
}

fn listen(addr: SocketAddr, opts: &ServeOpts) -> io::Result<StdListener> {
    let socket = Socket::new(Domain::for_address(addr), Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(opts.reuse_port)?;
    if addr.is_ipv6() {
        socket.set_only_v6(opts.v6_only)?;
    }
    socket.set_nonblocking(true)?;
    socket.bind(&addr.into())?;
    socket.listen(4096)?;
    Ok(socket.into())
}

struct Loop {
    poll: Poll,
    talk: Talk,
    name: &'static str,
    listeners: Vec<TcpListener>,
    shared: Arc<Shared>,
}

impl Loop {
    fn run(mut self) -> io::Result<()> {
        let mut events = Events::with_capacity(1024);
        let mut conns = HashMap::new();
        let mut next = self.listeners.len();
        let mut buffer = vec![0; 64 << 10];
        while !self.shared.stop.load(Ordering::Relaxed) {
            match self.poll.poll(&mut events, None) {
                Err(err) if err.kind() == ErrorKind::Interrupted => continue,
                result => result?,
            }
            for event in &events {
                let Token(number) = event.token();
                if let Some(listener) = self.listeners.get(number) {
                    // Until it would block: events only tell of changes.
                    loop {
                        let (stream, peer) = match listener.accept() {
                            Ok(accepted) => accepted,
                            Err(err) if err.kind() == ErrorKind::WouldBlock => break,
                            Err(err) if err.kind() == ErrorKind::ConnectionAborted => continue,
                            Err(err) => return Err(err),
                        };
                        let Ok(mut conn) = Conn::new(stream, peer, self.talk, self.name) else {
                            continue;
                        };
                        self.shared
                            .seen
                            .lock()
                            .unwrap_or_else(PoisonError::into_inner)
                            .push(conn.seen.clone());
                        self.poll.registry().register(
                            &mut conn.stream,
                            Token(next),
                            Interest::READABLE | Interest::WRITABLE,
                        )?;
                        conns.insert(next, conn);
                        next += 1;
                    }
                } else if let Some(conn) = conns.get_mut(&number)
                    && conn.pump(&mut buffer).is_err()
                {
                    conns.remove(&number);
                }
                self.shared.open.store(conns.len(), Ordering::Relaxed);
            }
        }
        // A child that another thread is just starting has copies of these until it executes:
        // closing alone would leave the ports taken for that time.
        for listener in &self.listeners {
            SockRef::from(listener).shutdown(Shutdown::Both)?;
        }
        Ok(())
    }
}

struct Conn {
    stream: TcpStream,
    seen: Seen,
    /// Whether `GET` may still come.
    http: bool,
    out: Vec<u8>,
    written: usize,
    ending: bool,
}

impl Conn {
    fn new(
        stream: TcpStream,
        peer: SocketAddr,
        talk: Talk,
        name: &'static str,
    ) -> io::Result<Self> {
        stream.set_nodelay(true)?;
        let by = (!name.is_empty()).then(|| name.to_owned());
        let mut seen = Seen { by, peer, local: stream.local_addr()?, orig: None, orig6: None };
        match talk {
            Talk::OriginalDst => seen.ask_original(&stream),
            Talk::OriginalDstOrHangUp => seen.insist_on_original(&stream)?,
            Talk::Echo | Talk::Greet => {}
        }
        let http = talk == Talk::Echo;
        let out = if http { Vec::new() } else { format!("{seen}\n").into_bytes() };
        Ok(Self { stream, seen, http, out, written: 0, ending: false })
    }

    /// Writes and reads as long as either goes on. An error, also the regular end of the
    /// connection, means that it is over.
    fn pump(&mut self, buffer: &mut [u8]) -> io::Result<()> {
        loop {
            while self.written < self.out.len() {
                match self.stream.write(&self.out[self.written..]) {
                    Ok(n) => self.written += n,
                    Err(err) if err.kind() == ErrorKind::WouldBlock => return Ok(()),
                    Err(err) if err.kind() == ErrorKind::Interrupted => {}
                    Err(err) => return Err(err),
                }
            }
            self.out.clear();
            self.written = 0;
            if self.ending {
                self.stream.shutdown(Shutdown::Write)?;
                return Err(ErrorKind::UnexpectedEof.into());
            }
            match self.stream.read(buffer) {
                Ok(0) => self.ending = true,
                Ok(n) => self.answer(&buffer[..n]),
                Err(err) if err.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(err) if err.kind() == ErrorKind::Interrupted => {}
                Err(err) => return Err(err),
            }
        }
    }

    fn answer(&mut self, data: &[u8]) {
        if self.http && data.starts_with(b"GET ") {
            let body = format!("{}\n", self.seen);
            let head = format!("content-length: {}\r\nconnection: close", body.len());
            self.out = format!("HTTP/1.1 200 OK\r\n{head}\r\n\r\n{body}").into_bytes();
            self.ending = true;
        } else {
            self.out.extend_from_slice(data);
        }
        self.http = false;
    }
}
