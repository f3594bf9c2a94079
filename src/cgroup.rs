//! The cgroup that the node's hooks are attached to.

use std::{
    fmt,
    fs::File,
    os::{
        fd::{AsRawFd, RawFd},
        unix::fs::MetadataExt,
    },
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, fstatfs};

/// A directory of the cgroup v2 hierarchy.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
    dir: File,
    id: u64,
}

impl Cgroup {
    /// The cgroup at `path`, or the root of the hierarchy where there is none given.
    ///
    /// # Errors
    /// Where the path can't be opened or is not cgroup v2, or no cgroup v2 is mounted.
    pub fn open(path: Option<&Path>) -> Result<Self> {
        let path = match path {
            Some(path) => path.to_owned(),
            None => root()?,
        };
        let dir =
            File::open(&path).with_context(|| format!("cannot open cgroup {}", path.display()))?;
        let kind = fstatfs(&dir)?.filesystem_type();
        ensure!(
            kind == CGROUP2_SUPER_MAGIC,
            "{} is not a cgroup v2 directory: eBPF programs attach to cgroup v2 only",
            path.display()
        );
        let id = dir.metadata()?.ino();
        Ok(Self { path, dir, id })
    }

    /// The kernel's id of it.
    pub fn id(&self) -> u64 {
        self.id
    }
}

impl fmt::Display for Cgroup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cgroup {}", self.path.display())
    }
}

impl AsRawFd for Cgroup {
    fn as_raw_fd(&self) -> RawFd {
        self.dir.as_raw_fd()
    }
}

/// Where the whole cgroup v2 hierarchy is mounted: `/sys/fs/cgroup` on most nodes,
/// `/sys/fs/cgroup/unified` beside cgroup v1.
fn root() -> Result<PathBuf> {
    let mounts =
        std::fs::read_to_string("/proc/self/mountinfo").context("cannot read mountinfo")?;
    find_root(&mounts).context(
        "no cgroup v2 is mounted here (/proc/self/mountinfo): mount it, or name one by --cgroup",
    )
}

/// The mount point of the first cgroup2 file system whose root is mounted.
fn find_root(mountinfo: &str) -> Option<PathBuf> {
    mountinfo.lines().find_map(|line| {
        let (mount, filesystem) = line.split_once(" - ")?;
        let mut fields = mount.split(' ').skip(3);
        let (root, point) = (fields.next()?, fields.next()?);
        (root == "/" && filesystem.starts_with("cgroup2 ")).then(|| point.into())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_root_is_found_in_either_layout() {
        let hybrid = "32 24 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n\
                      33 32 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu\n\
                      42 32 0:38 / /sys/fs/cgroup/unified rw shared:1 - cgroup2 cgroup2 rw\n";
        assert_eq!(find_root(hybrid), Some("/sys/fs/cgroup/unified".into()));
        let pure = "30 24 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n";
        assert_eq!(find_root(pure), Some("/sys/fs/cgroup".into()));
        let part = "30 24 0:26 /kubepods /mnt rw - cgroup2 cgroup2 rw\n";
        assert_eq!(find_root(part), None);
    }

    #[test]
    fn another_file_system_is_refused_by_name() {
        let error = Cgroup::open(Some(Path::new("/proc"))).expect_err("not a cgroup").to_string();
        assert!(error.contains("/proc") && error.contains("cgroup v2"), "{error}");
    }
}
