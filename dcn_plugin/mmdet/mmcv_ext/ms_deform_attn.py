"""mmcv's multi-scale deformable attention."""

import torch
from torch import Tensor

from dcn_plugin.ops import ms_deform_attn

from ._gradients import gradients

__all__ = ["ms_deform_attn_backward", "ms_deform_attn_forward"]


def ms_deform_attn_forward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
) -> Tensor:
    # mmcv has cast the locations to value's dtype.
    locations = sampling_locations if value.dtype is torch.float64 else sampling_locations.float()
    return ms_deform_attn(value, value_spatial_shapes, locations, attention_weights)


def ms_deform_attn_backward(
    value,
    value_spatial_shapes,
    value_level_start_index,
    sampling_locations,
    attention_weights,
    grad_output,
    grad_value,
    grad_sampling_loc,
    grad_attn_weight,
    im2col_step,
):
    def attend(value, sampling_locations, attention_weights):
        return ms_deform_attn_forward(
            value, value_spatial_shapes, value_level_start_index, sampling_locations, attention_weights, im2col_step
        )

    computed = gradients(attend, [value, sampling_locations, attention_weights], grad_output)
    for grad, one in zip((grad_value, grad_sampling_loc, grad_attn_weight), computed, strict=True):
        grad.copy_(one)
