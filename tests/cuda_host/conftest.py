"""The kernels under csrc/cuda, run without a GPU: `cuda_host` is the operators on the shim, each checker in turn."""

import pickle
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from .build import CXX, build, environment


class CudaHost:
    """The shim's library in a process of its own. The process is started again after an error ends it."""

    def __init__(self, checker: str):
        self.checker = checker
        self.library = build(checker)
        self.process = None

    def _start(self):
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115  (open as long as the process)
        self.process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("worker.py"), self.library],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env=environment(self.checker),
        )

    def __call__(self, name: str, *arguments, order: int = 0, fused=True, shared_kib: int = 227, on_host=True):
        """Runs operator `name`; blocks and threads take turns in `order` (see cuda_host.h).

        Without `fused` a convolution goes through columns, whatever the rule says. A block of the GPU has `shared_kib`
        of shared memory. Without `on_host` drivers read no tensor that kernels can read.
        """
        if self.process is None:
            self._start()
        pickle.dump((name, order, fused, shared_kib, on_host, arguments), self.process.stdin)
        self.process.stdin.flush()
        try:
            done, result = pickle.load(self.process.stdout)
        except EOFError:
            self.close()
            self.errors.seek(0)
            raise RuntimeError(self.errors.read().decode()) from None
        if not done:
            raise RuntimeError(result)
        return result

    def close(self):
        if self.process is not None:
            self.process.stdin.close()
            self.process.stdout.close()
            self.process.wait()
            self.process = None


@pytest.fixture(scope="session", params=["address", "race"])
def cuda_host(request):
    if shutil.which(CXX) is None:
        pytest.skip(f"no C++ compiler ({CXX})")
    host = CudaHost(request.param)
    yield host
    host.close()
