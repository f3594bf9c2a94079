//! Which network namespace is a pod's, by its processes.

use std::{collections::BTreeSet, fs, os::unix::fs::symlink, path::Path};

use sidestep::node::{Netns, NetnsCookie, PodNamespaces};
use sidestep_lab::{Lab, Pod, PodNet};

const UID: &str = "7e3c1a52-0d6f-4c3b-9a71-5c2b7f7d9e10";

/// A process as procfs shows it, with a name that is made to mislead.
fn process(proc: &Path, pid: u32, started: u64, netns: &Path) {
    let dir = proc.join(pid.to_string());
    fs::create_dir_all(dir.join("ns")).expect("made");
    fs::write(dir.join("cgroup"), format!("0::/kubepods/pod{UID}/abc\n")).expect("written");
    let zeros = "0 ".repeat(17);
    let stat = format!("{pid} (a) S 1 (b) S 1 {zeros}{started} 0 0\n");
    fs::write(dir.join("stat"), stat).expect("written");
    symlink(netns, dir.join("ns/net")).expect("linked");
}

fn cookie(pod: &Pod) -> NetnsCookie {
    Netns::open(&pod.netns()).and_then(|netns| netns.cookie()).expect("a cookie")
}

#[test]
fn a_pod_is_where_its_oldest_process_is() {
    let lab = Lab::new("places").expect("a lab");
    let [own, made] = ["own", "made"].map(|name| lab.pod(name, PodNet::V4).expect("a pod"));
    let proc = tempfile::tempdir().expect("a directory");
    // One of the pod's processes has made a namespace for itself. Numbers start again.
    process(proc.path(), 300, 50, &own.netns());
    process(proc.path(), 20, 900, &made.netns());
    process(proc.path(), 4000, 51, &made.netns());
    let uids = BTreeSet::from([UID.to_owned()]);
    let mut namespaces = PodNamespaces::new(proc.path(), Path::new("/run/netns"));
    namespaces.search(&uids, &BTreeSet::new()).expect("searched");
    assert_eq!(namespaces.get(UID).map(|place| place.cookie), Some(cookie(&own)));
    // The host's namespace is nobody's, whoever says so.
    let mut namespaces = PodNamespaces::new(proc.path(), Path::new("/run/netns"));
    let host = BTreeSet::from([cookie(&own), cookie(&made)]);
    namespaces.search(&uids, &host).expect("searched");
    assert_eq!(namespaces.get(UID), None);
}

/// F19: a runtime that pins nothing, and processes of which one has made a namespace for itself.
#[test]
fn f19_processes_that_disagree_show_nothing() {
    let lab = Lab::new("places-two").expect("a lab");
    let [own, made] = ["own", "made"].map(|name| lab.pod(name, PodNet::V4).expect("a pod"));
    let proc = tempfile::tempdir().expect("a directory");
    process(proc.path(), 20, 900, &made.netns());
    let uids = BTreeSet::from([UID.to_owned()]);
    let search = || {
        let mut namespaces = PodNamespaces::new(proc.path(), Path::new("/nonexistent"));
        let disputed = namespaces.search(&uids, &BTreeSet::new()).expect("searched");
        (namespaces.get(UID).map(|place| place.cookie), disputed.get(UID).cloned())
    };
    assert_eq!(search(), (Some(cookie(&made)), None), "all agree");
    process(proc.path(), 300, 50, &own.netns());
    let (found, why) = search();
    assert_eq!(found, None);
    assert!(why.expect("told").contains("2 network namespaces"));
}
