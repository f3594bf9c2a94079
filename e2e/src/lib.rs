//! For tests of Sidestep's Kubernetes mode: a node of a kind cluster and the agent on it, and a
//! real API server without a cluster.
#![forbid(unsafe_code)]

pub mod agent;
pub mod envtest;
pub mod image;
pub mod kind;
pub mod mesh;
pub mod node;
pub mod shell;
pub mod usage;
pub mod web;

pub use agent::Agent;
pub use envtest::Envtest;
pub use node::Node;
