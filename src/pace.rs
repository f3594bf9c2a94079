//! Rate limits, so that no pod's processes, and no writer of its object, can keep the agent busy.

use std::time::{Duration, Instant};

/// Allows a burst, and then one more in each period.
#[derive(Debug, Clone, Copy)]
pub struct Pace {
    period: Duration,
    burst: u32,
    /// The time when the whole burst is available again.
    full: Option<Instant>,
}

impl Pace {
    /// A full burst.
    pub const fn new(period: Duration, burst: u32) -> Self {
        Self { period, burst, full: None }
    }

    /// Whether one more is allowed now, and counts it.
    pub fn pass(&mut self, now: Instant) -> bool {
        let full = self.full.map_or(now, |full| full.max(now));
        let passes = full + self.period <= now + self.period * self.burst;
        if passes {
            self.full = Some(full + self.period);
        }
        passes
    }
}

/// Allows something at growing intervals, until it has not been asked for in a while.
#[derive(Debug, Clone, Copy)]
pub struct Backoff {
    first: Duration,
    longest: Duration,
    wait: Duration,
    last: Option<Instant>,
}

impl Backoff {
    /// The initial state, with the first and the longest pause.
    pub const fn new(first: Duration, longest: Duration) -> Self {
        Self { first, longest, wait: first, last: None }
    }

    /// Whether it is allowed now.
    pub fn pass(&mut self, now: Instant) -> bool {
        let since = self.last.map(|last| now.saturating_duration_since(last));
        match since {
            Some(since) if since < self.wait => return false,
            Some(since) if since < 10 * self.wait => self.wait = self.longest.min(2 * self.wait),
            _ => self.wait = self.first,
        }
        self.last = Some(now);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// F33.
    #[test]
    fn f33_a_burst_passes_and_then_one_for_each_period() {
        let start = Instant::now();
        let mut pace = Pace::new(10 * SECOND, 4);
        let mut passed = |from: u32, to: u32| {
            (from * 10..to * 10).filter(|n| pace.pass(start + SECOND / 10 * *n)).count()
        };
        assert_eq!(passed(0, 1), 4, "the burst");
        assert_eq!(passed(1, 101), 10, "ten changes a second for a hundred seconds");
        assert_eq!(passed(200, 201), 4, "after a while of peace");
    }

    /// F33.
    #[test]
    fn f33_pauses_grow_and_are_forgotten() {
        let start = Instant::now();
        let mut backoff = Backoff::new(SECOND / 10, 3 * SECOND);
        let mut passed = |from: u32, to: u32| {
            (from * 1000..to * 1000).filter(|n| backoff.pass(start + SECOND / 1000 * *n)).count()
        };
        assert!((4..=6).contains(&passed(0, 3)), "they grow");
        assert!((30..=36).contains(&passed(3, 103)), "one in three seconds at last");
        assert!((4..=6).contains(&passed(200, 203)), "from the beginning");
    }
}
