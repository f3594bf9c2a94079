//! Mistakes of people: each is named, and the other pods go on.

mod common;

use std::{path::Path, process::Command};

use common::*;
use serde_json::json;

fn sidestep(args: &[&str]) -> (bool, String) {
    said(Command::new(binary()).args(args))
}

fn said(command: &mut Command) -> (bool, String) {
    let output = command.output().expect("runs");
    let text = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8_lossy(&text).into_owned())
}

#[track_caller]
fn assert_says(text: &str, words: &[&str]) {
    for word in words {
        assert!(text.contains(word), "{word:?} is not in {text:?}");
    }
}

#[test]
fn bad_manifests_are_named_and_the_other_pods_go_on() {
    let mut node = Node::new("manifests");
    let sidecar = Sidecar::start(&node.a);
    let file = |name: &str, text: &str| {
        std::fs::write(node.agent.pods_dir().join(name), text).expect("written");
    };
    let with_netns = |node: &Node, name: &str, path: serde_json::Value| {
        let mut manifest = node.b.manifest();
        manifest["metadata"]["name"] = name.into();
        manifest["metadata"]["annotations"]["sidestep.io/netns"] = path;
        node.agent.add_manifest(name, &manifest).expect("written");
    };
    file("not-yaml.yaml", "a: [b");
    file("a-service.yaml", "apiVersion: v1\nkind: Service\nmetadata: {name: s}\n");
    file("no-kind.yaml", "hello\n");
    file("bad-pod.yaml", "apiVersion: v1\nkind: Pod\nmetadata: {name: p}\nspec: {containers: 7}\n");
    with_netns(&node, "nowhere", json!("/run/netns/does-not-exist"));
    with_netns(&node, "host", json!("/proc/self/ns/net"));
    with_netns(&node, "no-netns-file", json!("/etc/hostname"));
    let mut manifest = node.b.manifest();
    manifest["metadata"]["name"] = "unnamed-netns".into();
    let annotations = manifest["metadata"]["annotations"].as_object_mut().expect("annotations");
    annotations.remove("sidestep.io/netns");
    node.agent.add_manifest("unnamed-netns", &manifest).expect("written");
    let mut manifest = node.b.manifest();
    manifest["metadata"]["name"] = "tproxy".into();
    manifest["metadata"]["annotations"]["sidecar.istio.io/interceptionMode"] = "TPROXY".into();
    node.agent.add_manifest("tproxy", &manifest).expect("written");

    node.agent.add_pod(&node.a).expect("a good pod");
    node.agent.wait_enrolled(&node.a).expect("goes on");
    // A second pod in the namespace of the first, and the same pod in another file.
    with_netns(&node, "also-a", json!(node.a.netns()));
    node.agent.add_manifest("again", &node.a.manifest()).expect("written");

    for words in [
        &["not-yaml.yaml", "is not valid YAML"][..],
        &["a-service.yaml", "document 1", "expected a v1 Pod", "v1 Service"],
        &["no-kind.yaml", "document 1", "without apiVersion and kind"],
        &["bad-pod.yaml", "document 1", "invalid Pod", "spec.containers", "`7`"],
        &["pod lab/nowhere", "sidestep.io/netns", "/run/netns/does-not-exist", "No such file"],
        &["pod lab/host", "/proc/self/ns/net", "node's own"],
        &["pod lab/no-netns-file", "/etc/hostname", "as a network namespace"],
        &["pod lab/unnamed-netns", "annotation sidestep.io/netns is missing"],
        &["pod lab/tproxy", "interceptionMode", "TPROXY", "not supported"],
        &["pod lab/also-a", "already claimed by pod lab/a"],
        &["again.yaml", "pod lab/a", "already defined in"],
    ] {
        node.agent.wait_log(words[0]).expect("said");
        let log = node.agent.log();
        let line = log.lines().find(|line| words.iter().all(|word| line.contains(word)));
        assert!(line.is_some(), "{words:?} are not in one line of {log}");
    }
    let pods = node.agent.status().expect("status")["pods"].clone();
    assert_eq!(pods.as_array().map(Vec::len), Some(1), "{pods}");
    let target = addr(ip(REMOTE4), 80);
    assert_original(&node.a.ask(APP, APP, target).expect("captured"), target);
    // Said once, not at every look.
    let told = node.agent.log().matches("pod lab/also-a").count();
    assert_eq!(told, 1, "{}", node.agent.log());
    drop(sidecar);
}

#[test]
fn a_bad_annotation_fails_closed_and_is_named() {
    let mut node = Node::new("annotation");
    let _sidecar = Sidecar::start(&node.a);
    let key = "traffic.sidecar.istio.io/excludeOutboundPorts";
    let mut manifest = node.a.manifest();
    manifest["metadata"]["annotations"][key] = "80, eighty-one".into();
    node.agent.add_manifest("a", &manifest).expect("written");
    node.agent.wait_enrolled(&node.a).expect("enrolled all the same");
    let target = addr(ip(REMOTE4), 80);
    assert_original(&node.a.ask(APP, APP, target).expect("captured"), target);
    assert_says(
        &node.agent.log(),
        &["lab/a", key, "80, eighty-one", "all its traffic is captured"],
    );
}

#[test]
fn paths_that_are_not_what_they_should_be() {
    let pods = tempfile::tempdir().expect("a directory");
    let dir = pods.path().to_str().expect("a path");
    let (ok, text) = sidestep(&["run", "--pods", dir, "--cgroup", "/tmp"]);
    assert!(!ok);
    assert_says(&text, &["/tmp is not a cgroup v2 directory"]);
    let (ok, text) = sidestep(&["run", "--pods", dir, "--cgroup", "/nonexistent/cgroup"]);
    assert!(!ok);
    assert_says(&text, &["/nonexistent/cgroup", "No such file"]);
    let (ok, text) = sidestep(&["run", "--pods", dir, "--bpffs", "/tmp/pins"]);
    assert!(!ok);
    assert_says(&text, &["/tmp/pins is not on a BPF file system", "mount -t bpf"]);
    let (ok, text) = sidestep(&["run", "--pods", "/nonexistent/pods"]);
    assert!(!ok);
    assert_says(&text, &["/nonexistent/pods", "No such file"]);
    let (ok, text) = sidestep(&["status", "--output", "yaml"]);
    assert!(!ok);
    assert_says(&text, &["yaml", "text", "json"]);
    assert!(!Path::new("/tmp/pins").exists());
}

#[test]
fn a_source_of_pods_is_asked_for() {
    for (args, words) in [
        (&["run"][..], &["--pods <DIR>", "--kubernetes"][..]),
        (&["run", "--kubernetes"], &["--node-name"]),
        (&["run", "--kubernetes", "--node-name", "n", "--pods", "/tmp"], &["cannot be used with"]),
        (
            &["run", "--kubernetes", "--node-name", "n"],
            &["--kubeconfig is not set", "service account"],
        ),
    ] {
        let mut command = Command::new(binary());
        let (ok, text) = said(command.args(args).env_remove("KUBERNETES_SERVICE_HOST"));
        assert!(!ok, "{args:?}");
        assert_says(&text, words);
    }
}

#[test]
fn no_privileges_are_named() {
    let copy = tempfile::tempdir_in("/var/tmp").expect("a directory");
    std::fs::set_permissions(copy.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755))
        .expect("readable");
    let program = copy.path().join("sidestep");
    std::fs::copy(binary(), &program).expect("copied where anybody can read it");
    let nobody = |args: &[&str]| {
        said(
            Command::new("setpriv")
                .args(["--reuid=65534", "--regid=65534", "--clear-groups", "--"])
                .arg(&program)
                .args(args),
        )
    };
    let (ok, text) = nobody(&["check"]);
    assert!(!ok);
    assert_says(&text, &["MISSING  privileges", "CAP_BPF", "CAP_NET_ADMIN", "uid 65534"]);
    let (ok, text) = nobody(&["run", "--pods", "/tmp"]);
    assert!(!ok);
    assert_says(&text, &["missing CAP_NET_ADMIN", "CAP_BPF", "uid 65534"]);
}

#[test]
fn check_names_what_a_kernel_lacks() {
    let (ok, text) = sidestep(&["check"]);
    assert!(ok, "{text}");
    assert_says(&text, &["Sidestep can run here"]);
    // A kernel without BTF, as far as this process can see.
    let (ok, text) = said(
        Command::new("unshare")
            .args([
                "--mount",
                "sh",
                "-c",
                "mount -t tmpfs none /sys/kernel/btf && exec \"$0\" check",
            ])
            .arg(binary()),
    );
    assert!(!ok);
    assert_says(
        &text,
        &["MISSING  kernel types (BTF)", "CONFIG_DEBUG_INFO_BTF", "cannot run here"],
    );
    // And one without a bpffs, in JSON.
    let (ok, text) = said(
        Command::new("unshare")
            .args(["--mount", "sh", "-c"])
            .arg("umount /sys/fs/bpf && exec \"$0\" check --output json")
            .arg(binary()),
    );
    assert!(!ok);
    let report: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!(report["ok"], false);
    let items = report["items"].as_array().expect("items");
    let bpffs = items.iter().find(|item| item["name"] == "bpffs").expect("an item");
    assert_eq!(bpffs["ok"], false);
    assert!(items.iter().filter(|item| item["ok"] == false).count() == 1, "{text}");
}

#[test]
fn a_missing_clang_is_explained_by_the_build() {
    // The build script itself, as cargo ran it for this test.
    let out = Path::new(env!("OUT_DIR"));
    let builds = out.parent().and_then(Path::parent).expect("target/*/build");
    let script = std::fs::read_dir(builds)
        .expect("a directory")
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| {
            path.file_name().is_some_and(|n| n.to_string_lossy().starts_with("sidestep-"))
        })
        .map(|path| path.join("build-script-build"))
        .find(|path| path.exists())
        .expect("a compiled build script");
    let build = |clang: Option<&str>| {
        let mut command = Command::new(&script);
        command
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .env("OUT_DIR", out)
            .env("CARGO_CFG_TARGET_ARCH", std::env::consts::ARCH)
            .env("PATH", "/nonexistent")
            .env_remove("CLANG");
        if let Some(clang) = clang {
            command.env("CLANG", clang);
        }
        said(&mut command)
    };
    let (ok, text) = build(None);
    assert!(!ok);
    assert_says(&text, &["clang is needed", "make deps", "CLANG="]);
    let (ok, text) = build(Some("/opt/no/clang"));
    assert!(!ok);
    assert_says(&text, &["CLANG=/opt/no/clang does not run"]);
}
