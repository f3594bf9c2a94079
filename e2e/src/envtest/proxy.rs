//! Answers that no API server gives when a test wants them: a proxy in front of the real one, which
//! gives those itself.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Result;
use http_body_util::{BodyExt as _, Full, combinators::UnsyncBoxBody};
use hyper::body::{Bytes, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use kube::Client;
use kube::client::Body;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::Notify;

use super::{Envtest, client, kubeconfig, run_on};

/// What is answered instead of the API server's answer: by method, path and query, the status and
/// the body.
type Fault = dyn Fn(&str, &str) -> Option<(u16, String)> + Send + Sync;
type Faults = Arc<Mutex<Option<Box<Fault>>>>;
type Answer = Response<UnsyncBoxBody<Bytes, kube::Error>>;

/// A proxy that speaks plain HTTP, with an account's token of its own.
pub struct Proxy {
    address: SocketAddr,
    faults: Faults,
    cut: Arc<Notify>,
}

impl Envtest {
    /// Starts a proxy for who has this kubeconfig. It lives as long as the server.
    pub fn proxy(&self, kubeconfig: Value) -> Result<Proxy> {
        let client = client(&self.handle, kubeconfig)?;
        let (faults, cut) = (Faults::default(), Arc::new(Notify::new()));
        let (theirs, ends) = (Arc::clone(&faults), Arc::clone(&cut));
        let listener = run_on(&self.handle, TcpListener::bind("127.0.0.1:0"))??;
        let address = listener.local_addr()?;
        self.handle.spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (client, faults) = (client.clone(), Arc::clone(&theirs));
                let service = service_fn(move |request| {
                    let (client, faults) = (client.clone(), Arc::clone(&faults));
                    async move { Ok::<_, Infallible>(answer(client, &faults, request).await) }
                });
                let connection =
                    http1::Builder::new().serve_connection(TokioIo::new(stream), service);
                let ends = Arc::clone(&ends);
                tokio::spawn(async move {
                    tokio::select! {
                        _ = connection => {}
                        () = ends.notified() => {}
                    }
                });
            }
        });
        Ok(Proxy { address, faults, cut })
    }
}

impl Proxy {
    /// From now on gives the answers that `fault` has; none: the API server's.
    pub fn answer(
        &self,
        fault: impl Fn(&str, &str) -> Option<(u16, String)> + Send + Sync + 'static,
    ) {
        *self.faults.lock().unwrap_or_else(PoisonError::into_inner) = Some(Box::new(fault));
    }

    /// Ends all connections that are open now, and so the watches.
    pub fn cut(&self) {
        self.cut.notify_waiters();
    }

    /// A kubeconfig for it.
    pub fn kubeconfig(&self) -> Value {
        kubeconfig(&json!({"server": format!("http://{}", self.address)}), &json!({}))
    }
}

async fn answer(client: Client, faults: &Faults, request: Request<Incoming>) -> Answer {
    let uri = request.uri().to_string();
    let fault = {
        let faults = faults.lock().unwrap_or_else(PoisonError::into_inner);
        faults.as_ref().and_then(|fault| fault(request.method().as_str(), &uri))
    };
    let said = |status: u16, text: String| {
        let body = Full::new(Bytes::from(text)).map_err(|never| match never {}).boxed_unsync();
        let mut response = Response::new(body);
        *response.status_mut() = status.try_into().unwrap_or_default();
        response
    };
    if let Some((status, text)) = fault {
        return said(status, text);
    }
    let (head, body) = request.into_parts();
    let body = body.collect().await.map(|body| body.to_bytes().to_vec()).unwrap_or_default();
    match client.send(Request::from_parts(head, Body::from(body))).await {
        Ok(response) => response.map(|body| body.boxed_unsync()),
        Err(error) => said(502, error.to_string()),
    }
}
