//! Removes everything that Sidestep has attached and pinned.

use std::{fmt, fs, thread, time::Duration};

use anyhow::{Context, Result};

use super::{
    abi,
    hooks::HOOKS,
    links::remove_link,
    pins::{Pins, children},
    splice, table, tc,
};
use crate::node::NetnsCookie;

/// The time for sidecars to ask for the original destination of connections that were decided a
/// moment ago.
const ASKED: Duration = Duration::from_secs(1);

/// The result of `unload`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Unloaded {
    /// The number of removed pins.
    pub removed: usize,
    /// The number of spliced sockets with unread bytes, which would be lost with the maps: these
    /// stay, without a program, until the next `unload`.
    pub unread: u32,
}

impl fmt::Display for Unloaded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} pins removed", self.removed)?;
        match self.unread {
            0 => Ok(()),
            n => write!(
                f,
                "; {n} sockets hold spliced data that their processes have not read: the maps with \
                 this data were kept, run `sidestep unload` again later"
            ),
        }
    }
}

/// Removes every link, program and map of every layout.
///
/// # Errors
/// If a pin cannot be removed.
pub fn unload(pins: &Pins) -> Result<Unloaded> {
    let unread = splice::drain(pins)?;
    let mut removed = 0;
    let keep: &[&str] = if unread > 0 { &splice::MAPS } else { &[] };
    for layout in pins.layouts()? {
        removed += remove_layout(&layout, keep)?;
    }
    if pins.root.exists() && unread == 0 {
        fs::remove_dir(&pins.root)
            .with_context(|| format!("cannot remove {}", pins.root.display()))?;
    }
    Ok(Unloaded { removed, unread })
}

/// Whether a pod has the mesh's own rules: its connections go on without Sidestep, and none must get
/// lost on the way.
fn works_beside(pins: &Pins) -> Result<bool> {
    if !pins.map("pods").exists() {
        return Ok(false);
    }
    let rows = table::read_as::<NetnsCookie, abi::pod>(&pins.open_map("pods")?)?;
    Ok(rows.iter().any(|(_, row)| row.flags.0 & abi::pod_flag::POD_BESIDE.0 != 0))
}

/// Removes a layout's filters, links and maps, except the maps in `keep`. Returns the number of
/// pins.
pub(super) fn remove_layout(pins: &Pins, keep: &[&str]) -> Result<usize> {
    let mut removed = 0;
    let mut kept = false;
    tc::empty_qdiscs(pins);
    // What decides goes first, so that what it has decided is answered for.
    for hook in HOOKS.iter().filter(|hook| hook.decides) {
        let link = pins.link(hook.program);
        if link.exists() {
            remove_link(&link)?;
            removed += 1;
        }
    }
    if works_beside(pins)? {
        thread::sleep(ASKED);
    }
    // Links go before maps: a program without its map's contents would decide wrongly.
    for link in children(&pins.links())? {
        remove_link(&link)?;
        removed += 1;
    }
    for map in children(&pins.maps())? {
        if map.file_name().is_some_and(|name| keep.iter().any(|kept| name == *kept)) {
            kept = true;
            continue;
        }
        fs::remove_file(&map).with_context(|| format!("cannot remove {}", map.display()))?;
        removed += 1;
    }
    for dir in [pins.links(), pins.maps(), pins.layout()] {
        if dir.exists() && !kept {
            fs::remove_dir(&dir).with_context(|| format!("cannot remove {}", dir.display()))?;
        }
    }
    Ok(removed)
}
