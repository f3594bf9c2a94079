//! Requests to the API server about single objects.

use std::{
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use anyhow::{Context, Result, anyhow, bail};
use futures_util::FutureExt;
use hyper_timeout::TimeoutConnector;
use hyper_util::{
    client::legacy::{Client as HttpClient, connect::HttpConnector},
    rt::TokioExecutor,
};
use k8s_openapi::api::{
    apps::v1::DaemonSet,
    core::v1::{Node, Pod},
};
use kube::{
    Api, Client,
    api::{Patch, PatchParams},
    client::{ClientBuilder, ConfigExt},
    config::{KubeConfigOptions, Kubeconfig, KubeconfigError},
    core::PartialObjectMeta,
    runtime::reflector::{ObjectRef, Store},
};
use serde_json::json;
use tokio::time::timeout;
use tower::{BoxError, ServiceBuilder};
use tracing::{info, warn};

use super::{
    Config,
    errors::{ANSWER, Failing, explained, lock, note},
    events::{node_object, recorder, tell},
    watch::{SILENCE, keep_needed},
};
use crate::{mesh::facts, node::Sandbox, problem::Problem};

/// The idle time after which a connection is probed, and the interval of four more probes. An API
/// server that has lost power, or a network element that has lost its state, does not end a
/// connection. client-go probes after 30 seconds, by HTTP/2, and waits for 15.
const ALIVE: Duration = Duration::from_secs(20);
/// See [`ALIVE`].
const ALIVE_AGAIN: Duration = Duration::from_secs(5);
/// The taint that nodes can be created with, and that the agent removes.
const STARTUP_TAINT: &str = "sidestep.io/agent-not-ready";

/// The reason why an agent exits for good.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Removed {
    /// Its DaemonSet is gone or being deleted.
    Uninstalled(String),
    /// The node's label takes the node out.
    TakenOut(String),
}

/// Requests about single objects; cheap to clone.
#[derive(Clone)]
pub struct ApiServer {
    pub(super) client: Client,
    pub(super) node: String,
    pub(super) daemonset: Option<Arc<Own>>,
    pub(super) pods: Store<Pod>,
    pub(super) failing: Arc<Mutex<Failing>>,
}

/// The agent's own DaemonSet. It is watched, because `helm uninstall` removes the right to read it
/// right after it is deleted: a running watch still delivers the deletion.
pub(super) struct Own {
    pub(super) namespace: String,
    pub(super) name: String,
    pub(super) watched: Store<PartialObjectMeta<DaemonSet>>,
}

impl Own {
    /// Whether the watch has reported that the DaemonSet is gone, or being deleted.
    pub(super) fn is_gone(&self) -> bool {
        let told = matches!(self.watched.wait_until_ready().now_or_never(), Some(Ok(())));
        told && self.watched.state().iter().all(|own| own.metadata.deletion_timestamp.is_some())
    }
}

impl ApiServer {
    pub(super) fn failing(&self) -> MutexGuard<'_, Failing> {
        lock(&self.failing)
    }

    /// The pod of a sandbox, by its name, and by its uid if the runtime passes one: from the watch,
    /// or else from the API server. `None` for a static pod without a mirror pod, which the kubelet
    /// creates when it can, possibly after it has started the pod. No mesh injects its sidecar into
    /// a static pod.
    ///
    /// # Errors
    /// If the API server does not know it, or does not answer in time.
    pub async fn pod(&self, sandbox: &Sandbox) -> Result<Option<Arc<Pod>>> {
        let Sandbox { namespace, pod: name, uid, .. } = sandbox;
        let uid = uid.as_deref();
        let same = |pod: &Pod| uid == Some(facts::pod_uid(pod));
        let known = self.pods.get(&ObjectRef::new(name).within(namespace));
        if let Some(pod) = known.as_ref().filter(|pod| same(pod)) {
            return Ok(Some(Arc::clone(pod)));
        }
        let found = self.get_pod(namespace, name).await;
        let other = match found {
            Ok(Some(pod)) if uid.is_none() || same(&pod) => return Ok(Some(Arc::new(pod))),
            Ok(other) => Ok(other.map(Arc::new)),
            Err(error) => known.map(Some).ok_or(error),
        };
        // The mirror of an earlier manifest is as good: its pod was in a mesh, or not.
        let other_is_plain =
            other.as_ref().ok().and_then(Option::as_ref).is_none_or(|pod| !facts::is_in_mesh(pod));
        if uid.is_some_and(facts::is_static_uid) && other_is_plain {
            info!(
                pod = format!("{namespace}/{name}"),
                "static pod without a mirror pod: allowed to start"
            );
            return Ok(None);
        }
        match other? {
            Some(other) => {
                let (other, uid) = (facts::pod_uid(&other), uid.unwrap_or_default());
                bail!("pod {namespace}/{name} has uid {other} in the API server, not {uid}")
            }
            None => bail!("the API server has no pod {namespace}/{name}"),
        }
    }

    /// Asks the API server for a pod.
    async fn get_pod(&self, namespace: &str, name: &str) -> Result<Option<Pod>> {
        let api = Api::<Pod>::namespaced(self.client.clone(), namespace);
        let answer = timeout(ANSWER, api.get_opt(name)).await;
        let found = answer
            .context("the API server does not answer")
            .and_then(|answer| answer.map_err(|error| explained("get", "pods", &error)));
        note(&self.failing, "get pods", found.as_ref().err().map(|error| format!("{error:#}")));
        let mut found = found?;
        found.iter_mut().for_each(keep_needed);
        Ok(found)
    }

    /// Reports to the node why the agent cannot run on it.
    pub async fn tell_node(&self, text: &str) {
        let recorder = recorder(&self.client, &self.node);
        if let Err(error) = tell(&recorder, &Problem::node(text), &node_object(&self.node)).await {
            warn!("{error:#}");
        }
    }

    /// Removes the startup taint from this node. Returns whether the node is without it.
    pub async fn remove_startup_taint(&self) -> bool {
        let done = timeout(ANSWER, self.try_remove_startup_taint()).await;
        let done =
            done.unwrap_or_else(|_| bail!("cannot patch nodes: the API server does not answer"));
        note(&self.failing, "patch nodes", done.as_ref().err().map(|error| format!("{error:#}")));
        done.is_ok()
    }

    async fn try_remove_startup_taint(&self) -> Result<()> {
        let nodes = Api::<Node>::all(self.client.clone());
        let node =
            nodes.get(&self.node).await.map_err(|error| explained("get", "nodes", &error))?;
        let mut taints = node.spec.and_then(|spec| spec.taints).unwrap_or_default();
        let before = taints.len();
        taints.retain(|taint| taint.key != STARTUP_TAINT);
        if taints.len() == before {
            return Ok(());
        }
        // The list is replaced as a whole, so a concurrent change must make the request fail.
        let version = node.metadata.resource_version;
        let patch = json!({"metadata": {"resourceVersion": version}, "spec": {"taints": taints}});
        let patched = nodes.patch(&self.node, &PatchParams::default(), &Patch::Merge(patch)).await;
        patched.map_err(|error| explained("patch", "nodes", &error))?;
        info!(taint = STARTUP_TAINT, node = self.node, "removed the startup taint");
        Ok(())
    }

    /// The reason why this agent exits for good, if there is one. Only proof counts: the API server
    /// has no such DaemonSet, or it is being deleted. Any other answer, such as 401 or 403, may be
    /// a fault of the API server.
    pub async fn removed(&self) -> Option<Removed> {
        let node = Api::<Node>::all(self.client.clone());
        if let Ok(Ok(Some(node))) = timeout(ANSWER, node.get_metadata_opt(&self.node)).await
            && let Some(labels) = node.metadata.labels
            && labels.get(facts::INTERCEPT).is_some_and(|text| text == "disabled")
        {
            let why = format!("node {} has the label {}=disabled", self.node, facts::INTERCEPT);
            return Some(Removed::TakenOut(why));
        }
        let own = self.daemonset.as_ref()?;
        let Own { namespace, name, .. } = &**own;
        let gone = own.is_gone() || {
            let api = Api::<DaemonSet>::namespaced(self.client.clone(), namespace);
            let found = timeout(ANSWER, api.get_metadata_opt(name)).await.ok()?.ok()?;
            found.is_none_or(|found| found.metadata.deletion_timestamp.is_some())
        };
        gone.then(|| Removed::Uninstalled(format!("DaemonSet {namespace}/{name} is gone")))
    }
}

pub(super) async fn client(config: &Config) -> Result<Client> {
    let config = match &config.kubeconfig {
        Some(path) => {
            // Their texts have their causes in them.
            let invalid =
                |error: KubeconfigError| anyhow!("kubeconfig {}: {error}", path.display());
            let file = Kubeconfig::read_from(path).map_err(invalid)?;
            let options = KubeConfigOptions::default();
            kube::Config::from_custom_kubeconfig(file, &options).await.map_err(invalid)?
        }
        None => kube::Config::incluster().map_err(|_| {
            anyhow!(
                "--kubeconfig is not set, and this process is not in a pod with a service account \
                 (KUBERNETES_SERVICE_HOST and /var/run/secrets/kubernetes.io/serviceaccount)"
            )
        })?,
    };
    limited(config, SILENCE)
        .map_err(|error| anyhow!("cannot create a client for the API server: {error}"))
}

/// A client with a time limit. Without it, the agent would wait for ever for an API server that has
/// accepted a request and died silently. kube's own client does not probe connections, and silently
/// retries for minutes after 429 or 503.
fn limited(config: kube::Config, silence: Duration) -> kube::Result<Client> {
    let mut tcp = HttpConnector::new();
    tcp.enforce_http(false);
    tcp.set_keepalive(Some(ALIVE));
    tcp.set_keepalive_interval(Some(ALIVE_AGAIN));
    tcp.set_keepalive_retries(Some(4));
    let mut connector = TimeoutConnector::new(config.rustls_https_connector_with_connector(tcp)?);
    connector.set_connect_timeout(config.connect_timeout);
    connector.set_read_timeout(Some(silence));
    // The time counts from the request, not from the last use of its connection.
    connector.set_reset_reader_on_write(true);
    let service = ServiceBuilder::new()
        .layer(config.base_uri_layer())
        .option_layer(config.auth_layer()?)
        .map_err(BoxError::from)
        .service(HttpClient::builder(TokioExecutor::new()).build(connector));
    Ok(ClientBuilder::new(service, config.default_namespace).build())
}

/// Fails early if the API server has no node of this name: it would have no pods.
pub(super) async fn find_node(client: &Client, name: &str) -> Result<()> {
    let api = Api::<Node>::all(client.clone());
    match timeout(ANSWER, api.get_metadata_opt(name)).await {
        Ok(Ok(None)) => bail!("the API server has no node {name:?} (--node-name)"),
        Ok(Ok(Some(_))) => info!(node = name, "node found in the API server"),
        Ok(Err(error)) => warn!("{:#}", explained("get", "nodes", &error)),
        Err(_) => warn!("the API server does not answer; trying again"),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[tokio::test]
    async fn an_api_server_that_never_answers_is_not_waited_for() {
        // Connections are taken, and requests, and that is all.
        let silent = TcpListener::bind("127.0.0.1:0").expect("a port");
        let url = format!("http://{}", silent.local_addr().expect("an address"));
        let config = kube::Config::new(url.parse().expect("a URL"));
        let client = limited(config, Duration::from_millis(100));
        let pods = Api::<Pod>::all(client.expect("a client"));
        let listed = timeout(ANSWER, pods.list(&Default::default())).await;
        listed.expect("it waits for ever").expect_err("nobody answered");
    }
}
