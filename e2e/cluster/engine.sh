#!/usr/bin/env bash
# A container engine of our own, for machines without one: Debian's dockerd in namespaces that this makes.
#
#   engine.sh up              starts it
#   engine.sh in COMMAND...   runs a command where it is: its network, mounts and processes
#   engine.sh down            ends it with all that runs in it; what it stores stays, for the next time
#   engine.sh clean           down, also after a run that was killed, and removes what it stores
#   engine.sh running         says so by its exit status
#
# Everything that it runs is below one cgroup in each hierarchy. The machine's own cgroups, network,
# containerd and dockerd are left alone. There is no way out of its network: whatever downloads does
# so outside.
#
# Environment: SIDESTEP_LAB_DIR (default /var/lib/sidestep-lab): cluster/ in it has state, logs, store.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
RUN=${SIDESTEP_LAB_DIR:-/var/lib/sidestep-lab}/cluster
# Of the cgroups, and the host name inside.
NAME=sidestep-e2e
# What the store and three nodes take, in MB.
NEEDED_MB=8000
CONTAINERD=/run/engine-containerd/containerd.sock
# Tools that Debian keeps outside some users' PATH.
PATH=$PATH:/usr/sbin:/sbin

say() { printf 'engine: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

# Waits until a command succeeds: a minute.
eventually() {
    local deadline=$((SECONDS + 60))
    until "$@" >/dev/null 2>&1; do
        [ "$SECONDS" -lt "$deadline" ] || return 1
        sleep 0.1
    done
}

# --- Cgroups -------------------------------------------------------------------

# Of each hierarchy: how `mount` calls it (cgroup2 for v2), where it is mounted, our own path in it.
hierarchies() {
    local controllers path at
    while IFS=: read -r _ controllers path; do
        if [ -z "$controllers" ]; then
            at=$(findmnt -rnt cgroup2 -o TARGET | head -1)
            controllers=cgroup2
            # No process may be beside a cgroup with controllers, so not below the caller's.
            [ "$at" != /sys/fs/cgroup ] || path=/
        else
            at=$(findmnt -rnt cgroup -O "$controllers" -o TARGET | head -1)
        fi
        [ -z "$at" ] || echo "$controllers $at ${path%/}"
    done </proc/self/cgroup
}

make_cgroups() {
    local controllers at path dir
    hierarchies >"$RUN/hierarchies"
    while read -r controllers at path; do
        dir=$at$path/$NAME
        mkdir -p "$dir"
        # Its files have no sizes.
        [ -z "$(find "$dir" -name cgroup.procs -exec cat {} +)" ] ||
            die "$dir is in use by an engine of another SIDESTEP_LAB_DIR: end that one first (make clean-e2e)"
        echo "$dir" >>"$RUN/cgroups"
        case ,$controllers, in
        *,cpuset,*)
            cat "$at$path/cpuset.cpus" >"$dir/cpuset.cpus"
            cat "$at$path/cpuset.mems" >"$dir/cpuset.mems"
            ;;
        esac
    done <"$RUN/hierarchies"
}

# Moves this process into them.
join_cgroups() {
    local dir
    while read -r dir; do
        # Where the hierarchy has controllers, processes are in a leaf.
        [ ! -d "$dir/init" ] || dir=$dir/init
        echo "$BASHPID" >"$dir/cgroup.procs"
    done <"$RUN/cgroups"
}

kill_cgroups() {
    local dir
    while read -r dir; do
        [ -d "$dir" ] || continue
        # v2 kills all that is below at once, and nothing is in v1 alone.
        if [ -e "$dir/cgroup.kill" ]; then echo 1 >"$dir/cgroup.kill"; fi
    done <"$RUN/cgroups"
    while read -r dir; do
        eventually gone "$dir" || say "cannot remove the cgroup $dir: processes in it do not end"
    done <"$RUN/cgroups"
    rm -f "$RUN/cgroups" "$RUN/hierarchies"
}

gone() {
    [ ! -d "$1" ] || find "$1" -depth -type d -exec rmdir {} + 2>/dev/null
    [ ! -d "$1" ]
}

# --- Inside: the first process of the namespaces -----------------------------------

mount_all() {
    local controllers at
    hostname "$NAME"
    mount --make-rprivate /
    mount -t sysfs sysfs /sys
    # On v2 alone this is the hierarchy itself.
    if ! grep -q ' /sys/fs/cgroup ' "$RUN/hierarchies"; then
        mount -t tmpfs -o mode=755 cgroups /sys/fs/cgroup
    fi
    while read -r controllers at _; do
        mkdir -p "$at"
        case $controllers in
        cgroup2) mount -t cgroup2 cgroup2 "$at" ;;
        name=*) mount -t cgroup -o "none,$controllers" cgroup "$at" ;;
        *) mount -t cgroup -o "$controllers" cgroup "$at" ;;
        esac
    done <"$RUN/hierarchies"
    if [ -s /sys/fs/cgroup/cgroup.controllers ]; then
        mkdir -p /sys/fs/cgroup/init
        echo $$ >/sys/fs/cgroup/init/cgroup.procs
        sed 's/^\| / +/g' /sys/fs/cgroup/cgroup.controllers >/sys/fs/cgroup/cgroup.subtree_control
    fi
    mount -t bpf bpf /sys/fs/bpf
    mount -t tmpfs -o mode=755 run /run
    mkdir -p /run/netns /run/lock /run/docker
    mount --make-rshared /
    ip link set lo up
}

inside() {
    local containerd dockerd
    mount_all
    cat >/run/containerd.toml <<TOML
version = 2
root = "$RUN/store/containerd"
state = "/run/engine-containerd"
oom_score = 0
disabled_plugins = ["io.containerd.grpc.v1.cri"]
[grpc]
address = "$CONTAINERD"
TOML
    containerd --config /run/containerd.toml >"$RUN/log/containerd.log" 2>&1 &
    containerd=$!
    eventually test -S "$CONTAINERD"
    # No resolver: names of the cluster are CoreDNS's, and there are no others.
    dockerd --containerd "$CONTAINERD" --data-root "$RUN/store/docker" --exec-root /run/docker \
        --pidfile /run/docker.pid --oom-score-adjust 0 --storage-driver overlay2 \
        --add-runtime "amended=$here/runc-wrapper" --default-runtime amended \
        --exec-opt native.cgroupdriver=cgroupfs --dns 127.0.0.1 >"$RUN/log/dockerd.log" 2>&1 &
    dockerd=$!
    trap 'kill "$dockerd"; wait "$dockerd"; kill "$containerd"; wait "$containerd"; exit' TERM
    eventually docker info
    # Of a run that was killed.
    docker ps -aq | xargs -r docker rm -f -v >/dev/null
    touch "$RUN/ready"
    # And reaps what containers leave, as the first process must.
    wait "$dockerd"
}

# --- Verbs ---------------------------------------------------------------------

running() {
    [ -e "$RUN/pid" ] && grep -q "/$NAME" "/proc/$(cat "$RUN/pid")/cgroup" 2>/dev/null
}

up() {
    local free missing=() program
    for program in dockerd docker containerd runc unshare nsenter; do
        command -v "$program" >/dev/null || missing+=("$program")
    done
    [ ${#missing[@]} -eq 0 ] || die "missing: ${missing[*]} (scripts/deps.sh --e2e installs them)"
    mkdir -p "$RUN/log" "$RUN/store"
    free=$(df -Pm "$RUN" | awk 'END { print $4 }')
    [ "$free" -ge "$NEEDED_MB" ] ||
        die "$RUN has $free MB free, and a cluster needs $NEEDED_MB: make room, or set SIDESTEP_LAB_DIR"
    [ ! -e "$RUN/cgroups" ] || down
    rm -f "$RUN/ready"
    make_cgroups
    (
        join_cgroups
        exec setsid unshare --net --mount --pid --uts --ipc --cgroup --fork --kill-child --mount-proc \
            --propagation private "$here/engine.sh" inside </dev/null >"$RUN/log/engine.log" 2>&1
    ) &
    disown
    if ! eventually test -e "$RUN/ready" || ! pgrep -P $! >"$RUN/pid"; then
        tail -n 5 "$RUN"/log/{engine,containerd,dockerd}.log >&2
        kill_cgroups
        die "dockerd does not start: logs are in $RUN/log; engine.sh clean removes what it stores"
    fi
}

enter() {
    running || die "it does not run: engine.sh up"
    join_cgroups
    exec nsenter --target "$(cat "$RUN/pid")" --net --mount --pid --uts --ipc --cgroup --wd="$PWD" "$@"
}

down() {
    if running; then
        # With their volumes, which are most of what it stores.
        "$here/engine.sh" in sh -c 'docker ps -aq | xargs -r docker rm -f -v' >/dev/null || true
        kill -TERM "$(cat "$RUN/pid")"
        eventually not_running || true
    fi
    [ ! -e "$RUN/cgroups" ] || kill_cgroups
    rm -f "$RUN/pid" "$RUN/ready"
}
not_running() { ! running; }

[ "$(id -u)" = 0 ] || die "needs root: namespaces, cgroups and mounts"
case ${1:-} in
up) up ;;
in) shift && enter "$@" ;;
down) down ;;
clean) down && rm -rf "$RUN" ;;
running) running ;;
inside) inside ;;
*)
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0"
    exit 2
    ;;
esac
