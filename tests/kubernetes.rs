//! The agent against an API server: pods are found, enrolled before they run, told what is wrong
//! with them; the server may go away.

mod common;

use std::{
    fs,
    io::Write,
    os::unix::fs::{PermissionsExt, symlink},
    process::{Command, Stdio},
};

use common::{cluster::*, *};
use serde_json::{Value, json};
use sidestep::bpf::LAYOUT;
use sidestep_e2e::apiserver::Gone;
use sidestep_lab::{Pod, PodNet, wait_until};

#[test]
fn a_fresh_pod_is_intercepted_before_its_first_process() {
    let cluster = Cluster::new("k8s-fresh");
    cluster.in_force();
    let object = cluster.api.put(pending(&cluster.a)).expect("created");
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
    assert_eq!(cluster.names(), ["lab/a"], "it is intercepted until its namespace is gone");
}

#[test]
fn a_pod_that_is_in_no_mesh_starts_untouched() {
    let cluster = Cluster::new("k8s-plain");
    cluster.in_force();
    let mut object = pending(&cluster.a);
    object["metadata"]["annotations"] = json!({});
    let object = cluster.api.put(object).expect("created");
    succeeds(&cluster.plugin("ADD", &cluster.a, &object));
    assert!(cluster.names().is_empty());
}

#[test]
fn pods_that_ran_before_the_agent_are_found_by_their_processes() {
    let mut cluster = Cluster::new("k8s-before");
    cluster.agent.terminate().expect("ends");
    let object = cluster.api.put(running(&cluster.a)).expect("created");
    cluster.runs(|cluster| &cluster.a, &object);
    cluster.agent.restart().expect("starts");
    cluster.agent.wait_enrolled(&cluster.a).expect("enrolled");
    let status = cluster.agent.status().expect("status");
    assert!(status["pods"][0]["netns"].as_str().is_some_and(|path| path.starts_with("/proc/")));
    // A restart of the agent finds it again, whatever the API server does meanwhile.
    cluster.api.stop().expect("stopped");
    cluster.agent.kill9();
    cluster.agent.restart().expect("starts");
    let _proxy = cluster.a.fake_proxy(15001).expect("a proxy");
    let target = addr(ip(REMOTE4), 80);
    assert_original(&cluster.a.ask(APP, APP, target).expect("reaches the proxy"), target);
    cluster.agent.wait_log("can't be reached").expect("said");
    assert_eq!(cluster.names(), ["lab/a"]);
    cluster.api.resume().expect("resumed");
    cluster.agent.wait_enrolled(&cluster.a).expect("still enrolled");
}

/// Those that charts/sidestep names, one by one.
#[test]
fn the_charts_capabilities_are_enough() {
    let chart = include_str!("../charts/sidestep/templates/daemonset.yaml");
    let added =
        chart.split("drop: [ALL]").nth(1).and_then(|text| text.split("volumeMounts:").next());
    let names = added.expect("a list").lines().filter_map(|line| line.trim().strip_prefix("- "));
    let names: Vec<String> = names.map(|name| format!("+{}", name.to_lowercase())).collect();
    assert_eq!(names.len(), 7, "{names:?}");
    let mut cluster = Cluster::with_capabilities("k8s-caps", &names.join(","));
    cluster.in_force();
    let fresh = cluster.api.put(pending(&cluster.a)).expect("created");
    succeeds(&cluster.plugin("ADD", &cluster.a, &fresh));
    let object = running(&cluster.b);
    cluster.runs(|cluster| &cluster.b, &object);
    cluster.api.put(object).expect("created");
    cluster.agent.wait_enrolled(&cluster.b).expect("found by its process");
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
    let object = running(&cluster.a);
    cluster.runs(|cluster| &cluster.a, &object);
    cluster.api.put(object).expect("created");
    cluster.agent.wait_log("CAP_SYS_PTRACE").expect("said");
}

#[test]
fn the_api_server_may_go_away_and_forget() {
    let cluster = Cluster::new("k8s-away");
    cluster.in_force();
    let object = cluster.api.put(pending(&cluster.a)).expect("created");
    succeeds(&cluster.plugin("ADD", &cluster.a, &object));
    let _proxy = cluster.a.fake_proxy(15001).expect("a proxy");
    let target = addr(ip(REMOTE4), 80);
    let works = || assert_original(&cluster.a.ask(APP, APP, target).expect("reached"), target);
    cluster.api.stop().expect("stopped");
    cluster.agent.wait_log("can't be reached").expect("said");
    works();
    let log = cluster.agent.log();
    assert!(!log.contains("failed with error"), "in the agent's own words: {log}");
    cluster.api.compact(Gone::Event);
    cluster.api.resume().expect("resumed");
    cluster.agent.wait_log("solved: ").expect("solved");
    works();
    // What comes after that is seen: it follows the server again.
    let off = json!({"metadata": {"annotations": {"sidestep.io/intercept": "disabled"}}});
    cluster.api.patch("pods", "lab", "a", &off).expect("patched");
    cluster.becomes("the pod to leave", || cluster.names().is_empty());
    cluster.api.compact(Gone::Status);
    let on = json!({"metadata": {"annotations": {"sidestep.io/intercept": "enabled"}}});
    cluster.api.patch("pods", "lab", "a", &on).expect("patched");
    cluster.becomes("the pod to be back", || cluster.names() == ["lab/a"]);
    works();
}

#[test]
fn annotations_and_the_namespaces_label_change_live() {
    let cluster = Cluster::new("k8s-live");
    cluster.in_force();
    let object = cluster.api.put(pending(&cluster.a)).expect("created");
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
    let annotate = |value: Value| {
        let patch = json!({"metadata": {"annotations": {key: value}}});
        cluster.api.patch("pods", "lab", "a", &patch).expect("patched");
    };
    annotate("8099".into());
    cluster.becomes("the port to be excluded", || !captured());
    annotate(Value::Null);
    cluster.becomes("the port to be captured", captured);
    let label = |value: Value| {
        let patch = json!({"metadata": {"labels": {"sidestep.io/intercept": value}}});
        cluster.api.patch("namespaces", "", "lab", &patch).expect("patched");
    };
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
    let object = cluster.api.put(pending(&cluster.a)).expect("created");
    succeeds(&cluster.plugin("ADD", &cluster.a, &object));
    cluster.api.delete("pods", "lab", "a").expect("deleted");
    // Its successor has the same name, and another namespace and uid.
    let mut successor = pending(&cluster.b);
    successor["metadata"]["name"] = "a".into();
    let successor = cluster.api.put(successor).expect("created");
    succeeds(&cluster.plugin("ADD", &cluster.b, &successor));
    assert_eq!(cluster.names(), ["lab/a", "lab/a"]);
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
    cluster.becomes("the namespace's state to go", || cluster.names() == ["lab/a"]);
}

/// A Job's pod: its object stays, its namespace goes.
#[test]
fn a_pod_that_is_done_is_no_problem() {
    let mut cluster = Cluster::new("k8s-done");
    cluster.in_force();
    let object = cluster.api.put(pending(&cluster.a)).expect("created");
    succeeds(&cluster.plugin("ADD", &cluster.a, &object));
    let done = json!({"status": {"phase": "Succeeded"}});
    cluster.api.patch("pods", "lab", "a", &done).expect("patched");
    drop(std::mem::replace(&mut cluster.a, cluster.lab.pod("c", PodNet::V4).expect("c")));
    cluster.becomes("the namespace's state to go", || cluster.names().is_empty());
    assert!(!cluster.agent.log().contains("ERROR"), "{}", cluster.agent.log_tail());
}

#[test]
fn a_pod_that_cannot_be_enrolled_does_not_start_and_is_told() {
    let cluster = Cluster::new("k8s-refuse");
    cluster.in_force();
    let tproxy = annotated(pending(&cluster.a), "sidecar.istio.io/interceptionMode", "TPROXY");
    let object = cluster.api.put(tproxy).expect("created");
    let (code, text) = refused(&cluster.plugin("ADD", &cluster.a, &object));
    assert_eq!(code, 100);
    assert!(text.contains("lab/a") && text.contains("TPROXY"), "{text}");
    let events = || cluster.api.list("events.events.k8s.io").expect("events");
    cluster.becomes("an Event", || {
        events().iter().any(|event| {
            event["regarding"]["name"] == "a"
                && event["reason"] == "Unsupported"
                && event["note"].as_str().is_some_and(|note| note.contains("TPROXY"))
        })
    });
    // Annotations that can't be read capture everything, and say so.
    let key = "traffic.sidecar.istio.io/excludeOutboundPorts";
    let object = cluster.api.put(annotated(pending(&cluster.b), key, "80,http")).expect("created");
    succeeds(&cluster.plugin("ADD", &cluster.b, &object));
    cluster.becomes("an Event for b", || {
        events().iter().any(|event| {
            let note = event["note"].as_str().unwrap_or_default();
            event["regarding"]["name"] == "b" && note.contains(key) && note.contains("80,http")
        })
    });
    assert_eq!(cluster.names(), ["lab/b"]);
}

/// It is Istio's own agents' business, so it starts; that nobody took it is said.
#[test]
fn an_ambient_pod_starts_and_is_told_that_it_is_left_alone() {
    let cluster = Cluster::new("k8s-ambient");
    cluster.in_force();
    let label = json!({"metadata": {"labels": {"istio.io/dataplane-mode": "ambient"}}});
    cluster.api.patch("namespaces", "", "lab", &label).expect("patched");
    let mut object = pending(&cluster.a);
    object["metadata"]["annotations"] = json!({});
    object["spec"]["containers"] = json!([{"name": "app"}]);
    let object = cluster.api.put(object).expect("created");
    succeeds(&cluster.plugin("ADD", &cluster.a, &object));
    let runs = json!({"status": {"phase": "Running"}});
    cluster.api.patch("pods", "lab", "a", &runs).expect("patched");
    cluster.becomes("an Event", || {
        cluster.api.list("events.events.k8s.io").expect("events").iter().any(|event| {
            let note = event["note"].as_str().unwrap_or_default();
            event["regarding"]["name"] == "a"
                && event["reason"] == "Unsupported"
                && note.contains("istio.io/dataplane-mode: \"ambient\"")
        })
    });
    succeeds(&cluster.plugin("CHECK", &cluster.a, &object));
    assert!(cluster.names().is_empty());
    let taken = json!({"metadata": {"annotations": {"ambient.istio.io/redirection": "enabled"}}});
    cluster.api.patch("pods", "lab", "a", &taken).expect("patched");
    cluster.agent.wait_log("solved: ").expect("Istio's own agent has it");
}

#[test]
fn a_full_map_refuses_a_pod_and_wedges_nothing() {
    let cluster = Cluster::new("k8s-full");
    cluster.in_force();
    // Every other port is a rule of its own: half of what there is room for.
    let ports: Vec<String> = (1..=u16::MAX).step_by(2).map(|port| port.to_string()).collect();
    let key = "traffic.sidecar.istio.io/excludeOutboundPorts";
    let greedy = |pod: &Pod| annotated(pending(pod), key, &ports.join(","));
    let first = cluster.api.put(greedy(&cluster.a)).expect("created");
    succeeds(&cluster.plugin("ADD", &cluster.a, &first));
    let second = cluster.api.put(greedy(&cluster.b)).expect("created");
    let (code, text) = refused(&cluster.plugin("ADD", &cluster.b, &second));
    assert_eq!(code, 100);
    assert!(text.contains("lab/b") && text.contains("port_rules map is full"), "{text}");
    assert_eq!(cluster.names(), ["lab/a"]);
    // With less, it is let in, and the first one still works as it should.
    let modest = json!({"metadata": {"annotations": {key: "81"}}});
    cluster.api.patch("pods", "lab", "b", &modest).expect("patched");
    cluster.becomes("the second pod to be let in", || cluster.names() == ["lab/a", "lab/b"]);
    let _proxies = [&cluster.a, &cluster.b].map(|pod| pod.fake_proxy(15001).expect("a proxy"));
    let target = addr(ip(REMOTE4), 80);
    for pod in [&cluster.a, &cluster.b] {
        assert_original(&pod.ask(APP, APP, target).expect("reached"), target);
    }
}

#[test]
fn no_agent_no_pod() {
    let mut cluster = Cluster::new("k8s-no-agent");
    cluster.in_force();
    cluster.agent.kill9();
    let object = cluster.api.put(pending(&cluster.a)).expect("created");
    let (code, text) = refused(&cluster.plugin("ADD", &cluster.a, &object));
    assert_eq!(code, 11, "to be tried again: {text}");
    assert!(text.contains("no agent answers"), "{text}");
    succeeds(&cluster.plugin("DEL", &cluster.a, &object));
    // It waits for one that is on its way.
    cluster.agent.restart().expect("starts");
    cluster.becomes("the pod to be let in", || {
        cluster.plugin("ADD", &cluster.a, &object).status.success()
    });
    assert_eq!(cluster.names(), ["lab/a"]);
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
    cluster.agent.wait_log("10-net.conflist is left alone").expect("said");
    assert_eq!(fs::read_to_string(&file).expect("there"), "{ no json");
    fs::write(&file, BRIDGE).expect("written");
    cluster.becomes("the repair", || cluster.is_chained());
}

#[test]
fn bad_requests_of_the_plugin_are_named() {
    let cluster = Cluster::new("k8s-requests");
    cluster.in_force();
    let object = cluster.api.put(pending(&cluster.a)).expect("created");
    let (code, text) = refused(&cluster.plugin_with("ADD", &cluster.a, &object, "{ no json"));
    assert_eq!((code, text.contains("no JSON")), (6, true), "{text}");
    let mut unknown = object.clone();
    unknown["metadata"]["name"] = "nobody".into();
    let (code, text) = refused(&cluster.plugin("ADD", &cluster.a, &unknown));
    assert_eq!((code, text.contains("lab/nobody")), (11, true), "{text}");
    // Somebody who says nothing sensible to the socket itself.
    let mut stream = std::os::unix::net::UnixStream::connect(cluster.dir.path().join("cni.sock"))
        .expect("connected");
    stream.write_all(b"GET / HTTP/1.1\r\n").expect("written");
    let mut answer = String::new();
    std::io::BufRead::read_line(&mut std::io::BufReader::new(stream), &mut answer).expect("read");
    assert!(answer.contains("no request"), "{answer}");
    succeeds(&cluster.plugin("ADD", &cluster.a, &object));
}

#[test]
fn a_forbidden_verb_is_named() {
    let forbidden = [("list", "pods"), ("watch", "namespaces"), ("get", "nodes")];
    let cluster = Cluster::with("k8s-rbac", &[], |api| {
        for (verb, resource) in forbidden {
            api.forbid(verb, resource);
        }
    });
    let (api, agent) = (&cluster.api, &cluster.agent);
    for (verb, resource) in forbidden {
        cluster.becomes("the complaint", || {
            agent.log().contains(&format!("verb \"{verb}\" on \"{resource}\""))
        });
        api.allow(verb, resource);
    }
    // Of those that are asked for later, each is named when it is: nothing else waits for it.
    api.forbid("create", "events");
    let tproxy = annotated(pending(&cluster.b), "sidecar.istio.io/interceptionMode", "TPROXY");
    api.put(tproxy).expect("created");
    agent.wait_log("verb \"create\" on \"events\"").expect("said");
    let object = api.put(pending(&cluster.a)).expect("created");
    cluster.becomes("the pod to be let in", || {
        cluster.is_chained() && cluster.plugin("ADD", &cluster.a, &object).status.success()
    });
}

/// Where the watch has not told of the pod yet, it is asked for.
#[test]
fn a_pod_that_may_not_be_asked_for_is_named() {
    let cluster = Cluster::with("k8s-get", &[], |api| api.forbid("get", "pods"));
    cluster.in_force();
    let object = pending(&cluster.a);
    let (code, text) = refused(&cluster.plugin("ADD", &cluster.a, &object));
    assert_eq!(code, 11, "to be tried again: {text}");
    assert!(text.contains("verb \"get\" on \"pods\""), "{text}");
    // The watch tells: then nothing needs to be asked.
    let object = cluster.api.put(object).expect("created");
    cluster.becomes("the pod to be let in", || {
        cluster.plugin("ADD", &cluster.a, &object).status.success()
    });
}

#[test]
fn a_node_or_kubeconfig_that_cannot_be_right_ends_the_agent() {
    let mut cluster = Cluster::new("k8s-config");
    cluster.in_force();
    cluster.api.delete("nodes", "", NODE).expect("deleted");
    cluster.agent.restart().expect("starts");
    cluster.agent.wait_log("no node \"lab\" (--node-name)").expect("said");
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
    cluster.api.patch("nodes", "", NODE, &patch).expect("patched");
    cluster.agent.terminate().expect("ends");
    assert!(!cluster.is_chained() && !cluster.agent.bpffs().exists());
}

/// What an HTTP server answers to a GET: status and body.
fn get(at: std::net::SocketAddr, path: &str) -> (u16, String) {
    use std::io::Read;
    let Ok(mut stream) = std::net::TcpStream::connect(at) else {
        return (0, String::new());
    };
    let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).expect("written");
    let mut text = String::new();
    stream.read_to_string(&mut text).expect("read");
    let status = text.split(' ').nth(1).and_then(|code| code.parse().ok()).unwrap_or(0);
    (status, text.split_once("\r\n\r\n").map_or(String::new(), |(_, body)| body.to_owned()))
}

#[test]
fn health_and_metrics() {
    let flags = ["--http", "127.0.0.1:0"];
    let cluster = Cluster::with("k8s-http", &flags, |api| api.forbid("list", "pods"));
    cluster.agent.wait_log("health and metrics").expect("said");
    let log = cluster.agent.log();
    let port = log.split("address=127.0.0.1:").nth(1).expect("an address");
    let port = port.split(|c: char| !c.is_ascii_digit()).next().expect("a port");
    let http = addr([127, 0, 0, 1], port.parse().expect("a number"));
    cluster.becomes("health", || get(http, "/healthz").0 == 200);
    let (status, text) = get(http, "/readyz");
    assert_eq!(status, 503, "the first list has not come: {text}");
    assert!(text.contains("not told"), "{text}");
    cluster.api.allow("list", "pods");
    cluster.becomes("readiness", || get(http, "/readyz").0 == 200);
    let object = cluster.api.put(pending(&cluster.a)).expect("created");
    succeeds(&cluster.plugin("ADD", &cluster.a, &object));
    let _proxy = cluster.a.fake_proxy(15001).expect("a proxy");
    cluster.a.ask(APP, APP, addr(ip(REMOTE4), 80)).expect("reached");
    let (status, text) = get(http, "/metrics");
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
    // A hook that somebody took away.
    fs::remove_file(cluster.agent.bpffs().join(LAYOUT).join("links/connect4")).expect("removed");
    let (status, text) = get(http, "/readyz");
    assert_eq!((status, text.contains("connect4")), (503, true), "{text}");
    assert_eq!(get(http, "/nothing").0, 404);
}

#[test]
fn other_nodes_pods_are_never_sent() {
    let cluster = Cluster::new("k8s-others");
    cluster.in_force();
    let mut other = running(&cluster.b);
    other["spec"]["nodeName"] = "another".into();
    cluster.api.put(other).expect("created");
    let object = cluster.api.put(pending(&cluster.a)).expect("created");
    succeeds(&cluster.plugin("ADD", &cluster.a, &object));
    assert_eq!(cluster.names(), ["lab/a"]);
    let of_pods = |path: &str| path.ends_with("/pods");
    for request in cluster.api.requests().iter().filter(|request| of_pods(&request.path)) {
        assert!(request.query.contains("spec.nodeName%3Dlab"), "{request:?}");
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
