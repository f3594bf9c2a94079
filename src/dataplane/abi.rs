//! The kernel's structs as bytes, and their conversion from and to the agent's own types.

use std::{
    mem::size_of,
    net::{IpAddr, SocketAddr},
};

use anyhow::{Result, ensure};

pub(crate) use super::skel::policy::types::{direction, owner, question};
pub(crate) use super::skel::sidestep::types::{
    addr, backend, backend_key, cidr_rule_key, device_family, device_key, dialled_service, event,
    event_kind, frontend, if_key, leg, listener_event, listener_key, local_key, member, pod,
    pod_flag, pod_record, port_rule_key, rule_set, service_list, splice, splice_counter,
    splice_key, splice_leg, splice_state, stale_peer, swept, uid_rule_key, unread_event,
};
use crate::{
    mesh::{
        entries::{
            CidrRule, DeviceFamily, MAX_NETNS, MAX_POD, MAX_UID, PodRow, PortRule, Record, RuleSet,
            UidRule,
        },
        policy::TcpDns,
    },
    node::NetnsCookie,
    splice::{LegState, Reset},
    text,
};

/// A map's key or value.
///
/// # Safety
/// The type is `repr(C)`, without padding, and every bit pattern is a valid value of it.
pub(crate) unsafe trait Wire: Copy {}

// SAFETY: plain integers.
unsafe impl Wire for u8 {}
// SAFETY: plain integers.
unsafe impl Wire for u32 {}
// SAFETY: plain integers.
unsafe impl Wire for u64 {}
// SAFETY: a plain integer in a transparent struct.
unsafe impl Wire for NetnsCookie {}
// SAFETY: its header asserts the size that the fields add up to; all fields are integers, or enums
// that the skeleton makes a transparent u32.
unsafe impl Wire for pod {}
// SAFETY: as for `pod`.
unsafe impl Wire for addr {}
// SAFETY: as for `pod`.
unsafe impl Wire for device_key {}
// SAFETY: as for `pod`.
unsafe impl Wire for local_key {}
// SAFETY: as for `pod`.
unsafe impl Wire for port_rule_key {}
// SAFETY: as for `pod`.
unsafe impl Wire for cidr_rule_key {}
// SAFETY: as for `pod`.
unsafe impl Wire for if_key {}
// SAFETY: as for `pod`.
unsafe impl Wire for uid_rule_key {}
// SAFETY: as for `pod`.
unsafe impl Wire for listener_key {}
// SAFETY: as for `pod`.
unsafe impl Wire for pod_record {}
// SAFETY: as for `pod`.
unsafe impl Wire for event {}
// SAFETY: as for `pod`.
unsafe impl Wire for listener_event {}
// SAFETY: as for `pod`.
unsafe impl Wire for unread_event {}
// SAFETY: as for `pod`.
unsafe impl Wire for question {}
// SAFETY: as for `pod`.
unsafe impl Wire for leg {}
// SAFETY: as for `pod`.
unsafe impl Wire for splice_key {}
// SAFETY: as for `pod`.
unsafe impl Wire for swept {}
// SAFETY: as for `pod`.
unsafe impl Wire for splice {}

// SAFETY: as for `pod`.
unsafe impl Wire for frontend {}
// SAFETY: as for `pod`.
unsafe impl Wire for service_list {}
// SAFETY: as for `pod`.
unsafe impl Wire for backend {}
// SAFETY: as for `pod`.
unsafe impl Wire for backend_key {}
// SAFETY: as for `pod`.
unsafe impl Wire for member {}
// SAFETY: as for `pod`.
unsafe impl Wire for stale_peer {}

pub(crate) fn as_bytes<T: Wire>(value: &T) -> &[u8] {
    // SAFETY: a Wire type has no padding, so all of its bytes are initialised.
    unsafe { std::slice::from_raw_parts(std::ptr::from_ref(value).cast(), size_of::<T>()) }
}

pub(crate) fn from_bytes<T: Wire>(bytes: &[u8]) -> Result<T> {
    ensure!(
        bytes.len() == size_of::<T>(),
        "the kernel gave {} bytes for a {} of {}",
        bytes.len(),
        std::any::type_name::<T>(),
        size_of::<T>()
    );
    // SAFETY: the length was checked, any bit pattern is valid, and the read may be unaligned.
    Ok(unsafe { bytes.as_ptr().cast::<T>().read_unaligned() })
}

impl From<IpAddr> for addr {
    fn from(ip: IpAddr) -> Self {
        let v6 = match ip {
            IpAddr::V4(v4) => v4.to_ipv6_mapped(),
            IpAddr::V6(v6) => v6,
        };
        let mut w = [0; 4];
        for (word, octets) in w.iter_mut().zip(v6.octets().chunks_exact(4)) {
            *word = u32::from_ne_bytes([octets[0], octets[1], octets[2], octets[3]]);
        }
        Self { w }
    }
}

impl From<addr> for IpAddr {
    fn from(addr: addr) -> Self {
        let mut octets = [0; 16];
        for (bytes, word) in octets.chunks_exact_mut(4).zip(addr.w) {
            bytes.copy_from_slice(&word.to_ne_bytes());
        }
        std::net::Ipv6Addr::from(octets).to_canonical()
    }
}

impl From<unread_event> for Reset {
    fn from(event: unread_event) -> Self {
        let end = &event.end;
        Self {
            from: SocketAddr::new(end.local.into(), end.lport),
            to: SocketAddr::new(end.remote.into(), end.rport),
            sent: event.sent,
            received: event.received,
        }
    }
}

fn halves(cookie: NetnsCookie) -> [u32; 2] {
    [cookie.0 as u32, (cookie.0 >> 32) as u32]
}

fn set_of(set: RuleSet) -> rule_set {
    match set {
        RuleSet::OutExcludePorts => rule_set::OUT_EXCLUDE_PORTS,
        RuleSet::OutIncludePorts => rule_set::OUT_INCLUDE_PORTS,
        RuleSet::InExcludePorts => rule_set::IN_EXCLUDE_PORTS,
        RuleSet::InIncludePorts => rule_set::IN_INCLUDE_PORTS,
        RuleSet::OutExcludeCidrs => rule_set::OUT_EXCLUDE_CIDRS,
        RuleSet::OutIncludeCidrs => rule_set::OUT_INCLUDE_CIDRS,
        RuleSet::InExcludeCidrs => rule_set::IN_EXCLUDE_CIDRS,
        RuleSet::OutExcludeRoutes => rule_set::OUT_EXCLUDE_ROUTES,
        RuleSet::OutExcludeTcpUids(class) => of_class(rule_set::OUT_EXCLUDE_TCP_UIDS, class),
        RuleSet::OutExcludeUdpUids(class) => of_class(rule_set::OUT_EXCLUDE_UDP_UIDS, class),
    }
}

/// The position of the class of users in a list's number; `UID_CLASS_SHIFT` of bpf/mesh/rules.h.
pub(super) const UID_CLASS_SHIFT: u32 = 8;

/// Whose namespace it is from which calls are translated: `OF_POD` and `OF_NODE` of
/// bpf/service/translate.h.
pub(super) const OF_POD: u8 = 1;
/// See [`OF_POD`].
pub(super) const OF_NODE: u8 = 2;

/// The number of the list of a class of users.
fn of_class(set: rule_set, class: u32) -> rule_set {
    rule_set(set.0 | class << UID_CLASS_SHIFT)
}

/// The number of bits before the port or the address in a rule's key: the list and the cookie.
const RULE_BITS: u32 = 96;

pub(crate) fn port_key(rule: &PortRule) -> port_rule_key {
    port_rule_key {
        prefixlen: RULE_BITS + u32::from(rule.bits),
        set: set_of(rule.set),
        netns: halves(rule.cookie),
        port: rule.port.to_be(),
        pad: 0,
    }
}

pub(crate) fn cidr_key(rule: &CidrRule) -> cidr_rule_key {
    cidr_rule_key {
        prefixlen: RULE_BITS + u32::from(rule.net.prefix_len()),
        set: rule_set(set_of(rule.set).0 | if rule.v6 { CIDR_V6 } else { 0 }),
        netns: halves(rule.cookie),
        addr: IpAddr::V6(rule.net.network()).into(),
    }
}

/// The bit that separates the families; `CIDR_V6` of bpf/mesh/rules.h.
pub(super) const CIDR_V6: u32 = 1 << 8;

pub(crate) fn if_of(cookie: NetnsCookie, ifindex: u32) -> if_key {
    if_key { netns: cookie.0, ifindex, pad: 0 }
}

pub(crate) fn uid_key(rule: &UidRule) -> uid_rule_key {
    uid_rule_key {
        prefixlen: 64 + u32::from(rule.bits),
        netns: halves(rule.cookie),
        uid: rule.uid.to_be(),
    }
}

pub(crate) fn local_of(cookie: NetnsCookie, ip: IpAddr) -> local_key {
    local_key { netns: cookie.0, addr: ip.into() }
}

pub(crate) fn device_of(cookie: NetnsCookie, ifindex: u32, family: DeviceFamily) -> device_key {
    let family = match family {
        DeviceFamily::V4 => device_family::DEVICE_V4,
        DeviceFamily::V6 => device_family::DEVICE_V6,
        DeviceFamily::V6Link => device_family::DEVICE_V6_LINK,
    };
    device_key { netns: cookie.0, ifindex, family }
}

pub(crate) fn listener_of(cookie: NetnsCookie, at: IpAddr, port: u16, slot: u16) -> listener_key {
    listener_key { netns: cookie.0, at: at.into(), port, slot, pad: 0 }
}

pub(crate) fn pod_of(row: &PodRow) -> pod {
    let flags = [
        (row.capture_v4, pod_flag::POD_CAPTURE_V4),
        (row.capture_v6, pod_flag::POD_CAPTURE_V6),
        (row.proxy_uid.is_none(), pod_flag::POD_NO_UID),
        (row.proxy_gid.is_some(), pod_flag::POD_GID_EXEMPT),
        (row.tcp_dns == TcpDns::Direct, pod_flag::POD_TCP_DNS_DIRECT),
        (row.tcp_dns == TcpDns::AsAnyPort, pod_flag::POD_TCP_DNS_ANY),
        (row.self_inbound, pod_flag::POD_SELF_INBOUND),
        (row.out_all, pod_flag::POD_OUT_ALL),
        (row.in_all, pod_flag::POD_IN_ALL),
        (row.loopback_included, pod_flag::POD_LOOPBACK_INCLUDED),
        (row.udp_excludes, pod_flag::POD_UDP_EXCLUDES),
        (row.cidrs_first, pod_flag::POD_CIDRS_FIRST),
        (row.exclude_ifs, pod_flag::POD_EXCLUDE_IFS),
        (row.splice, pod_flag::POD_SPLICE),
        (row.route_localnet, pod_flag::POD_ROUTE_LOCALNET),
        (row.own_nat, pod_flag::POD_OWN_NAT),
        (row.beside, pod_flag::POD_BESIDE),
    ];
    let address = |ip: Option<IpAddr>| ip.map(addr::from).unwrap_or_default();
    pod {
        proxy_uid: row.proxy_uid.unwrap_or_default(),
        proxy_gid: row.proxy_gid.unwrap_or_default(),
        flags: pod_flag(flags.iter().filter(|(on, _)| *on).fold(0, |all, (_, flag)| all | flag.0)),
        sets: row.sets.iter().fold(0, |all, set| all | 1 << (set_of(*set).0 & 0xff)),
        ip4: address(row.ip4.map(IpAddr::V4)),
        ip6: address(row.ip6.map(IpAddr::V6)),
        out_port: row.out_port,
        in_port: row.in_port,
        hbone_port: row.hbone_port,
        dns_port: row.dns_port,
        mesh: row.mesh,
        pad: 0,
        device: row.device,
    }
}

fn text<const N: usize>(what: &str, text: &str) -> Result<[u8; N]> {
    ensure!(text.len() <= N, "{what} {text:?} is longer than {N} bytes");
    let mut bytes = [0; N];
    bytes[..text.len()].copy_from_slice(text.as_bytes());
    Ok(bytes)
}

fn untext(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

const _: () = assert!(size_of::<pod_record>() == MAX_POD + MAX_UID + MAX_NETNS);

/// Fails if a field is too long for the kernel's record.
pub(crate) fn record_of(record: &Record) -> Result<pod_record> {
    Ok(pod_record {
        pod: text("pod name", &record.pod)?,
        uid: text("pod uid", &record.uid)?,
        netns: text("network namespace path", &record.netns.to_string_lossy())?,
    })
}

impl From<&pod_record> for Record {
    fn from(record: &pod_record) -> Self {
        Self {
            pod: untext(&record.pod),
            uid: untext(&record.uid),
            netns: untext(&record.netns).into(),
        }
    }
}

/// Cuts a reason that is too long for the record, and marks the cut: it is for people.
pub(crate) fn leg_of(state: &LegState) -> leg {
    let mut why = [0; 2044];
    let text = text::cut(&state.why, why.len(), " ... (`sidestep check -v` has the rest)");
    why[..text.len()].copy_from_slice(text.as_bytes());
    leg { on: u32::from(state.on), why }
}

impl From<&leg> for LegState {
    fn from(leg: &leg) -> Self {
        Self { on: leg.on != 0, why: untext(&leg.why) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn addresses_survive_the_kernels_form(ip: IpAddr) {
            let back: IpAddr = addr::from(ip).into();
            prop_assert_eq!(back, ip.to_canonical());
        }

        #[test]
        fn records_survive_the_kernels_form(pod in "[a-z0-9./-]{1,320}", uid in "[a-f0-9-]{0,64}") {
            let record = Record { pod, uid, netns: "/run/netns/x".into() };
            let wire = record_of(&record).expect("fits");
            prop_assert_eq!(Record::from(&wire), record);
        }
    }

    #[test]
    fn a_record_that_is_too_long_is_refused_by_name() {
        let record = Record { pod: "x".repeat(321), ..Record::default() };
        let error = record_of(&record).expect_err("too long").to_string();
        assert!(error.contains("pod name") && error.contains("320"), "{error}");
    }

    #[test]
    fn bytes_are_the_structs_own() {
        let key = local_of(NetnsCookie(7), IpAddr::from([10, 0, 0, 1]));
        let bytes = as_bytes(&key);
        assert_eq!(bytes[..8], 7u64.to_ne_bytes());
        assert_eq!(bytes[18..], [0xff, 0xff, 10, 0, 0, 1]);
        assert!(from_bytes::<local_key>(&bytes[1..]).is_err());
    }
}
