//! The server as the real client library sees it.

use std::future::Future;
use std::pin::pin;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use futures_util::{Stream, StreamExt as _};
use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::{Namespace, Pod};
use k8s_openapi::api::events::v1::Event as K8sEvent;
use kube::api::{
    Api, DeleteParams, ListParams, Patch, PatchParams, PostParams, VersionMatch, WatchEvent,
    WatchParams,
};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::core::{PartialObjectMeta, Status};
use kube::runtime::reflector;
use kube::runtime::watcher::{self, Event};
use kube::runtime::{WatchStreamExt as _, watcher as watch};
use kube::{Client, Config, Error, ResourceExt as _};
use serde_json::{Value, json};
use tokio::time::timeout;

use super::{ApiServer, Gone};

fn server() -> Result<ApiServer> {
    ApiServer::start("127.0.0.1:0".parse()?)
}

async fn client(server: &ApiServer) -> Result<Client> {
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("kubeconfig");
    server.write_kubeconfig(&file)?;
    let kubeconfig = Kubeconfig::read_from(file)?;
    let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?;
    Ok(Client::try_from(config)?)
}

fn pod(name: &str, node: &str) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": "default", "labels": {"app": name}},
        "spec": {"nodeName": node, "containers": [{"name": "app", "image": "app"}]},
    })
}

/// Fails rather than hangs.
async fn soon<T>(what: &str, future: impl Future<Output = T>) -> Result<T> {
    timeout(Duration::from_secs(20), future).await.with_context(|| format!("waiting for {what}"))
}

async fn next<T>(stream: &mut (impl Stream<Item = T> + Unpin)) -> Result<T> {
    soon("an event", stream.next()).await?.context("the stream ended")
}

/// `+a` for one that came or changed, `-a` for one that went, a word for the rest.
fn told<K: kube::Resource>(event: &Event<K>) -> String {
    match event {
        Event::Apply(object) => format!("+{}", object.meta().name.clone().unwrap_or_default()),
        Event::Delete(object) => format!("-{}", object.meta().name.clone().unwrap_or_default()),
        Event::Init => "init".to_owned(),
        Event::InitApply(object) => {
            format!("={}", object.meta().name.clone().unwrap_or_default())
        }
        Event::InitDone => "done".to_owned(),
    }
}

fn code(error: Error) -> Result<(u16, String)> {
    match error {
        Error::Api(status) => Ok((status.code, status.reason.clone())),
        other => bail!("not a Status: {other:?}"),
    }
}

#[tokio::test]
async fn watcher_sees_what_the_field_selector_takes() -> Result<()> {
    let server = server()?;
    server.put(pod("a", "n1"))?;
    server.put(pod("b", "n2"))?;
    let api: Api<Pod> = Api::all(client(&server).await?);
    let config = watcher::Config::default().fields("spec.nodeName=n1").page_size(1);
    let mut events = pin!(watch(api, config));
    for wanted in ["init", "=a", "done"] {
        assert_eq!(told(&next(&mut events).await??), wanted);
    }
    // One that comes into the selection, and falls out of it again.
    server.put(pod("c", ""))?;
    server.patch("pods", "default", "c", &json!({"spec": {"nodeName": "n1"}}))?;
    server.patch("pods", "default", "b", &json!({"metadata": {"annotations": {"x": "y"}}}))?;
    server.patch("pods", "default", "a", &json!({"metadata": {"annotations": {"x": "y"}}}))?;
    server.patch("pods", "default", "c", &json!({"spec": {"nodeName": "n2"}}))?;
    server.delete("pods", "default", "a")?;
    for wanted in ["+c", "+a", "-c", "-a"] {
        assert_eq!(told(&next(&mut events).await??), wanted);
    }
    Ok(())
}

#[tokio::test]
async fn metadata_alone() -> Result<()> {
    let server = server()?;
    server.put(pod("a", "n1"))?;
    let client = client(&server).await?;
    let api: Api<Pod> = Api::default_namespaced(client.clone());
    let mut events = pin!(watch(
        Api::<PartialObjectMeta<Pod>>::default_namespaced(client.clone()),
        watcher::Config::default().labels("app=a")
    ));
    for wanted in ["init", "=a", "done"] {
        assert_eq!(told(&next(&mut events).await??), wanted);
    }
    server.patch("pods", "default", "a", &json!({"metadata": {"labels": {"x": "y"}}}))?;
    let Event::Apply(partial) = next(&mut events).await?? else { bail!("no change") };
    assert_eq!(partial.labels()["x"], "y");
    assert_eq!(partial.types.context("no kind")?.kind, "PartialObjectMetadata");
    let list = api.list_metadata(&ListParams::default()).await?;
    assert_eq!(list.items[0].name_any(), "a");
    Ok(())
}

#[tokio::test]
async fn compaction_makes_watchers_list_again() -> Result<()> {
    let server = server()?;
    server.put(pod("a", "n1"))?;
    let client = client(&server).await?;
    let api: Api<Pod> = Api::all(client.clone());
    let old = api.list(&ListParams::default()).await?.metadata.resource_version.unwrap_or_default();

    // A running watch is told so by an event, and so is one that begins too early.
    let running = api.watch(&WatchParams::default(), &old).await?.boxed();
    server.compact(Gone::Event);
    let late = api.watch(&WatchParams::default(), &old).await?.boxed();
    for mut events in [running, late] {
        let WatchEvent::Error(status) = next(&mut events).await?? else { bail!("no error") };
        assert_eq!((status.code, status.reason.as_str()), (410, "Expired"));
        ensure!(soon("the end", events.next()).await?.is_none(), "the watch goes on");
    }

    // Or by the HTTP status; one that begins now is not refused.
    server.compact(Gone::Status);
    let Err(err) = api.watch(&WatchParams::default(), &old).await else { bail!("not refused") };
    assert_eq!(code(err)?, (410, "Expired".to_owned()));
    let now = api.list(&ListParams::default()).await?.metadata.resource_version.unwrap_or_default();
    let _ = api.watch(&WatchParams::default(), &now).await?;

    // And a watcher copes.
    let mut events = pin!(watch(api, watcher::Config::default()).default_backoff());
    for wanted in ["init", "=a", "done"] {
        assert_eq!(told(&next(&mut events).await??), wanted);
    }
    // It is watching, not only listed: else the next list would be its first one.
    server.patch("pods", "default", "a", &json!({"metadata": {"labels": {"x": "y"}}}))?;
    assert_eq!(told(&next(&mut events).await??), "+a");
    server.compact(Gone::Event);
    server.put(pod("b", "n1"))?;
    let mut seen = Vec::new();
    while seen.last().map(String::as_str) != Some("done") {
        match next(&mut events).await? {
            Ok(event) => seen.push(told(&event)),
            Err(err) => seen.push(format!("{err:?}").contains("410").to_string()),
        }
    }
    assert_eq!(seen, ["true", "init", "=a", "=b", "done"]);
    Ok(())
}

#[tokio::test]
async fn reflector_survives_a_server_that_goes_and_comes() -> Result<()> {
    let server = server()?;
    server.put(pod("a", "n1"))?;
    let api: Api<Pod> = Api::all(client(&server).await?);
    let (store, writer) = reflector::store();
    let events = watch(api.clone(), watcher::Config::default()).default_backoff();
    let reflected = tokio::spawn(reflector(writer, events).for_each(|_| async {}));
    soon("the first list", store.wait_until_ready()).await??;
    let names = || {
        let mut names: Vec<String> = store.state().iter().map(|pod| pod.name_any()).collect();
        names.sort();
        names
    };
    assert_eq!(names(), ["a"]);
    server.stop()?;
    ensure!(api.list(&ListParams::default()).await.is_err(), "a stopped server answers");
    server.delete("pods", "default", "a")?;
    server.put(pod("b", "n1"))?;
    server.compact(Gone::Event);
    server.resume()?;
    soon("the change", async {
        while names() != ["b"] {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await?;
    reflected.abort();
    Ok(())
}

#[tokio::test]
async fn bookmarks_and_the_end_of_a_watch() -> Result<()> {
    let server = server()?;
    let api: Api<Pod> = Api::all(client(&server).await?);
    let version = api.list(&ListParams::default()).await?.metadata.resource_version;
    let params = WatchParams::default().fields("spec.nodeName=n1").timeout(1);
    let mut events = pin!(api.watch(&params, &version.unwrap_or_default()).await?.boxed());
    let other = server.put(pod("b", "n2"))?;
    let WatchEvent::Bookmark(bookmark) = next(&mut events).await?? else { bail!("no bookmark") };
    assert_eq!(bookmark.metadata.resource_version, other["metadata"]["resourceVersion"]);
    let WatchEvent::Bookmark(_) = next(&mut events).await?? else { bail!("no last bookmark") };
    ensure!(soon("the end", events.next()).await?.is_none(), "the watch goes on");

    // Without them only the objects come.
    let params = WatchParams::default().disable_bookmarks();
    let mut events = pin!(api.watch(&params, "0").await?.boxed());
    let WatchEvent::Added(pod) = next(&mut events).await?? else { bail!("not added") };
    assert_eq!(pod.name_any(), "b");
    Ok(())
}

#[tokio::test]
async fn streaming_lists_are_refused() -> Result<()> {
    let server = server()?;
    let api: Api<Pod> = Api::all(client(&server).await?);
    let mut events = pin!(watch(api, watcher::Config::default().streaming_lists()));
    let Err(err) = next(&mut events).await? else { bail!("not refused") };
    ensure!(format!("{err:?}").contains("422"), "{err:?}");
    Ok(())
}

#[tokio::test]
async fn pages_are_of_one_version() -> Result<()> {
    let server = server()?;
    for name in ["a", "b", "c"] {
        server.put(pod(name, "n1"))?;
    }
    let api: Api<Pod> = Api::all(client(&server).await?);
    let names = |list: &kube::api::ObjectList<Pod>| -> Vec<String> {
        list.items.iter().map(|pod| pod.name_any()).collect()
    };
    let first = api.list(&ListParams::default().limit(2)).await?;
    assert_eq!(names(&first), ["a", "b"]);
    assert_eq!(first.metadata.remaining_item_count, Some(1));
    server.delete("pods", "default", "c")?;
    let token = first.metadata.continue_.clone().unwrap_or_default();
    let second = api.list(&ListParams::default().limit(2).continue_token(&token)).await?;
    assert_eq!(names(&second), ["c"]);
    assert_eq!(second.metadata.resource_version, first.metadata.resource_version);
    assert_eq!(second.metadata.continue_, None);

    let version = first.metadata.resource_version.unwrap_or_default();
    let exact = ListParams::default().at(&version).matching(VersionMatch::Exact);
    assert_eq!(names(&api.list(&exact).await?), ["a", "b", "c"]);
    let newer = ListParams::default().at(&version).matching(VersionMatch::NotOlderThan);
    assert_eq!(names(&api.list(&newer).await?), ["a", "b"]);
    server.compact(Gone::Event);
    for params in [exact, ListParams::default().limit(2).continue_token(&token)] {
        let Err(err) = api.list(&params).await else { bail!("not refused") };
        assert_eq!(code(err)?.0, 410);
    }
    Ok(())
}

#[tokio::test]
async fn events_are_created_and_patched() -> Result<()> {
    let server = server()?;
    let api: Api<K8sEvent> = Api::default_namespaced(client(&server).await?);
    let event = json!({
        "metadata": {"generateName": "cart-"},
        "eventTime": "2026-01-01T00:00:00.000000Z",
        "reportingController": "sidestep.io/agent",
        "reportingInstance": "n1",
        "action": "Enroll",
        "reason": "Refused",
        "type": "Warning",
        "note": "no",
        "regarding": {"kind": "Pod", "namespace": "default", "name": "cart"},
    });
    let created =
        api.create(&PostParams::default(), &serde_json::from_value(event.clone())?).await?;
    let name = created.name_any();
    ensure!(name.starts_with("cart-") && name.len() == 10, "{name}");
    let series = json!({"series": {"count": 2, "lastObservedTime": "2026-01-01T00:00:09.000000Z"}});
    api.patch(&name, &PatchParams::default(), &Patch::Merge(&series)).await?;
    let kept = server.get("events.events.k8s.io", "default", &name)?.context("it is gone")?;
    assert_eq!(kept["series"]["count"], 2);

    for (field, wrong) in [
        ("eventTime", Value::Null),
        ("action", Value::Null),
        ("type", json!("Bad")),
        ("regarding", json!({"namespace": "kube-system"})),
    ] {
        let mut event = event.clone();
        event[field] = wrong;
        let event = serde_json::from_value(event)?;
        let Err(err) = api.create(&PostParams::default(), &event).await else { bail!("{field}") };
        assert_eq!(code(err)?, (422, "Invalid".to_owned()), "{field}");
    }
    Ok(())
}

#[tokio::test]
async fn writes() -> Result<()> {
    let server = server()?;
    let client = client(&server).await?;
    let pods: Api<Pod> = Api::default_namespaced(client.clone());
    let new: Pod = serde_json::from_value(pod("a", "n1"))?;
    let created = pods.create(&PostParams::default(), &new).await?;
    ensure!(created.metadata.uid.is_some() && created.metadata.creation_timestamp.is_some());
    let Err(err) = pods.create(&PostParams::default(), &new).await else { bail!("made twice") };
    assert_eq!(code(err)?, (409, "AlreadyExists".to_owned()));

    // The status has a path of its own, and only there it is written.
    let params = PatchParams::default();
    let both = json!({"metadata": {"labels": {"x": "y"}}, "status": {"phase": "Running"}});
    let patched = pods.patch("a", &params, &Patch::Merge(&both)).await?;
    assert_eq!(patched.labels()["x"], "y");
    assert_eq!(patched.status.and_then(|status| status.phase).as_deref(), Some("Pending"));
    let both = json!({"metadata": {"labels": {"x": "z"}}, "status": {"phase": "Running"}});
    let patched = pods.patch_status("a", &params, &Patch::Strategic(&both)).await?;
    assert_eq!(patched.labels()["x"], "y");
    assert_eq!(patched.status.and_then(|status| status.phase).as_deref(), Some("Running"));
    let stale = json!({"metadata": {"resourceVersion": created.resource_version()}});
    let Err(err) = pods.patch("a", &params, &Patch::Merge(&stale)).await else { bail!("stale") };
    assert_eq!(code(err)?, (409, "Conflict".to_owned()));

    // Deleting says so first; the kubelet's own deletion ends it.
    let going = pods.delete("a", &DeleteParams::default()).await?.left().context("it is gone")?;
    ensure!(going.metadata.deletion_timestamp.is_some());
    assert_eq!(going.metadata.deletion_grace_period_seconds, Some(30));
    pods.delete("a", &DeleteParams::default().grace_period(0)).await?;
    let Err(err) = pods.get("a").await else { bail!("it is still there") };
    assert_eq!(code(err)?, (404, "NotFound".to_owned()));

    let spaces: Api<Namespace> = Api::all(client.clone());
    let new: Namespace = serde_json::from_value(json!({"metadata": {"name": "shop"}}))?;
    spaces.create(&PostParams::default(), &new).await?;
    let labelled = ListParams::default().labels("kubernetes.io/metadata.name=shop");
    assert_eq!(spaces.list(&labelled).await?.items.len(), 1);
    let elsewhere: Api<Pod> = Api::namespaced(client, "nowhere");
    let mut new = pod("a", "n1");
    new["metadata"]["namespace"] = json!("nowhere");
    let new = serde_json::from_value(new)?;
    let Err(err) = elsewhere.create(&PostParams::default(), &new).await else { bail!("made") };
    assert_eq!(code(err)?.0, 404);
    Ok(())
}

#[tokio::test]
async fn refusals_and_the_log_of_requests() -> Result<()> {
    let server = server()?;
    server.put(json!({
        "apiVersion": "apps/v1",
        "kind": "DaemonSet",
        "metadata": {"name": "sidestep", "namespace": "kube-system"},
    }))?;
    let sets: Api<DaemonSet> = Api::namespaced(client(&server).await?, "kube-system");
    sets.get("sidestep").await?;
    server.forbid("get", "daemonsets");
    let Err(err) = sets.get("sidestep").await else { bail!("not forbidden") };
    let Error::Api(status) = err else { bail!("{err:?}") };
    let Status { code, reason, message, .. } = *status;
    assert_eq!((code, reason.as_str()), (403, "Forbidden"));
    ensure!(message.contains("cannot get resource \"daemonsets\""), "{message}");
    server.allow("get", "daemonsets");
    sets.get("sidestep").await?;
    let paths: Vec<String> = server.requests().into_iter().map(|request| request.path).collect();
    assert_eq!(paths, ["/apis/apps/v1/namespaces/kube-system/daemonsets/sidestep"; 3]);

    let mut kubeconfig = server.kubeconfig();
    kubeconfig["users"][0]["user"]["token"] = json!("another");
    let kubeconfig: Kubeconfig = serde_json::from_value(kubeconfig)?;
    let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?;
    let stranger: Api<Pod> = Api::all(Client::try_from(config)?);
    let Err(err) = stranger.list(&ListParams::default()).await else { bail!("let in") };
    assert_eq!(self::code(err)?.0, 401);
    Ok(())
}
