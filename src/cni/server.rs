//! The agent's side of the plugin's socket.

use std::{
    fs,
    io::ErrorKind,
    os::unix::fs::{DirBuilderExt, PermissionsExt},
    path::Path,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use k8s_openapi::api::core::v1::Pod;
use nix::unistd::geteuid;
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{UnixListener, UnixStream},
    sync::{Semaphore, mpsc, oneshot},
    task,
    time::timeout,
};
use tracing::{debug, warn};

use super::{Reply, Request};
use crate::source::kubernetes::ApiServer;

/// The maximum length of a request, which is one line.
const LONGEST: u64 = 64 << 10;
/// The maximum of simultaneous connections; each takes a descriptor.
const CONNECTIONS: usize = 256;
/// The time limit for the plugin's request.
const PATIENCE: Duration = Duration::from_secs(10);

/// A request, and the pod that it concerns, if any.
#[derive(Debug)]
pub struct Asked {
    /// The request.
    pub request: Request,
    /// The pod from the API server; `None` if it has none yet, and the pod is in no mesh.
    pub pod: Option<Arc<Pod>>,
    /// The channel for the answer.
    pub answer: oneshot::Sender<Reply>,
}

/// Listens on a socket that only root can use, and passes requests on.
///
/// # Errors
/// If the socket cannot be made.
pub fn serve(socket: &Path, api: ApiServer, asked: mpsc::Sender<Asked>) -> Result<()> {
    let listener = listen(socket)
        .with_context(|| format!("cannot listen on {} (--cni-socket)", socket.display()))?;
    task::spawn(async move {
        // Only root connects, but a runtime may start many pods at once: the others wait.
        let places = Arc::new(Semaphore::new(CONNECTIONS));
        while let Ok(place) = Arc::clone(&places).acquire_owned().await {
            match listener.accept().await {
                Ok((stream, _)) => {
                    let (api, asked) = (api.clone(), asked.clone());
                    task::spawn(async move {
                        let _place = place;
                        if let Err(error) = talk(stream, &api, &asked).await {
                            warn!("CNI request: {error:#}");
                        }
                    });
                }
                Err(error) => {
                    warn!("CNI socket: {error}");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    });
    Ok(())
}

fn listen(socket: &Path) -> Result<UnixListener> {
    if let Some(dir) = socket.parent() {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    }
    // A killed agent left the socket: there is one agent for each set of pins.
    match fs::remove_file(socket) {
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(error.into()),
        _ => {}
    }
    let listener = UnixListener::bind(socket)?;
    fs::set_permissions(socket, fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

async fn talk(stream: UnixStream, api: &ApiServer, asked: &mpsc::Sender<Asked>) -> Result<()> {
    let user = stream.peer_cred()?.uid();
    ensure!(user == 0 || user == geteuid().as_raw(), "uid {user} may not use this socket");
    let mut stream = BufReader::new(stream);
    let mut line = String::new();
    timeout(PATIENCE, (&mut stream).take(LONGEST).read_line(&mut line))
        .await
        .context("no request came in time")??;
    let reply = match serde_json::from_str(&line) {
        Ok(request) => ask(request, api, asked).await,
        Err(error) => Reply::refusal(format!("invalid request: {error}"), false),
    };
    debug!(request = line.trim(), ?reply, "CNI");
    let mut text = serde_json::to_vec(&reply)?;
    text.push(b'\n');
    stream.get_mut().write_all(&text).await.context("the plugin disconnected")?;
    match reply.error {
        Some(error) => bail!("{}: {error}", line.trim()),
        None => Ok(()),
    }
}

async fn ask(request: Request, api: &ApiServer, asked: &mpsc::Sender<Asked>) -> Reply {
    let pod = match &request {
        Request::Add(sandbox) | Request::Check(sandbox) => match api.pod(sandbox).await {
            Ok(pod) => pod,
            Err(error) => return Reply::refusal(format!("{error:#}"), true),
        },
        Request::Del { .. } | Request::Gc { .. } | Request::Problems | Request::Services => None,
    };
    let (answer, answered) = oneshot::channel();
    let gone = Reply::refusal("the agent is shutting down".into(), true);
    if asked.send(Asked { request, pod, answer }).await.is_err() {
        return gone;
    }
    answered.await.unwrap_or(gone)
}
