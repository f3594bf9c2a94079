//! F33: what a pod costs the agent is bounded, and nothing while it stays as it is.

mod common;

use std::{
    collections::BTreeSet,
    fs,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use common::*;
use nix::{
    sys::{
        resource::{UsageWho, getrusage},
        signal::{Signal, kill},
    },
    unistd::Pid,
};
use sidestep::{
    dataplane::{self, Dataplane, bpffs},
    mesh::{
        desired::{Candidate, Planner},
        facts::facts,
        policy::PortRange,
    },
    node::{NetnsCookie, NetnsFacts},
};
use sidestep_lab::{Agent, Lab, Pod, PodNet, wait_until};

const KEY: &str = "traffic.sidecar.istio.io/excludeOutboundPorts";
const FLAGS: [&str; 4] = ["--http", "127.0.0.1:0", "--splice", "off"];

/// An agent with metrics, and its pods.
struct Scene {
    agent: Agent,
    pods: Vec<Pod>,
    _lab: Lab,
}

impl Scene {
    fn new(tag: &str, names: &[&str]) -> Self {
        let lab = Lab::new(tag).expect("a lab");
        let agent = Agent::start_flags(binary(), &lab, &FLAGS).expect("an agent");
        let pods = names.iter().map(|name| lab.pod(name, PodNet::DUAL).expect("a pod")).collect();
        Self { agent, pods, _lab: lab }
    }

    fn metric(&self, name: &str) -> u32 {
        self.agent.metric(&format!("sidestep_{name}")).expect("metrics") as u32
    }

    fn wait_syncs(&self, count: u32) {
        let goal = self.metric("sync_seconds_count") + count;
        wait_until("more looks", SOON, || self.metric("sync_seconds_count") >= goal)
            .unwrap_or_else(|error| panic!("{error:#}; {}", self.agent.log_tail()));
    }
}

#[test]
fn f33_a_pod_that_stays_as_it_is_is_neither_read_nor_written() {
    let mut scene = Scene::new("c-idle", &["a", "b"]);
    for pod in &scene.pods {
        scene.agent.add_pod(pod).expect("a manifest");
    }
    scene.agent.wait_all_enrolled(&scene.pods).expect("enrolled");
    scene.wait_syncs(1);
    let counts = || [scene.metric("pod_reads_total"), scene.metric("map_writes_total")];
    let before = counts();
    assert!(before[0] >= 2 && before[1] > 0, "{before:?}");
    scene.wait_syncs(3);
    // A file that says the same once more is no change.
    scene.agent.add_pod(&scene.pods[0]).expect("a manifest");
    scene.wait_syncs(1);
    assert_eq!(counts(), before);
    // One that changes is read, and no other.
    let manifest = annotated(scene.pods[0].manifest(), KEY, "81");
    scene.agent.add_manifest("a", &manifest).expect("a manifest");
    wait_until("its rule", SOON, || counts()[1] > before[1]).expect("written");
    assert_eq!(counts()[0], before[0] + 1);
}

#[test]
fn f33_a_pod_that_changes_all_the_time_holds_up_nobody() {
    let mut scene = Scene::new("c-change", &["a", "b"]);
    for pod in &scene.pods {
        scene.agent.add_pod(pod).expect("a manifest");
    }
    scene.agent.wait_all_enrolled(&scene.pods).expect("enrolled");
    let target = addr(ip("10.77.200.9"), 81);
    let _sidecars: Vec<Sidecar> = scene.pods.iter().map(Sidecar::start).collect();
    scene._lab.add_node_address(target.ip()).expect("an address");
    let serve = || sidestep_lab::Server::start_here(sidestep_lab::ServeOpts::on([target]));
    let _server = scene._lab.on_node(serve).expect("runs").expect("a server");
    let [a, b] = [0, 1].map(|n| &scene.pods[n]);
    // 29,000 ports, and something else each time.
    let ports: Vec<String> = (1000..30_000).map(|port| port.to_string()).collect();
    let manifest = annotated(annotated(a.manifest(), KEY, &ports.join(",")), "change", "NUMBER");
    let text = serde_json::to_string(&manifest).expect("JSON");
    let change = |n: u32| {
        let [fresh, file] = [".a", "a.yaml"].map(|name| scene.agent.pods_dir().join(name));
        fs::write(&fresh, text.replace("NUMBER", &n.to_string())).expect("written");
        fs::rename(fresh, file).expect("renamed");
    };
    let (stop, changes) = (AtomicBool::new(false), AtomicU32::new(0));
    let start = Instant::now();
    let before = scene.metric("pod_reads_total");
    let mut others = 0;
    thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                change(changes.fetch_add(1, Ordering::Relaxed));
                // Ten changes a second are the load.
                thread::sleep(Duration::from_millis(100));
            }
        });
        let finish = Finish(&stop);
        while changes.load(Ordering::Relaxed) < 60 {
            // Another one changes now and then, and is seen to at once.
            let excluded = if others % 2 == 0 { "81" } else { "82" };
            let manifest = annotated(b.manifest(), KEY, excluded);
            scene.agent.add_manifest("b", &manifest).expect("a manifest");
            others += 1;
            wait_until("b's change", Duration::from_secs(2), || {
                let answer = b.ask(APP, APP, target).expect("answered");
                (answer.seen.original() == Some(target)) == (excluded == "82")
            })
            .unwrap_or_else(|error| panic!("{error:#}; {}", scene.agent.log_tail()));
            let goal = changes.load(Ordering::Relaxed) + 20;
            wait_until("some changes", SOON, || changes.load(Ordering::Relaxed) >= goal)
                .expect("changes");
        }
        drop(finish);
    });
    let seconds = start.elapsed().as_secs() as u32 + 1;
    let reads = scene.metric("pod_reads_total") - before;
    // A burst of four, once a second, and once in ten seconds.
    let most = 4 + seconds + seconds / 10 + 1 + others;
    assert!(reads <= most && reads < changes.load(Ordering::Relaxed) / 2, "{reads} in {seconds} s");
    // The last word counts in the end.
    scene.agent.add_manifest("a", &annotated(a.manifest(), KEY, "81")).expect("a manifest");
    wait_until("a's last change", SOON, || {
        a.ask(APP, APP, target).expect("answered").seen.orig.is_none()
    })
    .unwrap_or_else(|error| panic!("{error:#}; {}", scene.agent.log_tail()));
}

/// Ends the changes, also when an assertion fails, or the scope would wait for ever.
struct Finish<'a>(&'a AtomicBool);

impl Drop for Finish<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn f33_connections_that_are_refused_make_the_agent_look_ever_more_seldom() {
    let mut scene = Scene::new("c-refused", &["a", "b"]);
    scene.agent.add_pod(&scene.pods[0]).expect("a manifest");
    scene.agent.wait_enrolled(&scene.pods[0]).expect("enrolled");
    let [a, b] = [0, 1].map(|n| &scene.pods[n]);
    let target = addr(a.ipv4(), 8080);
    let searches = || scene.metric("listener_searches_total");
    let start = Instant::now();
    let mut refused = 0;
    while start.elapsed() < Duration::from_secs(6) || refused < 200 {
        b.ask(PROXY, PROXY, target).expect_err("nobody listens");
        refused += 1;
    }
    let seconds = start.elapsed().as_secs() as u32;
    // After 0, 0.1, 0.3, 0.7, 1.5, 3.1 and 6.1 seconds, and then every three.
    let most = 7 + seconds / 3;
    assert!((3..=most).contains(&searches()), "{} in {seconds} s", searches());
    // A proxy that starts is found all the same.
    let _sidecar = Sidecar::start(a);
    assert_original(&b.ask(PROXY, PROXY, target).expect("steered"), target);
}

/// F33: what one pod has to tell waits for the agent, and takes no other's room.
#[test]
fn f33_a_pod_whose_connections_are_refused_hides_no_other_pods() {
    let mut scene = Scene::new("c-hides", &["hostile", "victim", "client"]);
    for pod in &scene.pods[..2] {
        scene.agent.add_pod(pod).expect("a manifest");
        scene.agent.wait_enrolled(pod).expect("enrolled");
    }
    let [hostile, victim, client] = [0, 1, 2].map(|n| &scene.pods[n]);
    let refuse = |pod: &Pod| {
        client.ask(PROXY, PROXY, addr(pod.ipv4(), 8080)).expect_err("nobody listens");
    };
    let busy = Pid::from_raw(scene.agent.pid().expect("it runs") as i32);
    kill(busy, Signal::SIGSTOP).expect("stopped");
    (0..200).for_each(|_| refuse(hostile));
    refuse(victim);
    kill(busy, Signal::SIGCONT).expect("goes on");
    let searches = || scene.metric("listener_searches_total") == 2;
    wait_until("a search in each pod", SOON, searches).expect("both are looked after");
}

/// As many pods as a large node has (docs/scale.md).
const PODS: u64 = 250;
/// As many syncs are measured.
const SYNCS: u32 = 40;

fn candidate(n: u64) -> Candidate {
    let name = format!("shop/pod-{n}");
    let pod = serde_json::json!({
        "metadata": {
            "name": format!("pod-{n}"), "namespace": "shop", "uid": format!("uid-{n}"),
            "annotations": { "sidecar.istio.io/status": "{}" },
        },
        "spec": { "containers": [{ "name": "app" }, { "name": "istio-proxy" }] },
        "status": { "podIPs": [{ "ip": format!("10.1.{}.{}", n / 250, n % 250 + 1) }] },
    });
    let pod = serde_json::from_value(pod).expect("a pod");
    let facts = facts(&pod).expect("facts").expect("in the mesh").facts;
    assert_eq!(facts.name, name);
    let netns = NetnsFacts {
        path: format!("/run/netns/{n}").into(),
        cookie: NetnsCookie(1_000_000 + n),
        addresses: facts.ips.iter().map(|ip| (*ip, 2)).collect(),
        more_addresses: false,
        interfaces: [("lo".to_owned(), 1), ("eth0".to_owned(), 2)].into(),
        routes: Vec::new(),
        route_localnet: false,
        own_nat: false,
        rules: Ok(Vec::new()),
        forwarded: 0,
    };
    Candidate { facts: Arc::new(facts), netns: Arc::new(netns), beside: None }
}

/// The time that this process has spent in user space.
fn user_time() -> Duration {
    let used = getrusage(UsageWho::RUSAGE_SELF).expect("usage").user_time();
    Duration::new(used.tv_sec() as u64, used.tv_usec() as u32 * 1000)
}

/// One pod of many changes: the others cost next to nothing, in user space as in the kernel. What
/// that took before and takes now is in docs/scale.md.
#[test]
fn pods_that_stay_as_they_are_cost_a_sync_nothing() {
    let root = format!("/sys/fs/bpf/sidestep-cost-{}", std::process::id());
    let pins = bpffs::pins(root.as_ref(), dataplane::LAYOUT).expect("pins");
    let mut dataplane = Dataplane::load(&pins, Duration::from_millis(100), false).expect("loaded");
    let mut candidates: Vec<Candidate> = (0..PODS).map(candidate).collect();
    let (host, owners, keep) = Default::default();
    let limits = dataplane.limits();
    let mut planner = Planner::default();
    let mut applied = None;
    let mut sync = |candidates: &[Candidate]| {
        let goal = planner.desired(candidates, &host, &owners, &limits);
        let state = (goal, BTreeSet::clone(&keep));
        let mut written = 0;
        if applied.as_ref() != Some(&state) {
            let done = dataplane.apply(&state.0, &state.1).expect("applied");
            written = done.written;
            applied = Some(state.clone());
        }
        written
    };
    let start = user_time();
    assert!(sync(&candidates) > 5 * PODS as usize);
    let first = user_time() - start;
    let start = user_time();
    for n in 0..SYNCS {
        let policy = &mut Arc::make_mut(&mut candidates[100].facts).policy;
        policy.exclude_outbound_ports = [PortRange::one(2000 + n as u16)].into();
        let written = sync(&candidates);
        assert!((1..=3).contains(&written), "{written}");
    }
    let each = (user_time() - start) / SYNCS;
    dataplane::unload(&pins).expect("unloaded");
    println!("user space: all {PODS} pods {first:?}, one of them {each:?}");
    assert!(each * 5 < first, "{each:?} for one pod, {first:?} for all {PODS}");
}
