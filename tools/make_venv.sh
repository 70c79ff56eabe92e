#!/usr/bin/env bash
# Makes an environment and installs the project with some of its extras in it; does nothing where that is done and up to
# date. Without arguments that is .venv with the test and lint tools; with two, the folder and the extras: .venv-aot gpu
# Its file .state holds "installing" from the start to the end of an installation, then "installed".
# An environment without it was made by hand and is kept, if its Python serves.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=${1:-.venv}
extras=${2:-test,lint}
python=$venv/bin/python
state=$venv/.state

home_of() { "$1" -c 'import sys; print(sys.version_info[:3], sys.base_prefix)' 2>/dev/null </dev/null || true; }

# Why the environment cannot be used as it is; nothing where it can, or where there is none.
fault() {
    if [ ! -e $venv ] && [ ! -L $venv ]; then
        return
    elif [ "$(cat $state 2>/dev/null)" = installing ]; then
        echo "its installation was interrupted"
    elif ! $python -c '' 2>/dev/null; then
        echo "its Python does not run"
    elif ! $python -c 'import sys; sys.exit(sys.version_info < (3, 12))'; then
        echo "its Python is older than 3.12"
    elif ! $python -c 'import pip' 2>/dev/null; then
        echo "it has no pip"
    elif [ -n "${PYTHON:-}" ] && [ "$(home_of "$PYTHON")" != "$(home_of $python)" ]; then
        echo "it was not made with PYTHON=$PYTHON"
    fi
}

why=$(fault)
if [ -z "$why" ] && [ -e $state ] && ! [ setup.py -nt $state ] && ! [ pyproject.toml -nt $state ]; then
    exit 0
fi

start=$SECONDS
if [ -n "$why" ] || [ ! -e $venv ]; then
    base=$(tools/find_python.sh) # before anything is removed
    if [ -n "$why" ]; then
        echo "Making $venv anew: $why."
        rm -rf $venv
    fi
    echo "Making $venv with $base, then installing into it: a few minutes, only this once ..."
    mkdir $venv
    echo installing >$state
    "$base" -m venv $venv
else
    echo "Bringing $venv up to date with setup.py and pyproject.toml ..."
    echo installing >$state
fi
$python -m pip install -qq --no-input --disable-pip-version-check -e ".[$extras]" </dev/null
echo installed >$state
echo "Done in $((SECONDS - start)) s."
