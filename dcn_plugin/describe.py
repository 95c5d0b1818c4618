"""Lists the convolutions of a model, what its deformable ones cost, and its deformable attention; needs torch alone."""

import copy
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.overrides import TorchFunctionMode

from .convert import KINDS
from .layers import DeformConv2d, ModulatedDeformConv2d, MultiScaleDeformableAttention
from .layers.zero_init import ZeroInitConv2d
from .ops.flops import NEIGHBOURS, product, sampling

# What a detector runs on the maps of its neck. RoI heads are not among them: their cost depends on the number of boxes.
DENSE_HEADS = ("rpn_head", "bbox_head", "mask_head", "semantic_head", "roi_head.semantic_head")
HEADINGS = ("convolution", "channels", "kernel", "", "deformable", "chosen by", "+params", "FLOPs", "+FLOPs")
ATTENTION_HEADINGS = ("attention", "width", "heads", "levels", "points", "params", "FLOPs a query", "FLOPs a pixel")


def describe(model: nn.Module, shape: tuple[int, int] = (800, 1216)) -> str:
    """A table of a model's spatial convolutions: which are deformable, what chose them, their parameters and FLOPs.

    A second table has the layers of multi-scale deformable attention, where there are any; their FLOPs are those of
    each query, and of each pixel of the maps that they attend to.

    Args:
        model: any module; it is copied and stays as it is.
        shape: (height, width) of the image that its FLOPs (multiply-adds) are counted for.
    """
    with _CopiesResults():
        model = copy.deepcopy(model)
    names: dict[Any, list[str]] = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, _ConvNd) and not isinstance(module, ZeroInitConv2d):
            names[module].append(name)
    flops = _trace(model, shape)
    rows, extra_parameters, extra_flops = [], 0, 0
    for conv, its_names in names.items():
        deformable = isinstance(conv, (DeformConv2d, ModulatedDeformConv2d))
        if not deformable and max(conv.kernel_size) == 1:
            continue
        own, extra, parameters = flops.get(conv), None, 0
        if deformable and hasattr(conv, "conv_offset"):
            parameters = sum(parameter.numel() for parameter in conv.conv_offset.parameters())
            extra = flops.get((conv, "sampling"), 0) + flops.get(conv.conv_offset, 0) if own else None
        extra_parameters += parameters
        extra_flops += extra or 0
        rows.append(
            (
                its_names[0] + (f" and {len(its_names) - 1} more" if len(its_names) > 1 else ""),
                f"{conv.in_channels}->{conv.out_channels}",
                "x".join(map(str, conv.kernel_size)),
                _details(conv),
                _kind(conv) if deformable else "",
                getattr(conv, "chosen_by", ""),
                f"{parameters:,}" if deformable else "",
                _giga(own),
                _giga(extra) if deformable else "",
            )
        )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    total = sum(flops.values())
    footer = [
        "",
        f"{len(rows)} spatial convolutions, {sum(bool(row[4]) for row in rows)} of them deformable",
        f"parameters of the model: {(parameters - extra_parameters) / 1e6:.2f} M plain, {parameters / 1e6:.2f} M as "
        f"configured (+{extra_parameters / 1e6:.2f} M)",
        f"FLOPs (multiply-adds) of all its convolutions for an image of {shape[0]} x {shape[1]}: "
        + (
            f"{_giga(total - extra_flops)} plain, {_giga(total)} as configured (+{_giga(extra_flops)})"
            if total
            else "not counted, since the model could not be traced"
        ),
    ]
    if any(row[7] == "-" for row in rows):
        footer.append("-: not counted, since it runs on boxes or could not be traced")
    attention = _attention(model)
    return "\n".join(
        [*_aligned([HEADINGS, *rows]), *(["", *_aligned(attention, left=1)] if attention else []), *footer]
    )


def _attention(model: nn.Module) -> list[tuple[str, ...]]:
    """The table of attention layers, headings first; empty where there are none."""
    rows = []
    for name, layer in model.named_modules():
        if isinstance(layer, MultiScaleDeformableAttention):
            samples = NEIGHBOURS * layer.num_levels * layer.num_points * layer.value_proj.out_features
            of_query = (layer.sampling_offsets, layer.attention_weights, layer.output_proj)
            rows.append(
                (
                    name,
                    *map(str, (layer.embed_dims, layer.num_heads, layer.num_levels, layer.num_points)),
                    f"{sum(parameter.numel() for parameter in layer.parameters()):,}",
                    f"{samples + sum(linear.weight.numel() for linear in of_query):,}",
                    f"{layer.value_proj.weight.numel():,}",
                )
            )
    return [ATTENTION_HEADINGS, *rows] if rows else []


class _CopiesResults(TorchFunctionMode):
    """Lets deepcopy copy tensors that autograd computed, such as the weight that weight_norm leaves in a module."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.__deepcopy__ and not args[0].is_leaf:
            return args[0].detach().to("meta")
        return func(*args, **(kwargs or {}))


def _trace(model: nn.Module, shape: tuple[int, int]) -> dict:
    """Multiply-adds of each convolution, and of the samples that a deformable one takes, for one image."""
    flops: dict[Any, int] = defaultdict(int)

    def count(conv, inputs, output):
        small = inputs[0] if isinstance(conv, _ConvTransposeNd) else output
        flops[conv] += product(conv.weight.shape, small.shape)
        if isinstance(conv, (DeformConv2d, ModulatedDeformConv2d)):
            flops[conv, "sampling"] += sampling(inputs[0].shape, conv.weight.shape, output.shape)

    model = model.to("meta").eval() or model  # meta: shapes alone, nothing is computed; mmdet's ResNet.eval gives None
    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, _ConvNd)]
    images = torch.empty(1, 3, *shape, device="meta")
    try:
        maps = _attempt(getattr(model, "extract_feat", model), images)
        for path in DENSE_HEADS:
            head: Any = model
            for part in path.split("."):
                head = getattr(head, part, None)
            if isinstance(head, nn.Module) and maps is not None:
                _attempt(head, maps)
    finally:
        for hook in hooks:
            hook.remove()
    return flops


def _attempt(function: Callable, inputs):
    try:
        with torch.no_grad():
            return function(inputs)
    except Exception:  # of any kind: what was reached is counted, the rest is marked
        return None


def _kind(conv: nn.Module) -> str:
    """The name that configs have for a class, where there is one."""
    return next((name for name, kind in KINDS.items() if type(conv) is kind), type(conv).__name__)


def _details(conv: Any) -> str:
    details = [f"stride {conv.stride[0]}"] if max(conv.stride) > 1 else []
    if max(conv.dilation) > 1:
        details.append(f"dilation {conv.dilation[0]}")
    if conv.groups > 1:
        details.append("depthwise" if conv.groups == conv.in_channels else f"groups {conv.groups}")
    if isinstance(conv, _ConvTransposeNd):
        details.append("transposed")
    if not conv.weight.requires_grad:
        details.append("frozen")
    return ", ".join(details)


def _giga(flops: int | None) -> str:
    return "-" if flops is None else f"{flops / 1e9:.2f} G"


def _aligned(rows: list[tuple[str, ...]], left: int = len(HEADINGS) - 3) -> list[str]:
    """Columns, the first ``left`` of them to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            if width
        ).rstrip()
        for row in rows
    ]
