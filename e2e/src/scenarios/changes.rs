//! What people change while pods run.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use sidestep_e2e::lab::Node;

use super::pods::{answered, intercepted, mesh_pod, server, soon_answered};
use super::{Row, World};

pub const SCENARIOS: &[Row] = &[
    ("live-annotation", "a changed annotation takes effect in a running pod", live_annotation),
    ("break-glass", "a pod's annotation and a namespace's label take it out", break_glass),
    ("uninstall", "unload leaves a clean node and CNI's configuration as it was", uninstall),
    ("daemonset-gone", "SIGTERM after the DaemonSet is gone leaves a clean node", daemonset_gone),
];

const OWN_KEY: &str = "sidestep.io/intercept";

fn live_annotation(world: &mut World) -> Result<()> {
    let (node, _agent) = (&world.node, world.agent()?);
    let target = server(node, "server")?;
    mesh_pod(node, "cart")?;
    soon_answered(node, "cart", target, "outbound")?;
    for (ports, by) in [(json!("8080"), "app"), (json!("8081"), "outbound"), (json!("8080"), "app")]
    {
        annotate(node, "traffic.sidecar.istio.io/excludeOutboundPorts", &ports)?;
        soon_answered(node, "cart", target, by).with_context(|| format!("excluding {ports}"))?;
    }
    Ok(())
}

fn annotate(node: &Node, key: &str, value: &Value) -> Result<()> {
    let patch = json!({"metadata": {"annotations": {key: value}}});
    node.server().patch("pods", "shop", "cart", &patch).map(drop)
}

fn break_glass(world: &mut World) -> Result<()> {
    let (node, _agent) = (&world.node, world.agent()?);
    let target = server(node, "server")?;
    mesh_pod(node, "cart")?;
    soon_answered(node, "cart", target, "outbound")?;
    annotate(node, OWN_KEY, &json!("disabled"))?;
    soon_answered(node, "cart", target, "app")?;
    annotate(node, OWN_KEY, &Value::Null)?;
    soon_answered(node, "cart", target, "outbound")?;

    let label = |value: Value| {
        let patch = json!({"metadata": {"labels": {OWN_KEY: value}}});
        node.server().patch("namespaces", "", "shop", &patch).map(drop)
    };
    label(json!("disabled"))?;
    soon_answered(node, "cart", target, "app")?;
    label(Value::Null)?;
    soon_answered(node, "cart", target, "outbound")
}

/// The first configuration of CNI, and what is in it.
pub fn conflist(node: &Node) -> Result<(PathBuf, Value)> {
    let file = node.containerd().cni_conf_dir().join("10-e2e.conflist");
    let text = fs::read_to_string(&file).with_context(|| format!("reading {}", file.display()))?;
    let value = serde_json::from_str(&text).with_context(|| format!("{}", file.display()))?;
    Ok((file, value))
}

/// Whether the agent's plugin is in it.
pub fn is_chained(conflist: &Value) -> bool {
    let plugins = conflist["plugins"].as_array();
    plugins.is_some_and(|plugins| plugins.iter().any(|plugin| plugin["type"] == "sidestep-cni"))
}

fn uninstall(world: &mut World) -> Result<()> {
    let node = &world.node;
    let (_, before) = conflist(node)?;
    let mut agent = world.agent()?;
    let target = server(node, "server")?;
    let own = mesh_pod(node, "cart")?;
    soon_answered(node, "cart", target, "outbound")?;
    intercepted(node, "cart", own, target)?;
    ensure!(is_chained(&conflist(node)?.1), "the plugin is not in the configuration");
    agent.unload()?;
    clean(node, &before)?;
    ensure!(!agent.bpffs().exists(), "pins are left");
    plain(node)
}

fn daemonset_gone(world: &mut World) -> Result<()> {
    let node = &world.node;
    let (_, before) = conflist(node)?;
    node.server().put(json!({
        "apiVersion": "apps/v1",
        "kind": "DaemonSet",
        "metadata": {"name": "sidestep", "namespace": "kube-system"},
    }))?;
    let mut agent = world.agent_with(&["--daemonset", "kube-system/sidestep"])?;
    let target = server(node, "server")?;
    mesh_pod(node, "cart")?;
    soon_answered(node, "cart", target, "outbound")?;

    // A new version: the data plane stays in force meanwhile.
    agent.terminate()?;
    answered(node, "cart", target, "outbound")?;
    ensure!(is_chained(&conflist(node)?.1), "an update took the plugin out");
    agent.launch(node)?;
    agent.wait_ready(node)?;

    node.server().delete("daemonsets.apps", "kube-system", "sidestep")?;
    agent.terminate()?;
    clean(node, &before)?;
    ensure!(!agent.bpffs().exists(), "pins are left");
    plain(node)
}

/// CNI's files are as they were.
fn clean(node: &Node, before: &Value) -> Result<()> {
    let (file, after) = conflist(node)?;
    ensure!(after == *before, "{} is now {after:#}", file.display());
    let plugin = node.containerd().cni_bin_dir().join("sidestep-cni");
    ensure!(!plugin.exists(), "{} is left", plugin.display());
    Ok(())
}

/// Pods work without the agent: those that run, and new ones.
fn plain(node: &Node) -> Result<()> {
    let target = server(node, "server-2")?;
    answered(node, "cart", target, "app")?;
    let own = mesh_pod(node, "cart-2")?;
    answered(node, "cart-2", target, "app")?;
    answered(node, "server-2", own, "app")?;
    node.delete_pod("cart")
}
