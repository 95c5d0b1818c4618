"""The product of matrices, csrc/cpu/simd/gemm.h, for each instruction set; gemm.cpp beside this file says how."""

import ast
import os
import platform
import re
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SETUP = (ROOT / "setup.py").read_text()
INSTRUCTION_SETS = {"portable": []}
if platform.machine() in ("x86_64", "AMD64"):
    found = re.findall(r'INSTRUCTION_SETS\["(\w+)"\] = (\[.*\])', SETUP)
    INSTRUCTION_SETS |= {name: ast.literal_eval(flags) for name, flags in found}
    assert {"avx2", "avx512"} <= set(INSTRUCTION_SETS)
FLAGS = ["-std=c++20", "-Wall", "-Werror", "-fno-math-errno", "-fno-trapping-math", f"-I{ROOT / 'csrc/cpu/simd'}"]
BUILDS = {
    "optimised": ["-O3"],
    "sanitized": ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
}


def processor_has():
    info = Path("/proc/cpuinfo")
    return set(info.read_text().split()) if info.exists() else set()


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_products_equal_sums_in_double(name, build, tmp_path):
    flags = INSTRUCTION_SETS[name]
    lacking = {flag.removeprefix("-m") for flag in flags} - processor_has()
    if lacking:
        pytest.skip(f"this processor does not have {', '.join(sorted(lacking))}")
    program = tmp_path / "gemm"
    command = [os.environ.get("CXX", "g++"), *FLAGS, *BUILDS[build], *flags, f"-DDCN_ISA={name}", HERE / "gemm.cpp"]
    subprocess.run([*command, "-o", program], check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    native = name == "avx512" and "avx512_bf16" in processor_has()
    assert done.stdout.split() == ["float", "double"] + ["bfloat16"] * native
