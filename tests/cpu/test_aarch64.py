"""The CPU's sources make a library for aarch64, of the portable kernels; nothing runs here.

The compiler is Debian's cross compiler, the headers are those of this machine's torch: every platform has the same. A
library that leaves out a function still links, since torch's libraries for aarch64 are not there to link with; so what
it needs from elsewhere is compared with what this machine's library needs.
"""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import dcn_plugin

from .native import ROOT, TARGET, run_all

PREFIX = "aarch64-linux-gnu-"
FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"]  # of setup.py
FLAGS += [TARGET[0], "-DDCN_ISA=portable", f"-I{Path(torch.__file__).parent / 'include'}"]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    if shutil.which(f"{PREFIX}g++") is None:
        pytest.skip(f"needs {PREFIX}g++ (on Debian: g++-aarch64-linux-gnu)")
    build = tmp_path_factory.mktemp("aarch64")
    sources = [ROOT / "csrc/ops.cpp", *(ROOT / "csrc/cpu").rglob("*.cpp")]
    objects = [build / f"{source.stem}.o" for source in sources]
    commands = [[f"{PREFIX}g++", *FLAGS, "-c", s, "-o", to] for s, to in zip(sources, objects, strict=True)]
    assert not run_all(commands)
    assert not run_all([[f"{PREFIX}g++", "-shared", *objects, "-o", build / "_cpu.so"]])
    return build / "_cpu.so"


def needed(nm, library):
    """The functions of torch and of this project that a library takes from other libraries."""
    names = subprocess.check_output([nm, "--dynamic", "--undefined-only", library], text=True).split()
    return {name for name in names if re.match(r"aoti_|torch_|_ZN?K?3dcn", name)}


def test_needs_the_same_functions_as_this_machines_library(library):
    expected = needed("nm", Path(dcn_plugin.__file__).with_name("_cpu.so"))
    assert len(expected) > 20
    assert needed(f"{PREFIX}nm", library) == expected


def test_kernels_use_neon(library):
    code = subprocess.check_output([f"{PREFIX}objdump", "--disassemble", library], text=True)
    assert len(re.findall(r"\tfmla\tv\d+\.4s", code)) > 20  # multiply-adds of four floats
