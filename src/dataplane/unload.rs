//! Removes everything that Sidestep has attached and pinned.

use std::{fmt, fs};

use anyhow::{Context, Result};

use super::{
    links::remove_link,
    pins::{Pins, children},
    splice, tc,
};

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

/// Removes a layout's filters, links and maps, except the maps in `keep`. Returns the number of
/// pins.
pub(super) fn remove_layout(pins: &Pins, keep: &[&str]) -> Result<usize> {
    let mut removed = 0;
    let mut kept = false;
    tc::empty_qdiscs(pins);
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
