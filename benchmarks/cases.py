"""What is measured: operators on given shapes, each beside the dense convolution and the peers that are installed."""

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch.nn import functional as F

from dcn_plugin.ops import deform_conv2d, deform_ps_roi_pool, deform_roi_align

from . import peers

IMAGE = 800, 1216  # a COCO image as MMDetection resizes it
IMAGES = 2


@dataclass(frozen=True)
class Contender:
    """One implementation, on the tensors of a case."""

    name: str
    run: Callable  # without arguments; returns a tensor or a tuple of them
    leaves: tuple = ()  # what the backward differentiates by; none: it has no backward
    floor: str | None = None  # the contender it is compared with
    agrees_with: str | None = None  # the contender whose result it must equal
    optional: bool = False  # a peer: where it does not run or agree, it is left out


@dataclass(frozen=True)
class Case:
    """Of one operator; its subclasses say which. A run is (case, direction)."""

    label: str
    dtype: torch.dtype = torch.float32
    channels_last: bool = False
    threads: int | None = None  # None: as many as the benchmark was told to use
    quick: bool = False  # part of --quick
    memory: bool = False  # its peak memory is measured on the CPU too

    directions = "forward", "forward+backward"
    host_time_counts = False  # on CUDA too
    operator = None

    @property
    def name(self):
        """Unique among the cases of an operator."""
        dtype = "" if self.dtype is torch.float32 else str(self.dtype).removeprefix("torch.")
        parts = [self.label, "channels_last" * self.channels_last, dtype]
        return " ".join(filter(None, [*parts, f"threads={self.threads}" if self.threads else ""]))

    def describe(self):
        """What the JSON says of it."""
        options = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("quick", "memory", "threads")}
        return dict(operator=self.operator, case=self.name) | options | dict(dtype=str(self.dtype))

    def leaf(self, tensor, device, is_map=False):
        """As an input of the operator; maps and weights have the case's memory format."""
        layout = torch.channels_last if is_map and self.channels_last else torch.contiguous_format
        return tensor.to(device, self.dtype).contiguous(memory_format=layout).requires_grad_()

    def contenders(self, device, threads):
        """All that are installed; those that others are compared with come first."""
        raise NotImplementedError


@dataclass(frozen=True)
class Conv(Case):
    """DCNv2 (v1 with ``modulated=False``), as many output channels as input channels."""

    shape: tuple = ()  # of the input: (N, C, H, W)
    kernel: int = 3
    stride: int = 1
    dilation: int = 1
    groups: int = 1
    deform_groups: int = 1
    offset_pixels: float = 2.0  # standard deviation of the offsets; 0 samples on the pixels, as an untrained layer
    modulated: bool = True

    operator = "deform_conv2d"

    @property
    def padding(self):
        return self.dilation * (self.kernel // 2)

    def tensors(self, device):
        n, c, h, w = self.shape
        reach = self.dilation * (self.kernel - 1) - 2 * self.padding
        out = [(size - reach - 1) // self.stride + 1 for size in (h, w)]
        taps = self.deform_groups * self.kernel**2
        weight = torch.randn(c, c // self.groups, self.kernel, self.kernel)
        return dict(
            input=self.leaf(torch.randn(self.shape), device, is_map=True),
            weight=self.leaf(weight / weight[0].numel() ** 0.5, device, is_map=True),
            offset=self.leaf(torch.randn(n, 2 * taps, *out) * self.offset_pixels, device),
            mask=self.leaf(torch.rand(n, taps, *out), device) if self.modulated else None,
        )

    def contenders(self, device, threads):
        t = self.tensors(device)
        input, weight, offset, mask = t.values()
        geometry = self.stride, self.padding, self.dilation
        leaves = tuple(tensor for tensor in t.values() if tensor is not None)
        yield Contender("dense", lambda: F.conv2d(input, weight, None, *geometry, self.groups), (input, weight))
        yield Contender(
            "dcn_plugin", lambda: deform_conv2d(input, offset, weight, None, *geometry, mask), leaves, "dense"
        )
        if not self.threads:  # those compare numbers of threads, not implementations
            for name, run in peers.conv(self, t):
                yield Contender(name, run, leaves, "dense", "dcn_plugin", optional=True)
            for name, dense, run in peers.inference(self, t, device, threads):
                yield Contender(f"{name} dense", dense, agrees_with="dense", optional=True)
                yield Contender(name, run, (), f"{name} dense", "dcn_plugin", optional=True)


@dataclass(frozen=True)
class RoI(Case):
    """RoI align over a feature pyramid: boxes log-uniform from 16 to 512 pixels, each pooled from its size's level.

    The floor is a peer's RoI align, straight: bins that do not move.
    """

    rois: int = 512
    channels: int = 256
    bins: int = 7
    sampling_ratio: int = 2

    operator = "deform_roi_align"
    strides = 4, 8, 16, 32

    def boxes(self):
        """(K, 5)"""
        size = torch.exp2(torch.rand(self.rois, 2) * 5 + 4)
        extent = torch.tensor(IMAGE[::-1])
        centre = torch.rand(self.rois, 2) * extent
        corners = torch.cat([centre - size / 2, centre + size / 2], 1)
        corners = corners.clamp(min=torch.zeros(4), max=extent.repeat(2))
        return torch.cat([torch.arange(self.rois)[:, None] % IMAGES, corners], 1)

    def levels(self, device):
        """[(map, its RoIs, their offsets, spatial_scale), ...]"""
        boxes = self.boxes()
        area = (boxes[:, 3:] - boxes[:, 1:3]).prod(1)
        level_of = (area.sqrt() / 56).log2().floor().clamp(0, len(self.strides) - 1)  # as MMDetection assigns them
        found = []
        for level, stride in enumerate(self.strides):
            rois = boxes[level_of == level]
            maps = torch.randn(IMAGES, self.channels, IMAGE[0] // stride, IMAGE[1] // stride)
            offset = self.leaf(torch.randn(len(rois), 2, self.bins, self.bins), device)
            found.append((self.leaf(maps, device, is_map=True), rois.to(device, self.dtype), offset, 1 / stride))
        return [level for level in found if len(level[1])]

    def contenders(self, device, threads):
        levels = self.levels(device)
        maps, offsets = (tuple(level[i] for level in levels) for i in (0, 2))
        bins, ratio = self.bins, self.sampling_ratio

        def on_levels(pool):
            return lambda: tuple(pool(*level) for level in levels)

        pools, moving = peers.roi_align(bins, ratio)
        straight = "dcn_plugin, straight bins"
        floor = next((name for name, _ in pools), None)
        for name, pool in pools:
            yield Contender(name, on_levels(pool), maps, floor, straight, optional=True)
        ours = on_levels(lambda x, rois, offset, scale: deform_roi_align(x, rois, offset, bins, scale, ratio))
        still = on_levels(lambda x, rois, _, scale: deform_roi_align(x, rois, None, bins, scale, ratio))
        yield Contender("dcn_plugin", ours, (*maps, *offsets), floor)
        yield Contender(straight, still, maps, floor)
        for name, pool in moving:
            yield Contender(name, on_levels(pool), (*maps, *offsets), floor, "dcn_plugin", optional=True)


@dataclass(frozen=True)
class PSRoI(RoI):
    """Position-sensitive RoI pooling as in Deformable R-FCN: 7x7 score maps a class, 4x4 samples a bin, at stride 16.

    No peer has it with offsets: the floor is a RoI align of as many outputs, bins and samples.
    """

    channels: int = 81  # of the output: COCO's classes and the background
    sampling_ratio: int = 4

    operator = "deform_ps_roi_pool"
    strides = (16,)

    def contenders(self, device, threads):
        ((plain, rois, offset, scale),) = self.levels(device)
        maps = torch.randn(IMAGES, self.channels * self.bins**2, *plain.shape[2:])
        maps = self.leaf(maps, device, is_map=True)
        bins, samples = self.bins, self.sampling_ratio
        floor, pool = next(iter(peers.roi_align(bins, samples)[0]), (None, None))
        if floor:
            yield Contender(floor, lambda: pool(plain, rois, offset, scale), (plain,), optional=True)

        def ours():
            return deform_ps_roi_pool(maps, rois, offset, bins, bins, bins, samples, scale)

        yield Contender("dcn_plugin", ours, (maps, offset), floor)


def cases(device, threads):
    """Shapes of ResNet-50's stages at 800 x 1216, and variants of its fourth; on CUDA with a batch that fills one."""
    batch, low = (2, [torch.bfloat16]) if device == "cpu" else (16, [torch.bfloat16, torch.float16])
    stages = {"c3": (batch, 128, 100, 152), "c4": (batch, 256, 50, 76), "c5": (batch, 512, 25, 38)}
    c4 = stages["c4"]
    variants = {
        "1x1": dict(kernel=1),
        "5x5": dict(kernel=5),
        "stride 2": dict(stride=2),
        "dilation 2": dict(dilation=2),
        "deform_groups 4": dict(deform_groups=4),
        "depthwise": dict(groups=256),
    }
    for last in (False, True):
        for label, shape in stages.items():
            yield Conv(label, shape=shape, channels_last=last, quick=label == "c4" and not last, memory=True)
        yield Conv("small", shape=(1, 64, 56, 56), channels_last=last)
        for dtype in low:
            for label, shape in stages.items():
                yield Conv(label, dtype, last, shape=shape, quick=label == "c4" and last)
        for label, options in variants.items():
            yield Conv(f"c4 {label}", shape=c4, channels_last=last, **options)
        for ratio in (2, 0):
            yield RoI(f"FPN sampling_ratio {ratio}", channels_last=last, sampling_ratio=ratio, quick=ratio == 2)
        yield PSRoI("R-FCN", channels_last=last)
    yield Conv("tiny", shape=(1, 16, 8, 8), quick=True)
    for label, shape in stages.items():
        yield Conv(f"{label} zero offsets", shape=shape, offset_pixels=0.0)
    yield Conv("c4 v1", shape=c4, modulated=False)
    for dtype in low:
        yield RoI("FPN sampling_ratio 2", dtype)
    if device == "cpu":
        for count in sorted({1, 2} - {threads}):
            for label, shape in stages.items():
                yield Conv(label, shape=shape, channels_last=True, threads=count)
