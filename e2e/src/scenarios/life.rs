//! The life of a node, and of what runs on it.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use sidestep_e2e::mesh::{Capture, Cluster, Space, app, ensure_counts};
use sidestep_e2e::shell::Shell;

use super::load::{SOME, load};
use super::mesh::pair;
use super::pods::{container, istio_proxy};
use super::{MeshRow, Of};

pub const SCENARIOS: &[MeshRow] = &[
    ("life-sandbox", "a pod whose pause process dies starts again, in the mesh", Of::All, sandbox),
    ("life-runtime", "containerd and the kubelet are restarted under load", Of::All, runtime),
    (
        "life-static",
        "static pods start, and one that has a sidecar is taken",
        Of::Istio,
        static_pods,
    ),
    ("life-drain", "a node is drained under load, and taken into service again", Of::All, drain),
    (
        "life-reboot",
        "at a node's reboot not one packet of a mesh pod is in plain text",
        Of::All,
        reboot,
    ),
    ("life-churn", "300 mesh pods come and go, and leave nothing behind", Of::Istio, churn),
    (
        "life-taint",
        "pods wait for a node with the startup taint until its agent can intercept them",
        Of::All,
        taint,
    ),
    ("life-join", "a node joins, and its first mesh pod is in the mesh", Of::All, join),
];

fn sandbox(cluster: &Cluster) -> Result<()> {
    let space = cluster.space("life-sandbox")?;
    pair(&space)?;
    for pod in ["server", "client"] {
        space.get_known("client", "http://server/")?;
        let before = space.get_pod(pod)?;
        let uid = before["metadata"]["uid"].as_str().context("a pod without uid")?;
        let shell = cluster.shell(&space.node_of(pod)?);
        let pause = shell.process_named(uid, "pause")?.to_string();
        shell.run(&["kill", "-9", &pause])?;
        started_again(&space, pod, &before)?;
        space.wait_enrolled(pod, true)?;
        space.get_known("client", "http://server/")?;
    }
    Ok(())
}

/// Waits until the pod's app was started once more, and the pod is ready.
fn started_again(space: &Space<'_>, pod: &str, before: &Value) -> Result<()> {
    let started = |object: &Value| {
        let containers = object["status"]["containerStatuses"].as_array().into_iter().flatten();
        let mut app = containers.filter(|one| one["name"] == "app");
        app.next().map(|one| one["state"]["running"]["startedAt"].clone()).unwrap_or_default()
    };
    let old = started(before);
    let again = space.cluster().soon(&format!("{pod} to be started again"), || {
        let now = started(&space.get_pod(pod)?);
        ensure!(!now.is_null() && now != old, "it is not: {now}");
        Ok(())
    });
    again.with_context(|| format!("events: {:#?}", space.events(pod)))?;
    space.wait_ready(pod).map(drop)
}

fn runtime(cluster: &Cluster) -> Result<()> {
    let space = cluster.space("life-runtime")?;
    let load = load(&space)?;
    // A kubelet that starts takes its pods for not ready until it has probed them.
    let patch = r#"{"spec":{"publishNotReadyAddresses":true}}"#;
    space.kubectl(&["patch", "service", "server", "--patch", patch])?;
    for service in ["containerd", "kubelet"] {
        for node in cluster.workers() {
            cluster.shell(node).run(&["systemctl", "restart", service])?;
        }
        let late = format!("late-{service}");
        cluster.soon("the API server to take a pod", || {
            space.client(&late, cluster.worker(1)?, json!({}))
        })?;
        space.wait_ready(&late)?;
        space.get_known(&late, "http://server/")?;
        load.more(SOME).with_context(|| format!("after {service} was restarted"))?;
    }
    cluster.agents_ready()?;
    println!("       {} requests, none failed", load.ensure_undisturbed()?);
    Ok(())
}

/// Where the kubelet looks for static pods.
const MANIFESTS: &str = "/etc/kubernetes/manifests";

fn static_pods(cluster: &Cluster) -> Result<()> {
    let space = cluster.plain_space("life-static")?;
    // Where the mesh injects, the API server refuses the mirror pod: it would have the sidecar's
    // token.
    let injected = cluster.space("life-static-injected")?;
    let node = cluster.worker(0)?;
    let shell = cluster.shell(node);
    // The injector does not see static pods: the second has its sidecar in its manifest.
    let plain = json!({"containers": [app(&["http", "0.0.0.0:8080"])]});
    let mut proxy = istio_proxy();
    proxy["image"] = app(&[])["image"].clone();
    let meshed = json!({"containers": [app(&["serve", "0.0.0.0:8080"]), proxy]});
    let status = json!({"sidecar.istio.io/status": "{}"});
    let pods = [
        ("plain", &space, plain.clone(), json!({})),
        ("meshed", &space, meshed, status),
        ("mirrorless", &injected, plain, json!({})),
    ];
    let file = |name: &str| format!("{MANIFESTS}/e2e-{name}.json");
    let tested = (|| {
        for (name, space, spec, annotations) in &pods {
            let pod = json!({
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {"name": name, "namespace": space.name(), "annotations": annotations},
                "spec": spec,
            });
            shell.replace(&file(name), &pod.to_string())?;
        }
        for name in ["plain", "meshed"] {
            space.wait_ready(&format!("{name}-{node}"))?;
        }
        cluster.soon("the static pod without a mirror pod to run", || {
            let ps = ["crictl", "ps", "--state", "running", "--namespace", injected.name(), "-q"];
            ensure!(!shell.run(&ps)?.trim().is_empty(), "it does not");
            Ok(())
        })?;
        space.wait_enrolled(&format!("meshed-{node}"), true)?;
        let entry = cluster.enrolled(node, &space.full(&format!("plain-{node}")))?;
        ensure!(entry.is_none(), "the agent has taken it: {entry:?}");
        let target =
            SocketAddr::new(space.ip_of(&format!("plain-{node}"))?.parse()?, 8080).to_string();
        let said = space.exec(&format!("meshed-{node}"), &["/e2e-pod", "once", &target])?;
        ensure!(said.starts_with("ok by=outbound"), "{said:?}");
        Ok(())
    })();
    for (name, ..) in &pods {
        shell.run(&["rm", "-f", &file(name)])?;
    }
    tested
}

fn drain(cluster: &Cluster) -> Result<()> {
    let space = cluster.space("life-drain")?;
    space.service("web")?;
    let spread = json!({"spec": {
        "terminationGracePeriodSeconds": 10,
        "topologySpreadConstraints": [{
            "maxSkew": 1,
            "topologyKey": "kubernetes.io/hostname",
            "whenUnsatisfiable": "ScheduleAnyway",
            "labelSelector": {"matchLabels": {"app": "web"}},
        }],
    }});
    space.deployment("web", 4, &["http", "0.0.0.0:8080"], spread)?;
    cluster.rolled_out(space.name(), "web")?;
    space.client("client", cluster.worker(0)?, json!({}))?;
    space.wait_ready("client")?;
    space.get_known("client", "http://web/")?;
    let node = cluster.worker(1)?;
    let web_on_node = || -> Result<usize> {
        let pods = cluster.status(node)?["pods"].to_string();
        Ok(pods.matches(&space.full("web-")).count())
    };
    ensure!(web_on_node()? > 0, "none of its pods is on {node}");
    let args = [
        "drain",
        node,
        "--ignore-daemonsets",
        "--delete-emptydir-data",
        "--force",
        "--timeout=180s",
    ];
    let drained = cluster.kubectl(&args).and_then(|_| {
        cluster.rolled_out(space.name(), "web")?;
        cluster.soon("the agent to have none of its pods", || {
            let left = web_on_node()?;
            ensure!(left == 0, "{left} are left");
            Ok(())
        })?;
        space.get_known("client", "http://web/")
    });
    // Also when that failed: others want the node.
    cluster.kubectl(&["uncordon", node])?;
    drained?;
    space.server("back", node, json!({}))?;
    space.wait_ready("back")?;
    space.ensure_first_try("back")?;
    space.get_known("client", "http://back/").map(drop)
}

/// A unit that does at each start, before all else, what kind's nodes lack or others do to real
/// ones: it mounts the bpf file system, which systemd leaves to containers, and writes CNI's
/// configuration as the network's own installer does, without the agent's entry.
const INSTALLER: &str = "[Unit]
Description=Writes the network's own CNI configuration
Before=containerd.service kubelet.service

[Service]
Type=oneshot
ExecStart=/bin/mount -t bpf bpf /sys/fs/bpf
ExecStart=/bin/cp /etc/e2e.conflist FILE

[Install]
WantedBy=multi-user.target
";
const INSTALLER_FILE: &str = "/etc/systemd/system/e2e-network.service";

fn reboot(cluster: &Cluster) -> Result<()> {
    let space = cluster.space("life-reboot")?;
    let node = cluster.worker(1)?;
    let shell = cluster.shell(node);
    space.server("server", cluster.worker(0)?, json!({}))?;
    space.server("back", node, json!({}))?;
    space.wait_ready("server")?;
    space.wait_ready("back")?;
    let out = space.load("out", node, "server", json!({}))?;
    let into = space.load("into", cluster.worker(0)?, "back", json!({}))?;
    space.client("probe", cluster.worker(0)?, json!({}))?;
    space.wait_ready("probe")?;
    ensure_counts(&space, "probe", "http://back/")?;
    out.more(SOME)?;
    into.more(SOME)?;

    let (file, mut conflist) = conflist(&shell)?;
    let plugins = conflist["plugins"].as_array_mut().context("it has plugins")?;
    plugins.retain(|plugin| plugin["type"] != "sidestep-cni");
    shell.write("/etc/e2e.conflist", &conflist.to_string())?;
    shell.write(INSTALLER_FILE, &INSTALLER.replace("FILE", &file))?;
    shell.run(&["systemctl", "enable", "e2e-network.service"])?;
    let before = ["out", "back"].map(|pod| space.get_pod(pod));
    let capture = Capture::start(cluster)?;
    cluster.here(&["docker", "restart", node])?;
    for (pod, before) in ["out", "back"].iter().zip(before) {
        started_again(&space, pod, &before?)?;
    }
    cluster.agents_ready()?;
    out.more(SOME)?;
    into.more(SOME)?;
    let ran = shell.run(&["systemctl", "show", "-P", "Result", "e2e-network.service"])?;
    let state =
        shell.run(&["systemctl", "show", "-P", "ExecMainExitTimestamp", "e2e-network.service"])?;
    shell.run(&["systemctl", "disable", "e2e-network.service"])?;
    shell.run(&["rm", INSTALLER_FILE, "/etc/e2e.conflist"])?;
    ensure!(ran.trim() == "success" && !state.trim().is_empty(), "the installer: {ran} {state}");
    let plain = capture.end()?;
    ensure!(plain.is_empty(), "{} packets in plain text: {plain:#?}", plain.len());
    for (name, load) in [("out", &out), ("into", &into)] {
        let account = load.account()?;
        ensure!(account.plain.is_empty(), "{name}: in plain text: {:#?}", account.plain);
        let (answered, failed) = (account.answered, account.failed.len());
        println!(
            "       {name}: {answered} requests answered, {failed} failed, none in plain text"
        );
    }
    for pod in ["out", "back"] {
        space.wait_enrolled(pod, true)?;
    }
    Ok(())
}

/// A node's CNI configuration, and its file.
fn conflist(shell: &Shell) -> Result<(String, Value)> {
    let names = shell.run(&["ls", CNI])?;
    let name = names.lines().find(|name| name.ends_with(".conflist"));
    let file = format!("{CNI}/{}", name.with_context(|| format!("{CNI} has no conflist"))?);
    let text = shell.read(&file)?;
    Ok((file, serde_json::from_str(&text).with_context(|| format!("it is {text:?}"))?))
}

const CNI: &str = "/etc/cni/net.d";

/// How many pods come and go in all, how many of them at once, and what the agent may have grown
/// by then.
const CHURN: usize = 300;
const AT_ONCE: u32 = 50;
const MORE_KIB: u64 = 4096;

fn churn(cluster: &Cluster) -> Result<()> {
    let space = cluster.plain_space("life-churn")?;
    // A stand-in for Envoy: it is not what is tested, and 300 of it take many minutes.
    let mut proxy = istio_proxy();
    proxy["image"] = app(&[])["image"].clone();
    let mut serve = container("app", &["pause"]);
    serve["image"] = proxy["image"].clone();
    let edit = json!({
        "metadata": {"annotations": {"sidecar.istio.io/status": "{}"}},
        "spec": {"containers": [serve, proxy]},
    });
    let nodes: Vec<Shell> = cluster.workers().iter().map(|node| cluster.shell(node)).collect();
    let left = || nodes.iter().map(left_on).collect::<Result<Vec<_>>>();
    let scale = |replicas: u32| -> Result<()> {
        let replicas = format!("--replicas={replicas}");
        space.kubectl(&["scale", "deployment", "many", &replicas]).map(drop)
    };
    // The first round is what the agent's memory is compared with.
    space.deployment("many", AT_ONCE, &[], edit)?;
    let mut first = None;
    let mut seen = 0;
    while seen < CHURN {
        scale(AT_ONCE)?;
        cluster.rolled_out(space.name(), "many")?;
        let mut enrolled = 0;
        for node in cluster.workers() {
            let pods = cluster.status(node)?["pods"].to_string();
            enrolled += pods.matches(&space.full("many-")).count();
        }
        ensure!(enrolled >= AT_ONCE as usize, "the agents have {enrolled} of {AT_ONCE}");
        seen += AT_ONCE as usize;
        scale(0)?;
        cluster.within(Duration::from_secs(240), "all pods to be gone", || {
            let pods = space.kubectl(&["get", "pods", "-o", "name"])?;
            ensure!(pods.trim().is_empty(), "{} are left", pods.lines().count());
            Ok(())
        })?;
        match &first {
            None => first = Some(left()?),
            Some(first) => cluster.soon("nothing of them to be left", || {
                let now = left()?;
                for (before, now) in first.iter().zip(&now) {
                    ensure!(now.things == before.things, "{:#?} are left of {:#?}", now, before);
                }
                Ok(())
            })?,
        }
    }
    for (before, now) in first.unwrap_or_default().iter().zip(left()?) {
        println!("       {seen} pods; the agent: {} KiB, then {} KiB", before.rss, now.rss);
        ensure!(now.rss <= before.rss + MORE_KIB, "it grew: {before:?}, {now:?}");
    }
    Ok(())
}

/// What there is on a node.
#[derive(Debug, Default)]
struct Left {
    /// Entries of the agent's maps, its pins, routes, names of network namespaces.
    things: Vec<String>,
    /// The agent's memory, in KiB.
    rss: u64,
}

fn left_on(shell: &Shell) -> Result<Left> {
    let (status, metrics) = shell.http("/metrics")?;
    ensure!(status == 200, "the agent's metrics: {status}");
    let entries = metrics.lines().filter(|line| line.starts_with("sidestep_map_entries"));
    let mut things: Vec<String> = entries.map(str::to_owned).collect();
    let count =
        "find /sys/fs/bpf/sidestep | sort; ip route; ip -6 route; ls /var/run/netns | wc -l";
    things.extend(shell.script(count, &[])?.lines().map(str::to_owned));
    let pid = shell.run(&["pgrep", "-o", "-x", "sidestep"])?;
    let text = shell.read(&format!("/proc/{}/status", pid.trim()))?;
    let rss = text.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    let rss = rss.trim().trim_end_matches(" kB").parse().context("VmRSS")?;
    Ok(Left { things, rss })
}

fn join(cluster: &Cluster) -> Result<()> {
    let space = cluster.space("life-join")?;
    space.server("server", cluster.worker(0)?, json!({}))?;
    space.wait_ready("server")?;
    let node = cluster.worker(1)?;
    let shell = cluster.shell(node);
    let control = cluster.shell(cluster.control_plane());
    // It leaves as a machine that is thrown away.
    cluster.kubectl(&["delete", "node", node])?;
    shell.run(&["kubeadm", "reset", "--force"])?;
    shell.script(
        "rm -rf /etc/cni/net.d/* /opt/cni/bin/sidestep-cni /run/sidestep; \
         find /sys/fs/bpf/sidestep -depth -delete",
        &[],
    )?;
    let command = control.run(&["kubeadm", "token", "create", "--print-join-command"])?;
    let words: Vec<&str> = command.split_whitespace().collect();
    shell.run(&[&words[..], &["--ignore-preflight-errors=all"]].concat())?;
    // Before the network is there, or the agent: it waits for them.
    space.client("first", node, json!({}))?;
    cluster.soon("the node to be ready", || {
        cluster.kubectl(&["wait", "--for=condition=Ready", &format!("node/{node}"), "--timeout=5s"])
    })?;
    cluster.agents_ready()?;
    space.wait_ready("first")?;
    space.get_known("first", "http://server/").map(drop)
}

const TAINT: &str = "sidestep.io/agent-not-ready";

fn taint(cluster: &Cluster) -> Result<()> {
    let space = cluster.space("life-taint")?;
    space.server("server", cluster.worker(0)?, json!({}))?;
    space.wait_ready("server")?;
    let node = cluster.worker(1)?;
    cluster.kubectl(&["taint", "node", node, &format!("{TAINT}=:NoSchedule")])?;
    let tested = (|| {
        // By the scheduler: a pod that names its node passes it, and the taint.
        let edit = json!({"spec": {"nodeSelector": {"kubernetes.io/hostname": node}}});
        space.pod("client", None, &["pause"], edit)?;
        cluster.soon("the scheduler to find no node", || {
            let conditions = space.get_pod("client")?["status"]["conditions"].to_string();
            ensure!(conditions.contains("untolerated taint"), "{conditions}");
            Ok(())
        })?;
        cluster.install_agent(&["--set", "startupTaint.enabled=true"])?;
        space.wait_ready("client")?;
        space.ensure_first_try("client")?;
        space.wait_enrolled("client", true)?;
        space.get_known("client", "http://server/")?;
        let taints = cluster.kubectl(&["get", "node", node, "-o", "jsonpath={.spec.taints}"])?;
        ensure!(!taints.contains(TAINT), "the node still has {taints}");
        Ok(())
    })();
    if tested.is_err() {
        // Others want the node.
        cluster.kubectl(&["taint", "node", node, &format!("{TAINT}-")])?;
    }
    cluster.install_agent(&[])?;
    tested
}
