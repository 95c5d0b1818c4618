"""Builds dcn_plugin's native libraries against the LibTorch Stable ABI: one for the CPU, one for CUDA.

The libraries contain no Python symbol: one build serves every torch >= 2.10 and every Python, and
``torch.ops.load_library`` loads it. Files under csrc/cpu/simd are compiled once per instruction set;
which one runs is decided at run time (csrc/cpu/dispatch.h).

The CUDA library is built where nvcc is found and torch has CUDA. In the environment, DCN_PLUGIN_CUDA=0 leaves it out
and 1 insists on it, whatever torch this is: it needs the headers alone ("only" leaves out the CPU library instead);
DCN_PLUGIN_CUDA_ARCHS="90" (say) narrows it to the compute capabilities named, of 8.0 at least; MAX_JOBS limits the
compilers at work.
"""

import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.modified import newer_group

try:
    import torch
except ImportError as error:
    raise SystemExit(
        "dcn_plugin is compiled against the PyTorch you have: install torch >= 2.10 first, then run "
        "`pip install --no-build-isolation .`"
    ) from error

ROOT = Path(__file__).parent
FLAGS = [
    "-std=c++20",
    "-O3",
    "-Wall",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
]
INSTRUCTION_SETS = {"portable": []}
if platform.machine() in ("x86_64", "AMD64"):
    INSTRUCTION_SETS["avx2"] = ["-mavx2", "-mfma"]
    INSTRUCTION_SETS["avx512"] = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"]


CUDA_FLAGS = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-DUSE_CUDA", "-Xcompiler=-fPIC,-fvisibility=hidden"]
CUDA_ARCHS = "80 90 100"  # machine code; for later GPUs the last one's PTX too


class BuildLibraries(build_ext):
    """Compiles each source for its instruction sets and links one plain shared library."""

    torch_root = Path(torch.__file__).parent
    workers = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)

    def get_ext_filename(self, fullname):
        return str(Path(*fullname.split("."))) + ".so"  # no Python ABI in the name: there is none inside

    def build_extension(self, ext):
        library = Path(self.get_ext_fullpath(ext.name))
        library.parent.mkdir(parents=True, exist_ok=True)
        build = self.build_cuda if ext.name.endswith("_cuda") else self.build_cpu
        build(ext, str(library), Path(self.build_temp))

    def includes(self):
        return [str(self.torch_root / "include"), str(self.torch_root / "include/torch/csrc/api/include")]

    def build_cpu(self, ext, library, build):
        include = self.includes()

        def compile_one(job):
            source, name, flags = job
            return self.compiler.compile(
                [source], str(build / name), include_dirs=include, extra_postargs=FLAGS + flags, depends=ext.depends
            )

        jobs = []
        for source in ext.sources:
            if "/simd/" not in source:
                jobs.append((source, "common", []))
                continue
            for name, flags in INSTRUCTION_SETS.items():
                jobs.append((source, name, [*flags, f"-DDCN_ISA={name}"]))
        with ThreadPoolExecutor(self.workers) as pool:
            objects = [o for made in pool.map(compile_one, jobs) for o in made]
        self.compiler.link_shared_object(
            objects,
            library,
            libraries=["torch_cpu", "c10"],
            library_dirs=[str(self.torch_root / "lib")],
            target_lang="c++",
        )

    def build_cuda(self, ext, library, build):
        if not self.force and not newer_group([*ext.depends, "setup.py"], library):
            return
        build = build / "cuda"
        build.mkdir(parents=True, exist_ok=True)
        archs = os.environ.get("DCN_PLUGIN_CUDA_ARCHS", CUDA_ARCHS).split()
        targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
        targets.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
        flags = [*CUDA_FLAGS, FLAGS[-1], *targets, "-Xptxas=-v", *(f"-I{path}" for path in self.includes())]

        def compile_one(source):
            target = build / f"{Path(source).stem}.o"
            done = subprocess.run([NVCC, *flags, "-c", source, "-o", target], capture_output=True, text=True)
            target.with_suffix(".log").write_text(done.stderr)
            if done.returncode:
                raise RuntimeError(f"nvcc could not compile {source}:\n{done.stdout}{done.stderr}")
            return target

        with ThreadPoolExecutor(self.workers) as pool:
            objects = list(pool.map(compile_one, ext.sources))
        # torch loads its own libraries privately: the library must name libtorch_cuda.so among those it needs. Where
        # torch has none, an empty one of that name stands in for it while linking.
        folders = [self.torch_root / "lib"]
        if not (self.torch_root / "lib/libtorch_cuda.so").exists():
            folders.append(build)
            name = "libtorch_cuda.so"
            self.compiler.link_shared_object([], str(build / name), extra_preargs=[f"-Wl,-soname,{name}"])
        needed = ["-Xlinker=--no-as-needed", "-ltorch_cuda", "-ltorch_cpu", "-lc10"]
        subprocess.run([NVCC, "-shared", *objects, *(f"-L{f}" for f in folders), *needed, "-o", library], check=True)


class BuildWheel(bdist_wheel):
    """Names the wheel for every Python: the libraries belong to none."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


def find(folder, *patterns):
    return sorted(str(p.relative_to(ROOT)) for pattern in patterns for p in (ROOT / folder).rglob(pattern))


def cpu_library():
    return Extension("dcn_plugin._cpu", find("csrc", "*.cpp"), depends=find("csrc", "*.h"))


def cuda_library():
    sources = find("csrc/cuda", "*.cu")
    return Extension("dcn_plugin._cuda", sources, depends=sources + find("csrc", "*.h", "*.cuh"))


NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
WANT_CUDA = os.environ.get("DCN_PLUGIN_CUDA") or ("1" if NVCC and torch.version.cuda else "0")
if WANT_CUDA != "0" and NVCC is None:
    raise SystemExit("DCN_PLUGIN_CUDA asks for the CUDA library, but nvcc is not on the PATH")
libraries = ([cpu_library()] if WANT_CUDA != "only" else []) + ([cuda_library()] if WANT_CUDA != "0" else [])

setup(ext_modules=libraries, cmdclass={"build_ext": BuildLibraries, "bdist_wheel": BuildWheel})
