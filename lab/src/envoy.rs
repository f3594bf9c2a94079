//! A real Envoy with listeners and clusters shaped like those of Istio's sidecar.

use std::env;
use std::fs;
use std::io::{Read as _, Write as _};
use std::net::SocketAddr;
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
use crate::{INBOUND, OUTBOUND, PROXY};

const MAX: u32 = u32::MAX;

/// How to run Envoy.
#[derive(Clone, Copy, Debug)]
pub struct EnvoyOpts {
    /// Worker threads.
    pub concurrency: u32,
    /// A listening socket for each worker (SO_REUSEPORT), or one that they share.
    pub reuse_port: bool,
}

impl Default for EnvoyOpts {
    fn default() -> Self {
        Self { concurrency: 2, reuse_port: true }
    }
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
    let dir = env::var_os("SIDESTEP_LAB_DIR").unwrap_or_else(|| "/var/lib/sidestep-lab".into());
    let path = Path::new(&dir).join("envoy/bin/envoy");
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
        let binary = binary()?;
        let dir = pod.lab().new_path(&format!("{}-envoy", pod.name()), "d");
        fs::create_dir(&dir).with_context(|| format!("making {}", dir.display()))?;
        chown(&dir, Some(PROXY), Some(PROXY)).context("giving Envoy its directory")?;
        let config = dir.join("bootstrap.yaml");
        let text = serde_saphyr::to_string(&bootstrap(&dir, pod.has_v6(), opts.reuse_port))
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

    /// The process id.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// SIGKILL.
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
fn bootstrap(dir: &Path, v6: bool, reuse_port: bool) -> Value {
    let no_limits = json!({"thresholds": [{
        "max_connections": MAX, "max_pending_requests": MAX, "max_requests": MAX,
        "max_retries": MAX,
    }]});
    let original_dst = |name: &str| {
        json!({
            "name": name,
            "type": "ORIGINAL_DST",
            "lb_policy": "CLUSTER_PROVIDED",
            "connect_timeout": "10s",
            "circuit_breakers": no_limits,
        })
    };
    // What Envoy passes on to its own application comes from 127.0.0.6 or ::6: by that the
    // interception tells it from what applications say.
    let mut inbound = original_dst("InboundPassthroughCluster");
    inbound["upstream_bind_config"] = json!({
        "source_address": {"address": "127.0.0.6", "port_value": 0},
    });
    if v6 {
        inbound["upstream_bind_config"]["extra_source_addresses"] =
            json!([{"address": {"address": "::6", "port_value": 0}}]);
    }
    json!({
        "admin": {"address": {"pipe": {"path": dir.join("admin.sock")}}},
        "static_resources": {
            "listeners": [
                listener(dir, v6, reuse_port, "virtualOutbound", OUTBOUND, "PassthroughCluster"),
                listener(dir, v6, reuse_port, "virtualInbound", INBOUND, "InboundPassthroughCluster"),
            ],
            "clusters": [
                original_dst("PassthroughCluster"),
                inbound,
                {"name": "BlackHoleCluster", "type": "STATIC"},
            ],
        },
    })
}

fn listener(dir: &Path, v6: bool, reuse_port: bool, name: &str, port: u16, cluster: &str) -> Value {
    let address = |ip: &str| json!({"socket_address": {"address": ip, "port_value": port}});
    let access_log = json!([{
        "name": "envoy.access_loggers.file",
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog",
            "path": dir.join("access.jsonl"),
            "log_format": {"json_format": {
                "listener": name,
                "downstream_remote": "%DOWNSTREAM_REMOTE_ADDRESS%",
                "downstream_local": "%DOWNSTREAM_LOCAL_ADDRESS%",
                "upstream_local": "%UPSTREAM_LOCAL_ADDRESS%",
                "upstream_host": "%UPSTREAM_HOST%",
                "flags": "%RESPONSE_FLAGS%",
                "received": "%BYTES_RECEIVED%",
                "sent": "%BYTES_SENT%",
            }},
        },
    }]);
    let proxy_to = |cluster: &str| {
        json!([{
            "name": "envoy.filters.network.tcp_proxy",
            "typed_config": {
                "@type":
                    "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy",
                "stat_prefix": cluster,
                "cluster": cluster,
                "access_log": access_log,
            },
        }])
    };
    let mut listener = json!({
        "name": name,
        "address": address("0.0.0.0"),
        "enable_reuse_port": reuse_port,
        "traffic_direction": if port == OUTBOUND { "OUTBOUND" } else { "INBOUND" },
        "listener_filters": [{
            "name": "envoy.filters.listener.original_dst",
            "typed_config": {
                "@type":
                    "type.googleapis.com/envoy.extensions.filters.listener.original_dst.v3.OriginalDst",
            },
        }],
        "filter_chains": [
            // Not intercepted but dialled: passing it on would come back here for ever.
            {
                "name": "blackhole",
                "filter_chain_match": {"destination_port": port},
                "filters": proxy_to("BlackHoleCluster"),
            },
            {"name": "passthrough", "filters": proxy_to(cluster)},
        ],
    });
    if v6 {
        listener["additional_addresses"] = json!([{"address": address("::")}]);
    }
    listener
}
