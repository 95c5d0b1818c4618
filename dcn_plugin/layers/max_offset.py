"""``max_offset``: the bound that a layer may set to its offsets."""

from torch import Tensor


def checked_bound(max_offset: float | None) -> float | None:
    if max_offset is None:
        return None
    if not (isinstance(max_offset, (int, float)) and max_offset > 0):
        raise ValueError(f"max_offset must be a positive number or None, got {max_offset!r}")
    return float(max_offset)


def bounded_share(offset: Tensor, scale: float, max_offset: float | None) -> Tensor:
    """Offsets of which ``scale`` times is a share of a RoI's size, the share bounded by ``max_offset``."""
    if max_offset is None or scale == 0:
        return offset
    bound = max_offset / abs(scale)
    return offset.clamp(-bound, bound)
