//! Sidestep moves a service mesh's traffic interception from iptables to eBPF at the socket layer.
//! Data flows one way: facts -> desired -> diff -> maps. ARCHITECTURE.md has the map of the code.

pub mod agent;
pub mod cli;
pub mod cni;
pub mod controller;
pub mod dataplane;
pub mod files;
#[cfg(test)]
mod imports;
pub mod mesh;
pub mod node;
pub mod ops;
pub mod pace;
pub mod problem;
pub mod service;
pub mod source;
pub mod splice;
pub mod text;
pub mod watches;
