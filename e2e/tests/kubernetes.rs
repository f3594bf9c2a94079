//! The agent against a real API server: pods are found, enrolled before they run, told what is
//! wrong with them; the server may go away.

mod cluster;
#[path = "../../tests/common/mod.rs"]
mod common;

use std::{
    fs,
    io::Write,
    os::unix::fs::{PermissionsExt, symlink},
    path::Path,
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU16, Ordering},
    },
    time::Duration,
};

use cluster::*;
use common::*;
use k8s_openapi::api::core::v1::{Node as ApiNode, Pod as ApiPod};
use serde_json::{Value, json};
use sidestep_e2e::Envtest;
use sidestep_lab::{Lab, Pod, PodNet, wait_until};

#[test]
fn a_fresh_pod_is_intercepted_before_its_first_process() {
    let cluster = Cluster::new("k8s-fresh");
    cluster.in_force();
    let object = cluster.create_pending(&cluster.a);
    let result = succeeds(&cluster.plugin("ADD", &cluster.a, &object));
    assert_eq!(serde_json::from_str::<Value>(&result).expect("JSON")["cniVersion"], "1.0.0");
    // Nothing of the pod ran until now, and its object names no address.
    let proxy = cluster.a.fake_proxy(15001).expect("a proxy");
    for target in [addr(ip(REMOTE4), 80), addr(ip(REMOTE6), 80)] {
        let answer = cluster.a.ask(APP, APP, target).expect("reaches the proxy");
        assert_original(&answer, target);
    }
    succeeds(&cluster.plugin("CHECK", &cluster.a, &object));
    drop(proxy);
    // Its inbound too: there is no listener, so it is refused, and never the app's.
    let _app = cluster.a.serve(addr([0, 0, 0, 0], 8080), APP, APP).expect("an app");
    cluster.b.ask(APP, APP, addr(cluster.a.ipv4(), 8080)).expect_err("no sidecar listens");
    succeeds(&cluster.plugin("DEL", &cluster.a, &object));
    assert_eq!(
        cluster.names(),
        [cluster.named("a")],
        "it is intercepted until its namespace is gone"
    );
}

#[test]
fn a_pod_that_is_in_no_mesh_starts_untouched() {
    let cluster = Cluster::new("k8s-plain");
    cluster.in_force();
    let mut object = cluster.pending(&cluster.a);
    object["metadata"]["annotations"] = json!({});
    let object = cluster.create(object);
    succeeds(&cluster.plugin("ADD", &cluster.a, &object));
    assert!(cluster.names().is_empty());
}

#[test]
fn pods_that_ran_before_the_agent_are_found_by_their_processes() {
    let mut cluster = Cluster::alone("k8s-before");
    cluster.agent.terminate().expect("ends");
    let object = cluster.create(cluster.running(&cluster.a));
    cluster.runs(|cluster| &cluster.a, &object);
    cluster.agent.restart().expect("starts");
    cluster.wait_enrolled("a");
    let status = cluster.agent.status().expect("status");
    assert!(status["pods"][0]["netns"].as_str().is_some_and(|path| path.starts_with("/proc/")));
    // A restart of the agent finds it again, whatever the API server does meanwhile.
    cluster.api.stop().expect("stopped");
    cluster.agent.kill9();
    cluster.agent.restart().expect("starts");
    let _proxy = cluster.a.fake_proxy(15001).expect("a proxy");
    let target = addr(ip(REMOTE4), 80);
    assert_original(&cluster.a.ask(APP, APP, target).expect("reaches the proxy"), target);
    cluster.agent.wait_log("cannot reach the API server").expect("said");
    assert_eq!(cluster.names(), [cluster.named("a")]);
    cluster.api.resume().expect("resumed");
    cluster.wait_enrolled("a");
}

/// Those that charts/sidestep names, one by one.
#[test]
fn the_charts_capabilities_are_enough() {
    let chart = include_str!("../../charts/sidestep/templates/daemonset.yaml");
    let added =
        chart.split("drop: [ALL]").nth(1).and_then(|text| text.split("volumeMounts:").next());
    let names = added.expect("a list").lines().filter_map(|line| line.trim().strip_prefix("- "));
    let names: Vec<String> = names.map(|name| format!("+{}", name.to_lowercase())).collect();
    assert_eq!(names.len(), 7, "{names:?}");
    let mut cluster = Cluster::with_capabilities("k8s-caps", &names.join(","));
    cluster.in_force();
    let fresh = cluster.create_pending(&cluster.a);
    succeeds(&cluster.plugin("ADD", &cluster.a, &fresh));
    let object = cluster.create(cluster.running(&cluster.b));
    cluster.runs(|cluster| &cluster.b, &object);
    cluster.wait_enrolled("b");
    let target = addr(ip(REMOTE4), 80);
    for pod in [&cluster.a, &cluster.b] {
        let _proxy = pod.fake_proxy(15001).expect("a proxy");
        assert_original(&pod.ask(APP, APP, target).expect("reached"), target);
    }
}

#[test]
fn a_missing_capability_is_named() {
    let few = "+bpf,+perfmon,+net_admin,+net_raw,+sys_admin,+dac_read_search";
    let mut cluster = Cluster::with_capabilities("k8s-ptrace", few);
    cluster.in_force();
    let object = cluster.create(cluster.running(&cluster.a));
    cluster.runs(|cluster| &cluster.a, &object);
    cluster.agent.wait_log("CAP_SYS_PTRACE").expect("said");
}

/// As a control plane's upgrade does. The server's memory of changes begins anew with it, and
/// etcd has forgotten all before, so the agent's watches are answered by 410 and list again.
#[test]
fn the_api_server_may_go_away_and_forget() {
    let cluster = Cluster::alone("k8s-away");
    cluster.in_force();
    let object = cluster.create_pending(&cluster.a);
    succeeds(&cluster.plugin("ADD", &cluster.a, &object));
    let _proxy = cluster.a.fake_proxy(15001).expect("a proxy");
    let lists = || {
        let asked = cluster.api.asked(&cluster.name).expect("the audit log");
        asked.iter().filter(|asked| asked.verb == "list" && asked.uri.contains("/pods?")).count()
    };
    let ends: [fn(&Envtest) -> anyhow::Result<()>; 2] = [Envtest::stop, Envtest::kill];
    for (end, (value, left)) in ends.into_iter().zip([("disabled", 0), ("enabled", 1)]) {
        let (before, said) =
            (lists(), cluster.agent.log().matches("cannot reach the API server").count());
        // Something that its watch for pods is not about, and that moves the version on.
        cluster.label_namespace("round", value.into());
        cluster.api.compact().expect("compacted");
        end(&cluster.api).expect("ended");
        cluster.becomes("the complaint", || {
            cluster.agent.log().matches("cannot reach the API server").count() > said
        });
        assert_eq!(cluster.names().len(), 1 - left, "what is in force stays");
        let log = cluster.agent.log();
        assert!(!log.contains("failed with error"), "in the agent's own words: {log}");
        cluster.api.resume().expect("resumed");
        // What comes after that is seen: it follows the server again.
        cluster.annotate("a", "sidestep.io/intercept", value.into());
        cluster.becomes("the change", || cluster.names().len() == left);
        assert!(lists() > before, "it was told to list again");
        cluster.agent.wait_log("resolved: ").expect("solved");
    }
    cluster.works(&cluster.a);
}

/// A ClusterRole that somebody takes away takes what is in force away from nobody.
#[test]
fn a_running_agent_may_lose_its_rights() {
    let cluster = Cluster::alone("k8s-lost");
    cluster.in_force();
    let object = cluster.create_pending(&cluster.a);
    succeeds(&cluster.plugin("ADD", &cluster.a, &object));
    let _proxy = cluster.a.fake_proxy(15001).expect("a proxy");
    let rights = [("list", "pods"), ("watch", "pods"), ("watch", "namespaces")];
    for (verb, resource) in rights {
        cluster.forbid(verb, resource);
    }
    // Watches that run go on: rights are looked at when they begin.
    cluster.api.stop().expect("stopped");
    cluster.api.resume().expect("resumed");
    for resource in ["pods", "namespaces"] {
        cluster.agent.wait_log(&format!("verb \"watch\" on \"{resource}\"")).expect("said");
    }
    cluster.works(&cluster.a);
    cluster.annotate("a", "sidestep.io/intercept", "disabled".into());
    for (verb, resource) in rights {
        cluster.allow(verb, resource);
    }
    cluster.becomes("the change", || cluster.names().is_empty());
}

/// As with kubelets that are behind, or a clock that is: the token in the agent's file is too old.
#[test]
fn an_expired_token_is_named_and_a_new_one_is_taken() {
    let parts = Parts::new("k8s-token", shared());
    let expired = parts.api.expired_token(&parts.name).expect("a token");
    let good = fs::read_to_string(parts.at("token")).expect("a token");
    parts.write("token", &expired);
    let cluster = parts.cluster(&[], |_| {});
    cluster.agent.wait_log("rejects the agent's token").expect("said");
    fs::write(cluster.dir.path().join("token"), good).expect("written");
    let object = cluster.create_pending(&cluster.a);
    // The file is read again once a minute.
    wait_until("the pod to be let in", Duration::from_secs(100), || {
        cluster.is_chained() && cluster.plugin("ADD", &cluster.a, &object).status.success()
    })
    .unwrap_or_else(|error| panic!("{error:#}; {}", cluster.agent.log_tail()));
    cluster.becomes("the watch", || cluster.agent.log().contains("resolved: "));
}

/// It takes connections, and answers nothing.
#[test]
fn an_api_server_that_hangs_holds_up_only_what_it_is_asked_for() {
    let cluster = Cluster::alone("k8s-hangs");
    cluster.in_force();
    let first = cluster.create_pending(&cluster.a);
    succeeds(&cluster.plugin("ADD", &cluster.a, &first));
    let _proxy = cluster.a.fake_proxy(15001).expect("a proxy");
    cluster.api.freeze().expect("frozen");
    cluster.works(&cluster.a);
    succeeds(&cluster.plugin("CHECK", &cluster.a, &first));
    // One that the agent would have to ask for.
    let (code, text) = refused(&cluster.plugin("ADD", &cluster.b, &cluster.pending(&cluster.b)));
    assert_eq!(code, 11, "to be tried again: {text}");
    cluster.works(&cluster.a);
    cluster.api.go_on().expect("continued");
    let second = cluster.create_pending(&cluster.b);
    cluster.becomes("the pod to be let in", || {
        cluster.plugin("ADD", &cluster.b, &second).status.success()
    });
    cluster.annotate("a", "sidestep.io/intercept", "disabled".into());
    cluster.becomes("the change", || cluster.names() == [cluster.named("b")]);
}

/// The node's link goes down, and no end of a connection is told.
#[test]
fn a_cut_network_is_caught_up_with() {
    let lab = Lab::new("k8s-cut").expect("a lab");
    let uplink = lab.pod("uplink", PodNet::V4).expect("the node's link");
    let node = Path::new("/run/netns").join(lab.node_name());
    let api = Envtest::start_in(&node, [10, 77, 0, 1].into()).expect("an API server");
    let mut parts = Parts::on("k8s-cut", api, lab);
    parts.run_agent_by(&format!("nsenter --net={} --", uplink.netns().display()));
    let cluster = parts.cluster(&[], |_| {});
    cluster.in_force();
    let object = cluster.create_pending(&cluster.a);
    succeeds(&cluster.plugin("ADD", &cluster.a, &object));
    let _proxy = cluster.a.fake_proxy(15001).expect("a proxy");
    let cut = |direction: &str| uplink.ip(&format!("link set eth0 {direction}")).expect("set");

    // For a moment: TCP itself gets over it.
    cut("down");
    let second = cluster.create_pending(&cluster.b);
    cluster.annotate("a", "sidestep.io/intercept", "disabled".into());
    let (code, text) = refused(&cluster.plugin("ADD", &cluster.b, &second));
    assert_eq!(code, 11, "to be tried again: {text}");
    assert_eq!(cluster.names(), [cluster.named("a")], "what is in force stays");
    cluster.works(&cluster.a);
    cut("up");
    cluster.becomes("the change", || cluster.names().is_empty());
    cluster.becomes("the pod to be let in", || {
        cluster.plugin("ADD", &cluster.b, &second).status.success()
    });

    // Until the server has forgotten the connections, as one that lost its power.
    cut("down");
    cluster.api.kill().expect("killed");
    cluster.api.resume().expect("resumed");
    cut("up");
    cluster.annotate("b", "sidestep.io/intercept", "disabled".into());
    wait_until("the change", Duration::from_secs(60), || cluster.names().is_empty())
        .unwrap_or_else(|error| panic!("{error:#}; {}", cluster.agent.log_tail()));
}

/// What only a proxy can do: each of these is an answer that a healthy API server does not give, or
/// not when a test wants it.
#[test]
fn answers_that_make_no_sense_are_survived() {
    let parts = Parts::new("k8s-answers", shared());
    let kubeconfig = parts.api.kubeconfig(&parts.at("token"));
    let proxy = parts.api.proxy(kubeconfig).expect("a proxy");
    parts.write("kubeconfig", &proxy.kubeconfig().to_string());
    let cluster = parts.cluster(&[], |_| {});
    cluster.in_force();
    let object = cluster.create_pending(&cluster.a);
    succeeds(&cluster.plugin("ADD", &cluster.a, &object));
    let _proxy = cluster.a.fake_proxy(15001).expect("a proxy");
    let status = |code: u16, reason: &str| {
        let status = json!({
            "kind": "Status", "apiVersion": "v1", "status": "Failure",
            "code": code, "reason": reason, "message": format!("{reason}, says the proxy"),
        });
        (code, status.to_string())
    };
    let mut excluded = 9000;
    for (what, (code, body)) in [
        // By the HTTP status, where real servers send an event.
        ("watch=true", status(410, "Expired")),
        ("/pods?", status(429, "TooManyRequests")),
        ("/pods?", status(500, "InternalError")),
        ("/pods?", status(503, "ServiceUnavailable")),
        ("/pods?", (200, "<html>not what you think</html>".to_owned())),
        ("/pods?", (200, "{\"kind\": \"PodList\"".to_owned())),
    ] {
        let given = Arc::new(AtomicU16::new(0));
        let count = Arc::clone(&given);
        let answer = body.clone();
        proxy.answer(move |_, uri| {
            uri.contains(what).then(|| {
                count.fetch_add(1, Ordering::Relaxed);
                (code, answer.clone())
            })
        });
        proxy.cut();
        cluster.becomes(&format!("{code} to be given twice"), || given.load(Ordering::Relaxed) > 1);
        cluster.works(&cluster.a);
        assert_eq!(cluster.names(), [cluster.named("a")], "{code}: {body}");
        succeeds(&cluster.plugin("CHECK", &cluster.a, &object));
        proxy.answer(|_, _| None);
        excluded += 1;
        let key = "traffic.sidecar.istio.io/excludeOutboundPorts";
        cluster.annotate("a", key, excluded.to_string().into());
        let target = addr(ip(REMOTE4), excluded);
        cluster.becomes(&format!("the change after {code}"), || {
            cluster.a.ask(APP, APP, target).is_err()
        });
    }
    cluster.works(&cluster.a);
}

#[test]
fn annotations_and_the_namespaces_label_change_live() {
    let cluster = Cluster::new("k8s-live");
    cluster.in_force();
    let object = cluster.create_pending(&cluster.a);
    succeeds(&cluster.plugin("ADD", &cluster.a, &object));
    let _proxy = cluster.a.fake_proxy(15001).expect("a proxy");
    let remote = addr(ip("10.77.255.1"), 8099);
    cluster.lab.add_node_address(remote.ip()).expect("an address");
    let _direct = cluster
        .lab
        .on_node(|| sidestep_lab::Server::start_here(sidestep_lab::ServeOpts::on([remote])))
        .expect("runs")
        .expect("a remote server");
    let captured = || {
        let answer = cluster.a.ask(APP, APP, remote).expect("an answer");
        answer.seen.original() == Some(remote)
    };
    assert!(captured());
    let key = "traffic.sidecar.istio.io/excludeOutboundPorts";
    cluster.annotate("a", key, "8099".into());
    cluster.becomes("the port to be excluded", || !captured());
    cluster.annotate("a", key, Value::Null);
    cluster.becomes("the port to be captured", captured);
    let label = |value| cluster.label_namespace("sidestep.io/intercept", value);
    label("disabled".into());
    cluster.becomes("the namespace to be left alone", || cluster.names().is_empty());
    assert!(!captured());
    label(Value::Null);
    cluster.becomes("the namespace to be back", captured);
}

#[test]
fn a_force_deleted_pod_is_intercepted_until_its_namespace_is_gone() {
    let mut cluster = Cluster::new("k8s-force");
    cluster.in_force();
    let object = cluster.create_pending(&cluster.a);
    succeeds(&cluster.plugin("ADD", &cluster.a, &object));
    cluster.api.delete::<ApiPod>(&cluster.name, "a").expect("deleted");
    // Its successor has the same name, and another namespace and uid.
    let mut successor = cluster.pending(&cluster.b);
    successor["metadata"]["name"] = "a".into();
    let successor = cluster.create(successor);
    succeeds(&cluster.plugin("ADD", &cluster.b, &successor));
    assert_eq!(cluster.names(), [cluster.named("a"), cluster.named("a")]);
    let _proxies = [&cluster.a, &cluster.b].map(|pod| pod.fake_proxy(15001).expect("a proxy"));
    let target = addr(ip(REMOTE4), 80);
    for pod in [&cluster.a, &cluster.b] {
        assert_original(&pod.ask(APP, APP, target).expect("reached"), target);
    }
    // A late DEL of the first changes nothing for the second.
    succeeds(&cluster.plugin("DEL", &cluster.a, &object));
    assert_original(&cluster.b.ask(APP, APP, target).expect("reached"), target);
    drop(_proxies);
    let gone = std::mem::replace(&mut cluster.a, cluster.lab.pod("c", PodNet::V4).expect("c"));
    drop(gone);
    cluster.becomes("the namespace's state to go", || cluster.names() == [cluster.named("a")]);
}

/// A Job's pod: its object stays, its namespace goes.
#[test]
fn a_pod_that_is_done_is_no_problem() {
    let mut cluster = Cluster::new("k8s-done");
    cluster.in_force();
    let object = cluster.create_pending(&cluster.a);
    succeeds(&cluster.plugin("ADD", &cluster.a, &object));
    cluster.set_status("a", json!({"phase": "Succeeded"}));
    drop(std::mem::replace(&mut cluster.a, cluster.lab.pod("c", PodNet::V4).expect("c")));
    cluster.becomes("the namespace's state to go", || cluster.names().is_empty());
    assert!(!cluster.agent.log().contains("ERROR"), "{}", cluster.agent.log_tail());
}

#[test]
fn a_pod_that_cannot_be_enrolled_does_not_start_and_is_told() {
    let cluster = Cluster::new("k8s-refuse");
    cluster.in_force();
    let tproxy =
        annotated(cluster.pending(&cluster.a), "sidecar.istio.io/interceptionMode", "TPROXY");
    let object = cluster.create(tproxy);
    let (code, text) = refused(&cluster.plugin("ADD", &cluster.a, &object));
    assert_eq!(code, 100);
    assert!(text.contains(&cluster.named("a")) && text.contains("TPROXY"), "{text}");
    cluster.becomes("an Event", || cluster.has_event("Pod", "a", "Unsupported", &["TPROXY"]));
    // Annotations that cannot be read capture everything, and say so.
    let key = "traffic.sidecar.istio.io/excludeOutboundPorts";
    let object = cluster.create(annotated(cluster.pending(&cluster.b), key, "80,http"));
    succeeds(&cluster.plugin("ADD", &cluster.b, &object));
    cluster.becomes("an Event for b", || {
        cluster.has_event("Pod", "b", "InvalidPolicy", &[key, "80,http"])
    });
    assert_eq!(cluster.names(), [cluster.named("b")]);
}

/// It is Istio's own agents' business, so it starts; that nobody took it is said.
#[test]
fn an_ambient_pod_starts_and_is_told_that_it_is_left_alone() {
    let cluster = Cluster::new("k8s-ambient");
    cluster.in_force();
    cluster.label_namespace("istio.io/dataplane-mode", "ambient".into());
    let mut object = cluster.pending(&cluster.a);
    object["metadata"]["annotations"] = json!({});
    object["spec"]["containers"] = json!([{"name": "app", "image": "app"}]);
    let object = cluster.create(object);
    succeeds(&cluster.plugin("ADD", &cluster.a, &object));
    cluster.set_status("a", json!({"phase": "Running"}));
    cluster.becomes("an Event", || {
        let words = ["istio.io/dataplane-mode: \"ambient\""];
        cluster.has_event("Pod", "a", "Unsupported", &words)
    });
    succeeds(&cluster.plugin("CHECK", &cluster.a, &object));
    assert!(cluster.names().is_empty());
    cluster.annotate("a", "ambient.istio.io/redirection", "enabled".into());
    cluster.agent.wait_log("resolved: ").expect("Istio's own agent has it");
}

/// F31.
#[test]
fn f31_a_pod_that_asks_for_too_much_is_captured_whole_and_wedges_nothing() {
    let cluster = Cluster::new("k8s-full");
    cluster.in_force();
    // Every other port is a rule of its own: half of what there is room for on the node.
    let ports: Vec<String> = (1..=u16::MAX).step_by(2).map(|port| port.to_string()).collect();
    let key = "traffic.sidecar.istio.io/excludeOutboundPorts";
    let greedy = |pod: &Pod| annotated(cluster.pending(pod), key, &ports.join(","));
    let proxies = [&cluster.a, &cluster.b].map(|pod| pod.fake_proxy(15001).expect("a proxy"));
    // One of the excluded ones.
    let target = addr(ip(REMOTE4), 81);
    for pod in [&cluster.a, &cluster.b] {
        let object = cluster.create(greedy(pod));
        succeeds(&cluster.plugin("ADD", pod, &object));
        assert_original(&pod.ask(APP, APP, target).expect("captured"), target);
        let told =
            ["all its traffic is captured", "more than the 4096 entries of the port_rules map"];
        cluster
            .becomes("an Event", || cluster.has_event("Pod", pod.name(), "InvalidPolicy", &told));
    }
    // With less, it is as it says; the other stays as it is.
    cluster.annotate("b", key, "81".into());
    cluster.becomes("the exclusion to hold", || {
        let seen = proxies[1].seen().len();
        cluster.b.ask(APP, APP, target).is_err() && proxies[1].seen().len() == seen
    });
    assert_original(&cluster.a.ask(APP, APP, target).expect("captured"), target);
}

#[test]
fn no_agent_no_pod() {
    let mut cluster = Cluster::new("k8s-no-agent");
    cluster.in_force();
    cluster.agent.kill9();
    let object = cluster.create_pending(&cluster.a);
    let (code, text) = refused(&cluster.plugin("ADD", &cluster.a, &object));
    assert_eq!(code, 11, "to be tried again: {text}");
    assert!(text.contains("the agent does not answer"), "{text}");
    succeeds(&cluster.plugin("DEL", &cluster.a, &object));
    // It waits for one that is on its way.
    cluster.agent.restart().expect("starts");
    cluster.becomes("the pod to be let in", || {
        cluster.plugin("ADD", &cluster.a, &object).status.success()
    });
    assert_eq!(cluster.names(), [cluster.named("a")]);
}

#[test]
fn unload_takes_nothing_from_a_running_agent() {
    let mut cluster = Cluster::new("k8s-unload");
    cluster.in_force();
    let at = |name: &str| cluster.dir.path().join(name).to_string_lossy().into_owned();
    let (conf, bin) = (at("net.d"), at("bin"));
    let unload = ["unload", "--cni-conf-dir", &conf, "--cni-bin-dir", &bin];
    let error = cluster.agent.command(&unload).expect_err("an agent runs").to_string();
    assert!(error.contains("stop it first"), "{error}");
    assert!(cluster.is_chained() && cluster.dir.path().join("bin/sidestep-cni").exists());
    cluster.agent.terminate().expect("ends");
    cluster.agent.command(&unload).expect("unloaded");
    assert!(!cluster.is_chained() && !cluster.dir.path().join("bin/sidestep-cni").exists());
    assert!(!cluster.agent.bpffs().exists());
}

#[test]
fn a_configuration_that_others_write_is_repaired() {
    let cluster = Cluster::new("k8s-conflist");
    cluster.in_force();
    let file = cluster.dir.path().join("net.d/10-net.conflist");
    let socket = fs::metadata(cluster.dir.path().join("cni.sock")).expect("a socket");
    assert_eq!(socket.permissions().mode() & 0o777, 0o600);
    fs::write(&file, BRIDGE).expect("written");
    cluster.becomes("the repair", || cluster.is_chained());
    // Garbage is left alone, and reported.
    fs::write(&file, "{ no json").expect("written");
    cluster.agent.wait_log("10-net.conflist was not changed").expect("said");
    assert_eq!(fs::read_to_string(&file).expect("there"), "{ no json");
    fs::write(&file, BRIDGE).expect("written");
    cluster.becomes("the repair", || cluster.is_chained());
}

#[test]
fn bad_requests_of_the_plugin_are_named() {
    let cluster = Cluster::new("k8s-requests");
    cluster.in_force();
    let object = cluster.create_pending(&cluster.a);
    let (code, text) = refused(&cluster.plugin_with("ADD", &cluster.a, &object, "{ no json"));
    assert_eq!((code, text.contains("not valid JSON")), (6, true), "{text}");
    let mut unknown = object.clone();
    unknown["metadata"]["name"] = "nobody".into();
    let (code, text) = refused(&cluster.plugin("ADD", &cluster.a, &unknown));
    assert_eq!((code, text.contains(&cluster.named("nobody"))), (11, true), "{text}");
    // Somebody who says nothing sensible to the socket itself.
    let mut stream = std::os::unix::net::UnixStream::connect(cluster.dir.path().join("cni.sock"))
        .expect("connected");
    stream.write_all(b"GET / HTTP/1.1\r\n").expect("written");
    let mut answer = String::new();
    std::io::BufRead::read_line(&mut std::io::BufReader::new(stream), &mut answer).expect("read");
    assert!(answer.contains("invalid request"), "{answer}");
    succeeds(&cluster.plugin("ADD", &cluster.a, &object));
}

#[test]
fn a_forbidden_verb_is_named() {
    let forbidden = [("list", "pods"), ("watch", "namespaces"), ("get", "nodes")];
    let cluster = Cluster::with("k8s-rbac", &[], |api| {
        for (verb, resource) in forbidden {
            api.forbid("k8s-rbac", verb, resource).expect("forbidden");
        }
    });
    let agent = &cluster.agent;
    for (verb, resource) in forbidden {
        cluster.becomes("the complaint", || {
            agent.log().contains(&format!("verb \"{verb}\" on \"{resource}\""))
        });
        cluster.allow(verb, resource);
    }
    // Of those that are asked for later, each is named when it is: nothing else waits for it.
    cluster.forbid("create", "events");
    let tproxy = "sidecar.istio.io/interceptionMode";
    cluster.create(annotated(cluster.pending(&cluster.b), tproxy, "TPROXY"));
    agent.wait_log("verb \"create\" on \"events\"").expect("said");
    let object = cluster.create_pending(&cluster.a);
    cluster.becomes("the pod to be let in", || {
        cluster.is_chained() && cluster.plugin("ADD", &cluster.a, &object).status.success()
    });
}

/// Where the watch has not told of the pod yet, it is asked for.
#[test]
fn a_pod_that_may_not_be_asked_for_is_named() {
    let cluster = Cluster::with("k8s-get", &[], |api| {
        api.forbid("k8s-get", "get", "pods").expect("forbidden");
    });
    cluster.in_force();
    let object = cluster.pending(&cluster.a);
    let (code, text) = refused(&cluster.plugin("ADD", &cluster.a, &object));
    assert_eq!(code, 11, "to be tried again: {text}");
    assert!(text.contains("verb \"get\" on \"pods\""), "{text}");
    // The watch tells: then nothing needs to be asked.
    let object = cluster.create(object);
    cluster.becomes("the pod to be let in", || {
        cluster.plugin("ADD", &cluster.a, &object).status.success()
    });
}

#[test]
fn a_node_or_kubeconfig_that_cannot_be_right_ends_the_agent() {
    let mut cluster = Cluster::new("k8s-config");
    cluster.in_force();
    cluster.api.delete::<ApiNode>("", &cluster.name).expect("deleted");
    cluster.agent.restart().expect("starts");
    cluster.agent.wait_log("no node \"k8s-config\" (--node-name)").expect("said");
    let agent = &mut cluster.agent;
    wait_until("its end", SOON, || !agent.is_running()).expect("ended");
    fs::write(cluster.dir.path().join("kubeconfig"), "clusters: [").expect("written");
    cluster.agent.restart().expect("starts");
    cluster.agent.wait_log("kubeconfig").expect("said");
    let agent = &mut cluster.agent;
    wait_until("its end", SOON, || !agent.is_running()).expect("ended");
}

#[test]
fn a_node_that_is_taken_out_keeps_nothing() {
    let mut cluster = Cluster::new("k8s-node");
    cluster.in_force();
    let patch = json!({"metadata": {"labels": {"sidestep.io/intercept": "disabled"}}});
    cluster.api.patch::<ApiNode>("", &cluster.name, &patch).expect("patched");
    cluster.agent.terminate().expect("ends");
    assert!(!cluster.is_chained() && !cluster.agent.bpffs().exists());
}

#[test]
fn health_and_metrics() {
    let flags = ["--http", "127.0.0.1:0"];
    let cluster = Cluster::with("k8s-http", &flags, |api| {
        api.forbid("k8s-http", "list", "pods").expect("forbidden");
    });
    let get = |path| cluster.agent.get(path).expect("answered");
    cluster.becomes("health", || get("/healthz").0 == 200);
    let (status, text) = get("/readyz");
    assert_eq!(status, 503, "the first list has not come: {text}");
    assert!(text.contains("not been listed"), "{text}");
    cluster.allow("list", "pods");
    cluster.becomes("readiness", || get("/readyz").0 == 200);
    let object = cluster.create_pending(&cluster.a);
    succeeds(&cluster.plugin("ADD", &cluster.a, &object));
    let _proxy = cluster.a.fake_proxy(15001).expect("a proxy");
    cluster.a.ask(APP, APP, addr(ip(REMOTE4), 80)).expect("reached");
    let (status, text) = get("/metrics");
    assert_eq!(status, 200);
    for line in [
        "sidestep_pods_enrolled{mesh=\"istio\"} 1",
        "sidestep_events_total{mesh=\"istio\",event=\"captured_outbound\"} 1",
        "sidestep_cni_requests_total{verb=\"add\",result=\"ok\"} 1",
        "sidestep_hook_attached{hook=\"connect4\"} 1",
        "sidestep_map_entries{map=\"pods\"} 1",
    ] {
        assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
    }
    assert!(text.contains("sidestep_api_errors_total{request=\"pods\"}"), "{text}");
    assert_eq!(get("/nothing").0, 404);
}

#[test]
fn other_nodes_pods_are_never_sent() {
    let cluster = Cluster::new("k8s-others");
    cluster.in_force();
    let mut other = cluster.running(&cluster.b);
    other["spec"]["nodeName"] = "another".into();
    cluster.create(other);
    let object = cluster.create_pending(&cluster.a);
    succeeds(&cluster.plugin("ADD", &cluster.a, &object));
    assert_eq!(cluster.names(), [cluster.named("a")]);
    let asked = cluster.api.asked(&cluster.name).expect("the audit log");
    let of_pods: Vec<_> = asked.iter().filter(|asked| asked.uri.contains("/pods?")).collect();
    assert!(of_pods.iter().any(|asked| asked.verb == "watch"), "{asked:?}");
    for asked in of_pods {
        assert!(asked.uri.contains("spec.nodeName%3Dk8s-others"), "{asked:?}");
    }
}

/// A runtime may reach the plugin by a link.
#[test]
fn the_plugin_goes_by_its_files_name() {
    let dir = tempfile::tempdir().expect("a directory");
    let link = dir.path().join("sidestep-cni");
    symlink(binary(), &link).expect("linked");
    let output = Command::new(&link).env("CNI_COMMAND", "VERSION").stdin(Stdio::null()).output();
    let text = succeeds(&output.expect("runs"));
    assert!(text.contains("supportedVersions"), "{text}");
}
