"""Every native source compiles against the headers of the oldest torch that is supported.

They come once from that torch's wheel and stay in the user's cache. The wheel is macOS's, which is the smallest (80
MB); of the headers that the sources include, all platforms have the same.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest
from filelock import FileLock

from .native import CXX, OLDEST_TORCH, ROOT, TARGET, run_all

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dcn_plugin"
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
WHEEL = ["--python-version=3.11", "--platform=macosx_11_0_arm64", "--only-binary=:all:", f"torch=={OLDEST_TORCH}"]


def download(folder):
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--dest", scratch, *WHEEL]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no headers of torch {OLDEST_TORCH}: {done.stderr.strip().splitlines()[-1]}")
        with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as wheel:
            parts = ("headeronly", "csrc/stable", "csrc/inductor/aoti_torch")
            prefixes = tuple(f"torch/include/torch/{part}/" for part in parts)
            wheel.extractall(scratch, [name for name in wheel.namelist() if name.startswith(prefixes)])
        (Path(scratch) / "torch/include").rename(folder)


@pytest.fixture(scope="module")
def flags():
    headers = CACHE / f"torch-{OLDEST_TORCH}-include"
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(CACHE / "lock"):
        if not headers.exists():
            download(headers)
    return ["-std=c++20", TARGET[0], f"-I{headers}"]


def test_it_is_the_one_that_the_metadata_names():
    assert f'dependencies = ["torch>={OLDEST_TORCH.removesuffix(".0")}' in (ROOT / "pyproject.toml").read_text()


def test_cpu_sources(flags):
    commands = [
        [CXX, *flags, "-fsyntax-only", "-DDCN_ISA=portable", source]
        for source in [ROOT / "csrc/ops.cpp", *(ROOT / "csrc/cpu").rglob("*.cpp")]
    ]
    assert len(commands) > 5
    assert not run_all(commands)


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
def test_cuda_sources(flags, tmp_path):
    # nvcc's front ends for host and device, without optimisation, ptxas and the host's compiler.
    front_end = ["--cuda", "-arch=compute_80", "-Xcicc=-O0", "--expt-relaxed-constexpr", "-DUSE_CUDA"]
    commands = [
        [NVCC, *flags, *front_end, source, "-o", tmp_path / f"{source.stem}.ii"]
        for source in (ROOT / "csrc/cuda").glob("*.cu")
    ]
    assert len(commands) > 5
    assert not run_all(commands)
