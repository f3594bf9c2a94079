//! The agent comes and goes; connections do not notice.

mod common;

use std::{
    collections::BTreeSet,
    sync::atomic::AtomicBool,
    thread,
    time::{Duration, Instant},
};

use common::{
    load::{Finish, Load},
    *,
};
use sidestep::dataplane::LAYOUT;
use sidestep_lab::{Agent, PodNet, slowdown, wait_until};

/// No build's own layout; sorts before those.
const OTHER: &str = "v0";

/// To a build whose maps have another layout, and back, and forth again.
/// A10.
#[test]
fn traffic_does_not_notice_other_maps() {
    let mut node = Node::new("layout");
    node.agent.add_pod(&node.a).expect("manifest a");
    node.agent.wait_enrolled(&node.a).expect("a is enrolled");
    let _sidecar = Sidecar::start(&node.a);
    let _app = node.a.serve(addr(ip("0.0.0.0"), 8080), APP, APP).expect("app");
    // Open from before, and asked about at the end.
    let target = addr(ip(REMOTE4), 443);
    let old = node.a.run(APP, APP, || std::net::TcpStream::connect(target)).expect("runs");
    let old = old.expect("connected");
    let stop = AtomicBool::new(false);
    let loads = ["outbound", "outbound v6", "inbound", "inbound v6"].map(|n| Load::new(n, &stop));
    let paths = [
        (&node.a, addr(ip(REMOTE4), 80)),
        (&node.a, addr(ip(REMOTE6), 80)),
        (&node.b, addr(node.a.ipv4(), 8080)),
        (&node.b, addr(node.a.ipv6(), 8080)),
    ];
    let layouts = |agent: &Agent| {
        let dirs = std::fs::read_dir(agent.bpffs()).expect("pins");
        let name = |dir: std::io::Result<std::fs::DirEntry>| dir.expect("entry").file_name();
        let mut names: Vec<_> = dirs.map(name).collect();
        names.sort();
        names
    };
    thread::scope(|scope| {
        for (load, (from, target)) in loads.iter().zip(paths) {
            scope.spawn(move || load.run(from, target));
        }
        let finish = Finish(&stop);
        for layout in [Some(OTHER), None, Some(OTHER)] {
            let before = node.agent.log().matches("took over").count();
            node.agent.upgrade_to(layout).expect("starts");
            wait_until("the new agent", Duration::from_secs(30), || {
                node.agent.log().matches("took over").count() > before
            })
            .unwrap_or_else(|error| panic!("{error:#}; {}", node.agent.log_tail()));
            loads.iter().for_each(|load| load.wait_more(bulk(50)));
            let status = node.agent.status().expect("status");
            let pods = status["pods"].as_array().expect("pods");
            assert!(pods.len() == 1 && pods.iter().all(|pod| pod["inbound"] == true), "{status}");
        }
        drop(finish);
    });
    // The old connection's answer is that of the maps it was made with: they are still there.
    assert_eq!(layouts(&node.agent), [OTHER, LAYOUT]);
    assert_eq!(old.peer_addr().expect("a peer"), target);
    drop(old);
    wait_until("the old maps to go", Duration::from_secs(20), || layouts(&node.agent) == [OTHER])
        .unwrap_or_else(|error| panic!("{error:#}; {}", node.agent.log_tail()));
    node.agent.unload().expect_err("an agent runs");
    node.agent.terminate().expect("ends");
    node.agent.unload().expect("unloads");
    assert!(!node.agent.bpffs().exists());
}

/// Back to a build that has fewer programs: the others' links go, and nothing else does.
#[test]
fn hooks_that_this_build_does_not_have_are_taken_away() {
    let mut node = Node::enrolled("fewer");
    let _sidecar = Sidecar::start(&node.a);
    let links = node.agent.bpffs().join(LAYOUT).join("links");
    let names = || {
        let entries = std::fs::read_dir(&links).expect("links");
        entries.map(|entry| entry.expect("an entry").file_name()).collect::<BTreeSet<_>>()
    };
    let before = names();
    node.agent.terminate().expect("ends");
    // Two of them on a hook do no harm: the second finds the peer's name right already.
    std::fs::rename(links.join("getpeername4"), links.join("former_hook")).expect("renamed");
    node.agent.restart().expect("starts");
    node.agent.wait_log("former_hook").expect("said");
    wait_until("the links to be as before", Duration::from_secs(10), || names() == before)
        .unwrap_or_else(|error| panic!("{error:#}: {:?}", names()));
    let target = addr(ip(REMOTE4), 80);
    assert_original(&node.a.ask(APP, APP, target).expect("captured"), target);
}

/// A10.
#[test]
fn traffic_does_not_notice_a_killed_or_restarted_agent() {
    let mut node = Node::new("killed");
    node.agent.add_pod(&node.a).expect("manifest a");
    node.agent.wait_enrolled(&node.a).expect("a is enrolled");
    let _sidecar = Sidecar::start(&node.a);
    let _app = node.a.serve(addr(ip("0.0.0.0"), 8080), APP, APP).expect("app");
    let stop = AtomicBool::new(false);
    let loads = ["outbound", "outbound v6", "inbound", "inbound v6"].map(|n| Load::new(n, &stop));
    let (a, b) = (&node.a, &node.b);
    let paths = [
        (a, addr(ip(REMOTE4), 80)),
        (a, addr(ip(REMOTE6), 80)),
        (b, addr(a.ipv4(), 8080)),
        (b, addr(a.ipv6(), 8080)),
    ];
    thread::scope(|scope| {
        for (load, (from, target)) in loads.iter().zip(paths) {
            scope.spawn(move || load.run(from, target));
        }
        let finish = Finish(&stop);
        for _ in 0..3 {
            node.agent.kill9();
            loads.iter().for_each(|load| load.wait_more(bulk(50)));
            let before = node.agent.log().matches("BPF programs attached").count();
            node.agent.restart().expect("starts");
            wait_until("the new agent", Duration::from_secs(10), || {
                node.agent.log().matches("BPF programs attached").count() > before
            })
            .expect("in force");
            loads.iter().for_each(|load| load.wait_more(bulk(50)));
        }
        node.agent.restart().expect("an orderly restart");
        loads.iter().for_each(|load| load.wait_more(bulk(100)));
        drop(finish);
    });
    assert!(node.agent.log().contains("adopted=1"), "{}", node.agent.log_tail());
}

#[test]
fn a_pod_that_left_while_the_agent_was_away_is_dropped_and_others_stay() {
    let mut node = Node::enrolled("away");
    node.agent.kill9();
    node.agent.remove_pod(&node.b).expect("removed");
    node.agent.restart().expect("starts");
    node.agent.wait_gone(&node.b).expect("gone");
    node.agent.wait_enrolled(&node.a).expect("stays");
}

#[test]
fn a_manifest_that_turned_bad_while_the_agent_was_away_drops_no_pod() {
    let mut node = Node::enrolled("bad");
    let _sidecar = Sidecar::start(&node.a);
    let target = addr(ip(REMOTE4), 80);
    let later = node.lab.pod("later", PodNet { v4: true, v6: true }).expect("a pod");
    node.agent.kill9();
    let file = node.agent.pods_dir().join("a.yaml");
    std::fs::write(&file, "apiVersion: v1\nkind: [").expect("written");
    node.agent.restart().expect("starts");
    node.agent.wait_log("is not valid YAML").expect("said");
    // A pod that the agent has seen comes and goes as ever.
    node.agent.add_pod(&later).expect("added");
    node.agent.wait_enrolled(&later).expect("enrolled");
    node.agent.remove_pod(&later).expect("removed");
    node.agent.wait_gone(&later).expect("gone");
    assert_original(&node.a.ask(APP, APP, target).expect("still captured"), target);
    // The file is mended: now it is known that the pod is gone.
    std::fs::remove_file(&file).expect("removed");
    node.agent.wait_gone(&node.a).expect("gone");
}

/// A5.
#[test]
fn a_terminating_pod_is_intercepted_until_its_namespace_is_gone() {
    let node = Node::enrolled("terminating");
    let _sidecar = Sidecar::start(&node.a);
    let target = addr(ip(REMOTE4), 80);
    // The name goes, the namespace lives on: processes are in it.
    let netns = std::fs::File::open(node.a.netns()).expect("a namespace");
    nix::mount::umount2(&node.a.netns(), nix::mount::MntFlags::MNT_DETACH).expect("unmounted");
    let ask = || {
        thread::scope(|scope| {
            scope
                .spawn(|| {
                    nix::sched::setns(&netns, nix::sched::CloneFlags::CLONE_NEWNET)?;
                    sidestep_lab::ask(target, None)
                })
                .join()
                .expect("no panic")
        })
    };
    // Each file that cannot be read is told of by a look at everything.
    for n in 0..3 {
        let file = format!("nudge{n}.yaml");
        std::fs::write(node.agent.pods_dir().join(&file), "a: [").expect("written");
        node.agent.wait_log(&file).expect("looked");
        assert_original(&ask().expect("captured"), target);
    }
    assert!(node.agent.status().expect("status")["pods"].as_array().is_some_and(|p| p.len() == 2));
}

#[test]
fn manifests_take_effect_within_a_second() {
    let mut node = Node::new("watch");
    let _sidecar = Sidecar::start(&node.a);
    node.agent.wait_log("BPF programs attached").expect("starts");
    let pods =
        |agent: &Agent| agent.status().expect("status")["pods"].as_array().expect("pods").len();
    let mut took = Vec::new();
    for _ in 0..3 {
        let start = Instant::now();
        node.agent.add_pod(&node.a).expect("manifest a");
        wait_until("a pod", SOON, || pods(&node.agent) == 1).expect("added");
        took.push(start.elapsed());
        let start = Instant::now();
        node.agent.remove_pod(&node.a).expect("removed");
        wait_until("no pod", SOON, || pods(&node.agent) == 0).expect("removed");
        took.push(start.elapsed());
    }
    // Most of them: what a busy machine does to one is not the agent's doing. Without the watch
    // each would wait for the next look at everything, up to three seconds.
    assert!(took[3] < Duration::from_secs(1) * slowdown(), "{took:?}");
    // Several documents in one file.
    let text = [&node.a, &node.b]
        .map(|pod| serde_json::to_string(&pod.manifest()).expect("JSON"))
        .join("\n---\n");
    std::fs::write(node.agent.pods_dir().join("both.yml"), text).expect("written");
    wait_until("both pods", SOON, || pods(&node.agent) == 2).expect("added");
    node.agent.wait_enrolled(&node.b).expect("enrolled");
}

#[test]
fn a_second_agent_and_unload_are_refused_while_one_runs() {
    let node = Node::enrolled("second");
    let dir = node.agent.pods_dir().display().to_string();
    let cgroup = node.lab.cgroup().display().to_string();
    let error =
        node.agent.command(&["run", "--pods", &dir, "--cgroup", &cgroup]).expect_err("refused");
    assert!(format!("{error:#}").contains("another sidestep process"), "{error:#}");
    let error = node.agent.command(&["unload"]).expect_err("refused");
    assert!(format!("{error:#}").contains("another sidestep process"), "{error:#}");
    assert_eq!(node.agent.status().expect("status")["pods"].as_array().map(Vec::len), Some(2));
}
