//! Maps as sets of entries: read, compare, write what differs.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use libbpf_rs::{ErrorKind, MapCore, MapFlags};

use super::abi::{Wire, as_bytes, from_bytes};

/// A map's contents, present or desired, as the kernel's bytes.
pub(crate) type Entries = BTreeMap<Vec<u8>, Vec<u8>>;

/// The changes to a map; upserts come first, deletes last.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Diff {
    pub upserts: Entries,
    pub deletes: Vec<Vec<u8>>,
}

pub(crate) fn entry<K: Wire, V: Wire>(key: &K, value: &V) -> (Vec<u8>, Vec<u8>) {
    (as_bytes(key).to_vec(), as_bytes(value).to_vec())
}

pub(crate) fn diff(actual: &Entries, desired: Entries) -> Diff {
    let deletes = actual.keys().filter(|key| !desired.contains_key(*key)).cloned().collect();
    let upserts =
        desired.into_iter().filter(|(key, value)| actual.get(key) != Some(value)).collect();
    Diff { upserts, deletes }
}

/// Every entry of a map that is keyed by any of the hash or trie types.
pub(crate) fn read(map: &impl MapCore) -> Result<Entries> {
    let mut entries = Entries::new();
    for key in map.keys() {
        if let Some(value) = map.lookup(&key, MapFlags::ANY).with_context(|| error(map, "read"))? {
            entries.insert(key, value);
        }
    }
    Ok(entries)
}

/// Every entry, in the kernel's types.
pub(crate) fn read_as<K: Wire, V: Wire>(map: &impl MapCore) -> Result<Vec<(K, V)>> {
    read(map)?.iter().map(|(key, value)| Ok((from_bytes(key)?, from_bytes(value)?))).collect()
}

/// A map, and its known contents.
pub(crate) struct Table<'a, M> {
    pub map: &'a M,
    pub holds: &'a mut Entries,
}

impl<M: MapCore> Table<'_, M> {
    /// Writes the missing entries; `holds` stays correct if a write fails.
    pub fn upsert(&mut self, diff: &Diff) -> Result<()> {
        for (key, value) in &diff.upserts {
            if self.holds.get(key) != Some(value) {
                let done = self.map.update(key, value, MapFlags::ANY);
                done.with_context(|| error(self.map, "write to"))?;
                self.holds.insert(key.clone(), value.clone());
            }
        }
        Ok(())
    }

    /// Deletes the remaining entries; `holds` stays correct if a deletion fails.
    pub fn delete(&mut self, diff: &Diff) -> Result<()> {
        for key in &diff.deletes {
            if self.holds.contains_key(key) {
                match self.map.delete(key) {
                    Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
                    done => done.with_context(|| error(self.map, "delete from")),
                }?;
                self.holds.remove(key);
            }
        }
        Ok(())
    }
}

fn error(map: &impl MapCore, verb: &str) -> String {
    format!("cannot {verb} map {:?} ({} entries at most)", map.name(), map.max_entries())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn applying_the_diff_gives_the_desired(actual: BTreeMap<u8, u8>, desired: BTreeMap<u8, u8>) {
            let entries = |map: &BTreeMap<u8, u8>| -> Entries {
                map.iter().map(|(key, value)| entry(key, value)).collect()
            };
            let (mut now, goal) = (entries(&actual), entries(&desired));
            let diff_of = diff(&now, goal.clone());
            for (key, value) in &diff_of.upserts {
                prop_assert_ne!(now.get(key), Some(value), "a needless write");
            }
            for key in &diff_of.deletes {
                prop_assert!(now.contains_key(key));
            }
            now.extend(diff_of.upserts);
            now.retain(|key, _| !diff_of.deletes.contains(key));
            prop_assert_eq!(&now, &goal);
            prop_assert_eq!(diff(&now, goal), Diff::default());
        }
    }
}
