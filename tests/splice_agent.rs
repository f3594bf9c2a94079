//! Spliced connections while the agent and pods come and go: not a byte is lost, and none stalls.

mod common;

use std::{
    io::{ErrorKind, Write},
    net::{Shutdown, TcpStream},
    os::fd::AsRawFd,
    process::{Command, Stdio},
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread::{self, Scope},
    time::{Duration, Instant},
};

use common::{
    annotated, patience,
    programs::sockmap,
    splicing::{LARGE, Leg, OPT_OUT, Pair, Splicing, events, get, put, ready, say_rest},
};
use libbpf_rs::{MapCore, MapFlags, MapHandle};
use nix::{poll::PollFlags, sys::epoll::EpollFlags};
use serde_json::Value;
use sidestep::dataplane::LAYOUT;
use sidestep_lab::{
    Pod,
    calls::{self, ReadCall},
    pattern::{Checker, Pattern, mix},
    wait_until,
};

/// Streams both ways on some connections, with messages of all sizes, until it is dropped.
struct Flows<'a> {
    stop: AtomicBool,
    moved: Vec<AtomicU64>,
    pairs: &'a [Pair],
}

impl<'a> Flows<'a> {
    fn new(pairs: &'a [Pair]) -> Self {
        let moved = (0..2 * pairs.len()).map(|_| AtomicU64::new(0)).collect();
        Self { stop: AtomicBool::new(false), moved, pairs }
    }

    fn start<'s>(&'s self, scope: &'s Scope<'s, '_>) {
        for (number, pair) in self.pairs.iter().enumerate() {
            for (way, (from, to)) in
                [(&pair.client, &pair.server), (&pair.server, &pair.client)].into_iter().enumerate()
            {
                let key = (2 * number + way) as u64;
                scope.spawn(move || self.write(from, key));
                scope.spawn(move || self.read(to, key));
            }
        }
    }

    fn write(&self, to: &TcpStream, key: u64) {
        let pattern = Pattern::new(key);
        let mut position = 0;
        while !self.stop.load(Ordering::Relaxed) {
            // Mostly small ones, or it would be bulk and leave.
            let dice = mix(key ^ (position << 8));
            let most = if dice.is_multiple_of(256) { 2 * LARGE as u64 } else { 2000 };
            let size = 1 + (dice >> 8) % most;
            put(to, &pattern.bytes(position, size as usize));
            position += size;
            // The reader is to catch up now and then, or what is left to TCP would be bulk as well.
            if (dice >> 40).is_multiple_of(16) {
                self.wait_read(key, position);
            }
        }
        to.shutdown(Shutdown::Write).expect("shut down");
    }

    fn read(&self, from: &TcpStream, key: u64) {
        let mut checker = Checker::new(Pattern::new(key));
        let mut buffer = [0; 1 << 10];
        loop {
            match calls::read(from, ReadCall::Read, &mut buffer) {
                Ok(0) => return,
                Ok(n) => checker.check(&buffer[..n]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    let there = ready(from, PollFlags::POLLIN, patience());
                    assert!(there, "way {key} stands still after {} bytes", checker.received());
                }
                Err(error) => panic!("way {key} after {} bytes: {error}", checker.received()),
            }
            self.moved[key as usize].store(checker.received(), Ordering::Relaxed);
            assert_eq!(checker.damage(), None, "way {key}");
        }
    }

    /// Waits until all has been read that was written, or the flows are to end.
    fn wait_read(&self, key: u64, position: u64) {
        let read = || self.moved[key as usize].load(Ordering::Relaxed) >= position;
        let stop = || self.stop.load(Ordering::Relaxed);
        let done = wait_until("the reader", Duration::from_secs(20), || read() || stop());
        done.unwrap_or_else(|error| panic!("way {key}: {error:#}: {:?}", self.moved));
    }

    /// Waits until so many bytes more have come on each way.
    fn wait_more(&self, bytes: u64) {
        let goals: Vec<u64> =
            self.moved.iter().map(|moved| moved.load(Ordering::Relaxed) + bytes).collect();
        wait_until("all flows to go on", Duration::from_secs(20), || {
            self.moved
                .iter()
                .zip(&goals)
                .all(|(moved, goal)| moved.load(Ordering::Relaxed) >= *goal)
        })
        .unwrap_or_else(|error| panic!("{error:#}: {:?}", self.moved));
    }
}

/// Ends the flows, also when an assertion fails, or the scope would wait for ever.
struct Finish<'a>(&'a AtomicBool);

impl Drop for Finish<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

const MORE: u64 = 200_000;

/// Does something to the node while flows are running on both legs.
fn with_flows(node: &mut Splicing, act: impl FnOnce(&mut Splicing, &Flows<'_>)) {
    let mut pairs = node.pairs(Leg::Sidecar, 2);
    pairs.extend(node.pairs(Leg::App, 2));
    let flows = Flows::new(&pairs);
    thread::scope(|scope| {
        flows.start(scope);
        let finish = Finish(&flows.stop);
        flows.wait_more(MORE);
        act(node, &flows);
        flows.wait_more(MORE);
        drop(finish);
    });
}

/// Waits for a restarted agent.
fn wait_restarted(node: &mut Splicing) {
    let begun = |node: &Splicing| node.agent.log().matches("BPF programs attached").count();
    let before = begun(node);
    node.agent.restart().expect("starts");
    wait_until("the new agent", Duration::from_secs(20), || begun(node) > before)
        .unwrap_or_else(|error| panic!("{error:#}; {}", node.agent.log_tail()));
}

#[test]
fn the_agent_is_killed_and_restarted() {
    let mut node = Splicing::start("kill", "all");
    with_flows(&mut node, |node, flows| {
        for _ in 0..3 {
            node.agent.kill9();
            flows.wait_more(MORE);
            busy(node, flows);
            wait_restarted(node);
            flows.wait_more(MORE);
            // What is new is spliced again, beside what was.
            let spliced = node.counter("splice_sockets");
            let fresh = node.connect(Leg::Sidecar);
            node.wait_spliced(spliced + 2);
            drop(fresh);
        }
        wait_restarted(node);
    });
}

#[test]
fn another_mode_holds_for_what_is_open() {
    let mut node = Splicing::start("mode", "all");
    with_flows(&mut node, |node, flows| {
        node.agent.restart_with(&["--splice", "off"]).expect("starts");
        quiet(node, flows);
        node.agent.restart_with(&["--splice", "all"]).expect("starts");
        busy(node, flows);
    });
}

#[test]
fn unload_in_mid_stream() {
    let mut node = Splicing::start("unload", "all");
    with_flows(&mut node, |node, flows| {
        node.agent.terminate().expect("ends");
        flows.wait_more(MORE);
        let said = node.agent.command(&["unload"]).expect("unloads");
        assert!(said.contains("pins removed"), "{said}");
        flows.wait_more(MORE);
    });
}

#[test]
fn unload_waits_for_a_reader_that_has_stopped() {
    let mut node = Splicing::start("stopped", "all");
    let pairs = [node.pair(Leg::Sidecar), node.pair(Leg::App)];
    for Pair { client, .. } in &pairs {
        put(client, b"queued");
        put(client, &[1; LARGE]);
        put(client, b"behind");
    }
    node.agent.terminate().expect("ends");
    thread::scope(|scope| {
        let unload = scope.spawn(|| node.agent.command(&["unload"]));
        // It waits, and what is written meanwhile goes by TCP.
        let early = wait_until("its end", Duration::from_millis(500), || unload.is_finished());
        early.expect_err("redirected bytes are unread");
        for Pair { client, server } in &pairs {
            put(client, b"meanwhile");
            let bytes = get(server, 6 + LARGE + 6 + 9);
            assert!(bytes.starts_with(b"queued") && bytes.ends_with(b"behindmeanwhile"));
        }
        let said = unload.join().expect("no panic").expect("unloads");
        assert!(said.contains("pins removed"), "{said}");
    });
    for Pair { client, server } in pairs {
        put(&client, b"after");
        drop(client);
        assert_eq!(say_rest(&server), "5 bytes, end");
    }
}

/// Nothing is redirected any more, and all the flows go on.
fn quiet(node: &Splicing, flows: &Flows<'_>) {
    let start = Instant::now();
    loop {
        let before = node.counter("splice_messages");
        flows.wait_more(MORE);
        if node.counter("splice_messages") == before {
            return;
        }
        assert!(start.elapsed() < 3 * patience(), "still redirected");
    }
}

/// Something is redirected again.
fn busy(node: &Splicing, flows: &Flows<'_>) {
    let before = node.counter("splice_messages");
    wait_until("something to be redirected", Duration::from_secs(10), || {
        node.counter("splice_messages") > before
    })
    .unwrap_or_else(|error| panic!("{error:#}; {}", node.agent.log_tail()));
    flows.wait_more(MORE);
}

#[test]
fn pods_leave_and_come_back() {
    let mut node = Splicing::start("leave", "all");
    with_flows(&mut node, |node, flows| {
        for _ in 0..2 {
            node.agent.remove_pod(&node.a).expect("removed");
            node.agent.remove_pod(&node.b).expect("removed");
            node.agent.wait_gone(&node.a).expect("gone");
            node.agent.wait_gone(&node.b).expect("gone");
            quiet(node, flows);
            node.agent.add_pod(&node.a).expect("added");
            node.agent.add_pod(&node.b).expect("added");
            node.agent.wait_enrolled(&node.a).expect("enrolled");
            node.agent.wait_enrolled(&node.b).expect("enrolled");
            flows.wait_more(MORE);
        }
    });
}

#[test]
fn pods_opt_out_and_in_while_they_talk() {
    let mut node = Splicing::start("optout", "all");
    with_flows(&mut node, |node, flows| {
        let with = |text: &str| {
            for (name, pod) in [("a", &node.a), ("b", &node.b)] {
                let manifest: Value = annotated(pod.manifest(), OPT_OUT, text);
                node.agent.add_manifest(name, &manifest).expect("manifest");
            }
        };
        for _ in 0..2 {
            with("disabled");
            quiet(node, flows);
            with("enabled");
            busy(node, flows);
        }
    });
}

/// The filters that this takes stay on a pod's devices when it leaves; `unload` takes them away
/// (tests/unload.rs).
#[test]
fn pods_that_have_left_still_reset_what_they_close_with_unread_bytes() {
    let mut node = Splicing::start("left", "all");
    let legs = [Leg::Sidecar, Leg::App];
    let [close, shut_down, before] = [(); 3].map(|()| legs.map(|leg| node.pair(leg)));
    for pair in close.iter().chain(&shut_down).chain(&before) {
        put(&pair.client, b"never read");
    }
    // There, the filter is too late, and the agent has to do it: one that is not there yet, and
    // has not seen these pods enrolled.
    let shut_down_and_close = |Pair { client, server }: Pair| {
        server.shutdown(Shutdown::Write).expect("shut down");
        events(&client, EpollFlags::EPOLLRDHUP, patience());
        client
    };
    let reset = |client: &TcpStream| {
        let seen = events(client, EpollFlags::empty(), patience());
        assert!(seen.contains(EpollFlags::EPOLLERR), "{seen:?}");
    };
    node.agent.kill9();
    let before = before.map(shut_down_and_close);
    for pod in [&node.a, &node.b] {
        node.agent.remove_pod(pod).expect("removed");
    }
    wait_restarted(&mut node);
    for pod in [&node.a, &node.b] {
        node.agent.wait_gone(pod).expect("gone");
    }
    before.iter().for_each(reset);
    shut_down.map(shut_down_and_close).iter().for_each(reset);
    for (leg, Pair { client, server }) in legs.iter().zip(close) {
        drop(server);
        events(&client, EpollFlags::EPOLLRDHUP, patience());
        assert_eq!(say_rest(&client), "0 bytes, ECONNRESET, then 0", "{leg:?}");
    }
}

/// Neither by it nor to it.
#[test]
fn nobody_splices_with_a_pod_that_has_opted_out() {
    let node = Splicing::start("optone", "sidecar");
    let pair = node.pair(Leg::Sidecar);
    let manifest = annotated(node.a.manifest(), OPT_OUT, "disabled");
    node.agent.add_manifest("a", &manifest).expect("manifest");
    wait_until("both ends to stop", Duration::from_secs(10), || {
        let before = node.counter("splice_messages");
        pair.prime();
        node.counter("splice_messages") == before
    })
    .unwrap_or_else(|error| panic!("{error:#}: {}", node.status()));
}

#[test]
fn each_message_goes_where_it_should() {
    let node = Splicing::start("messages", "sidecar");
    let Pair { client, server } = node.pair(Leg::Sidecar);
    let counters = || {
        ["splice_messages", "splice_bulk", "splice_spilled", "splice_unread"]
            .map(|name| node.counter(name))
    };
    let mut before = counters();
    let mut since = || {
        let now = counters();
        let more: Vec<u64> = now.iter().zip(before).map(|(now, before)| now - before).collect();
        before = now;
        more
    };
    // More than a queue takes, in all.
    for _ in 0..50 {
        put(&client, &[1; 2000]);
        get(&server, 2000);
    }
    assert_eq!(since(), [50, 0, 0, 0], "small ones, each of them read");
    put(&client, &[1; LARGE]);
    get(&server, LARGE);
    put(&client, b"small");
    get(&server, 5);
    assert_eq!(since(), [1, 1, 0, 0], "a large one, read, and a small one");
    put(&client, &[1; LARGE]);
    put(&client, b"small");
    get(&server, LARGE + 5);
    assert_eq!(since(), [0, 1, 0, 1], "a small one behind a large one that is not read");
    put(&client, &[1; 30_000]);
    put(&client, &[1; 30_000]);
    put(&client, &[1; 30_000]);
    put(&client, &[1; 10]);
    assert_eq!(since(), [2, 0, 1, 1], "more than a queue takes");
    get(&server, 60_000);
    put(&client, &[1; 10]);
    assert_eq!(since(), [0, 0, 0, 1], "the queue is empty, TCP is not");
    get(&server, 30_020);
    put(&client, b"small");
    get(&server, 5);
    assert_eq!(since(), [1, 0, 0, 0], "all is read");
}

#[test]
fn bulk_leaves_the_map_and_loses_nothing() {
    let node = Splicing::start("bulk", "all");
    for leg in [Leg::Sidecar, Leg::App] {
        let others = node.sockets();
        let Pair { client, server } = node.pair(leg);
        let spliced = node.sockets();
        let (sent, received) = (Pattern::new(1), Pattern::new(2));
        // In the queue, and not read while its socket is to leave.
        put(&server, &received.bytes(0, 1000));
        let mut checker = Checker::new(sent);
        let mut position = 0;
        let mut send = |checker: &mut Checker, size: usize| {
            put(&client, &sent.bytes(position, size));
            position += size as u64;
            checker.check(&get(&server, size));
            assert_eq!(checker.damage(), None);
        };
        let left = || node.counter("splice_left");
        let before = left();
        for _ in 0..150 {
            send(&mut checker, LARGE);
        }
        // Both ends are told to, and none goes while something is in its queue.
        for _ in 0..50 {
            send(&mut checker, LARGE);
            thread::sleep(Duration::from_millis(10));
        }
        assert_eq!((node.sockets(), left()), (spliced, before), "with unread bytes in a queue");
        let mut back = Checker::new(received);
        back.check(&get(&client, 1000));
        assert_eq!(back.damage(), None);
        wait_until("both ends to leave", Duration::from_secs(10), || node.sockets() == others)
            .unwrap_or_else(|error| panic!("{error:#}: {}", node.agent.log_tail()));
        wait_until("it to be counted", Duration::from_secs(10), || left() == before + 2)
            .unwrap_or_else(|error| panic!("{error:#}: {}", left()));
        // And both go on, as plain TCP.
        let messages = node.counter("splice_messages");
        send(&mut checker, LARGE);
        send(&mut checker, 10);
        put(&server, &received.bytes(1000, 10));
        back.check(&get(&client, 10));
        assert_eq!((back.damage(), node.counter("splice_messages")), (None, messages));
    }
}

/// Each message in the queue takes about a kilobyte that no socket is charged for.
#[test]
fn tiny_messages_that_nobody_reads_are_few() {
    let node = Splicing::start("tiny", "all");
    let pairs = [node.pair(Leg::Sidecar), node.pair(Leg::App)];
    for Pair { client, server } in pairs {
        let before = node.counter("splice_messages");
        for _ in 0..60_000 {
            put(&client, b"x");
        }
        let queued = node.counter("splice_messages") - before;
        assert!((1..=256).contains(&queued), "{queued} messages in the queue");
        assert!(get(&server, 60_000).iter().all(|byte| *byte == b'x'));
    }
}

#[test]
fn a_mode_is_what_it_says() {
    for (mode, sidecar, app) in [("off", 0, 0), ("sidecar", 2, 0), ("all", 2, 2)] {
        let node = Splicing::start(mode, mode);
        let pairs =
            [node.connect(Leg::Sidecar), node.connect(Leg::App), node.connect(Leg::PlainSidecar)];
        node.wait_sockets(sidecar + app);
        // No more come, for as long as they may take.
        let more = wait_until("more", Duration::from_secs(2), || node.sockets() > sidecar + app);
        more.expect_err("sockets that are not to be spliced");
        let before = node.counter("splice_messages");
        pairs.iter().for_each(Pair::prime);
        let redirected = node.counter("splice_messages") - before;
        assert_eq!(redirected, (sidecar + app) as u64, "--splice {mode}");
        let legs = &node.status()["splice"]["legs"];
        let on = |leg: &str| legs[leg]["on"].as_bool().expect("on or not");
        assert_eq!((on("sidecar"), on("app")), (sidecar > 0, app > 0), "--splice {mode}: {legs}");
    }
}

/// Loads nftables rules in a pod's network namespace.
fn nft(pod: &Pod, rules: &str) {
    let mut nft = Command::new("nsenter")
        .arg(format!("--net={}", pod.netns().display()))
        .args(["--", "nft", "-f", "-"])
        .stdin(Stdio::piped())
        .spawn()
        .expect("nft runs");
    nft.stdin.take().expect("a pipe").write_all(rules.as_bytes()).expect("written");
    assert!(nft.wait().expect("ends").success(), "nft refused {rules}");
}

/// One question and its answer; false: none came in time.
fn answered(Pair { client, server }: &Pair) -> bool {
    put(client, b"?");
    if !ready(server, PollFlags::POLLIN, patience() / 6) {
        return false;
    }
    get(server, 1);
    put(server, b"!");
    let came = ready(client, PollFlags::POLLIN, patience() / 6);
    if came {
        get(client, 1);
    }
    came
}

/// F41: all packets between the pods are dropped from some moment on, as a CNI's policy does.
#[test]
fn f41_a_policy_that_comes_later_stops_a_spliced_connection() {
    let node = Splicing::start_refreshing("policy", "sidecar", 1);
    let pair = node.connect(Leg::Sidecar);
    node.wait_spliced(2);
    let before = node.counter("splice_messages");
    for _ in 0..100 {
        assert!(answered(&pair));
    }
    assert!(node.counter("splice_messages") > before + 100, "nothing was redirected");
    nft(
        &node.b,
        r#"table inet rules {
            chain in {
                type filter hook input priority 0
                iifname != "lo" drop
            }
        }"#,
    );
    let start = Instant::now();
    while answered(&pair) {
        let limit = Duration::from_secs(1) + patience();
        assert!(
            start.elapsed() < limit,
            "it talks on {:?} after it was forbidden",
            start.elapsed()
        );
    }
    // Allowed again, nothing is lost, and the connection goes on: TCP sends it once more.
    nft(&node.b, "delete table inet rules");
    assert_eq!(get(&pair.server, 1), b"?");
    put(&pair.server, b"!");
    assert_eq!(get(&pair.client, 1), b"!");
}

/// F40: connection tracking forgets a connection of which it sees no packet; what is sent by TCP
/// again is then dropped by rules that let only known connections through.
#[test]
fn f40_conntrack_does_not_forget_a_spliced_connection_that_talks() {
    let node = Splicing::start_refreshing("conntrack", "sidecar", 1);
    nft(
        &node.b,
        r#"table ip rules {
            chain in {
                type filter hook input priority 0; policy drop;
                iifname "lo" accept
                ct state established accept
                tcp flags syn / fin,syn,rst,ack ct state new accept
            }
            chain out {
                type filter hook output priority 0; policy drop;
                oifname "lo" accept
                ct state established accept
            }
        }"#,
    );
    node.b.sysctl("net.netfilter.nf_conntrack_tcp_timeout_established", "3").expect("sysctl");
    let pair = node.connect(Leg::Sidecar);
    node.wait_spliced(2);
    let (before, start) = (node.counter("splice_messages"), Instant::now());
    let mut turns = 0;
    // Twice as long as conntrack remembers.
    while start.elapsed() < Duration::from_secs(6) {
        assert!(answered(&pair), "after {turns} turns");
        turns += 1;
    }
    let redirected = node.counter("splice_messages") - before;
    assert!(redirected > turns, "{redirected} messages of {turns} turns were redirected");
    put(&pair.server, &[1; LARGE]);
    assert_eq!(get(&pair.client, LARGE).len(), LARGE);
}

/// F43: a sidecar's socket that is in a sockmap of its own stays with TCP, and it is said why.
#[test]
fn f43_a_socket_in_another_sockmap_stays_with_tcp() {
    let splicing = Splicing::start("another-map", "sidecar");
    let another = sockmap();
    let pair = splicing.connect(Leg::Sidecar);
    let socket = pair.client.as_raw_fd().to_ne_bytes();
    another.update(&[0; 4], &socket, MapFlags::ANY).expect("it takes the socket");
    wait_until("the other end to be looked at", Duration::from_secs(10), || {
        splicing.counter("splice_in_other_map") == 1 && splicing.counter("splice_sockets") == 1
    })
    .unwrap_or_else(|error| panic!("{error:#}: {}", splicing.status()));
    (0..100).for_each(|_| pair.prime());
    assert_eq!(splicing.counter("splice_messages"), 0, "{}", splicing.status());
    assert_eq!(splicing.counter("splice_map_full"), 0, "{}", splicing.status());
}

/// F30: a pod's connections that are spliced take its own share of the room, and no more.
#[test]
fn f30_a_pod_with_too_many_spliced_sockets_takes_no_room_of_others() {
    let splicing = Splicing::start("share", "sidecar");
    let maps = splicing.agent.bpffs().join(LAYOUT).join("maps");
    let used = MapHandle::from_pinned_path(maps.join("splice_shares")).expect("a pinned map");
    let pods = splicing.status()["pods"].as_array().cloned().expect("pods");
    let a = pods.iter().find(|pod| pod["pod"] == "lab/a").expect("pod a");
    let a: u64 = a["netns_cookie"].as_str().and_then(|c| c.parse().ok()).expect("a cookie");
    let set = |count: u32| {
        used.update(&a.to_ne_bytes(), &count.to_ne_bytes(), MapFlags::ANY).expect("written");
    };
    let count = || {
        let value = used.lookup(&a.to_ne_bytes(), MapFlags::ANY).expect("read").expect("pod a's");
        u32::from_ne_bytes(value.try_into().expect("a number"))
    };
    set(2048);
    let pair = splicing.connect(Leg::Sidecar);
    wait_until("its end to be refused", Duration::from_secs(10), || {
        splicing.counter("splice_map_full") == 1 && splicing.counter("splice_sockets") == 1
    })
    .unwrap_or_else(|error| panic!("{error:#}: {}", splicing.status()));
    (0..100).for_each(|_| pair.prime());
    assert_eq!(splicing.counter("splice_messages"), 0, "by TCP: {}", splicing.status());
    drop(pair);
    set(0);
    let pairs = splicing.pairs(Leg::Sidecar, 3);
    assert_eq!(count(), 3);
    drop(pairs);
    wait_until("the share to come back", Duration::from_secs(10), || count() == 0)
        .unwrap_or_else(|error| panic!("{error:#}: {} are taken", count()));
}
