//! Load while the agent comes and goes.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use super::*;

/// Connections, one after another, that must all be intercepted.
pub struct Load<'a> {
    name: &'static str,
    stop: &'a AtomicBool,
    done: AtomicUsize,
}

impl<'a> Load<'a> {
    pub fn new(name: &'static str, stop: &'a AtomicBool) -> Self {
        Self { name, stop, done: AtomicUsize::new(0) }
    }

    pub fn run(&self, from: &Pod, target: SocketAddr) {
        while !self.stop.load(Ordering::Relaxed) {
            let n = self.done.load(Ordering::Relaxed);
            let what = format!("{} connection {n}", self.name);
            let answer =
                from.ask(APP, APP, target).unwrap_or_else(|error| panic!("{what}: {error:#}"));
            assert_eq!(answer.seen.original(), Some(target), "{what}: {answer:?}");
            self.done.store(n + 1, Ordering::Relaxed);
        }
    }

    pub fn wait_more(&self, n: u16) {
        let goal = self.done.load(Ordering::Relaxed) + usize::from(n);
        let what = format!("{n} more {} connections", self.name);
        wait_until(&what, Duration::from_secs(20), || self.done.load(Ordering::Relaxed) >= goal)
            .expect("the load goes on");
    }
}

/// Ends the loads, also when an assertion fails, or the scope would wait for ever.
pub struct Finish<'a>(pub &'a AtomicBool);

impl Drop for Finish<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
