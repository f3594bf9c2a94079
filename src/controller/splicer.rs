//! Schedules the sweeps of connections to splice, and does the agent's work for them.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use anyhow::Result;
use tracing::{error, info, warn};

use super::Controller;
use crate::{
    node::{Netns, NetnsCookie},
    splice::{self, Leg, Reset},
};

/// The share of its time that the agent spends on sweeps, one part in this many at most.
const SWEEP_SHARE: u32 = 20;
/// The interval of sweeps.
const SWEEP: Duration = Duration::from_millis(100);
/// The first pause before a sweep for connections that are leaving the map; it doubles each time,
/// because a stopped reader keeps its connection there.
const LEAVING: Duration = Duration::from_millis(1);

/// The schedule of sweeps.
#[derive(Debug)]
pub(super) struct Sweeps {
    /// The time of the next sweep, at the earliest.
    next: Instant,
    /// The pause while connections are still leaving.
    leaving: Duration,
}

impl Sweeps {
    pub fn new(now: Instant) -> Self {
        Self { next: now, leaving: LEAVING }
    }

    /// Whether a sweep is allowed now, or else when.
    fn due(&self, now: Instant) -> Result<(), Instant> {
        if now < self.next { Err(self.next) } else { Ok(()) }
    }

    /// Records a sweep, and whether connections are leaving the map; `None` if no sweep was due.
    /// Returns the time of the next one; an event may ask for an earlier one.
    fn done(&mut self, start: Instant, end: Instant, are_leaving: Option<bool>) -> Instant {
        let mut wait = SWEEP;
        match are_leaving {
            Some(true) => {
                wait = self.leaving;
                self.leaving = SWEEP.min(self.leaving * 2);
            }
            Some(false) => self.leaving = LEAVING,
            None => {}
        }
        let spent = (end - start) * SWEEP_SHARE;
        self.next = end + spent;
        end + spent.max(wait)
    }

    /// Connections have to leave at once.
    fn hurry(&mut self) {
        self.leaving = LEAVING;
    }
}

impl Controller {
    /// Decides which legs are spliced, given what the self-test found.
    pub fn splice(&mut self, mode: splice::Mode, found: &splice::Found) {
        let states = splice::decide(mode, found);
        for (leg, state) in Leg::ALL.iter().zip(&states) {
            info!(leg = leg.name(), on = state.on, why = state.why, "splice");
            self.legs.insert(*leg, state.on);
        }
        if let Err(error) = self.dataplane.set_legs(&states) {
            error!("cannot set which legs are spliced: {error:#}");
        }
    }

    /// A spliced connection carries bulk, which is faster without splicing.
    pub fn take_bulk_out(&mut self) -> Instant {
        self.sweeps.hurry();
        self.sweep_splices()
    }

    /// Splices settled connections, if there are any. Returns the time of the next sweep.
    pub fn sweep_splices(&mut self) -> Instant {
        let start = Instant::now();
        if let Err(not_before) = self.sweeps.due(start) {
            return not_before;
        }
        let mut are_leaving = None;
        if self.dataplane.wants_sweep() {
            let swept = self.dataplane.sweep();
            let complain = |error: &_| warn!("cannot look at connections to splice: {error:#}");
            let unfinished = swept.inspect_err(complain).unwrap_or_default();
            are_leaving = Some(unfinished.leaving);
            self.wake_writers(&unfinished.stuck);
        }
        self.sweeps.done(start, Instant::now(), are_leaving)
    }

    /// Opens a namespace with spliced connections, of an enrolled pod or of one that has left. If
    /// the path is a process, that of an enrolled pod is the more recent one.
    fn spliced(&self, cookie: NetnsCookie) -> Result<Netns> {
        match self.pods.get(&cookie) {
            Some(pod) => Netns::open_as(&pod.netns.path, cookie),
            None => self.dataplane.filtered_netns(cookie),
        }
    }

    /// Wakes writers in these namespaces.
    fn wake_writers(&self, cookies: &BTreeSet<NetnsCookie>) {
        for cookie in cookies {
            let netns = self.spliced(*cookie);
            if let Err(error) = netns.and_then(|netns| self.dataplane.wake_writers(&netns)) {
                warn!(cookie = cookie.0, "cannot wake writers: {error:#}");
            }
        }
    }

    /// Resets connections that were closed with unread bytes, by the namespace of the closed end.
    pub fn reset(&self, unread: &BTreeMap<NetnsCookie, Vec<Reset>>) {
        for (cookie, resets) in unread {
            let complain = |error| {
                warn!(
                    cookie = cookie.0,
                    "cannot reset a connection that was \
                                                             closed with unread data: {error:#}"
                )
            };
            let send = || resets.iter().filter_map(|reset| reset.send().err()).for_each(complain);
            let netns = self.spliced(*cookie);
            if let Err(error) = netns.and_then(|netns| netns.inside(send)) {
                complain(error);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn sweeps_take_no_more_than_their_share() {
        let start = Instant::now();
        let mut sweeps = Sweeps::new(start);
        assert_eq!(sweeps.due(start), Ok(()));
        let end = start + 30 * MS;
        assert_eq!(sweeps.done(start, end, Some(false)), end + 600 * MS);
        assert_eq!(sweeps.due(end + 599 * MS), Err(end + 600 * MS), "whoever asks for it");
        assert_eq!(sweeps.due(end + 600 * MS), Ok(()));
        assert_eq!(sweeps.done(start, start + MS, None), start + MS + SWEEP, "ten times a second");
        assert_eq!(sweeps.due(start + 21 * MS), Ok(()), "an event may ask for it before");
    }

    #[test]
    fn those_that_leave_are_looked_at_ever_more_seldom() {
        let now = Instant::now();
        let mut sweeps = Sweeps::new(now);
        let mut wait = || (sweeps.done(now, now, Some(true)) - now).as_millis();
        let waits: Vec<u128> = (0..9).map(|_| wait()).collect();
        assert_eq!(waits, [1, 2, 4, 8, 16, 32, 64, 100, 100]);
        sweeps.hurry();
        assert_eq!(sweeps.done(now, now, Some(true)) - now, MS, "somebody else is to leave");
        sweeps.done(now, now, Some(true));
        sweeps.done(now, now, Some(false));
        assert_eq!(sweeps.done(now, now, Some(true)) - now, MS, "the last one has left");
    }
}
