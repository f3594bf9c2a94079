//! A client for the container runtime's own interface (CRI).

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use k8s_cri::v1::runtime_service_client::RuntimeServiceClient;
use k8s_cri::v1::{
    ContainerConfig, ContainerFilter, ContainerStatus, ContainerStatusRequest,
    CreateContainerRequest, ListContainersRequest, ListPodSandboxRequest, PodSandbox,
    PodSandboxConfig, PodSandboxFilter, PodSandboxStatusRequest, RemovePodSandboxRequest,
    RunPodSandboxRequest, StartContainerRequest, StatusRequest, StopContainerRequest,
    StopPodSandboxRequest,
};
use serde_json::Value;
use tonic::Status;
use tonic::transport::Channel;

/// The label that has a pod's uid.
pub const UID_LABEL: &str = "io.kubernetes.pod.uid";

/// A connection to the runtime.
#[derive(Clone)]
pub struct Cri {
    runtime: RuntimeServiceClient<Channel>,
}

/// A sandbox as far as it is of interest here.
#[derive(Clone, Debug)]
pub struct SandboxInfo {
    /// The addresses that CNI gave it; none in the host's network.
    pub ips: Vec<String>,
    /// Its network namespace; none when it is the host's.
    pub netns: Option<PathBuf>,
}

impl Cri {
    /// Connects to the runtime's socket.
    pub async fn connect(socket: &Path) -> Result<Self> {
        let runtime = RuntimeServiceClient::connect(format!("unix://{}", socket.display()))
            .await
            .with_context(|| format!("connecting to {}", socket.display()))?;
        Ok(Self { runtime })
    }

    /// The conditions that don't hold, such as `NetworkReady`, with what the runtime says of them.
    pub async fn not_ready(&mut self) -> Result<Vec<String>, Status> {
        let response = self.runtime.status(StatusRequest { verbose: false }).await?.into_inner();
        let conditions = response.status.map(|status| status.conditions).unwrap_or_default();
        Ok(conditions
            .into_iter()
            .filter(|condition| !condition.status)
            .map(|condition| format!("{}: {}", condition.r#type, condition.message))
            .collect())
    }

    /// Makes a sandbox, its network included, and gives its id.
    pub async fn run_sandbox(&mut self, config: PodSandboxConfig) -> Result<String, Status> {
        let request = RunPodSandboxRequest { config: Some(config), runtime_handler: String::new() };
        Ok(self.runtime.run_pod_sandbox(request).await?.into_inner().pod_sandbox_id)
    }

    /// What the runtime knows of a sandbox.
    pub async fn sandbox(&mut self, id: &str) -> Result<SandboxInfo> {
        let request = PodSandboxStatusRequest { pod_sandbox_id: id.to_owned(), verbose: true };
        let response = self.runtime.pod_sandbox_status(request).await?.into_inner();
        let network = response.status.and_then(|status| status.network).unwrap_or_default();
        let more = network.additional_ips.into_iter().map(|ip| ip.ip);
        let ips = [network.ip].into_iter().chain(more).filter(|ip| !ip.is_empty()).collect();
        let info = response.info.get("info").context("the runtime tells no more of a sandbox")?;
        let info: Value = serde_json::from_str(info).context("what the runtime tells of it")?;
        let namespaces = info["runtimeSpec"]["linux"]["namespaces"].as_array();
        let network = namespaces.into_iter().flatten().find(|space| space["type"] == "network");
        let netns = network.and_then(|space| space["path"].as_str()).map(PathBuf::from);
        Ok(SandboxInfo { ips, netns })
    }

    /// All sandboxes, or those of one pod.
    pub async fn sandboxes(&mut self, uid: Option<&str>) -> Result<Vec<PodSandbox>, Status> {
        let label_selector: HashMap<String, String> =
            uid.map(|uid| (UID_LABEL.to_owned(), uid.to_owned())).into_iter().collect();
        let filter = PodSandboxFilter { label_selector, ..PodSandboxFilter::default() };
        let request = ListPodSandboxRequest { filter: Some(filter) };
        Ok(self.runtime.list_pod_sandbox(request).await?.into_inner().items)
    }

    /// Ends what runs in a sandbox and takes its network down.
    pub async fn stop_sandbox(&mut self, id: &str) -> Result<(), Status> {
        let request = StopPodSandboxRequest { pod_sandbox_id: id.to_owned() };
        self.runtime.stop_pod_sandbox(request).await.map(drop)
    }

    /// Removes a stopped sandbox with its containers.
    pub async fn remove_sandbox(&mut self, id: &str) -> Result<(), Status> {
        let request = RemovePodSandboxRequest { pod_sandbox_id: id.to_owned() };
        self.runtime.remove_pod_sandbox(request).await.map(drop)
    }

    /// Makes a container and starts it; gives its id.
    pub async fn start_container(
        &mut self,
        sandbox: &str,
        config: ContainerConfig,
        sandbox_config: PodSandboxConfig,
    ) -> Result<String, Status> {
        let request = CreateContainerRequest {
            pod_sandbox_id: sandbox.to_owned(),
            config: Some(config),
            sandbox_config: Some(sandbox_config),
        };
        let id = self.runtime.create_container(request).await?.into_inner().container_id;
        self.runtime.start_container(StartContainerRequest { container_id: id.clone() }).await?;
        Ok(id)
    }

    /// SIGTERM, and SIGKILL after `grace` seconds.
    pub async fn stop_container(&mut self, id: &str, grace: i64) -> Result<(), Status> {
        let request = StopContainerRequest { container_id: id.to_owned(), timeout: grace };
        self.runtime.stop_container(request).await.map(drop)
    }

    /// The ids of a sandbox's containers, also of those that have ended.
    pub async fn containers(&mut self, sandbox: &str) -> Result<Vec<String>, Status> {
        let filter =
            ContainerFilter { pod_sandbox_id: sandbox.to_owned(), ..ContainerFilter::default() };
        let request = ListContainersRequest { filter: Some(filter) };
        let containers = self.runtime.list_containers(request).await?.into_inner().containers;
        Ok(containers.into_iter().map(|container| container.id).collect())
    }

    /// A container's state.
    pub async fn container(&mut self, id: &str) -> Result<ContainerStatus> {
        let request = ContainerStatusRequest { container_id: id.to_owned(), verbose: false };
        let response = self.runtime.container_status(request).await?.into_inner();
        response.status.context("the runtime tells no status of a container")
    }
}
