//! The many calls by which programs wait for, read from and write to a non-blocking socket.

use std::io::{self, ErrorKind, IoSlice, IoSliceMut, Read as _, Write as _};
use std::net::TcpStream;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{OFlag, SpliceFFlags, splice};
use nix::libc::MSG_MORE;
use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::select::{FdSet, select};
use nix::sys::sendfile::sendfile;
use nix::sys::socket::{MsgFlags, recv, recvmsg, send, sendmsg};
use nix::sys::time::{TimeVal, TimeValLike as _};
use nix::unistd::pipe2;

/// The highest descriptor that select() can name.
const SELECTABLE: i32 = 1023;

/// A way to wait for a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// poll().
    Poll,
    /// select(), where the descriptor fits.
    Select,
    /// epoll, level-triggered.
    Level,
    /// epoll, edge-triggered: reads and writes until EAGAIN.
    Edge,
    /// epoll, edge-triggered, taking fewer bytes than asked for as a sign that there are no
    /// more, as Tokio does.
    EdgeShort,
}

impl Wait {
    /// All but the last, which takes for granted what the kernel does not promise.
    pub const ALL: [Self; 4] = [Self::Poll, Self::Select, Self::Level, Self::Edge];
}

/// A way to read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadCall {
    /// read().
    Read,
    /// readv() into two buffers.
    Readv,
    /// recv() with a flag that changes nothing.
    Recv,
    /// recvmsg() into three buffers.
    Recvmsg,
    /// recv(MSG_PEEK), then read().
    PeekFirst,
}

impl ReadCall {
    /// All ways to read.
    pub const ALL: [Self; 5] =
        [Self::Read, Self::Readv, Self::Recv, Self::Recvmsg, Self::PeekFirst];
}

/// A way to write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WriteCall {
    /// write().
    Write,
    /// writev() from two buffers.
    Writev,
    /// send(MSG_NOSIGNAL).
    Send,
    /// send(MSG_MORE) of a half, but for the last byte.
    More,
    /// sendmsg() from three buffers.
    Sendmsg,
    /// sendfile() from a file in memory.
    Sendfile,
    /// splice() from a pipe.
    Splice,
}

impl WriteCall {
    /// All ways to write.
    pub const ALL: [Self; 7] = [
        Self::Write,
        Self::Writev,
        Self::Send,
        Self::More,
        Self::Sendmsg,
        Self::Sendfile,
        Self::Splice,
    ];
}

/// What can be tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ready {
    /// Whether a read can be tried.
    pub read: bool,
    /// Whether a write can be tried.
    pub write: bool,
}

/// Waits for one socket.
pub struct Waiter {
    wait: Wait,
    epoll: Option<Epoll>,
    /// An edge that comes only once: the connection ended in some way.
    closed: bool,
}

impl Waiter {
    /// Gets ready to wait.
    pub fn new(stream: &TcpStream, wait: Wait) -> io::Result<Self> {
        let wait = match wait {
            Wait::Select if stream.as_raw_fd() > SELECTABLE => Wait::Poll,
            _ => wait,
        };
        let epoll = match wait {
            Wait::Poll | Wait::Select => None,
            Wait::Level => {
                let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
                epoll.add(stream, EpollEvent::empty())?;
                Some(epoll)
            }
            Wait::Edge | Wait::EdgeShort => {
                let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
                let flags = EpollFlags::EPOLLIN
                    | EpollFlags::EPOLLOUT
                    | EpollFlags::EPOLLRDHUP
                    | EpollFlags::EPOLLET;
                epoll.add(stream, EpollEvent::new(flags, 0))?;
                Some(epoll)
            }
        };
        Ok(Self { wait, epoll, closed: false })
    }

    /// Whether `n` of `asked` bytes mean that there are no more for now.
    pub fn is_short(&self, n: usize, asked: usize) -> bool {
        self.wait == Wait::EdgeShort && n < asked && !self.closed
    }

    /// Waits until the socket can be read from or written to, or has an error. None: it took
    /// longer than `limit`. An edge-triggered waiter waits for whatever comes next.
    pub fn wait(
        &mut self,
        stream: &TcpStream,
        to_read: bool,
        to_write: bool,
        limit: Duration,
    ) -> io::Result<Option<Ready>> {
        let millis = u16::try_from(limit.as_millis()).unwrap_or(u16::MAX);
        let both = |n| (n > 0).then_some(Ready { read: true, write: true });
        let ready = match (self.wait, &self.epoll) {
            (Wait::Select, _) => {
                let (mut reads, mut writes, mut errors) =
                    (FdSet::new(), FdSet::new(), FdSet::new());
                for (wanted, set) in
                    [(to_read, &mut reads), (to_write, &mut writes), (true, &mut errors)]
                {
                    if wanted {
                        set.insert(stream.as_fd());
                    }
                }
                let mut limit = TimeVal::milliseconds(millis.into());
                select(None, &mut reads, &mut writes, &mut errors, &mut limit).map(both)
            }
            (_, None) => {
                let mut flags = PollFlags::empty();
                flags.set(PollFlags::POLLIN, to_read);
                flags.set(PollFlags::POLLOUT, to_write);
                poll(&mut [PollFd::new(stream.as_fd(), flags)], millis).map(both)
            }
            (wait, Some(epoll)) => {
                if wait == Wait::Level {
                    let mut flags = EpollFlags::empty();
                    flags.set(EpollFlags::EPOLLIN, to_read);
                    flags.set(EpollFlags::EPOLLOUT, to_write);
                    epoll.modify(stream, &mut EpollEvent::new(flags, 0))?;
                }
                let mut events = [EpollEvent::empty()];
                epoll.wait(&mut events, EpollTimeout::from(millis)).map(|n| {
                    let other =
                        EpollFlags::EPOLLRDHUP | EpollFlags::EPOLLHUP | EpollFlags::EPOLLERR;
                    let has = |flag| events[0].events().intersects(flag | other);
                    self.closed |= events[0].events().intersects(other);
                    (n > 0).then(|| Ready {
                        read: has(EpollFlags::EPOLLIN),
                        write: has(EpollFlags::EPOLLOUT),
                    })
                })
            }
        };
        match ready {
            Err(Errno::EINTR) => Ok(both(1)),
            ready => Ok(ready?),
        }
    }
}

/// Reads once. WouldBlock: nothing is there now.
pub fn read(mut stream: &TcpStream, call: ReadCall, buffer: &mut [u8]) -> io::Result<usize> {
    let fd = stream.as_raw_fd();
    match call {
        ReadCall::Read => stream.read(buffer),
        ReadCall::Readv => {
            let (a, b) = buffer.split_at_mut(buffer.len() / 2);
            stream.read_vectored(&mut [IoSliceMut::new(a), IoSliceMut::new(b)])
        }
        ReadCall::Recv => Ok(recv(fd, buffer, MsgFlags::MSG_NOSIGNAL)?),
        ReadCall::Recvmsg => {
            let (a, rest) = buffer.split_at_mut(buffer.len() / 3);
            let (b, c) = rest.split_at_mut(rest.len() / 2);
            let mut parts = [IoSliceMut::new(a), IoSliceMut::new(b), IoSliceMut::new(c)];
            Ok(recvmsg::<()>(fd, &mut parts, None, MsgFlags::empty())?.bytes)
        }
        ReadCall::PeekFirst => {
            let mut peeked = [0; 64];
            let part = buffer.len().min(peeked.len());
            let peeked = &mut peeked[..part];
            let seen = recv(fd, peeked, MsgFlags::MSG_PEEK)?;
            let n = stream.read(buffer)?;
            if n < seen || buffer[..seen] != peeked[..seen] {
                return Err(io::Error::new(
                    ErrorKind::InvalidData,
                    format!("MSG_PEEK showed {seen} bytes that read() then did not give"),
                ));
            }
            Ok(n)
        }
    }
}

/// Writes once. WouldBlock: there is no room now.
pub fn write(mut stream: &TcpStream, call: WriteCall, bytes: &[u8]) -> io::Result<usize> {
    let fd = stream.as_raw_fd();
    match call {
        WriteCall::Write => stream.write(bytes),
        WriteCall::Writev => {
            let (a, b) = bytes.split_at(bytes.len() / 2);
            stream.write_vectored(&[IoSlice::new(a), IoSlice::new(b)])
        }
        WriteCall::Send => Ok(send(fd, bytes, MsgFlags::MSG_NOSIGNAL)?),
        WriteCall::More => {
            // What is held back goes with the call that does not: that of the last byte.
            let half = &bytes[..bytes.len() / 2];
            if half.is_empty() {
                return Ok(send(fd, bytes, MsgFlags::MSG_NOSIGNAL)?);
            }
            let more = MsgFlags::MSG_NOSIGNAL | MsgFlags::from_bits_retain(MSG_MORE);
            Ok(send(fd, half, more)?)
        }
        WriteCall::Sendmsg => {
            let (a, rest) = bytes.split_at(bytes.len() / 3);
            let (b, c) = rest.split_at(rest.len() / 2);
            let parts = [IoSlice::new(a), IoSlice::new(b), IoSlice::new(c)];
            Ok(sendmsg::<()>(fd, &parts, &[], MsgFlags::MSG_NOSIGNAL, None)?)
        }
        WriteCall::Sendfile => {
            // A new one each time: its pages may be on their way for long.
            let file: OwnedFd = memfd_create(c"bytes", MFdFlags::MFD_CLOEXEC)?;
            nix::unistd::write(&file, bytes)?;
            Ok(sendfile(stream, &file, Some(&mut 0), bytes.len())?)
        }
        WriteCall::Splice => {
            // What the socket does not take is dropped with the pipe, and written again.
            let (from, to) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
            let n = nix::unistd::write(&to, bytes)?;
            let flags = SpliceFFlags::SPLICE_F_NONBLOCK;
            Ok(splice(&from, None, stream, None, n, flags)?)
        }
    }
}
