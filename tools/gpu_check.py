"""Builds, tests and measures the CUDA operators on a machine with an NVIDIA GPU, within 9 minutes on 16 cores.

python3 tools/gpu_check.py FOLDER

FOLDER receives gpu_check.json (how every step ended), cuda.json (the benchmark) and logs.tar (a log a step), all
written as it goes: whenever it is stopped, they hold what there was, and the log of a step in progress lies beside
them.

Needs nvcc and a python3 with torch >= 2.10 and setuptools >= 65. Without pytest the comparisons of
tests/cuda/smoke.py are all that is tested; compute-sanitizer and torchvision are used where they are. Nothing is
installed: the build happens in a temporary copy of the sources.
"""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("csrc", "dcn_plugin", "tests", "benchmarks", "tools", "setup.py", "pyproject.toml", "README.md", "LICENSE")
TOTAL_SECONDS = 550
INDUCTOR = "compile or inductor"  # tests of what takes long for reasons that are not ours


@dataclass
class Step:
    name: str
    command: list  # "{seconds}" in it becomes the time that it has, less a margin to end by itself
    seconds: float  # at most
    env: dict[str, str] = field(default_factory=dict)
    unavailable: str = ""  # what the log holds where the tool does not work on this machine
    takes_the_rest: bool = False  # of the time, but for what the steps after it may take


@dataclass
class Result:
    step: str
    outcome: str = "not run"
    seconds: float = 0.0
    last_line: str = ""

    @property
    def passed(self) -> bool:
        return self.outcome in ("passed", "does not work here")


def find_tool(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")


def sanitizer_steps(python: str) -> list[Step]:
    """racecheck watches our kernels alone: their mangled names contain the namespace dcn."""
    sanitizer = find_tool("compute-sanitizer")
    if sanitizer is None:
        return []
    said = subprocess.run([sanitizer, "--help"], capture_output=True, text=True).stdout
    kernels = ["--kernel-name" if "--kernel-name" in said else "--kernel-regex", "kns=dcn"]
    # Without the caching allocator every tensor is an allocation of its own, and its ends are seen.
    env = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return [
        Step(
            tool,
            [sanitizer, "--error-exitcode", "9", "--tool", tool, *options, python, "tests/cuda/smoke.py"],
            90,
            env,
            "Device not supported",
        )
        for tool, options in (("memcheck", []), ("racecheck", kernels))
    ]


def plan(out: Path) -> list[list[Step]]:
    """The steps, those of a list side by side."""
    python = sys.executable
    build = Step("build", [python, "setup.py", "-q", "build_ext", "--inplace", "--build-temp", "build"], 150)
    registers = Step("registers", [python, "tools/ptxas_report.py", "build", "--no-spills"], 10)
    smoke = Step("smoke", [python, "tests/cuda/smoke.py"], 60)
    tests, inductor = [], []
    if importlib.util.find_spec("pytest"):
        command = [python, "-m", "pytest", "-v", "--tb=short", "--maxfail=20", "-p", "no:cacheprovider"]
        files = ["tests/cuda", "tests/ops", "--ignore=tests/cuda/test_build.py"]
        tests = [Step("tests", [*command, "-k", f"cuda and not ({INDUCTOR})", *files], 120)]
        inductor = [Step("inductor", [*command, "-k", f"cuda and ({INDUCTOR})", *files], 90)]
    command = [python, "-m", "benchmarks", "--device", "cuda", "--results", out, "--json-only"]
    benchmark = Step("benchmark", [*command, "--budget", "0.3", "--seconds", "{seconds}"], 120, takes_the_rest=True)
    steps = [[build], [registers, smoke], tests, [benchmark], [*sanitizer_steps(python), *inductor]]
    return [together for together in steps if together]


class Check:
    """Runs steps, and keeps the record of them in a folder up to date."""

    def __init__(self, out: Path, sources: Path, env: dict[str, str], about: dict):
        self.out, self.sources, self.env, self.about = out, sources, env, about
        self.results: dict[str, Result] = {}
        self.lock = threading.Lock()

    def save(self) -> None:
        partial = self.out / "gpu_check.partial"
        steps = [asdict(result) for result in self.results.values()]
        partial.write_text(json.dumps({"about": self.about, "steps": steps}, indent=1) + "\n")
        partial.replace(self.out / "gpu_check.json")

    def record(self, result: Result, log: Path | None = None) -> None:
        """Keeps how a step is or ended; a log that is given moves into the archive of logs."""
        with self.lock:
            self.results[result.step] = result
            self.save()
            if log:
                with tarfile.open(self.out / "logs.tar", "a") as archive:
                    archive.add(log, log.name)
                log.unlink()
        seconds = f"{result.seconds:.0f} s" if result.seconds else ""
        print(f"{result.step:<10} {result.outcome:<24} {seconds:>6}  {result.last_line[:100]}", flush=True)

    def run(self, step: Step, limit: float) -> Result:
        """Of at most ``limit`` seconds."""
        started = time.monotonic()
        self.record(Result(step.name, f"running, at most {limit:.0f} s"))
        path = self.out / f"{step.name}.log"
        command = [str(word).replace("{seconds}", f"{max(limit - 20, 1):.0f}") for word in step.command]
        with path.open("w") as log:
            try:
                # In a session of its own, so that what it started ends with it.
                process = subprocess.Popen(
                    command,
                    cwd=self.sources,
                    env=self.env | step.env,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            except OSError as error:
                log.write(f"{error}\n")
                outcome = "failed (not started)"
            else:
                try:
                    code = process.wait(limit)
                    outcome = "passed" if code == 0 else f"failed ({code})"
                except subprocess.TimeoutExpired:
                    outcome = f"not finished in {limit:.0f} s"
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        text = path.read_text(errors="replace")
        if outcome != "passed" and step.unavailable and step.unavailable in text:
            outcome = "does not work here"
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        result = Result(step.name, outcome, time.monotonic() - started, lines[-1] if lines else "")
        self.record(result, path)
        return result

    def run_all(self, steps: list[list[Step]], seconds: float) -> None:
        """Runs the lists one after another until ``seconds`` have passed; after a failed build, nothing more."""
        deadline = time.monotonic() + seconds
        self.results = {step.name: Result(step.name) for together in steps for step in together}
        self.save()
        for i, together in enumerate(steps):
            left = deadline - time.monotonic()
            rest = left - sum(max(step.seconds for step in later) for later in steps[i + 1 :])
            limits = [max(step.seconds, rest) if step.takes_the_rest else step.seconds for step in together]
            if left < 1:
                break
            with ThreadPoolExecutor(len(together)) as pool:
                results = list(pool.map(self.run, together, [min(limit, left) for limit in limits]))
            if i == 0 and not results[0].passed:
                break


def copy_sources(to: Path) -> None:
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, to / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(source, to / name)


def print_benchmark(path: Path) -> None:
    """A short line for each run of the benchmark that was measured."""
    rows = json.loads(path.read_text())["times"] if path.exists() else []
    for row in rows:
        found = row["contenders"].get("dcn_plugin")
        if found is None:
            figures = "; ".join(f"{name}: {why[:80]}" for name, why in row["failed"].items())
        else:
            ratio = f"{found['ratio'][1]:.2f} of {found['floor']}" if "ratio" in found else ""
            figures = f"{1e3 * found['seconds'][1]:.3f} ms  {ratio}"
        print(f"{row['operator']} {row['case']} {row['direction']}: {figures}")


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print(__doc__)
        return 2
    gpu = torch.cuda.is_available()
    if not gpu or torch.cuda.get_device_capability() < (7, 5):
        print("the kernels need a GPU of compute capability 7.5 or later" if gpu else "PyTorch sees no GPU here")
        return 2
    if find_tool("nvcc") is None:
        print("nvcc is not on the PATH")
        return 2
    if importlib.util.find_spec("setuptools") is None:
        print("the build needs setuptools: `pip install 'setuptools>=77,<81'`")
        return 2
    out = Path(arguments[0]).resolve()
    out.mkdir(parents=True, exist_ok=True)
    for old in (*out.glob("*.log"), *out.glob("*.json"), *out.glob("logs.tar")):
        old.unlink()
    major, minor = torch.cuda.get_device_capability()
    about = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda}
    with tempfile.TemporaryDirectory() as folder:
        env = dict(
            os.environ,
            PYTHONPATH=folder,
            PYTHONUNBUFFERED="1",  # a log that is cut off holds all that was said
            DCN_PLUGIN_CUDA="1",
            TORCH_CUDA_ARCH_LIST=os.environ.get("TORCH_CUDA_ARCH_LIST", f"{major}.{minor}"),
            CUBLAS_WORKSPACE_CONFIG=":4096:8",
        )
        copy_sources(Path(folder))
        check = Check(out, Path(folder), env, about)
        check.run_all(plan(out), TOTAL_SECONDS)
    print_benchmark(out / "cuda.json")
    print(f"{about['gpu']}, torch {about['torch']}; logs in {out}")
    for result in check.results.values():
        print(f"{result.step:<10} {result.outcome:<24} {result.seconds:>5.0f} s  {result.last_line[:90]}")
    return int(not all(result.passed for result in check.results.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
