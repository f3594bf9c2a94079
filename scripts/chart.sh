#!/usr/bin/env bash
# Lints charts/sidestep, renders it with each set of values in charts/sidestep/ci,
# validates and checks what comes out (chart_check.py), sees each set in ci/bad
# refused with the message that its first line expects, and packs the chart.
#
# Environment: SIDESTEP_LAB_DIR (default /var/lib/sidestep-lab) has helm and the
#              validator, by scripts/deps.sh --chart. Output goes to target/chart.
set -euo pipefail
cd "$(dirname "$0")/.."

LAB_DIR=${SIDESTEP_LAB_DIR:-/var/lib/sidestep-lab}
CHART=charts/sidestep
OUT=${CARGO_TARGET_DIR:-target}/chart
RENDERED=$OUT/rendered

say() { printf 'chart: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }
# Nothing of the user's own Helm is read or written.
helm() { HELM_CONFIG_HOME=$OUT/helm HELM_CACHE_HOME=$OUT/helm HELM_DATA_HOME=$OUT/helm \
    "$LAB_DIR/helm/bin/helm" "$@"; }
render() { helm template sidestep "$CHART" --namespace mesh-system "$@"; }

scripts/deps.sh --chart
rm -rf "$OUT"
mkdir -p "$RENDERED"

helm lint --strict --quiet "$CHART"
render >"$RENDERED/default.yaml"
for values in "$CHART"/ci/*.yaml; do
    helm lint --strict --quiet "$CHART" --values "$values"
    render --values "$values" >"$RENDERED/$(basename "$values")"
done
"$LAB_DIR/chart-check/bin/python3" scripts/chart_check.py "$CHART" "$RENDERED"

refused=0
for values in "$CHART"/ci/bad/*.yaml; do
    expected=$(sed -n '1s/^# expect: //p' "$values")
    [ -n "$expected" ] || die "$values: the first line has to be '# expect: REGEX'"
    if message=$(render --values "$values" 2>&1 >/dev/null); then
        die "$values was not refused"
    fi
    grep -qE -- "$expected" <<<"$message" || die "$values: '$expected' is not in: $message"
    refused=$((refused + 1))
done
echo "$refused wrong sets of values refused by name"

# What the user is told is rendered only by an install.
helm install sidestep "$CHART" --namespace mesh-system --dry-run=client >"$OUT/notes.txt"
grep -q 'rollout status daemonset/sidestep' "$OUT/notes.txt" || die "NOTES.txt was not rendered"

helm package "$CHART" --destination "$OUT" >/dev/null
echo "packed $(echo "$OUT"/*.tgz)"
