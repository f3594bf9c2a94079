//! Connections that are spliced, and the same ones that are not.

use std::{
    fmt::Debug,
    io::{self, ErrorKind, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    os::fd::{AsFd, AsRawFd},
    panic::{self, AssertUnwindSafe},
    thread,
    time::{Duration, Instant},
};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use serde_json::Value;
use sidestep_lab::{Agent, Lab, Pod, PodNet, wait_until};
use socket2::SockRef;

use super::{APP, PROXY, REMOTE4, addr, annotated, binary, ip, patience};

/// Bytes of a message that goes by TCP where the queue is empty.
pub const LARGE: usize = 40 << 10;

/// Messages of which, unread, the first ones are in the queue and the last one is in TCP.
pub const SEAM: [usize; 3] = [6, 60_000, 20_000];

/// Messages each way that make a connection worth splicing: `SPLICE_TALK` of bpf/splice/mark.h, and
/// one more, for what is known of a message is known when it is acknowledged.
pub const TALK: usize = 16 + 1;

/// Keeps a pod's connections on TCP.
pub const OPT_OUT: &str = "sidestep.io/splice";

/// Where a connection runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Leg {
    /// From the sidecar of pod a to that of pod b.
    Sidecar,
    /// From the app of pod a to its sidecar.
    App,
    /// As `Sidecar`, to a pod that has opted out: plain TCP.
    PlainSidecar,
    /// As `App`, of a pod that has opted out: plain TCP.
    PlainApp,
}

impl Leg {
    pub fn is_plain(self) -> bool {
        matches!(self, Self::PlainSidecar | Self::PlainApp)
    }
}

/// A connection's two ends, non-blocking.
#[derive(Debug)]
pub struct Pair {
    pub client: TcpStream,
    pub server: TcpStream,
}

/// A node whose agent splices. Fields are dropped in this order.
pub struct Splicing {
    pub agent: Agent,
    pub a: Pod,
    pub b: Pod,
    pub c: Pod,
    outbound: [TcpListener; 2],
    inbound: [TcpListener; 2],
    pub lab: Lab,
}

impl Splicing {
    /// With pods a and b enrolled, and c, which has opted out. No message goes by TCP for the
    /// connection's sake alone.
    pub fn start(tag: &str, mode: &str) -> Self {
        Self::start_refreshing(tag, mode, 3600)
    }

    /// As `start`; after so many seconds a message goes by TCP.
    pub fn start_refreshing(tag: &str, mode: &str, seconds: u32) -> Self {
        let lab = Lab::new(tag).expect("a lab");
        let [a, b, c] = ["a", "b", "c"].map(|name| lab.pod(name, PodNet::DUAL).expect("a pod"));
        let flags = ["--splice", mode, "--splice-refresh", &seconds.to_string()];
        let mut agent = Agent::start_flags(binary(), &lab, &flags).expect("the agent");
        agent.add_pod(&a).expect("manifest a");
        agent.add_pod(&b).expect("manifest b");
        agent.add_manifest("c", &annotated(c.manifest(), OPT_OUT, "disabled")).expect("manifest c");
        for pod in [&a, &b, &c] {
            agent.wait_enrolled(pod).expect("enrolled");
        }
        let outbound = [&a, &c].map(|pod| listen(pod, addr([0, 0, 0, 0], 15001)));
        let inbound = [&b, &c].map(|pod| listen(pod, addr([0, 0, 0, 0], 15006)));
        Self { agent, a, b, c, outbound, inbound, lab }
    }

    /// Who dials what as whom, and who accepts at which listener.
    fn ends(&self, leg: Leg) -> (&Pod, u32, SocketAddr, &Pod, &TcpListener) {
        let (a, b, c) = (&self.a, &self.b, &self.c);
        let remote = addr(ip(REMOTE4), 80);
        match leg {
            Leg::Sidecar => (a, PROXY, addr(b.ipv4(), 9000), b, &self.inbound[0]),
            Leg::PlainSidecar => (a, PROXY, addr(c.ipv4(), 9000), c, &self.inbound[1]),
            Leg::App => (a, APP, remote, a, &self.outbound[0]),
            Leg::PlainApp => (c, APP, remote, c, &self.outbound[1]),
        }
    }

    /// A connection that has talked enough; it is not spliced yet.
    pub fn connect(&self, leg: Leg) -> Pair {
        self.connect_by(leg, |target| TcpStream::connect(target).expect("connected"))
    }

    /// As `connect`, by other means; non-blocking.
    pub fn connect_by(&self, leg: Leg, by: impl FnOnce(SocketAddr) -> TcpStream + Send) -> Pair {
        self.connect_blocking(leg, by).non_blocking()
    }

    /// As `connect_by`, and nothing was said on it yet.
    pub fn connect_silent(
        &self,
        leg: Leg,
        by: impl FnOnce(SocketAddr) -> TcpStream + Send,
    ) -> Pair {
        self.connect_as(PROXY, leg, by).non_blocking()
    }

    /// As `connect_by`, and blocking.
    pub fn connect_blocking(
        &self,
        leg: Leg,
        by: impl FnOnce(SocketAddr) -> TcpStream + Send,
    ) -> Pair {
        self.connect_as(PROXY, leg, by).talk()
    }

    /// As `connect_by`, accepted by another user than the sidecar's.
    pub fn connect_accepted_by(
        &self,
        user: u32,
        leg: Leg,
        by: impl FnOnce(SocketAddr) -> TcpStream + Send,
    ) -> Pair {
        self.connect_as(user, leg, by).talk().non_blocking()
    }

    fn connect_as(
        &self,
        user: u32,
        leg: Leg,
        by: impl FnOnce(SocketAddr) -> TcpStream + Send,
    ) -> Pair {
        let client = self.dial(leg, by);
        Pair { client, server: self.accept(leg, user) }
    }

    /// The client's end, which `accept` has the other one of.
    pub fn dial(&self, leg: Leg, by: impl FnOnce(SocketAddr) -> TcpStream + Send) -> TcpStream {
        let (from, uid, target, ..) = self.ends(leg);
        let client = from.run(uid, uid, || by(target)).expect("runs");
        client.set_nodelay(true).expect("TCP_NODELAY");
        client
    }

    pub fn accept(&self, leg: Leg, user: u32) -> TcpStream {
        let (.., pod, listener) = self.ends(leg);
        let accept = || listener.accept().expect("accepted").0;
        let server = pod.run(user, user, accept).expect("runs");
        server.set_nodelay(true).expect("TCP_NODELAY");
        server
    }

    /// So many connections, which are spliced when this returns, unless they are plain.
    pub fn pairs(&self, leg: Leg, count: usize) -> Vec<Pair> {
        let connect = || (0..count).map(|_| self.connect(leg)).collect();
        if leg.is_plain() {
            return connect();
        }
        // All that ever were: one that was closed may be there for a moment yet.
        let all = self.counter("splice_sockets") + 2 * count as u64;
        let pairs: Vec<Pair> = connect();
        self.wait_spliced(all);
        let redirected = self.counter("splice_messages");
        pairs.iter().for_each(Pair::prime);
        let more = self.counter("splice_messages") - redirected;
        assert_eq!(more, 2 * count as u64, "redirected messages: {}", self.status());
        pairs
    }

    /// One connection as of `pairs`.
    pub fn pair(&self, leg: Leg) -> Pair {
        self.pairs(leg, 1).remove(0)
    }

    pub fn status(&self) -> Value {
        self.agent.status().expect("status")
    }

    /// How many sockets are spliced now.
    pub fn sockets(&self) -> usize {
        let status = self.status();
        let sockets = status["splice"]["sockets"].as_u64();
        sockets.unwrap_or_else(|| panic!("no number of sockets: {status}")) as usize
    }

    pub fn wait_sockets(&self, count: usize) {
        self.wait(&format!("{count} spliced sockets"), || self.sockets() == count);
    }

    /// Waits until so many sockets have been spliced; some may have left again.
    pub fn wait_spliced(&self, count: u64) {
        let what = format!("{count} sockets that were spliced");
        self.wait(&what, || self.counter("splice_sockets") >= count);
    }

    fn wait(&self, what: &str, condition: impl FnMut() -> bool) {
        wait_until(what, Duration::from_secs(10), condition).unwrap_or_else(|error| {
            panic!("{error:#}: {}; {}", self.status(), self.agent.log_tail())
        });
    }

    pub fn counter(&self, name: &str) -> u64 {
        let status = self.status();
        let value = status["counters"]["istio"][name].as_u64();
        value.unwrap_or_else(|| panic!("no {name}: {status}"))
    }
}

/// A listener of the sidecar's.
fn listen(pod: &Pod, at: SocketAddr) -> TcpListener {
    pod.run(PROXY, PROXY, || TcpListener::bind(at)).expect("runs").expect("listens")
}

impl Pair {
    pub fn non_blocking(self) -> Self {
        for end in [&self.client, &self.server] {
            end.set_nonblocking(true).expect("non-blocking");
        }
        self
    }

    /// Says enough both ways to be spliced.
    pub fn talk(self) -> Self {
        (0..TALK).for_each(|_| self.prime());
        self
    }

    /// A byte each way.
    pub fn prime(&self) {
        for (from, to) in [(&self.client, &self.server), (&self.server, &self.client)] {
            put(from, b".");
            assert_eq!(get(to, 1), b".");
        }
    }

    /// Makes room for what a row writes while nobody reads.
    pub fn roomy(self) -> Self {
        for end in [&self.client, &self.server] {
            SockRef::from(end).set_recv_buffer_size(400_000).expect("SO_RCVBUF");
            SockRef::from(end).set_send_buffer_size(400_000).expect("SO_SNDBUF");
        }
        self
    }
}

/// What an ioctl that tells one number tells.
#[allow(unsafe_code, reason = "no safe wrapper knows FIONREAD and TIOCOUTQ of a socket")]
pub fn ioctl_int(stream: &TcpStream, request: libc::Ioctl) -> usize {
    let mut value: libc::c_int = 0;
    // SAFETY: both requests write one int.
    let rc = unsafe { libc::ioctl(stream.as_raw_fd(), request, &raw mut value) };
    assert_eq!(rc, 0, "{}", io::Error::last_os_error());
    usize::try_from(value).expect("no negative number")
}

/// Bytes in TCP that the other end has not acknowledged.
pub fn unsent(stream: &TcpStream) -> usize {
    ioctl_int(stream, libc::TIOCOUTQ)
}

/// Waits until one of the events, or an error; false: in vain.
pub fn ready(stream: &TcpStream, events: PollFlags, limit: Duration) -> bool {
    let start = Instant::now();
    while start.elapsed() < limit {
        let left = limit.saturating_sub(start.elapsed());
        let millis = u16::try_from(left.as_millis()).unwrap_or(u16::MAX);
        match poll(&mut [PollFd::new(stream.as_fd(), events)], millis) {
            Ok(0) | Err(Errno::EINTR) => {}
            Ok(_) => return true,
            Err(error) => panic!("poll: {error}"),
        }
    }
    false
}

/// Which of these events, of errors and of an end there are now, or within `limit` if none.
pub fn events(stream: &TcpStream, asked: EpollFlags, limit: Duration) -> EpollFlags {
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).expect("epoll");
    epoll.add(stream, EpollEvent::new(asked, 0)).expect("added");
    let mut events = [EpollEvent::empty()];
    let limit = EpollTimeout::try_from(limit).expect("a short time");
    match epoll.wait(&mut events, limit).expect("epoll") {
        0 => EpollFlags::empty(),
        _ => events[0].events(),
    }
}

/// Writes all.
#[track_caller]
pub fn put(mut stream: &TcpStream, mut bytes: &[u8]) {
    while !bytes.is_empty() {
        match stream.write(bytes) {
            Ok(n) => bytes = &bytes[n..],
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                assert!(ready(stream, PollFlags::POLLOUT, patience()), "nobody reads");
            }
            Err(error) => panic!("write: {error}"),
        }
    }
}

/// Reads exactly `count` bytes.
#[track_caller]
pub fn get(stream: &TcpStream, count: usize) -> Vec<u8> {
    let (bytes, end) = get_up_to(stream, count);
    assert_eq!(bytes.len(), count, "then {end:?}");
    bytes
}

/// Reads up to `count` bytes, and says why there are no more: its end (None) or an error. A
/// timeout is one.
pub fn get_up_to(mut stream: &TcpStream, count: usize) -> (Vec<u8>, Option<ErrorKind>) {
    let mut bytes = vec![0; count];
    let mut filled = 0;
    while filled < count {
        match stream.read(&mut bytes[filled..]) {
            Ok(0) => {
                bytes.truncate(filled);
                return (bytes, None);
            }
            Ok(n) => filled += n,
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                if !ready(stream, PollFlags::POLLIN, patience()) {
                    bytes.truncate(filled);
                    return (bytes, Some(ErrorKind::TimedOut));
                }
            }
            Err(error) => {
                bytes.truncate(filled);
                return (bytes, Some(error.kind()));
            }
        }
    }
    (bytes, None)
}

/// The result of a call as text that can be compared.
pub fn say(result: io::Result<usize>) -> String {
    match result {
        Ok(n) => n.to_string(),
        Err(error) => match error.raw_os_error() {
            Some(number) => format!("{:?}", Errno::from_raw(number)),
            None => format!("{:?}", error.kind()),
        },
    }
}

/// Reads until there are no more, and tells how many bytes there were and what ends them; then
/// what the next read says.
pub fn say_rest(mut stream: &TcpStream) -> String {
    let (mut count, mut buffer) = (0, [0; 4096]);
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return format!("{count} bytes, end"),
            Ok(n) => count += n,
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                if !ready(stream, PollFlags::POLLIN, patience()) {
                    return format!("{count} bytes, silence");
                }
            }
            Err(error) => {
                let then = say(stream.read(&mut buffer));
                return format!("{count} bytes, {}, then {then}", say(Err(error)));
            }
        }
    }
}

/// The value, once it is as wanted; or as it is after a while.
pub fn settled<T: PartialEq>(wanted: T, mut value: impl FnMut() -> T) -> T {
    let start = Instant::now();
    loop {
        let now = value();
        if now == wanted || start.elapsed() > patience() / 6 {
            return now;
        }
        thread::sleep(Duration::from_millis(2));
    }
}

/// What is done to a connection, and what is seen then.
pub struct Row<Act> {
    pub name: &'static str,
    /// The self-test's trial that finds out whether the kernel does this as without splicing.
    pub trial: Option<&'static str>,
    pub act: Act,
}

/// The table `ROWS`, and a test of each of its rows, by name, in a module of its own. The tests
/// share the file's `OBSERVED`, for which all rows run once.
#[allow(unused_macros, reason = "each test file uses its part")]
macro_rules! rows {
    (@trial) => { None };
    (@trial $trial:expr) => { Some($trial) };
    ($tests:ident, $(row($name:ident $([$trial:expr])?, $act:expr $(,)?)),* $(,)?) => {
        const ROWS: &[Row] = &[$(Row {
            name: stringify!($name),
            trial: rows!(@trial $($trial)?),
            act: $act,
        }),*];

        mod $tests {
            $(#[test]
            fn $name() {
                super::OBSERVED.judge(super::ROWS, stringify!($name));
            })*
        }
    };
}
#[allow(unused_imports, reason = "each test file uses its part")]
pub(crate) use rows;

/// What a row saw, or how it failed.
pub type Seen<S> = Result<S, String>;

/// A row that fails leaves the others to be seen.
pub fn seen<S>(act: impl FnOnce() -> S) -> Seen<S> {
    panic::catch_unwind(AssertUnwindSafe(act)).map_err(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        text.or(panic.downcast_ref().copied()).unwrap_or("a panic").to_owned()
    })
}

/// What all rows saw, in their order.
pub struct Observed<S> {
    pub plain: Vec<Seen<S>>,
    pub spliced: [(Leg, Vec<Seen<S>>); 2],
    /// What the self-test found on this kernel.
    pub known: String,
}

impl<S: PartialEq + Debug> Observed<S> {
    pub fn new(node: &Splicing, observe: impl Fn(Leg) -> Vec<Seen<S>>) -> Self {
        let plain = observe(Leg::PlainSidecar);
        let spliced = [Leg::Sidecar, Leg::App].map(|leg| (leg, observe(leg)));
        let known = node.status()["splice"]["legs"]["app"]["why"].as_str().expect("text").into();
        Self { plain, spliced, known }
    }

    /// A row sees what it sees on plain TCP, or the self-test has found that it does not.
    pub fn judge<Act>(&self, rows: &[Row<Act>], name: &str) {
        let n = rows.iter().position(|row| row.name == name).expect("a row of the table");
        let trial = rows[n].trial;
        let is_known = trial.is_some_and(|trial| self.known.contains(&format!("{trial}: ")));
        let plain = &self.plain[n];
        assert!(plain.is_ok(), "on plain TCP: {plain:?}");
        for (leg, seen) in &self.spliced {
            let seen = &seen[n];
            assert!(
                seen == plain || is_known,
                "{leg:?}:\n  TCP      {plain:?}\n  spliced  {seen:?}\nthe self-test knows of {}",
                self.known
            );
            if seen == plain && is_known {
                eprintln!("{leg:?}: no difference, though the self-test has one");
            }
        }
    }
}
