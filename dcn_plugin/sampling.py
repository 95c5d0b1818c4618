"""Where the deformable operators sample, from what they are given; needs torch alone."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Samples(NamedTuple):
    """Displacements and positions in pixels of the input map, in tensors of one shape, and which samples count."""

    dy: Tensor
    dx: Tensor
    y: Tensor
    x: Tensor
    counts: Tensor


def convolution_samples(
    size: Sequence[int],
    offset: Tensor,
    kernel_size: Sequence[int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> Samples:
    """The samples of a deformable convolution of a map of ``size``: (N, deform_groups, kh, kw, Ho, Wo) each.

    A sample counts where the operator reads it: -1 < y < H and -1 < x < W.
    """
    height, width = size
    kernel_h, kernel_w = kernel_size
    out_h, out_w = offset.shape[-2:]
    dy, dx = offset.float().reshape(len(offset), -1, kernel_h, kernel_w, 2, out_h, out_w).unbind(4)

    def grid(axis, taps, positions):
        taps, positions = (torch.arange(n, device=offset.device) for n in (taps, positions))
        return taps[:, None] * dilation[axis] + positions * stride[axis] - padding[axis]

    y = grid(0, kernel_h, out_h)[:, None, :, None] + dy
    x = grid(1, kernel_w, out_w)[:, None, :] + dx
    return Samples(dy, dx, y, x, (y > -1) & (y < height) & (x > -1) & (x < width))


def roi_align_bins(size: Sequence[int], rois: Tensor, offset: Tensor, scale: float, gamma: float) -> Samples:
    """The bins of deformable RoI align by their centres: (K, 1, oh, ow) each.

    Args:
        size: (H, W) of the map.
        rois, offset, scale, gamma: as the operator's; ``scale`` is its ``spatial_scale``.
    """
    height, width = size
    bins = _displaced_bins(*roi_align_edges(rois, scale), gamma * offset.float())
    _, _, y, x = bins
    return Samples(*bins, (y >= -1) & (y <= height) & (x >= -1) & (x <= width))


def ps_roi_pool_parts(size: Sequence[int], rois: Tensor, offset: Tensor, scale: float, trans_std: float) -> Samples:
    """As :func:`roi_align_bins`, for the parts that each class displaces: (K, classes, ph, pw) each."""
    height, width = size
    bins = _displaced_bins(*ps_roi_pool_edges(rois, scale), trans_std * offset.float())
    _, _, y, x = bins
    return Samples(*bins, (y >= -0.5) & (y <= height - 0.5) & (x >= -0.5) & (x <= width - 0.5))


def attention_samples(spatial_shapes: Tensor, reference_points: Tensor, sampling_locations: Tensor) -> Samples:
    """The samples of multi-scale deformable attention: (N, Q, heads, levels, points) each, in pixels of their levels.

    Displacements are from the reference points.

    Args:
        spatial_shapes: (levels, 2) as (H, W).
        reference_points: (N, Q, levels, 2 or more), x first.
        sampling_locations: as the operator's.
    """
    sizes = spatial_shapes.to(sampling_locations.device).flip(-1)[:, None]  # W, H
    x, y = (sampling_locations.float() * sizes - 0.5).unbind(-1)
    reference = reference_points.float()[:, :, None, :, None, :2]
    dx, dy = ((sampling_locations - reference) * sizes).unbind(-1)
    width, height = sizes.unbind(-1)
    return Samples(dy, dx, y, x, (y > -1) & (y < height) & (x > -1) & (x < width))


def roi_align_edges(rois: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Low edges and sizes (K, 2) of RoIs, x first, in pixels of the map, whose centres have whole coordinates."""
    low, high = (rois[:, 1:].float() * scale - 0.5).split(2, dim=1)
    return low, high - low


def ps_roi_pool_edges(rois: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """As :func:`roi_align_edges`, with the rounding of position-sensitive RoI pooling."""
    low, high = (rois[:, 1:].float() + 0.5).floor().split(2, dim=1)
    low, high = low * scale - 0.5, (high + 1) * scale - 0.5
    return low, (high - low).clamp_min(0.1)


def _displaced_bins(low: Tensor, size: Tensor, share: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Displacements (dy, dx) and centres (y, x) of the bins, each (K, classes, h, w).

    The bins' displacements (K, 2 * classes, h, w) are shares of the RoIs' sizes, x first.
    """
    dx, dy = (share.unflatten(1, (-1, 2)) * size[:, None, :, None, None]).unbind(2)
    in_y, in_x = ((torch.arange(bins, device=share.device) + 0.5) / bins for bins in share.shape[-2:])
    x = (low[:, :1] + in_x * size[:, :1])[:, None, None, :] + dx
    y = (low[:, 1:] + in_y * size[:, 1:])[:, None, :, None] + dy
    return dy, dx, y, x
