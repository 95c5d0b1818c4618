"""Trains and tests a deformable detector on handwritten digits with mmdet's own tools, and shows what it found.

Makes the data set, runs the tools/train.py and tools/test.py that mmdet ships inside its package, and prints the COCO
metrics and where the pictures of the detections are. What is done already is skipped.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import cv2
import mmdet
import numpy as np

HERE = Path(__file__).parent
TOOLS = Path(mmdet.__file__).parent / ".mim" / "tools"


def run(what, *command):
    """Runs a command whose output the user sees; the demo ends where it fails."""
    print(f"==> {what}\n    {' '.join(map(str, command))}", flush=True)
    start = time.monotonic()
    if subprocess.run([sys.executable, *map(str, command)]).returncode:
        sys.exit(f"error: {what}: the command above failed; its output says why")
    print(f"    done in {time.monotonic() - start:.0f} s", flush=True)


def trained(work_dir, config):
    """The checkpoint of a finished training with this very config, or None."""
    record = work_dir / "trained.json"
    if not record.exists():
        return None
    content = json.loads(record.read_text())
    checkpoint = Path(content["checkpoint"])
    return checkpoint if content["config"] == config.read_text() and checkpoint.exists() else None


def train(work_dir, config):
    run("Training (5 minutes on two cores; mmdet's tools/train.py)", TOOLS / "train.py", config, "--work-dir", work_dir)
    checkpoint = Path((work_dir / "last_checkpoint").read_text())
    record = dict(config=config.read_text(), checkpoint=str(checkpoint))
    (work_dir / "trained.json").write_text(json.dumps(record))
    return checkpoint


def test(work_dir, config, checkpoint):
    """Tests the checkpoint; returns mmdet's metrics and the folder of pictures, the truth beside what was found."""
    out = work_dir / "test"
    shutil.rmtree(out, ignore_errors=True)
    run(
        "Testing the checkpoint (half a minute; mmdet's tools/test.py)",
        *(TOOLS / "test.py", config, checkpoint, "--work-dir", out, "--show-dir", "pictures"),
        *("--cfg-options", "default_hooks.visualization.score_thr=0.25"),
    )
    metrics = json.loads(next(out.glob("*/*.json")).read_text())
    return metrics, next(out.glob("*/pictures"))


def contact_sheet(pictures, sheet, columns=4, rows=2):
    """Puts the detections of a few pictures side by side."""
    found = [cv2.imread(str(p)) for p in sorted(pictures.rglob("*.jpg"))[: columns * rows]]
    found = [image[:, image.shape[1] // 2 :] for image in found]  # the right half; the truth is on the left
    grid = [np.hstack(found[i : i + columns]) for i in range(0, len(found), columns)]
    cv2.imwrite(str(sheet), np.vstack(grid), [cv2.IMWRITE_JPEG_QUALITY, 88])


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="config of the detector")
    parser.add_argument("--work-dir", type=Path, required=True, help="folder for checkpoints, logs and pictures")
    parser.add_argument("--force", action="store_true", help="train again where a trained detector is there already")
    return parser.parse_args()


def main():
    args = parse_args()
    run("Making the data set (15 s)", HERE / "make_dataset.py")
    checkpoint = None if args.force else trained(args.work_dir, args.config)
    if checkpoint:
        print(f"==> Trained already: {checkpoint} (FORCE=1 trains again)")
    else:
        checkpoint = train(args.work_dir, args.config)
    metrics, pictures = test(args.work_dir, args.config, checkpoint)
    sheet = args.work_dir / "detections.jpg"
    contact_sheet(pictures, sheet)
    print(f"\ncheckpoint  {checkpoint}")
    print(f"pictures    {pictures} (truth left, detections right)")
    print(f"a few       {sheet}")
    print(f"AP          {metrics['coco/bbox_mAP']:.3f}")
    print(f"AP50        {metrics['coco/bbox_mAP_50']:.3f}")


if __name__ == "__main__":
    main()
