//! The node: an API server, an agent, and the plugin as the container runtime starts it.

use std::{
    collections::BTreeMap,
    fs,
    io::{Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, ensure};
use k8s_openapi::api::core::v1::Pod as ApiPod;
use serde_json::{Value, json};
use sidestep_e2e::Envtest;
use sidestep_lab::{Agent, Lab, interrupted, wait_for, wait_until};

use crate::{
    kernel::Kernel,
    pod::{self, NAMESPACE, NODE, Pod},
};

const CONFLIST: &str =
    r#"{"cniVersion":"1.0.0","name":"net","plugins":[{"type":"bridge"},{"type":"portmap"}]}"#;
/// The agent looks at everything this often: `RESYNC` of src/agent.rs.
const RESYNC: Duration = Duration::from_secs(3);
const PATIENCE: Duration = Duration::from_secs(30);

/// The agent's account.
const AGENT: &str = "sidestep";
/// Objects that are created at the same time.
const CREATORS: u32 = 8;

/// Dropped in this order.
pub struct Node {
    pub kernel: Kernel,
    pub agent: Agent,
    pub api: Arc<Envtest>,
    config: Value,
    http: SocketAddr,
    dir: tempfile::TempDir,
    base: PathBuf,
    made: AtomicU32,
    /// Of the agent's requests, those that came before what is measured.
    asked_before: AtomicUsize,
    _lab: Lab,
}

impl Node {
    /// An agent in force on a node without pods, in a cluster with `others` elsewhere.
    pub fn start(sidestep: &Path, others: usize) -> Result<Self> {
        let localhost = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let lab = Lab::new("bench")?;
        let api = Envtest::start()?;
        api.add_account(AGENT)?;
        for (kind, name) in [("Node", NODE), ("Namespace", NAMESPACE)] {
            let labels = json!({"istio-injection": "enabled"});
            api.create(json!({
                "apiVersion": "v1", "kind": kind, "metadata": {"name": name, "labels": labels},
            }))?;
        }
        create_others(&api, u32::try_from(others)?)?;
        let dir = tempfile::tempdir().context("a directory")?;
        let at = |name: &str| dir.path().join(name);
        fs::write(at("token"), api.token(AGENT)?)?;
        fs::write(at("kubeconfig"), api.kubeconfig(&at("token")).to_string())?;
        for name in ["net.d", "bin"] {
            fs::create_dir(at(name))?;
        }
        fs::write(at("net.d/10-net.conflist"), CONFLIST)?;
        // Free a moment ago, and most likely still.
        let http = TcpListener::bind(localhost)?.local_addr()?;
        let mut flags = vec!["--kubernetes".into(), "--cni".into()];
        for (name, value) in [
            ("--node-name", NODE.into()),
            ("--kubeconfig", at("kubeconfig").into_os_string()),
            ("--cni-conf-dir", at("net.d").into()),
            ("--cni-bin-dir", at("bin").into()),
            ("--cni-socket", at("cni.sock").into()),
            ("--http", http.to_string().into()),
        ] {
            flags.extend([name.into(), value]);
        }
        let agent = Agent::start_with(sidestep, &lab, flags)?;
        let chained = || {
            let text = fs::read_to_string(at("net.d/10-net.conflist")).ok()?;
            let list: Value = serde_json::from_str(&text).ok()?;
            let found = list["plugins"][2].clone();
            (found["type"] == "sidestep-cni" && get(http, "/readyz").is_ok()).then_some(found)
        };
        let found = wait_for("the agent to be ready", PATIENCE, chained);
        let mut config = found.with_context(|| agent.log_tail())?;
        config["cniVersion"] = "1.0.0".into();
        config["name"] = "net".into();
        config["prevResult"] = json!({"cniVersion": "1.0.0", "ips": []});
        let kernel = Kernel::open(agent.bpffs())?;
        let base = lab.node_name().strip_suffix("node").context("the lab's names")?;
        let base = Path::new("/run/netns").join(base);
        let (made, asked_before) = (AtomicU32::new(1), AtomicUsize::new(0));
        Ok(Self { kernel, agent, api, config, http, dir, base, made, asked_before, _lab: lab })
    }

    /// A new pod's namespace and object.
    pub fn create(&self) -> Result<Pod> {
        let mut pod = Pod::make(&self.base, self.made.fetch_add(1, Ordering::Relaxed))?;
        let created = self.api.create(pod.pending())?;
        let uid = created["metadata"]["uid"].as_str().context("a pod without a uid")?;
        pod.uid = uid.to_owned();
        Ok(pod)
    }

    /// What the kubelet writes once a pod runs.
    pub fn runs(&self, pod: &Pod) -> Result<()> {
        self.api.patch_status::<ApiPod>(NAMESPACE, &pod.name, pod.running())
    }

    /// Ends a pod as a user and the kubelet do: it is asked to end, its sandbox goes, its object
    /// last.
    pub fn remove(&self, pod: Pod) -> Result<()> {
        self.api.ask_to_end::<ApiPod>(NAMESPACE, &pod.name)?;
        self.plugin("DEL", &pod)?;
        let name = pod.name.clone();
        drop(pod);
        self.api.delete::<ApiPod>(NAMESPACE, &name)
    }

    /// Runs the plugin to its end; how long it took.
    pub fn plugin(&self, command: &str, pod: &Pod) -> Result<Duration> {
        let args = format!(
            "IgnoreUnknown=1;K8S_POD_NAMESPACE={NAMESPACE};K8S_POD_NAME={};K8S_POD_UID={}",
            pod.name, pod.uid
        );
        let start = Instant::now();
        let mut child = Command::new(self.dir.path().join("bin/sidestep-cni"))
            .env_clear()
            .env("CNI_COMMAND", command)
            .env("CNI_CONTAINERID", pod.sandbox())
            .env("CNI_NETNS", &pod.netns)
            .env("CNI_IFNAME", "eth0")
            .env("CNI_PATH", self.dir.path().join("bin"))
            .env("CNI_ARGS", args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("starting the plugin")?;
        let mut input = child.stdin.take().context("the plugin's input")?;
        input.write_all(self.config.to_string().as_bytes())?;
        drop(input);
        let output = child.wait_with_output()?;
        let took = start.elapsed();
        let said = [output.stdout, output.stderr].concat();
        let said = String::from_utf8_lossy(&said);
        ensure!(output.status.success(), "{command} of {}: {said}", pod.name);
        Ok(took)
    }

    /// Waits until the agent has looked at everything twice.
    pub fn settle(&self) -> Result<()> {
        let start = Instant::now();
        wait_until("the agent to settle", PATIENCE, || start.elapsed() > 2 * RESYNC)
    }

    /// Ends all pods, and waits until nothing is in the maps: how long that took, in
    /// milliseconds, and what was left in the end.
    pub fn empty(&self, pods: Vec<Pod>) -> Result<(f64, BTreeMap<String, usize>)> {
        for pod in pods {
            self.remove(pod)?;
        }
        let start = Instant::now();
        let sum = |all: &BTreeMap<String, usize>| all.values().sum::<usize>();
        let mut left = self.kernel.entries()?;
        while sum(&left) > 0 && start.elapsed() < PATIENCE {
            thread::sleep(Duration::from_millis(20));
            left = self.kernel.entries()?;
        }
        Ok((start.elapsed().as_secs_f64() * 1000.0, left))
    }

    /// The agent's `/metrics`.
    pub fn metrics(&self) -> Result<String> {
        get(self.http, "/metrics")
    }

    /// What came from the API server on the agent's connections, in bytes.
    pub fn received(&self, pid: u32) -> Result<u64> {
        let peer = self.api.address().to_string();
        let output = Command::new("ss").args(["-tinHOp", "dst", &peer]).output().context("ss")?;
        let text = String::from_utf8_lossy(&output.stdout);
        let own = format!("pid={pid},");
        let of_agent = text.lines().filter(|line| line.contains(&own));
        let bytes = of_agent.filter_map(|line| line.split("bytes_received:").nth(1));
        let bytes = bytes.filter_map(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
        Ok(bytes.sum())
    }

    /// Forgets the agent's requests so far.
    pub fn clear_requests(&self) -> Result<()> {
        self.asked_before.store(self.api.asked(AGENT)?.len(), Ordering::Relaxed);
        Ok(())
    }

    /// The agent's requests to the API server since then, by verb and path.
    pub fn requests(&self) -> Result<BTreeMap<String, usize>> {
        let mut all = BTreeMap::new();
        for asked in self.api.asked(AGENT)?.iter().skip(self.asked_before.load(Ordering::Relaxed)) {
            let path = asked.uri.split('?').next().unwrap_or_default();
            let path = match path.split_once("/pods/") {
                Some((namespace, _)) => format!("{namespace}/pods/NAME"),
                None => path.to_owned(),
            };
            *all.entry(format!("{} {path}", asked.verb)).or_default() += 1;
        }
        Ok(all)
    }

    /// The lines of the agent's log that are errors or warnings.
    pub fn complaints(&self) -> Vec<String> {
        let log = self.agent.log();
        let bad = |line: &&str| line.contains("ERROR") || line.contains("WARN");
        log.lines().filter(bad).map(str::to_owned).collect()
    }
}

/// Creates that many pods of other nodes.
fn create_others(api: &Envtest, count: u32) -> Result<()> {
    thread::scope(|scope| {
        let create = |first: u32| -> Result<()> {
            for number in (first..count).step_by(CREATORS as usize) {
                ensure!(!interrupted(), "interrupted");
                api.create(pod::other(number))?;
            }
            Ok(())
        };
        let creators: Vec<_> =
            (0..CREATORS).map(|first| scope.spawn(move || create(first))).collect();
        for creator in creators {
            creator.join().map_err(|_| anyhow!("a thread panicked"))??;
        }
        Ok(())
    })
}

/// The body of an HTTP answer with status 200.
fn get(at: SocketAddr, path: &str) -> Result<String> {
    let mut stream = TcpStream::connect(at)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {at}\r\nConnection: close\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    let (head, body) = text.split_once("\r\n\r\n").context("no HTTP answer")?;
    ensure!(head.starts_with("HTTP/1.1 200 "), "{path}: {head:?}: {body}");
    Ok(body.to_owned())
}
