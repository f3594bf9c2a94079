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
    sys::socket::{MsgFlags, SockProtocol, recv},
};
use rtnetlink::packet_core::{
    NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NLMSG_DONE, NLMSG_ERROR, NetlinkBuffer,
    NlasIterator,
};

use super::nlmsg;

/// Whoever translates needs the kernel to keep track of connections: where it does not, nobody does,
/// and nothing is asked that would load a module.
const CONNTRACK: &str = "/proc/sys/net/netfilter/nf_conntrack_max";
/// The tables of iptables' older kind that are in use, a name on each line.
pub(super) const TABLES: [&str; 2] =
    ["/proc/thread-self/net/ip_tables_names", "/proc/thread-self/net/ip6_tables_names"];

// From linux/netfilter/nfnetlink.h and linux/netfilter/nf_tables.h.
pub(super) const NFT_MSG_NEWCHAIN: u16 = (10 << 8) | 3;
pub(super) const NFT_MSG_GETCHAIN: u16 = (10 << 8) | 4;
pub(super) const NFTA_CHAIN_HOOK: u16 = 4;
const NFTA_CHAIN_USE: u16 = 6;
pub(super) const NFTA_CHAIN_TYPE: u16 = 7;
pub(super) const NFTA_HOOK_HOOKNUM: u16 = 1;
pub(super) const NF_INET_PRE_ROUTING: u32 = 0;
pub(super) const NF_INET_LOCAL_OUT: u32 = 3;
/// The length of `struct nfgenmsg`; of zeros: all families.
const FAMILY: usize = 4;

/// The direction whose addresses are translated.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Nat {
    /// Incoming connections.
    pub inbound: bool,
    /// Outgoing connections of the namespace's own processes.
    pub outbound: bool,
}

/// What rules of the calling thread's namespace translate: iptables' of either kind, or nftables'. A
/// table of iptables' older kind counts as both, though it is empty.
///
/// # Errors
/// If the kernel does not tell.
pub fn nat() -> Result<Nat> {
    if !tracks() {
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

/// Whether the kernel keeps track of connections at all.
pub(super) fn tracks() -> bool {
    Path::new(CONNTRACK).exists()
}

fn chains_translate() -> Result<Nat> {
    // Chains that come or go meanwhile are seen next time.
    Ok(translates(&dump_once(NFT_MSG_GETCHAIN)?.messages))
}

fn translates(messages: &[Message]) -> Nat {
    let mut found = Nat::default();
    for chain in messages.iter().filter(|message| message.kind == NFT_MSG_NEWCHAIN) {
        match hook_of_nat(&chain.payload) {
            Some(NF_INET_PRE_ROUTING) => found.inbound = true,
            Some(NF_INET_LOCAL_OUT) => found.outbound = true,
            _ => {}
        }
    }
    found
}

/// A message of nftables.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Message {
    /// What it is about.
    pub kind: u16,
    /// The family of its table.
    pub family: u8,
    /// Its attributes.
    pub payload: Vec<u8>,
}

/// The kernel's answer.
#[derive(Debug, Default, PartialEq, Eq)]
struct Dump {
    messages: Vec<Message>,
    /// The rules changed meanwhile: some may be missing.
    is_torn: bool,
}

/// All that nftables has of a kind, in the calling thread's namespace; `None` if it changed
/// meanwhile.
pub(super) fn dump(what: u16) -> Result<Option<Vec<Message>>> {
    let dump = dump_once(what).context("cannot read the rules of nftables")?;
    Ok((!dump.is_torn).then_some(dump.messages))
}

fn dump_once(what: u16) -> Result<Dump> {
    let (protocol, dump) = (SockProtocol::NetlinkNetFilter, NLM_F_REQUEST | NLM_F_DUMP);
    let socket = match nlmsg::send(protocol, what, dump, &[0; FAMILY]) {
        Err(Errno::EPROTONOSUPPORT) => return Ok(Dump::default()),
        socket => socket?,
    };
    let mut buffer = vec![0; 32 << 10];
    let mut found = Dump::default();
    loop {
        let received = recv(socket.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT)?;
        if read_answer(&buffer[..received], &mut found)? {
            return Ok(found);
        }
    }
}

/// A part of the kernel's answer. Says whether it was the last one.
fn read_answer(mut bytes: &[u8], found: &mut Dump) -> Result<bool> {
    while !bytes.is_empty() {
        let header = NetlinkBuffer::new_checked(bytes)?;
        found.is_torn |= header.flags() & NLM_F_DUMP_INTR != 0;
        let message = header.payload();
        match header.message_type() {
            NLMSG_DONE => return Ok(true),
            NLMSG_ERROR => {
                let code = message.first_chunk().map_or(0, |code| i32::from_ne_bytes(*code));
                match code.wrapping_neg() {
                    // It has no nftables.
                    libc::EINVAL | libc::EOPNOTSUPP => return Ok(true),
                    errno => bail!(io::Error::from_raw_os_error(errno)),
                }
            }
            kind => {
                let payload = message.get(FAMILY..).unwrap_or_default().to_vec();
                let family = message.first().copied().unwrap_or_default();
                found.messages.push(Message { kind, family, payload });
            }
        }
        let len = (header.length() as usize).next_multiple_of(4);
        bytes = bytes.get(len..).unwrap_or_default();
    }
    Ok(false)
}

/// Where a chain, given as its attributes, translates: it is hooked there, and has rules.
fn hook_of_nat(chain: &[u8]) -> Option<u32> {
    let chain = attributes(chain);
    let hook = chain.get(&NFTA_CHAIN_HOOK).map(|hook| attributes(hook)).unwrap_or_default();
    let is_nat = chain.get(&NFTA_CHAIN_TYPE).is_some_and(|name| name.starts_with(b"nat\0"));
    let has_rules = number(chain.get(&NFTA_CHAIN_USE)) != Some(0);
    number(hook.get(&NFTA_HOOK_HOOKNUM)).filter(|_| is_nat && has_rules)
}

/// The number in an attribute.
pub(super) fn number(value: Option<&Vec<u8>>) -> Option<u32> {
    Some(u32::from_be_bytes(value?.first_chunk().copied()?))
}

/// Attributes by their numbers.
pub(super) fn attributes(bytes: &[u8]) -> BTreeMap<u16, Vec<u8>> {
    list(bytes).collect()
}

/// Attributes in their order, several of which may have one number.
pub(super) fn list(bytes: &[u8]) -> impl Iterator<Item = (u16, Vec<u8>)> {
    let all = NlasIterator::new(bytes).map_while(Result::ok);
    all.map(|one| (one.kind(), one.value().to_vec()))
}

#[cfg(test)]
mod tests {
    use super::{super::nlmsg::HEADER, *};

    const NESTED: u16 = 1 << 15;

    fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
        let mut bytes = (4 + value.len() as u16).to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    fn message(kind: u16, payload: &[u8]) -> Vec<u8> {
        let mut bytes = ((HEADER + payload.len()) as u32).to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.resize(HEADER, 0);
        bytes.extend(payload);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    fn chain(of: &[u8], hook: u32, rules: u32) -> Vec<u8> {
        let hook = attribute(NFTA_HOOK_HOOKNUM, &hook.to_be_bytes());
        let attributes = [
            attribute(3, b"a chain\0"),
            attribute(NFTA_CHAIN_HOOK | NESTED, &hook),
            attribute(NFTA_CHAIN_USE, &rules.to_be_bytes()),
            attribute(NFTA_CHAIN_TYPE, of),
        ];
        message(NFT_MSG_NEWCHAIN, &[vec![2, 0, 0, 0], attributes.concat()].concat())
    }

    fn read(bytes: &[u8]) -> Result<(Nat, bool)> {
        let mut dump = Dump::default();
        let is_last = read_answer(bytes, &mut dump)?;
        Ok((translates(&dump.messages), is_last))
    }

    #[test]
    fn chains_that_translate() {
        let (inbound, outbound) = (NF_INET_PRE_ROUTING, NF_INET_LOCAL_OUT);
        let done = message(NLMSG_DONE, &[0; 4]);
        let nat = |inbound, outbound| Nat { inbound, outbound };
        let rows = [
            (vec![], nat(false, false)),
            (chain(b"nat\0", inbound, 1), nat(true, false)),
            (chain(b"nat\0", outbound, 2), nat(false, true)),
            ([chain(b"nat\0", inbound, 1), chain(b"nat\0", outbound, 1)].concat(), nat(true, true)),
            // No rules; where it translates the source alone; not a chain that translates.
            (chain(b"nat\0", inbound, 0), nat(false, false)),
            (chain(b"nat\0", 4, 1), nat(false, false)),
            (chain(b"filter\0", inbound, 1), nat(false, false)),
            (chain(b"nat", inbound, 1), nat(false, false)),
            (chain(b"nat64\0", inbound, 1), nat(false, false)),
            (chain(b"", inbound, 1), nat(false, false)),
            // Some other message comes first.
            ([message(7, b"odd"), chain(b"nat\0", inbound, 1)].concat(), nat(true, false)),
        ];
        for (bytes, found) in rows {
            assert_eq!(read(&bytes).expect("read"), (found, false), "{bytes:x?}");
            let all = [bytes, done.clone(), chain(b"nat\0", inbound, 1)].concat();
            assert_eq!(
                read(&all).expect("read"),
                (found, true),
                "what is behind the end: {all:x?}"
            );
        }
    }

    /// A chain that is in no hook, as those that rules jump to, and attributes that make no sense.
    #[test]
    fn attributes_that_are_missing_or_cut() {
        let chain =
            |attributes: &[u8]| message(NFT_MSG_NEWCHAIN, &[&[0; FAMILY], attributes].concat());
        let hook = attribute(NFTA_HOOK_HOOKNUM, &[0; 4]);
        let short = attribute(NFTA_HOOK_HOOKNUM, &[0; 3]);
        let nat = attribute(NFTA_CHAIN_TYPE, b"nat\0");
        for attributes in [
            vec![],
            nat.clone(),
            attribute(NFTA_CHAIN_HOOK, &hook),
            [attribute(NFTA_CHAIN_HOOK, &[]), nat.clone()].concat(),
            [attribute(NFTA_CHAIN_HOOK, &short), nat.clone()].concat(),
            [attribute(NFTA_CHAIN_HOOK, &hook[..6]), nat.clone()].concat(),
            [vec![0xff; 3], nat.clone()].concat(),
            [vec![0; 4], nat].concat(),
        ] {
            assert_eq!(read(&chain(&attributes)).expect("read"), (Nat::default(), false));
        }
        assert_eq!(read(&message(NFT_MSG_NEWCHAIN, &[0; 2])).expect("read"), Default::default());
    }

    #[test]
    fn an_answer_that_is_cut_or_lies_ends_in_an_error_or_nothing() {
        let whole = chain(b"nat\0", NF_INET_PRE_ROUTING, 1);
        for end in 1..whole.len() {
            assert!(read(&whole[..end]).is_err(), "{end} bytes");
        }
        for length in [0u32, 1, HEADER as u32 - 1, whole.len() as u32 + 4, u32::MAX] {
            let mut bytes = whole.clone();
            bytes[..4].copy_from_slice(&length.to_ne_bytes());
            assert!(read(&bytes).is_err(), "a length of {length}");
        }
        // Whatever one byte is changed to, it comes to an end.
        for at in 0..whole.len() {
            for value in [0, 1, 0x7f, 0x80, 0xff] {
                let mut bytes = whole.clone();
                bytes[at] = value;
                let _ = read(&bytes);
            }
        }
    }

    #[test]
    fn what_the_kernel_refuses() {
        let refused = |code: i32| read(&message(NLMSG_ERROR, &code.to_ne_bytes()));
        for errno in [libc::EINVAL, libc::EOPNOTSUPP] {
            assert_eq!(refused(-errno).expect("it has no nftables"), (Nat::default(), true));
        }
        let error = refused(-libc::EPERM).expect_err("not allowed");
        assert!(format!("{error:#}").contains("not permitted"), "{error:#}");
        assert!(refused(i32::MIN).is_err());
        assert!(read(&message(NLMSG_ERROR, &[])).is_err());
    }
}
