//! What people and monitoring see of the agent and its maps.

pub mod check;
pub mod http;
pub mod metrics;
pub mod status;
pub mod telemetry;
