//! The rules that the meshes' own init containers and CNI plugins install, with the real
//! iptables: Istio's by Istio's own binary or its record, the others' as text for
//! `iptables-restore`, by what a pod's annotations make of them.

mod istio;
mod kuma;
mod linkerd;

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv6Addr};

use anyhow::{Context, Result};

pub use istio::{
    Backend, Istio, PilotAgent, Record, install_istio_nftables, remove_istio_nftables,
};
pub use kuma::Kuma;
pub use linkerd::Linkerd;

use crate::pod::Pod;

/// A pod's annotations.
pub type Annotations = BTreeMap<String, String>;

/// The two versions of IP, which have tables of their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// `localhost` as the meshes' rules name it.
    const fn localhost(self) -> &'static str {
        match self {
            Self::V4 => "127.0.0.1/32",
            Self::V6 => "::1/128",
        }
    }

    /// The source that Istio's and Kuma's proxies use towards their application.
    const fn passthrough(self) -> &'static str {
        match self {
            Self::V4 => "127.0.0.6/32",
            Self::V6 => "::6/128",
        }
    }

    /// Whether a range such as `10.0.0.0/8`, or an address, is of this family.
    fn has(self, range: &str) -> bool {
        let address = range.split_once('/').map_or(range, |(address, _)| address);
        address.parse::<IpAddr>().is_ok_and(|ip| ip.is_ipv4() == (self == Self::V4))
    }
}

/// A mesh's rules for one pod.
pub trait RuleSet {
    /// All tables of one family, as input for `iptables-restore`.
    fn tables(&self, family: Family) -> String;

    /// Whether the proxy needs the address ::6 on the pod's `lo`.
    fn needs_passthrough(&self) -> bool;
}

/// Installs a mesh's rules in the pod, where `v6` says so for IPv6 too.
pub fn install(pod: &Pod, rules: &dyn RuleSet, v6: bool) -> Result<()> {
    install_by(pod, rules, v6, ["iptables-restore", "ip6tables-restore"])
}

/// The same in the kernel's older tables.
pub fn install_legacy(pod: &Pod, rules: &dyn RuleSet, v6: bool) -> Result<()> {
    install_by(pod, rules, v6, ["iptables-legacy-restore", "ip6tables-legacy-restore"])
}

fn install_by(pod: &Pod, rules: &dyn RuleSet, v6: bool, [v4_by, v6_by]: [&str; 2]) -> Result<()> {
    let netns = pod.netns_handle();
    let restore = |command, family| {
        netns
            .command(&[command, "--noflush"], &rules.tables(family))
            .with_context(|| format!("installing {family:?} rules in {}", pod.name()))
    };
    restore(v4_by, Family::V4)?;
    if v6 {
        restore(v6_by, Family::V6)?;
        if rules.needs_passthrough() {
            pod.add_address(Ipv6Addr::from(6).into(), 128, "lo", "")?;
        }
    }
    Ok(())
}

/// Installs the rules of an Istio sidecar with the default settings in the pod, for IPv6 too
/// when the pod has it, and gives `lo` the address ::6 as Istio does.
pub fn install_istio(pod: &Pod) -> Result<()> {
    install(pod, &Record::SIDECAR, pod.has_v6())
}

/// Undoes [`install_istio`], so that not even an empty table is left.
pub fn remove(pod: &Pod) -> Result<()> {
    let netns = pod.netns_handle();
    netns.command(&["nft", "delete", "table", "ip", "nat"], "")?;
    if pod.has_v6() {
        netns.command(&["nft", "delete", "table", "ip6", "nat"], "")?;
        pod.ip("addr del ::6/128 dev lo")?;
    }
    forget_connections(pod)
}

/// Empties the pod's table of tracked connections: known ones would go on being translated, and
/// new ones with the same ports too.
pub fn forget_connections(pod: &Pod) -> Result<()> {
    pod.netns_handle().command(&["conntrack", "-F"], "").map(drop)
}

/// All packet filter rules of the pod: what iptables-save, ip6tables-save and
/// `nft list ruleset` say, without comments. Empty when there is no rule, chain or table.
pub fn ruleset(pod: &Pod) -> Result<String> {
    let netns = pod.netns_handle();
    let mut all = String::new();
    for command in [&["iptables-save"][..], &["ip6tables-save"], &["nft", "list", "ruleset"]] {
        for line in netns.command(command, "")?.lines().filter(|line| !line.starts_with('#')) {
            all += line;
            all.push('\n');
        }
    }
    Ok(all)
}

/// The trimmed items of a comma-separated list; none of a missing or an empty one.
fn items(list: Option<&String>) -> Vec<String> {
    let text = list.map(|list| list.trim()).unwrap_or_default();
    text.split(',').map(str::trim).filter(|item| !item.is_empty()).map(str::to_owned).collect()
}

/// A table being written.
struct Table(String);

impl Table {
    fn new(name: &str, chains: &[&str]) -> Self {
        let mut table = Self(format!("*{name}\n"));
        for chain in chains {
            table.line(&format!("-N {chain}"));
        }
        table
    }

    fn line(&mut self, line: &str) {
        self.0 += line;
        self.0.push('\n');
    }

    /// Appends a rule to a chain.
    fn add(&mut self, chain: &str, rule: &str) {
        self.line(&format!("-A {chain} {rule}"));
    }

    fn end(mut self) -> String {
        self.line("COMMIT");
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_split_and_trimmed() {
        assert_eq!(items(Some(&" 80, 443 ,".to_owned())), ["80", "443"]);
        assert_eq!(items(Some(&" ".to_owned())), [""; 0]);
        assert_eq!(items(None), [""; 0]);
    }

    #[test]
    fn a_range_belongs_to_one_family() {
        assert!(Family::V4.has("10.0.0.0/8") && !Family::V6.has("10.0.0.0/8"));
        assert!(Family::V6.has("fd00::1") && !Family::V4.has("fd00::1"));
        assert!(!Family::V4.has("nonsense"));
    }
}
