"""The convolution types 'DCN' and 'DCNv2', where ``mmcv.cnn.build_conv_layer`` looks them up."""

from mmengine.registry import MODELS

from dcn_plugin.layers import DeformConv2dPack, ModulatedDeformConv2dPack


def register_conv_layers() -> None:
    """Registers our layers as 'DCN' and 'DCNv2' in MMEngine's MODELS, in place of mmcv's where there are any.

    Raises:
        ImportError: mmcv is installed and broken; mmcv-lite, which has no compiled operators, and no mmcv are ordinary.
    """
    # mmcv.ops registers types of these names and fails if they are taken, so it comes first.
    try:
        import mmcv.ops  # noqa: F401
    except Exception as error:
        if not (isinstance(error, ModuleNotFoundError) and error.name in ("mmcv", "mmcv._ext")):
            raise ImportError(
                f"mmcv is installed but mmcv.ops does not import ({type(error).__name__}: {error}): reinstall mmcv for "
                "this PyTorch, or put mmcv-lite in its place"
            ) from error
    MODELS.register_module("DCN", module=DeformConv2dPack, force=True)
    MODELS.register_module("DCNv2", module=ModulatedDeformConv2dPack, force=True)
