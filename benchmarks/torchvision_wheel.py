"""Lets a torchvision wheel built for CUDA run its CPU kernels on a CPU build of PyTorch, in a process of its own.

torchvision/_C.so is linked against CUDA libraries, of which its CPU kernels call nothing. Libraries of these names,
whose functions do nothing and return 0, stand in for them on that process's library path.
"""

import os
import re
import subprocess
import tempfile
from pathlib import Path

import torch

from .remote import Process

TORCH = Path(torch.__file__).parent / "lib"
CUDA = re.compile(r"lib(cu|nv|c10_cuda|torch_cuda)")  # how the names of CUDA libraries begin
SOURCE = "void *stand_in(void) { return 0; }\n"


def output_of(*command, **environment):
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment).stdout


def needed(library):
    return re.findall(r"\(NEEDED\).*\[(.+)\]", output_of("readelf", "--dynamic", library))


def link(path, symbols):
    """A shared library that defines ``symbols``, with the version of its own name where they ask for one."""
    lines = [f'__asm__(".globl {symbol}\\n.set {symbol}, stand_in");\n' for symbol, _ in symbols]
    path.with_suffix(".c").write_text(SOURCE + "".join(lines))
    versioned = [symbol for symbol, version in symbols if version]
    path.with_suffix(".map").write_text(f"{path.name} {{ {''.join(f'{s}; ' for s in versioned)} }};\n")
    options = [f"-Wl,--version-script={path.with_suffix('.map')}"] if versioned else []
    command = [os.environ.get("CC", "cc"), "-shared", "-fPIC", f"-Wl,-soname,{path.name}", *options]
    subprocess.run([*command, "-o", path, path.with_suffix(".c")], check=True)


def undefined(library, library_path):
    """[(symbol, version or ""), ...] that the loader misses."""
    said = output_of("ldd", "-r", library, LD_LIBRARY_PATH=library_path)
    found = re.findall(r"undefined symbol: ([\w.$]+)(?:, version (\S+))?", said)
    return sorted({(symbol, version) for symbol, version in found if not re.match(r"_?Py", symbol)})


def make_stand_ins(library, folder):
    """Writes the missing CUDA libraries that ``library`` needs into ``folder``; returns the library path to load it."""
    path = f"{folder}:{TORCH}"
    missing = [name for name in needed(library) if CUDA.match(name) and not (TORCH / name).exists()]
    for name in missing:
        link(folder / name, [])
    symbols = undefined(library, path)
    for name in missing:
        # A versioned symbol names its library; any library may define the others.
        link(folder / name, [s for s in symbols if s[1] == name or (not s[1] and name == missing[-1])])
    return path


def start(folder):
    """The process with the torchvision that ``folder`` holds (`pip install --no-deps --target FOLDER`); it says why, in
    a RuntimeError, where that does not load.
    """
    library = Path(folder).resolve() / "torchvision/_C.so"
    if not library.exists():
        raise RuntimeError(f"{library} does not exist")
    stand_ins = tempfile.TemporaryDirectory(prefix="torchvision-")
    process = Process(
        PYTHONPATH=os.pathsep.join(filter(None, [str(library.parents[1]), os.environ.get("PYTHONPATH")])),
        LD_LIBRARY_PATH=make_stand_ins(library, Path(stand_ins.name)),
        DCN_BENCHMARK_PEERS="torchvision",
    )
    process.stand_ins = stand_ins  # the folder lives as long as the process is known
    return process
