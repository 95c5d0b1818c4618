"""Where deformable convolution pays: the demo's detector, its plain twin, and others of equal cost. See README.md.

Trains each detector of ARMS from several seeds on the digits of make_dataset.py's kind "deformed", a thread each, and
writes the results, a table and a plot. What is there already is kept: an interrupted comparison goes on.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CONFIG = ROOT / "configs/digits/fcos_r18_deformed-digits.py"
TWO_STAGE = ROOT / "configs/digits/faster-rcnn_r18-deform-roi-align_deformed-digits.py"
SEMANTIC = ROOT / "configs/digits/semantic-fpn_r18-dcnv2_deformed-digits.py"
DATA = ROOT / "data/deformed-digits"
UPRIGHT = ROOT / "data/upright-digits"
SIZES = dict(small=(0, 24), medium=(24, 40), large=(40, 1e5))  # pixels, square root of a box's area
AP = ["AP", "AP50", "AP75", *(f"AP {size}" for size in SIZES)]
METRICS = [*AP, "mIoU"]
HEADINGS = {CONFIG: ("FCOS", AP), TWO_STAGE: ("Faster R-CNN", AP), SEMANTIC: ("semantic segmentation", ["mIoU"])}
SCRATCH, TWIN, DEMO = "plain", "plain, tuned from plain", "DCNv2 c3-c4, tuned from plain"


class Arm(NamedTuple):
    """A model as changes of a config, the arm to compare it with, and the one whose weights it starts from, if any.

    It is trained on ``data``, and tested on DATA.
    """

    options: dict[str, Any]
    twin: str | None = None
    start: str | None = None
    config: Path = CONFIG
    data: Path = DATA


def deformable(kind, *targets):
    return {"model.backbone.deformable": dict(type=kind, targets=list(targets))}


PLAIN = {"model.backbone.deformable": None}
DCNV2 = deformable("DCNv2", "layer2", "layer3")
FULL_RATE = {"optim_wrapper.paramwise_cfg.dcn_offset_lr_mult": 1.0}
DILATED = {"model.backbone.dilations": (1, 1, 2)}
WIDER = {"model.backbone.base_channels": 20, "model.backbone.stem_channels": 20, "model.bbox_head.in_channels": 80}
STRAIGHT = {
    "model.roi_head.bbox_roi_extractor.type": "SingleRoIExtractor",
    "model.roi_head.bbox_roi_extractor.roi_layer": dict(
        _delete_=True, type="RoIAlign", output_size=5, sampling_ratio=2, aligned=True
    ),
}
ARMS = {
    SCRATCH: Arm({}),
    "DCNv2 c3-c4": Arm(DCNV2, SCRATCH),
    "plain, dilated c4": Arm(DILATED, SCRATCH),
    "plain, wider": Arm(WIDER, SCRATCH),
    TWIN: Arm({}, start=SCRATCH),
    DEMO: Arm({**DCNV2, **FULL_RATE}, TWIN, start=SCRATCH),
    "DCNv2 c3-c4, offsets at a tenth of the rate, tuned from plain": Arm(DCNV2, TWIN, start=SCRATCH),
    "DCN c3-c4, offsets at a tenth of the rate, tuned from plain": Arm(
        deformable("DCN", "layer2", "layer3"), TWIN, start=SCRATCH
    ),
    "DCNv2 c4, tuned from plain": Arm({**deformable("DCNv2", "layer3"), **FULL_RATE}, TWIN, start=SCRATCH),
    "DCNv2 c2-c4, tuned from plain": Arm(
        {**deformable("DCNv2", "layer1", "layer2", "layer3"), **FULL_RATE}, TWIN, start=SCRATCH
    ),
    "plain, dilated c4, tuned from plain": Arm(DILATED, TWIN, start=SCRATCH),
    "plain, wider, tuned from plain, wider": Arm(WIDER, TWIN, start="plain, wider"),
    "plain, upright digits": Arm({}, data=UPRIGHT),
    "plain, upright digits, tuned": Arm({}, start="plain, upright digits", data=UPRIGHT),
    "DCNv2 c3-c4, upright digits, tuned": Arm(
        {**DCNV2, **FULL_RATE}, "plain, upright digits, tuned", start="plain, upright digits", data=UPRIGHT
    ),
    "RoI align": Arm(STRAIGHT, config=TWO_STAGE),
    "deformable RoI align": Arm({}, "RoI align", config=TWO_STAGE),
    "RoI align, tuned": Arm(STRAIGHT, start="RoI align", config=TWO_STAGE),
    "deformable RoI align, tuned from RoI align": Arm({}, "RoI align, tuned", start="RoI align", config=TWO_STAGE),
    "segmentation, plain": Arm(PLAIN, config=SEMANTIC),
    "segmentation, plain, dilated c4": Arm({**PLAIN, **DILATED}, "segmentation, plain", config=SEMANTIC),
    "segmentation, DCNv2 c3-c4": Arm(DCNV2, "segmentation, plain", config=SEMANTIC),
}


def configure(arm, seed, work_dir):
    from mmengine.config import Config

    config = Config.fromfile(arm.config)
    config.merge_from_dict(arm.options)
    config.work_dir = str(work_dir)
    config.visualizer.name = work_dir.name  # one of its own, of several trainings in a process
    config.randomness = dict(seed=seed)
    config.default_scope = "mmdet"
    config.train_cfg.val_interval = config.train_cfg.max_epochs
    config.default_hooks.checkpoint.interval = config.train_cfg.max_epochs
    config.custom_hooks = [dict(type="DeformOffsetHook", interval=100)]
    for loader in (config.train_dataloader, config.val_dataloader, config.test_dataloader):
        loader.update(num_workers=0, persistent_workers=False)
        loader.dataset.data_root = f"{DATA}/"
    config.train_dataloader.dataset.data_root = f"{arm.data}/"
    if arm.config != SEMANTIC:
        config.val_evaluator.update(ann_file=f"{DATA}/val.json", outfile_prefix=str(work_dir / "found"))
    return config


def train(name, seed, out):
    """The row of an arm and a seed; its log and checkpoint stay in a folder of ``out``."""
    work_dir = folder(out, name, seed)
    work_dir.mkdir(parents=True, exist_ok=True)
    with open(work_dir / "log.txt", "w") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        return _train(ARMS[name], seed, out, work_dir)


def _train(arm, seed, out, work_dir):
    import torch
    from mmengine.analysis import get_model_complexity_info
    from mmengine.hooks import Hook
    from mmengine.runner import Runner

    import dcn_plugin.mmdet  # noqa: F401  the config's types

    class Clock(Hook):
        """Processor time of the iterations, which other work on the machine prolongs less than that by the wall."""

        seconds: list = []

        def before_train_iter(self, *args, **kwargs):
            self.start = time.process_time()

        def after_train_iter(self, *args, **kwargs):
            self.seconds.append(time.process_time() - self.start)

    torch.set_num_threads(1)  # trainings run side by side
    config = configure(arm, seed, work_dir)
    config.load_from = (folder(out, arm.start, seed) / "last_checkpoint").read_text() if arm.start else None
    runner, clock = Runner.from_cfg(config), Clock()
    runner.register_hook(clock, priority="LOWEST")
    start = time.perf_counter()
    runner.train()
    size, macs = config.test_pipeline[2].scale, None
    model = runner.model.eval() or runner.model  # mmdet's ResNet.eval gives None
    if not hasattr(model, "roi_head"):  # whose cost depends on the boxes
        macs = get_model_complexity_info(model, (3, *size), show_table=False, show_arch=False)["flops"]
    scalars = Path(runner.visualizer.get_backend("LocalVisBackend")._scalar_save_file)
    lines = [json.loads(line) for line in scalars.read_text().splitlines()]
    found = work_dir / "found.bbox.json"
    return dict(
        **(evaluate(DATA / "val.json", found) if arm.config != SEMANTIC else dict(mIoU=lines[-1]["mIoU"])),
        parameters=sum(parameter.numel() for parameter in runner.model.parameters()),
        macs=macs,
        seconds=round(statistics.median(clock.seconds), 4),
        minutes=round((time.perf_counter() - start) / 60, 2),
        **curves(lines),
    )


def folder(out, name, seed):
    return out / f"{name.replace(' ', '-').replace(',', '')}-{seed}"


def curves(scalars):
    """The loss by iteration, and the last of what DeformOffsetHook says of each layer, from a run's scalars."""
    loss = [[one["step"], round(one["loss"], 4)] for one in scalars if "loss" in one]
    layers = {}
    for one in scalars:
        for name, value in one.items():
            kind, _, layer = name.partition("/")
            if kind in ("offset_mean", "offset_max", "offset_outside", "mask_mean"):
                layers.setdefault(layer, {})[kind] = round(value, 3)
    return dict(loss=loss, layers=layers)


def evaluate(truth, found):
    """AP by COCO's protocol in percent, but that small, medium and large are those of SIZES."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth = COCO(truth)
    evaluation = COCOeval(truth, truth.loadRes(str(found)), "bbox")
    evaluation.params.areaRng = [[0, 1e10], *([low**2, high**2] for low, high in SIZES.values())]
    evaluation.params.areaRngLbl = ["all", *SIZES]
    evaluation.evaluate()
    evaluation.accumulate()
    precision = evaluation.eval["precision"][..., -1]  # (IoU, recall, class, size), -1 where there is no truth

    def ap(of):
        return round(100 * float(of[of > -1].mean()), 2)

    aps = [precision[..., 0], precision[0, ..., 0], precision[5, ..., 0], *(precision[..., 1 + i] for i in range(3))]
    return dict(zip(AP, map(ap, aps), strict=True))


def summary(values, sign=""):
    """Mean and, of several, standard deviation."""
    return f"{statistics.mean(values):{sign}.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def table(results, heading, metrics):
    """A row for each model, in Markdown: mean and deviation over its seeds, their number, size and cost.

    What it has over its twin is a mean and a deviation of differences, each between two of one seed.
    """
    columns = ["seeds", *metrics, "over its twin", "parameters", "multiply-adds", "CPU seconds an iteration"]
    lines = [f"| {heading} | {' | '.join(columns)} |", "|:--|" + ":-:|" * len(columns)]
    for name, rows in results.items():
        first = next(iter(rows.values()))
        scores = [summary([row[metric] for row in rows.values()]) for metric in metrics]
        twins = results.get(ARMS[name].twin, {})
        gains = [row[metrics[0]] - twins[seed][metrics[0]] for seed, row in rows.items() if seed in twins]
        scores.append(summary(gains, sign="+") if gains else "")
        seconds = statistics.median(row["seconds"] for row in rows.values())
        macs = f"{first['macs'] / 1e6:.1f} M" if first["macs"] else ""
        cost = [f"{first['parameters'] / 1e3:.0f} k", macs, f"{seconds:.3f}"]
        lines.append(f"| {name} | {' | '.join([str(len(rows)), *scores, *cost])} |")
    return "\n".join(lines)


def layers_table(results):
    """Where the deformable layers of each detector ended up, mean over the seeds, in Markdown."""
    kinds = dict(offset_mean="mean offset", offset_max="largest", offset_outside="outside", mask_mean="mean mask")
    lines = [f"| detector | layer | {' | '.join(kinds.values())} |", "|:--|:--|" + ":-:|" * len(kinds)]
    for name, rows in results.items():
        every = [row["layers"] for row in rows.values()]
        for layer in every[0]:
            found = [[layers[layer][kind] for layers in every if kind in layers[layer]] for kind in kinds]
            cells = [f"{statistics.mean(values):.2f}" if values else "" for values in found]
            lines.append(f"| {name} | {layer.removeprefix('backbone.')} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(results, path):
    """AP over multiply-adds of what was tuned, and the loss of the demo's detector and of its twin, as SVG and PNG."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    style = {"svg.fonttype": "none", "svg.hashsalt": "dcn_plugin", "axes.spines.top": False, "axes.spines.right": False}
    with plt.rc_context(style):
        figure, (over, along) = plt.subplots(1, 2, figsize=(11, 4.2), width_ratios=(1, 1))
        tuned = {name: rows for name, rows in results.items() if ARMS[name].start and ARMS[name].data == DATA}
        for i, (name, rows) in enumerate(tuned.items()):
            mean, macs = statistics.mean(row["AP"] for row in rows.values()), next(iter(rows.values()))["macs"] / 1e6
            deviation = statistics.stdev(row["AP"] for row in rows.values()) if len(rows) > 1 else 0
            label = f"{name.split(', tuned')[0]} ({len(rows)})"
            marker = "o" if "DCN" in name else "s"
            over.errorbar(macs, mean, deviation, color=f"C{i}", marker=marker, linestyle="", capsize=3, label=label)
        for name, colour in ((TWIN, "#777777"), (DEMO, "#0072b2")):
            losses = zip(*(row["loss"] for row in results[name].values()), strict=True)
            points = [(one[0][0], statistics.mean(loss for _, loss in one)) for one in losses]
            # Without the first eighth, whose fall would dwarf the difference.
            shown = [point for point in smoothed(points) if point[0] > points[-1][0] / 8]
            along.plot(*zip(*shown, strict=True), color=colour, label=name)
        over.set(xlabel="multiply-adds of an image (M)", ylabel="AP")
        over.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1), title="tuned (seeds)")
        along.set(xlabel="iteration", ylabel="training loss")
        along.legend(frameon=False)
        for axis in (over, along):
            axis.grid(color="#e5e5e5", linewidth=0.7)
        figure.tight_layout()
        for suffix in ("svg", "png"):
            metadata = dict(Date=None) if suffix == "svg" else None
            figure.savefig(path.with_suffix(f".{suffix}"), facecolor="white", dpi=110, metadata=metadata)
        plt.close(figure)


def smoothed(points, over=10):
    """Means of so many successive (iteration, loss)."""
    windows = [points[max(0, i - over + 1) : i + 1] for i in range(len(points))]
    return [(window[-1][0], statistics.mean(loss for _, loss in window)) for window in windows]


def write(results, out):
    """The tables and the plot of results, beside them."""
    of = {config: {n: results[n] for n in ARMS if n in results and ARMS[n].config == config} for config in HEADINGS}
    tables = [table(rows, *HEADINGS[config]) for config, rows in of.items() if rows]
    if DEMO in results:
        tables.append(layers_table({DEMO: results[DEMO]}))
    (out / "table.md").write_text("\n\n".join(tables) + "\n")
    if {DEMO, TWIN} <= set(results):
        plot(of[CONFIG], out / "ap")


def missing(results, arms, seeds):
    """What is still to train, (arm, seed), seed by seed."""
    return [(name, seed) for seed in range(seeds) for name in arms if str(seed) not in results.get(name, {})]


def save(results, file):
    """As JSON, a line for each detector."""
    lines = [f"{json.dumps(name)}: {json.dumps(rows)}" for name, rows in results.items()]
    file.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "work_dirs/compare", help="folder of the results")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help="detectors to train")
    parser.add_argument("--seeds", type=int, default=3, help="how many (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="trainings side by side")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "results.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    for kind in ("deformed", "upright"):
        subprocess.run([sys.executable, HERE / "make_dataset.py", "--kind", kind], cwd=ROOT, check=True)
    todo, start, done = missing(results, args.arms, args.seeds), time.monotonic(), 0
    with ProcessPoolExecutor(args.workers, multiprocessing.get_context("spawn")) as pool:
        # What starts from another's weights waits for all the others.
        for chosen in ([one for one in todo if not ARMS[one[0]].start], [one for one in todo if ARMS[one[0]].start]):
            running = {pool.submit(train, *one, args.out): one for one in chosen}
            for future in as_completed(running):
                name, seed = running[future]
                row = future.result()
                results.setdefault(name, {})[str(seed)] = row
                save(results, file)
                done += 1
                left = (time.monotonic() - start) / done * (len(todo) - done) / 60
                scores = ", ".join(f"{metric} {row[metric]:.1f}" for metric in METRICS if metric in row)
                print(f"{done} of {len(todo)}: {name}, seed {seed}: {scores}; {left:.0f} minutes left", flush=True)
    write(results, args.out)
    print((args.out / "table.md").read_text())


if __name__ == "__main__":
    main()
