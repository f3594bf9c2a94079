//! Pods come, change and go.

use std::{
    collections::VecDeque,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use hdrhistogram::Histogram;
use k8s_openapi::api::core::v1::Pod as ApiPod;
use serde::Serialize;
use serde_json::json;
use sidestep_lab::interrupted;

use crate::{
    node::Node,
    pod::{NAMESPACE, Pod},
    report::{Settings, Times},
};

/// Pods that a node makes and ends at the same time, as a kubelet with many would.
const WORKERS: usize = 8;
/// Between two annotations that are changed.
const PATCH: Duration = Duration::from_millis(200);
/// Of the live pods, those that are not about to go.
const YOUNG: usize = 4;

/// A pod that was let in.
struct Live {
    pod: Pod,
    cookie: u64,
}

/// What pods had to wait for.
#[derive(Debug, Serialize)]
pub struct Added {
    /// From the start of the plugin's ADD to its end.
    pub add: Times,
    /// ADDs that failed, and why.
    pub failed: Vec<String>,
    /// ADDs that succeeded though the kernel did not have all of the pod.
    pub too_early: usize,
    /// From the first to the last.
    pub seconds: f64,
}

/// What a churn showed.
#[derive(Debug, Serialize)]
pub struct Churned {
    /// The pods that were added.
    #[serde(flatten)]
    pub added: Added,
    /// From a changed annotation to the maps.
    pub changed: Times,
    /// Changes that did not arrive, and why.
    pub lost: Vec<String>,
    /// From when a pod was to be replaced to when that began: how far behind the node was.
    pub behind: Times,
    /// Pods replaced in a second.
    pub rate: f64,
}

struct Adding<'a> {
    node: &'a Node,
    live: Mutex<VecDeque<Live>>,
    times: Mutex<Histogram<u64>>,
    failed: Mutex<Vec<String>>,
    too_early: Mutex<usize>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<'a> Adding<'a> {
    fn new(node: &'a Node, live: VecDeque<Live>) -> Result<Self> {
        Ok(Self {
            node,
            live: Mutex::new(live),
            times: Mutex::new(Times::histogram()?),
            failed: Mutex::default(),
            too_early: Mutex::default(),
        })
    }

    /// A pod's way to its first process.
    fn add(&self) -> Result<()> {
        let pod = self.node.create()?;
        match self.node.plugin("ADD", &pod) {
            Ok(took) => Times::record(&mut lock(&self.times), took)?,
            Err(error) => {
                lock(&self.failed).push(format!("{error:#}"));
                return self.node.remove(pod);
            }
        }
        let cookie = self.node.kernel.enrolled(&pod.uid)?;
        self.node.runs(&pod)?;
        match cookie {
            Some(cookie) => lock(&self.live).push_back(Live { pod, cookie }),
            None => {
                *lock(&self.too_early) += 1;
                self.node.remove(pod)?;
            }
        }
        Ok(())
    }

    fn replace_oldest(&self) -> Result<()> {
        let oldest = lock(&self.live).pop_front();
        if let Some(oldest) = oldest {
            self.node.remove(oldest.pod)?;
        }
        self.add()
    }

    fn done(self, seconds: f64) -> (VecDeque<Live>, Added) {
        let added = Added {
            add: Times::of(&lock(&self.times)),
            failed: self.failed.into_inner().unwrap_or_else(PoisonError::into_inner),
            too_early: *lock(&self.too_early),
            seconds,
        };
        (self.live.into_inner().unwrap_or_else(PoisonError::into_inner), added)
    }
}

/// The pods of a node that has been filled.
pub struct Pods(VecDeque<Live>);

impl Pods {
    /// Only the pods, without the changes.
    pub fn into_vec(self) -> Vec<Pod> {
        self.0.into_iter().map(|live| live.pod).collect()
    }
}

/// Fills an empty node as fast as it goes.
pub fn fill(node: &Node, count: usize) -> Result<(Pods, Added)> {
    let adding = Adding::new(node, VecDeque::new())?;
    let start = Instant::now();
    work(count, Duration::ZERO, |_| adding.add())?;
    let (pods, added) = adding.done(start.elapsed().as_secs_f64());
    Ok((Pods(pods), added))
}

/// Replaces the oldest pods at a steady rate, and changes annotations meanwhile.
pub fn churn(
    node: &Node,
    pods: Pods,
    settings: &Settings,
    progress: impl Fn(&str) + Sync,
) -> Result<(Pods, Churned)> {
    let count = usize::try_from(u64::from(settings.rate) * settings.seconds)?;
    let adding = Adding::new(node, pods.0)?;
    let (behind, over) = (Mutex::new(Times::histogram()?), AtomicBool::new(false));
    let start = Instant::now();
    let (changes, seconds) = thread::scope(|scope| -> Result<_> {
        let changes = scope.spawn(|| change(&adding, &over));
        let each = Duration::from_secs(1) / settings.rate;
        let worked = work(count, each, |due| {
            Times::record(&mut lock(&behind), due.elapsed())?;
            progress(&format!("churning for {} s", start.elapsed().as_secs()));
            adding.replace_oldest()
        });
        let seconds = start.elapsed().as_secs_f64();
        over.store(true, Ordering::Relaxed);
        let changes = changes.join().map_err(|_| anyhow::anyhow!("a thread panicked"))?;
        worked?;
        Ok((changes?, seconds))
    })?;
    let (changed, lost) = changes;
    let (pods, added) = adding.done(seconds);
    let rate = count as f64 / seconds;
    let behind = Times::of(&lock(&behind));
    Ok((Pods(pods), Churned { added, changed, lost, behind, rate }))
}

/// Does `count` times what workers do, `each` after another; they are told when it was due.
fn work(count: usize, each: Duration, task: impl Fn(Instant) -> Result<()> + Sync) -> Result<()> {
    let (due, queue) = mpsc::sync_channel::<Instant>(count);
    let queue = Mutex::new(queue);
    thread::scope(|scope| {
        let run = || -> Result<()> {
            loop {
                let next = lock(&queue).recv();
                let Ok(due) = next else { return Ok(()) };
                task(due)?;
            }
        };
        let workers: Vec<_> = (0..WORKERS).map(|_| scope.spawn(run)).collect();
        let start = Instant::now();
        for n in 0..u32::try_from(count)? {
            let at = start + each * n;
            thread::sleep(at.saturating_duration_since(Instant::now()));
            ensure!(!interrupted(), "interrupted");
            if due.send(at).is_err() {
                break;
            }
        }
        drop(due);
        for worker in workers {
            worker.join().map_err(|_| anyhow::anyhow!("a thread panicked"))??;
        }
        Ok(())
    })
}

/// Changes annotations of pods that will live for a while, until it is over.
fn change(adding: &Adding<'_>, over: &AtomicBool) -> Result<(Times, Vec<String>)> {
    let (mut times, mut lost) = (Times::histogram()?, Vec::new());
    let mut next = Instant::now();
    for port in 20_000..60_000u16 {
        next += PATCH;
        thread::sleep(next.saturating_duration_since(Instant::now()));
        if over.load(Ordering::Relaxed) {
            break;
        }
        let young = {
            let live = lock(&adding.live);
            let young = usize::from(port) % (live.len() / YOUNG).max(1);
            live.iter().rev().nth(young).map(|live| (live.pod.name.clone(), live.cookie))
        };
        let Some((name, cookie)) = young else { continue };
        let key = "traffic.sidecar.istio.io/excludeOutboundPorts";
        let patch = json!({"metadata": {"annotations": {key: port.to_string()}}});
        let start = Instant::now();
        adding.node.api.patch::<ApiPod>(NAMESPACE, &name, &patch)?;
        match adding.node.kernel.wait_excluded(cookie, port) {
            Ok(()) => Times::record(&mut times, start.elapsed())?,
            Err(error) => lost.push(format!("{name}: {error:#}")),
        }
    }
    Ok((Times::of(&times), lost))
}
