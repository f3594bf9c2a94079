//! The file system that pins live in.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};

use crate::bpf::Pins;

/// Where pins go unless a flag says otherwise.
pub const DEFAULT_ROOT: &str = "/sys/fs/bpf/sidestep";

/// The pins below `root`, which has to be on a bpffs; it need not exist yet. `layout` names the
/// maps' layout.
///
/// # Errors
/// Where `root` is on another file system.
pub fn pins(root: &Path, layout: &str) -> Result<Pins> {
    let existing: PathBuf = root
        .ancestors()
        .find(|path| path.exists())
        .with_context(|| format!("no part of {} exists", root.display()))?
        .into();
    let kind = statfs(&existing)
        .with_context(|| format!("cannot look at {}", existing.display()))?
        .filesystem_type();
    ensure!(
        kind == BPF_FS_MAGIC,
        "{} is not on a bpffs, pins can't live there: `mount -t bpf bpf /sys/fs/bpf`, or name a \
         directory on one by --bpffs",
        root.display()
    );
    Ok(Pins::new(root, layout))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_file_system_is_refused_by_name() {
        let error = pins(Path::new("/proc/none/sidestep"), "v1").expect_err("no bpffs").to_string();
        assert!(error.contains("/proc/none/sidestep") && error.contains("--bpffs"), "{error}");
    }
}
