//! Errors of the API server: their texts and their counts.

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use anyhow::anyhow;

/// The time limit of a single request to the API server.
pub(super) const ANSWER: Duration = Duration::from_secs(5);

/// The API server's present errors and their numbers, by the kind of request.
#[derive(Debug, Default)]
pub(super) struct Failing {
    pub(super) now: BTreeMap<&'static str, String>,
    pub(super) counts: BTreeMap<&'static str, u64>,
}

pub(super) fn lock(failing: &Mutex<Failing>) -> MutexGuard<'_, Failing> {
    failing.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Records a request's failure or success.
pub(super) fn note(failing: &Mutex<Failing>, what: &'static str, error: Option<String>) {
    let mut failing = lock(failing);
    match error {
        Some(error) => {
            *failing.counts.entry(what).or_default() += 1;
            failing.now.insert(what, error);
        }
        None => {
            failing.now.remove(what);
        }
    }
}

/// An error in words that help, such as the verb and the resource that are not allowed.
pub(super) fn explained(verb: &str, resource: &str, error: &kube::Error) -> anyhow::Error {
    match error {
        kube::Error::Api(status) if status.code == 403 => anyhow!(
            "cannot {verb} {resource}: the API server forbids it; the agent's role needs the verb \
             {verb:?} on {resource:?} ({})",
            status.message
        ),
        kube::Error::Api(status) if status.code == 401 => anyhow!(
            "cannot {verb} {resource}: the API server rejects the agent's token: it has expired, \
             or its service account is gone ({})",
            status.message
        ),
        kube::Error::Api(status) => {
            anyhow!("cannot {verb} {resource}: {} ({})", status.message, status.code)
        }
        // The innermost cause is the most specific.
        other => {
            let error: &dyn std::error::Error = other;
            let cause = std::iter::successors(Some(error), |error| error.source()).last();
            let cause = cause.map(ToString::to_string).unwrap_or_default();
            anyhow!("cannot {verb} {resource}: cannot reach the API server: {cause}")
        }
    }
}
