"""Runs every operator forward and backward with the library that is given, which counts as the installed one.

Each is announced on stderr, where the thread sanitizer writes too.
"""

import sys
from dataclasses import replace

import torch

if __name__ == "__main__":
    load_library = torch.ops.load_library
    torch.ops.load_library = lambda path: load_library(sys.argv[1] if path.endswith("_cpu.so") else path)

from dcn_plugin.ops import deform_conv2d, deform_ps_roi_pool, deform_roi_align, ms_deform_attn

from ..ops.cases import BASE

LAST = torch.channels_last


def conv(dtype, memory_format, **options):
    case = replace(BASE, size=(12, 11), **options)
    tensors = {name: t.requires_grad_() for name, t in case.make(dtype, memory_format=memory_format).items()}
    return deform_conv2d(**tensors, **case.options)


def rois(count):
    start = torch.rand(count, 2) * 10
    return torch.cat([torch.arange(count)[:, None] % 2, start, start + 2 + 10 * torch.rand(count, 2)], 1)


def roi_align(dtype, memory_format):
    maps = torch.randn(2, 70, 12, 13, dtype=dtype).contiguous(memory_format=memory_format).requires_grad_()
    offset = torch.randn(9, 2, 3, 3, dtype=dtype, requires_grad=True)
    return deform_roi_align(maps, rois(9).to(dtype), offset, 3, 0.5, 2)


def ps_roi_pool(dtype, memory_format):
    maps = torch.randn(2, 36, 12, 13, dtype=dtype).contiguous(memory_format=memory_format).requires_grad_()
    offset = torch.randn(9, 2, 3, 3, dtype=dtype, requires_grad=True)
    return deform_ps_roi_pool(maps, rois(9).to(dtype), offset, 3, 3, 3, 2, 0.5)


def attention(dtype, _):
    value = torch.randn(2, 30, 3, 8, dtype=dtype, requires_grad=True)
    sizes = torch.tensor([[4, 6], [3, 2]])
    locations = torch.rand(2, 9, 3, 2, 4, 2, requires_grad=True)
    weights = torch.rand(2, 9, 3, 2, 4, requires_grad=True)
    return ms_deform_attn(value, sizes, locations, weights)


OPERATORS = {
    "deform_conv2d": lambda *form: conv(*form, channels=40, out_channels=36),
    "deform_conv2d, groups": lambda *form: conv(*form, channels=12, out_channels=12, groups=6, deform_groups=3),
    "deform_conv2d, depthwise": lambda *form: conv(*form, channels=40, out_channels=40, groups=40),
    "deform_roi_align": roi_align,
    "deform_ps_roi_pool": ps_roi_pool,
    "ms_deform_attn": attention,
}

if __name__ == "__main__":
    torch.set_num_threads(1)  # PyTorch's own loops
    for name, run in OPERATORS.items():
        for dtype, memory_format in ((torch.float32, torch.contiguous_format), (torch.bfloat16, LAST)):
            for direction in ("forward", "backward"):
                print(f"\noperator: {name} {dtype} {direction}", file=sys.stderr, flush=True)
                if direction == "forward":
                    output = run(dtype, memory_format)
                else:
                    output.sum().backward()
