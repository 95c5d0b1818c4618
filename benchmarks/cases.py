"""What is measured: operators on given shapes, each beside the dense convolution and the peers that are installed."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import partial
from math import prod

import torch
from torch.nn import functional as F

from dcn_plugin.ops import deform_conv2d, deform_ps_roi_pool, deform_roi_align, ms_deform_attn

from . import peers
from .roofline import SAMPLE

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
    operations: int = 0  # multiplications and additions of the forward, for the roofline; 0: unknown
    gathered: int = 0  # bytes of pixels that its samples read, if they are to count in the roofline
    environment: dict = field(default_factory=dict)  # variables that are set while it runs


@dataclass(frozen=True)
class Case:
    """Of one operator; its subclasses say which. A run is (case, direction)."""

    label: str
    dtype: torch.dtype = torch.float32
    channels_last: bool = False
    tf32: bool = False  # CUDA: products of float32 may round to it
    threads: int | None = None  # None: as many as the benchmark was told to use
    quick: bool = False  # part of --quick
    memory: bool = False  # its peak memory is measured on the CPU too

    directions = "forward", "forward+backward"
    host_time_counts = False  # on CUDA too
    operator = None

    @property
    def name(self):
        """Unique among the cases of an operator."""
        dtype = "TF32" * self.tf32 if self.dtype is torch.float32 else str(self.dtype).removeprefix("torch.")
        parts = [self.label, "channels_last" * self.channels_last, dtype]
        return " ".join(filter(None, [*parts, f"threads={self.threads}" if self.threads else ""]))

    def describe(self):
        """What the JSON says of it."""
        options = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("quick", "memory", "threads")}
        return dict(operator=self.operator, case=self.name) | options | dict(dtype=str(self.dtype))

    def small(self):
        """The same with little to do, for cases whose memory is measured."""
        raise NotImplementedError

    def leaf(self, tensor, is_map=False):
        """As an input of the operator; maps and weights have the case's memory format."""
        layout = torch.channels_last if is_map and self.channels_last else torch.contiguous_format
        return tensor.to(self.dtype).contiguous(memory_format=layout).requires_grad_()

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

    def small(self):
        return replace(self, shape=(1, self.shape[1], 8, 8))

    @property
    def padding(self):
        return self.dilation * (self.kernel // 2)

    @property
    def out_size(self):
        reach = self.dilation * (self.kernel - 1) - 2 * self.padding
        return [(size - reach - 1) // self.stride + 1 for size in self.shape[2:]]

    @property
    def operations(self):
        n, c, _, _ = self.shape
        columns = n * prod(self.out_size) * self.kernel**2 * c
        return columns * (SAMPLE + 2 * c // self.groups)

    def tensors(self, device):
        n, c, _, _ = self.shape
        out, taps = self.out_size, self.deform_groups * self.kernel**2
        randn = partial(torch.randn, device=device)
        weight = randn(c, c // self.groups, self.kernel, self.kernel)
        offset = randn(n, 2 * taps, *out) * self.offset_pixels
        if self.dtype.itemsize == 2 and self.offset_pixels:
            # Held exactly, and never on a pixel, where gradients jump and conventions differ.
            offset = ((offset * 8).floor() + 0.5) / 8
        mask = torch.rand(n, taps, *out, device=device) if self.modulated else None
        return dict(
            input=self.leaf(randn(self.shape), is_map=True),
            weight=self.leaf(weight / weight[0].numel() ** 0.5, is_map=True),
            offset=self.leaf(offset),
            mask=self.leaf(mask) if self.modulated else None,
        )

    def contenders(self, device, threads):
        t = self.tensors(device)
        input, weight, offset, mask = t.values()
        geometry = self.stride, self.padding, self.dilation
        leaves = tuple(tensor for tensor in t.values() if tensor is not None)
        yield Contender("dense", lambda: F.conv2d(input, weight, None, *geometry, self.groups), (input, weight))
        ours = Contender(
            "dcn_plugin",
            lambda: deform_conv2d(input, offset, weight, None, *geometry, mask),
            leaves,
            "dense",
            operations=self.operations,
        )
        yield ours
        if device == "cuda" and (self.dtype is not torch.float32 or self.tf32):
            columns = dict(name="dcn_plugin, columns", agrees_with="dcn_plugin", environment={"DCN_PLUGIN_FUSED": "0"})
            yield replace(ours, **columns)
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
            maps = torch.randn(IMAGES, self.channels, IMAGE[0] // stride, IMAGE[1] // stride, device=device)
            offset = self.leaf(torch.randn(len(rois), 2, self.bins, self.bins, device=device))
            found.append((self.leaf(maps, is_map=True), rois.to(device, self.dtype), offset, 1 / stride))
        return [level for level in found if len(level[1])]

    def operations(self, levels):
        """Of interpolating every sample of every bin."""
        samples = 0
        for _, rois, _, scale in levels:
            size = (rois[:, 3:] - rois[:, 1:3]).double() * scale / self.bins
            counts = size.ceil() if self.sampling_ratio == 0 else torch.full_like(size, self.sampling_ratio)
            samples += int(counts.prod(1).sum()) * self.bins**2
        return SAMPLE * self.channels * samples

    def contenders(self, device, threads):
        levels = self.levels(device)
        maps, offsets = (tuple(level[i] for level in levels) for i in (0, 2))
        bins, ratio = self.bins, self.sampling_ratio

        def on_levels(pool, levels=levels):
            return lambda: tuple(pool(*level) for level in levels)

        pools, moving = peers.roi_align(bins, ratio)
        straight = "dcn_plugin, straight bins"
        floor = next((name for name, _ in pools), None)
        for name, pool in pools:
            yield Contender(name, on_levels(pool), maps, floor, straight, optional=True)

        def move(x, rois, offset, scale):
            return deform_roi_align(x, rois, offset, bins, scale, ratio)

        still = on_levels(lambda x, rois, _, scale: deform_roi_align(x, rois, None, bins, scale, ratio))
        yield Contender("dcn_plugin", on_levels(move), (*maps, *offsets), floor, operations=self.operations(levels))
        yield Contender(straight, still, maps, floor)
        if self.dtype.itemsize == 2:
            wide = [(*(t.detach().float() for t in level[:3]), level[3]) for level in levels]
            leaves = tuple(level[i].requires_grad_() for i in (0, 2) for level in wide)
            yield Contender("dcn_plugin, float32", on_levels(move, wide), leaves, floor)
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
        levels = self.levels(device)
        ((plain, rois, offset, scale),) = levels
        maps = torch.randn(IMAGES, self.channels * self.bins**2, *plain.shape[2:], device=device)
        maps = self.leaf(maps, is_map=True)
        bins, samples = self.bins, self.sampling_ratio
        floor, pool = next(iter(peers.roi_align(bins, samples)[0]), (None, None))
        if floor:
            yield Contender(floor, lambda: pool(plain, rois, offset, scale), (plain,), optional=True)

        def ours():
            return deform_ps_roi_pool(maps, rois, offset, bins, bins, bins, samples, scale)

        yield Contender("dcn_plugin", ours, (maps, offset), floor, operations=self.operations(levels))


@dataclass(frozen=True)
class Attention(Case):
    """Multi-scale deformable attention as in Deformable DETR, over the levels of images: 8 heads of 32 channels, 4
    points. Queries are the maps' pixels, which sample near themselves, as in its encoder; or a few anywhere, as in its
    decoder.

    The floor is the same of PyTorch's own operators: a grid_sample for each level.
    """

    queries: int | None = None  # None: the maps' pixels
    images: int = IMAGES
    heads: int = 8
    channels: int = 32  # of a head
    points: int = 4
    offset_pixels: float = 2.0  # standard deviation, on each level
    strides: tuple = (8, 16, 32, 64)

    operator = "ms_deform_attn"

    def small(self):
        return replace(self, queries=1, strides=(64,))

    @property
    def maps(self):
        return [tuple(-(-size // stride) for size in IMAGE) for stride in self.strides]

    def locations(self):
        """(N, Q, heads, L, P, 2)"""
        sizes = torch.tensor(self.maps).flip(1)[:, None]
        if self.queries is None:
            axes = [[(torch.arange(n) + 0.5) / n for n in size] for size in self.maps]
            centres = torch.cat([torch.cartesian_prod(*pair).flip(1) for pair in axes])
        else:
            centres = torch.rand(self.queries, 2)
        centres = centres[None, :, None, None, None]
        offset = torch.randn(self.images, centres.shape[1], self.heads, len(self.maps), self.points, 2)
        pixels = centres * sizes + offset * self.offset_pixels
        # Never on a pixel's centre, where gradients jump and float32 falls on either side of it.
        return ((pixels * 8).floor() + 0.25) / 8 / sizes

    def contenders(self, device, threads):
        locations = self.locations().to(device).requires_grad_()
        samples = locations.shape[:-1]
        weights = torch.rand(samples, device=device).flatten(3).softmax(3).view(samples)
        maps = torch.tensor(self.maps, device=device)
        keys = sum(height * width for height, width in self.maps)
        value = self.leaf(torch.randn(self.images, keys, self.heads, self.channels, device=device))
        tensors = dict(value=value, maps=maps, locations=locations, weights=self.leaf(weights))
        leaves = value, locations, tensors["weights"]
        floor = "grid_sample"
        yield Contender(
            "dcn_plugin",
            lambda: ms_deform_attn(*tensors.values()),
            leaves,
            floor,
            operations=(SAMPLE + 2) * self.channels * prod(samples),
            gathered=4 * self.channels * self.dtype.itemsize * prod(samples),
        )
        if self.dtype.itemsize == 2:
            wide = [t.detach().float().requires_grad_() for t in leaves]
            yield Contender("dcn_plugin, float32", lambda: ms_deform_attn(wide[0], maps, *wide[1:]), tuple(wide), floor)
        yield Contender(
            floor, lambda: peers.attention_by_grid_sample(self.maps, **tensors), leaves, floor, "dcn_plugin"
        )
        for name, run in peers.attention(tensors, device):
            yield Contender(name, run, leaves, floor, "dcn_plugin", optional=True)


C4_VARIANTS = {
    "c4 1x1": dict(kernel=1),
    "c4 5x5": dict(kernel=5),
    "c4 stride 2": dict(stride=2),
    "c4 dilation 2": dict(dilation=2),
    "c4 deform_groups 4": dict(deform_groups=4),
    "c4 depthwise": dict(groups=256),
}


def cpu_cases(threads):
    """Shapes of ResNet-50's stages at 800 x 1216, two images, and variants of its fourth."""
    stages = {"c3": (2, 128, 100, 152), "c4": (2, 256, 50, 76), "c5": (2, 512, 25, 38)}
    for last in (False, True):
        for label, shape in stages.items():
            yield Conv(label, channels_last=last, shape=shape, quick=label == "c4" and not last, memory=True)
        yield Conv("small", channels_last=last, shape=(1, 64, 56, 56))
        for label, shape in stages.items():
            yield Conv(label, torch.bfloat16, last, shape=shape, quick=label == "c4" and last)
        for label, options in C4_VARIANTS.items():
            yield Conv(label, channels_last=last, shape=stages["c4"], **options)
        for ratio in (2, 0):
            yield RoI(f"FPN sampling_ratio {ratio}", channels_last=last, sampling_ratio=ratio, quick=ratio == 2)
        yield PSRoI("R-FCN", channels_last=last, quick=not last)
    yield Conv("tiny", shape=(1, 16, 8, 8), quick=True)
    for label, shape in stages.items():
        yield Conv(f"{label} zero offsets", shape=shape, offset_pixels=0.0)
    yield Conv("c4 v1", shape=stages["c4"], modulated=False)
    for last in (False, True):
        yield RoI("FPN sampling_ratio 2", torch.bfloat16, last)
    for dtype in (torch.float32, torch.bfloat16):
        yield Attention("encoder", dtype, images=1, memory=True)
        yield Attention("decoder", dtype, queries=300, images=1, quick=True, memory=True)
    for count in sorted({1, 2} - {threads}):
        for label, shape in stages.items():
            yield Conv(label, shape=shape, channels_last=True, threads=count)


def cuda_cases():
    """Shapes of ResNet-50's stages at 800 x 1344, 16 images, which fill a large GPU; the most telling cases first."""
    stages = {"c3": (16, 128, 100, 168), "c4": (16, 256, 50, 84), "c5": (16, 512, 25, 42)}
    for dtype, tf32 in ((torch.bfloat16, False), (torch.float16, False), (torch.float32, True), (torch.float32, False)):
        for label, shape in stages.items():
            yield Conv(label, dtype, True, tf32, shape=shape, quick=dtype is torch.bfloat16)
    for dtype in (torch.float32, torch.bfloat16):
        yield Attention("encoder", dtype, quick=True)
    for dtype in (torch.float32, torch.float16):
        yield RoI("FPN sampling_ratio 2", dtype, True, quick=dtype is torch.float32)
    yield Conv("c4 depthwise", torch.bfloat16, True, shape=stages["c4"], groups=256, quick=True)
    yield PSRoI("R-FCN", channels_last=True, quick=True)
    for dtype in (torch.bfloat16, torch.float32):
        yield Conv("c4", dtype, shape=stages["c4"])
    yield Conv("tiny", shape=(1, 16, 8, 8), quick=True)
    for label, options in C4_VARIANTS.items():
        if label != "c4 depthwise":
            yield Conv(label, torch.bfloat16, True, shape=stages["c4"], **options)
    yield Conv("c4 depthwise", channels_last=True, shape=stages["c4"], groups=256)
    yield Conv("c4 zero offsets", torch.bfloat16, True, shape=stages["c4"], offset_pixels=0.0)
    yield Conv("c4 v1", torch.bfloat16, True, shape=stages["c4"], modulated=False)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        yield RoI("FPN sampling_ratio 2", dtype)
    yield RoI("FPN sampling_ratio 0", channels_last=True, sampling_ratio=0)
    yield PSRoI("R-FCN")
    yield Attention("encoder", torch.float16)
    for dtype in (torch.float32, torch.bfloat16):
        yield Attention("decoder", dtype, queries=300)


def cases(device, threads):
    return cuda_cases() if device == "cuda" else cpu_cases(threads)
