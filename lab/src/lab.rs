//! The lab: one node, which is a network namespace with a bridge.

use std::env;
use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32, Ordering};

use anyhow::{Context, Result, ensure};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::unistd::geteuid;

use crate::cgroup::{self, ChildCgroup, LabCgroup};
use crate::netns::Netns;
use crate::pod::{Pod, PodNet};

static COUNTER: AtomicU32 = AtomicU32::new(0);

/// A node of its own: a network namespace with the bridge `br0` (10.77.0.1/16, fd77::1/64), a
/// cgroup, and a directory for files. Labs do not see each other, so all use the same addresses.
pub struct Lab {
    inner: Arc<Inner>,
}

// Dropped in this order, after the last pod.
pub(crate) struct Inner {
    pub(crate) id: String,
    pub(crate) node: Netns,
    pub(crate) dir: TempDir,
    pub(crate) cgroup: LabCgroup,
    pub(crate) number: u32,
    pods: AtomicU16,
    files: AtomicU32,
}

impl Lab {
    /// Makes the node. `tag` only shows in file names. Fails when not root, or when `ip` or
    /// cgroup v2 is missing.
    pub fn new(tag: &str) -> Result<Self> {
        ensure!(geteuid().is_root(), "the lab needs root (it makes network namespaces)");
        raise_file_limit().context("raising the limit of open files")?;
        let number = COUNTER.fetch_add(1, Ordering::Relaxed);
        let id = format!("sl{}-{number}", process::id());
        let cgroup = LabCgroup::join()?;
        let dir = TempDir::new(&format!("{}{}-{number}-{tag}", cgroup::PREFIX, process::id()))?;
        let node = Netns::add(format!("{id}-node"))?;
        // A bridge hands its packets to iptables by default, and would let them be translated
        // twice.
        for call in ["iptables", "ip6tables", "arptables"] {
            let key = format!("net.bridge.bridge-nf-call-{call}");
            if Path::new("/proc/sys").join(key.replace('.', "/")).exists() {
                node.sysctl(&key, "0")?;
            }
        }
        node.sysctl("net.ipv6.conf.default.accept_dad", "0")?;
        // A bridge without an address of its own has its lowest port's. When that goes, which is
        // some time after its pod, the others' neighbour entries lead nowhere for half a minute.
        node.ip("link set lo up\n\
             link add br0 address 02:00:0a:4d:00:01 type bridge stp_state 0 forward_delay 0 mcast_snooping 0\n\
             addr add 10.77.0.1/16 dev br0\n\
             addr add fd77::1/64 dev br0 nodad\n\
             link set br0 up\n")?;
        let (pods, files) = (AtomicU16::new(0), AtomicU32::new(0));
        Ok(Self { inner: Arc::new(Inner { id, node, dir, cgroup, number, pods, files }) })
    }

    /// Adds a pod to the node.
    pub fn pod(&self, name: &str, net: PodNet) -> Result<Pod> {
        Pod::new(self.inner.clone(), name, net).with_context(|| format!("making the pod {name}"))
    }

    /// Runs `work` as root in a thread inside the node's namespace, where the kubelet would be.
    pub fn on_node<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        self.inner.node.run(0, 0, work)
    }

    /// The same while this process is outside of [`Lab::cgroup`], for sockets that no agent is to
    /// see. Nothing else of this process should make any meanwhile.
    pub fn on_node_outside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        self.on_node(|| cgroup::outside(work))?
    }

    /// Runs lines of `ip` commands on the node, without the word `ip`. Gives what they printed.
    pub fn ip_on_node(&self, batch: &str) -> Result<String> {
        self.inner.node.ip(batch)
    }

    /// Sets a sysctl such as `net.ipv4.ip_forward` on the node.
    pub fn sysctl_on_node(&self, key: &str, value: &str) -> Result<()> {
        self.inner.node.sysctl(key, value)
    }

    /// Gives the node one more address, such as a ClusterIP that a test wants answered.
    pub fn add_node_address(&self, ip: IpAddr) -> Result<()> {
        self.inner.node.add_address(ip, if ip.is_ipv4() { 32 } else { 128 }, "lo", "")
    }

    /// The cgroup that this process and all processes of its pods are in: what the agent's
    /// `--cgroup` should be. All labs of a process share it.
    pub fn cgroup(&self) -> &Path {
        self.inner.cgroup.dir()
    }

    /// Moves this process to a cgroup below [`Lab::cgroup`], until that is dropped.
    pub fn enter_child_cgroup(&self) -> Result<ChildCgroup> {
        ChildCgroup::enter(self.cgroup(), &format!("{}-child", self.inner.number))
    }

    /// The lab's directory: logs, configurations, sockets. Removed with the lab.
    pub fn dir(&self) -> &Path {
        self.inner.dir.path()
    }

    /// The name of the node's namespace, for `ip -n`.
    pub fn node_name(&self) -> &str {
        &self.inner.node.name
    }

    pub(crate) fn inner(&self) -> &Arc<Inner> {
        &self.inner
    }
}

impl Inner {
    /// A number for the next pod of this lab, counted from 0. At most 1000.
    pub(crate) fn next_pod(&self) -> Result<u16> {
        let number = self.pods.fetch_add(1, Ordering::Relaxed);
        ensure!(number < 1000, "too many pods");
        Ok(number)
    }

    /// A path in the lab's directory that no one else has: `NAME-NUMBER.EXTENSION`.
    pub(crate) fn new_path(&self, name: &str, extension: &str) -> PathBuf {
        let number = self.files.fetch_add(1, Ordering::Relaxed);
        self.dir.path().join(format!("{name}-{number}.{extension}"))
    }

    /// A new cgroup for child processes, below the lab's.
    pub(crate) fn leaf_cgroup(&self, name: &str) -> Result<LeafCgroup> {
        let dir = self.cgroup.dir().join(format!("{}-{name}", self.number));
        fs::create_dir(&dir).with_context(|| format!("making {}", dir.display()))?;
        Ok(LeafCgroup(dir))
    }
}

/// A cgroup for child processes. They are killed, and it is removed, on drop.
pub(crate) struct LeafCgroup(pub(crate) PathBuf);

impl Drop for LeafCgroup {
    fn drop(&mut self) {
        if let Err(err) = cgroup::remove(&self.0) {
            eprintln!("lab: {err:#}");
        }
    }
}

/// A directory below the system's one for temporary files, removed on drop.
pub(crate) struct TempDir(PathBuf);

impl TempDir {
    fn new(name: &str) -> Result<Self> {
        let dir = env::temp_dir().join(name);
        fs::create_dir(&dir).with_context(|| format!("making {}", dir.display()))?;
        Ok(Self(dir))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Thousands of connections have both their ends in this process.
fn raise_file_limit() -> Result<()> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    let wanted = hard.min(65536);
    if soft < wanted {
        setrlimit(Resource::RLIMIT_NOFILE, wanted, hard)?;
    }
    Ok(())
}
