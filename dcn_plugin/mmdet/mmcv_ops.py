"""Runs mmcv's deformable operators on ours, for the whole process.

That reaches what uses mmcv's operators without asking a registry: the heads of RepPoints, VFNet, TOOD, FoveaBox, Guided
Anchoring, Cascade RPN, CentripetalNet and GLIP, DyHead, the switchable convolution of DetectoRS,
``roi_layer=dict(type='DeformRoIPoolPack')``, and the attention of Deformable DETR, DINO, DDQ, Mask2Former and Grounding
DINO. Parameters and checkpoints stay mmcv's. These names change, in every module that has imported them:

- ``mmcv.ops.deform_conv.deform_conv2d``
- ``mmcv.ops.modulated_deform_conv.modulated_deform_conv2d``
- ``mmcv.ops.deform_roi_pool.deform_roi_pool``
- ``mmcv.ops.multi_scale_deform_attn.multi_scale_deformable_attn_pytorch`` and ``.MultiScaleDeformableAttnFunction``
- ``mmcv.ops.DeformConv2dPack``, ``mmcv.ops.ModulatedDeformConv2dPack`` and ``mmcv.ops.MultiScaleDeformableAttention``,
  so that ``isinstance`` of these is true of what the types 'DCN', 'DCNv2' and 'MultiScaleDeformableAttention' build
  (they are no abstract classes, with which a layer could be registered); models that name the last build ours

The functions compute what mmcv's compute and, unlike these, take keyword arguments, any batch size, empty batches, and
RoIs on the CPU.
"""

import contextlib
import logging
import sys
from types import ModuleType

import torch
from mmcv.ops.deform_conv import DeformConv2dFunction, DeformConv2dPack
from mmcv.ops.deform_roi_pool import DeformRoIPoolFunction
from mmcv.ops.modulated_deform_conv import ModulatedDeformConv2dFunction, ModulatedDeformConv2dPack
from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttention
from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction as _TheirAttention
from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch as _their_attention
from mmengine.logging import print_log
from mmengine.registry import MODELS
from torch import Tensor

from dcn_plugin import layers, ops

_replaced: list[tuple[ModuleType, str, object]] = []


def replace() -> list[str]:
    """Puts our functions and layers in the place of mmcv's; what is ours already stays.

    Returns:
        The names that changed, as 'module.name'.
    """
    # mmcv names `apply` of its autograd functions. Each access makes another such method, but all are equal.
    ours = {
        DeformConv2dFunction.apply: deform_conv2d,
        ModulatedDeformConv2dFunction.apply: modulated_deform_conv2d,
        DeformRoIPoolFunction.apply: deform_roi_pool,
        _their_attention: multi_scale_deformable_attn_pytorch,
        _TheirAttention: MultiScaleDeformableAttnFunction,
        DeformConv2dPack: layers.DeformConv2dPack,
        ModulatedDeformConv2dPack: layers.ModulatedDeformConv2dPack,
        MultiScaleDeformableAttention: layers.MultiScaleDeformableAttention,
    }
    kinds = set(map(type, ours))
    found = [
        (module, name, value)
        for module in list(sys.modules.values())
        if getattr(module, "__name__", None) != __name__
        for name, value in list(getattr(module, "__dict__", {}).items())
        if type(value) in kinds and value in ours
    ]
    for module, name, value in found:
        setattr(module, name, ours[value])
    _replaced.extend(found)
    changed = [f"{module.__name__}.{name}" for module, name, _ in found]
    if changed:
        print_log(f"dcn_plugin runs {', '.join(changed)}", logger="current", level=logging.DEBUG)
    return changed


def restore() -> list[str]:
    """Puts back what :func:`replace` replaced. Returns the names that changed."""
    changed = [f"{module.__name__}.{name}" for module, name, _ in _replaced]
    for module, name, value in _replaced:
        setattr(module, name, value)
    _replaced.clear()
    return changed


def register_attention() -> None:
    """Makes the registry's 'MultiScaleDeformableAttention' ours; mmcv's is no longer found there."""
    MODELS.register_module(module=layers.MultiScaleDeformableAttention, force=True)


def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    deform_groups: int = 1,
    bias: bool = False,
    im2col_step: int = 32,
) -> Tensor:
    """mmcv's v1 signature of :func:`dcn_plugin.ops.deform_conv2d`.

    ``bias`` must be False, as in mmcv's; ``im2col_step`` is accepted and unused. All is computed in offset's dtype.
    """
    if bias is not False:
        raise ValueError(f"mmcv's deform_conv2d has no bias: bias must be False, got {bias!r}")
    return _convolve(input, offset, weight, None, stride, padding, dilation, None, groups, deform_groups)


def modulated_deform_conv2d(
    input: Tensor,
    offset: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    deform_groups: int = 1,
) -> Tensor:
    """mmcv's v2 signature of :func:`dcn_plugin.ops.deform_conv2d`. All is computed in offset's dtype."""
    sizes = [_output_size(input, weight, stride, padding, dilation, axis) for axis in range(2)]
    offset, mask = _first_elements(offset, sizes), _first_elements(mask, sizes)
    return _convolve(input, offset, weight, bias, stride, padding, dilation, mask, groups, deform_groups)


def deform_roi_pool(
    input: Tensor,
    rois: Tensor,
    offset: Tensor | None,
    output_size: int | tuple[int, int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    gamma: float = 0.1,
) -> Tensor:
    """mmcv's signature of :func:`dcn_plugin.ops.deform_roi_align`. All is computed in input's dtype.

    As in mmcv's, an offset without elements counts as none.
    """
    offset = offset.type_as(input) if offset is not None and offset.numel() else None
    with _no_autocast(input):
        return ops.deform_roi_align(input, rois, offset, output_size, spatial_scale, int(sampling_ratio), gamma)


def multi_scale_deformable_attn_pytorch(
    value: Tensor, value_spatial_shapes: Tensor, sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """mmcv's signature of :func:`dcn_plugin.ops.ms_deform_attn`. The result has value's dtype; positions and sums are
    float32 where that is of half precision."""
    precision = torch.float64 if value.dtype is torch.float64 else torch.float32
    with _no_autocast(value):
        return ops.ms_deform_attn(
            value, value_spatial_shapes, sampling_locations.to(precision), attention_weights.to(precision)
        )


class MultiScaleDeformableAttnFunction:
    """What stands for mmcv's autograd function of this name: its ``apply``."""

    @staticmethod
    def apply(
        value: Tensor,
        value_spatial_shapes: Tensor,
        value_level_start_index: Tensor,
        sampling_locations: Tensor,
        attention_weights: Tensor,
        im2col_step: int = 64,
    ) -> Tensor:
        """As :func:`multi_scale_deformable_attn_pytorch`; the index follows from the shapes, and the step is unused."""
        return multi_scale_deformable_attn_pytorch(value, value_spatial_shapes, sampling_locations, attention_weights)


def _convolve(input, offset, weight, bias, stride, padding, dilation, mask, groups, deform_groups):
    # The operator takes both kinds of groups from the shapes. mmcv is told them, and what is told should fit.
    taps = weight.shape[2:].numel()
    if input.shape[1] != weight.shape[1] * groups or offset.shape[1] != 2 * deform_groups * taps:
        raise ValueError(
            f"groups={groups} and deform_groups={deform_groups} do not fit input {tuple(input.shape)}, weight "
            f"{tuple(weight.shape)} and offset {tuple(offset.shape)}"
        )
    # Under autocast it is the offset, a convolution's output, that tells mmcv the dtype.
    input, weight, bias, mask = [None if one is None else one.type_as(offset) for one in (input, weight, bias, mask)]
    with _no_autocast(input):
        return ops.deform_conv2d(input, offset, weight, bias, stride, padding, dilation, mask)


def _output_size(input, weight, stride, padding, dilation, axis):
    stride, padding, dilation = [one if isinstance(one, int) else one[axis] for one in (stride, padding, dilation)]
    span = dilation * (weight.shape[2 + axis] - 1) + 1
    return (input.shape[2 + axis] + 2 * padding - span) // stride + 1


def _first_elements(map: Tensor, sizes: list[int]) -> Tensor:
    """A sample's map (C, H, W) taken for one of other sizes.

    DyHead, and GLIP's head after it, give the offsets of one pyramid level to the next, of half its size. mmcv's kernel
    looks at the numbers alone and takes as many as it needs, from the first, whatever places and channels they were
    meant for. Trained models rely on that.
    """
    needed = map.shape[1] * sizes[0] * sizes[1]
    if list(map.shape[2:]) == sizes or not 0 < needed <= map.shape[1:].numel():
        return map  # as it should be, or refused by the operator, which names the shapes
    return map.flatten(1)[:, :needed].unflatten(1, (map.shape[1], *sizes))


def _no_autocast(tensor: Tensor):
    device = tensor.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()
