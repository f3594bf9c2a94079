//! The names and places of pinned maps and links. ARCHITECTURE.md has the layout below the pin
//! root.

use std::{
    fmt,
    fs::{self, File},
    os::unix::fs::{DirBuilderExt, MetadataExt},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, anyhow, ensure};
use libbpf_rs::MapHandle;
use nix::{
    fcntl::{Flock, FlockArg},
    unistd::geteuid,
};

use crate::node::NetnsCookie;

/// The layout of the pinned maps, a `v` and a number. It changes when a map's layout changes.
pub const LAYOUT: &str = "v5";

/// The name of `tc_namespaces` in builds before layout v5. Each layout pins the map by this name as
/// well.
pub(super) const FORMER_TC_NAMESPACES: &str = "filtered";
/// The name of `splice_sockets` in builds before layout v5.
pub(super) const FORMER_SPLICE_SOCKETS: &str = "spliced";
/// The names of these maps in builds before layout v5, which look for them after a rollback.
pub(super) const FORMER_NAMES: [(&str, &str); 2] =
    [("tc_namespaces", FORMER_TC_NAMESPACES), ("splice_sockets", FORMER_SPLICE_SOCKETS)];

/// The directories of pinned maps and links.
#[derive(Debug, Clone)]
pub struct Pins {
    pub(super) root: PathBuf,
    pub(super) layout: String,
}

impl Pins {
    /// The pins below this directory of a bpffs, for maps of this layout.
    pub fn new(root: &Path, layout: &str) -> Self {
        Self { root: root.to_owned(), layout: layout.to_owned() }
    }

    pub(super) fn layout(&self) -> PathBuf {
        self.root.join(&self.layout)
    }

    /// The pins of every layout that exists.
    pub(super) fn layouts(&self) -> Result<Vec<Self>> {
        let layouts = children(&self.root)?;
        let names = layouts.iter().filter_map(|path| path.file_name()?.to_str());
        Ok(names.map(|name| Self::new(&self.root, name)).collect())
    }

    /// The pins of other layouts, whose maps this build cannot read.
    pub(super) fn others(&self) -> Result<Vec<Self>> {
        let mut others = self.layouts()?;
        others.retain(|other| other.layout != self.layout);
        Ok(others)
    }

    /// Makes the layout's directories.
    pub(super) fn create(&self) -> Result<()> {
        fs::create_dir_all(self.maps())
            .and_then(|()| fs::create_dir_all(self.links()))
            .with_context(|| format!("cannot create {}", self.layout().display()))
    }

    pub(super) fn maps(&self) -> PathBuf {
        self.layout().join("maps")
    }

    pub(super) fn links(&self) -> PathBuf {
        self.layout().join("links")
    }

    pub(super) fn map(&self, name: &str) -> PathBuf {
        self.maps().join(name)
    }

    /// Opens a pinned map; for callers that have no loaded data plane.
    pub(super) fn open_map(&self, name: &str) -> Result<MapHandle> {
        let path = self.map(name);
        MapHandle::from_pinned_path(&path)
            .with_context(|| format!("cannot open map {}", path.display()))
    }

    pub(super) fn link(&self, name: &str) -> PathBuf {
        self.links().join(name)
    }

    pub(super) fn steer(&self, cookie: NetnsCookie) -> PathBuf {
        self.link(&steer(cookie))
    }

    /// Whether any pin exists.
    pub fn exist(&self) -> bool {
        self.map("pods").exists()
    }

    /// Locks the pins against other agents and `unload` while the result lives.
    ///
    /// # Errors
    /// If another process has it, or the directory cannot be made.
    pub fn lock(&self) -> Result<Flock<File>> {
        let root = self.root.display();
        // Every user can make directories in a bpffs' root.
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.root)
            .with_context(|| format!("cannot create {root}"))?;
        let dir = File::open(&self.root).with_context(|| format!("cannot open {root}"))?;
        let owner = dir.metadata()?.uid();
        ensure!(
            owner == geteuid().as_raw(),
            "{root} belongs to uid {owner}, not to this process: \
                                              remove it first"
        );
        Flock::lock(dir, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| {
            anyhow!(errno).context(format!(
                "another sidestep process uses {}: stop it first",
                self.root.display()
            ))
        })
    }
}

impl fmt::Display for Pins {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.layout().display())
    }
}

/// A directory's entries; empty if the directory does not exist.
pub(super) fn children(dir: &Path) -> Result<Vec<PathBuf>> {
    if !dir.exists() {
        return Ok(Vec::new());
    }
    fs::read_dir(dir)
        .and_then(|entries| entries.map(|entry| entry.map(|e| e.path())).collect())
        .with_context(|| format!("cannot read {}", dir.display()))
}

/// The name of the pin of a namespace's inbound link.
pub(super) fn steer(cookie: NetnsCookie) -> String {
    format!("steer-{cookie:x}")
}

/// The cookie in the name of an inbound link's pin.
pub(super) fn steered_by(pin: &str) -> Option<NetnsCookie> {
    u64::from_str_radix(pin.strip_prefix("steer-")?, 16).ok().map(NetnsCookie)
}

/// The cookies of the namespaces with a pinned inbound link.
pub(super) fn steered(pins: &Pins) -> Result<Vec<NetnsCookie>> {
    let links = children(&pins.links())?;
    Ok(links.iter().filter_map(|path| steered_by(path.file_name()?.to_str()?)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_of_an_inbound_pin_has_the_cookie() {
        for cookie in [1, 0xabc, u64::MAX].map(NetnsCookie) {
            assert_eq!(steered_by(&steer(cookie)), Some(cookie));
        }
        for other in ["connect4", "steer-", "steer-xyz", "dns-1-1"] {
            assert_eq!(steered_by(other), None, "{other}");
        }
    }

    #[test]
    fn pins_that_do_not_exist_are_none() {
        let pins = Pins::new(Path::new("/nonexistent"), "v5");
        assert!(!pins.exist());
        assert_eq!(steered(&pins).expect("read"), []);
    }
}
