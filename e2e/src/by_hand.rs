//! Parts to play with by hand.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::Value;
use sidestep_e2e::ApiServer;
use sidestep_lab::{interrupted, stop_on_signals, wait_until};

/// Longer than anyone plays.
const FOREVER: Duration = Duration::from_secs(7 * 24 * 3600);

/// Runs the API server until a signal comes.
pub fn apiserver(listen: SocketAddr, kubeconfig: &Path, load: Option<&Path>) -> Result<()> {
    stop_on_signals()?;
    let server = ApiServer::start(listen)?;
    server.write_kubeconfig(kubeconfig)?;
    for file in load.map(files).transpose()?.unwrap_or_default() {
        let text = fs::read_to_string(&file).with_context(|| format!("{}", file.display()))?;
        let objects: Vec<Value> = serde_saphyr::from_multiple(&text)
            .with_context(|| format!("{}: it is no YAML", file.display()))?;
        for object in objects {
            server.put(object).with_context(|| format!("{}", file.display()))?;
        }
    }
    println!("serving on http://{}; kubeconfig: {}", server.addr(), kubeconfig.display());
    let _ = wait_until("a signal", FOREVER, interrupted);
    Ok(())
}

/// The manifests of a directory, in the order of their names.
fn files(dir: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(dir).with_context(|| format!("reading {}", dir.display()))?;
    let mut files = entries
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<Result<Vec<PathBuf>, _>>()
        .with_context(|| format!("reading {}", dir.display()))?;
    files.retain(|file| {
        let extension = file.extension().and_then(|extension| extension.to_str());
        extension.is_some_and(|extension| ["yaml", "yml", "json"].contains(&extension))
    });
    files.sort();
    Ok(files)
}
