"""Makes convolutions of an existing model deformable, chosen by name and by what they are; needs torch alone."""

import inspect
import logging
import math
from collections.abc import Iterable
from difflib import get_close_matches
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .layers import DeformConv2dPack, ModulatedDeformConv2dPack
from .layers.old_offsets import rename_old_offsets
from .targets import PADS_ITSELF, Candidate, Options, candidates_of, choose, class_of, listed, name_of

KINDS = {"DCN": DeformConv2dPack, "DCNv2": ModulatedDeformConv2dPack}

logger = logging.getLogger("dcn_plugin")


def convert(
    module: nn.Module,
    type: str | type = "DCNv2",
    targets: str | Iterable[str] = "*",
    *,
    kernel_size: int | tuple[int, int] | None = None,
    stride: int | tuple[int, int] | None = None,
    depthwise: bool | None = None,
    min_channels: int = 0,
    last: int | None = None,
    **conv_kwargs,
) -> nn.Module:
    """Makes convolutions of a module deformable, in place.

    What the module computes stays the same until training moves the offsets; ``type='DCNv2'`` gets ``mask_scale=2``
    for that, so that its masks start at 1. Each chosen convolution changes its class and gains ``conv_offset``. It
    stays the same object: whoever shares it goes on sharing it, and its parameters, their ``requires_grad`` (which
    ``conv_offset`` takes over), dtype, device and memory format, its mode and its hooks stay as they are. A state dict
    from before the conversion loads; one line of the log 'dcn_plugin' then says which layers keep their offsets.

    A target is a glob on the names of submodules. It chooses, among the convolutions it matches and those inside the
    containers it matches, the 2D ones whose kernel is larger than 1x1, without the stem: what reads the image, that is
    has 3 input channels, or lies in a submodule named 'stem'. A target that is a convolution's full name chooses it
    even so. The options choose further.

    Args:
        module: the model or a part of it.
        type: 'DCN', 'DCNv2' or a subclass of these.
        targets: a pattern or several, such as 'layer3', 'layer4.*.conv2' or '*'.
        kernel_size: only convolutions of this kernel, as int or (h, w).
        stride: only convolutions of this stride, as int or (vertical, horizontal).
        depthwise: only depthwise convolutions, or only others; None takes both.
        min_channels: only convolutions of at least as many input and output channels.
        last: only the last so many, in the order of registration.
        conv_kwargs: further arguments of the deformable convolution: ``deform_groups``, ``mask_scale``, ``max_offset``.

    Returns:
        The module.

    Raises:
        ValueError: an unknown type or option; a target that matches nothing, names no convolution, names one that
            cannot be deformable (transposed, of another ``padding_mode``, of a class that computes something else) or
            of which the options leave nothing; a module that is distributed already. The module is then as before.
    """
    kind = _kind(type)
    _check_names(kind, conv_kwargs)
    if issubclass(kind, ModulatedDeformConv2dPack):
        conv_kwargs.setdefault("mask_scale", 2.0)
    _check_not_distributed(module)
    candidates = list(candidates_of(module))
    options = Options(kernel_size, stride, depthwise, min_channels)
    chosen = choose(module, candidates, targets, options)
    if last is not None:
        if not (isinstance(last, int) and 1 <= last <= len(chosen)):
            raise ValueError(f"last={last!r}, but {len(chosen)} convolutions of {name_of(module)} qualify")
        chosen = chosen[-last:]
    templates = [_template(kind, candidate, conv_kwargs) for candidate in chosen]  # all raise before anything changes
    for candidate, template in zip(chosen, templates, strict=True):
        _become(candidate.conv, template, candidate.pattern)
    _prepare_loading(module, chosen)
    unable = [c for c in candidates if c.pattern and c not in chosen and c.obstacle]
    frozen = [c for c in chosen if not c.conv.weight.requires_grad]
    logger.info(
        f"{name_of(module)}: {kind.__name__} in place of {len(chosen)} nn.Conv2d: {listed(c.names[0] for c in chosen)}"
        + (f"; frozen, and so their offsets: {listed(c.names[0] for c in frozen)}" if frozen else "")
        + (f"; could not: {listed(f'{c.names[0]} ({c.obstacle})' for c in unable)}" if unable else "")
    )
    return module


def _check_not_distributed(module: nn.Module) -> None:
    """New parameters would be nobody's: DistributedDataParallel and fully_shard look at a module when they wrap it."""
    wrapped = isinstance(module, nn.parallel.DistributedDataParallel)
    if wrapped or any(hasattr(parameter, "device_mesh") for parameter in module.parameters()):
        how = "wrapped in DistributedDataParallel" if wrapped else "sharded (its parameters are DTensors)"
        raise ValueError(f"{name_of(module)} is {how} already: convert first, and distribute what is converted")


def _kind(given: str | type) -> type:
    kind = KINDS.get(given) if isinstance(given, str) else given
    if not (isinstance(kind, type) and issubclass(kind, tuple(KINDS.values()))):
        raise ValueError(f"type of a deformable convolution must be {' or '.join(KINDS)}, or a subclass; got {given!r}")
    return kind


def _check_names(kind: type, conv_kwargs: dict) -> None:
    geometry = inspect.signature(nn.Conv2d).parameters  # the convolution's own, which stays
    initialisers = [vars(cls)["__init__"] for cls in kind.__mro__ if "__init__" in vars(cls) and cls is not object]
    arguments = {name for init in initialisers for name in inspect.signature(init).parameters}
    known = sorted(arguments - geometry.keys() - {"self", "args", "kwargs"})
    for name in conv_kwargs:
        if name in geometry:
            raise ValueError(f"{name!r} is no option: a convolution that becomes deformable keeps its own {name}")
        if name not in known:
            near = get_close_matches(
                name, [*(inspect.signature(convert).parameters.keys() - {"module", "conv_kwargs"}), *known]
            )
            raise ValueError(
                f"unknown option {name!r}; " + (f"nearest: {listed(near)}" if near else f"there are {listed(known)}")
            )


def _template(kind: type, candidate: Candidate, conv_kwargs: dict) -> nn.Module:
    """A deformable convolution of the same geometry; on no device, so that it costs nothing and draws nothing."""
    conv = candidate.conv
    try:
        return kind(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.groups,
            bias=conv.bias is not None,
            device="meta",
            dtype=conv.weight.dtype,
            **conv_kwargs,
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{candidate.names[0]} ({conv}) cannot become a {kind.__name__}: {error}") from error


def _become(conv: Any, template: Any, pattern: str | None) -> None:
    weight = conv.weight
    pads_itself = class_of(conv) in PADS_ITSELF
    conv.__class__ = type(template)
    conv.padding = template.padding
    conv.__dict__.update({name: value for name, value in vars(template).items() if name not in vars(conv)})
    conv.chosen_by = pattern

    offset = template.conv_offset.to_empty(device=weight.device)
    offset.reset_parameters()
    if not weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last):
        offset.to(memory_format=torch.channels_last)
    conv.conv_offset = offset.requires_grad_(weight.requires_grad).train(conv.training)
    if pads_itself:
        conv.register_forward_pre_hook(_pad_to_stride)


def _pad_to_stride(conv: Any, inputs: tuple[Tensor]) -> tuple[Tensor]:
    """Pads so that the output has ceil(size / stride) positions, the odd zero at the end: TensorFlow's 'SAME'."""
    x, pads = inputs[0], []
    for size, kernel, stride, dilation in zip(
        x.shape[:-3:-1], conv.kernel_size[::-1], conv.stride[::-1], conv.dilation[::-1], strict=True
    ):
        total = max((math.ceil(size / stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
        pads += [total // 2, total - total // 2]
    return (F.pad(x, pads) if any(pads) else x,)


def _prepare_loading(module: nn.Module, converted: list[Candidate]) -> None:
    containers: dict[str, list[str]] = {}  # the names of the converted layers in each
    for candidate in converted:
        candidate.conv.register_load_state_dict_pre_hook(_keep_offsets)
        for name in candidate.names:
            if name:
                rename_old_offsets(module.get_submodule(name.rpartition(".")[0]))
            parts = name.split(".") if name else []
            for end in range(len(parts)):
                containers.setdefault(".".join(parts[:end]), []).append(".".join(parts[end:]))
    for path, names in containers.items():
        module.get_submodule(path).register_load_state_dict_pre_hook(
            partial(_report_offsets, names=names, top=not path)
        )


def _keep_offsets(conv: Any, state_dict: dict, prefix: str, *_) -> None:
    """Completes the state dict of a layer from before its conversion by the offsets that the layer has."""
    if f"{prefix}weight" not in state_dict:
        return
    own = {f"{prefix}conv_offset.{key}": value for key, value in conv.conv_offset.named_parameters()}
    if not own.keys() & state_dict.keys():
        state_dict.update(own)
        if not prefix:
            _warn_of_kept(["conv_offset"])


def _report_offsets(module: nn.Module, state_dict: dict, prefix: str, *_, names: list[str], top: bool) -> None:
    """One line for all layers of a conversion whose offsets a state dict lacks, by what is loaded or was converted."""
    if prefix and not top:
        return
    paths = [f"{prefix}{name}" for name in names if f"{prefix}{name}.weight" in state_dict]
    offsets = (".conv_offset.weight", ".conv_offset.bias", "_offset.weight")  # the last of old checkpoints
    lacking = [f"{path}.conv_offset" for path in paths if not any(path + offset in state_dict for offset in offsets)]
    if lacking:
        _warn_of_kept(lacking)


def _warn_of_kept(offsets: list[str]) -> None:
    logger.warning(
        f"the checkpoint lacks the offsets of {len(offsets)} layers, which keep their own: {listed(offsets)}"
    )
