"""FLOPs of the operators, for torch's, mmengine's and fvcore's counters and for ``python -m dcn_plugin inspect``.

What is counted are multiply-adds; ``torch.utils.flop_counter`` reports two FLOPs for each, mmengine, fvcore and
``inspect`` one.

- The product with the weight has as many as the plain convolution of the same shape, by the rule of all four counters:
  N * Ho * Wo * Co * C / groups * kh * kw, the bias not counted.
- A sample has four for each channel: its neighbours times their bilinear weights. A convolution takes C * kh * kw
  samples an output position; RoI operators, which have no product, take them in every bin, attention at each
  query's points. torch's counter leaves out interpolation elsewhere, mmengine's and fvcore's count it. Here all count
  it: it is what a deformable convolution adds to the plain one and, where that is depthwise, most of its work. Finding
  positions and bilinear weights is not counted, since all channels share them.
- A backward has one product for the gradient of the weight and one for that of the samples. It takes the samples again
  for the former; it has four multiply-adds a sample for the gradient of each of the input, y, x and mask
  (attention's weight).

Counters see shapes, not values: ``sampling_ratio=0``, whose samples depend on the RoIs' sizes, counts as 2.

torch's counter knows the operators as soon as they are imported, mmengine's once :mod:`dcn_plugin.mmengine` is. For
fvcore: ``FlopCountAnalysis(model, inputs).set_op_handle(**dcn_plugin.ops.flops.JIT_HANDLES)``.
"""

from collections.abc import Callable, Sequence
from math import prod

import torch
from torch.utils.flop_counter import register_flop_formula

from ._library import NAMESPACE

NEIGHBOURS = 4


def product(weight: Sequence[int], output: Sequence[int]) -> int:
    """Multiply-adds of a convolution's product, from the shapes of its weight and its output."""
    batch, _, *size = output
    return batch * prod(size) * prod(weight)


def sampling(input: Sequence[int], weight: Sequence[int], output: Sequence[int]) -> int:
    """Multiply-adds of a deformable convolution's samples, from the shapes of its input, weight and output."""
    batch, _, *size = output
    return NEIGHBOURS * batch * prod(size) * input[1] * prod(weight[2:])


def _deform_conv2d(input, offset, weight, bias, mask, *args, out_shape, **kwargs):
    return product(weight, out_shape) + sampling(input, weight, out_shape)


def _deform_conv2d_backward(
    grad_output,
    input,
    offset,
    weight,
    mask,
    stride,
    padding,
    dilation,
    need_input,
    need_sampling,
    need_weight,
    *args,
    **kwargs,
):
    products = (need_input or need_sampling) + need_weight
    passes = need_weight + _gradients(need_input, need_sampling, offset, mask)
    return products * product(weight, grad_output) + passes * sampling(input, weight, grad_output)


def _deform_roi_align(
    input, rois, offset, mask, output_size, spatial_scale, sampling_ratio, *args, out_shape, **kwargs
):
    return NEIGHBOURS * prod(out_shape) * (sampling_ratio or 2) ** 2


def _deform_roi_align_backward(
    grad_output,
    input,
    rois,
    offset,
    mask,
    output_size,
    spatial_scale,
    sampling_ratio,
    gamma,
    need_input,
    need_sampling,
    *args,
    **kwargs,
):
    samples = prod(grad_output) * (sampling_ratio or 2) ** 2
    return NEIGHBOURS * samples * _gradients(need_input, need_sampling, offset, mask)


def _deform_ps_roi_pool(
    input, rois, offset, output_size, group_size, part_size, sample_per_part, *args, out_shape, **kwargs
):
    return NEIGHBOURS * prod(out_shape) * sample_per_part**2


def _deform_ps_roi_pool_backward(
    grad_output,
    input,
    rois,
    offset,
    output_size,
    group_size,
    part_size,
    sample_per_part,
    spatial_scale,
    trans_std,
    need_input,
    need_offset,
    *args,
    **kwargs,
):
    return NEIGHBOURS * prod(grad_output) * sample_per_part**2 * _gradients(need_input, need_offset, offset, None)


def _ms_deform_attn(value, spatial_shapes, sampling_locations, attention_weights, *args, **kwargs):
    return NEIGHBOURS * prod(attention_weights) * value[3]


def _ms_deform_attn_backward(
    grad_output,
    value,
    spatial_shapes,
    sampling_locations,
    attention_weights,
    need_value,
    need_sampling,
    *args,
    **kwargs,
):
    return NEIGHBOURS * prod(attention_weights) * value[3] * (need_value + 3 * need_sampling)


def _gradients(need_input, need_sampling, offset, mask) -> int:
    """For how many of the input, y, x and mask a backward computes gradients."""
    return need_input + need_sampling * (2 * (offset is not None) + (mask is not None))


def _jit_handle(multiply_adds: Callable) -> Callable:
    """What mmengine's and fvcore's counters call with the inputs and outputs of a traced operator."""

    def shape_or_constant(value):
        return value.type().sizes() if isinstance(value.type(), torch.TensorType) else value.toIValue()

    def handle(inputs, outputs):
        return multiply_adds(*map(shape_or_constant, inputs), out_shape=shape_or_constant(outputs[0]))

    return handle


FORWARD: dict[str, Callable] = dict(
    deform_conv2d=_deform_conv2d,
    deform_roi_align=_deform_roi_align,
    deform_ps_roi_pool=_deform_ps_roi_pool,
    ms_deform_attn=_ms_deform_attn,
)
BACKWARD: dict[str, Callable] = dict(
    deform_conv2d_backward=_deform_conv2d_backward,
    deform_roi_align_backward=_deform_roi_align_backward,
    deform_ps_roi_pool_backward=_deform_ps_roi_pool_backward,
    ms_deform_attn_backward=_ms_deform_attn_backward,
)
JIT_HANDLES = {f"{NAMESPACE}::{operator}": _jit_handle(formula) for operator, formula in FORWARD.items()}


def _register(operator: str, multiply_adds: Callable) -> None:
    @register_flop_formula(getattr(getattr(torch.ops, NAMESPACE), operator))
    def flops(*args, **kwargs):
        return 2 * multiply_adds(*args, **kwargs)


for _operator, _formula in (FORWARD | BACKWARD).items():
    _register(_operator, _formula)
