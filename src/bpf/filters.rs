//! The filters on the way out of a pod's network devices.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd},
};

use anyhow::{Context, Result};
use libbpf_rs::{TC_EGRESS, TcHook, TcHookBuilder};

use super::{Dataplane, Pins};
use crate::netns::{LO, Netns};

/// Layouts that have filters of their own.
const LAYOUTS: u32 = 16;

/// A filter, by its program.
#[derive(Debug, Clone, Copy)]
pub(super) enum Filter {
    /// `dns_reply`: answers of the pod's DNS listener, on lo.
    Dns,
    /// `reset`: ends of spliced connections that are closed with unread bytes.
    Reset,
}

impl Filter {
    const ALL: [Self; 2] = [Self::Dns, Self::Reset];

    /// Its handle and priority, plus the layout's number: behind what others put first.
    const fn place(self) -> u32 {
        match self {
            Self::Dns => 0x5353,
            Self::Reset => 0x5363,
        }
    }

    /// The agent's place among the filters of a device.
    pub(super) fn hook(self, program: BorrowedFd<'_>, layout: u32, device: u32) -> TcHook {
        let mut builder = TcHookBuilder::new(program);
        let place = self.place() + layout;
        builder.ifindex(device.cast_signed()).replace(true).handle(place).priority(place);
        builder.hook(TC_EGRESS)
    }
}

/// This layout's number among those that have filters.
fn layout(pins: &Pins) -> u32 {
    let number = pins.layout.strip_prefix('v').and_then(|number| number.parse().ok());
    number.unwrap_or(0) % LAYOUTS
}

impl Dataplane {
    /// Puts this build's filter for DNS answers in force on the pod's lo; one that is there
    /// already is replaced in one step.
    ///
    /// # Errors
    /// Where the namespace can't be entered, or the kernel refuses.
    pub fn attach_dns(&self, netns: &Netns) -> Result<()> {
        let program = self.skel.progs.dns_reply.as_fd();
        self.filter(Filter::Dns, program, netns, &[LO])
            .context("cannot attach the filter for DNS answers to lo")
    }

    /// Puts this build's filter for spliced connections that are closed with unread bytes in force
    /// on these devices of the pod, by index; those that are there already are replaced.
    ///
    /// # Errors
    /// As of [`Dataplane::attach_dns`].
    pub fn attach_reset(&self, netns: &Netns, devices: &[u32]) -> Result<()> {
        let program = self.skel.progs.reset.as_fd();
        self.filter(Filter::Reset, program, netns, devices)
            .context("cannot attach the filter for spliced connections' ends")
    }

    fn filter(
        &self,
        filter: Filter,
        program: BorrowedFd<'_>,
        netns: &Netns,
        devices: &[u32],
    ) -> Result<()> {
        let layout = layout(&self.pins);
        netns.inside(|| {
            devices.iter().try_for_each(|device| put(filter, program, layout, *device))
        })?
    }
}

/// Attaches a filter to a device of the calling thread's namespace.
pub(super) fn put(filter: Filter, program: BorrowedFd<'_>, layout: u32, device: u32) -> Result<()> {
    let mut hook = filter.hook(program, layout, device);
    hook.create()
        .with_context(|| format!("clsact qdisc of device {device} (module sch_ingress)"))?;
    hook.attach().with_context(|| format!("eBPF filter of device {device} (module cls_bpf)"))?;
    Ok(())
}

/// Takes the filter for DNS answers off a pod's lo, where there is one.
///
/// # Errors
/// Where the namespace can't be entered.
pub fn detach_dns(netns: &Netns) -> Result<()> {
    netns.inside(|| remove(Filter::Dns, LO))
}

/// Takes all filters off a pod's devices, and what they needed where nobody else does.
///
/// # Errors
/// Where the namespace can't be entered, or the kernel refuses.
pub fn detach_filters(netns: &Netns) -> Result<()> {
    let devices = netns.facts()?.interfaces;
    netns.inside(|| {
        for device in devices.values() {
            Filter::ALL.into_iter().for_each(|filter| remove(filter, *device));
        }
    })?;
    netns.remove_idle_qdiscs()
}

fn remove(filter: Filter, device: u32) {
    for layout in 0..LAYOUTS {
        // The kernel finds the filter by its place; the descriptor is not looked at.
        let mut hook = filter.hook(io::stderr().as_fd(), layout, device);
        // There may be none.
        let _ = hook.detach();
    }
}
