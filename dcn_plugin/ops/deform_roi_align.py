"""Deformable RoI align: the public function, its autograd formula, fake kernels and autocast."""

import torch
from torch import Tensor

from . import _compositions
from ._derivatives import gradients_of, register_derivatives
from ._library import (
    check_devices,
    check_onnx_export,
    check_tensors,
    memory_format_of,
    overridable,
    pair,
    register_autocast,
)


@overridable
def deform_roi_align(
    input: Tensor,
    rois: Tensor,
    offset: Tensor | None = None,
    output_size: int | tuple[int, int] = 7,
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    gamma: float = 0.1,
    mask: Tensor | None = None,
) -> Tensor:
    r"""RoI align whose bins move (v1, with ``offset``) and are weighted (v2, with ``mask``).

    .. math::
        y_k(i, j) = m_k(i, j) \cdot \frac{1}{|S|} \sum_{p \in S}
                    x(p_{ij} + p + \gamma \cdot \Delta p_k(i, j) \circ (w_k, h_k))

    for RoI k and bin (i, j), S being the bin's regular grid of sample points: equations 5 and 6 of `Deformable
    Convolutional Networks <https://arxiv.org/abs/1703.06211>`_ with RoI align's bilinear sampling in place of
    rounding, as mmcv's DeformRoIPool; the mask is that of `Deformable ConvNets v2 <https://arxiv.org/abs/1811.11168>`_.

    A RoI covers x1 * spatial_scale - 0.5 to x2 * spatial_scale - 0.5 pixels of the map, unrounded and unclamped.
    Samples outside [-1, H] x [-1, W] are 0; between there and the border they take the border's value.

    Args:
        input: (N, C, H, W), float32, float64, float16 or bfloat16. The output has its memory format.
        rois: (K, 5) as (batch index, x1, y1, x2, y2) in pixels of the image; K may be 0. Any floating dtype: float32
            RoIs keep their precision beside float16 features.
        offset: (K, 2, oh, ow) or None: displacement of each bin in x, then in y (the opposite order of
            :func:`deform_conv2d`), as a share of gamma times the RoI's width and height.
        output_size: bins as int or (oh, ow).
        spatial_scale: pixels of the map per pixel of the image, e.g. 1/16.
        sampling_ratio: samples a bin and axis; 0, or -1 as in torchvision, takes ceil(RoI's size / bins).
        gamma: scale of the offsets.
        mask: (K, 1, oh, ow) or None, multiplies the bins.

    Returns:
        (K, C, oh, ow), in input's dtype.

    Raises:
        TypeError: an argument that is no tensor.
        ValueError: output_size is not one or two integers.
        RuntimeError: shapes, dtypes or devices that do not fit together (the message names the argument and both
            shapes), or, on the CPU, a batch index out of range. On CUDA, where looking would stall the stream, such a
            RoI gives zeros.
    """
    check_tensors(input=input, rois=rois)
    return torch.ops.dcn_plugin.deform_roi_align(
        input,
        rois,
        offset,
        mask,
        pair(output_size, "output_size"),
        float(spatial_scale),
        max(sampling_ratio, 0),
        float(gamma),
    )


@torch.library.register_fake("dcn_plugin::deform_roi_align")
def _fake(input, rois, offset, mask, output_size, spatial_scale, sampling_ratio, gamma):
    check_onnx_export("deform_roi_align")
    check_devices(input, rois=rois, offset=offset, mask=mask)
    output = input.new_empty(rois.shape[0], input.shape[1], *output_size)
    return output.contiguous(memory_format=memory_format_of(input))


@torch.library.register_fake("dcn_plugin::deform_roi_align_backward")
def _fake_backward(
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
    deterministic=False,
):
    def gradient(needed, tensor, memory_format=torch.contiguous_format):
        return torch.empty_like(tensor, memory_format=memory_format) if needed else input.new_empty(0)

    return (
        gradient(need_input, input, memory_format_of(input)),
        gradient(need_sampling and offset is not None, offset),
        gradient(need_sampling and mask is not None, mask),
    )


def _setup_context(ctx, inputs, output):
    input, rois, offset, mask, *options = inputs
    ctx.save_for_backward(input, rois, offset, mask)
    ctx.options = options


def _backward(ctx, grad_output):
    input, rois, offset, mask = ctx.saved_tensors
    need_input, _, need_offset, need_mask = ctx.needs_input_grad[:4]
    grad_input, grad_offset, grad_mask = torch.ops.dcn_plugin.deform_roi_align_backward(
        grad_output,
        input,
        rois,
        offset,
        mask,
        *ctx.options,
        need_input,
        need_offset or need_mask,
        torch.are_deterministic_algorithms_enabled(),
    )
    return (
        grad_input if need_input else None,
        None,
        grad_offset if need_offset else None,
        grad_mask if need_mask else None,
        *[None] * 4,
    )


def _gradients(grad_output, input, rois, offset, mask, *options):
    *options, need_input, need_sampling, _ = options

    def of(input, offset, mask):
        return _compositions.deform_roi_align(input, rois, offset, mask, *options)

    return gradients_of(of, grad_output, (input, offset, mask), (need_input, need_sampling, need_sampling))


register_derivatives("deform_roi_align", _setup_context, _backward, _compositions.deform_roi_align, _gradients)
register_autocast("deform_roi_align", keep=("rois",))
