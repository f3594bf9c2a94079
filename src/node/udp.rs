//! Connected UDP sockets: which addresses one would have, and closing another process' as `ss --kill`
//! does.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    os::fd::AsRawFd,
};

use anyhow::{Context, Result, bail};
use nix::{
    errno::Errno,
    sys::socket::{
        AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto,
        socket,
    },
};
use rtnetlink::packet_core::{NLM_F_ACK, NLM_F_REQUEST, NLMSG_ERROR, NetlinkBuffer};

// From linux/sock_diag.h.
const SOCK_DESTROY: u16 = 21;
/// The length of `struct nlmsghdr` with `struct inet_diag_req_v2`.
const REQUEST: u32 = 16 + 56;

/// A socket's own address and its peer's, of one that is connected to `to` from the calling thread's
/// namespace. Nothing is sent.
///
/// # Errors
/// Where the kernel refuses to connect.
pub fn connect(to: SocketAddr) -> io::Result<(SocketAddr, SocketAddr)> {
    let any: IpAddr =
        if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0))?;
    socket.connect(to)?;
    Ok((socket.local_addr()?, socket.peer_addr()?))
}

/// A connected UDP socket, as the kernel finds it: one that has been connected elsewhere meanwhile,
/// or another at the same addresses, is not it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConnectedUdp {
    /// The kernel's identity of the socket.
    pub cookie: u64,
    /// Its own address and port.
    pub local: SocketAddr,
    /// What it is connected to.
    pub peer: SocketAddr,
    /// The index of the network device that it is bound to; 0: to none.
    pub device: u32,
}

/// What became of a socket that was to be closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Closed {
    /// Its process gets ECONNABORTED from the next call, once, and the socket is connected to
    /// nothing.
    Now,
    /// There is no such socket, or it has another peer.
    Gone,
    /// The kernel closes no sockets of others: it was built without `CONFIG_INET_DIAG_DESTROY`.
    Never,
}

impl ConnectedUdp {
    /// Closes the socket, which is in the calling thread's network namespace.
    ///
    /// # Errors
    /// Where the kernel refuses.
    pub fn close(&self) -> Result<Closed> {
        let flags = SockFlag::SOCK_CLOEXEC;
        let netlink = SockProtocol::NetlinkSockDiag;
        let netlink = socket(AddressFamily::Netlink, SockType::Raw, flags, netlink)
            .context("cannot open a socket of NETLINK_SOCK_DIAG")?;
        let kernel = NetlinkAddr::new(0, 0);
        sendto(netlink.as_raw_fd(), &self.request(), &kernel, MsgFlags::empty())?;
        let mut buffer = [0; 1024];
        let received = recv(netlink.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT)?;
        let answer = NetlinkBuffer::new_checked(&buffer[..received])?;
        let code = answer.payload().first_chunk().filter(|_| answer.message_type() == NLMSG_ERROR);
        let code = i32::from_ne_bytes(*code.context("the kernel gave no answer")?);
        match Errno::from_raw(code.wrapping_neg()) {
            _ if code == 0 => Ok(Closed::Now),
            Errno::ENOENT => Ok(Closed::Gone),
            Errno::EOPNOTSUPP => Ok(Closed::Never),
            errno => bail!(io::Error::from(errno)),
        }
    }

    /// The kernel finds an IPv4 peer by IPv4, whatever the socket's family.
    fn request(&self) -> Vec<u8> {
        let family = if self.peer.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
        let mut request = REQUEST.to_ne_bytes().to_vec();
        request.extend(SOCK_DESTROY.to_ne_bytes());
        request.extend((NLM_F_REQUEST | NLM_F_ACK).to_ne_bytes());
        request.extend([0; 8]); // any number, from whoever
        request.extend([family as u8, libc::IPPROTO_UDP as u8, 0, 0]);
        request.extend(u32::MAX.to_ne_bytes()); // in any state
        request.extend(self.local.port().to_be_bytes());
        request.extend(self.peer.port().to_be_bytes());
        for address in [self.local.ip(), self.peer.ip()] {
            match address {
                IpAddr::V4(v4) => request.extend([&v4.octets()[..], &[0; 12]].concat()),
                IpAddr::V6(v6) => request.extend(v6.octets()),
            }
        }
        request.extend(self.device.to_ne_bytes());
        request.extend((self.cookie as u32).to_ne_bytes());
        request.extend(((self.cookie >> 32) as u32).to_ne_bytes());
        request
    }
}
