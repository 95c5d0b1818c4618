"""Translations of this package's operators for the exporter of ``torch.onnx.export(..., dynamo=True)``.

Each function gets an operator's arguments, its tensors as symbolic values, and records ONNX nodes. Positions and sums
of the RoI operators and of attention are float32 (float64 for float64 inputs), as in the operators themselves.
"""

import numpy as np
import onnx_ir as ir
from onnx.defs import OpSchema
from onnxscript import evaluator, values
from onnxscript.onnx_opset import opset19 as op

from . import attention
from .shapes import OPSET, conv_groups

FLOAT, DOUBLE, INT64, BOOL = ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.INT64, ir.DataType.BOOL

_TENSORRT_PLUGIN = values.Op(
    values.Opset(attention.TENSORRT_DOMAIN, 1),
    attention.TENSORRT_PLUGIN,
    OpSchema(
        attention.TENSORRT_PLUGIN,
        attention.TENSORRT_DOMAIN,
        1,
        inputs=[
            OpSchema.FormalParameter(name, kind)
            for name, kind in (
                ("value", "tensor(float)"),
                ("spatial_shapes", "tensor(int32)"),
                ("level_start_index", "tensor(int32)"),
                ("sampling_locations", "tensor(float)"),
                ("attention_weights", "tensor(float)"),
            )
        ],
        outputs=[OpSchema.FormalParameter("output", "tensor(float)")],
        attributes=[OpSchema.Attribute(f"plugin_{one}", OpSchema.AttrType.STRING) for one in ("version", "namespace")],
    ),
)


def deform_conv2d(input, offset, weight, bias, mask, stride, padding, dilation, allow_tf32=False):
    """As the standard operator DeformConv."""
    # The exporter would write a model of opset 18 all the same, which no runtime reads.
    if _opset() < OPSET:
        raise ValueError(
            f"a deformable convolution needs ONNX opset {OPSET} or later (DeformConv), not {_opset()}: "
            f"torch.onnx.export(..., opset_version=20)"
        )
    groups, deform_groups = conv_groups(input.shape, weight.shape, offset.shape)
    return op.DeformConv(
        input,
        weight,
        offset,
        bias,
        mask,
        kernel_shape=[int(size) for size in weight.shape[2:]],
        strides=stride,
        pads=[*padding, *padding],
        dilations=dilation,
        group=groups,
        offset_group=deform_groups,
    )


def deform_roi_align(input, rois, offset, mask, output_size, spatial_scale, sampling_ratio, gamma):
    """As gathers of each sample's neighbours: (RoI, bin row, bin column, sample row, sample column, channel)."""
    if sampling_ratio < 1:
        raise ValueError(
            f"deform_roi_align with sampling_ratio={sampling_ratio} has no ONNX form: the number of samples would "
            "depend on each RoI's size. Choose a fixed number, such as sampling_ratio=2"
        )
    dtype = DOUBLE if input.dtype is DOUBLE else FLOAT
    batch, finite = _batch_of(rois, dtype)
    edges = op.Sub(op.Mul(op.Cast(rois, to=dtype), _const(spatial_scale, dtype)), _const(0.5, dtype))
    height, width = _size(input, 2), _size(input, 3)

    positions = []
    for axis, bins in enumerate(output_size):  # y, then x; columns of a RoI: batch, x1, y1, x2, y2
        low, high = (
            op.Unsqueeze(_take(edges, column, axis=1), _const([1, 2, 3, 4])) for column in (2 - axis, 4 - axis)
        )
        extent = op.Sub(high, low)
        parts = (np.arange(bins * sampling_ratio) + 0.5) / (bins * sampling_ratio)
        shape = (1, bins, 1, sampling_ratio, 1) if axis == 0 else (1, 1, bins, 1, sampling_ratio)
        position = op.Add(low, op.Mul(extent, _const(parts.reshape(shape), dtype)))
        if offset is not None:
            shift = op.Unsqueeze(_take(op.Cast(offset, to=dtype), 1 - axis, axis=1), _const([3, 4]))
            position = op.Add(position, op.Mul(op.Mul(shift, extent), _const(gamma, dtype)))
        positions.append(position)
    y = _neighbours(positions[0], height, -1.0, 0.0, dtype)
    x = _neighbours(positions[1], width, -1.0, 0.0, dtype)

    rows = op.Reshape(op.Transpose(input, perm=[0, 2, 3, 1]), op.Concat(_const([-1]), _size(input, 1), axis=0))
    first = op.Unsqueeze(op.Mul(batch, op.Mul(height, width)), _const([1, 2, 3, 4]))
    total = _bilinear_sum(rows, first, 1, y, x, width, [3, 4], dtype)
    mean = op.Mul(total, op.Unsqueeze(op.Div(finite, _const(sampling_ratio**2, dtype)), _const([1, 2, 3])))
    pooled = op.Transpose(mean, perm=[0, 3, 1, 2])
    if mask is not None:
        pooled = op.Mul(pooled, op.Cast(mask, to=dtype))
    return op.CastLike(pooled, input)


def deform_ps_roi_pool(
    input, rois, offset, output_size, group_size, part_size, sample_per_part, spatial_scale, trans_std
):
    """As gathers: (RoI, class, bin row, bin column, sample row, sample column, channel of the class)."""
    dtype = DOUBLE if input.dtype is DOUBLE else FLOAT
    batch, finite = _batch_of(rois, dtype)
    height, width = _size(input, 2), _size(input, 3)
    group_h, group_w = group_size
    classes = 1 if offset is None else int(offset.shape[1]) // 2
    of_class = int(input.shape[1]) // (group_h * group_w * classes)

    corners = _round(op.Cast(rois, to=dtype))
    positions = []
    for axis, bins in enumerate(output_size):
        low, high = (op.Unsqueeze(_take(corners, c, axis=1), _const([1, 2, 3, 4, 5])) for c in (2 - axis, 4 - axis))
        scale, half = _const(spatial_scale, dtype), _const(0.5, dtype)
        low = op.Sub(op.Mul(low, scale), half)
        high = op.Sub(op.Mul(op.Add(high, _const(1, dtype)), scale), half)
        extent = op.Max(op.Sub(high, low), _const(0.1, dtype))
        steps = (np.arange(bins)[:, None] + np.arange(sample_per_part) / sample_per_part) / bins
        shape = (1, 1, bins, 1, sample_per_part, 1) if axis == 0 else (1, 1, 1, bins, 1, sample_per_part)
        position = op.Add(low, op.Mul(extent, _const(steps.reshape(shape), dtype)))
        if offset is not None:
            shift = op.Cast(offset, to=dtype)
            for dim, (b, p) in enumerate(zip(output_size, part_size, strict=True)):
                shift = op.Gather(shift, _const(np.arange(b) * p // b), axis=2 + dim)
            shift = op.Gather(shift, _const(np.arange(classes) * 2 + 1 - axis), axis=1)
            shift = op.Unsqueeze(shift, _const([4, 5]))
            position = op.Add(position, op.Mul(op.Mul(shift, extent), _const(trans_std, dtype)))
        positions.append(position)
    y = _neighbours(positions[0], height, -0.5, -0.5, dtype)
    x = _neighbours(positions[1], width, -0.5, -0.5, dtype)

    maps = op.Concat(_const([-1, classes, of_class, group_h, group_w]), height, width, axis=0)
    rows = op.Reshape(op.Transpose(op.Reshape(input, maps), perm=[0, 3, 4, 5, 6, 1, 2]), _const([-1, of_class]))
    bins_h, bins_w = output_size
    group = (np.arange(bins_h) * group_h // bins_h)[:, None] * group_w + np.arange(bins_w) * group_w // bins_w
    first = op.Mul(op.Unsqueeze(batch, _const([1, 2, 3, 4, 5])), _const(group_h * group_w))
    first = op.Add(first, _const(group.reshape(1, 1, bins_h, bins_w, 1, 1)))
    first = op.Mul(op.Mul(first, op.Mul(height, width)), _const(classes))
    first = op.Add(first, _const(np.arange(classes).reshape(1, classes, 1, 1, 1, 1)))
    total = _bilinear_sum(rows, first, classes, y, x, width, [4, 5], dtype)
    counted = op.ReduceSum(op.Mul(y.counts, x.counts), _const([4, 5]), keepdims=0)
    mean = op.Div(total, op.Unsqueeze(op.Max(counted, _const(1, dtype)), _const([4])))
    mean = op.Mul(mean, op.Unsqueeze(finite, _const([1, 2, 3, 4])))
    pooled = op.Reshape(op.Transpose(mean, perm=[0, 1, 4, 2, 3]), _const([-1, classes * of_class, bins_h, bins_w]))
    return op.CastLike(pooled, input)


def ms_deform_attn(value, spatial_shapes, sampling_locations, attention_weights):
    """As a GridSample of each level's map."""
    tensors = value, spatial_shapes, sampling_locations, attention_weights
    dtype = DOUBLE if value.dtype is DOUBLE else FLOAT
    return attention.grid_samples(
        attention.Writer(op, _const, _size), tensors, int(sampling_locations.shape[3]), dtype, _opset()
    )


def ms_deform_attn_of_tensorrt(value, spatial_shapes, sampling_locations, attention_weights):
    """As TensorRT's plugin."""
    tensors = value, spatial_shapes, sampling_locations, attention_weights
    return attention.tensorrt_plugin(attention.Writer(op, _const, _size), _TENSORRT_PLUGIN, tensors)


class _Neighbours:
    """Along one axis, the pixels on both sides of each sample, and their weights."""

    def __init__(self, low, high, low_weight, high_weight, counts):
        self.sides = (low, low_weight), (high, high_weight)
        self.counts = counts


def _neighbours(position, size, before, beyond, dtype) -> _Neighbours:
    """The border rule of csrc/sampling.h: samples in [before, size + beyond] count, moved to the map's pixels."""
    size = op.Cast(size, to=dtype)
    zero, one = _const(0, dtype), _const(1, dtype)
    counts = op.And(
        op.GreaterOrEqual(position, _const(before, dtype)),
        op.LessOrEqual(position, op.Add(size, _const(beyond, dtype))),
    )
    last = op.Sub(size, one)
    position = op.Min(op.Max(op.Where(counts, position, zero), zero), last)
    low = op.Floor(position)
    fraction = op.Sub(position, low)
    weight = op.Cast(counts, to=dtype)
    return _Neighbours(
        op.Cast(low, to=INT64),
        op.Cast(op.Min(op.Add(low, one), last), to=INT64),
        op.Mul(op.Sub(one, fraction), weight),
        op.Mul(fraction, weight),
        weight,
    )


def _bilinear_sum(rows, first, step, y, x, width, axes, dtype):
    """Sums the samples of each bin, which lie along two axes.

    ``rows`` holds the channels of one pixel a row. Pixel (y, x) of a map is row ``first + (y * width + x) * step``.
    """
    total = None
    for row, weight_y in y.sides:
        for column, weight_x in x.sides:
            pixel = op.Add(op.Mul(row, width), column)
            index = op.Add(first, op.Mul(pixel, _const(step)))
            value = op.Cast(op.Gather(rows, index, axis=0), to=dtype)
            part = op.Mul(value, op.Unsqueeze(op.Mul(weight_y, weight_x), _const([-1])))
            total = part if total is None else op.Add(total, part)
    # ONNX Runtime 1.31 reduces nothing along negative axes where there is no RoI.
    return op.ReduceSum(total, _const(axes), keepdims=0)


def _batch_of(rois, dtype):
    """Each RoI's batch index, and 1 where all of the RoI is finite, else 0 (its index then, too)."""
    finite = op.Equal(op.Sub(rois, rois), op.CastLike(_const(0.0, dtype), rois))
    finite = op.ReduceMin(op.Cast(finite, to=dtype), _const([1]), keepdims=0)
    index = op.Cast(_take(rois, 0, axis=1), to=dtype)
    return op.Cast(op.Where(op.Cast(finite, to=BOOL), index, _const(0, dtype)), to=INT64), finite


def _opset() -> int:
    """That the exporter writes for."""
    return getattr(evaluator.default(), "opset", op).version


def _round(x):
    """To the nearest integer, halves away from 0; ONNX's Round takes halves to even numbers."""
    size = op.Abs(x)
    down = op.Floor(size)
    up = op.GreaterOrEqual(op.Sub(size, down), op.CastLike(_const(0.5, FLOAT), x))
    return op.Mul(op.Sign(x), op.Add(down, op.CastLike(up, x)))


def _const(value, dtype=INT64):
    return op.Constant(value=ir.tensor(np.asarray(value, dtype=ir.DataType(dtype).numpy())))


def _take(tensor, index: int, axis: int):
    return op.Gather(tensor, _const(index), axis=axis)


def _size(tensor, axis: int):
    """(1,), so that a dynamic size is as good as a static one."""
    return op.Shape(tensor, start=axis, end=axis + 1)
