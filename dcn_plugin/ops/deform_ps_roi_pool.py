"""Deformable position-sensitive RoI pooling: the public function, its autograd formula, fake kernels and autocast."""

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
def deform_ps_roi_pool(
    input: Tensor,
    rois: Tensor,
    offset: Tensor | None = None,
    output_size: int | tuple[int, int] = 7,
    group_size: int | tuple[int, int] | None = None,
    part_size: int | tuple[int, int] | None = None,
    sample_per_part: int = 4,
    spatial_scale: float = 1.0,
    trans_std: float = 0.1,
) -> Tensor:
    r"""Position-sensitive RoI pooling whose bins move: each bin reads score maps of its own.

    .. math::
        y_{k,c}(i, j) = \frac{1}{|S|} \sum_{p \in S}
                        x_{c,g(i,j)}(p_{ij} + p + \gamma \cdot \Delta p_k(i, j) \circ (w_k, h_k))

    for RoI k, output channel c and bin (i, j), with gamma = ``trans_std``: equation 6 of `Deformable Convolutional
    Networks <https://arxiv.org/abs/1703.06211>`_ as its authors implemented it for Deformable R-FCN; without offsets,
    the position-sensitive RoI pooling of `R-FCN <https://arxiv.org/abs/1605.06409>`_, sampled bilinearly.

    It is not :func:`deform_roi_align`: a RoI covers round(x1) * spatial_scale - 0.5 to (round(x2) + 1) *
    spatial_scale - 0.5 pixels of the map (halves round away from 0) and is 0.1 pixels wide at least; S starts at the
    bin's corner, ``sample_per_part`` points an axis in steps of an equal share of the bin; points outside
    [-0.5, H - 0.5] x [-0.5, W - 0.5] are left out of the mean, which is 0 where none remains, and those between the
    border and its pixels' centres take the border's value.

    Args:
        input: (N, output_dim * gh * gw, H, W), float32, float64, float16 or bfloat16; the maps of an output channel
            are neighbours, row by row of the groups. The output has its memory format.
        rois: (K, 5) as (batch index, x1, y1, x2, y2) in pixels of the image, x2 and y2 being the last pixels inside;
            K may be 0. Any floating dtype: float32 RoIs keep their precision beside float16 features.
        offset: (K, 2 * classes, ph, pw) or None: displacement of each part in x, then in y (the opposite order of
            :func:`deform_conv2d`), as a share of trans_std times the RoI's width and height. Each class has as many of
            the output channels as the others; one class moves all channels alike.
        output_size: bins as int or (oh, ow).
        group_size: maps of an output channel as int or (gh, gw), bin (i, j) reading map (i * gh // oh, j * gw // ow);
            None for output_size.
        part_size: offsets of a class as int or (ph, pw), shared out to the bins likewise; None for output_size.
        sample_per_part: samples a bin and axis.
        spatial_scale: pixels of the map per pixel of the image, e.g. 1/16.
        trans_std: scale of the offsets.

    Returns:
        (K, output_dim, oh, ow), in input's dtype.

    Raises:
        TypeError: an argument that is no tensor.
        ValueError: output_size, group_size or part_size is not one or two integers.
        RuntimeError: shapes, dtypes or devices that do not fit together (the message names the argument and both
            shapes), or, on the CPU, a batch index out of range. On CUDA, where looking would stall the stream, such a
            RoI gives zeros.
    """
    bins = pair(output_size, "output_size")
    groups = bins if group_size is None else pair(group_size, "group_size")
    parts = bins if part_size is None else pair(part_size, "part_size")
    check_tensors(input=input, rois=rois)
    return torch.ops.dcn_plugin.deform_ps_roi_pool(
        input, rois, offset, bins, groups, parts, sample_per_part, float(spatial_scale), float(trans_std)
    )


@torch.library.register_fake("dcn_plugin::deform_ps_roi_pool")
def _fake(input, rois, offset, output_size, group_size, part_size, sample_per_part, spatial_scale, trans_std):
    check_onnx_export("deform_ps_roi_pool")
    check_devices(input, rois=rois, offset=offset)
    output_dim = input.shape[1] // (group_size[0] * group_size[1])
    output = input.new_empty(rois.shape[0], output_dim, *output_size)
    return output.contiguous(memory_format=memory_format_of(input))


@torch.library.register_fake("dcn_plugin::deform_ps_roi_pool_backward")
def _fake_backward(
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
    deterministic=False,
):
    def gradient(needed, tensor, memory_format=torch.contiguous_format):
        return torch.empty_like(tensor, memory_format=memory_format) if needed else input.new_empty(0)

    return (
        gradient(need_input, input, memory_format_of(input)),
        gradient(need_offset and offset is not None, offset),
    )


def _setup_context(ctx, inputs, output):
    input, rois, offset, *options = inputs
    ctx.save_for_backward(input, rois, offset)
    ctx.options = options


def _backward(ctx, grad_output):
    need_input, _, need_offset = ctx.needs_input_grad[:3]
    grad_input, grad_offset = torch.ops.dcn_plugin.deform_ps_roi_pool_backward(
        grad_output,
        *ctx.saved_tensors,
        *ctx.options,
        need_input,
        need_offset,
        torch.are_deterministic_algorithms_enabled(),
    )
    return grad_input if need_input else None, None, grad_offset if need_offset else None, *[None] * 6


def _gradients(grad_output, input, rois, offset, *options):
    *options, need_input, need_offset, _ = options

    def of(input, offset):
        return _compositions.deform_ps_roi_pool(input, rois, offset, *options)

    return gradients_of(of, grad_output, (input, offset), (need_input, need_offset))


register_derivatives("deform_ps_roi_pool", _setup_context, _backward, _compositions.deform_ps_roi_pool, _gradients)
register_autocast("deform_ps_roi_pool", keep=("rois",))
