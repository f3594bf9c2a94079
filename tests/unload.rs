//! `sidestep unload` leaves nothing behind. Alone in its file: it looks at the whole kernel.

mod common;

use std::{
    collections::BTreeSet,
    io::{BufRead, BufReader, Write},
    net::TcpStream,
    time::Duration,
};

use common::*;
use libbpf_rs::{
    btf::{Btf, types::Struct},
    query::{LinkInfoIter, LinkTypeInfo, MapInfoIter, ProgInfoIter},
};
use sidestep_lab::wait_until;

/// Every program and map of the machine, and its links to cgroups, namespaces and devices.
fn kernel_objects() -> BTreeSet<(&'static str, u32, String)> {
    let programs = ProgInfoIter::default()
        .map(|program| ("program", program.id, program.name.to_string_lossy().into_owned()));
    let maps =
        MapInfoIter::default().map(|map| ("map", map.id, map.name.to_string_lossy().into_owned()));
    let links = LinkInfoIter::default().filter_map(|link| {
        let kind = match link.info {
            LinkTypeInfo::Cgroup(_) => "cgroup",
            LinkTypeInfo::NetNs(_) => "netns",
            LinkTypeInfo::Tcx(_) => "tcx",
            _ => return None,
        };
        Some(("link", link.id, kind.to_owned()))
    });
    programs.chain(maps).chain(links).collect()
}

/// Filters are links where the kernel knows such ones; elsewhere their programs tell.
fn links_filters() -> bool {
    let types = Btf::from_vmlinux().expect("types");
    types.type_by_name::<Struct<'_>>("tcx_link").is_some()
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
    if links_filters() {
        let linked = || kernel_objects().difference(&before).any(|(_, _, name)| name == "tcx");
        wait_until("a filter for the sidecar leg", SOON, linked).expect("a filter");
    }
    // A pod that has left keeps its filters for as long as connections may need them.
    node.agent.remove_pod(&node.b).expect("removed");
    node.agent.wait_gone(&node.b).expect("gone");
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
