//! Packets between the nodes that carry HTTP in plain text, counted by tcpdump.

use std::fs::File;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use sidestep_lab::wait_until;

use super::space::PORT;
use super::{Cluster, Space};

/// A count that runs. Where it is not ended by [`Capture::end`], dropping it ends it.
pub struct Capture {
    child: Child,
    seen: PathBuf,
    said: PathBuf,
    _dir: tempfile::TempDir,
}

impl Capture {
    /// Begins to count on the bridge that all nodes' uplinks are at: packets of TCP, of apps' port
    /// or to it, whose first bytes are a request's or an answer's in plain text.
    pub fn start(cluster: &Cluster) -> Result<Self> {
        let format = "{{slice .Id 0 12}}";
        let id = cluster.here(&["docker", "network", "inspect", "kind", "--format", format])?;
        let bridge = format!("br-{}", id.trim());
        // The offset of TCP's data, in IPv4 and in IPv6, where tcpdump knows no `tcp[]`.
        let (v4, v6) = ("((tcp[12]&0xf0)>>2)", "(40+((ip6[52]&0xf0)>>2))");
        let words = ["0x47455420", "0x48545450"]; // "GET ", "HTTP"
        let filter = words.map(|word| {
            format!(
                "(ip and tcp port {PORT} and tcp[{v4}:4]={word}) or \
                 (ip6 and ip6[6]=6 and (ip6[40:2]={PORT} or ip6[42:2]={PORT}) and \
                 ip6[{v6}:4]={word})"
            )
        });
        let dir = tempfile::tempdir().context("making a directory")?;
        let (seen, said) = (dir.path().join("seen"), dir.path().join("said"));
        let file = |path: &PathBuf| File::create(path).context("making a file");
        let child = Command::new("tcpdump")
            .args(["-i", &bridge, "-n", "-l", "--immediate-mode", &filter.join(" or ")])
            .stdin(Stdio::null())
            .stdout(file(&seen)?)
            .stderr(file(&said)?)
            .spawn()
            .context("running tcpdump")?;
        let mut capture = Self { child, seen, said, _dir: dir };
        let listens = wait_until("tcpdump to listen", cluster.patience(), || {
            capture.said().contains("listening on")
        });
        listens.with_context(|| capture.said())?;
        ensure!(capture.child.try_wait()?.is_none(), "tcpdump has ended: {}", capture.said());
        Ok(capture)
    }

    fn said(&self) -> String {
        std::fs::read_to_string(&self.said).unwrap_or_default()
    }

    /// The packets so far, a line for each.
    pub fn packets(&self) -> Result<Vec<String>> {
        let text = std::fs::read_to_string(&self.seen).context("reading what tcpdump wrote")?;
        // It ends with an empty line.
        Ok(text.lines().filter(|line| !line.is_empty()).map(str::to_owned).collect())
    }

    /// Ends the count, and gives the packets. Fails where the kernel had no room for some.
    pub fn end(mut self) -> Result<Vec<String>> {
        self.stop()?;
        let said = self.said();
        ensure!(said.contains("\n0 packets dropped by kernel"), "tcpdump said {said}");
        self.packets()
    }

    fn stop(&mut self) -> Result<()> {
        let pid = i32::try_from(self.child.id()).context("a process id")?;
        kill(Pid::from_raw(pid), Signal::SIGINT).context("ending tcpdump")?;
        self.child.wait().context("waiting for tcpdump").map(drop)
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = self.stop();
        }
    }
}

/// Fails unless a pod whose mesh is passed is counted: so a count of none says something.
pub fn ensure_counts(space: &Space<'_>, client: &str, url: &str) -> Result<()> {
    let cluster = space.cluster();
    let key = cluster.mesh.exclude_outbound();
    let capture = Capture::start(cluster)?;
    space.kubectl(&["annotate", "pod", client, &format!("{key}=80")])?;
    space.get_until(client, url, "its sidecar to be passed", |answered| answered.is_plain())?;
    let counted = cluster.soon("packets in plain text to be counted", || {
        ensure!(!capture.packets()?.is_empty(), "none is");
        Ok(())
    });
    space.kubectl(&["annotate", "pod", client, &format!("{key}-")])?;
    counted?;
    space.get_known(client, url)?;
    capture.end().map(drop)
}
