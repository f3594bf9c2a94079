//! A pod's network namespace: its identity, its addresses, and the little that the agent puts
//! into it.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::{AsRawFd, RawFd},
    path::{Path, PathBuf},
    thread,
};

use anyhow::{Context, Result, anyhow, ensure};
use futures_util::TryStreamExt;
use ipnet::IpNet;
use nix::{
    ifaddrs::getifaddrs,
    net::if_::if_nameindex,
    sched::{CloneFlags, setns, unshare},
};
use rtnetlink::{
    LinkUnspec, RouteMessageBuilder,
    packet_route::route::{
        RouteAddress, RouteAttribute, RouteMessage, RouteProtocol, RouteScope, RouteType,
    },
};

use crate::{
    bpf::current_netns_cookie,
    desired::{DnsRoute, NetnsFacts, PASSTHROUGH_V6, PodRow},
    files, netfilter,
};

/// Where captured IPv4 connections go; `VIA4_NET` of bpf/lib/capture.h.
const VIA4: (Ipv4Addr, u8) = (Ipv4Addr::new(127, 128, 0, 0), 16);
/// Where captured IPv6 connections go; `VIA6_HI` and `VIA6_LO` of bpf/lib/capture.h.
const VIA6: (Ipv6Addr, u8) = (Ipv6Addr::new(0xfd53, 0x6964, 0x6573, 0x7465, 0, 0, 0, 0), 64);
/// Where captured DNS goes; `DNS4_NET` of bpf/mesh/dns.h.
const DNS4: (Ipv4Addr, u8) = (Ipv4Addr::new(127, 129, 0, 0), 16);
/// The same for IPv6; `DNS6_SUBNET` of bpf/mesh/dns.h.
const DNS6: (Ipv6Addr, u8) = (Ipv6Addr::new(0xfd53, 0x6964, 0x6573, 0x7465, 0, 1, 0, 0), 96);

/// The kernel's table of local addresses.
const LOCAL_TABLE: u32 = 255;
/// The table that routing daemons and CNI plugins use.
const MAIN_TABLE: u32 = 254;
/// The index of lo, in every network namespace.
pub const LO: u32 = 1;
/// What a socket is bound to that takes connections to all addresses.
pub const ANY: [IpAddr; 2] = [IpAddr::V4(Ipv4Addr::UNSPECIFIED), IpAddr::V6(Ipv6Addr::UNSPECIFIED)];
/// Where REDIRECT leads what a pod sends.
pub const LOCALHOST: [IpAddr; 2] =
    [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)];

/// An open network namespace. Holding it keeps the namespace alive: don't.
#[derive(Debug)]
pub struct Netns {
    path: PathBuf,
    file: File,
}

impl Netns {
    /// The namespace at `path`.
    ///
    /// # Errors
    /// Where there is nothing at the path.
    pub fn open(path: &Path) -> Result<Self> {
        let file = files::open(path)
            .with_context(|| format!("cannot open network namespace {}", path.display()))?;
        Ok(Self { path: path.to_owned(), file })
    }

    /// The namespace at `path`, if it is the one with this cookie: a process' number may have
    /// become another's.
    ///
    /// # Errors
    /// Where there is nothing at the path, or another namespace.
    pub fn open_as(path: &Path, cookie: u64) -> Result<Self> {
        let netns = Self::open(path)?;
        let found = netns.cookie()?;
        ensure!(found == cookie, "{} leads to another network namespace now", path.display());
        Ok(netns)
    }

    /// Where it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The kernel's identity of the namespace.
    ///
    /// # Errors
    /// Where it is no network namespace, or can't be entered.
    pub fn cookie(&self) -> Result<u64> {
        self.inside(current_netns_cookie)?
    }

    /// Runs `work` on a thread of its own inside the namespace.
    ///
    /// # Errors
    /// Where the namespace can't be entered.
    pub fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        thread::scope(|scope| {
            let thread = scope.spawn(|| {
                setns(&self.file, CloneFlags::CLONE_NEWNET)?;
                Ok::<T, nix::Error>(work())
            });
            thread.join()
        })
        .map_err(|_| anyhow!("a thread in network namespace {} panicked", self.path.display()))?
        .with_context(|| format!("cannot enter {} as a network namespace", self.path.display()))
    }

    /// What the namespace says about itself.
    ///
    /// # Errors
    /// Where it is no network namespace, or can't be entered.
    pub fn facts(&self) -> Result<NetnsFacts> {
        self.inside(|| self.facts_here())?
    }

    /// See [`Netns::facts`]; the calling thread is inside.
    fn facts_here(&self) -> Result<NetnsFacts> {
        let interfaces = interfaces()?;
        let facts = NetnsFacts {
            path: self.path.clone(),
            cookie: current_netns_cookie()?,
            addresses: addresses(&interfaces)?,
            more_addresses: false,
            route_localnet: route_localnet(interfaces.keys()),
            interfaces,
            routes: Vec::new(),
            own_nat: own_nat(),
            forwarded: forwarded()?,
        };
        Ok(facts.bound())
    }

    /// The same, with what is there for captured connections and, where `with_dns` says so, for DNS;
    /// and where `with_routes` says so, with the main table's routes.
    ///
    /// # Errors
    /// Where the namespace can't be entered, or does not answer.
    pub fn look(&self, with_routes: bool, with_dns: bool) -> Result<(NetnsFacts, Lo)> {
        let look = || -> Result<(NetnsFacts, Lo)> {
            let mut facts = self.facts_here()?;
            let dns: &[_] = if with_dns { &facts.addresses } else { &[] };
            let (lo, routes) = netlink(async |handle| {
                let routes = if with_routes { routes(handle.clone()).await? } else { Vec::new() };
                Ok((lo(handle, dns).await?, routes))
            })?;
            facts.routes = routes;
            Ok((facts, lo))
        };
        self.inside(look)?.with_context(|| format!("cannot look at {}", self.path.display()))
    }

    /// Prepares the namespace for captured connections: routes that make the ranges they are sent
    /// to local and that prefer the pod's address as source, for DNS as in
    /// [`PodRow::dns_routes`]; and the address that the proxy calls the app from over IPv6 (Istio's own init
    /// adds that one too). Idempotent.
    ///
    /// # Errors
    /// Where the kernel refuses a route or the address.
    pub fn prepare(&self, row: &PodRow) -> Result<()> {
        self.inside(|| netlink(|handle| prepare(handle, row)))?
            .with_context(|| format!("cannot prepare {}", self.path.display()))
    }
}

/// What a pod's lo has for captured connections.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Lo {
    /// The source of what is sent to [`VIA4`], where that is local.
    source4: Option<IpAddr>,
    /// The source of what is sent to [`VIA6`], where that is local.
    source6: Option<IpAddr>,
    /// It has the address that the proxy calls the app from over IPv6.
    passthrough6: bool,
    /// The source of what is sent to [`DNS4`] or [`DNS6`] by each device, where that is local.
    dns: BTreeSet<(u32, IpAddr)>,
}

impl Lo {
    /// As [`Netns::prepare`] leaves it.
    pub fn prepared(row: &PodRow) -> Self {
        Self {
            source4: row.ip4.map(IpAddr::V4),
            source6: row.ip6.map(IpAddr::V6).filter(|_| row.capture_v6),
            passthrough6: row.capture_v6,
            // Another device may be down, and have no routes then.
            dns: row
                .dns_routes
                .iter()
                .filter(|route| route.own)
                .map(|route| (route.device, route.source))
                .collect(),
        }
    }

    /// Whether nothing of what a pod needs is missing.
    pub fn serves(&self, row: &PodRow) -> bool {
        let needed = Self::prepared(row);
        let source6 = match row.ip6 {
            // Nobody's source on another device: the kernel picks one.
            Some(ip) if ip.is_unicast_link_local() => self.source6.is_some(),
            _ => self.source6 == needed.source6,
        };
        // Of a link-local source only that there is one, as above.
        let has_dns = |(device, source): &(u32, IpAddr)| match source {
            IpAddr::V6(v6) if v6.is_unicast_link_local() => {
                self.dns.iter().any(|(on, from)| on == device && from.is_ipv6())
            }
            _ => self.dns.contains(&(*device, *source)),
        };
        needed.dns.iter().all(has_dns)
            && (row.ip4.is_none() || self.source4 == needed.source4)
            && (!row.capture_v6 || (source6 && self.passthrough6))
    }
}

/// What lo has in the calling thread's namespace, by what the kernel would do with a packet; for DNS,
/// by the devices that have these addresses.
async fn lo(handle: rtnetlink::Handle, dns_by: &[(IpAddr, u32)]) -> Result<Lo> {
    let v4 = RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix(VIA4.0, 32).build();
    let v6 = RouteMessageBuilder::<Ipv6Addr>::new().destination_prefix(VIA6.0, 128).build();
    let source4 = local_source(&handle, v4).await;
    let source6 = local_source(&handle, v6).await;
    let mut all = getifaddrs().context("cannot read interface addresses")?;
    let passthrough6 = all.any(|interface| {
        let sin6 = interface.address.and_then(|address| address.as_sockaddr_in6().copied());
        interface.interface_name == "lo" && sin6.is_some_and(|sin6| sin6.ip() == PASSTHROUGH_V6)
    });
    let devices: BTreeSet<(u32, bool)> =
        dns_by.iter().map(|(ip, device)| (*device, ip.is_ipv4())).collect();
    let mut dns = BTreeSet::new();
    for (device, v4) in devices {
        let to = if v4 {
            let to = RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix(DNS4.0, 32);
            to.output_interface(device).build()
        } else {
            let to = RouteMessageBuilder::<Ipv6Addr>::new().destination_prefix(DNS6.0, 128);
            to.output_interface(device).build()
        };
        dns.extend(local_source(&handle, to).await.map(|source| (device, source)));
    }
    Ok(Lo { source4, source6, passthrough6, dns })
}

/// The source of packets to a destination, where that is local; an unreachable one is not.
async fn local_source(handle: &rtnetlink::Handle, to: RouteMessage) -> Option<IpAddr> {
    let found = handle.route().get(to).execute().try_next().await.ok()??;
    let source = found.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::PrefSource(RouteAddress::Inet(v4)) => Some(IpAddr::V4(*v4)),
        RouteAttribute::PrefSource(RouteAddress::Inet6(v6)) => Some(IpAddr::V6(*v6)),
        _ => None,
    });
    source.filter(|_| found.header.kind == RouteType::Local)
}

impl AsRawFd for Netns {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

/// Runs `work` on a thread of its own in a new network namespace, which has nothing but lo and goes
/// with the thread.
///
/// # Errors
/// Where the namespace can't be made.
pub fn in_new<T: Send>(work: impl FnOnce() -> T + Send) -> Result<T> {
    let made = || -> Result<T> {
        unshare(CloneFlags::CLONE_NEWNET).context("cannot make a network namespace")?;
        netlink(async |handle| {
            let up = LinkUnspec::new_with_index(LO).up().build();
            handle.link().set(up).execute().await.context("cannot set lo up")
        })?;
        Ok(work())
    };
    let done = thread::scope(|scope| scope.spawn(made).join());
    done.map_err(|_| anyhow!("a thread in a new network namespace panicked"))?
}

/// Runs netlink requests in the calling thread's namespace.
fn netlink<T, F: Future<Output = Result<T>>>(
    work: impl FnOnce(rtnetlink::Handle) -> F,
) -> Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
    runtime.block_on(async {
        let (connection, handle, _) = rtnetlink::new_connection()?;
        tokio::spawn(connection);
        work(handle).await
    })
}

/// The cookies of the namespaces that can't be a pod's: the agent's own, which is the node's,
/// and the init process' where that may be looked at.
///
/// # Errors
/// Where the agent's own can't be read.
pub fn host_cookies() -> Result<BTreeSet<u64>> {
    let init = Netns::open(Path::new("/proc/1/ns/net")).and_then(|netns| netns.facts());
    let init = init.ok().map(|facts| facts.cookie);
    Ok(init.into_iter().chain([current_netns_cookie()?]).collect())
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
    netfilter::translates_inbound().unwrap_or_else(|error| {
        tracing::warn!("cannot tell whether a pod has NAT rules: {error:#}");
        true
    })
}

/// How many packets the calling thread's namespace has forwarded.
fn forwarded() -> Result<u64> {
    let read = |name: &str| {
        let path = format!("/proc/thread-self/net/{name}");
        std::fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))
    };
    // IPv6 may not be there.
    Ok(forwarded4(&read("snmp")?) + forwarded6(&read("snmp6").unwrap_or_default()))
}

/// Of the text of /proc/net/snmp: a line of names, and one of values.
fn forwarded4(text: &str) -> u64 {
    let mut lines = text.lines().filter_map(|line| line.strip_prefix("Ip:"));
    let names = lines.next().unwrap_or_default().split_whitespace();
    let values = lines.next().unwrap_or_default().split_whitespace();
    let found = names.zip(values).find(|(name, _)| *name == "ForwDatagrams");
    found.and_then(|(_, value)| value.parse().ok()).unwrap_or(0)
}

/// Of the text of /proc/net/snmp6: a name and a value on each line.
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

async fn add_dns_route(handle: &rtnetlink::Handle, dns: &DnsRoute) -> Result<()> {
    let priority = if dns.own { 1 } else { 1 + dns.device };
    let route = match dns.source {
        IpAddr::V4(source) => RouteMessageBuilder::<Ipv4Addr>::new()
            .destination_prefix(DNS4.0, DNS4.1)
            .pref_source(source)
            .output_interface(dns.device)
            .priority(priority)
            .table_id(LOCAL_TABLE)
            .protocol(RouteProtocol::Static)
            .scope(RouteScope::Host)
            .kind(RouteType::Local)
            .build(),
        IpAddr::V6(source) => {
            let mut route =
                RouteMessageBuilder::<Ipv6Addr>::new().destination_prefix(DNS6.0, DNS6.1);
            // As for connections.
            if !source.is_unicast_link_local() {
                route = route.pref_source(source);
            }
            route
                .output_interface(dns.device)
                .priority(priority)
                .table_id(LOCAL_TABLE)
                .protocol(RouteProtocol::Static)
                .kind(RouteType::Local)
                .build()
        }
    };
    handle.route().add(route).replace().execute().await.with_context(|| {
        format!("cannot add the route for DNS by device {} from {}", dns.device, dns.source)
    })
}

async fn prepare(handle: rtnetlink::Handle, row: &PodRow) -> Result<()> {
    for route in &row.dns_routes {
        match add_dns_route(&handle, route).await {
            Err(error) if !route.own => tracing::debug!("{error:#}"),
            done => done?,
        }
    }
    if let Some(source) = row.ip4 {
        let route = RouteMessageBuilder::<Ipv4Addr>::new()
            .destination_prefix(VIA4.0, VIA4.1)
            .pref_source(source)
            .output_interface(LO)
            .table_id(LOCAL_TABLE)
            .protocol(RouteProtocol::Static)
            .scope(RouteScope::Host)
            .kind(RouteType::Local)
            .build();
        handle.route().add(route).replace().execute().await.context("cannot add the IPv4 route")?;
    }
    if row.capture_v6 {
        let mut route = RouteMessageBuilder::<Ipv6Addr>::new().destination_prefix(VIA6.0, VIA6.1);
        // A link-local address is nobody's source on another device.
        if let Some(source) = row.ip6.filter(|ip| !ip.is_unicast_link_local()) {
            route = route.pref_source(source);
        }
        let route = route
            .output_interface(LO)
            .table_id(LOCAL_TABLE)
            .protocol(RouteProtocol::Static)
            .kind(RouteType::Local)
            .build();
        handle.route().add(route).replace().execute().await.context("cannot add the IPv6 route")?;
        handle
            .address()
            .add(LO, PASSTHROUGH_V6.into(), 128)
            .replace()
            .execute()
            .await
            .with_context(|| format!("cannot add {PASSTHROUGH_V6}/128 to lo"))?;
    }
    Ok(())
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
