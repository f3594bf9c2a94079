//! What the kernel's TCP has in its queues.

use std::fs;

use anyhow::{Context, Result};

/// Bytes that all TCP sockets of the machine are charged for.
pub fn tcp() -> Result<u64> {
    let text = fs::read_to_string("/proc/net/sockstat").context("reading sockstat")?;
    parse(&text).with_context(|| format!("no TCP memory in {text:?}"))
}

fn parse(text: &str) -> Option<u64> {
    let line = text.lines().find(|line| line.starts_with("TCP:"))?;
    let mut words = line.split_whitespace().skip_while(|word| *word != "mem").skip(1);
    let pages: u64 = words.next()?.parse().ok()?;
    Some(pages * 4096)
}

#[cfg(test)]
mod tests {
    #[test]
    fn sockstat() {
        let text = "sockets: used 12\nTCP: inuse 1 orphan 0 tw 0 alloc 1 mem 3\nUDP: mem 9\n";
        assert_eq!(super::parse(text), Some(3 * 4096));
        assert_eq!(super::parse("TCP: inuse 1"), None);
    }
}
