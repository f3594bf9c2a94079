//! The rules of Linkerd 2.18 to edge-26.8.3. Facts from linkerd/linkerd2-proxy-init:
//! `pkg/iptables/iptables.go` (which rules, in which order; at most 15 ports to a rule), `pkg/ports`
//! and `proxy-init/cmd/root.go` (formats), `cni-plugin/main.go` (annotations).

use super::{Annotations, Family, RuleSet, Table, items};

/// Most ports that one multiport match takes; a range counts twice.
const MULTIPORT_LIMIT: usize = 15;

/// What decides over a Linkerd pod's rules.
#[derive(Clone, Debug)]
pub struct Linkerd {
    skip_inbound_ports: Vec<String>,
    skip_outbound_ports: Vec<String>,
    skip_subnets: Vec<String>,
    uid: Option<u32>,
    gid: Option<u32>,
}

impl Linkerd {
    /// The port for outbound connections, on localhost alone.
    pub const OUTBOUND: u16 = 4140;
    /// The port for inbound connections.
    pub const INBOUND: u16 = 4143;
    /// The user that the proxy runs as.
    pub const UID: u32 = 2102;

    /// From a pod's annotations.
    pub fn new(annotations: &Annotations) -> Self {
        let get = |name: &str| annotations.get(&format!("config.linkerd.io/{name}"));
        let ports = |name: &str| -> Vec<String> {
            let items = get(name).into_iter().flat_map(|text| text.split(','));
            items.filter(|item| is_port_or_range(item)).map(str::to_owned).collect()
        };
        // The proxy's control and admin ports. linkerd-init adds the annotation's to them;
        // linkerd2-cni skips the annotation's alone.
        let mut skip_inbound_ports = vec!["4190".to_owned(), "4191".to_owned()];
        skip_inbound_ports.extend(ports("skip-inbound-ports"));
        // There is a rule for ids above zero alone.
        let id = |name: &str, default: i64| {
            let id = get(name).and_then(|text| text.parse().ok()).unwrap_or(default);
            u32::try_from(id).ok().filter(|id| *id > 0)
        };
        Self {
            skip_inbound_ports,
            skip_outbound_ports: ports("skip-outbound-ports"),
            skip_subnets: items(get("skip-subnets")),
            uid: id("proxy-uid", Self::UID.into()),
            gid: id("proxy-gid", 0),
        }
    }
}

/// Whether Linkerd takes the item: others are skipped, and a blank is a part of it.
fn is_port_or_range(item: &str) -> bool {
    let (first, last) = item.split_once('-').unwrap_or((item, item));
    match (first.parse::<u16>(), last.parse::<u16>()) {
        (Ok(first), Ok(last)) => first <= last,
        _ => false,
    }
}

/// The ports and ranges in the form of iptables' multiport match, as few rules as it allows.
fn multiports(ports: &[String]) -> Vec<String> {
    let mut rules: Vec<(usize, Vec<String>)> = Vec::new();
    for port in ports {
        let weight = 1 + usize::from(port.contains('-'));
        let port = port.replace('-', ":");
        match rules.last_mut().filter(|(used, _)| used + weight <= MULTIPORT_LIMIT) {
            Some((used, list)) => {
                *used += weight;
                list.push(port);
            }
            None => rules.push((weight, vec![port])),
        }
    }
    rules.into_iter().map(|(_, list)| list.join(",")).collect()
}

impl RuleSet for Linkerd {
    fn tables(&self, family: Family) -> String {
        let mut nat = Table::new("nat", &["PROXY_INIT_REDIRECT", "PROXY_INIT_OUTPUT"]);
        let ignore = |nat: &mut Table, chain: &str, ports: &[String]| {
            for list in multiports(ports) {
                nat.add(chain, &format!("-p tcp -m multiport --dports {list} -j RETURN"));
            }
        };
        ignore(&mut nat, "PROXY_INIT_REDIRECT", &self.skip_inbound_ports);
        for subnet in self.skip_subnets.iter().filter(|subnet| family.has(subnet)) {
            nat.add("PROXY_INIT_REDIRECT", &format!("-s {subnet} -j RETURN"));
        }
        let to = |port: u16| format!("-p tcp -j REDIRECT --to-ports {port}");
        nat.add("PROXY_INIT_REDIRECT", &to(Self::INBOUND));
        nat.add("PREROUTING", "-j PROXY_INIT_REDIRECT");

        if let Some(uid) = self.uid {
            nat.add("PROXY_INIT_OUTPUT", &format!("-m owner --uid-owner {uid} -j RETURN"));
        }
        if let Some(gid) = self.gid {
            nat.add("PROXY_INIT_OUTPUT", &format!("-m owner --gid-owner {gid} -j RETURN"));
        }
        nat.add("PROXY_INIT_OUTPUT", "-o lo -j RETURN");
        ignore(&mut nat, "PROXY_INIT_OUTPUT", &self.skip_outbound_ports);
        nat.add("PROXY_INIT_OUTPUT", &to(Self::OUTBOUND));
        nat.add("OUTPUT", "-j PROXY_INIT_OUTPUT");
        nat.end()
    }

    fn needs_passthrough(&self) -> bool {
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_takes_fifteen_ports() {
        let ports: Vec<String> = (1..=14).map(|port| port.to_string()).collect();
        assert_eq!(multiports(&ports).len(), 1);
        let with_range: Vec<String> = ports.iter().cloned().chain(["80-90".to_owned()]).collect();
        assert_eq!(multiports(&with_range)[1], "80:90");
        assert!(multiports(&[]).is_empty());
    }
}
