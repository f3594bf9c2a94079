//! Threads in another network namespace and with another file system uid and gid.

use std::fs::{self, File};
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::thread;

use anyhow::{Context, Result, ensure};
use nix::sched::{CloneFlags, setns};
use nix::unistd::{Gid, Uid, setfsgid, setfsuid};

use crate::cmd;

/// Where `ip netns` keeps its namespaces.
pub(crate) const DIR: &str = "/run/netns";

/// The path of a namespace made by `ip netns add`.
pub(crate) fn path(name: &str) -> PathBuf {
    Path::new(DIR).join(name)
}

/// A namespace made by `ip netns add`, deleted on drop.
pub(crate) struct Netns {
    pub(crate) name: String,
}

impl Netns {
    pub(crate) fn add(name: String) -> Result<Self> {
        cmd::run(&["ip", "netns", "add", &name])?;
        Ok(Self { name })
    }

    pub(crate) fn path(&self) -> PathBuf {
        path(&self.name)
    }

    /// Runs lines of `ip` commands inside.
    pub(crate) fn ip(&self, batch: &str) -> Result<()> {
        cmd::feed(&["ip", "-n", &self.name, "-batch", "-"], batch).map(drop)
    }

    /// Runs a command inside (its mount namespace stays ours, unlike with `ip netns exec`).
    pub(crate) fn command(&self, argv: &[&str], input: &str) -> Result<String> {
        let net = format!("--net={}", self.path().display());
        let mut all = vec!["nsenter", &net, "--"];
        all.extend(argv);
        cmd::feed(&all, input)
    }

    /// Sets a sysctl such as `net.ipv6.conf.all.forwarding` inside.
    pub(crate) fn sysctl(&self, key: &str, value: &str) -> Result<()> {
        let file = Path::new("/proc/sys").join(key.replace('.', "/"));
        self.run(0, 0, || fs::write(&file, value))?
            .with_context(|| format!("setting {key} to {value} in {}", self.name))
    }

    /// Runs `work` in a thread of its own inside. A panic in it goes on in the caller.
    pub(crate) fn run<T: Send>(
        &self,
        uid: u32,
        gid: u32,
        work: impl FnOnce() -> T + Send,
    ) -> Result<T> {
        run(&self.path(), uid, gid, work)
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        if let Err(err) = cmd::run(&["ip", "netns", "delete", &self.name]) {
            eprintln!("lab: {err:#}");
        }
    }
}

/// Runs `work` in a thread of its own inside the namespace at `path`. A panic in it goes on in
/// the caller.
pub(crate) fn run<T: Send>(
    path: &Path,
    uid: u32,
    gid: u32,
    work: impl FnOnce() -> T + Send,
) -> Result<T> {
    thread::scope(|scope| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let thread = thread::Builder::new()
            .name(name.into_owned())
            .spawn_scoped(scope, || enter(path, uid, gid).map(|()| work()))
            .context("starting a thread")?;
        thread.join().unwrap_or_else(|panic| resume_unwind(panic))
    })
}

/// Moves the calling thread into a network namespace and gives its new sockets an owner.
/// A socket takes its creator's *file system* uid and gid, which the kernel keeps per thread;
/// the thread's real uid remains root.
pub(crate) fn enter(path: &Path, uid: u32, gid: u32) -> Result<()> {
    let file = File::open(path).with_context(|| format!("opening {}", path.display()))?;
    setns(file, CloneFlags::CLONE_NEWNET)
        .with_context(|| format!("entering {}", path.display()))?;
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    setfsgid(gid);
    setfsuid(uid);
    // Neither call reports a failure: both give the id as it was, so ask again.
    ensure!(setfsgid(gid) == gid && setfsuid(uid) == uid, "can't act as {uid}:{gid}");
    Ok(())
}
