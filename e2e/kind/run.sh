#!/usr/bin/env bash
# Runs the scenarios in a kind cluster of its own, then those that take a real
# mesh: `e2e run` has the former, the latter are below.
#
#   e2e/kind/run.sh [istio|linkerd|kuma|none]
#
# Default: the first mesh whose CLI is in PATH (istioctl, linkerd, kumactl); none
# leaves what takes a mesh out. Exits with 2 where docker, kind or the mesh's CLI
# is missing, with 1 where a scenario fails; then logs are in target/e2e-kind.
#
# Environment: KEEP=1 leaves the cluster; CLUSTER_NAME (default sidestep-e2e) is
# created and deleted, and must not exist; ARGS is for `e2e run`.
set -euo pipefail
cd "$(dirname "$0")/../.."

NAME=${CLUSTER_NAME:-sidestep-e2e}
LAB_DIR=${SIDESTEP_LAB_DIR:-/var/lib/sidestep-lab}
OUT=${CARGO_TARGET_DIR:-target}/e2e-kind
NS=sidestep
# Seconds that something may take to happen.
PATIENCE=180
# helm and kubectl are fetched where the user has none.
PATH=$PATH:$LAB_DIR/helm/bin

say() { printf 'e2e: %s\n' "$*" >&2; }
die() { say "FAILED: $*"; exit 1; }
pass() { say "ok: $*"; }
have() { command -v "$1" >/dev/null 2>&1; }

# --- What is needed -----------------------------------------------------------

declare -A CLI=([istio]=istioctl [linkerd]=linkerd [kuma]=kumactl)
mesh=${1:-}
if [ -z "$mesh" ]; then
    for candidate in istio linkerd kuma; do
        if have "${CLI[$candidate]}"; then
            mesh=$candidate
            break
        fi
    done
elif [ "$mesh" != none ] && [ -z "${CLI[$mesh]:-}" ]; then
    say "no such mesh: $mesh (istio, linkerd, kuma or none)"
    exit 2
fi
missing=()
if ! have docker; then
    missing+=("docker")
elif ! docker info >/dev/null 2>&1; then
    missing+=("a docker engine that runs (docker info fails)")
fi
have kind || missing+=("kind (https://kind.sigs.k8s.io)")
if [ -z "$mesh" ]; then
    missing+=("a mesh's CLI: istioctl, linkerd or kumactl (MESH=none: without a mesh)")
elif [ "$mesh" != none ] && ! have "${CLI[$mesh]}"; then
    missing+=("${CLI[$mesh]}")
fi
if [ ${#missing[@]} -gt 0 ]; then
    printf 'e2e: missing: %s\n' "${missing[@]}" >&2
    exit 2
fi
scripts/deps.sh --chart
if kind get clusters 2>/dev/null | grep -qx "$NAME"; then
    die "there is a kind cluster $NAME: delete it, or set CLUSTER_NAME"
fi

# --- Helpers --------------------------------------------------------------------

mkdir -p "$OUT"
export KUBECONFIG=$PWD/$OUT/kubeconfig

# Runs a command until it succeeds.
eventually() {
    local deadline=$((SECONDS + PATIENCE))
    until "$@"; do
        [ "$SECONDS" -lt "$deadline" ] || return 1
        sleep 1
    done
}

nodes() { kind get nodes --name "$NAME"; }
pod() { kubectl get pod -l "app=$1" -o jsonpath='{.items[0].metadata.name}'; }
node_of() { kubectl get pod "$1" -o jsonpath='{.spec.nodeName}'; }
agent_on() {
    kubectl -n "$NS" get pod -l app.kubernetes.io/name=sidestep \
        --field-selector "spec.nodeName=$1" -o jsonpath='{.items[0].metadata.name}'
}
# What the kernel of the pod's node says.
status_of() {
    kubectl -n "$NS" exec "$(agent_on "$(node_of "$1")")" -- /sidestep status --output json
}
enrolled() { status_of "$1" | grep -q "\"pod\": *\"default/$1\""; }
# The header that the server's sidecar adds says which identity the client's had.
identity() {
    kubectl exec "$(pod client)" -c app -- \
        curl -sf --max-time 5 "http://server/header?key=$IDENTITY_HEADER"
}
through_mesh() { identity | grep -q client; }
past_mesh() {
    local seen
    seen=$(identity) && [[ $seen != *client* ]]
}

finish() {
    local status=$?
    trap - EXIT
    set +e
    if [ "$status" != 0 ]; then
        kubectl get pods -A -o wide >"$OUT/pods.txt" 2>&1
        kubectl describe pods -A >"$OUT/describe.txt" 2>&1
        kubectl -n "$NS" logs -l app.kubernetes.io/name=sidestep --tail=-1 --prefix >"$OUT/agent.log" 2>&1
        kind export logs "$OUT/kind" --name "$NAME" >/dev/null 2>&1
        say "logs are in $OUT"
    fi
    if [ "${KEEP:-}" = 1 ]; then
        say "the cluster stays: export KUBECONFIG=$KUBECONFIG; kind delete cluster --name $NAME"
    else
        kind delete cluster --name "$NAME"
    fi
    exit "$status"
}

# --- The cluster ------------------------------------------------------------------

make image
archive=$(echo "${CARGO_TARGET_DIR:-target}"/image/sidestep-*.tar)
[ -f "$archive" ] || die "make image left no archive, or several: $archive"
cargo build -q -p sidestep-e2e
e2e=${CARGO_TARGET_DIR:-target}/debug/e2e
"$e2e" image "$OUT/pod.tar"

trap finish EXIT
kind create cluster --name "$NAME" --config e2e/kind/cluster.yaml --wait "${PATIENCE}s"
for node in $(nodes); do
    # systemd mounts it on a real node, but not inside a container.
    docker exec "$node" sh -c \
        'mountpoint -q /sys/fs/bpf && [ "$(stat -f -c %T /sys/fs/bpf)" = bpf_fs ] || mount -t bpf bpf /sys/fs/bpf'
done
kind load image-archive "$archive" --name "$NAME"
kind load image-archive "$OUT/pod.tar" --name "$NAME"

# shellcheck disable=SC2086 # Several arguments.
"$e2e" run --kind-name "$NAME" --logs "$OUT/scenarios" ${ARGS:-}

# --- Under a real mesh ---------------------------------------------------------------

if [ "$mesh" = none ]; then
    say "MESH=none: not run under a real mesh"
    exit
fi
# Before the mesh: Linkerd's own control plane is intercepted too.
helm -n "$NS" install sidestep charts/sidestep --create-namespace --wait --timeout "${PATIENCE}s"
pass "the agent is ready on $(nodes | wc -l) nodes"

case $mesh in
istio)
    IDENTITY_HEADER=X-Forwarded-Client-Cert
    INIT_CONTAINER=istio-init
    EXCLUDE=traffic.sidecar.istio.io/excludeOutboundPorts
    istioctl install -y --set profile=minimal --set values.pilot.cni.enabled=true
    kubectl label namespace default istio-injection=enabled
    ;;
linkerd)
    IDENTITY_HEADER=L5d-Client-Id
    INIT_CONTAINER=linkerd-init
    EXCLUDE=config.linkerd.io/skip-outbound-ports
    linkerd install --crds --set installGatewayAPI=true | kubectl apply -f -
    linkerd install --linkerd-cni-enabled | kubectl apply -f -
    # Not `linkerd check`: it insists on Linkerd's own CNI plugin.
    kubectl -n linkerd rollout status deployment --timeout "${PATIENCE}s"
    kubectl annotate namespace default linkerd.io/inject=enabled
    ;;
kuma)
    IDENTITY_HEADER=X-Forwarded-Client-Cert
    INIT_CONTAINER=kuma-init
    EXCLUDE=traffic.kuma.io/exclude-outbound-ports
    kumactl install control-plane \
        --set controlPlane.envVars.KUMA_RUNTIME_KUBERNETES_INJECTOR_CNI_ENABLED=true |
        kubectl apply -f -
    kubectl -n kuma-system rollout status deployment --timeout "${PATIENCE}s"
    eventually kubectl apply -f e2e/kind/kuma-mesh.yaml || die "Kuma takes no Mesh"
    kubectl label namespace default kuma.io/sidecar-injection=enabled
    ;;
esac

kubectl apply -f e2e/kind/apps.yaml
# The mesh's validating init container ends only if traffic is intercepted already.
kubectl rollout status deployment/server --timeout "${PATIENCE}s"
kubectl rollout status deployment/client --timeout "${PATIENCE}s"
for app in client server; do
    containers=$(kubectl get pod "$(pod $app)" -o jsonpath='{.spec.initContainers[*].name}')
    [[ " $containers " != *" $INIT_CONTAINER "* ]] || die "$app has $INIT_CONTAINER: iptables are in use"
    [[ $containers == *valid* ]] || die "$app has no validating init container: $containers"
    enrolled "$(pod $app)" || die "$app is not in the status of its node"
done
pass "fresh pods are intercepted before their first process"

eventually through_mesh || die "the server's sidecar saw no identity of the client"
pass "client to server through both sidecars: $(identity | tr -d '\n' | cut -c1-120)"

# shellcheck disable=SC2016 # For the shell in the pod.
kubectl exec "$(pod client)" -c app -- sh -c \
    'n=0; while [ ! -e /tmp/stop ]; do curl -sf --max-time 5 http://server/hostname >/dev/null || echo failed; n=$((n + 1)); done; echo "requests: $n"' \
    >"$OUT/load.txt" &
load=$!
helm -n "$NS" upgrade sidestep charts/sidestep --set log.level=debug --wait --timeout "${PATIENCE}s"
helm -n "$NS" rollback sidestep --wait --timeout "${PATIENCE}s"
kubectl exec "$(pod client)" -c app -- touch /tmp/stop
wait "$load"
! grep -q failed "$OUT/load.txt" || die "$(grep -c failed "$OUT/load.txt") requests failed while the agent was replaced"
grep -q 'requests: [1-9]' "$OUT/load.txt" || die "there was no load"
pass "upgrade and rollback under load: $(grep requests "$OUT/load.txt"), none failed"

client=$(pod client)
kubectl annotate pod "$client" "$EXCLUDE=80"
eventually past_mesh || die "the annotation $EXCLUDE did not take effect"
kubectl annotate pod "$client" "$EXCLUDE-"
eventually through_mesh || die "the annotation was taken away, and is still in effect"
pass "a mesh's annotation takes effect in a running pod, both ways"
