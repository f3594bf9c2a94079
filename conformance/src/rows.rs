//! The rows: docs/conformance.md shows them with what became of them.
//!
//! `row(ID, MESHES, SENTENCE)`, then what the pod is like, what is done, and what the contract
//! says about it. T, I and L are the numbers of the contract's own statements.

use crate::row::Mesh::{Istio, Kuma, Linkerd};
use crate::row::Opened::{After, Before};
use crate::row::Place::{
    Broadcast, Far, Localhost, Loopback, Multicast, Node, Own, OwnLink, Passthrough, Peer,
    PeerLink, Remote, Secondary, Unroutable, Unspecified,
};
use crate::row::{
    Act, Addresses, Dial, Expect, Kind, Listeners, Manner, Mesh, Place, Row, Setup, Who,
};
use crate::validator::PASSES;

const ALL: &[Mesh] = &[Istio, Linkerd, Kuma];
const ENVOY: &[Mesh] = &[Istio, Kuma];

/// Every row, for every mesh.
pub fn rows() -> Vec<Row> {
    let all = [
        calls_off_the_pod(),
        calls_within_the_pod(),
        calls_to_the_pod(),
        listeners(),
        odd_sockets(),
        odd_destinations(),
        one_family(),
        validators(),
        istio_inbound_ports(),
        istio_outbound(),
        linkerd(),
        kuma(),
        kuma_configured(),
        dns(),
    ];
    all.into_iter().flatten().flat_map(Draft::rows).collect()
}

fn calls_off_the_pod() -> Vec<Draft> {
    vec![
        row("T1", ENVOY, "the app calls off the pod").app(Remote, 80).outbound(),
        row("T1.root", ENVOY, "root is an app").who(Who::User(0)).to(Remote, 80).outbound(),
        row("T1.below", ENVOY, "a user next to others' proxies is an app")
            .who(Who::User(1336))
            .to(Remote, 80)
            .outbound(),
        row("T1.peer", ENVOY, "the app calls another pod").app(Peer, 8080).outbound(),
        row("T1.node", ENVOY, "the app calls the node").app(Node, 10250).outbound(),
        row("T1.dual", ENVOY, "one listener of the proxy for both families")
            .listeners(Listeners::DualStack)
            .app(Remote, 80)
            .outbound(),
        row("T1.late", ENVOY, "refused while the proxy does not listen, taken when it does")
            .listeners(Listeners::Late)
            .app(Remote, 80)
            .refused()
            .then()
            .outbound(),
        row("T4", ENVOY, "the app calls its own service's address").app(Remote, 8080).outbound(),
        row("T8", ENVOY, "the proxy calls off the pod").proxy(Remote, 80).by("remote").peer(Own),
        row("T8.user", ENVOY, "the proxy's user is enough")
            .who(Who::ProxyUser)
            .to(Remote, 80)
            .by("remote")
            .peer(Own),
        row("T9", &[Istio], "the proxy's group is enough")
            .who(Who::ProxyGroup)
            .to(Remote, 80)
            .by("remote")
            .peer(Own),
        row("T9", &[Kuma], "the proxy's group is not enough")
            .who(Who::ProxyGroup)
            .to(Remote, 80)
            .outbound(),
        row("T12", ALL, "UDP that is not DNS").udp(Who::App, Remote, 443).answered("remote"),
        row("T12.proxy", ENVOY, "UDP of the proxy").udp(Who::Proxy, Remote, 443).answered("remote"),
        row("T13", ENVOY, "HBONE's port is exempt inbound only").app(Remote, 15008).outbound(),
        row("T13.15006", ENVOY, "another pod's inbound port").app(Peer, 15006).outbound(),
        row("T13.15001", ENVOY, "another pod's outbound port").app(Peer, 15001).outbound(),
    ]
}

fn calls_within_the_pod() -> Vec<Draft> {
    vec![
        row("T2", ALL, "the app calls its own pod").app(Own, 8080).by("app").peer(Own),
        row("T2.second", ALL, "the app calls another of its own addresses")
            .app(Secondary, 8080)
            .by("app"),
        row("T2.link", ALL, "the app calls its own link-local address")
            .app(OwnLink, 8080)
            .by("app")
            .kinds(Kind::IPV6),
        row("T2.15001", ENVOY, "the app calls its own pod's outbound port")
            .app(Own, 15001)
            .by("outbound")
            .orig(),
        row("T2.15006", ENVOY, "the app calls its own pod's inbound port")
            .app(Own, 15006)
            .by("inbound")
            .orig(),
        row("T3", ALL, "the app calls localhost").app(Localhost, 8080).by("app").peer(Localhost),
        row("T3.2", ALL, "the app calls 127.0.0.2").app(Loopback, 8080).by("app").kinds(Kind::IPV4),
        row("T3.any", ALL, "the app calls the unspecified address")
            .app(Unspecified, 8080)
            .by("app"),
        row("T3.15001", ENVOY, "the app calls localhost's outbound port")
            .app(Localhost, 15001)
            .by("outbound")
            .orig(),
        row("T5", ENVOY, "the proxy calls its own pod").proxy(Own, 8080).inbound().peer(Own),
        row("T5.user", ENVOY, "the proxy's user calls its own pod")
            .who(Who::ProxyUser)
            .to(Own, 8080)
            .inbound()
            .peer(Own),
        row("T5.group", ENVOY, "another user of the proxy's group calls its own pod")
            .who(Who::ProxyGroup)
            .to(Own, 8080)
            .by("app")
            .peer(Own),
        row("T5.second", ENVOY, "the proxy calls another address of its pod")
            .proxy(Secondary, 8080)
            .inbound(),
        row("T5.link", ENVOY, "the proxy calls its pod's link-local address")
            .proxy(OwnLink, 8080)
            .kinds(Kind::IPV6),
        row("T5.dual", ENVOY, "the proxy calls its own pod, one listener for both families")
            .listeners(Listeners::DualStack)
            .proxy(Own, 8080)
            .inbound()
            .peer(Own),
        row("T5.late", ENVOY, "the same, before and after the proxy listens")
            .listeners(Listeners::Late)
            .proxy(Own, 8080)
            .refused()
            .then()
            .inbound()
            .peer(Own),
        row("T5.15008", &[Istio], "the proxy calls its own pod's HBONE port")
            .proxy(Own, 15008)
            .by("app"),
        row("T5.15008", &[Kuma], "15008 is a port as any other").proxy(Own, 15008).inbound(),
        row("T5.15006", ENVOY, "the proxy calls its own inbound port")
            .proxy(Own, 15006)
            .by("inbound")
            .orig(),
        row("T6", ENVOY, "the proxy hands on to its app")
            .proxy(Own, 8080)
            .source(Passthrough)
            .by("app")
            .peer(Passthrough),
        row("T6.app", ENVOY, "the passthrough source on an app's socket")
            .app(Own, 8080)
            .source(Passthrough)
            .by("app")
            .peer(Passthrough),
        row("T7", ENVOY, "the proxy calls localhost").proxy(Localhost, 8080).by("app"),
        row("T7.2", ENVOY, "the proxy calls 127.0.0.2")
            .proxy(Loopback, 8080)
            .inbound()
            .kinds(Kind::IPV4),
        row("T7.any", ENVOY, "the proxy calls the unspecified address")
            .proxy(Unspecified, 8080)
            .by("app"),
        row("T10", ENVOY, "the proxy calls 127.0.0.6 or ::6 from localhost")
            .proxy(Passthrough, 15002)
            .source(Localhost)
            .inbound()
            .peer(Localhost),
        row("T10.unbound", ENVOY, "the same, from a socket that is not bound")
            .proxy(Passthrough, 15002),
        row("T10.app", ENVOY, "the same by an app").app(Passthrough, 8080).by("app"),
    ]
}

fn calls_to_the_pod() -> Vec<Draft> {
    vec![
        row("I1", ENVOY, "a pod calls").peer_calls(Own, 8080).inbound().peer(Peer),
        row("I1.host", ENVOY, "the node calls, such as the kubelet's probe")
            .host_calls(Own, 8080)
            .inbound()
            .peer(Node),
        row("I1.closed", ENVOY, "a port that no app listens on")
            .peer_calls(Own, 15002)
            .inbound()
            .peer(Peer),
        row("I1.dual", ENVOY, "one listener for both families")
            .listeners(Listeners::DualStack)
            .peer_calls(Own, 8080)
            .inbound()
            .peer(Peer),
        row("I1.second", ENVOY, "to another address of the pod")
            .peer_calls(Secondary, 8080)
            .inbound()
            .peer(Peer),
        row("I1.link", ENVOY, "to the pod's link-local address")
            .peer_calls(OwnLink, 8080)
            .inbound()
            .kinds(Kind::IPV6),
        row("I1.15001", ENVOY, "to the outbound port itself").peer_calls(Own, 15001).inbound(),
        row("I1.15006", ENVOY, "to the inbound port itself").peer_calls(Own, 15006).inbound(),
        row("I2", &[Istio], "HBONE is not touched").peer_calls(Own, 15008).by("app").peer(Peer),
        row("I2", &[Kuma], "15008 is a port as any other").peer_calls(Own, 15008).inbound(),
        row("I2.15007", ENVOY, "below HBONE").peer_calls(Own, 15007).inbound(),
        row("I2.15009", ENVOY, "above HBONE").peer_calls(Own, 15009).inbound(),
        row("I3", ALL, "UDP to the pod").udp(Who::Peer, Own, 8080).answered("app"),
        row("I3.host", ALL, "UDP from the node").udp(Who::Host, Own, 8080).answered("app"),
        row("I4", ENVOY, "the proxy does not listen: refused, not handed to the app")
            .listeners(Listeners::Late)
            .peer_calls(Own, 8080)
            .refused()
            .then()
            .inbound()
            .peer(Peer),
        row("I4.host", ENVOY, "the same from the node")
            .listeners(Listeners::Late)
            .host_calls(Own, 8080)
            .refused()
            .then()
            .inbound()
            .peer(Node),
        row("I4.exempt", &[Istio], "an exempt port needs no proxy")
            .listeners(Listeners::Late)
            .peer_calls(Own, 15021)
            .by("app"),
    ]
}

/// Where REDIRECT leads: to localhost for what the pod itself sends, to the first address of the
/// device for what comes in. So which listeners are reached depends on what they are bound to.
fn listeners() -> Vec<Draft> {
    let places = [
        (Localhost, "localhost", "localhost alone"),
        (Unspecified, "any", "all addresses"),
        (Own, "own", "the pod's address alone"),
        (Secondary, "second", "another of the pod's addresses alone"),
        (OwnLink, "link", "the pod's link-local address alone"),
        (Loopback, "loopback", "127.0.0.2 alone"),
    ];
    let mut all = Vec::new();
    for (place, id, at) in places {
        for (opened, when) in [(Before, "before"), (After, "after")] {
            let proxy = format!("the proxy listens at {at}, {when} the pod is enrolled");
            all.extend(
                calls_to_listeners(&format!("LN.{id}.{when}"), &proxy)
                    .into_iter()
                    .map(|draft| draft.listeners(Listeners::At(place, opened)).led_to(place)),
            );
        }
    }
    let proxy = "another user listens at 127.0.0.2, then the proxy at localhost";
    all.extend(
        calls_to_listeners("LN.squatted", proxy)
            .into_iter()
            .map(|draft| draft.listeners(Listeners::Squatted).led_to(Localhost)),
    );
    all
}

/// F68: each kind of call that is captured, to a proxy that may listen on localhost alone.
fn calls_to_listeners(id: &str, proxy: &str) -> Vec<Draft> {
    let call = |call: &str, meshes, says: &str| {
        row(format!("{id}.{call}"), meshes, format!("{says}; {proxy}"))
    };
    vec![
        call("out", ALL, "the app calls off the pod").app(Remote, 80),
        call("self", ENVOY, "the proxy calls its own pod").proxy(Own, 8080),
        call("self2", ENVOY, "the proxy calls another address of its pod").proxy(Secondary, 8080),
        call("lo", ENVOY, "the proxy calls 127.0.0.2").proxy(Loopback, 8080).kinds(Kind::IPV4),
        call("T10", ENVOY, "what istio-validation and kuma-validation do")
            .proxy(Passthrough, 15002)
            .source(Localhost),
        call("in", ALL, "a pod calls").peer_calls(Own, 8080),
        call("in2", ALL, "a pod calls another address").peer_calls(Secondary, 8080),
        call("in.link", ALL, "a pod calls the link-local address")
            .peer_calls(OwnLink, 8080)
            .kinds(Kind::IPV6),
    ]
}

fn odd_sockets() -> Vec<Draft> {
    vec![
        row("E.maker", ENVOY, "the app makes a socket, the proxy connects it: the maker counts")
            .proxy(Remote, 80)
            .maker(Who::App)
            .outbound(),
        row("E.maker2", ENVOY, "the proxy makes a socket, the app connects it")
            .app(Remote, 80)
            .maker(Who::Proxy)
            .by("remote"),
        row("E.maker3", &[Istio], "the proxy's group makes a socket, the app connects it")
            .app(Remote, 80)
            .maker(Who::ProxyGroup)
            .by("remote"),
        row("E.mark", ENVOY, "SO_MARK changes nothing").app(Remote, 80).mark(0x539).outbound(),
        row("E.mark.own", ENVOY, "nor for the proxy").proxy(Own, 8080).mark(0x539).inbound(),
        row("E.source.own", ENVOY, "bound to the pod's address")
            .app(Remote, 80)
            .source(Own)
            .outbound(),
        row("E.source.2", ENVOY, "bound to another address of the pod")
            .app(Remote, 80)
            .source(Secondary)
            .outbound()
            .peer(Secondary),
        row("E.source.lo", ENVOY, "bound to localhost, off the pod")
            .app(Remote, 80)
            .source(Localhost),
        row("E.source.lo.proxy", ENVOY, "the same by the proxy")
            .proxy(Remote, 80)
            .source(Localhost),
        row("E.source.6", ENVOY, "bound to the passthrough source, off the pod")
            .app(Remote, 80)
            .source(Passthrough),
        row("E.source.6.proxy", ENVOY, "the same by the proxy")
            .proxy(Remote, 80)
            .source(Passthrough),
        row("E.source.own.lo", ENVOY, "bound to the pod's address, to localhost")
            .app(Localhost, 8080)
            .source(Own)
            .by("app"),
        row("E.source.own.lo.proxy", ENVOY, "the same by the proxy")
            .proxy(Localhost, 8080)
            .source(Own)
            .by("app"),
        row("E.source.lo.own", ENVOY, "the proxy, bound to localhost, calls its pod")
            .proxy(Own, 8080)
            .source(Localhost),
        row("E.dev", ALL, "SO_BINDTODEVICE eth0, off the pod").app(Remote, 80).device("eth0"),
        row("E.dev.proxy", ENVOY, "the same by the proxy")
            .proxy(Remote, 80)
            .device("eth0")
            .by("remote"),
        row("E.dev.own", ENVOY, "SO_BINDTODEVICE eth0, to its own pod")
            .app(Own, 8080)
            .device("eth0"),
        row("E.dev.own.proxy", ENVOY, "the same by the proxy").proxy(Own, 8080).device("eth0"),
        row("E.dev.lo", ENVOY, "SO_BINDTODEVICE lo, to its own pod").app(Own, 8080).device("lo"),
        row("E.dev.lo.proxy", ENVOY, "the same by the proxy").proxy(Own, 8080).device("lo"),
        row("E.dev.lo.off", ENVOY, "SO_BINDTODEVICE lo, off the pod").app(Remote, 80).device("lo"),
    ]
}

fn odd_destinations() -> Vec<Draft> {
    vec![
        row("E.multicast", ALL, "to a multicast address").app(Multicast, 80),
        row("E.broadcast", ALL, "to the broadcast address").app(Broadcast, 80).kinds(Kind::IPV4),
        row("E.link", ALL, "to another pod's link-local address")
            .app(PeerLink, 80)
            .kinds(Kind::IPV6),
        row("E.link.proxy", ALL, "the same by the proxy")
            .proxy(PeerLink, 80)
            .by("peer")
            .kinds(Kind::IPV6),
        row("E.unroutable", ALL, "to an address that the pod has no route to").app(Unroutable, 80),
        row("E.unroutable.proxy", ALL, "the same by the proxy").proxy(Unroutable, 80),
    ]
}

fn one_family() -> Vec<Draft> {
    let pod = |id, says| row(id, ALL, says).v4_only();
    vec![
        pod("FAM.out", "told of IPv4 alone, the mesh captures it")
            .app(Remote, 80)
            .outbound()
            .kinds(Kind::IPV4),
        pod("FAM.out.6", "and leaves IPv6").app(Remote, 80).by("remote").kinds(Kind::IPV6),
        pod("FAM.in", "both ways").peer_calls(Own, 8080).inbound().kinds(Kind::IPV4),
        pod("FAM.in.6", "both ways").peer_calls(Own, 8080).by("app").kinds(Kind::IPV6),
        pod("FAM.dns", "DNS as well")
            .meshes(ENVOY)
            .dns()
            .asks(Remote, Manner::Unconnected)
            .dns_answers()
            .kinds(Kind::IPV4),
        pod("FAM.dns.6", "DNS as well")
            .meshes(ENVOY)
            .dns()
            .asks(Remote, Manner::Unconnected)
            .answered("remote")
            .kinds(Kind::IPV6),
    ]
}

/// F1 and F2: what the meshes' init containers do, in every kind of pod.
fn validators() -> Vec<Draft> {
    let passes = |id, meshes, says, addresses, kinds| {
        row(id, meshes, says).addresses(addresses).validates().kinds(kinds).by(PASSES)
    };
    let istio = |id, addresses, kinds| {
        passes(id, &[Istio], "istio-validation, the real one, lets the pod start", addresses, kinds)
    };
    let kuma = |id, addresses, kinds| {
        passes(id, &[Kuma], "kuma-validation lets the pod start", addresses, kinds)
    };
    let linkerd = |id, addresses, kinds| {
        let says = "linkerd-network-validator lets the pod start";
        passes(id, &[Linkerd], says, addresses, kinds)
    };
    let (dual, v4, v6) = (Addresses::Dual, Addresses::V4, Addresses::V6);
    let v4_link = Addresses::V4Link;
    vec![
        istio("V.dual", dual, Kind::ONE_V4),
        istio("V.dual.dns", dual, Kind::ONE_V4).dns(),
        istio("V.dual.v4", dual, Kind::ONE_V4).v4_only(),
        istio("V.v4", v4, Kind::ONE_V4),
        istio("V.v4+fe80", v4_link, Kind::ONE_V4),
        istio("V.v6", v6, Kind::IPV6),
        kuma("V.dual", dual, Kind::ONE_V4),
        kuma("V.dual.dns", dual, Kind::ONE_V4).dns(),
        kuma("V.v4", v4, Kind::ONE_V4),
        kuma("V.v4+fe80", v4_link, Kind::ONE_V4),
        kuma("V.v6", v6, Kind::IPV6),
        linkerd("V.dual", dual, Kind::FAMILIES),
        linkerd("V.v4", v4, Kind::ONE_V4).v4_only(),
        linkerd("V.v4+fe80", v4_link, Kind::ONE_V4).v4_only(),
        linkerd("V.v6", v6, Kind::IPV6),
    ]
}

/// Whether a port of the pod is captured when a peer calls.
fn istio_inbound_ports() -> Vec<Draft> {
    let pod = |id, says| row(id, &[Istio], says);
    vec![
        pod("IP.15020", "telemetry is exempt").peer_calls(Own, 15020).by("app"),
        pod("IP.15021", "health is exempt").peer_calls(Own, 15021).by("app"),
        pod("IP.15090", "Prometheus is exempt").peer_calls(Own, 15090).by("app"),
        pod("IP.15019", "a border").peer_calls(Own, 15019).inbound(),
        pod("IP.15022", "a border").peer_calls(Own, 15022).inbound(),
        pod("IP.ex", "an excluded port")
            .with("excludeInboundPorts", "9090, 9091")
            .peer_calls(Own, 9091)
            .by("app"),
        pod("IP.ex.other", "excluding leaves the others")
            .with("excludeInboundPorts", "9090, 9091")
            .peer_calls(Own, 8080)
            .inbound(),
        pod("IP.ex.adds", "excluding adds to the mesh's own")
            .with("excludeInboundPorts", "9090, 9091")
            .peer_calls(Own, 15090)
            .by("app"),
        pod("IP.ex.self", "excluding says nothing on the proxy's own call")
            .with("excludeInboundPorts", "9090, 9091")
            .proxy(Own, 9090)
            .inbound(),
        pod("IP.ex.empty", "an empty list excludes nothing")
            .with("excludeInboundPorts", "")
            .peer_calls(Own, 8080)
            .inbound(),
        pod("IP.status", "the status port is exempt")
            .with("status.sidecar.istio.io/port", "15025")
            .peer_calls(Own, 15025)
            .by("app"),
        pod("IP.in", "an included port")
            .with("includeInboundPorts", "8080,8081")
            .peer_calls(Own, 8081)
            .inbound(),
        pod("IP.in.other", "any other is not captured")
            .with("includeInboundPorts", "8080,8081")
            .peer_calls(Own, 9090)
            .by("app"),
        pod("IP.in.self", "including says nothing on the proxy's own call")
            .with("includeInboundPorts", "8080,8081")
            .proxy(Own, 9090)
            .inbound(),
        pod("IP.in.exempt", "an exempt port can be included")
            .with("includeInboundPorts", "15020,15008")
            .peer_calls(Own, 15020)
            .inbound(),
        pod("IP.in.hbone", "but not HBONE's")
            .with("includeInboundPorts", "15020,15008")
            .peer_calls(Own, 15008)
            .by("app"),
        pod("IP.in+ex", "with a list of includes, excludes are ignored")
            .with("includeInboundPorts", "8080")
            .with("excludeInboundPorts", "8080")
            .peer_calls(Own, 8080)
            .inbound(),
        pod("IP.in.all", "all, but the excluded")
            .with("includeInboundPorts", "*")
            .with("excludeInboundPorts", "9090")
            .peer_calls(Own, 8080)
            .inbound(),
        pod("IP.in.all.ex", "all, but the excluded")
            .with("includeInboundPorts", "*")
            .with("excludeInboundPorts", "9090")
            .peer_calls(Own, 9090)
            .by("app"),
        pod("IP.in.none", "an empty list of includes: none")
            .with("includeInboundPorts", "")
            .peer_calls(Own, 8080)
            .by("app"),
        pod("IP.in.none.self", "but the proxy's own call")
            .with("includeInboundPorts", "")
            .proxy(Own, 8080)
            .inbound(),
        pod("IP.many", "the last of many ports")
            .with("excludeInboundPorts", &many(2000, 60))
            .peer_calls(Own, 2118)
            .by("app"),
        pod("IP.many.gap", "a port between them")
            .with("excludeInboundPorts", &many(2000, 60))
            .peer_calls(Own, 2117)
            .inbound(),
        pod("IP.if", "an excluded interface")
            .with("excludeInterfaces", "eth0")
            .peer_calls(Own, 8080)
            .by("app"),
        pod("IP.if.self", "excluding eth0 says nothing on lo")
            .with("excludeInterfaces", "eth0")
            .proxy(Own, 8080)
            .inbound(),
        pod("IP.if.other", "another interface")
            .with("excludeInterfaces", "eth1")
            .peer_calls(Own, 8080)
            .inbound(),
        pod("IP.if.lo", "excluding lo: the proxy's own call")
            .with("excludeInterfaces", "eth1,lo")
            .proxy(Own, 8080)
            .by("app"),
        pod("OP.if.lo", "excluding lo says nothing on eth0")
            .with("excludeInterfaces", "eth1,lo")
            .app(Remote, 80)
            .outbound(),
        pod("OP.if", "an excluded interface")
            .with("excludeInterfaces", "eth0")
            .app(Remote, 80)
            .by("remote"),
    ]
}

fn istio_outbound() -> Vec<Draft> {
    let pod = |id, says| row(id, &[Istio], says);
    let ports = |id, says| pod(id, says).with("excludeOutboundPorts", "443, 80");
    let (ex, inc) = ("excludeOutboundIPRanges", "includeOutboundIPRanges");
    vec![
        pod("OP.15020", "telemetry of others is exempt unless the pod says otherwise")
            .app(Remote, 15020)
            .by("remote"),
        ports("OP.ex", "an excluded port").app(Remote, 80).by("remote").peer(Own),
        ports("OP.ex.other", "excluding leaves the others").app(Remote, 81).outbound(),
        ports("OP.ex.15020", "excluding replaces the default").app(Remote, 15020).outbound(),
        ports("OP.ex.self", "excluding beats the proxy's own call").proxy(Own, 80).by("app"),
        pod("OP.ex+in", "excluding a port beats including it")
            .with("excludeOutboundPorts", "80")
            .with("includeOutboundPorts", "80,81")
            .with(inc, "")
            .app(Remote, 80)
            .by("remote"),
        pod("OP.ex+in.other", "an included port")
            .with("excludeOutboundPorts", "80")
            .with("includeOutboundPorts", "80,81")
            .with(inc, "")
            .app(Remote, 81)
            .outbound(),
        pod("OP.ex+in.none", "no match is not captured")
            .with("excludeOutboundPorts", "80")
            .with("includeOutboundPorts", "80,81")
            .with(inc, "")
            .app(Remote, 82)
            .by("remote"),
        pod("OP.ex+range", "excluding a port beats including its range")
            .with("excludeOutboundPorts", "80")
            .with(inc, "10.96.0.0/16,fd96::/16")
            .app(Remote, 80)
            .by("remote"),
        pod("OP.in.all", "including a port takes nothing from including all")
            .with("includeOutboundPorts", "81")
            .app(Remote, 80)
            .outbound(),
        pod("OP.many", "the last of many ports")
            .with("excludeOutboundPorts", &many(2000, 60))
            .app(Remote, 2118)
            .by("remote"),
        pod("OP.many.gap", "a port between them")
            .with("excludeOutboundPorts", &many(2000, 60))
            .app(Remote, 2117)
            .outbound(),
        pod("OR.ex", "an excluded range")
            .with(ex, "10.96.0.0/16,fd96::/64")
            .app(Remote, 80)
            .by("remote"),
        pod("OR.ex.other", "excluding leaves the others")
            .with(ex, "10.96.0.0/16,fd96::/64")
            .app(Far, 80)
            .outbound(),
        pod("OR.ex.one", "an excluded address")
            .with(ex, "10.96.0.10/32,fd96::10/128")
            .app(Remote, 80)
            .by("remote"),
        pod("OR.ex.next", "the address next to it")
            .with(ex, "10.96.0.11/32,fd96::11/128")
            .app(Remote, 80)
            .outbound(),
        pod("OR.ex.own", "excluding says nothing on the proxy's own call")
            .with(ex, "10.77.0.0/16,fd77::/16")
            .proxy(Own, 8080)
            .inbound(),
        pod("OR.ex+port", "excluding a range beats including its port")
            .with(ex, "10.96.0.0/16,fd96::/16")
            .with("includeOutboundPorts", "80")
            .app(Remote, 80)
            .by("remote"),
        pod("OR.ex+in", "excluding a range beats including a wider one")
            .with(ex, "10.96.0.0/24,fd96::/64")
            .with(inc, "10.0.0.0/8,fd00::/8")
            .app(Remote, 80)
            .by("remote"),
        pod("OR.ex+in2", "excluding a range beats including a narrower one")
            .with(ex, "10.0.0.0/8,fd00::/8")
            .with(inc, "10.96.0.0/24,fd96::/64")
            .app(Remote, 80)
            .by("remote"),
        pod("OR.ex.all4", "0.0.0.0/0 excludes IPv4")
            .with(ex, "0.0.0.0/0")
            .app(Remote, 80)
            .by("remote")
            .kinds(Kind::IPV4),
        pod("OR.ex.all4.6", "and leaves IPv6")
            .with(ex, "0.0.0.0/0")
            .app(Remote, 80)
            .outbound()
            .kinds(Kind::IPV6),
        pod("OR.ex.all6", "::/0 excludes IPv6")
            .with(ex, "::/0")
            .app(Remote, 80)
            .by("remote")
            .kinds(Kind::IPV6),
        pod("OR.ex.all6.4", "and leaves IPv4, mapped or not")
            .with(ex, "::/0")
            .app(Remote, 80)
            .outbound()
            .kinds(Kind::IPV4),
        pod("OR.in", "an included range")
            .with(inc, "10.96.0.0/16,fd96::/16")
            .app(Remote, 80)
            .outbound(),
        pod("OR.in.other", "any other is not captured")
            .with(inc, "10.96.0.0/16,fd96::/16")
            .app(Far, 80)
            .by("far"),
        pod("OR.in.4", "a range of IPv4 takes no IPv6")
            .with(inc, "10.96.0.0/16")
            .app(Remote, 80)
            .by("remote")
            .kinds(Kind::IPV6),
        pod("OR.in.all4", "0.0.0.0/0 includes IPv4")
            .with(inc, "0.0.0.0/0")
            .app(Remote, 80)
            .outbound()
            .kinds(Kind::IPV4),
        pod("OR.in.all4.6", "and no IPv6")
            .with(inc, "0.0.0.0/0")
            .app(Remote, 80)
            .by("remote")
            .kinds(Kind::IPV6),
        pod("OR.in.all4.own", "and not the pod's own address")
            .with(inc, "0.0.0.0/0")
            .app(Own, 8080)
            .by("app")
            .kinds(Kind::IPV4),
        pod("OR.in.all6", "::/0 includes IPv6")
            .with(inc, "::/0")
            .app(Remote, 80)
            .outbound()
            .kinds(Kind::IPV6),
        pod("OR.in.all6.4", "and no IPv4, mapped or not")
            .with(inc, "::/0")
            .app(Remote, 80)
            .by("remote")
            .kinds(Kind::IPV4),
        pod("OR.in.star", "* includes all").with(inc, "*").app(Far, 80).outbound(),
        pod("OR.in.none", "an empty list: none").with(inc, "").app(Remote, 80).by("remote"),
        pod("OR.in.none.self", "but the proxy's own call").with(inc, "").proxy(Own, 8080).inbound(),
        pod("OR.in.none.in", "and calls to the pod").with(inc, "").peer_calls(Own, 8080).inbound(),
        pod("OR.in+port", "ports and ranges add up: the port")
            .with(inc, "192.0.2.0/24,2001:db8::/32")
            .with("includeOutboundPorts", "81")
            .app(Remote, 81)
            .outbound(),
        pod("OR.in+port.range", "ports and ranges add up: the range")
            .with(inc, "192.0.2.0/24,2001:db8::/32")
            .with("includeOutboundPorts", "81")
            .app(Far, 80)
            .outbound(),
        pod("OR.in+port.none", "ports and ranges add up: neither")
            .with(inc, "192.0.2.0/24,2001:db8::/32")
            .with("includeOutboundPorts", "81")
            .app(Remote, 80)
            .by("remote"),
        pod("OR.lo", "an included loopback range captures calls within the pod")
            .with(inc, "127.0.0.0/8,10.77.0.0/16")
            .app(Loopback, 8080)
            .kinds(Kind::IPV4),
        pod("OR.lo.localhost", "but never those to localhost")
            .with(inc, "127.0.0.0/8,10.77.0.0/16")
            .app(Localhost, 8080)
            .by("app")
            .kinds(Kind::IPV4),
        pod("OR.lo.own", "and those to the pod's address, where it is included")
            .with(inc, "127.0.0.0/8,10.77.0.0/16")
            .app(Own, 8080)
            .kinds(Kind::IPV4),
    ]
}

fn linkerd() -> Vec<Draft> {
    let pod = |id, says| row(id, &[Linkerd], says);
    let inbound = |id, says| pod(id, says).with("skip-inbound-ports", "25,8000-8010");
    let outbound = |id, says| pod(id, says).with("skip-outbound-ports", "25,8000-8010");
    // Which Linkerd skips, all but the first and the last.
    let bad = "25, 80,8010-8000,x,,90";
    let subnets = |id, says| pod(id, says).with("skip-subnets", "10.77.0.10/32,fd77::a/128");
    vec![
        pod("L1", "a pod calls").peer_calls(Own, 8080).inbound().peer(Peer),
        pod("L1.host", "the node calls").host_calls(Own, 8080).inbound().peer(Node),
        pod("L1.4190", "the control port").peer_calls(Own, 4190).by("app"),
        pod("L1.4191", "the admin port").peer_calls(Own, 4191).by("app"),
        pod("L1.4189", "a border").peer_calls(Own, 4189).inbound(),
        pod("L1.4192", "a border").peer_calls(Own, 4192).inbound(),
        pod("L1.15008", "HBONE's port is a port as any other").peer_calls(Own, 15008).inbound(),
        inbound("L1.skip", "a skipped port").peer_calls(Own, 25).by("app"),
        inbound("L1.skip.first", "the first of a skipped range").peer_calls(Own, 8000).by("app"),
        inbound("L1.skip.last", "the last of a skipped range").peer_calls(Own, 8010).by("app"),
        inbound("L1.skip.below", "below a skipped range").peer_calls(Own, 7999).inbound(),
        inbound("L1.skip.above", "above a skipped range").peer_calls(Own, 8011).inbound(),
        pod("L1.bad", "an item with a blank is no port, and is skipped: F66")
            .with("skip-inbound-ports", bad)
            .peer_calls(Own, 80)
            .inbound(),
        pod("L1.bad.first", "what is before it holds")
            .with("skip-inbound-ports", bad)
            .peer_calls(Own, 25)
            .by("app"),
        pod("L1.bad.last", "and what is after it")
            .with("skip-inbound-ports", bad)
            .peer_calls(Own, 90)
            .by("app"),
        pod("L2.bad", "the same outbound")
            .with("skip-outbound-ports", bad)
            .app(Remote, 80)
            .outbound(),
        pod("L2.bad.last", "what is after it holds")
            .with("skip-outbound-ports", bad)
            .app(Remote, 90)
            .by("remote"),
        inbound("L1.skip.4190", "skipping adds to the defaults").peer_calls(Own, 4190).by("app"),
        inbound("L1.skip.out", "skipping inbound says nothing on outbound")
            .app(Remote, 8000)
            .outbound(),
        pod("L1.many", "the last of many ranges")
            .with("skip-inbound-ports", &many_ranges(2000, 20))
            .peer_calls(Own, 2193)
            .by("app"),
        pod("L1.many.gap", "a port between them")
            .with("skip-inbound-ports", &many_ranges(2000, 20))
            .peer_calls(Own, 2195)
            .inbound(),
        subnets("L1.subnet", "a skipped source").peer_calls(Own, 8080).by("app").peer(Peer),
        subnets("L1.subnet.other", "any other source").host_calls(Own, 8080).inbound().peer(Node),
        subnets("L1.subnet.out", "skipping sources says nothing on destinations")
            .app(Peer, 80)
            .outbound(),
        pod("L1.subnet.all", "all of IPv4 is skipped")
            .with("skip-subnets", "0.0.0.0/0")
            .peer_calls(Own, 8080)
            .by("app")
            .kinds(Kind::IPV4),
        pod("L1.subnet.all.6", "but not IPv6")
            .with("skip-subnets", "0.0.0.0/0")
            .peer_calls(Own, 8080)
            .inbound()
            .kinds(Kind::IPV6),
        pod("L1.late", "refused until the proxy listens, never handed to the app")
            .listeners(Listeners::Late)
            .peer_calls(Own, 8080)
            .refused()
            .then()
            .inbound()
            .peer(Peer),
        pod("L2", "the app calls off the pod").app(Remote, 80).outbound(),
        pod("L2.root", "root is an app").who(Who::User(0)).to(Remote, 80).outbound(),
        pod("L2.peer", "the app calls another pod").app(Peer, 8080).outbound(),
        pod("L2.dns", "DNS by TCP is TCP").app(Remote, 53).outbound(),
        pod("L2.late", "refused until the proxy listens")
            .listeners(Listeners::Late)
            .app(Remote, 80)
            .refused()
            .then()
            .outbound(),
        pod("L2.maker", "who made the socket counts").proxy(Remote, 80).maker(Who::App).outbound(),
        pod("L2.proxy", "the proxy calls off the pod").proxy(Remote, 80).by("remote").peer(Own),
        pod("L2.group", "the proxy's group is not enough")
            .who(Who::ProxyGroup)
            .to(Remote, 80)
            .outbound(),
        pod("L2.group.on", "unless the pod says so")
            .with("proxy-gid", "2102")
            .who(Who::ProxyGroup)
            .to(Remote, 80)
            .by("remote"),
        pod("L2.uid", "the pod names another user")
            .with("proxy-uid", "2199")
            .who(Who::User(2199))
            .to(Remote, 80)
            .by("remote"),
        pod("L2.uid.old", "then the usual one is an app")
            .with("proxy-uid", "2199")
            .who(Who::ProxyUser)
            .to(Remote, 80)
            .outbound(),
        pod("L2.uid.zero", "user 0 exempts nobody, not even the proxy: F11")
            .with("proxy-uid", "0")
            .who(Who::ProxyUser)
            .to(Remote, 80)
            .outbound(),
        pod("L2.uid.root", "nor root")
            .with("proxy-uid", "0")
            .who(Who::User(0))
            .to(Remote, 80)
            .outbound(),
        pod("L2.uid.own", "its own pod is exempt all the same")
            .with("proxy-uid", "0")
            .who(Who::ProxyUser)
            .to(Own, 8080)
            .by("app"),
        pod("L2.gid.zero", "group 0 exempts nobody: F11")
            .with("proxy-gid", "0")
            .who(Who::User(0))
            .to(Remote, 80)
            .outbound(),
        pod("L2.gid.none", "nor does -1, which is the charts' word for it")
            .with("proxy-gid", "-1")
            .app(Remote, 80)
            .outbound(),
        outbound("L2.skip", "a skipped port").app(Remote, 25).by("remote"),
        outbound("L2.skip.first", "the first of a skipped range").app(Remote, 8000).by("remote"),
        outbound("L2.skip.last", "the last of a skipped range").app(Remote, 8010).by("remote"),
        outbound("L2.skip.below", "below a skipped range").app(Remote, 7999).outbound(),
        outbound("L2.skip.above", "above a skipped range").app(Remote, 8011).outbound(),
        outbound("L2.skip.in", "skipping outbound says nothing on inbound")
            .peer_calls(Own, 8000)
            .inbound(),
        pod("L4", "the app calls its own service").app(Remote, 8080).outbound(),
        pod("L4.proxy", "then the proxy its own pod: never inbound")
            .proxy(Own, 8080)
            .by("app")
            .peer(Own),
        pod("L4.lo", "and localhost").proxy(Localhost, 8080).by("app"),
        pod("L5", "a pod calls the inbound port itself").peer_calls(Own, 4143).inbound().peer(Peer),
        pod("L5.host", "the node calls the inbound port itself").host_calls(Own, 4143).inbound(),
        pod("L6", "the app calls the outbound port itself")
            .app(Localhost, 4140)
            .by("outbound")
            .orig(),
        pod("L6.in", "the app calls the inbound port itself").app(Own, 4143).by("inbound").orig(),
        pod("L7", "UDP DNS is not touched").udp(Who::App, Remote, 53).answered("remote"),
        pod("L8", "what linkerd-network-validator does")
            .listeners(Listeners::Validator)
            .who(Who::User(65534))
            .to(Far, 20001)
            .by("validator"),
    ]
}

fn kuma() -> Vec<Draft> {
    let pod = |id, says| row(id, &[Kuma], says);
    let users = |id, says| {
        pod(id, says)
            .with("exclude-outbound-ports-for-uids", "tcp:8000-8010:1000;9000:2000-2010;3000")
    };
    let (inn, out) = ("exclude-inbound-ips", "exclude-outbound-ips");
    vec![
        pod("K.in", "an excluded inbound port")
            .with("exclude-inbound-ports", "9090,9091")
            .peer_calls(Own, 9091)
            .by("app"),
        pod("K.in.other", "any other")
            .with("exclude-inbound-ports", "9090,9091")
            .peer_calls(Own, 8080)
            .inbound(),
        pod("K.in.15020", "no port of Istio's is exempt").peer_calls(Own, 15020).inbound(),
        pod("K.probe", "the probe proxy's port is exempt: F60").peer_calls(Own, 9001).by("app"),
        pod("K.probe.host", "for the kubelet").host_calls(Own, 9001).by("app"),
        pod("K.probe.next", "a border").peer_calls(Own, 9000).inbound(),
        pod("K.probe.named", "the pod names it")
            .with("kuma.io/application-probe-proxy-port", "9123")
            .host_calls(Own, 9123)
            .by("app"),
        pod("K.probe.old", "then the usual one is a port as any other")
            .with("kuma.io/application-probe-proxy-port", "9123")
            .host_calls(Own, 9001)
            .inbound(),
        pod("K.probe.off", "0: there is none")
            .with("kuma.io/application-probe-proxy-port", "0")
            .host_calls(Own, 9001)
            .inbound(),
        pod("K.probe.ex", "excluding ports leaves it exempt")
            .with("exclude-inbound-ports", "9090")
            .host_calls(Own, 9001)
            .by("app"),
        pod("K.admin", "Envoy's admin port is exempt inbound").peer_calls(Own, 9901).by("app"),
        pod("K.admin.ex", "unless the pod has a list")
            .with("exclude-inbound-ports", "9090")
            .peer_calls(Own, 9901)
            .inbound(),
        pod("K.admin.out", "and outbound").app(Remote, 9901).by("remote"),
        pod("K.admin.out.ex", "unless the pod has a list")
            .with("exclude-outbound-ports", "443")
            .app(Remote, 9901)
            .outbound(),
        pod("K.out", "an excluded outbound port")
            .with("exclude-outbound-ports", "443,80")
            .app(Remote, 80)
            .by("remote"),
        pod("K.out.other", "any other")
            .with("exclude-outbound-ports", "443,80")
            .app(Remote, 81)
            .outbound(),
        pod("K.out.self", "it beats the proxy's own call")
            .with("exclude-outbound-ports", "443,80")
            .proxy(Own, 80)
            .by("app"),
        users("K.users", "a port for a user: the first").app(Remote, 8000).by("remote"),
        users("K.users.last", "the last").app(Remote, 8010).by("remote"),
        users("K.users.above", "one above").app(Remote, 8011).outbound(),
        users("K.users.other", "another user").who(Who::User(1001)).to(Remote, 8000).outbound(),
        users("K.users.range", "the last of a range of users")
            .who(Who::User(2010))
            .to(Remote, 9000)
            .by("remote"),
        users("K.users.above2", "a user above the range")
            .who(Who::User(2011))
            .to(Remote, 9000)
            .outbound(),
        pod("K.users.both", "both protocols, in capitals: F67")
            .with("exclude-outbound-ports-for-uids", "TCP,udp:80:1000")
            .app(Remote, 80)
            .by("remote"),
        pod("K.gateway", "a gateway takes connections itself")
            .with("kuma.io/gateway", "enabled")
            .peer_calls(Own, 8080)
            .by("app"),
        users("K.users.all", "all ports for a user")
            .who(Who::User(3000))
            .to(Remote, 80)
            .by("remote"),
        pod("K.inip", "an excluded source")
            .with(inn, "10.77.0.10,fd77::a")
            .peer_calls(Own, 8080)
            .by("app")
            .peer(Peer),
        pod("K.inip.other", "any other source")
            .with(inn, "10.77.0.10,fd77::a")
            .host_calls(Own, 8080)
            .inbound(),
        pod("K.inip.all4", "all sources of IPv4")
            .with(inn, "0.0.0.0/0")
            .host_calls(Own, 8080)
            .by("app")
            .kinds(Kind::IPV4),
        pod("K.outip", "an excluded destination")
            .with(out, "10.96.0.0/16,fd96::10")
            .app(Remote, 80)
            .by("remote"),
        pod("K.outip.other", "any other destination")
            .with(out, "10.96.0.0/16,fd96::10")
            .app(Far, 80)
            .outbound(),
        pod("K.outip.self", "excluded destinations come before the proxy's own call")
            .with(out, "10.77.0.0/16,fd77::/16")
            .proxy(Own, 8080)
            .by("app"),
    ]
}

/// Kuma 3's `transparent-proxy-config`: F63. The pod's other annotations are there as well, and
/// count for nothing.
fn kuma_configured() -> Vec<Draft> {
    let pod = |id, says, redirect: &str| {
        let config = format!(r#"{{"cniMode": true, "redirect": {redirect}}}"#);
        row(id, &[Kuma], says)
            .with("transparent-proxy-config", &config)
            .with("exclude-outbound-ports", "80")
            .with("exclude-inbound-ports", "8080")
    };
    let dns = |id, says, outbound: &str| {
        let dns = r#"{"enabled": true, "captureAll": true, "port": 15053}"#;
        pod(id, says, &format!(r#"{{"dns": {dns}, "outbound": {outbound}}}"#)).dns()
    };
    let injected = r#"{"inbound": {"enabled": true, "port": 15006, "excludePorts": [9001]},
                       "outbound": {"enabled": true, "port": 15001}}"#;
    let inbound = |fields: &str| format!(r#"{{"inbound": {{{fields}}}}}"#);
    let outbound = |fields: &str| format!(r#"{{"outbound": {{{fields}}}}}"#);
    let include = r#""includePorts": [80], "excludePorts": [80]"#;
    let (ips, users) = (r#""excludePortsForIPs": "#, r#""excludePortsForUIDs": "#);
    let remote = outbound(&format!(r#"{ips}["10.96.0.0/16,fd96::/16"]"#));
    let peers = inbound(&format!(r#"{ips}["10.77.0.10", "fd77::a"]"#));
    vec![
        pod("C.out", "the configuration alone counts", injected).app(Remote, 80).outbound(),
        pod("C.in", "both ways", injected).peer_calls(Own, 8080).inbound(),
        pod("C.probe", "the probe proxy's port is in it", injected).host_calls(Own, 9001).by("app"),
        pod("C.probe.not", "and nowhere else", "{}").host_calls(Own, 9001).inbound(),
        pod("C.admin.not", "as is Envoy's admin port", "{}").app(Remote, 9901).outbound(),
        pod("C.self", "the proxy's own call", injected).proxy(Own, 8080).inbound(),
        pod("C.in.off", "inbound is off", &inbound(r#""enabled": false"#))
            .peer_calls(Own, 80)
            .by("app"),
        pod("C.in.off.out", "which says nothing on outbound", &inbound(r#""enabled": false"#))
            .app(Remote, 81)
            .outbound(),
        pod("C.in.only", "only these ports, excluded or not", &inbound(include))
            .peer_calls(Own, 80)
            .inbound(),
        pod("C.in.only.other", "no other port", &inbound(include)).peer_calls(Own, 81).by("app"),
        pod("C.in.ips", "excluded sources", &peers).peer_calls(Own, 80).by("app"),
        pod("C.in.ips.other", "other sources", &peers).host_calls(Own, 80).inbound(),
        pod(
            "C.in.users",
            "excluding ports of users inbound excludes all: a quirk",
            &inbound(&format!(r#"{users}["1000"]"#)),
        )
        .peer_calls(Own, 80)
        .by("app"),
        pod("C.out.off", "outbound is off", &outbound(r#""enabled": false"#))
            .app(Remote, 81)
            .by("remote"),
        pod("C.out.off.self", "for the proxy's own call too", &outbound(r#""enabled": false"#))
            .proxy(Own, 80)
            .by("app"),
        pod("C.out.off.in", "which says nothing on inbound", &outbound(r#""enabled": false"#))
            .peer_calls(Own, 80)
            .inbound(),
        dns("C.out.off.dns", "nor on DNS", r#"{"enabled": false}"#)
            .asks(Remote, Manner::Unconnected)
            .dns_answers(),
        pod("C.out.only", "only these ports, excluded or not", &outbound(include))
            .app(Remote, 80)
            .outbound(),
        pod("C.out.only.other", "no other port", &outbound(include)).app(Remote, 81).by("remote"),
        pod("C.out.only.self", "the proxy's own call is none of them", &outbound(include))
            .proxy(Own, 81)
            .inbound(),
        pod("C.out.only.lo", "nor is the app's to its own pod", &outbound(include))
            .app(Own, 80)
            .by("app"),
        pod("C.out.ips", "excluded destinations", &remote).app(Remote, 81).by("remote"),
        pod("C.out.ips.other", "other destinations", &remote).app(Far, 81).outbound(),
        dns("C.out.ips.dns", "DNS too", &format!(r#"{{{ips}["10.96.0.10,fd96::10"]}}"#))
            .asks(Remote, Manner::Unconnected)
            .answered("remote"),
        pod(
            "C.out.users",
            "a user's ports",
            &outbound(&format!(r#"{users}["tcp,udp:81:1001", "1000"]"#)),
        )
        .app(Remote, 82)
        .by("remote"),
        pod(
            "C.out.users.port",
            "by protocol and port",
            &outbound(&format!(r#"{users}["tcp,udp:81:1001", "1000"]"#)),
        )
        .who(Who::User(1001))
        .to(Remote, 81)
        .by("remote"),
        pod(
            "C.out.users.other",
            "another port of that user",
            &outbound(&format!(r#"{users}["tcp,udp:81:1001", "1000"]"#)),
        )
        .who(Who::User(1001))
        .to(Remote, 82)
        .outbound(),
        dns("C.dns", "DNS is on", "{}").asks(Remote, Manner::Unconnected).dns_answers(),
        dns("C.dns.tcp", "DNS over TCP goes straight out", "{}").app(Remote, 53).by("remote"),
        dns(
            "C.dns.insert",
            "unless the jump is inserted before its rule",
            r#"{"insertRedirectInsteadOfAppend": true}"#,
        )
        .app(Remote, 53)
        .outbound(),
        dns(
            "C.dns.insert.lo",
            "which says nothing on localhost",
            r#"{"insertRedirectInsteadOfAppend": true}"#,
        )
        .app(Localhost, 53)
        .by("app"),
        pod("C.dns.off", "by default DNS is off", "{}")
            .udp(Who::App, Remote, 53)
            .answered("remote"),
    ]
}

fn dns() -> Vec<Draft> {
    let both = |id, says| row(id, ENVOY, says).dns();
    let istio = |id, says| row(id, &[Istio], says).dns();
    let kuma = |id, says| row(id, &[Kuma], says).dns();
    let asks = |id, says, manner| both(id, says).asks(Remote, manner).dns_answers();
    vec![
        asks("T11", "the app asks a resolver, connected, F50", Manner::Connected),
        asks("T11.to", "not connected", Manner::Unconnected),
        asks("T11.msg", "by sendmsg and recvmsg", Manner::Message),
        asks("T11.several", "several resolvers from one socket", Manner::Several),
        asks("T11.bound", "bound to the pod's address", Manner::Unconnected).source(Own),
        asks("T11.bound.to", "the same, connected", Manner::Connected).source(Own),
        asks("T11.bound.several", "the same, several resolvers", Manner::Several).source(Own),
        asks("T11.second", "bound to another of the pod's addresses", Manner::Unconnected)
            .source(Secondary),
        asks("T11.second.to", "the same, connected, F50", Manner::Connected).source(Secondary),
        both("T11.own.to", "a resolver on the pod's own address, connected, F50")
            .asks(Own, Manner::Connected)
            .dns_answers(),
        both("T11.lo.to", "a resolver on localhost, connected, F50")
            .asks(Localhost, Manner::Connected)
            .dns_answers(),
        both("T11.own", "a resolver on the pod's own address")
            .asks(Own, Manner::Unconnected)
            .dns_answers(),
        both("T11.far", "a resolver that resolv.conf does not name")
            .asks(Far, Manner::Unconnected)
            .dns_answers(),
        both("T11.lo", "a resolver on localhost")
            .asks(Localhost, Manner::Unconnected)
            .dns_answers(),
        both("T11.root", "root asks").udp(Who::User(0), Remote, 53).dns_answers(),
        both("T11.proxy", "the proxy asks").udp(Who::Proxy, Remote, 53).answered("remote"),
        row("T11.group", &[Istio], "the proxy's group asks")
            .dns()
            .udp(Who::ProxyGroup, Remote, 53)
            .answered("remote"),
        row("T11.group", &[Kuma], "the proxy's group asks")
            .dns()
            .udp(Who::ProxyGroup, Remote, 53)
            .dns_answers(),
        istio("T11.tcp", "the app asks by TCP").app(Remote, 53).by("dns").peer(Own),
        istio("T11.tcp.lo", "the app asks localhost by TCP").app(Localhost, 53).by("dns"),
        istio("T11.tcp.own", "the app asks its own pod by TCP").app(Own, 53).by("dns"),
        kuma("T11.tcp", "the app asks by TCP: nobody listens for that, F61")
            .app(Remote, 53)
            .by("remote")
            .peer(Own),
        kuma("T11.tcp.lo", "the app asks localhost by TCP").app(Localhost, 53).by("app"),
        kuma("T11.tcp.2", "the app asks 127.0.0.2 by TCP")
            .app(Loopback, 53)
            .by("app")
            .kinds(Kind::IPV4),
        kuma("T11.tcp.own", "the app asks its own pod by TCP").app(Own, 53).by("app"),
        both("T11.tcp.proxy", "the proxy asks by TCP").proxy(Remote, 53).by("remote"),
        istio("T11.tcp.proxy.own", "the proxy asks its own pod by TCP").proxy(Own, 53).by("app"),
        kuma("T11.tcp.proxy.own", "the proxy asks its own pod by TCP").proxy(Own, 53).inbound(),
        both("T11.udp", "UDP to another port").udp(Who::App, Remote, 443).answered("remote"),
        both("T11.tcp.other", "TCP to another port").app(Remote, 80).outbound(),
        both("T11.self", "the proxy's own call").proxy(Own, 8080).inbound(),
        row("T11.ex", &[Istio], "an excluded port 53")
            .dns()
            .with("excludeOutboundPorts", "53")
            .udp(Who::App, Remote, 53)
            .answered("remote"),
        row("T11.ex.tcp", &[Istio], "an excluded port 53, TCP")
            .dns()
            .with("excludeOutboundPorts", "53")
            .app(Remote, 53)
            .by("remote"),
        row("T11.range", &[Istio], "excluded ranges say nothing on DNS")
            .dns()
            .with("excludeOutboundIPRanges", "10.96.0.0/16,fd96::/16")
            .udp(Who::App, Remote, 53)
            .dns_answers(),
        row("T11.users", &[Kuma], "an excluded port 53 for a user")
            .dns()
            .with("exclude-outbound-ports-for-uids", "udp:53:1000")
            .udp(Who::App, Remote, 53)
            .answered("remote"),
        row("T11.users.tcp", &[Kuma], "which says nothing on TCP")
            .dns()
            .with("exclude-outbound-ports-for-uids", "udp:53:1000")
            .app(Remote, 80)
            .outbound(),
        row("T11.ip", &[Kuma], "an excluded resolver")
            .dns()
            .with("exclude-outbound-ips", "10.96.0.10,fd96::10")
            .udp(Who::App, Remote, 53)
            .answered("remote"),
        row("T11.off", ENVOY, "DNS capture is off").udp(Who::App, Remote, 53).answered("remote"),
        row("T11.off.tcp", ENVOY, "DNS capture is off: TCP is TCP").app(Remote, 53).outbound(),
    ]
}

/// `count` ports from `first` on, each second one.
fn many(first: u16, count: u16) -> String {
    let ports: Vec<String> = (0..count).map(|n| (first + 2 * n).to_string()).collect();
    ports.join(",")
}

/// `count` ranges of four ports from `first` on, ten ports from one to the next.
fn many_ranges(first: u16, count: u16) -> String {
    let range = |n| format!("{}-{}", first + 10 * n, first + 10 * n + 3);
    (0..count).map(range).collect::<Vec<_>>().join(",")
}

/// A row being written.
struct Draft {
    id: String,
    meshes: &'static [Mesh],
    says: String,
    annotations: Vec<(String, String)>,
    dns: bool,
    v4_only: bool,
    addresses: Addresses,
    listeners: Listeners,
    act: Act,
    kinds: &'static [Kind],
    expect: Vec<Expect>,
}

fn row(id: impl Into<String>, meshes: &'static [Mesh], says: impl Into<String>) -> Draft {
    let dial = Dial {
        who: Who::App,
        to: Remote,
        port: 80,
        source: None,
        device: None,
        mark: None,
        maker: None,
    };
    Draft {
        id: id.into(),
        meshes,
        says: says.into(),
        annotations: Vec::new(),
        dns: false,
        v4_only: false,
        addresses: Addresses::Dual,
        listeners: Listeners::Usual,
        act: Act::Tcp(dial),
        kinds: Kind::ALL,
        expect: vec![Expect::default()],
    }
}

impl Draft {
    fn meshes(mut self, meshes: &'static [Mesh]) -> Self {
        self.meshes = meshes;
        self
    }

    // The pod.

    /// An annotation; a key without a slash gets the mesh's prefix.
    fn with(mut self, key: &str, value: &str) -> Self {
        let prefix = match self.meshes {
            [Istio, ..] => "traffic.sidecar.istio.io/",
            [Linkerd, ..] => "config.linkerd.io/",
            _ => "traffic.kuma.io/",
        };
        let key = if key.contains('/') { key.to_owned() } else { format!("{prefix}{key}") };
        self.annotations.push((key, value.to_owned()));
        self
    }

    fn dns(mut self) -> Self {
        self.dns = true;
        self
    }

    fn v4_only(mut self) -> Self {
        self.v4_only = true;
        self
    }

    fn listeners(mut self, listeners: Listeners) -> Self {
        self.listeners = listeners;
        self
    }

    fn addresses(mut self, addresses: Addresses) -> Self {
        self.addresses = addresses;
        self
    }

    // What is done.

    fn validates(mut self) -> Self {
        self.act = Act::Validate;
        self.listeners(Listeners::None)
    }

    fn dial(mut self, change: impl FnOnce(&mut Dial)) -> Self {
        if let Act::Tcp(dial) = &mut self.act {
            change(dial);
        }
        self
    }

    fn who(self, who: Who) -> Self {
        self.dial(|dial| dial.who = who)
    }

    fn to(self, to: Place, port: u16) -> Self {
        self.dial(|dial| (dial.to, dial.port) = (to, port))
    }

    fn app(self, to: Place, port: u16) -> Self {
        self.who(Who::App).to(to, port)
    }

    fn proxy(self, to: Place, port: u16) -> Self {
        self.who(Who::Proxy).to(to, port)
    }

    fn peer_calls(self, to: Place, port: u16) -> Self {
        self.who(Who::Peer).to(to, port)
    }

    fn host_calls(self, to: Place, port: u16) -> Self {
        self.who(Who::Host).to(to, port)
    }

    fn source(mut self, place: Place) -> Self {
        match &mut self.act {
            Act::Tcp(Dial { source, .. }) | Act::Udp { source, .. } => *source = Some(place),
            Act::Validate => {}
        }
        self
    }

    fn device(self, device: &'static str) -> Self {
        self.dial(|dial| dial.device = Some(device))
    }

    fn mark(self, mark: u32) -> Self {
        self.dial(|dial| dial.mark = Some(mark))
    }

    fn maker(self, maker: Who) -> Self {
        self.dial(|dial| dial.maker = Some(maker))
    }

    fn udp(mut self, who: Who, to: Place, port: u16) -> Self {
        self.act = Act::Udp { who, to, port, manner: Manner::Unconnected, source: None };
        self
    }

    fn asks(mut self, to: Place, manner: Manner) -> Self {
        self.act = Act::Udp { who: Who::App, to, port: 53, manner, source: None };
        self
    }

    fn kinds(mut self, kinds: &'static [Kind]) -> Self {
        self.kinds = kinds;
        self
    }

    // What the contract says. A row that none of these is called on is only compared.

    fn expect(mut self, change: impl FnOnce(&mut Expect)) -> Self {
        if let Some(last) = self.expect.last_mut() {
            change(last);
        }
        self
    }

    /// What was said so far is of the first observation, what follows of the second.
    fn then(mut self) -> Self {
        self.expect.push(Expect::default());
        self
    }

    fn outbound(self) -> Self {
        self.by("outbound").orig().peer(Own)
    }

    fn inbound(self) -> Self {
        self.by("inbound").orig()
    }

    fn refused(self) -> Self {
        self.by("refused")
    }

    fn by(self, outcome: &'static str) -> Self {
        self.expect(|expect| expect.outcome = Some(outcome))
    }

    fn answered(self, by: &'static str) -> Self {
        self.by(by).expect(|expect| expect.from = true)
    }

    fn dns_answers(self) -> Self {
        self.answered("dns")
    }

    fn orig(self) -> Self {
        self.expect(|expect| expect.orig = true)
    }

    fn peer(self, peer: Place) -> Self {
        self.expect(|expect| expect.peer = Some(peer))
    }

    /// Whether this call reaches listeners that are at this place alone: what the pod itself sends
    /// is led to localhost. To which address what comes in is led, iptables says.
    fn led_to(self, place: Place) -> Self {
        let Act::Tcp(dial) = &self.act else {
            return self;
        };
        let peer = match (dial.source, dial.to) {
            (Some(source), _) => source,
            (None, Loopback) => Localhost,
            (None, Secondary) => Secondary,
            _ => Own,
        };
        match (dial.who, place) {
            (Who::Peer, Unspecified) => self.inbound(),
            (Who::Peer, Localhost | Loopback) => self.refused(),
            (Who::Peer, _) => self,
            (Who::App, Localhost | Unspecified) => self.outbound(),
            (_, Localhost | Unspecified) => self.inbound().peer(peer),
            _ => self.refused(),
        }
    }

    fn rows(self) -> Vec<Row> {
        let Self { id, says, annotations, dns, v4_only, addresses, listeners, .. } = self;
        let Self { act, kinds, .. } = self;
        self.meshes
            .iter()
            .map(|mesh| Row {
                id: id.clone(),
                says: says.clone(),
                setup: Setup {
                    mesh: *mesh,
                    annotations: annotations.clone(),
                    dns,
                    v4_only,
                    addresses,
                    listeners,
                },
                act,
                kinds,
                expect: self.expect.clone(),
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_row_has_a_name_of_its_own() {
        let rows = rows();
        let names: BTreeSet<String> = rows.iter().map(Row::name).collect();
        assert_eq!(names.len(), rows.len());
    }
}
