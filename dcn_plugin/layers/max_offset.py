"""``max_offset``: the bound that a layer may set to its offsets."""

import torch
from torch import Tensor


def checked_bound(max_offset: float | None) -> float | None:
    if max_offset is None:
        return None
    if not (isinstance(max_offset, (int, float)) and max_offset > 0):
        raise ValueError(f"max_offset must be a positive number or None, got {max_offset!r}")
    return float(max_offset)


def bounded(offset: Tensor, max_offset: float | None) -> Tensor:
    """Offsets within ``max_offset`` of 0; beyond it their gradient is 0, at it 1.

    So is ``offset.clamp(-max_offset, max_offset)``, but for the gradient at the bound: it is 0 from torch 2.14 on.
    """
    if max_offset is None:
        return offset
    offset = torch.where(offset > max_offset, max_offset, offset)
    return torch.where(offset < -max_offset, -max_offset, offset)


def bounded_share(offset: Tensor, scale: float, max_offset: float | None) -> Tensor:
    """Offsets of which ``scale`` times is a share of a RoI's size, the share bounded by ``max_offset``."""
    if max_offset is None or scale == 0:
        return offset
    return bounded(offset, max_offset / abs(scale))
