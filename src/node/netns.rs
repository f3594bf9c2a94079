//! Network namespaces: their identity, and how to enter one.

use std::{
    collections::BTreeSet,
    fmt,
    fs::File,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::{AsRawFd, RawFd},
    path::{Path, PathBuf},
    thread,
};

use anyhow::{Context, Result, anyhow, ensure};
use nix::{
    getsockopt_impl,
    sched::{CloneFlags, setns, unshare},
    sockopt_impl,
    sys::socket::{AddressFamily, SockFlag, SockType, getsockopt, socket},
};
use rtnetlink::LinkUnspec;

use crate::files;

/// The index of lo, in every network namespace.
pub const LO: u32 = 1;
/// The wildcard addresses: a socket bound to them accepts connections to all addresses.
pub const ANY: [IpAddr; 2] = [IpAddr::V4(Ipv4Addr::UNSPECIFIED), IpAddr::V6(Ipv6Addr::UNSPECIFIED)];
/// The addresses to which REDIRECT leads the pod's own packets.
pub const LOCALHOST: [IpAddr; 2] =
    [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)];

sockopt_impl!(
    /// The cookie of the network namespace that a socket is in.
    SoNetnsCookie, GetOnly, libc::SOL_SOCKET, libc::SO_NETNS_COOKIE, u64
);

/// The kernel's identity of a network namespace: never reused while the machine runs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
#[repr(transparent)]
pub struct NetnsCookie(pub u64);

impl NetnsCookie {
    /// A value that no namespace has.
    pub const NONE: Self = Self(0);

    /// The cookie of the calling thread's namespace.
    ///
    /// # Errors
    /// If no socket can be made, or the kernel has no cookies (before 5.14).
    pub fn current() -> Result<Self> {
        let (family, kind) = (AddressFamily::Unix, SockType::Datagram);
        let socket = socket(family, kind, SockFlag::SOCK_CLOEXEC, None);
        let socket = socket.context("cannot make a socket")?;
        getsockopt(&socket, SoNetnsCookie).map(Self).context("getsockopt(SO_NETNS_COOKIE)")
    }
}

impl fmt::Display for NetnsCookie {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::LowerHex for NetnsCookie {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// An open network namespace. Holding it keeps the namespace alive: do not.
#[derive(Debug)]
pub struct Netns {
    path: PathBuf,
    file: File,
}

impl Netns {
    /// Opens the namespace at `path`.
    ///
    /// # Errors
    /// If there is nothing at the path.
    pub fn open(path: &Path) -> Result<Self> {
        let file = files::open(path)
            .with_context(|| format!("cannot open network namespace {}", path.display()))?;
        Ok(Self { path: path.to_owned(), file })
    }

    /// Opens the namespace at `path`, if it is the one with this cookie: a process number may
    /// belong to another process by now.
    ///
    /// # Errors
    /// If there is nothing at the path, or another namespace.
    pub fn open_as(path: &Path, cookie: NetnsCookie) -> Result<Self> {
        let netns = Self::open(path)?;
        let found = netns.cookie()?;
        ensure!(found == cookie, "{} is now another network namespace", path.display());
        Ok(netns)
    }

    /// The path at which the namespace was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The kernel's identity of the namespace.
    ///
    /// # Errors
    /// If it is no network namespace, or cannot be entered.
    pub fn cookie(&self) -> Result<NetnsCookie> {
        self.inside(NetnsCookie::current)?
    }

    /// Runs `work` on a thread of its own inside the namespace.
    ///
    /// # Errors
    /// If the namespace cannot be entered.
    pub fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        thread::scope(|scope| {
            let thread = scope.spawn(|| {
                setns(&self.file, CloneFlags::CLONE_NEWNET)?;
                Ok::<T, nix::Error>(work())
            });
            thread.join()
        })
        .map_err(|_| anyhow!("the thread in network namespace {} panicked", self.path.display()))?
        .with_context(|| format!("cannot enter {} as a network namespace", self.path.display()))
    }
}

impl AsRawFd for Netns {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

/// Runs `work` on a thread of its own in a new network namespace, which has nothing but lo and goes
/// with the thread.
///
/// # Errors
/// If the namespace cannot be made.
pub fn in_new<T: Send>(work: impl FnOnce() -> T + Send) -> Result<T> {
    let made = || -> Result<T> {
        unshare(CloneFlags::CLONE_NEWNET).context("cannot create a network namespace")?;
        netlink(async |handle| {
            let up = LinkUnspec::new_with_index(LO).up().build();
            handle.link().set(up).execute().await.context("cannot bring lo up")
        })?;
        Ok(work())
    };
    let done = thread::scope(|scope| scope.spawn(made).join());
    done.map_err(|_| anyhow!("the thread in a new network namespace panicked"))?
}

/// Runs netlink requests in the calling thread's namespace.
pub(super) fn netlink<T, F: Future<Output = Result<T>>>(
    work: impl FnOnce(rtnetlink::Handle) -> F,
) -> Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
    runtime.block_on(async {
        let (connection, handle, _) = rtnetlink::new_connection()?;
        tokio::spawn(connection);
        work(handle).await
    })
}

/// The cookies of the namespaces that can never be a pod's: the agent's own, which is the node's,
///
/// # Errors
/// If the agent's own cannot be read.
pub fn host_cookies() -> Result<BTreeSet<NetnsCookie>> {
    let init = Netns::open(Path::new("/proc/1/ns/net")).and_then(|netns| netns.cookie());
    Ok(init.into_iter().chain([NetnsCookie::current()?]).collect())
}
