//! The kernel verifier's cost of each program.

use std::{
    io,
    mem::size_of_val,
    os::fd::{AsFd, AsRawFd, BorrowedFd},
};

use anyhow::{Context, Result};
use libbpf_rs::{Program, libbpf_sys};
use serde::Serialize;

/// A program's length, and the cost of verifying it.
#[derive(Debug, Clone, Serialize)]
pub struct ProgramCost {
    /// The program's name.
    pub name: String,
    /// The number of its instructions.
    pub instructions: usize,
    /// The number of instructions that the verifier processed, on all paths; `None` if the kernel
    /// does not tell (before 5.16), or another program does this one's work on this kernel.
    pub verified: Option<u32>,
}

/// Asks the kernel about a loaded program.
pub(crate) fn of(program: &Program<'_>) -> Result<ProgramCost> {
    let name = program.name().to_string_lossy().into_owned();
    let verified = if program.autoload() {
        let info = info(program.as_fd())
            .with_context(|| format!("cannot ask the kernel about program {name}"))?;
        Some(info.verified_insns).filter(|count| *count > 0)
    } else {
        None
    };
    Ok(ProgramCost { name, instructions: program.insn_cnt(), verified })
}

/// The kernel's information about a program.
pub(super) fn info(program: BorrowedFd<'_>) -> io::Result<libbpf_sys::bpf_prog_info> {
    let mut info = libbpf_sys::bpf_prog_info::default();
    let mut len = size_of_val(&info) as u32;
    // SAFETY: info and len live across the call, len is the size of info, and info is zeroed:
    // the kernel is given no buffer to write to.
    let rc = unsafe {
        libbpf_sys::bpf_obj_get_info_by_fd(
            program.as_raw_fd(),
            (&raw mut info).cast(),
            &raw mut len,
        )
    };
    if rc < 0 { Err(io::Error::last_os_error()) } else { Ok(info) }
}
