#!/usr/bin/env bash
# Kubernetes' own tests for the cluster of cluster.sh, which has to be up: builds e2e.test, makes the
# images of its pods where registries cannot be reached, and loads those into the nodes.
#
#   kubernetes-tests.sh DIR    DIR gets what e2e.test takes by KUBE_TEST_REPO_LIST, repositories.yaml
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
export SIDESTEP_LAB_DIR=${SIDESTEP_LAB_DIR:-/var/lib/sidestep-lab}
RUN=$SIDESTEP_LAB_DIR/cluster
BIN=$SIDESTEP_LAB_DIR/parts/bin
NAME=${CLUSTER_NAME:-sidestep-e2e}
# Where our images are said to be, so that istio.sh's smaller agnhost is not mistaken for this one.
REPOSITORY=sidestep.io/kubernetes
SUITE=bookworm
# What the tests run in their pods: dig, curl, nc, ss, ip.
PACKAGES=ca-certificates,bind9-dnsutils,curl,netcat-openbsd,iproute2

say() { printf 'kubernetes-tests: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }
in_engine() { "$here/engine.sh" in "$@"; }

dir=${1:?usage: kubernetes-tests.sh DIR}
mkdir -p "$dir"
[ "$("$here/parts.sh" --list | awk '/^(e2e.test|kubelet) / { print $2 }' | uniq | wc -l)" = 1 ] ||
    die "the tests and the node are of different versions of Kubernetes: $here/kubernetes{,-tests}/go.mod"
"$here/parts.sh" e2e.test
case $(cat "$RUN/engine" 2>/dev/null) in
docker)
    echo '{}' >"$dir/repositories.yaml"
    exit
    ;;
own) ;;
*) die "there is no cluster: cluster.sh up" ;;
esac
"$here/parts.sh" agnhost coredns
echo "promoterE2eRegistry: $REPOSITORY" >"$dir/repositories.yaml"
# One image is both.
mapfile -t images < <(KUBE_TEST_REPO_LIST=$dir/repositories.yaml "$BIN/e2e.test" --list-images |
    grep -E "^$REPOSITORY/(agnhost|jessie-dnsutils):")
[ "${#images[@]}" = 2 ] || die "e2e.test asks for other images than those that are made here: ${images[*]}"
key=$({ cat "$0" "$SIDESTEP_LAB_DIR"/parts/key/{agnhost,coredns}; } | sha256sum | cut -c1-32)
if [ "$(in_engine docker image inspect -f '{{index .Config.Labels "key"}}' "${images[@]}" 2>/dev/null |
    sort -u)" != "$key" ]; then
    work=$(mktemp -d "$RUN/tests.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    start=$SECONDS
    certificate=$("$here/parts.sh" --module k8s.io/kubernetes)/test/images/agnhost/porter
    cp --no-preserve=mode "$certificate"/localhost.{crt,key} "$work/"
    cp "$BIN"/{agnhost,coredns} "$work/"
    # shellcheck disable=SC2016 # For mmdebstrap's shell.
    mmdebstrap --mode=root --variant=minbase --quiet --include="$PACKAGES" \
        --customize-hook="copy-in $work/agnhost $work/coredns $work/localhost.crt $work/localhost.key /" \
        --customize-hook='ln -s agnhost "$1/agnhost-2" && mkdir "$1/uploads"' \
        "$SUITE" - |
        in_engine docker import --change "LABEL key=$key" --change 'ENTRYPOINT ["/agnhost"]' \
            --change 'CMD ["pause"]' - "${images[0]}" >/dev/null
    in_engine docker tag "${images[@]}"
    say "the image of the tests' pods is made: $((SECONDS - start)) s"
fi
"$here/cluster.sh" in kind load docker-image "${images[@]}" --name "$NAME"
