"""tools/gpu_check.py as far as it goes without a GPU: its plan, and rehearsals of the whole of it."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SCRIPT = ROOT / "tools/gpu_check.py"
STEPS = ["build", "registers", "smoke", "tests", "benchmark", "memcheck", "racecheck", "inductor"]

spec = importlib.util.spec_from_file_location("rehearsal", HERE / "rehearsal.py")
rehearsal = importlib.util.module_from_spec(spec)
spec.loader.exec_module(rehearsal)


@pytest.fixture
def gpu_check():
    yield rehearsal.load()
    del sys.modules["gpu_check"]


@pytest.fixture
def rehearse(gpu_check, monkeypatch, tmp_path):
    (tmp_path / "tools").mkdir()
    return lambda *ending: rehearsal.rehearse(gpu_check, monkeypatch, tmp_path / "out", tmp_path / "tools", *ending)


def found(out):
    """({step: its result}, {log: its text})"""
    steps = json.loads((out / "gpu_check.json").read_text())["steps"]
    with tarfile.open(out / "logs.tar") as archive:
        logs = {member.name: archive.extractfile(member).read().decode() for member in archive}
    return {step["step"]: step for step in steps}, logs


def test_says_what_is_missing(tmp_path):
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True)
    assert done.returncode == 2
    assert "gpu_check.py FOLDER" in done.stdout
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = subprocess.run([sys.executable, SCRIPT, tmp_path / "out"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout.startswith("PyTorch sees no GPU here")


def test_says_that_setuptools_is_missing(rehearse, gpu_check, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu_check.importlib.util, "find_spec", lambda name: None)
    assert rehearse() == 2
    assert capsys.readouterr().out.startswith("the build needs setuptools: `pip install")
    assert not (tmp_path / "out").exists()


def test_all_goes_well(rehearse, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/logs.tar").write_text("of an earlier run")
    assert rehearse() == 0
    results, logs = found(tmp_path / "out")
    assert list(results) == STEPS
    assert all(result["outcome"] == "passed" for result in results.values())
    assert logs == {f"{name}.log": f"{name} at work\n" for name in STEPS}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"gpu_check.json", "cuda.json", "logs.tar"}
    printed = capsys.readouterr().out
    assert "deform_conv2d c4 forward: 2.000 ms  1.50 of dense" in printed
    assert [line.split()[0] for line in printed.splitlines()[-8:]] == STEPS


OUTCOMES = {
    "fails": "failed (3)",
    "is killed": "failed (-9)",
    "hangs": "not finished in 1 s",
    "hangs with children": "not finished in 1 s",
    "prints nothing": "passed",
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("end", OUTCOMES)
def test_a_step_ends_otherwise(rehearse, tmp_path, step, end):
    """The record holds how that step ended and what it had said, and all of the others."""
    assert rehearse(step, end) == (0 if OUTCOMES[end] == "passed" else 1)
    results, logs = found(tmp_path / "out")
    assert list(results) == STEPS
    assert results[step]["outcome"] == OUTCOMES[end]
    assert logs[f"{step}.log"] == ("" if end == "prints nothing" else f"{step} at work\n")
    others = [name for name in STEPS if name != step]
    if step == "build" and OUTCOMES[end] != "passed":  # nothing can run then
        assert all(results[name]["outcome"] == "not run" for name in others)
    else:
        assert all(results[name]["outcome"] == "passed" for name in others)
        assert set(logs) == {f"{name}.log" for name in STEPS}
        assert (tmp_path / "out/cuda.json").exists() == ((step, end) != ("benchmark", "prints nothing"))


def test_killed_itself(tmp_path):
    """What was done is kept, and so is what the step in progress had said."""
    out = tmp_path / "out"
    command = [sys.executable, HERE / "rehearsal.py", out, "benchmark", "hangs"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
    deadline = time.monotonic() + 120
    while not (out / "cuda.json").exists():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.1)
    tasks = Path(f"/proc/{process.pid}/task")
    children = [int(pid) for task in tasks.iterdir() for pid in (task / "children").read_text().split()]
    process.kill()
    process.wait()
    for pid in children:  # the step is in a group of its own, and lives on
        os.killpg(pid, signal.SIGKILL)
    printed = process.stdout.read().decode()
    process.stdout.close()
    results, logs = found(out)
    assert list(results) == STEPS
    assert [results[name]["outcome"] for name in STEPS[:4]] == ["passed"] * 4
    assert results["benchmark"]["outcome"].startswith("running")
    assert [results[name]["outcome"] for name in STEPS[5:]] == ["not run"] * 3
    assert set(logs) == {f"{name}.log" for name in STEPS[:4]}
    assert (out / "benchmark.log").read_text().startswith("benchmark at work")
    assert "tests      passed" in printed  # it said so as it went


def test_tool_that_does_not_work_here(gpu_check, tmp_path, capsys):
    step = gpu_check.Step
    program = ["sh", "-c", "echo Device not supported; exit 1"]
    check = gpu_check.Check(tmp_path, ROOT, dict(os.environ), {})
    check.run_all([[step("build", ["no such program"], 9)]], 60)
    assert check.results["build"].outcome == "failed (not started)"
    check.run_all([[step("memcheck", program, 9, {}, "Device not supported")]], 60)
    assert check.results["memcheck"].outcome == "does not work here"
    assert check.results["memcheck"].passed


def test_time_is_shared_out(gpu_check, tmp_path):
    """The benchmark has what the steps before it left, those after it what is theirs, and none more than there is."""
    step = gpu_check.Step
    say = ["echo", "{seconds}"]
    check = gpu_check.Check(tmp_path, ROOT, dict(os.environ), {})
    check.run_all(
        [[step("build", say, 100)], [step("all", say, 50, takes_the_rest=True)], [step("last", say, 60)]], 300
    )
    said = {name: int(result.last_line) for name, result in check.results.items()}
    assert said["build"] == 80
    assert 200 < said["all"] <= 220
    assert said["last"] == 40
    check.run_all([[step("build", say, 100)]], 30)
    assert int(check.results["build"].last_line) <= 10


@pytest.fixture
def plan(gpu_check, tmp_path, monkeypatch):
    sanitizer = tmp_path / "compute-sanitizer"
    sanitizer.write_text("#!/bin/sh\necho '  --kernel-regex arg'\n")
    sanitizer.chmod(0o755)
    monkeypatch.setattr(gpu_check, "find_tool", lambda name: str(tmp_path / name))
    return {step.name: step for together in gpu_check.plan(tmp_path) for step in together}


def test_limits_leave_time(gpu_check, plan, tmp_path):
    assert list(plan) == STEPS
    longest = sum(max(step.seconds for step in together) for together in gpu_check.plan(tmp_path))
    assert longest <= gpu_check.TOTAL_SECONDS <= 9.5 * 60
    assert plan["racecheck"].command[4:7] == ["racecheck", "--kernel-regex", "kns=dcn"]


def test_plan_names_files_that_are_there(gpu_check, plan, tmp_path):
    gpu_check.copy_sources(tmp_path / "sources")
    for step in plan.values():
        for word in map(str, step.command):
            if word.startswith(("tests/", "tools/")):
                assert (tmp_path / "sources" / word).exists()


def test_benchmark_takes_its_options(plan):
    command = [str(word).replace("{seconds}", "99") for word in plan["benchmark"].command]
    done = subprocess.run([*command, "--list"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("deform_conv2d c3 channels_last bfloat16 forward\n")


def test_selections_of_tests(plan, tmp_path):
    """As on a machine with a GPU: tests/cuda first, what runs on the device, torch.compile's for itself."""
    (tmp_path / "fake_gpu.py").write_text("import torch\ntorch.cuda.is_available = lambda: True\n")
    env = dict(os.environ, PYTHONPATH=f"{tmp_path}:{ROOT}")
    chosen = {}
    for name in ("tests", "inductor"):
        command = [*plan[name].command, "--collect-only", "-q", "-q", "-p", "fake_gpu"]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        chosen[name] = [line for line in done.stdout.splitlines() if "::" in line]
    assert chosen["tests"][0].startswith("tests/cuda/")
    assert sum("[cuda" in line or "-cuda" in line for line in chosen["tests"]) > 100
    on_cpu = [line.split("::")[1] for line in chosen["tests"] if "[cpu" in line or "-cpu" in line]
    assert all("cuda" in test.split("[")[0] for test in on_cpu)
    assert not any("test_compile" in line for line in chosen["tests"])
    assert {line.split("::")[1].split("[")[0] for line in chosen["inductor"]} == {"test_compile"}
    # Convolution with two backends, the two RoI operators with one, attention with shapes as a list and as a tensor.
    assert len(chosen["inductor"]) == 6
