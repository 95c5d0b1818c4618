"""``python -m dcn_plugin test-exported CONFIG OUT``: mmdet's evaluation with an exported network in the model."""

import argparse
import tempfile
import time
from pathlib import Path

import torch

from . import _config

DESCRIPTION = """\
Runs mmdet's evaluation in one process with the detector in PyTorch and with each exported network in its place, the
rest (data, preprocessing, the head's boxes, NMS) being mmdet's each time. Prints the metrics of all and the images a
second of the networks alone, on as many threads each.
"""


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "test-exported", help="evaluate what export wrote, beside PyTorch", description=DESCRIPTION
    )
    add = parser.add_argument
    add("config", metavar="CONFIG", help="that of the export")
    add("exported", metavar="OUT", nargs="+", help="files that `export` wrote, with the .json beside each")
    _config.add_options(parser)
    add("--checkpoint", help="of the detector in PyTorch (default: what the .json names)")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    print(test_exported(args.config, args.exported, _config.parsed(args.cfg_options), args.checkpoint))


def test_exported(
    config: str, exported: list[str], cfg_options: dict | None = None, checkpoint: str | None = None
) -> str:
    """The table of metrics and speeds.

    Raises:
        ValueError: what is exported, its description or the checkpoint is not there; images larger than the network.
    """
    cfg = _config.load(config, cfg_options)

    from mmengine.registry import RUNNERS
    from mmengine.runner import Runner

    from dcn_plugin.deploy import description
    from dcn_plugin.deploy.formats import FORMATS
    from dcn_plugin.deploy.network import Network

    paths = [Path(one) for one in exported]
    descriptions = [description.read(path) for path in paths]
    for about in descriptions:
        FORMATS[about["format"]].check(*FORMATS[about["format"]].loaded_by)
    checkpoint = checkpoint or descriptions[0]["checkpoint"]
    if not Path(checkpoint).is_file():
        raise ValueError(f"{checkpoint}: no such checkpoint; --checkpoint FILE says where it is")
    with tempfile.TemporaryDirectory() as work_dir:
        cfg.work_dir, cfg.load_from, cfg.resume, cfg.log_level = work_dir, None, False, "WARNING"
        cfg.visualizer, cfg.experiment_name = None, Path(work_dir).name  # MMEngine keeps those of an earlier run
        kind = cfg.get("runner_type")
        runner = (RUNNERS.get(kind) if kind else Runner).from_cfg(cfg)
        _config.load_weights(runner.model, checkpoint)
        network = Network(runner.model)
        results = {"PyTorch": _evaluate(runner, network, network)}
        for path, about in zip(paths, descriptions, strict=True):
            run = FORMATS[about["format"]].load(path, torch.get_num_threads())
            wrapped = Network(runner.model, normalize=about["input"]["mean"] is None and network.mean is not None)
            results[f"{path.name} ({about['format']})"] = _evaluate(runner, wrapped, _sized(run, wrapped, about, path))
    return _table(results)


class _Timed:
    """A network whose images and seconds are counted; the first call, which sets things up, is not."""

    def __init__(self, run):
        self.run, self.images, self.seconds, self.warm = run, 0, 0.0, False

    @torch.no_grad()
    def __call__(self, images):
        if not self.warm:
            self.run(images)
            self.warm = True
        start = time.perf_counter()
        outputs = self.run(images)
        self.seconds += time.perf_counter() - start
        self.images += len(images)
        return outputs


def _evaluate(runner, network, run) -> dict:
    timed = _Timed(run)
    with network.replaced_by(timed):
        metrics = runner.test()
    return {"images/s": timed.images / timed.seconds, **metrics}


def _sized(run, network, about: dict, path: Path):
    """A network of one size made to take batches of normalised images of at most that size."""
    from dcn_plugin.deploy.network import fit

    shape, dtype = about["input"]["shape"], getattr(torch, about["input"]["dtype"])

    def sized(images):
        size = images.shape[-2:]
        if isinstance(shape[0], str):
            target, batch = [-(-length // 32) * 32 for length in size], len(images)
        else:
            target, batch = shape[2:], shape[0]
        if any(length > limit for length, limit in zip(size, target, strict=True)):
            raise ValueError(
                f"{path} takes images of {target[0]}x{target[1]}, and the test set has one of {size[0]}x{size[1]}: "
                "export with --dynamic, or a larger --shape"
            )
        images = network.as_input(fit(images, target)).to(dtype)
        outputs = []
        for part in images.split(batch):
            missing = batch - len(part)
            part = torch.cat([part, part[-1:].expand(missing, *part.shape[1:])]) if missing else part
            outputs.append([one[: batch - missing] for one in run(part)])
        return [torch.cat(pieces).float() for pieces in zip(*outputs, strict=True)]

    return sized


def _table(results: dict[str, dict]) -> str:
    names = list({name: None for metrics in results.values() for name in metrics})
    width = max(map(len, [*results, "network"]))
    lines = [f"{'network':{width}}  " + "  ".join(names)]
    for network, metrics in results.items():
        values = {name: metrics.get(name, float("nan")) for name in names}  # mmdet has none where nothing is found
        cells = (f"{value:.1f}" if name == "images/s" else f"{value:.4f}" for name, value in values.items())
        lines.append(f"{network:{width}}  " + "  ".join(c.rjust(len(n)) for c, n in zip(cells, names, strict=True)))
    return "\n".join(lines)
