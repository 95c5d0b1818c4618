"""mmcv's ``nms``, ``softnms`` and ``nms_match``; ``batched_nms`` runs on them."""

from torch import Tensor

from dcn_plugin.ops import _nms

__all__ = ["nms", "nms_match", "softnms"]


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    return _nms.nms(boxes, scores, iou_threshold, offset)


def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    """Fills the first rows of ``dets`` (N, 5) with the boxes that remain and their scores; returns their indices."""
    kept, indices = _nms.soft_nms(boxes, scores, iou_threshold, sigma, min_score, method, offset)
    dets[: len(kept)] = kept
    return indices


def nms_match(dets: Tensor, iou_threshold: float) -> list[list[int]]:
    return _nms.nms_match(dets[:, :4], dets[:, 4], iou_threshold)
