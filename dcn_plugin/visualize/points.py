"""Sampling points: where in the image the samples of one output position lie, through several layers."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .recording import Convolution

MOST = 1_000_000


class Points(NamedTuple):
    """Samples of an output position, (P,) each."""

    y: Tensor  # in pixels of the image
    x: Tensor
    weight: Tensor  # of the sample in the output, 1 for the heaviest; 0 where it does not count
    counts: Tensor  # whether all layers on its way read it, rather than a zero outside their map


def sampling_points(convolution: Convolution, position: tuple[float, float], layers: int = 3) -> Points:
    """The samples of an output position, composed over the last layers: figure 5 of `Deformable Convolutional Networks
    <https://arxiv.org/abs/1703.06211>`_.

    Each sample of the last layer is a position in the output of the deformable convolution before it, which is sampled
    around there in turn; layers of 3x3 give 9, 81, 729 points. A position between output pixels has their offsets and
    masks, interpolated bilinearly. A sample outside the map is a zero: it and what follows from it stay in their
    places among the points and do not count.

    A point's weight is the product, over the layers, of its mask and of the norm of the kernel there.

    Args:
        convolution: the last layer; it must have a place in the image.
        position: (i, j) of its output.
        layers: as many as there are, at most.

    Raises:
        ValueError: no layers, no place in the image, or more than a million points.
    """
    if layers < 1:
        raise ValueError(f"layers must be at least 1, got {layers}")
    count = math.prod(len(layer.offset) // 2 for layer in convolution.chain(layers))
    if count > MOST:
        raise ValueError(f"{layers} layers of {convolution.name} make {count} points, more than {MOST}: take fewer")
    y, x = convolution.output_grid.to_image(*(torch.tensor([float(p)]) for p in position))
    weight, counts = torch.ones(1), torch.ones(1, dtype=torch.bool)
    for layer in convolution.chain(layers):
        y, x, own, read = _samples_at(layer, *layer.output_grid.to_map(y, x))
        y, x = layer.input_grid.to_image(y.flatten(), x.flatten())
        weight = (weight[:, None] * own).flatten()
        counts = (counts[:, None] & read).flatten()
    weight = weight.where(counts, 0)
    return Points(y, x, weight / weight.max().clamp_min(1e-12), counts)


def _samples_at(convolution: Convolution, i: Tensor, j: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Positions, weights and whether they count, of the samples of output positions (P,): (P, samples) each."""
    (kernel_h, kernel_w), (height, width) = convolution.kernel_size, convolution.size
    offset = _interpolated(convolution.offset, i, j).unflatten(1, (-1, kernel_h, kernel_w, 2))
    dy, dx = offset.unbind(-1)  # (P, deform groups, kh, kw)
    (stride_y, stride_x), (pad_y, pad_x) = convolution.stride, convolution.padding
    dilation_y, dilation_x = convolution.dilation
    y = (i * stride_y - pad_y)[:, None, None, None] + (torch.arange(kernel_h) * dilation_y)[:, None] + dy
    x = (j * stride_x - pad_x)[:, None, None, None] + torch.arange(kernel_w) * dilation_x + dx
    weight = convolution.taps.expand_as(y)
    if convolution.mask is not None:
        weight = weight * _interpolated(convolution.mask, i, j).view_as(y)
    counts = (y > -1) & (y < height) & (x > -1) & (x < width)
    return y.flatten(1), x.flatten(1), weight.flatten(1), counts.flatten(1)


def _interpolated(maps: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """Values (P, C) of maps (C, H, W) at positions (P,), bilinear, and beyond the border the border's."""
    height, width = maps.shape[-2:]
    i, j = (p.nan_to_num(0).clamp(0, n - 1) for p, n in ((i, height), (j, width)))
    top, left = i.floor().long(), j.floor().long()
    bottom, right = (top + 1).clamp(max=height - 1), (left + 1).clamp(max=width - 1)
    upper = maps[:, top, left].lerp(maps[:, top, right], j - left)
    return upper.lerp(maps[:, bottom, left].lerp(maps[:, bottom, right], j - left), i - top).T
