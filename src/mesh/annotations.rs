//! Reads a Pod object: annotations, labels, variables and lists, and the errors in them.

use std::{net::IpAddr, str::FromStr};

use ipnet::IpNet;
use k8s_openapi::api::core::v1::{Container, Pod};
use thiserror::Error;

/// An error in a Pod object.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum FactsError {
    /// A required field is missing.
    #[error("{0} is missing")]
    Missing(&'static str),
    /// A field's value is invalid.
    #[error("{key}: {text:?}: {why}")]
    Invalid {
        /// The annotation or field, and the field within an annotation that has several.
        key: String,
        /// The offending text.
        text: String,
        /// The expected format.
        why: String,
    },
    /// The pod asks for a mode of the mesh that is not implemented.
    #[error("{key}: {text:?} is not supported yet: the pod is not intercepted")]
    Unsupported {
        /// The annotation, and the field within an annotation that has several.
        key: String,
        /// Its value.
        text: String,
    },
    /// The pod is in Istio's ambient mode, but Istio's own agents have not redirected it.
    #[error(
        "{DATAPLANE_MODE}: \"ambient\" is not supported yet, and Istio's own node agent has not \
         redirected the pod: it is not intercepted"
    )]
    Ambient,
}

/// Istio's label for pods without sidecars, a pod's or its namespace's.
pub(super) const DATAPLANE_MODE: &str = "istio.io/dataplane-mode";
pub(super) const AMBIENT: &str = "ambient";

/// Collects the first error, and the items that the mesh ignores.
#[derive(Default)]
pub(crate) struct Reader {
    pub error: Option<FactsError>,
    pub warnings: Vec<FactsError>,
}

/// The maximum number of skipped items that are named; the annotation itself has them all.
const NAMED: usize = 8;

impl Reader {
    /// The value, or `default` if it is invalid. An unsupported mode remains an error.
    pub fn or<T>(&mut self, read: Result<T, FactsError>, default: T) -> Result<T, FactsError> {
        match read {
            Err(error @ FactsError::Invalid { .. }) => {
                self.error.get_or_insert(error);
                Ok(default)
            }
            other => other,
        }
    }

    /// Warns the pod of a value that has no effect.
    pub fn warn(&mut self, key: &str, text: &str, why: &str) {
        self.warnings.push(invalid(key, text, why));
    }

    /// Warns the pod of list items that the mesh skips; `what` is the kind of item that was
    /// expected.
    pub fn skipped(&mut self, key: &str, text: &str, items: &[&str], what: &str) {
        if items.is_empty() {
            return;
        }
        let mut named = Vec::from_iter(items.iter().take(NAMED).map(|item| format!("{item:?}")));
        if items.len() > NAMED {
            named.push(format!("and {} more", items.len() - NAMED));
        }
        let why = format!("skipped, as the mesh does: {}: {what}", named.join(", "));
        self.warn(key, text, &why);
    }
}

pub(crate) fn annotation<'a>(pod: &'a Pod, key: &str) -> Option<&'a str> {
    pod.metadata.annotations.as_ref()?.get(key).map(String::as_str)
}

pub(crate) fn label<'a>(pod: &'a Pod, key: &str) -> Option<&'a str> {
    pod.metadata.labels.as_ref()?.get(key).map(String::as_str)
}

/// A container's environment variable, if it is set: of several with one name the last. A variable
/// that takes its value from elsewhere is empty, as for the meshes.
pub(crate) fn env<'a>(container: &'a Container, name: &str) -> Option<&'a str> {
    let variables = container.env.as_deref().unwrap_or_default();
    let last = variables.iter().rfind(|variable| variable.name == name)?;
    Some(last.value.as_deref().unwrap_or_default())
}

pub(crate) fn init_containers(pod: &Pod) -> &[Container] {
    pod.spec.as_ref().and_then(|spec| spec.init_containers.as_deref()).unwrap_or_default()
}

/// The container of this name, among the init containers (a native sidecar is one) and the others.
pub(crate) fn sidecar<'a>(pod: &'a Pod, name: &str) -> Option<&'a Container> {
    let others = pod.spec.as_ref().map(|spec| &spec.containers[..]).unwrap_or_default();
    init_containers(pod).iter().chain(others).find(|container| container.name == name)
}

pub(crate) fn invalid(key: &str, text: &str, why: &str) -> FactsError {
    FactsError::Invalid { key: key.into(), text: text.into(), why: why.into() }
}

/// An annotation's port, where the pod has the annotation.
pub(crate) fn port(pod: &Pod, key: &str) -> Result<Option<u16>, FactsError> {
    let Some(text) = annotation(pod, key) else {
        return Ok(None);
    };
    let port = digits(text.trim()).filter(|port| *port != 0);
    port.map(Some).ok_or_else(|| invalid(key, text, "expected a port from 1 to 65535"))
}

/// The number of a user or group; the kernel takes the largest for "nobody known".
pub(crate) fn user(text: &str) -> Option<u32> {
    digits(text).filter(|id| *id != u32::MAX)
}

/// Parses a number as the meshes do; FromStr would accept a sign as well.
pub(crate) fn digits<T: FromStr>(text: &str) -> Option<T> {
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok())?
}

/// One of Sidestep's own switches.
pub(crate) fn switch(key: &str, text: &str) -> Result<bool, FactsError> {
    match text {
        "enabled" => Ok(true),
        "disabled" => Ok(false),
        _ => Err(invalid(key, text, "expected enabled or disabled")),
    }
}

/// A container's user or group, if it is set and not zero.
pub(crate) fn container_id(proxy: &Container, field: &str) -> Result<Option<u32>, FactsError> {
    let id = proxy.security_context.as_ref().and_then(|context| match field {
        "runAsUser" => context.run_as_user,
        _ => context.run_as_group,
    });
    let Some(text) = id.filter(|id| *id != 0).map(|id| id.to_string()) else {
        return Ok(None);
    };
    let key = format!("containers[{}].securityContext.{field}", proxy.name);
    user(&text).map(Some).ok_or_else(|| invalid(&key, &text, "expected a 32-bit number"))
}

/// `10.0.0.0/8`, `fd00::/8`, or an address alone.
pub(crate) fn parse_range(text: &str) -> Option<IpNet> {
    // By parts: the library's own parser takes leading zeros, and reads them as decimal.
    match text.split_once('/') {
        Some((address, bits)) => IpNet::new(address.parse().ok()?, digits(bits)?).ok(),
        None => text.parse::<IpAddr>().ok().map(IpNet::from),
    }
}

/// The items of a list, separated by commas, as they are: blanks belong to them. Of an empty text
/// none; an empty item among others is one.
pub(crate) fn items(text: &str) -> impl Iterator<Item = &str> {
    text.split(',').filter(move |_| !text.is_empty())
}
