//! The maps that only the agent writes, a row each; a row makes a pod's entries.

use std::{
    collections::{BTreeMap, BTreeSet},
    mem::offset_of,
    net::IpAddr,
    sync::Arc,
};

use anyhow::Result;
use libbpf_rs::MapMut;

use super::{
    abi::{self, addr, cidr_rule_key, device_key, if_key, local_key, port_rule_key, uid_rule_key},
    skel::sidestep::SidestepMaps,
    table::{self, Entries},
};
use crate::{mesh::entries::PodEntries, node::NetnsCookie};

/// A map, and the function that makes a pod's entries.
pub(super) struct Table {
    /// The map's name.
    pub name: &'static str,
    /// Finds the map among the loaded ones.
    pub map: for<'a, 'map> fn(&'a SidestepMaps<'map>) -> &'a MapMut<'map>,
    /// The cookie's offset in the map's keys.
    pub cookie_at: usize,
    /// Makes a pod's entries.
    pub rows: fn(NetnsCookie, &PodEntries) -> Result<Entries>,
}

/// The number of tables.
pub(super) const TABLES: usize = 8;

/// The tables in the order of writing; deletes go in reverse. The last one makes a pod's
/// connections captured.
pub(super) const ALL: [Table; TABLES] = [
    Table {
        name: "locals",
        map: |maps| &maps.locals,
        cookie_at: offset_of!(local_key, netns),
        rows: locals,
    },
    Table {
        name: "device_addrs",
        map: |maps| &maps.device_addrs,
        cookie_at: offset_of!(device_key, netns),
        rows: |cookie, pod| {
            let first = pod.device_addrs.iter().map(|((device, family), ip)| {
                table::entry(&abi::device_of(cookie, *device, *family), &addr::from(*ip))
            });
            Ok(first.collect())
        },
    },
    Table {
        name: "port_rules",
        map: |maps| &maps.port_rules,
        cookie_at: offset_of!(port_rule_key, netns),
        rows: |_, pod| {
            let rules = pod.port_rules.iter();
            Ok(rules.map(|rule| table::entry(&abi::port_key(rule), &1u8)).collect())
        },
    },
    Table {
        name: "cidr_rules",
        map: |maps| &maps.cidr_rules,
        cookie_at: offset_of!(cidr_rule_key, netns),
        rows: |_, pod| {
            let rules = pod
                .cidr_rules
                .iter()
                .map(|(rule, is_member)| table::entry(&abi::cidr_key(rule), &u8::from(*is_member)));
            Ok(rules.collect())
        },
    },
    Table {
        name: "uid_rules",
        map: |maps| &maps.uid_rules,
        cookie_at: offset_of!(uid_rule_key, netns),
        rows: |_, pod| {
            let rules = pod.uid_rules.iter();
            Ok(rules.map(|rule| table::entry(&abi::uid_key(rule), &rule.class)).collect())
        },
    },
    Table {
        name: "excluded_ifs",
        map: |maps| &maps.excluded_ifs,
        cookie_at: offset_of!(if_key, netns),
        rows: |cookie, pod| {
            let devices = pod.excluded_ifs.iter();
            Ok(devices.map(|device| table::entry(&abi::if_of(cookie, *device), &1u8)).collect())
        },
    },
    Table {
        name: "pod_records",
        map: |maps| &maps.pod_records,
        cookie_at: 0,
        rows: |cookie, pod| {
            Ok([table::entry(&cookie, &abi::record_of(&pod.record)?)].into_iter().collect())
        },
    },
    Table {
        name: "pods",
        map: |maps| &maps.pods,
        cookie_at: 0,
        rows: |cookie, pod| {
            Ok([table::entry(&cookie, &abi::pod_of(&pod.row))].into_iter().collect())
        },
    },
];

/// The kinds of entry of `locals`; `enum local` of bpf/lib/pod.h.
pub(super) const LOCAL_OWN: u8 = 1;
/// See [`LOCAL_OWN`].
pub(super) const LOCAL_LANDING: u8 = 2;

fn locals(cookie: NetnsCookie, pod: &PodEntries) -> Result<Entries> {
    let landings: BTreeSet<&IpAddr> = pod.device_addrs.values().collect();
    let locals = pod.locals.iter().map(|ip| {
        let kind = if landings.contains(ip) { LOCAL_LANDING } else { LOCAL_OWN };
        table::entry(&abi::local_of(cookie, *ip), &kind)
    });
    Ok(locals.collect())
}

/// The desired entries that belong to no single pod: the addresses that may be spliced with.
pub(super) fn shared(spliced: &BTreeSet<IpAddr>) -> [Entries; TABLES] {
    let key = |ip: &IpAddr| table::entry(&abi::local_of(NetnsCookie::NONE, *ip), &LOCAL_OWN);
    let mut all: [Entries; TABLES] = Default::default();
    all[0] = spliced.iter().map(key).collect();
    all
}

/// The desired entries of a pod.
pub(super) fn of_pod(cookie: NetnsCookie, pod: &PodEntries) -> Result<[Entries; TABLES]> {
    let mut all: [Entries; TABLES] = Default::default();
    for (table, entries) in ALL.iter().zip(&mut all) {
        *entries = (table.rows)(cookie, pod)?;
    }
    Ok(all)
}

/// The known contents of the maps.
#[derive(Default)]
pub(super) struct Held {
    /// The entries by pod; [`NetnsCookie::NONE`] has those that belong to no single pod.
    pub pods: BTreeMap<NetnsCookie, [Entries; TABLES]>,
    /// The pods whose desired entries are exactly in the maps.
    pub written: BTreeMap<NetnsCookie, Arc<PodEntries>>,
    /// The entries of no single pod that are exactly in the maps.
    pub spliced: Option<BTreeSet<IpAddr>>,
}

impl Held {
    /// Reads the contents from the kernel.
    pub fn read(loaded: &SidestepMaps<'_>) -> Result<Self> {
        let mut held = Self::default();
        for (n, table) in ALL.iter().enumerate() {
            for (key, value) in table::read((table.map)(loaded))? {
                let cookie = abi::from_bytes(&key[table.cookie_at..table.cookie_at + 8])?;
                held.pods.entry(cookie).or_default()[n].insert(key, value);
            }
        }
        Ok(held)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mesh::{
        desired::tests::{candidate, plain},
        entries::{CidrRule, RuleSet, UidRule},
    };

    #[test]
    fn each_key_has_its_pods_cookie_where_the_row_says() {
        let cookie = NetnsCookie(0x0102_0304_0506_0708);
        let pods = plain(&[candidate("ns/a", cookie.0, "10.0.0.7")]).pods;
        let mut pod = PodEntries::clone(&pods[&cookie]);
        // What this pod does not ask for.
        pod.uid_rules.insert(UidRule { cookie, uid: 0, bits: 0, class: 1 });
        pod.excluded_ifs.insert(3);
        let net = "::ffff:10.0.0.0/104".parse().expect("a range");
        let rule = CidrRule { cookie, set: RuleSet::OutExcludeCidrs, net, v6: false };
        pod.cidr_rules.insert(rule, true);
        for (table, entries) in ALL.iter().zip(of_pod(cookie, &pod).expect("entries")) {
            assert!(!entries.is_empty(), "{}", table.name);
            for key in entries.keys() {
                let at = &key[table.cookie_at..table.cookie_at + 8];
                assert_eq!(at, abi::as_bytes(&cookie), "{}", table.name);
            }
        }
        assert_eq!(ALL.last().map(|table| table.name), Some("pods"), "it captures: written last");
    }
}
