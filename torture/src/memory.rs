//! What the kernel's TCP holds.

use std::fs;

use anyhow::{Context, Result};

/// Bytes that all TCP sockets of the machine are charged for.
pub fn tcp() -> Result<u64> {
    let text = fs::read_to_string("/proc/net/sockstat").context("reading sockstat")?;
    let pages =
        value(&text, "TCP:", "mem").with_context(|| format!("no TCP memory in {text:?}"))?;
    Ok(pages * 4096)
}

/// TCP sockets of the calling thread's network namespace, those in TIME_WAIT aside.
pub fn sockets() -> Result<u64> {
    let text = fs::read_to_string("/proc/thread-self/net/sockstat").context("reading sockstat")?;
    let text6 =
        fs::read_to_string("/proc/thread-self/net/sockstat6").context("reading sockstat6")?;
    let inuse = value(&text, "TCP:", "inuse").zip(value(&text6, "TCP6:", "inuse"));
    inuse.map(|(v4, v6)| v4 + v6).with_context(|| format!("no TCP sockets in {text:?}, {text6:?}"))
}

fn value(text: &str, protocol: &str, name: &str) -> Option<u64> {
    let line = text.lines().find(|line| line.starts_with(protocol))?;
    let mut words = line.split_whitespace().skip_while(|word| *word != name).skip(1);
    words.next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    #[test]
    fn sockstat() {
        let text = "sockets: used 12\nTCP: inuse 1 orphan 0 tw 0 alloc 1 mem 3\nUDP: mem 9\n";
        assert_eq!(super::value(text, "TCP:", "mem"), Some(3));
        assert_eq!(super::value(text, "TCP:", "inuse"), Some(1));
        assert_eq!(super::value("TCP: inuse 1", "TCP:", "mem"), None);
    }
}
