//! Requests to the kernel by netlink, of the kinds that the netlink crates do not cover.

use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, sendto, socket,
};

/// The length of `struct nlmsghdr`.
pub const HEADER: usize = 16;

/// Sends one request. Returns the socket on which the kernel answers.
///
/// # Errors
/// EPROTONOSUPPORT where the kernel lacks the protocol.
pub fn send(protocol: SockProtocol, kind: u16, flags: u16, body: &[u8]) -> nix::Result<OwnedFd> {
    let socket = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol)?;
    let mut request = ((HEADER + body.len()) as u32).to_ne_bytes().to_vec();
    request.extend(kind.to_ne_bytes());
    request.extend(flags.to_ne_bytes());
    request.resize(HEADER, 0); // the sequence number and the sender's port, which the kernel fills
    request.extend(body);
    sendto(socket.as_raw_fd(), &request, &NetlinkAddr::new(0, 0), MsgFlags::empty())?;
    Ok(socket)
}
