//! Where maps and links are pinned, and under which names. ARCHITECTURE.md has the layout below the
//! pin root.

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

/// Moves when the layout of a pinned map moves: a `v` and a number.
pub const LAYOUT: &str = "v5";

/// `tc_namespaces`, as builds before layout v5 call it. Each layout has it by this name as well.
pub(super) const FORMER_TC_NAMESPACES: &str = "filtered";
/// `splice_sockets`, as builds before layout v5 call it.
pub(super) const FORMER_SPLICE_SOCKETS: &str = "spliced";
/// What builds before layout v5 call these maps: by that name they look for them when they are
/// rolled back to.
pub(super) const FORMER_NAMES: [(&str, &str); 2] =
    [("tc_namespaces", FORMER_TC_NAMESPACES), ("splice_sockets", FORMER_SPLICE_SOCKETS)];

/// Where maps and links are pinned.
#[derive(Debug, Clone)]
pub struct Pins {
    pub(super) root: PathBuf,
    pub(super) layout: String,
}

impl Pins {
    /// Below this directory of a bpffs, with maps of this layout.
    pub fn new(root: &Path, layout: &str) -> Self {
        Self { root: root.to_owned(), layout: layout.to_owned() }
    }

    pub(super) fn layout(&self) -> PathBuf {
        self.root.join(&self.layout)
    }

    /// Everything that is there, of any layout.
    pub(super) fn layouts(&self) -> Result<Vec<Self>> {
        let layouts = children(&self.root)?;
        let names = layouts.iter().filter_map(|path| path.file_name()?.to_str());
        Ok(names.map(|name| Self::new(&self.root, name)).collect())
    }

    /// What agents of other builds left there, whose maps this build cannot read.
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

    /// A pinned map, for whoever has no agent's.
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

    /// Whether anything is installed.
    pub fn exist(&self) -> bool {
        self.map("pods").exists()
    }

    /// Keeps other agents and `unload` away for as long as the result lives.
    ///
    /// # Errors
    /// Where another process has it, or the directory cannot be made.
    pub fn lock(&self) -> Result<Flock<File>> {
        let root = self.root.display();
        // Anybody may make directories in a bpffs' root.
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

/// A directory's entries; none where there is no directory.
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

/// The cookie of the namespace whose inbound link has a pin of this name.
pub(super) fn steered_by(pin: &str) -> Option<NetnsCookie> {
    u64::from_str_radix(pin.strip_prefix("steer-")?, 16).ok().map(NetnsCookie)
}

/// The cookies of the namespaces with a pinned inbound link.
pub(super) fn steered(pins: &Pins) -> Result<Vec<NetnsCookie>> {
    let links = children(&pins.links())?;
    Ok(links.iter().filter_map(|path| steered_by(path.file_name()?.to_str()?)).collect())
}
