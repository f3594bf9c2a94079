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
use libbpf_rs::{MapCore, MapFlags, MapHandle};
use serde_json::{Value, json};
use sidestep::dataplane::LAYOUT;
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

#[test]
fn status_names_services_and_tells_where_the_kernel_differs() {
    let web = Web::new(Cluster::with("svc-status", &["--services"], |_| {}));
    web.wait_backends(&[&web.cluster.b]);
    let name = &web.cluster.name;
    let socket = web.cluster.dir.path().join("cni.sock");
    let socket = socket.to_str().expect("a path");
    let status = |args: &[&str]| {
        let args = [&["status", "--cni-socket", socket], args].concat();
        web.cluster.agent.command(&args).map_err(|error| format!("{error:#}"))
    };
    let json = |args: &[&str]| -> Value {
        let text = status(&[&["-o", "json"], args].concat()).expect("a status");
        serde_json::from_str(&text).expect("JSON")
    };
    let (service, port) = (format!("{name}/web"), format!("{name}/web:http"));
    let endpoint = addr(web.cluster.b.ipv4(), TARGET);
    let found = json!([{
        "service": port, "address": web.vip, "protocol": "TCP", "backends": [endpoint],
    }]);
    let one = json(&["--service", &service]);
    assert_eq!((&one["services"], &one["service_drift"]), (&found, &json!([])));
    let all = json(&["--services"]);
    let all = all["services"].as_array().expect("services");
    // The API server's own.
    for of in ["default/kubernetes:https", &port] {
        assert!(all.iter().any(|one| one["service"] == of), "{of}: {all:#?}");
    }
    let text = status(&["--service", &service]).expect("a status");
    let line = format!("  {} TCP {port}  {endpoint}\n", web.vip);
    assert!(text.contains(&line) && !text.contains("default/kubernetes"), "{text}");
    assert!(text.contains("Addresses that differ from what the agent wants: 0\n"), "{text}");

    // One that does not exist, or has nothing that could be translated.
    web.cluster.create(json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"name": "headless", "namespace": name},
        "spec": {"clusterIP": "None", "ports": [{"port": PORT}]},
    }));
    for unknown in ["we", "headless"] {
        let unknown = format!("{name}/{unknown}");
        let error = status(&["--service", &unknown]).expect_err("there is no such Service");
        let named = format!("no address of a Service {unknown} is translated");
        assert!(error.contains(&named), "{error}");
    }

    // Somebody else takes the address out of the kernel's map, and puts another one in.
    let path = web.cluster.agent.bpffs().join(LAYOUT).join("maps/services");
    let map = MapHandle::from_pinned_path(path).expect("a pinned map");
    let vip = web.vip.ip().to_string();
    let IpAddr::V4(v4) = web.vip.ip() else { panic!("{vip} is IPv6") };
    let is_it = |key: &Vec<u8>| key.windows(4).any(|part| part == v4.octets());
    let key = map.keys().find(is_it).expect("the address");
    let list = map.lookup(&key, MapFlags::ANY).expect("read").expect("an entry");
    map.delete(&key).expect("deleted");
    let mut other = key.clone();
    let at = other.windows(4).position(|part| part == v4.octets()).expect("the address");
    other[at..at + 4].copy_from_slice(&[192, 0, 2, 7]);
    map.update(&other, &list, MapFlags::ANY).expect("written");
    let gone = json!({
        "address": web.vip, "protocol": "TCP", "service": port,
        "kernel": null, "agent": [endpoint],
    });
    let new = json!({
        "address": format!("192.0.2.7:{PORT}"), "protocol": "TCP", "service": null,
        "kernel": [endpoint], "agent": null,
    });
    assert_eq!(json(&["--services"])["service_drift"], json!([gone, new]));
    assert_eq!(json(&["--service", &service])["service_drift"], json!([gone]));
    let text = status(&["--services"]).expect("a status");
    let line = format!("{} TCP {port}  kernel: not translated; agent: {endpoint}", web.vip);
    assert!(text.contains("what the agent wants: 2\n") && text.contains(&line), "{text}");

    // Nobody says names.
    let args = ["status", "--cni-socket", "/nonexistent/s", "--services", "-o", "json"];
    let text = web.cluster.agent.command(&args).expect("a status");
    let status: Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!(status["service_drift"], Value::Null);
    let named = status["services"].as_array().expect("services").iter();
    assert_eq!(named.filter(|one| !one["service"].is_null()).count(), 0, "{text}");
    let args = ["status", "--cni-socket", "/nonexistent/s", "--service", &service];
    let error = web.cluster.agent.command(&args).expect_err("nobody knows it");
    assert!(format!("{error:#}").contains("/nonexistent/s"), "{error:#}");
}
