//! Pods: a network namespace on the node's bridge, and a cgroup.

use std::ffi::{OsStr, OsString};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{self, Command};
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::PROXY;
use crate::client::{self, Answer};
use crate::lab::{Inner, LeafCgroup};
use crate::netns::Netns;
use crate::process::Process;
use crate::server::{ServeOpts, Server, Talk};

/// The node, as pods know it.
const GATEWAY6: Ipv6Addr = Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 1);

/// Which addresses a pod gets.
#[derive(Clone, Copy, Debug)]
pub struct PodNet {
    /// An IPv4 address.
    pub v4: bool,
    /// An IPv6 address.
    pub v6: bool,
}

impl PodNet {
    /// IPv4 only.
    pub const V4: Self = Self { v4: true, v6: false };
    /// IPv6 only.
    pub const V6: Self = Self { v4: false, v6: true };
    /// IPv4 and IPv6.
    pub const DUAL: Self = Self { v4: true, v6: true };
}

/// A pod: `eth0` with a /24 and a /64 on the node's bridge, `lo`, and a cgroup for its
/// processes. All of it goes when it is dropped, its processes too.
pub struct Pod {
    name: String,
    uid: String,
    // Dropped in this order.
    cgroup: LeafCgroup,
    netns: Netns,
    v4: Option<Ipv4Addr>,
    v6: Option<Ipv6Addr>,
    lab: Arc<Inner>,
}

impl Pod {
    pub(crate) fn new(lab: Arc<Inner>, name: &str, net: PodNet) -> Result<Self> {
        ensure!(net.v4 || net.v6, "a pod needs an address");
        let number = lab.next_pod()?;
        let host = number + 10;
        let [high, low] = host.to_be_bytes();
        let v4 = net.v4.then(|| Ipv4Addr::new(10, 77, high, low));
        let v6 = net.v6.then(|| Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, host));
        let uid = format!("{:08x}-{:04x}-4000-8000-{host:012x}", process::id(), lab.number);
        let netns = Netns::add(format!("{}-{name}", lab.id))?;
        let cgroup = lab.leaf_cgroup(name)?;

        netns.sysctl("net.ipv6.conf.default.accept_dad", "0")?;
        let port = format!("p{number}");
        lab.node.ip(&format!(
            "link add {port} type veth peer name eth0 netns {}\n\
             link set {port} master br0 up\n",
            netns.name
        ))?;
        if !net.v6 {
            netns.sysctl("net.ipv6.conf.eth0.disable_ipv6", "1")?;
        }
        netns.ip("link set lo up\nlink set eth0 up\n")?;
        if let Some(ip) = v4 {
            netns.add_address(ip.into(), 16, "eth0", "")?;
            netns.ip("route add default via 10.77.0.1\n")?;
        }
        if let Some(ip) = v6 {
            netns.add_address(ip.into(), 64, "eth0", "")?;
            netns.ip("route add default via fd77::1\n")?;
            // With its first port the bridge, and so its address, comes up.
            lab.node.wait_local(GATEWAY6.into())?;
        }
        Ok(Self { name: name.to_owned(), uid, cgroup, netns, v4, v6, lab })
    }

    /// The name given to [`crate::Lab::pod`].
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The path of its network namespace, below /run/netns.
    pub fn netns(&self) -> PathBuf {
        self.netns.path()
    }

    /// Its cgroup, which only has child processes in it.
    pub fn cgroup(&self) -> &Path {
        &self.cgroup.0
    }

    /// Its IPv4 address. Panics when it has none: the test asked for a pod without.
    pub fn ipv4(&self) -> IpAddr {
        self.v4.expect("this pod was made without an IPv4 address").into()
    }

    /// Its IPv6 address. Panics when it has none: the test asked for a pod without.
    pub fn ipv6(&self) -> IpAddr {
        self.v6.expect("this pod was made without an IPv6 address").into()
    }

    /// Its addresses, IPv4 first.
    pub fn ips(&self) -> Vec<IpAddr> {
        self.v4.map(IpAddr::from).into_iter().chain(self.v6.map(IpAddr::from)).collect()
    }

    /// Whether it has an IPv6 address.
    pub fn has_v6(&self) -> bool {
        self.v6.is_some()
    }

    /// Runs `work` in a thread inside the pod whose sockets belong to `uid`:`gid` (as file
    /// system ids, which is what a socket's owner is; the real uid stays root). A panic in it
    /// goes on in the caller.
    pub fn run<T: Send>(&self, uid: u32, gid: u32, work: impl FnOnce() -> T + Send) -> Result<T> {
        self.netns.run(uid, gid, work)
    }

    /// Connects as `uid`:`gid` and reads the line that [`Pod::serve`] and [`Pod::fake_proxy`]
    /// greet with. Fails after three seconds.
    pub fn ask(&self, uid: u32, gid: u32, target: SocketAddr) -> Result<Answer> {
        self.run(uid, gid, || client::ask(target, None))?
            .with_context(|| format!("uid {uid} of {} asking {target}", self.name))
    }

    /// Serves TCP on `addr`: greets each client with what it sees of it, then echoes.
    pub fn serve(&self, addr: SocketAddr, uid: u32, gid: u32) -> Result<Server> {
        Server::start(self, ServeOpts { uid, gid, ..ServeOpts::on([addr]) })
    }

    /// Plays the sidecar (uid 1337) on `port` of all addresses: greets each client with the
    /// original destination as the kernel tells it.
    pub fn fake_proxy(&self, port: u16) -> Result<Server> {
        let any4 = SocketAddr::from((Ipv4Addr::UNSPECIFIED, port));
        let any6 = SocketAddr::from((Ipv6Addr::UNSPECIFIED, port));
        let listen = [any4].into_iter().chain(self.v6.map(|_| any6));
        Server::start(
            self,
            ServeOpts { talk: Talk::OriginalDst, uid: PROXY, gid: PROXY, ..ServeOpts::on(listen) },
        )
    }

    /// Starts a child process with real uid and gid, in the pod's namespace and cgroup.
    /// Its output is kept in a file in the lab's directory.
    pub fn spawn<S: AsRef<OsStr>>(
        &self,
        uid: u32,
        gid: u32,
        argv: impl IntoIterator<Item = S>,
    ) -> Result<Process> {
        let argv: Vec<OsString> = argv.into_iter().map(|arg| arg.as_ref().into()).collect();
        let program = Path::new(argv.first().context("an empty command")?)
            .file_name()
            .context("a command without a name")?
            .to_string_lossy();
        let name = format!("{}-{program}", self.name);
        let log = self.lab.new_path(&name, "log");
        let script = "echo $$ >\"$1/cgroup.procs\" && shift && exec setpriv \"$@\"";
        let mut command = Command::new("nsenter");
        command
            .arg(format!("--net={}", self.netns().display()))
            .args(["--", "sh", "-c", script, "sh"])
            .arg(self.cgroup())
            .args([format!("--reuid={uid}"), format!("--regid={gid}")])
            .args(["--clear-groups", "--"])
            .args(argv);
        Process::start(&name, &mut command, log)
    }

    /// Sets a sysctl such as `net.ipv4.tcp_tw_reuse` in the pod's namespace.
    pub fn sysctl(&self, key: &str, value: &str) -> Result<()> {
        self.netns.sysctl(key, value)
    }

    /// Gives a device of the pod an address, which is in force when this returns. `more` is what
    /// `ip addr add` is told besides.
    pub fn add_address(&self, ip: IpAddr, bits: u8, device: &str, more: &str) -> Result<()> {
        self.netns.add_address(ip, bits, device, more)
    }

    /// Runs one `ip` command in the pod, without the word `ip`: `route add unreachable 192.0.2.1`.
    /// Gives what it printed.
    pub fn ip(&self, command: &str) -> Result<String> {
        self.netns.ip(&format!("{command}\n"))
    }

    /// Has `nft` run these commands in the pod, and returns what it prints.
    pub fn nft(&self, commands: &str) -> Result<String> {
        self.netns.command(&["nft", "-f", "-"], commands)
    }

    /// The pod as Kubernetes would have it after Istio's injection, for the agent. A test may
    /// change the value before it hands it over.
    pub fn manifest(&self) -> Value {
        let mut env = vec![json!({"name": "ISTIO_META_APP_CONTAINERS", "value": "app"})];
        if self.v4.is_some() && self.v6.is_some() {
            env.push(json!({"name": "ISTIO_DUAL_STACK", "value": "true"}));
        }
        let ips: Vec<Value> = self.ips().iter().map(|ip| json!({"ip": ip})).collect();
        json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "name": self.name,
                "namespace": "lab",
                "uid": self.uid,
                "labels": {"app": self.name, "security.istio.io/tlsMode": "istio"},
                "annotations": {
                    "sidestep.io/netns": self.netns(),
                    "sidecar.istio.io/status": "{}",
                },
            },
            "spec": {
                "nodeName": "lab",
                "containers": [
                    {"name": "app", "image": "app"},
                    {
                        "name": "istio-proxy",
                        "image": "istio/proxyv2",
                        "args": ["proxy", "sidecar"],
                        "env": env,
                        "ports": [{"containerPort": 15090, "name": "http-envoy-prom"}],
                        "securityContext": {"runAsUser": PROXY, "runAsGroup": PROXY},
                    },
                ],
            },
            "status": {
                "phase": "Running",
                "podIP": self.ips().first(),
                "podIPs": ips,
            },
        })
    }

    pub(crate) fn lab(&self) -> &Inner {
        &self.lab
    }

    pub(crate) fn netns_handle(&self) -> &Netns {
        &self.netns
    }
}
