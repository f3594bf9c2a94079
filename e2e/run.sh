#!/usr/bin/env bash
# Runs the scenarios in a kind cluster of its own (cluster/cluster.sh says where it comes from), and
# removes it.
#
#   e2e/run.sh [ARGUMENTS of `e2e run`]
#   e2e/run.sh --bench [ARGUMENTS of `e2e bench`]    measures under a real Istio: `make bench-mesh`
#
# Environment, beside that of cluster.sh: MESH=istio (default), linkerd, kuma or none: what the scenarios
# of a mesh run under. KEEP=1 leaves the cluster. Logs of what fails are in target/e2e-logs.
# CONFORMANCE=1: in place of the scenarios, Kubernetes' own conformance tests of the network, without
# the agent and the mesh and with them; a quarter of an hour, and logs in target/e2e-kubernetes.
# CONFORMANCE=services: all its tests of Services, and once more without kube-proxy; hours.
set -euo pipefail
cd "$(dirname "$0")/.."

export SIDESTEP_LAB_DIR=${SIDESTEP_LAB_DIR:-/var/lib/sidestep-lab}
MESH=${MESH:-istio}
TARGET=${CARGO_TARGET_DIR:-target}
OUT=$TARGET/e2e-kind
NAME=${CLUSTER_NAME:-sidestep-e2e}
cluster=e2e/cluster/cluster.sh

say() { printf 'e2e: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

finish() {
    local status=$?
    trap - EXIT
    if [ "${KEEP:-}" = 1 ]; then
        say "the cluster stays: $cluster in kubectl get nodes; $cluster down"
    else
        "$cluster" down
    fi
    exit "$status"
}

what=run
case ${CONFORMANCE:-} in
'') ;;
1) what=judge suite=conformance ;;
services) what=judge suite=services ;;
*) die "CONFORMANCE=$CONFORMANCE: must be 1 or services" ;;
esac
[ "${1:-}" != --bench ] || { what=bench && shift; }
[ $what != bench ] || [ "$MESH" = istio ] || die "the measurement is made under Istio, not under MESH=$MESH"
[ $what != judge ] || [ "$MESH" != none ] || die "CONFORMANCE=$CONFORMANCE takes a mesh: MESH=none"

declare -A CLI=([linkerd]=linkerd [kuma]=kumactl)
case $MESH in
istio | none) ;;
linkerd | kuma)
    command -v "${CLI[$MESH]}" >/dev/null || die "MESH=$MESH takes its CLI in PATH: ${CLI[$MESH]}"
    ;;
*) die "MESH=$MESH: must be istio, linkerd, kuma or none" ;;
esac

# First what may be refused, then what takes minutes.
"$cluster" up
trap finish EXIT
make --no-print-directory image
archive=$(echo "$TARGET"/image/sidestep-*.tar)
[ -f "$archive" ] || die "make image left no archive, or several: $archive"
cargo build -q -p sidestep-e2e
mkdir -p "$OUT"
"$TARGET/debug/e2e" image "$OUT/pod.tar"
images=("$archive" "$OUT/pod.tar")
if [ $what = bench ]; then
    e2e/cluster/parts.sh fortio
    "$TARGET/debug/e2e" image "$OUT/program.tar" "$SIDESTEP_LAB_DIR/parts/bin/fortio"
    images+=("$OUT/program.tar")
fi

arguments=(--kind-name "$NAME")
[ "$MESH" = none ] || [ $what = bench ] || arguments+=(--mesh "$MESH")
"$cluster" load "${images[@]}"
if [ "$MESH" = istio ]; then
    "$cluster" istio "$OUT/istio"
    arguments+=(--istio "$OUT/istio")
fi
case $what in
run) arguments+=(--logs "$TARGET/e2e-logs") ;;
judge)
    "$cluster" tests "$OUT/kubernetes"
    arguments+=(--suite "$suite" --out "$TARGET/e2e-kubernetes" --program "$SIDESTEP_LAB_DIR/parts/bin/e2e.test"
        --repositories "$OUT/kubernetes/repositories.yaml")
    ;;
esac
"$cluster" in "$TARGET/debug/e2e" $what "${arguments[@]}" "$@"
