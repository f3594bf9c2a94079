//! Failures, as the `Status` objects that Kubernetes answers with.

use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::kind::Kind;

/// A request that failed.
#[derive(Clone, Debug)]
pub struct Failure {
    /// The HTTP status.
    pub code: u16,
    /// `NotFound` and the like: what clients decide by.
    pub reason: &'static str,
    /// For people.
    pub message: String,
    /// The object, or the cause.
    pub details: Value,
}

impl Failure {
    fn new(code: u16, reason: &'static str, message: String) -> Self {
        Self { code, reason, message, details: Value::Null }
    }

    fn about(mut self, kind: &Kind, name: &str) -> Self {
        self.details = json!({"group": kind.group, "kind": kind.plural, "name": name});
        self
    }

    /// 400.
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::new(400, "BadRequest", message.into())
    }

    /// 401: no token, or another one.
    pub fn unauthorized() -> Self {
        Self::new(401, "Unauthorized", "Unauthorized".to_owned())
    }

    /// 403 as RBAC gives it.
    pub fn forbidden(
        kind: &Kind,
        verb: &str,
        resource: &str,
        namespace: Option<&str>,
        name: &str,
        user: &str,
    ) -> Self {
        let wherever = namespace.map_or_else(
            || "at the cluster scope".to_owned(),
            |namespace| format!("in the namespace {namespace:?}"),
        );
        let object = if name.is_empty() { String::new() } else { format!(" {name:?}") };
        let message = format!(
            "{kind}{object} is forbidden: User {user:?} cannot {verb} resource {resource:?} \
             in API group {:?} {wherever}",
            kind.group
        );
        Self::new(403, "Forbidden", message).about(kind, name)
    }

    /// 404 for a path that the server doesn't have.
    pub fn no_such_path() -> Self {
        let message = "the server could not find the requested resource".to_owned();
        Self::new(404, "NotFound", message)
    }

    /// 404 for an object.
    pub fn not_found(kind: &Kind, name: &str) -> Self {
        Self::new(404, "NotFound", format!("{kind} {name:?} not found")).about(kind, name)
    }

    /// 405.
    pub fn method_not_allowed() -> Self {
        let message = "the server does not allow this method on the requested resource".to_owned();
        Self::new(405, "MethodNotAllowed", message)
    }

    /// 409 for a name that is taken.
    pub fn already_exists(kind: &Kind, name: &str) -> Self {
        Self::new(409, "AlreadyExists", format!("{kind} {name:?} already exists")).about(kind, name)
    }

    /// 409 for a write or a delete that assumed another version or uid.
    pub fn conflict(kind: &Kind, name: &str, why: &str) -> Self {
        let message = format!("Operation cannot be fulfilled on {kind} {name:?}: {why}");
        Self::new(409, "Conflict", message).about(kind, name)
    }

    /// 410: the resource version, or the list to be continued, is too old.
    pub fn expired(message: impl Into<String>) -> Self {
        Self::new(410, "Expired", message.into())
    }

    /// 415.
    pub fn unsupported_media_type(supported: &str) -> Self {
        let message = format!(
            "the body of the request was in an unknown format - accepted media types include: \
             {supported}"
        );
        Self::new(415, "UnsupportedMediaType", message)
    }

    /// 422: `kind` (an object's, or `ListOptions`) has a wrong or a missing field.
    pub fn invalid(kind: &str, name: &str, what: &str) -> Self {
        Self::new(422, "Invalid", format!("{kind} {name:?} is invalid: {what}"))
    }

    /// 504: a version that is not there yet.
    pub fn too_large_version(asked: u64, current: u64) -> Self {
        let message = format!("Too large resource version: {asked}, current: {current}");
        let mut failure = Self::new(504, "Timeout", format!("Timeout: {message}"));
        failure.details = json!({
            "causes": [{"reason": "ResourceVersionTooLarge", "message": message}],
            "retryAfterSeconds": 1,
        });
        failure
    }

    /// The `Status` object.
    pub fn to_status(&self) -> Value {
        let mut status = json!({
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": self.message,
            "reason": self.reason,
            "code": self.code,
        });
        if !self.details.is_null() {
            status["details"] = self.details.clone();
        }
        status
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let code = StatusCode::from_u16(self.code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let json = [(header::CONTENT_TYPE, "application/json")];
        (code, json, self.to_status().to_string()).into_response()
    }
}
