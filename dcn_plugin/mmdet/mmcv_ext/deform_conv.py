"""mmcv's ``deform_conv2d`` and ``modulated_deform_conv2d``, on this package's.

:mod:`dcn_plugin.mmdet` replaces the functions of mmcv that call these by faster ones. mmcv gives the tensors in order
and all that is geometry by name; groups follow from the tensors' shapes.
"""

from torch import Tensor

from dcn_plugin.ops import deform_conv2d

from ._gradients import gradients

__all__ = [
    "deform_conv_backward_input",
    "deform_conv_backward_parameters",
    "deform_conv_forward",
    "modulated_deform_conv_backward",
    "modulated_deform_conv_forward",
]


def _plain(geometry: dict) -> dict:
    """Stride, padding and dilation by the names of our operator, from those of mmcv's first version."""
    names = {"stride": "d", "padding": "pad", "dilation": "dilation"}
    return {ours: (geometry[f"{theirs}H"], geometry[f"{theirs}W"]) for ours, theirs in names.items()}


def _modulated(geometry: dict) -> dict:
    """The same from the names of mmcv's second version."""
    names = {"stride": "stride", "padding": "pad", "dilation": "dilation"}
    return {ours: (geometry[f"{theirs}_h"], geometry[f"{theirs}_w"]) for ours, theirs in names.items()}


def deform_conv_forward(
    input: Tensor, weight: Tensor, offset: Tensor, output: Tensor, columns: Tensor, ones: Tensor, **geometry
) -> None:
    output.copy_(deform_conv2d(input, offset, weight, **_plain(geometry)))


def deform_conv_backward_input(
    input: Tensor,
    offset: Tensor,
    gradOutput: Tensor,
    gradInput: Tensor,
    gradOffset: Tensor,
    weight: Tensor,
    columns: Tensor,
    **geometry,
) -> None:
    def convolve(input, offset):
        return deform_conv2d(input, offset, weight, **_plain(geometry))

    for grad, computed in zip((gradInput, gradOffset), gradients(convolve, [input, offset], gradOutput), strict=True):
        grad.copy_(computed)


def deform_conv_backward_parameters(
    input: Tensor,
    offset: Tensor,
    gradOutput: Tensor,
    gradWeight: Tensor,
    columns: Tensor,
    ones: Tensor,
    scale: float,
    **geometry,
) -> None:
    def convolve(weight):
        return deform_conv2d(input, offset, weight, **_plain(geometry))

    gradWeight.add_(gradients(convolve, [gradWeight], gradOutput)[0], alpha=scale)  # linear: any weight will do


def modulated_deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    output: Tensor,
    columns: Tensor,
    with_bias: bool,
    **geometry,
) -> None:
    added = bias if with_bias else None
    output.copy_(deform_conv2d(input, offset, weight, added, mask=mask, **_modulated(geometry)))


def modulated_deform_conv_backward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    columns: Tensor,
    grad_input: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_offset: Tensor,
    grad_mask: Tensor,
    grad_output: Tensor,
    with_bias: bool,
    **geometry,
) -> None:
    def convolve(input, offset, weight, mask):
        return deform_conv2d(input, offset, weight, mask=mask, **_modulated(geometry))

    computed = gradients(convolve, [input, offset, weight, mask], grad_output)
    for grad, one in zip((grad_input, grad_offset, grad_weight, grad_mask), computed, strict=True):
        grad.copy_(one)
    if with_bias:
        grad_bias.copy_(grad_output.sum((0, 2, 3)))
