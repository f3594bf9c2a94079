//! Asks the policy about a connection: bpf/policy.bpf.c runs the headers that decide for the hooks,
//! on maps of its own.

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

/// The protocol numbers IPPROTO_TCP and IPPROTO_UDP.
const PROTOCOLS: [u16; 2] = [6, 17];

/// The call that a connection or a datagram begins with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Call {
    /// A pod's process connects a TCP socket.
    Connect,
    /// A pod's process sends a datagram.
    Send,
    /// A TCP connection comes to the pod.
    Arrive,
}

/// A question to the policy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Question {
    /// The cookie of the pod's network namespace.
    pub cookie: NetnsCookie,
    /// The call.
    pub call: Call,
    /// The source; for a socket that is not bound, the unspecified address.
    pub source: IpAddr,
    /// The destination.
    pub destination: IpAddr,
    /// The destination's port, or 0 if it is unknown for an arriving connection.
    pub port: u16,
    /// The user who made the socket, numbered as in the pod's user namespace.
    pub uid: u32,
    /// The group that made the socket.
    pub gid: u32,
    /// The index of the device that the socket is bound to or the connection arrives at; 0 for
    /// none.
    pub device: u32,
}

/// The policy's decision, in the words of bpf/lib/reason.h in lower case.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decision {
    /// The verdict: `direct`, `outbound`, `inbound`, `dns` or `nowhere`.
    pub verdict: String,
    /// The reason.
    pub reason: String,
}

/// The policy, and the maps that it uses.
pub struct Policy {
    skel: PolicySkel<'static>,
    verdicts: Vec<String>,
    reasons: Vec<String>,
}

/// Converts an address to this object's type.
fn wire_of(ip: IpAddr) -> types::addr {
    types::addr { w: addr::from(ip).w }
}

impl Policy {
    /// Loads the policy with maps of its own, which hold the desired contents.
    ///
    /// # Errors
    /// If the kernel refuses.
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

    /// Runs the program on a question.
    ///
    /// # Errors
    /// If the kernel does not run the program.
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
