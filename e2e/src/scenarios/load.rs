//! What must not be noticed: each request of a load under the mesh is accounted for.

use anyhow::{Context, Result, ensure};
use serde_json::json;
use sidestep_e2e::mesh::{Cluster, Load, Space};

use super::{MeshRow, Of};

pub const SCENARIOS: &[MeshRow] = &[
    (
        "load-upgrade",
        "upgrade, rollback and kill -9 of the agent: no request fails or is in plain text",
        Of::All,
        upgrade,
    ),
    (
        "load-control-plane",
        "the mesh's control plane goes, the agents are replaced: no request fails",
        Of::All,
        control_plane,
    ),
    (
        "load-proxy-killed",
        "the sidecar's Envoy is killed: requests fail meanwhile, and none is in plain text",
        Of::Istio,
        proxy_killed,
    ),
    (
        "load-oom",
        "an agent that is killed for its memory: no request fails, and it comes back",
        Of::All,
        out_of_memory,
    ),
    (
        "load-reinstall",
        "uninstalled and installed again: running pods stay in the mesh all the time",
        Of::All,
        reinstall,
    ),
];

/// How many requests say that something works.
pub const SOME: usize = 100;

/// The pods `server` and `client`, on a node each, and the client asks without pause.
pub fn load<'s>(space: &'s Space<'_>) -> Result<Load<'s>> {
    let cluster = space.cluster();
    space.server("server", cluster.worker(0)?, json!({}))?;
    space.wait_ready("server")?;
    let load = space.load("client", cluster.worker(1)?, "server", json!({}))?;
    load.more(SOME)?;
    Ok(load)
}

fn report(load: &Load<'_>) -> Result<()> {
    println!("       {} requests, none failed", load.ensure_undisturbed()?);
    Ok(())
}

/// Kills the agent's process on a node, and waits until it is back.
fn kill_agent(cluster: &Cluster, node: &str) -> Result<()> {
    let shell = cluster.shell(node);
    let before = shell.run(&["pgrep", "-o", "-x", "sidestep"])?;
    shell.run(&["kill", "-9", before.trim()])?;
    cluster.soon("the agent to be back", || {
        let now = shell.run(&["pgrep", "-o", "-x", "sidestep"])?;
        ensure!(now != before, "it is still the same");
        Ok(())
    })?;
    cluster.agents_ready()
}

fn upgrade(cluster: &Cluster) -> Result<()> {
    let space = cluster.space("load-upgrade")?;
    let load = load(&space)?;
    cluster.install_agent(&["--set", "log.level=debug"])?;
    load.more(SOME)?;
    let wait = ["--wait", "--timeout", "180s"].map(str::to_owned);
    cluster.helm("sidestep", &["rollback", "sidestep"], &[&wait])?;
    cluster.agents_ready()?;
    load.more(SOME)?;
    for node in cluster.workers() {
        kill_agent(cluster, node)?;
        load.more(SOME)?;
    }
    report(&load)?;
    for pod in ["server", "client"] {
        space.wait_enrolled(pod, true)?;
    }
    Ok(())
}

fn control_plane(cluster: &Cluster) -> Result<()> {
    let space = cluster.space("load-control-plane")?;
    let load = load(&space)?;
    let (namespace, deployment) = cluster.mesh.control_plane();
    let scale = |replicas: u32| {
        let replicas = format!("--replicas={replicas}");
        cluster.kubectl(&["-n", namespace, "scale", "deployment", deployment, &replicas])
    };
    let format = "jsonpath={.status.readyReplicas}";
    let ready =
        || cluster.kubectl(&["-n", namespace, "get", "deployment", deployment, "-o", format]);
    scale(0)?;
    let tested = (|| {
        cluster.soon("the control plane to be gone", || {
            let ready = ready()?;
            ensure!(ready.trim().is_empty(), "{ready} are ready");
            Ok(())
        })?;
        load.more(SOME)?;
        for node in cluster.workers() {
            kill_agent(cluster, node)?;
        }
        load.more(SOME)
    })();
    // Also when that failed: others want it.
    scale(1)?;
    cluster.rolled_out(namespace, deployment)?;
    tested?;
    load.more(SOME)?;
    report(&load)
}

fn proxy_killed(cluster: &Cluster) -> Result<()> {
    let space = cluster.space("load-proxy-killed")?;
    let load = load(&space)?;
    for pod in ["client", "server"] {
        let object = space.get_pod(pod)?;
        let uid = object["metadata"]["uid"].as_str().context("a pod without uid")?;
        let shell = cluster.shell(&space.node_of(pod)?);
        let envoy = shell.process_named(uid, "envoy")?.to_string();
        shell.run(&["kill", "-9", &envoy])?;
        cluster.soon("the sidecar to be started again", || {
            let now = shell.process_named(uid, "envoy")?.to_string();
            ensure!(now != envoy, "it is still the same");
            Ok(())
        })?;
        space.wait_ready(pod)?;
        load.more(SOME).with_context(|| format!("after {pod}'s Envoy was killed"))?;
    }
    let account = load.account()?;
    println!("       {} requests, {} failed", account.answered, account.failed.len());
    ensure!(account.plain.is_empty(), "in plain text: {:#?}", account.plain);
    ensure!(account.lost.is_empty(), "unaccounted for: {:?}", account.lost);
    Ok(())
}

fn out_of_memory(cluster: &Cluster) -> Result<()> {
    let space = cluster.space("load-oom")?;
    let load = load(&space)?;
    let limit = |memory: &str| {
        // Not awaited: it never becomes ready.
        let args = ["charts/sidestep", "--reuse-values", "--set", memory].map(str::to_owned);
        cluster.helm("sidestep", &["upgrade", "sidestep"], &[&args])
    };
    limit("resources.requests.memory=4Mi,resources.limits.memory=4Mi")?;
    let format = "jsonpath={range .items[*]}{.status.containerStatuses[*].lastState.terminated.reason}\
                  {.status.containerStatuses[*].state.terminated.reason}\
                  {.status.containerStatuses[*].lastState.terminated.message}\
                  {.status.containerStatuses[*].state.waiting.message} {end}";
    let killed = cluster.soon("an agent to be killed for its memory", || {
        let args = ["-n", "sidestep", "get", "pods", "-o", format];
        let reasons = cluster.kubectl(&args)?;
        ensure!(reasons.contains("OOM") || reasons.contains("memory"), "{reasons:?}");
        Ok(())
    });
    let worked = load.more(SOME);
    // Also when that failed: others want an agent.
    cluster.install_agent(&[])?;
    killed?;
    worked?;
    load.more(SOME)?;
    report(&load)?;
    for pod in ["server", "client"] {
        space.wait_enrolled(pod, true)?;
    }
    Ok(())
}

fn reinstall(cluster: &Cluster) -> Result<()> {
    let space = cluster.space("load-reinstall")?;
    let outside = cluster.plain_space("load-reinstall-outside")?;
    let load = load(&space)?;
    cluster.apply(&[cluster.mesh.strict(space.name(), "server")])?;
    outside.client("outsider", cluster.worker(0)?, json!({}))?;
    outside.wait_ready("outsider")?;
    let url = format!("http://server.{}/", space.name());
    let refused = |when: &str| {
        let good = |answered: &sidestep_e2e::mesh::Answered| answered.is_refused();
        outside.get_until("outsider", &url, when, good).map(drop)
    };
    refused("plain text to be refused")?;
    cluster.uninstall_agent()?;
    let meanwhile = load.more(SOME).and_then(|()| {
        let answered = outside.get("outsider", &url)?;
        ensure!(answered.is_refused(), "plain text, without the agent: {answered:?}");
        Ok(())
    });
    cluster.install_agent(&[])?;
    meanwhile?;
    load.more(SOME)?;
    report(&load)?;
    for pod in ["server", "client"] {
        space.wait_enrolled(pod, true)?;
    }
    refused("plain text still to be refused")?;
    space.client("late", cluster.worker(1)?, json!({}))?;
    space.wait_ready("late")?;
    space.ensure_first_try("late")?;
    space.get_known("late", "http://server/").map(drop)
}
