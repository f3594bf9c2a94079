//! Istio's sidecar rules, as its CNI plugin has them installed for a pod. Facts from istio/istio:
//! `tools/istio-iptables/pkg/capture/run.go` with the rule sets in its `testdata` (which rules,
//! in which order) and `cni/pkg/plugin/sidecar_redirect.go` (what annotations mean, defaults).

use super::{Annotations, Family, RuleSet, Table, items};
use crate::{DNS, INBOUND, OUTBOUND, PROXY};

const HBONE: u16 = 15008;

/// What decides over an Istio pod's rules.
#[derive(Clone, Debug)]
pub struct Istio {
    /// `None`: all but the excluded.
    include_inbound_ports: Option<Vec<String>>,
    exclude_inbound_ports: Vec<String>,
    exclude_outbound_ports: Vec<String>,
    include_outbound_ports: Vec<String>,
    exclude_outbound_ranges: Vec<String>,
    /// `None`: all.
    include_outbound_ranges: Option<Vec<String>>,
    exclude_interfaces: Vec<String>,
    dns: bool,
}

impl Default for Istio {
    fn default() -> Self {
        Self::new(&Annotations::new(), false)
    }
}

impl Istio {
    /// From a pod's annotations and its proxy's ISTIO_META_DNS_CAPTURE.
    pub fn new(annotations: &Annotations, dns: bool) -> Self {
        let get = |name: &str| annotations.get(&format!("traffic.sidecar.istio.io/{name}"));
        let list = |name: &str| items(get(name));
        let unless_all =
            |name: &str| get(name).filter(|text| text.trim() != "*").map(|text| items(Some(text)));
        let mut exclude_inbound_ports = list("excludeInboundPorts");
        exclude_inbound_ports.extend(items(annotations.get("status.sidecar.istio.io/port")));
        exclude_inbound_ports.extend(["15020", "15021", "15090"].map(str::to_owned));
        let exclude_outbound_ports = match get("excludeOutboundPorts") {
            Some(text) => items(Some(text)),
            None => vec!["15020".to_owned()],
        };
        Self {
            include_inbound_ports: unless_all("includeInboundPorts"),
            exclude_inbound_ports,
            exclude_outbound_ports,
            include_outbound_ports: list("includeOutboundPorts"),
            exclude_outbound_ranges: list("excludeOutboundIPRanges"),
            include_outbound_ranges: unless_all("includeOutboundIPRanges"),
            exclude_interfaces: list("excludeInterfaces"),
            dns,
        }
    }

    fn inbound(&self, nat: &mut Table) {
        nat.add("ISTIO_INBOUND", &format!("-p tcp --dport {HBONE} -j RETURN"));
        match &self.include_inbound_ports {
            None => {
                nat.add("PREROUTING", "-p tcp -j ISTIO_INBOUND");
                for port in &self.exclude_inbound_ports {
                    nat.add("ISTIO_INBOUND", &format!("-p tcp --dport {port} -j RETURN"));
                }
                nat.add("ISTIO_INBOUND", "-p tcp -j ISTIO_IN_REDIRECT");
            }
            Some(ports) if ports.is_empty() => {}
            Some(ports) => {
                nat.add("PREROUTING", "-p tcp -j ISTIO_INBOUND");
                for port in ports {
                    nat.add(
                        "ISTIO_INBOUND",
                        &format!("-p tcp --dport {port} -j ISTIO_IN_REDIRECT"),
                    );
                }
            }
        }
    }

    fn outbound(&self, nat: &mut Table, family: Family) {
        let mut add = |rule: &str| nat.add("ISTIO_OUTPUT", rule);
        let localhost = family.localhost();
        for port in &self.exclude_outbound_ports {
            for protocol in ["tcp", "udp"] {
                add(&format!("-p {protocol} --dport {port} -j RETURN"));
            }
        }
        add(&format!("-o lo -s {} -j RETURN", family.passthrough()));
        let loopback_included = self
            .include_outbound_ranges
            .iter()
            .flatten()
            .any(|range| range.starts_with("127.") || range.starts_with("::1/"));
        for owner in ["uid-owner", "gid-owner"] {
            let ports = match (self.dns, owner) {
                (true, "uid-owner") => format!("-m multiport ! --dports 53,{HBONE}"),
                _ => format!("! --dport {HBONE}"),
            };
            add(&format!(
                "-o lo ! -d {localhost} -p tcp {ports} -m owner --{owner} {PROXY} \
                 -j ISTIO_IN_REDIRECT"
            ));
            if !loopback_included {
                let but_dns = if self.dns { "-p tcp ! --dport 53 " } else { "" };
                add(&format!("-o lo {but_dns}-m owner ! --{owner} {PROXY} -j RETURN"));
            }
            add(&format!("-m owner --{owner} {PROXY} -j RETURN"));
        }
        if self.dns {
            add("-j ISTIO_OUTPUT_DNS");
        }
        add(&format!("-d {localhost} -j RETURN"));
        for range in self.exclude_outbound_ranges.iter().filter(|range| family.has(range)) {
            add(&format!("-d {range} -j RETURN"));
        }
        for port in &self.include_outbound_ports {
            add(&format!("-p tcp --dport {port} -j ISTIO_REDIRECT"));
        }
        match &self.include_outbound_ranges {
            None => add("-j ISTIO_REDIRECT"),
            Some(ranges) => {
                for range in ranges.iter().filter(|range| family.has(range)) {
                    add(&format!("-d {range} -j ISTIO_REDIRECT"));
                }
            }
        }
    }

    /// The agent's own questions and answers are tracked apart from the applications'.
    fn zones() -> String {
        let mut raw = Table::new("raw", &["ISTIO_OUTPUT_DNS", "ISTIO_INBOUND"]);
        raw.add("OUTPUT", "-j ISTIO_OUTPUT_DNS");
        for owner in ["uid-owner", "gid-owner"] {
            for (side, port, zone) in [("dport", 53, 1), ("sport", DNS, 2)] {
                raw.add(
                    "ISTIO_OUTPUT_DNS",
                    &format!(
                        "-p udp --{side} {port} -m owner --{owner} {PROXY} -j CT --zone {zone}"
                    ),
                );
            }
        }
        raw.add("PREROUTING", "-j ISTIO_INBOUND");
        raw.add("ISTIO_OUTPUT_DNS", "-p udp --dport 53 -j CT --zone 2");
        raw.add("ISTIO_INBOUND", "-p udp --sport 53 -j CT --zone 1");
        raw.end()
    }
}

impl RuleSet for Istio {
    fn tables(&self, family: Family) -> String {
        let mut chains =
            vec!["ISTIO_INBOUND", "ISTIO_REDIRECT", "ISTIO_IN_REDIRECT", "ISTIO_OUTPUT"];
        if self.dns {
            chains.push("ISTIO_OUTPUT_DNS");
        }
        let mut nat = Table::new("nat", &chains);
        for interface in &self.exclude_interfaces {
            nat.add("PREROUTING", &format!("-i {interface} -j RETURN"));
            nat.add("OUTPUT", &format!("-o {interface} -j RETURN"));
        }
        nat.add("ISTIO_REDIRECT", &format!("-p tcp -j REDIRECT --to-ports {OUTBOUND}"));
        nat.add("ISTIO_IN_REDIRECT", &format!("-p tcp -j REDIRECT --to-ports {INBOUND}"));
        self.inbound(&mut nat);
        nat.add("OUTPUT", "-j ISTIO_OUTPUT");
        self.outbound(&mut nat, family);
        if !self.dns {
            return nat.end();
        }
        for protocol in ["tcp", "udp"] {
            let rule = format!("-p {protocol} --dport 53 -j REDIRECT --to-ports {DNS}");
            nat.add("ISTIO_OUTPUT_DNS", &rule);
        }
        nat.end() + &Self::zones()
    }

    fn needs_passthrough(&self) -> bool {
        true
    }
}
