"""Times deform_conv2d against the dense convolution of the same shape and against the peers that are installed.

All run interleaved in one process, so that what else the machine does falls on each alike; the table has the median of
their ratios to the dense convolution (oneDNN's on the CPU, cuDNN's on CUDA), quartiles in the JSON.
"""

import argparse
import json
import platform
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional as F

from dcn_plugin.ops import deform_conv2d


@dataclass(frozen=True)
class Case:
    """DCNv2 with as many output channels as input channels; ``shape`` is (N, C, H, W)."""

    name: str
    shape: tuple
    kernel: int = 3
    stride: int = 1
    dilation: int = 1
    groups: int = 1
    deform_groups: int = 1
    dtype: torch.dtype = torch.float32
    channels_last: bool = False

    def tensors(self, device):
        n, c, h, w = self.shape
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        padding = self.dilation * (self.kernel // 2)
        span = self.dilation * (self.kernel - 1) + 1
        out = [(size + 2 * padding - span) // self.stride + 1 for size in (h, w)]
        taps = self.deform_groups * self.kernel**2
        tensors = dict(
            input=torch.randn(self.shape).contiguous(memory_format=layout),
            offset=torch.randn(n, 2 * taps, *out) * 2,
            mask=torch.rand(n, taps, *out),
            weight=torch.randn(c, c // self.groups, self.kernel, self.kernel).contiguous(memory_format=layout),
        )
        return {name: t.to(device, self.dtype) for name, t in tensors.items()}, padding


C3, C4, C5 = (2, 128, 100, 152), (2, 256, 50, 76), (2, 512, 25, 38)  # ResNet-50's stages at 800 x 1216
CASES = [
    *(Case(f"{name}{' channels_last' if last else ''}", shape, channels_last=last)
      for last in (False, True) for name, shape in (("c3", C3), ("c4", C4), ("c5", C5), ("small", (1, 64, 56, 56)))),
    *(Case(f"{name} bfloat16", shape, dtype=torch.bfloat16, channels_last=True)
      for name, shape in (("c3", C3), ("c4", C4), ("c5", C5))),
    Case("c4 1x1", C4, kernel=1, channels_last=True),
    Case("c4 5x5", C4, kernel=5, channels_last=True),
    Case("c4 stride 2", C4, stride=2, channels_last=True),
    Case("c4 dilation 2", C4, dilation=2, channels_last=True),
    Case("c4 deform_groups 4", C4, deform_groups=4, channels_last=True),
    Case("c4 depthwise", C4, groups=256, channels_last=True),
    Case("tiny", (1, 16, 8, 8)),
]  # fmt: skip


def implementations(case, device):
    """Functions of the tensors, by name; those that are not installed, or do not take the case, are absent."""
    tensors, padding = case.tensors(device)
    geometry = case.stride, padding, case.dilation
    found = dict(
        dense=lambda input, weight, **_: F.conv2d(input, weight, None, *geometry, case.groups),
        dcn_plugin=lambda input, offset, mask, weight: deform_conv2d(input, offset, weight, None, *geometry, mask),
    )
    try:
        from mmcv.ops import modulated_deform_conv2d

        if device == "cpu" and case.dtype == torch.float32:
            groups = case.groups, case.deform_groups
            found["mmcv"] = lambda input, offset, mask, weight: modulated_deform_conv2d(
                input, offset, mask, weight, None, *geometry, *groups
            )
    except Exception:  # an optional peer: whatever keeps it from importing, it is absent
        pass
    try:
        from torchvision.ops import deform_conv2d as torchvision_deform_conv2d

        found["torchvision"] = lambda input, offset, mask, weight: torchvision_deform_conv2d(
            input, offset, weight, None, *geometry, mask
        )
    except Exception:
        pass
    return tensors, found


def seconds(function, device):
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(case, device, backward, budget):
    """Seconds of each implementation, as many interleaved rounds as fit in the budget (3 at least)."""
    tensors, functions = implementations(case, device)
    if backward:
        tensors = {name: t.requires_grad_() for name, t in tensors.items()}
        gradient = torch.randn_like(functions["dense"](**tensors))
        calls = {name: lambda f=f: f(**tensors).backward(gradient) for name, f in functions.items()}
    else:
        calls = {name: lambda f=f: f(**tensors) for name, f in functions.items()}
    times = {name: [] for name in calls}
    with torch.set_grad_enabled(backward):
        warm_up = sum(seconds(call, device) for call in calls.values())
        for _ in range(max(3, min(200, int(budget / warm_up)))):
            for name, call in calls.items():
                times[name].append(seconds(call, device))
    return times


def ratios(times):
    """Quartiles of each implementation's ratio to the dense convolution beside it."""
    dense = times["dense"]
    return {
        name: statistics.quantiles([t / d for t, d in zip(values, dense, strict=True)], n=4)
        for name, values in times.items()
        if name != "dense"
    }


def table(results):
    names = sorted({name for r in results for way in ("forward", "both") for name in r[way]["ratios"]})
    names.sort(key=lambda name: name != "dcn_plugin")
    head = [f"{name}, {way}" for way in ("forward", "with backward") for name in names]
    lines = ["| case | dense, ms | " + " | ".join(head) + " |", "|---" * (len(head) + 2) + "|"]
    for r in results:
        cells = [
            f"{r[way]['ratios'][name][1]:.2f}" if name in r[way]["ratios"] else ""
            for way in ("forward", "both")
            for name in names
        ]
        lines.append(f"| {r['case']} | {r['forward']['dense_ms']:.2f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (%(default)s)")
    parser.add_argument("--only", default="", help="run the cases whose name contains this")
    parser.add_argument("--budget", type=float, default=3.0, help="seconds per case and direction (%(default)s)")
    parser.add_argument("--out", type=Path, help="write the JSON here, and a table of the same name in Markdown")
    return parser.parse_args()


def main():
    args = parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    results = []
    for case in (c for c in CASES if args.only in c.name):
        result = dict(case=case.name)
        for way, backward in (("forward", False), ("both", True)):
            times = measure(case, args.device, backward, args.budget)
            result[way] = dict(dense_ms=1e3 * statistics.median(times["dense"]), ratios=ratios(times))
        results.append(result)
        print(
            f"{case.name}: " + ", ".join(f"{n} {q[1]:.2f}" for n, q in result["forward"]["ratios"].items()), flush=True
        )
    print("\n" + table(results))
    if args.out:
        machine = dict(
            processor=platform.processor() or platform.machine(), threads=args.threads, torch=torch.__version__
        )
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(dict(machine=machine, device=args.device, results=results), indent=1) + "\n")
        args.out.with_suffix(".md").write_text(table(results) + "\n")


if __name__ == "__main__":
    main()
