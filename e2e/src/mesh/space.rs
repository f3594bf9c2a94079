//! What one scenario has in the cluster: a namespace with pods that serve and ask.

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use sidestep_lab::APP;

use super::Cluster;
use crate::image::IMAGE;
use crate::web::{Account, Answer, account};

/// Where apps serve; their Service has port 80.
pub const PORT: u16 = 8080;

/// The namespace of a scenario.
pub struct Space<'a> {
    cluster: &'a Cluster,
    name: String,
}

/// What came of a request from within a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answered {
    /// The server answered.
    Yes(Answer),
    /// Somebody else did, with this status: the client's sidecar.
    No(u16, String),
    /// Nobody did: the error.
    Not(String),
}

impl Answered {
    /// The identity of the client that the server's sidecar saw.
    pub fn client(&self) -> Option<&str> {
        match self {
            Self::Yes(answer) => answer.client.as_deref(),
            Self::No(..) | Self::Not(_) => None,
        }
    }

    /// Whether the server answered a request in plain text.
    pub fn is_plain(&self) -> bool {
        matches!(self, Self::Yes(Answer { client: None, .. }))
    }

    /// Whether it did not get to the server.
    pub fn is_refused(&self) -> bool {
        !matches!(self, Self::Yes(_))
    }
}

impl<'a> Space<'a> {
    /// Makes the namespace, anew where an earlier run has left it.
    pub(super) fn new(cluster: &'a Cluster, name: &str, metadata: Value) -> Result<Self> {
        let space = Self { cluster, name: name.to_owned() };
        let delete = ["delete", "namespace", name, "--ignore-not-found", "--timeout", "120s"];
        cluster.kubectl(&delete)?;
        let mut namespace =
            json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}});
        merge(&mut namespace["metadata"], metadata);
        cluster.apply(&[namespace])?;
        Ok(space)
    }

    /// The namespace's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The cluster that it is in.
    pub fn cluster(&self) -> &'a Cluster {
        self.cluster
    }

    /// What Kubernetes, the agent and `Node` call a pod of it.
    pub fn full(&self, pod: &str) -> String {
        format!("{}/{pod}", self.name)
    }

    /// Applies objects that name no namespace.
    pub fn apply(&self, objects: &[Value]) -> Result<()> {
        let mut objects = objects.to_vec();
        for object in &mut objects {
            object["metadata"]["namespace"] = json!(self.name);
        }
        self.cluster.apply(&objects)
    }

    /// kubectl, in this namespace.
    pub fn kubectl(&self, args: &[&str]) -> Result<String> {
        self.cluster.kubectl(&[&["-n", &self.name], args].concat())
    }

    /// A pod with the container `app` that runs `e2e-pod` with these arguments, and whose service
    /// account has its name. `edit` is merged into it: objects by their keys, all else replaced.
    pub fn template(&self, name: &str, node: Option<&str>, args: &[&str], edit: Value) -> Value {
        let mut pod = json!({
            "metadata": {"labels": {"app": name}},
            "spec": {
                "serviceAccountName": name,
                "terminationGracePeriodSeconds": 1,
                "containers": [app(args)],
            },
        });
        if let Some(node) = node {
            pod["spec"]["nodeName"] = json!(node);
        }
        merge(&mut pod, edit);
        pod
    }

    /// Creates [`Space::template`] as a pod, with its service account.
    pub fn pod(&self, name: &str, node: Option<&str>, args: &[&str], edit: Value) -> Result<()> {
        let mut pod = self.template(name, node, args, edit);
        pod["apiVersion"] = json!("v1");
        pod["kind"] = json!("Pod");
        pod["metadata"]["name"] = json!(name);
        self.apply(&[account_of(name), pod])
    }

    /// Creates a Deployment of [`Space::template`]. A `restartPolicy` other than `Always` is not
    /// for it.
    pub fn deployment(&self, name: &str, replicas: u32, args: &[&str], edit: Value) -> Result<()> {
        let deployment = json!({
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": name},
            "spec": {
                "replicas": replicas,
                "selector": {"matchLabels": {"app": name}},
                "template": self.template(name, None, args, edit),
            },
        });
        self.apply(&[account_of(name), deployment])
    }

    /// The Service `http://NAME/` of the pods with that `app` label.
    pub fn service(&self, name: &str) -> Result<()> {
        self.apply(&[json!({
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": name},
            "spec": {
                "selector": {"app": name},
                "ports": [{"name": "http", "appProtocol": "http", "port": 80, "targetPort": PORT}],
            },
        })])
    }

    /// A pod that serves as `http://NAME/`.
    pub fn server(&self, name: &str, node: &str, edit: Value) -> Result<()> {
        self.service(name)?;
        self.pod(name, Some(node), &["http", "0.0.0.0:8080"], edit)
    }

    /// A pod that waits to be told what to ask: [`Space::get`].
    pub fn client(&self, name: &str, node: &str, edit: Value) -> Result<()> {
        self.pod(name, Some(node), &["pause"], edit)
    }

    /// A pod that asks `http://SERVER/` again and again, as [`Load`] accounts for.
    pub fn load(&self, name: &str, node: &str, server: &str, edit: Value) -> Result<Load<'_>> {
        let (url, path) = (format!("http://{server}/{name}"), format!("/{name}"));
        self.pod(name, Some(node), &["load", &url], edit)?;
        self.wait_ready(name)?;
        Ok(Load { space: self, client: name.to_owned(), server: server.to_owned(), path })
    }

    /// The pod as the API server has it.
    pub fn get_pod(&self, name: &str) -> Result<Value> {
        self.cluster.node.pod(&self.full(name))
    }

    /// Waits until the pod is ready, and gives it. Fails at once where it has ended.
    pub fn wait_ready(&self, name: &str) -> Result<Value> {
        let ready = self.cluster.soon(&format!("the pod {name} to be ready"), || {
            let pod = self.get_pod(name)?;
            // There is nothing to wait for.
            let ended = has_ended(&pod);
            ensure!(ended || is_ready(&pod), "it is not ready: {:#}", why(&pod["status"]));
            Ok((!ended).then_some(pod))
        });
        let events = || format!("{}: events: {:#?}", self.full(name), self.events(name));
        ready.and_then(|pod| pod.context("it has ended")).with_context(events)
    }

    /// Waits until the pod has ended, and fails unless it succeeded.
    pub fn wait_succeeded(&self, name: &str) -> Result<Value> {
        let ended = self.cluster.soon(&format!("the pod {name} to end"), || {
            let pod = self.get_pod(name)?;
            ensure!(has_ended(&pod), "it runs: {:#}", why(&pod["status"]));
            Ok(pod)
        });
        let events = || format!("{}: events: {:#?}", self.full(name), self.events(name));
        let pod = ended.with_context(events)?;
        let status = &pod["status"];
        ensure!(status["phase"] == "Succeeded", "{name} failed: {:#}\n{}", why(status), events());
        Ok(pod)
    }

    /// What was said of a pod in events.
    pub fn events(&self, name: &str) -> Vec<String> {
        self.cluster.node.events(&self.full(name))
    }

    /// What a container has written.
    pub fn log(&self, pod: &str, container: &str) -> Result<String> {
        self.kubectl(&["logs", pod, "-c", container, "--tail=-1"])
    }

    /// Deletes a pod, and waits until it is gone.
    pub fn delete_pod(&self, name: &str) -> Result<()> {
        self.kubectl(&["delete", "pod", name, "--timeout", "120s"]).map(drop)
    }

    /// Runs a command in the container `app` of a pod.
    pub fn exec(&self, pod: &str, argv: &[&str]) -> Result<String> {
        self.kubectl(&[&["exec", pod, "-c", "app", "--"], argv].concat())
    }

    /// Asks for a URL from within a pod, as its app.
    pub fn get(&self, pod: &str, url: &str) -> Result<Answered> {
        let said = match self.exec(pod, &["/e2e-pod", "get", url]) {
            Ok(said) => said,
            // Its own words, and not that it cannot be run.
            Err(err) => match format!("{err:#}").split_once("): failed ") {
                Some((_, reason)) => return Ok(Answered::Not(reason.trim().to_owned())),
                None => return Err(err),
            },
        };
        let (status, body) = said.split_once(' ').with_context(|| format!("it said {said:?}"))?;
        let status = status.parse().with_context(|| format!("it said {said:?}"))?;
        Ok(match serde_json::from_str(body) {
            Ok(answer) if status == 200 => Answered::Yes(answer),
            _ => Answered::No(status, body.trim().to_owned()),
        })
    }

    /// Asks until the answer is as it should be.
    pub fn get_until(
        &self,
        pod: &str,
        url: &str,
        what: &str,
        good: impl Fn(&Answered) -> bool,
    ) -> Result<Answered> {
        self.cluster.soon(&format!("{what}: {pod} asking {url}"), || {
            let answered = self.get(pod, url)?;
            ensure!(good(&answered), "{answered:?}");
            Ok(answered)
        })
    }

    /// Asks until the server's sidecar knows the client, by the service account of its name.
    pub fn get_known(&self, pod: &str, url: &str) -> Result<Answered> {
        let good = |answered: &Answered| answered.client().is_some_and(|id| is_identity(id, pod));
        self.get_until(pod, url, "the server to know the client", good)
    }

    /// Waits until the agent on the pod's node has it, or has it no more.
    pub fn wait_enrolled(&self, pod: &str, wanted: bool) -> Result<()> {
        let node = self.node_of(pod)?;
        let full = self.full(pod);
        self.cluster.soon(
            &format!("{full} to be {}", if wanted { "enrolled" } else { "gone" }),
            || {
                let entry = self.cluster.enrolled(&node, &full)?;
                let inbound = entry.as_ref().is_some_and(|entry| entry["inbound"] == true);
                ensure!(if wanted { inbound } else { entry.is_none() }, "{entry:?}");
                Ok(())
            },
        )
    }

    /// The pod with this `app` label that does not end.
    pub fn pod_of(&self, app: &str) -> Result<String> {
        let format = "jsonpath={range .items[*]}{.metadata.name} {.metadata.deletionTimestamp}{\"\\n\"}{end}";
        let args = ["get", "pods", "-l", &format!("app={app}"), "-o", format];
        let said = self.kubectl(&args)?;
        let pod = said.lines().find_map(|line| line.strip_suffix(' '));
        pod.map(str::to_owned).with_context(|| format!("{app} has only these pods: {said:?}"))
    }

    /// The node that a pod is on.
    pub fn node_of(&self, pod: &str) -> Result<String> {
        let pod = self.get_pod(pod)?;
        let node = pod["spec"]["nodeName"].as_str();
        node.map(str::to_owned).context("the pod is on no node")
    }

    /// The pod's address.
    pub fn ip_of(&self, pod: &str) -> Result<String> {
        let pod = self.get_pod(pod)?;
        let ip = pod["status"]["podIP"].as_str();
        ip.map(str::to_owned).context("the pod has no address")
    }

    /// Fails unless the pod came up at the first try: no container was started twice, and the
    /// mesh's validator was content.
    pub fn ensure_first_try(&self, pod: &str) -> Result<()> {
        let object = self.get_pod(pod)?;
        let status = &object["status"];
        let all = ["initContainerStatuses", "containerStatuses"];
        let all = all.iter().flat_map(|list| status[*list].as_array().into_iter().flatten());
        let mut validated = false;
        for container in all {
            ensure!(container["restartCount"] == 0, "{pod} was restarted: {:#}", why(status));
            if container["name"] == self.cluster.mesh.validator() {
                let code = &container["state"]["terminated"]["exitCode"];
                ensure!(*code == 0, "{pod}'s validator: {container:#}");
                validated = true;
            }
        }
        ensure!(validated, "{pod} has no {}", self.cluster.mesh.validator());
        let events = self.events(pod);
        let bad = events.iter().find(|event| event.starts_with("FailedCreatePodSandBox"));
        if let Some(bad) = bad {
            bail!("{pod}: {bad}");
        }
        Ok(())
    }
}

/// How many requests of a kind are shown where a load was disturbed.
const SHOWN: usize = 5;

/// A client that asks without pause, and its server.
pub struct Load<'s> {
    space: &'s Space<'s>,
    client: String,
    server: String,
    path: String,
}

impl Load<'_> {
    fn answered(&self) -> Result<usize> {
        let log = self.space.log(&self.client, "app")?;
        Ok(log.lines().filter(|line| line.ends_with(" ok")).count())
    }

    /// Waits until so many more requests were answered.
    pub fn more(&self, requests: usize) -> Result<()> {
        let before = self.answered()?;
        self.space.cluster.soon("more requests to be answered", || {
            let now = self.answered()?;
            ensure!(now >= before + requests, "{} more", now - before);
            Ok(())
        })
    }

    /// What became of each request so far.
    pub fn account(&self) -> Result<Account> {
        // In this order: what the client has an answer to, the server has written.
        let client = self.space.log(&self.client, "app")?;
        let server = self.space.log(&self.server, "app")?;
        Ok(account(&client, &server, &self.path))
    }

    /// Fails unless each request was answered, and none came in plain text. Gives their number.
    pub fn ensure_undisturbed(&self) -> Result<usize> {
        let account = self.account()?;
        let Account { answered, failed, plain, lost, .. } = &account;
        let first = |lines: &[String]| lines.iter().take(SHOWN).cloned().collect::<Vec<_>>();
        ensure!(
            failed.is_empty() && plain.is_empty() && lost.is_empty() && *answered > 0,
            "of {} requests {} failed, {} came in plain text, {} are unaccounted for: {:#?} {:#?} {:?}",
            answered + failed.len() + lost.len(),
            failed.len(),
            plain.len(),
            lost.len(),
            first(failed),
            first(plain),
            lost.iter().take(SHOWN).collect::<Vec<_>>(),
        );
        Ok(*answered)
    }
}

/// The app's container, with these arguments of `e2e-pod`.
pub fn app(args: &[&str]) -> Value {
    json!({
        "name": "app",
        "image": IMAGE,
        "args": args,
        "securityContext": {"runAsUser": APP, "runAsGroup": APP},
    })
}

fn account_of(name: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": name}})
}

/// Whether a mesh's identity is this service account's.
pub fn is_identity(identity: &str, account: &str) -> bool {
    // spiffe://.../sa/NAME, NAME.NAMESPACE.serviceaccount..., spiffe://MESH/NAME_NAMESPACE_svc
    let last = identity.rsplit('/').next().unwrap_or(identity);
    last.split(['.', '_']).next() == Some(account)
}

/// Whether a pod's condition `Ready` holds.
fn is_ready(pod: &Value) -> bool {
    let conditions = pod["status"]["conditions"].as_array();
    conditions.is_some_and(|conditions| {
        conditions.iter().any(|one| one["type"] == "Ready" && one["status"] == "True")
    })
}

fn has_ended(pod: &Value) -> bool {
    ["Failed", "Succeeded"].iter().any(|phase| pod["status"]["phase"] == *phase)
}

/// What a pod's status says of its containers, for error messages.
fn why(status: &Value) -> Value {
    let brief = |list: &str| -> Vec<Value> {
        let containers = status[list].as_array().into_iter().flatten();
        containers
            .map(|one| {
                json!({
                    "name": one["name"],
                    "ready": one["ready"],
                    "restarts": one["restartCount"],
                    "state": one["state"],
                    "before": one["lastState"],
                })
            })
            .collect()
    };
    json!({
        "phase": status["phase"],
        "init": brief("initContainerStatuses"),
        "containers": brief("containerStatuses"),
    })
}

/// Merges objects by their keys; all else takes the place of what was there.
fn merge(into: &mut Value, from: Value) {
    match (into, from) {
        (Value::Object(into), Value::Object(from)) => {
            for (key, value) in from {
                merge(into.entry(key).or_insert(Value::Null), value);
            }
        }
        (into, from) => *into = from,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identities_of_each_mesh() {
        assert!(is_identity("spiffe://cluster.local/ns/mesh/sa/client", "client"));
        assert!(is_identity("client.mesh.serviceaccount.identity.linkerd.cluster.local", "client"));
        assert!(is_identity("spiffe://default/client_mesh_svc", "client"));
        assert!(!is_identity("spiffe://cluster.local/ns/client/sa/other", "client"));
    }

    #[test]
    fn merging_keeps_what_is_not_named() {
        let mut pod = json!({"a": {"b": 1, "c": [1, 2]}});
        merge(&mut pod, json!({"a": {"c": [3]}, "d": null}));
        assert_eq!(pod, json!({"a": {"b": 1, "c": [3]}, "d": null}));
    }
}
