//! The meshes' init containers that look whether a pod's traffic is intercepted, and keep the pod
//! from starting where it is not. Each tries again for a while; here only its first try counts.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use anyhow::Result;
use sidestep_lab::iptables::{Kuma, Linkerd};
use sidestep_lab::{INBOUND, PROXY, ServeOpts, Server};
use socket2::{Domain, Socket, Type};

use crate::act;
use crate::observed::Observed;
use crate::row::{Kind, Mesh};
use crate::world::{Stage, VALIDATOR};

/// What a validator says that let the pod start.
pub const PASSES: &str = "passes";
/// How long a call may take. `istio-validation` calls again after a second.
const PATIENCE: Duration = Duration::from_millis(950);

/// Runs the mesh's validator in the pod.
pub fn run(stage: &Stage<'_>, mesh: Mesh, kind: Kind) -> Result<Observed> {
    let outcome = match mesh {
        Mesh::Istio => istio(stage)?,
        Mesh::Kuma => kuma(stage)?,
        Mesh::Linkerd => linkerd(stage, kind)?,
    };
    Ok(Observed::new(outcome))
}

/// `istio-validation`: Istio's own program, as its user.
fn istio(stage: &Stage<'_>) -> Result<String> {
    let patience = format!("{}ms", PATIENCE.as_millis());
    let (pilot_agent, istio) = stage.istio()?;
    let line = pilot_agent.validation(&istio, &patience);
    let mut process = stage.pod().spawn(PROXY, PROXY, line)?;
    let status = process.wait(10 * PATIENCE)?;
    Ok(if status.success() { PASSES.to_owned() } else { format!("{status}") })
}

/// `kuma-validation`, as its user: listens on the inbound port at localhost alone, and calls the
/// address that inbound connections to an application come from, at any port. IPv4 always, IPv6
/// where the pod has any address of it but `lo`'s. After
/// app/kumactl/cmd/install/transparent_proxy_validator.go and pkg/transparentproxy/validate of
/// kumahq/kuma 2.7 to 2.14.
fn kuma(stage: &Stage<'_>) -> Result<String> {
    let port = fastrand::u16(20000..30000);
    let mut pairs: Vec<(IpAddr, IpAddr)> =
        vec![(Ipv4Addr::LOCALHOST.into(), Ipv4Addr::new(127, 0, 0, 6).into())];
    if stage.has_v6() {
        pairs.push((Ipv6Addr::LOCALHOST.into(), Ipv6Addr::from(6).into()));
    }
    let listen = pairs.iter().map(|(localhost, _)| SocketAddr::new(*localhost, INBOUND));
    let _server = serve(stage, ServeOpts::on(listen), Kuma::UID)?;
    for (localhost, target) in &pairs {
        let target = SocketAddr::new(*target, port);
        let outcome = call(stage, Kuma::UID, Some((*localhost, 0).into()), target)?;
        if outcome != PASSES {
            return Ok(format!("{} {outcome}", target.ip()));
        }
    }
    Ok(PASSES.to_owned())
}

/// `linkerd-network-validator`, as nobody: listens in the place of the outbound proxy, and calls an
/// address that nobody has. With IPv6, the chart has it listen on `[::]` and call an address of
/// that family. After charts/partials/templates/_network-validator.tpl of linkerd2 2.18 to 2.20.
fn linkerd(stage: &Stage<'_>, kind: Kind) -> Result<String> {
    let (any, target): (IpAddr, IpAddr) = match kind {
        Kind::V6 => {
            (Ipv6Addr::UNSPECIFIED.into(), Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 1).into())
        }
        _ => (Ipv4Addr::UNSPECIFIED.into(), Ipv4Addr::new(1, 1, 1, 1).into()),
    };
    let listen = ServeOpts::on([SocketAddr::new(any, Linkerd::OUTBOUND)]);
    let _server = serve(stage, ServeOpts { v6_only: false, ..listen }, VALIDATOR)?;
    call(stage, VALIDATOR, None, SocketAddr::new(target, 20001))
}

fn serve(stage: &Stage<'_>, opts: ServeOpts, uid: u32) -> Result<Server> {
    Server::start(stage.pod(), ServeOpts { name: PASSES, uid, gid: uid, ..opts })
}

/// Who answers, or why nobody does.
fn call(
    stage: &Stage<'_>,
    uid: u32,
    source: Option<SocketAddr>,
    target: SocketAddr,
) -> Result<String> {
    stage.pod().run(uid, uid, || {
        let socket = Socket::new(Domain::for_address(target), Type::STREAM, None)?;
        if let Some(source) = source {
            socket.bind(&source.into())?;
        }
        let (seen, ..) = act::greet(socket, target, PATIENCE)?;
        Ok(seen.map_or_else(|outcome| outcome, |seen| seen.by.unwrap_or_default()))
    })?
}
