//! What breaks: the API server, the agent, CNI's configuration.

use std::fs;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::json;
use sidestep_e2e::apiserver::Gone;
use sidestep_e2e::lab::{Agent, IMAGE, NODE, Node};
use sidestep_lab::{wait_for, wait_until};

use super::changes::{conflist, is_chained};
use super::pods::{
    PORT, SOON, answered, answered_within, app, container, injected, intercepted, istio,
    istio_proxy, mesh_pod, server, soon_answered,
};
use super::{Row, World};

pub const SCENARIOS: &[Row] = &[
    ("api-away", "the API server goes, comes back and has forgotten old versions", api_away),
    (
        "api-gone-status",
        "410 as the HTTP status of a new watch makes it list again",
        api_gone_status,
    ),
    ("api-refuses", "without the right to list pods nothing that works breaks", api_refuses),
    ("agent-killed", "kill -9 and a new start under load: no connection fails or escapes", killed),
    (
        "agent-upgraded",
        "builds with other maps take over under load, forth and back: no connection notices",
        upgraded,
    ),
    (
        "conflist-overwritten",
        "CNI's configuration is mended when somebody overwrites it",
        overwritten,
    ),
    ("agent-away", "no pod starts unprotected while the agent is away", agent_away),
];

fn api_away(world: &mut World) -> Result<()> {
    let (node, mut agent) = (&world.node, world.agent()?);
    let target = server(node, "server")?;
    let own = mesh_pod(node, "cart")?;
    soon_answered(node, "cart", target, "outbound")?;
    node.server().stop()?;
    look_on(node, &mut agent, own, target, world.away).context("without an API server")?;
    exclude(node, "8080")?;
    node.server().compact(Gone::Event);
    node.server().resume()?;
    let back = Instant::now();
    // The pauses between its tries get longer, up to a minute: kube's 30 s, and up to as much
    // again by chance.
    let patience = (SOON + 2 * world.away).min(Duration::from_secs(60) + SOON);
    answered_within(node, "cart", target, "app", patience).with_context(|| agent.log_tail())?;
    if !world.away.is_zero() {
        println!("       caught up within {:.1} s", back.elapsed().as_secs_f64());
    }
    // And while the watch runs.
    exclude(node, "")?;
    node.server().compact(Gone::Event);
    soon_answered(node, "cart", target, "outbound").with_context(|| agent.log_tail())?;
    // A pod that leaves meanwhile.
    node.server().stop()?;
    node.server().delete("pods", "shop", "cart")?;
    node.server().resume()?;
    agent.wait_enrolled("cart", false)
}

/// How often interception is looked at while the API server is away.
const LOOK: Duration = Duration::from_secs(5);
/// What the agent may use meanwhile: memory on top, and processor time, the latter in percent.
const MORE_KIB: u64 = 2048;
const CPU_PERCENT: u32 = 3;
/// And how many lines of log: what is wrong is said once, not with every try.
const LINES: usize = 10;

/// For as long as that, and at least once: new connections are intercepted, the kernel has the
/// pods as they were, and the agent lives and does not grow.
fn look_on(
    node: &Node,
    agent: &mut Agent,
    own: SocketAddr,
    server: SocketAddr,
    time: Duration,
) -> Result<()> {
    let (start, before) = (Instant::now(), agent.usage()?);
    let pods = agent.status()?["pods"].clone();
    let lines = agent.log().lines().count();
    let mut looks = 0;
    loop {
        intercepted(node, "cart", own, server)?;
        let now = &agent.status()?["pods"];
        ensure!(*now == pods, "the kernel had the pods {pods:#}, and has {now:#}");
        ensure!(agent.is_running(), "the agent has ended; {}", agent.log_tail());
        let (code, body) = agent.get(node, "/readyz")?;
        ensure!(code == 200, "the agent is not ready: {body}");
        looks += 1;
        let left = time.saturating_sub(start.elapsed());
        if left.is_zero() {
            break;
        }
        let next = Instant::now() + LOOK.min(left);
        wait_until("the next look", 2 * LOOK, || Instant::now() >= next)?;
    }
    let after = agent.usage()?;
    let (passed, cpu) = (start.elapsed(), after.cpu - before.cpu);
    let said = agent.log().lines().count() - lines;
    if !time.is_zero() {
        println!(
            "       away {passed:.0?}: looked {looks} times; the agent used {:.2} % of a processor, \
             {} KiB before and {} KiB after, and wrote {said} lines",
            100.0 * cpu.as_secs_f64() / passed.as_secs_f64(),
            before.rss_kib,
            after.rss_kib,
        );
    }
    ensure!(cpu <= Duration::from_secs(1) + passed * CPU_PERCENT / 100, "it used {cpu:?}");
    let limit = before.rss_kib + MORE_KIB;
    ensure!(after.rss_kib <= limit, "it grew from {} to {} KiB", before.rss_kib, after.rss_kib);
    ensure!(said <= LINES, "it wrote {said} lines; {}", agent.log_tail());
    Ok(())
}

fn api_gone_status(world: &mut World) -> Result<()> {
    let (node, agent) = (&world.node, world.agent()?);
    let target = server(node, "server")?;
    mesh_pod(node, "cart")?;
    soon_answered(node, "cart", target, "outbound")?;
    node.server().stop()?;
    exclude(node, "8080")?;
    node.server().compact(Gone::Status);
    node.server().resume()?;
    soon_answered(node, "cart", target, "app").with_context(|| agent.log_tail())
}

fn exclude(node: &Node, ports: &str) -> Result<()> {
    let key = "traffic.sidecar.istio.io/excludeOutboundPorts";
    let patch = json!({"metadata": {"annotations": {key: ports}}});
    node.server().patch("pods", "shop", "cart", &patch).map(drop)
}

fn api_refuses(world: &mut World) -> Result<()> {
    let (node, mut agent) = (&world.node, world.agent()?);
    let target = server(node, "server")?;
    let own = mesh_pod(node, "cart")?;
    soon_answered(node, "cart", target, "outbound")?;
    // The kubelet here is the same user, but it watches already.
    agent.terminate()?;
    node.server().forbid("list", "pods");
    node.server().clear_requests();
    agent.launch(node)?;
    let lists = || {
        let requests = node.server().requests();
        requests.iter().filter(|request| request.path.ends_with("/pods")).count()
    };
    wait_until("the agent to be refused twice", Duration::from_secs(30), || lists() >= 2)
        .with_context(|| agent.log_tail())?;
    ensure!(agent.is_running(), "it gave up: {}", agent.log_tail());
    intercepted(node, "cart", own, target)?;
    node.server().allow("list", "pods");
    agent.wait_ready(node)?;
    intercepted(node, "cart", own, target)
}

fn killed(world: &mut World) -> Result<()> {
    let (node, mut agent) = (&world.node, world.agent()?);
    let target = server(node, "server")?;
    node.create_pod("cart", istio(), injected(app(&["loop", &target.to_string()])))?;
    node.wait_running("cart")?;
    more_load(node, "cart")?;
    for round in 0..3 {
        agent.kill9();
        more_load(node, "cart").with_context(|| format!("round {round}, without the agent"))?;
        agent.launch(node)?;
        agent.wait_ready(node)?;
        more_load(node, "cart").with_context(|| format!("round {round}, with a new agent"))?;
    }
    undisturbed(node, "cart")
}

/// All of the pod's connections went to its sidecar.
fn undisturbed(node: &Node, pod: &str) -> Result<()> {
    let log = node.log(pod, "app");
    // Before the sidecar listens all are refused; after that none.
    let begun = log.lines().skip_while(|line| line.contains("refused"));
    for line in begun {
        ensure!(line.starts_with("ok by=outbound "), "under load: {line}");
    }
    Ok(())
}

/// No build's own layout of the maps.
const OTHER_LAYOUT: &str = "v0";

fn upgraded(world: &mut World) -> Result<()> {
    let (node, mut agent) = (&world.node, world.agent()?);
    let target = server(node, "server")?;
    node.create_pod("cart", istio(), injected(app(&["loop", &target.to_string()])))?;
    node.wait_running("cart")?;
    for layout in [Some(OTHER_LAYOUT), None, Some(OTHER_LAYOUT)] {
        more_load(node, "cart")?;
        agent.upgrade_to(node, layout)?;
        agent.wait_ready(node)?;
        more_load(node, "cart").with_context(|| format!("with maps of {layout:?}"))?;
        agent.wait_enrolled("cart", true)?;
    }
    undisturbed(node, "cart")?;
    // A pod that starts now is intercepted by the new maps.
    let own = mesh_pod(node, "late")?;
    intercepted(node, "late", own, target)
}

/// Waits for some more connections of the pod's app.
fn more_load(node: &Node, pod: &str) -> Result<()> {
    let connections = || node.log(pod, "app").lines().filter(|line| line.starts_with("ok")).count();
    let before = connections();
    wait_until("more connections", Duration::from_secs(10), || connections() >= before + 20)
}

fn overwritten(world: &mut World) -> Result<()> {
    let node = &world.node;
    let (file, before) = conflist(node)?;
    let mut agent = world.agent()?;
    let target = server(node, "server")?;
    // The network's own installer, once in place and once by a new file.
    for round in 0..2 {
        let text = format!("{before:#}\n");
        if round == 0 {
            fs::write(&file, text)?;
        } else {
            let new = file.with_extension("new");
            fs::write(&new, text)?;
            fs::rename(&new, &file)?;
        }
        wait_until("the plugin to be back", Duration::from_secs(10), || {
            conflist(node).is_ok_and(|(_, value)| is_chained(&value))
        })
        .with_context(|| agent.log_tail())?;
    }
    let own = mesh_pod(node, "cart")?;
    agent.wait_enrolled("cart", true)?;
    soon_answered(node, "cart", target, "outbound")?;
    intercepted(node, "cart", own, target)
}

fn agent_away(world: &mut World) -> Result<()> {
    const ARGS: [&str; 4] = ["--cni-timeout", "1", "--cni-exclude-namespaces", "kube-system"];
    let (node, mut agent) = (&world.node, world.agent_with(&ARGS)?);
    let target = server(node, "server")?;
    agent.kill9();
    let spec = json!({
        "initContainers": [container("validation", &["avoid", &target.to_string(), "app"])],
        "containers": [app(&["serve", "0.0.0.0:8080"]), istio_proxy()],
    });
    node.create_pod("cart", istio(), spec)?;
    // It is told why, and tried again.
    let refused = wait_for("CNI to refuse", Duration::from_secs(20), || {
        let events = node.events("cart");
        let said = events.iter().filter(|event| event.starts_with("FailedCreatePodSandBox"));
        (said.count() >= 2).then_some(events)
    })?;
    ensure!(refused.iter().all(|event| event.contains("sidestep")), "events: {refused:#?}");
    ensure!(node.pod("cart")?["status"]["phase"] == "Pending", "the pod has started");
    // What the agent itself may need is not held up.
    node.server().put(json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "dns", "namespace": "kube-system"},
        "spec": {
            "nodeName": NODE,
            "containers": [{"name": "app", "image": IMAGE, "args": ["pause"]}],
        },
    }))?;
    wait_until("a pod in kube-system to run", Duration::from_secs(20), || {
        let pod = node.server().get("pods", "kube-system", "dns");
        pod.is_ok_and(|pod| pod.is_some_and(|pod| pod["status"]["phase"] == "Running"))
    })?;
    // One that leaves meanwhile must be able to.
    node.delete_pod("server")?;

    agent.launch(node)?;
    agent.wait_ready(node)?;
    let target = server(node, "server-2")?;
    let ip = node.wait_running("cart").with_context(|| agent.log_tail())?;
    soon_answered(node, "cart", target, "outbound")?;
    intercepted(node, "cart", SocketAddr::new(ip, PORT), target)?;
    answered(node, "server-2", target, "app").map(drop)
}
