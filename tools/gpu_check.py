"""Builds, tests and measures the CUDA operators on a machine with an NVIDIA GPU, within 8 minutes on 16 cores.

python3 tools/gpu_check.py FOLDER      FOLDER receives a log a step, gpu_check.json and benchmark.json

Needs nvcc and a python3 with torch >= 2.10 (and setuptools, which torch brings). Without pytest the tests are the
comparisons of tools/gpu_smoke.py alone; compute-sanitizer and torchvision are used where they are. Nothing is
installed: the build happens in a temporary copy of the sources.
"""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("csrc", "dcn_plugin", "tests", "benchmarks", "tools", "setup.py", "pyproject.toml", "README.md", "LICENSE")
TOTAL_SECONDS = 470


@dataclass
class Step:
    name: str
    command: list
    seconds: float  # at most
    env: dict[str, str] = field(default_factory=dict)
    unavailable: str = ""  # what the log holds where the tool does not work on this machine


@dataclass
class Result:
    step: str
    outcome: str
    seconds: float
    last_line: str

    @property
    def failed(self) -> bool:
        return self.outcome.startswith(("failed", "not finished"))


def find_tool(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")


def plan(out: Path) -> list[list[Step]]:
    """The steps, those of a list side by side."""
    python = sys.executable
    build = Step("build", [python, "setup.py", "-q", "build_ext", "--inplace", "--build-temp", "build"], 150)
    smoke = Step("smoke", [python, "tools/gpu_smoke.py"], 60)
    steps = [[build], [Step("registers", [python, "tools/ptxas_report.py", "build", "--no-spills"], 10), smoke]]
    if importlib.util.find_spec("pytest"):
        pytest = [python, "-m", "pytest", "-q", "--maxfail=20", "-p", "no:cacheprovider", "-k", "cuda"]
        workers = ["-n", "4"] if importlib.util.find_spec("xdist") else []
        tests = [*pytest, *workers, "tests/ops", "tests/cuda", "--ignore=tests/cuda/test_build.py"]
        steps.append([Step("tests", tests, 140)])
    if sanitizer := find_tool("compute-sanitizer"):
        # Without the caching allocator every tensor is an allocation of its own, and its ends are seen.
        env = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        command = [sanitizer, "--error-exitcode", "9", "--tool"]
        steps.append(
            [
                Step(tool, [*command, tool, python, "tools/gpu_smoke.py"], 80, env, "Device not supported")
                for tool in ("memcheck", "racecheck")
            ]
        )
    command = [python, "benchmarks/gpu.py", "--json", str(out / "benchmark.json"), "--seconds", "90"]
    steps.append([Step("benchmark", command, 130)])
    return steps


def run(step: Step, out: Path, sources: Path, env: dict[str, str], deadline: float) -> Result:
    started = time.monotonic()
    limit = max(0.0, min(step.seconds, deadline - started))
    path = out / f"{step.name}.log"
    with path.open("w") as log:
        # In a session of its own, so that what it started ends with it.
        process = subprocess.Popen(
            step.command, cwd=sources, env=env | step.env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(limit)
            outcome = "passed" if code == 0 else f"failed ({code})"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            outcome = f"not finished in {limit:.0f} s"
    text = path.read_text(errors="replace")
    if outcome != "passed" and step.unavailable and step.unavailable in text:
        outcome = "does not work here"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return Result(step.name, outcome, time.monotonic() - started, lines[-1] if lines else "")


def run_all(steps: list[list[Step]], out: Path, sources: Path, env: dict[str, str], seconds: float) -> list[Result]:
    """Runs the lists one after another until `seconds` have passed; after a failed build, nothing more."""
    deadline, results = time.monotonic() + seconds, []
    for together in steps:
        with ThreadPoolExecutor(len(together)) as pool:
            jobs = [pool.submit(run, step, out, sources, env, deadline) for step in together]
            results += [job.result() for job in jobs]
        if results[0].failed:
            break
    return results


def copy_sources(to: Path) -> None:
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, to / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(source, to / name)


def report(about: dict, results: list[Result], out: Path) -> None:
    """Writes gpu_check.json and prints the benchmark's table and, last, a line a step."""
    (out / "gpu_check.json").write_text(json.dumps({"about": about, "steps": [asdict(r) for r in results]}, indent=1))
    if (out / "benchmark.log").exists():
        print((out / "benchmark.log").read_text())
    print(f"{about['gpu']}, torch {about['torch']}; logs in {out}")
    for r in results:
        print(f"{r.step:<10} {r.outcome:<24} {r.seconds:>5.0f} s  {r.last_line[:90]}")


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print(__doc__)
        return 2
    gpu = torch.cuda.is_available()
    if not gpu or torch.cuda.get_device_capability() < (8, 0):
        print("the kernels need a GPU of compute capability 8.0 or later" if gpu else "PyTorch sees no GPU here")
        return 2
    if find_tool("nvcc") is None:
        print("nvcc is not on the PATH")
        return 2
    out = Path(arguments[0]).resolve()
    out.mkdir(parents=True, exist_ok=True)
    for old in (*out.glob("*.log"), *out.glob("*.json")):
        old.unlink()
    major, minor = torch.cuda.get_device_capability()
    about = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda}
    with tempfile.TemporaryDirectory() as folder:
        env = dict(
            os.environ,
            PYTHONPATH=folder,
            DCN_PLUGIN_CUDA="1",
            DCN_PLUGIN_CUDA_ARCHS=os.environ.get("DCN_PLUGIN_CUDA_ARCHS", f"{major}{minor}"),
            CUBLAS_WORKSPACE_CONFIG=":4096:8",
        )
        copy_sources(Path(folder))
        results = run_all(plan(out), out, Path(folder), env, TOTAL_SECONDS)
    report(about, results, out)
    return int(any(r.failed for r in results))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
