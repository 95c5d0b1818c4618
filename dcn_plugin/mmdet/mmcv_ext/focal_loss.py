"""mmcv's sigmoid and softmax focal losses: `Focal Loss for Dense Object Detection <https://arxiv.org/abs/1708.02002>`_.

``weight``, of a sample's class, has shape (C,), or no elements.
"""

import torch
from torch import Tensor

__all__ = [
    "sigmoid_focal_loss_backward",
    "sigmoid_focal_loss_forward",
    "softmax_focal_loss_backward",
    "softmax_focal_loss_forward",
]


def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Fills ``output`` (N, C) with each class's loss. A target (N,) of C, or more, is the background."""
    p, positive = _full_precision(input).sigmoid(), _is_target(input, target)
    loss = torch.where(positive, -alpha * (1 - p) ** gamma * _log(p), (alpha - 1) * p**gamma * _log(1 - p))
    output.copy_(loss * _sample_weight(weight, target)[:, None])


def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    p, positive = _full_precision(input).sigmoid(), _is_target(input, target)
    grad_positive = -alpha * (1 - p) ** gamma * (1 - p - gamma * p * _log(p))
    grad_negative = (alpha - 1) * p**gamma * (gamma * (1 - p) * _log(1 - p) - p)
    grad_input.copy_(torch.where(positive, grad_positive, grad_negative) * _sample_weight(weight, target)[:, None])


def softmax_focal_loss_forward(
    softmax: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Fills ``output`` (N,) with the loss of the target's probability; 0 where the target is negative."""
    p = _probability_of_target(softmax, target)
    output.copy_((-alpha * (1 - p) ** gamma * _log(p)).where(target >= 0, 0) * _sample_weight(weight, target))


def softmax_focal_loss_backward(
    softmax: Tensor, target: Tensor, weight: Tensor, buff: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """``softmax`` is the forward's; the gradient is that of its argument."""
    p = _probability_of_target(softmax, target)
    grad = alpha * (gamma * (1 - p) ** (gamma - 1) * p * _log(p) - (1 - p) ** gamma)
    buff.copy_(grad.where(target >= 0, 0) * _sample_weight(weight, target))
    grad_input.copy_(buff[:, None] * (_is_target(softmax, target).to(softmax.dtype) - softmax))


def _full_precision(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype is torch.float64 else tensor.float()


def _log(probability: Tensor) -> Tensor:
    return probability.clamp(min=torch.finfo(torch.float32).tiny).log()


def _is_target(scores: Tensor, target: Tensor) -> Tensor:
    return target[:, None] == torch.arange(scores.shape[1], device=scores.device)


def _probability_of_target(softmax: Tensor, target: Tensor) -> Tensor:
    return _full_precision(softmax.gather(1, target.clamp(min=0)[:, None])[:, 0])


def _sample_weight(weight: Tensor, target: Tensor) -> Tensor:
    if weight.numel() == 0:
        return target.new_ones(target.shape)
    known = (target >= 0) & (target < len(weight))
    return weight[target.where(known, 0)].where(known, 1)
