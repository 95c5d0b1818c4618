"""'DeformOffsetHook' in MMEngine's HOOKS: how far the offsets of a model in training reach."""

import sys
from collections.abc import Callable
from contextlib import ExitStack
from fnmatch import fnmatchcase
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from torch import Tensor, nn

from dcn_plugin.layers import (
    DeformConv2d,
    DeformPSRoIPool,
    DeformRoIAlign,
    ModulatedDeformConv2d,
    MultiScaleDeformableAttention,
)
from dcn_plugin.sampling import Samples, attention_samples, convolution_samples, ps_roi_pool_parts, roi_align_bins


def _convolution_samples(layer: Any, input: Tensor, offset: Tensor) -> Samples:
    geometry = layer.kernel_size, layer.stride, layer.padding, layer.dilation
    return convolution_samples(input.shape[-2:], offset, *geometry)


def _roi_align_bins(layer: DeformRoIAlign, input: Tensor, rois: Tensor, offset: Tensor) -> Samples:
    return roi_align_bins(input.shape[-2:], rois, offset, layer.spatial_scale, layer.gamma)


def _ps_roi_pool_parts(layer: DeformPSRoIPool, input: Tensor, rois: Tensor, offset: Tensor) -> Samples:
    return ps_roi_pool_parts(input.shape[-2:], rois, offset, layer.spatial_scale, layer.trans_std)


def _attention_samples(layer: nn.Module, spatial_shapes, reference_points: Tensor, locations: Tensor) -> Samples:
    return attention_samples(spatial_shapes, reference_points, locations)


SAMPLES: dict[type[nn.Module], Callable] = {
    DeformConv2d: _convolution_samples,
    ModulatedDeformConv2d: _convolution_samples,
    DeformRoIAlign: _roi_align_bins,
    DeformPSRoIPool: _ps_roi_pool_parts,
    MultiScaleDeformableAttention: _attention_samples,
}


class _Watch:
    """A layer's observer: sums over the layer's calls, kept on its device so that nothing waits for them."""

    sums: Any  # a tensor from the first call on
    largest: Any

    def __init__(self, layer: nn.Module):
        self.layer = layer
        self.samples_of: Callable = next(function for kind, function in SAMPLES.items() if isinstance(layer, kind))
        self.samples = self.masks = 0
        self.sums = self.largest = 0

    @torch.no_grad()
    def __call__(self, *arguments) -> None:
        *maps, offset, mask = arguments
        dy, dx, _, _, counts = self.samples_of(self.layer, *maps, offset)
        if not counts.numel():
            return
        reach = torch.hypot(dy, dx)
        finite = reach.isfinite()
        reach = reach.where(finite, 0)
        masks = reach.new_zeros(1) if mask is None else mask
        self.sums += torch.stack([one.sum(dtype=torch.float64) for one in (reach, finite, ~counts, masks)])
        self.largest = reach.max().double().clamp_min(self.largest)
        self.samples += counts.numel()
        self.masks += 0 if mask is None else mask.numel()

    def collected(self) -> Tensor:
        return torch.cat([self.sums, self.largest[None]])


class DeformOffsetHook(Hook):
    """Logs how far the offsets of each deformable layer reach, and warns when they run away.

    Every ``interval`` iterations the visualizer's backends get for each layer that ran:

    - ``offset_mean/<layer>``, ``offset_max/<layer>``: mean and largest length of the displacements, in pixels of the
      layer's input map. The length is Euclidean, whereas ``max_offset`` bounds y and x, each. Of RoI layers, the
      displacements of the bins; of attention layers, those from the reference points, in pixels of each level.
    - ``offset_outside/<layer>``: share of the samples that fall outside the map and so count as 0, padding included: a
      3x3 kernel with zero offsets has some at the borders. Of RoI layers, of the bins by their centres.
    - ``mask_mean/<layer>``: mean of the mask, where there is one.

    The log gets one line, of the layer whose offsets reach furthest on average.

    They are taken over all calls of a layer in the iteration, on the process's own images, from what the operator gets:
    within ``max_offset`` where the layer has one. Offsets that are not finite count as outside and in no mean. Other
    iterations cost nothing. Compiled models run uncompiled in the iterations that are looked at.

    Args:
        interval: iterations.
        threshold: in pixels of the layer's input map; a larger mean gives a warning, once a layer and run, as do
            offsets that are not finite.
        layers: glob or several on the names of the layers to look at, such as 'backbone.layer4.*'.

    Raises:
        ValueError: an interval that is not positive; when training starts, a glob that matches no deformable layer.
    """

    def __init__(self, interval: int = 50, threshold: float = 32.0, layers: str | list[str] = "*"):
        if interval < 1:
            raise ValueError(f"interval must be at least 1, got {interval}")
        self.interval = interval
        self.threshold = threshold
        self.patterns = [layers] if isinstance(layers, str) else list(layers)
        self._layers: dict[str, Any] = {}
        self._watches: dict[str, _Watch] = {}
        self._warned: set[tuple[str, str]] = set()
        self._eager = ExitStack()

    def before_train(self, runner) -> None:
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        every = {name: layer for name, layer in model.named_modules() if isinstance(layer, tuple(SAMPLES))}
        self._layers = {n: layer for n, layer in every.items() if any(fnmatchcase(n, p) for p in self.patterns)}
        self._warned.clear()
        for pattern in self.patterns:
            if every and not any(fnmatchcase(name, pattern) for name in every):
                raise ValueError(f"DeformOffsetHook: {pattern!r} matches none of the deformable layers: {list(every)}")
        if not every:
            runner.logger.warning("DeformOffsetHook: the model has no deformable layers")

    def before_train_iter(self, runner, batch_idx: int, data_batch=None) -> None:
        self._stop_watching()
        if not self._layers or not self.every_n_train_iters(runner, self.interval):
            return
        for name, layer in self._layers.items():
            self._watches[name] = layer.observer = _Watch(layer)
        if "torch._dynamo" in sys.modules:  # else nothing is compiled
            self._eager.enter_context(torch.compiler.set_stance("force_eager"))

    def after_train_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        watches = {name: watch for name, watch in self._watches.items() if watch.samples}
        self._stop_watching()
        if not watches:
            return
        collected = [watch.collected() for watch in watches.values()]
        rows = torch.stack([one.to(collected[0].device) for one in collected]).tolist()  # waits once for the device
        every: dict[str, float] = {}
        furthest: Any = None
        for (name, watch), (reach, finite, outside, mask, largest) in zip(watches.items(), rows, strict=True):
            mean = reach / finite if finite else float("nan")
            scalars = dict(offset_mean=mean, offset_max=largest, offset_outside=outside / watch.samples)
            if watch.masks:
                scalars["mask_mean"] = mask / watch.masks
            every |= {f"{kind}/{name}": value for kind, value in scalars.items()}
            if furthest is None or not mean <= furthest[1]["offset_mean"]:  # one that is not a number is the furthest
                furthest = name, scalars
            if finite < watch.samples:
                lost = watch.samples - int(finite)
                self._warn(runner, name, "not finite", f"{lost} of {watch.samples} displacements are not finite")
            elif mean > self.threshold:
                text = f"displaced by {mean:.1f} pixels on average, {largest:.1f} at most; the threshold is"
                self._warn(runner, name, "too far", f"the samples run away, {text} {self.threshold:g}")
        runner.visualizer.add_scalars(every, step=runner.iter + 1)
        name, scalars = furthest
        text = ", ".join(f"{kind} {value:.3g}" for kind, value in scalars.items())
        runner.logger.info(f"DeformOffsetHook, iteration {runner.iter + 1}, furthest of {len(watches)}: {name}: {text}")

    def after_train(self, runner) -> None:
        self._stop_watching()

    def _stop_watching(self) -> None:
        for watch in self._watches.values():
            vars(watch.layer).pop("observer", None)
        self._watches = {}
        self._eager.close()

    def _warn(self, runner, name: str, kind: str, text: str) -> None:
        if (name, kind) not in self._warned:
            self._warned.add((name, kind))
            runner.logger.warning(f"DeformOffsetHook, iteration {runner.iter + 1}, {name}: {text}")


def register_offset_hook() -> None:
    HOOKS.register_module(module=DeformOffsetHook, force=True)
