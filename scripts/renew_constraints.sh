#!/usr/bin/env bash
# Renew constraints.txt: install everything at its newest within the bounds of pyproject.toml, write down what came, and
# run the tests with it. To try newer packages, first widen the bounds. PYTHON names another interpreter than python3.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q -e ".[dev,data,docs,smolvlm,ray,slurm]"
{
    echo "# The tested set of packages, written by scripts/renew_constraints.sh: pip install -e . -c constraints.txt"
    # a build of torch for one kind of machine (+cpu) and the libraries of its CUDA build fit no other machine
    "$folder/venv/bin/pip" freeze --exclude-editable |
        grep -viE '^(nvidia-|cuda-|triton==|setuptools==)|@ ' |
        sed -E 's/^([^=]+==[^+]+)\+.*/\1/'
} > "$folder/constraints.txt"
"$folder/venv/bin/python" -m pip check
cp "$folder/constraints.txt" constraints.txt
"$folder/venv/bin/python" -m pytest -n 2
