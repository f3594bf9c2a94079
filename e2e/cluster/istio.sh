#!/usr/bin/env bash
# Istio for the cluster of cluster.sh, which has to be up: loads its images into the nodes, and writes
# what helm installs it with.
#
#   istio.sh DIR    DIR gets values.yaml, and where registries cannot be reached charts/ (Istio's
#                   own, of the module) and gateway-api/ (the CRDs); else these are the published ones
#
# Where they cannot: istiod and pilot-agent are built from Istio's module, Envoy is PyPI's, without
# the filters that Istio adds to its own build, so the values turn off what asks for them.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
export SIDESTEP_LAB_DIR=${SIDESTEP_LAB_DIR:-/var/lib/sidestep-lab}
RUN=$SIDESTEP_LAB_DIR/cluster
BIN=$SIDESTEP_LAB_DIR/parts/bin
ENVOY=$SIDESTEP_LAB_DIR/envoy/bin/envoy
AGNHOST=registry.k8s.io/e2e-test-images/agnhost:2.53
TAG=sidestep-e2e
NAME=${CLUSTER_NAME:-sidestep-e2e}

say() { printf 'istio: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }
in_engine() { "$here/engine.sh" in "$@"; }
has() { # IMAGE KEY
    [ "$(in_engine docker image inspect -f '{{index .Config.Labels "key"}}' "$1" 2>/dev/null)" = "$2" ]
}

# The directory of that name as an image.
import() { # IMAGE DIRECTORY CHANGE...
    local image=$1 tree=$2 change changes=()
    shift 2
    for change in "LABEL key=$key" 'ENV PATH=/usr/local/bin:/usr/bin:/bin' "$@"; do
        changes+=(--change "$change")
    done
    mkdir -p "$tree/etc/ssl/certs" "$tree/tmp"
    chmod 1777 "$tree/tmp"
    cp /etc/ssl/certs/ca-certificates.crt "$tree/etc/ssl/certs/"
    printf '%s\n' root:x:0:0:root:/:/bin/sh istio-proxy:x:1337:1337::/:/bin/sh >"$tree/etc/passwd"
    tar -C "$tree" --owner 0 --group 0 -c . | in_engine docker import "${changes[@]}" - "$image" >/dev/null
}

# A program, with the libraries that it is linked with.
with_libraries() { # PROGRAM DIRECTORY PATH
    local library
    mkdir -p "$2/$(dirname "$3")"
    cp -L "$1" "$2/$3"
    for library in $(ldd "$1" | grep -o '/[^ )]*' | sort -u); do
        mkdir -p "$2$(dirname "$library")"
        cp -L "$library" "$2$library"
    done
}

make_images() {
    local proxy=$work/proxyv2 pilot=$work/pilot agnhost=$work/agnhost program library
    mkdir -p "$pilot/usr/local/bin" "$proxy"/{bin,usr/local/bin,var/lib/istio/envoy,etc/istio/proxy}
    cp "$BIN/pilot-discovery" "$pilot/usr/local/bin/"
    import "docker.io/istio/pilot:$TAG" "$pilot" 'USER 1337:1337' \
        'ENTRYPOINT ["/usr/local/bin/pilot-discovery"]'

    cp "$BIN/pilot-agent" "$proxy/usr/local/bin/"
    with_libraries "$ENVOY" "$proxy" usr/local/bin/envoy
    cp "$(command -v busybox)" "$proxy/bin/sh"
    # For istio-init, where the mesh installs its own rules.
    for program in ip{,6}tables{,-save,-restore}; do
        with_libraries "$(command -v "$program")" "$proxy" "usr/bin/$program"
    done
    for library in /usr/lib/*/xtables/*.so; do
        mkdir -p "$proxy$(dirname "$library")"
        cp -L "$library" "$proxy$library"
    done
    install -m 644 "$istio/tools/packaging/common/envoy_bootstrap.json" \
        "$proxy/var/lib/istio/envoy/envoy_bootstrap_tmpl.json"
    # The proxy writes its configuration there, whatever its user.
    chmod 777 "$proxy/etc/istio/proxy"
    import "docker.io/istio/proxyv2:$TAG" "$proxy" 'USER 1337:1337' \
        'ENTRYPOINT ["/usr/local/bin/pilot-agent"]'

    mkdir -p "$agnhost/bin" "$agnhost/uploads"
    cp "$BIN/agnhost" "$agnhost/"
    cp "$(command -v busybox)" "$agnhost/bin/sh"
    install -m 644 "$kubernetes"/test/images/agnhost/porter/localhost.{crt,key} "$agnhost/"
    import "$AGNHOST" "$agnhost" 'ENTRYPOINT ["/agnhost"]' 'CMD ["pause"]'
}

dir=${1:?usage: istio.sh DIR}
mkdir -p "$dir"
case $(cat "$RUN/engine" 2>/dev/null) in
docker)
    : >"$dir/values.yaml"
    exit
    ;;
own) ;;
*) die "there is no cluster: cluster.sh up" ;;
esac
"$here/parts.sh" pilot-discovery pilot-agent agnhost
[ -x "$ENVOY" ] || die "there is no $ENVOY: scripts/deps.sh installs it"
istio=$("$here/parts.sh" --module istio.io/istio)
gateway_api=$("$here/parts.sh" --module sigs.k8s.io/gateway-api)
kubernetes=$("$here/parts.sh" --module k8s.io/kubernetes)
key=$({ cat "$0" "$(dirname "$ENVOY")/../VERSION"
    cat "$SIDESTEP_LAB_DIR"/parts/key/{pilot-discovery,pilot-agent,agnhost}; } | sha256sum | cut -c1-32)
images=("docker.io/istio/pilot:$TAG" "docker.io/istio/proxyv2:$TAG" "$AGNHOST")
for image in "${images[@]}"; do
    has "$image" "$key" || wanted=1
done
if [ -n "${wanted:-}" ]; then
    work=$(mktemp -d "$RUN/istio.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    start=$SECONDS
    make_images
    say "images of istiod, of its proxy and of agnhost are made: $((SECONDS - start)) s"
fi
"$here/cluster.sh" in kind load docker-image "${images[@]}" --name "$NAME"
rm -rf "$dir/charts" "$dir/gateway-api"
cp -r --no-preserve=mode "$istio/manifests/charts" "$dir/charts"
cp -r --no-preserve=mode "$gateway_api/config/crd/standard" "$dir/gateway-api"
cat >"$dir/values.yaml" <<END_OF_VALUES
# Images that are made here and loaded into the nodes.
global:
  hub: docker.io/istio
  tag: $TAG
  imagePullPolicy: IfNotPresent
# The published Envoy has no filters of Istio's own.
telemetry:
  enabled: false
pilot:
  env:
    PILOT_ENABLE_ALPN_FILTER: "false"
    PILOT_ENABLE_METADATA_EXCHANGE: "false"
END_OF_VALUES
