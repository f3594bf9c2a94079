//! What a node does to an agent: sandboxes that are made again, static pods, an uninstall, a mesh
//! that was not told, taints. Each test names its row of the faults that the field found.

mod cluster;
#[path = "../../tests/common/mod.rs"]
mod common;

use std::{fs, path::Path, sync::Arc};

use cluster::*;
use common::*;
use k8s_openapi::api::{
    apps::v1::DaemonSet,
    core::v1::{Node as ApiNode, Pod as ApiPod},
};
use libbpf_rs::Link;
use nix::{sys::stat::Mode, unistd::mkfifo};
use serde_json::{Value, json};
use sidestep::dataplane::LAYOUT;
use sidestep_e2e::Envtest;
use sidestep_lab::{Pod, PodNet, wait_until};

/// What a kubelet calls a static pod.
const STATIC: &str = "0f1e2d3c4b5a69788796a5b4c3d2e1f0";

/// The mirror of a static pod that is this object, as a kubelet makes it.
fn mirror(mut object: Value, uid: &str) -> Value {
    for key in ["hash", "mirror"] {
        object = annotated(object, &format!("kubernetes.io/config.{key}"), uid);
    }
    object
}

/// With no annotation of a mesh.
fn plain(mut object: Value) -> Value {
    let annotations = object["metadata"]["annotations"].as_object_mut().expect("a map");
    annotations.retain(|key, _| key.starts_with("kubernetes.io/"));
    object["spec"]["containers"] = json!([{"name": "app", "image": "app"}]);
    object
}

/// What an app's call off the pod meets: the sidecar, which learns the destination.
#[track_caller]
fn intercepted(pod: &Pod) {
    let _proxy = pod.fake_proxy(15001).expect("a proxy");
    for target in [addr(ip(REMOTE4), 80), addr(ip(REMOTE6), 80)] {
        assert_original(&pod.ask(APP, APP, target).expect("reaches the proxy"), target);
    }
}

/// The kubelet makes a pod's sandbox again when it has died; status.podIPs names the old addresses
/// until the new one is ready.
#[test]
fn f5_a_sandbox_that_is_made_again_starts() {
    let cluster = Cluster::new("node-again");
    cluster.in_force();
    let object = cluster.create_pending(&cluster.a);
    succeeds(&cluster.plugin("ADD", &cluster.a, &object));
    let has = |pod: &Pod| cluster.set_status("a", pod.manifest()["status"].clone());
    has(&cluster.a);
    cluster.becomes("its addresses to be known", || {
        let status = cluster.agent.status().unwrap_or_default();
        status["pods"][0]["captured"] == json!(cluster.a.ips())
    });
    // The new sandbox is another network namespace, with addresses of its own.
    succeeds(&cluster.plugin("ADD", &cluster.b, &object));
    let status = cluster.agent.status().expect("status");
    let found = status["pods"].as_array().expect("a list");
    let found = found.iter().find(|pod| pod["netns"] == json!(cluster.b.netns()));
    assert_eq!(found.expect("enrolled")["captured"], json!(cluster.b.ips()));
    intercepted(&cluster.b);
    // What was said of the old one comes late.
    has(&cluster.a);
    succeeds(&cluster.plugin("CHECK", &cluster.b, &object));
    has(&cluster.b);
    intercepted(&cluster.b);
    assert!(!cluster.agent.log().contains("ERROR"), "{}", cluster.agent.log_tail());
}

#[test]
fn f4_a_static_pod_starts_and_is_known_by_its_hash() {
    let cluster = Cluster::new("node-static");
    cluster.in_force();
    let input = cluster.input();
    let add = |pod: &Pod, uid: &str| {
        cluster.plugin_as("ADD", pod, [&cluster.name, pod.name(), uid], &input)
    };
    // Before the kubelet has made a mirror.
    succeeds(&add(&cluster.b, STATIC));
    // A uid of the API server's own that it does not know is no static pod's.
    let (code, text) = refused(&add(&cluster.b, "7e3c1a52-0d6f-4c3b-9a71-5c2b7f7d9e10"));
    assert_eq!((code, text.contains("has no pod node-static/b")), (11, true), "{text}");
    cluster.create(plain(mirror(cluster.pending(&cluster.b), STATIC)));
    succeeds(&add(&cluster.b, STATIC));
    succeeds(&add(&cluster.b, ""));
    assert!(cluster.names().is_empty());

    // One that somebody has given a sidecar.
    let hash = STATIC.replace("0f", "1f");
    let object = cluster.create(mirror(cluster.pending(&cluster.a), &hash));
    assert_ne!(object["metadata"]["uid"], json!(hash));
    succeeds(&add(&cluster.a, &hash));
    let status = cluster.agent.status().expect("status");
    assert_eq!(status["pods"][0]["uid"], json!(hash), "as its cgroups have it");
    intercepted(&cluster.a);
    // Its manifest has changed, and the mirror is the old one's: it waits for the new one.
    let (code, _) = refused(&add(&cluster.a, &STATIC.replace("0f", "2f")));
    assert_eq!(code, 11, "to be tried again");
    // `kubectl delete` of the mirror ends nothing, and the next one has another uid.
    cluster.api.delete::<ApiPod>(&cluster.name, "a").expect("deleted");
    cluster.create(mirror(cluster.pending(&cluster.a), &hash));
    intercepted(&cluster.a);
    assert_eq!(cluster.names(), [cluster.named("a")]);
}

/// Anybody who may create pods may write the annotations of a mirror.
#[test]
fn f4_an_object_that_claims_another_pods_uid_gets_nothing() {
    let cluster = Cluster::new("node-claim");
    cluster.in_force();
    let victim = cluster.create_pending(&cluster.a);
    succeeds(&cluster.plugin("ADD", &cluster.a, &victim));
    let uid = victim["metadata"]["uid"].as_str().expect("a uid");
    let mut liar = mirror(cluster.pending(&cluster.b), uid);
    liar = annotated(liar, "traffic.sidecar.istio.io/excludeOutboundPorts", "80");
    cluster.create(liar);
    cluster.becomes("the liar to be told", || {
        cluster.has_event("Pod", "b", "InvalidPod", &["which belongs to pod node-claim/a"])
    });
    intercepted(&cluster.a);
    assert_eq!(cluster.names(), [cluster.named("a")]);
}

#[test]
fn f4_static_pods_that_ran_before_the_agent_are_found_by_their_cgroups() {
    let mut cluster = Cluster::new("node-static-before");
    cluster.in_force();
    let object = mirror(cluster.running(&cluster.a), STATIC);
    let mut known = object.clone();
    known["metadata"]["uid"] = STATIC.into();
    cluster.runs(|cluster| &cluster.a, &known);
    let object = cluster.create(object);
    assert_ne!(object["metadata"]["uid"], known["metadata"]["uid"]);
    cluster.wait_enrolled("a");
    intercepted(&cluster.a);
}

fn daemonset(name: &str) -> Value {
    json!({
        "apiVersion": "apps/v1", "kind": "DaemonSet",
        "metadata": {"name": name, "namespace": name},
        "spec": {
            "selector": {"matchLabels": {"app": name}},
            "template": {
                "metadata": {"labels": {"app": name}},
                "spec": {"containers": [{"name": "agent", "image": "sidestep"}]},
            },
        },
    })
}

/// With the agent's own DaemonSet, which has the test's name as well.
fn installed(tag: &str, api: Arc<Envtest>, more: &[&str]) -> Cluster {
    let own = format!("{tag}/{tag}");
    let flags = [&["--daemonset", &own], more].concat();
    let create = |api: &Envtest| drop(api.create(daemonset(tag)).expect("created"));
    Parts::new(tag, api).cluster(&flags, create)
}

/// The plugin, its entry and the socket are gone: F9.
#[track_caller]
fn unchained(cluster: &Cluster) {
    assert_eq!(cluster.conflist(), serde_json::from_str::<Value>(BRIDGE).expect("JSON"));
    for name in ["bin/sidestep-cni", "cni.sock"] {
        let path = cluster.dir.path().join(name);
        assert!(!path.exists(), "{} is left", path.display());
    }
}

/// Ends the agent as `helm uninstall` does: the DaemonSet is gone, and so are the agent's rights.
fn uninstall(cluster: &mut Cluster) {
    cluster.api.delete::<DaemonSet>(&cluster.name, &cluster.name).expect("deleted");
    // The watch tells.
    cluster.becomes("the pods to be told", || {
        cluster.names().is_empty() || cluster.agent.log().contains("is being uninstalled")
    });
    for verb in ["get", "list", "watch"] {
        cluster.forbid(verb, "daemonsets");
    }
    cluster.agent.terminate().expect("ends");
}

#[test]
fn f23_pods_that_run_stay_intercepted_when_the_agent_is_uninstalled() {
    let mut cluster = installed("node-uninstall", shared(), &[]);
    cluster.in_force();
    let object = cluster.create_pending(&cluster.a);
    succeeds(&cluster.plugin("ADD", &cluster.a, &object));
    cluster.agent.terminate().expect("ends");
    assert!(cluster.is_chained() && cluster.agent.bpffs().exists(), "a restart takes nothing away");
    let before = cluster.agent.log().matches("adopted=1").count();
    cluster.agent.restart().expect("starts");
    cluster.becomes("the new agent", || cluster.agent.log().matches("adopted=1").count() > before);
    uninstall(&mut cluster);
    unchained(&cluster);
    assert!(cluster.has_event("Pod", "a", "StaysIntercepted", &["sidestep unload"]));
    // Neither out nor in.
    intercepted(&cluster.a);
    let app = cluster.a.serve(addr([0, 0, 0, 0], 8080), APP, APP).expect("an app");
    cluster.b.ask(APP, APP, addr(cluster.a.ipv4(), 8080)).expect_err("no sidecar listens");
    drop(app);

    // A fresh installation takes it over.
    for verb in ["get", "list", "watch"] {
        cluster.allow(verb, "daemonsets");
    }
    cluster.create(daemonset(&cluster.name));
    cluster.agent.restart().expect("starts");
    cluster.becomes("the fresh agent", || {
        cluster.agent.log().matches("adopted=1").count() > before + 1
    });
    cluster.in_force();
    intercepted(&cluster.a);
    // And where no mesh pod is left, nothing is.
    drop(std::mem::replace(&mut cluster.a, cluster.lab.pod("c", PodNet::V4).expect("c")));
    uninstall(&mut cluster);
    unchained(&cluster);
    assert!(!cluster.agent.bpffs().exists(), "{}", cluster.agent.log_tail());
}

#[test]
fn f23_who_asks_for_it_gets_a_clean_node_at_once() {
    let mut cluster = installed("node-unload", shared(), &["--on-uninstall", "unload"]);
    cluster.in_force();
    let object = cluster.create_pending(&cluster.a);
    succeeds(&cluster.plugin("ADD", &cluster.a, &object));
    cluster.api.delete::<DaemonSet>(&cluster.name, &cluster.name).expect("deleted");
    cluster.agent.terminate().expect("ends");
    unchained(&cluster);
    assert!(!cluster.agent.bpffs().exists());
    let remote = cluster.a.ask(APP, APP, addr(ip(REMOTE4), 80));
    assert!(remote.is_err(), "nothing is intercepted any more: {remote:?}");
}

/// An API server that refuses has not said that the agent was uninstalled.
#[test]
fn f13_an_api_server_that_refuses_or_is_away_takes_nothing_away() {
    let mut cluster = installed("node-refuses", Envtest::start().expect("an API server"), &[]);
    cluster.in_force();
    let object = cluster.create_pending(&cluster.a);
    succeeds(&cluster.plugin("ADD", &cluster.a, &object));
    for verb in ["get", "list", "watch"] {
        cluster.forbid(verb, "daemonsets");
    }
    let stays = |cluster: &mut Cluster| {
        cluster.agent.terminate().expect("ends");
        assert!(
            cluster.is_chained() && cluster.agent.bpffs().exists(),
            "{}",
            cluster.agent.log_tail()
        );
        intercepted(&cluster.a);
    };
    stays(&mut cluster);
    // From its start on: it says which right it lacks.
    cluster.agent.restart().expect("starts");
    cluster.agent.wait_log("verb \"list\" on \"daemonsets\"").expect("said");
    stays(&mut cluster);
    cluster.agent.restart().expect("starts");
    cluster.api.stop().expect("stopped");
    stays(&mut cluster);
}

/// `unload` takes the socket along as well.
#[test]
fn f9_unload_leaves_no_socket() {
    let mut cluster = Cluster::new("node-socket");
    cluster.in_force();
    cluster.agent.kill9();
    let at = |name: &str| cluster.dir.path().join(name).to_string_lossy().into_owned();
    assert!(Path::new(&at("cni.sock")).exists());
    let (conf, bin, socket) = (at("net.d"), at("bin"), at("cni.sock"));
    let paths = ["--cni-conf-dir", &conf, "--cni-bin-dir", &bin, "--cni-socket", &socket];
    cluster.agent.command(&[&["unload"], &paths[..]].concat()).expect("unloaded");
    unchained(&cluster);
}

/// The pod as a mesh makes it that was not told to leave interception alone.
fn with_init(mut object: Value) -> Value {
    object["spec"]["initContainers"] = json!([{"name": "istio-init", "image": "istio/proxyv2"}]);
    object
}

#[test]
fn f8_a_mesh_that_installs_iptables_itself_is_reported() {
    let cluster = Cluster::new("node-iptables");
    cluster.in_force();
    cluster.create(with_init(cluster.running(&cluster.a)));
    cluster.becomes("the Event", || {
        cluster.has_event("Node", &cluster.name, "OwnIptables", &["init container istio-init"])
    });
    let problems = cluster.problems();
    let text = &problems.iter().find(|(reason, _)| reason == "OwnIptables").expect("a problem").1;
    assert!(
        text.contains("istio") && text.contains("node-iptables/a") && text.contains("install.md"),
        "{text}"
    );
    // One pod that is intercepted: the mesh was told, and the others are from before.
    let object = cluster.create_pending(&cluster.b);
    succeeds(&cluster.plugin("ADD", &cluster.b, &object));
    cluster.becomes("the problem to be solved", || cluster.problems().is_empty());
}

#[test]
fn the_startup_taint_goes_when_pods_can_be_intercepted() {
    let taints = json!([
        {"key": "sidestep.io/agent-not-ready", "effect": "NoSchedule"},
        {"key": "example.com/other", "effect": "NoSchedule"},
    ]);
    let prepare = |api: &Envtest| {
        let node = json!({"spec": {"taints": taints.clone()}});
        api.patch::<ApiNode>("", "node-taint", &node).expect("tainted");
        api.forbid("node-taint", "list", "pods").expect("forbidden");
    };
    let cluster = Cluster::with("node-taint", &["--remove-startup-taint"], prepare);
    let keys = || {
        let nodes = cluster.api.list::<ApiNode>("").expect("nodes");
        let node = nodes.iter().find(|node| node["metadata"]["name"] == cluster.name);
        let node = node.expect("a node");
        let taints = node["spec"]["taints"].as_array().cloned().unwrap_or_default();
        taints
            .iter()
            .map(|taint| taint["key"].as_str().unwrap_or("").to_owned())
            .collect::<Vec<_>>()
    };
    cluster.agent.wait_log("verb \"list\" on \"pods\"").expect("said");
    assert_eq!(keys().len(), 2, "its pods are not known yet");
    cluster.forbid("patch", "nodes");
    cluster.allow("list", "pods");
    cluster.agent.wait_log("verb \"patch\" on \"nodes\"").expect("said");
    cluster.allow("patch", "nodes");
    cluster.becomes("the taint to go", || keys() == ["example.com/other"]);
}

#[test]
fn a_node_that_cannot_intercept_says_so() {
    let mut cluster = Cluster::new("node-event");
    cluster.in_force();
    fs::write(cluster.dir.path().join("net.d/10-net.conflist"), "{ no json").expect("written");
    cluster.becomes("the Event", || {
        cluster.has_event("Node", &cluster.name, "Node", &["was not changed"])
    });
    // And one whose agent cannot even start.
    cluster.agent.restart_with(&["--http", "192.0.2.1:9"]).expect("starts");
    cluster.becomes("the Event", || {
        cluster.has_event(
            "Node",
            &cluster.name,
            "Node",
            &["Sidestep cannot intercept pods on this node"],
        )
    });
    let agent = &mut cluster.agent;
    wait_until("its end", SOON, || !agent.is_running()).expect("ended");
}

/// F14: what was taken away in the kernel is told where the user looks.
#[test]
fn f14_a_pod_and_the_node_are_told_what_was_put_back() {
    let cluster = Cluster::new("node-repair");
    cluster.in_force();
    let object = cluster.create_pending(&cluster.a);
    succeeds(&cluster.plugin("ADD", &cluster.a, &object));
    let links = cluster.agent.bpffs().join(LAYOUT).join("links");
    let pins = fs::read_dir(&links).expect("links").map(|link| link.expect("an entry").path());
    let steer = pins.into_iter().find(|link| link.to_string_lossy().contains("steer-"));
    Link::open(steer.expect("a link")).and_then(|link| link.detach()).expect("detached");
    fs::remove_file(links.join("connect4")).expect("removed");
    let told = ["inbound program was detached", "Sidestep restored it"];
    cluster.becomes("an Event on the pod", || cluster.has_event("Pod", "a", "Repaired", &told));
    let told = ["pin of link connect4", "Sidestep restored it"];
    cluster.becomes("an Event on the node", || {
        cluster.has_event("Node", &cluster.name, "Repaired", &told)
    });
    intercepted(&cluster.a);
    cluster.becomes("nothing to be wrong", || cluster.problems().is_empty());
    Link::open(links.join("connect6")).and_then(|link| link.detach()).expect("detached");
    cluster.becomes("status to say so", || {
        let repaired = |(reason, text): &(String, String)| {
            reason == "Repaired" && text.contains("hook connect6 was detached")
        };
        cluster.problems().iter().any(repaired)
    });
    intercepted(&cluster.a);
}

/// A FIFO would be waited for, for ever.
#[test]
fn f34_a_fifo_is_refused_by_name_and_holds_nothing_up() {
    let mut node = Node::new("node-fifo");
    for path in [node.agent.pods_dir().join("fifo.yaml"), node.agent.pods_dir().join("netns")] {
        mkfifo(&path, Mode::S_IRWXU).expect("a FIFO");
    }
    let mut manifest = node.b.manifest();
    let netns = node.agent.pods_dir().join("netns");
    manifest["metadata"]["annotations"]["sidestep.io/netns"] = json!(netns);
    node.agent.add_manifest("b", &manifest).expect("written");
    node.agent.add_pod(&node.a).expect("written");
    node.agent.wait_enrolled(&node.a).expect("the other pod goes on");
    for words in [["fifo.yaml", "it is a FIFO"], ["pod lab/b", "it is a FIFO"]] {
        node.agent.wait_log(words[0]).expect("said");
        let log = node.agent.log();
        assert!(log.lines().any(|line| words.iter().all(|word| line.contains(word))), "{log}");
    }
    node.agent.terminate().expect("it ends when it is told to");
}
