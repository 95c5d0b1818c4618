"""Deformable convolution, v1 and v2: the public function, its autograd formula, fake kernels and autocast."""

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
def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    mask: Tensor | None = None,
) -> Tensor:
    r"""Deformable convolution v1 (``mask=None``) or v2 (with ``mask``).

    .. math::
        y(p) = b + \sum_{k} w_k \cdot m_k(p) \cdot x(p \cdot stride - padding + k \cdot dilation + \Delta p_k(p))

    for every output position p and kernel position ("tap") k, with x(.) interpolated bilinearly and 0 outside the map:
    equation 2 of `Deformable Convolutional Networks <https://arxiv.org/abs/1703.06211>`_, equation 1 of
    `Deformable ConvNets v2 <https://arxiv.org/abs/1811.11168>`_.

    A sample at (y, x) counts where -1 < y < H and -1 < x < W; any other, and any that is not finite, contributes 0 and
    has zero gradients. Coordinates and sums are float32 (float64 for float64 inputs) whatever the inputs' dtype. CUDA
    multiplies float32 in TF32 where PyTorch's matrix products may, which is not the default
    (``torch.backends.cuda.matmul.fp32_precision``); ``torch.compile`` keeps what it finds there.

    Args:
        input: (N, C, H, W), float32, float64, float16 or bfloat16; N may be 0. Contiguous or channels_last; the output
            has the same memory format.
        offset: (N, 2 * deform_groups * kh * kw, Ho, Wo), in pixels of the input map: for each deform group and tap
            (row-major) the displacement in y, then in x. Channel c is displaced by deform group
            c // (C / deform_groups).
        weight: (Co, C / groups, kh, kw); ``groups`` follows from the shape.
        bias: (Co,) or None.
        stride, padding, dilation: int or (vertical, horizontal), as in :func:`torch.nn.functional.conv2d`.
        mask: (N, deform_groups * kh * kw, Ho, Wo) or None, multiplies the samples. It is used as it is: a sigmoid,
            where one is wanted, is the caller's.

    Returns:
        (N, Co, Ho, Wo), in input's dtype.

    Raises:
        TypeError: an argument that is no tensor.
        ValueError: stride, padding or dilation are not one or two integers.
        RuntimeError: shapes, dtypes or devices that do not fit together; the message names the argument and both
            shapes. Under autocast all tensors are cast to its dtype first, as for a convolution.
    """
    check_tensors(input=input, offset=offset, weight=weight)
    return torch.ops.dcn_plugin.deform_conv2d(
        input,
        offset,
        weight,
        bias,
        mask,
        pair(stride, "stride"),
        pair(padding, "padding"),
        pair(dilation, "dilation"),
        input.is_cuda and _tf32_allowed(),
    )


def _tf32_allowed() -> bool:
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


# As torch.compiler.assume_constant_result says it, but without importing the compiler, which takes seconds and numpy.
_tf32_allowed._dynamo_marked_constant = True  # type: ignore[attr-defined]


@torch.library.register_fake("dcn_plugin::deform_conv2d")
def _fake(input, offset, weight, bias, mask, stride, padding, dilation, allow_tf32=False):
    check_onnx_export("deform_conv2d")
    check_devices(input, offset=offset, weight=weight, bias=bias, mask=mask)
    size = [
        (input.shape[i + 2] + 2 * padding[i] - dilation[i] * (weight.shape[i + 2] - 1) - 1) // stride[i] + 1
        for i in range(2)
    ]
    output = input.new_empty(input.shape[0], weight.shape[0], *size)
    return output.contiguous(memory_format=memory_format_of(input))


@torch.library.register_fake("dcn_plugin::deform_conv2d_backward")
def _fake_backward(
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
    deterministic=False,
):
    def gradient(needed, tensor, memory_format=torch.contiguous_format):
        return torch.empty_like(tensor, memory_format=memory_format) if needed else input.new_empty(0)

    return (
        gradient(need_input, input, memory_format_of(input)),
        gradient(need_sampling, offset),
        gradient(need_sampling and mask is not None, mask),
        gradient(need_weight, weight, memory_format_of(weight)),
    )


def _setup_context(ctx, inputs, output):
    input, offset, weight, bias, mask, stride, padding, dilation, _ = inputs
    ctx.save_for_backward(input, offset, weight, mask)
    ctx.geometry = stride, padding, dilation


def _backward(ctx, grad_output):
    input, offset, weight, mask = ctx.saved_tensors
    need_input, need_offset, need_weight, need_bias, need_mask = ctx.needs_input_grad[:5]
    grad_input = grad_offset = grad_mask = grad_weight = grad_bias = None
    if need_input or need_offset or need_mask or need_weight:
        need_sampling = need_offset or need_mask
        grads = torch.ops.dcn_plugin.deform_conv2d_backward(
            grad_output,
            input,
            offset,
            weight,
            mask,
            *ctx.geometry,
            need_input,
            need_sampling,
            need_weight,
            torch.are_deterministic_algorithms_enabled(),
        )
        grad_input = grads[0] if need_input else None
        grad_offset = grads[1] if need_offset else None
        grad_mask = grads[2] if need_mask else None
        grad_weight = grads[3] if need_weight else None
    if need_bias:
        grad_bias = grad_output.sum((0, 2, 3))
    return grad_input, grad_offset, grad_weight, grad_bias, grad_mask, None, None, None, None


def _gradients(grad_output, input, offset, weight, mask, *options):
    *geometry, need_input, need_sampling, need_weight, _ = options

    def of(input, offset, mask, weight):
        return _compositions.deform_conv2d(input, offset, weight, None, mask, *geometry)

    needed = need_input, need_sampling, need_sampling, need_weight
    return gradients_of(of, grad_output, (input, offset, mask, weight), needed)


register_derivatives("deform_conv2d", _setup_context, _backward, _compositions.deform_conv2d, _gradients)
register_autocast("deform_conv2d")
