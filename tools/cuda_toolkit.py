"""Which nvcc compiles the CUDA library, and for which GPUs: what setup.py asks before it builds."""

import os
import re
import shutil
import subprocess

# Compute capabilities that get machine code; "+PTX" lets the driver compile for GPUs newer than that one. 8.0's machine
# code runs on 8.6 and 8.9 as well, and 10.0's on 10.3: one entry a generation keeps the wheel small.
CAPABILITIES = "7.5 8.0 9.0 10.0 12.0+PTX"
LOWEST_CAPABILITY = (7, 5)
WITHOUT_FUSED = "7."  # the fused kernels need instructions of 8.0, and are empty in code for less


def find_nvcc() -> str | None:
    """nvcc of CUDA_HOME where that is set, otherwise of the PATH, otherwise where NVIDIA's packages put it."""
    if home := os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"):
        return shutil.which("nvcc", path=os.path.join(home, "bin"))
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def nvcc_version(nvcc: str) -> str:
    """The version of CUDA that nvcc belongs to, as "13.0"."""
    return re.search(r"release (\d+\.\d+)", subprocess.check_output([nvcc, "--version"], text=True))[1]


def nvcc_capabilities(nvcc: str) -> set[tuple[int, int]]:
    """The compute capabilities that nvcc compiles for."""
    listed = subprocess.check_output([nvcc, "--list-gpu-arch"], text=True)
    return {(int(major), int(minor)) for major, minor in re.findall(r"compute_(\d+)(\d)\b", listed)}


def choose_capabilities(wanted: str, available: set[tuple[int, int]]) -> tuple[list[str], list[str]]:
    """Splits `wanted` (written as TORCH_CUDA_ARCH_LIST is) into what can be built and what cannot.

    An entry that the kernels or nvcc do not support is left out. Where it had "+PTX", the highest entry that is left
    gets it, so that an older nvcc still makes a library for newer GPUs. Entries without the fused kernels get none:
    newer GPUs would run it. Nothing left is a ValueError.
    """
    kept, dropped = [], []
    for entry in filter(None, re.split(r"[\s;,]+", wanted)):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if match is None:
            raise ValueError(f"TORCH_CUDA_ARCH_LIST must list compute capabilities, as '8.0 9.0+PTX', got {entry!r}")
        capability = int(match[1]), int(match[2])
        (kept if capability >= LOWEST_CAPABILITY and capability in available else dropped).append(entry)
    if not kept:
        lowest = ".".join(map(str, LOWEST_CAPABILITY))
        raise ValueError(f"nothing to build for in {wanted!r}: the kernels need {lowest}, nvcc must know the rest")
    if any(entry.endswith("+PTX") for entry in dropped) and not any(entry.endswith("+PTX") for entry in kept):
        kept[-1] += "+PTX"
    return [entry.removesuffix("+PTX") if entry.startswith(WITHOUT_FUSED) else entry for entry in kept], dropped


def gencode_flags(capabilities: list[str]) -> list[str]:
    """nvcc's options for machine code of each entry, and for PTX where the entry says so."""
    flags = []
    for entry in capabilities:
        arch = entry.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{arch},code=sm_{arch}")
        if entry.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{arch},code=compute_{arch}")
    return flags
