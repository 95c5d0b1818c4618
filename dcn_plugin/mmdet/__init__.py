"""Makes the operators known to MMDetection: what a config names in ``custom_imports``.

Importing it imports :mod:`dcn_plugin.mmengine`, which registers the convolution types, the key ``deformable=`` and the
hook, and then, in this order,

- provides the operators that mmcv-lite lacks (:mod:`dcn_plugin.mmdet.mmcv_ext`);
- runs mmcv's own deformable operators on ours (:mod:`dcn_plugin.mmdet.mmcv_ops`) and registers
  'MultiScaleDeformableAttention', in the place of mmcv's;
- registers the RoI extractors 'DeformRoIExtractor', 'DeformGenericRoIExtractor' and 'DeformPSRoIExtractor';

and applies :mod:`dcn_plugin.mmdet.patches`.
"""

import dcn_plugin.mmengine  # noqa: F401

from .mmcv_ext import provide_mmcv_ext

try:
    provide_mmcv_ext()  # before anything imports mmcv.ops
    import mmdet.models  # noqa: F401
except Exception as error:
    if isinstance(error, ModuleNotFoundError) and error.name in ("mmdet", "mmcv"):
        raise ImportError(
            f"dcn_plugin.mmdet needs {error.name}, which is not installed: `pip install 'mmdet>=3.0' 'mmcv-lite<2.2'` "
            "(docs/install.md); without MMDetection, import dcn_plugin.mmengine"
        ) from error
    remedy = "docs/install.md lists such errors by their text"
    if isinstance(error, AssertionError) and str(error).startswith("MMCV=="):  # 2.2.0, which mmdet refuses
        remedy = "`pip uninstall mmcv mmcv-lite`, then `pip install mmcv-lite==2.1.0`: docs/install.md"
    raise ImportError(
        f"MMDetection is installed, but importing it fails with {type(error).__name__}: {error} ({remedy})"
    ) from error

from . import mmcv_ops, patches
from .roi_extractors import (
    DeformGenericRoIExtractor,
    DeformPSRoIExtractor,
    DeformRoIExtractor,
    register_roi_extractors,
)
from .runner import Runner

__all__ = ["DeformGenericRoIExtractor", "DeformPSRoIExtractor", "DeformRoIExtractor", "Runner"]

mmcv_ops.replace()
mmcv_ops.register_attention()
register_roi_extractors()
patches.fall_back_on_stride()
patches.suppress_in_bfloat16()
