"""Builds, tests and measures the CUDA operators on a machine with an NVIDIA GPU, within 8 minutes on 16 cores.

python3 tools/gpu_check.py FOLDER      FOLDER receives the logs, gpu_check.json and benchmark.json

Needs nvcc and a python3 with torch >= 2.10, setuptools and pytest; uses compute-sanitizer and torchvision where they
are. Nothing is installed: the build happens in a temporary copy of the sources.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("csrc", "dcn_plugin", "tests", "benchmarks", "tools", "setup.py", "pyproject.toml", "README.md", "LICENSE")


class Steps:
    def __init__(self, out: Path, sources: Path):
        self.out, self.sources, self.results = out, sources, []
        major, minor = torch.cuda.get_device_capability()
        self.env = dict(
            os.environ,
            PYTHONPATH=str(sources),
            DCN_PLUGIN_CUDA="1",
            DCN_PLUGIN_CUDA_ARCHS=os.environ.get("DCN_PLUGIN_CUDA_ARCHS", f"{major}{minor}"),
            CUBLAS_WORKSPACE_CONFIG=":4096:8",
        )

    def run(self, name: str, command: list, seconds: float, **env: str) -> bool:
        started = time.monotonic()
        log = self.out / f"{name}.log"
        with log.open("w") as file:
            try:
                done = subprocess.run(
                    command,
                    cwd=self.sources,
                    env=self.env | env,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    timeout=seconds,
                )
                outcome = "passed" if done.returncode == 0 else f"failed ({done.returncode})"
            except subprocess.TimeoutExpired:
                outcome = f"not finished in {seconds:.0f} s"
        lines = [line for line in log.read_text().splitlines() if line.strip()]
        self.results.append((name, outcome, time.monotonic() - started, lines[-1][:90] if lines else ""))
        return outcome == "passed"


def main() -> int:
    if len(sys.argv) != 2 or not torch.cuda.is_available():
        print(__doc__ if len(sys.argv) != 2 else "PyTorch sees no GPU here")
        return 2
    out = Path(sys.argv[1]).resolve()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        sources = Path(folder)
        for name in COPIED:
            source = ROOT / name
            ignored = shutil.ignore_patterns("*.so", "__pycache__")
            if source.is_dir():
                shutil.copytree(source, sources / name, ignore=ignored)
            elif source.exists():
                shutil.copy(source, sources / name)
        steps = Steps(out, sources)
        python = sys.executable
        if steps.run("build", [python, "setup.py", "build_ext", "--inplace", "--build-temp", "build"], 240):
            pytest = [python, "-m", "pytest", "-q", "--maxfail=20", "-p", "no:cacheprovider"]
            steps.run("tests", [*pytest, "tests/ops", "tests/cuda", "-k", "cuda"], 150)
            sanitizer = shutil.which("compute-sanitizer") or shutil.which(
                "compute-sanitizer", path="/usr/local/cuda/bin"
            )
            if sanitizer:
                with ThreadPoolExecutor() as pool:
                    for tool in ("memcheck", "racecheck"):
                        # Without the caching allocator every tensor is an allocation of its own, and its ends are seen.
                        command = [sanitizer, "--tool", tool, "--error-exitcode", "9", python, "tools/gpu_smoke.py"]
                        pool.submit(steps.run, tool, command, 100, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
            command = [python, "benchmarks/gpu.py", "--json", str(out / "benchmark.json"), "--seconds", "100"]
            steps.run("benchmark", command, 150)
    keys = ("step", "outcome", "seconds", "last_line")
    about = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda}
    report = {"about": about, "steps": [dict(zip(keys, result, strict=True)) for result in steps.results]}
    (out / "gpu_check.json").write_text(json.dumps(report, indent=1))
    if (out / "benchmark.log").exists():
        print((out / "benchmark.log").read_text())
    print(f"{about['gpu']}, torch {about['torch']}; logs in {out}")
    for name, outcome, seconds, last in steps.results:
        print(f"{name:<10} {outcome:<24} {seconds:>5.0f} s  {last}")
    return int(any(not outcome.startswith("passed") for _, outcome, *_ in steps.results))


if __name__ == "__main__":
    sys.exit(main())
