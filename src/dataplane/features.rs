//! The kernel's features: those that the programs need, and those that not every kernel has.

use std::{
    os::fd::{FromRawFd, OwnedFd},
    sync::OnceLock,
};

use libbpf_rs::{
    ProgramType,
    btf::{
        Btf,
        types::{Func, Struct},
    },
    libbpf_sys,
};

use super::hooks::{Attach, HOOKS, MAP_TYPES};

/// Optional features, read from the kernel's own types.
pub(super) struct Kernel {
    /// Programs see the interface of a new connection (Linux 5.17).
    pub tells_interface: bool,
    /// iter/tcp holds no spin lock while a program looks at a socket. The function that is looked
    /// for came with that change, in Linux 6.5; kernels with only the fix backported count as
    /// older.
    pub iterates_unlocked: bool,
    /// Filters can be links to devices (tcx, Linux 6.6).
    pub links_filters: bool,
    /// A program can choose the error of connect() (Linux 6.1).
    pub sets_error: bool,
    /// A program can visit the sockets that have storage in a map. Some kernels are built to refuse
    /// every iterator over a map's elements.
    pub iterates_storages: bool,
}

pub(super) fn kernel() -> &'static Kernel {
    static KERNEL: OnceLock<Kernel> = OnceLock::new();
    KERNEL.get_or_init(|| {
        let types = Btf::from_vmlinux().ok();
        let types = types.as_ref();
        let context = types.and_then(|types| types.type_by_name::<Struct<'_>>("bpf_sk_lookup"));
        let tcx = types.and_then(|types| types.type_by_name::<Struct<'_>>("tcx_link"));
        let destroy = types.and_then(|types| types.type_by_name::<Func<'_>>("bpf_sock_destroy"));
        Kernel {
            tells_interface: context.is_some_and(|context| {
                context.iter().any(|field| field.name == Some("ingress_ifindex".as_ref()))
            }),
            iterates_unlocked: destroy.is_some(),
            links_filters: tcx.is_some(),
            sets_error: ProgramType::CgroupSockAddr
                .is_helper_supported(libbpf_sys::BPF_FUNC_set_retval)
                .unwrap_or(false),
            iterates_storages: types.is_some_and(loads_storage_iterator),
        }
    })
}

/// Whether a program can visit the sockets that have storage in a map.
pub fn iterates_storages() -> bool {
    kernel().iterates_storages
}

/// Whether the kernel accepts the least program that visits sockets with storage.
fn loads_storage_iterator(types: &Btf<'_>) -> bool {
    let target = types.type_by_name::<Func<'_>>("bpf_iter_bpf_sk_storage_map");
    let Some(target) = target else { return false };
    let exit = [
        libbpf_sys::bpf_insn { code: 0xb7, ..Default::default() }, // r0 = 0
        libbpf_sys::bpf_insn { code: 0x95, ..Default::default() },
    ];
    let options = libbpf_sys::bpf_prog_load_opts {
        sz: size_of::<libbpf_sys::bpf_prog_load_opts>() as u64,
        expected_attach_type: libbpf_sys::BPF_TRACE_ITER,
        attach_btf_id: target.type_id().into(),
        ..Default::default()
    };
    // SAFETY: the name and the license end with NUL, and they, the instructions, which are as many as
    // is said, and the options live across the call, which does not write to the options: they have no
    // buffer for a log.
    let fd = unsafe {
        libbpf_sys::bpf_prog_load(
            libbpf_sys::BPF_PROG_TYPE_TRACING,
            c"probe".as_ptr(),
            c"GPL".as_ptr(),
            exit.as_ptr(),
            exit.len() as u64,
            &raw const options as *mut _,
        )
    };
    if fd < 0 {
        return false;
    }
    // SAFETY: the call returned a descriptor that nobody else has.
    drop(unsafe { OwnedFd::from_raw_fd(fd) });
    true
}

/// Asks the kernel for each program type, map type and helper that the programs need, and returns
/// `(name, whether it exists)`.
/// `(what, whether it is there)`.
pub fn probe() -> Vec<(String, bool)> {
    let mut found = Vec::new();
    let mut kinds: Vec<String> = Vec::new();
    // The library's probe for tracing programs needs a capability that iterators do not, so only
    // loading tells.
    for hook in HOOKS.iter().filter(|hook| hook.attach != Attach::Nothing) {
        let kind = format!("{:?}", hook.kind);
        if !kinds.contains(&kind) {
            found.push((format!("program type {kind}"), hook.kind.is_supported().unwrap_or(false)));
            kinds.push(kind);
        }
    }
    for (kind, name) in MAP_TYPES {
        found.push((format!("map type {name}"), kind.is_supported().unwrap_or(false)));
    }
    for hook in HOOKS {
        for (id, name) in hook.helpers {
            let what = format!("helper {name} in {:?} programs", hook.kind);
            if !found.iter().any(|(known, _)| *known == what) {
                found.push((what, hook.kind.is_helper_supported(*id).unwrap_or(false)));
            }
        }
    }
    found
}

/// Possible reasons why the kernel refused the programs.
pub(super) fn refusal() -> String {
    let lacks: Vec<String> =
        probe().into_iter().filter(|(_, there)| !there).map(|(what, _)| what).collect();
    let refused = "the kernel rejected the BPF programs or maps";
    match lacks[..] {
        [] => format!("{refused} (`sidestep check` may say more)"),
        _ => format!("{refused}: it lacks {} (see `sidestep check`)", lacks.join(", ")),
    }
}
