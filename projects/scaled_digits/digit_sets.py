"""Handwritten digits as 28x28 images, train and test written by different people, and their scaling."""

import gzip
import re
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

SIZE = 28
TEST_FORMS = 4  # of 14


class Split(NamedTuple):
    images: Tensor  # (N, 1, 28, 28), float32 from 0 (background) to 1
    labels: Tensor  # (N,), 0 to 9


class Digits(NamedTuple):
    train: Split
    test: Split


def sklearn_digits() -> Digits:
    """All 1797 digits of scikit-learn, enlarged from 8x8: 516 of the first four forms to test, 1281 to train.

    The set is the test part of UCI's Optical Recognition of Handwritten Digits, by 13 people of whom it says nothing
    else. Its order does: the labels are the same sequence of 130 digits, that of a preprinted form, 14 times, a few
    digits missing. A form has one writer, so a split between forms separates writers, but for the one who by these
    numbers filled in two.
    """
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.from_numpy(found.images).float()[:, None] / 16
    images = F.interpolate(images, size=(SIZE, SIZE), mode="bicubic").clamp(0, 1)
    labels = torch.from_numpy(found.target).long()
    start = form_ends(labels)[TEST_FORMS - 1]
    return Digits(train=Split(images[start:], labels[start:]), test=Split(images[:start], labels[:start]))


def form_ends(labels: Tensor) -> list[int]:
    """Where the forms of scikit-learn's digits end: every form ends on 4 9 0 8 9 8, at times without the last two."""
    return [end.end() for end in re.finditer(r"4908(9.)?(?=[01]|$)", "".join(map(str, labels.tolist())))]


def mnist(folder: str | Path) -> Digits:
    """MNIST from its four IDX files, ``train-images-idx3-ubyte`` and so on, compressed (.gz) or not.

    Its test digits are by other people than its training digits.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is not what its name says.
    """

    def split(name):
        images, labels = read_idx(folder, f"{name}-images", 3), read_idx(folder, f"{name}-labels", 1)
        if images.shape[1:] != (SIZE, SIZE) or len(images) != len(labels):
            raise ValueError(
                f"{name} of MNIST must be (N, {SIZE}, {SIZE}) images and N labels, "
                f"got {tuple(images.shape)} and {tuple(labels.shape)}"
            )
        return Split(images[:, None].float() / 255, labels.long())

    return Digits(train=split("train"), test=split("t10k"))


def read_idx(folder: str | Path, stem: str, dimensions: int) -> Tensor:
    """The bytes of an IDX file: 0, 0, type 8, the number of dimensions, each as big-endian 32 bits, the values."""
    pattern = f"{stem}?idx{dimensions}-ubyte*"
    path = next(iter(sorted(Path(folder).glob(pattern))), None)
    if path is None:
        raise FileNotFoundError(f"{folder} has no {stem}-idx{dimensions}-ubyte, nor that with .gz")
    content = (gzip.open if path.suffix == ".gz" else open)(path, "rb").read()
    header = 4 + 4 * dimensions
    shape = [int.from_bytes(content[i : i + 4], "big") for i in range(4, header, 4)]
    values = torch.frombuffer(bytearray(content[header:]), dtype=torch.uint8) if content[header:] else torch.empty(0)
    if content[:4] != bytes([0, 0, 8, dimensions]) or values.numel() != torch.Size(shape).numel():
        raise ValueError(f"{path} is no IDX file of bytes in {dimensions} dimensions, or is cut off")
    return values.reshape(shape)


def rescale(images: Tensor, scales: Tensor) -> Tensor:
    """Images about their centres as many times as large, each by its own scale (N,), on empty background."""
    theta = torch.zeros(len(images), 2, 3).to(images)
    theta[:, 0, 0] = theta[:, 1, 1] = 1 / scales
    grid = F.affine_grid(theta, images.shape, align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)
