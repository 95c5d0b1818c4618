"""What ``torch.onnx.export`` needs to know of this package's operators; the models then use standard ONNX operators.

::

    import dcn_plugin.onnx

    torch.onnx.export(
        model, args, "model.onnx", dynamo=True, custom_translation_table=dcn_plugin.onnx.translations()
    )

:func:`dcn_plugin.ops.deform_conv2d` becomes DeformConv, which ONNX has from opset 19 on, and
:func:`dcn_plugin.ops.ms_deform_attn` GridSample; the RoI operators become gathers and arithmetic. Importing this module
also teaches the TorchScript exporter (``dynamo=False``) the first two, so that tools which take their imports from a
config (``custom_imports``) find them.
"""

from collections.abc import Callable

import torch

from dcn_plugin import ops  # noqa: F401  (the operators exist)

from .torchscript import deform_conv2d_symbolic, ms_deform_attn_tensorrt_symbolic

__all__ = ["deform_conv2d_symbolic", "ms_deform_attn_tensorrt_symbolic", "translations"]


def translations(tensorrt_plugin: bool = False) -> dict[Callable, Callable]:
    """The ``custom_translation_table`` of ``torch.onnx.export`` for this package's operators.

    ========================  ========================================================================================
    deform_conv2d             DeformConv; groups, deform groups, any batch and image size, v1 and v2
    deform_roi_align          Gather and arithmetic; ``sampling_ratio`` of 1 at least
    deform_ps_roi_pool        Gather and arithmetic
    ms_deform_attn            GridSample; or TensorRT's plugin MultiscaleDeformableAttnPlugin_TRT
    ========================  ========================================================================================

    Args:
        tensorrt_plugin: whether ms_deform_attn becomes a call of TensorRT's plugin, which TensorRT alone can run.

    Raises:
        ImportError: onnxscript is not installed.
        ValueError: (the exporter, in the middle of its own messages) an opset older than 19; a deform_roi_align whose
            ``sampling_ratio`` is 0.
    """
    try:
        from . import dynamo
    except ModuleNotFoundError as error:
        if error.name not in ("onnx", "onnxscript", "onnx_ir"):
            raise
        raise ImportError(
            f"exporting to ONNX needs {error.name}, which is not installed: `pip install dcn_plugin[onnx]`"
        ) from error
    operators = torch.ops.dcn_plugin
    return {
        operators.deform_conv2d.default: dynamo.deform_conv2d,
        operators.deform_roi_align.default: dynamo.deform_roi_align,
        operators.deform_ps_roi_pool.default: dynamo.deform_ps_roi_pool,
        operators.ms_deform_attn.default: (
            dynamo.ms_deform_attn_of_tensorrt if tensorrt_plugin else dynamo.ms_deform_attn
        ),
    }
