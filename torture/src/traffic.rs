//! The connections: who opens them, who answers, and what came of them.

use std::collections::{BTreeMap, HashMap};
use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use sidestep_lab::{Pod, interrupted};
use socket2::{Domain, SockRef, Socket, TcpKeepalive, Type};

use crate::end::{self, How, Outcome, STALLED};
use crate::front::{SIDECAR_PORT, service};
use crate::plan::{Ending, PODS, Part, Path, Plan};

/// How long it may take until a connection that was opened has been answered.
const ANSWERED: Duration = Duration::from_secs(20);

enum Answer {
    Started,
    Ended(Outcome),
}

/// What came of all connections.
#[derive(Default)]
pub struct Tally {
    /// How many were played.
    pub connections: u64,
    /// Long talks among them that went well.
    pub long_talks: u64,
    /// Bytes that came, both ways.
    pub bytes: u64,
    /// By ending: how many were so.
    pub endings: BTreeMap<(Ending, &'static str), u64>,
    /// What is wrong, each with its connection.
    pub failures: Vec<String>,
}

/// Which connections, and how they are judged.
#[derive(Clone, Copy)]
pub struct Opts {
    /// What they follow from.
    pub seed: u64,
    /// This one alone.
    pub only: Option<u64>,
    /// All read as Tokio does.
    pub short_reads: bool,
    /// They may be spliced: a message that takes longer to the other end's queue than that one
    /// takes to close is answered EPIPE by the kernel. TCP takes it, and tells of the reset
    /// afterwards.
    pub spliced: bool,
}

impl Opts {
    fn plan(self, number: u64) -> Plan {
        let plan = Plan::new(self.seed, number);
        if self.short_reads { plan.with_short_reads() } else { plan }
    }
}

/// What the threads of a run share.
pub struct Traffic {
    opts: Opts,
    addresses: Vec<Vec<IpAddr>>,
    next: AtomicU64,
    stopping: AtomicBool,
    over: AtomicBool,
    waiting: Mutex<HashMap<u64, Sender<Answer>>>,
    /// Held for reading while a connection with the last pod opens, for writing while it is away.
    pub away: RwLock<()>,
    /// What came of it so far.
    pub tally: Mutex<Tally>,
}

impl Traffic {
    /// Traffic between these pods.
    pub fn new(opts: Opts, pods: &[Pod]) -> Arc<Self> {
        Arc::new(Self {
            opts,
            addresses: pods.iter().map(Pod::ips).collect(),
            next: AtomicU64::new(0),
            stopping: AtomicBool::new(false),
            over: AtomicBool::new(false),
            waiting: Mutex::default(),
            away: RwLock::new(()),
            tally: Mutex::default(),
        })
    }

    /// No connection is opened any more.
    pub fn stop(&self) {
        self.stopping.store(true, Ordering::Relaxed);
    }

    /// Nobody needs to listen any more.
    pub fn end(&self) {
        self.over.store(true, Ordering::Relaxed);
    }

    /// Whether nobody needs to listen any more.
    pub fn is_over(&self) -> bool {
        self.over.load(Ordering::Relaxed)
    }

    /// Something is wrong that is no connection's.
    pub fn problem(&self, text: String) {
        self.tally().failures.push(text);
    }

    fn tally(&self) -> std::sync::MutexGuard<'_, Tally> {
        self.tally.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The address of a pod's app, by that of its Service.
    pub fn pod_of(&self, target: SocketAddr) -> Option<SocketAddr> {
        let index = (0..PODS).find(|index| service(*index, target.is_ipv6()) == target)?;
        Some(SocketAddr::new(self.address(index, target.is_ipv6()), target.port()))
    }

    fn address(&self, pod: usize, v6: bool) -> IpAddr {
        self.addresses[pod][usize::from(v6)]
    }

    /// Opens connections, one after the other, until it is to stop.
    pub fn run(self: &Arc<Self>, pods: &[Pod]) {
        while !self.stopping.load(Ordering::Relaxed) && !interrupted() {
            let serial = self.next.fetch_add(1, Ordering::Relaxed);
            let plan = self.opts.plan(self.opts.only.unwrap_or(serial));
            let outcomes = self.connection(&plan, serial, pods);
            self.waiting().remove(&serial);
            let mut tally = self.tally();
            tally.connections += 1;
            let failures = match outcomes {
                Ok(ends) => {
                    tally.long_talks += u64::from(plan.long_talk);
                    tally.bytes += ends.iter().map(|end| end.received).sum::<u64>();
                    let kind = kind(&plan, &ends, self.opts.spliced);
                    *tally.endings.entry((plan.ending, kind)).or_default() += 1;
                    judge(&ends, kind)
                }
                Err(err) => vec![format!("{err:#}")],
            };
            tally
                .failures
                .extend(failures.into_iter().map(|failure| format!("{failure}\n    {plan}")));
        }
    }

    fn waiting(&self) -> std::sync::MutexGuard<'_, HashMap<u64, Sender<Answer>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn connection(
        self: &Arc<Self>,
        plan: &Plan,
        serial: u64,
        pods: &[Pod],
    ) -> Result<[Outcome; 2]> {
        let (sender, answers) = mpsc::channel();
        self.waiting().insert(serial, sender);
        let involved = [plan.from, plan.to].contains(&(PODS - 1));
        let guard = involved.then(|| self.away.read().unwrap_or_else(PoisonError::into_inner));
        let (uid, target) = match plan.path {
            Path::Apps => (sidestep_lab::APP, service(plan.to, plan.v6)),
            Path::Sidecars => {
                let ip = self.address(plan.to, plan.v6);
                (sidestep_lab::PROXY, SocketAddr::new(ip, SIDECAR_PORT))
            }
        };
        let mut stream = pods[plan.from]
            .run(uid, uid, || open(target, plan))?
            .with_context(|| format!("connecting to {target}"))?;
        let mut head = [0; 16];
        head[..8].copy_from_slice(&plan.number.to_ne_bytes());
        head[8..].copy_from_slice(&serial.to_ne_bytes());
        stream.write_all(&head).context("sending the connection's number")?;
        talk(&mut stream).context("talking")?;
        let Ok(Answer::Started) = answers.recv_timeout(ANSWERED) else {
            bail!("it was opened, and nobody has answered for {ANSWERED:?}");
        };
        drop(guard);
        let client = end::play(stream, &plan.client, plan.request(), plan.response());
        // The other end may be stalled just as long, and plays its pauses.
        let Ok(Answer::Ended(server)) = answers.recv_timeout(STALLED * 3) else {
            bail!("the server's end has not come to an end; the client: {client}");
        };
        Ok([client, server])
    }

    /// Plays the server's end of a connection that was accepted, in a thread of its own.
    pub fn serve(self: &Arc<Self>, mut stream: TcpStream) {
        let traffic = self.clone();
        thread::spawn(move || {
            let mut number = || -> io::Result<(u64, u64)> {
                stream.set_nonblocking(false)?;
                stream.set_read_timeout(Some(ANSWERED))?;
                let mut head = [0; 8];
                stream.read_exact(&mut head)?;
                let number = u64::from_ne_bytes(head);
                stream.read_exact(&mut head)?;
                for _ in 0..TALK {
                    let mut byte = [0];
                    stream.read_exact(&mut byte)?;
                    stream.write_all(&byte)?;
                }
                Ok((number, u64::from_ne_bytes(head)))
            };
            let (number, serial) = match number() {
                Ok(numbers) => numbers,
                Err(err) => {
                    return traffic
                        .problem(format!("a server, reading a connection's number: {err}"));
                }
            };
            let plan = traffic.opts.plan(number);
            let Some(sender) = traffic.waiting().get(&serial).cloned() else {
                return traffic.problem(format!("a server was called by nobody, as {number}"));
            };
            if let Err(err) = prepare(&stream, &plan, &plan.server) {
                return traffic.problem(format!("a server, preparing its socket: {err}"));
            }
            // The client may have given up.
            let _ = sender.send(Answer::Started);
            let outcome = end::play(stream, &plan.server, plan.response(), plan.request());
            let _ = sender.send(Answer::Ended(outcome));
        });
    }
}

/// So much small talk makes a connection worth splicing: `SPLICE_TALK` of bpf/splice/mark.h, and
/// some.
const TALK: usize = 24;

fn talk(stream: &mut TcpStream) -> io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(ANSWERED))?;
    for _ in 0..TALK {
        stream.write_all(b".")?;
        stream.read_exact(&mut [0])?;
    }
    stream.set_nonblocking(true)
}

fn open(target: SocketAddr, plan: &Plan) -> io::Result<TcpStream> {
    let socket = Socket::new(Domain::for_address(target), Type::STREAM, None)?;
    socket.connect_timeout(&target.into(), ANSWERED)?;
    let stream = socket.into();
    prepare(&stream, plan, &plan.client)?;
    Ok(stream)
}

/// After so long without a packet, a socket asks whether the other end is still there.
pub const IDLE: Duration = Duration::from_secs(2);
/// The same in a long talk, whose packets are to be those of `--splice-refresh` alone: longer than
/// connection tracking remembers ([`crate::REMEMBERED`]), and shorter than [`STALLED`].
const IDLE_TALK: Duration = Duration::from_secs(12);

/// A reset is sent once. Where it gets lost, TCP alone tells nobody who only reads.
pub fn ask_when_idle(socket: SockRef<'_>, idle: Duration) -> io::Result<()> {
    let asking = TcpKeepalive::new();
    socket.set_tcp_keepalive(&asking.with_time(idle).with_interval(Duration::from_secs(1)))
}

fn prepare(stream: &TcpStream, plan: &Plan, part: &Part) -> io::Result<()> {
    ask_when_idle(SockRef::from(stream), if plan.long_talk { IDLE_TALK } else { IDLE })?;
    stream.set_nodelay(part.write_size < 64 << 10)?;
    if let Some(bytes) = part.buffers {
        let socket = SockRef::from(stream);
        socket.set_send_buffer_size(bytes)?;
        socket.set_recv_buffer_size(bytes)?;
    }
    stream.set_nonblocking(true)
}

/// What is wrong with how a connection went. Plain TCP is held to the same.
fn judge(ends: &[Outcome; 2], kind: &'static str) -> Vec<String> {
    let damaged = ends.iter().any(|end| end.damage.is_some());
    let longer = ends[0].received > ends[1].sent || ends[1].received > ends[0].sent;
    let [client, server] = ends;
    let failed = kind == FAILED || damaged || longer;
    failed.then(|| format!("client: {client}; server: {server}")).into_iter().collect()
}

const FAILED: &str = "failed";
/// A reset, as a writer may be told of it.
pub const BROKEN_PIPE: &str = "EPIPE, some bytes";

/// In a word, what came of it.
fn kind(plan: &Plan, ends: &[Outcome; 2], spliced: bool) -> &'static str {
    let all = ends[0].received == ends[1].sent && ends[1].received == ends[0].sent;
    let not_done: Vec<How> =
        ends.iter().map(|end| end.how).filter(|how| *how != How::Done).collect();
    match (plan.ending.resets(), not_done.as_slice()) {
        (false, []) if all => "all bytes",
        (true, [How::Reset]) if all => "reset, all bytes",
        (true, [How::Reset]) => "reset, some bytes",
        (true, [How::Failed(Some(Errno::EPIPE))]) if spliced => BROKEN_PIPE,
        _ => FAILED,
    }
}
