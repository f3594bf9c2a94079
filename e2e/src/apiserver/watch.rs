//! A running watch.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;

use axum::body::Body;
use futures_util::stream;
use serde_json::{Value, json};
use tokio::sync::watch::Receiver;
use tokio::time::{Instant, sleep_until};

use super::Shared;
use super::requests::View;
use super::selector::Selector;
use super::status::Failure;
use super::store::Change;

/// What is watched, and from where.
pub struct Watch {
    shared: Arc<Shared>,
    changed: Receiver<()>,
    selector: Selector,
    view: View,
    bookmarks: bool,
    /// All changes up to it have been told.
    version: u64,
    deadline: Option<Instant>,
    lines: VecDeque<String>,
    over: bool,
}

impl Watch {
    /// Begins after `version`, or where there is none with all objects of now as `ADDED`.
    pub fn new(
        shared: &Arc<Shared>,
        selector: Selector,
        view: View,
        version: Option<u64>,
        bookmarks: bool,
        deadline: Option<Instant>,
    ) -> Self {
        // Subscribed before the first look, so that no change falls between.
        let changed = shared.changed.subscribe();
        let store = shared.store();
        let (start, mut lines) = (version.unwrap_or_else(|| store.version()), VecDeque::new());
        if version.is_none() {
            let objects = store.list(selector.kind, start);
            let selected = objects.values().filter(|object| selector.matches(object));
            lines.extend(selected.map(|object| line("ADDED", view.of(object))));
        }
        drop(store);
        let shared = shared.clone();
        let over = false;
        Self { shared, changed, selector, view, bookmarks, version: start, deadline, lines, over }
    }

    /// The response's body: a line for each event, as they come.
    pub fn into_body(self) -> Body {
        Body::from_stream(stream::unfold(self, async |mut watch| {
            let line = watch.next().await?;
            Some((Ok::<_, Infallible>(line), watch))
        }))
    }

    async fn next(&mut self) -> Option<String> {
        loop {
            if let Some(line) = self.lines.pop_front() {
                return Some(line);
            }
            if self.over {
                return None;
            }
            self.look();
            if !self.lines.is_empty() {
                continue;
            }
            let late = async {
                match self.deadline {
                    Some(deadline) => sleep_until(deadline).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                changed = self.changed.changed() => self.over |= changed.is_err(),
                () = late => {
                    self.bookmark();
                    self.over = true;
                }
            }
        }
    }

    /// Takes in what has changed.
    fn look(&mut self) {
        self.changed.mark_unchanged();
        let shared = self.shared.clone();
        let store = shared.store();
        if self.version < store.compacted() {
            let failure = Failure::expired(format!("too old resource version: {}", self.version));
            self.lines.push_back(line("ERROR", failure.to_status()));
            self.over = true;
            return;
        }
        if self.version == store.version() {
            return;
        }
        let changes = store.since(self.version).iter();
        self.lines = changes.filter_map(|change| self.event(change)).collect();
        self.version = store.version();
        // The real server sends one each minute. This tells as much, and no test has to wait.
        if self.lines.is_empty() {
            self.bookmark();
        }
    }

    /// What a change is to this watch: an object that comes into the selection is added, one
    /// that falls out of it is deleted.
    fn event(&self, change: &Change) -> Option<String> {
        if change.key.kind != self.selector.kind {
            return None;
        }
        let selected =
            |object: &Option<Value>| object.clone().filter(|object| self.selector.matches(object));
        let (kind, mut object) = match (selected(&change.before), selected(&change.after)) {
            (None, None) => return None,
            (None, Some(after)) => ("ADDED", after),
            (Some(_), Some(after)) => ("MODIFIED", after),
            (Some(before), None) => ("DELETED", before),
        };
        object["metadata"]["resourceVersion"] = json!(change.version.to_string());
        Some(line(kind, self.view.of(&object)))
    }

    fn bookmark(&mut self) {
        if self.bookmarks {
            let kind = self.selector.kind;
            let version = self.version.to_string();
            let object = json!({
                "apiVersion": kind.api_version(),
                "kind": kind.kind,
                "metadata": {"resourceVersion": version, "creationTimestamp": null},
            });
            self.lines.push_back(line("BOOKMARK", self.view.of(&object)));
        }
    }
}

fn line(kind: &str, object: Value) -> String {
    format!("{}\n", json!({"type": kind, "object": object}))
}
