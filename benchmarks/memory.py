"""Peak memory of one call above its inputs and outputs.

On the CPU (Linux) the kernel says it: what a call touches is counted, whoever allocated it. That needs a process that
sees every allocation come from and go back to the kernel: one with the environment MALLOC.
"""

from pathlib import Path

import torch

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
