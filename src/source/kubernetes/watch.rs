//! Watches that never end, and the fields of objects that are kept.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use futures_util::{Stream, StreamExt, pin_mut, stream};
use k8s_openapi::api::core::v1::{Container, Pod, PodSpec, PodStatus};
use kube::runtime::{WatchStreamExt, watcher};
use tokio::{
    sync::mpsc,
    task,
    time::{sleep, timeout},
};

use super::errors::{Failing, explained, note};
use crate::mesh::facts;

/// The longest silence of a list or a watch: the API server itself ends each watch after 290
/// seconds.
pub(super) const SILENCE: Duration = Duration::from_secs(300);
/// A watch that fails does so more often than this: kube pauses for a minute at most.
const QUIET: Duration = Duration::from_secs(SILENCE.as_secs() + 100);
/// The pause before a list that the API server has asked for by 410.
const RELIST: Duration = Duration::from_secs(1);

/// Follows a watch for ever, and tells of each change. Fails never: errors are noted. A watch that
/// goes on where it was cut off tells nothing before the next change: that no try has failed for
/// long enough is how its end of trouble is known.
pub(super) fn follow<K: 'static>(
    what: &'static str,
    watch: impl Stream<Item = watcher::Result<watcher::Event<K>>> + 'static + Send,
    failing: &Arc<Mutex<Failing>>,
    changed: &mpsc::Sender<()>,
) {
    let (failing, changed) = (Arc::clone(failing), changed.clone());
    task::spawn(async move {
        let watch = watch.default_backoff();
        pin_mut!(watch);
        loop {
            match timeout(QUIET, watch.next()).await {
                Ok(None) => return,
                // A relist has no effect until it is complete.
                Ok(Some(Ok(watcher::Event::Init | watcher::Event::InitApply(_)))) => continue,
                Ok(Some(Ok(_))) | Err(_) => note(&failing, what, None),
                Ok(Some(Err(error))) => note(&failing, what, Some(watch_error(what, &error))),
            }
            // One unread notification is enough.
            let _ = changed.try_send(());
        }
    });
}

/// A watch that lists again where the API server has forgotten its version, which it says by 410.
/// To a watcher that is one failure more: after a long absence it would wait for another minute
/// first. And where its start is answered so, it would ask for the same version for ever.
pub(super) fn relisting<K, W>(
    make: impl Fn() -> W,
) -> impl Stream<Item = watcher::Result<watcher::Event<K>>>
where
    W: Stream<Item = watcher::Result<watcher::Event<K>>>,
{
    stream::unfold((Box::pin(make()), make), async |(mut watch, make)| {
        loop {
            match watch.next().await? {
                Err(watcher::Error::WatchStartFailed(kube::Error::Api(status)))
                    if status.code == 410 =>
                {
                    watch = Box::pin(make());
                }
                Err(watcher::Error::WatchError(status)) if status.code == 410 => {}
                event => return Some((event, (watch, make))),
            }
            sleep(RELIST).await;
        }
    })
}

fn watch_error(what: &str, error: &watcher::Error) -> String {
    match error {
        watcher::Error::InitialListFailed(error) => format!("{:#}", explained("list", what, error)),
        watcher::Error::WatchStartFailed(error) | watcher::Error::WatchFailed(error) => {
            format!("{:#}", explained("watch", what, error))
        }
        watcher::Error::WatchError(status) => {
            format!(
                "cannot watch {what}: the API server answered {} ({})",
                status.message, status.code
            )
        }
        watcher::Error::NoResourceVersion => {
            format!("cannot watch {what}: the API server's answer has no resourceVersion")
        }
    }
}

/// Drops the fields that neither [`facts::facts`] nor the search for namespaces reads: a Pod object
/// is some 10 KB, most of it volumes, probes and conditions.
pub(super) fn keep_needed(pod: &mut Pod) {
    let meta = &mut pod.metadata;
    meta.managed_fields = None;
    meta.owner_references = None;
    meta.finalizers = None;
    if let Some(annotations) = &mut meta.annotations {
        annotations.remove("kubectl.kubernetes.io/last-applied-configuration");
    }
    if let Some(spec) = pod.spec.take() {
        let slim =
            |containers: Vec<Container>| containers.into_iter().map(keep_container).collect();
        pod.spec = Some(PodSpec {
            host_network: spec.host_network,
            init_containers: spec.init_containers.map(slim),
            containers: slim(spec.containers),
            ..PodSpec::default()
        });
    }
    if let Some(status) = pod.status.take() {
        pod.status =
            Some(PodStatus { phase: status.phase, pod_ips: status.pod_ips, ..Default::default() });
    }
}

fn keep_container(container: Container) -> Container {
    Container {
        name: container.name,
        args: container.args,
        env: container
            .env
            .map(|env| env.into_iter().filter(|one| facts::reads_env(&one.name)).collect()),
        restart_policy: container.restart_policy,
        security_context: container.security_context,
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{super::errors::lock, *};

    #[tokio::test(start_paused = true)]
    async fn a_watch_that_goes_on_where_it_was_is_no_problem_for_long() {
        let failing = Arc::new(Mutex::new(Failing::default()));
        let (changed, mut told) = mpsc::channel(1);
        let cut = watcher::Error::NoResourceVersion;
        let watch = stream::iter([Err::<watcher::Event<Pod>, _>(cut)]).chain(stream::pending());
        follow("pods", watch, &failing, &changed);
        told.recv().await.expect("told");
        assert_eq!(lock(&failing).now.len(), 1);
        told.recv().await.expect("told");
        assert!(lock(&failing).now.is_empty());
        assert_eq!(lock(&failing).counts["pods"], 1);
    }

    #[test]
    fn what_is_dropped_changes_no_facts() {
        let pod = json!({
            "metadata": {
                "name": "p", "namespace": "n", "uid": "u", "resourceVersion": "1",
                "labels": {"sidecar.istio.io/inject": "true"},
                "annotations": {
                    "sidecar.istio.io/status": "{}",
                    "kubectl.kubernetes.io/last-applied-configuration": "x".repeat(4000),
                    "traffic.sidecar.istio.io/excludeOutboundPorts": "25",
                },
                "managedFields": [{"manager": "kubelet", "operation": "Update", "fieldsType": "FieldsV1",
                                   "fieldsV1": {"f:status": {}}}],
                "ownerReferences": [{"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "r", "uid": "x"}],
            },
            "spec": {
                "hostNetwork": false, "nodeName": "here",
                "volumes": [{"name": "v", "emptyDir": {}}],
                "initContainers": [{
                    "name": "istio-proxy", "image": "i", "restartPolicy": "Always",
                    "args": ["proxy", "sidecar"],
                    "env": [{"name": "ISTIO_META_DNS_CAPTURE", "value": "true"},
                            {"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}],
                    "securityContext": {"runAsUser": 1400},
                }],
                "containers": [{"name": "app", "image": "i", "volumeMounts": [{"name": "v", "mountPath": "/v"}]}],
            },
            "status": {
                "phase": "Running", "podIPs": [{"ip": "10.0.0.1"}],
                "conditions": [{"type": "Ready", "status": "True"}],
            },
        });
        let whole: Pod = serde_json::from_value(pod).expect("a pod");
        let mut slim = whole.clone();
        keep_needed(&mut slim);
        let facts = facts::facts(&whole).expect("facts").expect("in a mesh");
        assert_eq!(facts.facts.proxy_uid, Some(1400));
        assert_eq!(facts.facts.dns_port, Some(15053));
        assert_eq!(facts::facts(&slim).expect("facts"), Some(facts));
        let size = |pod: &Pod| serde_json::to_string(pod).expect("JSON").len();
        assert!(size(&slim) * 4 < size(&whole), "{} of {}", size(&slim), size(&whole));
    }
}
