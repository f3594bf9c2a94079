//! HTTP for the scenarios' pods: a server that says what it got, and clients whose requests can be
//! accounted for, each by its number.

use std::collections::BTreeMap;
use std::env;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use axum::Router;
use axum::extract::State;
use axum::http::{HeaderMap, Uri};
use serde::{Deserialize, Serialize};
use serde_json::json;
use sidestep_lab::{interrupted, wait_until};

/// How long an answer may take.
const ANSWER: Duration = Duration::from_secs(10);
/// Where a server's sidecar says whose certificate the client's sidecar had: Istio and Kuma,
/// Linkerd.
const IDENTITY: [&str; 2] = ["x-forwarded-client-cert", "l5d-client-id"];

/// What a server answers.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq, Eq)]
pub struct Answer {
    /// The pod that answered.
    pub host: String,
    /// The client, as the server's sidecar knows it; none where the request came in plain text.
    pub client: Option<String>,
    /// The path that was asked for.
    pub path: String,
}

/// Serves on this address until the process ends. Each request gets a line on stdout, as
/// [`Served`] reads it.
pub fn serve(addr: SocketAddr) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("making a runtime")?;
    let host = env::var("HOSTNAME").unwrap_or_default();
    let app = Router::new().fallback(answer).with_state(host);
    runtime.block_on(async {
        let listener = tokio::net::TcpListener::bind(addr)
            .await
            .with_context(|| format!("listening on {addr}"))?;
        axum::serve(listener, app).await.context("serving")
    })
}

async fn answer(State(host): State<String>, headers: HeaderMap, uri: Uri) -> String {
    let header = IDENTITY.iter().find_map(|name| headers.get(*name)?.to_str().ok());
    let client = header.map(client_of);
    println!("got {} from {}", uri.path(), client.as_deref().unwrap_or(NOBODY));
    json!(Answer { host, client, path: uri.path().to_owned() }).to_string()
}

/// In a server's line: a request in plain text.
const NOBODY: &str = "-";

/// The client in the header: Envoy's `By=SERVER;Hash=...;URI=CLIENT`, or Linkerd's name alone.
fn client_of(header: &str) -> String {
    // Where proxies were passed before, the last one is whom the server's sidecar met.
    let last = header.rsplit(',').next().unwrap_or(header);
    let uri = last.split(';').find_map(|part| part.strip_prefix("URI="));
    uri.unwrap_or(last).to_owned()
}

/// Asks once, and gives the status and the body.
pub fn get(url: &str) -> Result<(u16, String)> {
    ask(&agent(0), url)
}

fn agent(idle: usize) -> ureq::Agent {
    let config = ureq::Agent::config_builder()
        .timeout_global(Some(ANSWER))
        .http_status_as_error(false)
        .max_idle_connections(idle)
        .build();
    config.into()
}

fn ask(agent: &ureq::Agent, url: &str) -> Result<(u16, String)> {
    let mut response = agent.get(url).call().with_context(|| format!("asking {url}"))?;
    let body = response.body_mut().read_to_string().with_context(|| format!("reading {url}"))?;
    Ok((response.status().as_u16(), body))
}

/// Asks again and again until SIGTERM, with a line on stdout for each request, as [`Sent`] reads
/// it. Request N asks for `URL/N`: every second one by the same connection as before, the others
/// by one of their own. Those before the first answer do not count.
pub fn load(url: &str, pause: Duration) {
    let agents = [agent(1), agent(0)];
    while !interrupted() && !matches!(ask(&agents[1], &format!("{url}/first")), Ok((200, _))) {
        sleep(Duration::from_millis(100));
    }
    let mut number = 0_u64;
    while !interrupted() {
        number += 1;
        let agent = &agents[usize::from(number.is_multiple_of(2))];
        match ask(agent, &format!("{url}/{number}")) {
            Ok((200, _)) => println!("{number} ok"),
            Ok((status, body)) => println!("{number} failed: {status} {}", one_line(&body)),
            Err(err) => println!("{number} failed: {}", one_line(&format!("{err:#}"))),
        }
        sleep(pause);
    }
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn sleep(pause: Duration) {
    let end = Instant::now() + pause;
    // It ends early on a signal.
    let _ = wait_until("the pause to end", 2 * pause, || Instant::now() >= end);
}

/// What became of each request of a load.
#[derive(Debug, Default)]
pub struct Account {
    /// Requests that were answered.
    pub answered: usize,
    /// Those that were not, with the reason: the client's lines.
    pub failed: Vec<String>,
    /// Those that came to the server in plain text: the server's lines.
    pub plain: Vec<String>,
    /// Those that the client has an answer to, and that the server knows nothing of; or that the
    /// client left out.
    pub lost: Vec<u64>,
    /// Those that came more than once: a sidecar tried them again.
    pub again: usize,
}

/// Brings together the log of a client, and that of its server, which was read after it. `path` is
/// what the client's URL has before the number.
pub fn account(client: &str, server: &str, path: &str) -> Account {
    let mut account = Account::default();
    let mut served = BTreeMap::<u64, usize>::new();
    let prefix = format!("got {path}/");
    for line in server.lines() {
        let Some(rest) = line.strip_prefix(&prefix) else { continue };
        let Some((number, from)) = rest.split_once(" from ") else { continue };
        if from == NOBODY {
            account.plain.push(line.to_owned());
        }
        if let Ok(number) = number.parse() {
            *served.entry(number).or_default() += 1;
        }
    }
    account.again = served.values().filter(|times| **times > 1).count();
    let mut next = 1;
    for line in client.lines() {
        let Some((number, outcome)) = line.split_once(' ') else { continue };
        let Ok(number) = number.parse::<u64>() else { continue };
        account.lost.extend(next..number);
        next = number + 1;
        if outcome != "ok" {
            account.failed.push(line.to_owned());
        } else if served.contains_key(&number) {
            account.answered += 1;
        } else {
            account.lost.push(number);
        }
    }
    account
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_the_client_is() {
        let istio = "By=spiffe://c/ns/a/sa/server;Hash=1;Subject=\"\";URI=spiffe://c/ns/a/sa/web";
        assert_eq!(client_of(istio), "spiffe://c/ns/a/sa/web");
        assert_eq!(client_of(&format!("{istio},By=x;URI=spiffe://last")), "spiffe://last");
        assert_eq!(client_of("web.shop.serviceaccount"), "web.shop.serviceaccount");
    }

    #[test]
    fn each_request_has_its_place() {
        let client = "1 ok\n2 failed: 503 no\n3 ok\n5 ok\n6 ok\n";
        let server = "got /a/first from x\ngot /a/1 from x\ngot /b/3 from x\ngot /a/5 from -\n\
                      got /a/6 from x\ngot /a/6 from x\n";
        let account = account(client, server, "/a");
        assert_eq!(account.answered, 3);
        assert_eq!(account.failed, ["2 failed: 503 no"]);
        assert_eq!(account.plain, ["got /a/5 from -"]);
        assert_eq!(account.lost, [3, 4]);
        assert_eq!(account.again, 1);
    }

    #[test]
    fn over_loopback() -> Result<()> {
        let free = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?;
        std::thread::spawn(move || serve(free));
        let url = format!("http://{free}/some/path");
        wait_until("the server to answer", ANSWER, || get(&url).is_ok())?;
        let (status, body) = get(&url)?;
        let answer: Answer = serde_json::from_str(&body)?;
        assert_eq!(status, 200);
        assert_eq!((answer.client, answer.path.as_str()), (None, "/some/path"));
        Ok(())
    }
}
