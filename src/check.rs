//! What this kernel and machine offer, by asking them, never by reading versions.

use std::{collections::BTreeMap, fmt, path::Path};

use anyhow::Result;
use nix::{sys::utsname::uname, unistd::geteuid};
use serde::Serialize;

use crate::{
    bpf::{self, Pins, ProgramCost},
    bpffs,
    node::{Cgroup, NetnsCookie},
    splice::{self, Leg, LegState, Mode},
};

/// The answers.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Version of this structure.
    pub version: u32,
    /// Nothing is missing.
    pub ok: bool,
    /// The running kernel, for the reader: nothing is decided by it.
    pub kernel: String,
    /// One for each thing that was looked for.
    pub items: Vec<Item>,
    /// What each program cost the kernel's verifier; empty where they don't load.
    pub programs: Vec<ProgramCost>,
    /// Which legs `--splice auto` splices here, by name, and why not.
    pub splice: BTreeMap<&'static str, LegState>,
}

/// One thing that was looked for.
#[derive(Debug, Serialize)]
pub struct Item {
    /// What.
    pub name: String,
    /// Whether it is there.
    pub ok: bool,
    /// What was found, or what is missing and what helps.
    pub detail: String,
}

/// Looks for everything that the agent needs.
pub fn check(cgroup: Option<&Path>, bpffs: &Path) -> Report {
    let mut items = Vec::new();
    let mut add = |name: &str, found: Result<String>| {
        items.push(Item {
            name: name.into(),
            ok: found.is_ok(),
            detail: found.unwrap_or_else(|error| format!("{error:#}")),
        });
    };
    add("privileges", privileges());
    add("kernel types (BTF)", btf());
    add("cgroup v2", Cgroup::open(cgroup).map(|found| found.to_string()));
    add("bpffs", bpffs::pins(bpffs, bpf::LAYOUT).map(|_| bpffs.display().to_string()));
    for (name, there) in bpf::probe() {
        let missing = || Err(anyhow::anyhow!("this kernel does not have it, or forbids it"));
        add(&name, if there { Ok(String::new()) } else { missing() });
    }
    let (mut programs, mut can_be_first) = (Vec::new(), false);
    add(
        "programs load",
        bpf::try_load().map(|loaded| {
            (programs, can_be_first) = (loaded.costs, loaded.can_be_first);
            String::new()
        }),
    );
    if !programs.is_empty()
        && let (Ok(pins), Ok(cgroup)) = (bpffs::pins(bpffs, bpf::LAYOUT), Cgroup::open(cgroup))
    {
        add("before other programs", order(&pins, &cgroup, can_be_first));
    }
    if !programs.is_empty() {
        add("filters on devices", bpf::try_filters().map(|()| String::new()));
    }
    add("network namespace identity", NetnsCookie::current().map(|_| String::new()));
    let kernel = uname().map(|u| u.release().to_string_lossy().into_owned()).unwrap_or_default();
    let mut splice = BTreeMap::new();
    if !programs.is_empty() {
        let found = bpf::self_test().map_err(|error| format!("{error:#}"));
        let names = Leg::ALL.iter().map(|leg| leg.name());
        splice = names.zip(splice::decide(Mode::Auto, &found)).collect();
    }
    Report { version: 1, ok: items.iter().all(|item| item.ok), kernel, items, programs, splice }
}

/// Whether Sidestep has the first word where others attach programs too. It can run where it has not.
fn order(pins: &Pins, cgroup: &Cgroup, can_be_first: bool) -> Result<String> {
    if can_be_first && !pins.exist() {
        return Ok("this kernel lets Sidestep's come first".into());
    }
    let ahead: Vec<String> = bpf::ahead(pins, cgroup)?.iter().map(ToString::to_string).collect();
    if ahead.is_empty() {
        return Ok("none comes first".into());
    }
    Ok(format!(
        "WARNING: these come first: {}; where they translate a Service's address, sidecars see an \
         endpoint in its place",
        ahead.join(", ")
    ))
}

/// The capabilities that the agent needs and has.
///
/// # Errors
/// Names those that this process lacks.
pub fn privileges() -> Result<String> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let effective = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok())
        .unwrap_or(0);
    let missing: Vec<&str> = NEEDED_CAPABILITIES
        .iter()
        .filter(|(bit, _)| effective & (1 << bit) == 0)
        .map(|(_, name)| *name)
        .collect();
    anyhow::ensure!(
        missing.is_empty(),
        "missing {} (running as uid {}): run as root, or grant them",
        missing.join(", "),
        geteuid()
    );
    Ok(NEEDED_CAPABILITIES.iter().map(|(_, name)| *name).collect::<Vec<_>>().join(", "))
}

/// Bits and names from linux/capability.h: to enter namespaces, to load programs that read
/// kernel types, to attach them and set routes, and to reset connections.
const NEEDED_CAPABILITIES: &[(u32, &str)] = &[
    (12, "CAP_NET_ADMIN"),
    (13, "CAP_NET_RAW"),
    (21, "CAP_SYS_ADMIN"),
    (38, "CAP_PERFMON"),
    (39, "CAP_BPF"),
];

fn btf() -> Result<String> {
    let path = "/sys/kernel/btf/vmlinux";
    let len = std::fs::metadata(path)
        .map_err(|_| {
            anyhow::anyhow!("no {path}: a kernel built with CONFIG_DEBUG_INFO_BTF=y is needed")
        })?
        .len();
    Ok(format!("{path}, {len} bytes"))
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "Kernel {}", self.kernel)?;
        let width = self.items.iter().map(|item| item.name.len()).max().unwrap_or(0);
        for item in &self.items {
            let mark = if item.ok { "ok     " } else { "MISSING" };
            let line = format!("  {mark}  {:width$}  {}", item.name, item.detail);
            writeln!(f, "{}", line.trim_end())?;
        }
        if !self.programs.is_empty() {
            writeln!(f, "Programs, in instructions: length, and verified by the kernel")?;
        }
        for ProgramCost { name, instructions, verified } in &self.programs {
            let verified = verified.map_or("?".into(), |count| count.to_string());
            writeln!(f, "  {name:15} {instructions:6} {verified:>8}")?;
        }
        if !self.splice.is_empty() {
            writeln!(f, "Spliced by --splice auto")?;
        }
        for (name, leg) in &self.splice {
            let line = format!("  {name:8} {:4} {}", if leg.on { "on" } else { "off" }, leg.why);
            writeln!(f, "{}", line.trim_end())?;
        }
        let missing = self.items.iter().filter(|item| !item.ok).count();
        match missing {
            0 => writeln!(f, "Sidestep can run here."),
            n => writeln!(f, "Sidestep can't run here: {n} missing."),
        }
    }
}
