#!/usr/bin/env bash
# Sets up .venv for the demo and the tests: pinned dependencies, mmcv from its source package, this package.
# A step that is done is skipped; one that was interrupted is done again.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-$(command -v python3.11 || echo python3)}
STAMPS=.venv/stamps
LOGS=.venv/logs
TORCH=2.13.0
MMCV=2.1.0
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

is_3_11='import sys; sys.exit(sys.version_info[:2] != (3, 11))'
headers='import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))'
command -v "$PYTHON" >/dev/null || fail "$PYTHON not found: install Python 3.11, or name it with PYTHON=..."
"$PYTHON" -c "$is_3_11" || fail "$("$PYTHON" --version) will not do: the pinned dependencies are Python 3.11's; name one with PYTHON=..."
"$PYTHON" -c 'import venv, ensurepip' 2>/dev/null || fail "$PYTHON has no venv module: install it (on Debian: python3.11-venv)"
"$PYTHON" -c "$headers" || fail "$PYTHON has no C headers, which mmcv's build needs: install them (on Debian: python3.11-dev)"
command -v "${CXX:-c++}" >/dev/null || fail "no C++ compiler found: install one (on Debian: g++)"
if [ -x .venv/bin/python ]; then
    .venv/bin/python -c "$is_3_11" || fail ".venv is not of Python 3.11: move it away"
fi

step venv "$("$PYTHON" --version)" "Creating .venv (10 s)" "'$PYTHON' -m venv .venv"
step torch $TORCH "Installing PyTorch $TORCH (a minute or more, as the network goes)" \
    "python -m pip install torch==$TORCH"
step requirements "$(hash_of tools/requirements.txt)" "Installing the pinned dependencies (1 minute)" \
    "python -m pip install --no-deps -r tools/requirements.txt"
# Its setup.py imports torch and pkg_resources: hence no build isolation, and setuptools before 81. Built for the CPU, a
# visible GPU or not, since the CUDA build needs an nvcc of torch's own version. pip's cache might hold another torch's.
step mmcv "$MMCV for torch $TORCH" "Building mmcv $MMCV from its source package (7 to 9 minutes on two cores, once)" "
    python -c 'import torch, mmcv._ext' && exit
    CUDA_VISIBLE_DEVICES= python -m pip install -v --force-reinstall --no-cache-dir --no-deps --no-build-isolation \
        --no-binary mmcv mmcv==$MMCV"
step package "$PWD $(hash_of csrc setup.py pyproject.toml)" "Building dcn_plugin (half a minute)" \
    "python -m pip install --no-build-isolation --no-deps -e ."
