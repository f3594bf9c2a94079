//! What a process uses, from /proc.

use std::time::Duration;

use anyhow::{Context, Result};

/// `USER_HZ`: the unit of times in /proc, the same on all architectures that Rust knows.
const TICK: Duration = Duration::from_millis(10);

/// A process at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    /// User and system time since its start.
    pub cpu: Duration,
    /// The resident memory.
    pub rss_kib: u64,
}

impl Usage {
    /// From the text of `/proc/PID/stat` and `/proc/PID/status`.
    pub fn parse(stat: &str, status: &str) -> Result<Self> {
        // The name may have spaces, and ends with the last parenthesis; utime is field 14.
        let (_, rest) = stat.rsplit_once(')').with_context(|| format!("no stat: {stat:?}"))?;
        let fields: Vec<&str> = rest.split_whitespace().collect();
        let ticks = |n: usize| -> Result<u32> {
            let field = fields.get(n).with_context(|| format!("a short stat: {stat:?}"))?;
            field.parse().with_context(|| format!("a time in stat: {field:?}"))
        };
        let rss = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let rss = rss.and_then(|text| text.trim().strip_suffix(" kB"));
        let rss = rss.with_context(|| format!("no VmRSS in status: {status:?}"))?;
        let cpu = TICK * (ticks(11)? + ticks(12)?);
        Ok(Self { cpu, rss_kib: rss.parse().with_context(|| format!("VmRSS: {rss:?}"))? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_parentheses() -> Result<()> {
        let stat = "7 (a) b (c) S 1 7 7 0 -1 4194560 9 0 0 0 25 17 3 4 20 0 5 0 100 1 2";
        let used = Usage::parse(stat, "Name:\ta\nVmRSS:\t   14220 kB\nThreads:\t5\n")?;
        assert_eq!(used, Usage { cpu: Duration::from_millis(420), rss_kib: 14220 });
        assert!(Usage::parse("7 (a) S 1", "VmRSS: 1 kB").is_err());
        assert!(Usage::parse(stat, "Name: kthreadd").is_err());
        Ok(())
    }
}
