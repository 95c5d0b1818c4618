"""Deformable convolution and RoI operators for MMDetection.

``dcn_plugin.ops`` and ``dcn_plugin.layers`` need torch alone. Where MMEngine is installed, importing this package
registers the layers, so that ``custom_imports = dict(imports=['dcn_plugin'])`` is all a config needs.
"""

__version__ = "0.1.0"

from . import registration  # noqa: F401
from .convert import convert  # noqa: F401
