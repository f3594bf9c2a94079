//! The lab's control groups (v2). A socket belongs to the cgroup of the process that made it,
//! so this process itself moves into the lab's cgroup for as long as there is a lab.

use std::fs;
use std::path::{Path, PathBuf};
use std::process;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::wait::wait_stubbornly;

pub(crate) const PREFIX: &str = "sidestep-lab-";

/// Where cgroup v2 is mounted, from /proc/self/mountinfo.
pub(crate) fn v2_root() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").context("reading mountinfo")?;
    mounts
        .lines()
        .find_map(|line| {
            // "id parent major:minor root mountpoint options... - type source options"
            let (left, right) = line.split_once(" - ")?;
            (right.split(' ').next()? == "cgroup2").then(|| left.split(' ').nth(4))?
        })
        .map(PathBuf::from)
        .context("no cgroup2 file system is mounted")
}

struct Shared {
    users: usize,
    dir: PathBuf,
    home: PathBuf,
}

static SHARED: Mutex<Option<Shared>> = Mutex::new(None);

/// A share in this process's lab cgroup: the first one makes it and moves the process in, the
/// last one to be dropped moves it back and removes it.
pub(crate) struct LabCgroup {
    dir: PathBuf,
}

impl LabCgroup {
    pub(crate) fn join() -> Result<Self> {
        let mut guard = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(shared) = guard.as_mut() {
            shared.users += 1;
            return Ok(Self { dir: shared.dir.clone() });
        }
        let root = v2_root()?;
        let home = own()?;
        let dir = root.join(format!("{PREFIX}{}", process::id()));
        fs::create_dir_all(&dir).with_context(|| format!("making {}", dir.display()))?;
        if let Err(err) = enter(&dir) {
            let _ = fs::remove_dir(&dir);
            return Err(err);
        }
        *guard = Some(Shared { users: 1, dir: dir.clone(), home });
        Ok(Self { dir })
    }

    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }
}

impl Drop for LabCgroup {
    fn drop(&mut self) {
        let mut guard = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(shared) = guard.as_mut() else { return };
        shared.users -= 1;
        if shared.users > 0 {
            return;
        }
        let leave = || {
            enter(&shared.home)?;
            // Children of this process that are no pod's: theirs is the cgroup that they came to.
            for pid in pids(&shared.dir) {
                let _ = fs::write(shared.home.join("cgroup.procs"), pid.to_string());
            }
            remove(&shared.dir)
        };
        if let Err(err) = leave() {
            eprintln!("lab: {err:#}");
        }
        *guard = None;
    }
}

/// Does `work` while this process is where it came from, outside of the labs' cgroup. Sockets that it
/// makes meanwhile belong there, also when it is back.
pub(crate) fn outside<T>(work: impl FnOnce() -> T) -> Result<T> {
    let guard = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
    let shared = guard.as_ref().context("there is no lab")?;
    enter(&shared.home)?;
    let result = work();
    enter(&shared.dir)?;
    Ok(result)
}

/// A cgroup below the lab's, as a node's pods are below its root, that this whole process is in
/// until it is dropped: what runs beside is in the lab's cgroup all the while.
pub struct ChildCgroup {
    dir: PathBuf,
    parent: PathBuf,
}

impl ChildCgroup {
    pub(crate) fn enter(parent: &Path, name: &str) -> Result<Self> {
        let dir = parent.join(name);
        fs::create_dir(&dir).with_context(|| format!("making {}", dir.display()))?;
        let child = Self { dir, parent: parent.to_owned() };
        enter(&child.dir)?;
        Ok(child)
    }

    /// What the `--cgroup` of an agent should be that is to see this cgroup alone.
    pub fn dir(&self) -> &Path {
        &self.dir
    }
}

impl Drop for ChildCgroup {
    fn drop(&mut self) {
        let left = enter(&self.parent).and_then(|()| {
            let what = format!("the processes of {} to leave", self.dir.display());
            wait_stubbornly(&what, Duration::from_secs(5), || {
                // Forked by another test's thread, on their way to a pod's cgroup.
                for pid in pids(&self.dir) {
                    let _ = fs::write(self.parent.join("cgroup.procs"), pid.to_string());
                }
                fs::remove_dir(&self.dir).ok()
            })
        });
        if let Err(err) = left {
            eprintln!("lab: {err:#}");
        }
    }
}

/// Cgroups below the root, each in the one before, whose memory can be limited. A machine whose
/// memory controller belongs to cgroup v1 cannot have them.
pub struct MemoryCgroups {
    dirs: Vec<PathBuf>,
}

impl MemoryCgroups {
    /// Makes so many. `name` is unique in this process.
    pub fn new(name: &str, depth: usize) -> Result<Self> {
        let mut parent = v2_root()?;
        let mut groups = Self { dirs: Vec::new() };
        for level in 0..depth {
            let controllers = parent.join("cgroup.subtree_control");
            fs::write(&controllers, "+memory")
                .with_context(|| format!("writing {}", controllers.display()))?;
            parent.push(match level {
                0 => format!("{PREFIX}{}-{name}", process::id()),
                _ => "child".to_owned(),
            });
            fs::create_dir(&parent).with_context(|| format!("making {}", parent.display()))?;
            groups.dirs.push(parent.clone());
        }
        Ok(groups)
    }

    /// Does `work` while this process is in the innermost: sockets that it makes are charged there,
    /// also when it has left.
    pub fn within<T>(&self, work: impl FnOnce() -> T) -> Result<T> {
        let home = own()?;
        enter(self.dirs.last().context("no cgroup")?)?;
        let result = work();
        enter(&home)?;
        Ok(result)
    }

    /// Sets the limit of the cgroup at this level, counted from the outermost: bytes, or "max".
    pub fn limit(&self, level: usize, limit: &str) -> Result<()> {
        let file = self.dirs.get(level).context("no such level")?.join("memory.max");
        fs::write(&file, limit).with_context(|| format!("writing {}", file.display()))
    }

    /// The bytes that are charged to the cgroup at this level.
    pub fn usage(&self, level: usize) -> Result<u64> {
        let file = self.dirs.get(level).context("no such level")?.join("memory.current");
        let text = fs::read_to_string(&file);
        text.with_context(|| format!("reading {}", file.display()))?
            .trim()
            .parse()
            .with_context(|| format!("the number in {}", file.display()))
    }
}

impl Drop for MemoryCgroups {
    fn drop(&mut self) {
        let removed = self.dirs.first().map_or(Ok(()), |dir| remove(dir));
        if let Err(err) = removed {
            eprintln!("lab: {err:#}");
        }
    }
}

/// The cgroup that this process is in.
fn own() -> Result<PathBuf> {
    let own = fs::read_to_string("/proc/self/cgroup").context("reading /proc/self/cgroup")?;
    let root = v2_root()?;
    own.lines()
        .find_map(|line| line.strip_prefix("0::/"))
        .map(|path| root.join(path))
        .context("this process is in no v2 cgroup")
}

/// Moves this process into the cgroup `dir`.
fn enter(dir: &Path) -> Result<()> {
    fs::write(dir.join("cgroup.procs"), process::id().to_string())
        .with_context(|| format!("entering the cgroup {}", dir.display()))
}

/// The processes of the cgroup `dir` itself; none when it is gone.
pub(crate) fn pids(dir: &Path) -> Vec<u32> {
    let text = fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
    text.lines().filter_map(|line| line.parse().ok()).collect()
}

/// Kills what still runs in the cgroup `dir` and below it, and removes it.
/// Refuses when this process is in it.
pub(crate) fn remove(dir: &Path) -> Result<()> {
    if !dir.exists() {
        return Ok(());
    }
    for entry in fs::read_dir(dir).with_context(|| format!("reading {}", dir.display()))?.flatten()
    {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove(&entry.path())?;
        }
    }
    if pids(dir).contains(&process::id()) {
        bail!("{} holds this very process", dir.display());
    }
    let what = format!("the processes of {} to end", dir.display());
    wait_stubbornly(&what, Duration::from_secs(5), || {
        for pid in pids(dir) {
            if let Ok(pid) = i32::try_from(pid) {
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
        }
        (fs::remove_dir(dir).is_ok() || !dir.exists()).then_some(())
    })
}
