#!/usr/bin/env bash
# The smoke set (tests/smoke) with several versions of torch, by hand; docs/torch-versions.md keeps what it prints.
#
#   tests/torch_versions.sh               makes an environment of 2.11, 2.13 and 2.15 each, in a temporary folder
#   tests/torch_versions.sh PYTHON ...    takes environments that exist: each has torch and the `dev` extra's packages
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT

pythons=("$@")
if ((${#pythons[@]} == 0)); then
    grep -viE '^(torch|setuptools)==' constraints.txt >"$scratch/constraints.txt"
    for version in 2.11 2.13 2.15; do
        "${PYTHON:-python3}" -m venv "$scratch/$version" || exit 1
        "$scratch/$version/bin/pip" install -q -c "$scratch/constraints.txt" "torch==$version.*" '.[dev]' || exit 1
        pythons+=("$scratch/$version/bin/python")
    done
fi

failed=0
for python in "${pythons[@]}"; do
    "$python" -m pip install -q --no-deps -e . || exit 1 # torch finds the backend by the package's entry point
    "$python" -c 'import torch; print("== torch", torch.__version__, flush=True)'
    PIECEWORK_SMOKE="$scratch/figures" "$python" -m pytest -q -p no:cacheprovider -m slow tests/smoke || failed=1
done

echo "== figures: seconds, one reading each"
[[ -s "$scratch/figures" ]] && "${pythons[0]}" - "$scratch/figures" <<'TABLE'
import json
import sys
from pathlib import Path

rows = [json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]
versions = list(dict.fromkeys(row["torch"] for row in rows))
found = {(row["what"], row["torch"]): row["value"] for row in rows}
print("| seconds |", " | ".join(versions), "|")
print("|---|" + "---|" * len(versions))
for what in dict.fromkeys(row["what"] for row in rows):
    print(f"| {what} |", " | ".join(str(found.get((what, version), "–")) for version in versions), "|")
TABLE
exit "$failed"
