"""Runs the whole of tools/gpu_check.py without a GPU.

The device, nvcc and compute-sanitizer are made up; in place of each step's command stands one that says what it does,
leaves what the step leaves, and ends as it is told.

python tests/tools/rehearsal.py FOLDER STEP END      STEP ends like END, all others pass
"""

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).parents[2]
ENDS = {  # in the shell, which starts fast
    "passes": "",
    "fails": "exit 3",
    "is killed": "kill -9 $$",
    "hangs": "exec sleep 600",
    "hangs with children": "sleep 600 & wait",
}
FOUND = dict(seconds=[0.001, 0.002, 0.003], ratio=[1.4, 1.5, 1.6], floor="dense")
ROW = dict(operator="deform_conv2d", case="c4", direction="forward", contenders=dict(dcn_plugin=FOUND), failed={})


def load():
    spec = importlib.util.spec_from_file_location("gpu_check", ROOT / "tools/gpu_check.py")
    module = sys.modules["gpu_check"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def program(step, end, out):
    """What stands in for a step."""
    if end == "prints nothing":
        return ["true"]
    lines = [f"echo {step} at work"]
    if step == "benchmark":
        lines.append(f"echo '{json.dumps(dict(times=[ROW]))}' > '{out / 'cuda.json'}'")
    return ["sh", "-c", "\n".join([*lines, ENDS[end]])]


def rehearse(gpu_check, monkeypatch, out, tools, step=None, end="passes", seconds=None):
    """The exit status of gpu_check, where ``step`` ends like ``end``. A step that hangs gets one second."""
    monkeypatch.setattr(gpu_check.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_check.torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(gpu_check.torch.cuda, "get_device_name", lambda: "a made-up GPU")
    sanitizer = tools / "compute-sanitizer"
    sanitizer.write_text("#!/bin/sh\necho '  --kernel-name arg'\n")
    sanitizer.chmod(0o755)
    monkeypatch.setattr(gpu_check, "find_tool", lambda name: str(tools / name))
    real_plan = gpu_check.plan

    def plan(out):
        def stand_in(real):
            ending = end if real.name == step else "passes"
            limit = seconds or (1 if ending.startswith("hangs") else 60)
            return replace(
                real, command=program(real.name, ending, out), seconds=limit, takes_the_rest=real.name != step
            )

        return [[stand_in(real) for real in together] for together in real_plan(out)]

    monkeypatch.setattr(gpu_check, "plan", plan)
    return gpu_check.main([str(out)])


if __name__ == "__main__":
    import tempfile

    import pytest

    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as tools:
        folder, *ending = sys.argv[1:]
        sys.exit(rehearse(load(), patch, Path(folder), Path(tools), *ending, seconds=300))
