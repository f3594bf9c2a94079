//! Istio's sidecar rules, by Istio's own binary: `pilot-agent istio-iptables`; and, where nothing
//! may be built, as that binary's record in `lab/records/istio`.

use std::ffi::OsString;
use std::fs;
use std::net::Ipv6Addr;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use super::{Annotations, Family, RuleSet, forget_connections};
use crate::lab::Lab;
use crate::pod::{Pod, PodNet};
use crate::{OUTBOUND, PROXY, lab_dir};

/// What `istio-iptables` is told for a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Istio(Vec<String>);

impl Istio {
    /// As Istio's CNI plugin makes it of a pod: `NewRedirect` in
    /// `cni/pkg/plugin/sidecar_redirect.go` says what annotations and the proxy's environment mean,
    /// `Program` in
    /// `sidecar_iptables_linux.go` which setting that is, `tools/istio-iptables/pkg/cmd/root.go` the
    /// setting's flag. Before that, the injector has added the status port to
    /// `excludeInboundPorts` (`excludeInboundPort` in the chart's `injection-template.yaml`). Read in
    /// istio.io/istio eed52ebb66ad, of August 2026.
    pub fn new(annotations: &Annotations, dns: bool, dual_stack: bool) -> Self {
        let traffic = |name: &str, default: &str| {
            let text = annotations.get(&format!("traffic.sidecar.istio.io/{name}"));
            text.map_or_else(|| default.to_owned(), Clone::clone)
        };
        let excluded = traffic("excludeInboundPorts", "");
        let status =
            annotations.get("status.sidecar.istio.io/port").map_or("15020", String::as_str);
        let mut inbound = Vec::new();
        for port in excluded.split(',').chain([status, "15020", "15021", "15090"]).map(str::trim) {
            if !["", "0"].contains(&port) && !inbound.contains(&port) {
                inbound.push(port);
            }
        }
        let flags = [
            ("-p", OUTBOUND.to_string()),
            ("-u", PROXY.to_string()),
            ("-g", PROXY.to_string()),
            ("-m", "REDIRECT".to_owned()),
            ("-i", traffic("includeOutboundIPRanges", "*")),
            ("-x", traffic("excludeOutboundIPRanges", "")),
            ("-b", traffic("includeInboundPorts", "*")),
            ("-d", inbound.join(",")),
            ("-q", traffic("includeOutboundPorts", "")),
            ("-o", traffic("excludeOutboundPorts", "15020")),
            ("-c", traffic("excludeInterfaces", "")),
        ];
        let mut args: Vec<String> =
            flags.into_iter().flat_map(|(flag, value)| [flag.to_owned(), value]).collect();
        let switches =
            [("--redirect-dns", dns), ("--capture-all-dns", dns), ("--dual-stack", dual_stack)];
        args.extend(switches.into_iter().filter(|(_, on)| *on).map(|(flag, _)| flag.to_owned()));
        Self(args)
    }
}

/// By which of the kernel's two languages `istio-iptables` installs its rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    /// iptables and ip6tables.
    Iptables,
    /// `--native-nftables`.
    Nftables,
}

/// Istio's binary.
#[derive(Clone, Debug)]
pub struct PilotAgent(PathBuf);

impl PilotAgent {
    /// `parts/bin/pilot-agent` below $SIDESTEP_LAB_DIR, which is /var/lib/sidestep-lab by default.
    /// Fails when it is not there.
    pub fn find() -> Result<Self> {
        Self::at(&lab_dir().join("parts/bin/pilot-agent"))
    }

    /// The binary at `path`. Fails when it is not there.
    pub fn at(path: &Path) -> Result<Self> {
        ensure!(
            path.is_file(),
            "{} is missing: `e2e/cluster/parts.sh pilot-agent` builds it",
            path.display()
        );
        Ok(Self(path.to_owned()))
    }

    /// Which version of the module istio.io/istio it was made of. Go writes the versions of all
    /// modules into what it builds, as text.
    pub fn version(&self) -> Result<String> {
        const BEFORE: &[u8] = b"\tistio.io/istio\t";
        let binary = fs::read(&self.0).with_context(|| format!("reading {}", self.0.display()))?;
        let found = binary.windows(BEFORE.len()).position(|text| text == BEFORE);
        let start = found.map(|at| at + BEFORE.len());
        let version = start.and_then(|start| binary[start..].split(u8::is_ascii_whitespace).next());
        let version = version.with_context(|| format!("{} names no version", self.0.display()))?;
        Ok(String::from_utf8_lossy(version).into_owned())
    }

    /// Installs the rules in the pod, with all else that belongs to them.
    pub fn install(&self, pod: &Pod, istio: &Istio, backend: Backend) -> Result<()> {
        let more: &[&str] = match backend {
            Backend::Iptables => &[],
            Backend::Nftables => &["--native-nftables"],
        };
        self.run(pod, istio, &[], more)
            .with_context(|| format!("installing {backend:?} rules in {}", pod.name()))
            .map(drop)
    }

    /// The command line of the init container `istio-validation`, which calls itself through the
    /// pod's interception and has `patience` for it.
    pub fn validation(&self, istio: &Istio, patience: &str) -> Vec<OsString> {
        let mut line = vec![self.0.clone().into_os_string(), "istio-iptables".into()];
        line.extend(istio.0.iter().map(OsString::from));
        line.extend(["--run-validation", "--skip-rule-apply", "--probe-timeout"].map(Into::into));
        line.push(patience.into());
        line
    }

    /// What [`PilotAgent::install`] would give to iptables-restore and ip6tables-restore in such a
    /// pod.
    fn tables(&self, pod: &Pod, istio: &Istio) -> Result<[String; 2]> {
        let file = pod.lab().new_path("dry-run", "txt");
        let file_path = format!("DRY_RUN_FILE_PATH={}", file.display());
        self.run(pod, istio, &[&file_path], &["--dry-run"])?;
        let said = fs::read_to_string(&file).context("reading what a dry run says")?;
        // Tables from `* NAME` to `COMMIT`, among the commands that only look: IPv4's come first,
        // then those of IPv6, by the same names.
        let mut families = [String::new(), String::new()];
        let mut names = Vec::new();
        for table in said.split("* ").skip(1) {
            let (table, _) = table.split_once("COMMIT").context("a table without an end")?;
            let name = table.lines().next().unwrap_or_default();
            let family = usize::from(names.contains(&(0, name)));
            ensure!(!names.contains(&(family, name)), "three tables {name} in {said}");
            names.push((family, name));
            families[family] += &format!("* {table}COMMIT\n");
        }
        Ok(families)
    }

    /// What [`PilotAgent::install`] would give to nft in such a pod.
    fn nftables(&self, pod: &Pod, istio: &Istio) -> Result<String> {
        const BEFORE: &str = "nftables rules programmed:";
        // There is no file for it: it is in the log.
        let said = self.run(pod, istio, &[], &["--dry-run", "--native-nftables"])?;
        let (_, rules) = said.split_once(BEFORE).with_context(|| format!("no rules in {said}"))?;
        let rules =
            rules.lines().filter(|line| line.starts_with("add ") || line.starts_with("flush "));
        Ok(rules.fold(String::new(), |text, line| text + line + "\n"))
    }

    fn run(&self, pod: &Pod, istio: &Istio, env: &[&str], more: &[&str]) -> Result<String> {
        let binary = self.0.to_string_lossy();
        let mut argv = vec!["env"];
        argv.extend(env);
        argv.extend([&*binary, "istio-iptables"]);
        argv.extend(istio.0.iter().map(String::as_str));
        argv.extend(more);
        pod.netns_handle().command(&argv, "")
    }
}

/// What `pilot-agent` installs, as text.
#[derive(Clone, Copy, Debug)]
pub struct Record {
    /// The name of its files in `lab/records/istio`.
    name: &'static str,
    dns: bool,
    v4: &'static str,
    v6: &'static str,
    nft: &'static str,
}

impl Record {
    /// Of a sidecar with the default settings, in a pod with both families.
    pub const SIDECAR: Self = Self {
        name: "sidecar",
        dns: false,
        v4: include_str!("../../records/istio/sidecar.v4"),
        v6: include_str!("../../records/istio/sidecar.v6"),
        nft: include_str!("../../records/istio/sidecar.nft"),
    };
    /// The same, with DNS captured.
    pub const DNS: Self = Self {
        name: "sidecar-dns",
        dns: true,
        v4: include_str!("../../records/istio/sidecar-dns.v4"),
        v6: include_str!("../../records/istio/sidecar-dns.v6"),
        nft: include_str!("../../records/istio/sidecar-dns.nft"),
    };
    /// All that there are.
    pub const ALL: [Self; 2] = [Self::SIDECAR, Self::DNS];

    /// The files of the record that this binary does not say the same of, with what they had to be.
    /// Makes a node of its own.
    pub fn stale(pilot_agent: &PilotAgent) -> Result<Vec<(PathBuf, String)>> {
        let lab = Lab::new("records")?;
        let pod = lab.pod("a", PodNet::DUAL)?;
        let version = pilot_agent.version()?;
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("records/istio");
        let mut stale = Vec::new();
        for record in Self::ALL {
            let istio = Istio::new(&Annotations::new(), record.dns, true);
            let args: Vec<String> = istio.0.iter().map(|arg| format!("'{arg}'")).collect();
            let args = args.join(" ");
            let [v4, v6] = pilot_agent.tables(&pod, &istio)?;
            let nft = pilot_agent.nftables(&pod, &istio)?;
            for (kind, to, recorded, now) in [
                ("v4", "iptables-restore", record.v4, v4),
                ("v6", "ip6tables-restore", record.v6, v6),
                ("nft", "nft", record.nft, nft),
            ] {
                let text = format!(
                    "# What pilot-agent gives to {to}. `make records` writes this.\n\
                     # istio.io/istio {version}\n# istio-iptables {args}\n{now}"
                );
                if text != recorded {
                    stale.push((dir.join(format!("{}.{kind}", record.name)), text));
                }
            }
        }
        Ok(stale)
    }
}

/// Installs what pilot-agent gives to nft with `--native-nftables`, for a sidecar with the default
/// settings, and gives `lo` the address ::6 as Istio does.
pub fn install_istio_nftables(pod: &Pod) -> Result<()> {
    pod.netns_handle()
        .command(&["nft", "-f", "-"], Record::SIDECAR.nft)
        .with_context(|| format!("installing nftables rules in {}", pod.name()))?;
    if pod.has_v6() {
        pod.add_address(Ipv6Addr::from(6).into(), 128, "lo", "")?;
    }
    Ok(())
}

/// Undoes [`install_istio_nftables`].
pub fn remove_istio_nftables(pod: &Pod) -> Result<()> {
    let netns = pod.netns_handle();
    for table in Record::SIDECAR.nft.lines().filter_map(|line| line.strip_prefix("add table ")) {
        netns.command(&["nft", &format!("delete table {table}")], "")?;
    }
    if pod.has_v6() {
        pod.ip("addr del ::6/128 dev lo")?;
    }
    forget_connections(pod)
}

impl RuleSet for Record {
    fn tables(&self, family: Family) -> String {
        match family {
            Family::V4 => self.v4,
            Family::V6 => self.v6,
        }
        .to_owned()
    }

    fn needs_passthrough(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_are_those_of_the_cni_plugin() {
        let of = |annotations: &[(&str, &str)], flag: &str| {
            let pairs = annotations.iter().map(|(key, value)| ((*key).into(), (*value).into()));
            let Istio(args) = Istio::new(&pairs.collect(), false, false);
            let at = args.iter().position(|arg| arg == flag).expect("the flag");
            args[at + 1].clone()
        };
        assert_eq!(of(&[], "-d"), "15020,15021,15090");
        assert_eq!(of(&[], "-o"), "15020");
        let exclude = "traffic.sidecar.istio.io/excludeInboundPorts";
        let status = "status.sidecar.istio.io/port";
        assert_eq!(of(&[(exclude, "80, 15021,")], "-d"), "80,15021,15020,15090");
        assert_eq!(of(&[(status, "15025")], "-d"), "15025,15020,15021,15090");
        assert_eq!(of(&[("traffic.sidecar.istio.io/includeInboundPorts", "")], "-b"), "");
    }
}
