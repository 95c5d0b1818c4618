"""Deformable convolution (v1, v2), attention and RoI operators for CPU and CUDA; needs torch alone.

Importing this registers the operators with PyTorch and changes nothing else. :mod:`dcn_plugin.mmdet` makes them known
to MMDetection; configs name it: ``custom_imports = dict(imports=["dcn_plugin.mmdet"])``.
"""

__version__ = "0.1.0"

from . import layers, ops
from .convert import convert
from .describe import describe

__all__ = ["convert", "describe", "layers", "ops"]
