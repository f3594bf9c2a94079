//! Attaches the node's programs to its cgroup, before those of others.

use std::{
    os::fd::{AsFd, AsRawFd},
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use libbpf_rs::{Link, Program, ProgramMut, skel::Skel};

use super::{
    hooks::{Attach, HOOKS, Hook},
    links::{cgroup_of, remove_link, replace_pin},
    order::{self, Ahead, ahead_of, can_be_first},
    pins::{Pins, children},
    state::Dataplane,
    tc,
};
use crate::node::Cgroup;

/// The interval at which Sidestep moves to the front: a rival program is reported, not fought with.
const AGAIN: Duration = Duration::from_secs(60);

impl Dataplane {
    /// Attaches the loaded programs to the cgroup. An existing hook is switched in one step, so
    /// that no connection finds it missing. If an agent with another layout is in place, its
    /// programs that decide stay until [`Dataplane::take_over`].
    ///
    /// # Errors
    /// If the kernel refuses to attach.
    pub fn attach(&mut self, cgroup: &Cgroup) -> Result<()> {
        self.attach_redirect()?;
        let others = self.pins.others()?;
        for hook in HOOKS.iter().filter(|hook| hook.attach == Attach::Cgroup) {
            let theirs = |other: &Pins| hook.decides && other.link(hook.program).exists();
            if !self.pins.link(hook.program).exists() && others.iter().any(theirs) {
                self.to_take_over = true;
                continue;
            }
            self.attach_hook(hook, cgroup)
                .with_context(|| format!("cannot attach {} to {cgroup}", hook.program))?;
        }
        self.remove_strangers()
    }

    /// Removes the programs of a build that had more of them, because no agent looks after them any
    /// more.
    fn remove_strangers(&self) -> Result<()> {
        for pin in children(&self.pins.links())? {
            let name = pin.file_name().unwrap_or_default().to_string_lossy();
            let known = HOOKS.iter().any(|hook| hook.program == name);
            if !known && !name.starts_with("steer-") && !tc::is_filter(&name) {
                tracing::info!(hook = %name, "removed the link of a program that this build does \
                                              not have");
                remove_link(&pin)?;
            }
        }
        Ok(())
    }

    pub(super) fn attach_hook(&mut self, hook: &Hook, cgroup: &Cgroup) -> Result<()> {
        let pin = self.pins.link(hook.program);
        let program = self.program(hook)?;
        if pin.exists() {
            let mut link = Link::open(&pin).context("cannot open its pinned link")?;
            if cgroup_of(&link)? == cgroup.id() {
                link.update_prog(&program).context("cannot replace its program")?;
                return self.links.hold(hook.program, link);
            }
        }
        self.attach_anew(hook, cgroup)
    }

    /// Attaches a program, even if it is attached already, before the old one is removed: two hooks
    /// for a moment do no harm, a missing one would.
    fn attach_anew(&mut self, hook: &Hook, cgroup: &Cgroup) -> Result<()> {
        let pin = self.pins.link(hook.program);
        let program = self.program(hook)?;
        let link = order::attach(&program, cgroup.as_raw_fd(), hook)?;
        replace_pin(link.as_fd(), &pin)?;
        self.links.hold(hook.program, link)
    }

    fn program(&mut self, hook: &Hook) -> Result<ProgramMut<'_>> {
        let mut all = self.skel.object_mut().progs_mut();
        all.find(|program| program.name() == hook.program).context("no such program")
    }

    /// Moves Sidestep's programs to the front on the cgroup, and returns the programs that still
    /// come before them.
    ///
    /// # Errors
    /// If the kernel does not tell, or refuses to attach.
    pub fn keep_first(&mut self, cgroup: &Cgroup) -> Result<Vec<Ahead>> {
        // An agent with another layout decides for now.
        if self.to_take_over {
            return Ok(Vec::new());
        }
        let found = self.ahead(cgroup)?;
        let recently = self.went_first.is_some_and(|then| then.elapsed() < AGAIN);
        if found.is_empty() || recently || !can_be_first(&self.skel.progs.connect4) {
            return Ok(found);
        }
        self.went_first = Some(Instant::now());
        for hook in HOOKS.iter().filter(|hook| found.iter().any(|one| one.hook == hook.program)) {
            self.attach_anew(hook, cgroup).with_context(|| {
                format!("cannot attach {} ahead of other programs to {cgroup}", hook.program)
            })?;
        }
        for one in &found {
            tracing::info!("{one} ran before Sidestep's program: Sidestep's runs first again");
        }
        self.ahead(cgroup)
    }

    fn ahead(&self, cgroup: &Cgroup) -> Result<Vec<Ahead>> {
        let object = self.skel.object();
        ahead_of(&self.pins, cgroup, |name| {
            let program = object.progs().find(|program| program.name() == name)?;
            Program::id_from_fd(program.as_fd()).ok()
        })
    }
}
