"""``python -m dcn_plugin visualize CONFIG CHECKPOINT IMAGE...``: pictures of what deformable layers learned."""

import argparse
import glob
from pathlib import Path
from typing import TYPE_CHECKING

from dcn_plugin.targets import listed

from . import _config

if TYPE_CHECKING:
    from mmengine.config import Config
    from mmengine.model import BaseModel

    from dcn_plugin.visualize.scene import Scene

DESCRIPTION = """\
Draws what the deformable layers of a model do with images, and writes for each IMAGE into DIR:

  IMAGE_points.png           the samples of output positions, composed over the last layers
  IMAGE_attention.png        the samples of queries, where the model has deformable attention, a colour a head
  IMAGE_receptive_field.png  what reaches these positions, with the offsets off and on
  IMAGE_rois.png             straight and moved bins of RoIs, where the model pools deformably
  IMAGE_offsets_LAYER.png    a layer's offset field and mask
  table.txt                  how far each layer reaches, over all images; printed, too
  IMAGE_points.gif           with --gif

Positions are the centres of a small, a middling and a large detection, and layers the last one of each stride, and the
last attention of an encoder and of a decoder, unless --at and --layers say which."""
EXAMPLES = """\
examples:
  python -m dcn_plugin visualize config.py epoch_12.pth image.jpg --out-dir pictures
  python -m dcn_plugin visualize config.py epoch_12.pth *.jpg --what points table --svg
  python -m dcn_plugin visualize config.py epoch_12.pth image.jpg --at 40,60 --at 200,60 --gif
  python -m dcn_plugin visualize config.py epoch_12.pth image.jpg --gif --checkpoints 'epoch_*.pth'"""
GIF_DPI = 100
KINDS = "points", "attention", "receptive_field", "rois", "offsets", "table"


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "visualize",
        help="draw what the deformable layers of a trained model learned",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("config", metavar="CONFIG", help="a file, or a package's config such as mmdet::fcos/...")
    add("checkpoint", metavar="CHECKPOINT", help="a file or URL")
    add("images", metavar="IMAGE", nargs="+", help="files")
    add("--out-dir", metavar="DIR", default="visualized", help="where to write (default: %(default)s)")
    add("--what", nargs="+", choices=KINDS, default=KINDS, metavar="KIND", help=f"of {', '.join(KINDS)}; default: all")
    add("--at", action="append", default=[], type=_place, metavar="X,Y", help="a position in the image; repeatable")
    add("--score-thr", type=float, default=0.3, help="detections below it are left out (default: %(default)s)")
    add("--layers", action="append", default=[], metavar="GLOB", help="layers by name, such as 'backbone.layer4.*'")
    add("--last", type=int, default=3, metavar="K", help="compose the points over so many layers (default: 3)")
    add("--svg", action="store_true", help="write SVG files too")
    add("--device", default="cpu", help="default: %(default)s")
    _config.add_options(parser)
    add = parser.add_argument_group("animation").add_argument
    add("--gif", action="store_true", help="animate the points along the line through all --at, or over --checkpoints")
    add("--checkpoints", nargs="+", default=[], metavar="FILE", help="of one training, files or patterns")
    add("--frames", type=int, default=24, help="along a line (default: %(default)s)")
    parser.set_defaults(run=run)


def _place(text: str) -> tuple[float, float]:
    try:
        x, y = map(float, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"a position is X,Y in pixels, got {text!r}") from None
    return x, y


def run(args: argparse.Namespace) -> None:
    missing = [image for image in args.images if not Path(image).is_file()]
    if missing:
        raise FileNotFoundError(f"{listed(missing)}: no such file")
    if args.last < 1 or args.frames < 2:
        raise ValueError("--last must be at least 1 and --frames at least 2")
    if args.checkpoints and not args.gif:
        raise ValueError("--checkpoints are for --gif")
    config = _config.load(args.config, _config.parsed(args.cfg_options))
    from dcn_plugin.visualize import drawing
    from dcn_plugin.visualize.scene import see
    from dcn_plugin.visualize.statistics import Table

    model, pipeline = _config.build(config), _pipeline(config)
    _load(model, args.checkpoint, args.device)
    out = Path(args.out_dir)
    out.mkdir(parents=True, exist_ok=True)

    table = Table()
    for image in args.images:
        data = pipeline(dict(img_path=image, img_id=0))
        scene = see(model, data, args.score_thr)
        if scene.recording.empty:
            raise ValueError("the model ran no deformable layer")
        for name, figure in drawing.figures(scene, args.layers, args.last, args.at, args.what):
            for suffix in (".png", ".svg") if args.svg else (".png",):
                drawing.save(figure, out / f"{name}{suffix}")
                print(out / f"{name}{suffix}", flush=True)
        if args.gif and scene.recording.chosen(args.layers):
            frames = _over_checkpoints(args, model, data) if args.checkpoints else _along_line(args, scene)
            _animate(frames, out / f"{scene.name}_points.gif")
            print(out / f"{scene.name}_points.gif", flush=True)
        table.add(scene.recording, scene.boxes, scene.frame.scale, scene.frame.to_image)
    if "table" in args.what:
        (out / "table.txt").write_text(f"{table}\n")
        print(f"{out / 'table.txt'}\n\n{table}")


def _pipeline(config: "Config"):
    from mmengine.dataset import Compose

    dataset = (config.get("test_dataloader") or {}).get("dataset")
    while dataset and "pipeline" not in dataset:  # of a dataset that wraps others
        dataset = dataset.get("dataset") or next(iter(dataset.get("datasets", ())), None)
    if not dataset:
        raise ValueError("the config's test_dataloader has no pipeline")
    return Compose(dataset.pipeline)


def _load(model: "BaseModel", checkpoint: str, device: str) -> None:
    from mmengine.runner.checkpoint import _load_checkpoint_to_model

    loaded = _config.read_checkpoint(checkpoint)
    names = {name.removeprefix("module.") for name in loaded.get("state_dict", loaded)}
    if names.isdisjoint(model.state_dict()):
        raise ValueError(f"{checkpoint} is a checkpoint of another model: it has no tensor of this config's model")
    _load_checkpoint_to_model(model, loaded)
    meta = (loaded.get("meta") or {}).get("dataset_meta") or {}
    model.dataset_meta = {key.lower(): value for key, value in meta.items()}
    model.to(device).eval()


def _along_line(args, scene: "Scene"):
    """Frames for positions at equal distances along the line through all places, or across the image through one."""
    import numpy as np

    from dcn_plugin.visualize import drawing

    places = args.at or scene.default_places(3)
    if len(places) == 1:
        places = [(0.0, places[0][1]), (scene.image.shape[1] - 1.0, places[0][1])]
    corners = np.array(places)
    along = np.concatenate([[0], np.hypot(*np.diff(corners, axis=0).T).cumsum()])
    layers = scene.recording.chosen(args.layers)
    for distance in np.linspace(0, along[-1], args.frames):
        place = tuple(float(np.interp(distance, along, corners[:, axis])) for axis in range(2))
        yield drawing.rendered(drawing.sampling_points_figure(scene, [place], layers, args.last), GIF_DPI)


def _over_checkpoints(args, model, data):
    """Frames for the checkpoints in the order of their numbers, at the places of the first picture."""
    import re

    from dcn_plugin.visualize import drawing
    from dcn_plugin.visualize.scene import see

    files = [file for pattern in args.checkpoints for file in (glob.glob(pattern) or [pattern])]
    files.sort(key=lambda file: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", file)])
    places = args.at or see(model, data, args.score_thr).default_places(3)
    for file in files:
        _load(model, file, args.device)
        scene = see(model, data, args.score_thr)
        layers = scene.recording.chosen(args.layers)
        figure = drawing.sampling_points_figure(scene, places, layers, args.last)
        figure.axes[0].set_ylabel(Path(file).stem)
        yield drawing.rendered(figure, GIF_DPI)
    _load(model, args.checkpoint, args.device)


def _animate(frames, path: Path) -> None:
    from PIL import Image

    # Of the palettes, the one that keeps rare colours, such as the position's.
    first, *others = (Image.fromarray(frame).quantize(256, Image.Quantize.MAXCOVERAGE) for frame in frames)
    first.save(path, save_all=True, append_images=others, duration=120 if len(others) > 15 else 600, loop=0)
