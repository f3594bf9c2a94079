//! Reads iptables' older tables, which the kernel shows by getsockopt() alone. No libbpf: it is here
//! because no safe wrapper hands the kernel the name of a table.

use std::{
    io,
    os::fd::{AsRawFd, RawFd},
};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

// From linux/netfilter_ipv4/ip_tables.h; ip6_tables.h has the same at the level of IPv6.
const GET_INFO: i32 = 64;
const GET_ENTRIES: i32 = 65;
/// The length of `struct ipt_getinfo`, and where it has the length of all entries.
const INFO: usize = 84;
const SIZE: usize = 80;
/// The length of a table's name, and of `struct ipt_get_entries` without the entries.
const NAME: usize = 32;
const HEAD: usize = 40;

/// See [`crate::node::ruleset::ReadLegacy`]. The table `nat` of the calling thread's namespace.
///
/// # Errors
/// If the kernel does not show it, also because it has changed meanwhile.
pub fn read_legacy_nat(v6: bool) -> io::Result<(Vec<u8>, Vec<u8>)> {
    let (family, level) = if v6 {
        (AddressFamily::Inet6, libc::IPPROTO_IPV6)
    } else {
        (AddressFamily::Inet, libc::IPPROTO_IP)
    };
    let raw = SockType::Raw;
    let protocol = nix::sys::socket::SockProtocol::Raw;
    let socket = socket(family, raw, SockFlag::SOCK_CLOEXEC, protocol)?;
    let mut info = vec![0; INFO];
    info[..3].copy_from_slice(b"nat");
    ask(socket.as_raw_fd(), level, GET_INFO, &mut info)?;
    let size = info[SIZE..].first_chunk().map_or(0, |size| u32::from_ne_bytes(*size));
    let mut entries = vec![0; HEAD + size as usize];
    entries[..3].copy_from_slice(b"nat");
    entries[NAME..NAME + 4].copy_from_slice(&size.to_ne_bytes());
    ask(socket.as_raw_fd(), level, GET_ENTRIES, &mut entries)?;
    Ok((info, entries))
}

/// Hands the kernel a buffer, which it reads and fills.
fn ask(socket: RawFd, level: i32, option: i32, buffer: &mut [u8]) -> io::Result<()> {
    let mut len = buffer.len() as libc::socklen_t;
    // SAFETY: the kernel reads and writes at most `len` bytes of the buffer, which is that long and
    // lives across the call.
    let rc = unsafe {
        libc::getsockopt(socket, level, option, buffer.as_mut_ptr().cast(), &raw mut len)
    };
    if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
