//! What the policy says about a connection, asked of the policy itself: bpf/policy.bpf.c runs the
//! headers that decide for the hooks, on maps of its own.

use std::{mem::MaybeUninit, net::IpAddr};

use anyhow::{Context, Result};
use libbpf_rs::{
    MapCore, MapFlags, ProgramInput,
    skel::{OpenSkel, Skel, SkelBuilder},
};

use super::{
    abi::{addr, as_bytes, direction, from_bytes, owner, question},
    skel::{
        names_of,
        policy::{PolicySkel, PolicySkelBuilder, types},
    },
    tables,
};
use crate::{mesh::desired::Desired, node::NetnsCookie};

/// IPPROTO_TCP and IPPROTO_UDP.
const PROTOCOLS: [u16; 2] = [6, 17];

/// What a connection, or a datagram, is about to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Call {
    /// A pod's process connects a TCP socket.
    Connect,
    /// A pod's process sends a datagram.
    Send,
    /// A TCP connection comes to the pod.
    Arrive,
}

/// A connection that the policy is asked about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Question {
    /// Cookie of the pod's network namespace.
    pub cookie: NetnsCookie,
    /// What happens.
    pub call: Call,
    /// The source; of a socket that is not bound, the unspecified address.
    pub source: IpAddr,
    /// The destination.
    pub destination: IpAddr,
    /// Its port. Of what arrives, 0: it is not known.
    pub port: u16,
    /// Who made the socket, as the pod's user namespace numbers users.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
    /// The index of the device that the socket is bound to, or that the connection comes by; 0:
    /// none.
    pub device: u32,
}

/// What the policy decides. The words are those of bpf/lib/reason.h, in small letters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decision {
    /// `direct`, `outbound`, `inbound`, `dns` or `nowhere`.
    pub verdict: String,
    /// Why.
    pub reason: String,
}

/// The policy, and the maps that it decides by.
pub struct Policy {
    skel: PolicySkel<'static>,
    verdicts: Vec<String>,
    reasons: Vec<String>,
}

/// An address in this object's type.
fn wire_of(ip: IpAddr) -> types::addr {
    types::addr { w: addr::from(ip).w }
}

impl Policy {
    /// With maps of its own, which hold what is desired.
    ///
    /// # Errors
    /// Where the kernel refuses.
    pub fn of(desired: &Desired) -> Result<Self> {
        // A skeleton borrows its object, which lasts as long as the process.
        let storage = Box::leak(Box::new(MaybeUninit::uninit()));
        let open = PolicySkelBuilder::default().open(storage)?;
        let skel = open.load().context("the kernel refused the policy's program")?;
        for (cookie, pod) in &desired.pods {
            for table in &tables::ALL {
                let Some(map) = skel.object().maps().find(|map| map.name() == table.name) else {
                    continue;
                };
                for (key, value) in (table.rows)(*cookie, pod)? {
                    map.update(&key, &value, MapFlags::ANY)?;
                }
            }
        }
        let verdicts = names_of(skel.object(), "verdict", "GO_")?;
        let reasons = names_of(skel.object(), "reason", "REASON_")?;
        Ok(Self { skel, verdicts, reasons })
    }

    /// Asks it.
    ///
    /// # Errors
    /// Where the kernel does not run the program.
    pub fn ask(&self, asked: &Question) -> Result<Decision> {
        let [tcp, udp] = PROTOCOLS;
        let (way, protocol) = match asked.call {
            Call::Connect => (direction::OUTBOUND, tcp),
            Call::Send => (direction::OUTBOUND, udp),
            Call::Arrive => (direction::INBOUND, tcp),
        };
        let question = question {
            netns: asked.cookie.0,
            src: wire_of(asked.source),
            dst: wire_of(asked.destination),
            port: asked.port,
            protocol,
            owner: owner { uid: asked.uid, gid: asked.gid },
            ifindex: asked.device,
            direction: way,
            ..question::default()
        };
        let mut answer = as_bytes(&question).to_vec();
        let input = ProgramInput {
            data_in: Some(as_bytes(&question)),
            data_out: Some(&mut answer),
            ..ProgramInput::default()
        };
        self.skel.progs.ask_policy.test_run(input).context("cannot run the policy's program")?;
        let decision = from_bytes::<question>(&answer)?.decision;
        let name = |names: &[String], index: u32| {
            names.get(index as usize).cloned().context("the policy's answer has no name")
        };
        Ok(Decision {
            verdict: name(&self.verdicts, decision.verdict.0)?,
            reason: name(&self.reasons, decision.reason.0)?,
        })
    }
}
