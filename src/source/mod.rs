//! Where pods come from.

pub mod manifests;
