//! Loads the programs to learn whether this kernel accepts them, for `check`.

use std::{
    mem::MaybeUninit,
    os::fd::AsFd,
    sync::{Mutex, PoisonError},
};

use anyhow::Result;
use libbpf_rs::{
    PrintLevel,
    skel::{OpenSkel, Skel},
};

use super::{
    cost::{self, ProgramCost},
    iter, order,
    skel::{open_inbound, open_node_in, set_services},
    tc::{self, Filter},
};
use crate::node::{self, NetnsCookie};

/// Routes libbpf's messages to the log: its warnings explain errors, so they become debug lines
/// beside the error that the caller reports.
pub fn log_libbpf() {
    libbpf_rs::set_print(Some((PrintLevel::Debug, |level, text| match level {
        PrintLevel::Warn => {
            if let Some(word) = last_word(&text) {
                *LAST_WORD.lock().unwrap_or_else(PoisonError::into_inner) = Some(word);
            }
            tracing::debug!(target: "libbpf", "{}", text.trim_end());
        }
        _ => tracing::trace!(target: "libbpf", "{}", text.trim_end()),
    })));
}

/// The program that a kernel's verifier refused last, and the reason; libbpf's error is only a
/// number.
static LAST_WORD: Mutex<Option<String>> = Mutex::new(None);

/// The program's name, and the last line of the verifier's log, from libbpf's message.
fn last_word(text: &str) -> Option<String> {
    let (head, log) = text.split_once("-- BEGIN PROG LOAD LOG --")?;
    let name = head.split('\'').nth(1)?;
    let words = log.lines().map(str::trim).filter(|line| !line.is_empty());
    let words = words.take_while(|line| !line.starts_with("processed ")).last()?;
    Some(format!("{name}: {words}"))
}

/// The kernel's information about the accepted programs.
pub struct Loaded {
    /// The verifier's cost of each program.
    pub costs: Vec<ProgramCost>,
    /// Whether the programs that decide can run before all others at their hooks.
    pub can_be_first: bool,
}

/// Loads every program and map once, unpinned and unattached, and drops them, to learn whether the
/// kernel can run this build.
///
/// # Errors
/// Returns the kernel's error.
pub fn try_load() -> Result<Loaded> {
    load_all().map_err(|error| {
        let word = LAST_WORD.lock().unwrap_or_else(PoisonError::into_inner).take();
        match word {
            Some(word) => error.context(word),
            None => error,
        }
    })
}

fn load_all() -> Result<Loaded> {
    let mut storage = MaybeUninit::uninit();
    let mut node = open_node_in(&mut storage)?;
    set_services(&mut node, true)?;
    for mut program in node.open_object_mut().progs_mut() {
        let wanted = iter::can_load(&program.name().to_string_lossy());
        program.set_autoload(wanted);
    }
    let node = node.load()?;
    let mut storage = MaybeUninit::uninit();
    let pod = open_inbound(&mut storage, NetnsCookie::NONE)?.load()?;
    let programs = node.object().progs().chain(pod.object().progs());
    let costs = programs.map(|program| cost::of(&program)).collect::<Result<_>>()?;
    Ok(Loaded { costs, can_be_first: order::can_be_first(&node.progs.connect4) })
}

/// Attaches the filters to the lo of a temporary network namespace.
///
/// # Errors
/// If the kernel refuses: it may lack modules.
pub fn try_filters() -> Result<()> {
    let mut storage = MaybeUninit::uninit();
    let mut node = open_node_in(&mut storage)?;
    for mut program in node.open_object_mut().progs_mut() {
        let wanted = ["dns_nat", "reset"].iter().any(|name| program.name() == *name);
        program.set_autoload(wanted);
    }
    let node = node.load()?;
    let mut storage = MaybeUninit::uninit();
    let pod = open_inbound(&mut storage, NetnsCookie::NONE)?.load()?;
    let (dns, reset) = (node.progs.dns_nat.as_fd(), node.progs.reset.as_fd());
    let dialled = pod.progs.note_dialled.as_fd();
    node::in_new(|| {
        tc::try_on_lo(Filter::Dns, dns)?;
        tc::try_on_lo(Filter::Reset, reset)?;
        tc::try_on_lo(Filter::Dialled, dialled)
    })?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_names_the_program_and_the_verifiers_last_word() {
        let text = "libbpf: prog 'steer': -- BEGIN PROG LOAD LOG --\n0: (b7) r0 = 1\n\
                    invalid bpf_context access off=64 size=4\nprocessed 2 insns (limit 1000000)\n\
                    -- END PROG LOAD LOG --\n";
        let found = last_word(text).expect("a refusal");
        assert_eq!(found, "steer: invalid bpf_context access off=64 size=4");
        assert_eq!(last_word("libbpf: prog 'steer': failed to load: -13\n"), None);
    }
}
