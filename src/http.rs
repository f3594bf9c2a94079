//! Health, readiness and metrics over HTTP, where an address is given.

use std::{convert::Infallible, net::SocketAddr, sync::Arc, time::Duration};

use anyhow::{Context, Result};
use http_body_util::Full;
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Bytes, Incoming},
    header::CONTENT_TYPE,
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{net::TcpListener, task};
use tracing::{debug, warn};

use crate::metrics::Metrics;

/// Whoever connects and says nothing does not stay.
const PATIENCE: Duration = Duration::from_secs(10);
const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Answers on this address until the process ends: `/healthz`, `/readyz`, `/metrics`. Gives the
/// address with the port that it got.
///
/// # Errors
/// Where the address can't be listened on.
pub async fn serve(address: SocketAddr, metrics: Arc<Metrics>) -> Result<SocketAddr> {
    let listener = TcpListener::bind(address)
        .await
        .with_context(|| format!("cannot listen on {address} (--http)"))?;
    let address = listener.local_addr()?;
    task::spawn(async move {
        loop {
            let stream = match listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    warn!("http: {error}");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            let metrics = Arc::clone(&metrics);
            let service = service_fn(move |request: Request<Incoming>| {
                let response = respond(request.method(), request.uri().path(), &metrics);
                async { Ok::<_, Infallible>(response) }
            });
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(PATIENCE)
                .serve_connection(TokioIo::new(stream), service);
            task::spawn(async move {
                if let Err(error) = connection.await {
                    debug!("http: {error}");
                }
            });
        }
    });
    Ok(address)
}

fn respond(method: &Method, path: &str, metrics: &Metrics) -> Response<Full<Bytes>> {
    if method != Method::GET {
        return text(StatusCode::METHOD_NOT_ALLOWED, "only GET is answered\n".into());
    }
    let answer = match path {
        "/healthz" => metrics.health().map(|()| "ok\n".to_owned()),
        "/readyz" => metrics.ready().map(|()| "ok\n".to_owned()),
        "/metrics" => metrics.text(),
        _ => return text(StatusCode::NOT_FOUND, "/healthz, /readyz and /metrics\n".into()),
    };
    match answer {
        Ok(body) => text(StatusCode::OK, body),
        Err(error) => text(StatusCode::SERVICE_UNAVAILABLE, format!("{error:#}\n")),
    }
}

fn text(status: StatusCode, body: String) -> Response<Full<Bytes>> {
    let kind = if body.ends_with("# EOF\n") { OPENMETRICS } else { "text/plain; charset=utf-8" };
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, hyper::header::HeaderValue::from_static(kind));
    response
}
