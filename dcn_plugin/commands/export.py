"""``python -m dcn_plugin export CONFIG CHECKPOINT OUT``: a detector's network for other runtimes."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from . import _config

FORMATS = ("onnx", "openvino", "torch-export", "aoti")
SUFFIXES = {".onnx": "onnx", ".xml": "openvino", ".pt2": "torch-export"}
# Of an output's largest value: what sums in another order may differ by in float32 after some hundred layers, and the
# rounding of each layer to float16.
TOLERANCE = {"float32": 1e-3, "float16": 5e-2}

DESCRIPTION = """\
Writes the part of a detector of mmdet's that computes tensors from images (backbone, neck and dense head), and beside
it OUT.json: the input, the classes, the pipeline and what the head's post-processing needs. The written file is read
again and run on real images, and each output compared with PyTorch's. Where anything fails, nothing is written. Of a
two-stage detector backbone, neck and RPN are written; its roi_head stays in PyTorch.
"""


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "export", help="write a detector for ONNX Runtime, OpenVINO or C++", description=DESCRIPTION
    )
    add = parser.add_argument
    add("config", metavar="CONFIG", help="a file, or a package's config such as mmdet::fcos/...")
    add("checkpoint", metavar="CHECKPOINT", help="of that config")
    add("target", metavar="OUT", help="the file to write: .onnx, .xml (OpenVINO) or .pt2")
    add("--format", choices=FORMATS, help="by default what OUT's suffix says; .pt2 is torch-export")
    _config.add_options(parser)
    add(
        "--shape",
        nargs=2,
        type=int,
        metavar=("HEIGHT", "WIDTH"),
        help="of the images (default: that of the config's test pipeline)",
    )
    add("--batch", type=int, default=1, help="images at once, unless --dynamic (default: 1)")
    add(
        "--dynamic",
        action="store_true",
        help="any batch, and any height and width that are multiples of 32 from 160 on",
    )
    add("--dtype", choices=tuple(TOLERANCE), default="float32", help="of the weights and of what is computed")
    add("--normalize", action="store_true", help="include the normalisation: the input is BGR pixels, 0 to 255")
    add("--opset", type=int, default=20, help="of ONNX, 19 at least (default: 20)")
    add("--image", nargs="+", default=[], metavar="FILE", help="compare on these images, not the first of the test set")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    options = {name: value for name, value in vars(args).items() if name != "run"}
    options["cfg_options"] = _config.parsed(args.cfg_options)
    print(export(**options))


def export(
    config: str,
    checkpoint: str,
    target: str,
    format: str | None = None,
    cfg_options: dict | None = None,
    shape: tuple[int, int] | None = None,
    batch: int = 1,
    dynamic: bool = False,
    dtype: str = "float32",
    normalize: bool = False,
    opset: int = 20,
    image: Sequence[str] = (),
) -> str:
    """Writes a network and its description; returns the report.

    Raises:
        ValueError: a detector, a size or a target that does not fit; a layer that cannot be exported, named with its
            operator; outputs that deviate from PyTorch's. Nothing is written then.
        ImportError: what the format needs is not installed.
        OSError: a file cannot be read or written.
    """
    path = Path(target)
    format = format or SUFFIXES.get(path.suffix)
    if format is None:
        raise ValueError(f"{target}: a suffix of {', '.join(SUFFIXES)}, or --format, says what to write")
    if format == "onnx" and opset < 19:
        raise ValueError(f"a deformable convolution needs ONNX opset 19 or later, not {opset}")
    cfg = _config.load(config, cfg_options)

    from dcn_plugin.deploy import images as inputs
    from dcn_plugin.deploy.description import describe, description_of
    from dcn_plugin.deploy.formats import FORMATS as WRITERS
    from dcn_plugin.deploy.formats import Exported, written_together
    from dcn_plugin.deploy.network import Network

    if path.suffix != WRITERS[format].suffix:
        raise ValueError(f"{target}: a file of the format {format} ends in {WRITERS[format].suffix}")
    height, width = shape or _config.image_size(cfg) or _no_size(config)
    if dynamic and (height % 32 or width % 32 or min(height, width) < 160):
        raise ValueError(
            f"--dynamic needs a --shape of multiples of 32, 160 at least, to start from; got {height} {width}"
        )
    if not path.parent.is_dir():
        raise ValueError(f"{path.parent}: no such folder")
    WRITERS[format].check(*WRITERS[format].written_by, *WRITERS[format].loaded_by)
    detector = _config.build(cfg)
    network = Network(detector, normalize)
    _config.load_weights(detector, checkpoint)
    found = inputs.real_images(cfg, detector, list(image))
    sizes = [(batch, height, width)]
    if dynamic:
        sizes = [(2, height, width), (1, height + 64, width + 32)]
    batches = [network.as_input(one) for one in inputs.of_sizes(found, sizes)]
    with torch.no_grad():
        names = network.named(network.parts(inputs.of_sizes(found, sizes)[0]))
        expected = [network(one) for one in batches]

    network.to(getattr(torch, dtype))
    batches = [one.to(getattr(torch, dtype)) for one in batches]
    exported = Exported(network, batches[0], names, dynamic, opset)
    with written_together(path) as temporary:
        WRITERS[format].write(exported, temporary)
        run = WRITERS[format].load(temporary, torch.get_num_threads())
        outputs = [run(one) for one in batches]
        report = compare(names, expected, outputs, TOLERANCE[dtype])
        description = describe(cfg, checkpoint, format, network, batches[0], dynamic, names)
        description_of(temporary).write_text(json.dumps(description, indent=2) + "\n")
    noise = "noise, since no images of the config's test set are here (--image FILE)"
    where = f"{len(found)} images" if found else noise
    lines = [f"compared with PyTorch (float32) on {where}, sizes {', '.join('x'.join(map(str, s)) for s in sizes)}:"]
    lines += [report, f"wrote {path} ({path.stat().st_size / 2**20:.1f} MiB) and {description_of(path)}"]
    if network.two_stage:
        lines.append(f"{type(detector).__name__}: backbone, neck and rpn_head are in it; roi_head stays in PyTorch")
    if WRITERS[format].runs_our_library:
        lines.append(f"to run it, load {_library()} first (torch.ops.load_library, or dlopen in C++) and ship it along")
    return "\n".join(lines)


def compare(names: list[str], expected: list, outputs: list, tolerance: float) -> str:
    """A table of each output's largest deviation from PyTorch's.

    Raises:
        ValueError: one is larger than ``tolerance`` times the largest value of that output.
    """
    rows, wrong = [], []
    for i, name in enumerate(names):
        pairs = [(ours[i], theirs[i].float()) for ours, theirs in zip(expected, outputs, strict=True)]
        for ours, theirs in pairs:
            if ours.shape != theirs.shape:
                raise ValueError(f"{name}: {tuple(theirs.shape)} in place of {tuple(ours.shape)}; nothing was written")
        deviation, relative = (max(values) for values in zip(*(_deviation(*pair) for pair in pairs), strict=True))
        rows.append(f"  {name:24} {str(tuple(pairs[0][0].shape)):22} {deviation:.1e} ({relative:.1e} of the largest)")
        if relative > tolerance:
            wrong.append(name)
    if wrong:
        raise ValueError(
            f"{', '.join(wrong)} deviate from PyTorch's by more than {tolerance:g} of the largest value; nothing was "
            "written:\n" + "\n".join(rows)
        )
    return "\n".join(rows)


def _deviation(ours: torch.Tensor, theirs: torch.Tensor) -> tuple[float, float]:
    """The largest difference, and its share of the largest value; infinite where a number is missing."""
    difference = float((theirs - ours).abs().nan_to_num(nan=float("inf")).max())
    return difference, difference / max(float(ours.abs().max()), 1e-12)


def _no_size(config: str):
    raise ValueError(f"{config}: the test pipeline says no size of images: give --shape HEIGHT WIDTH")


def _library() -> Path:
    from dcn_plugin.ops._library import FOLDER

    return FOLDER / "_cpu.so"
