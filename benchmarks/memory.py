"""Peak memory of one call above its inputs and outputs, on the CPU in a process of its own (Linux).

That process sees every allocation come from and go back to the kernel, and asks the kernel for its peak: what a call
touches is counted, whoever allocated it.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
# Every block of 64 KiB and more is mapped for itself: none is served, uncounted, from what was freed before.
MALLOC = dict(MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536", MALLOC_MMAP_MAX_="1000000")
MEASURED = "dense", "dcn_plugin", "mmcv", "torchvision"  # the runtimes' outputs are their own: what is above is unclear


def tensors_of(value):
    values = value if isinstance(value, (tuple, list)) else [value]
    return [tensor for tensor in values if isinstance(tensor, torch.Tensor)]


def bytes_of(value):
    return sum(tensor.nbytes for tensor in tensors_of(value))


def _status(key):
    """Of this process, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def cpu_peak(call):
    """Bytes at the peak of one call, above what was there before it and what it returns."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = _status("VmRSS")
    result = call()
    return max(0, _status("VmHWM") - before - bytes_of(result))


def cuda_peak(call):
    """As :func:`cpu_peak`, of what torch allocates on the device: what libraries allocate for themselves is not in."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    return max(0, torch.cuda.max_memory_allocated() - before - bytes_of(result))


def measure(case, direction, threads, names):
    """{contender: bytes} on the CPU of those named that can be measured, in one process for the case."""
    names = [name for name in names if name in MEASURED]
    job = json.dumps([case.operator, case.name, direction, names, threads])
    command = [sys.executable, "-m", "benchmarks.memory", job]
    done = subprocess.run(command, env=os.environ | MALLOC, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {case.name} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def main():
    from .cases import cases
    from .measure import call_of

    operator, case_name, direction, names, threads = json.loads(sys.argv[1])
    torch.set_num_threads(threads)
    case = next(c for c in cases("cpu", threads) if (c.operator, c.name) == (operator, case_name))
    small = replace(case, shape=(1, case.shape[1], 8, 8))  # what happens once a process: threads, libraries, code
    warm_up, measured = ({c.name: c for c in x.contenders("cpu", threads)} for x in (small, case))
    found = {}
    for name in names:
        call_of(warm_up[name], direction)()
        found[name] = cpu_peak(call_of(measured[name], direction))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
