//! Kuma's rules. Facts from kumahq/kuma: `pkg/transparentproxy/iptables/builder` (which rules, in
//! which order), `pkg/transparentproxy/config/config.go` (exclusions for users).

use super::{Annotations, Family, RuleSet, Table, items};
use crate::{DNS, INBOUND, OUTBOUND};

/// What decides over a Kuma pod's rules.
#[derive(Clone, Debug)]
pub struct Kuma {
    exclude_inbound_ports: Vec<String>,
    exclude_outbound_ports: Vec<String>,
    for_users: Vec<ForUsers>,
    exclude_inbound_ips: Vec<String>,
    exclude_outbound_ips: Vec<String>,
    uid: u32,
    dns: bool,
}

/// Ports that are not captured for some users: `PROTOCOL:PORTS:UIDS`, of which only the last is
/// needed.
#[derive(Clone, Debug)]
struct ForUsers {
    protocols: Vec<&'static str>,
    ports: String,
    uids: String,
}

impl ForUsers {
    fn parse(text: &str) -> Self {
        let parts: Vec<&str> = text.split(':').map(str::trim).collect();
        let (protocol, ports, uids) = match parts[..] {
            [protocol, ports, uids] => (protocol, ports, uids),
            [ports, uids] => ("*", ports, uids),
            _ => ("*", "*", text.trim()),
        };
        let both = ["tcp", "udp"];
        Self {
            protocols: both.into_iter().filter(|one| [one, "*", ""].contains(&protocol)).collect(),
            ports: if ["*", ""].contains(&ports) {
                "1:65535".into()
            } else {
                ports.replace('-', ":")
            },
            uids: uids.to_owned(),
        }
    }
}

impl Kuma {
    /// The proxy's user.
    pub const UID: u32 = 5678;

    /// From a pod's annotations.
    pub fn new(annotations: &Annotations, dns: bool) -> Self {
        let get = |name: &str| annotations.get(&format!("traffic.kuma.io/{name}"));
        let list = |name: &str| items(get(name));
        let uid = annotations.get("kuma.io/sidecar-uid").and_then(|text| text.trim().parse().ok());
        let for_users = get("exclude-outbound-ports-for-uids").map(|text| text.split(';'));
        Self {
            exclude_inbound_ports: list("exclude-inbound-ports"),
            exclude_outbound_ports: list("exclude-outbound-ports"),
            for_users: for_users.into_iter().flatten().map(ForUsers::parse).collect(),
            exclude_inbound_ips: list("exclude-inbound-ips"),
            exclude_outbound_ips: list("exclude-outbound-ips"),
            uid: uid.unwrap_or(Self::UID),
            dns,
        }
    }

    fn inbound(&self, nat: &mut Table, family: Family) {
        for ip in self.exclude_inbound_ips.iter().filter(|ip| family.has(ip)) {
            nat.add("KUMA_MESH_INBOUND", &format!("-s {ip} -j RETURN"));
        }
        for port in &self.exclude_inbound_ports {
            nat.add("KUMA_MESH_INBOUND", &format!("-p tcp --dport {port} -j RETURN"));
        }
        nat.add("KUMA_MESH_INBOUND", "-p tcp -j KUMA_MESH_INBOUND_REDIRECT");
    }

    /// What comes before the jump to Kuma's own chain.
    fn output(&self, nat: &mut Table, family: Family) {
        for ForUsers { protocols, ports, uids } in &self.for_users {
            for protocol in protocols {
                nat.add(
                    "OUTPUT",
                    &format!(
                        "-p {protocol} -m multiport --dports {ports} -m owner --uid-owner {uids} \
                         -j RETURN"
                    ),
                );
            }
        }
        for ip in self.exclude_outbound_ips.iter().filter(|ip| family.has(ip)) {
            nat.add("OUTPUT", &format!("-d {ip} -j RETURN"));
        }
        if self.dns {
            let uid = self.uid;
            nat.add("OUTPUT", &format!("-p udp --dport 53 -m owner --uid-owner {uid} -j RETURN"));
            nat.add("OUTPUT", &format!("-p udp --dport 53 -j REDIRECT --to-ports {DNS}"));
        }
        nat.add("OUTPUT", "-p tcp -j KUMA_MESH_OUTBOUND");
    }

    fn outbound(&self, nat: &mut Table, family: Family) {
        let mut add = |rule: &str| nat.add("KUMA_MESH_OUTBOUND", rule);
        let (uid, localhost) = (self.uid, family.localhost());
        let tcp = if self.dns { "-p tcp ! --dport 53" } else { "-p tcp" };
        for port in &self.exclude_outbound_ports {
            add(&format!("-p tcp --dport {port} -j RETURN"));
        }
        add(&format!("-s {} -o lo -j RETURN", family.passthrough()));
        add(&format!(
            "{tcp} -o lo ! -d {localhost} -m owner --uid-owner {uid} -j KUMA_MESH_INBOUND_REDIRECT"
        ));
        add(&format!("{tcp} -o lo -m owner ! --uid-owner {uid} -j RETURN"));
        add(&format!("-m owner --uid-owner {uid} -j RETURN"));
        if self.dns {
            add(&format!("-p tcp --dport 53 -j REDIRECT --to-ports {DNS}"));
        }
        add(&format!("-d {localhost} -j RETURN"));
        add("-j KUMA_MESH_OUTBOUND_REDIRECT");
    }

    /// The proxy's own questions and answers are tracked apart from the applications'.
    fn zones(&self) -> String {
        let mut raw = Table::new("raw", &[]);
        for (side, port, zone) in [("dport", 53, 1), ("sport", DNS, 2)] {
            let owner = format!("-m owner --uid-owner {}", self.uid);
            raw.add("OUTPUT", &format!("-p udp --{side} {port} {owner} -j CT --zone {zone}"));
        }
        raw.add("OUTPUT", "-p udp --dport 53 -j CT --zone 2");
        raw.add("PREROUTING", "-p udp --sport 53 -j CT --zone 1");
        raw.end()
    }
}

impl RuleSet for Kuma {
    fn tables(&self, family: Family) -> String {
        let mut nat = Table::new(
            "nat",
            &[
                "KUMA_MESH_INBOUND",
                "KUMA_MESH_OUTBOUND",
                "KUMA_MESH_INBOUND_REDIRECT",
                "KUMA_MESH_OUTBOUND_REDIRECT",
            ],
        );
        self.output(&mut nat, family);
        nat.add("PREROUTING", "-p tcp -j KUMA_MESH_INBOUND");
        self.inbound(&mut nat, family);
        self.outbound(&mut nat, family);
        for (chain, port) in
            [("KUMA_MESH_INBOUND_REDIRECT", INBOUND), ("KUMA_MESH_OUTBOUND_REDIRECT", OUTBOUND)]
        {
            nat.add(chain, &format!("-p tcp -j REDIRECT --to-ports {port}"));
        }
        if self.dns { nat.end() + &self.zones() } else { nat.end() }
    }

    fn needs_passthrough(&self) -> bool {
        true
    }
}
