//! What people change while pods run.

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::Pod;
use serde_json::{Value, json};
use sidestep_e2e::Node;
use sidestep_e2e::node::PLUGIN;

use super::pods::{answered, intercepted, mesh_pod, server, soon_answered};
use super::{Row, World};

pub const SCENARIOS: &[Row] = &[
    ("live-annotation", "a changed annotation takes effect in a running pod", live_annotation),
    ("break-glass", "a pod's annotation and a namespace's label take it out", break_glass),
    ("uninstall", "uninstalling leaves a clean node where no mesh pod runs", uninstall),
    (
        "daemonset-gone",
        "pods that run stay intercepted when the agent's DaemonSet is deleted, CNI's configuration is as it was",
        daemonset_gone,
    ),
];

const OWN_KEY: &str = "sidestep.io/intercept";

fn live_annotation(world: &World) -> Result<()> {
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
    node.patch::<Pod>("cart", &patch)
}

fn break_glass(world: &World) -> Result<()> {
    let (node, _agent) = (&world.node, world.agent()?);
    let target = server(node, "server")?;
    mesh_pod(node, "cart")?;
    soon_answered(node, "cart", target, "outbound")?;
    annotate(node, OWN_KEY, &json!("disabled"))?;
    soon_answered(node, "cart", target, "app")?;
    annotate(node, OWN_KEY, &Value::Null)?;
    soon_answered(node, "cart", target, "outbound")?;

    let label =
        |value: Value| node.patch_namespace(&json!({"metadata": {"labels": {OWN_KEY: value}}}));
    label(json!("disabled"))?;
    soon_answered(node, "cart", target, "app")?;
    label(Value::Null)?;
    soon_answered(node, "cart", target, "outbound")
}

/// Whether the agent's plugin is in CNI's configuration.
pub fn is_chained(conflist: &Value) -> bool {
    let plugins = conflist["plugins"].as_array();
    plugins.is_some_and(|plugins| plugins.iter().any(|plugin| plugin["type"] == "sidestep-cni"))
}

fn uninstall(world: &World) -> Result<()> {
    let node = &world.node;
    let (_, before) = node.conflist()?;
    let mut agent = world.agent()?;
    let target = server(node, "server")?;
    let own = mesh_pod(node, "cart")?;
    soon_answered(node, "cart", target, "outbound")?;
    intercepted(node, "cart", own, target)?;
    ensure!(is_chained(&node.conflist()?.1), "the plugin is not in the configuration");
    node.delete_pod("cart")?;
    agent.wait_enrolled("cart", false)?;
    agent.uninstall()?;
    clean(node, &before)?;
    agent.ensure_no_pins()?;
    plain(node)
}

fn daemonset_gone(world: &World) -> Result<()> {
    let node = &world.node;
    let (_, before) = node.conflist()?;
    let mut agent = world.agent()?;
    let target = server(node, "server")?;
    let own = mesh_pod(node, "cart")?;
    soon_answered(node, "cart", target, "outbound")?;

    // A new version: the data plane stays in force meanwhile.
    agent.terminate()?;
    answered(node, "cart", target, "outbound")?;
    ensure!(is_chained(&node.conflist()?.1), "an update took the plugin out");
    agent.launch()?;
    agent.wait_ready()?;

    agent.delete_daemonset()?;
    clean(node, &before)?;
    intercepted(node, "cart", own, target)?;
    plain(node)?;
    node.delete_pod("cart")
}

/// CNI's files are as they were.
fn clean(node: &Node, before: &Value) -> Result<()> {
    let (file, after) = node.conflist()?;
    ensure!(after == *before, "{file} is now {after:#}");
    ensure!(!node.shell().exists(PLUGIN)?, "{PLUGIN} is left");
    Ok(())
}

/// New pods work without the agent, and are not intercepted.
fn plain(node: &Node) -> Result<()> {
    let target = server(node, "server-2")?;
    let own = mesh_pod(node, "cart-2")?;
    answered(node, "cart-2", target, "app")?;
    answered(node, "server-2", own, "app").map(drop)
}
