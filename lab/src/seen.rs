//! What a server saw of one connection, as a line of text.

use std::collections::HashMap;
use std::fmt::{self, Display, Formatter};
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
        self.orig = Some(
            getsockopt(socket, OriginalDst)
                .map(|addr| SocketAddr::V4(SockaddrIn::from(addr).into()))
                .map_err(name),
        );
        self.orig6 = Some(
            getsockopt(socket, Ip6tOriginalDst)
                .map(|addr| SocketAddr::V6(SockaddrIn6::from(addr).into()))
                .map_err(name),
        );
    }
}

/// `orig=ADDR orig6=ERRNO peer=ADDR local=ADDR`, the first two only where asked for.
impl Display for Seen {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
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
            "orig=EOPNOTSUPP orig6=[fd77::b]:80 peer=[fd77::a]:4000 local=[fd77::b]:80",
        ] {
            assert_eq!(line.parse::<Seen>()?.to_string(), line);
        }
        assert!("peer=x local=y".parse::<Seen>().is_err());
        Ok(())
    }
}
