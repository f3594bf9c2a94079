#!/usr/bin/env bash
# Regenerates vmlinux/ARCH/vmlinux.h, the kernel's types as C declarations.
#
#   scripts/vmlinux.sh x86_64    from the kernel that is running
#   scripts/vmlinux.sh aarch64   from Debian's arm64 cloud kernel, which is only
#                                downloaded and unpacked, never installed or run
#
# Needs bpftool; aarch64 also needs apt-get, dpkg and python3.
# Environment: DEBIAN_SUITE (default trixie-security), and see distro-kernel.sh.
set -euo pipefail
cd "$(dirname "$0")/.."

# Debian keeps bpftool in /usr/sbin, which is not in every user's PATH.
PATH=$PATH:/usr/sbin:/sbin

say() { printf '%s\n' "$*" >&2; }
die() { say "vmlinux.sh: $*"; exit 1; }

command -v bpftool >/dev/null || die "bpftool is not installed (apt-get install bpftool)"

arch=${1:-}
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT

# dump BTF ARCH: writes vmlinux/ARCH/vmlinux.h, or leaves the old one when it fails.
dump() {
    bpftool btf dump file "$1" format c >"$tmp/vmlinux.h"
    grep -q '^struct task_struct {' "$tmp/vmlinux.h" || die "no struct task_struct in the BTF"
    mkdir -p "vmlinux/$2"
    cp "$tmp/vmlinux.h" "vmlinux/$2/vmlinux.h"
    say "wrote vmlinux/$2/vmlinux.h"
}

# cut_btf IMAGE BTF: the kernel's BTF lies uncompressed inside the Image, which
# is itself gzipped or, as an EFI zboot file, carries a compressed payload.
cut_btf() {
    python3 - "$1" "$2" <<'END'
import struct, sys, zlib

image = open(sys.argv[1], "rb").read()

if image[:2] == b"MZ" and image[4:8] == b"zimg":
    # EFI zboot header: payload offset and size at 8 and 12, method at 24.
    start, size = struct.unpack_from("<II", image, 8)
    method = image[24:56].split(b"\0")[0]
    if method != b"gzip":
        sys.exit(f"EFI zboot payload is compressed with {method!r}, not gzip")
    image = image[start : start + size]
if image[:2] == b"\x1f\x8b":
    image = zlib.decompressobj(zlib.MAX_WBITS | 16).decompress(image)

# struct btf_header: magic 0xeb9f, version 1, flags 0, hdr_len 24, then offset
# and length of the types and of the strings that follow them. The magic can
# turn up by chance, so the rest of the header must make sense too; of several
# BTF blobs the kernel's own is by far the largest.
best, at = b"", -1
while (at := image.find(b"\x9f\xeb\x01\x00", at + 1)) >= 0:
    if at + 24 > len(image):
        break
    hdr, types, types_len, strings, strings_len = struct.unpack_from("<5I", image, at + 4)
    end = at + hdr + strings + strings_len
    if hdr != 24 or types != 0 or strings != types_len or end > len(image):
        continue
    if image[at + hdr + strings] != 0 or image[end - 1] != 0:  # first and last string
        continue
    if end - at > len(best):
        best = image[at:end]
if not best:
    sys.exit("no BTF found in the kernel image")
open(sys.argv[2], "wb").write(best)
END
}

case $arch in
x86_64)
    [ "$(uname -m)" = x86_64 ] || die "x86_64 is made from the running kernel, and this is $(uname -m)"
    [ -r /sys/kernel/btf/vmlinux ] || die "this kernel has no /sys/kernel/btf/vmlinux"
    say "from the running kernel, $(uname -r)"
    dump /sys/kernel/btf/vmlinux x86_64
    ;;
aarch64)
    scripts/distro-kernel.sh "${DEBIAN_SUITE:-trixie-security}" arm64 "$tmp/kernel"
    say "from $(cat "$tmp/kernel/VERSION")"
    cut_btf "$tmp/kernel/vmlinuz" "$tmp/btf"
    dump "$tmp/btf" aarch64
    ;;
*)
    die "usage: scripts/vmlinux.sh x86_64|aarch64"
    ;;
esac
