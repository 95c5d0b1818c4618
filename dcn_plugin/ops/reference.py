"""The readable truth of each operator in plain PyTorch, to be read and run in float64.

Slow, and differentiable by autograd alone. The tests compare every kernel with these.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.modules.utils import _pair


def _sample_zero_padded(maps: Tensor, size, y: Tensor, x: Tensor, start: Tensor | int = 0) -> Tensor:
    """Bilinear samples of maps that continue with zeros.

    A sample counts where -1 < y < H and -1 < x < W; any other, and any that is not finite, is 0 with zero gradients. On
    a pixel's centre the derivative is the one towards the next pixel.

    Args:
        maps: (B, C, pixels).
        size: (H, W), of all maps or (P,) for each sample.
        y, x: (B, P), positions in pixels.
        start: (P,), where each sample's map begins among the pixels.

    Returns:
        (B, C, P)
    """
    height, width = size
    counts = (y > -1) & (y < height) & (x > -1) & (x < width)
    # Positions and pixels that do not count are replaced before any arithmetic: autograd would multiply their NaN by 0.
    y, x = y.where(counts, 0), x.where(counts, 0)
    if maps.shape[2] == 0:
        maps = F.pad(maps, (0, 1))  # gather needs a pixel, though no sample counts
    top, left = y.detach().floor(), x.detach().floor()
    total = maps.new_zeros(())
    for row, weight_y in ((top, 1 - (y - top)), (top + 1, y - top)):
        for column, weight_x in ((left, 1 - (x - left)), (left + 1, x - left)):
            inside = counts & (row >= 0) & (row < height) & (column >= 0) & (column < width)
            index = (start + row * width + column).where(inside, 0).long()
            value = maps.gather(2, index[:, None].expand(-1, maps.shape[1], -1))
            total = total + value.where(inside[:, None], 0) * (weight_y * weight_x)[:, None]
    return total


def deform_conv2d(
    input: Tensor, offset: Tensor, weight: Tensor, bias=None, stride=1, padding=0, dilation=1, mask=None
) -> Tensor:
    r"""See :func:`dcn_plugin.ops.deform_conv2d`.

    y(p) = b + sum over k of w_k * m_k(p) * x(p * stride - padding + k * dilation + dp_k(p)): equation 2 of
    `Deformable Convolutional Networks <https://arxiv.org/abs/1703.06211>`_ and 1 of `Deformable ConvNets v2
    <https://arxiv.org/abs/1811.11168>`_.
    """
    (stride_h, stride_w), (pad_h, pad_w), (dilation_h, dilation_w) = _pair(stride), _pair(padding), _pair(dilation)
    batch, channels = input.shape[:2]
    out_channels, group_channels, kernel_h, kernel_w = weight.shape
    out_h, out_w = offset.shape[-2:]
    groups, taps = channels // group_channels, kernel_h * kernel_w
    deform_groups = offset.shape[1] // (2 * taps)

    def grid(size):
        return torch.arange(size, dtype=input.dtype, device=input.device)

    offset = offset.reshape(batch, deform_groups, kernel_h, kernel_w, 2, out_h, out_w)
    y = (grid(out_h) * stride_h - pad_h)[:, None] + (grid(kernel_h) * dilation_h)[:, None, None, None]
    x = (grid(out_w) * stride_w - pad_w) + (grid(kernel_w) * dilation_w)[:, None, None]
    y, x = y + offset[:, :, :, :, 0], x + offset[:, :, :, :, 1]  # (N, dg, kh, kw, Ho, Wo)

    maps = input.reshape(batch * deform_groups, channels // deform_groups, math.prod(input.shape[-2:]))
    positions = batch * deform_groups, taps * out_h * out_w
    samples = _sample_zero_padded(maps, input.shape[-2:], y.reshape(positions), x.reshape(positions))
    samples = samples.reshape(batch, deform_groups, maps.shape[1], taps, out_h, out_w)
    if mask is not None:
        samples = samples * mask.reshape(batch, deform_groups, 1, taps, out_h, out_w)

    columns = samples.reshape(batch, groups, group_channels * taps, out_h * out_w)
    weight = weight.reshape(groups, out_channels // groups, group_channels * taps)
    output = torch.einsum("gok,ngkp->ngop", weight, columns).reshape(batch, out_channels, out_h, out_w)
    return output if bias is None else output + bias[:, None, None]


def _clamp(x: Tensor, low: float, high: float) -> Tensor:
    """``x.clamp(low, high)``, with derivative 1 at both bounds: that of torch's is 1 before version 2.14, then 0."""
    x = torch.where(x < low, low, x)
    return torch.where(x > high, high, x)


def _sample_clamped(image: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Bilinear samples of one (C, H, W) map at positions of any shape, for RoI align: (C, *shape).

    A sample outside [-1, H] x [-1, W], or not finite, is 0; one between there and the border takes the border's value.
    """
    height, width = image.shape[-2:]
    counts = (y >= -1) & (y <= height) & (x >= -1) & (x <= width)
    y = _clamp(y.where(counts, 0), 0, height - 1)
    x = _clamp(x.where(counts, 0), 0, width - 1)
    top, left = y.detach().floor(), x.detach().floor()
    bottom, right = (top + 1).clamp(max=height - 1), (left + 1).clamp(max=width - 1)
    total = image.new_zeros(())
    for row, weight_y in ((top, 1 - (y - top)), (bottom, y - top)):
        for column, weight_x in ((left, 1 - (x - left)), (right, x - left)):
            total = total + image[:, row.long(), column.long()].where(counts, 0) * (weight_y * weight_x)
    return total


def _sample_points(low: Tensor, high: Tensor, bins: int, sampling_ratio: int) -> Tensor:
    """Where one axis of a RoI is sampled, (bins, samples a bin): at the centres of as many equal parts of the RoI."""
    samples = sampling_ratio or max(math.ceil((high - low) / bins), 0)
    parts = torch.arange(bins * samples).to(low).reshape(bins, samples) + 0.5
    return low + parts * (high - low) / max(bins * samples, 1)


def deform_roi_align(
    input: Tensor,
    rois: Tensor,
    offset: Tensor | None = None,
    output_size=7,
    spatial_scale=1.0,
    sampling_ratio=0,
    gamma=0.1,
    mask: Tensor | None = None,
) -> Tensor:
    """See :func:`dcn_plugin.ops.deform_roi_align`: equations 5 and 6 of `Deformable Convolutional Networks
    <https://arxiv.org/abs/1703.06211>`_ with the sampling of RoI align, as mmcv's DeformRoIPool.

    - A RoI's edges are ``x * spatial_scale - 0.5``; its size may be anything, negative too.
    - ``sampling_ratio`` 0 takes ceil(RoI's size / bins) samples, none of an empty or inverted RoI, which is then 0.
    - A bin is the mean over all its samples, those outside the map included as 0.
    - A bin moves by gamma times its offset times the RoI's size on the map, x first.
    - A RoI that is not finite is 0.

    One difference to mmcv, in the gradient of an offset that moves a sample beyond a border pixel's centre: here it is
    the derivative of what is computed, 0 across the border and the border's own slope along it. mmcv continues the
    slopes of the first two rows or columns beyond the near borders, and takes 0 in both directions at the far ones.
    """
    out_h, out_w = _pair(output_size)
    empty = input.new_zeros(input.shape[1], out_h, out_w)

    def pool(k):
        if not rois[k].isfinite().all():
            return empty
        x1, y1, x2, y2 = rois[k, 1:] * spatial_scale - 0.5
        y = _sample_points(y1, y2, out_h, sampling_ratio)[:, None, :, None]  # (oh, ow, samples in y, samples in x)
        x = _sample_points(x1, x2, out_w, sampling_ratio)[None, :, None, :]
        if offset is not None:
            shift_x, shift_y = gamma * offset[k, ..., None, None]
            y, x = y + shift_y * (y2 - y1), x + shift_x * (x2 - x1)
        if y.numel() * x.numel() == 0:
            return empty
        pooled = _sample_clamped(input[int(rois[k, 0])], *torch.broadcast_tensors(y, x)).mean((-2, -1))
        return pooled if mask is None else pooled * mask[k]

    return torch.stack([pool(k) for k in range(len(rois))]) if len(rois) else empty.new_empty(0, *empty.shape)


def _round(x: Tensor) -> Tensor:
    """To the nearest integer, halves away from 0, as C rounds."""
    return x.trunc() + x.sign() * ((x - x.trunc()).abs() >= 0.5)


def deform_ps_roi_pool(
    input: Tensor,
    rois: Tensor,
    offset: Tensor | None = None,
    output_size=7,
    group_size=None,
    part_size=None,
    sample_per_part=4,
    spatial_scale=1.0,
    trans_std=0.1,
) -> Tensor:
    """See :func:`dcn_plugin.ops.deform_ps_roi_pool`: equation 6 of `Deformable Convolutional Networks
    <https://arxiv.org/abs/1703.06211>`_ with the sampling of its authors' position-sensitive RoI pooling.

    One difference to theirs: at the centre of a pixel they derive the offset to 0; here, as everywhere, it is the
    derivative towards the next pixel.
    """
    out_h, out_w = _pair(output_size)
    group_h, group_w = _pair(output_size if group_size is None else group_size)
    part_h, part_w = _pair(output_size if part_size is None else part_size)
    height, width = input.shape[-2:]
    output_dim = input.shape[1] // (group_h * group_w)
    classes = 1 if offset is None else offset.shape[1] // 2
    # Each class's maps: (N, classes, D / classes, gh, gw, H, W).
    maps = input.reshape(-1, classes, output_dim // classes, group_h, group_w, height, width)
    steps = torch.arange(sample_per_part).to(input) / sample_per_part

    def pool(roi, k, kind, i, j):
        x1, y1 = _round(roi[1:3]) * spatial_scale - 0.5
        x2, y2 = (_round(roi[3:5]) + 1) * spatial_scale - 0.5
        roi_w, roi_h = (x2 - x1).clamp_min(0.1), (y2 - y1).clamp_min(0.1)
        x = x1 + (j + steps) * roi_w / out_w
        y = y1 + (i + steps) * roi_h / out_h
        if offset is not None:
            dx, dy = offset[k, 2 * kind : 2 * kind + 2, i * part_h // out_h, j * part_w // out_w]
            x = x + trans_std * roi_w * dx
            y = y + trans_std * roi_h * dy
        y, x = (p.reshape(-1) for p in torch.meshgrid(y, x, indexing="ij"))
        counts = (y >= -0.5) & (y <= height - 0.5) & (x >= -0.5) & (x <= width - 0.5)
        own = maps[int(roi[0]), kind, :, i * group_h // out_h, j * group_w // out_w]
        samples = _sample_clamped(own, y.where(counts, 0), x.where(counts, 0)).where(counts, 0)
        return samples.sum(-1) / counts.sum().clamp_min(1)

    output = input.new_zeros(rois.shape[0], output_dim, out_h, out_w)
    pooled = []
    for k, roi in enumerate(rois):
        if not torch.isfinite(roi).all():
            pooled.append(output[k])
            continue
        bins = [
            torch.cat([pool(roi, k, kind, i, j) for kind in range(classes)]) for i in range(out_h) for j in range(out_w)
        ]
        pooled.append(torch.stack(bins, -1).reshape(-1, out_h, out_w))
    return torch.stack(pooled) if pooled else output


def ms_deform_attn(value: Tensor, spatial_shapes, sampling_locations: Tensor, attention_weights: Tensor) -> Tensor:
    """See :func:`dcn_plugin.ops.ms_deform_attn`: equation 3 of `Deformable DETR <https://arxiv.org/abs/2010.04159>`_
    between its two projections."""
    batch, queries, heads, levels, points = attention_weights.shape
    height, width = torch.as_tensor(spatial_shapes, device=value.device).unbind(1)
    start = (height * width).cumsum(0) - height * width
    height, width, start = (t[:, None].expand(queries, levels, points).flatten() for t in (height, width, start))

    maps = value.permute(0, 2, 3, 1).flatten(0, 1)  # (N * heads, D, keys)
    x, y = sampling_locations.transpose(1, 2).reshape(batch * heads, queries * levels * points, 2).unbind(-1)
    samples = _sample_zero_padded(maps, (height, width), y * height - 0.5, x * width - 0.5, start)
    samples = samples.unflatten(-1, (queries, levels * points))
    weights = attention_weights.transpose(1, 2).reshape(batch * heads, 1, queries, levels * points)
    return (samples * weights).sum(-1).unflatten(0, (batch, heads)).permute(0, 3, 1, 2).flatten(2)
