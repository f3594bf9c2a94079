#!/usr/bin/env bash
# Fetches the kernel that a suite of Debian or Ubuntu has for virtual machines and
# unpacks it: it is neither installed nor run.
#
#   scripts/distro-kernel.sh SUITE ARCH DIR
#
# gives DIR/vmlinuz, DIR/modules (what /lib/modules/VERSION is) and DIR/VERSION
# (the package's name and version). Does nothing for a week after that. The
# newest kernel is found through the meta package, whatever its name.
#
# Needs apt-get and dpkg, no root; for Ubuntu's kernels curl as well.
# Environment: DEBIAN_MIRROR, UBUNTU_MIRROR, such as scheme://host; by default the
#              mirror that this system's own apt uses, or archive.ubuntu.com.
set -euo pipefail

say() { printf 'distro-kernel.sh: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

[ $# = 3 ] || die "usage: scripts/distro-kernel.sh SUITE ARCH DIR"
suite=$1 arch=$2 dir=$3

[ -z "$(find "$dir/VERSION" -mtime -7 2>/dev/null)" ] || exit 0

case $suite in
*-security) distro=Debian archive=debian-security ;;
focal* | jammy* | noble*) distro=Ubuntu archive=ubuntu ;;
*) distro=Debian archive=debian ;;
esac

# The part before /debian of the archive's address, as apt has it.
own_mirror() {
    apt-get indextargets --format "\$(SITE)" 'Identifier: Packages' "Origin: $distro" |
        sed -n "s,/$archive\$,,p" | head -n 1
}
if [ $distro = Debian ]; then
    meta=linux-image-cloud-$arch
    keys=/usr/share/keyrings/debian-archive-keyring.gpg
    mirror=${DEBIAN_MIRROR:-$(own_mirror)}
    [ -n "$mirror" ] || die "this system's apt has no Debian mirror: name one by DEBIAN_MIRROR"
else
    meta=linux-image-virtual
    keys=/usr/share/keyrings/ubuntu-archive-keyring.gpg
    mirror=${UBUNTU_MIRROR:-$(own_mirror)}
    mirror=${mirror:-http://archive.ubuntu.com}
fi

# apt gets a configuration and a state of its own: of this system's, only the
# keyring that checks the signatures is read, and nothing is changed.
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
mkdir -p "$tmp"/{lists/partial,cache/archives/partial,root}
: >"$tmp/status"
if [ $distro = Ubuntu ] && [ ! -e $keys ]; then
    # Debian has no package with Ubuntu's keys. This one is known by its sum.
    package=pool/main/u/ubuntu-keyring/ubuntu-keyring_2023.11.28.1_all.deb
    curl -fsSL --retry 3 -o "$tmp/keyring" "$mirror/ubuntu/$package" || die "cannot fetch $package"
    echo "36de43b15853ccae0028e9a767613770c704833f82586f28eb262f0311adb8a8  $tmp/keyring" |
        sha256sum --check --quiet || die "$package is another one"
    dpkg -x "$tmp/keyring" "$tmp/keys"
    keys=$tmp/keys$keys
fi
echo "deb [arch=$arch signed-by=$keys] $mirror/$archive $suite main" >"$tmp/sources.list"
cat >"$tmp/apt.conf" <<END
APT::Architecture "$arch";
APT::Architectures { "$arch"; };
APT::Sandbox::User "root";
Acquire::IndexTargets::deb::Contents-deb::DefaultEnabled "false";
Acquire::Languages "none";
Dir::State "$tmp";
Dir::State::lists "$tmp/lists";
Dir::State::status "$tmp/status";
Dir::Cache "$tmp/cache";
Dir::Etc::sourcelist "$tmp/sources.list";
Dir::Etc::sourceparts "/dev/null";
END
export APT_CONFIG=$tmp/apt.conf

# depends PACKAGE NAME...: the packages NAME-* that it depends on.
depends() {
    local package=$1
    shift
    apt-cache show --no-all-versions "$package" | sed -n 's/^Depends: //p' | tr ',' '\n' |
        sed -nE "s/^ *(($(IFS='|' && echo "$*"))-[^ ]*).*/\1/p"
}

fetch() {
    local image version parts deb kernel modules
    apt-get -qq update >&2 || return 1
    image=$(depends "$meta" linux-image)
    [ -n "$image" ] || { say "$suite: $meta names no image"; return 1; }
    version=$(apt-cache show --no-all-versions "$image" | sed -n 's/^Version: //p')
    # From 7.x on it is only a name for packages with the kernel and its modules.
    mapfile -t parts < <(depends "$image" linux-binary linux-modules)
    (cd "$tmp" && apt-get -qq download "$image" "${parts[@]}" >&2) || return 1
    for deb in "$tmp"/*.deb; do
        dpkg -x "$deb" "$tmp/root" || return 1
    done
    # Where the packages have the two depends on their age.
    kernel=$(find "$tmp/root" -name 'vmlinuz*' -type f)
    modules=$(find "$tmp/root" -path '*/lib/modules/*' -prune -type d)
    if [ ! -f "$kernel" ] || [ ! -d "$modules" ]; then
        say "$image: no kernel, or several"
        return 1
    fi
    mkdir -p "$dir"
    rm -rf "$dir/VERSION" "$dir/modules"
    mv "$kernel" "$dir/vmlinuz"
    mv "$modules" "$dir/modules"
    echo "$image $version" >"$dir/VERSION"
}

if ! fetch; then
    [ -e "$dir/VERSION" ] || die "no kernel from $suite"
    say "could not look for a newer kernel in $suite; staying with $(cat "$dir/VERSION")"
fi
