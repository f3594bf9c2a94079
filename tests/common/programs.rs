//! eBPF programs of others, an instruction at a time.

#![allow(unsafe_code, reason = "no safe wrapper loads instructions")]

use std::{
    fs::File,
    net::Ipv4Addr,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    path::Path,
};

use libbpf_rs::{
    MapHandle, MapType,
    libbpf_sys::{self, bpf_insn},
};

/// The opcode, source and destination registers in a digit each, offset and number.
fn instruction(code: u8, registers: u8, off: i16, imm: i32) -> bpf_insn {
    // SAFETY: plain integers, of which all values are valid.
    let mut one: bpf_insn = unsafe { std::mem::zeroed() };
    (one.code, one.off, one.imm) = (code, off, imm);
    one.set_dst_reg(registers & 15);
    one.set_src_reg(registers >> 4);
    one
}

fn load(
    kind: libbpf_sys::bpf_prog_type,
    attach: libbpf_sys::bpf_attach_type,
    code: &[bpf_insn],
) -> OwnedFd {
    let options = libbpf_sys::bpf_prog_load_opts {
        sz: size_of::<libbpf_sys::bpf_prog_load_opts>() as _,
        expected_attach_type: attach,
        ..Default::default()
    };
    // SAFETY: names, code and options live across the call, and the descriptor is new.
    unsafe {
        let program = libbpf_sys::bpf_prog_load(
            kind,
            c"another".as_ptr(),
            c"GPL".as_ptr(),
            code.as_ptr(),
            code.len() as _,
            (&raw const options).cast_mut(),
        );
        assert!(program >= 0, "a program: {program}");
        OwnedFd::from_raw_fd(program)
    }
}

/// A program at connect4 of a cgroup that translates one address into another, as Cilium's does
/// with a Service's; until it is dropped.
pub struct Translation {
    _link: OwnedFd,
}

impl Translation {
    pub fn attach(cgroup: &Path, from: Ipv4Addr, to: Ipv4Addr, flags: u32) -> Self {
        let number = |ip: Ipv4Addr| i32::from_ne_bytes(ip.octets());
        let user_ip4 = 4; // in struct bpf_sock_addr
        let code = [
            instruction(0x61, 0x12, user_ip4, 0),     // r2 = r1->user_ip4
            instruction(0x56, 0x02, 2, number(from)), // if (r2 != from) skip two
            instruction(0xb4, 0x02, 0, number(to)),   // r2 = to
            instruction(0x63, 0x21, user_ip4, 0),     // r1->user_ip4 = r2
            instruction(0xb7, 0x00, 0, 1),            // r0 = 1
            instruction(0x95, 0x00, 0, 0),            // return r0
        ];
        let kind = libbpf_sys::BPF_CGROUP_INET4_CONNECT;
        let program = load(libbpf_sys::BPF_PROG_TYPE_CGROUP_SOCK_ADDR, kind, &code);
        let cgroup = File::open(cgroup).expect("a cgroup");
        let options = libbpf_sys::bpf_link_create_opts {
            sz: size_of::<libbpf_sys::bpf_link_create_opts>() as _,
            flags,
            ..Default::default()
        };
        let (program, cgroup) = (program.as_raw_fd(), cgroup.as_raw_fd());
        // SAFETY: the options live across the call, and the descriptor is new.
        unsafe {
            let link = libbpf_sys::bpf_link_create(program, cgroup, kind, &raw const options);
            assert!(link >= 0, "a link: {link}");
            Self { _link: OwnedFd::from_raw_fd(link) }
        }
    }
}

/// A sockmap whose program lets every message pass.
pub fn sockmap() -> MapHandle {
    let options = libbpf_sys::bpf_map_create_opts {
        sz: size_of::<libbpf_sys::bpf_map_create_opts>() as _,
        ..Default::default()
    };
    let map = MapHandle::create(MapType::Sockhash, Some("another"), 4, 4, 16, &options);
    let map = map.expect("a sockmap");
    let code = [instruction(0xb7, 0x00, 0, 1), instruction(0x95, 0x00, 0, 0)]; // return SK_PASS
    let kind = libbpf_sys::BPF_SK_MSG_VERDICT;
    let program = load(libbpf_sys::BPF_PROG_TYPE_SK_MSG, kind, &code);
    let map_fd = std::os::fd::AsFd::as_fd(&map).as_raw_fd();
    // SAFETY: both descriptors are open.
    let rc = unsafe { libbpf_sys::bpf_prog_attach(program.as_raw_fd(), map_fd, kind, 0) };
    assert_eq!(rc, 0, "its program is attached");
    map
}
