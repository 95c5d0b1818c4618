"""Watches a model run: what every deformable operator was given, and where its maps lie in the image."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from dcn_plugin.sampling import Samples, convolution_samples, ps_roi_pool_parts, roi_align_bins
from dcn_plugin.targets import listed

from .attention import Attention
from .grid import Grid

aten = torch.ops.aten


@dataclass(eq=False)
class Convolution:
    """A call of ``deform_conv2d`` for one image; tensors are float32 on the CPU."""

    name: str  # of the innermost module that ran
    index: int  # among the calls of this operator in one run of the model
    size: tuple[int, int]  # (H, W) of the input map
    offset: Tensor  # (2 * deform_groups * kh * kw, Ho, Wo)
    mask: Tensor | None  # (deform_groups * kh * kw, Ho, Wo)
    taps: Tensor  # (kh, kw): the norm of what the kernel multiplies each tap by
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    grid: Grid | None  # of the input map in the image; None where it was not computed from the image's pixels
    previous: "Convolution | None"  # the deformable convolution before this one on the way from the image

    @property
    def kernel_size(self) -> tuple[int, int]:
        return _size(self.taps)

    @property
    def output_size(self) -> tuple[int, int]:
        return _size(self.offset)

    @property
    def input_grid(self) -> Grid:
        """The input map's grid; a ValueError where it has none."""
        if self.grid is None:
            raise ValueError(f"{self.name} was not computed from the image's pixels")
        return self.grid

    @property
    def output_grid(self) -> Grid:
        return self.input_grid.window(self.kernel_size, self.stride, self.padding, self.dilation)

    def samples(self) -> Samples:
        """Its samples, (1, deform_groups, kh, kw, Ho, Wo) each."""
        geometry = self.kernel_size, self.stride, self.padding, self.dilation
        return convolution_samples(self.size, self.offset[None], *geometry)

    def chain(self, layers: int) -> "list[Convolution]":
        """This and the deformable convolutions before it on the way from the image, at most so many, the last first."""
        chain = [self]
        while len(chain) < layers and chain[-1].previous:
            chain.append(chain[-1].previous)
        return chain

    def position_at(self, y: float, x: float) -> tuple[int, int]:
        """The output position (i, j) whose centre is nearest to a point of the image."""
        place = self.output_grid.to_map(y, x)
        return tuple(min(max(round(p), 0), n - 1) for p, n in zip(place, self.output_size, strict=True))


@dataclass(eq=False)
class Pooling:
    """A call of ``deform_roi_align`` or ``deform_ps_roi_pool`` with offsets, for one image."""

    name: str
    operator: str
    size: tuple[int, int]
    rois: Tensor  # (K, 5), in pixels of the image
    offset: Tensor  # (K, 2 * classes, h, w)
    mask: Tensor | None  # (K, 1, h, w)
    scale: float  # spatial_scale
    gamma: float  # or trans_std

    def samples(self) -> Samples:
        """Its bins, (K, classes, h, w) each."""
        bins = roi_align_bins if self.operator == "deform_roi_align" else ps_roi_pool_parts
        return bins(self.size, self.rois, self.offset, self.scale, self.gamma)


@dataclass
class Recording:
    """What one image made a model do."""

    size: tuple[int, int]  # (H, W) of the image
    output: Any = None  # of the model
    convolutions: list[Convolution] = field(default_factory=list)  # in the order of execution
    poolings: list[Pooling] = field(default_factory=list)
    attentions: list[Attention] = field(default_factory=list)

    @property
    def empty(self) -> bool:
        """Whether no deformable operator ran."""
        return not (self.convolutions or self.poolings or self.attentions)

    def chosen(self, patterns: Sequence[str] = ()) -> list[Convolution]:
        """The convolutions with a place in the image whose names match one of the patterns (globs).

        Without patterns, the one of each stride that ran last, finest map first.

        Raises:
            ValueError: a pattern that matches none, nor an attention.
        """
        if not patterns:
            last = {tuple(round(s, 3) for s in conv.output_grid.scale): conv for conv in self._placed()}
            return [last[scale] for scale in sorted(last)]
        return self._matching(self._placed(), patterns)

    def chosen_attentions(self, patterns: Sequence[str] = ()) -> list[Attention]:
        """The attentions whose names match one of the patterns (globs).

        Without patterns, of those whose queries are pixels and of the others, the one that ran last.

        Raises:
            ValueError: a pattern that matches none, nor a convolution with a place in the image.
        """
        if not patterns:
            return list({attention.of_pixels: attention for attention in self.attentions}.values())
        return self._matching(self.attentions, patterns)

    def _placed(self) -> list[Convolution]:
        return [conv for conv in self.convolutions if conv.grid]

    def _matching(self, calls: list, patterns: Sequence[str]) -> list:
        every: list[Convolution | Attention] = [*self._placed(), *self.attentions]
        names = dict.fromkeys(call.name for call in every)
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ValueError(f"{pattern!r} matches none of the deformable layers that ran: {listed(names)}")
        return [call for call in calls if any(fnmatchcase(call.name, pattern) for pattern in patterns)]


def record(model: nn.Module, image: Tensor, forward: Callable[[Tensor], Any] | None = None) -> Recording:
    """Runs a model on one image and notes every call of the deformable operators.

    Calls are seen at the operators themselves, so those of functions (mmcv's, run on ours) are among them. Other
    operators than this package's, such as torchvision's, are not.

    The maps' places in the image are exact through convolutions, poolings, padding, cropping and resampling. Where a
    map has changed size in some other way since it was last known, the ratio of the sizes counts. Where paths meet (a
    sum, a concatenation), that through the finer maps counts, and of equally fine ones that with the later deformable
    convolution.

    Args:
        model: in the mode to look at, usually ``eval()``.
        image: (1, C, H, W), as the model gets it.
        forward: called with the image; by default the model.
    """
    if not isinstance(image, Tensor) or image.dim() != 4 or len(image) != 1:
        got = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
        raise ValueError(f"records one image (1, C, H, W), got {got}")
    recording = Recording(_size(image))
    with ExitStack() as stack:
        stack.enter_context(uncompiled())
        stack.enter_context(torch.no_grad())
        running = stack.enter_context(_names_of_running(model))
        stack.enter_context(_Recorder(image, running, recording))
        recording.output = (forward or model)(image)
    return recording


@contextmanager
def uncompiled() -> Iterator[None]:
    """Compiled models run as they were written: nothing can be watched inside a compiled graph."""
    with ExitStack() as stack:
        if "torch._dynamo" in sys.modules:  # else nothing is compiled
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


@contextmanager
def _names_of_running(model: nn.Module) -> Iterator[list[str]]:
    """The names of the modules that run, the innermost last."""
    running: list[str] = []
    handles = []

    def leave(*_) -> None:
        running.pop()

    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda *_, name=name: running.append(name)))
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield running
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True, eq=False)
class _Path:
    """How a tensor was computed from the image."""

    size: tuple[int, int]  # (H, W) of the map that ``grid`` is of
    grid: Grid
    coarsest: float = 1.0  # pixels of the image per pixel of the coarsest map on the way
    last: Convolution | None = None

    def at(self, size: tuple[int, int]) -> Grid:
        return self.grid if size == self.size else self.grid.resized(self.size, size)

    def to(self, size: tuple[int, int], grid: Grid, last: Convolution | None = None) -> "_Path":
        return _Path(size, grid, max(self.coarsest, *grid.scale), last or self.last)

    def rank(self) -> tuple[float, int]:
        return -self.coarsest, self.last.index if self.last else -1


def _size(tensor: Tensor) -> tuple[int, int]:
    height, width = tensor.shape[-2:]
    return height, width


def _pair(numbers) -> tuple:
    return tuple(numbers) * 2 if len(numbers) == 1 else tuple(numbers)


class _Recorder(TorchDispatchMode):
    """Notes the deformable operators' calls, and hands the path of an operation's inputs on to its outputs."""

    def __init__(self, image: Tensor, running: list[str], recording: Recording):
        super().__init__()
        self.running, self.recording = running, recording
        self.paths = WeakTensorKeyDictionary()
        self.paths[image] = _Path(recording.size, Grid())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if func.namespace == "dcn_plugin":
            noted = getattr(self, "_" + func._opname, None)
            if noted:
                noted(output, *args)
        elif func.namespace == "aten":
            self._hand_on(func, args, output)
        return output

    def _name(self) -> str:
        return self.running[-1] if self.running else ""

    def _deform_conv2d(self, output, input, offset, weight, bias, mask, stride, padding, dilation, *_) -> None:
        path = self.paths.get(input)
        taps = weight.detach().float().norm(dim=(0, 1)).cpu()
        geometry = tuple(stride), tuple(padding), tuple(dilation)
        grid = path and path.at(_size(input))
        offset, mask = (None if one is None else one.detach()[0].float().cpu() for one in (offset, mask))
        convolutions, last = self.recording.convolutions, path and path.last
        call = Convolution(
            self._name(), len(convolutions), _size(input), offset, mask, taps, *geometry, grid=grid, previous=last
        )
        convolutions.append(call)
        if path:
            self.paths[output] = path.to(_size(output), call.output_grid, call)

    def _pool(self, operator, input, rois, offset, mask, scale, gamma) -> None:
        if offset is not None:
            rois, offset, mask = (None if one is None else one.detach().float().cpu() for one in (rois, offset, mask))
            self.recording.poolings.append(
                Pooling(self._name(), operator, _size(input), rois, offset, mask, scale, gamma)
            )

    def _deform_roi_align(self, output, input, rois, offset, mask, output_size, scale, ratio, gamma) -> None:
        self._pool("deform_roi_align", input, rois, offset, mask, scale, gamma)

    def _deform_ps_roi_pool(
        self, output, input, rois, offset, output_size, group_size, part_size, samples, scale, trans_std
    ) -> None:
        self._pool("deform_ps_roi_pool", input, rois, offset, None, scale, trans_std)

    def _ms_deform_attn(self, output, value, spatial_shapes, sampling_locations, attention_weights) -> None:
        locations, weights = (one.detach()[0].float().cpu() for one in (sampling_locations, attention_weights))
        self.recording.attentions.append(
            Attention(self._name(), self.recording.size, spatial_shapes.cpu(), locations, weights)
        )

    def _hand_on(self, func, args, output) -> None:
        path = max(filter(None, map(self.paths.get, _tensors(args))), key=_Path.rank, default=None)
        if path is None:
            return
        for one in _tensors((output,)):
            step = _STEPS.get(func.overloadpacket)
            self.paths[one] = step(path, args, one) if step and one.dim() == 4 else path


def _tensors(values) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _after_convolution(path: _Path, args, output: Tensor) -> _Path:
    input, weight, _, stride, padding, dilation, transposed = args[:7]
    grid = path.at(_size(input))
    geometry = _size(weight), _pair(stride), _pair(padding), _pair(dilation)
    return path.to(_size(output), grid.transposed(*geometry) if transposed else grid.window(*geometry))


def _after_pooling(path: _Path, args, output: Tensor) -> _Path:
    input, kernel, stride, padding, dilation = (*args, *([], [0], [1])[len(args) - 2 :])[:5]
    dilation = [1] if isinstance(dilation, bool) else dilation  # average pooling has none, but ceil_mode in its place
    geometry = _pair(kernel), _pair(stride or kernel), _pair(padding), _pair(dilation)
    return path.to(_size(output), path.at(_size(input)).window(*geometry))


def _after_resampling(path: _Path, args, output: Tensor) -> _Path:
    size = _size(args[0])
    return path.to(_size(output), path.at(size).resized(size, _size(output)))


def _after_interpolation(path: _Path, args, output: Tensor) -> _Path:
    size, align_corners = _size(args[0]), bool(args[2])
    return path.to(_size(output), path.at(size).resized(size, _size(output), align_corners))


def _after_padding(path: _Path, args, output: Tensor) -> _Path:
    left, top = args[1][0], args[1][2] if len(args[1]) > 2 else 0
    return path.to(_size(output), path.at(_size(args[0])).then((1, 1), (-top, -left)))


def _after_slicing(path: _Path, args, output: Tensor) -> _Path:
    given: list[Any] = [*args, *(0, None, None, 1)[len(args) - 1 :]]
    input, dim, start, _, step = given
    axis, start = dim % 4 - 2, start or 0
    if axis < 0 or path.size != _size(input):  # another axis, or height and width are not the last
        return path
    steps, starts = [1, 1], [0, 0]
    steps[axis], starts[axis] = step, start if start >= 0 else start + input.shape[dim]
    return path.to(_size(output), path.grid.then(steps, starts))


# Operations that change where pixels are. All others hand on the path as it is: element by element, or a new layout.
_STEPS = {
    aten.convolution: _after_convolution,
    aten.max_pool2d_with_indices: _after_pooling,
    aten.avg_pool2d: _after_pooling,
    aten._adaptive_avg_pool2d: _after_resampling,
    aten.adaptive_max_pool2d: _after_resampling,
    aten.mean: _after_resampling,
    aten.upsample_nearest2d: _after_resampling,
    aten.upsample_bilinear2d: _after_interpolation,
    aten.upsample_bicubic2d: _after_interpolation,
    aten.constant_pad_nd: _after_padding,
    aten.slice: _after_slicing,
}
