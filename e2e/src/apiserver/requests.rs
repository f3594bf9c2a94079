//! What each request does.

use std::sync::{Arc, PoisonError};
use std::time::Duration;

use axum::body::{Body, to_bytes};
use axum::extract::{Query, State};
use axum::http::{HeaderMap, Method, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::time::Instant;
use uuid::Uuid;

use super::kind::{Kind, Target};
use super::selector::Selector;
use super::status::Failure;
use super::store::{Key, Store, merge, now};
use super::watch::Watch;
use super::{Gone, Request, Shared, TOKEN, USER};

/// The longest body that is read, in bytes.
const MAX_BODY: usize = 4 << 20;
const PATCHES: &str = "application/merge-patch+json, application/strategic-merge-patch+json";

/// The options of lists, watches and deletions. Empty is the same as absent.
#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Options {
    watch: String,
    allow_watch_bookmarks: String,
    send_initial_events: String,
    timeout_seconds: Option<u64>,
    field_selector: String,
    label_selector: String,
    limit: Option<usize>,
    #[serde(rename = "continue")]
    continue_: String,
    resource_version: String,
    resource_version_match: String,
    grace_period_seconds: Option<u64>,
}

fn is_true(text: &str) -> bool {
    matches!(text, "1" | "true")
}

/// Whether objects are given whole, or their metadata alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum View {
    /// Whole.
    Whole,
    /// As `PartialObjectMetadata`.
    Metadata,
}

impl View {
    fn asked(headers: &HeaderMap) -> Self {
        let accept = headers.get(header::ACCEPT).and_then(|accept| accept.to_str().ok());
        let words: Vec<&str> =
            accept.unwrap_or_default().split([';', ',']).map(str::trim).collect();
        let metadata = ["as=PartialObjectMetadata", "as=PartialObjectMetadataList"];
        match words.iter().any(|word| metadata.contains(word)) {
            true if words.contains(&"g=meta.k8s.io") && words.contains(&"v=v1") => Self::Metadata,
            _ => Self::Whole,
        }
    }

    /// The object as it is to be given.
    pub fn of(self, object: &Value) -> Value {
        match self {
            Self::Whole => object.clone(),
            Self::Metadata => json!({
                "kind": "PartialObjectMetadata",
                "apiVersion": "meta.k8s.io/v1",
                "metadata": object["metadata"],
            }),
        }
    }
}

/// Answers a request.
pub async fn handle(
    State(shared): State<Arc<Shared>>,
    method: Method,
    uri: Uri,
    headers: HeaderMap,
    body: Body,
) -> Response {
    shared.requests.lock().unwrap_or_else(PoisonError::into_inner).push(Request {
        method: method.to_string(),
        path: uri.path().to_owned(),
        query: uri.query().unwrap_or_default().to_owned(),
    });
    let answered = answer(&shared, &method, &uri, &headers, body).await;
    answered.unwrap_or_else(IntoResponse::into_response)
}

async fn answer(
    shared: &Arc<Shared>,
    method: &Method,
    uri: &Uri,
    headers: &HeaderMap,
    body: Body,
) -> Result<Response, Failure> {
    match uri.path() {
        "/version" => return Ok(json_response(StatusCode::OK, &version())),
        "/livez" | "/readyz" | "/healthz" => return Ok("ok".into_response()),
        _ => {}
    }
    let token = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    if token.and_then(|value| value.strip_prefix("Bearer ")) != Some(TOKEN) {
        return Err(Failure::unauthorized());
    }
    let target = Target::parse(uri.path()).ok_or_else(Failure::no_such_path)?;
    let Query(options) = Query::<Options>::try_from_uri(uri)
        .map_err(|err| Failure::bad_request(format!("{}: {err}", uri.query().unwrap_or(""))))?;
    let verb = match (method.as_str(), &target.name) {
        ("GET", Some(_)) => "get",
        ("GET", None) if is_true(&options.watch) => "watch",
        ("GET", None) => "list",
        ("POST", None) => "create",
        ("PUT", Some(_)) => "update",
        ("PATCH", Some(_)) => "patch",
        ("DELETE", Some(_)) => "delete",
        _ => return Err(Failure::method_not_allowed()),
    };
    let rule = (verb.to_owned(), target.resource());
    if shared.forbidden.lock().unwrap_or_else(PoisonError::into_inner).contains(&rule) {
        let (namespace, name) = (target.namespace.as_deref(), target.name.as_deref());
        let name = name.unwrap_or_default();
        return Err(Failure::forbidden(target.kind, verb, &rule.1, namespace, name, USER));
    }
    let known = match target.subresource.as_deref() {
        None => true,
        Some("status") => target.kind.status && matches!(verb, "get" | "update" | "patch"),
        Some(_) => false,
    };
    if !known {
        return Err(Failure::no_such_path());
    }
    let view = View::asked(headers);
    if verb == "watch" {
        return watch(shared, &target, &options, view);
    }
    if verb == "list" {
        return list(&shared.store(), &target, &options, view);
    }
    let body = to_bytes(body, MAX_BODY)
        .await
        .map_err(|err| Failure::bad_request(format!("reading the body: {err}")))?;
    let content = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
    let content = content.unwrap_or_default().split(';').next().unwrap_or_default();
    let read = |accepted: &str| {
        if !accepted.split(", ").any(|kind| kind == content) {
            return Err(Failure::unsupported_media_type(accepted));
        }
        serde_json::from_slice::<Value>(&body)
            .map_err(|err| Failure::bad_request(format!("the body is no JSON: {err}")))
    };
    let (code, object) = match verb {
        "create" => {
            let object = read("application/json")?;
            (StatusCode::CREATED, shared.change(|store| create(store, &target, object))?)
        }
        "update" => {
            let object = read("application/json")?;
            (StatusCode::OK, shared.change(|store| update(store, &target, |_| object))?)
        }
        "patch" => {
            let patch = read(PATCHES)?;
            let apply = |mut object: Value| {
                merge(&mut object, &patch);
                object
            };
            (StatusCode::OK, shared.change(|store| update(store, &target, apply))?)
        }
        "delete" => {
            let body = if body.is_empty() { Value::Null } else { read("application/json")? };
            let grace = options.grace_period_seconds;
            (StatusCode::OK, shared.change(|store| delete(store, &target, grace, &body))?)
        }
        _ => {
            let key = key(&target)?;
            let store = shared.store();
            let object = store.get(&key);
            let object = object.ok_or_else(|| Failure::not_found(key.kind, &key.name))?;
            (StatusCode::OK, object.clone())
        }
    };
    Ok(json_response(code, &view.of(&object)))
}

fn json_response(code: StatusCode, value: &Value) -> Response {
    (code, [(header::CONTENT_TYPE, "application/json")], value.to_string()).into_response()
}

fn version() -> Value {
    json!({
        "major": "1",
        "minor": "30",
        "gitVersion": "v1.30.0-e2e",
        "gitCommit": "",
        "gitTreeState": "clean",
        "buildDate": "2024-01-01T00:00:00Z",
        "goVersion": "",
        "compiler": "",
        "platform": "linux/amd64",
    })
}

fn key(target: &Target) -> Result<Key, Failure> {
    let namespace = target.namespace.clone().unwrap_or_default();
    let name = target.name.clone().ok_or_else(Failure::method_not_allowed)?;
    Ok(Key { kind: target.kind, namespace, name })
}

fn select(target: &Target, options: &Options) -> Result<Selector, Failure> {
    let namespace = target.namespace.as_deref();
    Selector::parse(target.kind, namespace, &options.label_selector, &options.field_selector)
}

/// The version that was asked for: none for any.
fn asked_version(options: &Options) -> Result<Option<u64>, Failure> {
    match options.resource_version.as_str() {
        "" | "0" => Ok(None),
        text => text.parse().map(Some).map_err(|_| {
            let what = format!("resourceVersion: Invalid value: {text:?}: must be a number");
            Failure::invalid("ListOptions.meta.k8s.io", "", &what)
        }),
    }
}

fn watch(
    shared: &Arc<Shared>,
    target: &Target,
    options: &Options,
    view: View,
) -> Result<Response, Failure> {
    let invalid = |what: &str| Err(Failure::invalid("ListOptions.meta.k8s.io", "", what));
    if !options.send_initial_events.is_empty() {
        return invalid(
            "sendInitialEvents: Forbidden: sendInitialEvents is forbidden for watch unless the \
             WatchList feature gate is enabled",
        );
    }
    if !options.resource_version_match.is_empty() {
        return invalid(
            "resourceVersionMatch: Forbidden: resourceVersionMatch is forbidden for watch unless \
             sendInitialEvents is provided",
        );
    }
    let selector = select(target, options)?;
    let version = asked_version(options)?;
    if let Some(version) = version {
        let store = shared.store();
        if version < store.compacted() && *shared.gone() == Gone::Status {
            let (oldest, asked) = (store.compacted(), version);
            return Err(Failure::expired(format!("too old resource version: {asked} ({oldest})")));
        }
        if version > store.version() {
            return Err(Failure::too_large_version(version, store.version()));
        }
    }
    let deadline = options.timeout_seconds.filter(|seconds| *seconds > 0);
    let deadline = deadline.map(|seconds| Instant::now() + Duration::from_secs(seconds));
    let bookmarks = is_true(&options.allow_watch_bookmarks);
    let watch = Watch::new(shared, selector, view, version, bookmarks, deadline);
    Ok(([(header::CONTENT_TYPE, "application/json")], watch.into_body()).into_response())
}

/// Where the next page begins: the version of the first page, and the last object on this one.
#[derive(Debug, Deserialize)]
struct Continue {
    version: u64,
    namespace: String,
    name: String,
}

fn list(
    store: &Store,
    target: &Target,
    options: &Options,
    view: View,
) -> Result<Response, Failure> {
    let selector = select(target, options)?;
    let next: Option<Continue> =
        match options.continue_.as_str() {
            "" => None,
            text => Some(serde_json::from_str(text).map_err(|_| {
                Failure::bad_request(format!("continue key is not valid: {text:?}"))
            })?),
        };
    let asked = asked_version(options)?;
    let exact = match options.resource_version_match.as_str() {
        "" | "NotOlderThan" => false,
        "Exact" if asked.is_some() => true,
        "Exact" => {
            let what = "resourceVersionMatch: Forbidden: resourceVersionMatch \"Exact\" is \
                        forbidden for resourceVersion \"0\" or none";
            return Err(Failure::invalid("ListOptions.meta.k8s.io", "", what));
        }
        other => {
            let what = format!("resourceVersionMatch: Unsupported value: {other:?}");
            return Err(Failure::invalid("ListOptions.meta.k8s.io", "", &what));
        }
    };
    if let Some(asked) = asked.filter(|asked| *asked > store.version()) {
        return Err(Failure::too_large_version(asked, store.version()));
    }
    let version = match (&next, asked) {
        (Some(next), _) => next.version,
        (None, Some(asked)) if exact => asked,
        _ => store.version(),
    };
    if version < store.compacted() {
        return Err(Failure::expired(
            "The provided continue parameter or resource version is too old to display a \
             consistent list result",
        ));
    }
    let mut objects: Vec<(Key, Value)> = store
        .list(target.kind, version)
        .into_iter()
        .filter(|(_, object)| selector.matches(object))
        .filter(|(key, _)| {
            next.as_ref()
                .is_none_or(|next| (&key.namespace, &key.name) > (&next.namespace, &next.name))
        })
        .collect();
    let mut metadata = json!({"resourceVersion": version.to_string()});
    if let Some(limit) = options.limit.filter(|limit| *limit > 0 && *limit < objects.len()) {
        if selector.is_empty() {
            metadata["remainingItemCount"] = json!(objects.len() - limit);
        }
        objects.truncate(limit);
        if let Some((last, _)) = objects.last() {
            let token = json!({
                "version": version,
                "namespace": last.namespace,
                "name": last.name,
            });
            metadata["continue"] = json!(token.to_string());
        }
    }
    let items = objects.iter().map(|(_, object)| {
        let mut item = view.of(object);
        // Whole objects in lists don't say what they are: the list does.
        if let (View::Whole, Value::Object(item)) = (view, &mut item) {
            item.remove("kind");
            item.remove("apiVersion");
        }
        item
    });
    let (kind, api_version) = match view {
        View::Whole => (format!("{}List", target.kind.kind), target.kind.api_version()),
        View::Metadata => ("PartialObjectMetadataList".to_owned(), "meta.k8s.io/v1".to_owned()),
    };
    let list = json!({
        "kind": kind,
        "apiVersion": api_version,
        "metadata": metadata,
        "items": items.collect::<Vec<_>>(),
    });
    Ok(json_response(StatusCode::OK, &list))
}

/// Puts in what the real server would.
pub fn with_defaults(kind: &Kind, name: &str, mut object: Value) -> Value {
    let phase = match kind.kind {
        "Pod" => "Pending",
        "Namespace" => {
            object["metadata"]["labels"]["kubernetes.io/metadata.name"] = json!(name);
            "Active"
        }
        _ => return object,
    };
    if object["status"]["phase"].is_null() {
        object["status"]["phase"] = json!(phase);
    }
    if kind.kind == "Pod" && object["spec"]["terminationGracePeriodSeconds"].is_null() {
        object["spec"]["terminationGracePeriodSeconds"] = json!(30);
    }
    object
}

fn create(store: &mut Store, target: &Target, mut object: Value) -> Result<Value, Failure> {
    let kind = target.kind;
    let namespace = match (&target.namespace, kind.namespaced) {
        (Some(namespace), true) => namespace.clone(),
        (None, false) => String::new(),
        _ => return Err(Failure::method_not_allowed()),
    };
    check_shape(&object)?;
    for (field, wanted) in [("apiVersion", kind.api_version()), ("kind", kind.kind.to_owned())] {
        if object[field] != wanted {
            let given = &object[field];
            let message = format!("the object's {field} is {given}, the path's is {wanted:?}");
            return Err(Failure::bad_request(message));
        }
    }
    let named = object["metadata"]["namespace"].as_str().unwrap_or(&namespace);
    if named != namespace {
        return Err(Failure::bad_request(
            "the namespace of the provided object does not match the namespace sent on the request",
        ));
    }
    if kind.namespaced {
        let spaces = Kind::of("v1", "Namespace").ok_or_else(Failure::no_such_path)?;
        let key = Key { kind: spaces, namespace: String::new(), name: namespace.clone() };
        if store.get(&key).is_none() {
            return Err(Failure::not_found(spaces, &namespace));
        }
    }
    let name = match (&object["metadata"]["name"], &object["metadata"]["generateName"]) {
        (Value::String(name), _) if !name.is_empty() => name.clone(),
        (_, Value::String(prefix)) if !prefix.is_empty() => {
            let random = Uuid::new_v4().simple().to_string();
            format!("{prefix}{}", &random[..5])
        }
        _ => {
            let what = "metadata.name: Required value: name or generateName is required";
            return Err(Failure::invalid(kind.kind, "", what));
        }
    };
    let key = Key { kind, namespace, name };
    if store.get(&key).is_some() {
        return Err(Failure::already_exists(kind, &key.name));
    }
    if kind.group == "events.k8s.io" {
        check_event(&key, &object)?;
    }
    if let Value::Object(metadata) = &mut object["metadata"] {
        // The server's own.
        for field in ["uid", "resourceVersion", "creationTimestamp", "deletionTimestamp"] {
            metadata.remove(field);
        }
    }
    let object = with_defaults(kind, &key.name, object);
    Ok(store.write(key, object))
}

/// What is looked into must be objects.
fn check_shape(object: &Value) -> Result<(), Failure> {
    let parts = ["", "/metadata", "/metadata/labels", "/spec", "/status"];
    let wrong = |path: &&str| {
        object.pointer(path).is_some_and(|value| !value.is_object() && !value.is_null())
    };
    match parts.iter().find(|path| wrong(path)) {
        Some(path) => Err(Failure::bad_request(format!("the body's {path:?} is no object"))),
        None if object.is_null() => Err(Failure::bad_request("the body is null")),
        None => Ok(()),
    }
}

/// What the real server asks of a new event.
fn check_event(key: &Key, event: &Value) -> Result<(), Failure> {
    let text = |field: &str| event[field].as_str().unwrap_or_default();
    let invalid = |what: String| Err(Failure::invalid("Event", &key.name, &what));
    if text("eventTime").is_empty() {
        return invalid("eventTime: Required value".to_owned());
    }
    for field in ["reportingController", "reportingInstance", "action", "reason"] {
        match text(field).len() {
            0 => return invalid(format!("{field}: Required value")),
            1..=128 => {}
            _ => {
                return invalid(format!("{field}: Invalid value: can have at most 128 characters"));
            }
        }
    }
    if text("note").len() > 1024 {
        return invalid("note: Invalid value: can have at most 1024 characters".to_owned());
    }
    if !["Normal", "Warning"].contains(&text("type")) {
        return invalid(format!("type: Invalid value: {:?}", text("type")));
    }
    // Events about what has no namespace are in this one.
    let about = event["regarding"]["namespace"].as_str().filter(|namespace| !namespace.is_empty());
    if about.unwrap_or("default") != key.namespace {
        return invalid(format!("regarding.namespace: Invalid value: {:?}", about.unwrap_or("")));
    }
    Ok(())
}

fn update(
    store: &mut Store,
    target: &Target,
    change: impl FnOnce(Value) -> Value,
) -> Result<Value, Failure> {
    let key = key(target)?;
    let current = store.get(&key).cloned();
    let current = current.ok_or_else(|| Failure::not_found(key.kind, &key.name))?;
    let mut new = change(current.clone());
    check_shape(&new)?;
    for (field, why) in [
        (
            "resourceVersion",
            "the object has been modified; please apply your changes to the latest version and try again",
        ),
        ("uid", "the UID in the precondition does not match the UID in record"),
    ] {
        let wanted = new["metadata"][field].as_str().unwrap_or_default();
        if !wanted.is_empty() && current["metadata"][field] != wanted {
            return Err(Failure::conflict(key.kind, &key.name, why));
        }
    }
    if target.subresource.is_some() {
        let status = new["status"].take();
        new = current;
        new["status"] = status;
    } else {
        if key.kind.status {
            new["status"] = current["status"].clone();
        }
        for field in ["deletionTimestamp", "deletionGracePeriodSeconds"] {
            match &current["metadata"][field] {
                Value::Null => {
                    if let Value::Object(metadata) = &mut new["metadata"] {
                        metadata.remove(field);
                    }
                }
                value => new["metadata"][field] = value.clone(),
            }
        }
    }
    let ended = !new["metadata"]["deletionTimestamp"].is_null()
        && new["metadata"]["deletionGracePeriodSeconds"].as_u64().unwrap_or(0) == 0
        && !has_finalizers(&new);
    let written = store.write(key.clone(), new);
    if ended {
        return store.remove(&key).ok_or_else(|| Failure::not_found(key.kind, &key.name));
    }
    Ok(written)
}

fn has_finalizers(object: &Value) -> bool {
    object["metadata"]["finalizers"].as_array().is_some_and(|all| !all.is_empty())
}

/// Deletes, or only says so: a pod that has a node is its kubelet's to end.
fn delete(
    store: &mut Store,
    target: &Target,
    grace: Option<u64>,
    options: &Value,
) -> Result<Value, Failure> {
    let key = key(target)?;
    let object = store.get(&key).cloned();
    let mut object = object.ok_or_else(|| Failure::not_found(key.kind, &key.name))?;
    if let Some(uid) = options["preconditions"]["uid"].as_str()
        && object["metadata"]["uid"] != uid
    {
        let why = "the UID in the precondition does not match the UID in record";
        return Err(Failure::conflict(key.kind, &key.name, why));
    }
    let finished = matches!(object["status"]["phase"].as_str(), Some("Succeeded" | "Failed"));
    let on_node = object["spec"]["nodeName"].as_str().is_some_and(|node| !node.is_empty());
    let grace = if key.kind.kind == "Pod" && on_node && !finished {
        let asked = options["gracePeriodSeconds"].as_u64().or(grace);
        let own = object["spec"]["terminationGracePeriodSeconds"].as_u64();
        asked.or(own).unwrap_or(30)
    } else {
        0
    };
    if grace == 0 && !has_finalizers(&object) {
        return store.remove(&key).ok_or_else(|| Failure::not_found(key.kind, &key.name));
    }
    let metadata = &mut object["metadata"];
    if metadata["deletionTimestamp"].is_null() {
        metadata["deletionTimestamp"] = json!(now());
    }
    let before = metadata["deletionGracePeriodSeconds"].as_u64().unwrap_or(grace);
    metadata["deletionGracePeriodSeconds"] = json!(before.min(grace));
    Ok(store.write(key, object))
}
