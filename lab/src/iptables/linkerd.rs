//! Linkerd's rules. Facts from linkerd/linkerd2-proxy-init: `internal/iptables/iptables.go` (which
//! rules, in which order; at most 15 ports to a rule) and `cni-plugin/main.go` (annotations).

use super::{Annotations, Family, RuleSet, Table, items};

/// Most ports that one multiport match takes; a range counts twice.
const MULTIPORT_LIMIT: usize = 15;

/// What decides over a Linkerd pod's rules.
#[derive(Clone, Debug)]
pub struct Linkerd {
    skip_inbound_ports: Vec<String>,
    skip_outbound_ports: Vec<String>,
    skip_subnets: Vec<String>,
    uid: u32,
    gid: Option<u32>,
}

impl Linkerd {
    /// The port for outbound connections, on localhost alone.
    pub const OUTBOUND: u16 = 4140;
    /// The port for inbound connections.
    pub const INBOUND: u16 = 4143;
    /// The proxy's user.
    pub const UID: u32 = 2102;

    /// From a pod's annotations.
    pub fn new(annotations: &Annotations) -> Self {
        let get = |name: &str| annotations.get(&format!("config.linkerd.io/{name}"));
        // The proxy's control and admin ports, which the plugin's own configuration names.
        let mut skip_inbound_ports = vec!["4190".to_owned(), "4191".to_owned()];
        skip_inbound_ports.extend(items(get("skip-inbound-ports")));
        let number = |name: &str| get(name).and_then(|text| text.trim().parse().ok());
        Self {
            skip_inbound_ports,
            skip_outbound_ports: items(get("skip-outbound-ports")),
            skip_subnets: items(get("skip-subnets")),
            uid: number("proxy-uid").unwrap_or(Self::UID),
            gid: number("proxy-gid").filter(|gid| *gid > 0),
        }
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

        nat.add("PROXY_INIT_OUTPUT", &format!("-m owner --uid-owner {} -j RETURN", self.uid));
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
