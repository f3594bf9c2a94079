//! Where and how it was measured.

use std::env;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use serde::Serialize;
use sidestep_lab::envoy;

/// The machine and the programs.
#[derive(Debug, Serialize)]
pub struct Environment {
    /// When it began, UTC.
    pub date: String,
    /// The command line.
    pub command: String,
    /// `uname -r`.
    pub kernel: String,
    /// The processor's name.
    pub cpu: String,
    /// Processors.
    pub cores: usize,
    /// Memory, in MiB.
    pub memory_mib: u64,
    /// The kernel's clock source.
    pub clock: String,
    /// Load average when it began.
    pub load_before: String,
    /// Load average when it ended.
    pub load_after: String,
    /// How long it took, in seconds.
    pub seconds: u64,
    /// Versions: sidestep, envoy, iptables, nft.
    pub versions: Vec<String>,
}

impl Environment {
    /// This machine's present state.
    pub fn read(sidestep: &Path) -> Result<Self> {
        let cpuinfo = read("/proc/cpuinfo")?;
        let field = |text: &str, name: &str| {
            let line = text.lines().find(|line| line.starts_with(name))?;
            Some(line.split_once(':')?.1.trim().to_owned())
        };
        let meminfo = read("/proc/meminfo")?;
        let memory = field(&meminfo, "MemTotal").context("no MemTotal")?;
        let memory: u64 = memory.trim_end_matches(" kB").parse().context("MemTotal")?;
        let mut args: Vec<String> = env::args().collect();
        if let Some(name) = args.first_mut() {
            *name = Path::new(name).file_name().unwrap_or_default().to_string_lossy().into_owned();
        }
        let envoy = envoy::binary()?;
        let versions = [
            said(sidestep, &["--version"])?,
            format!("Envoy {}", version(&said(&envoy, &["--version"])?)),
            said(Path::new("iptables"), &["--version"])?,
            said(Path::new("nft"), &["--version"])?,
        ];
        Ok(Self {
            date: said(Path::new("date"), &["--utc", "+%F %H:%M UTC"])?,
            command: args.join(" "),
            kernel: read("/proc/sys/kernel/osrelease")?,
            cpu: field(&cpuinfo, "model name").unwrap_or_else(|| "unknown".to_owned()),
            cores: std::thread::available_parallelism()?.get(),
            memory_mib: memory / 1024,
            clock: read("/sys/devices/system/clocksource/clocksource0/current_clocksource")?,
            load_before: load()?,
            load_after: String::new(),
            seconds: 0,
            versions: versions.to_vec(),
        })
    }
}

impl Environment {
    /// What makes its figures doubtful: others were at work as it began.
    pub fn doubt(&self) -> Option<String> {
        let load: f64 = self.load_before.split(' ').next()?.parse().ok()?;
        (load > 0.5).then(|| {
            format!("Other work was under way when it began (load average {load}): measure again.")
        })
    }
}

/// The load average of 1, 5 and 15 minutes.
pub fn load() -> Result<String> {
    let text = read("/proc/loadavg")?;
    Ok(text.split(' ').take(3).collect::<Vec<_>>().join(" "))
}

/// Of `.../envoy  version: HASH/1.40.0/Clean/RELEASE/BoringSSL`.
fn version(text: &str) -> &str {
    text.split('/').rev().nth(3).unwrap_or(text)
}

fn read(path: &str) -> Result<String> {
    Ok(fs::read_to_string(path).with_context(|| format!("reading {path}"))?.trim().to_owned())
}

fn said(program: &Path, args: &[&str]) -> Result<String> {
    let out = Command::new(program)
        .args(args)
        .output()
        .with_context(|| format!("running {}: `make deps` installs it", program.display()))?;
    Ok(String::from_utf8_lossy(&out.stdout).trim().to_owned())
}

#[cfg(test)]
mod tests {
    #[test]
    fn envoys_version_is_found() {
        let text = "/lab/envoy  version: 60a4/1.40.0/Clean/RELEASE/BoringSSL";
        assert_eq!(super::version(text), "1.40.0");
    }
}
