"""Multi-scale deformable attention: the public function, its autograd formula, fake kernels and autocast."""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _compositions
from ._derivatives import gradients_of, register_derivatives
from ._library import check_devices, check_onnx_export, check_tensors, overridable, register_autocast

HALF_TYPES = torch.float16, torch.bfloat16


@overridable
def ms_deform_attn(
    value: Tensor,
    spatial_shapes: Tensor | Sequence[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    r"""What each query and head samples of the maps of several levels, weighted and summed.

    .. math::
        y_h(q) = \sum_{l=1}^{L} \sum_{p=1}^{P} A_{qhlp} \cdot x_h^l(\phi_{qhlp})

    with :math:`x_h^l(\phi)` the bilinear sample of head h's channels on level l's map: equation 3 of `Deformable DETR
    <https://arxiv.org/abs/2010.04159>`_ between its two projections, which :class:`torch.nn.Linear` computes.

    A location (x, y) in [0, 1] x [0, 1] is at pixel (x * W - 0.5, y * H - 0.5) of a map of H x W pixels, as in
    ``grid_sample`` with ``align_corners=False``; the map continues with zeros. Locations far outside, or not finite,
    sample nothing and have zero gradients. Positions and sums are in float32, or in float64 for float64 values.

    Args:
        value: (N, sum of H * W, heads, D), the levels' maps one after the other, each row by row; float32, float64,
            float16 or bfloat16. Fastest where D is a multiple of 16.
        spatial_shapes: (L, 2), each level's (H, W), as a tensor on value's device or on the CPU, of int64 or
            int32, or as a list.
        sampling_locations: (N, Q, heads, L, P, 2), x first, as shares of the map's width and height: float32, or
            float64 beside a float64 value. Half types are converted to float32.
        attention_weights: (N, Q, heads, L, P), in value's dtype or in float32.

    Returns:
        (N, Q, heads * D), in value's dtype.

    Raises:
        TypeError: an argument that is no tensor.
        ValueError: spatial_shapes is neither a tensor nor pairs of integers.
        RuntimeError: shapes, dtypes or devices that do not fit together (the message names the argument and both
            shapes), or maps that have not as many pixels together as value has keys. On CUDA, where spatial_shapes is
            there too, the latter is an assertion on the device, which PyTorch reports at the next synchronisation.
    """
    check_tensors(value=value, sampling_locations=sampling_locations, attention_weights=attention_weights)
    spatial_shapes = shapes_tensor(spatial_shapes)
    if spatial_shapes.is_cuda:
        _check_shapes(value, spatial_shapes, sampling_locations, attention_weights)  # no GPU works on after assertions
        message = "spatial_shapes must have as many pixels as value has keys and must not be negative"
        torch._assert_async(_are_maps_of(spatial_shapes, value.shape[1]), message)
    if sampling_locations.dtype in HALF_TYPES:
        sampling_locations = sampling_locations.float()
    return torch.ops.dcn_plugin.ms_deform_attn(value, spatial_shapes, sampling_locations, attention_weights)


def shapes_tensor(spatial_shapes: Tensor | Sequence[tuple[int, int]]) -> Tensor:
    """(L, 2) in int64, of what :func:`ms_deform_attn` takes."""
    if isinstance(spatial_shapes, Tensor):
        return spatial_shapes.long() if spatial_shapes.dtype is torch.int32 else spatial_shapes
    if not isinstance(spatial_shapes, (list, tuple)) or not all(map(_is_size, spatial_shapes)):
        raise ValueError(
            f"spatial_shapes must be a tensor of shape (L, 2) or pairs of integers (H, W), got {spatial_shapes!r}"
        )
    numbers = [n for size in spatial_shapes for n in size]
    if any(isinstance(n, (Tensor, torch.SymInt)) for n in numbers):  # torch.tensor would make them constants
        return torch.stack([_scalar(n) for n in numbers]).view(-1, 2)
    return torch.tensor([int(n) for n in numbers], dtype=torch.int64).view(-1, 2)


def _is_size(size) -> bool:
    return isinstance(size, (list, tuple)) and len(size) == 2 and all(map(_is_integer, size))


def _is_integer(n) -> bool:
    if isinstance(n, Tensor):  # as torch.jit.trace has sizes
        return n.dim() == 0 and n.dtype in (torch.int32, torch.int64)
    return hasattr(n, "__index__")


def _scalar(n) -> Tensor:
    return n.to("cpu", torch.int64) if isinstance(n, Tensor) else torch.scalar_tensor(n, dtype=torch.int64)


def _are_maps_of(spatial_shapes: Tensor, keys: int) -> Tensor:
    """Whether sizes are not negative and have ``keys`` pixels together, on their device."""
    return (spatial_shapes >= 0).all() & (spatial_shapes.prod(-1).sum() == keys)


def _check_shapes(value: Tensor, spatial_shapes: Tensor, sampling_locations: Tensor, attention_weights: Tensor) -> None:
    """The errors of csrc/ms_deform_attn_shape.h, where no kernel runs or something else would fail before it."""

    def check(fits, name, tensor, expected):
        if not fits:
            raise RuntimeError(f"{name} must have shape {expected}, got {tuple(tensor.shape)}")

    check(value.dim() == 4, "value", value, "(N, sum of H * W, heads, D)")
    if value.shape[2] < 1 or value.shape[3] < 1:
        raise RuntimeError(f"value must have at least one head and one channel, got shape {tuple(value.shape)}")
    check(spatial_shapes.dim() == 2 and spatial_shapes.shape[1] == 2, "spatial_shapes", spatial_shapes, "(L, 2)")
    symbols = "(N, Q, heads, L, P, 2)"
    check(sampling_locations.dim() == 6, "sampling_locations", sampling_locations, symbols)
    queries, points = sampling_locations.shape[1], sampling_locations.shape[4]
    shape = value.shape[0], queries, value.shape[2], spatial_shapes.shape[0], points
    fits = tuple(sampling_locations.shape) == (*shape, 2)
    check(fits, "sampling_locations", sampling_locations, f"{symbols} = {(*shape, 2)}")
    fits = tuple(attention_weights.shape) == shape
    check(fits, "attention_weights", attention_weights, f"(N, Q, heads, L, P) = {shape}")


def _check(value: Tensor, spatial_shapes: Tensor, sampling_locations: Tensor, attention_weights: Tensor) -> None:
    """What the fake kernels check."""
    check_devices(value, "value", sampling_locations=sampling_locations, attention_weights=attention_weights)
    if spatial_shapes.device.type != "cpu":
        check_devices(value, "value", spatial_shapes=spatial_shapes)
    _check_shapes(value, spatial_shapes, sampling_locations, attention_weights)


@torch.library.register_fake("dcn_plugin::ms_deform_attn")
def _fake(value, spatial_shapes, sampling_locations, attention_weights):
    check_onnx_export("ms_deform_attn")
    _check(value, spatial_shapes, sampling_locations, attention_weights)
    batch, _, heads, channels = value.shape
    return value.new_empty(batch, sampling_locations.shape[1], heads * channels)


@torch.library.register_fake("dcn_plugin::ms_deform_attn_backward")
def _fake_backward(
    grad_output,
    value,
    spatial_shapes,
    sampling_locations,
    attention_weights,
    need_value,
    need_sampling,
    deterministic=False,
):
    _check(value, spatial_shapes, sampling_locations, attention_weights)

    def gradient(needed, tensor):
        return tensor.new_empty(tensor.shape if needed else 0)

    return (
        gradient(need_value, value),
        gradient(need_sampling, sampling_locations),
        gradient(need_sampling, attention_weights),
    )


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad_output):
    need_value, _, need_locations, need_weights = ctx.needs_input_grad
    grad_value, grad_locations, grad_weights = torch.ops.dcn_plugin.ms_deform_attn_backward(
        grad_output,
        *ctx.saved_tensors,
        need_value,
        need_locations or need_weights,
        torch.are_deterministic_algorithms_enabled(),
    )
    return (
        grad_value if need_value else None,
        None,
        grad_locations if need_locations else None,
        grad_weights if need_weights else None,
    )


def _gradients(grad_output, value, spatial_shapes, sampling_locations, attention_weights, need_value, need_sampling, _):
    def of(value, sampling_locations, attention_weights):
        return _compositions.ms_deform_attn(value, spatial_shapes, sampling_locations, attention_weights)

    tensors = value, sampling_locations, attention_weights
    return gradients_of(of, grad_output, tensors, (need_value, need_sampling, need_sampling))


register_derivatives("ms_deform_attn", _setup_context, _backward, _compositions.ms_deform_attn, _gradients)
register_autocast("ms_deform_attn", keep=("sampling_locations", "attention_weights"))
