//! Commands on a node. It has a shell, coreutils, util-linux, iproute2 and procps.

use std::net::SocketAddr;
use std::str::FromStr as _;

use anyhow::{Context, Result, bail};
use sidestep_lab::Seen;

/// Where the agent answers `/readyz` and `/metrics` on its node.
pub const HTTP: &str = "127.0.0.1:9465";

/// A node, as a place for commands.
pub struct Shell {
    prefix: Vec<String>,
}

impl Shell {
    /// The arguments that get a command onto the node.
    pub fn new(prefix: &[&str]) -> Self {
        Self { prefix: prefix.iter().map(|arg| (*arg).to_owned()).collect() }
    }

    /// Runs a command on the node to its end, and gives what it wrote to stdout. Fails with what it
    /// wrote to both when its status is not 0.
    pub fn run(&self, argv: &[&str]) -> Result<String> {
        self.feed(argv, "")
    }

    /// The same, with this input.
    pub fn feed(&self, argv: &[&str], input: &str) -> Result<String> {
        let prefix = self.prefix.iter().map(String::as_str);
        sidestep_lab::feed(&prefix.chain(argv.iter().copied()).collect::<Vec<_>>(), input)
    }

    /// Runs a script of the shell.
    pub fn script(&self, script: &str, args: &[&str]) -> Result<String> {
        self.run(&[&["sh", "-c", script, "sh"], args].concat())
    }

    /// What is in a file.
    pub fn read(&self, path: &str) -> Result<String> {
        self.run(&["cat", path])
    }

    /// Writes a file, in place.
    pub fn write(&self, path: &str, text: &str) -> Result<()> {
        self.feed(&["sh", "-c", "cat >\"$1\"", "sh", path], text).map(drop)
    }

    /// Puts a new file in its place.
    pub fn replace(&self, path: &str, text: &str) -> Result<()> {
        let script = "cat >\"$1.new\" && mv \"$1.new\" \"$1\"";
        self.feed(&["sh", "-c", script, "sh", path], text).map(drop)
    }

    /// Whether something is there.
    pub fn exists(&self, path: &str) -> Result<bool> {
        let said = self.script("if [ -e \"$1\" ]; then echo yes; fi", &[path])?;
        Ok(!said.is_empty())
    }

    /// A process of the pod with this uid that has `e2e-pod` in its root directory.
    pub fn process(&self, uid: &str) -> Result<u32> {
        // By the cgroup's name, which the two drivers write each in its way.
        let script = "for file in $(grep -lE \"pod($1|$2)\" /proc/[0-9]*/cgroup 2>/dev/null); do \
                          dir=${file%/cgroup}; \
                          if [ -e \"$dir/root/e2e-pod\" ]; then echo \"${dir#/proc/}\"; exit; fi; \
                      done";
        let said = self.script(script, &[uid, &uid.replace('-', "_")])?;
        said.trim().parse().with_context(|| format!("no process of the pod with uid {uid}"))
    }

    /// A process of the pod with this uid that has this name.
    pub fn process_named(&self, uid: &str, name: &str) -> Result<u32> {
        let script = "for file in $(grep -lE \"pod($1|$2)\" /proc/[0-9]*/cgroup 2>/dev/null); do \
                          dir=${file%/cgroup}; \
                          if [ \"$(cat $dir/comm)\" = \"$3\" ]; then echo \"${dir#/proc/}\"; exit; fi; \
                      done";
        let said = self.script(script, &[uid, &uid.replace('-', "_"), name])?;
        said.trim().parse().with_context(|| format!("the pod with uid {uid} has no process {name}"))
    }

    /// Connects from inside a process' network namespace as `uid`, with the pod's own program, and
    /// gives what the server saw.
    pub fn ask(&self, process: u32, uid: u32, target: SocketAddr) -> Result<Seen> {
        let (pid, uid) = (process.to_string(), uid.to_string());
        let enter = ["nsenter", "-t", &pid, "--mount", "--net", "-S", &uid, "-G", &uid, "--"];
        self.once(&enter, target)
    }

    /// The same from the node itself. The process is one that has the program.
    pub fn ask_from_node(&self, process: u32, target: SocketAddr) -> Result<Seen> {
        self.once(&["nsenter", "-t", &process.to_string(), "--mount", "--"], target)
    }

    fn once(&self, enter: &[&str], target: SocketAddr) -> Result<Seen> {
        let target = target.to_string();
        let said = self.run(&[enter, &["/e2e-pod", "once", &target]].concat())?;
        let Some(line) = said.trim().strip_prefix("ok ") else { bail!("it said {said:?}") };
        Seen::from_str(line)
    }

    /// Asks the agent by HTTP: the status and the body.
    pub fn http(&self, path: &str) -> Result<(u16, String)> {
        // The one client that every node has.
        let script = "exec 3<>\"/dev/tcp/$1\" && \
                      printf 'GET %s HTTP/1.1\\r\\nHost: localhost\\r\\nConnection: close\\r\\n\\r\\n' \
                      \"$2\" >&3 && cat <&3";
        let address = HTTP.replace(':', "/");
        let text = self.run(&["timeout", "5", "bash", "-c", script, "bash", &address, path])?;
        let (head, body) = text.split_once("\r\n\r\n").context("no HTTP answer")?;
        let code = head.split(' ').nth(1).and_then(|code| code.parse().ok());
        Ok((code.with_context(|| format!("no HTTP status in {head:?}"))?, body.to_owned()))
    }
}

/// The text in a container's log as the runtime writes it: `TIME STREAM F TEXT`.
pub fn text_of(log: &str) -> String {
    let lines = log.lines().filter_map(|line| line.splitn(4, ' ').nth(3));
    lines.map(|line| format!("{line}\n")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn on_this_very_machine() -> Result<()> {
        let shell = Shell::new(&["env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin"]);
        let dir = tempfile::tempdir()?;
        let file = dir.path().join("a b").to_string_lossy().into_owned();
        assert!(!shell.exists(&file)?);
        shell.write(&file, "one\n")?;
        shell.replace(&file, "two $HOME\n")?;
        assert!(shell.exists(&file)?);
        assert_eq!(shell.read(&file)?, "two $HOME\n");
        let err = shell.script("echo no >&2; exit 3", &[]).expect_err("it fails").to_string();
        assert!(err.contains("3): no"), "{err}");
        // Nobody has this pod, and nobody listens there.
        assert!(shell.process("00000000-0000-0000-0000-000000000000").is_err());
        assert!(shell.http("/readyz").is_err());
        Ok(())
    }

    #[test]
    fn logs_without_what_the_runtime_adds() {
        let log = "2026-01-01T00:00:00Z stdout F ok by=app x\n2026-01-01T00:00:00Z stderr F no\n";
        assert_eq!(text_of(log), "ok by=app x\nno\n");
    }
}
