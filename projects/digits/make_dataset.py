"""Makes a small detection data set: real handwritten digits in cluttered scenes, in COCO format, with masks.

The digits are scikit-learn's bundled ones (1797 real 8x8 scans). Each is enlarged, warped non-rigidly, rotated, scaled
and pasted into a scene of textures, strokes and fragments of digits. The train and val sets are made from disjoint
digits. The same arguments give the same bytes.
"""

import argparse
import json
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from sklearn.datasets import load_digits
from tqdm import tqdm

SUPERSAMPLED = 64  # pixels of an enlarged digit before it is warped
FIRST_FORMS = 516  # digits of the first four forms, whose writers filled in no other: see projects/scaled_digits
BACKGROUND = 10  # in the masks, where digits are 0 to 9


class Kind(NamedTuple):
    """How a data set's scenes are, and how its digits vary."""

    folder: str
    scenes: tuple[int, int]  # of the train and val set
    size: int  # pixels, both sides of a scene
    digits: tuple[int, int]  # to place in a scene, exclusive of the second
    strokes: tuple[int, int]  # likewise
    fragments: tuple[int, int]
    height: tuple[float, float]  # of a digit in pixels
    rotation: float  # radians, in both directions
    shear: float
    aspect: float  # share by which the width changes
    bend: float  # pixels of an enlarged digit
    light: bool  # digits on a dark background, or of any contrasting colour
    by_writer: bool  # val digits are by other people, or merely other digits


KINDS = {
    "regular": Kind(
        folder="data/digits",
        scenes=(1500, 200),
        size=192,
        digits=(3, 8),
        strokes=(2, 8),
        fragments=(2, 7),
        height=(20, 72),
        rotation=0.45,
        shear=0.2,
        aspect=0.2,
        bend=2.2,
        light=False,
        by_writer=False,
    ),
    "deformed": Kind(
        folder="data/deformed-digits",
        scenes=(1600, 400),
        size=96,
        digits=(2, 5),
        strokes=(0, 2),
        fragments=(0, 2),
        height=(16, 88),
        rotation=0.35,
        shear=0.3,
        aspect=0.3,
        bend=3.0,
        light=True,
        by_writer=True,
    ),
}
# The same scenes and writers, but its digits are as they were written, and of one size.
KINDS["upright"] = KINDS["deformed"]._replace(
    folder="data/upright-digits", height=(30, 30), rotation=0, shear=0, aspect=0, bend=0
)


def enlarge(scan):
    """An 8x8 scan of ink 0..16 to a smooth (64, 64) map of ink 0..1, with a margin for the warp."""
    ink = cv2.resize(np.pad(scan / 16.0, 3), (SUPERSAMPLED, SUPERSAMPLED), interpolation=cv2.INTER_CUBIC)
    return 1 / (1 + np.exp(-12 * (cv2.GaussianBlur(ink, (0, 0), 1.2) - 0.45)))


def warp(ink, height, kind, rng):
    """Rotates, shears, scales so that a digit is about ``height`` pixels tall, and bends."""
    angle, shear = rng.uniform(-kind.rotation, kind.rotation), rng.uniform(-kind.shear, kind.shear)
    scale = height / (SUPERSAMPLED * 8 / 14)
    side = int(np.ceil(SUPERSAMPLED * scale * 1.3))
    aspect = np.array([[rng.uniform(1 - kind.aspect, 1 + kind.aspect), shear], [0, 1]])
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    to_source = np.linalg.inv(turn @ aspect * scale)
    grid = np.stack(np.meshgrid(np.arange(side), np.arange(side)), -1) - (side - 1) / 2
    # A smooth random displacement, zero mean, of a few percent of the digit's size.
    bend = cv2.resize(rng.normal(size=(4, 4, 2)).astype(np.float32), (side, side), interpolation=cv2.INTER_CUBIC)
    source = grid @ to_source.T + (SUPERSAMPLED - 1) / 2 + kind.bend * bend
    return cv2.remap(ink.astype(np.float32), source.astype(np.float32), None, cv2.INTER_LINEAR)


def background(size, strokes, rng):
    """A smooth colour field with stripes, strokes and noise, (size, size, 3) in 0..1."""
    coarse = rng.uniform(0.1, 0.9, (3, 3, 3)).astype(np.float32)
    field = cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC)
    y, x = np.mgrid[:size, :size]
    direction, period = rng.uniform(0, np.pi), rng.uniform(6, 40)
    stripes = np.sin((x * np.cos(direction) + y * np.sin(direction)) * 2 * np.pi / period)
    field += rng.uniform(0, 0.12) * stripes[..., None]
    for _ in range(rng.integers(*strokes)):
        start, end = (tuple(int(v) for v in rng.integers(0, size, 2)) for _ in range(2))
        colour = tuple(float(v) for v in rng.uniform(0, 1, 3))
        if rng.random() < 0.5:
            cv2.line(field, start, end, colour, int(rng.integers(1, 5)), cv2.LINE_AA)
        else:
            axes = tuple(int(v) for v in rng.integers(5, 50, 2))
            cv2.ellipse(field, start, axes, float(rng.uniform(0, 180)), 0, float(rng.uniform(60, 360)), colour, 2)
    return field + rng.normal(0, rng.uniform(0.01, 0.05), field.shape)


def paste(image, ink, x, y, colour):
    """Blends ``colour`` into (H, W, C) where there is ink, its top left corner at (x, y), clipped to the image."""
    height, width = image.shape[:2]
    x0, y0 = max(x, 0), max(y, 0)
    x1, y1 = min(x + ink.shape[1], width), min(y + ink.shape[0], height)
    alpha = ink[y0 - y : y1 - y, x0 - x : x1 - x, None]
    image[y0:y1, x0:x1] = (1 - alpha) * image[y0:y1, x0:x1] + alpha * colour


def contrasting_colour(patch, light, rng):
    """A random colour whose brightness differs from the patch's mean by 0.35 at least, or is that much more."""
    while True:
        colour = rng.uniform(0, 1, 3)
        difference = colour.mean() - patch.mean()
        if (difference if light else abs(difference)) > 0.35:
            return colour


def overlap(a, b):
    """Intersection of two boxes (x1, y1, x2, y2) over the smaller one's area."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return max(width, 0) * max(height, 0) / min(areas)


def make_scene(scans, labels, kind, rng):
    """An image (size, size, 3) uint8, its objects as (label, (x1, y1, x2, y2)), and its mask (size, size) uint8."""
    size = kind.size
    image, mask = background(size, kind.strokes, rng), np.full((size, size, 1), BACKGROUND, np.uint8)
    for _ in range(rng.integers(*kind.fragments)):  # fragments: a corner of a digit is clutter, not an object
        ink = warp(enlarge(scans[rng.integers(len(scans))]), rng.uniform(20, 60), kind, rng)
        half = ink[: ink.shape[0] // 2, : ink.shape[1] // 2]
        paste(image, half, *(int(v) for v in rng.integers(0, size - 20, 2)), rng.uniform(0, 1, 3))
    if kind.light:
        image *= 0.5
    objects = []
    for _ in range(rng.integers(*kind.digits)):
        index = rng.integers(len(scans))
        ink = warp(enlarge(scans[index]), rng.uniform(*kind.height), kind, rng)
        rows, columns = np.where(ink.max(1) > 0.4)[0], np.where(ink.max(0) > 0.4)[0]
        if not len(rows) or not len(columns) or max(np.ptp(rows), np.ptp(columns)) >= size - 4:
            continue
        for _ in range(20):  # places that do not cover another digit
            x = int(rng.integers(-columns[0] + 2, size - columns[-1] - 2))
            y = int(rng.integers(-rows[0] + 2, size - rows[-1] - 2))
            box = [int(v) for v in (x + columns[0], y + rows[0], x + columns[-1] + 1, y + rows[-1] + 1)]
            if all(overlap(box, other) < 0.15 for _, other in objects):
                patch = image[box[1] : box[3], box[0] : box[2]]
                paste(image, ink, x, y, contrasting_colour(patch, kind.light, rng))
                paste(mask, ink > 0.4, x, y, labels[index])
                objects.append((int(labels[index]), box))
                break
    return (np.clip(image, 0, 1) * 255).astype(np.uint8), objects, mask[..., 0]


def write_split(out, name, count, scans, labels, kind, seed):
    """Writes ``count`` scenes to out/name/*.jpg, their masks beside them as PNG, their annotations to out/name.json."""
    (out / name).mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for number in tqdm(range(count), desc=f"{name} scenes", mininterval=1):
        image, objects, mask = make_scene(scans, labels, kind, np.random.default_rng([seed, number]))
        file = f"{number:05d}.jpg"
        cv2.imwrite(str(out / name / file), image, [cv2.IMWRITE_JPEG_QUALITY, 92])
        cv2.imwrite(str(out / name / file.replace("jpg", "png")), mask)
        images.append(dict(id=number, file_name=file, width=kind.size, height=kind.size))
        for label, (x1, y1, x2, y2) in objects:
            bbox = [x1, y1, x2 - x1, y2 - y1]
            annotations.append(
                dict(
                    id=len(annotations) + 1,
                    image_id=number,
                    category_id=label,
                    bbox=bbox,
                    area=bbox[2] * bbox[3],
                    iscrowd=0,
                )
            )
    categories = [dict(id=digit, name=str(digit)) for digit in range(10)]
    content = dict(images=images, annotations=annotations, categories=categories)
    # Written last and at once: where this file is, the split is complete.
    unfinished = out / f"{name}.json.part"
    unfinished.write_text(json.dumps(content))
    unfinished.rename(out / f"{name}.json")


def split_digits(count, kind, seed):
    """Indices of the train and of the val digits."""
    if kind.by_writer:
        return np.arange(FIRST_FORMS, count), np.arange(FIRST_FORMS)
    order = np.random.default_rng(seed).permutation(count)
    return order[count // 5 :], order[: count // 5]


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=KINDS, default="regular", help="how digits vary (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="folder to write (default: the kind's)")
    parser.add_argument("--train", type=int, help="training scenes (default: the kind's number)")
    parser.add_argument("--val", type=int, help="validation scenes (default: the kind's number)")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random (default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="make it again where it exists")
    return parser.parse_args()


def main():
    args = parse_args()
    digits, kind = load_digits(), KINDS[args.kind]
    train, val = split_digits(len(digits.target), kind, args.seed)
    out, counts = args.out or Path(kind.folder), (args.train or kind.scenes[0], args.val or kind.scenes[1])
    for name, count, chosen, stream in zip(("train", "val"), counts, (train, val), (1, 2), strict=True):
        if (out / f"{name}.json").exists() and not args.force:
            print(f"{out / name}: there already")
            continue
        scans, labels = digits.images[chosen], digits.target[chosen]
        write_split(out, name, count, scans, labels, kind, args.seed * 10 + stream)


if __name__ == "__main__":
    main()
