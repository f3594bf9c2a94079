//! Runs iterators.

use std::io::Read;

use anyhow::Result;
use libbpf_rs::{Iter, Link};

/// Runs an iterator's program over all its objects, and returns its output.
pub(super) fn run(link: &Link) -> Result<Vec<u8>> {
    let mut written = Vec::new();
    // Reading it to the end is what runs the program.
    Iter::new(link)?.read_to_end(&mut written)?;
    Ok(written)
}
