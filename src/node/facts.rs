//! Reads a network namespace's addresses, interfaces, routes and NAT rules.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use futures_util::TryStreamExt;
use ipnet::IpNet;
use nix::{ifaddrs::getifaddrs, net::if_::if_nameindex};
use rtnetlink::{
    RouteMessageBuilder,
    packet_route::route::{RouteAddress, RouteAttribute},
};

use super::{
    lo::{Lo, PASSTHROUGH_V6, lo},
    netfilter,
    netns::{Netns, NetnsCookie, netlink},
    ruleset::{ReadLegacy, Ruleset, ruleset},
};

/// The number of addresses of each family that count as a pod's own.
pub const ADDRESSES: usize = 64;
/// The main routing table, which routing daemons and CNI plugins use.
const MAIN_TABLE: u32 = 254;

/// The state of an enrolled pod's network namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetnsFacts {
    /// The namespace's path.
    pub path: PathBuf,
    /// The kernel's identity of the namespace.
    pub cookie: NetnsCookie,
    /// The addresses of its interfaces, but for loopback, in the order of the kernel's list, which
    /// has IPv4 first; each with the index of its interface. Empty: they are not known.
    pub addresses: Vec<(IpAddr, u32)>,
    /// Whether the namespace has more addresses than count.
    pub more_addresses: bool,
    /// The indices of its interfaces, by name.
    pub interfaces: BTreeMap<String, u32>,
    /// Its main table's routes, and the index of the interface that each leads to.
    pub routes: Vec<(IpNet, u32)>,
    /// Its sysctl `net.ipv4.conf.*.route_localnet` is set, of some device but lo: what is bound to
    /// 127.0.0.0/8 may call off the pod.
    pub route_localnet: bool,
    /// Whether the pod's own rules translate incoming connections.
    pub own_nat: bool,
    /// The chains of its own rules that may translate, or why they cannot be read.
    pub rules: Result<Ruleset, String>,
    /// The number of packets forwarded since the namespace was made.
    pub forwarded: u64,
}

impl NetnsFacts {
    /// Leaves out the addresses that are too many: whoever may add some in a namespace could fill
    /// the node's maps. A call to one that does not count is captured, as one to anywhere else.
    pub fn bound(mut self) -> Self {
        let mut counts = [0; 2];
        let before = self.addresses.len();
        self.addresses.retain(|(ip, _)| {
            let count = &mut counts[usize::from(ip.is_ipv6())];
            *count += 1;
            *count <= ADDRESSES
        });
        self.more_addresses = self.addresses.len() < before;
        self
    }
}

impl Netns {
    /// The namespace's state.
    ///
    /// # Errors
    /// If it is no network namespace, or cannot be entered.
    pub fn facts(&self) -> Result<NetnsFacts> {
        self.inside(|| self.facts_here())?
    }

    /// See [`Netns::facts`]; the calling thread must be inside the namespace.
    fn facts_here(&self) -> Result<NetnsFacts> {
        let interfaces = interfaces()?;
        let facts = NetnsFacts {
            path: self.path().to_owned(),
            cookie: NetnsCookie::current()?,
            addresses: addresses(&interfaces)?,
            more_addresses: false,
            route_localnet: route_localnet(interfaces.keys()),
            interfaces,
            routes: Vec::new(),
            own_nat: own_nat(),
            rules: Ok(Vec::new()),
            forwarded: forwarded()?,
        };
        Ok(facts.bound())
    }

    /// The same, with what is there for captured connections and, where `with_dns` says so, for
    /// DNS; where `with_routes` says so, with the main table's routes; and with the namespace's own
    /// rules, of which `read` reads those of iptables' older kind.
    ///
    /// # Errors
    /// If the namespace cannot be entered, or does not answer.
    pub fn look(
        &self,
        with_routes: bool,
        with_dns: bool,
        read: ReadLegacy,
    ) -> Result<(NetnsFacts, Lo)> {
        let look = || -> Result<(NetnsFacts, Lo)> {
            let mut facts = self.facts_here()?;
            facts.rules = ruleset(read).map_err(|error| format!("{error:#}"));
            let dns: &[_] = if with_dns { &facts.addresses } else { &[] };
            let (lo, routes) = netlink(async |handle| {
                let routes = if with_routes { routes(handle.clone()).await? } else { Vec::new() };
                Ok((lo(handle, dns).await?, routes))
            })?;
            facts.routes = routes;
            Ok((facts, lo))
        };
        self.inside(look)?.with_context(|| format!("cannot look at {}", self.path().display()))
    }
}

/// The calling thread's namespace's addresses, but for those of loopback, in the kernel's order;
/// with the index of their interface, of these.
fn addresses(interfaces: &BTreeMap<String, u32>) -> Result<Vec<(IpAddr, u32)>> {
    let all = getifaddrs().context("cannot read interface addresses")?;
    let ips = all.filter_map(|interface| {
        let address = interface.address?;
        let v4 = address.as_sockaddr_in().map(|sin| IpAddr::V4(sin.ip()));
        let ip = v4.or_else(|| address.as_sockaddr_in6().map(|sin6| IpAddr::V6(sin6.ip())))?;
        // An address may have a label behind its interface's name.
        let name = interface.interface_name.split(':').next()?;
        Some((ip, *interfaces.get(name)?))
    });
    let own = |ip: &IpAddr| !ip.is_loopback() && *ip != IpAddr::V6(PASSTHROUGH_V6);
    Ok(ips.filter(|(ip, _)| own(ip)).collect())
}

/// The device that kube-proxy's IPVS mode gives the addresses of all Services.
const KUBE_IPVS: &str = "kube-ipvs0";

/// The calling thread's namespace's addresses, loopback's too, but for those that kube-proxy has
/// given a device of its own.
///
/// # Errors
/// If they cannot be read.
pub fn own_addresses() -> Result<BTreeSet<IpAddr>> {
    let all = getifaddrs().context("cannot read interface addresses")?;
    let ips =
        all.filter(|interface| interface.interface_name != KUBE_IPVS).filter_map(|interface| {
            let address = interface.address?;
            let v4 = address.as_sockaddr_in().map(|sin| IpAddr::V4(sin.ip()));
            v4.or_else(|| address.as_sockaddr_in6().map(|sin6| IpAddr::V6(sin6.ip())))
        });
    Ok(ips.collect())
}

/// The calling thread's namespace's interfaces.
fn interfaces() -> Result<BTreeMap<String, u32>> {
    let all = if_nameindex().context("cannot read interfaces")?;
    Ok(all.iter().map(|i| (i.name().to_string_lossy().into_owned(), i.index())).collect())
}

/// Whether one of the calling thread's namespace's devices, but lo, lets 127.0.0.0/8 out.
fn route_localnet<'a>(devices: impl Iterator<Item = &'a String>) -> bool {
    let conf = Path::new("/proc/sys/net/ipv4/conf");
    ["all"].into_iter().chain(devices.map(String::as_str).filter(|device| *device != "lo")).any(
        // A device may be gone again, or have no IPv4.
        |device| fs::read(conf.join(device).join("route_localnet")).is_ok_and(|on| on != b"0\n"),
    )
}

/// Whether the calling thread's namespace translates what comes in. Where that is not known, it is
/// looked at as if it did.
fn own_nat() -> bool {
    netfilter::nat().map(|nat| nat.inbound).unwrap_or_else(|error| {
        tracing::warn!("cannot read whether a pod has NAT rules: {error:#}");
        true
    })
}

/// The number of packets that the calling thread's namespace has forwarded.
fn forwarded() -> Result<u64> {
    let read = |name: &str| {
        let path = format!("/proc/thread-self/net/{name}");
        fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))
    };
    // IPv6 may not be there.
    Ok(forwarded4(&read("snmp")?) + forwarded6(&read("snmp6").unwrap_or_default()))
}

/// Parses /proc/net/snmp: a line of names, and a line of values.
fn forwarded4(text: &str) -> u64 {
    let mut lines = text.lines().filter_map(|line| line.strip_prefix("Ip:"));
    let names = lines.next().unwrap_or_default().split_whitespace();
    let values = lines.next().unwrap_or_default().split_whitespace();
    let found = names.zip(values).find(|(name, _)| *name == "ForwDatagrams");
    found.and_then(|(_, value)| value.parse().ok()).unwrap_or(0)
}

/// Parses /proc/net/snmp6: a name and a value per line.
fn forwarded6(text: &str) -> u64 {
    let value = |line: &str| line.strip_prefix("Ip6OutForwDatagrams")?.trim().parse().ok();
    text.lines().find_map(value).unwrap_or(0)
}

async fn routes(handle: rtnetlink::Handle) -> Result<Vec<(IpNet, u32)>> {
    let mut found = Vec::new();
    for (message, any) in [
        (RouteMessageBuilder::<Ipv4Addr>::new().build(), IpAddr::V4(Ipv4Addr::UNSPECIFIED)),
        (RouteMessageBuilder::<Ipv6Addr>::new().build(), IpAddr::V6(Ipv6Addr::UNSPECIFIED)),
    ] {
        let mut all = handle.route().get(message).execute();
        while let Some(route) = all.try_next().await? {
            if u32::from(route.header.table) != MAIN_TABLE {
                continue;
            }
            let (mut to, mut oif) = (any, None);
            for attribute in &route.attributes {
                match attribute {
                    RouteAttribute::Destination(RouteAddress::Inet(v4)) => to = (*v4).into(),
                    RouteAttribute::Destination(RouteAddress::Inet6(v6)) => to = (*v6).into(),
                    RouteAttribute::Oif(index) => oif = Some(*index),
                    _ => {}
                }
            }
            let net = IpNet::new(to, route.header.destination_prefix_length)?;
            found.extend(oif.map(|index| (net, index)));
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forwarded_packets_are_read_from_the_kernels_text() {
        let v4 = "Ip: Forwarding DefaultTTL InReceives ForwDatagrams InUnknownProtos\n\
                  Ip: 1 64 1234 56 0\nIcmp: InMsgs\nIcmp: 7\n";
        assert_eq!(forwarded4(v4), 56);
        let v6 = "Ip6InReceives                   \t9\nIp6OutForwDatagrams             \t78\n";
        assert_eq!(forwarded6(v6), 78);
        assert_eq!((forwarded4(""), forwarded6("")), (0, 0));
    }
}
