"""``python -m dcn_plugin inspect CONFIG``: which convolutions of a config are deformable, what that costs, and its
deformable attention."""

from typing import TYPE_CHECKING

from dcn_plugin.describe import describe

from . import _config

if TYPE_CHECKING:
    from mmengine.config import Config

FLOORS = "dcn_plugin.mmdet", "dcn_plugin.mmengine"
NOTE = """
note: this config does not import dcn_plugin.mmdet{instead}. Training needs \
custom_imports=dict(imports=['dcn_plugin.mmdet']) in the file, or --cfg-options runner_type=dcn_plugin.mmdet.Runner"""


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "inspect",
        help="list the spatial convolutions of a config",
        description="Lists every spatial convolution of a config's model: whether it is deformable, which target of "
        "`deformable=` chose it, and its parameters and FLOPs (multiply-adds); and each layer of multi-scale "
        "deformable attention, with its FLOPs for a query and for a pixel of its maps. Loads no weights. For a model "
        "in Python there is dcn_plugin.describe.",
    )
    parser.add_argument(
        "config", help="a file, or a package's config such as mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py"
    )
    _config.add_options(parser)
    parser.add_argument(
        "--shape",
        nargs=2,
        type=int,
        metavar=("HEIGHT", "WIDTH"),
        help="of the image (default: that of the config's test pipeline, or 800 1216)",
    )
    parser.set_defaults(run=run)


def run(args) -> None:
    config = _config.load(args.config, _config.parsed(args.cfg_options))
    print(inspect(config, tuple(args.shape) if args.shape else None))


def inspect(config: "Config", shape: tuple[int, int] | None = None) -> str:
    """The table for a config's model and images of a shape (height, width)."""
    model = _config.build(config)
    table = describe(model, shape or _config.image_size(config) or (800, 1216))
    imports = (config.get("custom_imports") or {}).get("imports") or []
    named = [*([imports] if isinstance(imports, str) else imports), config.get("runner_type") or ""]
    if any(hasattr(m, "chosen_by") for m in model.modules()) and not any(one.startswith(FLOORS) for one in named):
        table += NOTE.format(instead=", but dcn_plugin, which registers nothing" if "dcn_plugin" in named else "")
    return table
