"""Conversion to OpenVINO by its PyTorch frontend, with a rule for the deformable convolution.

OpenVINO 2026.4's ONNX frontend has no rule for DeformConv, and its own operator treats borders as ours does only where
``bilinear_interpolation_pad`` is set.
"""

from functools import partial

import numpy as np
import openvino
import torch
from openvino import opset8
from openvino.frontend.pytorch import ConversionExtension
from torch import Tensor


def convert(network: torch.jit.ScriptModule, images: Tensor, names: list[str], dynamic: bool) -> openvino.Model:
    """A traced network as an OpenVINO model."""
    shape = [-1, images.shape[1], -1, -1] if dynamic else list(images.shape)
    # The frontend forgets channels on the way, in RepPoints' and VFNet's heads. The trace has them, in the order in
    # which nodes are converted; were it another, the comparison of the outputs would fail.
    graph = network.inlined_graph
    traced = [
        [value.type().sizes()[1] for value in list(node.inputs())[:2]]
        for node in graph.findAllNodes("dcn_plugin::deform_conv2d")  # type: ignore[attr-defined]
    ]
    deform_conv2d = partial(_deform_conv2d, iter(traced))
    rules = {"dcn_plugin::deform_conv2d": deform_conv2d, "aten::group_norm": _group_norm}
    model = openvino.convert_model(
        network,
        example_input=images,
        input=[openvino.PartialShape(shape)],
        extension=[ConversionExtension(operator, rule) for operator, rule in rules.items()],
    )
    model.inputs[0].get_tensor().set_names({"images"})
    for output, name in zip(model.outputs, names, strict=True):
        output.get_tensor().set_names({name})
    return model


def _deform_conv2d(traced, context):
    input, offset, weight, bias, mask = (context.get_input(i) for i in range(5))
    strides, pads, dilations = (context.get_values_from_const_input(i) for i in (5, 6, 7))
    channels, predicted = next(traced)
    _, group_channels, height, width = weight.get_shape()
    output = opset8.deformable_convolution(
        input,
        offset,
        weight,
        strides,
        pads,
        pads,
        dilations,
        None if _is_none(mask) else mask,
        group=channels // group_channels,
        deformable_group=predicted // (2 * height * width),
        bilinear_interpolation_pad=True,
    )
    if not _is_none(bias):
        output = opset8.add(output, opset8.reshape(bias, [1, -1, 1, 1], False))
    return output.outputs()


def _group_norm(context):
    """As MVN: compiling OpenVINO 2026.4's GroupNormalization in float32 crashes the process in some residual blocks."""
    input, weight, bias = (context.get_input(i) for i in (0, 2, 3))
    groups, epsilon = (context.get_values_from_const_input(i) for i in (1, 4))
    grouped = opset8.reshape(input, np.array([0, groups, -1]), True)
    output = opset8.mvn(grouped, np.array([2]), True, float(epsilon), "inside_sqrt")
    output = opset8.reshape(output, opset8.shape_of(input), False)
    for combine, parameter in ((opset8.multiply, weight), (opset8.add, bias)):
        if not _is_none(parameter):
            output = combine(output, opset8.reshape(parameter, [1, -1, 1, 1], False))
    return output.outputs()


def _is_none(node) -> bool:
    """Python's None, which the frontend hands over as an operation without a type."""
    return node.get_node().get_type_name() == "PtFrameworkNode" and node.get_element_type().is_dynamic()
