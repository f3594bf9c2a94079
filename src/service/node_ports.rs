//! At which addresses of this node NodePorts are translated.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr},
    str::FromStr,
};

use ipnet::IpNet;

/// What kube-proxy's `--nodeport-addresses` and `--iptables-localhost-nodeports` say, as one list.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct NodePorts {
    /// The addresses of the Node object, the first of each family.
    pub primary: bool,
    /// The node's addresses in these ranges, but for loopback and link-local ones.
    pub ranges: Vec<IpNet>,
    /// 127.0.0.1, for the node's own processes. kube-proxy has no such thing for IPv6.
    pub localhost: bool,
}

impl FromStr for NodePorts {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut found = Self::default();
        if text == "none" {
            return Ok(found);
        }
        for word in text.split(',') {
            match word {
                "primary" => found.primary = true,
                "localhost" => found.localhost = true,
                "all" => found.ranges.extend([
                    IpNet::new_assert(Ipv4Addr::UNSPECIFIED.into(), 0),
                    IpNet::new_assert(std::net::Ipv6Addr::UNSPECIFIED.into(), 0),
                ]),
                range => found.ranges.push(range.parse().map_err(|_| {
                    format!(
                        "{range:?} is not primary, all, localhost or a range such as 10.0.0.0/8, \
                         and none stands alone"
                    )
                })?),
            }
        }
        Ok(found)
    }
}

impl NodePorts {
    /// The addresses, of a node that has these `own` ones, `primary` by its object.
    pub fn addresses(&self, own: &BTreeSet<IpAddr>, primary: &[IpAddr]) -> BTreeSet<IpAddr> {
        let is_link_local = |ip: &IpAddr| match ip {
            IpAddr::V4(v4) => v4.is_link_local(),
            IpAddr::V6(v6) => v6.is_unicast_link_local(),
        };
        let wanted = |ip: &IpAddr| {
            let is_primary = self.primary && primary.contains(ip);
            is_primary || self.ranges.iter().any(|range| range.contains(ip))
        };
        let mut found: BTreeSet<IpAddr> = own
            .iter()
            .filter(|ip| !ip.is_loopback() && !is_link_local(ip) && wanted(ip))
            .copied()
            .collect();
        if self.localhost {
            found.insert(Ipv4Addr::LOCALHOST.into());
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &str) -> BTreeSet<String> {
        let ips = |all: &[&str]| -> Vec<IpAddr> {
            all.iter().map(|ip| ip.parse().expect("an address")).collect()
        };
        let own = ips(&[
            "127.0.0.1",
            "::1",
            "fe80::1",
            "169.254.20.10",
            "10.0.0.1",
            "10.1.0.1",
            "fd00::1",
            "fd01::1",
        ]);
        // The second one is no address of this node's devices.
        let primary = ips(&["10.0.0.1", "192.0.2.1", "fd00::1"]);
        let chosen: NodePorts = text.parse().expect(text);
        let found = chosen.addresses(&own.into_iter().collect(), &primary);
        found.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn each_choice_has_its_addresses() {
        for (text, wanted) in [
            ("none", &[][..]),
            ("primary", &["10.0.0.1", "fd00::1"]),
            ("all", &["10.0.0.1", "10.1.0.1", "fd00::1", "fd01::1"]),
            ("localhost", &["127.0.0.1"]),
            ("primary,localhost", &["10.0.0.1", "127.0.0.1", "fd00::1"]),
            ("10.1.0.0/16,fd00::/16", &["10.1.0.1", "fd00::1"]),
            ("127.0.0.0/8", &[]),
            ("192.0.2.0/24", &[]),
        ] {
            assert_eq!(of(text), wanted.iter().map(|ip| (*ip).to_owned()).collect(), "{text}");
        }
    }

    #[test]
    fn what_is_no_choice_is_named() {
        for (text, word) in
            [("", "\"\""), ("primary,none", "none"), ("10.0.0.1", "10.0.0.1"), ("any", "any")]
        {
            let error = text.parse::<NodePorts>().expect_err(text);
            assert!(error.contains(word) && error.contains("10.0.0.0/8"), "{error}");
        }
    }
}
