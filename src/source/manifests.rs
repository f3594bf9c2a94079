//! Pods from a directory of plain Kubernetes manifests: no cluster needed.

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

use super::{Snapshot, SourcePod};
use crate::{files, mesh::facts::pod_name, problem::Problem};

/// The annotation that names a pod's network namespace, as a path. Honoured by this source only.
pub const NETNS_ANNOTATION: &str = "sidestep.io/netns";

/// What is wrong with a manifest.
#[derive(Debug, Error)]
pub enum ManifestError {
    /// The file can't be read.
    #[error("cannot be read: {0}")]
    Unreadable(std::io::Error),
    /// The file is no YAML.
    #[error("is not valid YAML; the pods it held before stay enrolled: {0}")]
    NoYaml(String),
    /// A document is something else.
    #[error("document {document}: expected a v1 Pod, found {found}")]
    NoPod {
        /// Number of the document in the file, from 1.
        document: usize,
        /// What it is.
        found: String,
    },
    /// A document's fields don't fit a Pod.
    #[error("document {document}: invalid Pod: {why}")]
    BadPod {
        /// Number of the document in the file, from 1.
        document: usize,
        /// The misfit.
        why: String,
    },
}

/// The directory, and the pods that each file held when it was last read.
#[derive(Debug)]
pub struct Manifests {
    dir: PathBuf,
    last: BTreeMap<PathBuf, Held>,
}

/// The pods that a file held, and how the file looked where they are all of it.
#[derive(Debug, Default)]
struct Held {
    pods: Vec<Arc<Pod>>,
    looked: Option<Looks>,
}

/// What tells that a file has changed: device and inode, size, and the time of its last change in
/// seconds and nanoseconds.
type Looks = (u64, u64, u64, i64, i64);

/// A file that has changed so lately may change again without looking otherwise: the kernel's clock
/// for files is a coarse one.
const LATELY: Duration = Duration::from_secs(2);

/// How a file looks, where that tells all; asked for before it is read.
fn looks(path: &Path) -> Option<Looks> {
    let found = fs::metadata(path).ok()?;
    let changed = UNIX_EPOCH + Duration::from_secs(u64::try_from(found.ctime()).ok()?);
    let is_settled = changed.elapsed().is_ok_and(|age| age > LATELY);
    is_settled.then(|| (found.dev(), found.ino(), found.size(), found.ctime(), found.ctime_nsec()))
}

impl Manifests {
    /// Manifests in `dir`: files named `*.yaml`, `*.yml` or `*.json`.
    pub fn new(dir: &Path) -> Self {
        Self { dir: dir.to_owned(), last: BTreeMap::new() }
    }

    /// Reads the directory afresh, and those files of it that have changed. A pod is gone when its file is, or when its file is free of
    /// errors and no longer has it: a slip of the pen must not take a pod out of the mesh.
    ///
    /// # Errors
    /// Where the directory itself can't be read; a bad file is in the snapshot's errors.
    pub fn read(&mut self) -> Result<Snapshot> {
        let mut files: Vec<PathBuf> = fs::read_dir(&self.dir)
            .and_then(|entries| entries.map(|entry| entry.map(|e| e.path())).collect())
            .with_context(|| format!("cannot read directory {}", self.dir.display()))?;
        files.retain(|path| is_manifest(path));
        files.sort();

        let mut snapshot = Snapshot::default();
        let mut last = std::mem::take(&mut self.last);
        for path in files {
            let (mut pods, mut errors) = (Vec::new(), Vec::new());
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
                        match pod_of(n + 1, document) {
                            Ok(pod) => pods.extend(pod.map(Arc::new)),
                            Err(error) => errors.push(error),
                        }
                    }
                }
            }
            if !errors.is_empty() {
                let before = last.remove(&path).unwrap_or_default().pods;
                let names: Vec<_> = pods.iter().map(|pod: &Arc<Pod>| pod_name(pod).ok()).collect();
                let missing = |pod: &Arc<Pod>| !names.contains(&pod_name(pod).ok());
                pods.extend(before.into_iter().filter(missing));
                snapshot.incomplete = true;
            }
            let found = pods.iter().cloned();
            snapshot.pods.extend(found.map(|pod| SourcePod { pod, origin: Some(path.clone()) }));
            let told = errors.iter().map(|error| format!("{}: {error}", path.display()));
            snapshot.errors.extend(told.map(Problem::node));
            let looked = looked.filter(|_| errors.is_empty());
            self.last.insert(path, Held { pods, looked });
        }
        Ok(snapshot)
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
/// Where it is no YAML.
pub fn documents(text: &str) -> Result<Vec<Value>, ManifestError> {
    serde_saphyr::from_multiple(text).map_err(|error| {
        // The first line names the place; the others quote the file.
        ManifestError::NoYaml(error.to_string().lines().next().unwrap_or_default().into())
    })
}

/// The pod of a document; none where the document is empty.
///
/// # Errors
/// Where it is something else.
pub fn pod_of(document: usize, value: &Value) -> Result<Option<Pod>, ManifestError> {
    if value.is_null() {
        return Ok(None);
    }
    let field = |name: &str| value.get(name).and_then(Value::as_str);
    match (field("apiVersion"), field("kind")) {
        (Some("v1"), Some("Pod")) => {}
        (Some(version), Some(kind)) => {
            return Err(ManifestError::NoPod { document, found: format!("{version} {kind}") });
        }
        _ => {
            let found = "an object without apiVersion and kind".into();
            return Err(ManifestError::NoPod { document, found });
        }
    }
    serde_path_to_error::deserialize(value)
        .map(Some)
        .map_err(|error| ManifestError::BadPod { document, why: error.to_string() })
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
