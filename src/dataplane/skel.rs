//! The objects that `build.rs` compiles, and the variables that are set before they are loaded.

#[allow(clippy::all, clippy::unwrap_used, clippy::undocumented_unsafe_blocks, missing_docs)]
pub(super) mod sidestep {
    include!(concat!(env!("OUT_DIR"), "/sidestep.skel.rs"));
}
#[allow(clippy::all, clippy::unwrap_used, clippy::undocumented_unsafe_blocks, missing_docs)]
pub(super) mod inbound {
    include!(concat!(env!("OUT_DIR"), "/inbound.skel.rs"));
}
#[allow(clippy::all, clippy::unwrap_used, clippy::undocumented_unsafe_blocks, missing_docs)]
pub(super) mod policy {
    include!(concat!(env!("OUT_DIR"), "/policy.skel.rs"));
}

use std::{mem::MaybeUninit, time::Duration};

use anyhow::{Context, Result};
use libbpf_rs::{
    AsRawLibbpf, OpenObject,
    btf::{Btf, types::Enum},
    libbpf_sys,
    skel::SkelBuilder,
};

use super::features::kernel;
use crate::node::NetnsCookie;

pub(super) fn open_node() -> Result<sidestep::OpenSidestepSkel<'static>> {
    // A skeleton borrows its object; there is one for the life of the process.
    open_node_in(Box::leak(Box::new(MaybeUninit::uninit())))
}

pub(super) fn open_node_in(
    storage: &mut MaybeUninit<OpenObject>,
) -> Result<sidestep::OpenSidestepSkel<'_>> {
    let mut open = sidestep::SidestepSkelBuilder::default().open(storage)?;
    let constants = open.maps.rodata_data.as_mut().context("the object has no rodata")?;
    constants.sets_error = u8::from(kernel().sets_error);
    Ok(open)
}

/// The program for the namespace with this cookie.
pub(super) fn open_inbound(
    storage: &mut MaybeUninit<OpenObject>,
    cookie: NetnsCookie,
) -> Result<inbound::OpenInboundSkel<'_>> {
    let mut open = inbound::InboundSkelBuilder::default().open(storage)?;
    let constants = open.maps.rodata_data.as_mut().context("the inbound object has no rodata")?;
    constants.netns_cookie = cookie.0;
    constants.tells_interface = u8::from(kernel().tells_interface);
    Ok(open)
}

/// The names of an enum's values in an object, in lower case without their prefix, in order from 0.
///
/// # Errors
/// If the object has no such enum.
pub(super) fn names_of(
    object: &impl AsRawLibbpf<LibbpfType = libbpf_sys::bpf_object>,
    of: &str,
    prefix: &str,
) -> Result<Vec<String>> {
    // SAFETY: the object lives at least as long as the borrow that its types are read with.
    let types = Btf::from_bpf_object(unsafe { object.as_libbpf_object().as_ref() })?;
    let found = types.as_ref().and_then(|types| types.type_by_name::<Enum<'_>>(of));
    let found = found.with_context(|| format!("the object has no enum {of}"))?;
    found
        .iter()
        .map(|value| {
            let name = value.name.and_then(|name| name.to_str()).context("a value has no name")?;
            Ok(name.strip_prefix(prefix).unwrap_or(name).to_lowercase())
        })
        .collect()
}

/// Switches the translation of Services on or off in the programs.
pub(super) fn set_services(open: &mut sidestep::OpenSidestepSkel<'_>, on: bool) -> Result<()> {
    let constants = open.maps.rodata_data.as_mut().context("the object has no rodata")?;
    constants.services_on = u8::from(on);
    Ok(())
}

/// Sets the longest time that a spliced connection's messages bypass TCP without a message by TCP.
pub(super) fn set_refresh(
    open: &mut sidestep::OpenSidestepSkel<'_>,
    every: Duration,
) -> Result<()> {
    let constants = open.maps.rodata_data.as_mut().context("the object has no rodata")?;
    constants.splice_refresh = u64::try_from(every.as_nanos()).unwrap_or(u64::MAX);
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use libbpf_rs::skel::OpenSkel;

    use super::*;

    #[test]
    fn map_names_are_what_the_kernel_keeps() {
        let mut storage = MaybeUninit::uninit();
        let open = sidestep::SidestepSkelBuilder::default().open(&mut storage).expect("opens");
        for map in open.open_object().maps() {
            assert!(map.name().len() <= 15, "{:?} is cut at 15 bytes", map.name());
        }
    }

    #[test]
    fn a_pods_object_carries_the_maps_that_it_uses() {
        let mut storage = MaybeUninit::uninit();
        let open = inbound::InboundSkelBuilder::default().open(&mut storage).expect("opens");
        let maps = open.open_object().maps().map(|map| map.name().to_string_lossy().into_owned());
        let maps: BTreeSet<String> = maps.filter(|name| !name.contains('.')).collect();
        let used = [
            "cidr_rules",
            "device_addrs",
            "dialled",
            "event_shares",
            "events",
            "excluded_ifs",
            "handovers",
            "listeners",
            "locals",
            "mesh_counters",
            "pods",
            "port_rules",
        ];
        assert_eq!(maps, used.map(str::to_owned).into());
    }
}
