//! The pods of the demo.

use std::fs;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result};
use sidestep_lab::{APP, Envoy, EnvoyOpts, Lab, Pod, PodNet, Process, connect, wait_until};

/// Where the applications serve.
pub const PORT: u16 = 8080;

/// A pod with its application and, perhaps, its sidecar.
pub struct Side {
    envoy: Option<Envoy>,
    _app: Process,
    pub pod: Pod,
}

impl Side {
    pub fn new(lab: &Lab, name: &str, sidecar: bool) -> Result<Self> {
        let pod = lab.pod(name, PodNet::DUAL)?;
        // A connection for each request uses up the client's ports otherwise.
        pod.sysctl("net.ipv4.ip_local_port_range", "16000 65535")?;
        pod.sysctl("net.ipv4.tcp_tw_reuse", "1")?;
        let app = start_app(lab, &pod)?;
        let envoy = sidecar.then(|| Envoy::start(&pod, EnvoyOpts::default())).transpose()?;
        Ok(Self { envoy, _app: app, pod })
    }

    pub fn envoy(&self) -> Result<&Envoy> {
        self.envoy.as_ref().with_context(|| format!("{} has no Envoy", self.pod.name()))
    }
}

/// Starts this very binary as the pod's application: a process of its own, so that `--keep`
/// can leave it running.
fn start_app(lab: &Lab, pod: &Pod) -> Result<Process> {
    // The application's user may not be allowed to read where this binary is.
    let binary = lab.dir().join("app");
    if !binary.exists() {
        fs::copy("/proc/self/exe", &binary).context("copying this binary")?;
    }
    let any4 = SocketAddr::from(([0; 4], PORT)).to_string();
    let any6 = SocketAddr::from(([0; 16], PORT)).to_string();
    let app = pod.spawn(
        APP,
        APP,
        [binary.as_os_str(), "--serve".as_ref(), any4.as_ref(), any6.as_ref()],
    )?;
    let (ip, what) = (pod.ipv6(), format!("the application of {}", pod.name()));
    wait_until(&what, Duration::from_secs(5), || {
        matches!(pod.run(APP, APP, || connect((ip, PORT).into(), None)), Ok(Ok(_)))
    })
    .with_context(|| app.log())?;
    Ok(app)
}
