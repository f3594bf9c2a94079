//! The file system of the pins.

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use nix::{
    mount::{MsFlags, mount},
    sys::statfs::{BPF_FS_MAGIC, statfs},
};

use super::pins::Pins;

/// The default directory of the pins.
pub const DEFAULT_ROOT: &str = "/sys/fs/bpf/sidestep";

/// The pins below `root`, which must be on a bpffs but need not exist yet. `layout` names the maps'
/// layout.
///
/// # Errors
/// If `root` is on another file system.
pub fn pins(root: &Path, layout: &str) -> Result<Pins> {
    let existing: PathBuf = root
        .ancestors()
        .find(|path| path.exists())
        .with_context(|| format!("neither {} nor any directory above it exists", root.display()))?
        .into();
    let kind = statfs(&existing)
        .with_context(|| format!("cannot look at {}", existing.display()))?
        .filesystem_type();
    ensure!(
        kind == BPF_FS_MAGIC,
        "{} is not on a BPF file system (bpffs), which pins need: run `mount -t bpf bpf \
         /sys/fs/bpf`, or name a directory on a bpffs with --bpffs",
        root.display()
    );
    Ok(Pins::new(root, layout))
}

/// The mount point of a directory's file system.
///
/// # Errors
/// If it cannot be looked at.
pub fn mount_point(dir: &Path) -> Result<PathBuf> {
    let device = |path: &Path| {
        let found = fs::metadata(path);
        found.map(|found| found.dev()).with_context(|| format!("cannot look at {}", path.display()))
    };
    let own = device(dir)?;
    let mut mount_point = dir;
    while let Some(parent) = mount_point.parent()
        && device(parent)? == own
    {
        mount_point = parent;
    }
    Ok(mount_point.to_owned())
}

/// Mounts a new bpffs, as systemd does, if there is none.
///
/// # Errors
/// If the kernel refuses.
pub fn ensure_mounted(mount_point: &Path) -> Result<()> {
    if statfs(mount_point).is_ok_and(|found| found.filesystem_type() == BPF_FS_MAGIC) {
        return Ok(());
    }
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("bpf"), mount_point, Some("bpf"), flags, Some("mode=0700")).with_context(|| {
        let at = mount_point.display();
        format!("cannot mount a bpffs on {at}: run `mount -t bpf bpf {at}` on the node")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn f14_the_mount_point_of_a_directory_is_found() {
        let found = mount_point(Path::new("/proc/self/net")).expect("found");
        assert_eq!(found, Path::new("/proc"));
    }

    #[test]
    fn another_file_system_is_refused_by_name() {
        let error = pins(Path::new("/proc/none/sidestep"), "v1").expect_err("no bpffs").to_string();
        assert!(error.contains("/proc/none/sidestep") && error.contains("--bpffs"), "{error}");
    }
}
