//! Without the agent: does the lab's node itself work?

use std::fs::{self, Permissions};
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use sidestep_e2e::apiserver::Gone;
use sidestep_lab::wait_until;

use super::{Row, World};

/// With what they take of the lab.
pub const SCENARIOS: &[(Row, &str)] = &[
    (("smoke", "pods come up, reach each other, and leave nothing behind", smoke), KUBELET),
    (
        ("cni-refuses", "a CNI error becomes an event, and the pod is tried again", cni_refuses),
        KUBELET,
    ),
    (
        (
            "kubelet-alone",
            "the kubelet gets over an API server that goes and forgets",
            kubelet_alone,
        ),
        KUBELET,
    ),
    (("pod-life", "init containers, sidecars, ends, and the host's network", pod_life), KUBELET),
];

const KUBELET: &str = "it tests the lab's own kubelet";

fn smoke(world: &World) -> Result<()> {
    let node = &world.node;
    let serve = json!({"containers": [{"name": "app", "args": ["serve", "0.0.0.0:80"]}]});
    node.create_pod("server", Value::Null, serve)?;
    let ip = node.wait_running("server")?;
    let target = SocketAddr::new(ip, 80);
    node.wait_answer("server", target)?;
    let once = json!({"containers": [{"name": "app", "args": ["once", target.to_string()]}]});
    node.create_pod("client", Value::Null, once)?;
    node.wait_phase("client", "Succeeded")
        .with_context(|| format!("it said: {}", node.log("client", "app")))?;
    let said = node.log("client", "app");
    ensure!(said.starts_with("ok by=app peer=10.88."), "the client said {said:?}");
    let asked = node.ask("server", 1000, target)?;
    ensure!(asked.peer.ip() == ip, "its own peer is {}", asked.peer);

    // The agent attaches to the lab's cgroup: all of the pod must be below.
    let lab = node.own()?;
    let pid = node.process("server")?;
    let cgroup = fs::read_to_string(format!("/proc/{pid}/cgroup")).context("its cgroup")?;
    let own = lab.lab().cgroup().file_name().context("the lab's cgroup has no name")?;
    let below = format!("0::/{}/", own.to_string_lossy());
    ensure!(cgroup.lines().any(|line| line.starts_with(&below)), "its cgroups: {cgroup}");

    let pod = node.pod("server")?;
    let netns = lab.netns(pod["metadata"]["uid"].as_str().unwrap_or_default())?;
    ensure!(netns.exists(), "{} is not there", netns.display());
    node.delete_pod("server")?;
    node.delete_pod("client")?;
    // The object of a pod that has ended goes at once.
    wait_until("all sandboxes to be gone", Duration::from_secs(10), || {
        let left = lab.containerd().with_cri(async |mut cri| cri.sandboxes(None).await);
        left.is_ok_and(|left| left.is_empty())
    })?;
    ensure!(!netns.exists(), "{} is left", netns.display());
    let ipam = node.last_ip_file()?;
    let addresses = fs::read_dir(Path::new(&ipam).parent().context("it has a directory")?)?
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().starts_with("10."))
        .count();
    ensure!(addresses == 0, "{addresses} addresses are still taken");
    Ok(())
}

fn cni_refuses(world: &World) -> Result<()> {
    let node = &world.node;
    let plugin = node.own()?.containerd().cni_bin_dir().join("moody");
    let script = "#!/bin/sh\n\
                  [ \"$CNI_COMMAND\" = DEL ] && exit\n\
                  echo '{\"cniVersion\": \"1.0.0\", \"code\": 100, \"msg\": \"not today\"}'\n\
                  exit 1\n";
    fs::write(&plugin, script).context("writing a plugin")?;
    fs::set_permissions(&plugin, Permissions::from_mode(0o755)).context("making it executable")?;
    let (file, before) = node.conflist()?;
    let mut moody = before.clone();
    let plugins = moody["plugins"].as_array_mut().context("it has plugins")?;
    plugins.push(json!({"type": "moody"}));
    let replace = |value: &Value| node.shell().replace(&file, &value.to_string());
    replace(&moody)?;
    // containerd takes it in on its own time: so try with a pod each.
    let mut number = 0;
    wait_until("the pod to be refused", Duration::from_secs(20), || {
        number += 1;
        let name = format!("pod-{number}");
        let spec = json!({"containers": [{"name": "app", "args": ["pause"]}]});
        let made = node.create_pod(&name, Value::Null, spec);
        let running = || node.pod(&name).is_ok_and(|pod| pod["status"]["phase"] == "Running");
        let told = || running() || !node.events(&name).is_empty();
        made.is_ok()
            && wait_until("its fate", Duration::from_secs(10), told).is_ok()
            && node.events(&name).iter().any(|event| event.contains("not today"))
    })?;
    let name = format!("pod-{number}");
    ensure!(node.pod(&name)?["status"]["phase"] == "Pending", "it runs");
    replace(&before)?;
    node.wait_running(&name)?;
    node.delete_pod(&name)
}

fn kubelet_alone(world: &World) -> Result<()> {
    let node = &world.node;
    let lab = node.own()?;
    let server = lab.server();
    for (name, gone) in [("one", Gone::Event), ("two", Gone::Status)] {
        server.stop()?;
        let spec = json!({"containers": [{"name": "app", "args": ["pause"]}]});
        server.put(json!(node.manifest(name, Value::Null, spec)?))?;
        server.compact(gone);
        server.resume()?;
        node.wait_running(name).with_context(|| format!("told 410 by {gone:?}"))?;
    }
    server.stop()?;
    server.delete("pods", "shop", "one")?;
    server.compact(Gone::Event);
    server.resume()?;
    wait_until("the pod's sandbox to be gone", Duration::from_secs(10), || {
        let left = lab.containerd().with_cri(async |mut cri| cri.sandboxes(None).await);
        left.is_ok_and(|left| left.len() == 1)
    })
}

fn pod_life(world: &World) -> Result<()> {
    let node = &world.node;
    // The sidecar serves before the next init container asks it, and as long as the app runs.
    let spec = json!({
        "initContainers": [
            {
                "name": "sidecar",
                "args": ["serve", "127.0.0.1:81", "--name", "sidecar"],
                "restartPolicy": "Always",
            },
            {"name": "first", "args": ["loop", "127.0.0.1:81", "--seconds", "1"]},
        ],
        "containers": [{"name": "app", "args": ["once", "127.0.0.1:81"]}],
    });
    node.create_pod("job", Value::Null, spec)?;
    let pod = node.wait_phase("job", "Succeeded").with_context(|| node.log("job", "first"))?;
    let states = &pod["status"]["initContainerStatuses"];
    ensure!(states[1]["state"]["terminated"]["exitCode"] == 0, "init containers: {states:#}");
    ensure!(node.log("job", "app").starts_with("ok by=sidecar"), "{}", node.log("job", "app"));

    let fails = json!({
        "initContainers": [{"name": "first", "args": ["once", "127.0.0.1:82"]}],
        "containers": [{"name": "app", "args": ["pause"]}],
    });
    node.create_pod("fails", Value::Null, fails)?;
    let pod = node.wait_phase("fails", "Failed")?;
    ensure!(pod["status"]["containerStatuses"] == json!([]), "its app was started: {pod:#}");

    let host = json!({
        "hostNetwork": true,
        "containers": [{"name": "app", "args": ["serve", "10.77.0.1:83"]}],
    });
    node.create_pod("host", Value::Null, host)?;
    let ip = node.wait_running("host")?;
    ensure!(ip.to_string() == "10.77.0.1", "its address is {ip}");
    let seen = node.wait_answer("host", SocketAddr::new(ip, 83))?;
    ensure!(seen.by.as_deref() == Some("app"), "{seen} answered");
    for name in ["job", "fails", "host"] {
        node.delete_pod(name)?;
    }
    Ok(())
}
