//! What [`crate::iptables::install_istio`] does, said in nftables' own words: for comparing the
//! two, IPv4 only.

use anyhow::{Context, Result};

use crate::iptables::forget_connections;
use crate::pod::Pod;
use crate::{INBOUND, OUTBOUND, PROXY};

const TABLE: &str = "sidestep_lab";

/// Installs the rules in the pod.
pub fn install(pod: &Pod) -> Result<()> {
    pod.netns_handle()
        .command(&["nft", "-f", "-"], &rules())
        .with_context(|| format!("installing nftables rules in {}", pod.name()))
        .map(drop)
}

/// Undoes [`install`].
pub fn remove(pod: &Pod) -> Result<()> {
    pod.netns_handle().command(&["nft", "delete", "table", "ip", TABLE], "")?;
    forget_connections(pod)
}

/// The rules of an Istio sidecar with the default settings, in the same order as iptables has
/// them.
fn rules() -> String {
    let owner = |by: &str| {
        format!(
            "    oifname lo ip daddr != 127.0.0.1 tcp dport != 15008 {by} {PROXY} \
             redirect to :{INBOUND}
    oifname lo {by} != {PROXY} return
    {by} {PROXY} return
"
        )
    };
    let (by_uid, by_gid) = (owner("meta skuid"), owner("meta skgid"));
    format!(
        "table ip {TABLE} {{
  chain inbound {{
    type nat hook prerouting priority dstnat
    tcp dport {{ 15008, 15020, 15021, 15090 }} return
    meta l4proto tcp redirect to :{INBOUND}
  }}
  chain outbound {{
    type nat hook output priority -100
    meta l4proto {{ tcp, udp }} th dport 15020 return
    oifname lo ip saddr 127.0.0.6 return
{by_uid}{by_gid}    ip daddr 127.0.0.1 return
    meta l4proto tcp redirect to :{OUTBOUND}
  }}
}}
"
    )
}
