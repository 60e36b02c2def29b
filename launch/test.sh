#!/usr/bin/env bash
# Environment, lint, types, tests.
#
#   bash launch/test.sh                  # the quick tier, CI's: under 10 minutes on 2 cores after installation
#   bash launch/test.sh --all            # everything; writes its result to tests/FULL.md
#   bash launch/test.sh -k checkpoint    # other words go to pytest
set -euo pipefail
cd "$(dirname "$0")/.."
everything=""
if [ "${1:-}" = "--all" ]; then
    everything=yes
    shift
fi
bash launch/env.sh test
export PATH="$PATH:/usr/sbin:/sbin"

# Brings Debian's packages for some tests, where that can be done without asking and PROGRAM is not there; else these tests skip.
add() { # PROGRAM NAME PACKAGES...
    local program="$1" name="$2" install="apt-get -qq install -y --no-install-recommends ${*:3}"
    command -v "$program" >/dev/null && return
    [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || return 0
    echo "installing $name, for its tests"
    DEBIAN_FRONTEND=noninteractive timeout 180 sh -c "$install || { apt-get -qq update; $install; }" >/dev/null 2>&1 </dev/null ||
        echo "$name cannot be installed: its tests skip"
}
add slurmctld Slurm slurmctld slurmd slurm-client munge iproute2
[ -z "$everything" ] || add chromedriver Chromium chromium chromium-driver # tests of pages are marked slow
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
python=.venv/bin/python

echo "lint"
$python -m ruff check .
$python -m ruff format --check .
echo "types"
$python -m mypy
marks="not slow"
$python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || marks="$marks and not gpu"
# a file's tests share what is dear to make, so files, not tests, are dealt to the cores, the dearest first (conftest.py)
pytest="$python -m pytest --dist loadfile --no-loadscope-reorder"
cores="$($python -c 'import psutil; print(min(psutil.cpu_count(), 8))')"
if [ -z "$everything" ]; then
    exec $pytest -n "$cores" -m "$marks" "$@"
fi
scope=""
[[ $marks == *"not gpu"* ]] && scope="not gpu"
log="$(mktemp)"
code=0
# one worker more than cores: a third of the slow tests' time is spent waiting for Slurm, clocks and processes that hang
$pytest -n $((cores + 1)) -m "$scope" --durations=25 --write-costs "$@" 2>&1 | tee "$log" || code=$?
$python tests/full.py "$log" "$code" >tests/FULL.md
rm -f "$log"
echo "written: tests/FULL.md"
exit "$code"
