"""mmcv's ``roi_align`` and ``deform_roi_pool``, on this package's deformable RoI align."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from dcn_plugin.ops import deform_roi_align

from ._gradients import gradients

__all__ = ["deform_roi_pool_backward", "deform_roi_pool_forward", "roi_align_backward", "roi_align_forward"]


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Fills ``output`` (K, C, aligned_height, aligned_width) with the mean (``pool_mode`` 1) or the maximum (0) of each
    bin's samples; for the maximum, ``argmax_y`` and ``argmax_x`` with the row and column of the sample."""
    rois, size = _on_the_map(rois, spatial_scale, aligned), (aligned_height, aligned_width)
    if pool_mode == 1:
        output.copy_(deform_roi_align(input, rois, None, size, sampling_ratio=sampling_ratio))
        return
    for members, (rows, columns) in _samples_a_bin(rois, size, sampling_ratio):
        grid = (aligned_height * rows, aligned_width * columns)  # each sample a bin
        samples = deform_roi_align(input, rois[members], None, grid, sampling_ratio=1)
        output[members], place = F.max_pool2d(samples, (rows, columns), return_indices=True)
        argmax_y[members] = (place // grid[1]).to(argmax_y.dtype)
        argmax_x[members] = (place % grid[1]).to(argmax_x.dtype)


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    rois, size = _on_the_map(rois, spatial_scale, aligned), (aligned_height, aligned_width)
    if pool_mode == 1:
        grad_input.copy_(_align_backward(grad_output, grad_input, rois, size, sampling_ratio))
        return
    for members, (rows, columns) in _samples_a_bin(rois, size, sampling_ratio):
        grid = (aligned_height * rows, aligned_width * columns)
        place = argmax_y[members].long() * grid[1] + argmax_x[members].long()
        grad_samples = F.max_unpool2d(grad_output[members], place, (rows, columns), output_size=grid)
        grad_input += _align_backward(grad_samples, grad_input, rois[members], grid, 1)


def deform_roi_pool_forward(
    input: Tensor,
    rois: Tensor,
    offset: Tensor,
    output: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    gamma: float,
) -> None:
    """``offset`` has no elements where the bins are straight."""
    size = (pooled_height, pooled_width)
    bins = offset if offset.numel() else None
    output.copy_(deform_roi_align(input, rois, bins, size, spatial_scale, sampling_ratio, gamma))


def deform_roi_pool_backward(
    grad_output: Tensor,
    input: Tensor,
    rois: Tensor,
    offset: Tensor,
    grad_input: Tensor,
    grad_offset: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    gamma: float,
) -> None:
    def pool(input, offset=None):
        return deform_roi_align(
            input, rois, offset, (pooled_height, pooled_width), spatial_scale, sampling_ratio, gamma
        )

    with_offset = offset.numel() > 0
    computed = gradients(pool, [input, offset] if with_offset else [input], grad_output)
    grad_input.copy_(computed[0])
    if with_offset:
        grad_offset.copy_(computed[1])


def _on_the_map(rois: Tensor, spatial_scale: float, aligned: bool) -> Tensor:
    """The RoIs with which deform_roi_align covers, at spatial_scale 1, what mmcv's covers with ``rois``.

    Both move aligned RoIs by half a pixel. Those that are not aligned stay, and are one pixel in size or more.
    """
    rois = rois if rois.dtype is torch.float64 else rois.float()  # half precision would move them by pixels
    batch, boxes = rois[:, :1], rois[:, 1:] * spatial_scale
    if not aligned:
        start = boxes[:, :2] + 0.5
        boxes = torch.cat([start, start + (boxes[:, 2:] - boxes[:, :2]).clamp(min=1)], 1)
    return torch.cat([batch, boxes], 1)


def _samples_a_bin(
    rois: Tensor, output_size: tuple[int, int], sampling_ratio: int
) -> Iterator[tuple[Tensor, tuple[int, int]]]:
    """The RoIs by how many samples their bins have: indices, (rows, columns)."""
    if sampling_ratio > 0:
        counts = rois.new_full((len(rois), 2), sampling_ratio).long()
    else:
        bins = rois.new_tensor(output_size)
        counts = ((rois[:, [4, 3]] - rois[:, [2, 1]]) / bins).ceil().clamp(min=0).long()
    for rows, columns in counts.unique(dim=0).tolist():
        if rows * columns > 0:
            yield (counts == counts.new_tensor([rows, columns])).all(1).nonzero()[:, 0], (rows, columns)


def _align_backward(grad_output: Tensor, like: Tensor, rois: Tensor, output_size, sampling_ratio: int) -> Tensor:
    # RoI align is linear: its gradient takes the input's size alone.
    options = list(output_size), 1.0, sampling_ratio, 0.0, True, False, torch.are_deterministic_algorithms_enabled()
    return torch.ops.dcn_plugin.deform_roi_align_backward(grad_output, like, rois, None, None, *options)[0]
