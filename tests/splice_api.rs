//! What a program sees of a spliced connection, call by call, beside what it sees of one that
//! is not. Where the kernel itself differs the row names the self-test's trial that finds it, so
//! that the leg where it hurts is off.

#![allow(unsafe_code, reason = "recvmmsg and io_uring")]

mod common;

use std::{
    io::Write,
    net::{Shutdown, TcpStream},
    os::fd::AsRawFd,
    sync::LazyLock,
    time::Duration,
};

use common::{
    patience,
    splicing::{
        self, LARGE, Leg, Observed, Pair, SEAM, Splicing, events, get, get_up_to, ioctl_int, put,
        ready, rows, say, say_rest, seen, settled, unsent,
    },
};
use nix::{
    fcntl::{OFlag, SpliceFFlags, splice},
    poll::PollFlags,
    sys::{
        epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout},
        socket::{MsgFlags, recv, send},
    },
    unistd::pipe2,
};
use sidestep_lab::{
    calls::{self, ReadCall, Wait, Waiter, WriteCall},
    pattern::{Checker, Pattern, mix},
};
use socket2::SockRef;

const NOSIG: MsgFlags = MsgFlags::MSG_NOSIGNAL;

type Row = splicing::Row<fn(&TcpStream, &TcpStream) -> String>;

rows![
    each_call,
    row(the_server_speaks_first, |client, server| {
        put(server, b"220 ready");
        let greeting = get(client, 9) == b"220 ready";
        put(client, b"EHLO");
        format!("{greeting} {}", get(server, 4) == b"EHLO")
    }),
    row(poll, |w, r| waits(w, r, Wait::Poll)),
    row(select, |w, r| waits(w, r, Wait::Select)),
    row(epoll_level, |w, r| waits(w, r, Wait::Level)),
    row(epoll_edge, |w, r| waits(w, r, Wait::Edge)),
    row(epoll_edge_short_reads["short read taken for end of file"], |w, r| {
        waits(w, r, Wait::EdgeShort)
    }),
    row(a_short_read_while_more_is_there["short read taken for end of file"], |writer, reader| {
        SEAM.iter().for_each(|size| put(writer, &vec![7; *size]));
        assert_eq!(settled(0, || unsent(writer)), 0, "all of it has arrived");
        assert!(ready(reader, PollFlags::POLLIN, patience()));
        let mut buffer = [0; 100_000];
        let first = calls::read(reader, ReadCall::Read, &mut buffer).expect("bytes");
        format!("{first} bytes at once")
    },),
    row(events_while_idle_with_bytes_after_the_end, |writer, reader| {
        let some = EpollFlags::EPOLLIN | EpollFlags::EPOLLRDHUP | EpollFlags::EPOLLPRI;
        let all = some | EpollFlags::EPOLLOUT;
        let idle = events(reader, all, Duration::ZERO);
        put(writer, b"bytes");
        let bytes = events(reader, some, patience());
        get(reader, 5);
        let read = events(reader, all, Duration::ZERO);
        writer.shutdown(Shutdown::Write).expect("shut down");
        events(reader, EpollFlags::EPOLLRDHUP, patience());
        let end = events(reader, all, Duration::ZERO);
        format!("{idle:?}; {bytes:?}; {read:?}; {end:?}")
    }),
    row(epoll_tells_of_each_message_by_an_edge, |writer, reader| {
        let epoll = Epoll::new(EpollCreateFlags::empty()).expect("epoll");
        let flags = EpollFlags::EPOLLIN | EpollFlags::EPOLLET;
        epoll.add(reader, EpollEvent::new(flags, 0)).expect("added");
        let mut edges = Vec::new();
        for size in [1, 100, LARGE, 1, LARGE, 5000] {
            put(writer, &vec![1; size]);
            let mut events = [EpollEvent::empty()];
            let n = epoll.wait(&mut events, EpollTimeout::from(3000_u16)).expect("epoll");
            edges.push((n, events[0].events().contains(EpollFlags::EPOLLIN)));
            get(reader, size);
            let error = say(calls::read(reader, ReadCall::Read, &mut [0]));
            assert_eq!(error, "EAGAIN");
        }
        format!("{edges:?}")
    }),
    row(a_writer_that_waits_for_room_is_woken, |writer, reader| {
        let mut sent = fill(writer);
        let mut waiter = Waiter::new(writer, Wait::Edge).expect("epoll");
        waiter.wait(writer, false, true, Duration::ZERO).expect("what is there now");
        get(reader, sent);
        let woken = waiter.wait(writer, false, true, patience()).expect("epoll");
        put(writer, b"more");
        sent += 4;
        get(reader, 4);
        format!("{woken:?} {}", sent > 4)
    }),
    row(f42_zero_length_read["zero-length read"], |writer, reader| {
        put(writer, b"bytes");
        get(reader, 5);
        format!("{:?}", recv(reader.as_raw_fd(), &mut [], MsgFlags::empty()))
    }),
    row(f42_partly_invalid_buffer["partly invalid buffer"], |writer, reader| {
        put(writer, &[7; 200]);
        assert_eq!(settled(200, || unread_bytes(reader)), 200);
        let seen = half_bad(reader);
        format!("{seen}, then {} bytes", get_up_to(reader, 200).0.len())
    }),
    row(msg_peek, |writer, reader| {
        put(writer, b"one");
        put(writer, b"two");
        let mut buffer = [0; 16];
        let mut peek =
            || settled(Ok(6), || recv(reader.as_raw_fd(), &mut buffer, MsgFlags::MSG_PEEK));
        let seen = [peek(), peek()];
        format!("{seen:?} {:?} {:?}", &buffer[..6], get(reader, 6))
    }),
    row(readv_recv_and_recvmsg, |writer, reader| {
        let mut seen = Vec::new();
        for call in ReadCall::ALL {
            put(writer, b"some bytes to read");
            assert!(ready(reader, PollFlags::POLLIN, patience()));
            let mut buffer = [0; 32];
            let n = calls::read(reader, call, &mut buffer).expect("bytes");
            seen.push((n, buffer.starts_with(b"some bytes to read\0")));
        }
        format!("{seen:?}")
    }),
    row(write_writev_send_sendmsg_sendfile_and_splice_from_a_pipe, |writer, reader| {
        let mut seen = Vec::new();
        for call in WriteCall::ALL {
            for size in [1, 10, 5000, 60_000] {
                let bytes = Pattern::new(size as u64).bytes(0, size);
                let mut sent = 0;
                while sent < size {
                    sent += calls::write(writer, call, &bytes[sent..]).expect("written");
                }
                assert_eq!(get(reader, size), bytes, "{call:?} of {size}");
                seen.push((call, size));
            }
        }
        format!("{seen:?}")
    }),
    row(recvmmsg, |writer, reader| {
        for text in [b"first ", b"second", b"third "] {
            put(writer, text);
        }
        assert!(ready(reader, PollFlags::POLLIN, patience()));
        let mut bytes = Vec::new();
        while bytes.len() < 18 {
            bytes.extend(recvmmsg(reader));
        }
        String::from_utf8(bytes).expect("text")
    }),
    row(an_empty_write, |writer, reader| {
        let sent = say((&*writer).write(b""));
        let seen = say(calls::read(reader, ReadCall::Read, &mut [0; 4]));
        put(writer, b"next");
        format!("{sent} {seen} {:?}", get(reader, 4))
    }),
    row(fionread["FIONREAD"], |writer, reader| {
        let (mut sent, mut seen) = (0, Vec::new());
        for size in SEAM {
            put(writer, &vec![7; size]);
            sent += size;
            seen.push(settled(sent, || pending(reader)));
        }
        get(reader, 5);
        seen.push(settled(sent - 5, || pending(reader)));
        get(reader, sent - 5);
        seen.push(settled(0, || pending(reader)));
        format!("{seen:?}")
    }),
    row(siocoutq_is_none_when_all_is_read, |writer, reader| {
        put(writer, &[1; 3000]);
        get(reader, 3000);
        settled(0, || unsent(writer)).to_string()
    }),
    row(splice_2_to_a_pipe["splice(2)"], |writer, reader| {
        put(writer, b"piped");
        let (from, to) = pipe2(OFlag::O_NONBLOCK).expect("a pipe");
        let spliced = settled(Ok(5), || {
            splice(reader, None, &to, None, 100, SpliceFFlags::SPLICE_F_NONBLOCK)
        });
        let mut buffer = [0; 16];
        let read = nix::unistd::read(&from, &mut buffer);
        format!("{spliced:?} {read:?}")
    }),
    row(msg_peek_over_the_seam, |writer, reader| {
        SEAM.iter().for_each(|size| put(writer, &vec![7; *size]));
        assert_eq!(settled(0, || unsent(writer)), 0, "all of it has arrived");
        let mut buffer = vec![0; 100_000];
        let peek = |buffer: &mut [u8]| recv(reader.as_raw_fd(), buffer, MsgFlags::MSG_PEEK);
        let first = peek(&mut buffer[..6]);
        // How much a peek shows is not promised; that it is what comes, is.
        let most = peek(&mut buffer).expect("bytes");
        let read = get(reader, SEAM.iter().sum());
        format!("{first:?} {}", most > 6 && read[..most] == buffer[..most])
    }),
    row(msg_waitall_without_waiting, |writer, reader| {
        put(writer, b"half");
        assert!(ready(reader, PollFlags::POLLIN, patience()));
        let fd = reader.as_raw_fd();
        format!("{:?}", recv(fd, &mut [0; 8], MsgFlags::MSG_WAITALL))
    }),
    row(msg_trunc_drops_bytes, |writer, reader| {
        put(writer, b"dropped, kept");
        assert!(ready(reader, PollFlags::POLLIN, patience()));
        let mut buffer = [b'-'; 9];
        let n = recv(reader.as_raw_fd(), &mut buffer, MsgFlags::MSG_TRUNC);
        format!("{n:?} {:?}", get(reader, 4))
    }),
    row(msg_oob["MSG_OOB"], |writer, reader| {
        put(writer, b"ab");
        send(writer.as_raw_fd(), b"!", MsgFlags::MSG_OOB | NOSIG).expect("sent");
        put(writer, b"cd");
        let urgent = ready_exactly(reader, EpollFlags::EPOLLPRI);
        let mut byte = [0];
        let oob = recv(reader.as_raw_fd(), &mut byte, MsgFlags::MSG_OOB);
        let (inline, _) = get_up_to(reader, 2);
        format!("{urgent} {oob:?} {byte:?} {inline:?} {:?}", get(reader, 2))
    }),
    row(so_rcvlowat["SO_RCVLOWAT"], |writer, reader| {
        setsockopt_int(reader, libc::SO_RCVLOWAT, 1000);
        put(writer, &[1; 500]);
        let early = ready_exactly(reader, EpollFlags::EPOLLIN);
        put(writer, &[1; 600]);
        let late = ready(reader, PollFlags::POLLIN, patience());
        setsockopt_int(reader, libc::SO_RCVLOWAT, 1);
        get(reader, 1100);
        format!("{early} {late}")
    }),
    row(tcp_info_and_tcp_user_timeout, |writer, reader| {
        let socket = SockRef::from(writer);
        socket.set_tcp_user_timeout(Some(Duration::from_millis(300))).expect("set");
        put(writer, b"data");
        // What nobody reads is not what nobody acknowledges.
        let hung = ready(writer, PollFlags::POLLHUP, Duration::from_millis(900));
        let info = tcp_info(writer);
        format!("{hung} state {} unacked {} {:?}", info.0, info.1, get(reader, 4))
    }),
    row(so_keepalive_on_an_idle_connection, |writer, reader| {
        for end in [writer, reader] {
            let probes = socket2::TcpKeepalive::new()
                .with_time(Duration::from_secs(1))
                .with_interval(Duration::from_secs(1))
                .with_retries(1);
            SockRef::from(end).set_tcp_keepalive(&probes).expect("set");
        }
        put(writer, b"x");
        get(reader, 1);
        // Longer than a dead peer would live.
        let hung = ready(reader, PollFlags::POLLHUP, Duration::from_millis(3500));
        put(reader, b"still there");
        format!("{hung} {:?}", get(writer, 11))
    }),
    row(tcp_cork_holds_back_and_lets_go, |writer, reader| {
        let socket = SockRef::from(writer);
        socket.set_tcp_cork(true).expect("TCP_CORK");
        put(writer, b"head ");
        put(writer, b"body");
        socket.set_tcp_cork(false).expect("TCP_CORK");
        format!("{:?}", get(reader, 9))
    }),
    row(a_receive_buffer_that_is_tiny, |writer, reader| {
        SockRef::from(reader).set_recv_buffer_size(2048).expect("SO_RCVBUF");
        SockRef::from(writer).set_send_buffer_size(4096).expect("SO_SNDBUF");
        stream(writer, reader, 300_000)
    }),
    row(io_uring, |writer, reader| {
        let mut ring = io_uring::IoUring::new(4).expect("a ring");
        let mut run = |entry: &io_uring::squeue::Entry| {
            // SAFETY: the buffers and sockets live until the completion is reaped.
            unsafe { ring.submission().push(entry) }.expect("pushed");
            ring.submit_and_wait(1).expect("submitted");
            ring.completion().next().expect("a completion").result()
        };
        let (w, r) = [writer, reader].map(|end| io_uring::types::Fd(end.as_raw_fd())).into();
        let (bytes, mut buffer) = (*b"by io_uring", [0_u8; 32]);
        let send = io_uring::opcode::Send::new(w, bytes.as_ptr(), 11).build();
        let receive = io_uring::opcode::Recv::new(r, buffer.as_mut_ptr(), 32).build();
        let sent = run(&send);
        assert!(ready(reader, PollFlags::POLLIN, patience()));
        let received = run(&receive);
        let poll = io_uring::opcode::PollAdd::new(r, libc::POLLIN as u32).build();
        put(writer, b"polled");
        let polled = run(&poll);
        format!("{sent} {received} {polled} {:?} {:?}", &buffer[..11], get(reader, 6))
    }),
    row(many_threads_write_records, |writer, reader| {
        const THREADS: u8 = 8;
        // All fits while nobody reads, so that each record is taken in one piece.
        const RECORDS: usize = 60;
        let mut counts = [0; THREADS as usize];
        std::thread::scope(|scope| {
            for thread in 0..THREADS {
                scope.spawn(move || (0..RECORDS).for_each(|_| put(writer, &[thread; 64])));
            }
        });
        for _ in 0..usize::from(THREADS) * RECORDS {
            let record = get(reader, 64);
            assert!(record.iter().all(|byte| *byte == record[0]), "mixed: {record:?}");
            counts[usize::from(record[0])] += 1;
        }
        format!("{counts:?}")
    }),
    row(half_close_either_way, |client, server| {
        put(client, b"request");
        client.shutdown(Shutdown::Write).expect("shut down");
        let request = say_rest(server);
        let after = say((&*client).write(b"x"));
        put(server, b"answer");
        put(server, &[1; LARGE]);
        server.shutdown(Shutdown::Write).expect("shut down");
        format!("{request}; {after}; {}", say_rest(client))
    }),
    row(shutdown_for_reading, |client, server| {
        client.shutdown(Shutdown::Read).expect("shut down");
        let read = say(calls::read(client, ReadCall::Read, &mut [0; 8]));
        put(client, b"still writes");
        format!("{read} {:?}", get(server, 12))
    }),
];

/// Bytes by messages of all sizes, both below and above what is redirected, to a reader that
/// waits in this way.
fn waits(writer: &TcpStream, reader: &TcpStream, wait: Wait) -> String {
    let sizes = [1, 64, LARGE, 1, 700, 9000, 2 * LARGE, 5, 30_000, 30_000, 30_000, 30_000, 64];
    let pattern = Pattern::new(9);
    let total: usize = sizes.iter().sum();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut position = 0;
            for size in sizes {
                put(writer, &pattern.bytes(position, size));
                position += size as u64;
            }
        });
        let mut waiter = Waiter::new(reader, wait).expect("a waiter");
        let mut checker = Checker::new(pattern);
        let mut buffer = vec![0; 100_000];
        // What comes first is waited for by all.
        while checker.received() < total as u64 {
            match waiter.wait(reader, true, false, patience()).expect("waits") {
                None => break,
                Some(ready) if !ready.read => continue,
                Some(_) => {}
            }
            while let Ok(n) = calls::read(reader, ReadCall::Read, &mut buffer) {
                checker.check(&buffer[..n]);
                if n == 0 || waiter.is_short(n, buffer.len()) {
                    break;
                }
            }
        }
        let stalled = checker.received() < total as u64;
        while checker.received() < total as u64 {
            let (bytes, _) = get_up_to(reader, total - checker.received() as usize);
            assert!(!bytes.is_empty(), "{} of {total} bytes", checker.received());
            checker.check(&bytes);
        }
        format!("stalled {stalled}, wrong {:?}", checker.damage())
    })
}

/// A stream of messages of many sizes.
fn stream(writer: &TcpStream, reader: &TcpStream, total: usize) -> String {
    let pattern = Pattern::new(3);
    let mut checker = Checker::new(pattern);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut position = 0;
            while position < total {
                let size = 1 + mix(position as u64) as usize % 10_000;
                let size = size.min(total - position);
                put(writer, &pattern.bytes(position as u64, size));
                position += size;
            }
        });
        while (checker.received() as usize) < total {
            let left = total - checker.received() as usize;
            let (bytes, end) = get_up_to(reader, left.min(3000));
            assert!(end.is_none() && !bytes.is_empty(), "{} bytes, {end:?}", checker.received());
            checker.check(&bytes);
        }
    });
    format!("{:?}", checker.damage())
}

/// Writes until there is no room, and no more comes.
fn fill(writer: &TcpStream) -> usize {
    let mut sent = 0;
    loop {
        match calls::write(writer, WriteCall::Write, &[3; 4000]) {
            Ok(n) => sent += n,
            Err(_) if ready(writer, PollFlags::POLLOUT, Duration::from_millis(200)) => {}
            Err(error) => {
                assert_eq!(error.raw_os_error(), Some(libc::EAGAIN));
                return sent;
            }
        }
    }
}

/// Whether these events come soon, and not only others.
fn ready_exactly(stream: &TcpStream, wanted: EpollFlags) -> bool {
    settled(true, || events(stream, wanted, Duration::ZERO).contains(wanted))
}

fn pending(stream: &TcpStream) -> usize {
    ioctl_int(stream, libc::FIONREAD)
}

fn setsockopt_int(stream: &TcpStream, option: libc::c_int, value: libc::c_int) {
    // SAFETY: the option is an int, which lives across the call.
    let rc = unsafe {
        libc::setsockopt(
            stream.as_raw_fd(),
            libc::SOL_SOCKET,
            option,
            (&raw const value).cast(),
            size_of_val(&value) as u32,
        )
    };
    assert_eq!(rc, 0, "{}", std::io::Error::last_os_error());
}

/// The state, and segments that are not acknowledged.
fn tcp_info(stream: &TcpStream) -> (u8, u32) {
    // SAFETY: a struct of integers.
    let mut info: libc::tcp_info = unsafe { std::mem::zeroed() };
    let mut len = size_of_val(&info) as u32;
    // SAFETY: the struct and its length live across the call.
    let rc = unsafe {
        libc::getsockopt(
            stream.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            (&raw mut info).cast(),
            &raw mut len,
        )
    };
    assert_eq!(rc, 0, "{}", std::io::Error::last_os_error());
    (info.tcpi_state, info.tcpi_unacked)
}

/// Two buffers of 8 bytes in one call.
fn recvmmsg(stream: &TcpStream) -> Vec<u8> {
    let mut buffers = [[0_u8; 8]; 2];
    let mut parts = buffers
        .each_mut()
        .map(|buffer| libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() });
    let mut headers = parts.each_mut().map(|part| {
        // SAFETY: a struct of integers and pointers.
        let mut header: libc::mmsghdr = unsafe { std::mem::zeroed() };
        header.msg_hdr.msg_iov = part;
        header.msg_hdr.msg_iovlen = 1;
        header
    });
    // SAFETY: headers, parts and buffers live across the call.
    let count = unsafe {
        libc::recvmmsg(stream.as_raw_fd(), headers.as_mut_ptr(), 2, 0, std::ptr::null_mut())
    };
    let count = usize::try_from(count).expect("messages");
    headers[..count]
        .iter()
        .zip(&buffers)
        .flat_map(|(header, buffer)| buffer[..header.msg_len as usize].to_vec())
        .collect()
}

/// What MSG_PEEK shows.
fn unread_bytes(stream: &TcpStream) -> usize {
    recv(stream.as_raw_fd(), &mut [0; 1000], MsgFlags::MSG_PEEK).unwrap_or(0)
}

/// A read into two buffers of 100 bytes, of which the second one is not mapped.
fn half_bad(stream: &TcpStream) -> String {
    let mut good = [0_u8; 100];
    let parts = [
        libc::iovec { iov_base: good.as_mut_ptr().cast(), iov_len: good.len() },
        libc::iovec { iov_base: std::ptr::without_provenance_mut(1), iov_len: 100 },
    ];
    // SAFETY: the first part is writable; the kernel answers EFAULT for the second, which is not.
    let read = unsafe { libc::readv(stream.as_raw_fd(), parts.as_ptr(), 2) };
    format!("{:?}", nix::errno::Errno::result(read))
}

static OBSERVED: LazyLock<Observed<String>> = LazyLock::new(|| {
    let node = Splicing::start("api", "all");
    let run = |row: &Row, leg: Leg, Pair { client, server }| {
        let redirected = (!leg.is_plain()).then(|| node.counter("splice_messages"));
        let seen = (row.act)(&client, &server);
        if let Some(before) = redirected {
            assert!(node.counter("splice_messages") > before, "nothing was redirected");
        }
        seen
    };
    Observed::new(&node, |leg| {
        let pairs = node.pairs(leg, ROWS.len()).into_iter().map(Pair::roomy);
        ROWS.iter().zip(pairs).map(|(row, pair)| seen(|| run(row, leg, pair))).collect()
    })
});

/// It waits for word of the pages that it sent, which only TCP gives.
#[test]
fn who_sends_without_copying_stays_out() {
    let node = Splicing::start("zerocopy", "all");
    let pair = node.connect(Leg::Sidecar);
    setsockopt_int(&pair.client, libc::SO_ZEROCOPY, 1);
    let witness = node.connect(Leg::Sidecar);
    // Both ends of the witness, and the other's server.
    node.wait_sockets(3);
    witness.prime();
    let redirected = node.counter("splice_messages");
    send(pair.client.as_raw_fd(), b"page", NOSIG | MsgFlags::from_bits_retain(libc::MSG_ZEROCOPY))
        .expect("sent");
    assert_eq!(get(&pair.server, 4), b"page");
    assert!(ready(&pair.client, PollFlags::POLLPRI, patience()), "no word of the page");
    put(&pair.server, b"answer");
    assert_eq!(get(&pair.client, 6), b"answer");
    assert_eq!(node.counter("splice_messages"), redirected);
}
