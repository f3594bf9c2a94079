//! `sidestep unload` leaves nothing behind. Alone in its file: it looks at the whole kernel.

mod common;

use std::{
    collections::BTreeSet,
    error::Error,
    io::{self, BufRead, BufReader, Write},
    net::TcpStream,
    time::Duration,
};

use common::*;
use futures_util::TryStreamExt;
use libbpf_rs::query::{LinkInfoIter, LinkTypeInfo, MapInfoIter, ProgInfoIter};
use rtnetlink::packet_route::tc::TcMessage;
use sidestep_lab::{Pod, wait_until};
use tokio::runtime::Builder;

/// Every program and map of the machine, and its links to cgroups and namespaces.
fn kernel_objects() -> BTreeSet<(&'static str, u32, String)> {
    let programs = ProgInfoIter::default()
        .map(|program| ("program", program.id, program.name.to_string_lossy().into_owned()));
    let maps =
        MapInfoIter::default().map(|map| ("map", map.id, map.name.to_string_lossy().into_owned()));
    let links = LinkInfoIter::default()
        .filter(|link| matches!(link.info, LinkTypeInfo::Cgroup(_) | LinkTypeInfo::NetNs(_)))
        .map(|link| ("link", link.id, String::new()));
    programs.chain(maps).chain(links).collect()
}

/// What is on the way out of the pod's devices.
fn qdiscs(pod: &Pod) -> Vec<String> {
    let list = || -> Result<Vec<TcMessage>, Box<dyn Error + Send + Sync>> {
        let runtime = Builder::new_current_thread().enable_io().build()?;
        Ok(runtime.block_on(async {
            let (connection, handle, _) = rtnetlink::new_connection()?;
            tokio::spawn(connection);
            handle.qdisc().get().execute().try_collect().await.map_err(io::Error::other)
        })?)
    };
    let all = pod.run(0, 0, list).expect("runs").expect("listed");
    all.iter().map(|qdisc| format!("{:?}", qdisc.attributes.first())).collect()
}

#[test]
fn nothing_is_left_and_open_connections_go_on() {
    let before = kernel_objects();
    let mut node = Node::enrolled("unload");
    let _sidecar = Sidecar::start(&node.a);
    let mut open: Vec<TcpStream> = remotes(&node.a, 80)
        .into_iter()
        .map(|(target, _)| {
            node.a
                .run(APP, APP, || sidestep_lab::connect(target, None))
                .expect("runs")
                .expect("captured")
        })
        .collect();
    open.push(
        node.b
            .run(PROXY, PROXY, || sidestep_lab::connect(addr(node.a.ipv4(), 8080), None))
            .expect("runs")
            .expect("steered"),
    );
    // The self-test has objects of its own.
    node.agent.wait_log("splice leg=\"app\"").expect("it is decided what is spliced");
    let clsact = || qdiscs(&node.a).iter().filter(|kind| kind.contains("clsact")).count();
    wait_until("a filter for the sidecar leg", Duration::from_secs(5), || clsact() > 0)
        .expect("a filter");
    let installed = kernel_objects();
    let names: Vec<_> = installed.difference(&before).map(|(_, _, name)| name.as_str()).collect();
    for name in ["connect4", "steer", "pods", "listeners"] {
        assert!(names.contains(&name), "{name} is not in {names:?}");
    }

    node.agent.terminate().expect("ends");
    assert!(
        kernel_objects().is_superset(&installed_without_agent(&installed)),
        "it stays in force"
    );
    let said = node.agent.command(&["unload"]).expect("unloads");
    assert!(said.contains("pins removed"), "{said}");
    assert!(!node.agent.bpffs().exists());
    assert_eq!(clsact(), 0, "{:?}", qdiscs(&node.a));
    wait_until("the kernel to free everything", Duration::from_secs(5), || {
        kernel_objects().is_subset(&before)
    })
    .unwrap_or_else(|error| {
        panic!("{error:#}: {:?}", kernel_objects().difference(&before).collect::<Vec<_>>())
    });

    for stream in &mut open {
        let mut reader = BufReader::new(stream.try_clone().expect("a clone"));
        let mut greeting = String::new();
        reader.read_line(&mut greeting).expect("a greeting");
        stream.write_all(b"still there\n").expect("sent");
        let mut line = String::new();
        reader.read_line(&mut line).expect("echoed");
        assert_eq!(line, "still there\n");
    }
    // New connections go direct: nothing is there.
    node.a.ask(APP, APP, addr(node.b.ipv4(), 8080)).expect_err("direct, and nothing listens");
    // Twice is no error.
    let said = node.agent.command(&["unload"]).expect("unloads");
    assert!(said.contains("Nothing to unload"), "{said}");
    let status = node.agent.status().expect("status");
    assert_eq!(status["installed"], false);
}

/// What is pinned: programs and maps of the agent's own process (iterators, libbpf's probes) go
/// with it.
fn installed_without_agent(
    installed: &BTreeSet<(&'static str, u32, String)>,
) -> BTreeSet<(&'static str, u32, String)> {
    let pinned = ["connect4", "connect6", "sock_ops", "getsockopt", "steer", "pods", "listeners"];
    installed.iter().filter(|(_, _, name)| pinned.contains(&name.as_str())).cloned().collect()
}
