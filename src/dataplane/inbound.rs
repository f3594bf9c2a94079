//! A pod's inbound program, and the listeners that it hands connections to.

use std::{
    collections::BTreeSet,
    mem::MaybeUninit,
    net::IpAddr,
    os::fd::{AsFd, AsRawFd},
};

use anyhow::{Context, Result};
use libbpf_rs::{
    MapCore, MapFlags, OpenObject,
    skel::{OpenSkel, Skel},
};

use super::{
    abi,
    features::kernel,
    iter::run,
    links::{Links, netns_of, remove_link, replace_pin},
    pins::{Pins, steer},
    skel::{inbound::InboundSkel, open_inbound},
    state::Dataplane,
};
use crate::node::{Netns, NetnsCookie};

/// The slots for a pod's listeners; `LISTENER_SLOTS` of bpf/mesh/inbound.h.
pub(super) const LISTENER_SLOTS: u16 = 8;

impl Dataplane {
    /// Links this build's inbound program to a pod's namespace; an existing link is switched in one
    /// step.
    ///
    /// # Errors
    /// If the kernel refuses to load or to attach.
    pub fn attach_inbound(&mut self, cookie: NetnsCookie, netns: &Netns) -> Result<()> {
        let mut storage = MaybeUninit::uninit();
        let skel = self.load_inbound(&mut storage, cookie, "steer")?;
        let name = steer(cookie);
        if self.netns_lives(cookie) {
            return self.links.update(&name, &skel.progs.steer);
        }
        let link = skel.progs.steer.attach_netns(netns.as_raw_fd())?;
        replace_pin(link.as_fd(), &self.pins.steer(cookie))?;
        self.links.hold(&name, link)
    }

    /// Takes the inbound program away from a pod that stays enrolled.
    ///
    /// # Errors
    /// If a pin cannot be removed.
    pub fn detach_inbound(&mut self, cookie: NetnsCookie) -> Result<()> {
        remove_inbound(&mut self.links, &self.pins, cookie)
    }

    /// Loads one program of the object that each pod has.
    pub(super) fn load_inbound<'a>(
        &self,
        storage: &'a mut MaybeUninit<OpenObject>,
        cookie: NetnsCookie,
        name: &str,
    ) -> Result<InboundSkel<'a>> {
        let mut open = open_inbound(storage, cookie)?;
        for mut program in open.open_object_mut().progs_mut() {
            let wanted = program.name() == name;
            program.set_autoload(wanted);
        }
        for mut map in open.open_object_mut().maps_mut() {
            let own = self.skel.object().maps().find(|own| own.name() == map.name());
            if let Some(own) = own {
                map.reuse_fd(own.as_fd())
                    .with_context(|| format!("cannot share map {:?}", map.name()))?;
            }
        }
        open.load().with_context(|| format!("the kernel rejected program {name}"))
    }

    /// Whether the namespace with this cookie, which has an inbound program, still exists.
    pub fn netns_lives(&self, cookie: NetnsCookie) -> bool {
        self.links.get(&steer(cookie)).is_some_and(|link| netns_of(link).is_ok_and(|ino| ino != 0))
    }

    /// Records the pod's listeners on a port that the hooks did not see, at the given addresses
    /// without a known listener.
    ///
    /// # Errors
    /// If the namespace cannot be entered, or the iterator fails.
    pub fn find_listeners(
        &mut self,
        cookie: NetnsCookie,
        netns: &Netns,
        port: u16,
        at: &BTreeSet<IpAddr>,
    ) -> Result<()> {
        let known = &self.skel.maps.listeners;
        let unknown = at.iter().filter(|at| listeners(known, cookie, **at, port) == 0);
        let unknown: Vec<abi::addr> = unknown.map(|at| (*at).into()).collect();
        let variables = self.skel.maps.bss_data.as_mut().context("the object has no variables")?;
        variables.wanted_netns = cookie.0;
        variables.wanted_port = port;
        for wanted in unknown.chunks(variables.wanted_at.len()) {
            let variables =
                self.skel.maps.bss_data.as_mut().context("the object has no variables")?;
            variables.wanted_at[..wanted.len()].copy_from_slice(wanted);
            variables.wanted_count = wanted.len() as u32;
            variables.found_count = 0;
            variables.found.fill(0);
            if kernel().iterates_unlocked {
                let link = self.skel.progs.find_listeners.attach()?;
                netns.inside(|| run(&link).map(drop))??;
            } else {
                run(&self.skel.progs.find_listeners_by_file.attach()?)?;
            }
        }
        Ok(())
    }
}

pub(super) fn remove_inbound(links: &mut Links, pins: &Pins, cookie: NetnsCookie) -> Result<()> {
    if let Some(link) = links.release(&steer(cookie)) {
        // Fails if the namespace is gone.
        let _ = link.detach();
    }
    let pin = pins.steer(cookie);
    if pin.exists() { remove_link(&pin) } else { Ok(()) }
}

/// The number of a pod's listeners recorded at an address.
pub(super) fn listeners(map: &impl MapCore, cookie: NetnsCookie, at: IpAddr, port: u16) -> usize {
    (0..LISTENER_SLOTS)
        .filter(|slot| {
            let key = abi::listener_of(cookie, at, port, *slot);
            matches!(map.lookup(abi::as_bytes(&key), MapFlags::ANY), Ok(Some(_)))
        })
        .count()
}
