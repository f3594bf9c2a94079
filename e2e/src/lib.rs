//! A whole node for scenarios of Sidestep's Kubernetes mode: a small API server, a small kubelet,
//! real containerd, runc and CNI.
#![forbid(unsafe_code)]

pub mod agent;
pub mod apiserver;
pub mod cri;
pub mod kind;
pub mod kubelet;
pub mod lab;
pub mod node;
pub mod shell;
pub mod usage;

pub use agent::Agent;
pub use apiserver::ApiServer;
pub use node::Node;
