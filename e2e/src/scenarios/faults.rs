//! What breaks: the API server, the agent, CNI's configuration.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::Pod;
use serde_json::{Value, json};
use sidestep_e2e::{Agent, Node};
use sidestep_lab::{wait_for, wait_until};

use super::changes::is_chained;
use super::pods::{
    PORT, SOON, answered, answered_within, app, container, injected, intercepted, istio,
    istio_proxy, mesh_pod, server, soon_answered,
};
use super::{Row, World};

pub const SCENARIOS: &[Row] = &[
    ("api-away", "the API server goes and comes back", api_away),
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

fn api_away(world: &World) -> Result<()> {
    let (node, mut agent) = (&world.node, world.agent()?);
    let target = server(node, "server")?;
    let own = mesh_pod(node, "cart")?;
    soon_answered(node, "cart", target, "outbound")?;
    let gone = Instant::now();
    node.stop_api()?;
    look_on(node, &mut agent, own, target, world.away).context("without an API server")?;
    node.resume_api()?;
    node.patch::<Pod>("cart", &excluding("8080"))?;
    let back = Instant::now();
    // The pauses between its tries get longer, up to a minute: kube's 30 s, and up to as much
    // again by chance.
    let patience = (SOON + 2 * gone.elapsed()).min(Duration::from_secs(60) + SOON);
    answered_within(node, "cart", target, "app", patience).with_context(|| agent.log_tail())?;
    if !world.away.is_zero() {
        println!("       caught up within {:.1} s", back.elapsed().as_secs_f64());
    }
    // And while the watch runs.
    node.patch::<Pod>("cart", &excluding(""))?;
    soon_answered(node, "cart", target, "outbound").with_context(|| agent.log_tail())?;
    node.delete::<Pod>("cart")?;
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
    agent: &mut Agent<'_>,
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
        let (code, body) = agent.get("/readyz")?;
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

fn excluding(ports: &str) -> Value {
    let key = "traffic.sidecar.istio.io/excludeOutboundPorts";
    json!({"metadata": {"annotations": {key: ports}}})
}

fn api_refuses(world: &World) -> Result<()> {
    let (node, mut agent) = (&world.node, world.agent()?);
    let target = server(node, "server")?;
    let own = mesh_pod(node, "cart")?;
    soon_answered(node, "cart", target, "outbound")?;
    agent.terminate()?;
    node.allow_lists(false)?;
    agent.launch()?;
    let refused = || agent.refusals("pods").is_ok_and(|refusals| refusals >= 2);
    wait_until("the agent to be refused twice", node.patience(), refused)
        .with_context(|| agent.log_tail())?;
    ensure!(agent.is_running(), "it gave up: {}", agent.log_tail());
    intercepted(node, "cart", own, target)?;
    node.allow_lists(true)?;
    agent.wait_ready()?;
    intercepted(node, "cart", own, target)
}

fn killed(world: &World) -> Result<()> {
    let (node, mut agent) = (&world.node, world.agent()?);
    let target = server(node, "server")?;
    node.create_pod("cart", istio(), injected(app(&["loop", &target.to_string()])))?;
    node.wait_running("cart")?;
    more_load(node, "cart")?;
    for round in 0..3 {
        agent.kill9()?;
        more_load(node, "cart").with_context(|| format!("round {round}, without the agent"))?;
        agent.launch()?;
        agent.wait_ready()?;
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

fn upgraded(world: &World) -> Result<()> {
    let (node, mut agent) = (&world.node, world.agent()?);
    let target = server(node, "server")?;
    node.create_pod("cart", istio(), injected(app(&["loop", &target.to_string()])))?;
    node.wait_running("cart")?;
    for layout in [Some(OTHER_LAYOUT), None, Some(OTHER_LAYOUT)] {
        more_load(node, "cart")?;
        agent.upgrade_to(layout)?;
        agent.wait_ready()?;
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

fn overwritten(world: &World) -> Result<()> {
    let node = &world.node;
    let (file, before) = node.conflist()?;
    let mut agent = world.agent()?;
    let target = server(node, "server")?;
    // The network's own installer, once in place and once by a new file.
    for round in 0..2 {
        let text = format!("{before:#}\n");
        match round {
            0 => node.shell().write(&file, &text)?,
            _ => node.shell().replace(&file, &text)?,
        }
        wait_until("the plugin to be back", Duration::from_secs(10), || {
            node.conflist().is_ok_and(|(_, value)| is_chained(&value))
        })
        .with_context(|| agent.log_tail())?;
    }
    let own = mesh_pod(node, "cart")?;
    agent.wait_enrolled("cart", true)?;
    soon_answered(node, "cart", target, "outbound")?;
    intercepted(node, "cart", own, target)
}

fn agent_away(world: &World) -> Result<()> {
    let (node, mut agent) = (&world.node, world.impatient_agent()?);
    let target = server(node, "server")?;
    agent.kill9()?;
    let spec = json!({
        "initContainers": [container("validation", &["avoid", &target.to_string(), "app"])],
        "containers": [app(&["serve", "0.0.0.0:8080"]), istio_proxy()],
    });
    node.create_pod("cart", istio(), spec)?;
    // It is told why, and tried again.
    let refused = wait_for("CNI to refuse", node.patience(), || {
        let mut events = node.events("cart");
        events.retain(|event| event.starts_with("FailedCreatePodSandBox"));
        (events.len() >= 2).then_some(events)
    })?;
    ensure!(refused.iter().all(|event| event.contains("sidestep")), "events: {refused:#?}");
    ensure!(node.pod("cart")?["status"]["phase"] == "Pending", "the pod has started");
    // What the agent itself may need is not held up.
    let dns = "kube-system/dns";
    node.create_pod(dns, Value::Null, json!({"containers": [app(&["pause"])]}))?;
    node.wait_running(dns)?;
    node.delete_pod(dns)?;
    // One that leaves meanwhile must be able to.
    node.delete_pod("server")?;

    agent.launch()?;
    agent.wait_ready()?;
    let target = server(node, "server-2")?;
    let ip = node.wait_running("cart").with_context(|| agent.log_tail())?;
    soon_answered(node, "cart", target, "outbound")?;
    intercepted(node, "cart", SocketAddr::new(ip, PORT), target)?;
    answered(node, "server-2", target, "app").map(drop)
}
