"""The convolution types 'DCN' and 'DCNv2', where ``mmcv.cnn.build_conv_layer`` looks them up."""

import warnings

from mmengine.registry import MODELS

from dcn_plugin.layers import DCN, DCNv2

# mmcv.ops registers types of these names and fails if they are taken: it comes first, and is then overridden.
try:
    import mmcv.ops  # noqa: F401
except Exception as error:
    # No mmcv at all, and mmcv-lite, which has no compiled operators, are ordinary.
    if not (isinstance(error, ModuleNotFoundError) and error.name in ("mmcv", "mmcv._ext")):
        warnings.warn(
            f"importing mmcv.ops failed with {type(error).__name__}: {error}. 'DCN' and 'DCNv2' are dcn_plugin's and "
            "work; whatever else needs mmcv's operators will not.",
            stacklevel=2,
        )

MODELS.register_module("DCN", module=DCN, force=True)
MODELS.register_module("DCNv2", module=DCNv2, force=True)
