//! Meshes, as scenarios need to know them: how each is installed without interception of its own,
//! and what it calls things.

mod capture;
mod cluster;
mod space;

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

pub use capture::{Capture, ensure_counts};
pub use cluster::Cluster;
pub use space::{Answered, Load, Space, app, is_identity};

/// Values of Istio's chart for any cluster of scenarios.
const ISTIO_VALUES: &str = "e2e/mesh/istio.yaml";
/// Where Istio publishes its charts.
const ISTIO_CHARTS: &str = "https://istio-release.storage.googleapis.com/charts";
/// The namespace of Istio's control plane.
pub const ISTIO_SYSTEM: &str = "istio-system";

/// A service mesh that scenarios run under.
#[derive(Clone, Debug)]
pub enum Mesh {
    /// Istio, installed with helm.
    Istio(Istio),
    /// By `linkerd`.
    Linkerd,
    /// Kuma 2.x, by `kumactl`.
    Kuma,
}

/// Where Istio comes from.
#[derive(Clone, Debug, Default)]
pub struct Istio {
    /// What `e2e/cluster/cluster.sh istio` has written: a directory with `values.yaml`, and where
    /// no registry is `charts` and `gateway-api`. None: all is the published one.
    pub dir: Option<PathBuf>,
}

impl Istio {
    /// What helm calls one of its charts: `base`, `istiod` or `gateway`.
    pub fn chart(&self, name: &str) -> Result<Vec<String>> {
        let Some(charts) = self.part("charts") else {
            return Ok(vec![name.to_owned(), "--repo".to_owned(), ISTIO_CHARTS.to_owned()]);
        };
        // As its source has them.
        let place = if name == "istiod" { "istio-control/istio-discovery" } else { name };
        let place = charts.join(place);
        ensure!(place.join("Chart.yaml").is_file(), "there is no chart {}", place.display());
        Ok(vec![place.to_string_lossy().into_owned()])
    }

    /// helm's arguments for the values of `istiod`, but for those that docs/install.md names.
    pub fn values(&self) -> Vec<String> {
        let file = self.part("values.yaml").map(|file| file.to_string_lossy().into_owned());
        let files = [ISTIO_VALUES.to_owned()].into_iter().chain(file);
        files.flat_map(|file| ["--values".to_owned(), file]).collect()
    }

    /// The custom resources of Gateway API, which a waypoint takes.
    pub fn gateway_api(&self) -> Option<PathBuf> {
        self.part("gateway-api")
    }

    /// Whether its proxy is Istio's own build of Envoy, with Istio's extensions.
    pub fn has_own_envoy(&self) -> bool {
        self.part("charts").is_none()
    }

    fn part(&self, name: &str) -> Option<PathBuf> {
        self.dir.as_ref().map(|dir| dir.join(name)).filter(|part| part.exists())
    }
}

impl Mesh {
    /// The mesh's name in flags.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Istio(_) => "Istio",
            Self::Linkerd => "Linkerd",
            Self::Kuma => "Kuma",
        }
    }

    /// Where it is Istio.
    pub fn istio(&self) -> Option<&Istio> {
        match self {
            Self::Istio(istio) => Some(istio),
            Self::Linkerd | Self::Kuma => None,
        }
    }

    /// The container that is the sidecar.
    pub fn sidecar(&self) -> &'static str {
        match self {
            Self::Istio(_) => "istio-proxy",
            Self::Linkerd => "linkerd-proxy",
            Self::Kuma => "kuma-sidecar",
        }
    }

    /// The init container that ends once the pod is intercepted.
    pub fn validator(&self) -> &'static str {
        match self {
            Self::Istio(_) => "istio-validation",
            Self::Linkerd => "linkerd-network-validator",
            Self::Kuma => "kuma-validation",
        }
    }

    /// The init container that installs the mesh's own rules.
    pub fn init(&self) -> &'static str {
        match self {
            Self::Istio(_) => "istio-init",
            Self::Linkerd => "linkerd-init",
            Self::Kuma => "kuma-init",
        }
    }

    /// The annotation that leaves outbound ports alone.
    pub fn exclude_outbound(&self) -> &'static str {
        match self {
            Self::Istio(_) => "traffic.sidecar.istio.io/excludeOutboundPorts",
            Self::Linkerd => "config.linkerd.io/skip-outbound-ports",
            Self::Kuma => "traffic.kuma.io/exclude-outbound-ports",
        }
    }

    /// The metadata of a namespace whose pods get sidecars.
    pub fn injected(&self) -> Value {
        match self {
            Self::Istio(_) => json!({"labels": {"istio-injection": "enabled"}}),
            Self::Linkerd => json!({"annotations": {"linkerd.io/inject": "enabled"}}),
            Self::Kuma => json!({"labels": {"kuma.io/sidecar-injection": "enabled"}}),
        }
    }

    /// The annotations of a pod that is to have a native sidecar or a classic one.
    pub fn sidecar_style(&self, native: bool) -> Value {
        match self {
            Self::Istio(_) => json!({"sidecar.istio.io/nativeSidecar": native.to_string()}),
            Self::Linkerd => {
                json!({"config.alpha.linkerd.io/proxy-enable-native-sidecar": native.to_string()})
            }
            // It knows native ones by a setting of the control plane alone.
            Self::Kuma => json!({}),
        }
    }

    /// An object by which the pods of a namespace that have this `app` label refuse plain text.
    pub fn strict(&self, namespace: &str, app: &str) -> Value {
        let metadata = json!({"name": app, "namespace": namespace});
        let labels = json!({"matchLabels": {"app": app}});
        match self {
            Self::Istio(_) => json!({
                "apiVersion": "security.istio.io/v1",
                "kind": "PeerAuthentication",
                "metadata": metadata,
                "spec": {"selector": labels, "mtls": {"mode": "STRICT"}},
            }),
            Self::Linkerd => json!({
                "apiVersion": "policy.linkerd.io/v1beta3",
                "kind": "Server",
                "metadata": metadata,
                "spec": {"podSelector": labels, "port": "http", "accessPolicy": "all-authenticated"},
            }),
            Self::Kuma => json!({
                "apiVersion": "kuma.io/v1alpha1",
                "kind": "MeshTLS",
                "metadata": {
                    "name": app,
                    "namespace": namespace,
                    "labels": {"kuma.io/mesh": "default"},
                },
                "spec": {
                    "targetRef": {"kind": "Dataplane", "labels": {"app": app}},
                    "rules": [{"default": {"mode": "Strict"}}],
                },
            }),
        }
    }

    /// The namespace and the Deployment of its control plane.
    pub fn control_plane(&self) -> (&'static str, &'static str) {
        match self {
            Self::Istio(_) => (ISTIO_SYSTEM, "istiod"),
            Self::Linkerd => ("linkerd", "linkerd-destination"),
            Self::Kuma => ("kuma-system", "kuma-control-plane"),
        }
    }

    /// Installs it as docs/install.md says, where it is not installed yet.
    fn install(&self, cluster: &Cluster) -> Result<()> {
        let (namespace, deployment) = self.control_plane();
        if cluster.kubectl(&["-n", namespace, "get", "deployment", deployment]).is_ok() {
            return Ok(());
        }
        match self {
            Self::Istio(istio) => {
                let wait = ["--create-namespace", "--wait", "--timeout", "180s"];
                let base = istio.chart("base")?;
                cluster.helm(
                    ISTIO_SYSTEM,
                    &["upgrade", "--install", "base"],
                    &[&base, &owned(&wait)],
                )?;
                if let Some(crds) = istio.gateway_api() {
                    let crds = crds.to_string_lossy();
                    cluster.kubectl(&["apply", "--server-side", "-f", &crds])?;
                }
                let chart = [istio.chart("istiod")?, istio.values()].concat();
                let cni = ["--set", "pilot.cni.enabled=true"];
                let args = [&chart[..], &owned(&cni), &owned(&wait)];
                cluster.helm(ISTIO_SYSTEM, &["upgrade", "--install", "istiod"], &args)?;
            }
            Self::Linkerd => {
                let crds = ["install", "--crds", "--set", "installGatewayAPI=true"];
                for args in [&crds[..], &["install", "--linkerd-cni-enabled"]] {
                    cluster.apply_text(&cluster.here(&[&["linkerd"], args].concat())?)?;
                }
                // Not `linkerd check`: it insists on Linkerd's own CNI plugin.
                cluster.rolled_out(namespace, "")?;
            }
            Self::Kuma => {
                let cni = "controlPlane.envVars.KUMA_RUNTIME_KUBERNETES_INJECTOR_CNI_ENABLED=true";
                let install = ["kumactl", "install", "control-plane", "--set", cni];
                cluster.apply_text(&cluster.here(&install)?)?;
                cluster.rolled_out(namespace, "")?;
                let file = "e2e/mesh/kuma-mesh.yaml";
                let mesh = fs::read_to_string(file).with_context(|| format!("reading {file}"))?;
                cluster.soon("Kuma to take a Mesh", || cluster.apply_text(&mesh))?;
            }
        }
        Ok(())
    }

    /// The program that installs it.
    pub fn cli(&self) -> &'static str {
        match self {
            Self::Istio(_) => "helm",
            Self::Linkerd => "linkerd",
            Self::Kuma => "kumactl",
        }
    }

    /// Fails where what installs it is not to be had.
    fn check(&self, cluster: &Cluster) -> Result<()> {
        let cli = self.cli();
        if cluster.here(&["sh", "-c", "command -v \"$1\"", "sh", cli]).is_err() {
            bail!("{} is installed by {cli}, which is not in PATH", self.name());
        }
        Ok(())
    }
}

/// Owned copies.
pub(crate) fn owned(args: &[&str]) -> Vec<String> {
    args.iter().map(|arg| (*arg).to_owned()).collect()
}
