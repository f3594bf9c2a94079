//! A node of a cluster: a real API server, an agent with its CNI plugin, two pods.

#![allow(dead_code, reason = "each test file uses its part")]

use std::{
    ffi::OsString,
    fs,
    io::Write,
    os::unix::fs::PermissionsExt,
    path::PathBuf,
    process::{Command, Output, Stdio},
    sync::Arc,
    time::Duration,
};

use k8s_openapi::api::{
    core::v1::{Namespace, Pod as ApiPod},
    events::v1::Event,
};
use serde_json::{Value, json};
use sidestep_e2e::Envtest;
use sidestep_lab::{Agent, Lab, Pod, PodNet, Process, slowdown, wait_until};

use super::common::{APP, REMOTE4, addr, assert_original, binary, ip};

pub const BRIDGE: &str =
    r#"{"cniVersion":"1.0.0","name":"net","plugins":[{"type":"bridge"},{"type":"portmap"}]}"#;

/// A node of a cluster: an API server, CNI directories, two pods that nobody told of yet. The
/// node, the pods' namespace and the agent's account all have the test's name.
pub struct Cluster {
    pub agent: Agent,
    // Kept for its processes, which show where a pod's namespace is.
    pub processes: Vec<(Process, PathBuf)>,
    pub a: Pod,
    pub b: Pod,
    pub name: String,
    pub api: Arc<Envtest>,
    pub dir: tempfile::TempDir,
    pub lab: Lab,
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for (process, cgroup) in self.processes.drain(..) {
            drop(process);
            let removed = || fs::remove_dir(&cgroup).is_ok() || !cgroup.exists();
            let _ = wait_until("its cgroup to be empty", Duration::from_secs(5), removed);
        }
    }
}

impl Cluster {
    pub fn new(tag: &str) -> Self {
        Self::with(tag, &[], |_| {})
    }

    /// With more flags, and with what `prepare` does to the API server.
    pub fn with(tag: &str, flags: &[&str], prepare: impl FnOnce(&Envtest)) -> Self {
        Parts::new(tag, shared()).cluster(flags, prepare)
    }

    /// With an API server of its own, to be stopped and starved.
    pub fn alone(tag: &str) -> Self {
        Parts::new(tag, Envtest::start().expect("an API server")).cluster(&[], |_| {})
    }

    /// With an agent that has these capabilities alone.
    pub fn with_capabilities(tag: &str, capabilities: &str) -> Self {
        let mut parts = Parts::new(tag, shared());
        let limits = format!("setpriv --no-new-privs --bounding-set=-all,{capabilities}");
        parts.run_agent_by(&limits);
        parts.cluster(&[], |_| {})
    }

    /// The pod as the API server has it, not yet started.
    pub fn pending(&self, pod: &Pod) -> Value {
        let mut object = pod.manifest();
        object["metadata"]["namespace"] = self.name.clone().into();
        object["spec"]["nodeName"] = self.name.clone().into();
        object["status"] = json!({"phase": "Pending"});
        let annotations = object["metadata"]["annotations"].as_object_mut().expect("a map");
        annotations.shift_remove("sidestep.io/netns");
        object
    }

    /// [`Cluster::pending`], of no mesh.
    pub fn plain(&self, pod: &Pod) -> Value {
        let mut object = self.pending(pod);
        object["metadata"]["annotations"] = json!({});
        object["metadata"]["labels"] = json!({});
        object["spec"]["containers"] = json!([{"name": "app", "image": "app"}]);
        object
    }

    pub fn running(&self, pod: &Pod) -> Value {
        let mut object = self.pending(pod);
        object["status"] = pod.manifest()["status"].clone();
        object
    }

    pub fn create(&self, object: Value) -> Value {
        self.api.create(object).expect("created")
    }

    /// [`Cluster::pending`], created.
    pub fn create_pending(&self, pod: &Pod) -> Value {
        self.create(self.pending(pod))
    }

    pub fn patch(&self, pod: &str, patch: &Value) {
        self.api.patch::<ApiPod>(&self.name, pod, patch).expect("patched");
    }

    pub fn set_status(&self, pod: &str, status: Value) {
        self.api.patch_status::<ApiPod>(&self.name, pod, status).expect("patched");
    }

    /// With one of the pod's annotations set, or taken away.
    pub fn annotate(&self, pod: &str, key: &str, value: Value) {
        self.patch(pod, &json!({"metadata": {"annotations": {key: value}}}));
    }

    pub fn label_namespace(&self, key: &str, value: Value) {
        let patch = json!({"metadata": {"labels": {key: value}}});
        self.api.patch::<Namespace>("", &self.name, &patch).expect("patched");
    }

    /// Whether there is such an Event on a pod of the test, or on the node, with these words in its
    /// note.
    pub fn has_event(&self, kind: &str, name: &str, reason: &str, words: &[&str]) -> bool {
        let namespace = if kind == "Node" { "default" } else { &self.name };
        let events = self.api.list::<Event>(namespace).expect("events");
        events.iter().any(|event| {
            event["regarding"]["kind"] == kind
                && event["regarding"]["name"] == name
                && event["reason"] == reason
                && words.iter().all(|word| event["note"].as_str().is_some_and(|n| n.contains(word)))
        })
    }

    pub fn allow(&self, verb: &str, resource: &str) {
        self.api.allow(&self.name, verb, resource).expect("allowed");
    }

    pub fn forbid(&self, verb: &str, resource: &str) {
        self.api.forbid(&self.name, verb, resource).expect("forbidden");
    }

    /// A pod as `status` calls it.
    pub fn named(&self, pod: &str) -> String {
        format!("{}/{pod}", self.name)
    }

    pub fn wait_enrolled(&mut self, pod: &str) {
        let name = self.named(pod);
        self.agent.wait_named(&name, true).expect("enrolled");
    }

    /// The pod's app is intercepted.
    pub fn works(&self, pod: &Pod) {
        let target = addr(ip(REMOTE4), 80);
        assert_original(&pod.ask(APP, APP, target).expect("reached"), target);
    }

    pub fn flags(dir: &tempfile::TempDir, name: &str, more: &[&str]) -> Vec<OsString> {
        let at = |name: &str| dir.path().join(name).into_os_string();
        let mut flags: Vec<OsString> = vec!["--kubernetes".into(), "--node-name".into()];
        flags.extend([name.into(), "--kubeconfig".into(), at("kubeconfig"), "--cni".into()]);
        flags.extend(["--cni-conf-dir".into(), at("net.d"), "--cni-bin-dir".into(), at("bin")]);
        flags.extend(["--cni-socket".into(), at("cni.sock"), "--cni-timeout".into()]);
        flags.push((5 * slowdown()).to_string().into());
        flags.extend(more.iter().map(Into::into));
        flags
    }

    pub fn conflist(&self) -> Value {
        let text = fs::read_to_string(self.dir.path().join("net.d/10-net.conflist"));
        serde_json::from_str(&text.expect("a conflist")).expect("JSON")
    }

    pub fn is_chained(&self) -> bool {
        self.conflist()["plugins"][2]["type"] == "sidestep-cni"
    }

    /// The plugin as the runtime starts it, by the node's configuration.
    pub fn plugin(&self, command: &str, pod: &Pod, object: &Value) -> Output {
        self.plugin_with(command, pod, object, &self.input())
    }

    /// What the runtime gives to the plugin's standard input.
    pub fn input(&self) -> String {
        let mut config = self.conflist()["plugins"][2].clone();
        config["cniVersion"] = "1.0.0".into();
        config["name"] = "net".into();
        config["prevResult"] = json!({"cniVersion": "1.0.0", "ips": []});
        config.to_string()
    }

    pub fn plugin_with(&self, command: &str, pod: &Pod, object: &Value, input: &str) -> Output {
        let meta = &object["metadata"];
        let text = |key: &str| meta[key].as_str().unwrap_or_default();
        self.plugin_as(command, pod, [text("namespace"), text("name"), text("uid")], input)
    }

    /// The same, with these namespace, name and uid in `CNI_ARGS`, whatever the pod's object says.
    pub fn plugin_as(&self, command: &str, pod: &Pod, who: [&str; 3], input: &str) -> Output {
        let [namespace, name, uid] = who;
        let args = format!(
            "IgnoreUnknown=1;K8S_POD_NAMESPACE={namespace};K8S_POD_NAME={name};K8S_POD_UID={uid}"
        );
        let mut child = Command::new(self.dir.path().join("bin/sidestep-cni"))
            .env("CNI_COMMAND", command)
            .env("CNI_CONTAINERID", format!("sandbox-{name}"))
            .env("CNI_NETNS", pod.netns())
            .env("CNI_IFNAME", "eth0")
            .env("CNI_PATH", self.dir.path().join("bin"))
            .env("CNI_ARGS", args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the plugin starts");
        child.stdin.take().expect("a pipe").write_all(input.as_bytes()).expect("written");
        child.wait_with_output().expect("it ends")
    }

    /// A process of the pod, in a cgroup as the kubelet names them.
    pub fn runs(&mut self, on: impl Fn(&Self) -> &Pod, object: &Value) {
        let uid = object["metadata"]["uid"].as_str().expect("a uid");
        let pod = on(self);
        let cgroup = pod.cgroup().join(format!("pod{uid}"));
        fs::create_dir(&cgroup).expect("a cgroup");
        let script = format!("echo $$ >{}/cgroup.procs && exec sleep 1000", cgroup.display());
        let process = pod.spawn(0, 0, ["sh", "-c", &script]).expect("a process");
        self.processes.push((process, cgroup));
    }

    pub fn becomes(&self, what: &str, condition: impl FnMut() -> bool) {
        wait_until(what, Duration::from_secs(15), condition)
            .unwrap_or_else(|error| panic!("{error:#}; {}", self.agent.log_tail()));
    }

    pub fn in_force(&self) {
        self.becomes("the plugin to be chained", || self.is_chained());
    }

    /// What the agent says that is wrong, by `sidestep status`.
    pub fn problems(&self) -> Vec<(String, String)> {
        let socket = self.dir.path().join("cni.sock");
        let args = ["status", "--output", "json", "--cni-socket", &socket.to_string_lossy()];
        let status = self.agent.command(&args).expect("a status");
        let status: Value = serde_json::from_str(&status).expect("JSON");
        let problems = status["problems"].as_array().cloned().unwrap_or_default();
        let text = |problem: &Value, key: &str| problem[key].as_str().unwrap_or("").to_owned();
        problems.iter().map(|problem| (text(problem, "reason"), text(problem, "text"))).collect()
    }

    pub fn names(&self) -> Vec<String> {
        let status = self.agent.status().unwrap_or_default();
        let pods = status["pods"].as_array().cloned().unwrap_or_default();
        pods.iter().filter_map(|pod| Some(pod["pod"].as_str()?.to_owned())).collect()
    }
}

/// The API server that the tests of a file share.
pub fn shared() -> Arc<Envtest> {
    Envtest::shared().expect("an API server")
}

/// What a cluster is made of, before it has an agent.
pub struct Parts {
    pub name: String,
    pub api: Arc<Envtest>,
    pub dir: tempfile::TempDir,
    pub lab: Lab,
    pub binary: PathBuf,
}

impl Parts {
    pub fn new(tag: &str, api: Arc<Envtest>) -> Self {
        Self::on(tag, api, Lab::new(tag).expect("a lab"))
    }

    pub fn on(tag: &str, api: Arc<Envtest>, lab: Lab) -> Self {
        api.add_account(tag).expect("an account");
        api.create(json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": tag}}))
            .expect("a node");
        let dir = tempfile::tempdir().expect("a directory");
        for name in ["net.d", "bin"] {
            fs::create_dir(dir.path().join(name)).expect("made");
        }
        fs::write(dir.path().join("net.d/10-net.conflist"), BRIDGE).expect("written");
        let parts = Self { name: tag.to_owned(), api, dir, lab, binary: binary().to_owned() };
        let token = parts.api.token(tag).expect("a token");
        parts.write("token", &token);
        parts.write("kubeconfig", &parts.api.kubeconfig(&parts.at("token")).to_string());
        parts
    }

    pub fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn write(&self, name: &str, text: &str) {
        fs::write(self.at(name), text).expect("written");
    }

    /// Has the agent started by this command.
    pub fn run_agent_by(&mut self, command: &str) {
        self.write("agent", &format!("#!/bin/sh\nexec {command} {} \"$@\"\n", binary().display()));
        self.binary = self.at("agent");
        fs::set_permissions(&self.binary, fs::Permissions::from_mode(0o755)).expect("executable");
    }

    pub fn cluster(self, flags: &[&str], prepare: impl FnOnce(&Envtest)) -> Cluster {
        prepare(&self.api);
        let Self { name, api, dir, lab, binary } = self;
        let (a, b) = (lab.pod("a", PodNet::DUAL), lab.pod("b", PodNet::DUAL));
        let flags = Cluster::flags(&dir, &name, flags);
        let agent = Agent::start_with(&binary, &lab, flags).expect("an agent");
        let (a, b) = (a.expect("pod a"), b.expect("pod b"));
        Cluster { agent, processes: Vec::new(), a, b, name, api, dir, lab }
    }
}

#[track_caller]
pub fn succeeds(output: &Output) -> String {
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{text} {}", String::from_utf8_lossy(&output.stderr));
    text
}

/// Code and message of the plugin's refusal.
#[track_caller]
pub fn refused(output: &Output) -> (u64, String) {
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(!output.status.success(), "{text}");
    let error: Value = serde_json::from_str(&text).unwrap_or_else(|_| panic!("no JSON: {text}"));
    (error["code"].as_u64().expect("a code"), error["msg"].as_str().expect("a text").to_owned())
}
