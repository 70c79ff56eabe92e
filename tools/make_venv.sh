#!/usr/bin/env bash
# Make an environment and install the project and some of its extras in it, unless that has been done and is up to date:
#   tools/make_venv.sh                            .venv with everything that the tests, the linters and the docs need
#   tools/make_venv.sh .venv-aot gpu              another folder with other extras
#   tools/make_venv.sh .venv-oldest test oldest   with the oldest versions that pyproject.toml allows
#   tools/make_venv.sh .venv-triton triton newest "jax-cuda13-plugin"   and packages in the version of jaxlib, without
#                                                 those that they depend on
# The file .state in it holds "installing" from the start to the end of an installation, then "installed".
# An environment without that file was made by hand and is kept if its Python will do.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=${1:-.venv}
extras=${2:-test,lint,docs}
versions=${3:-newest}
beside_jaxlib=${4:-}
python=$venv/bin/python
state=$venv/.state

home_of() { "$1" -c 'import sys; print(sys.version_info[:3], sys.base_prefix)' 2>/dev/null </dev/null || true; }

# Print why the environment cannot be used; print nothing if it can, or if there is none.
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
if [ -z "$why" ] && [ -e $state ] && ! [ pyproject.toml -nt $state ]; then
    exit 0
fi

start=$SECONDS
if [ -n "$why" ] || [ ! -e $venv ]; then
    base=$(tools/find_python.sh) # before anything is removed
    if [ -n "$why" ]; then
        echo "Replacing $venv: $why."
        rm -rf $venv
    fi
    echo "Making $venv with $base, then installing into it: a few minutes, only this once ..."
    mkdir $venv
    echo installing >$state
    "$base" -m venv $venv
else
    echo "Bringing $venv up to date with pyproject.toml ..."
    echo installing >$state
fi
constraints=$venv/constraints.txt
: >$constraints
if [ "$versions" = oldest ]; then
    $python tools/lower_bounds.py >$constraints
fi
install() { $python -m pip install -qq --no-input --disable-pip-version-check "$@" </dev/null; }
install -c $constraints -e ".[$extras]"
if [ -n "$beside_jaxlib" ]; then
    version=$($python -c 'from importlib.metadata import version; print(version("jaxlib"))')
    for package in $beside_jaxlib; do
        install --no-deps "$package==$version"
    done
fi
echo installed >$state
echo "Done in $((SECONDS - start)) s."
