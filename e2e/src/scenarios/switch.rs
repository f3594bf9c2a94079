//! The mesh goes from its own iptables rules to Sidestep and back, by the commands of
//! docs/install.md.

use std::fs;

use anyhow::{Context, Result, ensure};
use serde_json::json;
use sidestep_e2e::mesh::{Cluster, Space, is_identity};

use super::{MeshRow, Of};

pub const SCENARIOS: &[MeshRow] = &[(
    "mesh-switch",
    "from the mesh's own iptables to Sidestep and back, as docs/install.md says",
    Of::Istio,
    switch,
)];

const DOC: &str = "docs/install.md";
/// The lines before the commands.
const TO_SIDESTEP: &str = "To move a running Istio from its own iptables rules to Sidestep:";
const TO_IPTABLES: &str = "And back:";

fn switch(cluster: &Cluster) -> Result<()> {
    let space = cluster.space("mesh-switch")?;
    space.service("server")?;
    space.deployment("server", 1, &["http", "0.0.0.0:8080"], json!({}))?;
    space.deployment("client", 1, &["pause"], json!({}))?;
    intercepted(&space, true)?;
    let back = follow(&space, TO_IPTABLES).and_then(|()| intercepted(&space, false));
    // Also when that failed: others want the mesh as it was.
    follow(&space, TO_SIDESTEP)?;
    back?;
    intercepted(&space, true)
}

/// Runs the commands below a line of the document.
fn follow(space: &Space<'_>, line: &str) -> Result<()> {
    let text = fs::read_to_string(DOC).with_context(|| format!("reading {DOC}"))?;
    let commands = commands(&text, line);
    ensure!(!commands.is_empty(), "{DOC} has no commands below {line:?}");
    let cluster = space.cluster();
    let chart = cluster.mesh.istio().context("this is for Istio")?.chart("istiod")?;
    for command in commands {
        let mut argv = Vec::new();
        for word in command.split_whitespace() {
            match word {
                "istio/istiod" => argv.extend(chart.iter().map(String::as_str)),
                "NAMESPACE" => argv.push(space.name()),
                word => argv.push(word),
            }
        }
        cluster.here(&argv)?;
    }
    for deployment in ["server", "client"] {
        cluster.rolled_out(space.name(), deployment)?;
    }
    Ok(())
}

/// The commands of the first indented block below a line.
fn commands<'t>(text: &'t str, line: &str) -> Vec<&'t str> {
    let below = text.lines().skip_while(|one| *one != line).skip(1);
    let block = below.skip_while(|one| one.is_empty());
    block.map_while(|one| one.strip_prefix("    ")).collect()
}

/// The pods are in the mesh, by Sidestep or else by the mesh's own rules.
fn intercepted(space: &Space<'_>, by_sidestep: bool) -> Result<()> {
    let cluster = space.cluster();
    let wanted = if by_sidestep { cluster.mesh.validator() } else { cluster.mesh.init() };
    let mut pods = Vec::new();
    for app in ["server", "client"] {
        cluster.rolled_out(space.name(), app)?;
        let pod = cluster.soon(&format!("{app} to have {wanted}"), || {
            let pod = space.pod_of(app)?;
            let inits = space.get_pod(&pod)?["spec"]["initContainers"].to_string();
            ensure!(inits.contains(wanted), "{pod}'s init containers: {inits}");
            Ok(pod)
        })?;
        space.wait_ready(&pod)?;
        space.wait_enrolled(&pod, by_sidestep)?;
        pods.push(pod);
    }
    space.get_until(&pods[1], "http://server/", "the server to know the client", |answered| {
        answered.client().is_some_and(|id| is_identity(id, "client"))
    })?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_commands_are_there() {
        let text = include_str!("../../../docs/install.md");
        for line in [TO_SIDESTEP, TO_IPTABLES] {
            let commands = commands(text, line);
            assert!(commands.len() == 2 && commands[0].starts_with("helm "), "{commands:?}");
        }
        assert_eq!(commands("a\n\nb:\n\n    c d\n    e\nf\n    g\n", "b:"), ["c d", "e"]);
    }
}
