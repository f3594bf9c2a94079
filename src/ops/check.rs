//! Checks the kernel and the machine by asking them, never by reading versions.

use std::{collections::BTreeMap, fmt::Write, path::Path};

use anyhow::Result;
use nix::{sys::utsname::uname, unistd::geteuid};
use serde::Serialize;

use crate::{
    dataplane::{self, Pins, ProgramCost, bpffs},
    node::{Cgroup, NetnsCookie, udp},
    splice::{self, Hazard, Leg, LegState, Mode},
    text::beside,
};

/// The result of `sidestep check`.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Version of this structure.
    pub version: u32,
    /// Whether nothing is missing.
    pub ok: bool,
    /// The running kernel, for the reader: nothing is decided by it.
    pub kernel: String,
    /// One for each thing that was looked for.
    pub items: Vec<Item>,
    /// What each program cost the kernel's verifier; empty where they do not load.
    pub programs: Vec<ProgramCost>,
    /// Which legs `--splice auto` splices here, by name, and why not.
    pub splice: BTreeMap<&'static str, LegState>,
    /// What the self-test found wrong.
    #[serde(skip)]
    hazards: Vec<Hazard>,
}

/// One thing that was looked for.
#[derive(Debug, Serialize)]
pub struct Item {
    /// The name of the requirement.
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
    add("bpffs", bpffs::pins(bpffs, dataplane::LAYOUT).map(|_| bpffs.display().to_string()));
    for (name, there) in dataplane::probe() {
        let missing = || Err(anyhow::anyhow!("the kernel lacks it or does not permit it"));
        add(&name, if there { Ok(String::new()) } else { missing() });
    }
    let (mut programs, mut can_be_first) = (Vec::new(), false);
    add(
        "programs load",
        dataplane::try_load().map(|loaded| {
            (programs, can_be_first) = (loaded.costs, loaded.can_be_first);
            String::new()
        }),
    );
    if !programs.is_empty()
        && let (Ok(pins), Ok(cgroup)) =
            (bpffs::pins(bpffs, dataplane::LAYOUT), Cgroup::open(cgroup))
    {
        add("before other programs", order(&pins, &cgroup, can_be_first));
    }
    if !programs.is_empty() {
        add("filters on devices", dataplane::try_filters().map(|()| String::new()));
    }
    add("finding sockets with state", Ok(finds_sockets().into()));
    add("closing UDP sockets", closes_udp());
    add("network namespace identity", NetnsCookie::current().map(|_| String::new()));
    let kernel = uname().map(|u| u.release().to_string_lossy().into_owned()).unwrap_or_default();
    let (mut splice, mut hazards) = (BTreeMap::new(), Vec::new());
    if !programs.is_empty() {
        let found = dataplane::self_test().map_err(|error| format!("{error:#}"));
        let names = Leg::ALL.iter().map(|leg| leg.name());
        splice = names.zip(splice::decide(Mode::Auto, &found)).collect();
        hazards = found.unwrap_or_default();
    }
    let ok = items.iter().all(|item| item.ok);
    Report { version: 1, ok, kernel, items, programs, splice, hazards }
}

/// Whether Sidestep has the first word where others attach programs too. It can run where it has
/// not.
fn order(pins: &Pins, cgroup: &Cgroup, can_be_first: bool) -> Result<String> {
    if can_be_first && !pins.exist() {
        return Ok("this kernel lets Sidestep's programs run first".into());
    }
    let ahead: Vec<String> =
        dataplane::ahead(pins, cgroup)?.iter().map(ToString::to_string).collect();
    if ahead.is_empty() {
        return Ok("no other program runs before Sidestep's".into());
    }
    Ok(format!(
        "WARNING: these run before Sidestep's: {}; where they translate a Service's address, \
         sidecars see the endpoint's address instead",
        ahead.join(", ")
    ))
}

/// How the agent comes to the sockets of spliced connections and of Services.
fn finds_sockets() -> &'static str {
    if dataplane::iterates_storages() {
        "by the maps of their state"
    } else {
        "WARNING: this kernel refuses iterators over maps: by the open files of all processes, which \
         takes longer on a node with many"
    }
}

/// Whether the kernel closes a UDP socket whose endpoint is gone. Services are translated without.
fn closes_udp() -> Result<String> {
    Ok(if udp::can_close()? {
        "this kernel does that for --services".into()
    } else {
        "WARNING: with --services, connected UDP sockets stay connected to endpoints that are gone: \
         the kernel lacks CONFIG_INET_UDP_DIAG or CONFIG_INET_DIAG_DESTROY"
            .into()
    })
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
        "missing {} (running as uid {}): run as root, or grant these capabilities",
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
            anyhow::anyhow!(
                "{path} does not exist: the kernel must be built with \
                             CONFIG_DEBUG_INFO_BTF=y"
            )
        })?
        .len();
    Ok(format!("{path}, {len} bytes"))
}

impl Report {
    /// For people, in lines of at most [`crate::text::WIDTH`] columns; `verbose`: with each of the
    /// self-test's trials that this kernel fails.
    pub fn text(&self, verbose: bool) -> String {
        let mut text = format!("Kernel {}\n", self.kernel);
        let items = self.items.iter().filter(|item| !item.detail.is_empty());
        let width = items.map(|item| item.name.len()).max().unwrap_or(0);
        for item in &self.items {
            let mark = if item.ok { "ok     " } else { "MISSING" };
            text += &beside(&format!("  {mark}  {:width$}  ", item.name), &item.detail);
        }
        if !self.programs.is_empty() {
            text += "Programs: instructions, and instructions that the verifier processed\n";
        }
        let width = self.programs.iter().map(|program| program.name.len()).max().unwrap_or(0);
        for ProgramCost { name, instructions, verified } in &self.programs {
            let verified = verified.map_or("?".into(), |count| count.to_string());
            // Writing to a String does not fail.
            let _ = writeln!(text, "  {name:width$} {instructions:6} {verified:>8}");
        }
        if !self.splice.is_empty() {
            text += "Spliced with --splice auto\n";
        }
        for leg in Leg::ALL {
            let Some(state) = self.splice.get(leg.name()) else {
                continue;
            };
            let label = format!("  {:8} {:4} ", leg.name(), if state.on { "on" } else { "off" });
            let against = splice::against(leg, &self.hazards);
            let hint = if verbose { "" } else { "; -v lists them" };
            text += &match against.len() {
                0 => beside(&label, &state.why),
                n => beside(&label, &format!("trials of the self-test that fail here: {n}{hint}")),
            };
            for hazard in against.iter().filter(|_| verbose) {
                text += &beside(&format!("    {}: ", hazard.name), &hazard.found);
            }
        }
        text + &match self.items.iter().filter(|item| !item.ok).count() {
            0 => "Sidestep can run here.\n".to_owned(),
            n => format!("Sidestep cannot run here: {n} missing.\n"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{splice::Hurts, text::WIDTH};

    fn report() -> Report {
        let item = |name: &str, ok, detail: String| Item { name: name.into(), ok, detail };
        let hazards = vec![
            Hazard { name: "FIONREAD", hurts: Hurts::Apps, found: "0 of 32769 bytes".into() },
            Hazard { name: "MSG_PEEK", hurts: Hurts::Apps, found: "long ".repeat(50) },
        ];
        let state =
            |leg: &Leg| splice::decide(Mode::Auto, &Ok(hazards.clone()))[*leg as usize].clone();
        Report {
            version: 1,
            ok: false,
            kernel: "6.18.0".into(),
            items: vec![
                item("bpffs", true, format!("/{}", "directory/".repeat(30))),
                item(
                    "helper bpf_skb_load_bytes_relative in SchedCls programs",
                    true,
                    String::new(),
                ),
                item("programs load", false, "the kernel rejected it ".repeat(20)),
            ],
            programs: vec![ProgramCost {
                name: "find_listeners_by_file".into(),
                instructions: 222,
                verified: None,
            }],
            splice: Leg::ALL.iter().map(|leg| (leg.name(), state(leg))).collect(),
            hazards,
        }
    }

    #[test]
    fn no_line_is_too_long_and_nothing_is_cut_off() {
        for verbose in [false, true] {
            let text = report().text(verbose);
            assert!(text.lines().all(|line| line.len() <= WIDTH && !line.is_empty()), "{text}");
            let joined = text.replace(['\n', ' '], "");
            for whole in ["directory/".repeat(30), "thekernelrejectedit".repeat(20)] {
                assert!(joined.contains(&whole), "{text}");
            }
        }
    }

    #[test]
    fn failed_trials_are_counted_and_listed_when_asked_for() {
        let brief = report().text(false);
        assert!(brief.contains("fail here: 2; -v lists them"), "{brief}");
        assert!(!brief.contains("FIONREAD"), "{brief}");
        let long = report().text(true);
        assert!(long.lines().any(|line| line == "    FIONREAD: 0 of 32769 bytes"), "{long}");
        assert!(long.contains("    MSG_PEEK: long long"), "{long}");
    }

    #[test]
    fn json_names_the_failed_trials_as_ever() {
        let json = serde_json::to_value(report()).expect("JSON");
        let why = json["splice"]["app"]["why"].as_str().expect("text");
        assert!(why.contains("FIONREAD: 0 of 32769 bytes; MSG_PEEK: long"), "{why}");
        assert!(json.get("hazards").is_none(), "{json}");
    }
}
