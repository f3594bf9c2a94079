//! Calls of the kernel's own sockets to Services. The rows are those of docs/services.md.

mod common;

use std::{
    fs,
    io::Read,
    net::{IpAddr, SocketAddr, TcpListener},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::{Receiver, channel},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use common::{services::*, *};
use nix::mount::{MsFlags, mount};
use serde_json::json;
use sidestep_lab::{Agent, Lab, Pod, PodNet, slowdown};

/// What the kernel's client needs of an NFS server here: one that takes its calls, and hangs up, at
/// once or in the end.
struct HangsUp {
    /// Who called.
    calls: Receiver<SocketAddr>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl HangsUp {
    fn start(pod: &Pod, holds: bool) -> Self {
        let listener = pod.run(0, 0, || TcpListener::bind(addr(ip("::"), TARGET))).expect("runs");
        let listener = listener.expect("bound");
        listener.set_nonblocking(true).expect("set");
        let (called, calls) = channel();
        let stop = Arc::<AtomicBool>::default();
        let ends = Arc::clone(&stop);
        let thread = thread::spawn(move || {
            let mut held = Vec::new();
            while !ends.load(Ordering::Relaxed) {
                let Ok((mut stream, from)) = listener.accept() else {
                    thread::sleep(Duration::from_millis(20));
                    continue;
                };
                stream.set_nonblocking(false).expect("set");
                stream.set_read_timeout(Some(patience())).expect("set");
                if stream.read(&mut [0; 64]).is_ok_and(|n| n > 0) {
                    let _ = called.send(from);
                }
                if holds {
                    held.push(stream);
                }
            }
        });
        Self { calls, stop, thread: Some(thread) }
    }

    /// Waits for the next call.
    fn called_by(&self) -> IpAddr {
        let wait = SOON * slowdown();
        self.calls.recv_timeout(wait).expect("a call").ip().to_canonical()
    }
}

impl Drop for HangsUp {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A node whose agent attaches to the root of all cgroups, as on a real one: sockets that the kernel's
/// own threads make are in no other.
fn node() -> Cluster {
    let lab = Lab::new("s30").expect("a lab");
    let client = lab.pod("client", PodNet::DUAL).expect("a pod");
    let backends = ["b1", "b2"].map(|name| lab.pod(name, PodNet::DUAL).expect("a backend"));
    let root = Path::new("/sys/fs/cgroup");
    let start = || Agent::start_on(binary(), &lab, root, &["--services", "--splice", "off"]);
    let agent = lab.on_node(start).expect("runs").expect("the agent");
    agent.wait_log("interception is in force").expect("it attaches");
    let node = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": NODE}});
    agent.add_manifest("node", &node).expect("manifest");
    let cluster = Cluster { agent, client, backends, lab };
    cluster.serve_both();
    cluster
}

/// Row 30: the kernel's own client dials the Service, from the node's namespace, and when it dials
/// again, for its connection is gone, it dials the Service again, and not the endpoint that it had.
#[test]
#[ignore = "takes NFS, and attaches to the machine's root cgroup: for those of scripts/kernels.sh"]
fn r30_a_mount_by_a_services_address_calls_the_endpoint_of_now() {
    let cluster = node();
    let dir = tempfile::tempdir().expect("a directory");
    for (vip, n) in [(VIP4, 0), (VIP6, 1)] {
        cluster.endpoints(&[&cluster.backends[0]], &ready());
        cluster.wait_backends(vip, 1);
        let first = HangsUp::start(&cluster.backends[0], true);
        let at = dir.path().join(n.to_string());
        fs::create_dir(&at).expect("a directory");
        let proto = if ip(vip).is_ipv6() { "tcp6" } else { "tcp" };
        let options = format!(
            "vers=4.1,proto={proto},addr={vip},clientaddr={vip},port={PORT},soft,timeo=100,retrans=2"
        );
        let source = if ip(vip).is_ipv6() { format!("[{vip}]:/") } else { format!("{vip}:/") };
        thread::scope(|scope| {
            let mounting = scope.spawn(|| {
                let call =
                    || mount(Some(&*source), &at, Some("nfs4"), MsFlags::empty(), Some(&*options));
                cluster.lab.on_node(call).expect("runs").expect_err("nobody answers")
            });
            let from_node = first.called_by();
            assert!(["10.77.0.1", "fd77::1"].map(ip).contains(&from_node), "{from_node}");
            cluster.endpoints(&[&cluster.backends[1]], &ready());
            cluster.wait_backends(vip, 1);
            let second = HangsUp::start(&cluster.backends[1], false);
            drop(first);
            assert_eq!(second.called_by(), from_node);
            // It tries again and again, and gives up.
            mounting.join().expect("a thread");
        });
    }
    let (v4, v6) = (cluster.counter("service_tcp4"), cluster.counter("service_tcp6"));
    assert!(v4 >= 2 && v6 >= 2, "{v4}, {v6}");
}
