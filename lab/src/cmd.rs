//! Running short commands such as `ip`.

use std::io::Write as _;
use std::process::{Command, Stdio};
use std::thread;

use anyhow::{Context, Result, bail};

/// Runs a command to its end with `input` as stdin and gives its stdout.
/// Fails with what it wrote when it cannot be run or its exit status is not 0.
pub fn feed<S: AsRef<str>>(argv: &[S], input: &str) -> Result<String> {
    let argv: Vec<&str> = argv.iter().map(AsRef::as_ref).collect();
    let line = argv.join(" ");
    let (program, args) = argv.split_first().context("an empty command")?;
    let mut child = Command::new(program)
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("running `{line}`"))?;
    let stdin = child.stdin.take();
    let out = thread::scope(|scope| {
        // It may write before it has read all. One that fails early closes its stdin: its own words
        // say more than EPIPE.
        scope.spawn(move || stdin.map(|mut stdin| stdin.write_all(input.as_bytes())));
        child.wait_with_output()
    });
    let out = out.with_context(|| format!("running `{line}`"))?;
    let said = String::from_utf8_lossy(&out.stdout);
    if !out.status.success() {
        let words = format!("{said}{}", String::from_utf8_lossy(&out.stderr));
        bail!("`{line}` failed ({}): {}", out.status, words.trim());
    }
    Ok(said.into_owned())
}

/// Like [`feed`] with nothing on stdin.
pub(crate) fn run(argv: &[&str]) -> Result<String> {
    feed(argv, "")
}
