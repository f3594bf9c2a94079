//! Waiting for a condition, and noticing Ctrl-C while doing so.

use std::env;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

const POLL: Duration = Duration::from_millis(3);

static INTERRUPTED: LazyLock<Arc<AtomicBool>> = LazyLock::new(Arc::default);

/// How many times slower than usual this machine is, from `SIDESTEP_TEST_SLOWDOWN`: 1 unless a
/// test runs in an emulated machine. Time limits grow by it, and bulk shrinks.
pub fn slowdown() -> u32 {
    static SLOWDOWN: LazyLock<u32> = LazyLock::new(|| {
        env::var("SIDESTEP_TEST_SLOWDOWN").map_or(1, |text| {
            let number = text.parse().ok().filter(|number| *number > 0);
            number.unwrap_or_else(|| panic!("SIDESTEP_TEST_SLOWDOWN={text} is no number from 1 on"))
        })
    });
    *SLOWDOWN
}

/// From now on Ctrl-C, SIGTERM and SIGHUP only make [`interrupted`] true, so that the program
/// returns from what it does and everything is dropped in order.
pub fn stop_on_signals() -> Result<()> {
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        signal_hook::flag::register(signal, INTERRUPTED.clone())
            .with_context(|| format!("handling signal {signal}"))?;
    }
    Ok(())
}

/// Whether a signal asked this process to stop (see [`stop_on_signals`]).
pub fn interrupted() -> bool {
    INTERRUPTED.load(Ordering::Relaxed)
}

/// Asks `cond` every few milliseconds until it holds. Fails, naming `what` was waited for,
/// after `timeout` (times [`slowdown`]) or when [`interrupted`].
pub fn wait_until(what: &str, timeout: Duration, mut cond: impl FnMut() -> bool) -> Result<()> {
    wait_for(what, timeout, || cond().then_some(()))
}

/// Like [`wait_until`], but gives the value that `get` has at last.
pub fn wait_for<T>(what: &str, timeout: Duration, get: impl FnMut() -> Option<T>) -> Result<T> {
    poll(what, timeout, interrupted, get)
}

/// Like [`wait_for`], but goes on when [`interrupted`]: for cleaning up.
pub(crate) fn wait_stubbornly<T>(
    what: &str,
    timeout: Duration,
    get: impl FnMut() -> Option<T>,
) -> Result<T> {
    poll(what, timeout, || false, get)
}

fn poll<T>(
    what: &str,
    timeout: Duration,
    stop: impl Fn() -> bool,
    mut get: impl FnMut() -> Option<T>,
) -> Result<T> {
    let start = Instant::now();
    let timeout = timeout * slowdown();
    loop {
        if let Some(value) = get() {
            return Ok(value);
        }
        if stop() {
            bail!("interrupted while waiting for {what}");
        }
        if start.elapsed() >= timeout {
            bail!("waited {timeout:?} in vain for {what}");
        }
        thread::sleep(POLL);
    }
}
