"""Builds dcn_plugin's native libraries against the LibTorch Stable ABI: one for the CPU, one for CUDA.

The libraries contain no Python symbol: one build serves every torch >= 2.10 and every Python, and
``torch.ops.load_library`` loads it. Files under csrc/cpu/simd are compiled once per instruction set;
which one runs is decided at run time (csrc/cpu/dispatch.h).

The CUDA library is built where nvcc is found and torch has CUDA. In the environment:

DCN_PLUGIN_CUDA=0        leaves it out; 1 insists on it, whatever torch this is: it needs the headers alone;
                         "only" leaves out the CPU library instead
CUDA_HOME                the CUDA toolkit whose nvcc compiles it (otherwise that of the PATH)
TORCH_CUDA_ARCH_LIST     compute capabilities to build for, as "9.0" or "8.0 9.0+PTX" (otherwise cuda_toolkit.py's)
MAX_JOBS                 how many compilers run at once

`build_ext` alone works with any setuptools from 65 on, for machines where none can be installed.
"""

import os
import subprocess
import sys
import sysconfig
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import setuptools
from setuptools import Distribution, Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT / "tools"))
import cuda_toolkit  # noqa: E402

try:
    import torch
except ImportError as error:
    raise SystemExit(
        "dcn_plugin is compiled against the PyTorch you have: install torch >= 2.10 first, then run "
        "`pip install --no-build-isolation .`"
    ) from error

OLDEST_TORCH = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # the stable ABI of 2.10
CXX_FLAGS = [
    "-std=c++20",
    "-O3",
    "-g0",
    "-Wall",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    OLDEST_TORCH,
]
CUDA_FLAGS = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-DUSE_CUDA", OLDEST_TORCH]
CUDA_FLAGS += ["-Xcompiler=-fPIC,-fvisibility=hidden", "-Xptxas=-v"]  # tools/ptxas_report.py reads what ptxas says
INSTRUCTION_SETS = {"portable": []}
if sysconfig.get_platform().endswith(("-x86_64", "-amd64")):
    INSTRUCTION_SETS["avx2"] = ["-mavx2", "-mfma"]
    INSTRUCTION_SETS["avx512"] = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"]
    INSTRUCTION_SETS["avx512bf16"] = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mavx512bf16"]

TORCH = Path(torch.__file__).parent
TORCH_INCLUDES = [str(TORCH / "include"), str(TORCH / "include/torch/csrc/api/include")]
TORCH_LIBRARIES = str(TORCH / "lib")


class BuildLibraries(build_ext):
    """Compiles each source for its instruction sets, or its GPUs, and links one plain shared library."""

    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)

    def get_ext_filename(self, fullname):
        return str(Path(*fullname.split("."))) + ".so"  # no Python ABI in the name: there is none inside

    def build_extension(self, ext):
        library = Path(self.get_ext_fullpath(ext.name))
        library.parent.mkdir(parents=True, exist_ok=True)
        build = self.build_cuda if ext.name.endswith("_cuda") else self.build_cpu
        build(ext, str(library), Path(self.build_temp))

    def build_cpu(self, ext, library, build):
        def compile_one(job):
            source, name, flags = job
            return self.compiler.compile(
                [source], str(build / name), include_dirs=TORCH_INCLUDES, extra_postargs=flags, depends=ext.depends
            )

        jobs = []
        for source in ext.sources:
            if "/simd/" not in source:
                jobs.append((source, "common", CXX_FLAGS))
                continue
            for name, flags in INSTRUCTION_SETS.items():
                jobs.append((source, name, [*CXX_FLAGS, *flags, f"-DDCN_ISA={name}"]))
        with ThreadPoolExecutor(self.jobs) as pool:
            objects = [o for made in pool.map(compile_one, jobs) for o in made]
        self.compiler.link_shared_object(
            objects, library, libraries=["torch_cpu", "c10"], library_dirs=[TORCH_LIBRARIES], target_lang="c++"
        )

    def build_cuda(self, ext, library, build):
        nvcc, build = cuda_toolkit.find_nvcc(), build / "cuda"
        flags = [*CUDA_FLAGS, *cuda_target_flags(nvcc), *(f"-I{path}" for path in TORCH_INCLUDES)]
        last, command = build / "last_build.txt", f"{library} for torch {torch.__version__}: {[nvcc, *flags]}"
        same = last.exists() and last.read_text() == command and os.path.exists(library)
        if same and os.path.getmtime(library) >= max(map(os.path.getmtime, ext.depends)):
            return
        last.unlink(missing_ok=True)
        build.mkdir(parents=True, exist_ok=True)

        def compile_one(source):
            target = build / f"{Path(source).stem}.o"
            done = subprocess.run([nvcc, *flags, "-c", source, "-o", target], capture_output=True, text=True)
            target.with_suffix(".log").write_text(done.stderr)
            if done.returncode:
                raise RuntimeError(f"nvcc could not compile {source}:\n{done.stdout}{done.stderr}")
            return target

        with ThreadPoolExecutor(self.jobs) as pool:
            objects = list(pool.map(compile_one, ext.sources))
        # torch loads its own libraries privately: the library must name libtorch_cuda.so among those it needs. Where
        # torch has none, an empty one of that name stands in for it while linking.
        folders = [TORCH_LIBRARIES]
        if not (TORCH / "lib/libtorch_cuda.so").exists():
            folders.append(build)
            name = "libtorch_cuda.so"
            self.compiler.link_shared_object([], str(build / name), extra_preargs=[f"-Wl,-soname,{name}"])
        needed = ["-Xlinker=--no-as-needed", "-ltorch_cuda", "-ltorch_cpu", "-lc10"]
        subprocess.run([nvcc, "-shared", *objects, *(f"-L{f}" for f in folders), *needed, "-o", library], check=True)
        last.write_text(command)


def setuptools_options():
    """What setup() takes, as far as this setuptools knows it: before 77 it cannot read pyproject.toml's license."""
    if int(setuptools.__version__.split(".")[0]) < 77:
        if "build_ext" not in sys.argv:
            raise SystemExit(
                f"error: dcn_plugin needs setuptools >= 77, found {setuptools.__version__}: "
                "`pip install 'setuptools>=77,<81'` (mmcv's setup.py needs one before 81)"
            )
        return dict(distclass=LibrariesAlone, cmdclass={"build_ext": BuildLibraries})
    from setuptools.command.bdist_wheel import bdist_wheel

    class BuildWheel(bdist_wheel):
        """Names the wheel for every Python: the libraries belong to none."""

        def get_tag(self):
            return "py3", "none", super().get_tag()[2]

    return dict(cmdclass={"build_ext": BuildLibraries, "bdist_wheel": BuildWheel})


class LibrariesAlone(Distribution):
    """Without pyproject.toml, which the libraries do not need."""

    def parse_config_files(self, *args, **kwargs):
        pass


def cuda_target_flags(nvcc):
    """nvcc's options for the GPUs to build for; the library names them in its error on any other GPU."""
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST") or cuda_toolkit.CAPABILITIES
    version = cuda_toolkit.nvcc_version(nvcc)
    try:
        built, left_out = cuda_toolkit.choose_capabilities(wanted, cuda_toolkit.nvcc_capabilities(nvcc))
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    if left_out:
        warnings.warn(
            f"nvcc {version} or the kernels do not support compute capability {', '.join(left_out)}", stacklevel=1
        )
    if torch.version.cuda and torch.version.cuda.split(".")[0] != version.split(".")[0]:
        warnings.warn(
            f"nvcc is of CUDA {version}, PyTorch {torch.__version__} of CUDA {torch.version.cuda}: the library needs a "
            f"driver for CUDA {version} or later; CUDA_HOME names another toolkit",
            stacklevel=1,
        )
    return [*cuda_toolkit.gencode_flags(built), f'-DDCN_CUDA_CAPABILITIES="{", ".join(built)}"']


def find(folder, *patterns):
    return sorted(str(p.relative_to(ROOT)) for pattern in patterns for p in (ROOT / folder).rglob(pattern))


def libraries():
    wanted = os.environ.get("DCN_PLUGIN_CUDA") or ("1" if torch.version.cuda and cuda_toolkit.find_nvcc() else "0")
    if wanted not in ("0", "1", "only"):
        raise SystemExit(f"error: DCN_PLUGIN_CUDA must be 0, 1 or only, got {wanted!r}")
    if wanted != "0" and cuda_toolkit.find_nvcc() is None:
        raise SystemExit("error: DCN_PLUGIN_CUDA asks for the CUDA library, but CUDA_HOME or the PATH has no nvcc")
    cuda_sources = find("csrc/cuda", "*.cu")
    cpu = Extension("dcn_plugin._cpu", find("csrc", "*.cpp"), depends=find("csrc", "*.h"))
    cuda = Extension("dcn_plugin._cuda", cuda_sources, depends=cuda_sources + find("csrc", "*.h", "*.cuh"))
    return {"0": [cpu], "1": [cpu, cuda], "only": [cuda]}[wanted]


setup(ext_modules=libraries(), **setuptools_options())
