//! Whether a network namespace has rules of its own that translate addresses: asked of the kernel, for
//! the calling thread's namespace.

use std::{
    collections::BTreeMap,
    fs,
    io::{self, ErrorKind},
    os::fd::AsRawFd,
    path::Path,
};

use anyhow::{Context, Result, bail};
use nix::{
    errno::Errno,
    sys::socket::{
        AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto,
        socket,
    },
};
use rtnetlink::packet_core::{
    NLM_F_DUMP, NLM_F_REQUEST, NLMSG_DONE, NLMSG_ERROR, NetlinkBuffer, NlasIterator,
};

/// Whoever translates needs the kernel to keep track of connections: where it does not, nobody does,
/// and nothing is asked that would load a module.
const CONNTRACK: &str = "/proc/sys/net/netfilter/nf_conntrack_max";
/// The tables of iptables' older kind that are in use, a name on each line.
const TABLES: [&str; 2] =
    ["/proc/thread-self/net/ip_tables_names", "/proc/thread-self/net/ip6_tables_names"];

// From linux/netfilter/nfnetlink.h and linux/netfilter/nf_tables.h.
const NFT_MSG_NEWCHAIN: u16 = (10 << 8) | 3;
const NFT_MSG_GETCHAIN: u16 = (10 << 8) | 4;
const NFTA_CHAIN_HOOK: u16 = 4;
const NFTA_CHAIN_USE: u16 = 6;
const NFTA_CHAIN_TYPE: u16 = 7;
const NFTA_HOOK_HOOKNUM: u16 = 1;
const NF_INET_PRE_ROUTING: u32 = 0;
const NF_INET_LOCAL_OUT: u32 = 3;
/// The length of `struct nlmsghdr`.
const HEADER: usize = 16;
/// The length of `struct nfgenmsg`.
const FAMILY: usize = 4;

/// What is translated.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Nat {
    /// Connections that come in.
    pub inbound: bool,
    /// Connections that the namespace's own processes make.
    pub outbound: bool,
}

/// What rules of the calling thread's namespace translate: iptables' of either kind, or nftables'. A
/// table of iptables' older kind counts as both, though it is empty.
///
/// # Errors
/// Where the kernel does not tell.
pub fn nat() -> Result<Nat> {
    if !Path::new(CONNTRACK).exists() {
        return Ok(Nat::default());
    }
    for path in TABLES {
        match fs::read_to_string(path) {
            Ok(tables) if tables.lines().any(|table| table == "nat") => {
                return Ok(Nat { inbound: true, outbound: true });
            }
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(error).with_context(|| format!("cannot read {path}")),
        }
    }
    chains_translate().context("cannot read the chains of nftables")
}

fn chains_translate() -> Result<Nat> {
    let protocol = SockProtocol::NetlinkNetFilter;
    let socket =
        match socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol) {
            Err(Errno::EPROTONOSUPPORT) => return Ok(Nat::default()),
            socket => socket?,
        };
    let mut request = ((HEADER + FAMILY) as u32).to_ne_bytes().to_vec();
    request.extend(NFT_MSG_GETCHAIN.to_ne_bytes());
    request.extend((NLM_F_REQUEST | NLM_F_DUMP).to_ne_bytes());
    request.resize(HEADER + FAMILY, 0); // any number, from whoever, of all families
    let kernel = NetlinkAddr::new(0, 0);
    sendto(socket.as_raw_fd(), &request, &kernel, MsgFlags::empty())?;
    let mut buffer = vec![0; 32 << 10];
    let mut found = Nat::default();
    loop {
        let received = recv(socket.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT)?;
        let mut rest = &buffer[..received];
        while !rest.is_empty() {
            let header = NetlinkBuffer::new_checked(rest)?;
            let message = header.payload();
            match header.message_type() {
                NLMSG_DONE => return Ok(found),
                NLMSG_ERROR => {
                    let code = message.first_chunk().map_or(0, |code| i32::from_ne_bytes(*code));
                    match -code {
                        // It has no nftables.
                        libc::EINVAL | libc::EOPNOTSUPP => return Ok(Nat::default()),
                        errno => bail!(io::Error::from_raw_os_error(errno)),
                    }
                }
                NFT_MSG_NEWCHAIN => {
                    let chain = message.get(FAMILY..).unwrap_or_default();
                    match hook_of_nat(chain) {
                        Some(NF_INET_PRE_ROUTING) => found.inbound = true,
                        Some(NF_INET_LOCAL_OUT) => found.outbound = true,
                        _ => {}
                    }
                }
                _ => {}
            }
            let len = (header.length() as usize).next_multiple_of(4);
            rest = rest.get(len..).unwrap_or_default();
        }
    }
}

/// Where a chain, given as its attributes, translates: it is hooked there, and has rules.
fn hook_of_nat(chain: &[u8]) -> Option<u32> {
    let chain = attributes(chain);
    let hook = chain.get(&NFTA_CHAIN_HOOK).map(|hook| attributes(hook)).unwrap_or_default();
    let number = |value: Option<&Vec<u8>>| Some(u32::from_be_bytes(value?.first_chunk().copied()?));
    let is_nat = chain.get(&NFTA_CHAIN_TYPE).is_some_and(|name| name.starts_with(b"nat\0"));
    let has_rules = number(chain.get(&NFTA_CHAIN_USE)) != Some(0);
    number(hook.get(&NFTA_HOOK_HOOKNUM)).filter(|_| is_nat && has_rules)
}

fn attributes(bytes: &[u8]) -> BTreeMap<u16, Vec<u8>> {
    let all = NlasIterator::new(bytes).map_while(Result::ok);
    all.map(|one| (one.kind(), one.value().to_vec())).collect()
}
