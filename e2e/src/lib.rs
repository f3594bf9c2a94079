//! Parts for whole-node scenarios of Sidestep's Kubernetes mode: a small API server.
#![forbid(unsafe_code)]

pub mod apiserver;

pub use apiserver::ApiServer;
