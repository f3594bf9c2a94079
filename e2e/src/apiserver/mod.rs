//! A small API server that speaks the real protocol over plain HTTP: lists and watches with
//! selectors, pages, bookmarks and expiry, metadata alone, writes, and failures as `Status`
//! objects. What it keeps is in memory, and a test may do to it what happens to real ones.

mod kind;
mod requests;
mod selector;
mod status;
mod store;
#[cfg(test)]
mod tests;
mod watch;

use std::collections::BTreeSet;
use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result, ensure};
use axum::Router;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::runtime;
use tokio::sync::mpsc as commands;
use tokio::sync::watch::Sender;

pub use kind::{KINDS, Kind};
use store::{Key, Store, merge};

/// The token of the only user.
const TOKEN: &str = "e2e-token";
/// The name of the only user, as failures give it.
const USER: &str = "system:serviceaccount:sidestep-system:sidestep";

/// A request that came, for assertions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// `GET` and the like.
    pub method: String,
    /// The path, without the query.
    pub path: String,
    /// The query, as it came; empty when there was none.
    pub query: String,
}

/// How a watch that begins at a version too old for the server is told so.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Gone {
    /// By an `ERROR` event: that is what today's servers do.
    #[default]
    Event,
    /// By the HTTP status, as the protocol also allows.
    Status,
}

pub(crate) struct Shared {
    store: Mutex<Store>,
    /// Told of each change.
    changed: Sender<()>,
    requests: Mutex<Vec<Request>>,
    /// Verb and resource.
    forbidden: Mutex<BTreeSet<(String, String)>>,
    gone: Mutex<Gone>,
}

impl Shared {
    fn store(&self) -> MutexGuard<'_, Store> {
        self.store.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn gone(&self) -> MutexGuard<'_, Gone> {
        self.gone.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change<T>(&self, change: impl FnOnce(&mut Store) -> T) -> T {
        let result = change(&mut self.store());
        self.changed.send_replace(());
        result
    }
}

enum Command {
    Stop(mpsc::Sender<()>),
    Resume(mpsc::Sender<Result<()>>),
}

/// A running server. It ends on drop.
pub struct ApiServer {
    shared: Arc<Shared>,
    addr: SocketAddr,
    commands: Option<commands::UnboundedSender<Command>>,
    thread: Option<JoinHandle<()>>,
}

impl ApiServer {
    /// Starts a server with the namespaces `default` and `kube-system`, in the network namespace
    /// of the calling thread. A port 0 means any.
    pub fn start(addr: SocketAddr) -> Result<Self> {
        let shared = Arc::new(Shared {
            store: Mutex::new(Store::new()),
            changed: Sender::new(()),
            requests: Mutex::default(),
            forbidden: Mutex::default(),
            gone: Mutex::default(),
        });
        let (commands, received) = commands::unbounded_channel();
        let (report, ready) = mpsc::channel();
        let theirs = shared.clone();
        // A thread of its own, which stays in that namespace for as long as the server is used.
        let thread = thread::Builder::new()
            .name("apiserver".to_owned())
            .spawn(move || serve(addr, theirs, received, report))
            .context("starting a thread")?;
        let addr = ready.recv().context("the server's thread ended")??;
        let server = Self { shared, addr, commands: Some(commands), thread: Some(thread) };
        for name in ["default", "kube-system"] {
            server.put(json!({
                "apiVersion": "v1",
                "kind": "Namespace",
                "metadata": {"name": name},
            }))?;
        }
        Ok(server)
    }

    /// Where it listens.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Creates an object or replaces it whole, its status included, and gives it as it is then.
    /// Fails when kind or name are missing, or the namespace of what has one.
    pub fn put(&self, object: Value) -> Result<Value> {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let (version, name) = (text(&object["apiVersion"]), text(&object["kind"]));
        let kind = Kind::of(&version, &name)
            .with_context(|| format!("the API server has no {name:?} of {version:?}"))?;
        let metadata = &object["metadata"];
        let key = key(kind, &text(&metadata["namespace"]), &text(&metadata["name"]))?;
        let object = requests::with_defaults(kind, &key.name, object);
        Ok(self.shared.change(|store| store.write(key, object)))
    }

    /// Applies a JSON merge patch to an object, also to its status. `resource` is `pods`,
    /// `daemonsets.apps` and the like; the namespace of what has none is empty.
    pub fn patch(
        &self,
        resource: &str,
        namespace: &str,
        name: &str,
        patch: &Value,
    ) -> Result<Value> {
        let key = key(named(resource)?, namespace, name)?;
        self.shared.change(|store| {
            let mut object = store
                .get(&key)
                .cloned()
                .with_context(|| format!("there is no {resource} {namespace}/{name}"))?;
            merge(&mut object, patch);
            Ok(store.write(key, object))
        })
    }

    /// Deletes an object at once, without grace, and gives it as it was last.
    pub fn delete(&self, resource: &str, namespace: &str, name: &str) -> Result<Value> {
        let key = key(named(resource)?, namespace, name)?;
        self.shared
            .change(|store| store.remove(&key))
            .with_context(|| format!("there is no {resource} {namespace}/{name}"))
    }

    /// An object as it is, if there is one. Fails for a resource that the server doesn't have.
    pub fn get(&self, resource: &str, namespace: &str, name: &str) -> Result<Option<Value>> {
        let key = key(named(resource)?, namespace, name)?;
        Ok(self.shared.store().get(&key).cloned())
    }

    /// All objects of a resource, in the order of their namespaces and names.
    pub fn list(&self, resource: &str) -> Result<Vec<Value>> {
        let kind = named(resource)?;
        let store = self.shared.store();
        Ok(store.list(kind, store.version()).into_values().collect())
    }

    /// Stops serving: open connections are cut and new ones refused. Objects stay.
    pub fn stop(&self) -> Result<()> {
        let (report, done) = mpsc::channel();
        self.command(Command::Stop(report))?;
        done.recv().context("the server has stopped already")
    }

    /// Serves again on the same port. Fails when it is taken.
    pub fn resume(&self) -> Result<()> {
        let (report, done) = mpsc::channel();
        self.command(Command::Resume(report))?;
        done.recv().context("the server runs already")?
    }

    fn command(&self, command: Command) -> Result<()> {
        let sent = self.commands.as_ref().is_some_and(|commands| commands.send(command).is_ok());
        ensure!(sent, "the API server's thread has ended");
        Ok(())
    }

    /// Forgets all older resource versions. Running watches end with an `ERROR` event, 410 Gone;
    /// from now on new ones that begin at an older version are told so as `gone` says.
    pub fn compact(&self, gone: Gone) {
        *self.shared.gone() = gone;
        self.shared.change(Store::compact);
    }

    /// All requests so far, in the order of their coming.
    pub fn requests(&self) -> Vec<Request> {
        self.shared.requests.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Forgets the requests so far.
    pub fn clear_requests(&self) {
        self.shared.requests.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// From now on answers such requests with 403. The words are those of RBAC rules: `list` and
    /// `pods`, `patch` and `pods/status`.
    pub fn forbid(&self, verb: &str, resource: &str) {
        self.rules().insert((verb.to_owned(), resource.to_owned()));
    }

    /// Takes [`ApiServer::forbid`] back.
    pub fn allow(&self, verb: &str, resource: &str) {
        self.rules().remove(&(verb.to_owned(), resource.to_owned()));
    }

    fn rules(&self) -> MutexGuard<'_, BTreeSet<(String, String)>> {
        self.shared.forbidden.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A kubeconfig for this server, as JSON, which is YAML too.
    pub fn kubeconfig(&self) -> Value {
        json!({
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "e2e", "cluster": {"server": format!("http://{}", self.addr)}}],
            "users": [{"name": "e2e", "user": {"token": TOKEN}}],
            "contexts": [{"name": "e2e", "context": {"cluster": "e2e", "user": "e2e"}}],
            "current-context": "e2e",
        })
    }

    /// Writes [`ApiServer::kubeconfig`] to a file.
    pub fn write_kubeconfig(&self, path: &Path) -> Result<()> {
        fs::write(path, format!("{:#}\n", self.kubeconfig()))
            .with_context(|| format!("writing {}", path.display()))
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        self.commands = None;
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            eprintln!("e2e: the API server on {} panicked", self.addr);
        }
    }
}

fn named(resource: &str) -> Result<&'static Kind> {
    KINDS
        .iter()
        .find(|kind| kind.to_string() == resource)
        .with_context(|| format!("the API server has no resource {resource:?}"))
}

fn key(kind: &'static Kind, namespace: &str, name: &str) -> Result<Key> {
    ensure!(!name.is_empty(), "{kind} without a name");
    ensure!(
        kind.namespaced != namespace.is_empty(),
        "{kind} {name:?}: the namespace is {namespace:?}"
    );
    Ok(Key { kind, namespace: namespace.to_owned(), name: name.to_owned() })
}

fn serve(
    addr: SocketAddr,
    shared: Arc<Shared>,
    mut commands: commands::UnboundedReceiver<Command>,
    report: mpsc::Sender<Result<SocketAddr>>,
) {
    let app = Router::new().fallback(requests::handle).with_state(shared);
    let (mut bound, addr) = match bind(addr) {
        Ok((runtime, listener, addr)) => (Some((runtime, listener)), addr),
        Err(err) => {
            let _ = report.send(Err(err));
            return;
        }
    };
    let _ = report.send(Ok(addr));
    loop {
        if let Some((runtime, listener)) = bound.take() {
            let command = runtime.block_on(async {
                tokio::select! {
                    _ = axum::serve(listener, app.clone()) => None,
                    command = commands.recv() => command,
                }
            });
            // Takes all connections with it.
            drop(runtime);
            match command {
                None => return,
                Some(Command::Stop(report)) => drop(report.send(())),
                Some(Command::Resume(_)) => {}
            }
        }
        match commands.blocking_recv() {
            None => return,
            Some(Command::Stop(_)) => {}
            Some(Command::Resume(report)) => {
                let result = bind(addr).map(|(runtime, listener, _)| {
                    bound = Some((runtime, listener));
                });
                let _ = report.send(result);
            }
        }
    }
}

fn bind(addr: SocketAddr) -> Result<(runtime::Runtime, TcpListener, SocketAddr)> {
    let runtime = runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("making the API server's runtime")?;
    let listener = runtime
        .block_on(TcpListener::bind(addr))
        .with_context(|| format!("the API server listening on {addr}"))?;
    let addr = listener.local_addr()?;
    Ok((runtime, listener, addr))
}
