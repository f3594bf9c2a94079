//! A node of a cluster, and the pods that scenarios have on it: pods by the Kubernetes API, and
//! commands on the node.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt::Debug;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::core::v1::{Namespace, Pod};
use k8s_openapi::api::events::v1::Event;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams};
use kube::config::KubeConfigOptions;
use kube::{Api, Client, Config, Resource};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use sidestep_lab::{Seen, wait_for, wait_until};
use tokio::runtime::{self, Runtime};
use tokio::time::timeout;

use crate::agent::Agent;
use crate::image::IMAGE;
use crate::kind::{Kind, Release};
use crate::shell::{Shell, text_of};

/// The namespace of the scenarios' pods.
pub const NAMESPACE: &str = "shop";
/// CNI's configuration on the node.
const CNI_CONF: &str = "/etc/cni/net.d";
/// Where the agent's plugin is while it is installed.
pub const PLUGIN: &str = "/opt/cni/bin/sidestep-cni";
/// How long one answer of the API server may take.
const ANSWER: Duration = Duration::from_secs(10);

/// A node. Pods are named `NAME`, which are in the namespace `shop`, or `NAMESPACE/NAME`.
pub struct Node {
    runtime: Runtime,
    client: Client,
    /// Of the pods that were created. Also known while the API server is away.
    uids: RefCell<BTreeMap<String, String>>,
    kind: Kind,
}

impl Node {
    /// The worker of a kind cluster, which the kubeconfig in use is about. What earlier scenarios
    /// left is removed.
    pub fn new(cluster: &str) -> Result<Self> {
        let runtime = runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("making a runtime")?;
        let client = runtime.block_on(async {
            let config = Config::from_kubeconfig(&KubeConfigOptions::default()).await?;
            Client::try_from(config).context("making a client of the API server")
        })?;
        let node = Self { runtime, client, uids: RefCell::default(), kind: Kind::new(cluster) };
        node.make_namespace()?;
        Ok(node)
    }

    /// With the namespace `shop` and nothing in it.
    fn make_namespace(&self) -> Result<()> {
        let namespaces = |client| Api::<Namespace>::all(client);
        let delete = self.api(async |client| {
            let deleted = namespaces(client).delete(NAMESPACE, &DeleteParams::default()).await;
            found(deleted)
        })?;
        if delete.is_some() {
            wait_until("the namespace to be gone", self.patience(), || {
                let asked = self.api(async |client| namespaces(client).get_opt(NAMESPACE).await);
                asked.is_ok_and(|namespace| namespace.is_none())
            })?;
        }
        let new: Namespace = object(json!({"metadata": {"name": NAMESPACE}}))?;
        self.api(async |client| namespaces(client).create(&PostParams::default(), &new).await)?;
        // No pod is taken before.
        wait_until("the namespace's service account", self.patience(), || {
            let account = self.get::<k8s_openapi::api::core::v1::ServiceAccount>("default");
            account.is_ok_and(|account| account.is_some())
        })
    }

    /// For commands on the node.
    pub fn shell(&self) -> &Shell {
        self.kind.shell()
    }

    /// How long a pod or the agent may take to come up or go.
    pub fn patience(&self) -> Duration {
        Duration::from_secs(120)
    }

    /// Installs the agent with its CNI plugin, which waits for that many seconds when the agent is
    /// away, and waits until it is ready.
    pub fn agent(&self, cni_timeout: u32) -> Result<Agent<'_>> {
        Agent::start(self, Release::new(self, &self.kind, cni_timeout))
    }

    /// Stops the API server, and waits until it does not answer.
    pub fn stop_api(&self) -> Result<()> {
        self.kind.stop_api()?;
        wait_until("the API server to be gone", self.patience(), || !self.has_api())
    }

    /// Starts it again, and waits until it answers.
    pub fn resume_api(&self) -> Result<()> {
        self.kind.resume_api()?;
        wait_until("the API server to be back", self.patience(), || self.has_api())
    }

    fn has_api(&self) -> bool {
        self.api(async |client| Api::<Namespace>::all(client).get_opt(NAMESPACE).await).is_ok()
    }

    /// Whether the agent may list pods.
    pub fn allow_lists(&self, allowed: bool) -> Result<()> {
        self.kind.allow_lists(self, allowed)
    }

    /// Asks the API server.
    pub fn api<T>(&self, ask: impl AsyncFnOnce(Client) -> kube::Result<T>) -> Result<T> {
        let client = self.client.clone();
        let answer = self.runtime.block_on(async { timeout(ANSWER, ask(client)).await });
        Ok(answer.context("the API server does not answer")??)
    }

    /// An object, if there is one.
    pub fn get<K: Object>(&self, name: &str) -> Result<Option<K>> {
        let (namespace, name) = split(name);
        self.api(async |client| Api::<K>::namespaced(client, namespace).get_opt(name).await)
    }

    /// Applies a JSON merge patch to an object.
    pub fn patch<K: Object>(&self, name: &str, patch: &Value) -> Result<()> {
        let ((namespace, name), patch) = (split(name), Patch::Merge(patch));
        let params = PatchParams::default();
        self.api(async |client| {
            Api::<K>::namespaced(client, namespace).patch(name, &params, &patch).await.map(drop)
        })
    }

    /// Asks for an object to be deleted; fine where there is none.
    pub fn delete<K: Object>(&self, name: &str) -> Result<()> {
        let ((namespace, name), params) = (split(name), DeleteParams::default());
        self.api(async |client| {
            let deleted = Api::<K>::namespaced(client, namespace).delete(name, &params).await;
            found(deleted).map(drop)
        })
    }

    /// Applies a JSON merge patch to the namespace `shop`.
    pub fn patch_namespace(&self, patch: &Value) -> Result<()> {
        let (patch, params) = (Patch::Merge(patch), PatchParams::default());
        self.api(async |client| {
            Api::<Namespace>::all(client).patch(NAMESPACE, &params, &patch).await.map(drop)
        })
    }

    /// A pod that is for this node. `metadata` and `spec` are merged with what all pods here have;
    /// containers without an image get [`IMAGE`].
    pub fn manifest(&self, name: &str, metadata: Value, mut spec: Value) -> Result<Pod> {
        for list in ["initContainers", "containers"] {
            for container in spec[list].as_array_mut().into_iter().flatten() {
                if container["image"].is_null() {
                    container["image"] = json!(IMAGE);
                }
            }
        }
        let (namespace, short) = split(name);
        let mut pod = json!({"metadata": metadata, "spec": spec});
        pod["metadata"]["name"] = json!(short);
        pod["metadata"]["namespace"] = json!(namespace);
        for (key, value) in [
            ("nodeName", json!(self.kind.node())),
            ("terminationGracePeriodSeconds", json!(1)),
            ("restartPolicy", json!("Never")),
            ("automountServiceAccountToken", json!(false)),
        ] {
            pod["spec"][key] = value;
        }
        object(pod).with_context(|| format!("the pod {name}"))
    }

    /// Creates [`Node::manifest`].
    pub fn create_pod(&self, name: &str, metadata: Value, spec: Value) -> Result<()> {
        let pod = self.manifest(name, metadata, spec)?;
        let namespace = split(name).0;
        let created = self.api(async |client| {
            Api::<Pod>::namespaced(client, namespace).create(&PostParams::default(), &pod).await
        })?;
        let uid = created.metadata.uid.with_context(|| format!("the pod {name} has no uid"))?;
        self.uids.borrow_mut().insert(name.to_owned(), uid);
        Ok(())
    }

    /// The pod as the API server has it. Fails when it has none.
    pub fn pod(&self, name: &str) -> Result<Value> {
        let pod = self.get::<Pod>(name)?.with_context(|| format!("there is no pod {name}"))?;
        serde_json::to_value(pod).with_context(|| format!("the pod {name}"))
    }

    /// Waits until the pod is in a phase, and gives it. Fails with the events when it gets into
    /// another final one.
    pub fn wait_phase(&self, name: &str, phase: &str) -> Result<Value> {
        let what = format!("the pod {name} to be {phase}");
        let waited = wait_for(&what, self.patience(), || {
            let pod = self.pod(name).ok()?;
            match pod["status"]["phase"].as_str() {
                Some(now) if now == phase => Some(Ok(pod)),
                Some(now @ ("Succeeded" | "Failed")) => Some(Err(anyhow!("it is {now}"))),
                _ => None,
            }
        });
        waited
            .and_then(|pod| pod.context(what))
            .with_context(|| format!("events: {:#?}", self.events(name)))
    }

    /// Waits until the pod runs, and gives its address.
    pub fn wait_running(&self, name: &str) -> Result<IpAddr> {
        let pod = self.wait_phase(name, "Running")?;
        let ip = pod["status"]["podIP"].as_str().unwrap_or_default();
        ip.parse().with_context(|| format!("the address of the pod {name}: {ip:?}"))
    }

    /// Deletes the pod, and waits until it is gone.
    pub fn delete_pod(&self, name: &str) -> Result<()> {
        self.delete::<Pod>(name)?;
        wait_until(&format!("the pod {name} to be gone"), self.patience(), || {
            self.get::<Pod>(name).is_ok_and(|pod| pod.is_none())
        })
        .with_context(|| format!("events: {:#?}", self.events(name)))
    }

    /// What was said of a pod in events: `REASON: NOTE`, as often as it was said.
    pub fn events(&self, name: &str) -> Vec<String> {
        self.events_by(name, |_| true)
    }

    /// What the agent said of a pod.
    pub fn events_of_agent(&self, name: &str) -> Vec<String> {
        self.events_by(name, |event| event.reporting_controller.as_deref() == Some("sidestep"))
    }

    fn events_by(&self, name: &str, by: impl Fn(&Event) -> bool) -> Vec<String> {
        let (namespace, name) = split(name);
        let about = ListParams::default();
        let listed = self
            .api(async |client| Api::<Event>::namespaced(client, namespace).list(&about).await)
            .map(|events| events.items);
        let of_pod = |event: &Event| {
            let pod = event.regarding.as_ref().and_then(|pod| pod.name.as_deref());
            pod == Some(name) && by(event)
        };
        let events = listed.unwrap_or_default().into_iter().filter(of_pod);
        let words = |event: Event| {
            let times = event.deprecated_count.unwrap_or(1).max(1);
            let (reason, note) = (event.reason.unwrap_or_default(), event.note.unwrap_or_default());
            vec![format!("{reason}: {note}"); usize::try_from(times).unwrap_or(1)]
        };
        events.flat_map(words).collect()
    }

    /// What a container has written so far.
    pub fn log(&self, pod: &str, container: &str) -> String {
        let uid = self.uids.borrow().get(pod).cloned().unwrap_or_default();
        let (namespace, name) = split(pod);
        let file = format!("/var/log/pods/{namespace}_{name}_{uid}/{container}/0.log");
        text_of(&self.shell().read(&file).unwrap_or_default())
    }

    /// A process of the pod that has `e2e-pod` in its root directory.
    pub fn process(&self, pod: &str) -> Result<u32> {
        let uid = self.uids.borrow().get(pod).cloned();
        let uid = uid.with_context(|| format!("the pod {pod} was not created here"))?;
        self.shell().process(&uid).with_context(|| pod.to_owned())
    }

    /// Connects from inside the pod as `uid`, and gives what the server saw.
    pub fn ask(&self, pod: &str, uid: u32, target: SocketAddr) -> Result<Seen> {
        let asked = self.process(pod).and_then(|process| self.shell().ask(process, uid, target));
        asked.with_context(|| format!("uid {uid} of {pod} asking {target}"))
    }

    /// Connects from the node to an address of this pod.
    pub fn ask_from_node(&self, pod: &str, target: SocketAddr) -> Result<Seen> {
        let process = self.process(pod)?;
        let asked = self.shell().ask_from_node(process, target);
        asked.with_context(|| format!("the node asking {target}"))
    }

    /// Waits until somebody on this address of the pod answers the node.
    pub fn wait_answer(&self, pod: &str, target: SocketAddr) -> Result<Seen> {
        wait_for(&format!("an answer of {target}"), self.patience(), || {
            self.ask_from_node(pod, target).ok()
        })
    }

    /// The file of CNI's configuration, and what is in it.
    pub fn conflist(&self) -> Result<(String, Value)> {
        let names = self.shell().run(&["ls", CNI_CONF])?;
        let name = names.lines().find(|name| name.ends_with(".conflist"));
        let name = name.with_context(|| format!("{CNI_CONF} has no conflist"))?;
        let file = format!("{CNI_CONF}/{name}");
        let text = self.shell().read(&file)?;
        let value = serde_json::from_str(&text).with_context(|| format!("{file}: {text:?}"))?;
        Ok((file, value))
    }

    /// Where host-local chooses the next address from: a file with the last one that was given.
    pub fn last_ip_file(&self) -> Result<String> {
        let conflist = self.conflist()?.1;
        let ipam = &conflist["plugins"][0]["ipam"];
        if ipam["type"] != "host-local" {
            bail!("the pods' addresses are not host-local's: {conflist:#}");
        }
        let dir = ipam["dataDir"].as_str().unwrap_or("/var/lib/cni/networks");
        let name = conflist["name"].as_str().context("CNI's configuration has no name")?;
        Ok(format!("{dir}/{name}/last_reserved_ip.0"))
    }

    /// Keeps the logs for a look: in the directory `dir`.
    pub fn keep_logs(&self, dir: &Path) {
        self.kind.keep_logs(dir);
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        for pod in self.uids.take().keys() {
            if let Err(err) = self.delete::<Pod>(pod) {
                eprintln!("e2e: deleting the pod {pod}: {err:#}");
            }
        }
    }
}

/// What has a name in a namespace.
pub trait Object:
    Resource<DynamicType = (), Scope = NamespaceResourceScope>
    + Clone
    + Debug
    + DeserializeOwned
    + Serialize
    + Send
{
}

impl<K> Object for K where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope>
        + Clone
        + Debug
        + DeserializeOwned
        + Serialize
        + Send
{
}

/// Namespace and name.
fn split(name: &str) -> (&str, &str) {
    name.split_once('/').unwrap_or((NAMESPACE, name))
}

/// None where the API server has no such object.
fn found<T>(answer: kube::Result<T>) -> kube::Result<Option<T>> {
    match answer {
        Ok(value) => Ok(Some(value)),
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(None),
        Err(err) => Err(err),
    }
}

/// An object from JSON.
pub fn object<K: DeserializeOwned>(value: Value) -> Result<K> {
    serde_json::from_value(value).context("an object of the API")
}
