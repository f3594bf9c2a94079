//! The agent's part in splicing: which legs are on, and which sockets are in the map. bpf/splice/
//! decides the rest.

use std::{
    collections::BTreeSet,
    mem::size_of,
    os::fd::{AsFd, AsRawFd},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use libbpf_rs::{MapCore, MapFlags};

use super::{
    abi::{self, as_bytes, from_bytes},
    iter::{run, visit, visit_other},
    pins::{FORMER_SPLICE_SOCKETS, Pins},
    state::Dataplane,
};
use crate::{
    node::{Netns, NetnsCookie},
    splice::LegState,
};

/// The maps that spliced bytes depend on: a socket's queue is lost with the map that it is in.
pub(super) const MAPS: [&str; 3] = ["splice_sockets", FORMER_SPLICE_SOCKETS, "splices"];
/// The time that `unload` waits until redirected data is read.
const DRAIN: Duration = Duration::from_secs(10);
/// The interval at which it checks.
const LOOK: Duration = Duration::from_millis(20);

/// The result of a sweep, as the program counts it.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Swept {
    /// Connections that are too young, or may become eligible.
    pub left: u32,
    /// Sockets that are leaving the map.
    pub leaving: u32,
    /// Cookies of namespaces with writers that need waking.
    pub stuck: BTreeSet<NetnsCookie>,
}

/// The work that a sweep leaves to the agent.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Unfinished {
    /// Whether connections are leaving the map: that takes several sweeps, and bulk transfers are
    /// slow in the meantime.
    pub leaving: bool,
    /// The cookies of network namespaces with writers that wait for memory and that the kernel does
    /// not wake: [`Dataplane::wake_writers`] does.
    pub stuck: BTreeSet<NetnsCookie>,
}

/// The key of a connection's other end.
fn other_end(end: &[u8]) -> Result<Vec<u8>> {
    let key: abi::splice_key = from_bytes(end)?;
    let other = abi::splice_key {
        local: key.remote,
        remote: key.local,
        lport: key.rport,
        rport: key.lport,
        first_sent: key.first_received,
        first_received: key.first_sent,
        pad: key.pad,
    };
    Ok(as_bytes(&other).to_vec())
}

impl Dataplane {
    /// Attaches this build's program to the map's sockets. Sockets that an earlier agent put there
    /// keep its program until they close.
    pub(super) fn attach_redirect(&self) -> Result<()> {
        let map = self.skel.maps.splice_sockets.as_fd().as_raw_fd();
        self.skel.progs.redirect.attach_sockmap(map).context("cannot attach redirect")
    }

    /// Sets which legs are spliced; it applies to every connection at the next sweep.
    ///
    /// # Errors
    /// If the map cannot be written.
    pub fn set_legs(&mut self, states: &[LegState]) -> Result<()> {
        for (index, state) in states.iter().enumerate() {
            let leg = abi::leg_of(state);
            let key = (index as u32).to_ne_bytes();
            self.skel.maps.splice_legs.update(&key, as_bytes(&leg), MapFlags::ANY)?;
        }
        self.want_sweep(true)
    }

    /// Whether a connection asks for a sweep.
    pub fn wants_sweep(&self) -> bool {
        self.skel.maps.bss_data.as_ref().is_some_and(|variables| {
            // SAFETY: a valid, aligned u32 in a page that the kernel's side writes to.
            unsafe { (&raw const variables.splices_wanted).read_volatile() != 0 }
        })
    }

    /// Sets whether the next sweep is due.
    ///
    /// # Errors
    /// If the object has no variables.
    pub fn want_sweep(&mut self, wanted: bool) -> Result<()> {
        let variables = self.skel.maps.bss_data.as_mut().context("the object has no variables")?;
        // SAFETY: as in `wants_sweep`; the kernel's side only ever writes 1.
        unsafe { (&raw mut variables.splices_wanted).write_volatile(u32::from(wanted)) };
        Ok(())
    }

    /// Sweeps: puts settled and eligible connections into the map, removes those that are faster
    /// without, and applies changes of their pods.
    ///
    /// # Errors
    /// If the iterator fails.
    pub fn sweep(&mut self) -> Result<Unfinished> {
        // Connections marked while the sweep runs are for the next one.
        self.want_sweep(false)?;
        let swept = self.sweep_once()?;
        if swept.left + swept.leaving > 0 {
            self.want_sweep(true)?;
        }
        Ok(Unfinished { leaving: swept.leaving > 0, stuck: swept.stuck })
    }

    /// Makes a pod's writers retry that wait for memory and that the kernel does not wake.
    ///
    /// # Errors
    /// If the namespace cannot be entered, or the iterator fails.
    pub fn wake_writers(&self, netns: &Netns) -> Result<()> {
        let link = self.skel.progs.wake_writers.attach()?;
        netns.inside(|| run(&link).map(drop))?
    }

    fn sweep_once(&mut self) -> Result<Swept> {
        let variables = self.skel.maps.bss_data.as_mut().context("the object has no variables")?;
        variables.splices_left = 0;
        variables.splices_leaving = 0;
        variables.sweep_pass = variables.sweep_pass % u32::from(u8::MAX) + 1;
        let progs = &self.skel.progs;
        let splices = self.skel.maps.splices.as_fd();
        let written = visit(&progs.sweep_splices, &progs.sweep_splices_by_file, splices)?;
        let (mut leave, mut stuck) = (BTreeSet::new(), BTreeSet::new());
        for swept in written.chunks_exact(size_of::<abi::swept>()) {
            let swept: abi::swept = from_bytes(swept)?;
            if swept.stuck == 0 {
                leave.insert(as_bytes(&swept.leaves).to_vec());
            } else {
                stuck.insert(NetnsCookie(swept.stuck));
            }
        }
        let spliced = &self.skel.maps.splice_sockets;
        for end in &leave {
            let other = other_end(end)?;
            // Without the other end, nothing is redirected to this one: only a sweep puts it back.
            if leave.contains(&other) || spliced.lookup(&other, MapFlags::ANY)?.is_none() {
                // An end that has closed in the meantime has left the map.
                let _ = spliced.delete(end);
            }
        }
        let variables = self.skel.maps.bss_data.as_ref().context("the object has no variables")?;
        // SAFETY: valid, aligned u32s in a page that the kernel's side writes to.
        unsafe {
            Ok(Swept {
                left: (&raw const variables.splices_left).read_volatile(),
                leaving: (&raw const variables.splices_leaving).read_volatile(),
                stuck,
            })
        }
    }
}

/// Switches all connections to TCP, and waits until the redirected data is read, which would be
/// lost with the map. Returns the number of sockets that still have some, in any layout.
pub(super) fn drain(pins: &Pins) -> Result<u32> {
    let mut layouts = pins.layouts()?;
    layouts.retain(|layout| layout.map("splices").exists());
    let start = Instant::now();
    loop {
        // By cookie: by files, a socket is found once for each process that has it open.
        let mut unread = BTreeSet::new();
        for layout in &layouts {
            let (cookies, ()) = visit_other("drain_splices", layout, &["splices"], |_| ())?;
            unread.extend(cookies.chunks_exact(size_of::<u64>()).map(<[u8]>::to_vec));
        }
        if unread.is_empty() || start.elapsed() > DRAIN {
            return Ok(unread.len() as u32);
        }
        thread::sleep(LOOK);
    }
}

/// The legs, and the number of spliced sockets, read from the pins alone.
pub(super) fn state(pins: &Pins) -> Result<(Vec<LegState>, usize)> {
    let legs = pins.open_map("splice_legs")?;
    let mut states = Vec::new();
    for key in legs.keys() {
        let value = legs.lookup(&key, MapFlags::ANY)?.context("no such leg")?;
        states.push(LegState::from(&from_bytes::<abi::leg>(&value)?));
    }
    Ok((states, pins.open_map("splice_sockets")?.keys().count()))
}
