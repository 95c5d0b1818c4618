"""The CPU kernels of every instruction set this processor has, each in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
INSTRUCTION_SETS = {"portable": None, "avx2": "avx2", "avx512": "avx512dq", "avx512bf16": "avx512_bf16"}  # and flags
# Without float16, whose tensors are converted to float32 before a kernel runs.
SELECTION = (
    "(test_equals_reference and not 130 and not 300 or sizes_equal_reference or repeats or same_bits) and not float16"
)
BEST_SELECTION = "test_equals_reference and base"  # all other tests run the best one already


def flags():
    info = Path("/proc/cpuinfo")
    return set(info.read_text().split()) if info.exists() else set()


def environment(name):
    return {**os.environ, "DCN_PLUGIN_CPU_ISA": name}


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_instruction_set(name):
    available = [name for name, flag in INSTRUCTION_SETS.items() if flag is None or flag in flags()]
    if name not in available:
        pytest.skip(f"this processor does not have {name}")
    selection = BEST_SELECTION if name == available[-1] else SELECTION
    operators = "deform_conv2d", "deform_roi_align", "deform_ps_roi_pool", "ms_deform_attn"
    files = [str(TESTS / f"test_{operator}.py") for operator in operators]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", selection, *files]
    result = subprocess.run(command, env=environment(name), capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:]


def test_unknown_instruction_set_is_an_error():
    program = "import torch; from dcn_plugin.ops import deform_conv2d as f; z = torch.zeros; "
    program += "f(z(1, 1, 1, 1), z(1, 2, 1, 1), z(1, 1, 1, 1))"
    result = subprocess.run([sys.executable, "-c", program], env=environment("sse9"), capture_output=True, text=True)
    assert "DCN_PLUGIN_CPU_ISA must be portable, avx2, avx512 or avx512bf16, got sse9" in result.stderr
