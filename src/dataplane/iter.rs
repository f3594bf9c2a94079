//! Runs iterators.

use std::{
    io::Read,
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd},
};

use anyhow::{Context, Result};
use libbpf_rs::{
    Iter, Link, MapHandle, OpenObject, ProgramMut,
    skel::{OpenSkel, Skel},
};

use super::{
    features::kernel,
    pins::Pins,
    skel::{open_node_in, sidestep::SidestepSkel},
};

/// Programs that visit the sockets with storage in a map, and those that do the same by processes'
/// open files, for kernels without iterators over maps.
const VISITORS: [(&str, &str); 4] = [
    ("sweep_splices", "sweep_splices_by_file"),
    ("find_stale_peers", "find_stale_peers_by_file"),
    ("drain_splices", "drain_splices_by_file"),
    ("count_storages", "count_storages_by_file"),
];
/// Of these, the ones for maps that may be another layout's: [`visit_other`] loads them.
const FOR_OTHERS: [&str; 2] = ["drain_splices", "count_storages"];

/// The visitor that works on this kernel, by its first name.
fn visitor(name: &str) -> &str {
    let found = VISITORS.iter().find(|(by_storage, _)| *by_storage == name);
    found.map_or(
        name,
        |(by_storage, by_file)| {
            if kernel().iterates_storages { *by_storage } else { *by_file }
        },
    )
}

/// Whether this kernel can load the program: it may have no iterators over maps.
pub(super) fn can_load(program: &str) -> bool {
    kernel().iterates_storages || VISITORS.iter().all(|(by_storage, _)| *by_storage != program)
}

/// Whether the agent loads the program with the others.
pub(super) fn is_agents(program: &str) -> bool {
    VISITORS.iter().all(|(by_storage, by_file)| {
        let is_visitor = [by_storage, by_file].contains(&&program);
        !is_visitor || (program == visitor(by_storage) && !FOR_OTHERS.contains(by_storage))
    })
}

/// Runs an iterator's program over all its objects, and returns its output.
pub(super) fn run(link: &Link) -> Result<Vec<u8>> {
    let mut written = Vec::new();
    // Reading it to the end is what runs the program.
    Iter::new(link)?.read_to_end(&mut written)?;
    Ok(written)
}

/// Runs that one of two visitors which the agent has loaded, over the sockets with storage in the map.
/// It is the program's own map: by files, it looks for no other.
pub(super) fn visit(
    by_storage: &ProgramMut<'_>,
    by_file: &ProgramMut<'_>,
    map: BorrowedFd<'_>,
) -> Result<Vec<u8>> {
    let link =
        if kernel().iterates_storages { by_storage.attach_iter(map)? } else { by_file.attach()? };
    run(&link)
}

/// Loads a visitor by its first name for those of the maps that another layout, or this one, has
/// pinned, runs it, and returns its output, and what `read` finds in the object's variables.
pub(super) fn visit_other<T>(
    name: &str,
    pins: &Pins,
    maps: &[&str],
    read: impl FnOnce(&SidestepSkel<'_>) -> T,
) -> Result<(Vec<u8>, T)> {
    let name = visitor(name);
    let mut storage = MaybeUninit::<OpenObject>::uninit();
    let mut open = open_node_in(&mut storage)?;
    for mut program in open.open_object_mut().progs_mut() {
        let wanted = program.name() == name;
        program.set_autoload(wanted);
    }
    // By files, the program looks for storage in the maps in these places. A map gives its own name to
    // its place, and the skeleton looks for the places by name: so each is in the one that it is from.
    let mut given = Vec::new();
    for mut place in open.open_object_mut().maps_mut() {
        let of = place.name().to_string_lossy().into_owned();
        if !maps.contains(&&*of) {
            if !of.contains('.') {
                place.set_autocreate(false)?;
            }
        } else if let Ok(map) = MapHandle::from_pinned_path(pins.map(&of)) {
            place.reuse_fd(map.as_fd())?;
            given.push(map);
        }
    }
    let mut skel = open.load().with_context(|| format!("the kernel rejected program {name}"))?;
    let program = skel.object_mut().progs_mut().find(|program| program.name() == name);
    let program = program.with_context(|| format!("the object has no program {name}"))?;
    let written = if kernel().iterates_storages {
        let runs = given.iter().map(|map| run(&program.attach_iter(map.as_fd())?));
        runs.collect::<Result<Vec<_>>>()?.concat()
    } else {
        run(&program.attach()?)?
    };
    Ok((written, read(&skel)))
}

#[cfg(test)]
mod tests {
    use libbpf_rs::skel::SkelBuilder;

    use super::{super::skel::sidestep::SidestepSkelBuilder, *};

    #[test]
    fn the_object_has_each_visitor_twice() {
        let mut storage = MaybeUninit::uninit();
        let open = SidestepSkelBuilder::default().open(&mut storage).expect("opens");
        let section = |name: &str| {
            let program = open.open_object().progs().find(|program| program.name() == name);
            program.map(|program| program.section().to_string_lossy().into_owned())
        };
        for (by_storage, by_file) in VISITORS {
            assert_eq!(section(by_storage).as_deref(), Some("iter/bpf_sk_storage_map"));
            assert_eq!(section(by_file).as_deref(), Some("iter/task_file"));
        }
        let over_maps = open.open_object().progs().filter(|program| {
            let section = program.section().to_string_lossy();
            section.starts_with("iter/bpf_") || section == "iter/sockmap"
        });
        assert_eq!(over_maps.count(), VISITORS.len(), "one that some kernels refuse has no twin");
    }

    #[test]
    fn the_agent_loads_one_of_two_and_none_of_those_for_other_layouts() {
        for (by_storage, by_file) in VISITORS {
            let loaded = [by_storage, by_file].into_iter().filter(|name| is_agents(name));
            let expected = usize::from(!FOR_OTHERS.contains(&by_storage));
            assert_eq!(loaded.count(), expected, "{by_storage}");
            assert!(can_load(by_file) && can_load(visitor(by_storage)));
        }
        assert!(is_agents("connect4") && can_load("connect4"));
    }
}
