#!/usr/bin/env bash
# tools/setup_env.sh [dev]     sets up .venv for the demo and the tests: pinned dependencies, mmcv-lite, this package; with
#                              "dev", what lint, docs and wheel need too
# A step that is done is skipped; one that was interrupted is done again. In the environment, PYTHON names the Python that
# .venv is made with, and MMCV=full compiles mmcv, for the tests and benchmarks that compare with its operators.
set -euo pipefail
cd "$(dirname "$0")/.."

[ $# = 0 ] || [ "$*" = dev ] || { echo "usage: tools/setup_env.sh [dev]" >&2; exit 2; }
STAMPS=.venv/stamps
LOGS=.venv/logs
TORCH=2.13.0
MMCV_VERSION=2.1.0
export MAX_JOBS=${MAX_JOBS:-$(nproc)} PIP_DISABLE_PIP_VERSION_CHECK=1
export PATH=$PWD/.venv/bin:$PATH # for python, and for ninja, which mmcv's build looks for

fail() {
    echo "error: $*" >&2
    exit 1
}

# step NAME FINGERPRINT "what it does, how long it takes" "COMMANDS"
# Runs the commands unless they have succeeded before with the same fingerprint; shows every 30 s that it is alive.
step() {
    local name=$1 fingerprint=$2 what=$3 commands=$4
    local stamp=$STAMPS/$name log=$LOGS/$name.log start=$SECONDS waited=0
    [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$fingerprint" ] && return
    mkdir -p "$STAMPS" "$LOGS"
    rm -f "$stamp"
    echo "==> $what"
    setsid bash -euc "$commands" >"$log" 2>&1 </dev/null & # a group of its own, so that all of it can be ended
    local job=$!
    trap "kill -- -$job 2>/dev/null || true; echo 'interrupted: the next run takes it up here' >&2" EXIT
    while kill -0 $job 2>/dev/null; do
        sleep 1
        waited=$((waited + 1))
        [ $((waited % 30)) = 0 ] && echo "    ... $((SECONDS - start)) s ($(tail -c 400 "$log" | tr '\r' '\n' | tail -n 1 | cut -c 1-80))"
    done
    trap - EXIT
    if ! wait $job; then
        tail -n 30 "$log" >&2
        fail "this step failed; its whole log is $log"
    fi
    echo "    done in $((SECONDS - start)) s"
    echo "$fingerprint" >"$stamp"
}

hash_of() { find "$@" -type f | LC_ALL=C sort | xargs cat | cksum | cut -d ' ' -f 1; }

is_supported='import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))'
has_headers='import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))'
versions="3.10 to 3.13"
if [ -f $STAMPS/venv ]; then
    PYTHON=$PWD/.venv/bin/python
    "$PYTHON" -c "$is_supported" || fail ".venv is of $("$PYTHON" --version), not of Python $versions: move it away"
else
    for candidate in ${PYTHON:-python3.11 python3 python3.12 python3.13 python3.10}; do
        "$candidate" -c "$is_supported" 2>/dev/null && PYTHON=$candidate && break
    done
    "${PYTHON:-false}" -c "$is_supported" 2>/dev/null || fail "no Python $versions found: install one, or name it with PYTHON=..."
fi
"$PYTHON" -c 'import venv, ensurepip' 2>/dev/null || fail "$PYTHON has no venv module: install it (on Debian: python3-venv)"
if [ "${MMCV:-lite}" = full ]; then
    "$PYTHON" -c "$has_headers" || fail "$PYTHON has no C headers, which mmcv's build needs: install them (on Debian: python3-dev)"
elif [ "${MMCV:-lite}" != lite ]; then
    fail "MMCV is lite (the default) or full, not '$MMCV'"
fi
command -v "${CXX:-c++}" >/dev/null || fail "no C++ compiler found: install one (on Debian: g++)"

step venv "$("$PYTHON" --version)" "Creating .venv of $("$PYTHON" --version) (10 s)" "'$PYTHON' -m venv .venv"
step torch $TORCH "Installing PyTorch $TORCH (a minute or more, as the network goes)" \
    "python -m pip install torch==$TORCH"
step requirements "$(hash_of tools/requirements.txt)" "Installing the pinned dependencies (1 minute)" \
    "python -m pip install --no-deps -r tools/requirements.txt"
if [ "${MMCV:-lite}" = full ]; then
    # Its setup.py imports torch and pkg_resources: hence no build isolation, and setuptools before 81. Built for the CPU,
    # a visible GPU or not, since the CUDA build needs an nvcc of torch's own version. pip's cache might hold another
    # torch's. mmcv-lite has the same files, and goes first.
    step mmcv "$MMCV_VERSION for torch $TORCH" "Building mmcv $MMCV_VERSION from its source package (7 to 9 minutes on two cores, once)" "
        python -c 'import torch, mmcv._ext' && exit
        python -m pip uninstall -y mmcv-lite
        CUDA_VISIBLE_DEVICES= python -m pip install -v --force-reinstall --no-cache-dir --no-deps --no-build-isolation \
            --no-binary mmcv mmcv==$MMCV_VERSION"
elif [ ! -f $STAMPS/mmcv ]; then # a compiled mmcv does as well
    step mmcv-lite $MMCV_VERSION "Installing mmcv-lite $MMCV_VERSION (5 s)" \
        "python -m pip install --no-deps mmcv-lite==$MMCV_VERSION"
fi
if [ "$*" = dev ]; then
    step requirements-dev "$(hash_of tools/requirements-dev.txt)" "Installing linters and what the site is made with (20 s)" \
        "python -m pip install --no-deps -r tools/requirements-dev.txt"
fi
step package "$PWD $(hash_of csrc setup.py tools/cuda_toolkit.py pyproject.toml)" "Building dcn_plugin (half a minute)" \
    "python -m pip install --no-build-isolation --no-deps -e ."
