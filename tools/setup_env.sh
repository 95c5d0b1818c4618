#!/usr/bin/env bash
# Sets up .venv for the demo and the tests: pinned dependencies, mmcv from its source package, this package.
# A step that is done is skipped; one that was interrupted is done again.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
VENV=$PWD/.venv
STAMPS=$VENV/stamps
LOGS=$VENV/logs
JOBS=${MAX_JOBS:-$(nproc)}

fail() {
    echo "error: $*" >&2
    exit 1
}

# step NAME FINGERPRINT "what it does, how long it takes" COMMAND...
# Runs the command unless it has succeeded before with the same fingerprint; shows every 30 s that it is alive.
step() {
    local name=$1 fingerprint=$2 what=$3
    shift 3
    local stamp=$STAMPS/$name log=$LOGS/$name.log start=$SECONDS
    [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$fingerprint" ] && return
    rm -f "$stamp"
    mkdir -p "$STAMPS" "$LOGS"
    echo "==> $what"
    "$@" >"$log" 2>&1 &
    local job=$! waited=0
    trap 'kill $job 2>/dev/null' EXIT
    while kill -0 $job 2>/dev/null; do
        sleep 1
        waited=$((waited + 1))
        [ $((waited % 30)) = 0 ] && echo "    ... $((SECONDS - start)) s ($(tail -c 200 "$log" | tr '\r' '\n' | tail -n 1 | cut -c 1-80))"
    done
    trap - EXIT
    if ! wait $job; then
        tail -n 30 "$log" >&2
        fail "this step failed; its whole log is $log"
    fi
    echo "    done in $((SECONDS - start)) s"
    echo "$fingerprint" >"$stamp"
}

hash_of() { find "$@" -type f | sort | xargs cat | cksum | cut -d ' ' -f 1; }

create_venv() {
    rm -rf "$VENV/bin" "$VENV/lib"
    "$PYTHON" -m venv "$VENV"
}

PIP="$VENV/bin/python -m pip --disable-pip-version-check"

build_mmcv() {
    # Its setup.py imports torch and, through it, pkg_resources: no build isolation, and setuptools before 81.
    MMCV_WITH_OPS=1 FORCE_CUDA=0 MAX_JOBS=$JOBS $PIP install -v --no-deps --no-build-isolation --no-binary mmcv mmcv==2.1.0
}

command -v "$PYTHON" >/dev/null || fail "$PYTHON not found: install Python 3.11, or name it with PYTHON=..."
"$PYTHON" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))' ||
    fail "$("$PYTHON" --version) will not do: the pinned dependencies want Python 3.11 (name one with PYTHON=...)"
"$PYTHON" -c 'import venv, ensurepip' 2>/dev/null || fail "$PYTHON has no venv module: install it (on Debian: python3-venv)"
command -v "${CXX:-c++}" >/dev/null || fail "no C++ compiler found: install one (on Debian: g++)"

step venv "$("$PYTHON" --version)" "Creating .venv (10 s)" create_venv
step torch 2.13.0 "Installing PyTorch 2.13.0 (under a minute to some minutes, as the network goes)" \
    $PIP install torch==2.13.0
step requirements "$(hash_of tools/requirements.txt)" "Installing the pinned dependencies (1 minute)" \
    $PIP install --no-deps -r tools/requirements.txt
step mmcv 2.1.0 "Building mmcv 2.1.0 from its source package (7 to 9 minutes on two cores, once)" build_mmcv
step package "$(hash_of csrc setup.py pyproject.toml)" "Building dcn_plugin (half a minute)" \
    $PIP install --no-build-isolation --no-deps -e .
