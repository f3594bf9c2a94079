//! Tests this kernel's behaviour towards spliced sockets, with sockets of the agent's own in a
//! temporary network namespace. Each known hazard has a trial; a failed trial is a [`Hazard`].

use std::{
    cell::Cell,
    io::{ErrorKind, Read, Write},
    mem::MaybeUninit,
    net::{Ipv4Addr, Shutdown, TcpListener, TcpStream},
    os::fd::{AsFd, AsRawFd},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, bail, ensure};
use libbpf_rs::{
    MapCore, MapFlags,
    skel::{OpenSkel, SkelBuilder},
};
use nix::{
    errno::Errno,
    fcntl::{SpliceFFlags, splice},
    sys::{
        epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout},
        socket::{MsgFlags, recv, send, setsockopt, sockopt},
    },
    unistd::pipe,
};

use super::{
    abi,
    skel::{
        set_refresh,
        sidestep::{SidestepSkel, SidestepSkelBuilder},
    },
};
use crate::{
    node,
    splice::{Hazard, Hurts},
};

/// The time limit for a byte, an end or a wake-up; loopback needs microseconds.
const PATIENCE: Duration = Duration::from_secs(1);
/// `SPLICE_LARGE` of bpf/splice/redirect.h: larger messages use TCP.
pub(super) const LARGE: usize = 32 * 1024;
/// `SPLICE_LIMIT` of bpf/splice/redirect.h: messages use TCP while more than this is unread.
pub(super) const LIMIT: usize = 64 * 1024;
/// More bytes than TCP's default buffers let a writer get ahead of its reader.
const FAR_AHEAD: usize = 64 << 20;

/// A trial's error is the observed behaviour.
type Trial = fn(&Bench) -> Result<()>;

const TRIALS: &[(&str, Hurts, Trial)] = &[
    ("order while queue and TCP alternate", Hurts::Everybody, order),
    ("a stopped reader blocks the writer", Hurts::Everybody, held),
    ("FIN behind queued bytes", Hurts::Everybody, half_close),
    ("RST behind queued bytes", Hurts::Everybody, reset),
    ("send after shutdown", Hurts::Everybody, after_shutdown),
    ("edge-triggered wake-ups", Hurts::Everybody, edges),
    ("MSG_PEEK", Hurts::Everybody, peek),
    ("blocking read woken without data", Hurts::Apps, blocking),
    ("MSG_WAITALL", Hurts::Apps, wait_all),
    ("FIONREAD", Hurts::Apps, fionread),
    ("splice(2)", Hurts::Apps, splice_out),
    ("MSG_OOB", Hurts::Apps, out_of_band),
    ("write after a reset", Hurts::Apps, write_after_reset),
    ("SO_RCVLOWAT", Hurts::Apps, low_water),
    ("short read taken for end of file", Hurts::Apps, short_read),
    ("zero-length read", Hurts::Apps, read_nothing),
    ("partly invalid buffer", Hurts::Apps, bad_buffer),
];

/// Runs the trials, and returns this kernel's hazards; takes some 100 ms.
///
/// # Errors
/// If the trials could not run, or would prove nothing.
pub fn self_test() -> Result<Vec<Hazard>> {
    node::in_new(|| {
        let mut storage = MaybeUninit::uninit();
        let bench = Bench::new(&mut storage)?;
        let mut hazards = Vec::new();
        for (name, hurts, trial) in TRIALS {
            if let Err(error) = trial(&bench) {
                hazards.push(Hazard { name, hurts: *hurts, found: format!("{error:#}") });
            }
        }
        ensure!(bench.redirected()? > 0, "the kernel redirected nothing");
        Ok(hazards)
    })?
}

/// The program and the maps of the trials.
struct Bench<'a> {
    skel: SidestepSkel<'a>,
    pairs: Cell<u32>,
}

impl<'a> Bench<'a> {
    fn new(storage: &'a mut MaybeUninit<libbpf_rs::OpenObject>) -> Result<Self> {
        let mut open = SidestepSkelBuilder::default().open(storage)?;
        // The trials themselves decide which messages use TCP.
        set_refresh(&mut open, Duration::MAX)?;
        for mut program in open.open_object_mut().progs_mut() {
            program.set_autoload(program.name() == "redirect");
        }
        let skel = open.load().context("the kernel rejected program redirect")?;
        skel.progs.redirect.attach_sockmap(skel.maps.splice_sockets.as_fd().as_raw_fd())?;
        Ok(Self { skel, pairs: Cell::new(0) })
    }

    /// Two ends of a spliced connection, non-blocking: the client's, the server's.
    fn pair(&self) -> Result<(TcpStream, TcpStream)> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let client = TcpStream::connect(listener.local_addr()?)?;
        let (server, _) = listener.accept()?;
        let number = self.pairs.get();
        self.pairs.set(number + 1);
        for (end, socket) in [(1, &client), (2, &server)] {
            socket.set_nonblocking(true)?;
            socket.set_nodelay(true)?;
            // Invented keys: each is the other's other end, and no real socket's.
            let key = abi::splice_key {
                lport: end,
                rport: 3 - end,
                first_sent: number,
                first_received: number,
                ..abi::splice_key::default()
            };
            let splice = abi::splice {
                state: abi::splice_state::SPLICE_IN,
                leg: abi::splice_leg::LEG_SIDECAR,
                key,
                ..abi::splice::default()
            };
            let (fd, maps) = (socket.as_raw_fd(), &self.skel.maps);
            maps.splices.update(&fd.to_ne_bytes(), abi::as_bytes(&splice), MapFlags::ANY)?;
            let fd = u64::try_from(fd)?.to_ne_bytes();
            maps.splice_sockets.update(abi::as_bytes(&key), &fd, MapFlags::NO_EXIST)?;
        }
        Ok((client, server))
    }

    /// The number of bytes that have bypassed TCP.
    fn redirected(&self) -> Result<u64> {
        let index = abi::splice_counter::SPLICE_BYTES.0.to_ne_bytes();
        let values = self.skel.maps.splice_counters.lookup_percpu(&index, MapFlags::ANY)?;
        let values = values.context("no counter")?;
        values.iter().map(|value| abi::from_bytes::<u64>(value)).sum()
    }
}

/// The byte at a position: its period differs from every buffer's size.
fn byte(at: usize) -> u8 {
    (at % 251) as u8 ^ (at / 251) as u8
}

fn bytes(from: usize, len: usize) -> Vec<u8> {
    (from..from + len).map(byte).collect()
}

/// Sends everything in one message, if the other end has room for it.
fn put(to: &mut TcpStream, data: &[u8]) -> Result<()> {
    let sent = to.write(data).context("send")?;
    ensure!(sent == data.len(), "{sent} of {} bytes were accepted", data.len());
    Ok(())
}

/// Reads available bytes: at most `most`, at least one, or none at the end.
fn get(from: &mut TcpStream, most: usize) -> Result<Vec<u8>> {
    let mut data = vec![0; most];
    let start = Instant::now();
    loop {
        match from.read(&mut data) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                ensure!(start.elapsed() < PATIENCE, "the reader was never woken");
                thread::yield_now();
            }
            Err(error) => return Err(error).context("read"),
            Ok(len) => {
                data.truncate(len);
                return Ok(data);
            }
        }
    }
}

/// Reads exactly these bytes of the sequence.
fn expect(from: &mut TcpStream, at: usize, len: usize) -> Result<()> {
    let mut seen = at;
    while seen < at + len {
        let data = get(from, (at + len - seen).min(20_000))?;
        ensure!(!data.is_empty(), "end of file after {} of {len} bytes", seen - at);
        let wrong = data.iter().enumerate().find(|(n, found)| **found != byte(seen + n));
        if let Some((n, _)) = wrong {
            bail!("byte {} of {len} is wrong", seen - at + n);
        }
        seen += data.len();
    }
    Ok(())
}

fn expect_end(from: &mut TcpStream) -> Result<()> {
    let data = get(from, 1)?;
    ensure!(data.is_empty(), "a byte instead of end of file");
    Ok(())
}

fn order(bench: &Bench) -> Result<()> {
    let (mut one, mut other) = bench.pair()?;
    let sizes = [1, 64, LARGE + 1, 64, 5000, LARGE * 2, 1, 1, LARGE, LARGE + 1, 700, 64];
    // A socket learns its other end with the first message.
    put(&mut one, &bytes(0, LARGE + 1))?;
    expect(&mut other, 0, LARGE + 1)?;
    for _ in 0..2 {
        // Read after each message, after some, and after all: the states in between differ.
        for every in [1, 3, sizes.len()] {
            let (mut sent, mut read) = (0, 0);
            for (n, size) in sizes.iter().enumerate() {
                put(&mut one, &bytes(sent, *size))?;
                sent += size;
                if (n + 1) % every == 0 {
                    expect(&mut other, read, sent - read)?;
                    read = sent;
                }
            }
        }
        // The reverse direction: each has a state of its own.
        std::mem::swap(&mut one, &mut other);
    }
    Ok(())
}

fn held(bench: &Bench) -> Result<()> {
    let (mut writer, mut reader) = bench.pair()?;
    let mut sent = 0;
    loop {
        match writer.write(&bytes(sent, 4000)) {
            Ok(len) => sent += len,
            Err(error) if error.kind() == ErrorKind::WouldBlock => break,
            Err(error) => return Err(error).context("send"),
        }
        ensure!(sent < FAR_AHEAD, "{sent} bytes were accepted although nobody read them");
    }
    expect(&mut reader, 0, sent)?;
    put(&mut writer, &bytes(sent, 100))?;
    expect(&mut reader, sent, 100)
}

fn half_close(bench: &Bench) -> Result<()> {
    let (mut writer, mut reader) = bench.pair()?;
    put(&mut writer, &bytes(0, 100))?;
    writer.shutdown(Shutdown::Write)?;
    expect(&mut reader, 0, 100)?;
    expect_end(&mut reader)?;
    // The other direction is still open.
    put(&mut reader, &bytes(0, 100))?;
    drop(reader);
    expect(&mut writer, 0, 100)?;
    expect_end(&mut writer)
}

fn reset(bench: &Bench) -> Result<()> {
    let (mut writer, mut reader) = bench.pair()?;
    put(&mut writer, &bytes(0, 100))?;
    setsockopt(&writer, sockopt::Linger, &libc::linger { l_onoff: 1, l_linger: 0 })?;
    drop(writer);
    expect(&mut reader, 0, 100)?;
    match get(&mut reader, 1).map_err(|error| error.downcast::<std::io::Error>()) {
        Err(Ok(error)) if error.kind() == ErrorKind::ConnectionReset => Ok(()),
        other => bail!("no reset, but {other:?}"),
    }
}

fn after_shutdown(bench: &Bench) -> Result<()> {
    let (writer, mut reader) = bench.pair()?;
    writer.shutdown(Shutdown::Write)?;
    let sent = send(writer.as_raw_fd(), b"x", MsgFlags::MSG_NOSIGNAL);
    ensure!(sent == Err(Errno::EPIPE), "send() returned {sent:?}");
    expect_end(&mut reader)
}

/// Waits for an edge, and returns whether there was one.
fn edge(epoll: &Epoll, within: Duration) -> Result<bool> {
    let mut events = [EpollEvent::empty()];
    let timeout = EpollTimeout::try_from(within)?;
    Ok(epoll.wait(&mut events, timeout)? > 0)
}

fn watched(socket: &TcpStream) -> Result<Epoll> {
    let epoll = Epoll::new(EpollCreateFlags::empty())?;
    epoll.add(socket, EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, 0))?;
    Ok(epoll)
}

/// Reads until nothing is left.
fn read_all(from: &mut TcpStream) -> Result<usize> {
    let (mut data, mut total) = ([0; 16384], 0);
    loop {
        match from.read(&mut data) {
            Ok(0) => return Ok(total),
            Ok(len) => total += len,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(total),
            Err(error) => return Err(error).context("read"),
        }
    }
}

fn edges(bench: &Bench) -> Result<()> {
    let (mut writer, mut reader) = bench.pair()?;
    let epoll = watched(&reader)?;
    for size in [1, LARGE + 1, 64, 64, LARGE * 2, 1] {
        put(&mut writer, &bytes(0, size))?;
        let mut total = 0;
        while total < size {
            ensure!(
                edge(&epoll, PATIENCE)?,
                "no wake-up for the rest of {size} bytes after {total}"
            );
            total += read_all(&mut reader)?;
        }
    }
    put(&mut writer, &bytes(0, 64))?;
    writer.shutdown(Shutdown::Write)?;
    let mut total = 0;
    while total < 64 {
        ensure!(edge(&epoll, PATIENCE)?, "no wake-up for the last bytes");
        total += read_all(&mut reader)?;
    }
    expect_end(&mut reader)
}

fn peek(bench: &Bench) -> Result<()> {
    let (mut writer, mut reader) = bench.pair()?;
    for size in [100, LARGE + 1] {
        put(&mut writer, &bytes(0, size))?;
        let mut data = [0; 50];
        let start = Instant::now();
        while recv(reader.as_raw_fd(), &mut data, MsgFlags::MSG_PEEK) != Ok(50) {
            ensure!(start.elapsed() < PATIENCE, "it does not see the data");
        }
        ensure!(data[..] == bytes(0, 50), "it sees wrong bytes");
        expect(&mut reader, 0, size)?;
    }
    Ok(())
}

/// Runs a blocking call on a thread, and `then` once the thread sleeps in it; returns the call's
/// result. The call must end by itself: the socket has a time limit.
fn while_blocked<T: Send>(
    call: impl FnOnce() -> T + Send,
    then: impl FnOnce(&dyn Fn() -> bool) -> Result<()>,
) -> Result<T> {
    let (tell, told) = std::sync::mpsc::channel();
    thread::scope(|scope| {
        let thread = scope.spawn(move || {
            let _ = tell.send(nix::unistd::gettid());
            call()
        });
        let stat = format!("/proc/self/task/{}/stat", told.recv()?);
        // "tid (name) S ...": it sleeps.
        let sleeps = || {
            let stat = std::fs::read_to_string(&stat).unwrap_or_default();
            stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('S'))
        };
        while !thread.is_finished() && !sleeps() {
            thread::yield_now();
        }
        let done = then(&|| thread.is_finished());
        let result = thread.join().map_err(|_| anyhow!("a thread panicked"))?;
        done.map(|()| result)
    })
}

/// A reader that waits, with a time limit.
fn make_blocking(reader: &TcpStream) -> Result<()> {
    reader.set_nonblocking(false)?;
    Ok(reader.set_read_timeout(Some(PATIENCE))?)
}

fn blocking(bench: &Bench) -> Result<()> {
    let (mut writer, mut reader) = bench.pair()?;
    make_blocking(&reader)?;
    let other = reader.try_clone()?;
    let mut data = [0; 10];
    let read = while_blocked(
        || reader.read(&mut data),
        |finished| {
            // The acknowledgement of our FIN wakes readers.
            other.shutdown(Shutdown::Write)?;
            let start = Instant::now();
            while !finished() && start.elapsed() < Duration::from_millis(50) {
                thread::yield_now();
            }
            put(&mut writer, &bytes(0, 10))
        },
    )?;
    ensure!(read.context("the read returned instead of waiting")? == 10);
    Ok(())
}

fn wait_all(bench: &Bench) -> Result<()> {
    let (mut writer, reader) = bench.pair()?;
    make_blocking(&reader)?;
    let mut data = [0; 200];
    put(&mut writer, &bytes(0, 100))?;
    let read = while_blocked(
        || recv(reader.as_raw_fd(), &mut data, MsgFlags::MSG_WAITALL),
        |_| put(&mut writer, &bytes(100, 100)),
    )?;
    ensure!(read == Ok(200), "recv() of 200 bytes returned {read:?}");
    Ok(())
}

/// The number of bytes that FIONREAD or TIOCOUTQ returns.
fn ioctl(socket: &TcpStream, request: libc::Ioctl) -> Result<usize> {
    let mut count: libc::c_int = 0;
    // SAFETY: the descriptor is open, and both requests write one int.
    let rc = unsafe { libc::ioctl(socket.as_raw_fd(), request, &raw mut count) };
    ensure!(rc == 0, "{}", std::io::Error::last_os_error());
    Ok(usize::try_from(count)?)
}

fn fionread(bench: &Bench) -> Result<()> {
    let (mut writer, mut reader) = bench.pair()?;
    for size in [100, LARGE + 1] {
        put(&mut writer, &bytes(0, size))?;
        let start = Instant::now();
        loop {
            let there = ioctl(&reader, libc::FIONREAD)?;
            if there == size {
                break;
            }
            ensure!(start.elapsed() < PATIENCE / 4, "it reports {there} of {size} bytes");
        }
        expect(&mut reader, 0, size)?;
    }
    Ok(())
}

fn splice_out(bench: &Bench) -> Result<()> {
    let (mut writer, reader) = bench.pair()?;
    let (_out, into) = pipe()?;
    put(&mut writer, &bytes(0, 100))?;
    let moved = splice(&reader, None, &into, None, 100, SpliceFFlags::SPLICE_F_NONBLOCK);
    ensure!(moved == Ok(100), "of 100 bytes it moved {moved:?}");
    Ok(())
}

fn out_of_band(bench: &Bench) -> Result<()> {
    let (mut writer, reader) = bench.pair()?;
    put(&mut writer, b"a")?;
    send(writer.as_raw_fd(), b"!", MsgFlags::MSG_OOB)?;
    let mut data = [0; 1];
    let start = Instant::now();
    while recv(reader.as_raw_fd(), &mut data, MsgFlags::MSG_OOB) != Ok(1) {
        ensure!(start.elapsed() < PATIENCE / 20, "the urgent byte did not arrive");
    }
    ensure!(data == *b"!", "another byte was taken for the urgent one");
    Ok(())
}

fn write_after_reset(bench: &Bench) -> Result<()> {
    let (writer, reader) = bench.pair()?;
    setsockopt(&writer, sockopt::Linger, &libc::linger { l_onoff: 1, l_linger: 0 })?;
    drop(writer);
    let write = || send(reader.as_raw_fd(), b"x", MsgFlags::MSG_NOSIGNAL);
    let start = Instant::now();
    while write() != Err(Errno::ECONNRESET) {
        ensure!(start.elapsed() < PATIENCE, "no reset");
    }
    let again = write();
    ensure!(again == Err(Errno::EPIPE), "the second write returned {again:?}");
    Ok(())
}

fn low_water(bench: &Bench) -> Result<()> {
    let (mut writer, reader) = bench.pair()?;
    let low: libc::c_int = 1000;
    // SAFETY: the descriptor is open, and the option is an int.
    let rc = unsafe {
        libc::setsockopt(
            reader.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_RCVLOWAT,
            (&raw const low).cast(),
            size_of_val(&low) as libc::socklen_t,
        )
    };
    ensure!(rc == 0, "SO_RCVLOWAT: {}", std::io::Error::last_os_error());
    let epoll = watched(&reader)?;
    put(&mut writer, &bytes(0, 100))?;
    ensure!(!edge(&epoll, PATIENCE / 50)?, "100 bytes wake a reader that waits for {low}");
    put(&mut writer, &bytes(100, 1000))?;
    ensure!(edge(&epoll, PATIENCE)?, "1100 bytes do not wake a reader that waits for {low}");
    Ok(())
}

fn read_nothing(bench: &Bench) -> Result<()> {
    let (_writer, reader) = bench.pair()?;
    let read = recv(reader.as_raw_fd(), &mut [], MsgFlags::empty());
    ensure!(read == Err(Errno::EAGAIN), "with nothing to read, recv() returned {read:?}");
    Ok(())
}

fn bad_buffer(bench: &Bench) -> Result<()> {
    let (mut writer, mut reader) = bench.pair()?;
    put(&mut writer, &bytes(0, 200))?;
    let start = Instant::now();
    while recv(reader.as_raw_fd(), &mut [0; 200], MsgFlags::MSG_PEEK) != Ok(200) {
        ensure!(start.elapsed() < PATIENCE, "the data did not arrive");
    }
    let mut good = [0_u8; 100];
    let parts = [
        libc::iovec { iov_base: good.as_mut_ptr().cast(), iov_len: good.len() },
        // Nothing is mapped there.
        libc::iovec { iov_base: std::ptr::without_provenance_mut(1), iov_len: 100 },
    ];
    // SAFETY: the first part is writable; the kernel answers EFAULT for the second, which is not.
    let read = unsafe { libc::readv(reader.as_raw_fd(), parts.as_ptr(), 2) };
    let read = Errno::result(read);
    ensure!(read == Err(Errno::EFAULT), "readv() returned {read:?}");
    expect(&mut reader, 0, 200)
}

fn short_read(bench: &Bench) -> Result<()> {
    let (mut writer, mut reader) = bench.pair()?;
    let epoll = watched(&reader)?;
    let mut sent = 0;
    while sent < LIMIT + 10_000 {
        put(&mut writer, &bytes(sent, 1000))?;
        sent += 1000;
    }
    // Spilled bytes must have arrived before the reader begins.
    let start = Instant::now();
    while ioctl(&writer, libc::TIOCOUTQ)? > 0 {
        ensure!(start.elapsed() < PATIENCE, "the data that went by TCP did not arrive");
    }
    let (mut data, mut total) = ([0; 16384], 0);
    while total < sent {
        ensure!(edge(&epoll, PATIENCE / 10)?, "no wake-up for the rest, after {total} of {sent}");
        loop {
            let len = reader.read(&mut data)?;
            total += len;
            if len < data.len() {
                break;
            }
        }
    }
    Ok(())
}
