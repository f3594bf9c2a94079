//! The pods of the scenarios, and asking from within them.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use sidestep_e2e::Node;
use sidestep_lab::{APP, PROXY, Seen, wait_for};

/// Where the apps serve: their user may have no lower port.
pub const PORT: u16 = 8080;
/// How long a change may take to be in force.
pub const SOON: Duration = Duration::from_secs(10);

/// Starts a pod outside any mesh that serves on [`PORT`], waits until it does, and gives its
/// address.
pub fn server(node: &Node, name: &str) -> Result<SocketAddr> {
    node.create_pod(name, Value::Null, json!({"containers": [app(&["serve", "0.0.0.0:8080"])]}))?;
    let addr = SocketAddr::new(node.wait_running(name)?, PORT);
    node.wait_answer(name, addr)?;
    Ok(addr)
}

/// An app's container, with these arguments of `e2e-pod`.
pub fn app(args: &[&str]) -> Value {
    container("app", args)
}

/// A container of the app's user.
pub fn container(name: &str, args: &[&str]) -> Value {
    json!({
        "name": name,
        "args": args,
        "securityContext": {"runAsUser": APP, "runAsGroup": APP},
    })
}

/// What Istio's injection adds to a pod's metadata.
pub fn istio() -> Value {
    json!({"annotations": {"sidecar.istio.io/status": "{}"}})
}

/// Istio's sidecar.
pub fn istio_proxy() -> Value {
    json!({
        "name": "istio-proxy",
        "args": ["proxy", "sidecar"],
        "securityContext": {"runAsUser": PROXY, "runAsGroup": PROXY},
    })
}

/// A mesh pod as Istio injects it: the app, and the sidecar beside it.
pub fn injected(app: Value) -> Value {
    json!({"containers": [app, istio_proxy()]})
}

/// A mesh pod with a native sidecar, and init containers after it.
pub fn native(inits: &[Value], app: Value) -> Value {
    let mut proxy = istio_proxy();
    proxy["restartPolicy"] = json!("Always");
    let all: Vec<Value> = [proxy].into_iter().chain(inits.iter().cloned()).collect();
    json!({"initContainers": all, "containers": [app]})
}

/// Starts an injected pod whose app serves on [`PORT`], waits until it or its sidecar does, and
/// gives that address.
pub fn mesh_pod(node: &Node, name: &str) -> Result<SocketAddr> {
    node.create_pod(name, istio(), injected(app(&["serve", "0.0.0.0:8080"])))?;
    let addr = SocketAddr::new(node.wait_running(name)?, PORT);
    node.wait_answer(name, addr)?;
    Ok(addr)
}

/// Asks from the pod as its app; fails unless `by` answers at once. A proxy must also know the
/// original destination.
pub fn answered(node: &Node, pod: &str, target: SocketAddr, by: &str) -> Result<Seen> {
    let seen = node.ask(pod, APP, target)?;
    check(&seen, target, by).with_context(|| format!("{pod} asking {target}"))?;
    Ok(seen)
}

/// The same, but `by` may take some seconds to begin.
pub fn soon_answered(node: &Node, pod: &str, target: SocketAddr, by: &str) -> Result<()> {
    answered_within(node, pod, target, by, SOON)
}

/// The same, but `by` may take that long to begin.
pub fn answered_within(
    node: &Node,
    pod: &str,
    target: SocketAddr,
    by: &str,
    patience: Duration,
) -> Result<()> {
    let mut last = None;
    wait_for(&format!("{by} to answer {pod}"), patience, || {
        let result = answered(node, pod, target, by);
        last = result.as_ref().err().map(|err| format!("{err:#}"));
        result.ok()
    })
    .map(drop)
    .with_context(|| last.unwrap_or_default())
}

fn check(seen: &Seen, target: SocketAddr, by: &str) -> Result<()> {
    ensure!(seen.by.as_deref() == Some(by), "not {by}: {seen}");
    let proxy = ["inbound", "outbound"].contains(&by);
    ensure!(!proxy || seen.original() == Some(target), "not the original destination: {seen}");
    Ok(())
}

/// The mesh's side of a pod: what its app calls goes to the sidecar, what the sidecar itself
/// calls goes straight out, and who calls it reaches the sidecar.
pub fn intercepted(node: &Node, pod: &str, own: SocketAddr, server: SocketAddr) -> Result<()> {
    answered(node, pod, server, "outbound")?;
    let direct = node.ask(pod, PROXY, server)?;
    check(&direct, server, "app").context("the sidecar's own call")?;
    let inbound = node.ask_from_node(pod, own)?;
    check(&inbound, own, "inbound").with_context(|| format!("the node asking {pod}"))
}
