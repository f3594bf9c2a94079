#![no_main]
//! A pod of some mesh with any annotations: a line is `KEY=TEXT`, or `NAME=TEXT` for a variable
//! of the proxy's environment (`\\n` in TEXT begins a line there); a line `@N` is the mesh of the
//! pod, and begins another pod.

use std::mem;

use k8s_openapi::api::core::v1::Pod;
use serde_json::{Value, json};
use sidestep::mesh::MESHES;

libfuzzer_sys::fuzz_target!(|text: &str| {
    let mut pods = Vec::new();
    let mut pod = empty(0, 0);
    for line in text.lines().take(100) {
        if let Some(mesh) = line.strip_prefix('@') {
            let next = empty(mesh.trim().parse().unwrap_or(0), pods.len() + 1);
            pods.push(mem::replace(&mut pod, next));
        } else if let Some((key, value)) = line.split_once('=') {
            if key.contains('/') {
                pod["metadata"]["annotations"][key] = value.replace("\\n", "\n").into();
            } else {
                let env = &mut pod["spec"]["containers"][0]["env"];
                env.as_array_mut().expect("env").push(json!({"name": key, "value": value}));
            }
        }
    }
    pods.push(pod);
    let pods: Vec<Pod> =
        pods.into_iter().map(|pod| serde_json::from_value(pod).expect("a pod")).collect();
    sidestep_fuzz::check_pods(&pods);
});

/// A pod that is in the mesh, with nothing said about it.
fn empty(mesh: usize, number: usize) -> Value {
    let proxy = MESHES[mesh % MESHES.len()].proxy_container;
    json!({
        "metadata": {
            "name": format!("pod-{number}"),
            "annotations": {"sidecar.istio.io/status": "{}", "kuma.io/sidecar-injected": "true"},
        },
        "spec": {"containers": [{"name": proxy, "args": ["proxy"], "env": []}]},
    })
}
