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
    sys::socket::{MsgFlags, SockProtocol, recv},
};
use rtnetlink::packet_core::{NLM_F_ACK, NLM_F_REQUEST, NLMSG_ERROR, NetlinkBuffer};

use super::nlmsg;

// From linux/sock_diag.h and linux/inet_diag.h.
const SOCK_DESTROY: u16 = 21;
const INET_DIAG_NOCOOKIE: u64 = u64::MAX;

/// A socket's own address and its peer's, of one that is connected to `to` from the calling thread's
/// namespace. Nothing is sent.
///
/// # Errors
/// Where the kernel refuses to connect.
pub fn connect(to: SocketAddr) -> io::Result<(SocketAddr, SocketAddr)> {
    let socket = connected(to)?;
    Ok((socket.local_addr()?, socket.peer_addr()?))
}

fn connected(to: SocketAddr) -> io::Result<UdpSocket> {
    let any: IpAddr =
        if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0))?;
    socket.connect(to)?;
    Ok(socket)
}

/// Whether the kernel closes other processes' UDP sockets, tried with one of this process: a kernel
/// without `CONFIG_INET_UDP_DIAG` says of each that there is none, and one without
/// `CONFIG_INET_DIAG_DESTROY` that it does not.
///
/// # Errors
/// Where the kernel refuses, or there is no socket to be had.
pub fn can_close() -> Result<bool> {
    let socket =
        connected((Ipv4Addr::LOCALHOST, 1).into()).context("cannot connect to localhost")?;
    let (local, peer) = (socket.local_addr()?, socket.peer_addr()?);
    ConnectedUdp { cookie: INET_DIAG_NOCOOKIE, local, peer, device: 0 }.close()
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

impl ConnectedUdp {
    /// Closes the socket, which is in the calling thread's network namespace: its process gets
    /// ECONNABORTED from the next call, once, and the socket is connected to nothing. False: there is
    /// no such socket, it has another peer, or this kernel closes none (see [`can_close`]).
    ///
    /// # Errors
    /// Where the kernel refuses.
    pub fn close(&self) -> Result<bool> {
        let flags = NLM_F_REQUEST | NLM_F_ACK;
        let netlink =
            nlmsg::send(SockProtocol::NetlinkSockDiag, SOCK_DESTROY, flags, &self.request())?;
        let mut buffer = [0; 1024];
        let received = recv(netlink.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT)?;
        let answer = NetlinkBuffer::new_checked(&buffer[..received])?;
        let code = answer.payload().first_chunk().filter(|_| answer.message_type() == NLMSG_ERROR);
        let code = i32::from_ne_bytes(*code.context("the kernel gave no answer")?);
        match Errno::from_raw(code.wrapping_neg()) {
            _ if code == 0 => Ok(true),
            Errno::ENOENT | Errno::EOPNOTSUPP => Ok(false),
            errno => bail!(io::Error::from(errno)),
        }
    }

    /// `struct inet_diag_req_v2`. The kernel finds an IPv4 peer by IPv4, whatever the socket's family.
    fn request(&self) -> Vec<u8> {
        let family = if self.peer.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
        let mut request = vec![family as u8, libc::IPPROTO_UDP as u8, 0, 0];
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
