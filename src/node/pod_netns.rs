//! Finds a pod's network namespace: the container runtime names it, or the pod's processes show it.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::{self, ErrorKind},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};

use super::netns::{Netns, NetnsCookie};

/// A pod's network namespace: its path and its identity.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodNetns {
    /// A path to the namespace: a bind mount, or a process of the pod.
    pub path: PathBuf,
    /// The kernel's identity of the namespace. A path may come to lead elsewhere.
    pub cookie: NetnsCookie,
    /// The sandbox's id, if the runtime has named it.
    pub container: Option<String>,
}

/// The network namespaces of this node's pods, by `metadata.uid`.
#[derive(Debug)]
pub struct PodNamespaces {
    proc: PathBuf,
    pins: PathBuf,
    known: BTreeMap<String, PodNetns>,
}

impl PodNamespaces {
    /// No namespaces yet. Processes are searched in `proc`, the node's own procfs; `pins` is the
    /// directory where the container runtime mounts network namespaces.
    pub fn new(proc: &Path, pins: &Path) -> Self {
        Self { proc: proc.to_owned(), pins: pins.to_owned(), known: BTreeMap::new() }
    }

    /// Records a pod's namespace that the runtime has named.
    pub fn remember(&mut self, uid: &str, netns: PodNetns) {
        if !uid.is_empty() {
            self.known.insert(uid.to_owned(), netns);
        }
    }

    /// The pod's namespace as it was last seen. Callers that open the path compare the cookie.
    pub fn get(&self, uid: &str) -> Option<&PodNetns> {
        self.known.get(uid)
    }

    /// Forgets the namespace of a pod that is gone.
    pub fn lost(&mut self, uid: &str) {
        self.known.remove(uid);
    }

    /// Forgets a sandbox, unless another one has replaced it.
    pub fn forget(&mut self, container: &str) {
        self.known.retain(|_, netns| netns.container.as_deref() != Some(container));
    }

    /// Forgets the sandboxes that the runtime has named, except these.
    pub fn keep_only(&mut self, containers: &BTreeSet<String>) {
        self.known.retain(|_, netns| {
            netns.container.as_ref().is_none_or(|container| containers.contains(container))
        });
    }

    /// Forgets all pods except these.
    pub fn retain(&mut self, uids: &BTreeSet<String>) {
        self.known.retain(|uid, _| uids.contains(uid));
    }

    /// Looks for processes of these pods, by their cgroups, and remembers where each pod is, by
    /// [`of_sandbox`]. The namespaces in `host` are nobody's. Tells of the pods whose processes do
    /// not show it, and why.
    ///
    /// # Errors
    /// If the processes cannot be listed, or those of a pod may not be looked at. One that is
    /// gone is passed over: they come and go.
    pub fn search(
        &mut self,
        uids: &BTreeSet<String>,
        host: &BTreeSet<NetnsCookie>,
    ) -> Result<BTreeMap<String, String>> {
        let mut disputed = BTreeMap::new();
        if uids.is_empty() {
            return Ok(disputed);
        }
        let processes = fs::read_dir(&self.proc)
            .with_context(|| format!("cannot list processes in {}", self.proc.display()))?;
        let mut forbidden = None;
        let mut found: BTreeMap<String, Vec<Process>> = BTreeMap::new();
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
            match (namespace(&dir.join("ns/net")), namespace(&dir.join("ns/user"))) {
                (Ok(net), user) => {
                    let user = user.ok();
                    found.entry(uid).or_default().push(Process { age, dir, net, user });
                }
                (Err(error), _) if error.kind() == ErrorKind::PermissionDenied => {
                    forbidden = Some(error);
                }
                (Err(_), _) => {}
            }
        }
        // A process of a pod may have been let into the node's own namespace.
        let nodes =
            ["/proc/self/ns/net", "/proc/1/ns/net"].map(|path| namespace(Path::new(path)).ok());
        for processes in found.values_mut() {
            processes.retain(|process| !nodes.contains(&Some(process.net)));
        }
        found.retain(|_, processes| !processes.is_empty());
        let pinned = self.pinned();
        let own = namespace(Path::new("/proc/self/ns/user")).ok();
        let mut all = uids.iter().all(|uid| found.contains_key(uid));
        for (uid, processes) in found {
            let process = match of_sandbox(processes, &pinned, own) {
                Ok(process) => process,
                Err(why) => {
                    disputed.insert(uid, why);
                    continue;
                }
            };
            let path = process.dir.join("ns/net");
            let cookie = Netns::open(&path).and_then(|netns| netns.cookie());
            // The number may have become another process' meanwhile.
            let is_same = namespace(&path).is_ok_and(|net| net == process.net)
                && pod_of(&process.dir).as_ref() == Some(&uid);
            match cookie {
                Ok(cookie) if is_same && !host.contains(&cookie) => {
                    self.known.insert(uid, PodNetns { path, cookie, container: None });
                }
                _ => all = false,
            }
        }
        match forbidden.filter(|_| !all) {
            Some(error) => Err(anyhow::Error::from(error).context(
                "no permission to look at the processes of pods (CAP_SYS_PTRACE, AppArmor)",
            )),
            None => Ok(disputed),
        }
    }

    /// The namespaces that somebody has pinned by a mount: only root of the node can, and container
    /// runtimes do so with those of sandboxes.
    fn pinned(&self) -> BTreeSet<Namespace> {
        let entries = fs::read_dir(&self.pins).into_iter().flatten().flatten();
        entries.filter_map(|entry| namespace(&entry.path()).ok()).collect()
    }
}

/// A process of a pod, as procfs shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Process {
    age: Age,
    dir: PathBuf,
    net: Namespace,
    /// Its user namespace, where that may be looked at.
    user: Option<Namespace>,
}

/// The device and inode number of a namespace, unique while it lives.
type Namespace = (u64, u64);

/// The namespace at a path. Nothing is opened: it may be anything.
fn namespace(path: &Path) -> io::Result<Namespace> {
    fs::metadata(path).map(|found| (found.dev(), found.ino()))
}

/// The process that shows a pod's network namespace: that of its sandbox, and none that the pod's
/// processes made for themselves.
///
/// Where the container runtime has pinned one of those that they are in, that is it. Else all have
/// to agree, and to be in the node's own user namespace (`own`): who may make a network namespace
/// without making a user namespace first is privileged. Of several processes the oldest.
///
/// # Errors
/// The reason why no process shows it.
fn of_sandbox(
    mut processes: Vec<Process>,
    pinned: &BTreeSet<Namespace>,
    own: Option<Namespace>,
) -> Result<Process, String> {
    processes.sort_by_key(|process| process.age);
    let is_pinned = |process: &&Process| pinned.contains(&process.net);
    if let Some(process) = processes.iter().find(is_pinned) {
        return Ok(process.clone());
    }
    let namespaces: BTreeSet<Namespace> = processes.iter().map(|process| process.net).collect();
    if namespaces.len() > 1 {
        return Err(format!(
            "its processes are in {} network namespaces, none of them pinned by the container \
             runtime: Sidestep cannot tell which one is the pod's",
            namespaces.len()
        ));
    }
    if processes.iter().any(|process| process.user.is_some() && process.user != own) {
        return Err(
            "its processes are in a user namespace of their own, and the container runtime has not \
             pinned their network namespace: they may have created it themselves"
                .into(),
        );
    }
    processes.into_iter().next().ok_or_else(|| "it has no processes".into())
}

/// When a process started, in ticks since the machine did, and its number.
type Age = (u64, u32);

/// When a process started: field 22 of its stat, behind the name, which may hold anything.
fn started(process: &Path) -> Option<u64> {
    let stat = fs::read_to_string(process.join("stat")).ok()?;
    stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
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

    /// F19: a pod's processes cannot choose another namespace for the pod.
    #[test]
    fn f19_only_the_sandboxs_own_namespace_counts() {
        let (node, inner) = (Some((4, 1)), Some((4, 2)));
        let process = |pid: u32, net: u64, user| Process {
            age: (u64::from(pid), pid),
            dir: format!("/proc/{pid}").into(),
            net: (4, net),
            user,
        };
        let pins = |net: &[u64]| -> BTreeSet<Namespace> { net.iter().map(|n| (4, *n)).collect() };
        let shown = |processes: &[Process], pinned: &[u64]| {
            of_sandbox(processes.to_vec(), &pins(pinned), node).map(|process| process.age.1)
        };
        // The first process has made user and network namespaces for itself.
        let first = process(10, 70, inner);
        let (second, third) = (process(11, 50, node), process(12, 50, node));
        let all = [first.clone(), third, second.clone()];
        assert_eq!(shown(&all, &[50, 60]), Ok(11), "the oldest of those in the pinned one");
        assert!(shown(&all, &[]).expect_err("they disagree").contains("2 network namespaces"));
        let alone = shown(&[first], &[50]);
        assert!(alone.expect_err("nobody disagrees").contains("created it themselves"));
        assert_eq!(shown(&[second], &[]), Ok(11), "a runtime that pins nothing");
        // A pod with a user namespace of its own, by the kubelet.
        assert_eq!(shown(&[process(20, 80, inner)], &[80]), Ok(20));
    }

    #[test]
    fn no_procfs_is_an_error() {
        let mut namespaces =
            PodNamespaces::new(Path::new("/nonexistent"), Path::new("/nonexistent"));
        let error = namespaces.search(&BTreeSet::from([UID.to_owned()]), &BTreeSet::new());
        assert!(error.expect_err("no procfs").to_string().contains("/nonexistent"));
    }
}
