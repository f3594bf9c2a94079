#!/usr/bin/env python3
"""Checks what `helm template` made of charts/sidestep, and the chart's own tables.

    chart_check.py CHART RENDERED

CHART is the chart's directory; RENDERED has NAME.yaml for CHART/ci/NAME.yaml and
default.yaml. Prints each failure, and exits with 1 if there is any.

Needs PyYAML and kubernetes-validate: scripts/chart.sh runs it.
"""

import json
import re
import sys
from pathlib import Path

import kubernetes_validate
import yaml

# The oldest that Chart.yaml allows, the one most users have, the newest.
VERSIONS = ["1.30", "1.34", "1.37"]
# Kinds that Kubernetes has no schema of: the Prometheus operator's.
SKIPPED = ["PodMonitor"]

CAPABILITIES = ["BPF", "PERFMON", "NET_ADMIN", "NET_RAW", "SYS_ADMIN", "SYS_PTRACE", "DAC_READ_SEARCH"]
CLUSTER_RULES = [
    ([""], ["pods"], ["get", "list", "watch"], None),
    ([""], ["namespaces"], ["list", "watch"], None),
    ([""], ["nodes"], ["get"], None),  # patch as well, with the startup taint
    (["events.k8s.io"], ["events"], ["create", "patch"], None),
]
SERVICE_RULES = [
    ([""], ["services"], ["list", "watch"], None),
    (["discovery.k8s.io"], ["endpointslices"], ["list", "watch"], None),
    ([""], ["nodes"], ["list", "watch"], None),
]
KINDS = [
    "ClusterRole", "ClusterRoleBinding", "DaemonSet", "Role", "RoleBinding", "ServiceAccount",
]
# Path in the container and on the node, propagation, read-only.
MOUNTS = [
    ("/sys/fs/bpf", "/sys/fs/bpf", "HostToContainer", False),
    ("/sys/fs/cgroup", "/sys/fs/cgroup", None, True),
    ("/var/run/netns", "/var/run/netns", "HostToContainer", True),
]
CNI_MOUNTS = [
    ("/run/sidestep", "/run/sidestep", None, False),
    ("/etc/cni/net.d", "/etc/cni/net.d", None, False),
    ("/opt/cni/bin", "/opt/cni/bin", None, False),
]

failures = []


def check(where, what, found, wanted):
    if found != wanted:
        failures.append(f"{where}: {what}: {found!r} instead of {wanted!r}")


class Rendered:
    """The objects of one set of values."""

    def __init__(self, path):
        self.name = path.stem
        self.objects = [doc for doc in yaml.safe_load_all(path.read_text()) if doc]
        self.daemonset = self.one("DaemonSet")
        self.pod = self.daemonset["spec"]["template"]["spec"]
        (self.agent,) = self.pod["containers"]
        self.args = self.agent["args"]

    def one(self, kind):
        (found,) = [o for o in self.objects if o["kind"] == kind]
        return found

    def check(self, what, found, wanted):
        check(self.name, what, found, wanted)

    def args_of(self, prefix):
        return [arg for arg in self.args if arg.startswith(prefix)]

    def mounts(self):
        """As MOUNTS has them."""
        hosts = {v["name"]: v["hostPath"]["path"] for v in self.pod["volumes"]}
        return [
            (m["mountPath"], hosts.get(m["name"]), m.get("mountPropagation"), m.get("readOnly", False))
            for m in self.agent["volumeMounts"]
        ]

    def rules(self, kind):
        """As CLUSTER_RULES has them."""
        return [
            (r["apiGroups"], r["resources"], r["verbs"], r.get("resourceNames"))
            for r in self.one(kind)["rules"]
        ]


def check_schemas(rendered):
    for obj in rendered.objects:
        if obj["kind"] in SKIPPED:
            print(f"{rendered.name}: {obj['kind']} is not validated: it is no kind of Kubernetes")
            continue
        for version in VERSIONS:
            where = f"{rendered.name}: {obj['kind']} by the schema of {version}"
            try:
                # An older schema would stand in for one that is missing.
                check(where, "schema", kubernetes_validate.validate(obj, version, strict=True), version)
            except kubernetes_validate.ValidationError as error:
                path = ".".join(str(item) for item in error.path)
                failures.append(f"{where}: {path}: {error.message}")
            except kubernetes_validate.SchemaNotFoundError as error:
                failures.append(f"{where}: {error.message}")


def check_always(r):
    """What holds whatever the values are."""
    name = r.daemonset["metadata"]["name"]
    namespace = r.daemonset["metadata"]["namespace"]
    kinds = sorted(o["kind"] for o in r.objects)
    r.check("kinds", [k for k in kinds if k not in SKIPPED], KINDS)
    for obj in r.objects:
        r.check(f"name of {obj['kind']}", obj["metadata"]["name"], name)

    context = r.agent["securityContext"]
    r.check("privileged", context.get("privileged"), False)
    r.check("allowPrivilegeEscalation", context.get("allowPrivilegeEscalation"), False)
    r.check("readOnlyRootFilesystem", context.get("readOnlyRootFilesystem"), True)
    r.check("capabilities", context.get("capabilities"), {"drop": ["ALL"], "add": CAPABILITIES})
    r.check("user", (context.get("runAsUser"), context.get("runAsGroup")), (0, 0))
    r.check("seccompProfile", r.pod["securityContext"]["seccompProfile"], {"type": "RuntimeDefault"})
    r.check("seccompProfile of the container", context.get("seccompProfile"), None)
    r.check("other containers", [k for k in r.pod if k.endswith("Containers")], [])
    r.check("hostNetwork, hostPID", (r.pod.get("hostNetwork"), r.pod.get("hostPID")), (True, True))
    r.check("hostIPC", r.pod.get("hostIPC"), None)
    r.check("update", r.daemonset["spec"]["updateStrategy"]["type"], "RollingUpdate")
    r.check("nodes", r.pod["nodeSelector"].get("kubernetes.io/os"), "linux")
    (term,) = r.pod["affinity"]["nodeAffinity"][
        "requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    r.check("affinity", term, {"matchExpressions": [
        {"key": "sidestep.io/intercept", "operator": "NotIn", "values": ["disabled"]}]})

    r.check("first arguments", r.args[:2], ["run", "--kubernetes"])
    r.check("daemonset", r.args_of("--daemonset"), [f"--daemonset={namespace}/{name}"])
    env = {e["name"]: e for e in r.agent["env"]}
    r.check("node name", env["SIDESTEP_NODE_NAME"].get("valueFrom"),
            {"fieldRef": {"fieldPath": "spec.nodeName"}})
    for probe, path in [("startupProbe", "/healthz"), ("livenessProbe", "/healthz"),
                        ("readinessProbe", "/readyz")]:
        get = r.agent[probe]["httpGet"]
        r.check(probe, (get["path"], get["port"]), (path, "http"))
        r.check(f"{probe}'s host is the node itself", get["host"] in ("127.0.0.1", "::1"), True)

    volumes = [v["name"] for v in r.pod["volumes"]]
    r.check("volumes are host paths", [v["name"] for v in r.pod["volumes"] if "hostPath" not in v], [])
    r.check("volumes that are mounted", [m["name"] for m in r.agent["volumeMounts"]], volumes)
    cni = "--cni" in r.args
    r.check("cni flags", bool(r.args_of("--cni-")), cni)
    r.check("cni paths", {"cni-conf", "cni-bin", "run"} <= set(volumes), cni)

    nodes = ["get", "patch"] if "--remove-startup-taint" in r.args else ["get"]
    rules = [(g, res, nodes if res == ["nodes"] else verbs, names) for g, res, verbs, names in CLUSTER_RULES]
    rules[3:3] = SERVICE_RULES if "--services" in r.args else []
    r.check("rules of the ClusterRole", r.rules("ClusterRole"), rules)
    r.check("rules of the Role", r.rules("Role"),
            [(["apps"], ["daemonsets"], ["get", "list", "watch"], [name])])
    for kind, role in [("ClusterRoleBinding", "ClusterRole"), ("RoleBinding", "Role")]:
        binding = r.one(kind)
        r.check(f"role of {kind}", (binding["roleRef"]["kind"], binding["roleRef"]["name"]), (role, name))
        r.check(f"subjects of {kind}", binding["subjects"],
                [{"kind": "ServiceAccount", "name": name, "namespace": namespace}])
    r.check("account", r.pod["serviceAccountName"], name)
    selector = r.daemonset["spec"]["selector"]["matchLabels"]
    labels = r.daemonset["spec"]["template"]["metadata"]["labels"]
    r.check("selector", selector.items() <= labels.items(), True)


def check_default(r):
    r.check("mounts", r.mounts(), MOUNTS + CNI_MOUNTS)
    r.check("http", r.args_of("--http"), ["--http=127.0.0.1:9465"])
    r.check("cgroup", [e["name"] for e in r.agent["env"]], ["SIDESTEP_NODE_NAME", "RUST_LOG"])
    r.check("uninstall", r.args_of("--on-uninstall"), ["--on-uninstall=keep"])
    r.check("startup taint", r.args_of("--remove-startup-taint"), [])
    r.check("services", r.args_of("--services"), [])
    r.check("log", r.args_of("--log"), ["--log-format=json"])
    r.check("cni", r.args_of("--cni"), [
        "--cni", "--cni-conf-dir=/etc/cni/net.d", "--cni-bin-dir=/opt/cni/bin",
        "--cni-on-agent-away=refuse", "--cni-timeout=30", "--cni-exclude-namespaces=kube-system"])
    r.check("image", r.agent["image"], f"sidestep:{chart_version()}")
    r.check("priority", r.pod["priorityClassName"], "system-node-critical")
    r.check("tolerations", r.pod["tolerations"], [{"operator": "Exists"}])
    r.check("updates", r.daemonset["spec"]["updateStrategy"]["rollingUpdate"], {"maxUnavailable": 1})
    r.check("grace", r.pod["terminationGracePeriodSeconds"], 30)
    r.check("resources", r.agent["resources"], {"requests": {"cpu": "20m", "memory": "64Mi"}})


def check_cni_off(r):
    r.check("mounts", r.mounts(), MOUNTS)
    r.check("cni", r.args_of("--cni"), [])


def check_metrics(r):
    r.check("http", r.args_of("--http"), ["--http=0.0.0.0:19465"])
    r.check("ports", r.agent["ports"], [{"name": "http", "containerPort": 19465, "hostPort": 19465}])
    r.check("probe", r.agent["livenessProbe"]["httpGet"]["host"], "127.0.0.1")
    monitor = r.one("PodMonitor")
    r.check("labels", monitor["metadata"]["labels"].get("release"), "prometheus")
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    r.check("endpoint", (endpoint["port"], endpoint["path"], endpoint["interval"]),
            ("http", "/metrics", "15s"))
    r.check("selector", monitor["spec"]["selector"], r.daemonset["spec"]["selector"])


def check_custom(r):
    r.check("name", r.daemonset["metadata"]["name"], "mesh-agent")
    r.check("image", r.agent["image"],
            "registry.example.com:5000/mesh/sidestep@sha256:" + "0123456789abcdef" * 4)
    conf, binaries = "/var/lib/rancher/k3s/agent/etc/cni/net.d", "/var/lib/rancher/k3s/data/cni"
    r.check("cni", r.args_of("--cni"), [
        "--cni", f"--cni-conf-dir={conf}", f"--cni-bin-dir={binaries}",
        "--cni-on-agent-away=allow", "--cni-timeout=5",
        "--cni-exclude-namespaces=kube-system,istio-system"])
    r.check("mounts", r.mounts(), [
        MOUNTS[0], ("/sys/fs/cgroup", "/sys/fs/cgroup/unified", None, True), MOUNTS[2],
        CNI_MOUNTS[0], (conf, conf, None, False), (binaries, binaries, None, False)])
    env = {e["name"]: e.get("value") for e in r.agent["env"]}
    r.check("cgroup", env.get("SIDESTEP_CGROUP"), "/sys/fs/cgroup")
    api = [env.get(f"KUBERNETES_SERVICE_{part}") for part in ("HOST", "PORT")]
    r.check("API server", api, ["fd00::a", "7443"])
    r.check("uninstall", r.args_of("--on-uninstall"), ["--on-uninstall=unload"])
    r.check("startup taint", r.args_of("--remove-startup-taint"), ["--remove-startup-taint"])
    r.check("services", r.args_of("--services"), ["--services", "--services-external-ips", "--services-node-ports=primary,10.0.0.0/8"])
    r.check("http", r.args_of("--http"), ["--http=[::1]:9465"])
    r.check("probe", r.agent["livenessProbe"]["httpGet"]["host"], "::1")
    r.check("nodes", r.pod["nodeSelector"], {"kubernetes.io/os": "linux", "pool": "mesh"})
    r.check("priority", r.pod.get("priorityClassName"), None)
    r.check("selinux", r.pod["securityContext"].get("seLinuxOptions"), None)
    r.check("updates", r.daemonset["spec"]["updateStrategy"]["rollingUpdate"], {"maxUnavailable": "10%"})
    r.check("secrets", r.pod["imagePullSecrets"], [{"name": "registry"}])
    metadata = r.daemonset["spec"]["template"]["metadata"]
    r.check("label", metadata["labels"].get("team"), "mesh")
    r.check("annotation", metadata["annotations"].get("example.com/team"), "mesh")


def check_bare(r):
    r.check("tolerations", r.pod.get("tolerations"), None)
    r.check("resources", r.agent.get("resources"), None)
    r.check("excluded", r.args_of("--cni-exclude"), [])


def check_e2e(r):
    """What e2e/src/kind.rs takes for granted."""
    for kind in ["DaemonSet", "ClusterRole"]:
        r.check(f"name of the {kind}", r.one(kind)["metadata"]["name"], "sidestep")
    r.check("nodes", r.pod["nodeSelector"].get("sidestep-e2e"), "here")
    labels = r.daemonset["spec"]["template"]["metadata"]["labels"]
    r.check("label", labels.get("app.kubernetes.io/name"), "sidestep")
    r.check("image", (r.agent["image"].split(":")[0], r.agent["imagePullPolicy"]), ("sidestep", "Never"))


CHECKS = {
    "default": check_default,
    "cni-off": check_cni_off,
    "metrics": check_metrics,
    "custom": check_custom,
    "bare": check_bare,
    "e2e": check_e2e,
}


def chart_version():
    return yaml.safe_load((CHART / "Chart.yaml").read_text())["version"]


def leaves(values, prefix=""):
    """The dotted keys whose values hold no more keys."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key


def in_schema(schema, key):
    """What the schema has for a dotted key, or none."""
    definitions = schema["definitions"]
    for part in key.split("."):
        if "$ref" in schema:
            schema = definitions[schema["$ref"].rsplit("/", 1)[1]]
        further = schema.get("additionalProperties")
        schema = schema.get("properties", {}).get(part) or (further if further else None)
        if not schema:
            return None
    return schema


def open_objects(schema, path=""):
    """Paths of objects in the schema that take any key."""
    if isinstance(schema, dict):
        if "properties" in schema and schema.get("additionalProperties", True) is True:
            yield path or "/"
        for key, value in schema.items():
            yield from open_objects(value, f"{path}/{key}")


def check_tables():
    """values.yaml, values.schema.json and README.md have the same keys; versions agree."""
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    schema = json.loads((CHART / "values.schema.json").read_text())
    rows = dict(re.findall(r"^\| `([^`]+)` \| `([^`]+)` \|", (CHART / "README.md").read_text(), re.M))
    keys = list(leaves(values))
    for key in keys:
        if not in_schema(schema, key):
            failures.append(f"values.schema.json has no {key}")
        if key not in rows:
            failures.append(f"README.md has no row for {key}")
    for key, default in rows.items():
        if key not in keys:
            failures.append(f"README.md has a row for {key}, values.yaml has no such key")
            continue
        value = values
        for part in key.split("."):
            value = value[part]
        check("README.md", f"default of {key}", yaml.safe_load(default), value)
    for key in schema["properties"]:
        if key not in values and key != "global":
            failures.append(f"values.schema.json has {key}, values.yaml has not")
    for path in open_objects(schema):
        failures.append(f"values.schema.json: {path} takes any key")

    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    cargo = re.search(r'^version = "(.*)"', (CHART / "../../Cargo.toml").read_text(), re.M).group(1)
    check("Chart.yaml", "version and appVersion", (chart["version"], chart["appVersion"]), (cargo, cargo))


CHART, RENDERED = map(Path, sys.argv[1:])
check_tables()
sets = sorted(path.stem for path in RENDERED.glob("*.yaml"))
check("rendered", "sets of values", sets, sorted(CHECKS))
for name in sets:
    rendered = Rendered(RENDERED / f"{name}.yaml")
    check_schemas(rendered)
    check_always(rendered)
    CHECKS[name](rendered)
for failure in failures:
    print(f"chart: {failure}", file=sys.stderr)
if failures:
    sys.exit(1)
print(f"{len(sets)} sets of values rendered and checked against Kubernetes {', '.join(VERSIONS)}")
