//! Threads in another network namespace and with another file system uid and gid.

use std::fs::{self, File};
use std::net::IpAddr;
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sched::{CloneFlags, setns};
use nix::unistd::{Gid, Uid, setfsgid, setfsuid};

use crate::cmd;
use crate::wait::wait_until;

/// A route to an address of the machine's own.
const RTF_LOCAL: u32 = 0x8000_0000;

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

    /// Runs lines of `ip` commands inside, and gives what they printed.
    pub(crate) fn ip(&self, batch: &str) -> Result<String> {
        cmd::feed(&["ip", "-n", &self.name, "-batch", "-"], batch)
    }

    /// Gives a device an address, which is in force when this returns. `more` is what `ip addr add`
    /// is told besides.
    pub(crate) fn add_address(&self, ip: IpAddr, bits: u8, device: &str, more: &str) -> Result<()> {
        let nodad = if ip.is_ipv6() { "nodad" } else { "" };
        self.ip(&format!("addr add {ip}/{bits} dev {device} {nodad} {more}\n"))?;
        self.wait_local(ip)
    }

    /// Waits until an address is in force: the kernel makes an IPv6 address' route some time after
    /// it has said that it is there, and answers "unreachable" until then.
    pub(crate) fn wait_local(&self, ip: IpAddr) -> Result<()> {
        let IpAddr::V6(ip) = ip else { return Ok(()) };
        // "destination prefixlength ... flags device", in hexadecimal
        let (destination, host) = (format!("{:032x}", u128::from(ip)), "80");
        let is_local = |line: &str| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            let flags = fields.get(8).and_then(|flags| u32::from_str_radix(flags, 16).ok());
            fields.starts_with(&[&destination, host])
                && flags.is_some_and(|flags| flags & RTF_LOCAL != 0)
        };
        self.run(0, 0, || {
            wait_until(&format!("{ip} to be local"), Duration::from_secs(10), || {
                let routes = fs::read_to_string("/proc/thread-self/net/ipv6_route");
                routes.unwrap_or_default().lines().any(is_local)
            })
        })?
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
    ensure!(setfsgid(gid) == gid && setfsuid(uid) == uid, "cannot act as {uid}:{gid}");
    Ok(())
}
