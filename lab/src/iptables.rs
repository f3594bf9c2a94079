//! The rules that Istio's init container installs, with the real iptables.

use anyhow::{Context, Result};

use crate::pod::Pod;
use crate::{INBOUND, OUTBOUND, PROXY};

/// Installs the rules of an Istio sidecar with the default settings in the pod, for IPv6 too
/// when the pod has it, and gives `lo` the address ::6 as Istio does.
pub fn install_istio(pod: &Pod) -> Result<()> {
    let netns = pod.netns_handle();
    netns
        .command(&["iptables-restore", "--noflush"], &rules("127.0.0.6/32", "127.0.0.1/32"))
        .context("installing Istio's IPv4 rules")?;
    if pod.has_v6() {
        netns
            .command(&["ip6tables-restore", "--noflush"], &rules("::6/128", "::1/128"))
            .context("installing Istio's IPv6 rules")?;
        pod.ip("addr add ::6/128 dev lo nodad")?;
    }
    Ok(())
}

/// Undoes [`install_istio`], so that not even an empty table is left.
pub fn remove(pod: &Pod) -> Result<()> {
    let netns = pod.netns_handle();
    netns.command(&["nft", "delete", "table", "ip", "nat"], "")?;
    if pod.has_v6() {
        netns.command(&["nft", "delete", "table", "ip6", "nat"], "")?;
        pod.ip("addr del ::6/128 dev lo")?;
    }
    // Known connections would go on being translated, and new ones with the same ports too.
    netns.command(&["conntrack", "-F"], "").map(drop)
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

/// The nat table. `own` is the address that the proxy passes inbound connections on from.
fn rules(own: &str, localhost: &str) -> String {
    let mut text = format!(
        "*nat\n\
         -N ISTIO_INBOUND\n\
         -N ISTIO_REDIRECT\n\
         -N ISTIO_IN_REDIRECT\n\
         -N ISTIO_OUTPUT\n\
         -A ISTIO_INBOUND -p tcp --dport 15008 -j RETURN\n\
         -A ISTIO_REDIRECT -p tcp -j REDIRECT --to-ports {OUTBOUND}\n\
         -A ISTIO_IN_REDIRECT -p tcp -j REDIRECT --to-ports {INBOUND}\n\
         -A PREROUTING -p tcp -j ISTIO_INBOUND\n\
         -A ISTIO_INBOUND -p tcp --dport 15090 -j RETURN\n\
         -A ISTIO_INBOUND -p tcp --dport 15021 -j RETURN\n\
         -A ISTIO_INBOUND -p tcp --dport 15020 -j RETURN\n\
         -A ISTIO_INBOUND -p tcp -j ISTIO_IN_REDIRECT\n\
         -A OUTPUT -p tcp -j ISTIO_OUTPUT\n\
         -A ISTIO_OUTPUT -o lo -s {own} -j RETURN\n"
    );
    for owner in ["uid-owner", "gid-owner"] {
        text += &format!(
            "-A ISTIO_OUTPUT -o lo ! -d {localhost} -p tcp ! --dport 15008 -m owner \
                --{owner} {PROXY} -j ISTIO_IN_REDIRECT\n\
             -A ISTIO_OUTPUT -o lo -m owner ! --{owner} {PROXY} -j RETURN\n\
             -A ISTIO_OUTPUT -m owner --{owner} {PROXY} -j RETURN\n"
        );
    }
    text += &format!(
        "-A ISTIO_OUTPUT -d {localhost} -j RETURN\n\
         -A ISTIO_OUTPUT -j ISTIO_REDIRECT\n\
         COMMIT\n"
    );
    text
}
