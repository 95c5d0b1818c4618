"""Deformable operators for CPU and CUDA tensors; needs torch alone."""

from . import _vmap, flops  # noqa: F401
from .deform_conv2d import deform_conv2d
from .deform_ps_roi_pool import deform_ps_roi_pool
from .deform_roi_align import deform_roi_align
from .ms_deform_attn import ms_deform_attn

__all__ = ["deform_conv2d", "deform_ps_roi_pool", "deform_roi_align", "flops", "ms_deform_attn"]
