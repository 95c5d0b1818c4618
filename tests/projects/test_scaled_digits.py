"""The experiment on scaled digits: its data, what each training changes, its points, and all of it in small."""

import gzip
import struct
import subprocess
import sys
from difflib import SequenceMatcher
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("sklearn", reason="the experiment's digits come from scikit-learn")

sys.path.insert(0, str(Path(__file__).parents[2] / "projects" / "scaled_digits"))

import digit_sets
import experiment
import pictures

from dcn_plugin import convert


def write_idx(path, values, magic=b"\0\0\x08"):
    content = magic + bytes([values.dim()]) + struct.pack(f">{values.dim()}I", *values.shape) + values.numpy().tobytes()
    (gzip.open if path.suffix == ".gz" else open)(path, "wb").write(content)


def write_mnist(folder, train=70, test=10, suffix=""):
    torch.manual_seed(0)
    for name, count in (("train", train), ("t10k", test)):
        write_idx(folder / f"{name}-images-idx3-ubyte{suffix}", torch.randint(256, (count, 28, 28), dtype=torch.uint8))
        write_idx(folder / f"{name}-labels-idx1-ubyte{suffix}", torch.arange(count, dtype=torch.uint8) % 10)


def test_all_of_scikit_learns_digits_split_between_forms():
    from sklearn.datasets import load_digits

    labels = torch.from_numpy(load_digits().target)
    ends = digit_sets.form_ends(labels)
    forms = [labels[start:end].tolist() for start, end in zip([0, *ends], ends, strict=False)]
    assert len(forms) == 14 and ends[-1] == 1797
    assert all(SequenceMatcher(None, forms[0], form, autojunk=False).ratio() > 0.95 for form in forms)
    digits = digit_sets.sklearn_digits()
    assert len(digits.test.labels) == ends[3] == 516 and len(digits.train.labels) == 1281
    assert digits.test.labels.tolist() + digits.train.labels.tolist() == labels.tolist()
    assert digits.train.images.shape == (1281, 1, 28, 28)
    assert digits.train.images.min() == 0 and digits.train.images.max() == 1


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_mnist_files(tmp_path, suffix):
    write_mnist(tmp_path, suffix=suffix)
    digits = digit_sets.mnist(tmp_path)
    assert digits.train.images.shape == (70, 1, 28, 28) and digits.test.images.shape == (10, 1, 28, 28)
    assert digits.test.labels.tolist() == list(range(10))
    torch.manual_seed(0)
    assert torch.equal(digits.train.images[:, 0] * 255, torch.randint(256, (70, 28, 28)).float())


def cut_off(folder):
    path = folder / "t10k-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (cut_off, "t10k-images-idx3-ubyte is no IDX file .* or is cut off"),
        (lambda folder: write_idx(folder / "train-labels-idx1-ubyte", torch.zeros(70), b"\0\0\x0d"), "no IDX file"),
        (lambda folder: (folder / "train-labels-idx1-ubyte").write_bytes(b""), "no IDX file"),
        (lambda folder: write_idx(folder / "train-labels-idx1-ubyte", torch.zeros(9).byte()), r"got \(70, 28, 28\)"),
        (lambda folder: (folder / "train-labels-idx1-ubyte").unlink(), "has no train-labels-idx1-ubyte"),
    ],
)
def test_mnist_files_that_are_not_as_they_should_be(tmp_path, spoil, message):
    write_mnist(tmp_path)
    spoil(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        digit_sets.mnist(tmp_path)


def test_rescale_shrinks_about_the_centre():
    images = torch.zeros(2, 1, 28, 28)
    images[:, :, 4:12, 10:18] = 1
    same, half = digit_sets.rescale(images, torch.tensor([1.0, 0.5]))
    torch.testing.assert_close(same, images[0])
    expected = torch.zeros(1, 28, 28)
    expected[:, 9:13, 12:16] = 1  # each edge half as far from the centre, 14
    torch.testing.assert_close(half, expected)


def changed(before, after):
    return {name for name, value in after.items() if not torch.equal(value, before[name])}


def test_only_what_is_tuned_changes():
    digits = digit_sets.Split(torch.rand(64, 1, 28, 28), torch.arange(64) % 10)
    before, seen = {}, {}
    for name, net, parameters in experiment.networks(digits, width=4, steps=3):
        state = {key: value.clone() for key, value in net.state_dict().items()}
        if name == experiment.UNTOUCHED:
            before, seen[name] = state, parameters
        elif name != experiment.CEILING:
            offsets = {key: torch.zeros_like(value) for key, value in state.items() if "conv_offset" in key}
            seen[name] = changed(before | offsets, state), parameters
        if name in experiment.DEFORMABLE:
            assert seen[name][0] == offsets.keys() and parameters == sum(map(torch.numel, offsets.values()))
            blocks = net.stem, net.conv2, net.conv3, net.conv4
            assert [hasattr(block[0], "conv_offset") for block in blocks] == [False, True, True, True]
    norms, third = experiment.CONTROLS
    assert seen[experiment.UNTOUCHED] == 0
    assert all("running" not in key and ("classifier" in key or ".1." in key) for key in seen[norms][0])
    assert len(seen[norms][0]) == 2 * 4 + 2
    assert seen[third] == ({"conv3.0.weight"}, 9 * 8 * 16)


def test_points_of_plain_convolutions_are_their_receptive_field():
    net = experiment.cnn(4).eval()
    points = pictures.image_points(net, torch.rand(1, 1, 28, 28), (3, 3))
    # The last two read the second's output, whose positions are 2 pixels of the image apart, the second the image's.
    axis = {4 * 3 + 2 * a + 2 * b + c for a in (-1, 0, 1) for b in (-1, 0, 1) for c in (-1, 0, 1)}
    assert len(points) == 729
    assert set(points[:, 0].tolist()) == set(points[:, 1].tolist()) == axis


def test_points_move_with_the_offsets_of_each_layer():
    net, image = convert(experiment.cnn(4), "DCN").eval(), torch.rand(1, 1, 28, 28)
    grid = pictures.image_points(net, image, (3, 3))
    nn.init.constant_(net.conv4[0].conv_offset.bias[::2], 0.5)  # y, in pixels of the third convolution's map
    nn.init.constant_(net.conv2[0].conv_offset.bias[1::2], -0.25)  # x, in pixels of the stem's
    assert len(grid) == 729
    moved = pictures.image_points(net, image, (3, 3))
    torch.testing.assert_close(moved - grid, torch.tensor([0.5 * 2, -0.25]).expand(729, 2))


def test_table_is_mean_deviation_and_share_of_the_gap():
    def rows(untouched, offsets, ceiling):
        found = {experiment.UNTOUCHED: untouched, "offsets": offsets, experiment.CEILING: ceiling}
        return {name: dict(parameters=1234, accuracy={"0.4": scaled, "1.0": 90.0}) for name, scaled in found.items()}

    forward = {"16": dict(DCN=dict(milliseconds=1.5, ratio=1.25))}
    results = dict(seeds={"0": rows(10.0, 70.0, 90.0), "1": rows(10.0, 90.0, 90.0)}, forward=forward)
    lines = experiment.table(results).splitlines()
    assert "| offsets | 1,234 | 90.00 ± 0.00 | 85.00 ± 7.07 | 87.50 ± 17.68 |" in lines
    assert "| DCN, 16 channels in the first layer | 1.5 | 1.25 |" in lines


def run(*arguments):
    command = [sys.executable, "-W", "ignore", experiment.__file__, *arguments]
    return subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True).stdout


def test_runs_and_resumes(tmp_path):
    write_mnist(tmp_path)
    arguments = "--mnist", tmp_path, "--out", tmp_path / "out", "--steps", "2", "--width", "4", "--workers", "1"
    assert "seed 0: trained on scaled digits: regular" in run(*arguments, "--seeds", "1")
    again = run(*arguments, "--seeds", "2")
    assert "seed 0:" not in again and "seed 1: trained on scaled digits: regular" in again
    assert "| offsets of DCNv2 tuned on scaled digits |" in (tmp_path / "out" / "table.md").read_text()
    assert (tmp_path / "out" / "accuracy.svg").read_text().startswith("<?xml")
    assert (tmp_path / "out" / "sampling.gif").read_bytes().startswith(b"GIF89a")
