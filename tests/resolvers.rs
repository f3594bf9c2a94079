//! The programs that people run: each looks a name up through a pod whose DNS is captured. Its
//! servers are addresses that nobody has, so that an answer is the sidecar's.

mod common;

use std::{
    collections::BTreeSet,
    fs,
    net::{IpAddr, SocketAddr, UdpSocket},
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use common::*;
use sidestep_lab::{Process, lab_dir, slowdown, wait_until};

const NAME: &str = "app.mesh.test";
const ANSWERS: [&str; 2] = ["192.0.2.80", "2001:db8::80"];
const A: u16 = 1;
const AAAA: u16 = 28;

/// The sidecar's DNS listener, for one name.
struct Names {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Names {
    fn start(node: &Node) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let threads = ["127.0.0.1:15053", "[::1]:15053"].map(|at| {
            let at: SocketAddr = at.parse().expect("an address");
            let socket = node.a.run(PROXY, PROXY, || udp(at)).expect("runs");
            socket.set_read_timeout(Some(Duration::from_millis(50))).expect("timeout");
            let told = Arc::clone(&stop);
            thread::spawn(move || {
                let mut question = [0; 512];
                while !told.load(Ordering::Relaxed) {
                    if let Ok((len, client)) = socket.recv_from(&mut question)
                        && let Some(answer) = answer(&question[..len])
                    {
                        socket.send_to(&answer, client).expect("answered");
                    }
                }
            })
        });
        Self { stop, threads: threads.into() }
    }
}

impl Drop for Names {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            thread.join().expect("its thread");
        }
    }
}

/// The name as it is in a message of DNS.
fn labels() -> Vec<u8> {
    let label = |label: &str| [&[label.len() as u8][..], label.as_bytes()].concat();
    NAME.split('.').flat_map(label).chain([0]).collect()
}

fn question(kind: u16) -> Vec<u8> {
    let header = [0x12, 0x34, 0x01, 0x00, 0, 1, 0, 0, 0, 0, 0, 0];
    [&header[..], &labels(), &kind.to_be_bytes(), &[0, 1]].concat()
}

/// What [`NAME`] has; of any other name, that there is none.
fn answer(question: &[u8]) -> Option<Vec<u8>> {
    let labels = labels();
    let name = question.get(12..)?;
    let end = 12 + name.iter().position(|byte| *byte == 0)? + 5;
    let known = name.to_ascii_lowercase().starts_with(&labels);
    let kind = u16::from_be_bytes(question.get(end - 4..end - 2)?.try_into().ok()?);
    let data = match (ANSWERS.map(ip), kind) {
        ([IpAddr::V4(v4), _], A) if known => v4.octets().to_vec(),
        ([_, IpAddr::V6(v6)], AAAA) if known => v6.octets().to_vec(),
        _ => Vec::new(),
    };
    let (count, code) = (u8::from(!data.is_empty()), if known { 0 } else { 3 });
    let mut answer = question.get(..2)?.to_vec();
    answer.extend([0x81, 0x80 | code, 0, 1, 0, count, 0, 0, 0, 0]);
    answer.extend(question.get(12..end)?);
    if count == 1 {
        answer.extend([0xc0, 12]);
        answer.extend(kind.to_be_bytes());
        answer.extend([0, 1, 0, 0, 0, 60, 0]);
        answer.push(data.len() as u8);
        answer.extend(data);
    }
    Some(answer)
}

/// A pod whose DNS is captured, its resolver, and what its programs find in /etc.
struct World {
    dir: tempfile::TempDir,
    _names: Names,
    node: Node,
}

impl World {
    fn new(tag: &str, servers: &[&str]) -> Self {
        let mut node = Node::new(tag);
        let mut manifest = node.a.manifest();
        let env = manifest["spec"]["containers"][1]["env"].as_array_mut().expect("env");
        env.push(serde_json::json!({"name": "ISTIO_META_DNS_CAPTURE", "value": "true"}));
        node.agent.add_manifest("a", &manifest).expect("a manifest");
        node.agent.wait_enrolled(&node.a).expect("enrolled");
        let dir = tempfile::Builder::new().permissions(everybody()).tempdir().expect("a directory");
        let lines: String = servers.iter().map(|server| format!("nameserver {server}\n")).collect();
        fs::write(dir.path().join("resolv.conf"), lines + "options timeout:2 attempts:2\n")
            .expect("written");
        fs::write(dir.path().join("nsswitch.conf"), "hosts: files dns\n").expect("written");
        let names = Names::start(&node);
        Self { dir, _names: names, node }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Starts a program of this user's, which finds the pod's files in /etc.
    fn start(&self, uid: u32, argv: &[&str]) -> Process {
        let script = "for name in resolv.conf nsswitch.conf; do \
                      mount --bind \"$1/$name\" \"/etc/$name\" || exit; done; uid=$2; shift 2; \
                      exec setpriv --reuid=$uid --regid=$uid --clear-groups -- \"$@\"";
        self.start_by(script, &[&[&*uid.to_string()], argv].concat())
    }

    /// The same by a script of the shell that has mounts of its own, and the world's directory
    /// before its arguments.
    fn start_by(&self, script: &str, arguments: &[&str]) -> Process {
        let dir = self.dir.path().to_string_lossy();
        let all = ["unshare", "--mount", "sh", "-c", script, "sh", &*dir].into_iter();
        self.node.a.spawn(0, 0, all.chain(arguments.iter().copied())).expect("a program")
    }

    /// A forwarder in the pod answers at this port of 127.0.0.1 what the sidecar has answered it.
    #[track_caller]
    fn forwards(&self, what: &str, process: &Process, port: u16) {
        let ask = |kind| {
            self.node.a.run(APP, APP, || {
                let socket = UdpSocket::bind("127.0.0.1:0").expect("a socket");
                socket.connect(("127.0.0.1", port)).expect("connects");
                socket.set_read_timeout(Some(Duration::from_secs(1))).expect("timeout");
                let mut text = [0; 512];
                socket.send(&question(kind)).ok()?;
                let len = socket.recv(&mut text).ok()?;
                Some(text[..len].to_vec())
            })
        };
        for (kind, expected) in [A, AAAA].into_iter().zip(ANSWERS) {
            let expected = match ip(expected) {
                IpAddr::V4(v4) => v4.octets().to_vec(),
                IpAddr::V6(v6) => v6.octets().to_vec(),
            };
            wait_until(&format!("{what} to answer"), SOON, || {
                ask(kind).expect("runs").is_some_and(|answer| answer.ends_with(&expected))
            })
            .unwrap_or_else(|error| panic!("{error:#}: {}", process.log_tail()));
        }
    }

    /// The program prints what the name has, and nothing else.
    #[track_caller]
    fn finds(&self, argv: &[&str], expected: &[&str]) {
        let mut process = self.start(APP, argv);
        let status = process.wait(Duration::from_secs(20) * slowdown()).expect("it ends");
        assert!(status.success(), "{argv:?}: {}", process.log_tail());
        let log = process.log();
        let found: BTreeSet<&str> =
            log.lines().filter_map(|line| line.split_whitespace().next()).collect();
        assert_eq!(found, BTreeSet::from_iter(expected.iter().copied()), "{argv:?}: {log}");
    }
}

fn everybody() -> fs::Permissions {
    std::os::unix::fs::PermissionsExt::from_mode(0o755)
}

fn source(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/dns").join(name)
}

fn build(command: &mut Command) {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// The servers of a resolv.conf: of IPv4, of IPv6, of both.
const SERVERS: [&[&str]; 3] =
    [&["10.96.53.1", "10.96.53.2"], &["fd96::53:1"], &["10.96.53.1", "fd96::53:1"]];

#[test]
fn c_libraries() {
    for servers in SERVERS {
        let world = World::new("libc", servers);
        let musl = world.at("musl");
        build(Command::new("musl-gcc").args(["-static", "-o"]).arg(&musl).arg(source("lookup.c")));
        let glibc = world.at("glibc");
        build(Command::new("gcc").arg("-o").arg(&glibc).arg(source("lookup.c")));
        for program in [musl, glibc] {
            world.finds(&[&program.to_string_lossy(), NAME], &ANSWERS);
        }
        world.finds(&["getent", "ahostsv4", NAME], &ANSWERS[..1]);
        world.finds(&["getent", "ahostsv6", NAME], &ANSWERS[1..]);
    }
}

#[test]
fn go() {
    // From PATH where it is recent enough, else from PyPI.
    let found = Command::new("e2e/cluster/parts.sh").arg("--go").output().expect("parts.sh runs");
    let found = String::from_utf8(found.stdout).expect("text").trim().to_owned();
    for servers in SERVERS {
        let world = World::new("go", servers);
        let program = world.at("go");
        let mut go = Command::new(&found);
        build(
            go.env("CGO_ENABLED", "0").args(["build", "-o"]).arg(&program).arg(source("lookup.go")),
        );
        world.finds(&[&program.to_string_lossy(), NAME], &ANSWERS);
    }
}

#[test]
fn python_and_node() {
    let python =
        format!("import socket\nfor a in socket.getaddrinfo({NAME:?}, None): print(a[4][0])");
    // lookup is the C library's, resolve c-ares'.
    let lookup = format!(
        "require('dns').lookup({NAME:?}, {{all: true}}, (error, all) => {{ \
         if (error) throw error; all.forEach(one => console.log(one.address)); }})"
    );
    let resolve = format!(
        "for (const kind of ['A', 'AAAA']) require('dns').resolve({NAME:?}, kind, (error, all) => \
         {{ if (error) throw error; all.forEach(one => console.log(one)); }})"
    );
    for servers in SERVERS {
        let world = World::new("scripts", servers);
        world.finds(&["/usr/bin/python3", "-c", &python], &ANSWERS);
        world.finds(&["/usr/bin/node", "-e", &lookup], &ANSWERS);
        world.finds(&["/usr/bin/node", "-e", &resolve], &ANSWERS);
    }
}

/// A forwarder in the pod: its own questions are captured, its clients are its own.
#[test]
fn dnsmasq() {
    for server in ["10.96.53.1", "fd96::53:1", "10.96.53.1@eth0", "fd96::53:1@eth0"] {
        let world = World::new("dnsmasq", &["10.96.53.9"]);
        let to = format!("--server={server}");
        let argv = "dnsmasq --keep-in-foreground --user=root --conf-file=/dev/null --pid-file= --no-hosts --no-resolv \
                    --port=5300 --listen-address=127.0.0.1 --bind-interfaces --log-facility=- --log-queries";
        let argv: Vec<&str> = argv.split_whitespace().chain([&*to]).collect();
        // As root, which may name a device in --server.
        let process = world.start(0, &argv);
        world.forwards(&format!("dnsmasq with {server}"), &process, 5300);
    }
}

/// The same with systemd's: it asks by sockets that are bound to the device.
#[test]
fn systemd_resolved() {
    // Of the system, or what `make deps` unpacked: installed, it would take the place of a
    // machine's own.
    let unpacked = lab_dir().join("resolved");
    let root = if Path::new("/lib/systemd/systemd-resolved").exists() {
        Path::new("/")
    } else {
        &unpacked
    };
    let script = "set -e; cp /etc/passwd \"$1/passwd\"; \
                  echo systemd-resolve:x:1000:1000::/:/bin/false >>\"$1/passwd\"; \
                  mount --bind \"$1/passwd\" /etc/passwd; \
                  mount -t tmpfs none /run; mkdir -p /run/systemd /etc/systemd; \
                  mount -t tmpfs none /etc/systemd; cp \"$1/resolved.conf\" /etc/systemd; \
                  export LD_LIBRARY_PATH=\"$2/usr/lib/$(uname -m)-linux-gnu/systemd\"; \
                  exec \"$2/lib/systemd/systemd-resolved\"";
    for server in ["10.96.53.1", "fd96::53:1", "10.96.53.1%eth0", "fd96::53:1%eth0"] {
        let world = World::new("resolved", &["10.96.53.9"]);
        let settings = format!(
            "[Resolve]\nDNS={server}\nFallbackDNS=\nDomains=~.\nDNSStubListener=no\n\
             DNSStubListenerExtra=127.0.0.1:5300\nLLMNR=no\nMulticastDNS=no\nDNSSEC=no\n"
        );
        fs::write(world.at("resolved.conf"), settings).expect("written");
        let process = world.start_by(script, &[&root.to_string_lossy()]);
        world.forwards(&format!("systemd-resolved with {server}"), &process, 5300);
    }
}

/// Java's runtime has no program that prints addresses, but one that connects to a name: it asks
/// the C library, and takes IPv6 sockets for everything.
#[test]
fn java() {
    for servers in SERVERS {
        let world = World::new("java", servers);
        let sidecar = Sidecar::start(&world.node.a);
        let target = format!("{NAME}:443");
        let mut process = world.start(APP, &["keytool", "-printcert", "-sslserver", &target]);
        let seen = || {
            let seen = sidecar.outbound.seen();
            let dialled = seen.iter().filter_map(|seen| seen.original());
            dialled.map(|original| original.ip().to_string()).any(|ip| ANSWERS.contains(&&*ip))
        };
        wait_until("Java to call what it found", SOON * 2, seen)
            .unwrap_or_else(|error| panic!("{error:#}: {}", process.log_tail()));
        drop(sidecar);
        process.wait(Duration::from_secs(20) * slowdown()).expect("it ends");
    }
}
