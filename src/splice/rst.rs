//! Sends the resets that TCP itself did not send: for connections that were shut down, and then
//! closed with unread bytes that TCP does not know about. bpf/splice/rst.h reports them.

use std::net::SocketAddr;

use anyhow::{Context, Result, bail};
use etherparse::TcpHeader;
use socket2::{Domain, Protocol, Socket, Type};

/// A reset, as the closed end would have sent it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reset {
    /// The closed end.
    pub from: SocketAddr,
    /// The other end, which receives the reset.
    pub to: SocketAddr,
    /// The next sequence number of the closed end.
    pub sent: u32,
    /// The next sequence number that the closed end expected.
    pub received: u32,
}

impl Reset {
    /// Sends the reset, in the calling thread's network namespace.
    ///
    /// # Errors
    /// If the kernel refuses: it takes CAP_NET_RAW.
    pub fn send(&self) -> Result<()> {
        let Self { from, to, .. } = self;
        self.try_send().with_context(|| format!("cannot send a reset to {to} on behalf of {from}"))
    }

    fn try_send(&self) -> Result<()> {
        let packet = self.packet()?;
        let domain = Domain::for_address(self.from);
        let raw = Socket::new(domain, Type::RAW, Some(Protocol::TCP))?;
        // The addresses of captured connections are local only by a route.
        if domain == Domain::IPV4 {
            raw.set_freebind_v4(true)?;
        } else {
            raw.set_freebind_v6(true)?;
        }
        // The kernel reads a port in a raw socket's address as a protocol.
        let [from, to] = [self.from.ip(), self.to.ip()].map(|ip| SocketAddr::new(ip, 0));
        raw.bind(&from.into())?;
        raw.send_to(&packet, &to.into())?;
        Ok(())
    }

    /// A TCP header without data.
    fn packet(&self) -> Result<Vec<u8>> {
        let mut header = TcpHeader::new(self.from.port(), self.to.port(), self.sent, 0);
        header.rst = true;
        header.ack = true;
        header.acknowledgment_number = self.received;
        header.checksum = match (self.from, self.to) {
            (SocketAddr::V4(from), SocketAddr::V4(to)) => {
                header.calc_checksum_ipv4_raw(from.ip().octets(), to.ip().octets(), &[])?
            }
            (SocketAddr::V6(from), SocketAddr::V6(to)) => {
                header.calc_checksum_ipv6_raw(from.ip().octets(), to.ip().octets(), &[])?
            }
            _ => bail!("its two addresses are of different families"),
        };
        Ok(header.to_bytes().to_vec())
    }
}
