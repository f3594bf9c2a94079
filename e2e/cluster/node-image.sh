#!/usr/bin/env bash
# Makes the image of a kind node in our own engine (engine.sh, which has to run), for machines where
# the published one cannot be had: of Debian's packages, and of programs that parts.sh builds.
#
#   node-image.sh    makes it if it is not there, or not of these parts; prints its name
#
# Cold it takes about two minutes beside the programs, and 1 GB.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
LAB_DIR=${SIDESTEP_LAB_DIR:-/var/lib/sidestep-lab}
RUN=$LAB_DIR/cluster
BIN=$LAB_DIR/parts/bin
IMAGE=sidestep-e2e/node
BASE=sidestep-e2e/debian
# As node/network.yaml names it.
NETWORK=sidestep.io/network:1
SUITE=bookworm
# What kind's own image has, and: socat for port-forward, ping, and a container runtime.
PACKAGES=systemd,systemd-sysv,dbus,ca-certificates,conntrack,iptables,nftables,iproute2,ethtool
PACKAGES+=,util-linux,mount,kmod,libseccomp2,pigz,e2fsprogs,bash,curl,jq,procps,socat,ebtables
PACKAGES+=,hostname,findutils,containerd,runc,containernetworking-plugins,iputils-ping
PROGRAMS=(kubeadm kubelet kubectl crictl kube-apiserver kube-controller-manager kube-scheduler
    kube-proxy etcd etcdctl coredns)
PATH_IN_IMAGES=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin

say() { printf 'node-image: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }
in_engine() { "$here/engine.sh" in "$@"; }
# The time that a step takes, in one line.
step() { # WORDS COMMAND...
    local words=$1 start=$SECONDS
    shift
    printf 'node-image: %s ... ' "$words" >&2
    # In the background, where the shell still ends at the first failure.
    "$@" 2>"$work/log" &
    if ! wait $!; then
        echo FAILED >&2
        tail -n 5 "$work/log" >&2
        die "the node's image is not complete: the next try makes it anew"
    fi
    echo "$((SECONDS - start)) s" >&2
}
has() { # IMAGE KEY
    [ "$(in_engine docker image inspect -f '{{index .Config.Labels "key"}}' "$1" 2>/dev/null)" = "$2" ]
}
hash() { sha256sum | cut -c1-32; }

# Debian, by mmdebstrap, which takes the machine's own sources where this is the same Debian.
debian() {
    local sources=() excluded=() path
    # shellcheck disable=SC1091 # Of the system.
    if [ "$(. /etc/os-release && echo "${VERSION_CODENAME:-}")" = "$SUITE" ]; then
        for path in /etc/apt/sources.list /etc/apt/sources.list.d/debian.{list,sources}; do
            [ ! -s "$path" ] || sources+=("$path")
        done
    fi
    for path in doc man locale info; do
        excluded+=("--dpkgopt=path-exclude=/usr/share/$path/*")
    done
    mmdebstrap --mode=root --variant=minbase --quiet --include="$PACKAGES" "${excluded[@]}" \
        "$SUITE" - "${sources[@]}" |
        in_engine docker import --change "LABEL key=$base_key" - "$BASE"
}

# Everything that the Dockerfile copies, and the build.
node() {
    local context=$work/context kind
    kind=$("$here/parts.sh" --module sigs.k8s.io/kind)
    mkdir -p "$context/bin"
    cp -r --no-preserve=mode "$kind/images/base/files" "$context/kind"
    cp "$BIN"/{kubeadm,kubelet,kubectl,crictl} "$context/bin/"
    cp "$here"/node/* "$context/"
    printf %s "$("$BIN/kubeadm" version -o short)" >"$context/version"
    in_engine env DOCKER_BUILDKIT=0 docker build -q --network none --build-arg "BASE=$BASE" \
        --build-arg "PAUSE=$(listed pause)" -t "$IMAGE:empty" "$context"
}

# The images that kubeadm will ask for, or the one of that name.
listed() { # [NAME]
    "$BIN/kubeadm" config images list --kubernetes-version "$("$BIN/kubeadm" version -o short)" |
        grep "/${1:-.*}:"
}

# An image of one layer: a tar archive, from standard input.
import() { # IMAGE CHANGE...
    local image=$1 change changes=()
    shift
    for change in "ENV PATH=$PATH_IN_IMAGES" "$@"; do changes+=(--change "$change"); done
    in_engine docker import "${changes[@]}" - "$image"
}
programs() { # DIRECTORY PROGRAM...
    local directory=$1
    shift
    tar -C "$BIN" --owner 0 --group 0 --transform "s,^,$directory," -c "$@"
}

# What the control plane and the network run as, under the names that kubeadm gives them.
cluster_images() {
    local name
    for name in kube-apiserver kube-controller-manager kube-scheduler; do
        programs usr/local/bin/ "$name" | import "$(listed $name)"
    done
    programs usr/local/bin/ etcd etcdctl | import "$(listed etcd)"
    programs '' coredns | import "$(listed coredns)" 'ENTRYPOINT ["/coredns"]'
    printf '%s\n' '#include <signal.h>' '#include <unistd.h>' \
        'static void end(int signal) { (void)signal; _exit(0); }' \
        'int main(void) { signal(SIGINT, end); signal(SIGTERM, end); for (;;) pause(); }' |
        gcc -O2 -static -x c -o "$work/pause" -
    tar -C "$work" --owner 0 --group 0 -c pause | import "$(listed pause)" 'ENTRYPOINT ["/pause"]'

    # A shell and what changes a node's network, with its libraries: all of it the node's own.
    # shellcheck disable=SC2016 # For the shell in the image.
    in_engine docker run --rm --network none --entrypoint bash "$IMAGE:empty" -ec '
        cd /
        {
            echo tmp
            for program in bin/{sh,cat,mv,sleep} usr/sbin/ip{,6}tables{,-save,-restore} sbin/ip \
                usr/sbin/{nft,conntrack} sbin/modprobe usr/lib/*/xtables/*.so; do
                echo "$program"
                ldd "/$program" | grep -o "/[^ )]*" | cut -c2-
            done
        } | sort -u | tar --no-recursion --dereference --hard-dereference -cT -' >"$work/tools.tar"
    import "$NETWORK" <"$work/tools.tar"
    programs usr/local/bin/ kube-proxy >"$work/proxy.tar"
    tar --concatenate -f "$work/proxy.tar" "$work/tools.tar"
    import "$(listed kube-proxy)" <"$work/proxy.tar"
}

# Puts those images into the store of the node's own containerd, as kind does.
fill() {
    local id images status=0
    cluster_images
    mapfile -t images < <(listed && echo "$NETWORK")
    id=$(in_engine docker run -d --privileged --network none --entrypoint sleep "$IMAGE:empty" infinity)
    # shellcheck disable=SC2016 # For the shell in the image.
    {
        in_engine docker save "${images[@]}" | in_engine docker exec -i "$id" bash -ec '
            containerd >/tmp/log 2>&1 & pid=$!
            until ctr version >/dev/null 2>&1; do kill -0 $pid; sleep 0.1; done
            ctr -n k8s.io images import --all-platforms --no-unpack -
            kill $pid; wait $pid || true
            rm -rf /run/containerd/* /tmp/*' &&
            in_engine docker commit --change "LABEL key=$key" \
                --change 'ENTRYPOINT ["/usr/local/bin/entrypoint", "/sbin/init"]' "$id" "$IMAGE:latest"
    } || status=1
    in_engine docker rm -f -v "$id"
    in_engine docker rmi -f "${images[@]}" "$IMAGE:empty"
    # And what was made before it.
    in_engine docker image prune -f
    return "$status"
}

"$here/parts.sh" "${PROGRAMS[@]}"
base_key=$(echo "$SUITE $PACKAGES" | hash)
key=$({ echo "$base_key" && cat "$0" "$here"/node/* "$here/kind/go.sum" &&
    cat "${PROGRAMS[@]/#/$LAB_DIR/parts/key/}"; } | hash)
if ! has "$IMAGE" "$key"; then
    for program in mmdebstrap gcc; do
        command -v "$program" >/dev/null || die "missing: $program (scripts/deps.sh --e2e installs it)"
    done
    work=$(mktemp -d "$RUN/image.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    exec 3>&1 >/dev/null
    has "$BASE" "$base_key" || step "Debian's packages" debian
    step "the node" node
    step "the images of the control plane" fill
    exec >&3
fi
echo "$IMAGE:latest"
