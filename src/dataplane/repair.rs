//! Asks the kernel whether everything is attached and written as the agent left it, and restores
//! what others have removed. Only root of the node can remove it, by mistake or to bypass a mesh.

use std::{
    fs::{self, Metadata},
    os::{
        fd::{AsFd, AsRawFd},
        unix::fs::MetadataExt,
    },
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use libbpf_rs::{
    Link, MapCore, MapFlags, MapInfo, Program, libbpf_sys, query::LinkInfo, skel::Skel,
};

use super::{
    bpffs,
    hooks::{Attach, HOOKS, Hook},
    links::{cgroup_of, netns_of, pin, pinned, replace_pin},
    pins::{Pins, children, steer},
    state::{Dataplane, Repair},
    tables::ALL,
};
use crate::node::{Cgroup, Netns, NetnsCookie};

/// The number of map entries that are checked each time.
const LOOKED_AT: usize = 1024;

impl Dataplane {
    /// Checks the parts of the node: the pins and their file system, the hooks, and some entries of
    /// the maps in turn.
    pub fn repair(&mut self, cgroup: &Cgroup) -> Vec<Repair> {
        let mut repairs = Vec::new();
        repairs.extend(self.repair_directory());
        repairs.extend(self.repair_map_pins());
        for hook in HOOKS.iter().filter(|hook| hook.attach == Attach::Cgroup) {
            repairs.extend(self.repair_hook(hook, cgroup));
        }
        repairs.extend(self.repair_redirect());
        repairs.extend(self.repair_entries());
        repairs
    }

    /// Checks the pins' directory: its file system may have been unmounted, or the directory
    /// removed. The lock's descriptor leads to the former directory, with all of its pins.
    fn repair_directory(&mut self) -> Option<Repair> {
        let root = self.pins.root.clone();
        let held = match self.lock.metadata() {
            Ok(held) => held,
            Err(error) => {
                return Some(Repair::new(
                    "bpffs",
                    "cannot look at the lock on the pin \
                                                            directory",
                    Err(error.into()),
                ));
            }
        };
        if fs::metadata(&root).is_ok_and(|there| same(&there, &held)) {
            return None;
        }
        let text = format!("the pin directory {} was removed or unmounted", root.display());
        let done = bpffs::ensure_mounted(&self.mount_point).and_then(|()| {
            let fresh = self.pins.lock()?;
            let former = PathBuf::from(format!("/proc/self/fd/{}", self.lock.as_raw_fd()));
            for layout in Pins::new(&former, &self.pins.layout).layouts()? {
                let now = Pins::new(&root, &layout.layout);
                now.create()?;
                copy_pins(&layout.maps(), &now.maps())?;
                copy_pins(&layout.links(), &now.links())?;
            }
            self.pins.create()?;
            self.lock = fresh;
            Ok(())
        });
        Some(Repair::new("bpffs", text, done))
    }

    fn repair_map_pins(&self) -> Vec<Repair> {
        let mut repairs = Vec::new();
        for map in self.skel.object().maps() {
            let name = map.name().to_string_lossy();
            let at = self.pins.map(&name);
            let there = pinned(&at).ok().and_then(|there| map_id(&there));
            if name.contains('.') || there == map_id(&map) {
                continue;
            }
            let text = format!("the pin of map {name} was removed or replaced");
            repairs.push(Repair::new("pin", text, replace_pin(map.as_fd(), &at)));
        }
        repairs
    }

    fn repair_hook(&mut self, hook: &Hook, cgroup: &Cgroup) -> Option<Repair> {
        let name = hook.program;
        // The link is not held: an agent with another layout still decides.
        let link = self.links.get(name)?;
        let program = self.links.program(name);
        match link.info() {
            Ok(info) if cgroup_of(link).ok() == Some(cgroup.id()) => {
                if Some(info.prog_id) != program {
                    let text = format!("the program of hook {name} was replaced");
                    return Some(Repair::new("hook", text, self.restore_hook(name)));
                }
                self.repair_pin(name, &self.pins.link(name), &info)
            }
            _ => {
                let text = format!("hook {name} was detached from {cgroup}");
                Some(Repair::new("hook", text, self.attach_hook(hook, cgroup)))
            }
        }
    }

    fn restore_hook(&mut self, name: &str) -> Result<()> {
        let program = self.skel.object_mut().progs_mut().find(|program| program.name() == name);
        let program = program.context("no such program")?;
        self.links.update(name, &program)
    }

    /// Checks the pin of an attached link.
    fn repair_pin(&self, name: &str, at: &Path, link: &LinkInfo) -> Option<Repair> {
        if Link::open(at).and_then(|there| there.info()).is_ok_and(|there| there.id == link.id) {
            return None;
        }
        let held = self.links.get(name)?;
        let text = format!("the pin of link {name} was removed or replaced");
        Some(Repair::new("pin", text, replace_pin(held.as_fd(), at)))
    }

    /// Checks the program of spliced sockets, which is attached to their map. Kernels before Linux
    /// 5.18 do not tell and are not asked.
    fn repair_redirect(&self) -> Option<Repair> {
        let map = self.skel.maps.splice_sockets.as_fd().as_raw_fd();
        let (mut id, mut count, mut flags) = (0u32, 1u32, 0u32);
        // SAFETY: the map is open, and there is room for one number, as `count` says.
        let rc = unsafe {
            libbpf_sys::bpf_prog_query(
                map,
                libbpf_sys::BPF_SK_MSG_VERDICT,
                0,
                &raw mut flags,
                &raw mut id,
                &raw mut count,
            )
        };
        let own = Program::id_from_fd(self.skel.progs.redirect.as_fd());
        if rc != 0 || own.is_ok_and(|own| count == 1 && own == id) {
            return None;
        }
        let text = "program redirect was detached from map splice_sockets";
        Some(Repair::new("hook", text, self.attach_redirect()))
    }

    /// Checks the written entries of the maps: all of `pods`, and the next batch of the others. A
    /// look-up of a rule may return a longer rule within it, as it does when a connection is
    /// decided.
    fn repair_entries(&mut self) -> Vec<Repair> {
        let Some(known) = &self.known else {
            return Vec::new();
        };
        let maps = &self.skel.maps;
        let [others @ .., pods] = &ALL;
        let rows = known.pods.values().flat_map(|tables| &tables[others.len()]);
        let mut repairs = Vec::from_iter(repair_in((pods.map)(maps), rows));
        let all = known.pods.iter().flat_map(|(cookie, tables)| {
            let tables = tables.iter().take(others.len()).enumerate();
            tables.flat_map(move |(n, entries)| {
                entries.iter().map(move |(key, value)| ((*cookie, n, key), value))
            })
        });
        let (cookie, n, key) = &self.looked_at;
        let last = (*cookie, *n, key);
        // Continues where the last check ended, then from the beginning: each entry at most once.
        let (before, behind): (Vec<_>, Vec<_>) = all.partition(|(place, _)| *place <= last);
        let next: Vec<_> = behind.into_iter().chain(before).take(LOOKED_AT).collect();
        let end = next.last().map(|((cookie, n, key), _)| (*cookie, *n, (*key).clone()));
        for (n, table) in others.iter().enumerate() {
            let of_table = next.iter().filter(|((_, at, _), _)| *at == n);
            let entries = of_table.map(|((_, _, key), value)| (*key, *value));
            repairs.extend(repair_in((table.map)(maps), entries));
        }
        self.looked_at = end.unwrap_or_default();
        repairs
    }

    /// Checks a namespace's inbound link. `None` if it is attached, the namespace is gone, or it
    /// had no link.
    pub fn repair_inbound(&mut self, cookie: NetnsCookie, netns: &Path) -> Option<Repair> {
        let name = steer(cookie);
        let link = self.links.get(&name)?;
        let text = match (link.info(), netns_of(link)) {
            (Ok(info), Ok(ino)) if ino != 0 => {
                if Some(info.prog_id) == self.links.program(&name) {
                    return self.repair_pin(&name, &self.pins.steer(cookie), &info);
                }
                "the inbound program was replaced"
            }
            _ => "the inbound program was detached",
        };
        let netns = Netns::open_as(netns, cookie).ok()?;
        Some(Repair::new("inbound", text, self.attach_inbound(cookie, &netns)))
    }
}

fn same(one: &Metadata, other: &Metadata) -> bool {
    (one.dev(), one.ino()) == (other.dev(), other.ino())
}

/// The kernel's number of a map.
fn map_id(map: impl AsFd) -> Option<u32> {
    MapInfo::new(map.as_fd()).ok().map(|info| info.info.id)
}

/// Restores the entries of a map that differ from what was written.
fn repair_in<'a>(
    map: &impl MapCore,
    goal: impl Iterator<Item = (&'a Vec<u8>, &'a Vec<u8>)>,
) -> Option<Repair> {
    let missing = |(key, value): &(&Vec<u8>, &Vec<u8>)| {
        map.lookup(key, MapFlags::ANY).is_ok_and(|found| found.as_ref() != Some(*value))
    };
    let missing: Vec<_> = goal.filter(missing).collect();
    if missing.is_empty() {
        return None;
    }
    let mut write = missing.iter().map(|(key, value)| map.update(key, value, MapFlags::ANY));
    let done = write.try_for_each(|done| done.map_err(Into::into));
    let text = format!("{} entries of map {:?} were removed or changed", missing.len(), map.name());
    Some(Repair::new("entry", text, done))
}

/// Pins the objects of one directory in another, except those that have a pin there already.
fn copy_pins(from: &Path, to: &Path) -> Result<()> {
    for former in children(from)? {
        let now = to.join(former.file_name().unwrap_or_default());
        if !now.exists() {
            pin(pinned(&former)?.as_fd(), &now)?;
        }
    }
    Ok(())
}
