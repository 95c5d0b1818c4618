"""mmcv's ``carafe`` and ``carafe_naive``: `Content-Aware ReAssembly of FEatures <https://arxiv.org/abs/1905.02188>`_."""

import torch
from torch import Tensor
from torch.nn import functional as F

from ._gradients import gradients

__all__ = ["carafe_backward", "carafe_forward", "carafe_naive_backward", "carafe_naive_forward"]


def _reassemble(features: Tensor, masks: Tensor, kernel_size: int, group_size: int, scale_factor: int) -> Tensor:
    """Upsamples features: each pixel of the output is the sum of the kernel_size x kernel_size pixels about the one it
    comes from, weighted by its own mask.

    Args:
        features: (N, C, H, W).
        masks: (N, group_size * kernel_size^2, H * scale_factor, W * scale_factor); a group of channels shares one.

    Returns:
        (N, C, H * scale_factor, W * scale_factor)
    """
    batch, _, height, width = features.shape
    windows = F.unfold(features, kernel_size, padding=kernel_size // 2)
    windows = windows.view(batch, group_size, -1, kernel_size**2, height, width)
    masks = masks.view(batch, group_size, kernel_size**2, height, scale_factor, width, scale_factor)
    output = torch.einsum("ngckhw,ngkhiwj->ngchiwj", windows, masks)
    return output.reshape(batch, -1, height * scale_factor, width * scale_factor)


def carafe_naive_forward(features, masks, output, kernel_size, group_size, scale_factor):
    output.copy_(_reassemble(features, masks, kernel_size, group_size, scale_factor))


def carafe_naive_backward(top_grad, features, masks, bottom_grad, mask_grad, kernel_size, group_size, scale_factor):
    def reassemble(features, masks):
        return _reassemble(features, masks, kernel_size, group_size, scale_factor)

    for grad, computed in zip(
        (bottom_grad, mask_grad), gradients(reassemble, [features, masks], top_grad), strict=True
    ):
        grad.copy_(computed)


def carafe_forward(features, masks, rfeatures, routput, rmasks, output, kernel_size, group_size, scale_factor):
    rfeatures.copy_(features)  # what mmcv gives to the backward in place of the features; the others are its buffers
    carafe_naive_forward(features, masks, output, kernel_size, group_size, scale_factor)


def carafe_backward(
    top_grad,
    rfeatures,
    masks,
    rtop_grad,
    rbottom_grad_hs,
    rbottom_grad,
    rmask_grad,
    bottom_grad,
    mask_grad,
    kernel_size,
    group_size,
    scale_factor,
):
    carafe_naive_backward(top_grad, rfeatures, masks, bottom_grad, mask_grad, kernel_size, group_size, scale_factor)
