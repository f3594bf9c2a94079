#!/usr/bin/env bash
# Runs the static binary, and the tests that need no Envoy and no API server, in virtual machines
# under other kernels with pure cgroup v2, and prints what came of it.
#
#   scripts/kernels.sh [--update-budget] [NAME...]
#
# NAME is of the table below; default: all. --update-budget writes the most that
# the verifier of any kernel counted, the running one's too, to bpf/budget.txt:
# run all for that, as root.
#
# The kernels are Debian's and Ubuntu's for clouds (see distro-kernel.sh). A machine is a
# kernel and an initramfs. Its processor is emulated, because /dev/kvm is not to
# be had everywhere: the tests get more time and less bulk (SLOWDOWN).
#
# Environment: TESTS="inbound outbound" runs these files of tests alone;
#              SIDESTEP_LAB_DIR (default /var/lib/sidestep-lab) gets the kernels;
#              PROFILE=demo builds them with another profile of Cargo.toml than release;
#              LIMIT=3600 lets a machine take that many seconds;
#              logs go to target/kernels.
set -euo pipefail
cd "$(dirname "$0")/.."

# Name, suite of Debian or Ubuntu, and whether Sidestep is to run there or to refuse.
kernels() {
    cat <<'END'
5.10 bullseye-security refuse
5.15 jammy-updates run
6.1 bookworm-security run
6.8 noble-updates run
6.12 trixie-security run
7.x trixie-backports run
END
}

# skipped [KERNEL]: what does not run in the machines, or in that one, and why: a
# file of tests, or one test of it. An entry that skips nothing is an error.
skipped() {
    sed -n "s/^@${1:-none} //p; /^@/!p" <<'END' | grep -E "^(${TESTS:-.*})[: ]" || [ $? = 1 ]
envoy: Envoy and its libraries are ten times as large as everything else

bad_input a_missing_clang_is_explained_by_the_build: it is about the build, not about kernels
beside: iptables and the many modules that it takes are not in the machine
resolvers: the programs that it runs are not in the machine
dns f50_f51_sockets_see_what_they_see_beside_istios_rules: nor is Python
splice_agent f41_a_policy_that_comes_later_stops_a_spliced_connection: nftables and its modules are not in the machine
splice_agent f40_conntrack_does_not_forget_a_spliced_connection_that_talks: the same
services r37_a_pod_whose_own_rules_translate_is_left_alone: the same
inbound f16_nat_rules_of_the_pod_do_not_change_which_ports_are_excluded: the same
inbound f15_a_pod_that_forwards_packets_is_told_so: the same
edges f18_an_app_cannot_send_its_packets_by_another_way: the same
sockets f21_f30_with_no_room_for_handovers_the_sidecar_is_told_nothing_rather_than_something_wrong: the same
edges hundreds_of_pods_and_ten_thousand_connections: it is about bulk, which takes too long when emulated
services_life r26_a_service_whose_addresses_have_no_room_is_left_to_kube_proxy_as_a_whole: the same
services_life r26_a_service_whose_endpoints_have_no_room_is_left_to_kube_proxy_as_a_whole: the same
@5.15 services_kernel: its modules were tried with 6.1 alone
@6.8 services_kernel: its modules were tried with 6.1 alone
@6.12 services_kernel: its modules were tried with 6.1 alone
@7.x services_kernel: its modules were tried with 6.1 alone
@5.15 outbound a_call_within_the_pod_leaves_by_lo_whatever_the_routes_say: pods that exempt an interface are refused there
@5.15 sockets sockets_bound_to_an_exempt_device_are_direct: the same
@5.15 sockets mptcp_sockets_are_captured_and_told_the_truth: nothing leads from a subflow to its connection there
END
}

# How many times slower than usual an emulated processor is; see slowdown() in
# lab/src/wait.rs.
SLOWDOWN=10
# What kernels that are too old lack first.
LACKS='helper bpf_get_netns_cookie in SockOps programs'
# Seconds that a machine may take.
LIMIT=${LIMIT:-1800}
# What the lab and the tests call: busybox has the rest. Its own sh would take
# its own setpriv, whatever the PATH says.
TOOLS=(bash ip nsenter setpriv sh unshare)
# In the order in which they need each other. A node loads them by itself.
MODULES=(llc stp bridge veth sch_ingress cls_bpf inet_diag udp_diag
    netfs fscache grace sunrpc lockd dns_resolver nfs nfsv4)

LAB_DIR=${SIDESTEP_LAB_DIR:-/var/lib/sidestep-lab}
TARGET=x86_64-unknown-linux-gnu
PATH=$PATH:${CARGO_HOME:-${HOME:-/root}/.cargo}/bin:/usr/sbin:/sbin
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$PWD/target}
OUT=$CARGO_TARGET_DIR/kernels

say() { printf 'kernels: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

[ "$(uname -m)" = x86_64 ] || die "the machines are x86_64, and this is $(uname -m) (make test TEST_KERNELS= does without)"
update=
if [ "${1:-}" = --update-budget ]; then
    update=1
    shift
fi
profile=${PROFILE:-release}
# Files of tests, and the same as a pattern: a|b|c. Empty: all.
read -ra files <<<"${TESTS:-}"
TESTS=$(IFS='|'; echo "${files[*]}")
[ -z "$update" ] || [ -z "$TESTS" ] || [[ " ${files[*]} " == *" budget "* ]] ||
    die "--update-budget takes the tests of the file budget"
wanted=("$@")
[ $# -gt 0 ] || mapfile -t wanted < <(kernels | cut -d ' ' -f 1)
for name in "${wanted[@]}"; do
    kernels | grep -q "^$name " || die "no kernel $name in the table: $(kernels | cut -d ' ' -f 1 | xargs)"
done

# --- The initramfs ----------------------------------------------------------

# archive DIR FILE: the directory's contents as a cpio archive. Several, one
# after the other, make one initramfs.
archive() { (cd "$1" && find . | cpio --quiet -o -H newc -R 0:0 >"$2"); }

# Static test binaries, named after their sources, as $1/NAME.
build_tests() {
    local flags name path chosen=(--test '*')
    [ -z "$TESTS" ] || chosen=("${files[@]/#/--test=}")
    read -ra flags < <(scripts/libelf.sh; echo)
    RUSTFLAGS='-C target-feature=+crt-static' cargo test --profile "$profile" --no-run --target "$TARGET" \
        -p sidestep "${chosen[@]}" "${flags[@]}" 2>&1 | tee "$OUT/build.log" | sed -u '/Executable/d' >&2
    sed -n 's/^ *Executable tests\/\(.*\)\.rs (\(.*\))$/\1 \2/p' "$OUT/build.log" |
        while read -r name path; do cp "$path" "$1/$name"; done
}

# list_tests KERNEL: the lines of /tests for the init: a test binary and its arguments.
list_tests() {
    local path name file test
    for path in "$OUT"/root/tests.d/*; do
        name=${path##*/}
        skipped "$1" | grep -q "^$name:" && continue
        printf '%s' "$name"
        # Only the budget's numbers are read from what the tests print.
        [ "$name" != budget ] || printf ' --nocapture'
        while read -r file test; do
            [ "$file" != "$name" ] || printf ' --skip %s' "$test"
        done < <(skipped "$1" | sed -n 's/^\([^:]* [^:]*\):.*/\1/p')
        # What `cargo test` leaves alone, for it is about the machine as a whole, is for here.
        printf ' --include-ignored --exact'
        echo
    done
}

# $OUT/base.cpio: all but the kernel's modules.
make_base() {
    local root=$OUT/root tool lib
    rm -rf "$root"
    mkdir -p "$root"/{bin,tests.d}
    build_tests "$root/tests.d"
    # After the tests: cargo puts a binary of the same name in the same place for them.
    make -s build PROFILE="$profile" >&2
    cp "$CARGO_TARGET_DIR/$TARGET/$profile/sidestep" "$(command -v busybox)" "$root/bin/"
    while read -r name; do
        [ -e "$root/tests.d/$name" ] || die "in the list of skipped tests, but there is no $name"
        rm "$root/tests.d/$name"
    done < <(skipped | sed -n 's/^\([^ :]*\):.*/\1/p')
    # With the libraries that they are linked to, in their own places.
    for tool in "${TOOLS[@]}"; do
        tool=$(command -v "$tool")
        while read -r lib; do
            mkdir -p "$root${lib%/*}"
            cp -L "$lib" "$root$lib"
        done < <(echo "$tool"; ldd "$tool" | grep -o '/[^ ]*')
    done
    # What scripts name in their first line.
    [ -e "$root/bin/sh" ] || ln -s "$(command -v sh)" "$root/bin/sh"
    install -m 755 scripts/kernels-init.sh "$root/init"
    archive "$root" "$OUT/base.cpio"
}

# make_own KERNEL FROM FILE: what is for one kernel: its tests, and the modules that the lab needs,
# if it has them as modules.
make_own() {
    local dir=$OUT/modules path module
    rm -rf "$dir"
    mkdir -p "$dir/modules"
    for module in "${MODULES[@]}"; do
        path=$(find "$2" -name "$module.ko*" | head -n 1)
        case $path in
        *.ko) cp "$path" "$dir/modules/" ;;
        *.xz) xz -dc "$path" >"$dir/modules/$module.ko" ;;
        *.zst) zstd -qdc "$path" >"$dir/modules/$module.ko" ;;
        '') ;;
        *) die "unknown compression: $path" ;;
        esac
    done
    printf '%s\n' "${MODULES[@]}" >"$dir/modules/list"
    list_tests "$1" >"$dir/tests"
    archive "$dir" "$3"
}

# --- A machine --------------------------------------------------------------

# run_machine NAME SUITE EXPECT: leaves $OUT/NAME.log, what the init and the
# tests said, and $OUT/NAME.console, what the kernel said.
run_machine() {
    local name=$1 dir=$LAB_DIR/kernels/$2 expect=$3
    scripts/distro-kernel.sh "$2" amd64 "$dir"
    make_own "$name" "$dir/modules" "$OUT/modules.cpio"
    cat "$OUT/base.cpio" "$OUT/modules.cpio" >"$OUT/initramfs"
    rm -f "$OUT/$name".{log,console}
    # panic=-1 and -no-reboot: a machine that panics ends at once.
    timeout --foreground "$LIMIT" qemu-system-x86_64 -accel tcg,thread=multi -cpu max -M q35 \
        -m 2G -smp 2 -display none -monitor none -nic none -no-reboot \
        -kernel "$dir/vmlinuz" -initrd "$OUT/initramfs" \
        -append "console=ttyS0 quiet panic=-1 expect=$expect SIDESTEP_BIN=/bin/sidestep SIDESTEP_TEST_SLOWDOWN=$SLOWDOWN" \
        -serial "file:$OUT/$name.console" -serial "file:$OUT/$name.log" || say "$name: QEMU failed, or $LIMIT seconds were over"
}

# judge NAME EXPECT: what was wrong, one a line; nothing where all is well.
judge() {
    local log=$OUT/$1.log skips filtered step status
    [ -s "$log" ] || { echo "it did not boot"; return; }
    grep -q '^@done' "$log" || echo "it did not come to its end"
    if [ "$2" = refuse ]; then
        grep -q '^@check 1$' "$log" || echo "check did not exit with 1"
        # By name, and not only by a failed load.
        grep -q "MISSING  $LACKS" "$log" || echo "check did not name what is missing"
        grep -q '^@run 1$' "$log" || echo "run did not refuse"
        grep -q "refused the eBPF programs or maps: it lacks $LACKS" "$log" ||
            echo "run did not name what is missing"
        # Which leaves nothing behind.
        grep -q '^Nothing is installed' "$log" || echo "status found something after that"
        return
    fi
    # Later kernels have links in their place.
    case $1 in
    5.15 | 6.1)
        grep -q 'MISSING  filters on devices .*module sch_ingress' "$log" ||
            echo "check did not miss the modules before they were loaded"
        ;;
    esac
    while read -r step status; do
        [ "$step" = budget ] && [ -n "$update" ] && continue
        [ "$status" = 0 ] || echo "$step failed ($status)"
    done < <(sed -n 's/^@\([^ ]*\) \([0-9]*\)$/\1 \2/p' "$log")
    skips=$(skipped "$1" | grep -c '^[^:]* ' || true)
    filtered=$(tally "$1" 'filtered out')
    [ "$filtered" = "$skips" ] || echo "$filtered tests were skipped, $skips are in the list"
}

# tally NAME WORD: the sum of the test binaries' own counts: passed, failed.
tally() { sed -n "s/^test result:.* \([0-9]*\) $2.*/\1/p" "$OUT/$1.log" | awk '{ n += $1 } END { print n + 0 }'; }

# --- All of them ------------------------------------------------------------

mkdir -p "$OUT"
make_base
# What was wrong, a line for each kernel.
failures=()
rows=()
# Whose verifiers have told; the running kernel's tells root only.
counted=()
if [ "$(id -u)" = 0 ] && "$OUT/root/bin/sidestep" check >"$OUT/check"; then
    sed -n '/^Programs/,$ s/^  \([^ ]*\)  *[0-9]*  *\([0-9]*\)$/verified \1 \2/p' "$OUT/check" >"$OUT/here.log"
    counted=(here)
fi
while read -r name suite expect; do
    [[ " ${wanted[*]} " == *" $name "* ]] || continue
    say "$name: booting"
    start=$SECONDS
    run_machine "$name" "$suite" "$expect" </dev/null
    mapfile -t wrong < <(judge "$name" "$expect")
    verdict=ok
    if [ ${#wrong[@]} -gt 0 ]; then
        verdict=FAILED
        mapfile -t -O ${#wrong[@]} wrong < <(sed -n 's/^test \(.*\) \.\.\. FAILED$/\1/p' "$OUT/$name.log")
        failures+=("$name: $(printf '%s; ' "${wrong[@]}")see $OUT/$name.log")
        say "$name failed; the end of $OUT/$name.log:"
        tail -n 60 "$OUT/$name.log" >&2 || tail -n 20 "$OUT/$name.console" >&2
    fi
    if [ "$expect" = refuse ]; then
        check=refused tests=-
    else
        check=ok tests="$(tally "$name" passed)/$(($(tally "$name" passed) + $(tally "$name" failed)))"
        counted+=("$name")
    fi
    version=$(cut -d ' ' -f 2 "$LAB_DIR/kernels/$suite/VERSION")
    rows+=("$name $version $check $tests $((SECONDS - start)) $verdict")
done < <(kernels)

printf '\n%-8s %-18s %-8s %-8s %-8s %s\n' kernel package check tests seconds result
printf '%s\n' "${rows[@]}" | awk '{ printf "%-8s %-18s %-8s %-8s %-8s %s\n", $1, $2, $3, $4, $5, $6 }'

# counts: "PROGRAM KERNEL COUNT" lines, from what the test of the budget printed.
counts() {
    local name
    for name in "${counted[@]}"; do
        sed -n "s/^verified \([^ ]*\) \([0-9]*\)$/\1 $name \2/p" "$OUT/$name.log"
    done
}
if [ ${#counted[@]} -gt 0 ]; then
    printf '\n%-16s' "verified insns"
    printf '%8s' "${counted[@]}" budget
    echo
    counts | awk -v kernels="${counted[*]}" '
        FILENAME != "-" { if ($0 !~ /^#/) budget[$1] = $2; next }
        { count[$1, $2] = $3; programs[$1] }
        END {
            columns = split(kernels, kernel, " ")
            for (program in programs) {
                printf "%-16s", program | "sort"
                for (k = 1; k <= columns; k++) printf "%8s", count[program, kernel[k]] | "sort"
                printf "%8s\n", budget[program] | "sort"
            }
        }' bpf/budget.txt -
fi

if [ -n "$update" ] && [ ${#failures[@]} = 0 ]; then
    {
        sed -n '/^#/p' bpf/budget.txt
        counts | awk '$3 > most[$1] { most[$1] = $3 } END { for (p in most) print p, most[p] }' | sort
    } >"$OUT/budget.txt"
    cp "$OUT/budget.txt" bpf/budget.txt
    say "wrote bpf/budget.txt"
fi

# Last, because a log is often kept from its end alone.
if [ ${#failures[@]} -gt 0 ]; then
    {
        echo
        printf 'kernels: %s\n' "${failures[@]}"
    } >&2
    exit 1
fi
