"""What the operators compute, composed of PyTorch's differentiable operations: for second derivatives and forward mode.

Arguments are those of the operators' schemas (csrc/ops.cpp), which have checked them. float16 and bfloat16 are computed
in float32.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from . import reference


def _in_computing_dtype(composition: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Computes in float64 for float64 inputs and float32 for all others; answers in the input's dtype."""

    @functools.wraps(composition)
    def computed(input: Tensor, *args) -> Tensor:
        dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
        casted = (v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for v in args)
        with torch.autocast(input.device.type, enabled=False):
            return composition(input.to(dtype), *casted).to(input.dtype)

    return computed


@_in_computing_dtype
def deform_conv2d(input, offset, weight, bias, mask, stride, padding, dilation, allow_tf32=False):
    return reference.deform_conv2d(input, offset, weight, bias, stride, padding, dilation, mask)


def _sample_clamped(values: Callable[[Tensor, Tensor], Tensor], y: Tensor, x: Tensor, size: torch.Size) -> Tensor:
    """Bilinear samples where the border continues; ``values(row, column)`` reads pixels."""
    height, width = size
    y, x = y.clamp(0, height - 1), x.clamp(0, width - 1)
    top, left = y.detach().floor(), x.detach().floor()
    low_y, low_x, high_y, high_x = 1 - (y - top), 1 - (x - left), y - top, x - left
    bottom, right = (top + 1).clamp(max=height - 1).long(), (left + 1).clamp(max=width - 1).long()
    top, left = top.long(), left.long()
    upper = values(top, left) * (low_y * low_x) + values(top, right) * (low_y * high_x)
    return upper + values(bottom, left) * (high_y * low_x) + values(bottom, right) * (high_y * high_x)


def _images_of(rois: Tensor, images: int) -> tuple[Tensor, Tensor, Tensor]:
    """RoIs' images and edges (K, 4), and which RoIs (K,) have both; the others get numbers that do no harm."""
    fit = rois.isfinite().all(1) & (rois[:, 0] >= 0) & (rois[:, 0] < images)
    rois = rois.where(fit[:, None], 0)
    return rois[:, 0].long(), rois[:, 1:], fit


@_in_computing_dtype
def deform_roi_align(input, rois, offset, mask, output_size, spatial_scale, sampling_ratio, gamma):
    image, edges, fit = _images_of(rois, len(input))
    low, high = (edges * spatial_scale - 0.5).split(2, dim=1)

    def axis(which):
        """Positions (K, bins, samples) along an axis, which of them are samples (K, 1, samples), and how many."""
        bins, start, length = output_size[1 - which], low[:, which], (high - low)[:, which]
        samples = (length / bins).ceil().clamp_min(0) if not sampling_ratio else torch.full_like(length, sampling_ratio)
        most = sampling_ratio or (int(samples.max()) if len(samples) else 0)
        each = torch.arange(most, device=rois.device)
        parts = (torch.arange(bins, device=rois.device)[:, None] * samples[:, None, None] + each) + 0.5
        step = length / (bins * samples).clamp_min(1)
        return start[:, None, None] + parts * step[:, None, None], each < samples[:, None, None], samples

    x, used_x, samples_x = axis(0)
    y, used_y, samples_y = axis(1)
    y, x = y[:, :, None, :, None], x[:, None, :, None, :]  # (K, oh, ow, samples in y, samples in x)
    if offset is not None:
        shift = gamma * offset[..., None, None] * (high - low)[:, :, None, None, None, None]
        y, x = y + shift[:, 1], x + shift[:, 0]
    y, x = torch.broadcast_tensors(y, x)
    height, width = input.shape[-2:]
    counts = (y >= -1) & (y <= height) & (x >= -1) & (x <= width)
    counts = counts & used_y[:, :, None, :, None] & used_x[:, None, :, None, :] & fit[:, None, None, None, None]
    image = image[:, None, None, None, None]

    def values(row, column):
        return input[image, :, row, column].movedim(-1, 1).where(counts[:, None], 0)

    y, x = y.where(counts, 0)[:, None], x.where(counts, 0)[:, None]
    pooled = _sample_clamped(lambda row, column: values(row[:, 0], column[:, 0]), y, x, input.shape[-2:]).sum((-2, -1))
    pooled = pooled / (samples_y * samples_x).clamp_min(1)[:, None, None, None]
    return pooled if mask is None else pooled * mask.where(fit[:, None, None, None], 0)


@_in_computing_dtype
def deform_ps_roi_pool(
    input, rois, offset, output_size, group_size, part_size, sample_per_part, spatial_scale, trans_std
):
    image, edges, fit = _images_of(rois, len(input))
    height, width = input.shape[-2:]
    output_dim = input.shape[1] // (group_size[0] * group_size[1])
    classes = 1 if offset is None else offset.shape[1] // 2
    whole = edges.trunc() + edges.sign() * ((edges - edges.trunc()).abs() >= 0.5)  # halves away from 0
    low, high = whole[:, :2] * spatial_scale - 0.5, (whole[:, 2:] + 1) * spatial_scale - 0.5
    size = (high - low).clamp_min(0.1)
    steps = torch.arange(sample_per_part, device=input.device).to(input) / sample_per_part
    bin_y, bin_x = (torch.arange(bins, device=input.device) for bins in output_size)

    def axis(which, bins):
        parts = (bins[:, None] + steps) / len(bins)
        return low[:, which, None, None] + parts * size[:, which, None, None]  # (K, bins, samples)

    # (K, classes, oh, ow, samples in y, samples in x)
    y, x = axis(1, bin_y)[:, None, :, None, :, None], axis(0, bin_x)[:, None, None, :, None, :]
    if offset is not None:
        part_y, part_x = bin_y * part_size[0] // output_size[0], bin_x * part_size[1] // output_size[1]
        shift = trans_std * offset.unflatten(1, (classes, 2))[..., part_y[:, None], part_x, None, None]
        shift = shift * size[:, None, :, None, None, None, None]
        y, x = y + shift[:, :, 1], x + shift[:, :, 0]
    y, x = torch.broadcast_tensors(y, x)
    counts = (y >= -0.5) & (y <= height - 0.5) & (x >= -0.5) & (x <= width - 0.5)
    counts = counts & fit[:, None, None, None, None, None]
    y, x = y.where(counts, 0), x.where(counts, 0)

    own_y, own_x = bin_y * group_size[0] // output_size[0], bin_x * group_size[1] // output_size[1]
    channel = torch.arange(output_dim, device=input.device).reshape(classes, -1, 1, 1) * group_size[0] + own_y[:, None]
    channel = (channel * group_size[1] + own_x)[..., None, None]  # (classes, D / classes, oh, ow, 1, 1)
    image = image.reshape(-1, *[1] * 6)
    y, x, counts = y[:, :, None], x[:, :, None], counts[:, :, None]

    def values(row, column):
        return input[image, channel, row, column].where(counts, 0)

    pooled = _sample_clamped(values, y, x, input.shape[-2:]).sum((-2, -1)) / counts.sum((-2, -1)).clamp_min(1)
    return pooled.flatten(1, 2)


@_in_computing_dtype
def ms_deform_attn(value, spatial_shapes, sampling_locations, attention_weights):
    return reference.ms_deform_attn(value, spatial_shapes, sampling_locations, attention_weights)
