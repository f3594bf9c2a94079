//! The rules of Kuma 2.14.3, and of its master in August 2026 (3.0 to come), which are the same.
//! Facts from kumahq/kuma: `pkg/transparentproxy/iptables/builder` (which rules, in which order),
//! `pkg/transparentproxy/config` (formats), `app/cni/pkg/cni/annotations_linux.go` (annotations and
//! their defaults), `pkg/transparentproxy/kubernetes/kubernetes_config.go` (the configuration of
//! 3.0).

use serde_json::Value;

use super::{Annotations, Family, RuleSet, Table, items};
use crate::{DNS, INBOUND, OUTBOUND};

/// What decides over a Kuma pod's rules.
#[derive(Clone, Debug)]
pub struct Kuma {
    inbound: Flow,
    outbound: Flow,
    for_users: Vec<ForUsers>,
    uid: u32,
    dns: bool,
    /// The jump for outbound connections comes before the rule for DNS over TCP.
    insert: bool,
}

/// The rules of one direction.
#[derive(Clone, Debug)]
struct Flow {
    enabled: bool,
    include_ports: Vec<String>,
    exclude_ports: Vec<String>,
    exclude_ips: Vec<String>,
    /// Of the inbound direction Kuma makes a rule that matches everything.
    exclude_users: bool,
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
        let parts: Vec<&str> = text.split(':').collect();
        let (protocol, ports, uids) = match parts[..] {
            [protocol, ports, uids] => (protocol.to_lowercase(), ports, uids),
            [ports, uids] => (String::new(), ports, uids),
            _ => (String::new(), "*", text),
        };
        let named: Vec<&str> = protocol.split(',').map(str::trim).collect();
        let all = protocol.is_empty() || protocol == "*";
        Self {
            protocols: ["tcp", "udp"].into_iter().filter(|o| all || named.contains(o)).collect(),
            ports: match ports {
                "" | "*" => "1:65535".into(),
                ports => ports.replace('-', ":"),
            },
            uids: uids.replace('-', ":"),
        }
    }
}

impl Kuma {
    /// The user that the proxy runs as.
    pub const UID: u32 = 5678;

    /// From a pod's annotations.
    pub fn new(annotations: &Annotations, dns: bool) -> Self {
        match annotations.get("traffic.kuma.io/transparent-proxy-config") {
            Some(text) if !text.is_empty() => Self::configured(text),
            _ => Self::annotated(annotations, dns),
        }
    }

    fn annotated(annotations: &Annotations, dns: bool) -> Self {
        let get = |name: &str| annotations.get(&format!("traffic.kuma.io/{name}"));
        let flow = |direction: &str, enabled| Flow {
            enabled,
            include_ports: Vec::new(),
            exclude_ports: match get(&format!("exclude-{direction}-ports")) {
                None => vec!["9901".to_owned()],
                list => items(list),
            },
            exclude_ips: items(get(&format!("exclude-{direction}-ips"))),
            exclude_users: false,
        };
        let gateway = annotations.get("kuma.io/gateway").is_some_and(|text| text == "enabled");
        let mut inbound = flow("inbound", !gateway);
        let probe_proxy = annotations.get("kuma.io/application-probe-proxy-port");
        let probe_proxy = probe_proxy.map_or("9001", String::as_str);
        inbound.exclude_ports.extend(Some(probe_proxy.to_owned()).filter(|port| port != "0"));
        let for_users = get("exclude-outbound-ports-for-uids").map(|text| text.split(';'));
        let uid = annotations.get("kuma.io/sidecar-uid").and_then(|text| text.parse().ok());
        Self {
            inbound,
            outbound: flow("outbound", true),
            for_users: for_users.into_iter().flatten().map(ForUsers::parse).collect(),
            uid: uid.unwrap_or(Self::UID),
            dns,
            insert: false,
        }
    }

    /// By the whole configuration; JSON is YAML.
    fn configured(text: &str) -> Self {
        let config: Value = serde_json::from_str(text).unwrap_or_default();
        let at = |path: &str| config.pointer(&format!("/redirect/{path}"));
        let on = |path: &str, default| at(path).and_then(Value::as_bool).unwrap_or(default);
        let list = |path: &str| -> Vec<String> {
            let text =
                |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
            match at(path) {
                Some(Value::Array(all)) => all.iter().map(text).collect(),
                Some(value) => vec![text(value)],
                None => Vec::new(),
            }
        };
        let split = |path: &str| items(Some(&list(path).join(",")));
        let flow = |direction: &str| Flow {
            enabled: on(&format!("{direction}/enabled"), true),
            include_ports: split(&format!("{direction}/includePorts")),
            exclude_ports: split(&format!("{direction}/excludePorts")),
            exclude_ips: split(&format!("{direction}/excludePortsForIPs")),
            exclude_users: !list(&format!("{direction}/excludePortsForUIDs")).is_empty(),
        };
        let user = config["kumaDPUser"].as_str().and_then(|text| text.parse().ok());
        Self {
            inbound: flow("inbound"),
            outbound: flow("outbound"),
            for_users: list("outbound/excludePortsForUIDs")
                .iter()
                .map(|o| ForUsers::parse(o))
                .collect(),
            uid: user.unwrap_or(Self::UID),
            dns: on("dns/enabled", false),
            insert: on("outbound/insertRedirectInsteadOfAppend", false),
        }
    }

    fn inbound(&self, nat: &mut Table, family: Family) {
        let mut add = |rule: &str| nat.add("KUMA_MESH_INBOUND", rule);
        let Flow { enabled, include_ports, exclude_ports, exclude_ips, exclude_users } =
            &self.inbound;
        if !enabled {
            return add("-p tcp -j RETURN");
        }
        if *exclude_users {
            add("-j RETURN");
        }
        for ip in exclude_ips.iter().filter(|ip| family.has(ip)) {
            add(&format!("-s {ip} -j RETURN"));
        }
        for port in include_ports {
            add(&format!("-p tcp --dport {port} -j KUMA_MESH_INBOUND_REDIRECT"));
        }
        if include_ports.is_empty() {
            for port in exclude_ports {
                add(&format!("-p tcp --dport {port} -j RETURN"));
            }
            add("-p tcp -j KUMA_MESH_INBOUND_REDIRECT");
        }
    }

    /// What comes before Kuma's own chain, and the jump to it.
    fn output(&self, nat: &mut Table, family: Family) {
        let mut add = |rule: &str| nat.add("OUTPUT", rule);
        let uid = self.uid;
        for ForUsers { protocols, ports, uids } in &self.for_users {
            for protocol in protocols {
                add(&format!(
                    "-p {protocol} -m multiport --dports {ports} -m owner --uid-owner {uids} \
                     -j RETURN"
                ));
            }
        }
        for ip in self.outbound.exclude_ips.iter().filter(|ip| family.has(ip)) {
            add(&format!("-d {ip} -j RETURN"));
        }
        let jump = "-p tcp -j KUMA_MESH_OUTBOUND";
        if self.dns {
            add(&format!("-p udp --dport 53 -m owner --uid-owner {uid} -j RETURN"));
            add(&format!("-p udp --dport 53 -j REDIRECT --to-ports {DNS}"));
            if self.insert {
                add(jump);
            }
            add(&format!("-p tcp --dport 53 -m owner ! --uid-owner {uid} -j RETURN"));
        }
        if !(self.dns && self.insert) {
            add(jump);
        }
    }

    fn outbound(&self, nat: &mut Table, family: Family) {
        let mut add = |rule: &str| nat.add("KUMA_MESH_OUTBOUND", rule);
        let (uid, localhost) = (self.uid, family.localhost());
        let Flow { enabled, include_ports, exclude_ports, .. } = &self.outbound;
        if !enabled {
            return add("-p tcp -j RETURN");
        }
        if include_ports.is_empty() {
            for port in exclude_ports {
                add(&format!("-p tcp --dport {port} -j RETURN"));
            }
        }
        add(&format!("-s {} -o lo -j RETURN", family.passthrough()));
        add(&format!(
            "-p tcp -o lo ! -d {localhost} -m owner --uid-owner {uid} -j KUMA_MESH_INBOUND_REDIRECT"
        ));
        add(&format!("-p tcp -o lo -m owner ! --uid-owner {uid} -j RETURN"));
        add(&format!("-m owner --uid-owner {uid} -j RETURN"));
        add(&format!("-d {localhost} -j RETURN"));
        for port in include_ports {
            add(&format!("-p tcp --dport {port} -j KUMA_MESH_OUTBOUND_REDIRECT"));
        }
        if include_ports.is_empty() {
            add("-j KUMA_MESH_OUTBOUND_REDIRECT");
        }
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
