"""Makes the layers known to MMEngine; needs mmengine alone.

For projects on MMEngine without MMDetection; :mod:`dcn_plugin.mmdet` includes it. They are two packages so that each
either works whole or fails to import. Importing it, as ``custom_imports = dict(imports=["dcn_plugin.mmengine"])`` does,
registers in this order:

- 'DCN' and 'DCNv2' in MODELS, where ``mmcv.cnn.build_conv_layer`` looks for convolution types;
- the key ``deformable=`` of whatever MODELS, or a registry below it, builds;
- 'DeformOffsetHook' and 'DeformOffsetVisHook' in HOOKS;

and applies :mod:`dcn_plugin.mmengine.patches`.
"""

try:
    import mmengine  # noqa: F401
except Exception as error:
    if isinstance(error, ModuleNotFoundError) and error.name == "mmengine":
        raise ImportError(
            "dcn_plugin.mmengine needs mmengine, which is not installed: `pip install 'mmengine>=0.10'`"
        ) from error
    raise ImportError(f"MMEngine is installed, but importing it fails with {type(error).__name__}: {error}") from error

from . import patches
from .conv_layers import register_conv_layers
from .deformable_key import register_deformable_key
from .offset_hook import DeformOffsetHook, register_offset_hook
from .offset_vis_hook import DeformOffsetVisHook, register_offset_vis_hook
from .runner import Runner

__all__ = ["DeformOffsetHook", "DeformOffsetVisHook", "Runner"]

register_conv_layers()
register_deformable_key()
register_offset_hook()
register_offset_vis_hook()
patches.find_packages()
patches.load_mmengine_checkpoints()
patches.apply_offset_learning_rates()
patches.count_flops()
patches.load_old_offsets()
patches.explain_resuming()
patches.launch_on_cpus()
