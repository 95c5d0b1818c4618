"""What a run was made on, by and with: a number means little without it."""

import os
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path

import torch

from . import peers


def processor():
    try:
        lines = [line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines()]
    except OSError:
        return platform.processor() or platform.machine()
    of = {key.strip(): value.strip() for key, _, value in reversed(lines)}
    return f"{of.get('model name', platform.machine())} (family {of.get('cpu family')}, model {of.get('model')})"


def git(*command):
    try:
        where = ["git", "-C", Path(__file__).parent.parent]
        return subprocess.run([*where, *command], capture_output=True, text=True).stdout.strip()
    except OSError:  # there is no git
        return ""


def commit():
    """Of the working tree; "+" says that operators or benchmarks have changed since."""
    changed = git("status", "--porcelain", "--", "csrc", "dcn_plugin", "benchmarks/*.py", "setup.py")
    return (git("rev-parse", "--short=12", "HEAD") or "unknown") + "+" * bool(changed)


def command():
    """What to run to make the numbers again."""
    matter = "DCN_PLUGIN_CPU_ISA", "OMP_NUM_THREADS"
    variables = [f"{name}={os.environ[name]}" for name in matter if name in os.environ]
    return shlex.join([*variables, "python", "-m", "benchmarks", *sys.argv[1:]])


def describe(device, threads):
    built = torch.__config__.show()
    working, absent = peers.installed()
    found = dict(
        processor=processor(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        threads=threads,
        instruction_set=os.environ.get("DCN_PLUGIN_CPU_ISA") or torch.backends.cpu.get_cpu_capability(),
        system=platform.platform(terse=True),
        python=platform.python_version(),
        torch=torch.__version__,
        blas=", ".join(re.findall(r"BLAS_INFO=(\w+)", built) + re.findall(r"MKL-DNN (v[\d.]+)", built)[:1]),
        peers=working,
        absent=absent,
        commit=commit(),
        load_before=round(os.getloadavg()[0], 1),
    )
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= dict(gpu=properties.name, cuda=torch.version.cuda, cudnn=torch.backends.cudnn.version())
        found["tf32"] = torch.backends.cudnn.allow_tf32
    return found
