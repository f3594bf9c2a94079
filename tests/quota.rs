//! F31: what one pod asks for is no other's loss.

mod common;

use std::{fs, net::SocketAddr, time::Duration};

use common::*;
use libbpf_rs::{MapCore, MapFlags};
use sidestep_lab::{Pod, PodNet, wait_until};

const KEY: &str = "traffic.sidecar.istio.io/excludeOutboundPorts";
/// Some server off the pods.
const REMOTE: &str = "10.77.200.9";
/// As many rules as the map has room for.
const ROOM: u32 = 1024 * 64;

/// Whether the pod's call is captured; else it comes to the server itself.
fn is_captured(pod: &Pod, target: SocketAddr) -> bool {
    pod.ask(APP, APP, target).expect("answered").seen.original() == Some(target)
}

/// With a sidecar for a pod, and a server off the pods on two ports, of which one is excluded.
fn becomes(node: &Node, what: &str, pod: &Pod, captured: [bool; 2]) {
    let targets = [80, 81].map(|port| addr(ip(REMOTE), port));
    let asked = || targets.map(|target| is_captured(pod, target));
    wait_until(&format!("{what}: {captured:?}"), SOON, || asked() == captured)
        .unwrap_or_else(|error| panic!("{error:#}: {:?}; {}", asked(), node.agent.log_tail()));
}

/// A rule of nobody's, in the namespace with this cookie.
fn rule(cookie: u64, n: u32) -> Vec<u8> {
    // Its list and port: `struct port_rule_key`.
    let list = 0x100 + (n >> 16);
    let mut key = (32u32 * 3 + 16).to_ne_bytes().to_vec();
    key.extend(list.to_ne_bytes());
    key.extend(cookie.to_ne_bytes());
    key.extend((n as u16).to_be_bytes());
    key.extend([0; 2]);
    key
}

/// Fills `port_rules` up.
fn fill(node: &Node, cookie: u64) -> u32 {
    let map = node.map("port_rules");
    assert_eq!(map.key_size() as usize, rule(0, 0).len(), "the key is laid out as here");
    (0..=ROOM).take_while(|n| map.update(&rule(cookie, *n), &[1], MapFlags::ANY).is_ok()).count()
        as u32
}

#[test]
fn f31_two_hostile_pods_take_nothing_from_a_third() {
    let mut node = Node::new("q-greedy");
    let servers = [80, 81].map(|port| node.remote(addr(ip(REMOTE), port)));
    let ports: Vec<String> = (1..=u16::MAX).step_by(2).map(|port| port.to_string()).collect();
    let victim = node.lab.pod("victim", PodNet::DUAL).expect("a pod");
    let sidecars = [&node.a, &node.b, &victim].map(Sidecar::start);
    for pod in [&node.a, &node.b] {
        let text = ports.join(",");
        assert!(text.len() > 180_000 && text.len() < 256 * 1024);
        node.agent.add_manifest(pod.name(), &annotated(pod.manifest(), KEY, &text)).expect("added");
        node.agent.wait_enrolled(pod).expect("enrolled");
    }
    let manifest = annotated(victim.manifest(), KEY, "81");
    node.agent.add_manifest("victim", &manifest).expect("added");
    node.agent.wait_enrolled(&victim).expect("enrolled");
    for n in 0..2 {
        becomes(&node, "what the victim excludes is direct", &victim, [true, false]);
        for pod in [&node.a, &node.b] {
            becomes(&node, "all of a hostile pod is captured", pod, [true, true]);
            let told =
                format!("pod lab/{}: all its traffic is captured until this is fixed", pod.name());
            wait_until("each agent to say so", SOON, || {
                node.agent.log().matches(&told).count() > n
            })
            .unwrap_or_else(|error| panic!("{error:#}; {}", node.agent.log_tail()));
        }
        node.agent.restart().expect("starts");
        wait_until("the next agent", SOON, || {
            node.agent.log().matches("BPF programs attached").count() > n + 1
        })
        .expect("in force");
    }
    drop((servers, sidecars));
}

#[test]
fn f31_a_full_map_is_emptied_before_it_is_filled() {
    let mut node = Node::new("q-full");
    let _servers = [80, 81].map(|port| node.remote(addr(ip(REMOTE), port)));
    let _sidecar = Sidecar::start(&node.a);
    node.agent.wait_log("BPF programs attached").expect("starts");
    node.agent.kill9();
    // What an agent may have left of pods that are gone.
    assert!(fill(&node, 1) >= ROOM - 1);
    node.agent.add_manifest("a", &annotated(node.a.manifest(), KEY, "81")).expect("added");
    node.agent.restart().expect("starts");
    node.agent.wait_enrolled(&node.a).expect("enrolled");
    becomes(&node, "its exclusion holds", &node.a, [true, false]);
    // A policy that is exchanged for another where there is no room for both.
    let list =
        |first: u16| (0..4000).map(|n| (first + 2 * n).to_string()).collect::<Vec<_>>().join(",");
    node.agent.add_manifest("a", &annotated(node.a.manifest(), KEY, &list(81))).expect("added");
    let rules = || node.map("port_rules").keys().count();
    wait_until("its rules", SOON, || rules() > 4000).expect("written");
    let cookie = node.map("pods").keys().next().expect("the pod");
    let other = 7 ^ u64::from_ne_bytes(cookie.try_into().expect("a cookie"));
    fill(&node, other);
    node.agent.add_manifest("a", &annotated(node.a.manifest(), KEY, &list(80))).expect("added");
    becomes(&node, "the other policy holds", &node.a, [false, true]);
}

#[test]
fn f31_a_pod_that_there_is_no_room_for_is_captured_whole_and_the_others_are_as_ever() {
    let mut node = Node::new("q-enospc");
    let _servers = [80, 81].map(|port| node.remote(addr(ip(REMOTE), port)));
    let later = node.lab.pod("later", PodNet::DUAL).expect("a pod");
    let _sidecars = [&node.a, &node.b, &later].map(Sidecar::start);
    for pod in [&node.a, &node.b] {
        node.agent.add_manifest(pod.name(), &annotated(pod.manifest(), KEY, "81")).expect("added");
        node.agent.wait_enrolled(pod).expect("enrolled");
    }
    let cookies: Vec<Vec<u8>> = node.map("pods").keys().collect();
    let cookie = |bytes: &[u8]| u64::from_ne_bytes(bytes.try_into().expect("a cookie"));
    let records = node.map("pod_records");
    let of_b = cookies.iter().find(|cookie| {
        let record = records.lookup(cookie, MapFlags::ANY).expect("read").expect("a record");
        record.starts_with(b"lab/b\0")
    });
    let of_b = cookie(of_b.expect("pod b"));
    node.agent.kill9();
    // All room is that of a pod whose manifest cannot be read now: it stays as it is.
    fs::write(node.agent.pods_dir().join("b.yaml"), "a: [").expect("written");
    let filled = fill(&node, of_b);
    node.agent.add_manifest("later", &annotated(later.manifest(), KEY, "81")).expect("added");
    node.agent.restart().expect("starts");
    node.agent.wait_enrolled(&later).expect("enrolled");
    node.agent
        .wait_log("pod lab/later: all its traffic is captured until then: cannot write to map")
        .expect("told");
    becomes(&node, "there is no room for its exclusion", &later, [true, true]);
    for pod in [&node.a, &node.b] {
        becomes(&node, "the others have theirs", pod, [true, false]);
    }
    // And a change of another's that needs no room.
    node.agent.add_manifest("a", &annotated(node.a.manifest(), KEY, "80")).expect("added");
    becomes(&node, "its other exclusion", &node.a, [false, true]);
    let map = node.map("port_rules");
    (0..filled).for_each(|n| map.delete(&rule(of_b, n)).expect("deleted"));
    becomes(&node, "there is room", &later, [true, false]);
    wait_until("it to be solved", Duration::from_secs(10), || {
        node.agent.log().contains("resolved: pod lab/later: all its traffic is captured until then")
    })
    .expect("said");
}
