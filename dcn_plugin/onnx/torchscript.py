"""The symbolic function for the TorchScript exporter, ``torch.onnx.export(..., dynamo=False)``."""

import torch
from torch.onnx import symbolic_helper

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


torch.onnx.register_custom_op_symbolic("dcn_plugin::deform_conv2d", deform_conv2d_symbolic, OPSET)
