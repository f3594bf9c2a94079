//! Services by Sidestep, where kube-proxy is not.

use anyhow::{Result, ensure};
use serde_json::json;
use sidestep_e2e::mesh::{Answered, Cluster};

use super::{MeshRow, Of};

pub const SCENARIOS: &[MeshRow] = &[(
    "services-alone",
    "Services are reached on a node that has no kube-proxy, in the mesh and beside it",
    Of::All,
    alone,
)];

const SERVICES: [&str; 2] = ["--set", "services.enabled=true"];

fn alone(cluster: &Cluster) -> Result<()> {
    let result = without_kube_proxy(cluster);
    // Others want the node as it was, also when that failed.
    let back = cluster.kube_proxy(&[cluster.worker(0)?], true);
    cluster.install_agent(&[])?;
    result.and(back)
}

fn without_kube_proxy(cluster: &Cluster) -> Result<()> {
    let (here, elsewhere) = (cluster.worker(0)?, cluster.worker(1)?);
    let space = cluster.space("services-alone")?;
    let outside = cluster.plain_space("services-outside")?;
    outside.server("plain", elsewhere, json!({}))?;
    space.server("server", elsewhere, json!({}))?;
    outside.client("client", here, json!({}))?;
    outside.wait_ready("plain")?;
    outside.wait_ready("client")?;
    space.wait_ready("server")?;
    let name = format!("http://plain.{}/", outside.name());
    let address = format!("http://{}/", cluster_ip(cluster, outside.name(), "plain")?);
    let answers = |answered: &Answered| !answered.is_refused();
    let fails = |answered: &Answered| matches!(answered, Answered::Not(_));
    outside.get_until("client", &name, "kube-proxy to lead there", answers)?;

    cluster.kube_proxy(&[here], false)?;
    for url in [&name, &address] {
        outside.get_until("client", url, "nobody to lead there", fails)?;
    }
    let api = cluster_ip(cluster, "default", "kubernetes")?;
    // The shell takes an IPv6 address without brackets.
    let dial = format!("exec 3<>/dev/tcp/{}/443", api.trim_matches(['[', ']']));
    let from_node = || cluster.shell(here).run(&["timeout", "3", "bash", "-c", &dial]);
    ensure!(from_node().is_err(), "kube-proxy's rules are there still");

    // Not even the agent reaches the API server by its Service.
    cluster.install_agent(
        &[&SERVICES[..], &cluster.direct_api()?.each_ref().map(String::as_str)].concat(),
    )?;
    // The name by kube-dns' address over UDP, the Service over TCP.
    for url in [&name, &address] {
        outside.get_until("client", url, "Sidestep to lead there", answers)?;
    }
    cluster.soon("the node to reach the API server by its Service", from_node)?;
    // A pod that is new: its sidecar asks for the control plane by its Service.
    space.client("late", here, json!({}))?;
    space.wait_ready("late")?;
    space.ensure_first_try("late")?;
    space.get_known("late", "http://server/")?;
    let status = cluster.status(here)?;
    let counters = &status["service_counters"];
    // By the family of the cluster's Services.
    for (v4, v6) in [("service_tcp4", "service_tcp6"), ("service_udp4", "service_udp6")] {
        let is_counted = [v4, v6].iter().any(|name| counters[name].as_u64() > Some(0));
        ensure!(is_counted, "neither {v4} nor {v6}: {counters}");
    }
    ensure!(status["service_counters"]["service_torn"] == 0, "{counters}");
    Ok(())
}

/// A Service's first address, as it is in a URL.
fn cluster_ip(cluster: &Cluster, namespace: &str, name: &str) -> Result<String> {
    let args = ["-n", namespace, "get", "service", name, "-o", "jsonpath={.spec.clusterIP}"];
    let ip = cluster.kubectl(&args)?;
    Ok(if ip.contains(':') { format!("[{}]", ip.trim()) } else { ip.trim().to_owned() })
}
