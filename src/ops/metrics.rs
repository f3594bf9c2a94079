//! What the agent counts, for /metrics, and whether it is ready. The names are an interface:
//! docs/metrics.md lists them.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric, text::encode},
    metrics::{
        counter::{ConstCounter, Counter},
        family::Family,
        gauge::{ConstGauge, Gauge},
        histogram::{Histogram, exponential_buckets},
        info::Info,
    },
    registry::{Registry, Unit},
};

use crate::{
    dataplane::{self, Pins},
    mesh::{
        self,
        desired::Desired,
        quota::{Limits, QUOTAS},
    },
    problem::{Problem, Reason},
    splice::Leg,
};

/// An agent that did not look after its pods for so long is stuck.
const STUCK: Duration = Duration::from_secs(60);

/// What may be put back: the values of the metric's label.
const REPAIRS: [&str; 7] = ["bpffs", "pin", "hook", "inbound", "filter", "entry", "lo"];

type Label = [(&'static str, String); 1];
type Labels = [(&'static str, String); 2];

/// How full a map of the kernel is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fill {
    /// The map's name.
    pub map: &'static str,
    /// Entries that the agent wrote.
    pub entries: usize,
    /// Entries that there is room for.
    pub capacity: usize,
}

impl Fill {
    /// Of every map that the agent fills.
    pub fn all(goal: &Desired, limits: &Limits) -> Vec<Self> {
        let pods = Self { map: "pods", entries: goal.pods.len(), capacity: limits.pods };
        let shared = QUOTAS.iter().zip(goal.used).map(|(quota, entries)| Self {
            map: quota.map,
            entries,
            capacity: (quota.limit)(limits),
        });
        [pods].into_iter().chain(shared).collect()
    }
}

/// The agent's state as others may see it.
pub struct Metrics {
    registry: Registry,
    pins: Pins,
    cgroup: u64,
    enrolled: Family<Label, Gauge>,
    problems: Family<Label, Gauge>,
    map_entries: Family<Label, Gauge>,
    map_capacity: Family<Label, Gauge>,
    sync: Histogram,
    api_errors: Family<Label, Counter>,
    cni: Family<Labels, Counter>,
    repairs: Family<Label, Counter>,
    pod_reads: Counter,
    map_writes: Counter,
    searches: Counter,
    /// What of the node's is not in force, and cannot be put back.
    broken: Mutex<Option<String>>,
    forwarded: Counter,
    closed_udp: Counter,
    syncs: AtomicU64,
    chained: AtomicBool,
    last_turn: Mutex<Instant>,
}

impl Metrics {
    /// Of the data plane below these pins, attached to the cgroup with this id.
    pub fn new(pins: &Pins, cgroup: u64) -> Self {
        let mut registry = Registry::with_prefix("sidestep");
        let (enrolled, problems) = (Family::default(), Family::default());
        let (map_entries, map_capacity) = (Family::default(), Family::default());
        let (api_errors, cni) = (Family::default(), Family::default());
        let repairs = Family::<Label, Counter>::default();
        let (pod_reads, map_writes) = (Counter::default(), Counter::default());
        let searches = Counter::default();
        for what in REPAIRS {
            drop(repairs.get_or_create(&[("what", what.into())]));
        }
        let sync = Histogram::new(exponential_buckets(0.000_5, 2.0, 14));
        let version = vec![("version", env!("CARGO_PKG_VERSION"))];
        registry.register("build", "The agent's version", Info::new(version));
        registry.register("pods_enrolled", "Enrolled pods by mesh", Family::clone(&enrolled));
        registry.register("problems", "Current problems, by reason", Family::clone(&problems));
        let help = "Entries of a BPF map in use";
        registry.register("map_entries", help, Family::clone(&map_entries));
        let help = "Entries that a BPF map has room for";
        registry.register("map_capacity", help, Family::clone(&map_capacity));
        let help = "Time to sync the BPF maps";
        registry.register_with_unit("sync", help, Unit::Seconds, sync.clone());
        let help = "Failed requests to the API server";
        registry.register("api_errors", help, Family::clone(&api_errors));
        let help = "Requests from the CNI plugin, by verb and result";
        registry.register("cni_requests", help, Family::clone(&cni));
        let help = "Programs, links, pins, entries and routes that were lost and restored";
        registry.register("repairs", help, Family::clone(&repairs));
        let help = "Pod objects parsed because they were new or had changed";
        registry.register("pod_reads", help, pod_reads.clone());
        let help = "BPF map entries written or deleted";
        registry.register("map_writes", help, map_writes.clone());
        let help = "Searches for a proxy's listener after a connection found none";
        registry.register("listener_searches", help, searches.clone());
        let help = "Packets forwarded by enrolled pods, which bypass their sidecars";
        let forwarded = Counter::default();
        registry.register("forwarded_packets", help, forwarded.clone());
        let help = "Connected UDP sockets closed because the Service's endpoint was gone";
        let closed_udp = Counter::default();
        registry.register("service_sockets_closed", help, closed_udp.clone());
        registry.register_collector(Box::new(Kernel { pins: pins.clone(), cgroup }));
        Self {
            registry,
            pins: pins.clone(),
            cgroup,
            enrolled,
            problems,
            map_entries,
            map_capacity,
            sync,
            api_errors,
            cni,
            repairs,
            pod_reads,
            map_writes,
            searches,
            broken: Mutex::new(None),
            forwarded,
            closed_udp,
            syncs: AtomicU64::new(0),
            chained: AtomicBool::new(false),
            last_turn: Mutex::new(Instant::now()),
        }
    }

    /// Enrolled pods forwarded so many packets more.
    pub fn forwarded(&self, packets: u64) {
        self.forwarded.inc_by(packets);
    }

    /// So many connected UDP sockets were closed, whose endpoint was gone.
    pub fn closed_udp(&self, count: u64) {
        self.closed_udp.inc_by(count);
    }

    /// A sync with a complete source took so long.
    pub fn synced(&self, took: Duration) {
        self.sync.observe(took.as_secs_f64());
        self.syncs.fetch_add(1, Ordering::Relaxed);
    }

    /// So many pods were read.
    pub fn read_pods(&self, count: usize) {
        self.pod_reads.inc_by(count as u64);
    }

    /// A listener was looked for.
    pub fn searched(&self) {
        self.searches.inc();
    }

    /// So many entries of maps were written or deleted.
    pub fn wrote(&self, count: usize) {
        self.map_writes.inc_by(count as u64);
    }

    /// Something was put back in force.
    pub fn repaired(&self, what: &'static str) {
        self.repairs.get_or_create(&[("what", what.into())]).inc();
    }

    /// What of the node's could not be put back in force at the last look.
    pub fn broken(&self, what: Option<String>) {
        *self.broken.lock().unwrap_or_else(PoisonError::into_inner) = what;
    }

    /// The agent's loop went round.
    pub fn turned(&self) {
        *self.last_turn.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }

    /// A request of the CNI plugin was answered.
    pub fn cni(&self, verb: &str, ok: bool) {
        let result = if ok { "ok" } else { "refused" };
        let labels = [("verb", verb.to_owned()), ("result", result.to_owned())];
        self.cni.get_or_create(&labels).inc();
    }

    /// How things stand: the enrolled pods' meshes by index, what is wrong, how full the maps
    /// are, and the API server's errors since the agent's start.
    pub fn set(
        &self,
        meshes: impl Iterator<Item = u16>,
        problems: &BTreeSet<Problem>,
        fills: &[Fill],
        api: &BTreeMap<&'static str, u64>,
    ) {
        let mut enrolled: BTreeMap<u16, i64> =
            mesh::MESHES.iter().map(|mesh| (mesh.index, 0)).collect();
        for mesh in meshes {
            *enrolled.entry(mesh).or_default() += 1;
        }
        for (index, count) in enrolled {
            let name = mesh::by_index(index).map_or("unknown", |mesh| mesh.name);
            self.enrolled.get_or_create(&[("mesh", name.into())]).set(count);
        }
        for reason in Reason::ALL {
            let count = problems.iter().filter(|problem| problem.reason == reason).count();
            self.problems.get_or_create(&[("reason", reason.name().into())]).set(count as i64);
        }
        for fill in fills {
            let label = [("map", fill.map.to_owned())];
            self.map_entries.get_or_create(&label).set(fill.entries as i64);
            self.map_capacity.get_or_create(&label).set(fill.capacity as i64);
        }
        for (request, count) in api {
            let counter = self.api_errors.get_or_create(&[("request", (*request).into())]);
            counter.inner().store(*count, Ordering::Relaxed);
        }
    }

    /// Whether the agent's loop goes round.
    ///
    /// # Errors
    /// If it does not.
    pub fn health(&self) -> Result<()> {
        let last = *self.last_turn.lock().unwrap_or_else(PoisonError::into_inner);
        let idle = last.elapsed();
        ensure!(
            idle < STUCK,
            "the agent's event loop has been stuck for {} seconds",
            idle.as_secs()
        );
        Ok(())
    }

    /// Whether this node's pods are in the mesh: every hook is attached, says the kernel, what else
    /// is the node's is in force, and the source's first complete list is in the maps.
    ///
    /// # Errors
    /// Names the missing part.
    pub fn ready(&self) -> Result<()> {
        if let Some(broken) = &*self.broken.lock().unwrap_or_else(PoisonError::into_inner) {
            bail!("{broken}");
        }
        for hook in dataplane::hook_states(&self.pins) {
            if !hook.attached || hook.cgroup_id != self.cgroup {
                bail!("hook {} is not attached", hook.name);
            }
        }
        let synced = self.syncs.load(Ordering::Relaxed) > 0;
        ensure!(synced, "this node's pods have not been listed yet");
        Ok(())
    }

    /// Whether the CNI plugin is chained, where it is to be.
    pub fn chained(&self, chained: bool) {
        self.chained.store(chained, Ordering::Relaxed);
    }

    /// Whether a pod that starts now is intercepted from its first process on.
    pub fn can_intercept(&self) -> bool {
        self.chained.load(Ordering::Relaxed) && self.ready().is_ok()
    }

    /// All of it, in OpenMetrics' text format.
    ///
    /// # Errors
    /// If it cannot be put into words.
    pub fn text(&self) -> Result<String> {
        let mut text = String::new();
        encode(&mut text, &self.registry).context("cannot encode the metrics")?;
        Ok(text)
    }
}

/// What the kernel counts, read when it is asked for.
#[derive(Debug)]
struct Kernel {
    pins: Pins,
    cgroup: u64,
}

impl Collector for Kernel {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let counters = dataplane::counters(&self.pins).unwrap_or_default();
        let help = "Connections and DNS queries of enrolled pods, by what became of them";
        let help_total = ConstCounter::new(0u64).metric_type();
        let mut family = encoder.encode_descriptor("events", help, None, help_total)?;
        for (mesh, events) in &counters {
            for (event, count) in events {
                let labels = [("mesh", *mesh), ("event", *event)];
                ConstCounter::new(*count).encode(family.encode_family(&labels)?)?;
            }
        }
        let help = "Calls to addresses of Services, by what became of them";
        let mut family = encoder.encode_descriptor("service_events", help, None, help_total)?;
        for (event, count) in &dataplane::service_counters(&self.pins).unwrap_or_default() {
            let event = event.strip_prefix("service_").unwrap_or(event);
            ConstCounter::new(*count).encode(family.encode_family(&[("event", event)])?)?;
        }
        let kind = ConstGauge::new(0i64).metric_type();
        let help = "Whether a hook is attached to the node's cgroup";
        let mut family = encoder.encode_descriptor("hook_attached", help, None, kind)?;
        for hook in dataplane::hook_states(&self.pins) {
            let attached = hook.attached && hook.cgroup_id == self.cgroup;
            let labels = [("hook", hook.name)];
            ConstGauge::new(i64::from(attached)).encode(family.encode_family(&labels)?)?;
        }
        let (legs, sockets) = dataplane::spliced(&self.pins).unwrap_or_default();
        let help = "Whether splicing is on for a leg";
        let mut family = encoder.encode_descriptor("splice_leg", help, None, kind)?;
        for (leg, state) in Leg::ALL.iter().zip(&legs) {
            let labels = [("leg", leg.name())];
            ConstGauge::new(i64::from(state.on)).encode(family.encode_family(&labels)?)?;
        }
        let help = "Spliced sockets; a connection has two";
        let encoder = encoder.encode_descriptor("spliced_sockets", help, None, kind)?;
        ConstGauge::new(i64::try_from(sockets).unwrap_or(i64::MAX)).encode(encoder)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn nothing_is_ready_that_is_not_attached() {
        let metrics = Metrics::new(&Pins::new(Path::new("/nonexistent"), dataplane::LAYOUT), 1);
        let error = metrics.ready().expect_err("nothing is attached").to_string();
        assert!(error.contains("sock_ops"), "{error}");
        metrics.health().expect("it has just started");
    }

    #[test]
    fn the_text_has_what_was_set() {
        let metrics = Metrics::new(&Pins::new(Path::new("/nonexistent"), dataplane::LAYOUT), 1);
        let problem = Problem::node("x");
        let fill = Fill { map: "pods", entries: 2, capacity: 4 };
        let api = BTreeMap::from([("pods", 3)]);
        metrics.set([0, 0, 2].into_iter(), &BTreeSet::from([problem]), &[fill], &api);
        metrics.synced(Duration::from_millis(1));
        metrics.cni("add", false);
        metrics.forwarded(5);
        let text = metrics.text().expect("text");
        for line in [
            "sidestep_pods_enrolled{mesh=\"istio\"} 2",
            "sidestep_pods_enrolled{mesh=\"linkerd\"} 0",
            "sidestep_pods_enrolled{mesh=\"kuma\"} 1",
            "sidestep_problems{reason=\"Node\"} 1",
            "sidestep_map_entries{map=\"pods\"} 2",
            "sidestep_api_errors_total{request=\"pods\"} 3",
            "sidestep_cni_requests_total{verb=\"add\",result=\"refused\"} 1",
            "sidestep_sync_seconds_count 1",
            "sidestep_forwarded_packets_total 5",
            "sidestep_hook_attached{hook=\"connect4\"} 0",
            "# EOF",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
        }
    }
}
