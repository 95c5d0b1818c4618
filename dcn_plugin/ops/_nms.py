"""Non-maximum suppression, for mmcv without its compiled operators: internal functions and their fake kernels.

The kernels are the CPU's. Boxes on another device are copied there, except where torchvision has a kernel for it.
"""

import math

import torch
from torch import Tensor

from . import _library  # noqa: F401  loads the operators


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int = 0) -> Tensor:
    """Greedy suppression.

    Args:
        boxes: (N, 4) as (x1, y1, x2, y2).
        scores: (N,)
        iou_threshold: a box goes where its IoU with a better one that stays is larger.
        offset: added to x2 - x1 and y2 - y1 for a box's sides: 1 where x2 and y2 are the last pixels inside.

    Returns:
        Indices of the boxes that stay, best first; equal scores are in the order ``torch.sort`` gives them, as in mmcv.
    """
    if boxes.is_cuda and (torchvision_nms := _torchvision_nms()):
        return torchvision_nms(boxes + boxes.new_tensor([0, 0, offset, offset]), scores, iou_threshold)
    order = scores.contiguous().argsort(descending=True)
    suppressor = torch.ops.dcn_plugin.nms_suppressors(boxes[order].cpu(), iou_threshold, offset)
    return order[(suppressor == torch.arange(len(suppressor))).to(order.device)]


def nms_match(boxes: Tensor, scores: Tensor, iou_threshold: float) -> list[list[int]]:
    """Each box that stays, best first, followed by those that it suppresses: those whose IoU with it is at least
    ``iou_threshold`` (in :func:`nms` it has to be larger, as in mmcv)."""
    order = scores.contiguous().argsort(descending=True)
    below = torch.nextafter(torch.tensor(iou_threshold, dtype=boxes.dtype), torch.tensor(-math.inf, dtype=boxes.dtype))
    suppressor = torch.ops.dcn_plugin.nms_suppressors(boxes[order].cpu(), float(below), 0)
    groups: dict[int, list[int]] = {}
    for place, index in zip(suppressor.tolist(), order.tolist(), strict=True):
        groups.setdefault(place, []).append(index)
    return list(groups.values())


def soft_nms(
    boxes: Tensor, scores: Tensor, iou_threshold: float, sigma: float, min_score: float, method: int, offset: int = 0
) -> tuple[Tensor, Tensor]:
    r"""`Soft-NMS <https://arxiv.org/abs/1704.04503>`_: a box's score decays with its IoU with each better box.

    Args:
        boxes, scores, offset: as of :func:`nms`.
        iou_threshold: below it, the methods 0 and 1 leave a score as it is.
        sigma: of method 2.
        min_score: a box whose score decays below it goes.
        method: what multiplies a score: 0, nothing of it stays; 1, :math:`1 - IoU`; 2, :math:`e^{-IoU^2 / \sigma}`.

    Returns:
        (M, 5), the boxes that remain and their scores, best first, and (M,), their indices.
    """
    boxes, scores = boxes.cpu(), scores.cpu()
    return torch.ops.dcn_plugin.soft_nms(boxes, scores, iou_threshold, sigma, min_score, method, offset)


def _torchvision_nms():
    try:
        from torchvision.ops import nms
    except Exception:  # not installed, or not made for this torch
        return None
    return nms


@torch.library.register_fake("dcn_plugin::nms_suppressors")
def _fake_nms_suppressors(boxes, iou_threshold, offset=0):
    return boxes.new_empty(boxes.shape[0], dtype=torch.int64)


@torch.library.register_fake("dcn_plugin::soft_nms")
def _fake_soft_nms(boxes, scores, iou_threshold, sigma, min_score, method, offset=0):
    remaining = torch.library.get_ctx().new_dynamic_size()
    return boxes.new_empty(remaining, 5), boxes.new_empty(remaining, dtype=torch.int64)
