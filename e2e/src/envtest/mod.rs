//! A real etcd and a real kube-apiserver, as processes on loopback: what the field calls envtest.
//! There is no kubelet, no scheduler and no controller: a test plays their parts.

mod account;
mod kube_proxy;
mod part;
mod proxy;

use std::fs;
use std::future::Future;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, mpsc};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use hyper::Request;
use kube::api::{
    Api, ApiResource, DeleteParams, DynamicObject, ListParams, Patch, PatchParams, PostParams,
};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config, Resource};
use nix::sched::{CloneFlags, setns};
use nix::sys::signal::Signal;
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrIn, bind, getsockname, setsockopt, socket, sockopt,
};
use serde::Deserialize;
use serde_json::{Value, json};
use sidestep_lab::{slowdown, wait_for, wait_until};
use tokio::runtime::{self, Handle};
use tokio::sync::oneshot;
use tokio::time::timeout;

pub use kube_proxy::{KubeProxy, Mode};
use part::Part;
pub use proxy::Proxy;

/// How long a server may take to start or to end.
const START: Duration = Duration::from_secs(60);
/// How long one answer may take.
const ANSWER: Duration = Duration::from_secs(15);
/// The token of the cluster's administrator.
const ADMIN: &str = "admin-token";
/// Who signs the tokens of service accounts.
const ISSUER: &str = "https://kubernetes.default.svc";
/// One event for each request of a service account, when it arrives.
const AUDIT: &str = "apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [ResponseStarted, ResponseComplete, Panic]
rules:
  - level: Metadata
    userGroups: [system:serviceaccounts]
  - level: None
";

/// A request of a service account, as the API server has written it down.
#[derive(Clone, Debug, Deserialize)]
pub struct Asked {
    /// `list`, `watch` and the like.
    pub verb: String,
    /// The path with the query.
    #[serde(rename = "requestURI")]
    pub uri: String,
    user: User,
}

#[derive(Clone, Debug, Deserialize)]
struct User {
    username: String,
}

/// A running etcd with its API server, or one that is down. On drop both are killed, and what they
/// wrote is removed; the same happens when this process ends in any other way.
pub struct Envtest {
    // Dropped in this order.
    api: Mutex<Option<Part>>,
    _etcd: Part,
    client: Client,
    handle: Handle,
    /// Ends the runtime's thread when it is dropped.
    _end: oneshot::Sender<()>,
    address: SocketAddr,
    /// Keeps the port from others, also while the server is down.
    _port: OwnedFd,
    dir: PathBuf,
    netns: Option<PathBuf>,
}

impl Envtest {
    /// Starts both on this machine's loopback, and waits until the API server is ready. For tests
    /// that stop the server, or starve it; others take [`Envtest::shared`].
    pub fn start() -> Result<Arc<Self>> {
        Self::start_on(None, Ipv4Addr::LOCALHOST)
    }

    /// The same in a network namespace, which is dropped after this, on that address of its own.
    pub fn start_in(netns: &Path, ip: Ipv4Addr) -> Result<Arc<Self>> {
        Self::start_on(Some(netns.to_owned()), ip)
    }

    /// One for all tests of this process. Each has a name of its own for all that it makes.
    pub fn shared() -> Result<Arc<Self>> {
        static SHARED: OnceLock<Result<Arc<Envtest>>> = OnceLock::new();
        let shared = SHARED.get_or_init(Self::start).as_ref();
        shared.map(Arc::clone).map_err(|err| anyhow!("{err:#}"))
    }

    fn start_on(netns: Option<PathBuf>, ip: Ipv4Addr) -> Result<Arc<Self>> {
        let dir = tempfile::Builder::new().prefix("sidestep-envtest-").tempdir()?;
        // From here on the keeper of etcd removes it.
        let dir = dir.keep();
        fs::write(dir.join("tokens.csv"), format!("{ADMIN},admin,admin,system:masters\n"))?;
        fs::write(dir.join("audit.yaml"), AUDIT)?;
        fs::write(dir.join("audit.log"), "")?;
        let key = dir.join("accounts.key").to_string_lossy().into_owned();
        let genpkey = ["openssl", "genpkey", "-quiet", "-algorithm", "RSA", "-out", &key];
        sidestep_lab::feed(&genpkey, "").context("making the key of service accounts")?;
        let etcd = start_etcd(&dir)?;

        let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
        let handle = runtime.handle().clone();
        let (_end, end) = oneshot::channel::<()>();
        let (entered, reserved) = mpsc::channel();
        let theirs = netns.clone();
        // It stays in that namespace for as long as the server is used.
        thread::Builder::new().name("envtest".to_owned()).spawn(move || {
            let _ = entered.send(enter(theirs.as_deref()).and_then(|()| reserve_port(ip)));
            let _ = runtime.block_on(end);
        })?;
        let (port, address) = reserved.recv().context("a thread has ended")??;

        let mut api = start_api(&dir, netns.as_deref(), address)?;
        let client = connect(&handle, &dir, address, &mut api)?;
        let api = Mutex::new(Some(api));
        let server =
            Self { api, _etcd: etcd, client, handle, _end, address, _port: port, dir, netns };
        server.wait_ready()?;
        Ok(Arc::new(server))
    }

    /// Where the API server listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// SIGTERM, and waits for the end. Nothing listens then.
    pub fn stop(&self) -> Result<()> {
        self.end(Signal::SIGTERM)
    }

    /// SIGKILL, and waits for the end.
    pub fn kill(&self) -> Result<()> {
        self.end(Signal::SIGKILL)
    }

    fn end(&self, signal: Signal) -> Result<()> {
        let mut api = self.lock().take().context("the API server is down already")?;
        api.signal(signal)?;
        wait_until("the end of the API server", START, || !api.is_running())
            .with_context(|| api.log_tail())
    }

    /// Starts it again at the same address, and waits until it is ready.
    pub fn resume(&self) -> Result<()> {
        let api = start_api(&self.dir, self.netns.as_deref(), self.address)?;
        *self.lock() = Some(api);
        self.wait_ready()
    }

    /// SIGSTOP: connections are taken, and nothing is answered until [`Envtest::go_on`].
    pub fn freeze(&self) -> Result<()> {
        self.signal(Signal::SIGSTOP)
    }

    /// SIGCONT.
    pub fn go_on(&self) -> Result<()> {
        self.signal(Signal::SIGCONT)
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        self.lock().as_ref().context("the API server is down")?.signal(signal)
    }

    fn lock(&self) -> MutexGuard<'_, Option<Part>> {
        self.api.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait_ready(&self) -> Result<()> {
        wait_for("the API server to be ready", START, || {
            let mut api = self.lock();
            let api = api.as_mut()?;
            if !api.is_running() {
                return Some(Err(anyhow!("it has ended; {}", api.log_tail())));
            }
            let ready = Request::get("/readyz").body(Vec::new()).ok()?;
            self.ask(async move |client| client.request_text(ready).await).ok().map(|_| Ok(()))
        })?
    }

    /// Makes etcd forget all but the last revision, as the API server itself does every five
    /// minutes.
    pub fn compact(&self) -> Result<()> {
        let socket = self.dir.join("etcd.sock");
        let now = etcd(&socket, "range", &json!({"key": "AA=="}))?;
        let revision = now["header"]["revision"].as_str().context("etcd's answer")?;
        etcd(&socket, "compaction", &json!({"revision": revision, "physical": true})).map(drop)
    }

    /// What service accounts of that name, in the namespace of that name, have asked for so far.
    pub fn asked(&self, name: &str) -> Result<Vec<Asked>> {
        let text = fs::read_to_string(self.dir.join("audit.log")).context("the audit log")?;
        let user = account::user(name);
        let mut all = Vec::new();
        for line in text.lines() {
            let asked: Asked = serde_json::from_str(line).context("a line of the audit log")?;
            if asked.user.username == user {
                all.push(asked);
            }
        }
        Ok(all)
    }

    /// Creates an object, with its status where it has one, and gives it as it is then.
    pub fn create(&self, object: Value) -> Result<Value> {
        let status = object["status"].clone();
        let object: DynamicObject = serde_json::from_value(object).context("an object")?;
        let types = object.types.clone().context("an object without a kind")?;
        let kind = ApiResource::from_gvk(&(&types).try_into().context("its apiVersion")?);
        let namespace = object.metadata.namespace.clone().unwrap_or_default();
        let what = format!("creating {} {:?}", types.kind, object.metadata.name);
        let created = self
            .ask(async move |client| {
                let api = dynamic(client, &namespace, &kind);
                let created = api.create(&PostParams::default(), &object).await?;
                let name = created.metadata.name.clone().unwrap_or_default();
                if status.is_null() {
                    return Ok(created);
                }
                let patch = Patch::Merge(json!({"status": status}));
                api.patch_status(&name, &PatchParams::default(), &patch).await
            })
            .context(what)?;
        Ok(serde_json::to_value(created)?)
    }

    /// Applies a JSON merge patch to an object; the namespace of what has none is empty.
    pub fn patch<K>(&self, namespace: &str, name: &str, patch: &Value) -> Result<()>
    where
        K: Resource<DynamicType = ()>,
    {
        self.write::<K>(namespace, name, patch, false)
    }

    /// The same with its status.
    pub fn patch_status<K>(&self, namespace: &str, name: &str, status: Value) -> Result<()>
    where
        K: Resource<DynamicType = ()>,
    {
        self.write::<K>(namespace, name, &json!({"status": status}), true)
    }

    fn write<K>(&self, namespace: &str, name: &str, patch: &Value, status: bool) -> Result<()>
    where
        K: Resource<DynamicType = ()>,
    {
        let (kind, patch) = (ApiResource::erase::<K>(&()), Patch::Merge(patch.clone()));
        let what = format!("patching {} {namespace}/{name}", kind.kind);
        let (namespace, name) = (namespace.to_owned(), name.to_owned());
        self.ask(async move |client| {
            let (api, params) = (dynamic(client, &namespace, &kind), PatchParams::default());
            match status {
                true => api.patch_status(&name, &params, &patch).await.map(drop),
                false => api.patch(&name, &params, &patch).await.map(drop),
            }
        })
        .context(what)
    }

    /// Deletes an object at once, as a kubelet does with a pod that has ended.
    pub fn delete<K: Resource<DynamicType = ()>>(&self, namespace: &str, name: &str) -> Result<()> {
        self.end_of::<K>(namespace, name, DeleteParams::default().grace_period(0))
    }

    /// Deletes an object as users do: a pod has time to end, and then somebody has to delete it.
    pub fn ask_to_end<K>(&self, namespace: &str, name: &str) -> Result<()>
    where
        K: Resource<DynamicType = ()>,
    {
        self.end_of::<K>(namespace, name, DeleteParams::default())
    }

    fn end_of<K>(&self, namespace: &str, name: &str, params: DeleteParams) -> Result<()>
    where
        K: Resource<DynamicType = ()>,
    {
        let kind = ApiResource::erase::<K>(&());
        let what = format!("deleting {} {namespace}/{name}", kind.kind);
        let (namespace, name) = (namespace.to_owned(), name.to_owned());
        self.ask(async move |client| {
            dynamic(client, &namespace, &kind).delete(&name, &params).await.map(drop)
        })
        .context(what)
    }

    /// All objects of a kind in a namespace.
    pub fn list<K: Resource<DynamicType = ()>>(&self, namespace: &str) -> Result<Vec<Value>> {
        let kind = ApiResource::erase::<K>(&());
        let what = format!("listing {} of {namespace:?}", kind.plural);
        let namespace = namespace.to_owned();
        let listed = self.ask(async move |client| {
            dynamic(client, &namespace, &kind).list(&ListParams::default()).await
        });
        let items = listed.context(what)?.items.into_iter();
        Ok(items.map(serde_json::to_value).collect::<Result<_, _>>()?)
    }

    /// Asks the API server as the cluster's administrator.
    pub fn ask<T, F>(&self, ask: impl FnOnce(Client) -> F + Send + 'static) -> Result<T>
    where
        T: Send + 'static,
        F: Future<Output = kube::Result<T>> + Send + 'static,
    {
        let client = self.client.clone();
        run_on(&self.handle, async move { timeout(ANSWER * slowdown(), ask(client)).await })?
            .context("the API server does not answer")?
            .map_err(Into::into)
    }

    /// A kubeconfig with the token that is in this file, as the service account of a pod has it.
    pub fn kubeconfig(&self, token_file: &Path) -> Value {
        kubeconfig(&https(&self.dir, self.address), &json!({"tokenFile": token_file}))
    }
}

fn dynamic(client: Client, namespace: &str, kind: &ApiResource) -> Api<DynamicObject> {
    match namespace {
        "" => Api::all_with(client, kind),
        _ => Api::namespaced_with(client, namespace, kind),
    }
}

/// Runs a future in the server's own thread, and waits for its value.
fn run_on<T: Send + 'static>(
    handle: &Handle,
    future: impl Future<Output = T> + Send + 'static,
) -> Result<T> {
    let (report, done) = mpsc::channel();
    handle.spawn(async move { report.send(future.await) });
    done.recv().context("the thread of the server's clients has ended")
}

fn enter(netns: Option<&Path>) -> Result<()> {
    let Some(path) = netns else { return Ok(()) };
    let file = fs::File::open(path).with_context(|| format!("opening {}", path.display()))?;
    setns(file, CloneFlags::CLONE_NEWNET).with_context(|| format!("entering {}", path.display()))
}

/// A port that nobody else gets: bound, not listened on, and to be shared with the
/// API server.
fn reserve_port(ip: Ipv4Addr) -> Result<(OwnedFd, SocketAddr)> {
    let held = socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    setsockopt(&held, sockopt::ReusePort, &true)?;
    bind(held.as_raw_fd(), &SockaddrIn::from(SocketAddrV4::new(ip, 0)))
        .context("looking for a free port")?;
    let port = getsockname::<SockaddrIn>(held.as_raw_fd())?.port();
    Ok((held, SocketAddr::from((ip, port))))
}

/// A program of Kubernetes.
fn program(name: &str) -> Result<PathBuf> {
    let path = sidestep_lab::lab_dir().join("parts/bin").join(name);
    let how = format!("run e2e/cluster/parts.sh {name}, which builds it");
    ensure!(path.is_file(), "there is no {}: {how}", path.display());
    Ok(path)
}

fn start_etcd(dir: &Path) -> Result<Part> {
    let socket = dir.join("etcd.sock");
    let at = |name: &str| dir.join(name).to_string_lossy().into_owned();
    let flags = [
        ("data-dir", &*at("etcd")),
        ("listen-client-urls", &format!("unix://{}", socket.display())),
        ("listen-peer-urls", &format!("unix://{}", at("peer.sock"))),
        // It takes no path of a file for these two, and nobody uses them.
        ("advertise-client-urls", "http://localhost:2379"),
        ("initial-advertise-peer-urls", "http://localhost:2380"),
        // Nothing of it outlives this process.
        ("unsafe-no-fsync", "true"),
        ("log-level", "warn"),
    ];
    let mut etcd = Part::start(&program("etcd")?, &flags, None, dir, Some(dir))?;
    wait_for("etcd to listen", START, || match etcd.is_running() {
        true => socket.exists().then_some(Ok(())),
        false => Some(Err(anyhow!("it has ended; {}", etcd.log_tail()))),
    })??;
    Ok(etcd)
}

fn start_api(dir: &Path, netns: Option<&Path>, address: SocketAddr) -> Result<Part> {
    let at = |name: &str| dir.join(name).to_string_lossy().into_owned();
    let flags = [
        ("etcd-servers", &*format!("unix://{}", at("etcd.sock"))),
        ("bind-address", &address.ip().to_string()),
        ("secure-port", &address.port().to_string()),
        ("permit-port-sharing", "true"),
        ("cert-dir", &at("certificates")),
        ("service-account-issuer", ISSUER),
        ("service-account-key-file", &at("accounts.key")),
        ("service-account-signing-key-file", &at("accounts.key")),
        ("service-cluster-ip-range", "10.96.0.0/16,fd96::/108"),
        ("token-auth-file", &at("tokens.csv")),
        ("authorization-mode", "RBAC"),
        // Nobody makes the namespaces' own accounts here.
        ("disable-admission-plugins", "ServiceAccount"),
        ("endpoint-reconciler-type", "none"),
        ("audit-policy-file", &at("audit.yaml")),
        ("audit-log-path", &at("audit.log")),
        ("profiling", "false"),
        // Else a server that is to end waits a minute for watches.
        ("shutdown-watch-termination-grace-period", "5s"),
    ];
    Part::start(&program("kube-apiserver")?, &flags, netns, dir, None)
}

/// The administrator's client. The server makes its own certificate when it starts for the first
/// time.
fn connect(handle: &Handle, dir: &Path, address: SocketAddr, api: &mut Part) -> Result<Client> {
    let certificate = dir.join("certificates/apiserver.crt");
    wait_for("the API server's certificate", START, || match api.is_running() {
        true => {
            let text = fs::read_to_string(&certificate).unwrap_or_default();
            text.ends_with("-----END CERTIFICATE-----\n").then_some(Ok(()))
        }
        false => Some(Err(anyhow!("it has ended; {}", api.log_tail()))),
    })??;
    client(handle, kubeconfig(&https(dir, address), &json!({"token": ADMIN})))
}

fn client(handle: &Handle, kubeconfig: Value) -> Result<Client> {
    let file: Kubeconfig = serde_json::from_value(kubeconfig).context("a kubeconfig")?;
    run_on(handle, async move {
        let config = Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await?;
        Client::try_from(config).context("making a client of the API server")
    })?
}

/// The API server as a cluster of a kubeconfig.
fn https(dir: &Path, address: SocketAddr) -> Value {
    let authority = dir.join("certificates/apiserver.crt");
    json!({"server": format!("https://{address}"), "certificate-authority": authority})
}

/// A kubeconfig, as JSON, which is YAML too.
fn kubeconfig(cluster: &Value, user: &Value) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "envtest", "cluster": cluster}],
        "users": [{"name": "envtest", "user": user}],
        "contexts": [{"name": "envtest", "context": {"cluster": "envtest", "user": "envtest"}}],
        "current-context": "envtest",
    })
}

/// A call of etcd's v3 API, by its JSON gateway.
fn etcd(socket: &Path, call: &str, body: &Value) -> Result<Value> {
    let mut stream = UnixStream::connect(socket).context("connecting to etcd")?;
    let body = body.to_string();
    write!(
        stream,
        "POST /v3/kv/{call} HTTP/1.0\r\nHost: localhost\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    let Some((head, body)) = text.split_once("\r\n\r\n") else { bail!("no HTTP: {text:?}") };
    ensure!(head.contains(" 200 "), "etcd's {call}: {head:?}: {body}");
    serde_json::from_str(body).with_context(|| format!("etcd's answer {body:?}"))
}
