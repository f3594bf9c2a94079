//! A server's process, which does not outlive this one.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result};
use nix::sys::signal::{self, Signal};
use nix::unistd::Pid;

/// Runs a program until its own stdin ends, which it does when this process is gone in whatever
/// way, and removes the directory `$1` then, if there is one. Whoever else writes there is about
/// to be killed as well.
const KEEPER: &str = r#"
dir=$1
shift
"$@" >&2 &
echo $!
exec >/dev/null
cat
kill -9 $!
wait
[ -z "$dir" ] || until rm -rf "$dir"; do sleep 0.1; done
"#;

/// A process, with a shell that keeps it. On drop both end.
pub struct Part {
    name: String,
    pid: Pid,
    keeper: Child,
    log: PathBuf,
}

impl Part {
    /// Starts a program, in a network namespace if one is given, with its log in `dir`. `remove`
    /// goes with it.
    pub fn start(
        program: &Path,
        flags: &[(&str, &str)],
        netns: Option<&Path>,
        dir: &Path,
        remove: Option<&Path>,
    ) -> Result<Self> {
        let name = program.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let log = dir.join(format!("{name}.log"));
        let file = File::options().create(true).append(true).open(&log);
        let mut command = match netns {
            Some(path) => {
                let mut command = Command::new("nsenter");
                command.arg(format!("--net={}", path.display())).args(["--", "sh"]);
                command
            }
            None => Command::new("sh"),
        };
        command
            .args(["-c", KEEPER, "sh"])
            .arg(remove.unwrap_or(Path::new("")))
            .arg(program)
            .args(flags.iter().map(|(flag, value)| format!("--{flag}={value}")))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(file.with_context(|| format!("opening {}", log.display()))?)
            // A Ctrl-C at the terminal is not for it.
            .process_group(0);
        let mut keeper = command.spawn().with_context(|| format!("starting {name}"))?;
        let mut line = String::new();
        let stdout = keeper.stdout.take().context("a pipe")?;
        BufReader::new(stdout).read_line(&mut line).context("reading a process id")?;
        let pid = line.trim().parse().with_context(|| format!("starting {name}: {line:?}"))?;
        Ok(Self { name, pid: Pid::from_raw(pid), keeper, log })
    }

    /// Whether it has not ended yet. Its keeper does not wait for it before its own end.
    pub fn is_running(&mut self) -> bool {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid)).unwrap_or_default();
        stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with('Z'))
    }

    /// Its number.
    pub fn pid(&self) -> u32 {
        self.pid.as_raw().unsigned_abs()
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        signal::kill(self.pid, signal).with_context(|| format!("sending {signal} to {}", self.name))
    }

    /// The end of what it has written.
    pub fn log_tail(&self) -> String {
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        let tail = &lines[lines.len().saturating_sub(15)..];
        format!("{} said:\n  {}", self.name, tail.join("\n  "))
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        // Its stdin ends.
        drop(self.keeper.stdin.take());
        let _ = self.keeper.wait();
    }
}
