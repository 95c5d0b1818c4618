"""Makes a small detection data set: real handwritten digits in cluttered scenes, in COCO format.

The digits are scikit-learn's bundled ones (1797 real 8x8 scans). Each is enlarged, warped non-rigidly, rotated, scaled
and pasted into a scene of textures, strokes and fragments of digits. The train and val sets are made from disjoint
digits. The same arguments give the same bytes.
"""

import argparse
import json
from pathlib import Path

import cv2
import numpy as np
from sklearn.datasets import load_digits
from tqdm import tqdm

SIZE = 192  # pixels, both sides of a scene
SUPERSAMPLED = 64  # pixels of an enlarged digit before it is warped


def enlarge(scan):
    """An 8x8 scan of ink 0..16 to a smooth (64, 64) map of ink 0..1, with a margin for the warp."""
    ink = cv2.resize(np.pad(scan / 16.0, 3), (SUPERSAMPLED, SUPERSAMPLED), interpolation=cv2.INTER_CUBIC)
    return 1 / (1 + np.exp(-12 * (cv2.GaussianBlur(ink, (0, 0), 1.2) - 0.45)))


def warp(ink, height, rng):
    """Rotates by up to 25 degrees, shears, scales so that a digit is about ``height`` pixels tall, and bends."""
    angle, shear = rng.uniform(-0.45, 0.45), rng.uniform(-0.2, 0.2)
    scale = height / (SUPERSAMPLED * 8 / 14)
    side = int(np.ceil(SUPERSAMPLED * scale * 1.3))
    aspect = np.array([[rng.uniform(0.8, 1.2), shear], [0, 1]])
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    to_source = np.linalg.inv(turn @ aspect * scale)
    grid = np.stack(np.meshgrid(np.arange(side), np.arange(side)), -1) - (side - 1) / 2
    # A smooth random displacement, zero mean, of a few percent of the digit's size.
    bend = cv2.resize(rng.normal(size=(4, 4, 2)).astype(np.float32), (side, side), interpolation=cv2.INTER_CUBIC)
    source = grid @ to_source.T + (SUPERSAMPLED - 1) / 2 + 2.2 * bend
    return cv2.remap(ink.astype(np.float32), source.astype(np.float32), None, cv2.INTER_LINEAR)


def background(rng):
    """A smooth colour field with stripes, strokes and noise, (SIZE, SIZE, 3) in 0..1."""
    coarse = rng.uniform(0.1, 0.9, (3, 3, 3)).astype(np.float32)
    field = cv2.resize(coarse, (SIZE, SIZE), interpolation=cv2.INTER_CUBIC)
    y, x = np.mgrid[:SIZE, :SIZE]
    direction, period = rng.uniform(0, np.pi), rng.uniform(6, 40)
    stripes = np.sin((x * np.cos(direction) + y * np.sin(direction)) * 2 * np.pi / period)
    field += rng.uniform(0, 0.12) * stripes[..., None]
    for _ in range(rng.integers(2, 8)):
        start, end = (tuple(int(v) for v in rng.integers(0, SIZE, 2)) for _ in range(2))
        colour = tuple(float(v) for v in rng.uniform(0, 1, 3))
        if rng.random() < 0.5:
            cv2.line(field, start, end, colour, int(rng.integers(1, 5)), cv2.LINE_AA)
        else:
            axes = tuple(int(v) for v in rng.integers(5, 50, 2))
            cv2.ellipse(field, start, axes, float(rng.uniform(0, 180)), 0, float(rng.uniform(60, 360)), colour, 2)
    return field + rng.normal(0, rng.uniform(0.01, 0.05), field.shape)


def paste(image, ink, x, y, colour):
    """Blends ``colour`` into the image where there is ink, its top left corner at (x, y), clipped to the image."""
    x0, y0 = max(x, 0), max(y, 0)
    x1, y1 = min(x + ink.shape[1], SIZE), min(y + ink.shape[0], SIZE)
    alpha = ink[y0 - y : y1 - y, x0 - x : x1 - x, None]
    image[y0:y1, x0:x1] = (1 - alpha) * image[y0:y1, x0:x1] + alpha * colour


def contrasting_colour(patch, rng):
    """A random colour whose brightness differs from the patch's mean by 0.35 at least."""
    while True:
        colour = rng.uniform(0, 1, 3)
        if abs(colour.mean() - patch.mean()) > 0.35:
            return colour


def overlap(a, b):
    """Intersection of two boxes (x1, y1, x2, y2) over the smaller one's area."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return max(width, 0) * max(height, 0) / min(areas)


def make_scene(scans, labels, rng):
    """One image (SIZE, SIZE, 3) uint8 and its objects, a list of (label, box as x1, y1, x2, y2)."""
    image = background(rng)
    for _ in range(rng.integers(2, 7)):  # fragments: a corner of a digit is clutter, not an object
        ink = warp(enlarge(scans[rng.integers(len(scans))]), rng.uniform(20, 60), rng)
        half = ink[: ink.shape[0] // 2, : ink.shape[1] // 2]
        paste(image, half, *(int(v) for v in rng.integers(0, SIZE - 20, 2)), rng.uniform(0, 1, 3))
    objects = []
    for _ in range(rng.integers(3, 8)):
        index = rng.integers(len(scans))
        ink = warp(enlarge(scans[index]), rng.uniform(20, 72), rng)
        rows, columns = np.where(ink.max(1) > 0.4)[0], np.where(ink.max(0) > 0.4)[0]
        if not len(rows) or not len(columns):
            continue
        for _ in range(20):  # places that do not cover another digit
            x = int(rng.integers(-columns[0] + 2, SIZE - columns[-1] - 2))
            y = int(rng.integers(-rows[0] + 2, SIZE - rows[-1] - 2))
            box = [int(v) for v in (x + columns[0], y + rows[0], x + columns[-1] + 1, y + rows[-1] + 1)]
            if all(overlap(box, other) < 0.15 for _, other in objects):
                patch = image[box[1] : box[3], box[0] : box[2]]
                paste(image, ink, x, y, contrasting_colour(patch, rng))
                objects.append((int(labels[index]), box))
                break
    return (np.clip(image, 0, 1) * 255).astype(np.uint8), objects


def write_split(out, name, count, scans, labels, seed):
    """Writes ``count`` scenes to out/name/*.jpg and their annotations to out/name.json."""
    (out / name).mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for number in tqdm(range(count), desc=f"{name} scenes", mininterval=1):
        image, objects = make_scene(scans, labels, np.random.default_rng([seed, number]))
        file = f"{number:05d}.jpg"
        cv2.imwrite(str(out / name / file), image, [cv2.IMWRITE_JPEG_QUALITY, 92])
        images.append(dict(id=number, file_name=file, width=SIZE, height=SIZE))
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


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("data/digits"), help="folder to write (default: %(default)s)")
    parser.add_argument("--train", type=int, default=1500, help="training scenes (default: %(default)s)")
    parser.add_argument("--val", type=int, default=200, help="validation scenes (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random (default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="make it again where it exists")
    return parser.parse_args()


def main():
    args = parse_args()
    digits = load_digits()
    order = np.random.default_rng(args.seed).permutation(len(digits.target))
    held_out = len(order) // 5
    splits = dict(train=(args.train, order[held_out:], 1), val=(args.val, order[:held_out], 2))
    for name, (count, chosen, stream) in splits.items():
        if (args.out / f"{name}.json").exists() and not args.force:
            print(f"{args.out / name}: there already")
            continue
        write_split(args.out, name, count, digits.images[chosen], digits.target[chosen], args.seed * 10 + stream)


if __name__ == "__main__":
    main()
