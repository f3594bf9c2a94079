//! Reads pods from a directory of plain Kubernetes manifests, without a cluster.

use std::{
    collections::BTreeMap,
    fs,
    io::ErrorKind::NotFound,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, UNIX_EPOCH},
};

use anyhow::{Context, Result};
use k8s_openapi::api::core::v1::Pod;
use serde_json::Value;
use thiserror::Error;

use super::{PodSource, Snapshot, SourcePod};
use crate::{
    files,
    mesh::facts::pod_name,
    problem::{Problem, Reason},
    service::{Catalog, facts, object},
};

/// The annotation that names a pod's network namespace, as a path. Honoured by this source only.
pub const NETNS_ANNOTATION: &str = "sidestep.io/netns";

/// An error in a manifest.
#[derive(Debug, Error)]
pub enum ManifestError {
    /// The file cannot be read.
    #[error("cannot be read: {0}")]
    Unreadable(std::io::Error),
    /// The file is not valid YAML.
    #[error("is not valid YAML; the pods it held before stay enrolled: {0}")]
    NoYaml(String),
    /// A document is of an unsupported kind.
    #[error("document {document}: expected {expected}, found {found}")]
    NoPod {
        /// The document's number in the file, from 1.
        document: usize,
        /// The supported kinds.
        expected: &'static str,
        /// The document's kind.
        found: String,
    },
    /// A document's fields do not fit its kind.
    #[error("document {document}: invalid {kind}: {why}")]
    BadPod {
        /// The document's number in the file, from 1.
        document: usize,
        /// The document's kind.
        kind: &'static str,
        /// The error of the field.
        why: String,
    },
}

/// The directory, and each file's contents when it was last read.
#[derive(Debug)]
pub struct Manifests {
    dir: PathBuf,
    /// Whether Services are read as well.
    with_services: bool,
    last: BTreeMap<PathBuf, Held>,
    /// Whether documents about Services may have changed since the last report.
    are_services_new: bool,
}

/// A file's contents, and its state when it was read, if that identifies them.
#[derive(Debug, Default)]
struct Held {
    pods: Vec<Arc<Pod>>,
    others: Vec<Arc<Other>>,
    looked: Option<Looks>,
}

/// A document about Services.
#[derive(Debug)]
enum Other {
    Service(object::Service),
    Slice(object::EndpointSlice),
    /// This node: the name that EndpointSlices use for it, its zone and its addresses.
    Node(object::Node),
}

impl Other {
    /// The key of the object among others of its kind.
    fn name(&self) -> (&'static str, Option<Arc<str>>) {
        match self {
            Self::Service(service) => ("Service", facts::name_of(&service.metadata).ok()),
            Self::Slice(slice) => ("EndpointSlice", facts::name_of(&slice.metadata).ok()),
            Self::Node(node) => ("Node", node.metadata.name.as_deref().map(Arc::from)),
        }
    }
}

/// A file's state, which changes with its contents: device and inode, size, and the time of its
/// last change in seconds and nanoseconds.
type Looks = (u64, u64, u64, i64, i64);

/// The age below which a file may change again without a new state: the kernel's clock for files is
/// coarse.
const LATELY: Duration = Duration::from_secs(2);

/// A file's state, if it identifies the contents; taken before the file is read.
fn looks(path: &Path) -> Option<Looks> {
    let found = fs::metadata(path).ok()?;
    let changed = UNIX_EPOCH + Duration::from_secs(u64::try_from(found.ctime()).ok()?);
    let is_settled = changed.elapsed().is_ok_and(|age| age > LATELY);
    is_settled.then(|| (found.dev(), found.ino(), found.size(), found.ctime(), found.ctime_nsec()))
}

impl PodSource for Manifests {
    fn snapshot(&mut self) -> Result<Option<Snapshot>> {
        self.read().map(Some)
    }
}

impl Manifests {
    /// Manifests in `dir`: files named `*.yaml`, `*.yml` or `*.json`.
    pub fn new(dir: &Path) -> Self {
        Self {
            dir: dir.to_owned(),
            with_services: false,
            last: BTreeMap::new(),
            are_services_new: false,
        }
    }

    /// Whether to read Services, EndpointSlices and this Node as well.
    #[must_use]
    pub fn with_services(self, on: bool) -> Self {
        Self { with_services: on, are_services_new: on, ..self }
    }

    /// Reads the directory afresh, and those files of it that have changed. A pod is gone when its
    /// file is, or when its file is free of errors and no longer has it: a slip of the pen must not
    /// take a pod out of the mesh.
    ///
    /// # Errors
    /// If the directory itself cannot be read; a bad file is in the snapshot's errors.
    pub fn read(&mut self) -> Result<Snapshot> {
        let mut files: Vec<PathBuf> = fs::read_dir(&self.dir)
            .and_then(|entries| entries.map(|entry| entry.map(|e| e.path())).collect())
            .with_context(|| format!("cannot read directory {}", self.dir.display()))?;
        files.retain(|path| is_manifest(path));
        files.sort();

        let mut snapshot = Snapshot::default();
        let mut last = std::mem::take(&mut self.last);
        for path in files {
            let (mut pods, mut others, mut errors) = (Vec::new(), Vec::new(), Vec::new());
            let looked = looks(&path);
            if let Some(held) = last.remove(&path) {
                if looked.is_some() && held.looked == looked {
                    let found = held.pods.iter().cloned();
                    let found = found.map(|pod| SourcePod { pod, origin: Some(path.clone()) });
                    snapshot.pods.extend(found);
                    self.last.insert(path, held);
                    continue;
                }
                last.insert(path.clone(), held);
            }
            let text = files::read(&path).map_err(ManifestError::Unreadable);
            match text.and_then(|text| documents(&text)) {
                // Removed since the directory was listed.
                Err(ManifestError::Unreadable(error)) if error.kind() == NotFound => continue,
                Err(error) => errors.push(error),
                Ok(documents) => {
                    for (n, document) in documents.iter().enumerate() {
                        if self.with_services
                            && let Some(other) = other_of(n + 1, document)
                        {
                            match other {
                                Ok(other) => others.push(Arc::new(other)),
                                Err(error) => errors.push(error),
                            }
                            continue;
                        }
                        match pod_of(n + 1, document) {
                            Ok(pod) => pods.extend(pod.map(Arc::new)),
                            Err(error) => errors.push(self.expecting(error)),
                        }
                    }
                }
            }
            if !errors.is_empty() {
                let before = last.remove(&path).unwrap_or_default();
                let names: Vec<_> = pods.iter().map(|pod: &Arc<Pod>| pod_name(pod).ok()).collect();
                let missing = |pod: &Arc<Pod>| !names.contains(&pod_name(pod).ok());
                pods.extend(before.pods.into_iter().filter(missing));
                let names: Vec<_> = others.iter().map(|one: &Arc<Other>| one.name()).collect();
                let missing = |one: &Arc<Other>| !names.contains(&one.name());
                others.extend(before.others.into_iter().filter(missing));
                snapshot.incomplete = true;
            }
            let found = pods.iter().cloned();
            snapshot.pods.extend(found.map(|pod| SourcePod { pod, origin: Some(path.clone()) }));
            let told = errors.iter().map(|error| format!("{}: {error}", path.display()));
            snapshot.errors.extend(told.map(Problem::node));
            let looked = looked.filter(|_| errors.is_empty());
            self.are_services_new |=
                !others.is_empty() || last.get(&path).is_some_and(|held| !held.others.is_empty());
            last.remove(&path);
            self.last.insert(path, Held { pods, others, looked });
        }
        self.are_services_new |= last.values().any(|gone| !gone.others.is_empty());
        Ok(snapshot)
    }

    /// Passes the files' last contents to the catalog of Services, and returns the errors in them.
    pub fn feed(&mut self, catalog: &mut Catalog) -> Option<Vec<Problem>> {
        if !std::mem::take(&mut self.are_services_new) {
            return None;
        }
        let mut problems = Vec::new();
        let mut wrong = |path: &Path, text: &str| {
            let text = format!("{}: {text}", path.display());
            problems.push(Problem { reason: Reason::InvalidService, pod: None, text });
        };
        let all = || {
            self.last.iter().flat_map(|(path, held)| held.others.iter().map(move |one| (path, one)))
        };
        let mut seen: BTreeMap<(&'static str, Arc<str>), &Path> = BTreeMap::new();
        let (mut services, mut slices, mut node) = (Vec::new(), Vec::new(), None);
        for (path, one) in all() {
            let (kind, name) = one.name();
            let Some(name) = name else {
                wrong(path, &format!("a {kind} without metadata.name"));
                continue;
            };
            if let Some(first) = seen.get(&(kind, Arc::clone(&name))) {
                wrong(path, &format!("{kind} {name} is already defined in {}", first.display()));
                continue;
            }
            match &**one {
                Other::Node(_) if node.is_some() => {
                    wrong(path, &format!("Node {name}: there is another Node, which is this one"));
                    continue;
                }
                Other::Node(found) => node = Some(found),
                Other::Service(service) => services.push(service),
                Other::Slice(slice) => slices.push(slice),
            }
            seen.insert((kind, name), path);
        }
        catalog.set_node(node.map(facts::node).unwrap_or_default());
        let node = node.and_then(|node| node.metadata.name.as_deref()).unwrap_or_default();
        catalog.replace_services(services.iter().filter_map(|one| facts::service(one).ok()?));
        catalog.replace_slices(slices.iter().filter_map(|one| facts::slice(one, node).ok()?));
        Some(problems)
    }

    /// An error that names the supported kinds.
    fn expecting(&self, error: ManifestError) -> ManifestError {
        match error {
            ManifestError::NoPod { document, found, .. } if self.with_services => {
                ManifestError::NoPod { document, expected: WITH_SERVICES, found }
            }
            error => error,
        }
    }
}

fn is_manifest(path: &Path) -> bool {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let kind = path.extension().and_then(|extension| extension.to_str());
    !name.starts_with('.') && matches!(kind, Some("yaml" | "yml" | "json"))
}

/// The documents of a file.
///
/// # Errors
/// If it is no YAML.
pub fn documents(text: &str) -> Result<Vec<Value>, ManifestError> {
    serde_saphyr::from_multiple(text).map_err(|error| {
        // The first line names the place; the others quote the file.
        ManifestError::NoYaml(error.to_string().lines().next().unwrap_or_default().into())
    })
}

/// The supported kinds.
const PODS: &str = "a v1 Pod";
/// The supported kinds, if Services are read as well.
const WITH_SERVICES: &str =
    "a v1 Pod, a v1 Service, a discovery.k8s.io/v1 EndpointSlice or a v1 Node";

/// The Service, EndpointSlice or Node in a document; `None` for another kind.
fn other_of(document: usize, value: &Value) -> Option<Result<Other, ManifestError>> {
    let field = |name: &str| value.get(name).and_then(Value::as_str);
    let (kind, read): (_, Result<Other, _>) = match (field("apiVersion")?, field("kind")?) {
        ("v1", "Service") => {
            ("Service", serde_path_to_error::deserialize(value).map(Other::Service))
        }
        ("discovery.k8s.io/v1", "EndpointSlice") => {
            ("EndpointSlice", serde_path_to_error::deserialize(value).map(Other::Slice))
        }
        ("v1", "Node") => ("Node", serde_path_to_error::deserialize(value).map(Other::Node)),
        _ => return None,
    };
    let bad = |why: String| ManifestError::BadPod { document, kind, why };
    Some(read.map_err(|error| bad(error.to_string())))
}

/// The pod in a document; `None` if the document is empty.
///
/// # Errors
/// If the document is of another kind.
pub fn pod_of(document: usize, value: &Value) -> Result<Option<Pod>, ManifestError> {
    if value.is_null() {
        return Ok(None);
    }
    let field = |name: &str| value.get(name).and_then(Value::as_str);
    match (field("apiVersion"), field("kind")) {
        (Some("v1"), Some("Pod")) => {}
        (Some(version), Some(kind)) => {
            let found = format!("{version} {kind}");
            return Err(ManifestError::NoPod { document, expected: PODS, found });
        }
        _ => {
            let found = "an object without apiVersion and kind".into();
            return Err(ManifestError::NoPod { document, expected: PODS, found });
        }
    }
    serde_path_to_error::deserialize(value).map(Some).map_err(|error| ManifestError::BadPod {
        document,
        kind: "Pod",
        why: error.to_string(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const POD: &str = "apiVersion: v1\nkind: Pod\nmetadata: {name: a}\n";

    fn dir(files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().expect("a directory");
        for (name, text) in files {
            fs::write(dir.path().join(name), text).expect("written");
        }
        dir
    }

    fn names(snapshot: &Snapshot) -> Vec<&str> {
        snapshot.pods.iter().filter_map(|p| p.pod.metadata.name.as_deref()).collect()
    }

    #[test]
    fn several_documents_in_a_file() {
        let two = format!("---\n{POD}---\n---\n{}", POD.replace("name: a", "name: b"));
        let dir = dir(&[("pods.yaml", &two), (".hidden.yaml", "x"), ("notes.txt", "x")]);
        let snapshot = Manifests::new(dir.path()).read().expect("read");
        assert_eq!(names(&snapshot), ["a", "b"]);
        assert!(snapshot.errors.is_empty());
    }

    #[test]
    fn a_bad_document_is_named_and_the_others_go_on() {
        let service = POD.replace("kind: Pod", "kind: Service");
        let bad = "apiVersion: v1\nkind: Pod\nmetadata: {name: [1]}\n";
        let text = format!("{service}---\n{bad}---\njust text\n---\n{POD}");
        let dir = dir(&[("pods.yaml", &text)]);
        let snapshot = Manifests::new(dir.path()).read().expect("read");
        assert_eq!(names(&snapshot), ["a"]);
        let told: Vec<String> = snapshot.errors.iter().map(|e| e.to_string()).collect();
        assert!(told[0].contains("document 1") && told[0].contains("v1 Service"), "{told:?}");
        assert!(told[1].contains("document 2") && told[1].contains("invalid Pod"), "{told:?}");
        assert!(told[2].contains("document 3") && told[2].contains("without"), "{told:?}");
    }

    #[test]
    fn a_file_that_turns_bad_keeps_what_it_said() {
        let dir = dir(&[("pod.yaml", POD)]);
        let mut manifests = Manifests::new(dir.path());
        assert_eq!(names(&manifests.read().expect("read")), ["a"]);
        fs::write(dir.path().join("pod.yaml"), "a: [b").expect("written");
        let snapshot = manifests.read().expect("read");
        assert_eq!(names(&snapshot), ["a"]);
        assert!(snapshot.incomplete && snapshot.errors.len() == 1);
        assert!(snapshot.errors[0].text.contains("not valid YAML"), "{:?}", snapshot.errors);
        // A document that turns bad beside a good one that is new.
        let text = format!("{}---\nkind: Pod\n", POD.replace("name: a", "name: b"));
        fs::write(dir.path().join("pod.yaml"), text).expect("written");
        let snapshot = manifests.read().expect("read");
        assert_eq!((names(&snapshot), snapshot.errors.len()), (vec!["b", "a"], 1));
        // Mended: now it is gone.
        fs::write(dir.path().join("pod.yaml"), POD.replace("name: a", "name: b")).expect("written");
        assert_eq!(names(&manifests.read().expect("read")), ["b"]);
        fs::remove_file(dir.path().join("pod.yaml")).expect("removed");
        assert!(names(&manifests.read().expect("read")).is_empty());
    }

    #[test]
    fn no_directory_is_an_error() {
        let error =
            Manifests::new(Path::new("/nonexistent/pods")).read().expect_err("no directory");
        assert!(error.to_string().contains("/nonexistent/pods"));
    }
}
