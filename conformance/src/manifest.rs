//! A pod as Kubernetes would have it after a mesh's injection.

use serde_json::{Value, json};
use sidestep_lab::Pod;
use sidestep_lab::iptables::{Kuma, Linkerd};

use crate::row::{Mesh, Setup};

/// The manifest of the pod with this setup, for the agent.
pub fn manifest(pod: &Pod, setup: &Setup) -> Value {
    // The lab knows how Istio injects; the others change what is theirs.
    let mut manifest = pod.manifest();
    let (annotations, proxy) = match setup.mesh {
        Mesh::Istio => {
            let proxy = &mut manifest["spec"]["containers"][1];
            if setup.v4_only {
                proxy["env"] = json!([]);
            }
            if setup.dns {
                let env = json!({"name": "ISTIO_META_DNS_CAPTURE", "value": "true"});
                proxy["env"].as_array_mut().into_iter().for_each(|all| all.push(env.clone()));
            }
            (json!({"sidecar.istio.io/status": "{}"}), proxy.clone())
        }
        Mesh::Linkerd => (
            json!({"linkerd.io/inject": "enabled", "linkerd.io/proxy-version": "edge"}),
            json!({
                "name": "linkerd-proxy",
                "image": "cr.l5d.io/linkerd/proxy",
                "env": [{
                    "name": "LINKERD2_PROXY_OUTBOUND_LISTEN_ADDRS",
                    "value": if setup.v4_only { "127.0.0.1:4140" } else { "127.0.0.1:4140,[::1]:4140" },
                }],
                "securityContext": {"runAsUser": Linkerd::UID, "runAsGroup": Linkerd::UID},
            }),
        ),
        Mesh::Kuma => (
            json!({
                "kuma.io/sidecar-injected": "true",
                "kuma.io/sidecar-uid": Kuma::UID.to_string(),
                "kuma.io/transparent-proxying": "enabled",
                "kuma.io/transparent-proxying-ip-family-mode":
                    if setup.v4_only { "ipv4" } else { "dualstack" },
                "kuma.io/transparent-proxying-inbound-port": "15006",
                "kuma.io/transparent-proxying-outbound-port": "15001",
            }),
            json!({
                "name": "kuma-sidecar",
                "image": "kuma-dp",
                "securityContext": {"runAsUser": Kuma::UID, "runAsGroup": Kuma::UID},
            }),
        ),
    };
    manifest["metadata"]["labels"] = json!({"app": pod.name()});
    manifest["metadata"]["annotations"] = annotations;
    let all = &mut manifest["metadata"]["annotations"];
    if setup.mesh == Mesh::Kuma && setup.dns {
        // The injector says so where DNS is captured, and nothing elsewhere.
        all["kuma.io/builtin-dns"] = json!("enabled");
        all["kuma.io/builtin-dns-port"] = json!("15053");
    }
    all["sidestep.io/netns"] = json!(pod.netns());
    for (key, value) in &setup.annotations {
        manifest["metadata"]["annotations"][key] = json!(value);
    }
    manifest["spec"]["containers"][1] = proxy;
    manifest
}
