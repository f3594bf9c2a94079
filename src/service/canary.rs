//! Addresses that the agent dials to see that its programs translate: as attached as they look, they
//! may be so in a hierarchy of cgroups in which no process is.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use anyhow::{Context, Result, ensure};

use super::{Family, Frontend, List, ListKey, Protocol};

/// One for each family, from ranges that are for documentation; `CANARY4` and `CANARY6` of
/// bpf/service/translate.h.
pub const CANARIES: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(192, 0, 2, 183)),
    IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0x5349, 0x4445, 0, 0, 0, 1)),
];
/// Nobody serves it.
const PORT: u16 = 1;

/// The lists by which the canaries lead to localhost.
pub fn lists() -> impl Iterator<Item = (ListKey, List)> {
    CANARIES.into_iter().map(|ip| {
        let key = ListKey {
            service: "sidestep/canary".into(),
            port: "".into(),
            protocol: Protocol::Udp,
            family: Family::of(ip),
            is_local: false,
        };
        let frontend = Frontend { ip, port: PORT, protocol: Protocol::Udp };
        let backend = SocketAddr::new(localhost(ip), PORT);
        let list = List {
            frontends: [frontend].into(),
            backends: [backend].into(),
            serving: [backend].into(),
            affinity: None,
        };
        (key, list)
    })
}

fn localhost(like: IpAddr) -> IpAddr {
    if like.is_ipv4() { Ipv4Addr::LOCALHOST.into() } else { Ipv6Addr::LOCALHOST.into() }
}

/// Dials the canaries, in those families that reach their localhost. `connect` makes a connected UDP
/// socket and says which addresses it has, its own first; nothing is sent.
///
/// # Errors
/// The family that is not translated.
pub fn dial(connect: impl Fn(SocketAddr) -> io::Result<(SocketAddr, SocketAddr)>) -> Result<()> {
    for canary in CANARIES {
        let localhost = localhost(canary);
        if connect(SocketAddr::new(localhost, PORT)).is_err() {
            continue;
        }
        let what = format!("a test connection over {} to {canary}", Family::of(canary));
        let (from, to) =
            connect(SocketAddr::new(canary, PORT)).with_context(|| format!("{what} failed"))?;
        ensure!(
            (from.ip(), to.ip()) == (localhost, canary),
            "{what} was not led to {localhost}: it is from {} to {}",
            from.ip(),
            to.ip()
        );
    }
    Ok(())
}
