//! From a pod's spec to what the container runtime is told.

use std::collections::HashMap;

use k8s_cri::v1::{
    Capability, ContainerConfig, ContainerMetadata, ImageSpec, Int64Value, KeyValue,
    LinuxContainerConfig, LinuxContainerSecurityContext, LinuxPodSandboxConfig,
    LinuxSandboxSecurityContext, NamespaceMode, NamespaceOption, PodSandboxConfig,
    PodSandboxMetadata,
};
use k8s_openapi::api::core::v1::{Container, Pod, PodSpec};

use super::KubeletOpts;
use crate::cri::UID_LABEL;

/// A pod's name, namespace, uid and spec.
#[derive(Clone, Debug)]
pub struct PodIdentity {
    pub namespace: String,
    pub name: String,
    pub uid: String,
    pub spec: PodSpec,
    annotations: HashMap<String, String>,
}

impl PodIdentity {
    pub fn of(pod: &Pod) -> Self {
        let metadata = &pod.metadata;
        Self {
            namespace: metadata.namespace.clone().unwrap_or_default(),
            name: metadata.name.clone().unwrap_or_default(),
            uid: metadata.uid.clone().unwrap_or_default(),
            spec: pod.spec.clone().unwrap_or_default(),
            annotations: metadata.annotations.clone().unwrap_or_default().into_iter().collect(),
        }
    }

    pub fn host_network(&self) -> bool {
        self.spec.host_network.unwrap_or(false)
    }

    fn labels(&self) -> HashMap<String, String> {
        let labels = [
            ("io.kubernetes.pod.name", &self.name),
            ("io.kubernetes.pod.namespace", &self.namespace),
            (UID_LABEL, &self.uid),
        ];
        labels.map(|(key, value)| (key.to_owned(), value.clone())).into()
    }

    fn namespaces(&self) -> NamespaceOption {
        let mode = |host: Option<bool>, otherwise| match host {
            Some(true) => NamespaceMode::Node,
            _ => otherwise,
        };
        NamespaceOption {
            network: mode(self.spec.host_network, NamespaceMode::Pod).into(),
            pid: mode(self.spec.host_pid, NamespaceMode::Container).into(),
            ipc: NamespaceMode::Pod.into(),
            ..NamespaceOption::default()
        }
    }

    /// The sandbox. `attempt` counts from 0: the runtime wants no name twice.
    pub fn sandbox(&self, opts: &KubeletOpts, attempt: u32) -> PodSandboxConfig {
        PodSandboxConfig {
            metadata: Some(PodSandboxMetadata {
                name: self.name.clone(),
                uid: self.uid.clone(),
                namespace: self.namespace.clone(),
                attempt,
            }),
            // The host's network comes with the host's own name.
            hostname: if self.host_network() { String::new() } else { self.name.clone() },
            log_directory: opts.logs.join(self.directory()).to_string_lossy().into_owned(),
            labels: self.labels(),
            annotations: self.annotations.clone(),
            linux: Some(LinuxPodSandboxConfig {
                cgroup_parent: format!("{}/kubepods/burstable/pod{}", opts.cgroup_parent, self.uid),
                security_context: Some(LinuxSandboxSecurityContext {
                    namespace_options: Some(self.namespaces()),
                    ..LinuxSandboxSecurityContext::default()
                }),
                ..LinuxPodSandboxConfig::default()
            }),
            ..PodSandboxConfig::default()
        }
    }

    /// The directory of its containers' output.
    pub fn directory(&self) -> String {
        format!("{}_{}_{}", self.namespace, self.name, self.uid)
    }

    /// A container of this pod.
    pub fn container(&self, container: &Container) -> ContainerConfig {
        let context = container.security_context.clone().unwrap_or_default();
        let pod = self.spec.security_context.clone().unwrap_or_default();
        let id =
            |own: Option<i64>, pods: Option<i64>| own.or(pods).map(|value| Int64Value { value });
        let added = context.capabilities.and_then(|capabilities| capabilities.add);
        let env = container.env.clone().unwrap_or_default();
        let mut labels = self.labels();
        labels.insert("io.kubernetes.container.name".to_owned(), container.name.clone());
        ContainerConfig {
            metadata: Some(ContainerMetadata { name: container.name.clone(), attempt: 0 }),
            image: Some(ImageSpec {
                image: container.image.clone().unwrap_or_default(),
                ..ImageSpec::default()
            }),
            command: container.command.clone().unwrap_or_default(),
            args: container.args.clone().unwrap_or_default(),
            envs: env
                .into_iter()
                .map(|var| KeyValue { key: var.name, value: var.value.unwrap_or_default() })
                .collect(),
            labels,
            log_path: format!("{}/0.log", container.name),
            linux: Some(LinuxContainerConfig {
                security_context: Some(LinuxContainerSecurityContext {
                    capabilities: added.map(|add_capabilities| Capability {
                        add_capabilities,
                        ..Capability::default()
                    }),
                    namespace_options: Some(self.namespaces()),
                    run_as_user: id(context.run_as_user, pod.run_as_user),
                    run_as_group: id(context.run_as_group, pod.run_as_group),
                    ..LinuxContainerSecurityContext::default()
                }),
                ..LinuxContainerConfig::default()
            }),
            ..ContainerConfig::default()
        }
    }
}

/// Whether an init container goes on beside the others.
pub fn is_sidecar(container: &Container) -> bool {
    container.restart_policy.as_deref() == Some("Always")
}
