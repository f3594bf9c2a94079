//! Against the small API server, with commands that are recorded and not run.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use kube::config::Kubeconfig;
use sidestep_lab::APP;

use super::*;
use crate::ApiServer;

/// How long the other side may take.
const SOON: Duration = Duration::from_secs(10);

/// What was run, a line for each command.
type Commands = Arc<Mutex<Vec<String>>>;

fn taken(commands: &Commands) -> Vec<String> {
    std::mem::take(&mut *commands.lock().unwrap_or_else(PoisonError::into_inner))
}

/// A cluster `e2e` without anything but its API server, and what it is told.
fn cluster() -> Result<(Arc<ApiServer>, Commands, Node)> {
    let server = Arc::new(ApiServer::start(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))?);
    for object in [
        json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "shop"}}),
        json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "sidestep"}}),
        json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "e2e-worker"}}),
        json!({
            "apiVersion": "v1",
            "kind": "ServiceAccount",
            "metadata": {"name": "default", "namespace": "shop"},
        }),
    ] {
        server.put(object)?;
    }
    let commands = Commands::default();
    let (told, api) = (Arc::clone(&commands), Arc::clone(&server));
    let away = AtomicBool::new(false);
    let run = move |argv: &[String], _: &str| {
        let line = argv.join(" ");
        told.lock().unwrap_or_else(PoisonError::into_inner).push(line.clone());
        let said = match () {
            () if line.ends_with(&format!("mv {MANIFEST} {ASIDE}")) => {
                away.store(true, Ordering::Relaxed);
                api.stop()?;
                ""
            }
            () if line.ends_with(&format!("sh {ASIDE} {MANIFEST}")) => {
                if away.swap(false, Ordering::Relaxed) {
                    api.resume()?;
                }
                ""
            }
            () if line.contains("pgrep") => "42\n",
            () if line.contains("/proc/") => "7\n",
            () if line.contains("/e2e-pod once") => "ok by=app peer=10.0.0.1:1 local=10.0.0.2:2\n",
            () if line.contains("/var/log/pods") => "2026-01-01T00:00:00Z stdout F hello\n",
            () => "",
        };
        Ok(said.to_owned())
    };
    let kubeconfig: Kubeconfig = serde_json::from_value(server.kubeconfig())?;
    let node = Node::of_kind(Kind::with("e2e", Arc::new(run)), Some(kubeconfig))?;
    Ok((server, commands, node))
}

fn release(node: &Node) -> Result<Release<'_>> {
    let Some(kind) = node.as_kind() else { anyhow::bail!("it is kind's") };
    Ok(Release::new(node, kind, 1))
}

/// The agent's pod as its DaemonSet makes it.
fn agent_pod() -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": "sidestep-x",
            "namespace": "sidestep",
            "labels": {"app.kubernetes.io/name": "sidestep"},
        },
        "spec": {"nodeName": "e2e-worker"},
    })
}

/// The node's label.
fn label(server: &ApiServer) -> Result<Value> {
    let node = server.get("nodes", "", "e2e-worker")?.context("there is a node")?;
    Ok(node["metadata"]["labels"][LABEL].clone())
}

#[test]
fn pods_and_how_they_are_asked() -> Result<()> {
    let (server, commands, node) = cluster()?;
    let spec = json!({"containers": [{"name": "app", "args": ["serve", "0.0.0.0:8080"]}]});
    node.create_pod("cart", Value::Null, spec.clone())?;
    node.create_pod("kube-system/dns", Value::Null, spec)?;
    let pod = node.pod("cart")?;
    let uid = pod["metadata"]["uid"].as_str().context("a uid")?.to_owned();
    assert_eq!(pod["metadata"]["namespace"], "shop");
    assert_eq!(pod["spec"]["nodeName"], "e2e-worker");
    assert_eq!(pod["spec"]["restartPolicy"], "Never");
    assert_eq!(pod["spec"]["containers"][0]["image"], crate::lab::IMAGE);

    let exec = "docker exec --privileged -i e2e-worker";
    assert_eq!(node.log("cart", "app"), "hello\n");
    assert_eq!(taken(&commands), [format!("{exec} cat /var/log/pods/shop_cart_{uid}/app/0.log")]);
    let target = SocketAddr::from(([10, 0, 0, 2], 8080));
    assert_eq!(node.ask("cart", APP, target)?.by.as_deref(), Some("app"));
    node.ask_from_node("cart", target)?;
    let asked = taken(&commands);
    assert!(asked[0].ends_with(&format!("sh {uid} {}", uid.replace('-', "_"))), "{asked:#?}");
    let once = "/e2e-pod once 10.0.0.2:8080";
    let inside = "nsenter -t 7 --mount --net -S 1000 -G 1000 --";
    assert_eq!(asked[1], format!("{exec} {inside} {once}"));
    assert_eq!(asked[3], format!("{exec} nsenter -t 7 --mount -- {once}"));

    // Also what is not in the namespace that goes.
    drop(node);
    let left = server.list("pods")?;
    let left = left.iter().filter(|pod| pod["metadata"]["deletionTimestamp"].is_null());
    assert_eq!(left.count(), 0);
    Ok(())
}

#[test]
fn the_namespace_is_made_anew() -> Result<()> {
    let (server, _, node) = cluster()?;
    let uid = |server: &ApiServer| -> Result<Value> {
        let namespace = server.get("namespaces", "", "shop")?.context("there is a namespace")?;
        Ok(namespace["metadata"]["uid"].clone())
    };
    let first = uid(&server)?;
    let kubeconfig: Kubeconfig = serde_json::from_value(server.kubeconfig())?;
    let again =
        Node::of_kind(Kind::with("e2e", Arc::new(|_, _| Ok(String::new()))), Some(kubeconfig))?;
    assert_ne!(uid(&server)?, first);
    drop((node, again));
    Ok(())
}

#[test]
fn the_release_and_the_nodes_label() -> Result<()> {
    let (server, commands, node) = cluster()?;
    let mut release = release(&node)?;
    let helm = "helm --namespace sidestep";
    let end = "--wait --timeout 180s";
    release.launch()?;
    assert_eq!(label(&server)?, "here");
    assert_eq!(
        taken(&commands),
        [format!(
            "{helm} install sidestep charts/sidestep --create-namespace \
             --values charts/sidestep/ci/e2e.yaml --set cni.timeoutSeconds=1 {end}"
        )]
    );

    // The label goes first, then the pod.
    server.put(agent_pod())?;
    thread::scope(|scope| {
        let gone = scope.spawn(|| {
            wait_until("the label to be gone", SOON, || {
                label(&server).is_ok_and(|it| it.is_null())
            })?;
            server.delete("pods", "sidestep", "sidestep-x").map(drop)
        });
        release.kill9()?;
        assert!(server.get("pods", "sidestep", "sidestep-x")?.is_none(), "it did not wait");
        gone.join().expect("it does not panic")
    })?;
    let exec = "docker exec --privileged -i e2e-worker";
    assert_eq!(
        taken(&commands),
        [format!("{exec} pgrep -o -x sidestep"), format!("{exec} kill -9 42")]
    );

    // There again, without helm.
    release.launch()?;
    assert_eq!(label(&server)?, "here");
    assert!(taken(&commands).is_empty());

    release.uninstall()?;
    assert!(label(&server)?.is_null());
    let told = taken(&commands);
    assert_eq!(told[2..], [format!("{helm} uninstall sidestep --ignore-not-found {end}")]);
    release.uninstall()?;
    assert!(taken(&commands).is_empty(), "it is done once");
    Ok(())
}

#[test]
fn another_layout_is_rolled_out() -> Result<()> {
    let (server, commands, node) = cluster()?;
    let mut release = release(&node)?;
    let args = |server: &ApiServer| -> Result<Value> {
        let daemonset = server.get("daemonsets.apps", "sidestep", "sidestep")?;
        let daemonset = daemonset.context("there is a DaemonSet")?;
        Ok(daemonset["spec"]["template"]["spec"]["containers"][0]["args"].clone())
    };
    let daemonset = |updated: u32| {
        json!({
            "metadata": {"generation": 2},
            "status": {
                "currentNumberScheduled": 1,
                "desiredNumberScheduled": 1,
                "numberMisscheduled": 0,
                "numberReady": 1,
                "numberAvailable": 1,
                "observedGeneration": 2,
                "updatedNumberScheduled": updated,
            },
        })
    };
    server.put(json!({
        "apiVersion": "apps/v1",
        "kind": "DaemonSet",
        "metadata": {"name": "sidestep", "namespace": "sidestep"},
        "spec": {
            "selector": {"matchLabels": {"app": "sidestep"}},
            "template": {"spec": {"containers": [
                {"name": "agent", "image": "sidestep:1", "args": ["run", "--kubernetes"]},
            ]}},
        },
    }))?;
    for (layout, wanted) in [
        (Some("v0"), json!(["run", "--kubernetes", "--layout=v0"])),
        (None, json!(["run", "--kubernetes"])),
    ] {
        server.patch("daemonsets.apps", "sidestep", "sidestep", &daemonset(0))?;
        thread::scope(|scope| {
            let rolled = scope.spawn(|| {
                wait_until("the arguments", SOON, || args(&server).is_ok_and(|it| it == wanted))?;
                server.patch("daemonsets.apps", "sidestep", "sidestep", &daemonset(1)).map(drop)
            });
            release.upgrade_to(layout)?;
            rolled.join().expect("it does not panic")
        })?;
        assert_eq!(args(&server)?, wanted);
    }
    release.layout = Some("v0".to_owned());
    release.sidestep(&["status"])?;
    let told = taken(&commands);
    assert_eq!(
        told.last().map(String::as_str),
        Some(
            "docker exec --privileged -i e2e-worker nsenter -t 42 --mount -- /sidestep status \
             --layout v0"
        )
    );
    release.delete_daemonset()?;
    assert_eq!(server.list("daemonsets.apps")?, [] as [Value; 0]);
    Ok(())
}

#[test]
fn the_api_server_goes_and_refuses() -> Result<()> {
    let (server, commands, node) = cluster()?;
    node.stop_api()?;
    node.resume_api()?;
    let exec = "docker exec --privileged -i e2e-control-plane";
    let told = taken(&commands);
    assert_eq!(told[0], format!("{exec} mv {MANIFEST} {ASIDE}"));
    assert!(told[1].starts_with(&format!("{exec} sh -c if")), "{told:#?}");

    server.put(json!({
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "ClusterRole",
        "metadata": {"name": "sidestep"},
        "rules": [
            {"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch"]},
            {"apiGroups": [""], "resources": ["namespaces"], "verbs": ["list", "watch"]},
        ],
    }))?;
    let verbs = || -> Result<Vec<Value>> {
        let role = server.get("clusterroles.rbac.authorization.k8s.io", "", "sidestep")?;
        let role = role.context("there is a ClusterRole")?;
        Ok(vec![role["rules"][0]["verbs"].clone(), role["rules"][1]["verbs"].clone()])
    };
    node.allow_lists(false)?;
    assert_eq!(verbs()?, [json!(["get", "watch"]), json!(["list", "watch"])]);
    node.allow_lists(true)?;
    assert_eq!(verbs()?, [json!(["get", "watch", "list"]), json!(["list", "watch"])]);
    Ok(())
}
