"""mmcv's ``roi_pool``: the largest pixel of each bin, a bin being all pixels that it touches."""

import torch
from torch import Tensor

__all__ = ["roi_pool_backward", "roi_pool_forward"]


def roi_pool_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Fills ``output`` (K, C, pooled_height, pooled_width), and ``argmax`` with the pixels as y * W + x.

    A bin outside the map is 0 and its argmax -1.
    """
    height, width = input.shape[-2:]
    rows = _bins(rois[:, 2], rois[:, 4], pooled_height, spatial_scale, height)
    columns = _bins(rois[:, 1], rois[:, 3], pooled_width, spatial_scale, width)
    output.zero_()
    argmax.fill_(-1)
    for k, image in enumerate(rois[:, 0].long().tolist()):
        y, y_counts = _pixels(*rows[k])
        x, x_counts = _pixels(*columns[k])
        if y.numel() * x.numel() == 0:
            continue
        pixels = y[:, None, :, None] * width + x[None, :, None, :]  # (pooled height and width, rows and columns)
        inside = (y_counts[:, None, :, None] & x_counts[None, :, None, :]).flatten(2)
        values = input[image].flatten(1)[:, pixels.flatten(2)].masked_fill(~inside, -torch.inf)
        largest, place = values.max(-1)
        filled = inside.any(-1)
        output[k] = largest.where(filled, 0)
        argmax[k] = pixels.flatten(2).expand_as(values).gather(-1, place[..., None])[..., 0].where(filled, -1)


def roi_pool_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax: Tensor,
    grad_input: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    grad_input.zero_()
    batch, channels, height, width = grad_input.shape
    plane = rois[:, :1].long() * channels + torch.arange(channels, device=rois.device)  # (K, C)
    filled = argmax >= 0
    pixel = plane[..., None, None] * (height * width) + argmax
    grad_input.view(-1).index_add_(0, pixel[filled], grad_output[filled])


def _bins(low: Tensor, high: Tensor, bins: int, spatial_scale: float, size: int) -> Tensor:
    """The bins of one axis, (K, 2, bins): the first pixel and the one after the last; no pixel in a RoI of no size."""
    low, high = low * spatial_scale, (high + 1) * spatial_scale
    step = ((high - low) / bins)[:, None]
    i = torch.arange(bins).to(low)
    first = (i * step + low[:, None]).floor()
    end = ((i + 1) * step + low[:, None]).ceil()
    return (torch.stack([first, end], 1).clamp(0, size) * (high > low)[:, None, None]).long()


def _pixels(first: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """Each bin's pixels in as many places as the largest bin needs, (bins, places), and which of the places count."""
    pixels = first[:, None] + torch.arange(int((end - first).max().clamp(min=0)), device=first.device)
    counts = pixels < end[:, None]
    return pixels.where(counts, 0), counts
