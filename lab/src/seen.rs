//! What a server saw of one connection, as a line of text.

use std::collections::HashMap;
use std::fmt::{self, Display, Formatter};
use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::str::FromStr;

use anyhow::{Context, Error, Result};
use nix::errno::Errno;
use nix::sys::socket::sockopt::{Ip6tOriginalDst, OriginalDst};
use nix::sys::socket::{SockaddrIn, SockaddrIn6, getsockopt};

/// What a server saw of one connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// What the server calls itself, if anything.
    pub by: Option<String>,
    /// The client's address, from accept().
    pub peer: SocketAddr,
    /// The accepted socket's own address, from getsockname().
    pub local: SocketAddr,
    /// SO_ORIGINAL_DST of level 0, or the name of the error; only asked for by the fake proxy.
    pub orig: Option<Result<SocketAddr, String>>,
    /// SO_ORIGINAL_DST of level 41, or the name of the error; only asked for by the fake proxy.
    pub orig6: Option<Result<SocketAddr, String>>,
}

impl Seen {
    /// The original destination that the kernel told, by whichever of the two options.
    pub fn original(&self) -> Option<SocketAddr> {
        let told = |answer: &Option<Result<SocketAddr, String>>| answer.clone()?.ok();
        told(&self.orig).or_else(|| told(&self.orig6))
    }

    /// Asks the kernel for both original destinations of an accepted socket.
    pub(crate) fn ask_original(&mut self, socket: &impl AsFd) {
        let name = |err: Errno| format!("{err:?}");
        self.orig = Some(original4(socket).map_err(name));
        self.orig6 = Some(original6(socket).map_err(name));
    }

    /// Asks the kernel for the original destination that the accepted socket's own family has.
    pub(crate) fn insist_on_original(&mut self, socket: &impl AsFd) -> io::Result<()> {
        match self.local {
            SocketAddr::V4(_) => self.orig = Some(Ok(original4(socket)?)),
            SocketAddr::V6(_) => self.orig6 = Some(Ok(original6(socket)?)),
        }
        Ok(())
    }
}

fn original4(socket: &impl AsFd) -> Result<SocketAddr, Errno> {
    let address = getsockopt(socket, OriginalDst)?;
    Ok(SocketAddr::V4(SockaddrIn::from(address).into()))
}

fn original6(socket: &impl AsFd) -> Result<SocketAddr, Errno> {
    let address = getsockopt(socket, Ip6tOriginalDst)?;
    Ok(SocketAddr::V6(SockaddrIn6::from(address).into()))
}

/// `by=NAME orig=ADDR orig6=ERRNO peer=ADDR local=ADDR`, the first three only where there is one.
impl Display for Seen {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        if let Some(by) = &self.by {
            write!(f, "by={by} ")?;
        }
        for (key, answer) in [("orig", &self.orig), ("orig6", &self.orig6)] {
            match answer {
                Some(Ok(addr)) => write!(f, "{key}={addr} ")?,
                Some(Err(errno)) => write!(f, "{key}={errno} ")?,
                None => {}
            }
        }
        write!(f, "peer={} local={}", self.peer, self.local)
    }
}

impl FromStr for Seen {
    type Err = Error;

    fn from_str(line: &str) -> Result<Self> {
        let fields: HashMap<&str, &str> =
            line.split_whitespace().filter_map(|word| word.split_once('=')).collect();
        let addr = |key| {
            let text: &str = fields.get(key).with_context(|| format!("no {key} in {line:?}"))?;
            text.parse().with_context(|| format!("{key} in {line:?}"))
        };
        let answer = |key| fields.get(key).map(|text| text.parse().map_err(|_| (*text).to_owned()));
        Ok(Self {
            by: fields.get("by").map(|name| (*name).to_owned()),
            peer: addr("peer")?,
            local: addr("local")?,
            orig: answer("orig"),
            orig6: answer("orig6"),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_and_back() -> Result<()> {
        for line in [
            "peer=10.77.0.10:4000 local=[::ffff:10.77.0.11]:80",
            "orig=10.96.0.10:80 orig6=ENOENT peer=10.77.0.10:4000 local=10.77.0.11:15006",
            "by=inbound peer=10.77.0.10:4000 local=10.77.0.11:80",
            "orig=EOPNOTSUPP orig6=[fd77::b]:80 peer=[fd77::a]:4000 local=[fd77::b]:80",
        ] {
            assert_eq!(line.parse::<Seen>()?.to_string(), line);
        }
        assert!("peer=x local=y".parse::<Seen>().is_err());
        Ok(())
    }
}
