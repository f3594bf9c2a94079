#!/usr/bin/env bash
# Prints the cargo flags by which the static binary gets its libelf: none where
# the distribution's libelf.a can be linked with -lelf -lz alone (Debian 12), else
# the feature that builds libelf from the sources in the libbpf-sys crate, which
# takes half a minute more and needs autoconf and its kin. Debian 13's libelf.a,
# for one, lacks symbols of its own (eu_search_tree_init).
set -euo pipefail

tmp=$(mktemp)
trap 'rm -f "$tmp"' EXIT

# The calls that libbpf makes and that pull in most of libelf.
if ! gcc -static -x c -o "$tmp" - -lelf -lz 2>/dev/null <<'END'
int elf_begin(void), elf_strptr(void), elf_update(void);
int main(void) { return elf_begin() + elf_strptr() + elf_update(); }
END
then
    echo "--features libbpf-rs/vendored"
fi
