//! What happens to the node while connections are open.

use std::sync::PoisonError;
use std::time::Duration;

use anyhow::{Context, Result};
use fastrand::Rng;
use serde_json::Value;
use sidestep_lab::{Agent, Pod, wait_until};

use crate::counter;
use crate::plan::PODS;
use crate::traffic::Traffic;

/// The annotation that keeps a pod's connections on TCP.
const OPT_OUT: &str = "sidestep.io/splice";

/// Resets get through: one that is lost is not sent again, over plain TCP neither, and the other
/// end would wait for ever.
const POLICY: &str = "table inet rules {
    chain in {
        type filter hook input priority 0
        iifname != \"lo\" meta l4proto tcp tcp flags & rst == 0 drop
    }
}";
/// `--splice-refresh`'s default.
const REFRESH: Duration = Duration::from_secs(1);
/// How long those that wait for each other may take to come to a stop, and how long nothing must
/// have been redirected by then.
const STOPS: Duration = Duration::from_secs(2);
const STILL: Duration = Duration::from_millis(300);

/// A random event.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Event {
    /// The agent is killed, and after a while there is another.
    Killed,
    /// The agent is told to end, and there is another at once.
    Restarted,
    /// The last pod's manifest goes, and comes again.
    PodLeft,
    /// The first pod opts out, and in again.
    OptedOut,
    /// A network policy drops what the pods send each other, and goes again.
    Forbidden,
}

impl Event {
    /// All events.
    pub const ALL: [Self; 5] =
        [Self::Killed, Self::PodLeft, Self::OptedOut, Self::Forbidden, Self::Restarted];

    /// The name of the event.
    pub fn name(self) -> &'static str {
        match self {
            Self::Killed => "the agent was killed",
            Self::Restarted => "the agent was restarted",
            Self::PodLeft => "a pod left and came back",
            Self::OptedOut => "a pod opted out and in",
            Self::Forbidden => "a policy stopped all",
        }
    }

    /// What happens in turn: all of it, from anywhere on.
    pub fn turns(rng: &mut Rng) -> impl Iterator<Item = Self> {
        Self::ALL.into_iter().cycle().skip(rng.usize(..Self::ALL.len()))
    }

    /// Makes the event happen.
    pub fn happen(
        self,
        agent: &mut Agent,
        pods: &[Pod],
        traffic: &Traffic,
        rng: &mut Rng,
    ) -> Result<()> {
        let pause = Duration::from_millis(rng.u64(100..1000));
        match self {
            Self::Killed => {
                agent.kill9();
                std::thread::sleep(pause);
                restart(agent)
            }
            Self::Restarted => restart(agent),
            Self::PodLeft => {
                let pod = &pods[PODS - 1];
                let _away = traffic.away.write().unwrap_or_else(PoisonError::into_inner);
                agent.remove_pod(pod)?;
                agent.wait_gone(pod)?;
                std::thread::sleep(pause);
                agent.add_pod(pod)?;
                agent.wait_enrolled(pod)
            }
            Self::OptedOut => {
                let pod = &pods[0];
                let mut manifest = pod.manifest();
                manifest["metadata"]["annotations"][OPT_OUT] = Value::from("disabled");
                agent.add_manifest(pod.name(), &manifest)?;
                std::thread::sleep(Duration::from_secs(1) + pause);
                agent.add_pod(pod)
            }
            Self::Forbidden => {
                pods.iter().try_for_each(|pod| pod.nft(POLICY).map(drop))?;
                let stopped = stops(agent);
                pods.iter().try_for_each(|pod| pod.nft("delete table inet rules").map(drop))?;
                stopped
            }
        }
        .with_context(|| format!("{self:?}; {}", agent.log_tail()))
    }
}

/// What is spliced stops as well, once each direction's next message has gone by TCP: within a
/// second by `--splice-refresh`'s default.
fn stops(agent: &Agent) -> Result<()> {
    let redirected = || agent.status().map(|status| counter(&status, "splice_messages"));
    let mut before = redirected()?;
    wait_until("what is spliced to stop", REFRESH + STOPS, || {
        std::thread::sleep(STILL);
        let now = redirected().unwrap_or(before + 1);
        std::mem::replace(&mut before, now) == now
    })
}

fn restart(agent: &mut Agent) -> Result<()> {
    let begun = |agent: &Agent| agent.log().matches("in force").count();
    let before = begun(agent);
    agent.restart()?;
    wait_until("the new agent", Duration::from_secs(20), || begun(agent) > before)
}
