//! A node of a cluster: an API server, an agent with its CNI plugin, two pods.

use std::{
    ffi::OsString,
    fs,
    io::Write,
    os::unix::fs::PermissionsExt,
    path::PathBuf,
    process::{Command, Output, Stdio},
    time::Duration,
};

use serde_json::{Value, json};
use sidestep_e2e::ApiServer;
use sidestep_lab::{Agent, Lab, Pod, PodNet, Process, slowdown, wait_until};

use super::{addr, binary};

pub const NODE: &str = "lab";
pub const BRIDGE: &str =
    r#"{"cniVersion":"1.0.0","name":"net","plugins":[{"type":"bridge"},{"type":"portmap"}]}"#;

/// A node of a cluster: an API server, CNI directories, two pods that nobody told of yet.
pub struct Cluster {
    pub agent: Agent,
    // Kept for its processes, which show where a pod's namespace is.
    pub processes: Vec<(Process, PathBuf)>,
    pub a: Pod,
    pub b: Pod,
    pub lab: Lab,
    pub dir: tempfile::TempDir,
    pub api: ApiServer,
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
    pub fn with(tag: &str, flags: &[&str], prepare: impl FnOnce(&ApiServer)) -> Self {
        Self::made(tag, flags, None, prepare)
    }

    /// With an agent that has these capabilities alone.
    pub fn with_capabilities(tag: &str, capabilities: &str) -> Self {
        Self::made(tag, &[], Some(capabilities), |_| {})
    }

    pub fn made(
        tag: &str,
        flags: &[&str],
        capabilities: Option<&str>,
        prepare: impl FnOnce(&ApiServer),
    ) -> Self {
        let api = ApiServer::start(addr([127, 0, 0, 1], 0)).expect("an API server");
        api.put(json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": NODE}}))
            .expect("a node");
        api.put(json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "lab"}}))
            .expect("a namespace");
        prepare(&api);
        let dir = tempfile::tempdir().expect("a directory");
        api.write_kubeconfig(&dir.path().join("kubeconfig")).expect("written");
        for name in ["net.d", "bin"] {
            fs::create_dir(dir.path().join(name)).expect("made");
        }
        fs::write(dir.path().join("net.d/10-net.conflist"), BRIDGE).expect("written");
        let lab = Lab::new(tag).expect("a lab");
        let (a, b) = (lab.pod("a", PodNet::DUAL), lab.pod("b", PodNet::DUAL));
        let mut agent = binary().to_owned();
        if let Some(capabilities) = capabilities {
            let script = format!(
                "#!/bin/sh\nexec setpriv --no-new-privs --bounding-set=-all,{capabilities} {} \"$@\"\n",
                agent.display()
            );
            agent = dir.path().join("limited");
            fs::write(&agent, script).expect("written");
            fs::set_permissions(&agent, fs::Permissions::from_mode(0o755)).expect("executable");
        }
        let agent = Agent::start_with(&agent, &lab, Self::flags(&dir, flags)).expect("an agent");
        let (a, b) = (a.expect("pod a"), b.expect("pod b"));
        Self { agent, processes: Vec::new(), a, b, lab, dir, api }
    }

    pub fn flags(dir: &tempfile::TempDir, more: &[&str]) -> Vec<OsString> {
        let at = |name: &str| dir.path().join(name).into_os_string();
        let mut flags: Vec<OsString> = vec!["--kubernetes".into(), "--node-name".into()];
        flags.extend([NODE.into(), "--kubeconfig".into(), at("kubeconfig"), "--cni".into()]);
        flags.extend(["--cni-conf-dir".into(), at("net.d"), "--cni-bin-dir".into(), at("bin")]);
        flags.extend(["--cni-socket".into(), at("cni.sock"), "--cni-timeout".into()]);
        flags.push((2 * slowdown()).to_string().into());
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
        let (namespace, name, uid) = (text("namespace"), text("name"), text("uid"));
        self.plugin_as(command, pod, [namespace, name, uid], input)
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

    /// Whether there is such an Event, with these words in its note.
    pub fn has_event(&self, kind: &str, name: &str, reason: &str, words: &str) -> bool {
        let events = self.api.list("events.events.k8s.io").expect("events");
        events.iter().any(|event| {
            event["regarding"]["kind"] == kind
                && event["regarding"]["name"] == name
                && event["reason"] == reason
                && event["note"].as_str().is_some_and(|note| note.contains(words))
        })
    }

    pub fn names(&self) -> Vec<String> {
        let status = self.agent.status().unwrap_or_default();
        let pods = status["pods"].as_array().cloned().unwrap_or_default();
        pods.iter().filter_map(|pod| Some(pod["pod"].as_str()?.to_owned())).collect()
    }
}

/// The pod as the API server has it, not yet started.
pub fn pending(pod: &Pod) -> Value {
    let mut object = pod.manifest();
    object["status"] = json!({"phase": "Pending"});
    object["metadata"]["annotations"]["sidestep.io/netns"] = Value::Null;
    object["metadata"]["annotations"]
        .as_object_mut()
        .expect("a map")
        .shift_remove("sidestep.io/netns");
    object
}

pub fn running(pod: &Pod) -> Value {
    let mut object = pending(pod);
    object["status"] = pod.manifest()["status"].clone();
    object
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
