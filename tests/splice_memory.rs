//! Spliced connections while memory is short: a writer is not told, and not a byte is lost.
//!
//! TCP's limits are the whole machine's, and those of memory cgroups want a machine that is all
//! cgroup v2: so scripts/kernels.sh alone runs these.

mod common;

use std::{cell::Cell, fs, io::ErrorKind, net::TcpStream, time::Duration};

use common::{
    PROXY, kernel_before, patience,
    splicing::{Leg, Pair, Splicing, get, put, unsent},
};
use nix::{
    setsockopt_impl, sockopt_impl,
    sys::{
        epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout},
        socket::setsockopt,
    },
};
use sidestep_lab::{
    MemoryCgroups,
    calls::{self, WriteCall},
    pattern::Pattern,
    wait_until,
};

/// Bytes of a message: more than a socket has been charged for in advance.
const MESSAGE: usize = 8000;
/// Messages that a queue takes all of while nobody reads.
const MESSAGES: usize = 7;
const MIB: u64 = 1 << 20;
/// Memory cgroups of a reader that are looked at, `SPLICE_GROUPS` of bpf/splice/memory.h, the root
/// among them.
const DEEPEST: usize = 16 - 1;

/// A connection of the sidecar leg, spliced, whose server's end is charged to these cgroups.
fn connect(node: &Splicing, groups: &MemoryCgroups) -> Pair {
    let tcp = |target| TcpStream::connect(target).expect("connected");
    let client = node.dial(Leg::Sidecar, tcp);
    let server = groups.within(|| node.accept(Leg::Sidecar, PROXY)).expect("moves");
    let pair = Pair { client, server }.talk().non_blocking().roomy();
    node.wait_sockets(2);
    pair
}

/// How many of the messages were redirected that `act` sends.
fn redirected(node: &Splicing, act: impl FnOnce()) -> u64 {
    let before = node.counter("splice_messages");
    act();
    node.counter("splice_messages") - before
}

/// Writes as much as there is room for, and tells how much that was.
fn write(writer: &TcpStream, bytes: &[u8]) -> usize {
    let mut written = 0;
    while written < bytes.len() {
        let message = &bytes[written..bytes.len().min(written + MESSAGE)];
        match calls::write(writer, WriteCall::Write, message) {
            Ok(n) => written += n,
            Err(error) if error.kind() == ErrorKind::WouldBlock => break,
            Err(error) => panic!("the writer was told {error} after {written} bytes"),
        }
    }
    written
}

/// Waits for the next edge that tells the writer of room; the first has been.
fn edges(writer: &TcpStream) -> impl Fn() -> bool {
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).expect("epoll");
    let edge = EpollFlags::EPOLLOUT | EpollFlags::EPOLLET;
    epoll.add(writer, EpollEvent::new(edge, 0)).expect("added");
    let limit = EpollTimeout::try_from(patience()).expect("a short time");
    let wait = move || epoll.wait(&mut [EpollEvent::empty()], limit).expect("epoll") == 1;
    assert!(wait(), "there is room");
    wait
}

/// Writes to a reader that does not read for as long as memory is short: the writer may have to
/// wait, as with plain TCP. Then all is well again.
fn survives(node: &Splicing, pair: &Pair, shortage: impl FnOnce(), plenty: impl FnOnce()) {
    assert_eq!(redirected(node, || pair.prime()), 2, "{}", node.status());
    let bytes = Pattern::new(1).bytes(0, MESSAGE * MESSAGES);
    let mut written = 0;
    shortage();
    let by_queue = redirected(node, || written = write(&pair.client, &bytes));
    plenty();
    assert!(written > 0, "the writer itself has no memory, which says nothing");
    assert_eq!(by_queue, 0, "messages were redirected while memory was short");
    put(&pair.client, &bytes[written..]);
    assert!(get(&pair.server, bytes.len()) == bytes, "other bytes were read than were written");
    assert_eq!(redirected(node, || pair.prime()), 2, "{}", node.status());
}

#[test]
#[ignore = "limits the memory of cgroups: scripts/kernels.sh runs it"]
fn the_readers_pod_is_at_its_limit() {
    let node = Splicing::start("pod", "sidecar");
    let groups = MemoryCgroups::new("pod", 1).expect("cgroups");
    let limit = |limit: String| groups.limit(0, &limit).expect("a limit");
    let pair = connect(&node, &groups);
    // A limit that is far is no reason.
    limit((groups.usage(0).expect("usage") + 64 * MIB).to_string());
    survives(&node, &pair, || limit("0".into()), || limit((64 * MIB).to_string()));
    // Close to it, others may take what is left before the kernel does.
    let close = || limit((groups.usage(0).expect("usage") + 2 * MIB).to_string());
    survives(&node, &pair, close, || limit("max".into()));
}

#[test]
#[ignore = "limits the memory of cgroups: scripts/kernels.sh runs it"]
fn what_the_readers_pod_is_in_is_at_its_limit() {
    let node = Splicing::start("above", "sidecar");
    let groups = MemoryCgroups::new("above", 5).expect("cgroups");
    let pair = connect(&node, &groups);
    for level in [0, 3] {
        let limit = |limit| groups.limit(level, limit).expect("a limit");
        survives(&node, &pair, || limit("0"), || limit("max"));
    }
}

/// Where not all limits are known, nothing is redirected.
#[test]
#[ignore = "takes the memory controller: scripts/kernels.sh runs it"]
fn a_reader_deep_below_the_root_stays_with_tcp() {
    let node = Splicing::start("deep", "sidecar");
    for (name, depth, expected) in [("deepest", DEEPEST, 2), ("deeper", DEEPEST + 1, 1)] {
        let groups = MemoryCgroups::new(name, depth).expect("cgroups");
        let pair = connect(&node, &groups);
        // The client's end is not down there.
        assert_eq!(redirected(&node, || pair.prime()), expected, "{depth} below the root");
        drop(pair);
        node.wait_sockets(0);
    }
}

/// TCP's limits for the whole machine; they are as before when this is dropped.
struct TcpMem(String);

const TCP_MEM: &str = "/proc/sys/net/ipv4/tcp_mem";

/// What counts against it now.
fn tcp_pages() -> u64 {
    let text = fs::read_to_string("/proc/net/sockstat").expect("sockstat");
    let tcp = text.lines().find(|line| line.starts_with("TCP:")).expect("a line for TCP");
    let (_, pages) = tcp.rsplit_once("mem ").expect("a number of pages");
    pages.parse().expect("a number")
}

impl TcpMem {
    fn set(limits: &str) -> Self {
        let before = fs::read_to_string(TCP_MEM).expect("tcp_mem");
        fs::write(TCP_MEM, limits).expect("tcp_mem");
        Self(before)
    }
}

impl Drop for TcpMem {
    fn drop(&mut self) {
        fs::write(TCP_MEM, &self.0).expect("tcp_mem");
    }
}

sockopt_impl!(
    /// Bytes that a socket is charged for now, and keeps.
    ReserveMem,
    SetOnly,
    libc::SOL_SOCKET,
    libc::SO_RESERVE_MEM,
    usize
);

#[test]
#[ignore = "limits TCP's memory in the whole machine: scripts/kernels.sh runs it"]
fn tcp_is_at_its_limit() {
    let mut node = Splicing::start("tcp-mem", "sidecar");
    let groups = MemoryCgroups::new("tcp-mem", 1).expect("cgroups");
    let pair = connect(&node, &groups);
    // It would take the connection out of the map for good if it looked while TCP is short.
    node.agent.kill9();
    // The writer has what it needs, and the reader has not: or the writer would wait anyway.
    if kernel_before(5, 16) {
        // Those keep up to two megabytes that a socket was charged for once.
        put(&pair.client, &[0; 4 * MESSAGE]);
        get(&pair.server, 4 * MESSAGE);
    } else {
        setsockopt(&pair.client, ReserveMem, &(4 << 20)).expect("SO_RESERVE_MEM");
    }
    let limited = Cell::new(None);
    for limits in ["1 1 1".to_owned(), format!("{} 1000000 1000000", tcp_pages() + 256)] {
        let shortage = || limited.set(Some(TcpMem::set(&limits)));
        survives(&node, &pair, shortage, || drop(limited.take()));
    }
}

/// A connection that holds more memory than processors keep for themselves: what they keep does not
/// count against TCP's limits, and may be given back at any time.
fn holds_memory(node: &Splicing) -> Pair {
    let pair = node.connect(Leg::PlainSidecar).roomy();
    if kernel_before(5, 16) {
        write(&pair.client, &[0; 200_000]);
    } else {
        setsockopt(&pair.client, ReserveMem, &(8 << 20)).expect("SO_RESERVE_MEM");
    }
    pair
}

/// TCP itself wakes who waits to write when there is memory again, and a socket in the map is not
/// woken.
#[test]
#[ignore = "limits TCP's memory in the whole machine: scripts/kernels.sh runs it"]
fn nothing_stays_spliced_while_tcp_is_short() {
    let node = Splicing::start("short", "sidecar");
    let pair = node.pair(Leg::Sidecar).roomy();
    let other = holds_memory(&node);
    let short = TcpMem::set("1 1 1000000");
    put(&other.server, &[0; 100_000]);
    node.wait_sockets(0);
    // Another one, which would be settled in half a second, waits for better times.
    let sockets = node.counter("splice_sockets");
    let fresh = node.connect(Leg::Sidecar);
    let came = || node.counter("splice_sockets") > sockets;
    wait_until("nothing", Duration::from_secs(1), came).expect_err("it came into the map");

    let bytes = Pattern::new(2).bytes(0, 20 * MESSAGE);
    let wait = edges(&pair.client);
    let none = TcpMem::set("1 1 1");
    let mut written = write(&pair.client, &bytes);
    assert!(written < bytes.len(), "TCP was not short");
    drop(none);
    drop(short);
    while written < bytes.len() {
        assert!(wait(), "the writer was not woken after {written} bytes");
        written += write(&pair.client, &bytes[written..]);
    }
    assert!(get(&pair.server, bytes.len()) == bytes, "other bytes were read than were written");

    node.wait_sockets(2);
    assert_eq!(redirected(&node, || fresh.prime()), 2, "{}", node.status());
}

/// A writer that was told to wait for memory, with nothing in TCP that would be acknowledged, is
/// woken, though the reader sends nothing, and what is queued keeps the connection in the map.
fn is_woken(
    node: &mut Splicing,
    pair: &Pair,
    shortage: impl FnOnce(),
    plenty: impl FnOnce(&mut Splicing),
) {
    assert_eq!(redirected(node, || put(&pair.client, b"queued")), 1, "{}", node.status());
    let bytes = Pattern::new(3).bytes(0, 20 * MESSAGE);
    let wait = edges(&pair.client);
    shortage();
    let mut written = 0;
    loop {
        let more = write(&pair.client, &bytes[written..]);
        written += more;
        wait_until("the writer's bytes to arrive", patience(), || unsent(&pair.client) == 0)
            .expect("acknowledged");
        if more == 0 {
            break;
        }
    }
    assert!(written < bytes.len(), "there was memory");
    plenty(node);
    while written < bytes.len() {
        assert!(wait(), "the writer was not woken after {written} bytes");
        written += write(&pair.client, &bytes[written..]);
    }
    assert_eq!(get(&pair.server, 6), b"queued");
    assert!(get(&pair.server, bytes.len()) == bytes, "other bytes were read than were written");
}

#[test]
#[ignore = "limits the memory of cgroups: scripts/kernels.sh runs it"]
fn the_writers_own_cgroup_is_at_its_limit() {
    let mut node = Splicing::start("writer", "sidecar");
    let groups = MemoryCgroups::new("writer", 1).expect("cgroups");
    let limit = |limit| groups.limit(0, limit).expect("a limit");
    let Pair { client, server } = connect(&node, &groups);
    let turned = Pair { client: server, server: client };
    is_woken(&mut node, &turned, || limit("0"), |_| limit("max"));
}

/// And the agent that would wake it has never seen it enrolled.
#[test]
#[ignore = "limits the memory of cgroups: scripts/kernels.sh runs it"]
fn the_writers_pod_has_left_while_it_waits() {
    let mut node = Splicing::start("writer-left", "sidecar");
    let groups = MemoryCgroups::new("writer-left", 1).expect("cgroups");
    let limit = |limit| groups.limit(0, limit).expect("a limit");
    let Pair { client, server } = connect(&node, &groups);
    let turned = Pair { client: server, server: client };
    let leave = |node: &mut Splicing| {
        node.agent.kill9();
        node.agent.remove_pod(&node.b).expect("removed");
        node.agent.restart().expect("starts");
        node.agent.wait_gone(&node.b).expect("gone");
        limit("max");
    };
    is_woken(&mut node, &turned, || limit("0"), leave);
}

/// From plenty to nothing between two looks of the agent.
#[test]
#[ignore = "limits TCP's memory in the whole machine: scripts/kernels.sh runs it"]
fn tcp_comes_to_its_limit_at_once() {
    let mut node = Splicing::start("at-once", "sidecar");
    let pair = node.pair(Leg::Sidecar).roomy();
    let _other = holds_memory(&node);
    let limited = Cell::new(None);
    let shortage = || limited.set(Some(TcpMem::set("1 1 1")));
    is_woken(&mut node, &pair, shortage, |_| drop(limited.take()));
}
