#!/usr/bin/env bash
# Prints the path of the first CPython >= 3.12 that can make a virtual environment, or says that there is none.
# PYTHON=/path/to/python (or a command's name) is used instead of a search where it is set.
# A name on PATH proves nothing (pyenv's shims exist for versions that are not selected), so each candidate is run.
set -u

probe='
import os, sys
if sys.version_info < (3, 12) or sys.implementation.name != "cpython":
    sys.exit(1)
import ensurepip, venv
print(os.path.realpath(sys.executable))  # of a virtual environment: the Python that it was made from
'

try() { "$1" -c "$probe" 2>/dev/null </dev/null; }

if [ -n "${PYTHON:-}" ]; then
    try "$PYTHON" && exit 0
    echo "PYTHON=$PYTHON is not a CPython >= 3.12 with the modules venv and ensurepip." >&2
    exit 1
fi

for name in python3.12 python3.13 python3.14 python3 python; do
    try "$name" && exit 0
done

pyenv_root=$(pyenv root 2>/dev/null) || pyenv_root=${PYENV_ROOT:-${HOME:-}/.pyenv}
for python in "$pyenv_root"/versions/*/bin/python; do
    try "$python" && exit 0
done

python=$(uv python find --system --no-python-downloads '>=3.12' 2>/dev/null) && try "$python" && exit 0

cat >&2 <<'END'
No CPython >= 3.12 found: not as python3.12, python3.13, python3.14, python3 or python on PATH, not among pyenv's
versions, not by uv; or the one found lacks the modules venv and ensurepip (Debian, Ubuntu: install python3-venv).
Install one (for example `pyenv install 3.12` or `uv python install 3.12`), or name it: PYTHON=/path/to/python3.12 make test
END
exit 1
