//! Logging.

use std::io::IsTerminal;

use clap::ValueEnum;
use tracing::warn;
use tracing_subscriber::EnvFilter;

use crate::dataplane;

/// Format of log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// Lines for people.
    Human,
    /// A JSON object per line.
    Json,
}

/// Targets that log each failed request without naming it: the agent logs these errors itself.
const NOISE: &str = "kube_client::client::builder=off";

/// Starts logging to standard error. `RUST_LOG` sets the level, `info` by default.
pub fn init(format: LogFormat) {
    let wanted = std::env::var("RUST_LOG").ok().filter(|text| !text.trim().is_empty());
    let wanted = wanted.as_deref().unwrap_or("info");
    // What comes later counts.
    let (filter, error) = match EnvFilter::try_new(format!("{NOISE},{wanted}")) {
        Ok(filter) => (filter, None),
        Err(error) => (EnvFilter::new(format!("{NOISE},info")), Some(error)),
    };
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match format {
        LogFormat::Human => {
            builder.with_target(false).with_ansi(std::io::stderr().is_terminal()).init();
        }
        LogFormat::Json => builder.json().flatten_event(true).init(),
    }
    if let Some(error) = error {
        warn!("RUST_LOG: {wanted:?}: {error}; the level is info");
    }
    dataplane::log_libbpf();
}
