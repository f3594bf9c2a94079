//! The kinds of objects that the server knows, and how request paths name them.

use std::fmt::{self, Display, Formatter};

/// A kind of object.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Kind {
    /// The API group; empty for the core.
    pub group: &'static str,
    /// The version in that group.
    pub version: &'static str,
    /// The resource's name in paths.
    pub plural: &'static str,
    /// The kind's own name.
    pub kind: &'static str,
    /// Whether its objects are in namespaces.
    pub namespaced: bool,
    /// Whether it has a status subresource: then writes to the object itself leave the status
    /// alone.
    pub status: bool,
    /// The fields that a field selector may name, beside the object's name and namespace.
    pub fields: &'static [&'static str],
}

/// All kinds.
pub const KINDS: &[Kind] = &[
    Kind {
        group: "",
        version: "v1",
        plural: "namespaces",
        kind: "Namespace",
        namespaced: false,
        status: true,
        fields: &["status.phase"],
    },
    Kind {
        group: "",
        version: "v1",
        plural: "nodes",
        kind: "Node",
        namespaced: false,
        status: true,
        fields: &["spec.unschedulable"],
    },
    Kind {
        group: "",
        version: "v1",
        plural: "pods",
        kind: "Pod",
        namespaced: true,
        status: true,
        fields: &[
            "spec.nodeName",
            "spec.restartPolicy",
            "spec.schedulerName",
            "spec.serviceAccountName",
            "status.phase",
            "status.podIP",
            "status.nominatedNodeName",
        ],
    },
    Kind {
        group: "",
        version: "v1",
        plural: "events",
        kind: "Event",
        namespaced: true,
        status: false,
        fields: &["involvedObject.name", "involvedObject.uid", "reason", "type"],
    },
    Kind {
        group: "",
        version: "v1",
        plural: "serviceaccounts",
        kind: "ServiceAccount",
        namespaced: true,
        status: false,
        fields: &[],
    },
    Kind {
        group: "rbac.authorization.k8s.io",
        version: "v1",
        plural: "clusterroles",
        kind: "ClusterRole",
        namespaced: false,
        status: false,
        fields: &[],
    },
    Kind {
        group: "apps",
        version: "v1",
        plural: "daemonsets",
        kind: "DaemonSet",
        namespaced: true,
        status: true,
        fields: &[],
    },
    Kind {
        group: "events.k8s.io",
        version: "v1",
        plural: "events",
        kind: "Event",
        namespaced: true,
        status: false,
        fields: &["regarding.name", "regarding.uid", "reason", "type"],
    },
];

impl Kind {
    /// What objects say in `apiVersion`.
    pub fn api_version(&self) -> String {
        match self.group {
            "" => self.version.to_owned(),
            group => format!("{group}/{}", self.version),
        }
    }

    /// The kind of an object with these two.
    pub fn of(api_version: &str, kind: &str) -> Option<&'static Self> {
        KINDS.iter().find(|known| known.kind == kind && known.api_version() == api_version)
    }

    fn by_path(group: &str, version: &str, plural: &str) -> Option<&'static Self> {
        KINDS
            .iter()
            .find(|kind| (kind.group, kind.version, kind.plural) == (group, version, plural))
    }
}

/// `pods`, `daemonsets.apps`: how messages name it.
impl Display for Kind {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self.group {
            "" => f.write_str(self.plural),
            group => write!(f, "{}.{group}", self.plural),
        }
    }
}

/// What a path is about: a collection, an object or a part of one.
#[derive(Debug, PartialEq, Eq)]
pub struct Target {
    /// The kind.
    pub kind: &'static Kind,
    /// Its namespace; none for all of them, or where there are none.
    pub namespace: Option<String>,
    /// The object; none for the collection.
    pub name: Option<String>,
    /// `status`, `eviction` and the like.
    pub subresource: Option<String>,
}

impl Target {
    /// Reads a request's path. None when the server has no such thing.
    pub fn parse(path: &str) -> Option<Self> {
        let words: Vec<&str> = path.trim_matches('/').split('/').collect();
        let (group, version, rest) = match words.as_slice() {
            ["api", version, rest @ ..] => ("", *version, rest),
            ["apis", group, version, rest @ ..] => (*group, *version, rest),
            _ => return None,
        };
        if let ["namespaces", namespace, plural, rest @ ..] = rest
            && let Some(kind) = Kind::by_path(group, version, plural)
            && kind.namespaced
        {
            return Self::new(kind, Some(namespace), rest);
        }
        let (plural, rest) = rest.split_first()?;
        let kind = Kind::by_path(group, version, plural)?;
        // Objects in namespaces have no other path; their collections have one over all.
        (!kind.namespaced || rest.is_empty()).then(|| Self::new(kind, None, rest))?
    }

    fn new(kind: &'static Kind, namespace: Option<&str>, rest: &[&str]) -> Option<Self> {
        let (name, subresource) = match rest {
            [] => (None, None),
            [name] => (Some(*name), None),
            [name, subresource] => (Some(*name), Some(*subresource)),
            _ => return None,
        };
        let owned = |text: Option<&str>| text.map(str::to_owned);
        Some(Self {
            kind,
            namespace: owned(namespace),
            name: owned(name),
            subresource: owned(subresource),
        })
    }

    /// `pods` or `pods/status`: how RBAC rules name it.
    pub fn resource(&self) -> String {
        match &self.subresource {
            None => self.kind.plural.to_owned(),
            Some(subresource) => format!("{}/{subresource}", self.kind.plural),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths() {
        let parts = |path: &str| {
            let target = Target::parse(path)?;
            let text = |part: Option<String>| part.unwrap_or_else(|| "-".to_owned());
            let resource = target.resource();
            Some(format!(
                "{} {resource} {} {}",
                target.kind,
                text(target.namespace),
                text(target.name)
            ))
        };
        for (path, wanted) in [
            ("/api/v1/pods", Some("pods pods - -")),
            ("/api/v1/pods/a", None),
            ("/api/v1/namespaces", Some("namespaces namespaces - -")),
            ("/api/v1/namespaces/a", Some("namespaces namespaces - a")),
            ("/api/v1/namespaces/a/status", Some("namespaces namespaces/status - a")),
            ("/api/v1/namespaces/a/pods", Some("pods pods a -")),
            ("/api/v1/namespaces/a/pods/b", Some("pods pods a b")),
            ("/api/v1/namespaces/a/pods/b/status", Some("pods pods/status a b")),
            ("/api/v1/namespaces/a/pods/b/c/d", None),
            ("/apis/apps/v1/namespaces/a/daemonsets/b", Some("daemonsets.apps daemonsets a b")),
            ("/apis/events.k8s.io/v1/namespaces/a/events", Some("events.events.k8s.io events a -")),
            ("/apis/apps/v2/daemonsets", None),
            ("/healthz", None),
        ] {
            assert_eq!(parts(path).as_deref(), wanted, "{path}");
        }
    }
}
