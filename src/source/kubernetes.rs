//! Pods from the API server: this node's alone, and of namespaces their metadata.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anyhow::{Context, Result, anyhow, bail};
use clap::ValueEnum;
use futures_util::{FutureExt, Stream, StreamExt, pin_mut, stream};
use hyper_timeout::TimeoutConnector;
use hyper_util::{
    client::legacy::{Client as HttpClient, connect::HttpConnector},
    rt::TokioExecutor,
};
use k8s_openapi::api::{
    apps::v1::DaemonSet,
    core::v1::{Container, Namespace, Node, ObjectReference, Pod, PodSpec, PodStatus},
};
use kube::{
    Api, Client,
    api::{Patch, PatchParams},
    client::{ClientBuilder, ConfigExt},
    config::{KubeConfigOptions, Kubeconfig, KubeconfigError},
    core::PartialObjectMeta,
    runtime::{
        WatchStreamExt,
        events::{Event, EventType, Recorder, Reporter},
        reflector::{self, ObjectRef, Store},
        watcher,
    },
};
use serde_json::json;
use tokio::{
    sync::mpsc,
    task,
    time::{sleep, timeout},
};
use tower::{BoxError, ServiceBuilder};
use tracing::{info, warn};

use super::{Snapshot, SourcePod, services::Services};
use crate::{
    mesh::facts,
    node::Sandbox,
    problem::{Problem, Reason},
    service::Catalog,
    text,
};

/// How long a single question to the API server may take.
const ANSWER: Duration = Duration::from_secs(5);
/// How long the API server may say nothing to a list or a watch: it ends each watch itself after
/// 290 seconds.
const SILENCE: Duration = Duration::from_secs(300);
/// A connection that is silent for so long is asked whether its other end is still there, and four
/// times more, this far apart: an API server that lost its power, or a network between that lost its
/// memory, ends no connection. client-go asks after 30 seconds, by HTTP/2, and waits for 15.
const ALIVE: Duration = Duration::from_secs(20);
/// See [`ALIVE`].
const ALIVE_AGAIN: Duration = Duration::from_secs(5);
/// A watch that can't be had fails more often than this: kube pauses for a minute at most.
const QUIET: Duration = Duration::from_secs(SILENCE.as_secs() + 100);
/// Before a list that the API server asks for by 410.
const RELIST: Duration = Duration::from_secs(1);
/// Whoever makes a node may put this taint on it; the agent takes it off.
const STARTUP_TAINT: &str = "sidestep.io/agent-not-ready";
/// Events that wait for the API server; what comes on top is in the log alone.
const EVENTS: usize = 256;
/// What an Event's note may hold.
const NOTE: usize = 1000;

/// How to reach the API server, and which node this is.
#[derive(Debug, Clone)]
pub struct Config {
    /// `spec.nodeName` of the pods to look after.
    pub node: String,
    /// A kubeconfig; none: the service account of the agent's own pod.
    pub kubeconfig: Option<PathBuf>,
    /// The agent's own DaemonSet, namespace and name.
    pub daemonset: Option<(String, String)>,
    /// What becomes of this node's mesh pods when that is gone.
    pub on_uninstall: OnUninstall,
    /// Services are watched as well.
    pub services: bool,
}

/// What happens to intercepted pods when Sidestep is uninstalled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum OnUninstall {
    /// They stay intercepted until they terminate or a new agent takes them over. On a node without
    /// intercepted pods, everything is removed.
    Keep,
    /// Everything is removed at once: their traffic bypasses their sidecars from then on.
    Unload,
}

/// Why an agent ends, where that is for good.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Removed {
    /// Its DaemonSet is gone or being deleted.
    Uninstalled(String),
    /// The node's label takes the node out.
    TakenOut(String),
}

/// What goes wrong with the API server now, by what was asked of it, and how often it did.
#[derive(Debug, Default)]
pub(super) struct Failing {
    now: BTreeMap<&'static str, String>,
    counts: BTreeMap<&'static str, u64>,
}

/// This node's part of the API server's state.
pub struct Kubernetes {
    api: ApiServer,
    namespaces: Store<PartialObjectMeta<Namespace>>,
    /// None: they are not translated.
    services: Option<Services>,
    on_uninstall: OnUninstall,
    /// None: no more are sent.
    events: Option<mpsc::Sender<(Problem, ObjectReference)>>,
    publisher: task::JoinHandle<()>,
    /// Pods that a CNI request was about and that the watch has not told of yet, by uid.
    ahead: BTreeMap<String, Arc<Pod>>,
}

/// Answers about single objects; cheap to clone.
#[derive(Clone)]
pub struct ApiServer {
    client: Client,
    node: String,
    daemonset: Option<Arc<Own>>,
    pods: Store<Pod>,
    failing: Arc<Mutex<Failing>>,
}

/// The agent's own DaemonSet. It is watched, because `helm uninstall` takes the right to ask about
/// it away right after it: a watch that runs tells of its end all the same.
struct Own {
    namespace: String,
    name: String,
    watched: Store<PartialObjectMeta<DaemonSet>>,
}

impl Own {
    /// Whether the watch has told that it is gone, or being deleted.
    fn is_gone(&self) -> bool {
        let told = matches!(self.watched.wait_until_ready().now_or_never(), Some(Ok(())));
        told && self.watched.state().iter().all(|own| own.metadata.deletion_timestamp.is_some())
    }
}

impl Kubernetes {
    /// Starts watching; `changed` is told of every change, and of the first complete state.
    ///
    /// # Errors
    /// Where the configuration can't be read, or the API server says that there is no such node.
    /// An API server that can't be reached is no error: it is tried again for ever.
    pub async fn start(config: &Config, changed: mpsc::Sender<()>) -> Result<Self> {
        let client = client(config).await?;
        find_node(&client, &config.node).await?;
        let failing = Arc::new(Mutex::new(Failing::default()));

        let (pods, writer) = reflector::store();
        let only = watcher::Config::default().fields(&format!("spec.nodeName={}", config.node));
        let api = Api::<Pod>::all(client.clone());
        let watch = relisting(move || watcher(api.clone(), only.clone())).modify(keep_needed);
        follow("pods", watch.reflect(writer), &failing, &changed);

        let (namespaces, writer) = reflector::store();
        let all = Api::<PartialObjectMeta<Namespace>>::all(client.clone());
        let watch = relisting(move || watcher(all.clone(), watcher::Config::default()));
        let watch = watch.modify(|namespace| namespace.metadata.managed_fields = None);
        follow("namespaces", watch.reflect(writer), &failing, &changed);

        let daemonset = config.daemonset.clone().map(|(namespace, name)| {
            let (watched, writer) = reflector::store();
            let api = Api::<PartialObjectMeta<DaemonSet>>::namespaced(client.clone(), &namespace);
            let only = watcher::Config::default().fields(&format!("metadata.name={name}"));
            let watch = relisting(move || watcher(api.clone(), only.clone()));
            follow("daemonsets", watch.reflect(writer), &failing, &changed);
            Arc::new(Own { namespace, name, watched })
        });

        let services =
            config.services.then(|| Services::start(&client, &config.node, &failing, &changed));

        let (events, queue) = mpsc::channel(EVENTS);
        let recorder = recorder(&client, &config.node);
        let publisher = task::spawn(publish(recorder, queue, Arc::clone(&failing)));
        let api = ApiServer { client, node: config.node.clone(), daemonset, pods, failing };
        Ok(Self {
            api,
            namespaces,
            services,
            on_uninstall: config.on_uninstall,
            events: Some(events),
            publisher,
            ahead: BTreeMap::new(),
        })
    }

    /// Asks about single objects.
    pub fn api(&self) -> &ApiServer {
        &self.api
    }

    /// What is known; none before every store had its first complete list.
    pub fn read(&mut self) -> Option<Snapshot> {
        self.api.pods.wait_until_ready().now_or_never()?.ok()?;
        self.namespaces.wait_until_ready().now_or_never()?.ok()?;
        let (mut pods, errors) = by_uid(self.api.pods.state());
        self.ahead.retain(|uid, _| !pods.contains_key(uid));
        pods.extend(self.ahead.iter().map(|(uid, pod)| (uid.clone(), Arc::clone(pod))));
        let pods = pods.into_values().map(|pod| SourcePod { pod: self.inherit(pod), origin: None });
        Some(Snapshot { pods: pods.collect(), errors, incomplete: false, missing_may_run: true })
    }

    /// Tells the catalog what is new about Services. False: not before their lists are complete.
    pub fn feed(&self, catalog: &mut Catalog) -> bool {
        self.services.as_ref().is_some_and(|services| services.feed(catalog))
    }

    /// What goes wrong with the API server now.
    pub fn problems(&self) -> Vec<Problem> {
        self.api.failing().now.values().map(Problem::node).collect()
    }

    /// The pod with what it takes from its namespace.
    pub fn inherit(&self, pod: Arc<Pod>) -> Arc<Pod> {
        let name = pod.metadata.namespace.as_deref().unwrap_or("default");
        match self.namespaces.get(&ObjectRef::new(name)) {
            Some(namespace) => facts::inherit(pod, &namespace.metadata),
            None => pod,
        }
    }

    /// Takes a pod in that the watch may not have told of yet.
    pub fn expect(&mut self, pod: Arc<Pod>) {
        self.ahead.insert(facts::pod_uid(&pod).to_owned(), pod);
    }

    /// Forgets the pods that the watch never told of, but for those of which `alive` says so.
    pub fn forget(&mut self, alive: impl Fn(&str) -> bool) {
        self.ahead.retain(|uid, _| alive(uid));
    }

    /// Tells a pod what is wrong with it; what is no pod's is told to the node.
    pub fn event(&self, problem: &Problem) {
        let object = match &problem.pod {
            Some((name, uid)) => {
                let (namespace, name) = name.split_once('/').unwrap_or(("default", name));
                ObjectReference {
                    kind: Some("Pod".into()),
                    namespace: Some(namespace.into()),
                    uid: Some(uid.clone()),
                    ..node_object(name)
                }
            }
            None => node_object(&self.api.node),
        };
        if let Some(queue) = &self.events
            && queue.try_send((problem.clone(), object)).is_err()
        {
            warn!("too many Events are waiting for the API server; dropped: {problem}");
        }
    }

    /// Sends the Events that wait still, as far as that is possible within a moment.
    pub async fn send_events(&mut self) {
        self.events = None;
        let _ = timeout(2 * ANSWER, &mut self.publisher).await;
    }

    /// Whether Sidestep is being uninstalled, and leaves this node's mesh pods intercepted.
    pub fn leaves_pods_behind(&self) -> bool {
        let is_gone = self.api.daemonset.as_ref().is_some_and(|own| own.is_gone());
        is_gone && self.on_uninstall == OnUninstall::Keep
    }

    /// How often the API server did not do what was asked, by what that was.
    pub fn errors(&self) -> BTreeMap<&'static str, u64> {
        self.api.failing().counts.clone()
    }
}

impl ApiServer {
    fn failing(&self) -> std::sync::MutexGuard<'_, Failing> {
        lock(&self.failing)
    }

    /// The pod of a sandbox, by its name, and by its uid where the runtime tells one: what the
    /// watch told, or else what the API server says now. None: a static pod that the API server has
    /// no mirror of. The kubelet makes that when it can, which may be after it started the pod. No
    /// mesh injects its sidecar into a static pod.
    ///
    /// # Errors
    /// Where the API server doesn't know it, or doesn't answer in time.
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
        // The mirror of an earlier manifest tells as much: that one was in a mesh, or not.
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

    /// What the API server says about a pod now.
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

    /// Tells the node why nothing works there, where the agent can't go on.
    pub async fn tell_node(&self, text: &str) {
        let recorder = recorder(&self.client, &self.node);
        if let Err(error) = tell(&recorder, &Problem::node(text), &node_object(&self.node)).await {
            warn!("{error:#}");
        }
    }

    /// Takes the startup taint off this node. Says whether the node is without it.
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
        // The list is replaced as a whole: somebody else's change meanwhile must not get lost.
        let version = node.metadata.resource_version;
        let patch = json!({"metadata": {"resourceVersion": version}, "spec": {"taints": taints}});
        let patched = nodes.patch(&self.node, &PatchParams::default(), &Patch::Merge(patch)).await;
        patched.map_err(|error| explained("patch", "nodes", &error))?;
        info!(taint = STARTUP_TAINT, node = self.node, "removed the startup taint");
        Ok(())
    }

    /// Why this agent ends for good, if so. Only what says so for sure counts: that the API server
    /// has no such DaemonSet, or that it is being deleted. An answer that is none, such as 401 or
    /// 403, may be the API server's own trouble.
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

/// Makes Events of this node's agent.
fn recorder(client: &Client, node: &str) -> Recorder {
    let reporter = Reporter { controller: "sidestep".into(), instance: Some(node.into()) };
    Recorder::new(client.clone(), reporter)
}

/// What an Event about the node is told to: the uid is what `kubectl describe node` looks for, and
/// what the kubelet's own Events have.
fn node_object(node: &str) -> ObjectReference {
    ObjectReference {
        api_version: Some("v1".into()),
        kind: Some("Node".into()),
        name: Some(node.into()),
        uid: Some(node.into()),
        ..ObjectReference::default()
    }
}

/// Pods by the uid that the node knows them by, and objects that claim another's. What makes an
/// object a static pod's mirror is in its annotations, which anybody writes who may create pods: so
/// a pod whose own uid it is comes first, then the older object.
fn by_uid(mut known: Vec<Arc<Pod>>) -> (BTreeMap<String, Arc<Pod>>, Vec<Problem>) {
    known.sort_by_key(|pod| {
        (facts::static_uid(pod).is_some(), pod.metadata.creation_timestamp.clone())
    });
    let (mut pods, mut errors) = (BTreeMap::<String, Arc<Pod>>::new(), Vec::new());
    for pod in known {
        let uid = facts::pod_uid(&pod).to_owned();
        let Some(first) = pods.get(&uid) else {
            pods.insert(uid, pod);
            continue;
        };
        let first = facts::pod_name(first).unwrap_or_default();
        let text = format!("its annotations name uid {uid:?}, which belongs to pod {first}");
        // Told to the object itself, not to the pod that it claims to be.
        let own = pod.metadata.uid.clone().unwrap_or_default();
        let name = facts::pod_name(&pod).unwrap_or_default();
        let text = format!("pod {name}: {text}: the pod is not intercepted");
        errors.push(Problem { reason: Reason::InvalidPod, pod: Some((name, own)), text });
    }
    (pods, errors)
}

fn lock(failing: &Mutex<Failing>) -> std::sync::MutexGuard<'_, Failing> {
    failing.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Notes that something failed, or that it works.
fn note(failing: &Mutex<Failing>, what: &'static str, error: Option<String>) {
    let mut failing = lock(failing);
    match error {
        Some(error) => {
            *failing.counts.entry(what).or_default() += 1;
            failing.now.insert(what, error);
        }
        None => {
            failing.now.remove(what);
        }
    }
}

/// Follows a watch for ever, and tells of each change. Fails never: errors are noted. A watch that
/// goes on where it was cut off tells nothing before the next change: that no try has failed for
/// long enough is how its end of trouble is known.
pub(super) fn follow<K: 'static>(
    what: &'static str,
    watch: impl Stream<Item = watcher::Result<watcher::Event<K>>> + 'static + Send,
    failing: &Arc<Mutex<Failing>>,
    changed: &mpsc::Sender<()>,
) {
    let (failing, changed) = (Arc::clone(failing), changed.clone());
    task::spawn(async move {
        let watch = watch.default_backoff();
        pin_mut!(watch);
        loop {
            match timeout(QUIET, watch.next()).await {
                Ok(None) => return,
                // A relist is nothing until it is complete.
                Ok(Some(Ok(watcher::Event::Init | watcher::Event::InitApply(_)))) => continue,
                Ok(Some(Ok(_))) | Err(_) => note(&failing, what, None),
                Ok(Some(Err(error))) => note(&failing, what, Some(watch_error(what, &error))),
            }
            // One that is not read yet is enough.
            let _ = changed.try_send(());
        }
    });
}

/// A watch that lists again where the API server has forgotten its version, which it says by 410.
/// To a watcher that is one failure more: after a long absence it would wait for another minute
/// first. And where its start is answered so, it would ask for the same version for ever.
pub(super) fn relisting<K, W>(
    make: impl Fn() -> W,
) -> impl Stream<Item = watcher::Result<watcher::Event<K>>>
where
    W: Stream<Item = watcher::Result<watcher::Event<K>>>,
{
    stream::unfold((Box::pin(make()), make), async |(mut watch, make)| {
        loop {
            match watch.next().await? {
                Err(watcher::Error::WatchStartFailed(kube::Error::Api(status)))
                    if status.code == 410 =>
                {
                    watch = Box::pin(make());
                }
                Err(watcher::Error::WatchError(status)) if status.code == 410 => {}
                event => return Some((event, (watch, make))),
            }
            sleep(RELIST).await;
        }
    })
}

fn watch_error(what: &str, error: &watcher::Error) -> String {
    match error {
        watcher::Error::InitialListFailed(error) => format!("{:#}", explained("list", what, error)),
        watcher::Error::WatchStartFailed(error) | watcher::Error::WatchFailed(error) => {
            format!("{:#}", explained("watch", what, error))
        }
        watcher::Error::WatchError(status) => {
            format!(
                "cannot watch {what}: the API server answered {} ({})",
                status.message, status.code
            )
        }
        watcher::Error::NoResourceVersion => {
            format!("cannot watch {what}: the API server's answer has no resourceVersion")
        }
    }
}

/// An error in words that help: which verb of which resource is not allowed, say.
fn explained(verb: &str, resource: &str, error: &kube::Error) -> anyhow::Error {
    match error {
        kube::Error::Api(status) if status.code == 403 => anyhow!(
            "cannot {verb} {resource}: the API server forbids it; the agent's role needs the verb \
             {verb:?} on {resource:?} ({})",
            status.message
        ),
        kube::Error::Api(status) if status.code == 401 => anyhow!(
            "cannot {verb} {resource}: the API server rejects the agent's token: it has expired, \
             or its service account is gone ({})",
            status.message
        ),
        kube::Error::Api(status) => {
            anyhow!("cannot {verb} {resource}: {} ({})", status.message, status.code)
        }
        // The innermost cause is the one that says something.
        other => {
            let error: &dyn std::error::Error = other;
            let cause = std::iter::successors(Some(error), |error| error.source()).last();
            let cause = cause.map(ToString::to_string).unwrap_or_default();
            anyhow!("cannot {verb} {resource}: cannot reach the API server: {cause}")
        }
    }
}

async fn client(config: &Config) -> Result<Client> {
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

/// A client with an end to waiting. An API server that took a request and has died since, without a
/// word, would else be waited for as long as the agent lives. It is not kube's own client, which does
/// not ask whether a connection is alive, and which tries again for minutes where the API server says
/// 429 or 503, and tells nobody.
fn limited(config: kube::Config, silence: Duration) -> kube::Result<Client> {
    let mut tcp = HttpConnector::new();
    tcp.enforce_http(false);
    tcp.set_keepalive(Some(ALIVE));
    tcp.set_keepalive_interval(Some(ALIVE_AGAIN));
    tcp.set_keepalive_retries(Some(4));
    let mut connector = TimeoutConnector::new(config.rustls_https_connector_with_connector(tcp)?);
    connector.set_connect_timeout(config.connect_timeout);
    connector.set_read_timeout(Some(silence));
    // Counted from the request on, not from when its connection was last used.
    connector.set_reset_reader_on_write(true);
    let service = ServiceBuilder::new()
        .layer(config.base_uri_layer())
        .option_layer(config.auth_layer()?)
        .map_err(BoxError::from)
        .service(HttpClient::builder(TokioExecutor::new()).build(connector));
    Ok(ClientBuilder::new(service, config.default_namespace).build())
}

/// A node of another name than the API server's has no pods: better said at once.
async fn find_node(client: &Client, name: &str) -> Result<()> {
    let api = Api::<Node>::all(client.clone());
    match timeout(ANSWER, api.get_metadata_opt(name)).await {
        Ok(Ok(None)) => bail!("the API server has no node {name:?} (--node-name)"),
        Ok(Ok(Some(_))) => info!(node = name, "node found in the API server"),
        Ok(Err(error)) => warn!("{:#}", explained("get", "nodes", &error)),
        Err(_) => warn!("the API server does not answer; trying again"),
    }
    Ok(())
}

async fn publish(
    recorder: Recorder,
    mut queue: mpsc::Receiver<(Problem, ObjectReference)>,
    failing: Arc<Mutex<Failing>>,
) {
    while let Some((problem, object)) = queue.recv().await {
        let sent = tell(&recorder, &problem, &object).await;
        note(&failing, "events", sent.err().map(|error| format!("{error:#}")));
    }
}

/// Makes an Event of a problem.
async fn tell(recorder: &Recorder, problem: &Problem, object: &ObjectReference) -> Result<()> {
    let event = Event {
        type_: EventType::Warning,
        reason: problem.reason.name().into(),
        note: Some(note_of(&problem.text)),
        action: "Intercept".into(),
        secondary: None,
    };
    match timeout(ANSWER, recorder.publish(&event, object)).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => Err(explained(verb_of(&error), "events", &error)),
        Err(_) => bail!("cannot create events: the API server does not answer"),
    }
}

/// What publishing did: one more Event, or the same once more.
fn verb_of(error: &kube::Error) -> &'static str {
    match error {
        kube::Error::Api(status) if status.message.contains("cannot patch") => "patch",
        _ => "create",
    }
}

/// What an Event has room for; the log has it all.
fn note_of(text: &str) -> String {
    text::cut(text, NOTE, " ... (the rest is in the agent's log)")
}

/// Drops what [`facts::facts`] and the search for namespaces don't look at: a Pod object is some
/// 10 KB, most of it volumes, probes and conditions.
fn keep_needed(pod: &mut Pod) {
    let meta = &mut pod.metadata;
    meta.managed_fields = None;
    meta.owner_references = None;
    meta.finalizers = None;
    if let Some(annotations) = &mut meta.annotations {
        annotations.remove("kubectl.kubernetes.io/last-applied-configuration");
    }
    if let Some(spec) = pod.spec.take() {
        let slim =
            |containers: Vec<Container>| containers.into_iter().map(keep_container).collect();
        pod.spec = Some(PodSpec {
            host_network: spec.host_network,
            init_containers: spec.init_containers.map(slim),
            containers: slim(spec.containers),
            ..PodSpec::default()
        });
    }
    if let Some(status) = pod.status.take() {
        pod.status =
            Some(PodStatus { phase: status.phase, pod_ips: status.pod_ips, ..Default::default() });
    }
}

fn keep_container(container: Container) -> Container {
    Container {
        name: container.name,
        args: container.args,
        env: container
            .env
            .map(|env| env.into_iter().filter(|one| facts::reads_env(&one.name)).collect()),
        restart_policy: container.restart_policy,
        security_context: container.security_context,
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use serde_json::json;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_watch_that_goes_on_where_it_was_is_no_problem_for_long() {
        let failing = Arc::new(Mutex::new(Failing::default()));
        let (changed, mut told) = mpsc::channel(1);
        let cut = watcher::Error::NoResourceVersion;
        let watch = stream::iter([Err::<watcher::Event<Pod>, _>(cut)]).chain(stream::pending());
        follow("pods", watch, &failing, &changed);
        told.recv().await.expect("told");
        assert_eq!(lock(&failing).now.len(), 1);
        told.recv().await.expect("told");
        assert!(lock(&failing).now.is_empty());
        assert_eq!(lock(&failing).counts["pods"], 1);
    }

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

    #[test]
    fn what_is_dropped_changes_no_facts() {
        let pod = json!({
            "metadata": {
                "name": "p", "namespace": "n", "uid": "u", "resourceVersion": "1",
                "labels": {"sidecar.istio.io/inject": "true"},
                "annotations": {
                    "sidecar.istio.io/status": "{}",
                    "kubectl.kubernetes.io/last-applied-configuration": "x".repeat(4000),
                    "traffic.sidecar.istio.io/excludeOutboundPorts": "25",
                },
                "managedFields": [{"manager": "kubelet", "operation": "Update", "fieldsType": "FieldsV1",
                                   "fieldsV1": {"f:status": {}}}],
                "ownerReferences": [{"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "r", "uid": "x"}],
            },
            "spec": {
                "hostNetwork": false, "nodeName": "here",
                "volumes": [{"name": "v", "emptyDir": {}}],
                "initContainers": [{
                    "name": "istio-proxy", "image": "i", "restartPolicy": "Always",
                    "args": ["proxy", "sidecar"],
                    "env": [{"name": "ISTIO_META_DNS_CAPTURE", "value": "true"},
                            {"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}],
                    "securityContext": {"runAsUser": 1400},
                }],
                "containers": [{"name": "app", "image": "i", "volumeMounts": [{"name": "v", "mountPath": "/v"}]}],
            },
            "status": {
                "phase": "Running", "podIPs": [{"ip": "10.0.0.1"}],
                "conditions": [{"type": "Ready", "status": "True"}],
            },
        });
        let whole: Pod = serde_json::from_value(pod).expect("a pod");
        let mut slim = whole.clone();
        keep_needed(&mut slim);
        let facts = facts::facts(&whole).expect("facts").expect("in a mesh");
        assert_eq!(facts.facts.proxy_uid, Some(1400));
        assert_eq!(facts.facts.dns_port, Some(15053));
        assert_eq!(facts::facts(&slim).expect("facts"), Some(facts));
        let size = |pod: &Pod| serde_json::to_string(pod).expect("JSON").len();
        assert!(size(&slim) * 4 < size(&whole), "{} of {}", size(&slim), size(&whole));
    }

    #[test]
    fn a_note_says_where_the_rest_is() {
        assert_eq!(note_of("short"), "short");
        let note = note_of(&"\u{e4}".repeat(NOTE));
        assert!(note.len() <= NOTE && note.ends_with("in the agent's log)"), "{}", note.len());
    }
}
