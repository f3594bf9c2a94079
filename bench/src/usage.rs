//! What load costs: CPU, the kernel's memory, tracked connections.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use sidestep_lab::Pod;

/// CPU time of the lab: clients, proxies, servers and agent, by the cgroup that all of them are
/// in. What the kernel does for them in softirqs is in it where it runs on top of them, as it
/// nearly always does; the ksoftirqd threads are added, though they serve the whole machine.
pub struct Cpu {
    stat: PathBuf,
    ksoftirqd: Vec<PathBuf>,
}

impl Cpu {
    /// Of the lab with that cgroup.
    pub fn new(cgroup: &Path) -> Result<Self> {
        let mut ksoftirqd = Vec::new();
        for entry in fs::read_dir("/proc").context("reading /proc")?.flatten() {
            let name = fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
            if name.starts_with("ksoftirqd/") {
                ksoftirqd.push(entry.path().join("schedstat"));
            }
        }
        Ok(Self { stat: cgroup.join("cpu.stat"), ksoftirqd })
    }

    /// The CPU time so far, in microseconds.
    pub fn micros(&self) -> Result<f64> {
        let text = fs::read_to_string(&self.stat)
            .with_context(|| format!("reading {}", self.stat.display()))?;
        let mut micros = number(&text, "usage_usec")?;
        for path in &self.ksoftirqd {
            let text =
                fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
            let nanos: f64 =
                text.split_whitespace().next().context("an empty schedstat")?.parse()?;
            micros += nanos / 1000.0;
        }
        Ok(micros)
    }
}

/// The number that follows `key` at the start of a line.
fn number(text: &str, key: &str) -> Result<f64> {
    let line = text.lines().find_map(|line| line.strip_prefix(key));
    let line = line.with_context(|| format!("there is no {key}"))?;
    line.split_whitespace().next().context("no number")?.parse().context("no number")
}

/// Bytes of all objects in the kernel's slab caches that are in use.
pub fn slab_bytes() -> Result<f64> {
    let text = fs::read_to_string("/proc/slabinfo").context("reading /proc/slabinfo")?;
    objects(&text)
}

fn objects(slabinfo: &str) -> Result<f64> {
    let mut bytes = 0.0;
    // "name active_objs num_objs objsize ...", below two lines of headings.
    for line in slabinfo.lines().skip(2) {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let [_, active, _, size, ..] = fields[..] else { continue };
        bytes += active.parse::<f64>()? * size.parse::<f64>()?;
    }
    Ok(bytes)
}

/// Connections that are tracked in the pod's namespace.
pub fn tracked(pod: &Pod) -> Result<f64> {
    // A namespace without rules tracks none, and the file is there all the same.
    let path = "/proc/sys/net/netfilter/nf_conntrack_count";
    let text = pod.run(0, 0, || fs::read_to_string(path))?;
    text.with_context(|| format!("reading {path}"))?.trim().parse().context("no number")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_found_with_its_number() {
        let text = "usage_usec 12\nuser_usec 5\n";
        assert_eq!(number(text, "user_usec").ok(), Some(5.0));
        assert!(number(text, "system_usec").is_err());
    }

    #[test]
    fn objects_in_use_are_added_up() {
        let text = "slabinfo - version: 2.1\n# name <active_objs> ...\n\
                    TCP 10 20 2048 4 2 : tunables 0 0 0\nfilp 3 9 256 1 1 : tunables\n";
        assert_eq!(objects(text).ok(), Some(10.0 * 2048.0 + 3.0 * 256.0));
    }
}
