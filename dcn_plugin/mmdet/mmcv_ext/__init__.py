"""Lets MMDetection run on mmcv-lite, the mmcv that is installed without a compiler.

mmcv-lite has all of mmcv.ops' Python, but not the module ``mmcv._ext`` of compiled operators that it imports.
:func:`provide_mmcv_ext` puts a module in its place that computes what MMDetection uses with PyTorch's operators and
those of this package, on the CPU and on CUDA. Its functions take mmcv's own arguments, so mmcv.ops works unchanged.
"""

import importlib
import logging
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import torch
from mmengine.logging import print_log
from mmengine.registry import MODELS

from dcn_plugin.mmengine import register_conv_layers

from . import carafe, deform_conv, focal_loss, masked_conv, ms_deform_attn, nms, roi_align, roi_pool

NAME = "mmcv._ext"


def provide_mmcv_ext() -> bool:
    """Puts the module in ``sys.modules`` where ``mmcv._ext`` is missing, and imports mmcv.ops.

    Returns:
        Whether mmcv runs on it; False where mmcv's compiled operators are installed, which stay in charge.

    Raises:
        ImportError: there is no mmcv, or its compiled operators do not load.
    """
    try:
        return isinstance(importlib.import_module(NAME), _Extension)
    except ModuleNotFoundError as error:
        if error.name != NAME:
            raise
    sys.modules[NAME] = extension = _Extension()
    setattr(sys.modules["mmcv"], "_ext", extension)  # noqa: B010  the import system would have set it
    # mmcv.ops registers its types, and fails where ours have the names already.
    for name in ("DCN", "DCNv2"):
        MODELS.module_dict.pop(name, None)
    register_conv_layers()
    print_log(
        "dcn_plugin provides the operators of mmcv-lite that MMDetection uses", logger="current", level=logging.INFO
    )
    return True


class _Extension(ModuleType):
    """What ``import mmcv._ext`` gives. Any name can be looked up, as mmcv does when it imports; what is not provided
    raises where it is called."""

    def __init__(self):
        super().__init__(NAME, "dcn_plugin's operators in the place of mmcv's compiled ones.")
        self.__spec__ = ModuleSpec(NAME, loader=None)
        for group in (carafe, deform_conv, focal_loss, masked_conv, ms_deform_attn, nms, roi_align, roi_pool):
            for name in group.__all__:
                setattr(self, name, _as_compiled(getattr(group, name)))

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(f"module {NAME!r} has no attribute {name!r}")

        def refuse(*args, **kwargs):
            raise NotImplementedError(
                f"mmcv's operator {name} is not among those that dcn_plugin provides for mmcv-lite: install mmcv with "
                "its compiled operators for it"
            )

        return refuse

    @staticmethod
    def get_compiler_version() -> str:
        return "none (mmcv-lite with dcn_plugin's operators)"

    get_compiling_cuda_version = get_compiler_version


def _as_compiled(function):
    """Runs a function as a compiled one would: autograd does not record it, and autocast leaves its dtypes alone."""

    def run(*args, **kwargs):
        device = args[0].device.type
        with torch.no_grad(), torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return run
