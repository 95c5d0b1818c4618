"""Times the operators on an NVIDIA GPU beside cuDNN's dense convolution and torchvision, all in one process.

python benchmarks/gpu.py [--json FILE] [--seconds S]      S: start no new case after so long

Times are medians of single calls by device events, the contenders taking turns, with the caches flushed before each.
Ratios are to the dense convolution (or torchvision's roi_align) of the same shape, dtype and layout.
"""

import argparse
import json
import os
import statistics
import time
from dataclasses import asdict, dataclass

import torch
from torch.nn import functional as F

from dcn_plugin.ops import deform_conv2d, deform_roi_align

try:
    import torchvision
except ImportError:
    torchvision = None

STAGES = {"c3": (128, 100, 168), "c4": (256, 50, 84), "c5": (512, 25, 42)}  # ResNet-50 at 800 x 1344
BATCH = 16
ROUNDS = 15


@dataclass
class Row:
    case: str
    contender: str
    milliseconds: float
    spread: float  # half the distance of the quartiles
    ratio: float  # to the case's first contender
    peak_mib: float  # memory above what was there before the call


def autograd(run, leaves):
    grad = torch.randn_like(run())
    return lambda: torch.autograd.grad(run(), leaves, grad)


def through_columns(call):
    """The same without the fused kernels."""

    def run():
        os.environ["DCN_PLUGIN_FUSED"] = "0"
        try:
            return call()
        finally:
            del os.environ["DCN_PLUGIN_FUSED"]

    return run


def peak_mib(call):
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def measure(case, contenders):
    """One row for each contender that runs; the first is what the others are compared with."""
    flush = torch.empty(512 << 20, dtype=torch.uint8, device="cuda")
    peaks, times = {}, {}
    for name, call in contenders.items():
        try:
            for _ in range(3):
                call()
            peaks[name] = peak_mib(call)
            times[name] = []
        except (RuntimeError, NotImplementedError) as error:
            print(f"  {case}: {name} does not run: {str(error).splitlines()[0][:100]}")
    for _ in range(ROUNDS):
        for name in times:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            torch.cuda._sleep(1_000_000)  # time for the host to queue the call
            start.record()
            contenders[name]()
            end.record()
            torch.cuda.synchronize()
            times[name].append(start.elapsed_time(end))
    medians = {name: statistics.median(values) for name, values in times.items()}
    rows = []
    for name, values in times.items():
        low, _, high = statistics.quantiles(values, n=4)
        ratio = medians[name] / medians[next(iter(medians))]
        rows.append(Row(case, name, medians[name], (high - low) / 2, ratio, peaks[name]))
    return rows


def conv_contenders(channels, height, width, dtype, memory_format, groups, backward):
    def random(*size, scale=1.0):
        t = torch.randn(size, device="cuda") * scale
        return t.to(dtype, memory_format=memory_format).requires_grad_()

    input = random(BATCH, channels, height, width)
    weight = random(channels, channels // groups, 3, 3, scale=(9 * channels // groups) ** -0.5)
    offset = random(BATCH, 18, height, width, scale=2)
    mask = torch.rand(BATCH, 9, height, width, device="cuda").to(dtype, memory_format=memory_format).requires_grad_()
    calls = {
        "dense (cuDNN)": (lambda: F.conv2d(input, weight, None, 1, 1, 1, groups), [input, weight]),
        "deform_conv2d v2": (
            lambda: deform_conv2d(input, offset, weight, None, 1, 1, 1, mask),
            [input, offset, weight, mask],
        ),
    }
    if torchvision is not None:
        # Where it lacks the dtype, its autocast runs float32.
        cast = (lambda t: t.float()) if dtype is torch.bfloat16 else (lambda t: t)
        calls["torchvision"] = (
            lambda: torchvision.ops.deform_conv2d(
                cast(input), cast(offset), cast(weight), None, 1, 1, 1, cast(mask)
            ).to(dtype),
            [input, offset, weight, mask],
        )
    if backward:
        made = {name: autograd(run, leaves) for name, (run, leaves) in calls.items()}
    else:
        made = {name: torch.no_grad()(run) for name, (run, _) in calls.items()}
    if dtype is not torch.float32:
        made["deform_conv2d, columns"] = through_columns(made["deform_conv2d v2"])
    return made


def roi_contenders(dtype, memory_format, backward):
    input = torch.randn(2, 256, 200, 336, device="cuda").to(dtype, memory_format=memory_format).requires_grad_()
    centre, size = torch.rand(1000, 2) * torch.tensor([1344.0, 800.0]), torch.rand(1000, 2) * 200 + 20
    image = torch.arange(1000.0)[:, None] % 2
    rois = torch.cat([image, centre - size / 2, centre + size / 2], 1).to("cuda", dtype)
    offset = torch.randn(1000, 2, 7, 7, device="cuda").to(dtype).requires_grad_()
    calls = {}
    if torchvision is not None:
        calls["torchvision roi_align"] = (
            lambda: torchvision.ops.roi_align(input, rois, 7, 0.25, 2, aligned=True),
            [input],
        )
    calls["deform_roi_align plain"] = (lambda: deform_roi_align(input, rois, None, 7, 0.25, 2), [input])
    calls["deform_roi_align v1"] = (lambda: deform_roi_align(input, rois, offset, 7, 0.25, 2), [input, offset])
    if not backward:
        return {name: torch.no_grad()(run) for name, (run, _) in calls.items()}
    return {name: autograd(run, leaves) for name, (run, leaves) in calls.items()}


def cases():
    """(name, make its contenders, allow TF32), the most telling first."""
    layouts = {"nhwc": torch.channels_last, "nchw": torch.contiguous_format}

    def conv(stage, dtype, layout="nhwc", tf32=True, depthwise=False):
        channels, height, width = STAGES[stage]
        groups = channels if depthwise else 1
        kind = str(dtype).removeprefix("torch.") + (
            "" if dtype is not torch.float32 else " tf32" if tf32 else " strict"
        )
        for backward in (False, True):
            name = f"{stage}{' depthwise' if depthwise else ''} {kind} {layout} {'fwd+bwd' if backward else 'fwd'}"
            arguments = (channels, height, width, dtype, layouts[layout], groups, backward)
            yield name, lambda arguments=arguments: conv_contenders(*arguments), tf32

    for stage in STAGES:
        yield from conv(stage, torch.bfloat16)
    for stage in STAGES:
        yield from conv(stage, torch.float16)
        yield from conv(stage, torch.float32, tf32=True)
        yield from conv(stage, torch.float32, tf32=False)
    for dtype in (torch.bfloat16, torch.float32):
        yield from conv("c4", dtype, depthwise=True)
    for layout in layouts:
        for dtype in (torch.float32, torch.float16):
            for backward in (False, True):
                name = f"roi {str(dtype).removeprefix('torch.')} {layout} {'fwd+bwd' if backward else 'fwd'}"
                arguments = (dtype, layouts[layout], backward)
                yield name, lambda arguments=arguments: roi_contenders(*arguments), True
    for dtype in (torch.bfloat16, torch.float32):
        yield from conv("c4", dtype, "nchw")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json")
    parser.add_argument("--seconds", type=float, default=180)
    options = parser.parse_args()
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(0)
    started, rows, skipped = time.monotonic(), [], []
    for name, make, tf32 in cases():
        if time.monotonic() - started > options.seconds:
            skipped.append(name)
            continue
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        rows += measure(name, make())
        torch.cuda.empty_cache()
    about = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "torchvision": torchvision and torchvision.__version__,
        "batch": BATCH,
        "rounds": ROUNDS,
        "not_measured": skipped,
    }
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"about": about, "rows": [asdict(row) for row in rows]}, file, indent=1)
    print(f"{about['gpu']}, torch {about['torch']}, cuDNN {about['cudnn']}, batch {BATCH}")
    print(f"{'case':<40}{'contender':<26}{'ms':>9}{'+-':>7}{'ratio':>7}{'peak MiB':>10}")
    for row in rows:
        print(
            f"{row.case:<40}{row.contender:<26}{row.milliseconds:>9.3f}{row.spread:>7.3f}{row.ratio:>7.2f}"
            f"{row.peak_mib:>10.0f}"
        )
    if skipped:
        print(f"not measured, out of time: {', '.join(skipped)}")


if __name__ == "__main__":
    main()
