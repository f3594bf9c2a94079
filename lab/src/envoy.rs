//! A real Envoy with listeners and clusters shaped like those of Istio's sidecar.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::unix::fs::chown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::pod::Pod;
use crate::process::Process;
use crate::wait::wait_until;
use crate::{INBOUND, OUTBOUND, PROXY, lab_dir};

const MAX: u32 = u32::MAX;

/// How to run Envoy.
#[derive(Clone, Copy, Debug)]
pub struct EnvoyOpts {
    /// The number of worker threads.
    pub concurrency: u32,
    /// A listening socket for each worker (SO_REUSEPORT), or one that they share.
    pub reuse_port: bool,
    /// Write an access log; [`Envoy::access_log`] is empty without.
    pub access_log: bool,
    /// What goes to this port is taken for HTTP and goes through Envoy's connection manager.
    pub http_port: Option<u16>,
}

impl Default for EnvoyOpts {
    fn default() -> Self {
        Self { concurrency: 2, reuse_port: true, access_log: true, http_port: None }
    }
}

/// A listener that is dialled and has one upstream: a proxy without interception.
#[derive(Clone, Copy, Debug)]
pub struct Twin {
    /// The address that it listens on.
    pub listen: SocketAddr,
    /// Where all of it goes.
    pub upstream: SocketAddr,
    /// Whether that is the pod's own application, which is dialled from 127.0.0.6.
    pub inbound: bool,
    /// Whether it goes through Envoy's connection manager for HTTP.
    pub http: bool,
}

/// One connection in Envoy's access log, which is written when the connection ends.
#[derive(Clone, Debug, Deserialize)]
pub struct LogLine {
    /// `virtualOutbound` or `virtualInbound`.
    pub listener: String,
    /// The peer that Envoy saw.
    pub downstream_remote: SocketAddr,
    /// The original destination, as Envoy believes.
    pub downstream_local: SocketAddr,
    /// Envoy's own address on the connection that it made.
    pub upstream_local: Option<SocketAddr>,
    /// Where it connected to.
    pub upstream_host: Option<SocketAddr>,
    /// Response flags, such as `UH`; `-` when all went well.
    pub flags: String,
    /// Bytes from the downstream peer.
    pub received: u64,
    /// Bytes to the downstream peer.
    pub sent: u64,
}

/// Where Envoy's binary is: `envoy/bin/envoy` below $SIDESTEP_LAB_DIR, which is
/// /var/lib/sidestep-lab by default. Fails when it is not there.
pub fn binary() -> Result<PathBuf> {
    let path = lab_dir().join("envoy/bin/envoy");
    ensure!(path.is_file(), "there is no Envoy at {}: run `make deps`", path.display());
    Ok(path)
}

/// A running Envoy (uid and gid 1337). Killed on drop.
pub struct Envoy {
    process: Process,
    pod: String,
    dir: PathBuf,
}

impl Envoy {
    /// Starts Envoy in the pod and waits, up to 20 seconds, until it listens.
    pub fn start(pod: &Pod, opts: EnvoyOpts) -> Result<Self> {
        Self::start_with(pod, opts, &[])
    }

    /// Like [`Envoy::start`], with more listeners.
    pub fn start_with(pod: &Pod, opts: EnvoyOpts, twins: &[Twin]) -> Result<Self> {
        let binary = binary()?;
        let dir = pod.lab().new_path(&format!("{}-envoy", pod.name()), "d");
        fs::create_dir(&dir).with_context(|| format!("making {}", dir.display()))?;
        chown(&dir, Some(PROXY), Some(PROXY)).context("giving Envoy its directory")?;
        let config = dir.join("bootstrap.yaml");
        let text = serde_saphyr::to_string(&bootstrap(&dir, pod.has_v6(), opts, twins))
            .context("writing YAML")?;
        fs::write(&config, text).with_context(|| format!("writing {}", config.display()))?;
        let process = pod.spawn(
            PROXY,
            PROXY,
            [
                binary.as_os_str(),
                "--config-path".as_ref(),
                config.as_os_str(),
                "--disable-hot-restart".as_ref(),
                "--concurrency".as_ref(),
                opts.concurrency.to_string().as_ref(),
                "--file-flush-interval-msec".as_ref(),
                "50".as_ref(),
                "--log-level".as_ref(),
                "warning".as_ref(),
            ],
        )?;
        let mut envoy = Self { process, pod: pod.name().to_owned(), dir };
        let what = format!("Envoy in {} to listen", pod.name());
        let mut running = true;
        let ready = wait_until(&what, Duration::from_secs(20), || {
            running = envoy.process.is_running();
            !running || envoy.admin("/ready").is_ok_and(|body| body.trim() == "LIVE")
        });
        ready
            .and_then(|()| {
                ensure!(running, "Envoy in {} ended at once", pod.name());
                Ok(())
            })
            .with_context(|| envoy.process.log_tail())?;
        Ok(envoy)
    }

    /// The id of Envoy's process.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Kills Envoy with SIGKILL.
    pub fn kill(&mut self) {
        self.process.kill();
    }

    /// What Envoy itself has written, such as warnings.
    pub fn log(&self) -> String {
        self.process.log()
    }

    /// The body of `path` from the administration interface. Fails when its status is not 200.
    pub fn admin(&self, path: &str) -> Result<String> {
        let socket = self.dir.join("admin.sock");
        let mut stream = UnixStream::connect(&socket)
            .with_context(|| format!("connecting to {}", socket.display()))?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        write!(stream, "GET {path} HTTP/1.1\r\nHost: lab\r\nConnection: close\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).context("reading Envoy's answer")?;
        let (head, body) = answer.split_once("\r\n\r\n").context("no HTTP answer")?;
        let status = head.split(' ').nth(1);
        ensure!(status == Some("200"), "{path} answered {}", head.lines().next().unwrap_or(""));
        if head.contains("transfer-encoding: chunked") {
            unchunk(body)
        } else {
            Ok(body.to_owned())
        }
    }

    /// Where the access log is: lines of JSON.
    pub fn access_log_path(&self) -> PathBuf {
        self.dir.join("access.jsonl")
    }

    /// The connections that have ended, oldest first. Fails on a line that is no [`LogLine`].
    pub fn access_log(&self) -> Result<Vec<LogLine>> {
        let text = fs::read_to_string(self.access_log_path()).unwrap_or_default();
        let end = text.rfind('\n').map_or(0, |at| at + 1); // the last line may be half written
        text[..end]
            .lines()
            .map(|line| serde_json::from_str(line).with_context(|| format!("access log: {line}")))
            .collect()
    }

    /// Waits, up to fifteen seconds, for a connection that `wanted` picks.
    pub fn wait_log(&self, what: &str, wanted: impl Fn(&LogLine) -> bool) -> Result<LogLine> {
        let mut log = Ok(Vec::new());
        let mut found = None;
        let waiting = format!("{what} in the access log of {}'s Envoy", self.pod);
        let waited = wait_until(&waiting, Duration::from_secs(15), || {
            log = self.access_log();
            found = log.iter().flatten().find(|line| wanted(line)).cloned();
            log.is_err() || found.is_some()
        });
        let log = log?;
        waited.with_context(|| format!("the log has {} lines: {log:#?}", log.len()))?;
        found.context("interrupted")
    }
}

/// The text of a chunked HTTP body.
fn unchunk(mut body: &str) -> Result<String> {
    let mut text = String::new();
    loop {
        let (size, rest) = body.split_once("\r\n").context("a chunk without a size")?;
        let size = usize::from_str_radix(size, 16).context("a chunk's size")?;
        if size == 0 {
            return Ok(text);
        }
        text += rest.get(..size).context("a chunk is cut off")?;
        body = rest.get(size + 2..).context("a chunk is cut off")?;
    }
}

/// The configuration. Both listeners take connections that were meant for others, and learn
/// from the kernel for whom (the listener filter `original_dst`).
fn bootstrap(dir: &Path, v6: bool, opts: EnvoyOpts, twins: &[Twin]) -> Value {
    let mut listeners = vec![
        listener(dir, v6, opts, "virtualOutbound", OUTBOUND, "PassthroughCluster"),
        listener(dir, v6, opts, "virtualInbound", INBOUND, "InboundPassthroughCluster"),
    ];
    let mut clusters = vec![
        cluster("PassthroughCluster", None),
        from_passthrough(cluster("InboundPassthroughCluster", None), v6),
        json!({"name": "BlackHoleCluster", "type": "STATIC"}),
    ];
    for twin in twins {
        let name = format!("twin-{}", twin.listen.port());
        let log = access_log(dir, opts, &name);
        let filter = if twin.http { http_to(&name, &log) } else { tcp_to(&name, &log) };
        listeners.push(json!({
            "name": name,
            "address": address(twin.listen),
            "enable_reuse_port": opts.reuse_port,
            "traffic_direction": if twin.inbound { "INBOUND" } else { "OUTBOUND" },
            "filter_chains": [{"filters": filter}],
        }));
        let to = cluster(&name, Some(twin.upstream));
        clusters.push(if twin.inbound { from_passthrough(to, v6) } else { to });
    }
    json!({
        "admin": {"address": {"pipe": {"path": dir.join("admin.sock")}}},
        "static_resources": {"listeners": listeners, "clusters": clusters},
    })
}

fn address(addr: SocketAddr) -> Value {
    json!({"socket_address": {"address": addr.ip(), "port_value": addr.port()}})
}

/// A cluster of one upstream, or of each connection's original destination.
fn cluster(name: &str, upstream: Option<SocketAddr>) -> Value {
    let mut cluster = json!({
        "name": name,
        "connect_timeout": "10s",
        "circuit_breakers": {"thresholds": [{
            "max_connections": MAX, "max_pending_requests": MAX, "max_requests": MAX,
            "max_retries": MAX,
        }]},
    });
    match upstream {
        None => {
            cluster["type"] = "ORIGINAL_DST".into();
            cluster["lb_policy"] = "CLUSTER_PROVIDED".into();
        }
        Some(upstream) => {
            cluster["type"] = "STATIC".into();
            cluster["load_assignment"] = json!({
                "cluster_name": name,
                "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address(upstream)}}]}],
            });
        }
    }
    cluster
}

/// What Envoy passes on to its own application comes from 127.0.0.6 or ::6: by that the
/// interception tells it from what applications say.
fn from_passthrough(mut cluster: Value, v6: bool) -> Value {
    cluster["upstream_bind_config"] = json!({
        "source_address": {"address": "127.0.0.6", "port_value": 0},
    });
    if v6 {
        cluster["upstream_bind_config"]["extra_source_addresses"] =
            json!([{"address": {"address": "::6", "port_value": 0}}]);
    }
    cluster
}

fn access_log(dir: &Path, opts: EnvoyOpts, listener: &str) -> Value {
    if !opts.access_log {
        return json!([]);
    }
    json!([{
        "name": "envoy.access_loggers.file",
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog",
            "path": dir.join("access.jsonl"),
            "log_format": {"json_format": {
                "listener": listener,
                "downstream_remote": "%DOWNSTREAM_REMOTE_ADDRESS%",
                "downstream_local": "%DOWNSTREAM_LOCAL_ADDRESS%",
                "upstream_local": "%UPSTREAM_LOCAL_ADDRESS%",
                "upstream_host": "%UPSTREAM_HOST%",
                "flags": "%RESPONSE_FLAGS%",
                "received": "%BYTES_RECEIVED%",
                "sent": "%BYTES_SENT%",
            }},
        },
    }])
}

fn tcp_to(cluster: &str, access_log: &Value) -> Value {
    json!([{
        "name": "envoy.filters.network.tcp_proxy",
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy",
            "stat_prefix": cluster,
            "cluster": cluster,
            "access_log": access_log,
        },
    }])
}

fn http_to(cluster: &str, access_log: &Value) -> Value {
    json!([{
        "name": "envoy.filters.network.http_connection_manager",
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
            "stat_prefix": cluster,
            "access_log": access_log,
            "http_filters": [{
                "name": "envoy.filters.http.router",
                "typed_config": {
                    "@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router",
                },
            }],
            "route_config": {
                "name": cluster,
                "virtual_hosts": [{
                    "name": "all",
                    "domains": ["*"],
                    "routes": [{"match": {"prefix": "/"}, "route": {"cluster": cluster}}],
                }],
            },
        },
    }])
}

fn listener(dir: &Path, v6: bool, opts: EnvoyOpts, name: &str, port: u16, cluster: &str) -> Value {
    let log = access_log(dir, opts, name);
    let mut chains = vec![
        // Not intercepted but dialled: passing it on would come back here for ever.
        json!({
            "name": "blackhole",
            "filter_chain_match": {"destination_port": port},
            "filters": tcp_to("BlackHoleCluster", &log),
        }),
        json!({"name": "passthrough", "filters": tcp_to(cluster, &log)}),
    ];
    if let Some(http) = opts.http_port {
        chains.push(json!({
            "name": "http",
            "filter_chain_match": {"destination_port": http},
            "filters": http_to(cluster, &log),
        }));
    }
    let mut listener = json!({
        "name": name,
        "address": address((Ipv4Addr::UNSPECIFIED, port).into()),
        "enable_reuse_port": opts.reuse_port,
        "traffic_direction": if port == OUTBOUND { "OUTBOUND" } else { "INBOUND" },
        "listener_filters": [{
            "name": "envoy.filters.listener.original_dst",
            "typed_config": {
                "@type":
                    "type.googleapis.com/envoy.extensions.filters.listener.original_dst.v3.OriginalDst",
            },
        }],
        "filter_chains": chains,
    });
    if v6 {
        let any = address((Ipv6Addr::UNSPECIFIED, port).into());
        listener["additional_addresses"] = json!([{"address": any}]);
    }
    listener
}
