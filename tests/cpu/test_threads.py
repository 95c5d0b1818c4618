"""The kernels, and what divides their work among threads, under the thread sanitizer; threads.cpp gives them threads
that it sees. Portable kernels alone: it does not see every store of wider instruction sets.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from .native import CXX, ROOT, TARGET, run_all
from .threads_worker import OPERATORS

TORCH = Path(torch.__file__).parent
FLAGS = ["-std=c++20", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", TARGET[0]]
FLAGS += ["-fsanitize=thread", "-DDCN_ISA=portable", "-DDCN_PORTABLE_ALONE", f"-I{TORCH / 'include'}"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """run(**environment) -> (exit status, {operator, type and direction: what is said meanwhile})"""
    sanitizer = Path(subprocess.check_output([CXX, "-print-file-name=libtsan.so"], text=True).strip())
    if not sanitizer.is_absolute():
        pytest.skip(f"{CXX} has no thread sanitizer")
    build = tmp_path_factory.mktemp("threads")
    sources = [Path(__file__).with_name("threads.cpp"), ROOT / "csrc/ops.cpp", *(ROOT / "csrc/cpu").rglob("*.cpp")]
    objects = [build / f"{source.stem}.o" for source in sources]
    assert len(set(objects)) == len(objects)
    commands = [[CXX, *FLAGS, "-c", s, "-o", to] for s, to in zip(sources, objects, strict=True)]
    assert not run_all(commands)
    link = [CXX, "-shared", "-fsanitize=thread", "-Wl,-Bsymbolic"]  # its own functions come before libtorch's
    assert not run_all([[*link, *objects, f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10", "-o", build / "_cpu.so"]])
    # The sanitizer needs addresses where it expects them.
    command = [setarch, "-R"] if (setarch := shutil.which("setarch")) else []
    command += ["env", f"LD_PRELOAD={sanitizer.resolve()}"]
    command += [sys.executable, "-m", "tests.cpu.threads_worker", build / "_cpu.so"]

    def run(symbolize, **environment):
        environment = (
            os.environ | environment | dict(TSAN_OPTIONS=f"ignore_noninstrumented_modules=1 symbolize={int(symbolize)}")
        )
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
        said = re.split(r"^operator: (.*)\n", done.stderr, flags=re.MULTILINE)
        return done.returncode, dict(zip(said[1::2], said[2::2], strict=True))

    return run


def test_no_races(run):
    status, said = run(symbolize=True)
    assert status == 0, said
    assert not [text for text in said.values() if text.strip()]
    assert len(said) == 4 * len(OPERATORS)


def test_tasks_done_twice_are_seen(run):
    """By all operators, or the test above would not see races either."""
    status, said = run(symbolize=False, DCN_PLANT_RACES="1")
    assert status == 66
    # Not each of its runs: the sanitizer reports a place once, and remembers few accesses.
    seen = {name.split(" torch.")[0] for name, text in said.items() if "ThreadSanitizer: data race" in text}
    assert seen == set(OPERATORS)
