//! Pods that come: each is taken over before its first process, or as soon as it is seen.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use sidestep_e2e::Node;
use sidestep_lab::APP;

use super::pods::{
    PORT, answered, app, container, injected, intercepted, istio, mesh_pod, native, server,
    soon_answered,
};
use super::{Row, World};

pub const SCENARIOS: &[Row] = &[
    ("fresh-pod", "a pod that comes through CNI is taken over before its first process", fresh_pod),
    ("older-pods", "pods that ran before the agent are taken over when it starts", older_pods),
    ("native-sidecar", "init containers after a native sidecar go through it", native_sidecar),
    ("short-job", "a Job that lives one second is in the mesh for all of it", short_job),
    ("ip-reuse", "a pod that gets the name and address of one that left is its own", ip_reuse),
    (
        "host-network",
        "a pod in the host's network and the host itself stay untouched",
        host_network,
    ),
    ("two-meshes", "pods of two meshes share a node", two_meshes),
];

fn fresh_pod(world: &World) -> Result<()> {
    let (node, mut agent) = (&world.node, world.agent()?);
    let target = server(node, "server")?;
    // No sidecar runs yet: so nobody answers, the server least of all.
    let mut spec = injected(app(&["serve", "0.0.0.0:8080"]));
    let address = target.to_string();
    spec["initContainers"] = json!([container("validation", &["avoid", &address, "app"])]);
    node.create_pod("cart", istio(), spec)?;
    let own = SocketAddr::new(
        node.wait_running("cart").with_context(|| node.log("cart", "validation"))?,
        PORT,
    );
    let said = node.log("cart", "validation");
    ensure!(said.contains("refused"), "the validation said {said:?}");
    agent.wait_enrolled("cart", true)?;
    // The sidecar may still be about to listen.
    soon_answered(node, "cart", target, "outbound")?;
    intercepted(node, "cart", own, target)?;
    answered(node, "server", own, "inbound")?;

    let netns = agent.netns("cart")?;
    ensure!(node.shell().exists(&netns)?, "{netns} is not there");
    node.delete_pod("cart")?;
    agent.wait_enrolled("cart", false)?;
    ensure!(!node.shell().exists(&netns)?, "the agent keeps {netns}");
    Ok(())
}

fn older_pods(world: &World) -> Result<()> {
    let node = &world.node;
    let target = server(node, "server")?;
    let own = mesh_pod(node, "cart")?;
    answered(node, "cart", target, "app")?;
    let mut agent = world.agent()?;
    agent.wait_enrolled("cart", true)?;
    soon_answered(node, "cart", target, "outbound")?;
    intercepted(node, "cart", own, target)?;
    answered(node, "server", target, "app").context("a pod outside the mesh")?;
    Ok(())
}

fn native_sidecar(world: &World) -> Result<()> {
    let (node, _agent) = (&world.node, world.agent()?);
    let target = server(node, "server")?.to_string();
    // The sidecar has just been started, perhaps it does not listen yet: so for a second.
    let inits = [container("first", &["loop", &target, "--seconds", "1"])];
    node.create_pod("cart", istio(), native(&inits, app(&["once", &target])))?;
    let pod = node.wait_phase("cart", "Succeeded");
    for name in ["first", "app"] {
        all_by(node, "cart", name, "outbound")?;
    }
    pod.map(drop)
}

fn short_job(world: &World) -> Result<()> {
    let (node, mut agent) = (&world.node, world.agent()?);
    let target = server(node, "server")?.to_string();
    for number in 0..3 {
        let name = format!("job-{number}");
        let spec = native(&[], app(&["loop", &target, "--seconds", "1"]));
        node.create_pod(&name, istio(), spec)?;
        let done = node.wait_phase(&name, "Succeeded");
        all_by(node, &name, "app", "outbound")?;
        done?;
        node.delete_pod(&name)?;
        agent.wait_enrolled(&name, false)?;
    }
    Ok(())
}

/// Each connection of a container that came through was answered by `by`, and there were some.
/// Those before the sidecar listens may be refused.
fn all_by(node: &Node, pod: &str, container: &str, by: &str) -> Result<()> {
    let log = node.log(pod, container);
    let wanted = format!("ok by={by} ");
    let wrong = log.lines().find(|line| !line.starts_with(&wanted) && !line.contains("refused"));
    if let Some(wrong) = wrong {
        bail!("{pod}'s {container} said {wrong:?}");
    }
    ensure!(log.contains(&wanted), "{pod}'s {container} said only {log:?}");
    Ok(())
}

fn ip_reuse(world: &World) -> Result<()> {
    let (node, mut agent) = (&world.node, world.agent()?);
    let target = server(node, "server")?;
    let own = mesh_pod(node, "db-0")?;
    soon_answered(node, "db-0", target, "outbound")?;
    intercepted(node, "db-0", own, target)?;
    node.delete_pod("db-0")?;

    // The same name and address, outside the mesh.
    give_next(node, own.ip())?;
    let plain = server(node, "db-0")?;
    ensure!(plain == own, "it got {plain}, not {own}");
    answered(node, "db-0", target, "app")?;
    answered(node, "server", own, "app")?;
    agent.wait_enrolled("db-0", false)?;
    node.delete_pod("db-0")?;

    // And in it again.
    give_next(node, own.ip())?;
    let again = mesh_pod(node, "db-0")?;
    ensure!(again == own, "it got {again}, not {own}");
    soon_answered(node, "db-0", target, "outbound")?;
    intercepted(node, "db-0", own, target)
}

/// Makes the next pod get this address.
fn give_next(node: &Node, ip: IpAddr) -> Result<()> {
    let before: IpAddr = match ip {
        IpAddr::V4(ip) => Ipv4Addr::from(u32::from(ip) - 1).into(),
        IpAddr::V6(ip) => Ipv6Addr::from(u128::from(ip) - 1).into(),
    };
    let shell = node.shell();
    shell.write(&node.last_ip_file()?, &before.to_string())?;
    // So soon, the neighbours would still send to the interface that had the address.
    let flush = ["ip", "neighbour", "flush", "all"];
    shell.run(&flush)?;
    let pid = node.process("server")?.to_string();
    shell.run(&[&["nsenter", "-t", &pid, "--net", "--"][..], &flush].concat()).map(drop)
}

fn host_network(world: &World) -> Result<()> {
    let (node, mut agent) = (&world.node, world.agent()?);
    let target = server(node, "server")?;
    let mut spec = injected(app(&["serve", "0.0.0.0:8083"]));
    spec["hostNetwork"] = json!(true);
    node.create_pod("host", istio(), spec)?;
    let own = SocketAddr::new(node.wait_running("host")?, 8083);
    node.wait_answer("host", own)?;
    // Another pod is through, so the agent has seen this one.
    mesh_pod(node, "cart")?;
    agent.wait_enrolled("cart", true)?;
    agent.wait_enrolled("host", false)?;
    for (pod, address) in [("server", target), ("host", own)] {
        let seen = node.ask_from_node(pod, address)?;
        ensure!(seen.by.as_deref() == Some("app"), "the node asking {address}: {seen}");
    }
    let seen = node.ask("server", APP, own)?;
    ensure!(seen.by.as_deref() == Some("app"), "a pod asking the host: {seen}");
    Ok(())
}

fn two_meshes(world: &World) -> Result<()> {
    let (node, mut agent) = (&world.node, world.agent()?);
    let target = server(node, "server")?;
    let own = mesh_pod(node, "cart")?;
    let linkerd = json!({
        "name": "linkerd-proxy",
        "args": ["proxy", "linkerd"],
        "securityContext": {"runAsUser": 2102, "runAsGroup": 2102},
    });
    let spec = json!({"containers": [app(&["serve", "0.0.0.0:8080"]), linkerd]});
    node.create_pod("web", Value::Null, spec)?;
    let web = SocketAddr::new(node.wait_running("web")?, PORT);
    for name in ["cart", "web"] {
        agent.wait_enrolled(name, true)?;
        soon_answered(node, name, target, "outbound")?;
    }
    intercepted(node, "cart", own, target)?;
    // Each mesh's own users are exempt, the other's are not.
    let seen = node.ask("web", 2102, target)?;
    ensure!(seen.by.as_deref() == Some("app"), "Linkerd's own call: {seen}");
    let seen = node.ask("web", 1337, target)?;
    ensure!(seen.by.as_deref() == Some("outbound"), "uid 1337 in Linkerd's pod: {seen}");
    answered(node, "server", web, "inbound").map(drop)
}
