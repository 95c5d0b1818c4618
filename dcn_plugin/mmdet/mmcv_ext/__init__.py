"""Lets MMDetection run on mmcv-lite, the mmcv that is installed without a compiler.

mmcv-lite has all of mmcv.ops' Python, but not the module ``mmcv._ext`` of compiled operators that it imports.
:func:`provide_mmcv_ext` puts a module in its place that computes what MMDetection uses with PyTorch's operators and
those of this package, on the CPU and on CUDA. It has mmcv's own argument names, so all of mmcv.ops works unchanged.
"""

import importlib
import logging
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import torch
from mmengine.logging import print_log

from . import carafe, deform_conv, focal_loss, masked_conv, ms_deform_attn, nms, roi_align, roi_pool

NAME = "mmcv._ext"


def provide_mmcv_ext() -> bool:
    """Puts the module in ``sys.modules`` where ``mmcv._ext`` is missing. Has to run before mmcv.ops is imported.

    Returns:
        Whether mmcv runs on it; False where mmcv's compiled operators are installed, which nothing changes.

    Raises:
        ModuleNotFoundError: there is no mmcv at all.
        ImportError: mmcv's compiled operators are installed but do not load.
    """
    mmcv = importlib.import_module("mmcv")
    try:
        return isinstance(importlib.import_module(NAME), _Extension)
    except ModuleNotFoundError as error:
        if error.name != NAME:
            raise
    except ImportError as error:
        raise ImportError(
            f"mmcv {mmcv.__version__}'s compiled operators do not load on PyTorch {torch.__version__} ({error}): they "
            "were built for another. Build mmcv again for this PyTorch, or have dcn_plugin provide its operators: "
            f"`pip uninstall mmcv` and `pip install mmcv-lite=={mmcv.__version__}`."
        ) from error
    mmcv._ext = sys.modules[NAME] = _Extension()
    print_log(
        f"mmcv {mmcv.__version__} has no compiled operators; dcn_plugin provides those that MMDetection uses",
        logger="current",
        level=logging.INFO,
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
