"""tools/gpu_check.py as far as it goes without a GPU: its plan, its steps and its report."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tools/gpu_check.py"


@pytest.fixture
def gpu_check(monkeypatch):
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_check", module)
    spec.loader.exec_module(module)
    return module


def test_says_what_is_missing(tmp_path):
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True)
    assert done.returncode == 2
    assert "gpu_check.py FOLDER" in done.stdout
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = subprocess.run([sys.executable, SCRIPT, tmp_path / "out"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout.startswith("PyTorch sees no GPU here")


def test_plan_names_files_that_are_there(gpu_check, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "find_tool", lambda name: name)
    steps = [step for together in gpu_check.plan(tmp_path) for step in together]
    names = [step.name for step in steps]
    assert names == ["build", "registers", "smoke", "tests", "memcheck", "racecheck", "benchmark"]
    gpu_check.copy_sources(tmp_path / "sources")
    for step in steps:
        for word in step.command:
            if str(word).endswith(".py") and "=" not in word:
                assert (tmp_path / "sources" / word).is_file()
    longest = sum(max(step.seconds for step in together) for together in gpu_check.plan(tmp_path)[1:])
    assert longest + 60 <= gpu_check.TOTAL_SECONDS < 480  # a build takes a minute at most on 16 cores


def python(code):
    return [sys.executable, "-c", code]


def test_runs_and_reports(gpu_check, tmp_path, capsys):
    step = gpu_check.Step
    steps = [
        [step("build", python("print('built'); print()"), 60)],
        [
            step("wrong", python("print('so'); exit(3)"), 60),
            step("absent", python("print('Device not supported'); exit(1)"), 60, {}, "Device not supported"),
        ],
        [step("benchmark", python("import os; print('table', os.environ['A'], os.environ['B'])"), 60, {"B": "b"})],
    ]
    results = gpu_check.run_all(steps, tmp_path, ROOT, dict(os.environ, A="a", B="a"), 60)
    assert [(r.step, r.outcome, r.last_line) for r in results] == [
        ("build", "passed", "built"),
        ("wrong", "failed (3)", "so"),
        ("absent", "does not work here", "Device not supported"),
        ("benchmark", "passed", "table a b"),
    ]
    assert [r.failed for r in results] == [False, True, False, False]
    gpu_check.report({"gpu": "a GPU", "torch": "2.13"}, results, tmp_path)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "table a b"
    assert [line.split()[0] for line in printed[-4:]] == ["build", "wrong", "absent", "benchmark"]
    written = json.loads((tmp_path / "gpu_check.json").read_text())
    assert written["about"]["gpu"] == "a GPU"
    assert written["steps"][1]["outcome"] == "failed (3)"


def test_stops_what_takes_too_long(gpu_check, tmp_path):
    sleeper = python("import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])")
    step, started = gpu_check.Step, time.monotonic()
    steps = [[step("short", sleeper, 1)], [step("never", sleeper, 60)]]
    results = gpu_check.run_all(steps, tmp_path, ROOT, dict(os.environ), 60)
    assert [r.outcome for r in results] == ["not finished in 1 s"]  # the first is the build: nothing more
    steps = [[step("build", python(""), 60)], [step("slow", sleeper, 60)]]
    results = gpu_check.run_all(steps, tmp_path, ROOT, dict(os.environ), 2)  # all steps together
    assert results[1].outcome.startswith("not finished in")
    assert time.monotonic() - started < 60
