"""Contenders in processes of their own: what their libraries load and allocate stays out of the benchmark's."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent


class Process:
    """One `python -m benchmarks.worker`, which answers requests until it is closed."""

    def __init__(self, **environment):
        self.environment = environment
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "benchmarks.worker"],
            env=os.environ | environment,
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, what, **arguments):
        """The answer; RuntimeError with what the request raised there, or that the process has ended."""
        try:
            print(json.dumps([what, arguments]), file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        except OSError:  # nobody reads: it has ended
            line = ""
        if not line:
            raise RuntimeError(f"its process ended with status {self.process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["value"]

    def close(self):
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class Call:
    """One contender's call in another process, on a case that it makes for itself from the same seed."""

    def __init__(self, process, **run):
        self.process, self.run = process, run

    def __call__(self):
        """Makes the case there and runs it once; returns the result."""
        with tempfile.NamedTemporaryFile(suffix=".pt") as file:
            self.process.ask("run", **self.run, result=file.name)
            return torch.load(file.name)

    def seconds(self, repeat):
        return self.process.ask("seconds", repeat=repeat)
