"""Builds dcn_plugin's native libraries against the LibTorch Stable ABI.

The libraries contain no Python symbol: one build serves every torch >= 2.10 and every Python, and
``torch.ops.load_library`` loads it. Files under csrc/cpu/simd are compiled once per instruction set;
which one runs is decided at run time (csrc/cpu/dispatch.h).
"""

import os
import platform
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

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


class BuildLibraries(build_ext):
    """Compiles each source for its instruction sets and links one plain shared library."""

    def get_ext_filename(self, fullname):
        return str(Path(*fullname.split("."))) + ".so"  # no Python ABI in the name: there is none inside

    def build_extension(self, ext):
        torch_root = Path(torch.__file__).parent
        include = [str(torch_root / "include"), str(torch_root / "include/torch/csrc/api/include")]
        build = Path(self.build_temp)

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
        workers = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
        with ThreadPoolExecutor(workers) as pool:
            objects = [o for made in pool.map(compile_one, jobs) for o in made]

        library = self.get_ext_fullpath(ext.name)
        Path(library).parent.mkdir(parents=True, exist_ok=True)
        self.compiler.link_shared_object(
            objects, library, libraries=["torch_cpu", "c10"], library_dirs=[str(torch_root / "lib")], target_lang="c++"
        )


def cpu_library():
    sources = [str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.cpp")]
    headers = [str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.h")]
    return Extension("dcn_plugin._cpu", sorted(sources), depends=sorted(headers))


setup(ext_modules=[cpu_library()], cmdclass={"build_ext": BuildLibraries})
