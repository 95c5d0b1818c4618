"""The convolutions in a state dict that predict offsets."""

import re
from difflib import get_close_matches

import torch
from torch import Tensor

State = dict[str, Tensor]


def versions_of(conv: Tensor, offset: Tensor) -> list[int]:
    """Which versions, 1 or 2, two convolutions' weights may be, if the second predicts what deforms the first."""
    if conv.dim() != 4 or offset.dim() != 4 or conv.shape[2:] != offset.shape[2:] or offset.shape[1] % conv.shape[1]:
        return []
    taps = conv.shape[2] * conv.shape[3]
    return [version for version in (1, 2) if offset.shape[0] % ((version + 1) * taps) == 0]


def deformable_layers(state: State) -> dict[str, list[int]]:
    """The deformable convolutions of a state dict with mmdet's names, and the versions that their shapes allow."""
    layers = {}
    for name, offset in state.items():
        layer = name.removesuffix("conv_offset.weight")
        if layer != name and f"{layer}weight" in state:
            layers[layer.removesuffix(".")] = versions_of(state[f"{layer}weight"], offset)
    return layers


def _key(module: str, name: str) -> str:
    return f"{module}.{name}" if module else name


def merge_offsets(
    state: State, offset_name: str, mask_name: str | None = None, conv_name: str | None = None
) -> tuple[State, list[str]]:
    """Merges convolutions that predict offsets and masks into the ``conv_offset`` of the convolution they deform.

    That is how users of ``torchvision.ops.DeformConv2d`` build the layers DCN and DCNv2: the order of the channels is
    the same.

    Args:
        state: a state dict.
        offset_name: the offset convolutions' name in the module that holds them, such as 'offset_conv' or '{}_offset',
            where '{}' is the name of the convolution that they deform.
        mask_name: the same of the mask convolutions, which the model follows by a sigmoid; None if there are none, or
            if the offset convolutions predict the masks too, after the offsets.
        conv_name: the same of the convolutions that are deformed. Not needed with '{}', where the holding module is
            itself the convolution, or where it holds but one.

    Returns:
        The state dict and the names of the deformed convolutions.

    Raises:
        ValueError: no module has the name; it is not clear which convolution is meant; shapes that do not fit together.
    """
    state = dict(state)
    own_name = re.escape(offset_name).replace(re.escape("{}"), "(?P<own>[^.]+)")
    pattern = re.compile(rf"(?P<parent>.*\.|){own_name}\.weight")
    matches = [match for match in map(pattern.fullmatch, state) if match]
    if not matches:
        lasts = {name.rpartition(".")[0].rpartition(".")[2] for name in state}
        near = get_close_matches(offset_name, lasts, n=3, cutoff=0.3)
        raise ValueError(f"no module is named {offset_name!r} (--offset-name); nearest: {', '.join(near) or 'none'}")
    convs = []
    for match in matches:
        parent, own = match["parent"], match.groupdict().get("own")
        predictors = [match[0].removesuffix(".weight")]
        if mask_name:
            predictors.append(parent + mask_name.replace("{}", own or ""))
        conv = own or conv_name
        convs.append(parent + conv if conv else _deformed_by(state, parent.removesuffix("."), predictors))
        _merge(state, convs[-1], predictors)
    return state, convs


def _deformed_by(state: State, holder: str, predictors: list[str]) -> str:
    if _key(holder, "weight") in state:
        return holder
    names = [name.removesuffix(".weight") for name, tensor in state.items() if tensor.dim() == 4]
    inside = [name for name in names if name.rpartition(".")[0] == holder and name not in predictors]
    if len(inside) != 1:
        raise ValueError(
            f"{predictors[0]} may deform {' or '.join(inside) or 'nothing beside it'}: say which by --conv-name, or by "
            "'{}' in --offset-name, as in '{}_offset'"
        )
    return inside[0]


def _merge(state: State, conv: str, predictors: list[str]) -> None:
    weights, biases = [], []
    for name in predictors:
        if f"{name}.weight" not in state:
            raise ValueError(f"{predictors[0]} predicts offsets of {conv}, but there is no {name} (--mask-name)")
        weights.append(state.pop(f"{name}.weight"))
        biases.append(state.pop(f"{name}.bias", weights[-1].new_zeros(len(weights[-1]))))
    shapes = [tuple(weight.shape) for weight in weights]
    deformed = state.get(_key(conv, "weight"))
    versions = []
    if deformed is not None and len({shape[1:] for shape in shapes}) == 1:
        versions = versions_of(deformed, torch.cat(weights))
    if not versions or len(weights) == 2 and (2 not in versions or shapes[0][0] != 2 * shapes[1][0]):
        raise ValueError(
            f"{' and '.join(predictors)} of {' and '.join(map(str, shapes))} cannot deform {conv} of "
            f"{'no shape' if deformed is None else tuple(deformed.shape)}: its kernel must be theirs, and they must "
            "have 2 and 1 channels for each deform group and tap"
        )
    state[_key(conv, "conv_offset.weight")] = torch.cat(weights)
    state[_key(conv, "conv_offset.bias")] = torch.cat(biases)
