#!/usr/bin/env bash
# Checks .github/ against GitHub's schemas, by the venv that deps.sh makes, and that every target of the
# Makefile that a workflow calls is there.
set -euo pipefail
cd "$(dirname "$0")/.."

check=${SIDESTEP_LAB_DIR:-/var/lib/sidestep-lab}/workflow-check/bin/check-jsonschema
[ -x "$check" ] || { echo "workflows: there is no $check: make deps installs it" >&2; exit 1; }
"$check" -q --builtin-schema vendor.github-workflows .github/workflows/*.yml
"$check" -q --builtin-schema vendor.dependabot .github/dependabot.yml

grep -ohE '(^|[ $])make [a-z0-9-]+' .github/workflows/*.yml | awk '{ print $2 }' | sort -u |
    while read -r target; do
        grep -q "^$target:" Makefile || { echo "workflows: there is no target $target in the Makefile" >&2; exit 1; }
    done
