//! The lab itself: what the tests of the agent rely on. Needs root.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result};
use sidestep_lab::load::{self, LoadOpts, Mode};
use sidestep_lab::{
    APP, Envoy, EnvoyOpts, INBOUND, Lab, OUTBOUND, PROXY, PodNet, ServeOpts, Server, Talk, Twin,
    ask, connect, http_get, iptables, teardown,
};

fn own_leftovers() -> Result<Option<teardown::Leftover>> {
    Ok(teardown::find()?.into_iter().find(|found| found.pid == std::process::id()))
}

#[test]
fn direct() -> Result<()> {
    let lab = Lab::new("direct")?;
    let a = lab.pod("a", PodNet::DUAL)?;
    let b = lab.pod("b", PodNet::DUAL)?;
    for ip in b.ips() {
        let server = b.serve(SocketAddr::new(ip, 8080), APP, APP)?;
        let answer = a.ask(APP, APP, server.addr())?;
        assert_eq!(answer.peer, server.addr());
        assert_eq!(answer.seen.peer, answer.local);
        assert_eq!(answer.seen.local, server.addr());
        assert!(a.ips().contains(&answer.local.ip()));
        assert_eq!(server.wait_seen(1)?, [answer.seen]);

        let from_node = lab.on_node(|| ask(server.addr(), None))??;
        assert!(["10.77.0.1", "fd77::1"].contains(&from_node.local.ip().to_string().as_str()));
    }
    assert_eq!(iptables::ruleset(&a)?, "");
    Ok(())
}

#[test]
fn node_address_answers() -> Result<()> {
    let lab = Lab::new("vip")?;
    let a = lab.pod("a", PodNet::DUAL)?;
    for ip in ["10.96.0.10", "fd96::10"] {
        let vip: IpAddr = ip.parse()?;
        lab.add_node_address(vip)?;
        let server = lab.on_node(|| Server::start_here(ServeOpts::on([(vip, 80).into()])))??;
        assert_eq!(a.ask(APP, APP, server.addr())?.peer, server.addr());
    }
    Ok(())
}

#[test]
fn everything_is_removed_after_a_panic() -> Result<()> {
    let caught = std::panic::catch_unwind(|| {
        let lab = Lab::new("panic").expect("a lab");
        let pod = lab.pod("a", PodNet::V4).expect("a pod");
        let _child = pod.spawn(APP, APP, ["sleep", "1000"]).expect("a child");
        let id = lab.node_name().trim_end_matches("-node").to_owned();
        pod.run(APP, APP, || std::panic::panic_any(id)).expect("not reached");
    });
    let id = *caught.expect_err("no panic").downcast::<String>().expect("its text");
    let namespaces = own_leftovers()?.map(|found| found.namespaces).unwrap_or_default();
    assert!(!namespaces.iter().any(|name| name.starts_with(&format!("{id}-"))), "{namespaces:?}");
    Ok(())
}

#[test]
fn children_have_real_ids_and_the_pods_cgroup() -> Result<()> {
    let lab = Lab::new("child")?;
    let pod = lab.pod("a", PodNet::V4)?;
    let mut child = pod.spawn(
        1234,
        2345,
        ["sh", "-c", "id; cat /proc/self/cgroup; readlink /proc/self/ns/net"],
    )?;
    assert!(child.wait(Duration::from_secs(5))?.success());
    let net = pod.run(0, 0, || std::fs::read_link("/proc/thread-self/ns/net"))??;
    let log = child.log();
    let cgroup = pod.cgroup().file_name().context("a name")?.to_string_lossy();
    for wanted in ["uid=1234", "gid=2345", &format!("/{cgroup}"), &net.to_string_lossy()] {
        assert!(log.contains(wanted), "no {wanted} in {log}");
    }
    Ok(())
}

#[test]
fn many_connections() -> Result<()> {
    let lab = Lab::new("many")?;
    let pod = lab.pod("a", PodNet::V4)?;
    let server = pod.serve((pod.ipv4(), 8080).into(), APP, APP)?;
    let open = pod.run(APP, APP, || {
        (0..4000).map(|_| connect(server.addr(), None)).collect::<Result<Vec<_>>>()
    })??;
    server.wait_seen(4000)?;
    assert_eq!(server.open(), 4000);
    drop(open);
    sidestep_lab::wait_until("all to close", Duration::from_secs(5), || server.open() == 0)
}

/// Istio's rules with a recorder in the place of the proxy.
#[test]
fn istio_rules_redirect() -> Result<()> {
    let lab = Lab::new("rules")?;
    let a = lab.pod("a", PodNet::DUAL)?;
    let b = lab.pod("b", PodNet::DUAL)?;
    iptables::install_istio(&a)?;
    let outbound = a.fake_proxy(OUTBOUND)?;
    let inbound = a.fake_proxy(INBOUND)?;
    for (own, peer, vip) in [
        (a.ipv4(), b.ipv4(), "10.96.0.10".parse::<IpAddr>()?),
        (a.ipv6(), b.ipv6(), "fd96::10".parse()?),
    ] {
        // T1: an application's call leaves the pod.
        let vip = SocketAddr::new(vip, 80);
        let answer = a.ask(APP, APP, vip)?;
        assert_eq!(answer.peer, vip);
        assert_eq!(answer.seen.original(), Some(vip), "{}", answer.seen);
        assert_eq!(answer.seen.peer, answer.local);
        assert_eq!(outbound.wait_seen(1)?.len(), 1);
        outbound.clear();

        // T2, T8: the pod itself, and the proxy's own calls, go through.
        let app = a.serve((own, 8080).into(), APP, APP)?;
        assert_eq!(a.ask(APP, APP, app.addr())?.seen.orig, None);
        let far = b.serve((peer, 8080).into(), APP, APP)?;
        assert_eq!(a.ask(PROXY, PROXY, far.addr())?.seen.peer.ip(), own);
        assert_eq!(a.ask(4321, PROXY, far.addr())?.seen.peer.ip(), own);

        // T6: what the proxy passes on to the application.
        let six = if own.is_ipv4() { "127.0.0.6" } else { "::6" }.parse()?;
        let passed = a.run(PROXY, PROXY, || ask(app.addr(), Some(six)))??;
        assert_eq!((passed.seen.peer.ip(), passed.seen.orig), (six, None));

        // I1: a peer's call arrives.
        let answer = b.ask(APP, APP, app.addr())?;
        assert_eq!(answer.seen.original(), Some(app.addr()), "{}", answer.seen);
        assert_eq!(answer.seen.peer, answer.local);
        inbound.clear();
    }
    assert!(iptables::ruleset(&a)?.contains("ISTIO_REDIRECT"));
    iptables::remove(&a)?;
    assert_eq!(iptables::ruleset(&a)?, "");
    Ok(())
}

/// A `[::]` listener without IPV6_V6ONLY serves IPv4 as mapped addresses.
#[test]
fn mapped_addresses() -> Result<()> {
    let lab = Lab::new("mapped")?;
    let a = lab.pod("a", PodNet::DUAL)?;
    let b = lab.pod("b", PodNet::DUAL)?;
    iptables::install_istio(&b)?;
    let proxy = Server::start(
        &b,
        ServeOpts {
            talk: Talk::OriginalDst,
            v6_only: false,
            ..ServeOpts::on([(Ipv6Addr::UNSPECIFIED, INBOUND).into()])
        },
    )?;
    let seen = a.ask(APP, APP, (b.ipv4(), 8080).into())?.seen;
    assert_eq!(seen.original(), Some((b.ipv4(), 8080).into()));
    assert!(seen.peer.is_ipv6() && seen.peer.ip().to_canonical() == a.ipv4());
    assert_eq!(proxy.seen(), [seen]);
    Ok(())
}

/// app-a -> its Envoy -> Envoy of app-b -> app-b, by Istio's rules.
#[test]
fn envoys_pass_calls_on() -> Result<()> {
    let lab = Lab::new("envoy")?;
    let a = lab.pod("app-a", PodNet::DUAL)?;
    let b = lab.pod("app-b", PodNet::DUAL)?;
    let opts = [
        EnvoyOpts::default(),
        EnvoyOpts { concurrency: 1, reuse_port: false, ..EnvoyOpts::default() },
    ];
    let [envoy_a, envoy_b] = [(&a, opts[0]), (&b, opts[1])].map(|(pod, opts)| {
        iptables::install_istio(pod)?;
        Envoy::start(pod, opts)
    });
    let (envoy_a, envoy_b) = (envoy_a?, envoy_b?);
    for (from, to, six) in [
        (a.ipv4(), b.ipv4(), IpAddr::V4(Ipv4Addr::new(127, 0, 0, 6))),
        (a.ipv6(), b.ipv6(), IpAddr::V6(Ipv6Addr::new(0, 0, 0, 0, 0, 0, 0, 6))),
    ] {
        let target = SocketAddr::new(to, 8080);
        let app = Server::start(
            &b,
            ServeOpts { talk: Talk::Echo, uid: APP, gid: APP, ..ServeOpts::on([target]) },
        )?;
        let answer = a.run(APP, APP, || http_get(target))??;
        assert_eq!(answer.peer, target);
        assert_eq!(answer.seen.peer.ip(), six);
        assert_eq!(app.seen().len(), 1);

        let out = envoy_a.wait_log("the call", |line| line.downstream_remote == answer.local)?;
        assert_eq!(out.listener, "virtualOutbound");
        assert_eq!(out.downstream_local, target);
        assert_eq!(out.upstream_host, Some(target));
        assert_eq!(out.upstream_local.map(|addr| addr.ip()), Some(from));
        assert_eq!(out.flags, "-");
        assert!(out.received > 0 && out.sent > 0);

        let went = |line: &sidestep_lab::envoy::LogLine| {
            Some(line.downstream_remote) == out.upstream_local
        };
        let into = envoy_b.wait_log("the call", went)?;
        assert_eq!(into.listener, "virtualInbound");
        assert_eq!(into.downstream_local, target);
        assert_eq!(into.upstream_local, Some(answer.seen.peer));

        for mode in [Mode::KeepAlive, Mode::Connect] {
            let duration = Duration::from_millis(300);
            let opts = LoadOpts { connections: 4, duration, mode, ..LoadOpts::default() };
            let report = load::run(&a, APP, target, opts)?;
            assert!(report.requests > 10 && report.errors == 0, "{report:?}");
            assert!(
                report.p50 > Duration::from_micros(5) && report.p99 >= report.p50,
                "{report:?}"
            );
            assert!(report.p99 < Duration::from_secs(1), "{report:?}");
        }
    }
    // Nobody is meant to dial the proxy's own port: that ends there and does not loop.
    let own = SocketAddr::new(b.ipv4(), INBOUND);
    assert!(a.ask(APP, APP, own).is_err());
    let line = envoy_b.wait_log("the dialled port", |line| line.downstream_local == own)?;
    assert_eq!((line.upstream_host, line.flags.as_str()), (None, "UH"));
    Ok(())
}

/// Through two Envoys that are dialled, without any interception: as bytes, and as HTTP.
#[test]
fn twins_pass_calls_on() -> Result<()> {
    let lab = Lab::new("twins")?;
    let a = lab.pod("app-a", PodNet::V4)?;
    let b = lab.pod("app-b", PodNet::V4)?;
    let app = SocketAddr::new(b.ipv4(), 8080);
    let twins = [(9080, 10080, false), (9081, 10081, true)].map(|(near, far, http)| {
        let far = SocketAddr::new(b.ipv4(), far);
        let near = SocketAddr::from((Ipv4Addr::LOCALHOST, near));
        [
            Twin { listen: near, upstream: far, inbound: false, http },
            Twin { listen: far, upstream: app, inbound: true, http },
        ]
    });
    let opts = EnvoyOpts { concurrency: 1, access_log: false, ..EnvoyOpts::default() };
    let side = |side: usize| twins.map(|twin| twin[side]);
    let _near = Envoy::start_with(&a, opts, &side(0))?;
    let far = Envoy::start_with(&b, opts, &side(1))?;
    let _app = Server::start(
        &b,
        ServeOpts { talk: Talk::Echo, uid: APP, gid: APP, ..ServeOpts::on([app]) },
    )?;
    for (twin, http) in [(twins[0][0], "0"), (twins[1][0], "1")] {
        let answer = a.run(APP, APP, || http_get(twin.listen))??;
        assert_eq!(answer.peer, twin.listen);
        assert_eq!(answer.seen.peer.ip(), IpAddr::V4(Ipv4Addr::new(127, 0, 0, 6)));
        let stats = far.admin("/stats?filter=twin-10081.downstream_rq_total")?;
        assert!(stats.trim_end().ends_with(http), "{stats}");
    }
    assert!(far.access_log()?.is_empty());
    Ok(())
}
