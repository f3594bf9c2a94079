//! Takes over from an agent whose maps have another layout.

use std::fs;

use anyhow::{Context, Result};
use libbpf_rs::{MapCore, MapHandle};

use super::{
    hooks::HOOKS,
    iter::visit_other,
    links::{remove_link, steer_lives},
    pins::{Pins, steered},
    state::Dataplane,
    unload::remove_layout,
};
use crate::node::{Cgroup, NetnsCookie};

impl Dataplane {
    /// Whether an agent with another layout of the maps still decides.
    pub fn is_taking_over(&self) -> bool {
        self.to_take_over
    }

    /// The number of living pods that an agent with another layout has enrolled, and that are
    /// missing in this layout's maps.
    ///
    /// # Errors
    /// If the pins cannot be read.
    pub fn not_taken_over(&self) -> Result<usize> {
        let mut missing = 0;
        for other in self.pins.others()? {
            let cookies = steered(&other)?;
            let lives =
                |cookie: &NetnsCookie| steer_lives(&other, *cookie) && !self.netns_lives(*cookie);
            missing += cookies.into_iter().filter(lives).count();
        }
        Ok(missing)
    }

    /// Takes over from an agent whose maps have another layout, once this layout's maps are filled:
    /// the programs that decide are switched in one step. Those that answer for connections decided
    /// earlier stay beside, until [`Dataplane::retire`].
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn take_over(&mut self, cgroup: &Cgroup) -> Result<()> {
        if !self.to_take_over {
            return Ok(());
        }
        let others = self.pins.others()?;
        for hook in HOOKS.iter().filter(|hook| hook.decides) {
            let own = self.pins.link(hook.program);
            let theirs = others.iter().map(|other| other.link(hook.program));
            for theirs in theirs.filter(|pin| pin.exists()).collect::<Vec<_>>() {
                if own.exists() {
                    remove_link(&theirs)?;
                } else {
                    fs::rename(&theirs, &own)
                        .with_context(|| format!("cannot take over {}", theirs.display()))?;
                }
            }
            self.attach_hook(hook, cgroup)
                .with_context(|| format!("cannot take over {} on {cgroup}", hook.program))?;
        }
        for other in &others {
            for cookie in steered(other)? {
                remove_link(&other.steer(cookie))?;
            }
        }
        self.to_take_over = false;
        Ok(())
    }

    /// Removes the parts of other layouts that no socket needs any more. Returns whether any are
    /// left.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn retire(&mut self) -> Result<bool> {
        if self.to_take_over {
            return Ok(true);
        }
        let mut left = false;
        for other in self.pins.others()? {
            if Self::is_needed(&other)? {
                left = true;
            } else {
                remove_layout(&other, &[])?;
            }
        }
        Ok(left)
    }

    /// Whether a socket has state of that layout, or is about to get it.
    fn is_needed(other: &Pins) -> Result<bool> {
        let Ok(handovers) = MapHandle::from_pinned_path(other.map("handovers")) else {
            return Ok(false);
        };
        if handovers.keys().next().is_some() {
            return Ok(true);
        }
        let maps = ["origdsts", "dns_asked", "splices"];
        let (_, found) = visit_other("count_storages", other, &maps, |skel| {
            skel.maps.bss_data.as_ref().map_or(0, |variables| variables.storages)
        })?;
        Ok(found > 0)
    }
}
