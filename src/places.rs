//! Which network namespace is a pod's: what the container runtime told, or what the pod's
//! processes show.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};

use crate::netns::Netns;

/// Where a pod's network namespace is found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// A path that leads there: a bind mount, or a process of the pod.
    pub path: PathBuf,
    /// The kernel's identity of the namespace. A path may come to lead elsewhere.
    pub cookie: u64,
    /// The sandbox's id, where the runtime told.
    pub container: Option<String>,
}

/// The places of this node's pods, by `metadata.uid`.
#[derive(Debug)]
pub struct Places {
    proc: PathBuf,
    known: BTreeMap<String, Place>,
}

impl Places {
    /// None yet; processes are looked for in `proc`, the node's own procfs.
    pub fn new(proc: &Path) -> Self {
        Self { proc: proc.to_owned(), known: BTreeMap::new() }
    }

    /// Takes in what somebody knows for sure.
    pub fn remember(&mut self, uid: &str, place: Place) {
        if !uid.is_empty() {
            self.known.insert(uid.to_owned(), place);
        }
    }

    /// Where the pod's namespace was last seen. Whoever goes there compares the cookie.
    pub fn get(&self, uid: &str) -> Option<&Place> {
        self.known.get(uid)
    }

    /// Forgets where a pod is: it is not there any more.
    pub fn lost(&mut self, uid: &str) {
        self.known.remove(uid);
    }

    /// Forgets a sandbox; one that has taken its place since is kept.
    pub fn forget(&mut self, container: &str) {
        self.known.retain(|_, place| place.container.as_deref() != Some(container));
    }

    /// Forgets the sandboxes that the runtime told of and that are not among these.
    pub fn keep_only(&mut self, containers: &BTreeSet<String>) {
        self.known.retain(|_, place| {
            place.container.as_ref().is_none_or(|container| containers.contains(container))
        });
    }

    /// Forgets the pods that are not among these.
    pub fn retain(&mut self, uids: &BTreeSet<String>) {
        self.known.retain(|uid, _| uids.contains(uid));
    }

    /// Looks for processes of these pods, by their cgroups, and remembers where the oldest of each
    /// is: the sandbox's own comes first, and what a pod's processes do to themselves later counts
    /// for nothing. The namespaces in `host` are nobody's.
    ///
    /// # Errors
    /// Where the processes can't be listed, or those of a pod may not be looked at. One that is
    /// gone is passed over: they come and go.
    pub fn search(&mut self, uids: &BTreeSet<String>, host: &BTreeSet<u64>) -> Result<()> {
        if uids.is_empty() {
            return Ok(());
        }
        let processes = fs::read_dir(&self.proc)
            .with_context(|| format!("cannot list processes in {}", self.proc.display()))?;
        let mut forbidden = None;
        let mut found: BTreeMap<String, (Age, Place)> = BTreeMap::new();
        for process in processes.flatten() {
            let name = process.file_name();
            let Some(pid) = name.to_str().and_then(|name| name.parse().ok()) else {
                continue;
            };
            let dir = process.path();
            let Some(uid) = pod_of(&dir).filter(|uid| uids.contains(uid)) else {
                continue;
            };
            let Some(age) = started(&dir).map(|start| (start, pid)) else {
                continue;
            };
            if found.get(&uid).is_some_and(|(oldest, _)| *oldest < age) {
                continue;
            }
            let path = dir.join("ns/net");
            let cookie = match Netns::open(&path).and_then(|netns| netns.cookie()) {
                Ok(cookie) => cookie,
                Err(error) => {
                    if is_forbidden(&error) {
                        forbidden = Some(error);
                    }
                    continue;
                }
            };
            // The number may have become another process' meanwhile.
            if host.contains(&cookie) || pod_of(&dir).as_ref() != Some(&uid) {
                continue;
            }
            found.insert(uid, (age, Place { path, cookie, container: None }));
        }
        let all = found.len() == uids.len();
        self.known.extend(found.into_iter().map(|(uid, (_, place))| (uid, place)));
        match forbidden.filter(|_| !all) {
            Some(error) => Err(error
                .context("the processes of pods may not be looked at (CAP_SYS_PTRACE, AppArmor)")),
            None => Ok(()),
        }
    }
}

/// When a process started, in ticks since the machine did, and its number.
type Age = (u64, u32);

/// When a process started: field 22 of its stat, behind the name, which may hold anything.
fn started(process: &Path) -> Option<u64> {
    let stat = fs::read_to_string(process.join("stat")).ok()?;
    stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
}

fn is_forbidden(error: &anyhow::Error) -> bool {
    let kind = error.downcast_ref::<io::Error>().map(io::Error::kind);
    kind == Some(io::ErrorKind::PermissionDenied)
}

/// The pod that a process belongs to, by its `metadata.uid`.
fn pod_of(process: &Path) -> Option<String> {
    pod_of_cgroups(&fs::read_to_string(process.join("cgroup")).ok()?)
}

/// The pod in a /proc/PID/cgroup: that of the first line with one.
fn pod_of_cgroups(text: &str) -> Option<String> {
    text.lines().find_map(|line| pod_of_cgroup(line.splitn(3, ':').nth(2)?))
}

/// The pod in a cgroup's path: `/kubepods/burstable/podUID/...` as the kubelet's cgroupfs driver
/// names it, `/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podUID.slice/...` as
/// its systemd driver does, the latter with `_` for `-`. Seen from another cgroup namespace, the
/// path starts with `/..` and lacks what both share. The outermost pod counts: what a pod names
/// its own cgroups proves nothing.
fn pod_of_cgroup(path: &str) -> Option<String> {
    path.split('/').find_map(|part| {
        if let Some(uid) = part.strip_prefix("pod") {
            return is_uid(uid).then(|| uid.to_owned());
        }
        let uid = part.strip_suffix(".slice")?.rsplit_once("-pod")?.1.replace('_', "-");
        is_uid(&uid).then_some(uid)
    })
}

/// Whether this looks like a `metadata.uid`, or like the hash that names a static pod.
fn is_uid(text: &str) -> bool {
    text.len() >= 32 && text.bytes().all(|byte| byte.is_ascii_hexdigit() || byte == b'-')
}

#[cfg(test)]
mod tests {
    use super::*;

    const UID: &str = "7e3c1a52-0d6f-4c3b-9a71-5c2b7f7d9e10";

    #[test]
    fn every_layout_of_the_kubelets_cgroups_names_the_pod() {
        let systemd = UID.replace('-', "_");
        for path in [
            format!("0::/kubepods/burstable/pod{UID}/abc"),
            format!("0::/kubepods/pod{UID}"),
            format!(
                "0::/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{systemd}.slice/cri-containerd-abc.scope"
            ),
            format!("0::/kubepods.slice/kubepods-pod{systemd}.slice/crio-abc.scope"),
            // From inside another pod's cgroup namespace.
            format!("0::/../../kubepods-burstable-pod{systemd}.slice/cri-containerd-abc.scope"),
            format!("0::/../../pod{UID}/abc"),
            // kind: a node is a container itself.
            format!("0::/docker/4f/kubelet/kubepods/burstable/pod{UID}/abc"),
            // Hybrid: the unified hierarchy says nothing, version 1 does.
            format!(
                "12:pids:/kubepods/burstable/pod{UID}/abc\n0::/system.slice/containerd.service"
            ),
        ] {
            assert_eq!(pod_of_cgroups(&path).as_deref(), Some(UID), "{path}");
        }
    }

    #[test]
    fn what_is_no_pods_cgroup_names_none() {
        for path in [
            "0::/",
            "0::/user.slice/user-1000.slice",
            "0::/system.slice/podman.service",
            "0::/kubepods/burstable",
            "garbage",
            "",
        ] {
            assert_eq!(pod_of_cgroups(path), None, "{path}");
        }
    }

    #[test]
    fn a_pod_that_names_a_cgroup_like_another_pod_stays_itself() {
        let other = "00000000-0000-0000-0000-000000000000";
        let path = format!("0::/kubepods/pod{UID}/abc/kubepods/pod{other}/x");
        assert_eq!(pod_of_cgroups(&path).as_deref(), Some(UID));
    }

    #[test]
    fn no_procfs_is_an_error() {
        let mut places = Places::new(Path::new("/nonexistent"));
        let error = places.search(&BTreeSet::from([UID.to_owned()]), &BTreeSet::new());
        assert!(error.expect_err("no procfs").to_string().contains("/nonexistent"));
    }
}
