//! A whole node for scenarios of Sidestep's Kubernetes mode: a small API server, a small kubelet,
//! real containerd, runc and CNI.
#![forbid(unsafe_code)]

pub mod apiserver;
pub mod cri;
pub mod kubelet;
pub mod lab;
pub mod usage;

pub use apiserver::ApiServer;
