//! The order of programs at the hooks that decide. If another program translates a Service's
//! address first (Cilium, Calico), sidecars see an endpoint, and the mesh's rules for the Service
//! do not apply.

use std::{
    collections::BTreeSet,
    ffi::CStr,
    fmt, io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd},
};

use anyhow::{Result, ensure};
use libbpf_rs::{AsRawLibbpf, Link, Program, ProgramMut, libbpf_sys};

use super::{
    cost,
    hooks::{HOOKS, Hook},
    pins::Pins,
};
use crate::node::Cgroup;

/// The flags that put a program first, the best first: before all programs of the hierarchy (Linux
/// 6.15), and among those before the others of the same cgroup (Linux 6.17).
const FIRST: [u32; 2] =
    [libbpf_sys::BPF_F_PREORDER | libbpf_sys::BPF_F_BEFORE, libbpf_sys::BPF_F_PREORDER];
/// More programs than any kernel allows on a cgroup and those above it.
const MANY: usize = 1024;

/// Another program that runs before Sidestep's.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ahead {
    /// The hook, by the name of Sidestep's program.
    pub hook: &'static str,
    /// The kernel's id of the program.
    pub id: u32,
    /// The program's name, which the kernel cuts at 15 bytes.
    pub name: String,
}

impl fmt::Display for Ahead {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "program {:?} (id {}) at {}", self.name, self.id, self.hook)
    }
}

/// The hooks that decide, and the kernel's numbers for them.
fn deciding() -> impl Iterator<Item = (&'static Hook, libbpf_sys::bpf_attach_type)> {
    HOOKS.iter().filter(|hook| hook.decides).filter_map(|hook| {
        let kind = match hook.program {
            "connect4" => libbpf_sys::BPF_CGROUP_INET4_CONNECT,
            "connect6" => libbpf_sys::BPF_CGROUP_INET6_CONNECT,
            "sendmsg4" => libbpf_sys::BPF_CGROUP_UDP4_SENDMSG,
            "sendmsg6" => libbpf_sys::BPF_CGROUP_UDP6_SENDMSG,
            _ => return None,
        };
        Some((hook, kind))
    })
}

/// The flags that put a program first on this kernel; 0 if it has none: programs then run in the
/// order of attachment.
fn first(program: BorrowedFd<'_>, kind: libbpf_sys::bpf_attach_type) -> u32 {
    let takes = |flags: &u32| {
        let options = libbpf_sys::bpf_link_create_opts {
            sz: size_of::<libbpf_sys::bpf_link_create_opts>() as _,
            flags: *flags,
            ..Default::default()
        };
        // The kernel checks the flags before the cgroup, which is invalid here.
        // SAFETY: the program's descriptor is open, and the options live across the call.
        let rc = unsafe {
            libbpf_sys::bpf_link_create(program.as_raw_fd(), -1, kind, &raw const options)
        };
        rc == -libc::EBADF
    };
    FIRST.into_iter().find(takes).unwrap_or(0)
}

/// Attaches a program to a cgroup: if it decides, before others where the kernel allows it.
pub(super) fn attach(program: &ProgramMut<'_>, cgroup: RawFd, hook: &Hook) -> Result<Link> {
    let kind = deciding().find(|(one, _)| one.program == hook.program).map(|(_, kind)| kind);
    let options = libbpf_sys::bpf_cgroup_opts {
        sz: size_of::<libbpf_sys::bpf_cgroup_opts>() as _,
        flags: kind.map_or(0, |kind| first(program.as_fd(), kind)),
        ..Default::default()
    };
    let program = program.as_libbpf_object().as_ptr();
    // SAFETY: the program is loaded, and the options live across the call.
    let link =
        unsafe { libbpf_sys::bpf_program__attach_cgroup_opts(program, cgroup, &raw const options) };
    let link = std::ptr::NonNull::new(link).ok_or_else(io::Error::last_os_error)?;
    // SAFETY: libbpf has just made it, for nobody else.
    Ok(unsafe { Link::from_ptr(link) })
}

/// The ids of the programs that run for processes of a cgroup, in their order.
fn effective(cgroup: &Cgroup, kind: libbpf_sys::bpf_attach_type) -> Result<Vec<u32>> {
    let mut ids = vec![0; MANY];
    let (mut flags, mut count) = (0, MANY as u32);
    // SAFETY: the cgroup is open, and there is room for as many ids as the kernel is told.
    let rc = unsafe {
        libbpf_sys::bpf_prog_query(
            cgroup.as_raw_fd(),
            kind,
            libbpf_sys::BPF_F_QUERY_EFFECTIVE,
            &raw mut flags,
            ids.as_mut_ptr(),
            &raw mut count,
        )
    };
    let error = io::Error::from_raw_os_error(-rc);
    ensure!(rc == 0, "cannot read the programs of {cgroup}: {error}");
    ids.truncate(count as usize);
    Ok(ids)
}

/// A program's name and tag; `None` if it is gone.
fn named(id: u32) -> Option<(String, [u8; 8])> {
    let fd = Program::fd_from_id(id).ok()?;
    let info = cost::info(fd.as_fd()).ok()?;
    let name = info.name.map(|byte| byte.cast_unsigned());
    let name = CStr::from_bytes_until_nul(&name).ok()?.to_string_lossy().into_owned();
    Some((name, info.tag))
}

/// Programs of others that run before Sidestep's at the hooks that decide. Without attached
/// programs of Sidestep, those that would, on a kernel that does not let it come first.
///
/// # Errors
/// If the kernel does not tell.
pub fn ahead(pins: &Pins, cgroup: &Cgroup) -> Result<Vec<Ahead>> {
    ahead_of(pins, cgroup, |_| None)
}

/// The same as [`ahead`], with these programs of Sidestep known beside those of the pinned links.
pub(super) fn ahead_of(
    pins: &Pins,
    cgroup: &Cgroup,
    loaded: impl Fn(&str) -> Option<u32>,
) -> Result<Vec<Ahead>> {
    let layouts = pins.layouts()?;
    let mut found = Vec::new();
    for (hook, kind) in deciding() {
        let links = layouts.iter().filter_map(|pins| Link::open(pins.link(hook.program)).ok());
        let linked = links.filter_map(|link| Some(link.info().ok()?.prog_id));
        let own: BTreeSet<u32> = linked.chain(loaded(hook.program)).collect();
        let tags: BTreeSet<[u8; 8]> = own.iter().filter_map(|id| Some(named(*id)?.1)).collect();
        for id in effective(cgroup, kind)?.into_iter().take_while(|id| !own.contains(id)) {
            // Another instance of Sidestep affects only its own pods.
            let Some((name, _)) = named(id).filter(|(_, tag)| !tags.contains(tag)) else {
                continue;
            };
            found.push(Ahead { hook: hook.program, id, name });
        }
    }
    Ok(found)
}

/// Whether this kernel lets a program come first, tried with one of the loaded programs.
pub(super) fn can_be_first(program: &Program<'_>) -> bool {
    first(program.as_fd(), libbpf_sys::BPF_CGROUP_INET4_CONNECT) != 0
}
