"""The readable truth of each operator in plain PyTorch, to be read and run in float64.

Slow, and differentiable by autograd alone. The tests compare every kernel with these.
"""

import torch
from torch import Tensor
from torch.nn.modules.utils import _pair


def _sample_zero_padded(maps: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Bilinear samples of maps that continue with zeros.

    A sample counts where -1 < y < H and -1 < x < W; any other, and any that is not finite, is 0 with zero gradients.

    Args:
        maps: (B, C, H, W).
        y, x: (B, P), positions in pixels.

    Returns:
        (B, C, P)
    """
    height, width = maps.shape[-2:]
    counts = (y > -1) & (y < height) & (x > -1) & (x < width)
    # Positions that do not count are replaced before any arithmetic, so that no NaN meets a gradient.
    y, x = y.where(counts, 0), x.where(counts, 0)
    top, left = y.detach().floor(), x.detach().floor()
    total = 0
    for row, weight_y in ((top, 1 - (y - top)), (top + 1, y - top)):
        for column, weight_x in ((left, 1 - (x - left)), (left + 1, x - left)):
            inside = counts & (row >= 0) & (row < height) & (column >= 0) & (column < width)
            index = (row * width + column).where(inside, 0).long()
            value = maps.flatten(2).gather(2, index[:, None].expand(-1, maps.shape[1], -1))
            total = total + (value * (weight_y * weight_x)[:, None]).where(inside[:, None], 0)
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

    maps = input.reshape(batch * deform_groups, channels // deform_groups, *input.shape[-2:])
    positions = batch * deform_groups, taps * out_h * out_w
    samples = _sample_zero_padded(maps, y.reshape(positions), x.reshape(positions))
    samples = samples.reshape(batch, deform_groups, -1, taps, out_h, out_w)
    if mask is not None:
        samples = samples * mask.reshape(batch, deform_groups, 1, taps, out_h, out_w)

    columns = samples.reshape(batch, groups, group_channels * taps, out_h * out_w)
    weight = weight.reshape(groups, out_channels // groups, group_channels * taps)
    output = torch.einsum("gok,ngkp->ngop", weight, columns).reshape(batch, out_channels, out_h, out_w)
    return output if bias is None else output + bias[:, None, None]


def _sample_clamped(image: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Bilinear samples of one (C, H, W) map at (P,) positions, for RoI align.

    A sample outside [-1, H] x [-1, W], or not finite, is 0; one between there and the border takes the border's value.
    """
    height, width = image.shape[-2:]
    counts = (y >= -1) & (y <= height) & (x >= -1) & (x <= width)
    y = y.where(counts, 0).clamp(0, height - 1)
    x = x.where(counts, 0).clamp(0, width - 1)
    top, left = y.detach().floor(), x.detach().floor()
    bottom, right = (top + 1).clamp(max=height - 1), (left + 1).clamp(max=width - 1)
    total = 0
    for row, weight_y in ((top, 1 - (y - top)), (bottom, y - top)):
        for column, weight_x in ((left, 1 - (x - left)), (right, x - left)):
            total = total + image[:, row.long(), column.long()] * (weight_y * weight_x)
    return total.where(counts, 0)


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

    One difference to mmcv: it derives the offsets of samples that are clamped to the border as if they were not; these
    are the derivatives of what the operator computes, 0 along a clamped axis.
    """
    out_h, out_w = _pair(output_size)
    output = input.new_zeros(rois.shape[0], input.shape[1], out_h, out_w)
    pooled = []
    for k, roi in enumerate(rois):
        x1, y1, x2, y2 = (roi[1:] * spatial_scale - 0.5).unbind()
        width, height = x2 - x1, y2 - y1
        bin_h, bin_w = height / out_h, width / out_w
        if not torch.isfinite(roi).all():
            pooled.append(output[k])
            continue
        samples_h = sampling_ratio or max(int(torch.ceil(bin_h)), 0)
        samples_w = sampling_ratio or max(int(torch.ceil(bin_w)), 0)
        if samples_h * samples_w == 0:  # an empty RoI
            pooled.append(output[k])
            continue
        bins = []
        for i in range(out_h):
            for j in range(out_w):
                # Sample points: the centres of samples_h x samples_w equal parts of the bin.
                y = y1 + (i + (torch.arange(samples_h).to(input) + 0.5) / samples_h) * bin_h
                x = x1 + (j + (torch.arange(samples_w).to(input) + 0.5) / samples_w) * bin_w
                if offset is not None:
                    x = x + gamma * width * offset[k, 0, i, j]
                    y = y + gamma * height * offset[k, 1, i, j]
                y, x = (p.reshape(-1) for p in torch.meshgrid(y, x, indexing="ij"))
                value = _sample_clamped(input[int(roi[0])], y, x).mean(-1)
                bins.append(value if mask is None else value * mask[k, 0, i, j])
        pooled.append(torch.stack(bins, -1).reshape(-1, out_h, out_w))
    return torch.stack(pooled) if pooled else output
