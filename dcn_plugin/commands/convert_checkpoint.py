"""``python -m dcn_plugin convert-checkpoint IN OUT``: other projects' checkpoints, for MMDetection and this package."""

import argparse
import re
from collections import OrderedDict
from collections.abc import Iterable
from difflib import get_close_matches
from fnmatch import fnmatchcase
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dcn_plugin import __version__
from dcn_plugin.checkpoints.files import load, save, state_dict_of
from dcn_plugin.checkpoints.formats import detect, names_of
from dcn_plugin.checkpoints.offsets import State, deformable_layers, merge_offsets
from dcn_plugin.targets import listed

from . import _config

DESCRIPTION = """\
Converts a checkpoint to MMDetection's names, with this package's layers 'DCN' and 'DCNv2' in it. IN is only read.

formats:
  torchvision    a ResNet of torchvision's (conv1, layer1.0.conv1, fc): the names stay, the classifier fc is left out
  detectron2     a ResNet, deformable or not (res3.0.conv2_offset), or a detector of detectron2's, .pth or .pkl
  mmdet          names stay, but for conv2_offset of old mmcv's, which becomes conv2.conv_offset
  deform_conv2d  any model around torchvision.ops.DeformConv2d: the convolutions that predict offsets and masks, named
                 by --offset-name and --mask-name, become conv_offset of the convolution they deform

A checkpoint of the plain model needs no conversion for a model made deformable by the key 'deformable': it loads as it
is, and the offsets start at zero."""
EXAMPLES = """\
examples:
  python -m dcn_plugin convert-checkpoint resnet50.pth backbone.pth --prefix backbone.
  python -m dcn_plugin convert-checkpoint model_final.pkl mmdet.pth --config my_config.py
  python -m dcn_plugin convert-checkpoint net.pth out.pth --offset-name '{}_offset' --mask-name '{}_mask'
  python -m dcn_plugin convert-checkpoint net.pth out.pth --offset-name offset_conv --mask-name modulator_conv \\
      --rename '\\.regular_conv\\.=.'"""
NOTES = {
    "torchvision": [
        "needs style='pytorch' and images in RGB with mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], as "
        "in mmdet's configs for torchvision://resnet50"
    ],
    "detectron2": [
        "bgr_to_rgb, mean and std of the data_preprocessor must be those of detectron2's INPUT.FORMAT, "
        "MODEL.PIXEL_MEAN and MODEL.PIXEL_STD (by default BGR, [103.53, 116.28, 123.675], [1, 1, 1])",
        "the backbone needs style='caffe' where RESNETS.STRIDE_IN_1X1 is True, else 'pytorch'",
        "an anchor_generator with several scales and ratios a level needs scale_major=False; RetinaNet's FPN "
        "add_extra_convs='on_input' (or as its IN_FEATURE was) and relu_before_extra_convs=True",
    ],
    "mmdet": [],
    "deform_conv2d": [
        "the convolutions that predict must have the stride, padding and dilation of the one they deform",
        "where the model multiplies the sigmoid of the mask by 2, DCNv2 needs mask_scale=2",
    ],
}
MODULATED = (
    "masks are a plain sigmoid, as with dcn=dict(type='DCNv2'); the key 'deformable' needs mask_scale=1 for that"
)


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "convert-checkpoint",
        help="convert a checkpoint of torchvision's, detectron2's or old mmcv's naming",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("source", metavar="IN", help="a .pth or .pkl file")
    add("target", metavar="OUT", help="the file to write")
    add("--format", choices=("auto", *NOTES), default="auto", help="of IN; by default, what its names say")
    add("--config", help="check that OUT loads into the model of this config")
    _config.add_options(parser)
    add("--force", action="store_true", help="overwrite OUT")
    add("--trust", action="store_true", help="read IN whatever it contains: runs code that is in it")
    add("--strip", default="", metavar="PREFIX", help="take this from the start of IN's names, first")
    add("--drop", action="append", default=[], metavar="GLOB", help="leave out these of IN's names")
    add("--prefix", default="", help="put this before the new names, such as 'backbone.'")
    add("--rename", action="append", default=[], metavar="REGEX=TEXT", help="change the new names further, last")
    add("-v", "--verbose", action="store_true", help="list every name")
    add = parser.add_argument_group("for deform_conv2d").add_argument
    add("--offset-name", metavar="NAME", help="such as 'offset_conv', or '{}_offset': {} is what it deforms")
    add("--mask-name", metavar="NAME", help="the same of the mask's convolution, if there is one")
    add("--conv-name", metavar="NAME", help="the same of the deformed convolution, where that is not clear")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    options = {name: value for name, value in vars(args).items() if name not in ("run", "cfg_options")}
    print(convert_checkpoint(**options, cfg_options=_config.parsed(args.cfg_options) if args.config else None))


def convert_checkpoint(
    source: str | Path,
    target: str | Path,
    format: str = "auto",
    *,
    config: str | None = None,
    cfg_options: dict | None = None,
    force: bool = False,
    trust: bool = False,
    strip: str = "",
    drop: Iterable[str] = (),
    prefix: str = "",
    rename: Iterable[str] = (),
    offset_name: str | None = None,
    mask_name: str | None = None,
    conv_name: str | None = None,
    verbose: bool = False,
) -> str:
    """Converts a checkpoint to MMDetection's names; the arguments are the command's.

    The source is only read. The target is written whole or not at all.

    Returns:
        What was done.

    Raises:
        FileNotFoundError: no source, or no folder for the target.
        ValueError: a source that cannot be read, names that the format does not have, two names that become one, a
            target that exists (without ``force``), tensors that do not fit the config's model.
    """
    source, target = Path(source), Path(target)
    if not source.is_file():
        raise FileNotFoundError(f"{source} is not a file")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{target.parent} is not a folder")
    if target.exists() and target.samefile(source):
        raise ValueError(f"{target} is the checkpoint to convert, which stays as it is")
    if target.exists() and not force:
        raise ValueError(f"{target} exists; --force overwrites it")

    if find_spec("mmengine"):
        import dcn_plugin.mmengine  # noqa: F401  so that torch.load reads what MMEngine's checkpoints contain
    checkpoint = load(source, trust)
    given, beside = state_dict_of(checkpoint, source)
    dropped = [name for name in given if any(fnmatchcase(name, glob) for glob in drop)]
    state, taken = _stripped({name: tensor for name, tensor in given.items() if name not in dropped}, strip)
    merged: list[str] = []
    if format == "auto":
        format = "deform_conv2d" if offset_name else detect(state)
    if format == "deform_conv2d":
        if not offset_name:
            raise ValueError("the format deform_conv2d needs --offset-name")
        state, merged = merge_offsets(state, offset_name, mask_name, conv_name)
    names = {name: name for name in state} if merged else names_of(format, state)
    names = {old: new if new is None else _renamed(prefix + new, rename) for old, new in names.items()}
    converted = _under(names, state)
    if format == "mmdet" and converted.keys() <= given.keys() and hasattr(given, "_metadata"):
        # The modules' versions, which some look at when they load.
        converted._metadata = given._metadata  # type: ignore[attr-defined]

    lines = [f"{source}: {format}, {len(given)} tensors"]
    show = (lambda names: "".join(f"\n  {name}" for name in names)) if verbose else (lambda names: listed(names, 4))
    for what, items in {
        "prefix taken away": [taken] if taken else [],
        "merged into conv_offset": [conv or "the model itself" for conv in merged],
        "renamed": [f"{old} -> {new}" for old, new in names.items() if new not in (None, old)],
        "kept": [old for old, new in names.items() if new == old],
        "left out": dropped + [old for old, new in names.items() if new is None],
        "left out beside the model": beside,
    }.items():
        lines += [f"{what}, {len(items)}: {show(items)}"] if items else []
    lines += _about_deformable(converted)
    lines += [f"note: {note}" for note in NOTES[format]]
    if format == "detectron2" and {"pixel_mean", "pixel_std"} <= state.keys():
        mean, std = ([f"{value:g}" for value in state[f"pixel_{kind}"].flatten()] for kind in ("mean", "std"))
        lines.append(f"note: its own PIXEL_MEAN is {', '.join(mean)}, its PIXEL_STD {', '.join(std)}")
    if config:
        lines += _check(config, cfg_options or {}, converted)

    meta = checkpoint.get("meta") if isinstance(checkpoint, dict) and format == "mmdet" else None
    meta = dict(meta) if isinstance(meta, dict) else {}
    meta["converted"] = dict(source=source.name, format=format, dcn_plugin=__version__)
    save(dict(meta=meta, state_dict=converted), target)
    return "\n".join([*lines, f"wrote {len(converted)} tensors to {target}"])


def _stripped(state: State, prefix: str) -> tuple[State, str]:
    """Without a prefix, and without those that wrappers of whole models put before it; and what was taken."""
    taken = ""
    for wrapper in ("module.", "_orig_mod.", "module."):
        if state and all(name.startswith(wrapper) for name in state):
            state, taken = {name.removeprefix(wrapper): tensor for name, tensor in state.items()}, taken + wrapper
    if prefix and not any(name.startswith(prefix) for name in state):
        near = get_close_matches(prefix, {name.partition(".")[0] + "." for name in state}, n=3, cutoff=0)
        raise ValueError(f"no name starts with {prefix!r} (--strip); nearest: {', '.join(near)}")
    return {name.removeprefix(prefix): tensor for name, tensor in state.items()}, taken + prefix


def _renamed(name: str, rules: Iterable[str]) -> str:
    for rule in rules:
        pattern, equals, text = rule.partition("=")
        if not equals:
            raise ValueError(f"--rename is REGEX=TEXT, got {rule!r}")
        try:
            name = re.sub(pattern, text, name)
        except re.error as error:
            raise ValueError(f"--rename {rule!r}: {error}") from error
    return name


def _under(names: dict[str, str | None], state: State) -> State:
    converted: State = OrderedDict()
    for old, new in names.items():
        if new in converted:
            other = next(name for name, its_new in names.items() if its_new == new)
            raise ValueError(f"{other} and {old} would both become {new}")
        if new is not None:
            converted[new] = state[old]
    if not converted:
        raise ValueError("nothing is left of the checkpoint")
    return converted


def _about_deformable(state: State) -> list[str]:
    layers = deformable_layers(state)
    if not layers:
        return ["deformable, 0: this is a plain model's; in a deformable one the offsets start at zero"]
    possible = {version for versions in layers.values() for version in versions}
    kinds = " or ".join(name for version, name in ((1, "DCN"), (2, "DCNv2")) if version in possible)
    names = listed([name or "the model itself" for name in layers], 4)
    lines = [f"deformable, {len(layers)}, {kinds or 'of no kind known here'}: {names}"]
    return lines + [f"note: {MODULATED}"] if 2 in possible else lines


def _check(config: str, cfg_options: dict, state: State) -> list[str]:
    """How a state dict fits a config's model.

    Raises:
        ValueError: it does not load, or none of it is the model's.
    """
    model: Any = _config.build(_config.load(config, cfg_options))
    where = "the model"
    if hasattr(model, "backbone") and not any(name.startswith("backbone.") for name in state):
        model, where = model.backbone, "the backbone"
    try:
        missing, unexpected = model.load_state_dict(OrderedDict(state), strict=False)
    except RuntimeError as error:
        raise ValueError(f"does not load into {where} of the config: {error}") from error
    if len(unexpected) == len(state):
        raise ValueError(f"none of the names is one of {where} of the config: {listed(unexpected, 4)}")
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]
    lines = [f"config: loads into {where}; missing {len(missing)}, unexpected {len(unexpected)}"]
    lines += [f"  missing: {listed(missing)}"] if missing else []
    for name in unexpected[:8]:
        near = get_close_matches(name, missing or model.state_dict(), n=1)
        lines.append(f"  unexpected: {name}" + (f" (nearest: {near[0]})" if near else ""))
    return lines + (["  ..."] if len(unexpected) > 8 else [])
