"""Trains and tests a deformable detector on handwritten digits with mmdet's own tools, and shows what it found.

Makes the data set, runs the tools/train.py and tools/test.py that mmdet ships inside its package, and prints the COCO
metrics and where the pictures of the detections are. A config with ``load_from`` is the difference of a detector to the
one that is trained first, its ``_base_``. What is done already is skipped, and an interrupted training goes on from its
last epoch.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
from mmengine.config import Config

import dcn_plugin.mmengine  # noqa: F401  finds configs of packages with any setuptools

HERE = Path(__file__).parent
# What compare.py measured, of this config's detector and others.
RECORDED, COMPARED = HERE / "results.json", "fcos_r18-dcnv2_deformed-digits"
KINDS = {"data/digits": "regular", "data/deformed-digits": "deformed"}
TOOL = ("-m", "dcn_plugin.mmdet")  # finds mmdet's tools, and runs them where mmcv is mmcv-lite too
# OpenMP's threads spin while they wait: beside one busy process a training then takes ten times as long.
ENVIRONMENT = {"OMP_WAIT_POLICY": "passive", **os.environ}
ITERATION = re.compile(r"Epoch\(train\)\s+\[(\d+)\]\[\s*(\d+)/(\d+)\].*?eta: ([\d:]+).*?\sloss: ([\d.]+)")


class Progress:
    """Turns the lines of a training's log into a few of epoch, loss and time left."""

    def __init__(self, epochs, lines=8):
        self.epochs, self.lines, self.shown = epochs, lines, -1

    def __call__(self, line):
        found = ITERATION.search(line)
        if found is None:
            return None
        epoch, done, of = map(int, found.groups()[:3])
        share = (epoch - 1 + done / of) / self.epochs
        if int(share * self.lines) <= self.shown:
            return None
        self.shown = int(share * self.lines)
        return f"    epoch {epoch} of {self.epochs}, {share:4.0%}, loss {found[5]}, {found[4]} left"


def run(what, *command, log, verbose, progress=lambda line: None):
    """Runs a command, its output into a log; shows its progress, and the log's end where the command fails."""
    print(f"==> {what}", flush=True)
    start = time.monotonic()
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, *map(str, command)]
    with (
        open(log, "a") as file,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=ENVIRONMENT
        ) as process,
    ):
        file.write(f"$ {' '.join(command)}\n")
        for line in process.stdout:
            file.write(line)
            shown = line.rstrip() if verbose else progress(line)
            if shown:
                print(shown, flush=True)
    if process.returncode:
        print("".join(log.read_text().splitlines(keepends=True)[-20:]), file=sys.stderr)
        sys.exit(f"error: {what} failed; the whole output: {log}")
    print(f"    done in {time.monotonic() - start:.0f} s", flush=True)


def last_checkpoint(work_dir, text):
    """The checkpoint of a training with the config of this very text, finished or not, or None."""
    record, last = work_dir / "config.txt", work_dir / "last_checkpoint"
    if not (record.exists() and last.exists() and record.read_text() == text):
        return None
    checkpoint = Path(last.read_text())
    return checkpoint if checkpoint.exists() else None


def train(what, work_dir, path, load_from, force, **options):
    """The checkpoint of a config's last epoch, which is trained from ``load_from`` as far as that is not done yet."""
    config = load(path)
    text = f"{config.pretty_text}\nstart = {load_from and str(load_from)!r}\n"
    checkpoint = None if force else last_checkpoint(work_dir, text)
    if checkpoint and checkpoint.stem == f"epoch_{config.max_epochs}":
        print(f"==> Trained already: {checkpoint} (FORCE=1 trains again)")
        return checkpoint
    start = ["--resume"] if checkpoint else ["--cfg-options", f"load_from={load_from}"] if load_from else []
    if not checkpoint:
        (work_dir / "last_checkpoint").unlink(missing_ok=True)
        work_dir.mkdir(parents=True, exist_ok=True)
        (work_dir / "config.txt").write_text(text)
    run(
        f"{'Going on with' if checkpoint else 'Training'} {what} (mmdet's tools/train.py)",
        *(*TOOL, "tools/train.py", path, "--work-dir", work_dir, *start),
        progress=Progress(config.max_epochs),
        **options,
    )
    return Path((work_dir / "last_checkpoint").read_text())


def load(path):
    return Config.fromfile(path, import_custom_modules=False)


def test(work_dir, config, checkpoint, **options):
    """Tests the checkpoint; returns mmdet's metrics and the folder of pictures, the truth beside what was found."""
    out = work_dir / "test"
    shutil.rmtree(out, ignore_errors=True)
    run(
        "Testing the checkpoint (half a minute; mmdet's tools/test.py)",
        *(*TOOL, "tools/test.py", config, checkpoint, "--work-dir", out, "--show-dir", "pictures"),
        *("--cfg-options", "default_hooks.visualization.score_thr=0.25"),
        **options,
    )
    metrics = json.loads(next(out.glob("*/*.json")).read_text())
    return metrics, next(out.glob("*/pictures"))


def recorded(name):
    """AP of a detector that compare.py measured, "0.404 ± 0.003 (3 seeds)": mean and standard deviation."""
    found = [row["AP"] / 100 for row in json.loads(RECORDED.read_text())[name].values()]
    return f"{statistics.mean(found):.3f} ± {statistics.stdev(found):.3f} ({len(found)} seeds)"


def contact_sheet(pictures, sheet, columns=4, rows=2):
    """Puts the detections of a few pictures side by side."""
    found = [cv2.imread(str(p)) for p in sorted(pictures.rglob("*.jpg"))[: columns * rows]]
    found = [image[:, image.shape[1] // 2 :] for image in found]  # the right half; the truth is on the left
    found = [cv2.resize(image, (192, 192), interpolation=cv2.INTER_CUBIC) for image in found]
    grid = [np.hstack(found[i : i + columns]) for i in range(0, len(found), columns)]
    cv2.imwrite(str(sheet), np.vstack(grid), [cv2.IMWRITE_JPEG_QUALITY, 88])


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="config of the detector")
    parser.add_argument("--work-dir", type=Path, required=True, help="folder for checkpoints, logs and pictures")
    parser.add_argument("--force", action="store_true", help="train again where a trained detector is there already")
    parser.add_argument("--verbose", action="store_true", help="show all that mmdet's tools print")
    return parser.parse_args()


def main():
    args = parse_args()
    options = dict(log=args.work_dir / "demo.log", verbose=args.verbose)
    config, start = load(args.config), None
    data = config.data_root.rstrip("/")
    run("Making the data set (15 s)", HERE / "make_dataset.py", "--kind", KINDS[data], **options)
    if config.get("load_from"):
        base = args.config.parent / re.search(r'^_base_ = "(.+)"', args.config.read_text(), re.MULTILINE)[1]
        start = train(
            "the plain detector that it starts from", args.work_dir / "plain", base, None, args.force, **options
        )
    checkpoint = train("the deformable detector", args.work_dir, args.config, start, args.force, **options)
    metrics, pictures = test(args.work_dir, args.config, checkpoint, **options)
    sheet = args.work_dir / "detections.jpg"
    contact_sheet(pictures, sheet)
    points = args.work_dir / "visualized"
    run(
        "Drawing where it looks (15 s; python -m dcn_plugin visualize)",
        *("-m", "dcn_plugin", "visualize", args.config, checkpoint, f"{data}/val/00005.jpg"),
        *("--what", "points", "--out-dir", points),
        **options,
    )
    print(f"\ncheckpoint  {checkpoint}")
    print(f"log         {options['log']}")
    print(f"pictures    {pictures} (truth left, detections right)")
    print(f"a few       {sheet}")
    print(f"its samples {points / '00005_points.png'}")
    print(f"AP          {metrics['coco/bbox_mAP']:.3f}")
    print(f"AP50        {metrics['coco/bbox_mAP_50']:.3f}")
    if args.config.stem == COMPARED:
        print("\nRecorded by projects/digits/compare.py, at the same schedule:")
        print(f"  AP of detectors like this one           {recorded('DCNv2 c3-c4, tuned from plain')}")
        print(f"  AP of their twins without `deformable=` {recorded('plain, tuned from plain')}")


if __name__ == "__main__":
    main()
