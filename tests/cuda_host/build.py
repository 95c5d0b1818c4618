"""Compiles csrc/cuda with the host's C++ compiler and the shim (cuda_host.h), with one of two checkers."""

import hashlib
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from filelock import FileLock

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
CXX = os.environ.get("CXX", "g++")
TORCH = Path(torch.__file__).parent
FLAGS = [
    *("-std=c++20", "-O1", "-g1", "-fPIC", "-Wall", "-Wno-unknown-pragmas", "-Wno-unused-function"),
    *("-fno-strict-aliasing", "-fvisibility=hidden", "-DTORCH_TARGET_VERSION=0x020a000000000000"),
    # Small chunks and parts of the batch, large tiles for few blocks: small tests meet what large inputs do.
    *("-DDCN_CHUNK_BYTES=16384", "-DDCN_SUMS_BYTES=16384", "-DDCN_WANTED_BLOCKS=2"),
    *(f"-I{p}" for p in (HERE, ROOT / "csrc", TORCH / "include", TORCH / "include/torch/csrc/api/include")),
]
ADDRESS = ["-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=undefined"]
# By checker: flags of the kernels, of the shim itself, of the linker.
CHECKERS = {
    "address": (ADDRESS, ADDRESS, ADDRESS),
    "race": (["-fsanitize=thread"], ["-DCUDA_HOST_WATCH"], []),  # the compiler's reports go to the shim, not to libtsan
}


def _fingerprint(checker: str) -> str:
    digest = hashlib.sha256(f"{CHECKERS[checker]} {FLAGS} {torch.__version__}".encode())
    for path in sorted([*(ROOT / "csrc").rglob("*"), *HERE.glob("*.c*"), *HERE.glob("*.h")]):
        if path.is_file():
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def build(checker: str) -> Path:
    """The shared library with the operators on PyTorch's CPU key; built unless one of the same sources is there."""
    folder = ROOT / "build/cuda_host" / f"{checker}-{_fingerprint(checker)}"
    library = folder / "cuda_host.so"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):  # of test processes that run side by side, one builds
        if not library.exists():
            _build(checker, folder, library)
    return library


def _build(checker: str, folder: Path, library: Path) -> None:
    kernel_flags, shim_flags, link_flags = CHECKERS[checker]
    sources = [ROOT / "csrc/ops.cpp", *sorted((ROOT / "csrc/cuda").glob("*.cu")), HERE / "planted.cu"]

    def compile_one(source, flags):
        target = folder / f"{source.stem}{source.suffix}.o"
        subprocess.run([CXX, *FLAGS, *flags, "-x", "c++", "-c", source, "-o", target], check=True)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [pool.submit(compile_one, source, kernel_flags) for source in sources]
        jobs.append(pool.submit(compile_one, HERE / "cuda_host.cpp", shim_flags))
        objects = [job.result() for job in jobs]
    unfinished = folder / "unfinished.so"
    libraries = [f"-L{TORCH / 'lib'}", f"-Wl,-rpath,{TORCH / 'lib'}", "-ltorch_cpu", "-lc10"]
    subprocess.run([CXX, *link_flags, "-shared", *objects, *libraries, "-o", unfinished], check=True)
    unfinished.rename(library)
    for old in folder.parent.glob(f"{checker}-*/cuda_host.so"):
        if old != library:
            shutil.rmtree(old.parent)


def environment(checker: str) -> dict[str, str]:
    """What a Python process needs to load the library: AddressSanitizer must be there before everything else."""
    env = dict(os.environ, OMP_NUM_THREADS="1")
    if checker == "address":
        paths = [
            subprocess.check_output([CXX, f"-print-file-name={name}"], text=True).strip()
            for name in ("libasan.so", "libstdc++.so.6")
        ]
        # Memory is filled with NaN (all bits one) when it is allocated, so that what a kernel left unwritten shows.
        env["LD_PRELOAD"] = " ".join(paths)
        env["ASAN_OPTIONS"] = "detect_leaks=0:max_malloc_fill_size=1073741824:malloc_fill_byte=255"
    return env
