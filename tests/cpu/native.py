"""How setup.py compiles the native sources, for tests that compile some of them in another way."""

import ast
import os
import platform
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
CXX = os.environ.get("CXX", "g++")
SETUP = (ROOT / "setup.py").read_text()

INSTRUCTION_SETS = {"portable": []}
if platform.machine() in ("x86_64", "AMD64"):
    found = re.findall(r'INSTRUCTION_SETS\["(\w+)"\] = (\[.*\])', SETUP)
    INSTRUCTION_SETS |= {name: ast.literal_eval(flags) for name, flags in found}
    assert {"avx2", "avx512"} <= set(INSTRUCTION_SETS)

TARGET = re.search(r"-DTORCH_TARGET_VERSION=0x(\w\w)(\w\w)\w+", SETUP)  # the oldest torch that the library loads into
OLDEST_TORCH = f"{int(TARGET[1], 16)}.{int(TARGET[2], 16)}.0"


def processor_has():
    info = Path("/proc/cpuinfo")
    flags = set(info.read_text().split()) if info.exists() else set()
    return flags | {flag.replace("_", "") for flag in flags}  # as compilers write them, such as avx512bf16


def run_all(commands):
    """Runs compilers side by side; returns what those that fail print."""

    def run(command):
        done = subprocess.run(command, capture_output=True, text=True)
        return done.stderr if done.returncode else ""

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return "".join(pool.map(run, commands))
