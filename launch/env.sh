#!/usr/bin/env bash
# Makes .venv with tlx in it, editable, pinned by launch/constraints.txt. Idempotent: does nothing when nothing has changed.
#
#   bash launch/env.sh [EXTRA,EXTRA...]      # extras of pyproject.toml: quickstart, test, tensorboard, datasets
#   PYTHON=python3.12 bash launch/env.sh     # with a Python of your choice (3.10 or newer)
set -euo pipefail
cd "$(dirname "$0")/.."
extras="${1:-}"

find_python() {
    for candidate in ${PYTHON:-} python3 python3.13 python3.12 python3.11 python3.10 python; do
        if command -v "$candidate" >/dev/null && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "error: no Python 3.10 or newer on PATH; install one, or name it: PYTHON=/path/to/python bash $0" >&2
    return 2
}

stamp=".venv/.tlx-installed"
wanted="$(cat pyproject.toml launch/constraints.txt | cksum) $PWD"
have="$(cat "$stamp" 2>/dev/null || true)"
if [ "${have%%|*}" = "$wanted" ] && [[ ",${have##*|}," == *",$extras,"* ]]; then
    echo "environment: .venv is up to date"
    exit 0
fi
if [ ! -x .venv/bin/python ]; then
    python="$(find_python)"
    echo "environment: making .venv with $("$python" --version 2>&1)"
    "$python" -m venv .venv
fi
echo "environment: installing tlx${extras:+[$extras]} (torch with CUDA is about 5 GB; a minute or two)"
started=$SECONDS
.venv/bin/python -m pip install --quiet --disable-pip-version-check -c launch/constraints.txt -e ".${extras:+[$extras]}"
[ "${have%%|*}" = "$wanted" ] && already="${have##*|}," || already=""
echo "$wanted|$already$extras" >"$stamp"
echo "environment: ready in $((SECONDS - started)) s"
