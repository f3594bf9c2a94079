//! For scenarios of Sidestep's Kubernetes mode: a node of a kind cluster, and the agent on it.
#![forbid(unsafe_code)]

pub mod agent;
pub mod apiserver;
pub mod image;
pub mod kind;
pub mod mesh;
pub mod node;
pub mod shell;
pub mod usage;
pub mod web;

pub use agent::Agent;
pub use apiserver::ApiServer;
pub use node::Node;
