"""Deformable operators for CPU and CUDA tensors; needs torch alone."""

from .deform_conv2d import deform_conv2d

__all__ = ["deform_conv2d"]
