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

# Can tlx's optional C extension, setup.py, be built: a C compiler, Python's header, libjpeg-turbo's header?
can_build() {
    [ -x .venv/bin/python ] || return 1
    local headers compiler
    headers="$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_paths()["include"])')"
    compiler="$(command -v gcc || command -v cc)" || return 1
    printf '#include <Python.h>\n#include <stdio.h>\n#include <jpeglib.h>\n' | "$compiler" -E -I"$headers" - >/dev/null 2>&1
}

# Installs libjpeg's header where that can be done without asking; nothing depends on it but speed.
add_libjpeg() {
    [ "$(id -u)" = 0 ] || return 0
    echo "environment: installing libjpeg's header, for faster decoding"
    if command -v apt-get >/dev/null; then
        local install="apt-get -qq install -y --no-install-recommends libjpeg-dev"
        DEBIAN_FRONTEND=noninteractive timeout 180 sh -c "$install || { apt-get -qq update; $install; }" >/dev/null 2>&1 </dev/null
    elif command -v dnf >/dev/null; then
        timeout 180 dnf -q -y install libjpeg-turbo-devel >/dev/null 2>&1 </dev/null
    fi || true
}

# a header that came or went since then counts as a change
wish() {
    local extension=without
    ! can_build || extension=with
    echo "$(cat pyproject.toml launch/constraints.txt setup.py tlx/data/_jpeg.c | cksum) $extension $PWD"
}

stamp=".venv/.tlx-installed"
wanted="$(wish)"
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
if ! can_build; then
    add_libjpeg
    can_build || echo "environment: no libjpeg header (or no C compiler): tlx will decode with torchvision (slower); to mend: install gcc, python3-dev and libjpeg-dev (libjpeg-turbo-devel), then bash launch/env.sh"
fi
wanted="$(wish)"
rm -f tlx/data/_jpeg.*.so # what is there afterwards was built now
echo "environment: installing tlx${extras:+[$extras]} (torch with CUDA is about 5 GB; a minute or two)"
started=$SECONDS
.venv/bin/python -m pip install --quiet --disable-pip-version-check -c launch/constraints.txt -e ".${extras:+[$extras]}"
[ "${have%%|*}" = "$wanted" ] && already="${have##*|}," || already=""
echo "$wanted|$already$extras" >"$stamp"
echo "environment: ready in $((SECONDS - started)) s"
