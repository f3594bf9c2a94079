//! Under a real mesh: its injector, its control plane, its sidecars. Interception is the one thing
//! that is not the mesh's own.

use std::net::SocketAddr;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use sidestep_e2e::mesh::{Answered, Cluster, Istio, Space};
use sidestep_lab::PROXY;

use super::{MeshRow, Of};

pub const SCENARIOS: &[MeshRow] = &[
    ("mesh-start", "pods start at the first try, with classic and native sidecars", Of::All, start),
    ("mesh-mtls", "mutual TLS on a node and between nodes; plain text is refused", Of::All, mtls),
    ("mesh-annotation", "a changed annotation takes effect, both ways", Of::All, annotation),
    ("mesh-dns", "names that only the mesh knows are resolved by the sidecar", Of::Istio, dns),
    ("mesh-inits", "init containers before the sidecar, and after it", Of::Istio, inits),
    (
        "mesh-job",
        "Jobs end, with either kind of sidecar, and all of them were in the mesh",
        Of::Istio,
        job,
    ),
    ("mesh-probes", "probes of every kind under STRICT", Of::Istio, probes),
    ("mesh-gateway", "an ingress gateway is left alone, and works", Of::Istio, gateway),
    ("mesh-waypoint", "a waypoint is left alone", Of::GatewayApi, waypoint),
];

fn start(cluster: &Cluster) -> Result<()> {
    let space = cluster.space("mesh-start")?;
    for style in ["classic", "native"] {
        let native = style == "native";
        let annotations = cluster.mesh.sidecar_style(native);
        let edit = json!({"metadata": {"annotations": annotations}});
        let (server, client) = (format!("server-{style}"), format!("client-{style}"));
        space.server(&server, cluster.worker(0)?, edit.clone())?;
        space.client(&client, cluster.worker(1)?, edit)?;
        for name in [&server, &client] {
            let pod = space.wait_ready(name)?;
            space.ensure_first_try(name)?;
            space.wait_enrolled(name, true)?;
            let inits = names(&pod, "initContainers");
            ensure!(!inits.contains(&cluster.mesh.init()), "{name} has {inits:?}");
            let list = if native { "initContainers" } else { "containers" };
            let sidecars = names(&pod, list);
            // Kuma's are all of one kind.
            if annotations != json!({}) {
                ensure!(
                    sidecars.contains(&cluster.mesh.sidecar()),
                    "{name}'s {list}: {sidecars:?}"
                );
            }
        }
        space.get_known(&client, &format!("http://{server}/"))?;
    }
    Ok(())
}

/// The names of a pod's containers of one kind.
fn names<'p>(pod: &'p Value, list: &str) -> Vec<&'p str> {
    let containers = pod["spec"][list].as_array().into_iter().flatten();
    containers.filter_map(|container| container["name"].as_str()).collect()
}

fn mtls(cluster: &Cluster) -> Result<()> {
    let space = cluster.space("mesh-mtls")?;
    let outside = cluster.plain_space("mesh-mtls-outside")?;
    let here = cluster.worker(0)?;
    space.server("server", here, json!({}))?;
    space.client("near", here, json!({}))?;
    space.client("far", cluster.worker(1)?, json!({}))?;
    outside.client("outsider", here, json!({}))?;
    for name in ["server", "near", "far"] {
        space.wait_ready(name)?;
    }
    outside.wait_ready("outsider")?;
    let direct = format!("http://{}:8080/", space.ip_of("server")?);
    let by_name = format!("http://server.{}/", space.name());
    // Who asks in plain text is answered, as long as the mesh lets him.
    outside.get_until("outsider", &by_name, "an answer in plain text", Answered::is_plain)?;
    cluster.apply(&[cluster.mesh.strict(space.name(), "server")])?;
    for url in [&by_name, &direct] {
        outside.get_until("outsider", url, "the server to refuse", Answered::is_refused)?;
    }
    for client in ["near", "far"] {
        space.get_known(client, "http://server/")?;
    }
    // And it stays so.
    for url in [&by_name, &direct] {
        let answered = outside.get("outsider", url)?;
        ensure!(answered.is_refused(), "plain text to {url}: {answered:?}");
    }
    Ok(())
}

fn annotation(cluster: &Cluster) -> Result<()> {
    let space = cluster.space("mesh-annotation")?;
    pair(&space)?;
    let key = cluster.mesh.exclude_outbound();
    let url = "http://server/";
    for _ in 0..2 {
        space.get_known("client", url)?;
        space.kubectl(&["annotate", "pod", "client", &format!("{key}=80")])?;
        space.get_until("client", url, "its sidecar to be passed", Answered::is_plain)?;
        space.kubectl(&["annotate", "pod", "client", &format!("{key}-")])?;
    }
    space.get_known("client", url).map(drop)
}

/// The pods `server` and `client`, on a node each, both ready.
pub fn pair(space: &Space<'_>) -> Result<()> {
    let cluster = space.cluster();
    space.server("server", cluster.worker(0)?, json!({}))?;
    space.client("client", cluster.worker(1)?, json!({}))?;
    for name in ["server", "client"] {
        space.wait_ready(name)?;
    }
    Ok(())
}

fn dns(cluster: &Cluster) -> Result<()> {
    let space = cluster.space("mesh-dns")?;
    let capture = "proxyMetadata:\n  ISTIO_META_DNS_CAPTURE: \"true\"\n";
    let captured = json!({"metadata": {"annotations": {"proxy.istio.io/config": capture}}});
    space.server("server", cluster.worker(0)?, json!({}))?;
    space.client("captured", cluster.worker(1)?, captured.clone())?;
    // The sidecar's listener for DNS over TCP is Go's, and so one of MPTCP.
    let mut tcp = captured;
    tcp["spec"]["dnsConfig"]["options"] = json!([{"name": "use-vc"}]);
    space.client("captured-tcp", cluster.worker(1)?, tcp)?;
    space.client("other", cluster.worker(1)?, json!({}))?;
    for name in ["server", "captured", "captured-tcp", "other"] {
        space.wait_ready(name)?;
    }
    // In no DNS server.
    let host = "db.sidestep.internal";
    let server = space.ip_of("server")?;
    // Of the pods' family: nobody has it.
    let address = if server.contains(':') { "2001:2::17" } else { "240.240.17.17" };
    space.apply(&[json!({
        "apiVersion": "networking.istio.io/v1",
        "kind": "ServiceEntry",
        "metadata": {"name": "db"},
        "spec": {
            "hosts": [host],
            "addresses": [address],
            "location": "MESH_INTERNAL",
            "ports": [{"number": 80, "name": "http", "protocol": "HTTP", "targetPort": 8080}],
            "resolution": "STATIC",
            "endpoints": [{"address": server}],
        },
    })])?;
    let url = format!("http://{host}/");
    let good = |answered: &Answered| matches!(answered, Answered::Yes(_));
    for name in ["captured", "captured-tcp"] {
        space.get_until(name, &url, "the sidecar to resolve the name", good)?;
    }
    let answered = space.get("other", &url)?;
    let Answered::Not(reason) = &answered else { bail!("without capture: {answered:?}") };
    // What its DNS server knows, it knows with capture as well.
    space.get_known("captured", "http://server/").context(reason.clone()).map(drop)
}

fn inits(cluster: &Cluster) -> Result<()> {
    let space = cluster.space("mesh-inits")?;
    let outside = cluster.plain_space("mesh-inits-outside")?;
    outside.pod("greeter", Some(cluster.worker(0)?), &["serve", "0.0.0.0:8080"], json!({}))?;
    outside.wait_ready("greeter")?;
    space.server("server", cluster.worker(0)?, json!({}))?;
    space.wait_ready("server")?;
    let greeter = SocketAddr::new(outside.ip_of("greeter")?.parse()?, 8080).to_string();

    // Before a classic sidecar: nobody listens yet. Istio lets those through that are its own user.
    let mut own = init("own", &["once", &greeter]);
    own["securityContext"] = json!({"runAsUser": PROXY, "runAsGroup": PROXY});
    let before = [init("before", &["avoid", &greeter, "app"]), own];
    space.client("classic", cluster.worker(1)?, with_inits(cluster, false, &before))?;
    space.wait_ready("classic")?;
    let said = space.log("classic", "before")?;
    ensure!(said.contains("refused"), "before the sidecar: {said:?}");
    let said = space.log("classic", "own")?;
    ensure!(said.starts_with("ok by=app"), "as the sidecar's user: {said:?}");

    // After a native one: through it.
    let after = [init("after", &["get", "http://server/"])];
    space.client("native", cluster.worker(1)?, with_inits(cluster, true, &after))?;
    space.wait_ready("native")?;
    let said = space.log("native", "after")?;
    ensure!(said.starts_with("200") && said.contains("/sa/native"), "after the sidecar: {said:?}");
    Ok(())
}

/// A pod's init containers, and the kind of its sidecar.
fn with_inits(cluster: &Cluster, native: bool, inits: &[Value]) -> Value {
    let annotations = cluster.mesh.sidecar_style(native);
    json!({"metadata": {"annotations": annotations}, "spec": {"initContainers": inits}})
}

fn init(name: &str, args: &[&str]) -> Value {
    let mut container = sidestep_e2e::mesh::app(args);
    container["name"] = json!(name);
    container
}

fn job(cluster: &Cluster) -> Result<()> {
    let space = cluster.space("mesh-job")?;
    space.server("server", cluster.worker(0)?, json!({}))?;
    space.wait_ready("server")?;
    let worker = cluster.worker(1)?;
    let args = ["get", "http://server/"];
    for (name, native, completions) in [("native", true, 3), ("classic", false, 1)] {
        let mut edit = json!({
            "metadata": {"annotations": cluster.mesh.sidecar_style(native)},
            "spec": {"restartPolicy": "Never"},
        });
        if !native {
            // Or the app asks before anybody listens, as under iptables.
            let hold = "holdApplicationUntilProxyStarts: true\n";
            edit["metadata"]["annotations"]["proxy.istio.io/config"] = json!(hold);
        }
        space.apply(&[
            json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": name}}),
            json!({
                "apiVersion": "batch/v1",
                "kind": "Job",
                "metadata": {"name": name},
                "spec": {
                    "backoffLimit": 0,
                    "completions": completions,
                    "template": space.template(name, Some(worker), &args, edit),
                },
            }),
        ])?;
        let label = format!("app={name}");
        if !native {
            // A classic sidecar runs until it is told that the app has ended.
            let pod = cluster.soon("the app to end", || {
                let pod = space.pod_of(name)?;
                let statuses = space.get_pod(&pod)?["status"]["containerStatuses"].clone();
                let mut app = statuses.as_array().into_iter().flatten();
                let app = app.find(|one| one["name"] == "app").context("no app yet")?;
                ensure!(app["state"]["terminated"]["exitCode"] == 0, "{:#}", app["state"]);
                Ok(pod)
            })?;
            let quit = ["pilot-agent", "request", "POST", "quitquitquit"];
            let exec = ["exec", &pod, "-c", cluster.mesh.sidecar(), "--"];
            space.kubectl(&[&exec[..], &quit].concat())?;
        }
        let job = format!("job/{name}");
        let wait = ["wait", "--for=condition=complete", &job, "--timeout=180s"];
        space.kubectl(&wait).with_context(|| {
            let seen = space.kubectl(&["describe", "pods", "-l", &label]);
            seen.unwrap_or_else(|err| format!("{err:#}"))
        })?;
        let said = space.kubectl(&["logs", "-l", &label, "-c", "app", "--tail=-1"])?;
        let account = format!("/sa/{name}");
        let known = said.lines().filter(|line| line.contains(&account)).count();
        ensure!(known == completions, "the pods of the Job {name} said {said}");
        space.kubectl(&["delete", &job, "--timeout", "120s"])?;
    }
    cluster.soon("the agent to have none of its pods", || {
        let status = cluster.status(worker)?;
        let pods = status["pods"].to_string();
        ensure!(
            !["native", "classic"].iter().any(|name| pods.contains(&space.full(name))),
            "{pods}"
        );
        Ok(())
    })
}

/// How many probes a pod is to get by with.
const PROBES: usize = 10;

fn probes(cluster: &Cluster) -> Result<()> {
    let space = cluster.space("mesh-probes")?;
    let worker = cluster.worker(0)?;
    let get = ["/e2e-pod", "get", "http://127.0.0.1:8080/exec"];
    let kinds = [
        ("http", json!({"httpGet": {"path": "/probe", "port": 8080}})),
        ("tcp", json!({"tcpSocket": {"port": 8080}})),
        ("exec", json!({"exec": {"command": get}})),
        ("grpc", json!({"grpc": {"port": 5000}})),
        // Nobody listens there: it must not become ready.
        ("wrong", json!({"tcpSocket": {"port": 8081}})),
    ];
    for (kind, how) in &kinds {
        cluster.apply(&[cluster.mesh.strict(space.name(), kind)])?;
        let mut probe = how.clone();
        probe["periodSeconds"] = json!(1);
        probe["timeoutSeconds"] = json!(5);
        let mut app = sidestep_e2e::mesh::app(&["http", "0.0.0.0:8080"]);
        if *kind == "grpc" {
            app["image"] = json!(AGNHOST);
            app["args"] = json!(["grpc-health-checking"]);
        }
        app["readinessProbe"] = probe.clone();
        if *kind != "wrong" {
            app["startupProbe"] = probe.clone();
            app["livenessProbe"] = probe;
        }
        space.pod(kind, Some(worker), &[], json!({"spec": {"containers": [app]}}))?;
    }
    let good = &kinds[..kinds.len() - 1];
    for (kind, _) in good {
        space.wait_ready(kind)?;
    }
    cluster.soon("more probes", || {
        let log = space.log("http", "app")?;
        let probes = log.lines().filter(|line| line.starts_with("got /probe ")).count();
        ensure!(probes >= PROBES, "{probes} so far");
        Ok(())
    })?;
    for (kind, _) in good {
        space.wait_ready(kind)?;
        space.ensure_first_try(kind)?;
    }
    // It may have begun last.
    cluster.soon("the last pod to run, and not to be ready", || {
        let pod = space.get_pod("wrong")?;
        ensure!(pod["status"]["phase"] == "Running", "it does not run: {:#}", pod["status"]);
        let conditions = pod["status"]["conditions"].to_string();
        ensure!(conditions.contains("containers with unready status: [app]"), "{conditions}");
        Ok(())
    })
}

/// The image with a server of gRPC's health protocol.
const AGNHOST: &str = "registry.k8s.io/e2e-test-images/agnhost:2.53";

fn gateway(cluster: &Cluster) -> Result<()> {
    let istio = cluster.mesh.istio().context("this is for Istio")?;
    let space = cluster.space("mesh-gateway")?;
    let outside = cluster.plain_space("mesh-gateway-outside")?;
    space.server("server", cluster.worker(0)?, json!({}))?;
    cluster.apply(&[cluster.mesh.strict(space.name(), "server")])?;
    outside.client("outsider", cluster.worker(1)?, json!({}))?;
    let values = "service.type=ClusterIP,imagePullPolicy=IfNotPresent,autoscaling.enabled=false";
    let args = ["--set", values, "--wait", "--timeout", "180s"];
    let args = args.map(str::to_owned);
    let chart = istio.chart("gateway")?;
    cluster.helm(space.name(), &["upgrade", "--install", "ingress"], &[&chart, &args])?;
    space.apply(&[
        json!({
            "apiVersion": "networking.istio.io/v1",
            "kind": "Gateway",
            "metadata": {"name": "ingress"},
            "spec": {
                "selector": {"app": "ingress"},
                "servers": [{
                    "port": {"number": 80, "name": "http", "protocol": "HTTP"},
                    "hosts": ["*"],
                }],
            },
        }),
        json!({
            "apiVersion": "networking.istio.io/v1",
            "kind": "VirtualService",
            "metadata": {"name": "ingress"},
            "spec": {
                "hosts": ["*"],
                "gateways": ["ingress"],
                "http": [{"route": [{"destination": {"host": "server"}}]}],
            },
        }),
    ])?;
    space.wait_ready("server")?;
    outside.wait_ready("outsider")?;
    let url = format!("http://ingress.{}/", space.name());
    let known = |answered: &Answered| answered.client().is_some_and(|id| id.ends_with("/ingress"));
    outside.get_until("outsider", &url, "the gateway to be known to the server", known)?;
    left_alone(&space, "app=ingress")
}

/// The agent has none of these pods, and nothing to say about them.
fn left_alone(space: &Space<'_>, selector: &str) -> Result<()> {
    let format = "jsonpath={range .items[*]}{.metadata.name} {.spec.nodeName}{\"\\n\"}{end}";
    let pods = space.kubectl(&["get", "pods", "-l", selector, "-o", format])?;
    ensure!(!pods.trim().is_empty(), "there is no pod {selector}");
    for line in pods.lines() {
        let (pod, node) = line.split_once(' ').context("a pod on no node")?;
        let entry = space.cluster().enrolled(node, &space.full(pod))?;
        ensure!(entry.is_none(), "the agent has taken it: {entry:?}");
        let said = space.cluster().node.events_of_agent(&space.full(pod));
        ensure!(said.is_empty(), "{pod}: {said:?}");
    }
    Ok(())
}

fn waypoint(cluster: &Cluster) -> Result<()> {
    let space = cluster.space("mesh-waypoint")?;
    space.apply(&[json!({
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "Gateway",
        "metadata": {"name": "waypoint", "labels": {"istio.io/waypoint-for": "service"}},
        "spec": {
            "gatewayClassName": "istio-waypoint",
            "listeners": [{"name": "mesh", "port": 15008, "protocol": "HBONE"}],
        },
    })])?;
    cluster.soon("istiod to make the waypoint", || {
        space.kubectl(&["get", "deployment", "waypoint"])
    })?;
    let selector = "gateway.networking.k8s.io/gateway-name=waypoint";
    if cluster.mesh.istio().is_none_or(Istio::has_own_envoy) {
        cluster.rolled_out(space.name(), "waypoint")?;
    } else {
        // The published Envoy ends at once: it has no 'metadata_discovery', which a waypoint takes.
        cluster.soon("the waypoint's Envoy to be started", || {
            let format = "jsonpath={.items[*].status.containerStatuses[*].containerID}";
            let started = space.kubectl(&["get", "pods", "-l", selector, "-o", format])?;
            ensure!(started.starts_with("containerd://"), "{started:?}");
            Ok(())
        })?;
    }
    left_alone(&space, selector)
}
