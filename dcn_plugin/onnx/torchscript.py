"""The symbolic functions for the TorchScript exporter, ``torch.onnx.export(..., dynamo=False)``."""

from collections.abc import Callable
from functools import partial

import torch
from torch.onnx import symbolic_helper

from . import attention
from .shapes import OPSET, conv_groups


@symbolic_helper.parse_args("v", "v", "v", "v", "v", "is", "is", "is", "b")
def deform_conv2d_symbolic(g, input, offset, weight, bias, mask, stride, padding, dilation, allow_tf32=False):
    """:func:`dcn_plugin.ops.deform_conv2d` as the standard operator DeformConv."""
    # The exporter forgets shapes as it goes; the traced node has them.
    traced = [value.type().varyingSizes() or [None] * 4 for value in list(g.original_node.inputs())[:3]]
    kernel = traced[2]
    groups, deform_groups = conv_groups(traced[0], kernel, traced[1])
    output = g.op(
        "DeformConv",
        input,
        weight,
        offset,
        bias,
        mask,
        kernel_shape_i=kernel[2:],
        strides_i=stride,
        pads_i=[*padding, *padding],
        dilations_i=dilation,
        group_i=groups,
        offset_group_i=deform_groups,
    )
    output.setType(input.type().with_sizes([None, kernel[0], None, None]))  # the exporter infers none
    return output


class _Operators:
    """A function for each ONNX operator that adds it to a graph; attributes are integers, lists of them, and texts."""

    def __init__(self, g):
        self.g = g

    def __getattr__(self, name: str) -> Callable:
        def add(*inputs, **attributes):
            kinds = {key: "s" if isinstance(value, str) else "i" for key, value in attributes.items()}
            return self.g.op(name, *inputs, **{f"{key}_{kinds[key]}": value for key, value in attributes.items()})

        return add


def _writer(g, inputs: list) -> attention.Writer:
    """For a node of the tensors ``inputs``."""
    op, kinds = _Operators(g), {attention.FLOAT: torch.float32, attention.DOUBLE: torch.float64}
    # The exporter forgets shapes as it goes; the traced node has them.
    traced = [value.type().varyingSizes() for value in g.original_node.inputs()]

    def const(value, dtype: int = attention.INT64):
        return g.op("Constant", value_t=torch.tensor(value, dtype=kinds.get(dtype, torch.int64)))

    def size(tensor, axis: int):
        # Known sizes as constants: where it works them out of Shape itself, torch 2.13's exporter crashes.
        known = traced[inputs.index(tensor)][axis]
        return op.Shape(tensor, start=axis, end=axis + 1) if known is None else const([known])

    return attention.Writer(op, const, size)


def _ms_deform_attn(opset: int, g, *tensors):
    """:func:`dcn_plugin.ops.ms_deform_attn` as a GridSample of each level's map."""
    value, _, locations, _ = tensors
    levels = list(g.original_node.inputs())[2].type().varyingSizes()[3]
    dtype = attention.DOUBLE if value.type().scalarType() == "Double" else attention.FLOAT
    output = attention.grid_samples(_writer(g, list(tensors)), tensors, levels, dtype, opset)
    output.setType(value.type().with_sizes([None] * 3))  # the exporter infers none
    return output


def ms_deform_attn_tensorrt_symbolic(g, value, spatial_shapes, sampling_locations, attention_weights):
    """:func:`dcn_plugin.ops.ms_deform_attn` as TensorRT's plugin.

    ``torch.onnx.register_custom_op_symbolic("dcn_plugin::ms_deform_attn", ms_deform_attn_tensorrt_symbolic, 20)`` lets
    the exporter write it in the place of GridSample, from opset 20 on.
    """
    tensors = value, spatial_shapes, sampling_locations, attention_weights
    writer = _writer(g, list(tensors))
    plugin = getattr(writer.op, f"{attention.TENSORRT_DOMAIN}::{attention.TENSORRT_PLUGIN}")
    output = attention.tensorrt_plugin(writer, plugin, tensors)
    output.setType(value.type().with_sizes([None] * 3))
    return output


for _opset in (16, 20):  # the first with GridSample, and the first with its present names
    torch.onnx.register_custom_op_symbolic("dcn_plugin::ms_deform_attn", partial(_ms_deform_attn, _opset), _opset)
torch.onnx.register_custom_op_symbolic("dcn_plugin::deform_conv2d", deform_conv2d_symbolic, OPSET)
