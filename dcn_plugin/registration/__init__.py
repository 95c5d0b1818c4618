"""What MMEngine's registries learn from this package. Each module here registers when it is imported."""

import warnings
from importlib import import_module

from dcn_plugin import layers  # noqa: F401  outside the guard below: our own library missing is an error

_broken: set[str] = set()  # packages that a warning has named


def _register(module: str, what: str, needs: tuple[str, ...]) -> None:
    """Imports one module of this folder.

    Where what it needs is not installed there is nothing to register with. Where that is installed but broken, the
    operators and layers still work: one warning says what does not.
    """
    try:
        import_module(f"{__name__}.{module}")
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name in needs or not _broken.isdisjoint(needs):
            return
        _broken.add(needs[-1])
        warnings.warn(
            f"dcn_plugin could not register {what}: importing {needs[-1]} failed with {type(error).__name__}: {error}",
            stacklevel=2,
        )


_register("conv_layers", "its convolutions 'DCN' and 'DCNv2'", needs=("mmengine",))
_register("deformable_key", "the key 'deformable' of models", needs=("mmengine",))
_register("roi_extractors", "'DeformRoIExtractor'", needs=("mmengine", "mmdet"))
_register("offset_learning_rate", "'dcn_offset_lr_mult' of its layers", needs=("mmengine",))
_register("fallback_on_stride", "'fallback_on_stride' of ResNets", needs=("mmengine", "mmcv", "mmdet"))
_register("checkpoint_globals", "the contents of MMEngine's checkpoints with torch.load", needs=("numpy", "mmengine"))
_register("offset_hook", "'DeformOffsetHook'", needs=("mmengine",))
