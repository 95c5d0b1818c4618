"""The product of matrices, csrc/cpu/simd/gemm.h, for each instruction set; gemm.cpp beside this file says how."""

import subprocess
from pathlib import Path

import pytest

from .native import CXX, INSTRUCTION_SETS, ROOT, processor_has

FLAGS = ["-std=c++20", "-Wall", "-Werror", "-fno-math-errno", "-fno-trapping-math", f"-I{ROOT / 'csrc/cpu/simd'}"]
BUILDS = {
    "optimised": ["-O3"],
    "sanitized": ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
}


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_products_equal_sums_in_double(name, build, tmp_path):
    flags = INSTRUCTION_SETS[name]
    lacking = {flag.removeprefix("-m") for flag in flags} - processor_has()
    if lacking:
        pytest.skip(f"this processor does not have {', '.join(sorted(lacking))}")
    program = tmp_path / "gemm"
    command = [CXX, *FLAGS, *BUILDS[build], *flags, f"-DDCN_ISA={name}", Path(__file__).with_name("gemm.cpp")]
    subprocess.run([*command, "-o", program], check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split() == ["float", "double"] + ["bfloat16"] * (name == "avx512bf16")
