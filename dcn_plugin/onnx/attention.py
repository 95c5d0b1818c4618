"""Multi-scale deformable attention in ONNX, for both exporters.

Batch, number of queries and sizes of the levels may be dynamic.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

FLOAT, INT32, INT64, DOUBLE = 1, 6, 7, 11  # ONNX's numbers of these types
TENSORRT_DOMAIN, TENSORRT_PLUGIN = "trt.plugins", "MultiscaleDeformableAttnPlugin_TRT"


class Writer(NamedTuple):
    """What records nodes for an exporter."""

    op: Any  # has a function for each ONNX operator, which takes tensors and attributes
    const: Callable  # makes a constant of a list or number, of int64 or of the type that it is told
    size: Callable  # of a tensor along an axis, as a tensor (1,)

    def reshape(self, tensor, *sizes):
        """To sizes (n,), which may be 0."""
        return self.op.Reshape(tensor, self.op.Concat(*sizes, axis=0), allowzero=1)


def grid_samples(writer: Writer, tensors, levels: int, dtype: int, opset: int):
    """As a GridSample of each level's map, in float32 or float64 (``dtype``)."""
    op, const, size_of = writer
    value, spatial_shapes, locations, weights = tensors
    batch, heads, channels = (size_of(value, axis) for axis in (0, 2, 3))
    queries, points = (size_of(locations, axis) for axis in (1, 4))
    maps = op.Mul(batch, heads)
    channels_first = op.Transpose(op.Cast(value, to=dtype), perm=[0, 2, 3, 1])  # (N, heads, D, pixels)
    weights = op.Transpose(op.Cast(weights, to=dtype), perm=[0, 2, 3, 1, 4])  # (N, heads, levels, Q, P)
    grid = _grid(writer, op.Cast(locations, to=dtype), dtype)
    grid = op.Transpose(grid, perm=[0, 2, 3, 1, 4, 5])  # (N, heads, levels, Q, P, 2)
    sizes = op.Cast(spatial_shapes, to=INT64)

    total, first = None, const([0])
    for level in range(levels):
        index = const(level)
        size = op.Gather(sizes, index, axis=0)
        end = op.Add(first, op.ReduceProd(size, keepdims=1))
        sampled = op.GridSample(  # (N * heads, D, Q, P)
            writer.reshape(op.Slice(channels_first, first, end, const([3])), maps, channels, size),
            writer.reshape(op.Gather(grid, index, axis=2), maps, queries, points, const([2])),
            mode="linear" if opset >= 20 else "bilinear",
            padding_mode="zeros",
            align_corners=0,
        )
        weight = writer.reshape(op.Gather(weights, index, axis=2), maps, const([1]), queries, points)
        part = op.ReduceSum(op.Mul(sampled, weight), const([3]), keepdims=0)
        total = part if total is None else op.Add(total, part)
        first = end
    joined = writer.reshape(total, batch, op.Mul(heads, channels), queries)
    return op.CastLike(op.Transpose(joined, perm=[0, 2, 1]), value)


def tensorrt_plugin(writer: Writer, plugin: Callable, tensors):
    """As a call of TensorRT's plugin, in float32: its output is (N, Q, heads, D)."""
    op, const, size_of = writer
    value, spatial_shapes, locations, weights = tensors
    sizes = op.Cast(spatial_shapes, to=INT64)
    areas = op.Mul(op.Gather(sizes, const(0), axis=1), op.Gather(sizes, const(1), axis=1))
    starts = op.CumSum(areas, const(0), exclusive=1)
    attended = plugin(
        op.Cast(value, to=FLOAT),
        op.Cast(sizes, to=INT32),
        op.Cast(starts, to=INT32),
        op.Cast(locations, to=FLOAT),
        op.Cast(weights, to=FLOAT),
        plugin_version="1",
        plugin_namespace="",
    )
    width = op.Mul(size_of(value, 2), size_of(value, 3))
    return op.CastLike(writer.reshape(attended, size_of(value, 0), size_of(locations, 1), width), value)


def _grid(writer: Writer, locations, dtype: int):
    """GridSample's coordinates, from -1 to 1, of locations; what is far outside or not finite is moved just outside."""
    op, const, _ = writer
    low, high = const(-1, dtype), const(2, dtype)  # more than half a pixel outside, whatever the map's size
    near = op.And(op.GreaterOrEqual(locations, low), op.LessOrEqual(locations, high))
    return op.Sub(op.Mul(op.Where(near, locations, low), const(2, dtype)), const(1, dtype))
