//! The plugin's side: the container runtime starts it for each sandbox. CNI 1.1 and earlier,
//! <https://www.cni.dev/docs/spec/>. It is chained: its result is that of the plugins before it.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{BufRead, BufReader, Read, Write},
    os::unix::net::UnixStream,
    path::Path,
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use serde::Serialize;
use serde_json::{Value, json};

use super::{OnAgentAway, Reply, Request, Settings, VERSIONS};
use crate::node::Sandbox;

/// The pause between two attempts to reach the agent.
const PAUSE: Duration = Duration::from_millis(200);
/// The time limit for the agent where its answer changes nothing.
const COURTESY: Duration = Duration::from_secs(2);

/// The specification's error codes.
mod code {
    pub const VERSION: u32 = 1;
    pub const ENVIRONMENT: u32 = 4;
    pub const IO: u32 = 5;
    pub const DECODING: u32 = 6;
    pub const CONFIG: u32 = 7;
    pub const TRY_AGAIN: u32 = 11;
    /// The first code that a plugin may define: the pod cannot be enrolled.
    pub const REFUSED: u32 = 100;
}

/// An error in the runtime's format.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct CniError {
    cni_version: String,
    code: u32,
    msg: String,
}

/// The plugin's input: its environment and its configuration.
#[derive(Debug, Clone, Default)]
pub struct Call {
    /// The variables `CNI_*`.
    pub environment: BTreeMap<String, String>,
    /// The configuration from standard input.
    pub input: String,
}

/// Runs as the plugin: reads the environment and standard input, answers on standard output.
pub fn main() -> ExitCode {
    let mut input = String::new();
    let read = std::io::stdin().take(4 << 20).read_to_string(&mut input);
    let environment = std::env::vars_os()
        .filter_map(|(key, value)| Some((key.into_string().ok()?, value.into_string().ok()?)))
        .filter(|(key, _)| key.starts_with("CNI_"))
        .collect();
    let answer = match read {
        Ok(_) => run(&Call { environment, input }),
        Err(error) => Err(CniError {
            cni_version: VERSIONS[0].into(),
            code: code::IO,
            msg: format!("cannot read the configuration from standard input: {error}"),
        }),
    };
    let (text, code) = match &answer {
        Ok(text) => (text.clone(), ExitCode::SUCCESS),
        Err(error) => (serde_json::to_string(error).unwrap_or_default(), ExitCode::FAILURE),
    };
    match std::io::stdout().write_all(text.as_bytes()) {
        Ok(()) => code,
        Err(_) => ExitCode::FAILURE,
    }
}

/// Executes the call, and returns the text for standard output.
///
/// # Errors
/// The error, in the specification's terms.
pub fn run(call: &Call) -> Result<String, CniError> {
    let variable = |name: &str| call.environment.get(name).map_or("", String::as_str);
    let command = variable("CNI_COMMAND");
    // A sandbox that cannot be removed would stay for ever.
    if matches!(command, "DEL" | "GC") {
        if let Err(error) = take_away(command, call) {
            eprintln!("{}: {command}: {error:#}", super::PLUGIN);
        }
        return Ok(String::new());
    }
    let mut version = VERSIONS[0].to_owned();
    let fail =
        |version: &str, code, msg: String| CniError { cni_version: version.into(), code, msg };
    if command == "VERSION" && call.input.trim().is_empty() {
        return Ok(versions("1.1.0"));
    }
    if command.is_empty() {
        let msg = "CNI_COMMAND is not set: this program is a CNI plugin, which container runtimes \
                   start";
        return Err(fail(&version, code::ENVIRONMENT, msg.into()));
    }
    let config: Value = serde_json::from_str(&call.input).map_err(|error| {
        fail(&version, code::DECODING, format!("the configuration is not valid JSON: {error}"))
    })?;
    if !config.is_object() {
        let msg = "the configuration is not a JSON object";
        return Err(fail(&version, code::DECODING, msg.into()));
    }
    if let Some(named) = config["cniVersion"].as_str().filter(|named| !named.is_empty()) {
        version = named.to_owned();
    }
    match command {
        "VERSION" => return Ok(versions(&version)),
        // An agent that is away for a moment must not make the whole node unready.
        "STATUS" => return Ok(String::new()),
        "ADD" | "CHECK" => {}
        other => {
            let msg =
                format!("CNI_COMMAND: {other:?}: expected ADD, DEL, CHECK, GC, STATUS or VERSION");
            return Err(fail(&version, code::ENVIRONMENT, msg));
        }
    }
    if !VERSIONS.contains(&version.as_str()) {
        let msg = format!("cniVersion: {version:?}: expected one of {}", VERSIONS.join(", "));
        return Err(fail(&version, code::VERSION, msg));
    }
    let settings: Settings = serde_json::from_value(config.clone())
        .map_err(|error| fail(&version, code::CONFIG, format!("invalid configuration: {error}")))?;
    let result = &config["prevResult"];
    if !result.is_object() {
        let msg = "prevResult is missing: this plugin makes no network of its own, so it must come \
                   last in a chain";
        return Err(fail(&version, code::CONFIG, msg.into()));
    }
    let passed = if command == "ADD" { result.to_string() } else { String::new() };
    for name in ["CNI_CONTAINERID", "CNI_NETNS"] {
        if variable(name).is_empty() {
            return Err(fail(&version, code::ENVIRONMENT, format!("{name} is not set")));
        }
    }
    let Some(sandbox) = sandbox(call) else {
        // Not called by Kubernetes: somebody tries the network by hand.
        return Ok(passed);
    };
    let excluded = settings.exclude_namespaces.contains(&sandbox.namespace);
    let request = if command == "ADD" { Request::Add(sandbox) } else { Request::Check(sandbox) };
    if excluded {
        let _ = ask(&settings.socket, &request, COURTESY);
        return Ok(passed);
    }
    match insist(&settings, &request) {
        Reply { error: None, .. } => Ok(passed),
        Reply { retry: true, .. } if settings.on_agent_away == OnAgentAway::Allow => Ok(passed),
        Reply { error: Some(msg), retry: true, .. } => Err(fail(&version, code::TRY_AGAIN, msg)),
        Reply { error: Some(msg), retry: false, .. } => Err(fail(&version, code::REFUSED, msg)),
    }
}

fn versions(version: &str) -> String {
    json!({ "cniVersion": version, "supportedVersions": VERSIONS }).to_string()
}

/// The sandbox that the call concerns; `None` if it names no pod.
fn sandbox(call: &Call) -> Option<Sandbox> {
    let variable = |name: &str| call.environment.get(name).cloned();
    let text = variable("CNI_ARGS")?;
    let args: BTreeMap<&str, &str> =
        text.split(';').filter_map(|pair| pair.split_once('=')).collect();
    let arg = |name: &str| args.get(name).filter(|value| !value.is_empty());
    Some(Sandbox {
        container: variable("CNI_CONTAINERID")?,
        netns: variable("CNI_NETNS")?.into(),
        namespace: (*arg("K8S_POD_NAMESPACE")?).into(),
        pod: (*arg("K8S_POD_NAME")?).into(),
        uid: arg("K8S_POD_UID").map(|uid| (*uid).into()),
    })
}

/// Tells the agent that sandboxes are gone.
fn take_away(command: &str, call: &Call) -> Result<()> {
    let config: Value =
        serde_json::from_str(&call.input).context("the configuration is not valid JSON")?;
    let settings: Settings = serde_json::from_value(config.clone())?;
    let request = if command == "DEL" {
        let container = call.environment.get("CNI_CONTAINERID").cloned();
        Request::Del { container: container.context("CNI_CONTAINERID is not set")? }
    } else {
        let valid = config["cni.dev/valid-attachments"].as_array();
        let valid = valid.context("cni.dev/valid-attachments is missing")?;
        let ids = valid.iter().filter_map(|attachment| attachment["containerID"].as_str());
        Request::Gc { containers: ids.map(str::to_owned).collect::<BTreeSet<_>>() }
    };
    let reply = ask(&settings.socket, &request, COURTESY)?;
    reply.error.map_or(Ok(()), |error| Err(anyhow::anyhow!(error)))
}

/// Repeats the request until there is an answer, or the time is up.
fn insist(settings: &Settings, request: &Request) -> Reply {
    let limit = Duration::from_secs(settings.timeout_seconds);
    let start = Instant::now();
    loop {
        let left = limit.saturating_sub(start.elapsed()).max(PAUSE);
        let reply = ask(&settings.socket, request, left).unwrap_or_else(|error| {
            Reply::refusal(format!("the agent does not answer: {error:#}"), true)
        });
        if !(reply.retry && reply.error.is_some()) {
            return reply;
        }
        if start.elapsed() + PAUSE >= limit {
            let error = reply.error.unwrap_or_default();
            let seconds = settings.timeout_seconds;
            return Reply::refusal(format!("{error} (after {seconds} seconds)"), true);
        }
        thread::sleep(PAUSE);
    }
}

/// Sends the request once.
///
/// # Errors
/// If nobody listens on the socket, or the answer does not arrive in time or cannot be read.
pub fn ask(socket: &Path, request: &Request, limit: Duration) -> Result<Reply> {
    let mut stream = UnixStream::connect(socket)
        .with_context(|| format!("cannot connect to {}", socket.display()))?;
    stream.set_read_timeout(Some(limit))?;
    stream.set_write_timeout(Some(limit))?;
    let mut line = serde_json::to_vec(request)?;
    line.push(b'\n');
    stream.write_all(&line)?;
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer).context("no answer in time")?;
    serde_json::from_str(&answer).with_context(|| format!("cannot parse the answer {answer:?}"))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    const RESULT: &str = r#"{"cniVersion":"1.0.0","interfaces":[{"name":"eth0"}],"ips":[]}"#;

    fn call(command: &str, input: &str) -> Call {
        let environment = [
            ("CNI_COMMAND", command),
            ("CNI_CONTAINERID", "abc"),
            ("CNI_NETNS", "/var/run/netns/x"),
            ("CNI_IFNAME", "eth0"),
            ("CNI_ARGS", "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=cart;K8S_POD_UID=u1"),
        ];
        let own = |(key, value): (&str, &str)| (key.to_owned(), value.to_owned());
        Call { environment: environment.map(own).into(), input: input.into() }
    }

    fn config(socket: &Path, more: &str) -> String {
        let socket = socket.display();
        format!(
            r#"{{"cniVersion":"1.0.0","name":"n","type":"sidestep-cni","socket":"{socket}",{more}
            "timeoutSeconds":0,"prevResult":{RESULT}}}"#
        )
    }

    /// An agent that answers each request with the next reply, and hands the requests back.
    fn agent(replies: Vec<Reply>) -> (tempfile::TempDir, thread::JoinHandle<Vec<Request>>) {
        let dir = tempfile::tempdir().expect("directory");
        let listener = UnixListener::bind(dir.path().join("s")).expect("bound");
        let thread = thread::spawn(move || {
            let answer = |reply: Reply| {
                let (stream, _) = listener.accept().expect("accepted");
                let mut line = String::new();
                BufReader::new(&stream).read_line(&mut line).expect("a line");
                let text = serde_json::to_string(&reply).expect("text") + "\n";
                (&stream).write_all(text.as_bytes()).expect("written");
                serde_json::from_str(&line).expect("a request")
            };
            replies.into_iter().map(answer).collect()
        });
        (dir, thread)
    }

    fn refusal(text: &str, retry: bool) -> Reply {
        Reply::refusal(text.into(), retry)
    }

    #[test]
    fn add_hands_the_result_on_when_the_agent_agrees() {
        let (dir, agent) = agent(vec![Reply::default()]);
        let input = config(&dir.path().join("s"), "");
        let result = run(&call("ADD", &input)).expect("added");
        let expected: Value = serde_json::from_str(RESULT).expect("json");
        assert_eq!(serde_json::from_str::<Value>(&result).expect("json"), expected);
        let sandbox = Sandbox {
            container: "abc".into(),
            netns: "/var/run/netns/x".into(),
            namespace: "shop".into(),
            pod: "cart".into(),
            uid: Some("u1".into()),
        };
        assert_eq!(agent.join().expect("asked"), [Request::Add(sandbox)]);
    }

    #[test]
    fn add_tells_the_agents_reason_and_whether_to_try_again() {
        for (retry, code) in [(false, code::REFUSED), (true, code::TRY_AGAIN)] {
            let (dir, _agent) = agent(vec![refusal("pod shop/cart: because", retry)]);
            let error = run(&call("ADD", &config(&dir.path().join("s"), ""))).expect_err("refused");
            assert_eq!((error.code, error.cni_version.as_str()), (code, "1.0.0"));
            assert!(error.msg.contains("shop/cart: because"), "{error:?}");
        }
    }

    #[test]
    fn a_pod_waits_for_an_agent_that_is_not_ready() {
        let (dir, agent) = agent(vec![refusal("not yet", true), Reply::default()]);
        let input = config(&dir.path().join("s"), "").replace("Seconds\":0", "Seconds\":20");
        run(&call("ADD", &input)).expect("added");
        assert_eq!(agent.join().expect("asked").len(), 2);
    }

    #[test]
    fn f6_no_agent_refuses_unless_told_otherwise() {
        let socket = Path::new("/nonexistent/s");
        let error = run(&call("ADD", &config(socket, ""))).expect_err("refused");
        assert_eq!(error.code, code::TRY_AGAIN);
        assert!(error.msg.contains("/nonexistent/s"), "{error:?}");
        run(&call("ADD", &config(socket, r#""onAgentAway":"allow","#))).expect("allowed");
        let excluded = r#""excludeNamespaces":["kube-system","shop"],"#;
        run(&call("ADD", &config(socket, excluded))).expect("excluded");
    }

    /// F3: the agent chains the plugin into configurations of these versions.
    #[test]
    fn f3_every_version_that_a_runtime_may_use_is_taken() {
        let socket = Path::new("/nonexistent/s");
        let with = |version: Option<&str>| {
            let version = version.map(|version| format!(r#""cniVersion":"{version}","#));
            let version = version.unwrap_or_default();
            let allow = config(socket, r#""onAgentAway":"allow","#);
            allow.replacen(r#""cniVersion":"1.0.0","#, &version, 1)
        };
        for version in VERSIONS.into_iter().map(Some).chain([None, Some("")]) {
            let result = run(&call("ADD", &with(version))).expect("added");
            assert!(result.contains("eth0"), "{result}");
        }
        let error = run(&call("ADD", &with(Some("0.5.0")))).expect_err("refused");
        assert!(error.msg.contains("0.5.0") && error.msg.contains("0.2.0"), "{error:?}");
    }

    #[test]
    fn what_is_no_pod_passes() {
        let mut call = call("ADD", &config(Path::new("/nonexistent/s"), ""));
        call.environment.remove("CNI_ARGS");
        run(&call).expect("passed");
    }

    #[test]
    fn del_and_gc_never_fail() {
        for command in ["DEL", "GC"] {
            for input in ["", "no json", &config(Path::new("/nonexistent/s"), "")] {
                assert_eq!(run(&call(command, input)), Ok(String::new()), "{command} {input}");
            }
        }
        let (dir, agent) = agent(vec![Reply::default(), Reply::default()]);
        let more = r#""cni.dev/valid-attachments":[{"containerID":"a","ifname":"eth0"}],"#;
        for command in ["DEL", "GC"] {
            run(&call(command, &config(&dir.path().join("s"), more))).expect("done");
        }
        let (del, gc) = (
            Request::Del { container: "abc".into() },
            Request::Gc { containers: ["a".to_owned()].into() },
        );
        assert_eq!(agent.join().expect("asked"), [del, gc]);
    }

    #[test]
    fn version_needs_no_agent() {
        for input in ["", r#"{"cniVersion":"1.1.0"}"#] {
            let text = run(&call("VERSION", input)).expect("answered");
            let answer: Value = serde_json::from_str(&text).expect("json");
            assert_eq!(answer["cniVersion"], "1.1.0");
            assert!(answer["supportedVersions"].as_array().is_some_and(|all| all.len() == 7));
        }
        run(&call("STATUS", &config(Path::new("/nonexistent/s"), ""))).expect("ready");
    }

    #[test]
    fn bad_calls_are_named() {
        let good = config(Path::new("/nonexistent/s"), "");
        for (command, input, code, word) in [
            ("ADD", "{", code::DECODING, "not valid JSON"),
            ("ADD", "[]", code::DECODING, "not a JSON object"),
            ("ADD", r#"{"cniVersion":"9.0.0"}"#, code::VERSION, "9.0.0"),
            ("ADD", r#"{"cniVersion":"1.0.0","prevResult":{}}"#, code::CONFIG, "socket"),
            ("ADD", r#"{"cniVersion":"1.0.0","socket":"/s"}"#, code::CONFIG, "prevResult"),
            (
                "ADD",
                &good.replace("\"timeoutSeconds\":0", "\"onAgentAway\":\"perhaps\""),
                code::CONFIG,
                "perhaps",
            ),
            ("FROB", &good, code::ENVIRONMENT, "FROB"),
            ("", &good, code::ENVIRONMENT, "CNI_COMMAND"),
            ("", "", code::ENVIRONMENT, "CNI_COMMAND"),
        ] {
            let error = run(&call(command, input)).expect_err(command);
            assert_eq!(error.code, code, "{error:?}");
            assert!(error.msg.contains(word), "{error:?} names {word}");
        }
        let mut nowhere = call("ADD", &good);
        nowhere.environment.remove("CNI_NETNS");
        let error = run(&nowhere).expect_err("no namespace");
        assert!(error.msg.contains("CNI_NETNS"), "{error:?}");
    }
}
