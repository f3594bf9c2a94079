//! Publishes problems as Events, which `kubectl describe` shows.

use std::sync::{Arc, Mutex};

use anyhow::{Result, bail};
use k8s_openapi::api::core::v1::ObjectReference;
use kube::{
    Client,
    runtime::events::{Event, EventType, Recorder, Reporter},
};
use tokio::{sync::mpsc, time::timeout};

use super::errors::{ANSWER, Failing, explained, note};
use crate::{problem::Problem, text};

/// The maximum of Events that wait for the API server; further problems are only logged.
pub(super) const EVENTS: usize = 256;
/// The maximum length of an Event's note.
const NOTE: usize = 1000;

/// Publishes the Events of this node's agent.
pub(super) fn recorder(client: &Client, node: &str) -> Recorder {
    let reporter = Reporter { controller: "sidestep".into(), instance: Some(node.into()) };
    Recorder::new(client.clone(), reporter)
}

/// The object of Events about the node. Its uid is the one that `kubectl describe node` looks for,
/// and that the kubelet's own Events have.
pub(super) fn node_object(node: &str) -> ObjectReference {
    ObjectReference {
        api_version: Some("v1".into()),
        kind: Some("Node".into()),
        name: Some(node.into()),
        uid: Some(node.into()),
        ..ObjectReference::default()
    }
}

pub(super) async fn publish(
    recorder: Recorder,
    mut queue: mpsc::Receiver<(Problem, ObjectReference)>,
    failing: Arc<Mutex<Failing>>,
) {
    while let Some((problem, object)) = queue.recv().await {
        let sent = tell(&recorder, &problem, &object).await;
        note(&failing, "events", sent.err().map(|error| format!("{error:#}")));
    }
}

/// Publishes a problem as an Event.
pub(super) async fn tell(
    recorder: &Recorder,
    problem: &Problem,
    object: &ObjectReference,
) -> Result<()> {
    let event = Event {
        type_: EventType::Warning,
        reason: problem.reason.name().into(),
        note: Some(note_of(&problem.text)),
        action: "Intercept".into(),
        secondary: None,
    };
    match timeout(ANSWER, recorder.publish(&event, object)).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => Err(explained(verb_of(&error), "events", &error)),
        Err(_) => bail!("cannot create events: the API server does not answer"),
    }
}

/// The verb of a failed request: `create` for a new Event, `patch` for another occurrence.
fn verb_of(error: &kube::Error) -> &'static str {
    match error {
        kube::Error::Api(status) if status.message.contains("cannot patch") => "patch",
        _ => "create",
    }
}

/// Cuts a text to an Event's maximum; the log has the whole text.
fn note_of(text: &str) -> String {
    text::cut(text, NOTE, " ... (the rest is in the agent's log)")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_note_says_where_the_rest_is() {
        assert_eq!(note_of("short"), "short");
        let note = note_of(&"\u{e4}".repeat(NOTE));
        assert!(note.len() <= NOTE && note.ends_with("in the agent's log)"), "{}", note.len());
    }
}
