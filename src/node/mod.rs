//! The machine: network namespaces, what they hold, and the cgroup that the hooks are attached to.
//! Knows of no mesh, and asks the kernel by system calls, netlink and procfs alone.

pub mod cgroup;
mod facts;
pub mod lo;
mod netfilter;
mod netns;
mod nlmsg;
pub mod pod_netns;
pub mod ruleset;
mod sandbox;
pub mod udp;

pub use cgroup::Cgroup;
pub use facts::{ADDRESSES, NetnsFacts, own_addresses};
pub use lo::Lo;
pub use netfilter::{Nat, nat};
pub use netns::{ANY, LO, LOCALHOST, Netns, NetnsCookie, host_cookies, in_new};
pub use pod_netns::{PodNamespaces, PodNetns};
pub use sandbox::Sandbox;
pub use udp::ConnectedUdp;
