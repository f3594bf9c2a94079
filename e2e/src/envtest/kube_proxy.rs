//! The real kube-proxy, in a node's network namespace, fed by the API server.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::json;

use super::{ADMIN, Envtest, https, kubeconfig, part::Part, program};

/// By what it translates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// `iptables`, the default.
    Iptables,
    /// `nftables`.
    Nftables,
}

/// A running kube-proxy. On drop it is killed; its rules go with the namespace.
pub struct KubeProxy(Part);

impl Envtest {
    /// Starts kube-proxy for the node of that name, in the node's network namespace. `pods` are the
    /// ranges of the pods' addresses, with commas between them. All that it writes to /proc/sys
    /// belongs to that namespace: it leaves conntrack's size alone, which is the machine's.
    pub fn kube_proxy(
        &self,
        mode: Mode,
        netns: &Path,
        node: &str,
        pods: &str,
    ) -> Result<KubeProxy> {
        let user = kubeconfig(&https(&self.dir, self.address), &json!({"token": ADMIN}));
        let (at, config) = (self.dir.join("kube-proxy.kubeconfig"), self.dir.join("kube-proxy"));
        fs::write(&at, user.to_string()).with_context(|| format!("writing {}", at.display()))?;
        let name = match mode {
            Mode::Iptables => "iptables",
            Mode::Nftables => "nftables",
        };
        // The pause between two syncs is a second by default.
        let at_once = json!({"minSyncPeriod": "1ms", "localhostNodePorts": false});
        let text = json!({
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
            "kind": "KubeProxyConfiguration",
            "clientConnection": {"kubeconfig": at},
            "hostnameOverride": node,
            "mode": name,
            "clusterCIDR": pods,
            "healthzBindAddress": "127.0.0.1:10256",
            "oomScoreAdj": 0,
            "iptables": at_once,
            "nftables": {"minSyncPeriod": "1ms"},
            "conntrack": {
                "maxPerCore": 0, "min": 0,
                "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s",
                // A source port that comes again is another client.
                "udpTimeout": "1s", "udpStreamTimeout": "1s",
            },
        });
        fs::write(&config, text.to_string())
            .with_context(|| format!("writing {}", config.display()))?;
        let flags = [("config", &*config.to_string_lossy()), ("v", "2")];
        let part = Part::start(&program("kube-proxy")?, &flags, Some(netns), &self.dir, None)?;
        Ok(KubeProxy(part))
    }
}

impl KubeProxy {
    /// Its process.
    pub fn pid(&self) -> u32 {
        self.0.pid()
    }

    /// Whether it has not ended yet.
    pub fn is_running(&mut self) -> bool {
        self.0.is_running()
    }

    /// The end of what it has written.
    pub fn log_tail(&self) -> String {
        self.0.log_tail()
    }
}
