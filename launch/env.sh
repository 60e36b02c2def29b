#!/usr/bin/env bash
# Makes .venv with tlx in it, editable, pinned by launch/constraints.txt. Idempotent: does nothing when nothing has changed.
#
#   bash launch/env.sh [EXTRA,EXTRA...]      # extras of pyproject.toml: quickstart, test, tensorboard, datasets
#   PYTHON=python3.12 bash launch/env.sh     # with a Python of your choice (3.10 or newer)
#   INSTALLER=pip bash launch/env.sh         # without uv, which takes a fifth of pip's time
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

# uv: the one that is installed, or its own package, which pip brings in seconds where its index or folder has it.
find_uv() {
    command -v uv && return
    [ -x .venv/bin/uv ] || .venv/bin/python -m pip install --quiet --disable-pip-version-check --retries 1 -c launch/constraints.txt uv >/dev/null 2>&1 || return 1
    echo .venv/bin/uv
}

# Installs with uv, from where pip's settings say. uv keeps what it has built: tlx is built anew.
with_uv() {
    local settings uv
    [ "${INSTALLER:-uv}" = uv ] || return 1
    settings="$(.venv/bin/python -m pip config list --disable-pip-version-check | .venv/bin/python launch/pip_for_uv.py)" || return 1
    uv="$(find_uv)" || return 1
    (
        unset UV_NO_INDEX # 0 or false say no
        eval "$settings"
        "$uv" pip install --quiet ${UV_NO_INDEX:+--no-index} --python .venv/bin/python --reinstall-package tlx -c launch/constraints.txt -e "$1"
    ) || {
        echo "environment: uv could not install it; with pip again"
        return 1
    }
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
echo "environment: installing tlx${extras:+[$extras]} (torch with CUDA is about 5 GB; a minute with uv, several with pip)"
started=$SECONDS
with_uv ".${extras:+[$extras]}" ||
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -c launch/constraints.txt -e ".${extras:+[$extras]}"
[ "${have%%|*}" = "$wanted" ] && already="${have##*|}," || already=""
echo "$wanted|$already$extras" >"$stamp"
echo "environment: ready in $((SECONDS - started)) s"
