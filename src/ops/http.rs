//! Health, readiness and metrics over HTTP, where an address is given.

use std::{collections::VecDeque, convert::Infallible, net::SocketAddr, sync::Arc, time::Duration};

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
use tokio::{net::TcpListener, task, time::timeout};
use tracing::{debug, warn};

use super::metrics::Metrics;

/// A client that sends nothing is disconnected after this time.
const PATIENCE: Duration = Duration::from_secs(10);
/// The maximum of simultaneous connections; each takes a descriptor.
const CONNECTIONS: usize = 64;
const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Answers on this address until the process ends: `/healthz`, `/readyz`, `/metrics`. Gives the
/// address with the port that it got.
///
/// # Errors
/// If the address cannot be listened on.
pub async fn serve(address: SocketAddr, metrics: Arc<Metrics>) -> Result<SocketAddr> {
    let listener = TcpListener::bind(address)
        .await
        .with_context(|| format!("cannot listen on {address} (--http)"))?;
    let address = listener.local_addr()?;
    task::spawn(async move {
        let mut open: VecDeque<task::AbortHandle> = VecDeque::new();
        loop {
            let stream = match listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    warn!("http: {error}");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            open.retain(|connection| !connection.is_finished());
            // The oldest goes: the kubelet, who asks at once, is answered also where others hold
            // their connections open.
            if open.len() >= CONNECTIONS
                && let Some(oldest) = open.pop_front()
            {
                oldest.abort();
            }
            let metrics = Arc::clone(&metrics);
            let service = service_fn(move |request: Request<Incoming>| {
                let response = respond(request.method(), request.uri().path(), &metrics);
                async { Ok::<_, Infallible>(response) }
            });
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(PATIENCE)
                .keep_alive(false)
                .serve_connection(TokioIo::new(stream), service);
            let connection = task::spawn(async move {
                match timeout(2 * PATIENCE, connection).await {
                    Ok(Ok(())) => {}
                    Ok(Err(error)) => debug!("http: {error}"),
                    Err(_) => debug!("http: the client did not read the answer in time"),
                }
            });
            open.push_back(connection.abort_handle());
        }
    });
    Ok(address)
}

fn respond(method: &Method, path: &str, metrics: &Metrics) -> Response<Full<Bytes>> {
    if method != Method::GET {
        return text(StatusCode::METHOD_NOT_ALLOWED, "only GET is supported\n".into());
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

#[cfg(test)]
mod tests {
    use std::path::Path;

    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpStream,
    };

    use super::*;
    use crate::dataplane::{LAYOUT, Pins};

    /// F32: clients that send nothing, or never complete a request, do not lock others out.
    #[tokio::test]
    async fn f32_those_who_only_connect_keep_nobody_out() {
        let metrics = Arc::new(Metrics::new(&Pins::new(Path::new("/nonexistent"), LAYOUT), 1));
        let address = serve(([127, 0, 0, 1], 0).into(), metrics).await.expect("listens");
        let mut idle = Vec::new();
        for _ in 0..4 * CONNECTIONS {
            let mut stream = TcpStream::connect(address).await.expect("connected");
            stream.write_all(b"GET /healthz HTTP/1.1\r\nHost").await.expect("written");
            idle.push(stream);
            task::yield_now().await;
        }
        let mut probe = TcpStream::connect(address).await.expect("connected");
        probe.write_all(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n").await.expect("written");
        let mut answer = String::new();
        let read = timeout(PATIENCE / 2, probe.read_to_string(&mut answer)).await;
        read.expect("in time").expect("read");
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        // The first ones were sent away, long before their time was up.
        let mut byte = [0];
        let gone = timeout(PATIENCE / 2, idle[0].read(&mut byte)).await.expect("in time");
        assert!(matches!(gone, Ok(0) | Err(_)), "{gone:?}");
    }
}
