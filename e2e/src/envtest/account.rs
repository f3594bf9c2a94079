//! The agent's service account, with the rights that the chart gives it. An account, its namespace,
//! its ClusterRole and its Role all have the same name.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::authentication::v1::{TokenRequest, TokenRequestSpec};
use k8s_openapi::api::authorization::v1::{
    ResourceAttributes, SubjectAccessReview, SubjectAccessReviewSpec,
};
use k8s_openapi::api::core::v1::ServiceAccount;
use k8s_openapi::api::rbac::v1::{ClusterRole, PolicyRule, Role};
use kube::Api;
use kube::api::PostParams;
use serde_json::{Value, json};
use sidestep_lab::wait_until;

use super::{Envtest, ISSUER};

/// The chart's own.
const RBAC: &str = include_str!("../../../charts/sidestep/templates/rbac.yaml");
/// A rule has to have some verb.
const NO_VERB: &str = "none";
/// How long a changed right may take to be in force.
const SOON: Duration = Duration::from_secs(10);

/// How the API server calls an account.
pub(super) fn user(name: &str) -> String {
    format!("system:serviceaccount:{name}:{name}")
}

/// The chart's objects as helm fills them in where all that is optional is wanted, without the
/// labels that every object has.
fn rbac(name: &str) -> String {
    let (mut text, mut otherwise) = (String::new(), false);
    for line in RBAC.lines() {
        otherwise = (otherwise || line.contains("{{- else")) && !line.contains("{{- end");
        if !otherwise && !line.contains("{{-") {
            text += &format!("{line}\n");
        }
    }
    text.replace("{{ $name }}", name).replace("{{ .Release.Namespace }}", name)
}

impl Envtest {
    /// Makes an account, and waits until its rights are in force.
    pub fn add_account(&self, name: &str) -> Result<()> {
        let meta = json!({"name": name, "namespace": name});
        self.create(json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}))?;
        self.create(json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": meta}))?;
        let objects: Vec<Value> =
            serde_saphyr::from_multiple(&rbac(name)).context("the chart's rbac.yaml")?;
        ensure!(objects.len() == 4, "the chart's rbac.yaml has {} objects", objects.len());
        for object in objects {
            self.create(object)?;
        }
        for (verb, resource) in [("list", "pods"), ("get", "daemonsets")] {
            self.wait_right(name, verb, resource, true)?;
        }
        Ok(())
    }

    /// A token of an account, from the API server, good for an hour.
    pub fn token(&self, name: &str) -> Result<String> {
        let name = name.to_owned();
        let request = TokenRequest {
            spec: TokenRequestSpec { expiration_seconds: Some(3600), ..Default::default() },
            ..Default::default()
        };
        let answer = self.ask(async move |client| {
            let accounts = Api::<ServiceAccount>::namespaced(client, &name);
            accounts.create_token_request(&name, &PostParams::default(), &request).await
        })?;
        Ok(answer.status.context("a token without a status")?.token)
    }

    /// A token of an account that has expired a minute ago. The API server itself makes none that
    /// is good for less than ten minutes, so this is signed with its key.
    pub fn expired_token(&self, name: &str) -> Result<String> {
        let account = name.to_owned();
        let account = self.ask(async move |client| {
            Api::<ServiceAccount>::namespaced(client, &account).get(&account).await
        })?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
        let claims = json!({
            "iss": ISSUER,
            "aud": [ISSUER],
            "sub": user(name),
            "iat": now - 3660,
            "nbf": now - 3660,
            "exp": now - 60,
            "kubernetes.io": {
                "namespace": name,
                "serviceaccount": {"name": name, "uid": account.metadata.uid},
            },
        });
        let script = "encode() { openssl base64 -A | tr '+/' '-_' | tr -d '='; }\n\
                      text=$(printf %s '{\"alg\":\"RS256\"}' | encode).$(encode) &&\n\
                      sum=$(printf %s \"$text\" | openssl dgst -sha256 -sign \"$1\" | encode) &&\n\
                      printf %s \"$text.$sum\"";
        let key = self.dir.join("accounts.key").to_string_lossy().into_owned();
        sidestep_lab::feed(&["sh", "-c", script, "sh", &key], &claims.to_string())
    }

    /// Takes a right from an account's roles, and waits until it has none. The words are those of
    /// RBAC rules: `list` and `pods`.
    pub fn forbid(&self, name: &str, verb: &str, resource: &str) -> Result<()> {
        self.change_rights(name, verb, resource, false)
    }

    /// Takes [`Envtest::forbid`] back.
    pub fn allow(&self, name: &str, verb: &str, resource: &str) -> Result<()> {
        self.change_rights(name, verb, resource, true)
    }

    fn change_rights(&self, name: &str, verb: &str, resource: &str, allowed: bool) -> Result<()> {
        let change = {
            let (verb, resource) = (verb.to_owned(), resource.to_owned());
            move |rules: &mut Option<Vec<PolicyRule>>| {
                for rule in rules.iter_mut().flatten() {
                    if rule.resources.iter().flatten().any(|found| *found == resource) {
                        rule.verbs.retain(|found| *found != verb && found != NO_VERB);
                        rule.verbs.extend(allowed.then(|| verb.clone()));
                        if rule.verbs.is_empty() {
                            rule.verbs.push(NO_VERB.to_owned());
                        }
                    }
                }
            }
        };
        let account = name.to_owned();
        self.ask(async move |client| {
            let params = PostParams::default();
            let roles = Api::<ClusterRole>::all(client.clone());
            let mut role = roles.get(&account).await?;
            change(&mut role.rules);
            roles.replace(&account, &params, &role).await?;
            let roles = Api::<Role>::namespaced(client, &account);
            let mut role = roles.get(&account).await?;
            change(&mut role.rules);
            roles.replace(&account, &params, &role).await
        })?;
        self.wait_right(name, verb, resource, allowed)
    }

    fn wait_right(&self, name: &str, verb: &str, resource: &str, wanted: bool) -> Result<()> {
        let group = match resource {
            "daemonsets" => "apps",
            "endpointslices" => "discovery.k8s.io",
            "events" => "events.k8s.io",
            _ => "",
        };
        // Of its own namespace's objects: whoever may list them everywhere may do so there.
        let attributes = ResourceAttributes {
            namespace: Some(name.to_owned()),
            name: (group == "apps").then(|| name.to_owned()),
            group: Some(group.to_owned()),
            resource: Some(resource.to_owned()),
            verb: Some(verb.to_owned()),
            ..Default::default()
        };
        let review = SubjectAccessReview {
            spec: SubjectAccessReviewSpec {
                user: Some(user(name)),
                resource_attributes: Some(attributes),
                ..Default::default()
            },
            ..Default::default()
        };
        let what =
            format!("{verb} {resource} to be {}", if wanted { "allowed" } else { "refused" });
        wait_until(&what, SOON, || {
            let review = review.clone();
            let answer = self.ask(async move |client| {
                Api::all(client).create(&PostParams::default(), &review).await
            });
            let status = answer.ok().and_then(|review: SubjectAccessReview| review.status);
            status.is_some_and(|status| status.allowed == wanted)
        })
    }
}
