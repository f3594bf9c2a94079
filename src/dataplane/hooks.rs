//! The hook table: every program, its attachment, and the kernel features that it needs.

use libbpf_rs::{MapType, ProgramType, libbpf_sys};

/// The attachment of a program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Attach {
    /// The node's cgroup; the link is pinned under the program's name.
    Cgroup,
    /// A pod's network namespace; the link is pinned under the namespace's cookie.
    Netns,
    /// Egress of a pod's network devices.
    Devices,
    /// Ingress of a pod's network devices; the program is in the object that each pod has.
    DevicesIn,
    /// None: the agent runs the program itself.
    Nothing,
    /// A map of sockets: the program sees the messages that they send.
    Sockets,
}

/// A program and its requirements.
#[derive(Debug)]
pub(crate) struct Hook {
    /// The name of the C function, and of the pin.
    pub program: &'static str,
    /// The attachment.
    pub attach: Attach,
    /// The program type, for the probes.
    pub kind: ProgramType,
    /// Whether it decides about new connections, for which the other programs answer: when the
    /// maps' layout changes, it is switched once the new maps are filled, and the others stay
    /// beside.
    pub decides: bool,
    /// The helpers that it requires, by the kernel's number and name.
    pub helpers: &'static [(libbpf_sys::bpf_func_id, &'static str)],
}

const NETNS_COOKIE: (libbpf_sys::bpf_func_id, &str) =
    (libbpf_sys::BPF_FUNC_get_netns_cookie, "bpf_get_netns_cookie");
const STORAGE: (libbpf_sys::bpf_func_id, &str) =
    (libbpf_sys::BPF_FUNC_sk_storage_get, "bpf_sk_storage_get");
const AS_TCP: (libbpf_sys::bpf_func_id, &str) =
    (libbpf_sys::BPF_FUNC_skc_to_tcp_sock, "bpf_skc_to_tcp_sock");
const READ_KERNEL: (libbpf_sys::bpf_func_id, &str) =
    (libbpf_sys::BPF_FUNC_probe_read_kernel, "bpf_probe_read_kernel");

const fn sock_addr(
    program: &'static str,
    helpers: &'static [(libbpf_sys::bpf_func_id, &'static str)],
) -> Hook {
    Hook {
        program,
        attach: Attach::Cgroup,
        kind: ProgramType::CgroupSockAddr,
        decides: false,
        helpers,
    }
}

/// The programs that decide where a connection or a datagram goes.
const fn decides(program: &'static str) -> Hook {
    Hook { decides: true, ..sock_addr(program, &[NETNS_COOKIE, STORAGE, READ_KERNEL]) }
}

/// All programs, in the order of attachment: first those that answer for a captured connection,
/// last those that capture one.
pub(crate) const HOOKS: &[Hook] = &[
    Hook {
        program: "sock_ops",
        attach: Attach::Cgroup,
        kind: ProgramType::SockOps,
        decides: false,
        helpers: &[
            NETNS_COOKIE,
            STORAGE,
            AS_TCP,
            (libbpf_sys::BPF_FUNC_sock_hash_update, "bpf_sock_hash_update"),
        ],
    },
    Hook {
        program: "getsockopt",
        attach: Attach::Cgroup,
        kind: ProgramType::CgroupSockopt,
        decides: false,
        helpers: &[NETNS_COOKIE, STORAGE],
    },
    Hook {
        program: "setsockopt",
        attach: Attach::Cgroup,
        kind: ProgramType::CgroupSockopt,
        decides: false,
        helpers: &[NETNS_COOKIE, READ_KERNEL],
    },
    Hook {
        program: "sock_release",
        attach: Attach::Cgroup,
        kind: ProgramType::CgroupSock,
        decides: false,
        helpers: &[STORAGE, READ_KERNEL],
    },
    sock_addr("getpeername4", &[STORAGE]),
    sock_addr("getpeername6", &[STORAGE]),
    sock_addr("getsockname4", &[STORAGE]),
    sock_addr("getsockname6", &[STORAGE]),
    sock_addr("recvmsg4", &[STORAGE]),
    sock_addr("recvmsg6", &[STORAGE]),
    decides("sendmsg4"),
    decides("sendmsg6"),
    decides("connect4"),
    decides("connect6"),
    Hook {
        program: "count_storages",
        attach: Attach::Nothing,
        kind: ProgramType::Tracing,
        decides: false,
        helpers: &[],
    },
    Hook {
        program: "count_storages_by_file",
        attach: Attach::Nothing,
        kind: ProgramType::Tracing,
        decides: false,
        helpers: &[],
    },
    Hook {
        program: "find_stale_peers",
        attach: Attach::Nothing,
        kind: ProgramType::Tracing,
        decides: false,
        helpers: &[],
    },
    Hook {
        program: "find_stale_peers_by_file",
        attach: Attach::Nothing,
        kind: ProgramType::Tracing,
        decides: false,
        helpers: &[],
    },
    Hook {
        program: "note_agent",
        attach: Attach::Nothing,
        kind: ProgramType::Syscall,
        decides: false,
        helpers: &[],
    },
    Hook {
        program: "find_listeners",
        attach: Attach::Nothing,
        kind: ProgramType::Tracing,
        decides: false,
        helpers: &[],
    },
    Hook {
        program: "find_listeners_by_file",
        attach: Attach::Nothing,
        kind: ProgramType::Tracing,
        decides: false,
        helpers: &[],
    },
    Hook {
        program: "sweep_splices",
        attach: Attach::Nothing,
        kind: ProgramType::Tracing,
        decides: false,
        helpers: &[],
    },
    Hook {
        program: "sweep_splices_by_file",
        attach: Attach::Nothing,
        kind: ProgramType::Tracing,
        decides: false,
        helpers: &[],
    },
    Hook {
        program: "drain_splices",
        attach: Attach::Nothing,
        kind: ProgramType::Tracing,
        decides: false,
        helpers: &[],
    },
    Hook {
        program: "drain_splices_by_file",
        attach: Attach::Nothing,
        kind: ProgramType::Tracing,
        decides: false,
        helpers: &[],
    },
    Hook {
        program: "wake_writers",
        attach: Attach::Nothing,
        kind: ProgramType::Tracing,
        decides: false,
        helpers: &[],
    },
    Hook {
        program: "redirect",
        attach: Attach::Sockets,
        kind: ProgramType::SkMsg,
        decides: false,
        helpers: &[
            STORAGE,
            READ_KERNEL,
            AS_TCP,
            (libbpf_sys::BPF_FUNC_msg_redirect_hash, "bpf_msg_redirect_hash"),
        ],
    },
    Hook {
        program: "dns_nat",
        attach: Attach::Devices,
        kind: ProgramType::SchedCls,
        decides: false,
        helpers: &[STORAGE, (libbpf_sys::BPF_FUNC_sk_lookup_udp, "bpf_sk_lookup_udp")],
    },
    Hook {
        program: "reset",
        attach: Attach::Devices,
        kind: ProgramType::SchedCls,
        decides: false,
        helpers: &[STORAGE],
    },
    Hook {
        program: "note_dialled",
        attach: Attach::DevicesIn,
        kind: ProgramType::SchedCls,
        decides: false,
        helpers: &[(libbpf_sys::BPF_FUNC_skb_load_bytes_relative, "bpf_skb_load_bytes_relative")],
    },
    Hook {
        program: "steer",
        attach: Attach::Netns,
        kind: ProgramType::SkLookup,
        decides: false,
        helpers: &[(libbpf_sys::BPF_FUNC_sk_assign, "bpf_sk_assign")],
    },
];

/// The map types that the programs use.
pub(crate) const MAP_TYPES: &[(MapType, &str)] = &[
    (MapType::Hash, "hash"),
    (MapType::LruHash, "lru_hash"),
    (MapType::LpmTrie, "lpm_trie"),
    (MapType::SkStorage, "sk_storage"),
    (MapType::Sockhash, "sockhash"),
    (MapType::Array, "array"),
    (MapType::PercpuArray, "percpu_array"),
    (MapType::RingBuf, "ringbuf"),
];

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, mem::MaybeUninit};

    use libbpf_rs::skel::{OpenSkel, SkelBuilder};

    use super::{
        super::skel::{inbound::InboundSkelBuilder, sidestep::SidestepSkelBuilder},
        *,
    };

    #[test]
    fn every_program_has_its_row_and_every_row_its_program() {
        let mut storage = MaybeUninit::uninit();
        let node = SidestepSkelBuilder::default().open(&mut storage).expect("opens");
        let mut storage = MaybeUninit::uninit();
        let pod = InboundSkelBuilder::default().open(&mut storage).expect("opens");
        let programs = |object: &libbpf_rs::OpenObject| -> BTreeSet<String> {
            object.progs().map(|p| p.name().to_string_lossy().into_owned()).collect()
        };
        let rows = |netns: bool| -> BTreeSet<String> {
            let of_pod = |attach| matches!(attach, Attach::Netns | Attach::DevicesIn);
            let hooks = HOOKS.iter().filter(|hook| of_pod(hook.attach) == netns);
            hooks.map(|hook| hook.program.to_owned()).collect()
        };
        assert_eq!(programs(node.open_object()), rows(false));
        assert_eq!(programs(pod.open_object()), rows(true));
    }
}
