//! F14, F70: what others take away in the kernel or in a pod's namespace is seen within seconds,
//! put back, and told.

#![allow(unsafe_code, reason = "to put another program in the place of the agent's")]

mod common;

use std::{
    fs,
    net::{SocketAddr, UdpSocket},
    os::fd::AsRawFd,
    path::{Path, PathBuf},
    time::Duration,
};

use common::*;
use libbpf_rs::{Link, MapCore, MapHandle, Program, libbpf_sys};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use sidestep::dataplane::LAYOUT;
use sidestep_lab::{Agent, Lab, Pod, PodNet, wait_until};

const FLAGS: [&str; 4] = ["--http", "127.0.0.1:0", "--splice", "off"];

/// A bpffs of the test's own, that nobody else's pins are in.
struct Bpffs(tempfile::TempDir);

impl Bpffs {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let none = MsFlags::empty();
        mount(Some("bpf"), dir.path(), Some("bpf"), none, None::<&str>).expect("mounted");
        Self(dir)
    }

    fn unmount(&self) {
        umount2(self.0.path(), MntFlags::MNT_DETACH).expect("unmounted");
    }
}

impl Drop for Bpffs {
    fn drop(&mut self) {
        // One may be on top of another.
        while umount2(self.0.path(), MntFlags::MNT_DETACH).is_ok() {}
    }
}

/// An enrolled pod with its sidecar and an app, and a peer that is in no mesh.
struct Scene {
    sidecar: Sidecar,
    agent: Agent,
    pod: Pod,
    peer: Pod,
    _bpffs: Bpffs,
    _lab: Lab,
}

impl Scene {
    fn new(tag: &str) -> Self {
        let lab = Lab::new(tag).expect("a lab");
        let bpffs = Bpffs::new();
        let pins = bpffs.0.path().join("sidestep");
        let [pod, peer] = ["a", "b"].map(|name| lab.pod(name, PodNet::DUAL).expect("a pod"));
        let mut agent = Agent::start_at(binary(), &lab, &pins, &FLAGS).expect("an agent");
        agent.add_pod(&pod).expect("a manifest");
        agent.wait_enrolled(&pod).expect("enrolled");
        let sidecar = Sidecar::start(&pod);
        Self { sidecar, agent, pod, peer, _bpffs: bpffs, _lab: lab }
    }

    fn link(&self, name: &str) -> PathBuf {
        self.agent.bpffs().join(LAYOUT).join("links").join(name)
    }

    /// The pin of the pod's only link of a kind.
    fn link_of(&self, kind: &str) -> Option<PathBuf> {
        let links = fs::read_dir(self.link("")).expect("links");
        let mut links = links.map(|link| link.expect("an entry").path());
        let is = |link: &PathBuf| {
            link.file_name().is_some_and(|n| n.to_string_lossy().starts_with(kind))
        };
        links.find(is)
    }

    /// Whether both directions are intercepted, in both families.
    fn is_intercepted(&self) -> bool {
        let outbound = [addr(ip(REMOTE4), 80), addr(ip(REMOTE6), 80)];
        let inbound = [addr(self.pod.ipv4(), 8080), addr(self.pod.ipv6(), 8080)];
        let seen = |pod: &Pod, user: u32, target: SocketAddr| {
            pod.ask(user, user, target).is_ok_and(|answer| answer.seen.original() == Some(target))
        };
        outbound.into_iter().all(|target| seen(&self.pod, APP, target))
            && inbound.into_iter().all(|target| seen(&self.peer, PROXY, target))
    }

    /// Whether the agent counts that many repairs, now or soon.
    fn was_repaired(&self, what: &str, count: u32) -> bool {
        let metric = format!("sidestep_repairs_total{{what=\"{what}\"}}");
        let counted = || self.agent.metric(&metric).expect("a metric") >= f64::from(count);
        wait_until(&format!("{metric} {count}"), SOON, counted).is_ok()
    }

    /// After the sabotage: it is repaired, counted, logged with these words, and everything is
    /// intercepted.
    #[track_caller]
    fn is_repaired(&self, what: &str, count: u32, words: &str) {
        let counted = self.was_repaired(what, count);
        assert!(counted, "{count} repairs of {what} are not counted; {}", self.agent.log_tail());
        self.agent.wait_log(words).expect("said");
        wait_until("everything to be intercepted", SOON, || self.is_intercepted())
            .unwrap_or_else(|error| panic!("{error:#}; {}", self.agent.log_tail()));
        let (status, text) = self.agent.get("/readyz").expect("answered");
        assert_eq!(status, 200, "{text}");
    }
}

/// Puts the program of another link in the place of a link's.
fn replace_program(pin: &Path, other: &Path) {
    let program = Link::open(other).and_then(|link| link.info()).expect("a link").prog_id;
    let program = Program::fd_from_id(program).expect("a program");
    let link = Link::open(pin).expect("a link");
    let link = std::os::fd::AsFd::as_fd(&link).as_raw_fd();
    // SAFETY: both descriptors are open, and options may be none.
    let rc = unsafe { libbpf_sys::bpf_link_update(link, program.as_raw_fd(), std::ptr::null()) };
    assert_eq!(rc, 0, "the kernel takes the program");
}

#[test]
fn f14_a_hook_comes_back() {
    let scene = Scene::new("r-hook");
    let before = scene.agent.metric("sidestep_repairs_total{what=\"hook\"}").expect("a metric");
    assert!(before == 0.0 && scene.is_intercepted(), "{}", scene.agent.log_tail());
    fs::remove_file(scene.link("connect4")).expect("removed");
    assert!(scene.is_intercepted(), "the agent holds the link");
    scene.is_repaired(
        "pin",
        1,
        "the pin of link connect4 was removed or replaced: Sidestep restored it",
    );
    assert!(scene.link("connect4").exists());
    for (n, name) in (1..).zip(["connect4", "sock_ops"]) {
        Link::open(scene.link(name)).and_then(|link| link.detach()).expect("detached");
        scene.is_repaired("hook", n, &format!("hook {name} was detached"));
    }
    replace_program(&scene.link("connect6"), &scene.link("getpeername6"));
    assert!(!scene.is_intercepted(), "the other program does not capture");
    scene.is_repaired("hook", 3, "the program of hook connect6 was replaced");
    // Every one of them at once.
    for pin in fs::read_dir(scene.link("")).expect("links") {
        fs::remove_file(pin.expect("an entry").path()).expect("removed");
    }
    scene.is_repaired("pin", 15, "the pin of link getsockopt was removed");
    assert_eq!(scene.agent.metric("sidestep_repairs_total{what=\"inbound\"}").expect("one"), 0.0);
}

#[test]
fn f14_a_pods_inbound_program_comes_back() {
    let mut scene = Scene::new("r-inbound");
    let app = scene.pod.serve(addr(ip("0.0.0.0"), 8080), APP, APP).expect("an app");
    let steer = scene.link_of("steer-").expect("a link");
    fs::remove_file(&steer).expect("removed");
    assert!(scene.is_intercepted(), "the agent holds the link");
    scene.is_repaired("pin", 1, "pod lab/a: the pin of link steer-");
    assert!(steer.exists());
    Link::open(&steer).and_then(|link| link.detach()).expect("detached");
    scene.is_repaired("inbound", 1, "pod lab/a: the inbound program was detached");
    // The program of another pod passes everything.
    scene.agent.add_pod(&scene.peer).expect("a manifest");
    scene.agent.wait_enrolled(&scene.peer).expect("enrolled");
    let links = scene.link("");
    let steers = || {
        let links = fs::read_dir(&links).expect("links");
        let links = links.map(|link| link.expect("an entry").path());
        links.filter(|link| link.to_string_lossy().contains("steer-")).collect::<Vec<_>>()
    };
    let other = steers().into_iter().find(|link| *link != steer).expect("the peer's");
    replace_program(&steer, &other);
    scene.is_repaired("inbound", 2, "the inbound program was replaced");
    // It says that it lives after all of that, and its end is noticed.
    let status = scene.agent.status().expect("status");
    assert!(status["pods"].as_array().is_some_and(|pods| pods.len() == 2), "{status}");
    scene.agent.remove_pod(&scene.pod).expect("removed");
    scene.agent.wait_gone(&scene.pod).expect("gone");
    assert_eq!(steers(), [other]);
    let target = addr(scene.pod.ipv4(), 8080);
    let answer = scene.peer.ask(PROXY, PROXY, target).expect("answered");
    assert_eq!(answer.seen.orig, None, "no longer intercepted");
    assert!(!app.seen().is_empty());
}

#[test]
fn f14_maps_and_their_entries_come_back() {
    let scene = Scene::new("r-maps");
    let pin = |name: &str| scene.agent.bpffs().join(LAYOUT).join("maps").join(name);
    let pods = MapHandle::from_pinned_path(pin("pods")).expect("a map");
    fs::remove_file(pin("pods")).expect("removed");
    fs::rename(pin("origdsts"), pin("handovers")).expect("renamed");
    scene.is_repaired("pin", 3, "the pin of map pods was removed");
    let again = MapHandle::from_pinned_path(pin("pods")).expect("a map");
    assert_eq!(again.info().expect("info").info.id, pods.info().expect("info").info.id);
    let cookie = pods.keys().next().expect("the pod");
    pods.delete(&cookie).expect("deleted");
    scene.is_repaired("entry", 1, "1 entries of map \"pods\" were removed or changed");
    // The others are compared in turn.
    let rules = MapHandle::from_pinned_path(pin("port_rules")).expect("a map");
    let before = rules.keys().count();
    for rule in rules.keys().collect::<Vec<_>>() {
        rules.delete(&rule).expect("deleted");
    }
    wait_until("the rules", 3 * SOON, || rules.keys().count() == before)
        .unwrap_or_else(|error| panic!("{error:#}; {}", scene.agent.log_tail()));
    scene.is_repaired("entry", 2, "of map \"port_rules\" were removed or changed");
}

#[test]
fn f14_the_filter_for_dns_answers_comes_back() {
    let mut scene = Scene::new("r-dns");
    let mut manifest = scene.pod.manifest();
    let env = manifest["spec"]["containers"][1]["env"].as_array_mut().expect("env");
    env.push(serde_json::json!({"name": "ISTIO_META_DNS_CAPTURE", "value": "true"}));
    scene.agent.add_manifest("a", &manifest).expect("a manifest");
    scene.agent.wait_enrolled(&scene.pod).expect("enrolled");
    wait_until("DNS to be captured", SOON, || {
        scene.agent.status().is_ok_and(|status| status["pods"][0]["dns_port"] == 15053)
    })
    .expect("captured");
    let resolver = scene.pod.run(PROXY, PROXY, || udp(addr(ip("127.0.0.1"), 15053))).expect("runs");
    resolver.set_read_timeout(Some(Duration::from_millis(300))).expect("set");
    let server = addr(ip(REMOTE4), 53);
    let client: UdpSocket = scene.pod.run(APP, APP, || udp(addr(ip("0.0.0.0"), 0))).expect("runs");
    client.set_read_timeout(Some(Duration::from_millis(300))).expect("set");
    // Without the filter no question gets to the resolver.
    let answered = || {
        let mut buffer = [0; 16];
        let mut asked = |server: SocketAddr| {
            client.send_to(b"question", server).expect("sent");
            resolver.recv_from(&mut buffer).ok().map(|(_, from)| from)
        };
        let first = asked(server);
        asked(addr(ip("10.96.0.11"), 53));
        let reply = first.and_then(|from| resolver.send_to(b"answer", from).ok());
        reply.is_some() && client.recv_from(&mut [0; 16]).is_ok_and(|(_, from)| from == server)
    };
    wait_until("an answer before", SOON, answered).expect("answered");
    if kernel_before(6, 6) {
        scene
            .pod
            .run(0, 0, || {
                let tc = ["qdisc", "del", "dev", "lo", "clsact"];
                std::process::Command::new("tc").args(tc).status().expect("tc runs")
            })
            .expect("runs");
    } else {
        wait_until("the filter", SOON, || scene.link_of("dns-").is_some()).expect("attached");
        fs::remove_file(scene.link_of("dns-").expect("the filter")).expect("removed");
    }
    // The kernel lets go of it a moment later, and the agent may have put it back by then.
    scene.is_repaired("filter", 1, "pod lab/a: the dns filter was removed from device 1");
    wait_until("an answer", SOON, answered).expect("answered");
}

#[test]
fn f14_the_pins_file_system_comes_back() {
    let mut scene = Scene::new("r-bpffs");
    let pin = scene.link("connect4");
    scene._bpffs.unmount();
    assert!(!pin.exists() && scene.is_intercepted());
    scene.is_repaired("bpffs", 1, "was removed or unmounted: Sidestep restored it");
    assert!(pin.exists());
    // What is pinned anew outlives the agent, and the next one takes it over.
    scene.agent.kill9();
    assert!(scene.is_intercepted());
    scene.agent.restart().expect("starts");
    scene.agent.wait_log("adopted=1").expect("adopted");
    wait_until("readiness", SOON, || scene.agent.get("/readyz").is_ok_and(|(code, _)| code == 200))
        .expect("ready");
    // The directory alone.
    fs::remove_dir_all(scene.agent.bpffs()).expect("removed");
    assert!(scene.is_intercepted());
    scene.is_repaired("bpffs", 1, "was removed or unmounted: Sidestep restored it");
    assert!(pin.exists());
    // Nobody else may take the directory meanwhile.
    let error = scene.agent.command(&["unload"]).expect_err("refused");
    assert!(format!("{error:#}").contains("another sidestep process"), "{error:#}");
    scene.agent.terminate().expect("ends");
    scene.agent.unload().expect("unloads");
    assert!(!scene.is_intercepted() && !scene.agent.bpffs().exists());
}

#[test]
fn f14_what_cannot_be_put_back_is_told_for_as_long() {
    let scene = Scene::new("r-refused");
    // No pin can take a directory's place.
    let pin = scene.link("connect4");
    fs::remove_file(&pin).and_then(|()| fs::create_dir(&pin)).expect("made");
    fs::create_dir(pin.join("x")).expect("made");
    scene
        .agent
        .wait_log("the pin of link connect4 was removed or replaced, and Sidestep cannot")
        .expect("said");
    wait_until("no readiness", SOON, || {
        scene
            .agent
            .get("/readyz")
            .is_ok_and(|(code, text)| code == 503 && text.contains("connect4"))
    })
    .unwrap_or_else(|error| panic!("{error:#}; {}", scene.agent.log_tail()));
    assert!(scene.is_intercepted(), "it is in force all the same");
    fs::remove_dir(pin.join("x")).and_then(|()| fs::remove_dir(&pin)).expect("removed");
    scene.is_repaired(
        "pin",
        1,
        "the pin of link connect4 was removed or replaced: Sidestep restored it",
    );
    assert!(!scene.sidecar.inbound.seen().is_empty());
}

/// What an app's call off the pod comes from, as the sidecar sees it, and under iptables.
fn leaves_from_the_pod(scene: &Scene) -> bool {
    let seen = |target: &str| {
        let answer = scene.pod.ask(APP, APP, addr(ip(target), 80)).ok()?;
        let captured = answer.seen.original() == Some(addr(ip(target), 80));
        captured.then(|| canonical(answer.seen.peer).ip())
    };
    seen(REMOTE4) == Some(scene.pod.ipv4()) && seen(REMOTE6) == Some(scene.pod.ipv6())
}

/// Breaks a pod's namespace, and waits until all is as before.
#[track_caller]
fn f70(tag: &str, sabotage: impl FnOnce(&Pod), mend: impl FnOnce(&Pod)) -> Scene {
    let scene = Scene::new(tag);
    assert!(leaves_from_the_pod(&scene), "before; {}", scene.agent.log_tail());
    sabotage(&scene.pod);
    // The agent's round may come before this look.
    assert!(
        !leaves_from_the_pod(&scene) || scene.was_repaired("lo", 1),
        "the test breaks something"
    );
    mend(&scene.pod);
    wait_until("calls to leave from the pod's address", SOON, || leaves_from_the_pod(&scene))
        .unwrap_or_else(|error| panic!("{error:#}; {}", scene.agent.log_tail()));
    // The proxy's calls to its app from ::6, as from 127.0.0.6.
    let app = scene.pod.serve(addr(scene.pod.ipv6(), 9000), APP, APP).expect("an app");
    let from = Some(ip("::6"));
    let target = addr(scene.pod.ipv6(), 9000);
    let answer = scene.pod.run(PROXY, PROXY, || sidestep_lab::ask(target, from)).expect("runs");
    assert_eq!(canonical(answer.expect("direct").seen.peer).ip(), ip("::6"));
    drop(app);
    scene
}

/// What the pod itself still has, the agent counts as put back.
#[track_caller]
fn is_counted(scene: &Scene) {
    scene.is_repaired(
        "lo",
        1,
        "pod lab/a: routes or addresses were removed from lo: Sidestep restored it",
    );
}

fn runs(pod: &Pod, commands: &[&str]) {
    for command in commands {
        pod.ip(command).expect("ip runs");
    }
}

fn without_ipv6(pod: &Pod, value: &str) {
    for device in ["all", "lo"] {
        pod.sysctl(&format!("net.ipv6.conf.{device}.disable_ipv6"), value).expect("set");
    }
}

fn gets_its_addresses(pod: &Pod, ips: &[std::net::IpAddr]) {
    for ip in ips {
        pod.add_address(*ip, if ip.is_ipv4() { 16 } else { 64 }, "eth0", "").expect("added");
    }
    // Those went with the addresses.
    let _ = pod.ip("route add default via 10.77.0.1");
    let _ = pod.ip("route add default via fd77::1");
}

#[test]
fn f70_lo_down_and_up() {
    let scene = f70("f70-lo", |pod| runs(pod, &["link set lo down", "link set lo up"]), |_| {});
    is_counted(&scene);
}

#[test]
fn f70_a_route_or_the_passthrough_address_removed() {
    let v4 = "route del local 127.128.0.0/16 dev lo table local";
    let v6 = "route del local fd53:6964:6573:7465::/64 dev lo table local";
    let sabotage = |pod: &Pod| runs(pod, &[v4, v6, "addr del ::6/128 dev lo"]);
    is_counted(&f70("f70-routes", sabotage, |_| {}));
}

/// Not counted where the agent has looked in between: the pod had no IPv6 then, and has it anew.
#[test]
fn f70_ipv6_off_and_on() {
    f70(
        "f70-ipv6",
        |pod| without_ipv6(pod, "1"),
        |pod| {
            without_ipv6(pod, "0");
            gets_its_addresses(pod, &[pod.ipv6()]);
        },
    );
}

/// The same.
#[test]
fn f70_addresses_removed_and_added() {
    let flush = |pod: &Pod| runs(pod, &["addr flush dev eth0 scope global"]);
    f70("f70-addr", flush, |pod| gets_its_addresses(pod, &pod.ips()));
}
