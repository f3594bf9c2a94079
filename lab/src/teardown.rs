//! Finding and removing what killed runs left over.

use std::collections::BTreeMap;
use std::env;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::agent::BPFFS;
use crate::cgroup;
use crate::cmd;
use crate::netns;

/// What one process made: all of it has the process id in its name.
#[derive(Clone, Debug, Default)]
pub struct Leftover {
    /// The process that made it.
    pub pid: u32,
    /// Whether that process still runs.
    pub alive: bool,
    /// Names of network namespaces.
    pub namespaces: Vec<String>,
    /// Its cgroup, and directories of pins and of files.
    pub directories: Vec<PathBuf>,
}

/// Everything that labs of any process have made and not removed yet, by process.
pub fn find() -> Result<Vec<Leftover>> {
    let mut all: BTreeMap<u32, Leftover> = BTreeMap::new();
    for name in names(Path::new(netns::DIR)) {
        if let Some(pid) = number_after(&name, "sl") {
            all.entry(pid).or_default().namespaces.push(name);
        }
    }
    let root = cgroup::v2_root()?;
    for parent in [root.clone(), PathBuf::from(BPFFS), env::temp_dir()] {
        for name in names(&parent) {
            if let Some(pid) = number_after(&name, cgroup::PREFIX) {
                all.entry(pid).or_default().directories.push(parent.join(name));
            }
        }
    }
    for (pid, leftover) in &mut all {
        leftover.pid = *pid;
        // The maker of a lab is in its cgroup, so a later process with the same id is not it.
        leftover.alive = cgroup::pids(&root.join(format!("{}{pid}", cgroup::PREFIX))).contains(pid);
    }
    Ok(all.into_values().collect())
}

/// Kills the processes of a lab, detaches its programs and removes the rest of it.
pub fn remove(leftover: &Leftover) -> Result<()> {
    let root = cgroup::v2_root()?;
    for dir in &leftover.directories {
        if dir.parent() == Some(&root) {
            cgroup::remove(dir)?;
        } else {
            fs::remove_dir_all(dir).with_context(|| format!("removing {}", dir.display()))?;
        }
    }
    for name in &leftover.namespaces {
        cmd::run(&["ip", "netns", "delete", name])?;
    }
    Ok(())
}

fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let mut names: Vec<String> =
        entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort();
    names
}

/// The number in `PREFIX<number>` or `PREFIX<number>-...`.
fn number_after(name: &str, prefix: &str) -> Option<u32> {
    name.strip_prefix(prefix)?.split('-').next()?.parse().ok()
}
