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
    /// The cgroup at `path`, or the root of the hierarchy without a path.
    ///
    /// # Errors
    /// If the path cannot be opened or is not cgroup v2, or no cgroup v2 is mounted.
    pub fn open(path: Option<&Path>) -> Result<Self> {
        match path {
            Some(path) => Self::at(path.to_owned()),
            None => Self::root(),
        }
    }

    fn at(path: PathBuf) -> Result<Self> {
        let dir =
            File::open(&path).with_context(|| format!("cannot open cgroup {}", path.display()))?;
        let kind = fstatfs(&dir)?.filesystem_type();
        ensure!(
            kind == CGROUP2_SUPER_MAGIC,
            "{} is not a cgroup v2 directory: BPF programs attach to cgroup v2 only",
            path.display()
        );
        let id = dir.metadata()?.ino();
        Ok(Self { path, dir, id })
    }

    /// The outermost cgroup that is mounted here: `/sys/fs/cgroup` on most nodes,
    /// `/sys/fs/cgroup/unified` beside cgroup v1.
    fn root() -> Result<Self> {
        let mounts =
            std::fs::read_to_string("/proc/self/mountinfo").context("cannot read mountinfo")?;
        // Where another mount is on top of one, its path leads elsewhere.
        roots(&mounts).into_iter().find_map(|path| Self::at(path).ok()).context(
            "no cgroup v2 hierarchy is mounted (/proc/self/mountinfo): mount one, or name a cgroup \
             with --cgroup",
        )
    }

    /// Whether it is the root of the node's whole hierarchy, which holds every process. The kernel
    /// gives the root the id 1, and warns where it has another (`cgroup_setup_root` in its
    /// kernel/cgroup/cgroup.c).
    pub fn is_root(&self) -> bool {
        self.id == 1
    }

    /// The kernel's id of the cgroup.
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

/// Where cgroup v2 is mounted with all that this process' cgroup namespace has, or more, outermost
/// first. A mount's root is told as seen from that namespace: in a container, `/` is the
/// container's own cgroup, and the node's hierarchy, which the chart mounts beside, begins at
/// `/../..` and so on.
fn roots(mountinfo: &str) -> Vec<PathBuf> {
    let parse = |line: &str| {
        let (mount, filesystem) = line.split_once(" - ")?;
        let mut fields = mount.split(' ').skip(3);
        let (root, point) = (fields.next()?, fields.next()?);
        let mut parts = root.split('/').filter(|part| !part.is_empty());
        let is_whole = filesystem.starts_with("cgroup2 ") && parts.clone().all(|part| part == "..");
        is_whole.then(|| (parts.by_ref().count(), PathBuf::from(point)))
    };
    let mut found: Vec<(usize, PathBuf)> = mountinfo.lines().filter_map(parse).collect();
    // Of the same, the first: sorting is stable.
    found.sort_by_key(|(above, _)| std::cmp::Reverse(*above));
    found.into_iter().map(|(_, point)| point).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_root_is_found_in_either_layout() {
        let hybrid = "32 24 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n\
                      33 32 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu\n\
                      42 32 0:38 / /sys/fs/cgroup/unified rw shared:1 - cgroup2 cgroup2 rw\n";
        let first = |mounts| roots(mounts).into_iter().next();
        assert_eq!(first(hybrid), Some("/sys/fs/cgroup/unified".into()));
        let pure = "30 24 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n";
        assert_eq!(first(pure), Some("/sys/fs/cgroup".into()));
        let part = "30 24 0:26 /kubepods /mnt rw - cgroup2 cgroup2 rw\n";
        assert_eq!(first(part), None);
    }

    #[test]
    fn in_a_container_the_nodes_own_comes_before_the_containers() {
        // The runtime's own mount, and the node's by a volume elsewhere.
        let beside = "90 80 0:26 / /sys/fs/cgroup ro - cgroup2 cgroup rw\n\
                      91 80 0:26 /../../.. /host/cgroup ro - cgroup2 cgroup2 rw\n";
        assert_eq!(roots(beside), ["/host/cgroup", "/sys/fs/cgroup"].map(PathBuf::from));
        // On a hybrid node, with the node's directory on top of the runtime's own.
        let hybrid = "90 80 0:50 / /sys/fs/cgroup ro - tmpfs tmpfs rw\n\
                      91 90 0:38 /kubepods/poda/b /sys/fs/cgroup/unified ro - cgroup2 cgroup rw\n\
                      92 80 0:28 / /sys/fs/cgroup ro - tmpfs tmpfs rw\n\
                      93 92 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n";
        assert_eq!(roots(hybrid), [PathBuf::from("/sys/fs/cgroup/unified")]);
    }

    #[test]
    fn another_file_system_is_refused_by_name() {
        let error = Cgroup::open(Some(Path::new("/proc"))).expect_err("not a cgroup").to_string();
        assert!(error.contains("/proc") && error.contains("cgroup v2"), "{error}");
    }
}
