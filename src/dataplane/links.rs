//! The links that the agent holds beside their pins, so that removing a pin detaches nothing, even
//! for a moment.

use std::{
    collections::BTreeMap,
    ffi::{CString, OsString},
    fs, io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

use anyhow::{Context, Result, bail, ensure};
use libbpf_rs::{Link, Program, libbpf_sys, query::LinkTypeInfo};

use super::pins::{Pins, children, steered_by};
use crate::node::NetnsCookie;

/// A link, and its program when the agent last attached or adopted it.
struct Held {
    link: Link,
    program: u32,
}

/// Links by the names of their pins.
#[derive(Default)]
pub(super) struct Links(BTreeMap<String, Held>);

impl Links {
    /// The inbound links of an earlier agent, whose pods may be alive.
    pub fn adopt(pins: &Pins) -> Result<Self> {
        let mut links = Self::default();
        for pin in children(&pins.links())? {
            let name = pin.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if steered_by(&name).is_some() {
                let link = Link::open(&pin);
                links
                    .hold(&name, link.with_context(|| format!("cannot open {}", pin.display()))?)?;
            }
        }
        Ok(links)
    }

    /// Adds a link that has this build's program, or one that must stay.
    pub fn hold(&mut self, name: &str, link: Link) -> Result<()> {
        let program = link.info()?.prog_id;
        self.0.insert(name.to_owned(), Held { link, program });
        Ok(())
    }

    /// Stops holding a link; it lives on by its pin.
    pub fn release(&mut self, name: &str) -> Option<Link> {
        self.0.remove(name).map(|held| held.link)
    }

    /// Switches a link to another program in one step.
    pub fn update(&mut self, name: &str, program: &Program<'_>) -> Result<()> {
        let held = self.0.get_mut(name).context("the agent holds no descriptor of its link")?;
        held.link.update_prog(program)?;
        held.program = Program::id_from_fd(program.as_fd())?;
        Ok(())
    }

    pub fn get(&self, name: &str) -> Option<&Link> {
        self.0.get(name).map(|held| &held.link)
    }

    /// The program that a link should have.
    pub fn program(&self, name: &str) -> Option<u32> {
        self.0.get(name).map(|held| held.program)
    }

    /// The cookies of the namespaces whose inbound links are held.
    pub fn steered(&self) -> Vec<NetnsCookie> {
        self.0.keys().filter_map(|name| steered_by(name)).collect()
    }
}

/// Pins an object, in place of an existing pin.
pub(super) fn replace_pin(object: BorrowedFd<'_>, at: &Path) -> Result<()> {
    let mut fresh = OsString::from(at);
    fresh.push("-new");
    let _ = fs::remove_file(&fresh);
    pin(object, Path::new(&fresh))?;
    fs::rename(&fresh, at).with_context(|| format!("cannot pin {}", at.display()))
}

/// Pins an object at a path without a pin.
pub(super) fn pin(object: BorrowedFd<'_>, at: &Path) -> Result<()> {
    let path = CString::new(at.as_os_str().as_bytes())?;
    // SAFETY: the descriptor is open, and the path ends with a NUL.
    let rc = unsafe { libbpf_sys::bpf_obj_pin(object.as_raw_fd(), path.as_ptr()) };
    let error = io::Error::from_raw_os_error(-rc);
    ensure!(rc == 0, "cannot pin {}: {error}", at.display());
    Ok(())
}

/// Opens the pinned object at a path, of any kind.
pub(super) fn pinned(at: &Path) -> Result<OwnedFd> {
    let path = CString::new(at.as_os_str().as_bytes())?;
    // SAFETY: the path ends with a NUL.
    let fd = unsafe { libbpf_sys::bpf_obj_get(path.as_ptr()) };
    let error = io::Error::from_raw_os_error(-fd);
    ensure!(fd >= 0, "cannot open {}: {error}", at.display());
    // SAFETY: the kernel has just made it, for nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

pub(super) fn remove_link(pin: &Path) -> Result<()> {
    let link = Link::open(pin).with_context(|| format!("cannot open {}", pin.display()))?;
    // Detaches at once, even if others hold the link; fails if its target is gone.
    let _ = link.detach();
    fs::remove_file(pin).with_context(|| format!("cannot remove {}", pin.display()))
}

/// The id of the cgroup that a link is attached to; 0 if that cgroup is gone.
pub(super) fn cgroup_of(link: &Link) -> Result<u64> {
    match link.info()?.info {
        LinkTypeInfo::Cgroup(info) => Ok(info.cgroup_id),
        other => bail!("the pin is a link of another type: {other:?}"),
    }
}

/// The inode of the network namespace that a link is attached to; 0 if it is gone.
pub(super) fn netns_of(link: &Link) -> Result<u32> {
    match link.info()?.info {
        LinkTypeInfo::NetNs(info) => Ok(info.ino),
        other => bail!("the pin is a link of another type: {other:?}"),
    }
}

pub(super) fn steer_lives(pins: &Pins, cookie: NetnsCookie) -> bool {
    let link = Link::open(pins.steer(cookie)).map_err(anyhow::Error::from);
    link.and_then(|link| netns_of(&link)).is_ok_and(|ino| ino != 0)
}
