//! Running short commands such as `ip`.

use std::io::Write as _;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

/// Runs a command to its end with `input` as stdin and gives its stdout.
/// Fails with its stderr when it can't be run or its exit status is not 0.
pub(crate) fn feed(argv: &[&str], input: &str) -> Result<String> {
    let line = argv.join(" ");
    let (program, args) = argv.split_first().context("an empty command")?;
    let mut child = Command::new(program)
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("running `{line}`"))?;
    if let Some(mut stdin) = child.stdin.take() {
        // A command that fails early closes its stdin: its own words say more than EPIPE.
        let _ = stdin.write_all(input.as_bytes());
    }
    let out = child.wait_with_output().with_context(|| format!("running `{line}`"))?;
    if !out.status.success() {
        let said = String::from_utf8_lossy(&out.stderr);
        bail!("`{line}` failed ({}): {}", out.status, said.trim());
    }
    Ok(String::from_utf8_lossy(&out.stdout).into_owned())
}

/// Like [`feed`] with nothing on stdin.
pub(crate) fn run(argv: &[&str]) -> Result<String> {
    feed(argv, "")
}
