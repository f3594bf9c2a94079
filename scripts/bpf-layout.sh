#!/usr/bin/env bash
# Checks the rules of bpf/: each header compiles alone, a domain includes no other, and programs are
# in the objects' own files. libbpf's headers are those that a build of the agent has left.
set -euo pipefail
cd "$(dirname "$0")/.."

shopt -s nullglob
arch=$(uname -m)
include=("${CARGO_TARGET_DIR:-target}"/debug/build/libbpf-sys-*/out/include)
[ ${#include[@]} -gt 0 ] || { echo "bpf-layout: build the agent first: cargo build" >&2; exit 1; }
for clang in "${CLANG:-clang}" clang-{14..24}; do
	command -v "$clang" > /dev/null && break
done
status=0
fail() {
	echo "bpf-layout: $*" >&2
	status=1
}
for header in bpf/*/*.h; do
	"$clang" -target bpf -mcpu=v3 -fsyntax-only -Wall -Wextra -Wshadow -Werror -I bpf \
		-I "vmlinux/$arch" -I "${include[0]}" -include "$header" -x c /dev/null ||
		fail "$header does not compile alone"
done
for domain in mesh service splice; do
	for other in mesh service splice; do
		[ "$domain" = "$other" ] && continue
		grep -Hn "#include \"$other/" bpf/"$domain"/* && fail "$domain includes $other"
	done
	grep -Hn "#include \"$domain/" bpf/lib/* && fail "lib includes $domain"
done
grep -n 'SEC("[^.]' bpf/*/*.h && fail "a program is in a header"
exit $status
