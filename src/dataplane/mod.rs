//! The only module that talks to libbpf, and the only one with `unsafe`.
//!
//! Everything that matters is pinned: maps and links outlive the agent, and the next one adopts
//! them. The files are in layers, the lowest first; `src/imports.rs` holds that none knows itself
//! by way of others.

#![allow(unsafe_code)]

// What the kernel has, and what the objects are.
mod cost;
mod features;
mod hooks;
mod iter;
mod skel;
mod xtables;
// Values in maps, and what is pinned.
mod abi;
pub mod bpffs;
mod links;
mod order;
mod pins;
mod policy;
mod records;
mod services;
mod table;
mod tables;
// What the parts share.
mod state;
// The parts.
mod events;
mod inbound;
mod inspect;
mod probe;
mod splice;
mod splice_selftest;
mod tc;
// What puts them together.
mod apply;
mod attach;
mod migrate;
mod repair;
mod unload;

pub use apply::{Applied, Failure};
pub use cost::ProgramCost;
pub use events::{Events, Seen};
pub use features::{iterates_storages, probe};
pub use inspect::{
    Enrolled, HookState, counters, enrolled, hook_states, service_counters, services, spliced,
};
pub use order::{Ahead, ahead};
pub use pins::{LAYOUT, Pins};
pub use policy::{Call, Decision, Policy, Question};
pub use probe::{Loaded, log_libbpf, try_filters, try_load};
pub use services::{ServicesApplied, StalePeer};
pub use splice_selftest::self_test;
pub use state::{Dataplane, Repair};
pub use unload::{Unloaded, unload};
pub use xtables::read_legacy_nat;

#[cfg(test)]
mod tests {
    use std::{
        mem::MaybeUninit,
        net::{IpAddr, Ipv4Addr, Ipv6Addr},
    };

    use libbpf_rs::skel::{OpenSkel, SkelBuilder};

    use super::{
        abi, hooks,
        inbound::LISTENER_SLOTS,
        inspect::{MESH_COUNTERS, SERVICE_COUNTERS, SPLICE_COUNTERS},
        skel::{names_of, sidestep::SidestepSkelBuilder},
        splice_selftest, tables,
    };
    use crate::{
        mesh::{self, desired, quota::Limits},
        node::{ANY, LOCALHOST, lo},
        service,
    };

    #[test]
    fn constants_and_names_are_the_programs_own() {
        let mut storage = MaybeUninit::uninit();
        let open = SidestepSkelBuilder::default().open(&mut storage).expect("opens");
        let shared = &open.maps.rodata_data.as_ref().expect("rodata").shared;
        let counters = |name, how_many: u32| {
            let names = names_of(open.open_object(), name, "").expect("an enum");
            assert_eq!(names.len(), how_many as usize + 1, "and one that counts them");
            names.into_iter().take(how_many as usize).collect::<Vec<_>>()
        };
        assert_eq!(counters("mesh_counter", shared.mesh_counters.0), MESH_COUNTERS);
        assert_eq!(counters("service_counter", shared.service_counters.0), SERVICE_COUNTERS);
        assert_eq!(counters("splice_counter", shared.splice_counters.0), SPLICE_COUNTERS);
        assert!(shared.max_meshes as usize >= mesh::MESHES.len());
        assert_eq!(
            [tables::LOCAL_OWN, tables::LOCAL_LANDING].map(u32::from),
            [1, shared.local_landing.0]
        );
        assert_eq!(shared.listener_slots, u32::from(LISTENER_SLOTS));
        let landings = desired::MAX_LANDINGS + ANY.len() + LOCALHOST.len();
        assert_eq!(shared.landings as usize, landings);
        assert_eq!(shared.uid_class_shift, abi::UID_CLASS_SHIFT);
        assert_eq!(shared.cidr_v6, abi::CIDR_V6);
        assert_eq!([shared.of_pod, shared.of_node], [abi::OF_POD, abi::OF_NODE].map(u32::from));
        let maps = &open.maps;
        let limits = Limits {
            pods: maps.pods.max_entries() as usize,
            locals: maps.locals.max_entries() as usize,
            port_rules: maps.port_rules.max_entries() as usize,
            cidr_rules: maps.cidr_rules.max_entries() as usize,
            uid_rules: maps.uid_rules.max_entries() as usize,
            excluded_ifs: maps.excluded_ifs.max_entries() as usize,
            tells_interface: true,
        };
        assert_eq!(limits, desired::tests::NODE, "what the tests of quotas go by");
        let mask = |bits: u8| u32::MAX << (32 - bits);
        let v4 = [
            (lo::VIA4, shared.via4_net, shared.via4_mask),
            (lo::DNS4, shared.dns4_net, shared.dns4_mask),
        ];
        for ((ip, bits), net, netmask) in v4 {
            assert_eq!((u32::from(ip), mask(bits)), (net, netmask));
        }
        let via6 = u128::from(shared.via6_hi) << 96 | u128::from(shared.via6_lo) << 64;
        assert_eq!((u128::from(lo::VIA6.0), lo::VIA6.1), (via6, 64));
        let dns6 = via6 | u128::from(shared.dns6_subnet) << 32;
        assert_eq!((u128::from(lo::DNS6.0), lo::DNS6.1), (dns6, 96));
        let canary6 = u128::from(shared.canary6_hi) << 64 | u128::from(shared.canary6_lo);
        let canaries =
            [IpAddr::from(Ipv4Addr::from(shared.canary4)), Ipv6Addr::from(canary6).into()];
        assert_eq!(service::canary::CANARIES, canaries);
        assert_eq!(shared.splice_large as usize, splice_selftest::LARGE);
        assert_eq!(shared.splice_limit as usize, splice_selftest::LIMIT);
    }

    #[test]
    fn architecture_names_every_program_and_map() {
        let text = include_str!("../../ARCHITECTURE.md");
        let has = |name: &str| text.contains(&format!("`{name}`"));
        for hook in hooks::HOOKS {
            let families = hook.program.trim_end_matches(['4', '6']);
            let both = format!("{families}4/6");
            assert!(has(hook.program) || has(&both), "program {}", hook.program);
        }
        let mut storage = MaybeUninit::uninit();
        let open = SidestepSkelBuilder::default().open(&mut storage).expect("opens");
        for map in open.open_object().maps() {
            let name = map.name().to_string_lossy();
            assert!(name.contains('.') || has(&name), "map {name}");
        }
    }
}
