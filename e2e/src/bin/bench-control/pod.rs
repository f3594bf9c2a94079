//! A pod of this node: a network namespace with an address on lo, and its object.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    process::Command,
    thread,
};

use anyhow::{Context, Result, anyhow, ensure};
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, unshare},
};
use serde_json::{Value, json};

/// The namespace that all pods are in, and the node that these are on.
pub const NAMESPACE: &str = "bench";
/// See [`NAMESPACE`].
pub const NODE: &str = "bench-node";

/// A network namespace where the container runtime would put it.
pub struct Netns(PathBuf);

impl Netns {
    /// Makes one at `path` with `ip` on lo.
    pub fn make(path: &Path, ip: &str) -> Result<Self> {
        File::create_new(path).with_context(|| format!("making {}", path.display()))?;
        let made = Self(path.to_owned());
        let inside = || -> Result<()> {
            unshare(CloneFlags::CLONE_NEWNET)?;
            let none: Option<&str> = None;
            mount(Some("/proc/thread-self/ns/net"), path, none, MsFlags::MS_BIND, none)?;
            // A child of this thread is in this thread's namespace.
            let script = format!("ip link set lo up && ip addr add {ip}/32 dev lo");
            let output = Command::new("sh").args(["-c", &script]).output()?;
            ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            Ok(())
        };
        thread::scope(|scope| scope.spawn(inside).join())
            .map_err(|_| anyhow!("a thread panicked"))?
            .with_context(|| format!("making network namespace {}", path.display()))?;
        Ok(made)
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        let gone = umount2(&self.0, MntFlags::MNT_DETACH).map_err(io::Error::from);
        // One that was not mounted yet is but a file.
        let removed = fs::remove_file(&self.0);
        if let Err(error) = removed.or(gone) {
            eprintln!("{}: {error}", self.0.display());
        }
    }
}

/// A pod with its namespace.
pub struct Pod {
    pub name: String,
    /// The API server's; empty before it has the pod.
    pub uid: String,
    pub netns: PathBuf,
    ip: String,
    _handle: Netns,
}

impl Pod {
    /// The pod with this number; `base` is what its namespace's path starts with.
    pub fn make(base: &Path, number: u32) -> Result<Self> {
        let name = format!("pod-{number}");
        let [_, _, high, low] = number.to_be_bytes();
        let ip = format!("10.78.{high}.{low}");
        let netns = PathBuf::from(format!("{}p{number}", base.display()));
        let _handle = Netns::make(&netns, &ip)?;
        Ok(Self { name, uid: String::new(), netns, ip, _handle })
    }

    /// Its object as the scheduler leaves it.
    pub fn pending(&self) -> Value {
        object(&self.name, NODE)
    }

    /// What the kubelet says of it once it runs.
    pub fn running(&self) -> Value {
        json!({
            "phase": "Running", "podIP": self.ip, "podIPs": [{"ip": self.ip}],
            "conditions": conditions("True"),
        })
    }

    /// `CNI_CONTAINERID`.
    pub fn sandbox(&self) -> String {
        format!("sandbox-{}", self.uid)
    }
}

/// A pod of another node, which runs.
pub fn other(number: u32) -> Value {
    let mut object = object(&format!("other-{number}"), &format!("node-{}", number % 50));
    let [_, _, high, low] = number.to_be_bytes();
    let ip = format!("10.79.{high}.{low}");
    object["status"] = json!({"phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}]});
    object
}

fn conditions(ready: &str) -> Value {
    let condition = |kind: &str| {
        json!({
            "type": kind, "status": ready, "lastProbeTime": null,
            "lastTransitionTime": "2026-01-01T00:00:00Z",
        })
    };
    ["PodReadyToStartContainers", "Initialized", "Ready", "ContainersReady", "PodScheduled"]
        .map(condition)
        .to_vec()
        .into()
}

/// A pod as Istio's webhook leaves it, with as much around it as there is in a cluster: most of
/// an object of some 8 KB is nothing to the agent.
fn object(name: &str, node: &str) -> Value {
    let env: Vec<Value> = (0..20)
        .map(|n| json!({"name": format!("SETTING_{n}"), "value": format!("the value of {n}")}))
        .collect();
    let probe = json!({
        "httpGet": {"path": "/app-health/app/readyz", "port": 15020, "scheme": "HTTP"},
        "periodSeconds": 10, "timeoutSeconds": 1, "successThreshold": 1, "failureThreshold": 3,
    });
    let mounts: Vec<Value> = ["workload-socket", "istiod-ca-cert", "istio-data", "istio-token"]
        .map(|name| json!({"name": name, "mountPath": format!("/var/run/secrets/{name}")}))
        .into();
    let volumes: Vec<Value> = ["workload-socket", "istiod-ca-cert", "istio-data", "istio-token"]
        .map(|name| json!({"name": name, "emptyDir": {"medium": "Memory"}}))
        .into();
    let resources = json!({
        "limits": {"cpu": "2", "memory": "1Gi"}, "requests": {"cpu": "100m", "memory": "128Mi"},
    });
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "namespace": NAMESPACE,
            "labels": {"app": "shop", "pod-template-hash": "7d4b9c8f5", "version": "v1"},
            "annotations": {
                "sidecar.istio.io/status": "{\"initContainers\":[\"istio-validation\"]}",
                "traffic.sidecar.istio.io/excludeOutboundPorts": "9999",
            },
            "ownerReferences": [{
                "apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "shop-7d4b9c8f5",
                "uid": "7d4b9c8f-0000-4000-8000-000000000000", "controller": true,
            }],
        },
        "spec": {
            "nodeName": node,
            "serviceAccountName": "shop",
            "tolerations": [{"key": "node.kubernetes.io/not-ready", "operator": "Exists"}],
            "volumes": volumes,
            "containers": [
                {
                    "name": "app", "image": "registry.example/shop:1", "env": env,
                    "ports": [{"containerPort": 8080}], "resources": resources,
                    "readinessProbe": probe, "livenessProbe": probe, "volumeMounts": mounts,
                },
                {
                    "name": "istio-proxy", "image": "istio/proxyv2:1.27.0",
                    "args": ["proxy", "sidecar", "--domain", "$(POD_NAMESPACE).svc.cluster.local"],
                    "env": env, "resources": resources, "readinessProbe": probe,
                    "ports": [{"containerPort": 15090, "name": "http-envoy-prom"}],
                    "securityContext": {"runAsUser": 1337, "runAsGroup": 1337},
                    "volumeMounts": mounts,
                },
            ],
        },
        "status": {"phase": "Pending", "qosClass": "Burstable", "conditions": conditions("False")},
    })
}
