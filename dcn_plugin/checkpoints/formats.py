"""The names that other projects' checkpoints give to what MMDetection has too, and what those become."""

import re
from collections.abc import Callable
from difflib import get_close_matches
from typing import Any

from .offsets import State, versions_of

Names = dict[str, str | None]  # the new name of each old one; None is dropped

EXAMPLES = {
    "torchvision": "conv1.weight bn1.running_mean layer1.0.conv1.weight layer1.0.downsample.0.weight fc.weight",
    "detectron2": "backbone.bottom_up.stem.conv1.weight backbone.bottom_up.res3.0.conv2_offset.weight "
    "backbone.fpn_lateral2.weight res3.0.conv1.norm.weight stem.conv1.weight",
    "mmdet": "backbone.layer1.0.conv1.weight backbone.layer2.0.conv2.conv_offset.weight "
    "neck.lateral_convs.0.conv.weight bbox_head.fc_cls.weight",
}
_LEAF = r"(weight|bias|running_mean|running_var|num_batches_tracked)"
_TORCHVISION = rf"(conv1|bn1|layer[1-4]\.\d+\.(conv[123]|bn[123]|downsample\.[01]))\.{_LEAF}"
_DETECTRON2 = r"(backbone\.(bottom_up\.)?|roi_heads\.)?(stem\.conv1|res[2-5]\.\d+\.conv\d)\.weight"
# Other detectors, whose modules have some of mmdet's names: torchvision's, DETR's.
_FOREIGN = r"backbone\.(\d+\.)?(body|fpn)\.|rpn\.head\.|roi_heads\.box_head\.fc6\.|class_embed\."
_MMDET = r"(backbone|neck|rpn_head|bbox_head|roi_head|mask_head|panoptic_fusion_head|data_preprocessor)\."


class UnknownNames(ValueError):
    """A checkpoint holds names that its format does not have."""


def detect(state: State) -> str:
    """The format of a state dict: 'torchvision', 'detectron2' or 'mmdet'.

    Raises:
        UnknownNames: none of these.
    """
    if any(re.fullmatch(_DETECTRON2, name) for name in state):
        return "detectron2"
    if any(name.endswith(("conv_offset.weight", "conv2_offset.weight")) for name in state):
        return "mmdet"
    if any(re.fullmatch(r"layer[1-4]\.\d+\.conv[123]\.weight", name) for name in state):
        return "torchvision"
    if any(re.match(_MMDET, name) for name in state) and not any(re.match(_FOREIGN, name) for name in state):
        return "mmdet"
    examples = {example: kind for kind, names in EXAMPLES.items() for example in names.split()}
    lines = []
    for name in [name for name in state if name.endswith("weight")][:4] or list(state)[:4]:
        near = get_close_matches(name, examples, n=1, cutoff=0)
        lines.append(f"  {name}: the nearest is {examples[near[0]]}'s {near[0]}")
    caffe = any(re.match(r"res\d_\d+_branch", name) for name in state)
    lines.append("(Caffe2's names: detectron2 converts them)" if caffe else "(--strip takes a prefix away)")
    raise UnknownNames("the names are of no format known here; --format forces one:\n" + "\n".join(lines))


def names_of(kind: str, state: State) -> Names:
    """What a format's names become.

    Raises:
        UnknownNames: some are not this format's; the message has the nearest that are.
    """
    names, unknown = FORMATS[kind](state)
    if unknown:
        known = [name for name in names if name not in unknown] or EXAMPLES[kind].split()
        lines = [f"  {name}: the nearest is {get_close_matches(name, known, n=1, cutoff=0)[0]}" for name in unknown[:6]]
        lines += [f"  and {len(unknown) - 6} more"] if len(unknown) > 6 else []
        raise UnknownNames(
            f"{len(unknown)} of {len(state)} names are not {kind}'s (--drop GLOB leaves names out, --format mmdet keeps"
            " all as they are):\n" + "\n".join(lines)
        )
    return names


def _torchvision(state: State) -> tuple[Names, list[str]]:
    """A classifier; mmdet's ResNets have its names, without the fc."""
    names: Names = {name: None if name.startswith("fc.") else name for name in state}
    return names, [name for name, new in names.items() if new and not re.fullmatch(_TORCHVISION, name)]


def _mmdet(state: State) -> tuple[Names, list[str]]:
    """Names stay, but for those that old versions of mmcv gave offsets: 'conv2_offset' beside 'conv2'."""
    names: Names = {}
    for name in state:
        match = re.fullmatch(r"(.*[^.])_offset\.(weight|bias)", name)
        conv = state.get(f"{match[1]}.weight") if match else None
        offset = state.get(f"{match[1]}_offset.weight") if match else None
        old = conv is not None and offset is not None and versions_of(conv, offset)
        names[name] = f"{match[1]}.conv_offset.{match[2]}" if match and old else name
    return names, []


# A detectron2 module's name, and mmdet's; where it holds a norm, that one's name. Numbers are named by how they change.
_RESNET = [
    (r"stem\.conv1", "conv1", "{norm}1"),
    (r"res(?P<stage>\d)\.(?P<i>\d+)\.conv(?P<k>\d)", "layer{stage}.{i}.conv{k}", "layer{stage}.{i}.{norm}{k}"),
    (r"res(?P<stage>\d)\.(?P<i>\d+)\.conv2_offset", "layer{stage}.{i}.conv2.conv_offset", ""),
    (r"res(?P<stage>\d)\.(?P<i>\d+)\.shortcut", "layer{stage}.{i}.downsample.0", "layer{stage}.{i}.downsample.1"),
]
_CONV_MODULES = [
    (r"backbone\.fpn_lateral(?P<level>\d)", "neck.lateral_convs.{level}."),
    (r"backbone\.fpn_output(?P<level>\d)", "neck.fpn_convs.{level}."),
    (r"backbone\.top_block\.p(?P<level>\d)", "neck.fpn_convs.{level}."),
    (r"proposal_generator\.rpn_head\.conv\.conv(?P<i>\d)", "rpn_head.rpn_conv.{i}."),
    (r"roi_heads\.box_head\.(?P<head>\d\.|)conv(?P<nth>\d)", "roi_head.bbox_head.{head}shared_convs.{nth}."),
    (r"roi_heads\.mask_head\.mask_fcn(?P<nth>\d)", "roi_head.mask_head.convs.{nth}."),
    (r"head\.cls_subnet\.(?P<sub>\d+)", "bbox_head.cls_convs.{sub}."),
    (r"head\.bbox_subnet\.(?P<sub>\d+)", "bbox_head.reg_convs.{sub}."),
]
_LAYERS = [
    (r"proposal_generator\.rpn_head\.conv", "rpn_head.rpn_conv"),
    (r"proposal_generator\.rpn_head\.objectness_logits", "rpn_head.rpn_cls"),
    (r"proposal_generator\.rpn_head\.anchor_deltas", "rpn_head.rpn_reg"),
    (r"roi_heads\.box_head\.(?P<head>\d\.|)fc(?P<nth>\d)", "roi_head.bbox_head.{head}shared_fcs.{nth}"),
    (r"roi_heads\.box_predictor\.(?P<head>\d\.|)cls_score", "roi_head.bbox_head.{head}fc_cls"),
    (r"roi_heads\.box_predictor\.(?P<head>\d\.|)bbox_pred", "roi_head.bbox_head.{head}fc_reg"),
    (r"roi_heads\.mask_head\.deconv", "roi_head.mask_head.upsample"),
    (r"roi_heads\.mask_head\.predictor", "roi_head.mask_head.conv_logits"),
    (r"head\.cls_score", "bbox_head.retina_cls"),
    (r"head\.bbox_pred", "bbox_head.retina_reg"),
]
_PLACES = (("", ""), (r"backbone\.(?:bottom_up\.)?", "backbone."), (r"roi_heads\.", "roi_head.shared_head."))
_RULES = [
    *((old + module, new + name, norm and new + norm) for old, new in _PLACES for module, name, norm in _RESNET),
    *((module, f"{name}conv", f"{name}{{norm}}") for module, name in _CONV_MODULES),
    *((module, name, "") for module, name in _LAYERS),
]
_DROPPED = r"pixel_mean|pixel_std|.*anchor_generator\.cell_anchors\.\d+|(stem\.fc|linear)\.(weight|bias)"


def _detectron2(state: State) -> tuple[Names, list[str]]:
    levels = [int(level) for name in state for level in re.findall(r"^backbone\.fpn_lateral(\d)", name)]
    shifts = dict(stage=-1, nth=-1, level=-min(levels, default=0))
    # RetinaNet's subnets number their ReLUs too, and their norms, where they have any.
    normed = any(tensor.dim() == 1 and re.fullmatch(r"head\..*_subnet\.\d+\.weight", n) for n, tensor in state.items())

    def rename(name: str) -> str | None:
        module, _, leaf = name.rpartition(".")
        holder = module.removesuffix(".norm")
        norm = "bn" if f"{module}.running_mean" in state else "gn"
        for pattern, layer, its_norm in _RULES:
            match = re.fullmatch(pattern, holder)
            if not match or (holder != module and not its_norm):
                continue
            parts: dict[str, Any] = {
                k: int(v) + shifts.get(k, 0) if v.isdigit() else v for k, v in match.groupdict().items()
            }
            is_norm = holder != module
            if "sub" in parts:
                parts["sub"], place = divmod(parts["sub"], 3 if normed else 2)
                is_norm = place == 1
            return f"{(its_norm if is_norm else layer).format(norm=norm, **parts)}.{leaf}"
        return None

    names: Names = {name: rename(name) for name in state}
    return names, [name for name, new in names.items() if new is None and not re.fullmatch(_DROPPED, name)]


FORMATS: dict[str, Callable[[State], tuple[Names, list[str]]]] = {
    "torchvision": _torchvision,
    "detectron2": _detectron2,
    "mmdet": _mmdet,
}
