//! The topology: two pods on one node, each with an application and a sidecar. All modes and
//! proxies use the same two pods.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use sidestep_lab::{
    APP, Agent, Envoy, EnvoyOpts, Lab, PROXY, Pod, PodNet, Process, Twin, connect, interrupted,
    iptables, wait_for, wait_until,
};

use crate::app::Service;
use crate::mode::{Mode, Proxy};
use crate::relay::TwinArg;

/// From an application's port to that of the twin which leads to it, in its own pod and in the
/// client's.
const FAR_TWIN: u16 = 2000;
const NEAR_TWIN: u16 = 1000;

/// How long thousands of connections may take to be closed.
const DRAINING: Duration = Duration::from_secs(30);

/// How long connections may take to be spliced.
const SPLICING: Duration = Duration::from_secs(10);
/// And for each of them.
const SPLICING_ONE: Duration = Duration::from_millis(5);

/// Either program that relays.
enum Sidecar {
    Relay(Process),
    Envoy(Envoy),
}

/// The node, its pods and what runs in them.
pub struct World {
    // Dropped in this order.
    sidecars: Option<(Proxy, [Sidecar; 2])>,
    app: Process,
    /// Where the client is.
    pub client: Pod,
    /// Where the application is.
    pub server: Pod,
    /// Further pods, in which nothing runs.
    pub others: Vec<Pod>,
    /// The lab.
    pub lab: Lab,
    sidestep: PathBuf,
    /// Whether that agent has the flag --splice.
    splice_flag: bool,
}

impl World {
    /// Makes all but the sidecars.
    pub fn new(sidestep: &Path) -> Result<Self> {
        let lab = Lab::new("bench")?;
        let client = pod(&lab, "client")?;
        let server = pod(&lab, "server")?;
        // The application's user may not be allowed to read where this binary is.
        fs::copy("/proc/self/exe", lab.dir().join("bench")).context("copying this binary")?;
        let app = start_app(&lab, &server)?;
        let help = Command::new(sidestep).args(["run", "--help"]).output();
        let help = help.with_context(|| format!("running {}", sidestep.display()))?;
        let splice_flag = String::from_utf8_lossy(&help.stdout).contains("--splice");
        let sidestep = sidestep.to_owned();
        let others = Vec::new();
        Ok(Self { sidecars: None, app, client, server, others, lab, sidestep, splice_flag })
    }

    /// Starts the sidecars, instead of the others if there are some. Those that speak HTTP keep
    /// connections to each other, which were made in another mode and are of no use in the next:
    /// they start anew.
    pub fn use_proxy(&mut self, proxy: Proxy) -> Result<()> {
        let running = self.sidecars.as_ref().map(|(running, _)| *running);
        if running == Some(proxy) && proxy != Proxy::Http {
            return Ok(());
        }
        self.sidecars = None;
        let client = self.sidecar(proxy, &self.client, &self.near_twins())?;
        let server = self.sidecar(proxy, &self.server, &self.far_twins())?;
        self.sidecars = Some((proxy, [client, server]));
        Ok(())
    }

    /// Ends the application and starts it again: writers that wait for it are told.
    pub fn restart_app(&mut self) -> Result<()> {
        self.app.kill();
        self.app = start_app(&self.lab, &self.server)?;
        Ok(())
    }

    /// Kills the sidecars.
    pub fn stop_sidecars(&mut self) {
        self.sidecars = None;
    }

    fn sidecar(&self, proxy: Proxy, pod: &Pod, twins: &[Twin]) -> Result<Sidecar> {
        if proxy == Proxy::Relay {
            let args = twins.iter().flat_map(|twin| ["--twin".to_owned(), TwinArg::text(twin)]);
            let args = ["relay".to_owned()].into_iter().chain(args);
            let process = pod.spawn(PROXY, PROXY, part(&self.lab, args))?;
            let last = twins.last().context("no twin")?.listen;
            wait_for_port(pod, last.ip(), last.port()).with_context(|| process.log_tail())?;
            return Ok(Sidecar::Relay(process));
        }
        // One worker, as the relay has, so that what is compared is the same.
        let opts = EnvoyOpts {
            concurrency: 1,
            access_log: false,
            http_port: Some(Service::Http.port()),
            ..EnvoyOpts::default()
        };
        Envoy::start_with(pod, opts, twins).map(Sidecar::Envoy)
    }

    fn near_twins(&self) -> Vec<Twin> {
        let twin = |service: Service| Twin {
            listen: (Ipv4Addr::LOCALHOST, service.port() + NEAR_TWIN).into(),
            upstream: (self.server.ipv4(), service.port() + FAR_TWIN).into(),
            inbound: false,
            http: service == Service::Http,
        };
        Service::EVERY.map(twin).to_vec()
    }

    fn far_twins(&self) -> Vec<Twin> {
        let ip = self.server.ipv4();
        let twin = |service: Service| Twin {
            listen: (ip, service.port() + FAR_TWIN).into(),
            upstream: (ip, service.port()).into(),
            inbound: true,
            http: service == Service::Http,
        };
        Service::EVERY.map(twin).to_vec()
    }

    /// What the client dials.
    pub fn target(&self, mode: Mode, service: Service) -> SocketAddr {
        match mode {
            Mode::Explicit => (Ipv4Addr::LOCALHOST, service.port() + NEAR_TWIN).into(),
            _ => (self.server.ipv4(), service.port()).into(),
        }
    }

    /// Makes further pods until there are `count`.
    pub fn pods(&mut self, count: usize) -> Result<()> {
        while self.others.len() + 2 < count {
            ensure!(!interrupted(), "interrupted");
            let name = format!("other-{}", self.others.len());
            self.others.push(pod(&self.lab, &name)?);
        }
        Ok(())
    }

    /// Waits until the sidecars have closed all their connections to the application, but those
    /// that HTTP keeps.
    pub fn wait_drained(&self) -> Result<()> {
        if matches!(self.sidecars, Some((Proxy::Http, _)) | None) {
            return Ok(());
        }
        let ip = self.server.ipv4();
        for (pod, twin) in [(&self.client, FAR_TWIN), (&self.server, 0)] {
            let mut peers = Vec::new();
            for service in Service::EVERY {
                peers.extend([0, twin].map(|more| SocketAddr::from((ip, service.port() + more))));
            }
            let what = format!("the connections of {} to be closed", pod.name());
            wait_for(&what, DRAINING, || match made_by_sidecar(pod, &peers) {
                Ok(0) => Some(Ok(())),
                Ok(_) => None,
                Err(err) => Some(Err(err)),
            })??;
        }
        Ok(())
    }

    fn all_pods(&self) -> impl Iterator<Item = &Pod> {
        [&self.client, &self.server].into_iter().chain(&self.others)
    }

    /// What the application and the sidecars have written so far.
    pub fn logs(&self) -> Vec<String> {
        let mut all = vec![self.app.log()];
        if let Some((_, sidecars)) = &self.sidecars {
            all.extend(sidecars.iter().map(|sidecar| match sidecar {
                Sidecar::Relay(process) => process.log(),
                Sidecar::Envoy(envoy) => envoy.log(),
            }));
        }
        all
    }

    /// The last line of each of them since `before`: what went wrong there.
    pub fn said_since(&self, before: &[String]) -> String {
        let logs = self.logs();
        let new = logs.iter().zip(before).filter_map(|(log, before)| log.get(before.len()..));
        new.filter_map(|log| log.lines().last()).collect::<Vec<_>>().join("; ")
    }
}

fn pod(lab: &Lab, name: &str) -> Result<Pod> {
    let pod = lab.pod(name, PodNet::V4)?;
    // A connection for each request uses up the client's ports otherwise.
    pod.sysctl("net.ipv4.ip_local_port_range", "16000 65535")?;
    pod.sysctl("net.ipv4.tcp_tw_reuse", "1")?;
    Ok(pod)
}

fn start_app(lab: &Lab, pod: &Pod) -> Result<Process> {
    let ip = pod.ipv4();
    let app = pod.spawn(APP, APP, part(lab, ["app".to_owned(), ip.to_string()]))?;
    wait_for_port(pod, ip, Service::Stopped.port()).with_context(|| app.log_tail())?;
    Ok(app)
}

/// The command line of this binary as one of the parts in the pods.
fn part(lab: &Lab, args: impl IntoIterator<Item = String>) -> Vec<String> {
    let binary = lab.dir().join("bench").display().to_string();
    [binary].into_iter().chain(args).collect()
}

fn wait_for_port(pod: &Pod, ip: IpAddr, port: u16) -> Result<()> {
    let what = format!("port {port} of the pod {}", pod.name());
    wait_until(&what, Duration::from_secs(5), || {
        matches!(pod.run(APP, APP, || connect((ip, port).into(), None)), Ok(Ok(_)))
    })
}

/// A mode that is in force in the pods.
pub struct InForce {
    mode: Mode,
    agent: Option<Agent>,
}

impl InForce {
    /// Puts the mode in force in all pods, and makes sure that it is.
    pub fn new(world: &World, mode: Mode) -> Result<Self> {
        let mut in_force = Self { mode, agent: None };
        match mode {
            Mode::Direct | Mode::Explicit => {}
            Mode::Iptables => world.all_pods().try_for_each(iptables::install_istio)?,
            Mode::Nftables => world.all_pods().try_for_each(iptables::install_istio_nftables)?,
            Mode::Off | Mode::Sidecar | Mode::All => {
                let splice = mode.splice().context("no agent")?;
                let flags = ["--splice", splice];
                let flags = match (world.splice_flag, mode) {
                    (true, _) => &flags[..],
                    (false, Mode::Off) => &[],
                    (false, _) => bail!("this sidestep has no --splice"),
                };
                let mut agent = Agent::start_flags(&world.sidestep, &world.lab, flags)?;
                world.all_pods().try_for_each(|pod| agent.add_pod(pod))?;
                agent.wait_all_enrolled(world.all_pods())?;
                in_force.agent = Some(agent);
            }
        }
        if let Err(err) = in_force.check(world) {
            in_force.end(world)?;
            return Err(err);
        }
        Ok(in_force)
    }

    /// One call: it goes through both sidecars or through none, as the mode says.
    fn check(&self, world: &World) -> Result<()> {
        let Some((proxy, _)) = &world.sidecars else { bail!("there are no sidecars") };
        let target = world.target(self.mode, Service::Echo);
        let call = world.client.run(APP, APP, || -> Result<TcpStream> {
            let mut stream = connect(target, None)?;
            stream.write_all(b"x")?;
            stream.read_exact(&mut [0])?;
            Ok(stream)
        })?;
        let _open = call.context("the first call")?;
        let port = Service::Echo.port();
        let onward = if self.mode == Mode::Explicit { port + FAR_TWIN } else { port };
        let wanted = usize::from(self.mode != Mode::Direct);
        for (pod, port) in [(&world.client, onward), (&world.server, port)] {
            let mut found = Ok(0);
            let what = format!("a call through {wanted} sidecar ({proxy}) of {}", pod.name());
            let waited = wait_until(&what, Duration::from_secs(3), || {
                found = made_by_sidecar(pod, &[(world.server.ipv4(), port).into()]);
                !matches!(found, Ok(number) if number != wanted)
            });
            let found = found?;
            waited.with_context(|| format!("it made {found} connections"))?;
        }
        Ok(())
    }

    /// Sockets that are spliced now.
    fn spliced(&self) -> Result<usize> {
        let agent = self.agent.as_ref().context("there is no agent")?;
        let status = agent.status()?;
        let sockets = status["splice"]["sockets"].as_u64();
        let sockets = sockets.context("the agent's status has no splice.sockets")?;
        sockets.try_into().context("too many sockets")
    }

    /// Opens `count` connections through `open`, and where the mode splices waits until they
    /// are: six sockets of each connection or two, no less. Gives how many there are.
    pub fn open<T>(
        &self,
        proxy: Proxy,
        count: usize,
        open: impl FnOnce() -> Result<T>,
    ) -> Result<(T, usize)> {
        if self.mode.spliced() == 0 {
            return Ok((open()?, 0));
        }
        // Those of an earlier cell are being closed, but for what HTTP keeps.
        let mut before = self.spliced()?;
        if proxy != Proxy::Http && before > 0 {
            wait_until("earlier connections to be closed", DRAINING, || {
                before = self.spliced().unwrap_or(before);
                before == 0
            })?;
        }
        let opened = open()?;
        let wanted = match (proxy, self.mode) {
            // Envoy shares its connections onward between requests.
            (Proxy::Http, Mode::All) => 2 * count,
            (Proxy::Http, _) => 2,
            _ => self.mode.spliced() * count,
        };
        Ok((opened, self.wait_spliced(before + wanted, count)? - before))
    }

    /// Like [`InForce::open`], for more connections of a client: until all `count` of it are
    /// spliced, where the mode splices.
    pub fn open_more(&self, count: usize, open: impl FnOnce() -> Result<()>) -> Result<usize> {
        open()?;
        self.wait_spliced(self.mode.spliced() * count, count)
    }

    fn wait_spliced(&self, wanted: usize, count: usize) -> Result<usize> {
        if wanted == 0 {
            return Ok(0);
        }
        let patience = SPLICING + SPLICING_ONE * u32::try_from(count)?;
        let mut spliced = 0;
        let what = format!("{wanted} sockets to be spliced");
        let waited = wait_for(&what, patience, || {
            spliced = self.spliced().unwrap_or(spliced);
            // Counting takes the machine's time, and more of it where there are more.
            std::thread::sleep(Duration::from_millis(50 + count as u64 / 20));
            (spliced >= wanted).then_some(spliced)
        });
        waited.with_context(|| {
            let status = self.agent.as_ref().map_or(Ok(Value::Null), Agent::status);
            let said = status.map(|status| status["splice"].to_string()).unwrap_or_default();
            format!("{spliced} are: {said}")
        })
    }

    /// Takes it away. Connections that were made in it had better be closed: without its rules
    /// they never end.
    pub fn end(mut self, world: &World) -> Result<()> {
        match self.mode {
            Mode::Direct | Mode::Explicit => Ok(()),
            Mode::Iptables => world.all_pods().try_for_each(iptables::remove),
            Mode::Nftables => world.all_pods().try_for_each(iptables::remove_istio_nftables),
            Mode::Off | Mode::Sidecar | Mode::All => {
                let Some(mut agent) = self.agent.take() else { return Ok(()) };
                agent.terminate()?;
                agent.unload()
            }
        }
    }
}

/// How many connections to any of `peers` the sidecar of the pod has made that have not ended: the
/// last words of one need the mode's rules as well.
fn made_by_sidecar(pod: &Pod, peers: &[SocketAddr]) -> Result<usize> {
    let text = pod.run(0, 0, || fs::read_to_string("/proc/thread-self/net/tcp"))?;
    let text = text.context("reading /proc/net/tcp")?;
    let peers: Vec<String> = peers.iter().filter_map(as_proc_has_it).collect();
    Ok(text.lines().skip(1).filter(|line| is_sidecars(line, &peers)).count())
}

/// An address in /proc/net/tcp.
fn as_proc_has_it(addr: &SocketAddr) -> Option<String> {
    let IpAddr::V4(ip) = addr.ip() else { return None };
    Some(format!("{:08X}:{:04X}", u32::from_ne_bytes(ip.octets()), addr.port()))
}

/// Whether a line of /proc/net/tcp is a connection of the sidecar's user to one of `peers`, in any
/// state but TIME_WAIT.
fn is_sidecars(line: &str, peers: &[String]) -> bool {
    // "sl local remote state queues timer retransmits uid ..."
    let fields: Vec<&str> = line.split_whitespace().collect();
    let [_, _, to, state, _, _, _, uid, ..] = fields[..] else { return false };
    state != "06" && uid == PROXY.to_string() && peers.iter().any(|peer| peer == to)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sidecars_connections_are_told_from_others() {
        let peer = "10.77.0.11:8080".parse().expect("an address");
        let peers = [as_proc_has_it(&peer).expect("IPv4")];
        let line = "   3: 0A004D0A:9C40 0B004D0A:1F90 01 00000000:00000000 00:00000000 00000000  \
                    1337        0 1234 1 0000000000000000 20 4 30 10 -1";
        if cfg!(target_endian = "little") {
            assert!(is_sidecars(line, &peers));
            assert!(!is_sidecars(&line.replace("1337", "1000"), &peers));
            assert!(is_sidecars(&line.replace(" 01 ", " 05 "), &peers)); // FIN_WAIT2
            assert!(!is_sidecars(&line.replace(" 01 ", " 06 "), &peers));
            assert!(!is_sidecars(&line.replace(":1F90", ":1F91"), &peers));
        }
        assert!(!is_sidecars("nonsense", &peers));
    }
}
