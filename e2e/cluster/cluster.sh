#!/usr/bin/env bash
# A kind cluster of three nodes, on any machine.
#
#   cluster.sh up           makes it; fails if there is one of its name
#   cluster.sh in COMMAND...  runs a command with KUBECONFIG, kind, kubectl, helm and docker of the cluster
#   cluster.sh load ARCHIVE...  loads images into its nodes
#   cluster.sh istio DIR    loads Istio's images, and writes to DIR what helm installs them with:
#                           charts/ (where the published ones are not used) and values.yaml
#   cluster.sh tests DIR    loads the images of Kubernetes' own tests, and builds those: kubernetes-tests.sh
#   cluster.sh down         removes it
#   cluster.sh clean        down, also after a run that was killed, and what an engine of our own stores
#
# Environment:
#   ENGINE=docker  the docker engine of this machine, and published images
#   ENGINE=own     an engine in namespaces of its own (engine.sh) and images that are made here
#                  (node-image.sh): everything is from package registries
#   ENGINE=auto    default: docker, if it runs and an image registry answers; own elsewhere
#   IP=ipv4        default; or ipv6, or dual
#   PROXY=iptables default; or nftables: kube-proxy's mode
#   CLUSTER_NAME   default sidestep-e2e
#   SIDESTEP_LAB_DIR  default /var/lib/sidestep-lab: what is built and stored
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
export SIDESTEP_LAB_DIR=${SIDESTEP_LAB_DIR:-/var/lib/sidestep-lab}
RUN=$SIDESTEP_LAB_DIR/cluster
NAME=${CLUSTER_NAME:-sidestep-e2e}
IP=${IP:-ipv4} PROXY=${PROXY:-iptables}
# Seconds that something may take to happen.
PATIENCE=${PATIENCE:-180}
# What the scenarios' pods take from a registry, if there is one.
AGNHOST=registry.k8s.io/e2e-test-images/agnhost:2.53
# helm and kubectl are fetched where the user has none.
PATH=$PATH:$SIDESTEP_LAB_DIR/parts/bin:$SIDESTEP_LAB_DIR/helm/bin
export KUBECONFIG=$RUN/kubeconfig

say() { printf 'cluster: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }
have() { command -v "$1" >/dev/null 2>&1; }

# --- Which engine -----------------------------------------------------------------

# Prints own or docker, or fails and says why neither will do.
find_engine() {
    case ${ENGINE:-auto} in
    own) echo own ;;
    docker)
        docker info >/dev/null 2>&1 || die "ENGINE=docker: no docker engine answers (docker info)"
        echo docker
        ;;
    auto)
        if ! have docker || ! docker info >/dev/null 2>&1; then
            say "no docker engine answers: one of our own, and images made from packages (ENGINE=own)"
            echo own
        elif ! docker pull -q "$AGNHOST" >/dev/null 2>&1; then
            say "no image registry answers: an engine of our own, and images made from packages (ENGINE=own)"
            echo own
        else
            say "docker runs and registries answer: published images (ENGINE=docker)"
            echo docker
        fi
        ;;
    *) die "ENGINE=$ENGINE: must be auto, own or docker" ;;
    esac
}

# The engine of the cluster that is there.
engine() { cat "$RUN/engine" 2>/dev/null || die "there is no cluster: $0 up"; }

# Runs a command where the engine is.
inside() {
    local engine
    engine=$(engine) || exit
    if [ "$engine" = own ]; then "$here/engine.sh" in "$@"; else "$@"; fi
}
is_there() { inside kind get clusters 2>/dev/null | grep -x "$NAME" >/dev/null; }
nodes() { inside kind get nodes --name "$NAME"; }

# --- Up and down --------------------------------------------------------------------

up() {
    local image=() node chosen
    case $IP in ipv4 | ipv6 | dual) ;; *) die "IP=$IP: must be ipv4, ipv6 or dual" ;; esac
    case $PROXY in iptables | nftables) ;; *) die "PROXY=$PROXY: must be iptables or nftables" ;; esac
    mkdir -p "$RUN" 2>/dev/null || true
    [ -w "$RUN" ] ||
        die "cannot write to $RUN: run this as root, or name another directory by SIDESTEP_LAB_DIR"
    if [ -e "$RUN/engine" ]; then
        die "there is a cluster already, kept or left by a run that was killed: make clean-e2e removes it"
    fi
    chosen=$(find_engine) || exit
    echo "$chosen" >"$RUN/engine"
    trap 'say "the cluster is not complete: removing it"; down' EXIT
    have kind || "$here/parts.sh" kind
    if ! have helm || ! have kubectl; then "$here/../../scripts/deps.sh" --chart; fi
    if [ "$(engine)" = own ]; then
        "$here/../../scripts/deps.sh" --e2e
        "$here/engine.sh" up
        image=(--image "$("$here/node-image.sh")")
    fi
    ! is_there || { trap 'rm -f "$RUN/engine"' EXIT &&
        die "there is a kind cluster $NAME: kind delete cluster --name $NAME, or set CLUSTER_NAME"; }
    {
        cat "$here/../kind/cluster.yaml"
        printf 'networking:\n  ipFamily: %s\n  kubeProxyMode: %s\n' "$IP" "$PROXY"
    } >"$RUN/cluster.yaml"
    inside kind create cluster --name "$NAME" --config "$RUN/cluster.yaml" "${image[@]}" --wait "${PATIENCE}s"
    # kind waits for the control plane alone.
    inside kubectl wait --for=condition=Ready nodes --all --timeout "${PATIENCE}s" >/dev/null
    for node in $(nodes); do
        # systemd mounts it on a real node, but not inside a container.
        # shellcheck disable=SC2016 # For the shell on the node.
        inside docker exec "$node" sh -c \
            '[ "$(stat -f -c %T /sys/fs/bpf)" = bpf_fs ] || mount -t bpf bpf /sys/fs/bpf'
    done
    trap - EXIT
    say "$(nodes | wc -l) nodes of Kubernetes $(inside kubectl get nodes -o 'jsonpath={.items[0].status.nodeInfo.kubeletVersion}') are ready after $SECONDS s: $IP, kube-proxy with $PROXY"
}

down() {
    case $(cat "$RUN/engine" 2>/dev/null) in
    own) "$here/engine.sh" down ;;
    docker) kind delete cluster --name "$NAME" ;;
    esac
    rm -f "$RUN"/{engine,kubeconfig,cluster.yaml}
}

case ${1:-} in
up) up ;;
in) shift && inside "$@" ;;
load)
    shift
    for archive; do inside kind load image-archive "$archive" --name "$NAME"; done
    ;;
istio) "$here/istio.sh" "${2:?a directory}" ;;
tests) "$here/kubernetes-tests.sh" "${2:?a directory}" ;;
down) down ;;
clean)
    down
    # A run may have been killed before it said which engine.
    [ ! -d "$RUN" ] || "$here/engine.sh" clean
    ;;
*)
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0"
    exit 2
    ;;
esac
