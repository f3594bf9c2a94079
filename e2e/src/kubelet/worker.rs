//! The life of one pod.

use std::fs;
use std::future::Future;
use std::sync::Arc;

use anyhow::{Context as _, Result, anyhow};
use jiff::Timestamp;
use k8s_cri::v1::{ContainerState, ContainerStatus, PodSandboxConfig};
use k8s_openapi::api::core::v1::{Container, Pod};
use k8s_openapi::api::events::v1::Event;
use kube::api::{DeleteParams, Patch, PatchParams, PostParams, Preconditions};
use kube::{Api, Error};
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::time::sleep;

use super::config::{PodIdentity, is_sidecar};
use super::{Context, RETRY};
use crate::cri::Cri;

/// Runs one pod from its first sight to its end.
pub struct Worker {
    context: Arc<Context>,
    pod: PodIdentity,
    finished: bool,
    changes: watch::Receiver<Option<Pod>>,
}

/// A container that was started.
struct Started {
    name: String,
    id: String,
}

/// What the pod's status is made of.
#[derive(Default)]
struct Report {
    ips: Vec<String>,
    init: Vec<Started>,
    main: Vec<Started>,
}

impl Worker {
    /// The pod as it was first seen, and its changes from then on.
    pub fn new(context: Arc<Context>, pod: Pod, changes: watch::Receiver<Option<Pod>>) -> Self {
        let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
        let finished = matches!(phase, Some("Succeeded" | "Failed"));
        Self { context, pod: PodIdentity::of(&pod), finished, changes }
    }

    /// Runs it.
    pub async fn run(self) {
        let changes = self.changes.clone();
        let live = async {
            if !self.finished
                && let Err(err) = self.live().await
            {
                self.event("Failed", &format!("{err:#}")).await;
            }
            std::future::pending().await
        };
        let grace = tokio::select! {
            grace = deletion(changes) => grace,
            () = live => None,
        };
        self.end(grace.unwrap_or(0)).await;
    }

    /// Brings it up, and waits until it is over by itself.
    async fn live(&self) -> Result<()> {
        let mut cri = self.context.cri.clone();
        let (sandbox, config) = self.sandbox(&mut cri).await;
        let node_ip = self.context.opts.node_ip.to_string();
        let ips = match self.pod.host_network() {
            true => vec![node_ip],
            false => cri.sandbox(&sandbox).await?.ips,
        };
        let mut report = Report { ips, ..Report::default() };
        self.report("Pending", &report).await?;
        let (mut failed, mut cri) = (false, cri);
        for container in self.pod.spec.init_containers.iter().flatten() {
            report.init.push(self.start(&mut cri, &sandbox, &config, container).await?);
            self.report("Pending", &report).await?;
            if !is_sidecar(container) {
                let last = report.init.last().context("it was just started")?;
                failed = self.ended(&mut cri, &last.id).await?.exit_code != 0;
                self.report("Pending", &report).await?;
            }
            if failed {
                break;
            }
        }
        if !failed {
            for container in &self.pod.spec.containers {
                report.main.push(self.start(&mut cri, &sandbox, &config, container).await?);
            }
            self.report("Running", &report).await?;
            for container in &report.main {
                failed |= self.ended(&mut cri, &container.id).await?.exit_code != 0;
            }
        }
        // Sidecars go last.
        for container in &report.init {
            cri.stop_container(&container.id, self.grace()).await?;
        }
        self.report(if failed { "Failed" } else { "Succeeded" }, &report).await?;
        cri.stop_sandbox(&sandbox).await?;
        Ok(())
    }

    /// Tries until there is a sandbox. What CNI says on the way becomes events.
    async fn sandbox(&self, cri: &mut Cri) -> (String, PodSandboxConfig) {
        let mut attempt = 0;
        loop {
            let config = self.pod.sandbox(&self.context.opts, attempt);
            match cri.run_sandbox(config.clone()).await {
                Ok(id) => return (id, config),
                Err(status) => {
                    let note = format!("Failed to create pod sandbox: {}", status.message());
                    self.event("FailedCreatePodSandBox", &note).await;
                }
            }
            attempt += 1;
            sleep(RETRY).await;
        }
    }

    async fn start(
        &self,
        cri: &mut Cri,
        sandbox: &str,
        sandbox_config: &PodSandboxConfig,
        container: &Container,
    ) -> Result<Started> {
        let config = self.pod.container(container);
        let logs = self.context.opts.logs.join(self.pod.directory()).join(&container.name);
        fs::create_dir_all(&logs).with_context(|| format!("making {}", logs.display()))?;
        let id = cri
            .start_container(sandbox, config, sandbox_config.clone())
            .await
            .map_err(|status| anyhow!("{}", status.message()))
            .with_context(|| format!("starting the container {}", container.name))?;
        Ok(Started { name: container.name.clone(), id })
    }

    /// Waits until a container has ended.
    async fn ended(&self, cri: &mut Cri, id: &str) -> Result<ContainerStatus> {
        loop {
            let status = cri.container(id).await?;
            if status.state() == ContainerState::ContainerExited {
                return Ok(status);
            }
            sleep(RETRY / 4).await;
        }
    }

    fn grace(&self) -> i64 {
        self.pod.spec.termination_grace_period_seconds.unwrap_or(30)
    }

    /// Takes everything down and tells the API server, however often it has to try.
    async fn end(&self, grace: i64) {
        let mut cri = self.context.cri.clone();
        while let Err(err) = self.take_down(&mut cri, grace).await {
            self.event("FailedKillPod", &format!("{err:#}")).await;
            sleep(RETRY).await;
        }
        let params = DeleteParams {
            grace_period_seconds: Some(0),
            preconditions: Some(Preconditions {
                uid: Some(self.pod.uid.clone()),
                resource_version: None,
            }),
            ..DeleteParams::default()
        };
        let api = self.api();
        let delete = || async { api.delete(&self.pod.name, &params).await.map(drop) };
        if let Err(err) = insist(delete).await {
            eprintln!("kubelet: deleting {}: {err:#}", self.pod.name);
        }
    }

    async fn take_down(&self, cri: &mut Cri, grace: i64) -> Result<()> {
        for sandbox in cri.sandboxes(Some(&self.pod.uid)).await? {
            for container in cri.containers(&sandbox.id).await? {
                cri.stop_container(&container, grace).await?;
            }
            cri.stop_sandbox(&sandbox.id).await?;
            cri.remove_sandbox(&sandbox.id).await?;
        }
        Ok(())
    }

    fn api(&self) -> Api<Pod> {
        Api::namespaced(self.context.client.clone(), &self.pod.namespace)
    }

    /// Writes the pod's status.
    async fn report(&self, phase: &str, report: &Report) -> Result<()> {
        let running = phase == "Running";
        let mut status = json!({
            "phase": phase,
            "hostIP": self.context.opts.node_ip,
            "hostIPs": [{"ip": self.context.opts.node_ip}],
            "podIP": report.ips.first(),
            "podIPs": report.ips.iter().map(|ip| json!({"ip": ip})).collect::<Vec<_>>(),
            "conditions": [{
                "type": "Ready",
                "status": if running { "True" } else { "False" },
                "lastTransitionTime": Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string(),
            }],
        });
        for (field, started) in
            [("initContainerStatuses", &report.init), ("containerStatuses", &report.main)]
        {
            let mut all = Vec::new();
            for container in started {
                all.push(self.container_status(container).await?);
            }
            status[field] = json!(all);
        }
        let (api, params) = (self.api(), PatchParams::default());
        let patch = Patch::Merge(json!({
            "metadata": {"uid": self.pod.uid},
            "status": status,
        }));
        insist(|| async { api.patch_status(&self.pod.name, &params, &patch).await.map(drop) }).await
    }

    async fn container_status(&self, container: &Started) -> Result<Value> {
        let status = self.context.cri.clone().container(&container.id).await?;
        let time = |nanoseconds: i64| {
            let time = Timestamp::from_nanosecond(nanoseconds.into()).unwrap_or_default();
            time.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
        };
        let running = status.state() == ContainerState::ContainerRunning;
        let state = match status.state() {
            ContainerState::ContainerRunning => {
                json!({"running": {"startedAt": time(status.started_at)}})
            }
            ContainerState::ContainerExited => json!({"terminated": {
                "exitCode": status.exit_code,
                "reason": if status.exit_code == 0 { "Completed" } else { "Error" },
                "startedAt": time(status.started_at),
                "finishedAt": time(status.finished_at),
            }}),
            _ => json!({"waiting": {"reason": "ContainerCreating"}}),
        };
        Ok(json!({
            "name": container.name,
            "image": status.image.map(|image| image.image),
            "imageID": status.image_ref,
            "containerID": format!("containerd://{}", container.id),
            "restartCount": 0,
            "ready": running,
            "started": running,
            "state": state,
        }))
    }

    /// Records what went wrong. If that fails too, it stays unsaid: the next try has its own.
    async fn event(&self, reason: &str, note: &str) {
        // A note has 1024 bytes.
        let short: String = note.chars().take(1000).collect();
        let event = json!({
            "metadata": {"generateName": format!("{}.", self.pod.name)},
            "eventTime": Timestamp::now().strftime("%Y-%m-%dT%H:%M:%S%.6fZ").to_string(),
            "reportingController": "kubelet",
            "reportingInstance": self.context.opts.node,
            "action": "Run",
            "reason": reason,
            "type": "Warning",
            "note": short,
            "regarding": {
                "apiVersion": "v1",
                "kind": "Pod",
                "namespace": self.pod.namespace,
                "name": self.pod.name,
                "uid": self.pod.uid,
            },
        });
        let api: Api<Event> = Api::namespaced(self.context.client.clone(), &self.pod.namespace);
        let created = match serde_json::from_value(event) {
            Ok(event) => api.create(&PostParams::default(), &event).await.map(drop),
            Err(err) => Err(Error::SerdeError(err)),
        };
        if let Err(err) = created {
            eprintln!("kubelet: {}: {note}; no event: {err:#}", self.pod.name);
        }
    }
}

/// Waits until the pod is to be deleted, and gives the grace in seconds; none when it is gone
/// from the API server already.
async fn deletion(mut changes: watch::Receiver<Option<Pod>>) -> Option<i64> {
    loop {
        let grace = match &*changes.borrow_and_update() {
            None => Some(None),
            Some(pod) if pod.metadata.deletion_timestamp.is_some() => {
                Some(pod.metadata.deletion_grace_period_seconds)
            }
            Some(_) => None,
        };
        if let Some(grace) = grace {
            return grace;
        }
        if changes.changed().await.is_err() {
            return std::future::pending().await;
        }
    }
}

/// Asks the API server until it answers. That the pod is gone, or another one now, is fine.
async fn insist<F: Future<Output = Result<(), Error>>>(ask: impl Fn() -> F) -> Result<()> {
    loop {
        match ask().await {
            Ok(()) => return Ok(()),
            Err(Error::Api(status)) if matches!(status.code, 404 | 409) => return Ok(()),
            Err(Error::Api(status)) => return Err(Error::Api(status).into()),
            Err(_) => sleep(RETRY).await,
        }
    }
}
