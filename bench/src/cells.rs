//! The measurements, and the order that they are made in.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use anyhow::{Context, Error, Result, ensure};
use clap::ValueEnum;
use serde::Serialize;
use sidestep_lab::{APP, interrupted, wait_for};

use crate::app::Service;
use crate::client::{Bulk, Client, Protocol, Tally, churn};
use crate::mode::{Mode, Proxy};
use crate::progress::Progress;
use crate::sample::{Sample, Samples};
use crate::usage::{self, Cpu};
use crate::world::{InForce, World};

/// Measurements that are made one after the other in a mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Group {
    /// Requests and answers on connections that stay
    Keepalive,
    /// A connection for each request
    Connect,
    /// One connection, as fast as it goes
    Bulk,
    /// How much can be written to a reader that has stopped
    Stopped,
    /// The kernel's memory and tracked connections, for each idle connection
    Memory,
    /// Latency and connection rate beside more and more open connections
    Connections,
    /// The same beside more and more enrolled pods
    Pods,
}

impl fmt::Display for Group {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&format!("{self:?}").to_lowercase())
    }
}

impl Group {
    /// All groups of measurements.
    pub const EVERY: [Self; 7] = [
        Self::Keepalive,
        Self::Connect,
        Self::Bulk,
        Self::Stopped,
        Self::Memory,
        Self::Connections,
        Self::Pods,
    ];
}

/// How much of everything.
#[derive(Clone, Debug, Serialize)]
pub struct Settings {
    /// The number of rounds.
    pub rounds: usize,
    /// How long one measurement lasts, in seconds.
    pub seconds: f64,
    /// The groups of measurements.
    pub groups: Vec<Group>,
    /// The modes that are compared.
    pub modes: Vec<Mode>,
    /// The sidecars that are used.
    pub proxies: Vec<Proxy>,
    /// Bytes of a request.
    pub sizes: Vec<usize>,
    /// Keep-alive connections at the same time, in ascending order.
    pub connections: Vec<usize>,
    /// Clients of the connection rate.
    pub clients: Vec<usize>,
    /// Idle connections of which the memory is measured.
    pub idle: usize,
    /// Open connections, in ascending order.
    pub open: Vec<usize>,
    /// Enrolled pods, in ascending order.
    pub pods: Vec<usize>,
    /// How long a writer must have been stuck, in seconds.
    pub stuck: f64,
    /// Rounds of what moves little or takes long.
    pub few_rounds: usize,
    /// All measurements of a round in a mode, before the next mode has its turn: quicker, and the
    /// modes are further apart.
    pub at_once: bool,
}

/// Connections that are active while others only stay open.
const ACTIVE: usize = 10;
/// Clients of the connection rate in that case.
const BESIDE: usize = 8;

impl Settings {
    fn slice(&self) -> Duration {
        Duration::from_secs_f64(self.seconds)
    }

    /// Whether the group is measured through that proxy in that round.
    fn takes(&self, group: Group, proxy: Proxy, round: usize) -> bool {
        let (proxy, rounds) = match group {
            Group::Keepalive | Group::Connect => (true, self.rounds),
            Group::Bulk => (proxy != Proxy::Http, self.rounds),
            Group::Stopped => (proxy != Proxy::Http, self.few_rounds + 1),
            Group::Memory => (proxy != Proxy::Http, self.few_rounds),
            // One proxy of those that there are: it is about the kernel.
            Group::Connections | Group::Pods => {
                (self.proxies.first() == Some(&proxy), self.few_rounds)
            }
        };
        proxy && round < rounds.min(self.rounds)
    }

    /// All measurements, in their order.
    pub fn plan(&self) -> Vec<Step> {
        let mut steps = Vec::new();
        let mut add = |round: usize, proxy, groups: Vec<Group>, pods| {
            let count = if groups.is_empty() { 0 } else { self.modes.len() };
            steps.extend((0..count).map(|turn| Step {
                round,
                turn,
                proxy,
                groups: groups.clone(),
                mode: self.modes[(round + turn) % count],
                pods,
            }));
        };
        let due = |bundle: &[Group], proxy, round| -> Vec<Group> {
            let groups = bundle.iter().filter(|group| self.groups.contains(group));
            groups.copied().filter(|group| self.takes(*group, proxy, round)).collect()
        };
        for round in 0..self.rounds {
            for proxy in &self.proxies {
                if self.at_once {
                    add(round, *proxy, due(&BUNDLES.concat(), *proxy, round), 2);
                    continue;
                }
                for bundle in BUNDLES {
                    add(round, *proxy, due(bundle, *proxy, round), 2);
                }
            }
        }
        // Last: pods that are there stay, and would be in the way of the others.
        for pods in &self.pods {
            for round in 0..self.rounds {
                for proxy in &self.proxies {
                    add(round, *proxy, due(&[Group::Pods], *proxy, round), *pods);
                }
            }
        }
        steps
    }
}

/// What is measured without leaving the mode in between: little enough for the modes to follow
/// each other within seconds.
const BUNDLES: &[&[Group]] = &[
    &[Group::Keepalive],
    &[Group::Connect, Group::Bulk],
    &[Group::Connections],
    // Last: its connections are stuck until the application ends.
    &[Group::Memory, Group::Stopped],
];

/// Some groups of measurements in one mode.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    pub round: usize,
    pub turn: usize,
    pub proxy: Proxy,
    pub groups: Vec<Group>,
    pub mode: Mode,
    pub pods: usize,
}

/// Takes all steps. Gives what was measured, also when it was interrupted or a mode could not be
/// left again: the error says which.
pub fn run(settings: &Settings, world: &mut World, progress: &Progress) -> (Samples, Result<()>) {
    let mut samples = Samples::default();
    let result = settings.plan().into_iter().try_for_each(|step| {
        progress.step(&step);
        take(settings, world, &step, &mut samples)
    });
    progress.finish();
    (samples, result)
}

fn take(settings: &Settings, world: &mut World, step: &Step, samples: &mut Samples) -> Result<()> {
    ensure!(!interrupted(), "interrupted");
    world.pods(step.pods)?;
    world.use_proxy(step.proxy)?;
    let in_force = match InForce::new(world, step.mode) {
        Ok(in_force) => in_force,
        Err(err) => {
            ensure!(!interrupted(), "interrupted");
            let err = err.context("the mode could not be put in force");
            let groups: Vec<String> = step.groups.iter().map(Group::to_string).collect();
            samples.0.push(sample(step, groups.join("+"), 0, Err(err)));
            return Ok(());
        }
    };
    let cpu = Cpu::new(world.lab.cgroup())?;
    let logs = world.logs();
    let mut turn = Turn { settings, world, in_force: &in_force, step, cpu, logs, samples };
    for group in &step.groups {
        turn.measure(*group);
    }
    if step.groups.contains(&Group::Stopped) {
        world.restart_app()?;
    }
    let drained = world.wait_drained();
    in_force.end(world).with_context(|| format!("leaving the mode {}", step.mode))?;
    ensure!(!interrupted(), "interrupted");
    if let Err(err) = drained {
        samples.0.push(sample(step, "closing".to_owned(), 0, Err(err)));
        world.stop_sidecars();
    }
    Ok(())
}

fn sample(step: &Step, cell: String, spliced: usize, values: Result<Values>) -> Sample {
    let Step { round, turn, proxy, mode, .. } = *step;
    let spliced = (mode.spliced() > 0).then_some(spliced);
    let (values, error) = match values {
        Ok(values) => (values, None),
        // The agent's status may be in it, and be long.
        Err(err) => (Values::new(), Some(format!("{err:#}").chars().take(600).collect())),
    };
    Sample { round, turn, proxy, cell, mode, spliced, values, error }
}

type Values = BTreeMap<&'static str, f64>;

/// A group in a mode.
struct Turn<'a> {
    settings: &'a Settings,
    world: &'a World,
    in_force: &'a InForce,
    step: &'a Step,
    cpu: Cpu,
    /// What was written before it began.
    logs: Vec<String>,
    samples: &'a mut Samples,
}

impl Turn<'_> {
    fn measure(&mut self, group: Group) {
        match group {
            Group::Keepalive => self.keepalive(),
            Group::Connect => {
                for clients in &self.settings.clients {
                    let values = self.connect(*clients);
                    self.put(format!("connect/{clients}"), 0, values);
                }
            }
            Group::Bulk => {
                let cells = [("bulk/up", Service::Sink), ("bulk/down", Service::Source)];
                self.with_bulk(cells, Self::transfer);
            }
            Group::Stopped => {
                let stopped = Service::Stopped;
                let cells = [("stopped/64K", stopped), ("stopped/1K", stopped)];
                self.with_bulk(cells, Self::stuff);
            }
            Group::Memory => {
                let (spliced, values) = split(self.memory());
                self.put("memory".to_owned(), spliced, values);
            }
            Group::Connections => self.beside_connections(),
            Group::Pods => {
                let (cell, pods) = ("pods", self.step.pods);
                let opened = self.open(ACTIVE);
                let (spliced, kept) = split(opened);
                let kept = kept.and_then(|mut client| {
                    self.costed(|settings| client.ask(ACTIVE, 64, settings.slice()))
                });
                self.put(format!("{cell}/{pods}/keepalive"), spliced, kept);
                let values = self.connect(BESIDE);
                self.put(format!("{cell}/{pods}/connect"), 0, values);
            }
        }
    }

    fn put(&mut self, cell: String, spliced: usize, values: Result<Values>) {
        if interrupted() {
            return; // it failed for no other reason
        }
        let values = values.map_err(|err| {
            let said = self.world.said_since(&self.logs);
            if said.is_empty() { err } else { Error::msg(format!("{err:#} (in the pods: {said})")) }
        });
        self.samples.0.push(sample(self.step, cell, spliced, values));
    }

    fn protocol(&self) -> (Protocol, Service) {
        match self.step.proxy {
            Proxy::Http => (Protocol::Http, Service::Http),
            _ => (Protocol::Echo, Service::Echo),
        }
    }

    /// Opens that many connections, and waits until they are spliced where they are to be.
    fn open(&self, count: usize) -> Result<(Client, usize)> {
        let (protocol, service) = self.protocol();
        let target = self.world.target(self.step.mode, service);
        self.in_force.open(self.step.proxy, count, || {
            self.world.client.run(APP, APP, || {
                let mut client = Client::new(target, protocol)?;
                client.open(count)?;
                Ok(client)
            })?
        })
    }

    /// Runs a slice of load: its rate, its times, and what it cost.
    fn costed(&self, load: impl FnOnce(&Settings) -> Result<Tally>) -> Result<Values> {
        let before = self.cpu.micros()?;
        let tally = load(self.settings)?;
        let cpu = self.cpu.micros()? - before;
        ensure!(!tally.times.is_empty(), "nothing was answered");
        Ok([
            ("rate", tally.rate()),
            ("p50_us", tally.micros(0.5)),
            ("p99_us", tally.micros(0.99)),
            ("p999_us", tally.micros(0.999)),
            ("cpu_us", cpu / tally.times.len() as f64),
        ]
        .into())
    }

    fn keepalive(&mut self) {
        let most = self.settings.connections.last().copied().unwrap_or(1);
        let mut client = None;
        for size in &self.settings.sizes {
            for active in &self.settings.connections {
                let cell = format!("keepalive/{}/{active}", size_name(*size));
                // After a failure with other connections.
                let opened = client.take().map_or_else(|| self.open(most), Ok);
                let (spliced, opened) = split(opened);
                let values = opened.and_then(|mut open| {
                    let slice = |settings: &Settings| open.ask(*active, *size, settings.slice());
                    let values = self.costed(slice)?;
                    client = Some((open, spliced));
                    Ok(values)
                });
                self.put(cell, spliced, values);
            }
        }
    }

    fn connect(&self, clients: usize) -> Result<Values> {
        let (protocol, service) = self.protocol();
        let target = self.world.target(self.step.mode, service);
        self.costed(|settings| {
            let slice = settings.slice();
            self.world.client.run(APP, APP, || churn(target, protocol, clients, slice))?
        })
    }

    /// Opens a connection for each cell, and then works on one after the other.
    fn with_bulk(
        &mut self,
        cells: [(&str, Service); 2],
        work: impl Fn(&Self, Bulk, &str) -> Result<Values>,
    ) {
        let opened = self.in_force.open(self.step.proxy, cells.len(), || {
            self.world.client.run(APP, APP, || -> Result<Vec<Bulk>> {
                let targets = cells.iter().map(|(_, s)| self.world.target(self.step.mode, *s));
                targets.map(Bulk::open).collect()
            })?
        });
        let (spliced, opened) = split(opened);
        let mut opened = opened.map(Vec::into_iter);
        for (cell, _) in cells {
            let values = match &mut opened {
                Ok(bulks) => {
                    bulks.next().context("no connection").and_then(|bulk| work(self, bulk, cell))
                }
                Err(err) => Err(Error::msg(format!("{err:#}"))),
            };
            self.put(cell.to_owned(), spliced, values);
        }
    }

    fn stuff(&self, bulk: Bulk, cell: &str) -> Result<Values> {
        let size = if cell.ends_with("/1K") { 1 << 10 } else { 64 << 10 };
        let stuck = Duration::from_secs_f64(self.settings.stuck);
        Ok([("bytes", bulk.stuff(size, stuck)? as f64)].into())
    }

    fn transfer(&self, bulk: Bulk, cell: &str) -> Result<Values> {
        let slice = self.settings.slice();
        let before = self.cpu.micros()?;
        let down = cell.ends_with("/down");
        let moved = if down { bulk.receive(slice)? } else { bulk.send(slice)? };
        let cpu = self.cpu.micros()? - before;
        let bytes = moved.bytes as f64;
        Ok([
            ("gbps", bytes * 8.0 / moved.elapsed.as_secs_f64() / 1e9),
            ("cpu_us_per_mb", cpu / (bytes / 1e6)),
        ]
        .into())
    }

    fn memory(&self) -> Result<(Values, usize)> {
        let count = self.settings.idle;
        let patience = Duration::from_secs_f64(2.0 * self.settings.stuck);
        let before = settled_slab(patience)?;
        let (client, spliced) = self.open(count)?;
        let after = settled_slab(patience)?;
        let tracked = |pod| usage::tracked(pod).map(|number| number / count as f64);
        let values = [
            ("kernel_bytes", (after - before) / count as f64),
            ("tracked_client", tracked(&self.world.client)?),
            ("tracked_server", tracked(&self.world.server)?),
        ];
        drop(client);
        Ok((values.into(), spliced))
    }

    fn beside_connections(&mut self) {
        let mut client = None;
        for count in &self.settings.open {
            let count = (*count).max(ACTIVE);
            let opened = match client.take() {
                None => self.open(count),
                Some(client) => self.open_more(client, count),
            };
            let (spliced, opened) = split(opened);
            let kept = opened.and_then(|mut open| {
                let slice = |settings: &Settings| open.ask(ACTIVE, 64, settings.slice());
                let values = self.costed(slice)?;
                client = Some(open);
                Ok(values)
            });
            self.put(format!("connections/{count}/keepalive"), spliced, kept);
            if client.is_none() {
                return; // it failed, and more of it would fail too
            }
            let values = self.connect(BESIDE);
            self.put(format!("connections/{count}/connect"), 0, values);
        }
    }

    fn open_more(&self, mut client: Client, count: usize) -> Result<(Client, usize)> {
        let spliced = self
            .in_force
            .open_more(count, || self.world.client.run(APP, APP, || client.open(count))?)?;
        Ok((client, spliced))
    }
}

/// The kernel frees what was closed a little later.
fn settled_slab(patience: Duration) -> Result<f64> {
    let mut last = usage::slab_bytes()?;
    let settled = wait_for("the kernel's memory to settle", patience, || {
        std::thread::sleep(Duration::from_millis(100));
        let now = usage::slab_bytes().ok()?;
        let still = (now - last).abs() < 32_768.0;
        last = now;
        still.then_some(now)
    });
    // On a machine that does other things it never does.
    ensure!(!interrupted(), "interrupted");
    Ok(settled.unwrap_or(last))
}

fn split<T>(result: Result<(T, usize)>) -> (usize, Result<T>) {
    match result {
        Ok((value, spliced)) => (spliced, Ok(value)),
        Err(err) => (0, Err(err)),
    }
}

/// Formats a size, as `64B` or `1K`.
pub fn size_name(bytes: usize) -> String {
    if bytes < 1024 { format!("{bytes}B") } else { format!("{}K", bytes / 1024) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings() -> Settings {
        Settings {
            rounds: 3,
            seconds: 1.0,
            groups: vec![Group::Keepalive, Group::Memory, Group::Pods],
            modes: vec![Mode::Direct, Mode::Iptables, Mode::Off],
            proxies: vec![Proxy::Relay, Proxy::Http],
            sizes: vec![64],
            connections: vec![1],
            clients: vec![1],
            idle: 1,
            open: vec![10],
            pods: vec![2, 5],
            stuck: 1.0,
            few_rounds: 2,
            at_once: false,
        }
    }

    #[test]
    fn every_mode_has_each_place_once() {
        let plan = settings().plan();
        for mode in settings().modes {
            let mut turns: Vec<_> = plan
                .iter()
                .filter(|s| {
                    s.mode == mode && s.groups == [Group::Keepalive] && s.proxy == Proxy::Http
                })
                .map(|s| s.turn)
                .collect();
            turns.sort_unstable();
            assert_eq!(turns, [0, 1, 2]);
        }
    }

    #[test]
    fn what_takes_long_has_fewer_rounds_and_pods_come_last() {
        let plan = settings().plan();
        let count = |group| plan.iter().filter(|step| step.groups == [group]).count();
        assert_eq!(count(Group::Keepalive), 3 * 3 * 2);
        assert_eq!(count(Group::Memory), 2 * 3);
        assert_eq!(count(Group::Pods), 2 * 2 * 3);
        let first = plan.iter().position(|step| step.groups == [Group::Pods]).expect("pods");
        assert!(plan[first..].iter().all(|step| step.groups == [Group::Pods]));
        assert!(plan[first..].is_sorted_by_key(|step| step.pods));
    }
}
