//! Services of a real API server: what is made there can be dialled.

mod cluster;
#[path = "../../tests/common/mod.rs"]
mod common;

use std::net::{IpAddr, SocketAddr};

use cluster::*;
use common::*;
use k8s_openapi::api::{
    core::v1::{Node as ApiNode, Service},
    discovery::v1::EndpointSlice,
};
use serde_json::{Value, json};
use sidestep_e2e::Envtest;
use sidestep_lab::{Lab, Pod, PodNet, Server};

const PORT: u16 = 80;
const TARGET: u16 = 8080;

/// The Service `web`, whose endpoints are the slice `web-1`.
struct Web {
    cluster: Cluster,
    vip: SocketAddr,
}

impl Web {
    /// Pod `a` is of no mesh, and the client; pod `b` is the endpoint.
    fn new(mut cluster: Cluster) -> Self {
        cluster.in_force();
        let client = cluster.create(cluster.plain(&cluster.a));
        succeeds(&cluster.plugin("ADD", &cluster.a, &client));
        // By which an agent that the plugin told nothing finds it.
        cluster.runs(|cluster| &cluster.a, &client);
        let service = cluster.create(json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": {"name": "web", "namespace": cluster.name},
            "spec": {"ports": [{"name": "http", "port": PORT}]},
        }));
        let vip = service["spec"]["clusterIP"].as_str().expect("an address");
        let vip = addr(ip(vip), PORT);
        let web = Self { cluster, vip };
        web.cluster.create(json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": {
                "name": "web-1", "namespace": web.cluster.name,
                "labels": {"kubernetes.io/service-name": "web"},
            },
            "addressType": "IPv4",
            "ports": [{"name": "http", "port": TARGET}],
            "endpoints": [web.endpoint(&web.cluster.b, json!({}))],
        }));
        web
    }

    /// An endpoint, with more fields.
    fn endpoint(&self, pod: &Pod, more: Value) -> Value {
        let mut endpoint = json!({"addresses": [pod.ipv4()], "nodeName": self.cluster.name});
        for (key, value) in more.as_object().expect("fields") {
            endpoint[key] = value.clone();
        }
        endpoint
    }

    fn set(&self, endpoints: &[Value]) {
        let patch = json!({"endpoints": endpoints});
        let name = &self.cluster.name;
        self.cluster.api.patch::<EndpointSlice>(name, "web-1", &patch).expect("patched");
    }

    fn serve(pod: &Pod) -> Server {
        pod.serve(addr([0, 0, 0, 0], TARGET), APP, APP).expect("an app")
    }

    /// Who answers the client.
    fn met(&self) -> Result<IpAddr, String> {
        let answer = self.cluster.a.ask(APP, APP, self.vip).map_err(|e| format!("{e:#}"))?;
        assert_eq!(answer.peer, self.vip, "getpeername");
        Ok(answer.seen.local.ip())
    }

    /// What the kernel has behind the Service; none: it is not translated.
    fn backends(&self) -> Option<Value> {
        let text = self.cluster.agent.command(&["status", "--services", "-o", "json"]);
        let status: Value = serde_json::from_str(&text.expect("a status")).expect("JSON");
        let services = status["services"].as_array().expect("services");
        let found = services.iter().find(|one| one["address"] == self.vip.to_string());
        Some(found?["backends"].clone())
    }

    #[track_caller]
    fn wait_backends(&self, pods: &[&Pod]) {
        let mut wanted: Vec<_> = pods.iter().map(|pod| addr(pod.ipv4(), TARGET)).collect();
        wanted.sort();
        self.cluster.becomes(&format!("the backends {wanted:?}"), || {
            self.backends() == Some(json!(wanted))
        });
    }
}

#[test]
fn what_the_api_server_says_of_a_service_is_what_is_dialled() {
    let web = Web::new(Cluster::with("svc-live", &["--services"], |_| {}));
    let (a, b) = (&web.cluster.a, &web.cluster.b);
    let _apps = [Web::serve(a), Web::serve(b)];
    web.cluster.becomes("the Service to answer", || web.met() == Ok(b.ipv4()));

    // Endpoints come and go, and are hinted to zones.
    web.set(&[web.endpoint(a, json!({}))]);
    web.wait_backends(&[a]);
    assert_eq!(web.met(), Ok(a.ipv4()));
    let zones = |zone: &str| json!({"hints": {"forZones": [{"name": zone}]}});
    web.set(&[web.endpoint(a, zones("east")), web.endpoint(b, zones("west"))]);
    web.wait_backends(&[a, b]);
    let label = |zone: Value| {
        let patch = json!({"metadata": {"labels": {"topology.kubernetes.io/zone": zone}}});
        web.cluster.api.patch::<ApiNode>("", &web.cluster.name, &patch).expect("patched");
    };
    label("west".into());
    web.wait_backends(&[b]);
    label(Value::Null);
    web.wait_backends(&[a, b]);
    web.set(&[]);
    web.wait_backends(&[]);
    let error = web.met().expect_err("there is no endpoint");
    assert!(error.contains("refused"), "{error}");

    // A Service that becomes somebody else's, and one that is gone, are left to them.
    let name = &web.cluster.name;
    let whose = |proxy: Value| {
        let patch =
            json!({"metadata": {"labels": {"service.kubernetes.io/service-proxy-name": proxy}}});
        web.cluster.api.patch::<Service>(name, "web", &patch).expect("patched");
    };
    whose("other".into());
    web.cluster.becomes("the Service to be left alone", || web.backends().is_none());
    whose(Value::Null);
    web.wait_backends(&[]);
    web.cluster.api.delete::<Service>(name, "web").expect("deleted");
    web.cluster.becomes("the Service to be gone", || web.backends().is_none());
}

#[test]
fn a_new_agent_keeps_what_is_translated_until_it_has_all_lists() {
    let mut web = Web::new(Cluster::with("svc-lists", &["--services"], |_| {}));
    let b = web.cluster.b.ipv4();
    let _app = Web::serve(&web.cluster.b);
    web.cluster.becomes("the Service to answer", || web.met() == Ok(b));
    web.cluster.agent.kill9();
    assert_eq!(web.met(), Ok(b), "without an agent");
    web.cluster.forbid("list", "endpointslices");
    web.cluster.agent.restart().expect("starts");
    web.cluster.agent.wait_log("verb \"list\" on \"endpointslices\"").expect("said");
    web.wait_backends(&[&web.cluster.b]);
    assert_eq!(web.met(), Ok(b), "with an agent that knows no endpoint");
    web.set(&[web.endpoint(&web.cluster.a, json!({}))]);
    web.cluster.allow("list", "endpointslices");
    web.wait_backends(&[&web.cluster.a]);
}

#[test]
fn a_role_without_services_is_named_and_the_mesh_goes_on() {
    let name = "svc-rbac";
    let cluster = Cluster::with(name, &["--services"], |api| {
        api.forbid(name, "list", "services").expect("forbidden");
    });
    cluster.agent.wait_log("verb \"list\" on \"services\"").expect("said");
    cluster.in_force();
    let object = cluster.create_pending(&cluster.b);
    succeeds(&cluster.plugin("ADD", &cluster.b, &object));
    let proxy = cluster.b.fake_proxy(15001).expect("a proxy");
    cluster.works(&cluster.b);
    cluster.becomes("an Event on the node", || {
        cluster.has_event("Node", name, "Node", &["\"list\" on \"services\""])
    });
    drop(proxy);
    let web = Web::new(cluster);
    assert_eq!(web.backends(), None, "the agent may not know of it");
    web.cluster.allow("list", "services");
    web.wait_backends(&[&web.cluster.b]);
}

#[test]
fn what_is_wrong_with_a_service_is_told_to_the_node() {
    let web = Web::new(Cluster::with("svc-bad", &["--services"], |_| {}));
    web.wait_backends(&[&web.cluster.b]);
    let name = &web.cluster.name;
    let ports = json!({"spec": {"ports": [
        {"name": "http", "port": PORT},
        {"name": "sctp", "port": 81, "protocol": "SCTP"},
    ]}});
    web.cluster.api.patch::<Service>(name, "web", &ports).expect("patched");
    let words = [&format!("{name}/web"), "SCTP"];
    web.cluster.becomes("an Event on the node", || {
        web.cluster.has_event("Node", name, "InvalidService", &words)
    });
    web.wait_backends(&[&web.cluster.b]);
}

/// An agent that reaches the API server by an address of a Service would be led to an endpoint by its
/// own programs, one that may be gone.
#[test]
fn r23_the_agents_own_calls_are_not_translated() {
    let lab = Lab::new("svc-own").expect("a lab");
    let server = lab.pod("api", PodNet::DUAL).expect("a pod");
    let IpAddr::V4(at) = server.ipv4() else { panic!("an IPv4 address") };
    let api = Envtest::start_in(&server.netns(), at).expect("an API server");
    let at = api.address();
    let mut parts = Parts::on("svc-own", api, lab);
    let node = parts.lab.node_name().to_owned();
    parts.run_agent_by(&format!("nsenter --net=/run/netns/{node} --"));
    let flags = ["--services", "--services-external-ips"];
    let mut web = Web::new(parts.cluster(&flags, |_| {}));
    let b = &web.cluster.b;
    let _app = Web::serve(b);
    web.cluster.becomes("the Service to answer", || web.met() == Ok(b.ipv4()));

    web.vip = at;
    let ports = [json!({"name": "http", "port": at.port()})];
    let patch = json!({"spec": {"externalIPs": [at.ip()], "ports": ports}});
    web.cluster.api.patch::<Service>(&web.cluster.name, "web", &patch).expect("patched");
    web.wait_backends(&[b]);
    assert_eq!(web.met(), Ok(b.ipv4()), "others are led to the endpoint");
    web.cluster.agent.kill9();
    web.cluster.agent.restart().expect("starts");
    web.set(&[web.endpoint(&web.cluster.a, json!({}))]);
    web.wait_backends(&[&web.cluster.a]);
}
