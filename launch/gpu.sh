#!/usr/bin/env bash
# What has to be seen on a machine with an NVIDIA GPU: tests, precision, memory, speed; a table at the end.
#
#   bash launch/gpu.sh                        # all four parts, each at most 4 minutes
#   bash launch/gpu.sh --only memory          # one part; --only speed:data one step; may be repeated
#   bash launch/gpu.sh --wheels FOLDER        # without a network: this Python's own torch, what it lacks from wheels
#   bash launch/gpu.sh --dry                  # every step on a CPU at toy size
#
# The table and its JSON come to .gpu/out (--out FOLDER). Exit code 1: something is not as it must be.
#
# For --wheels: what that machine's Python lacks of pyproject.toml (torch and torchvision are there), fetched where there is a
# network, for its version; what is still missing is named:
#   pip download --dest FOLDER --only-binary=:all: --no-deps --python-version 3.12 -c launch/constraints.txt pydantic ...
# PYTHON=/path/to/python3 names it if it is not python3; tlx itself needs no wheel.
set -euo pipefail
cd "$(dirname "$0")/.."
wheels=""
words=()
while [ $# -gt 0 ]; do
    case "$1" in
    --wheels)
        [ $# -gt 1 ] || { echo "error: --wheels needs a folder" >&2 && exit 2; }
        wheels="$2"
        shift
        ;;
    --wheels=*) wheels="${1#*=}" ;;
    *) words+=("$1") ;;
    esac
    shift
done
if [ -z "$wheels" ]; then
    bash launch/env.sh test
    python=.venv/bin/python
else
    [ -d "$wheels" ] || { echo "error: --wheels: there is no folder $wheels" >&2 && exit 2; }
    python="${PYTHON:-python3}"
    site="$PWD/.gpu/site"
    echo "environment: $("$python" --version) and wheels from $wheels"
    find "$wheels" -name '*.whl' -print0 |
        xargs -0 -r "$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --upgrade --target "$site"
    export PYTHONPATH="$site:$PWD${PYTHONPATH:+:$PYTHONPATH}"
    "$python" - "$wheels" <<'EOF' || exit 2
import importlib, sys
missing = []
for name in "torch torchvision timm accelerate tlx.train.command tlx.train.loop tlx.train.build tlx.cli.main pytest hypothesis".split():
    try:
        importlib.import_module(name)
    except ImportError as error:
        missing.append(f"{name}: {error}")
if missing:
    print("error: packages are missing\n  " + "\n  ".join(missing) + f"\n  -> add their wheels to {sys.argv[1]}", file=sys.stderr)
sys.exit(bool(missing))
EOF
    "$python" setup.py -q build_ext --inplace >/dev/null 2>&1 ||
        echo "environment: no C compiler or libjpeg header: tlx decodes with torchvision (slower)"
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" PYTHONUNBUFFERED=1
exec "$python" tests/gpu/run.py ${words[@]+"${words[@]}"}
