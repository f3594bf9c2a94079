//! The additions to a pod's lo that captured connections need: local routes, and the address from
//! which the proxy calls the app over IPv6.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use anyhow::{Context, Result};
use futures_util::TryStreamExt;
use nix::ifaddrs::getifaddrs;
use rtnetlink::{
    RouteMessageBuilder,
    packet_route::route::{
        RouteAddress, RouteAttribute, RouteMessage, RouteProtocol, RouteScope, RouteType,
    },
};

use super::netns::{LO, Netns, netlink};

/// Where captured IPv4 connections go; `VIA4_NET` of bpf/lib/capture.h.
pub(crate) const VIA4: (Ipv4Addr, u8) = (Ipv4Addr::new(127, 128, 0, 0), 16);
/// Where captured IPv6 connections go; `VIA6_HI` and `VIA6_LO` of bpf/lib/capture.h.
pub(crate) const VIA6: (Ipv6Addr, u8) =
    (Ipv6Addr::new(0xfd53, 0x6964, 0x6573, 0x7465, 0, 0, 0, 0), 64);
/// Where captured DNS goes; `DNS4_NET` of bpf/mesh/dns.h.
pub(crate) const DNS4: (Ipv4Addr, u8) = (Ipv4Addr::new(127, 129, 0, 0), 16);
/// The same for IPv6; `DNS6_SUBNET` of bpf/mesh/dns.h.
pub(crate) const DNS6: (Ipv6Addr, u8) =
    (Ipv6Addr::new(0xfd53, 0x6964, 0x6573, 0x7465, 0, 1, 0, 0), 96);

/// The passthrough source that Istio's init puts on the pod's lo for IPv6.
pub const PASSTHROUGH_V6: Ipv6Addr = Ipv6Addr::new(0, 0, 0, 0, 0, 0, 0, 6);

/// The kernel's table of local addresses.
const LOCAL_TABLE: u32 = 255;

/// The additions that a pod needs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Needs {
    /// The pod's IPv4 address, the source of captured connections, if it has one.
    pub ip4: Option<Ipv4Addr>,
    /// The pod's IPv6 address, if it has one; a link-local one only if it has no other.
    pub ip6: Option<Ipv6Addr>,
    /// Whether IPv6 is captured.
    pub capture_v6: bool,
    /// The routes for captured DNS, one per device.
    pub dns_routes: Vec<DnsRoute>,
}

/// A route for captured DNS. Each device has one, because a socket may name its device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DnsRoute {
    /// The device's index.
    pub device: u32,
    /// The device's address that becomes the source.
    pub source: IpAddr,
    /// Whether that is the pod's own address, which sockets use that name no device.
    pub own: bool,
}

impl Netns {
    /// Prepares the namespace for captured connections: routes that make the ranges they are sent
    /// to local and that prefer the pod's address as source, for DNS as in
    /// [`Needs::dns_routes`]; and the address that the proxy calls the app from over IPv6 (Istio's
    /// own init adds that one too). Idempotent.
    ///
    /// # Errors
    /// If the kernel refuses a route or the address.
    pub fn prepare(&self, needs: &Needs) -> Result<()> {
        self.inside(|| netlink(|handle| prepare(handle, needs)))?
            .with_context(|| format!("cannot prepare {}", self.path().display()))
    }
}

/// The additions that a pod's lo has.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Lo {
    /// The source of packets to [`VIA4`], if that range is local.
    source4: Option<IpAddr>,
    /// The source of packets to [`VIA6`], if that range is local.
    source6: Option<IpAddr>,
    /// Whether lo has the address from which the proxy calls the app over IPv6.
    passthrough6: bool,
    /// The source of packets to [`DNS4`] or [`DNS6`] by each device, if that range is local.
    dns: BTreeSet<(u32, IpAddr)>,
}

impl Lo {
    /// The state after [`Netns::prepare`].
    pub fn prepared(needs: &Needs) -> Self {
        Self {
            source4: needs.ip4.map(IpAddr::V4),
            source6: needs.ip6.map(IpAddr::V6).filter(|_| needs.capture_v6),
            passthrough6: needs.capture_v6,
            // Another device may be down, and have no routes then.
            dns: needs
                .dns_routes
                .iter()
                .filter(|route| route.own)
                .map(|route| (route.device, route.source))
                .collect(),
        }
    }

    /// Whether every addition that a pod needs is there.
    pub fn serves(&self, needs: &Needs) -> bool {
        let needed = Self::prepared(needs);
        let source6 = match needs.ip6 {
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
            && (needs.ip4.is_none() || self.source4 == needed.source4)
            && (!needs.capture_v6 || (source6 && self.passthrough6))
    }
}

/// What lo has in the calling thread's namespace, by what the kernel would do with a packet; for
/// DNS, by the devices that have these addresses.
pub(super) async fn lo(handle: rtnetlink::Handle, dns_by: &[(IpAddr, u32)]) -> Result<Lo> {
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

/// The source that the kernel picks for a destination, if the destination is local and reachable.
async fn local_source(handle: &rtnetlink::Handle, to: RouteMessage) -> Option<IpAddr> {
    let found = handle.route().get(to).execute().try_next().await.ok()??;
    let source = found.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::PrefSource(RouteAddress::Inet(v4)) => Some(IpAddr::V4(*v4)),
        RouteAttribute::PrefSource(RouteAddress::Inet6(v6)) => Some(IpAddr::V6(*v6)),
        _ => None,
    });
    source.filter(|_| found.header.kind == RouteType::Local)
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
        format!("cannot add the DNS route for device {} from {}", dns.device, dns.source)
    })
}

async fn prepare(handle: rtnetlink::Handle, needs: &Needs) -> Result<()> {
    for route in &needs.dns_routes {
        match add_dns_route(&handle, route).await {
            Err(error) if !route.own => tracing::debug!("{error:#}"),
            done => done?,
        }
    }
    if let Some(source) = needs.ip4 {
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
    if needs.capture_v6 {
        let mut route = RouteMessageBuilder::<Ipv6Addr>::new().destination_prefix(VIA6.0, VIA6.1);
        // A link-local address is nobody's source on another device.
        if let Some(source) = needs.ip6.filter(|ip| !ip.is_unicast_link_local()) {
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
