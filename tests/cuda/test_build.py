"""The CUDA library as it ships, compiled where nvcc is: no GPU is needed for what is tested here."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dcn_plugin.ops import _library

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build/cuda"  # as `make cuda`: what is up to date is not compiled again
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")

pytestmark = pytest.mark.skipif(NVCC is None, reason="needs nvcc")


@pytest.fixture(scope="module")
def library():
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-temp", BUILD, "--build-lib", BUILD / "lib"]
    subprocess.run(command, cwd=ROOT, env=dict(os.environ, DCN_PLUGIN_CUDA="only"), check=True)
    return BUILD / "lib/dcn_plugin/_cuda.so"


def run(*command):
    done = subprocess.run([sys.executable, *command], cwd=ROOT, text=True, stdout=subprocess.PIPE)
    return done.returncode, done.stdout


def test_no_kernel_spills_registers(library):
    code, report = run("tools/ptxas_report.py", BUILD, "--no-spills")
    assert code == 0, report
    assert all(f"regs sm_{arch}" in report for arch in (75, 80, 90, 100))
    assert "fused_forward_kernel" in report


def test_report_names_what_spills(tmp_path):
    (tmp_path / "greedy.log").write_text(
        "ptxas info    : Compiling entry function 'greedy' for 'sm_90'\n"
        "ptxas info    : Function properties for greedy\n"
        "    8 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads\n"
        "ptxas info    : Used 255 registers, used 1 barriers, 64 bytes smem\n"
    )
    code, report = run("tools/ptxas_report.py", tmp_path, "--no-spills")
    assert code == 1
    assert "1 spill registers: greedy on sm_90" in report
    assert run("tools/ptxas_report.py", tmp_path)[0] == 0
    assert run("tools/ptxas_report.py", tmp_path / "none", "--no-spills")[0] == 1


def test_needs_torch_cuda_and_registers_every_operator(library, tmp_path):
    """On a CPU build of torch something else of libtorch_cuda's name stands in, with the one function asked of it."""
    script, stand_in = tmp_path / "load.py", tmp_path / "libtorch_cuda.so"
    source = tmp_path / "stand_in.cpp"
    source.write_text('extern "C" void aoti_torch_get_current_cuda_stream() {}')
    subprocess.run([NVCC, "-shared", "-Xcompiler=-fPIC", "-Xlinker=-soname,libtorch_cuda.so", source, "-o", stand_in])
    script.write_text(
        "import ctypes, sys, torch\n"
        "cpu, cuda, stand_in, *operators = sys.argv[1:]\n"
        "torch.ops.load_library(cpu)\n"
        "if torch.version.cuda is None:\n"
        "    try:\n"
        "        torch.ops.load_library(cuda)\n"
        "    except OSError as error:\n"
        "        assert 'libtorch_cuda.so: cannot open shared object file' in str(error.__cause__)\n"
        "    ctypes.CDLL(stand_in)\n"
        "torch.ops.load_library(cuda)\n"
        "for name in operators:\n"
        "    assert torch._C._dispatch_has_kernel_for_dispatch_key(f'dcn_plugin::{name}', 'CUDA'), name\n"
        "print('registered')\n"
    )
    arguments = [_library.FOLDER / "_cpu.so", library, stand_in, *_library.OPERATORS]
    assert run(script, *arguments) == (0, "registered\n")
