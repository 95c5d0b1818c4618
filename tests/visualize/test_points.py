"""Sampling points against what is computed by hand."""

import pytest
import torch
from torch import nn

from dcn_plugin.layers import DeformConv2dPack, ModulatedDeformConv2dPack
from dcn_plugin.visualize import effective_dilation, record, sampling_points
from dcn_plugin.visualize.statistics import SIZES, Table, size_of_objects


def deform(*args, offset=None, kind=DeformConv2dPack, **kwargs):
    layer = kind(*args, **kwargs)
    if offset is not None:
        layer.conv_offset.bias.data[: 2 * layer.weight[0, 0].numel()] = torch.tensor(offset).repeat(
            layer.weight[0, 0].numel()
        )
    return layer


def points(net, position, layers=3, size=(32, 40), channels=1):
    conv = record(net, torch.rand(1, channels, *size)).convolutions[-1]
    return sampling_points(conv, position, layers)


def pairs(points):
    return sorted(zip(points.y.tolist(), points.x.tolist(), strict=True))


def grid(y, x, step=1, reach=1):
    steps = [step * k for k in range(-reach, reach + 1)]
    return [(y + dy, x + dx) for dy in steps for dx in steps]


def test_zero_offsets_give_the_regular_grid():
    found = points(deform(1, 1, 3, padding=1), (10, 20))
    assert pairs(found) == grid(10, 20)
    assert found.counts.all()
    assert pairs(points(deform(1, 1, 3, padding=4, dilation=4), (10, 20))) == grid(10, 20, step=4)
    assert pairs(points(deform(1, 1, 3, stride=2, padding=1), (5, 7))) == grid(10, 14)
    assert pairs(points(deform(1, 1, (1, 3), padding=0), (5, 7))) == [(5, 7), (5, 8), (5, 9)]


def test_a_constant_offset_translates():
    found = points(deform(1, 1, 3, padding=1, offset=(-2.5, 3.25)), (10, 20))
    assert pairs(found) == grid(7.5, 23.25)


def test_two_layers_by_hand():
    """The second, of stride 2, moves by (1, -2) pixels of its map, and the first by (-3, 0.5) of the image."""
    net = nn.Sequential(deform(1, 1, 3, padding=1, offset=(-3.0, 0.5)), deform(1, 1, 3, 2, 1, offset=(1.0, -2.0)))
    found = points(net, (5, 8))
    by_hand = [first for y, x in grid(10 + 1, 16 - 2) for first in grid(y - 3, x + 0.5)]
    assert pairs(found) == sorted(by_hand) and len(by_hand) == 81
    assert pairs(points(net, (5, 8), layers=1)) == grid(11, 14)


def test_layers_between_which_maps_shrink():
    """A stem of stride 2, a layer there, a pooling to stride 4 whose pixels lie at 4p + 1, and a layer there."""
    net = nn.Sequential(
        nn.Conv2d(1, 1, 3, 2, 1),
        deform(1, 1, 3, padding=1),
        nn.MaxPool2d(2),
        deform(1, 1, 3, padding=1, offset=(0.5, 0.0)),
    )
    # Positions of the last: 3 - 1 + 0.5 and so on, in pixels at 4p + 1 of the image; the layer before adds -2, 0, 2.
    by_hand = [
        (4 * (3 + k + 0.5) + 1 + dy, 4 * (5 + m) + 1 + dx) for k, m in grid(0, 0) for dy, dx in grid(0, 0, step=2)
    ]
    assert pairs(points(net, (3, 5))) == sorted(by_hand)


def test_offsets_between_pixels_are_interpolated():
    first = deform(1, 1, 1)
    first.conv_offset.weight.data[0] = 1.0  # the image's value is the displacement in y
    net = nn.Sequential(first, deform(1, 1, 1, offset=(0.25, 0.5)))
    image = torch.arange(12.0).reshape(1, 1, 3, 4)
    conv = record(net, image).convolutions[-1]
    found = sampling_points(conv, (1, 1))
    assert (float(found.y), float(found.x)) == pytest.approx((1.25 + (1.25 * 4 + 1.5), 1.5))


def test_samples_outside_the_map_stay_in_their_places_and_do_not_count():
    net = nn.Sequential(deform(1, 1, 3, padding=1), deform(1, 1, 3, padding=1))
    found = points(net, (0, 39))
    assert pairs(found) == sorted(p for y, x in grid(0, 39) for p in grid(y, x))
    inside = [0 <= y < 32 and 0 <= x < 40 for y, x in zip(found.y, found.x, strict=True)]
    # What the second layer reads at (-1, 40) is a zero, wherever the first would have looked from there.
    by_second = [0 <= y < 32 and 0 <= x < 40 for y, x in grid(0, 39) for _ in range(9)]
    assert found.counts.tolist() == [a and b for a, b in zip(inside, by_second, strict=True)]
    assert (found.weight[~found.counts] == 0).all() and (found.weight[found.counts] > 0).all()


def test_a_sample_between_the_border_and_the_outside_counts():
    found = points(deform(1, 1, 1, offset=(-0.5, 0.0)), (0, 0))
    assert found.counts.all() and float(found.y) == -0.5
    assert not points(deform(1, 1, 1, offset=(-1.0, 0.0)), (0, 0)).counts.any()


def test_weights_are_of_the_kernel_and_the_mask():
    layer = deform(2, 3, (1, 2), kind=ModulatedDeformConv2dPack)
    layer.conv_offset.bias.data[4:] = torch.tensor([0.0, 2.0])
    found = points(layer, (1, 1), channels=2)
    weights = layer.weight.detach().norm(dim=(0, 1))[0] * torch.tensor([0.0, 2.0]).sigmoid()
    torch.testing.assert_close(found.weight, weights / weights.max())


def test_deform_groups_have_points_of_their_own():
    layer = deform(2, 2, 1, deform_groups=2)
    layer.conv_offset.bias.data = torch.tensor([1.0, 0.0, 0.0, 2.0])
    assert pairs(points(layer, (4, 4), channels=2)) == [(4, 6), (5, 4)]


def test_offsets_that_are_not_finite():
    layer = deform(1, 1, 1, offset=(float("nan"), 0.0))
    found = points(nn.Sequential(deform(1, 1, 1), layer), (4, 4))
    assert not found.counts.any() and found.weight.tolist() == [0.0]


def test_errors():
    conv = record(deform(1, 1, 1), torch.rand(1, 1, 4, 4)).convolutions[0]
    with pytest.raises(ValueError, match="layers must be at least 1"):
        sampling_points(conv, (0, 0), 0)
    net = nn.Sequential(*[deform(1, 1, 3, padding=1) for _ in range(7)])
    with pytest.raises(ValueError, match="7 layers of 6 make 4782969 points"):
        points(net, (0, 0), layers=7)
    conv.grid = None
    with pytest.raises(ValueError, match="not computed from the image"):
        sampling_points(conv, (0, 0))


def test_effective_dilation():
    y, x = torch.meshgrid(torch.arange(3.0) * 2, torch.arange(3.0) * 2, indexing="ij")
    assert effective_dilation(y[..., None, None], x[..., None, None]).item() == 2
    assert effective_dilation(y[..., None, None] * 2, x[..., None, None]).item() == 3  # six pairs of 4, six of 2
    x = x.clone()
    x[0, 0] = -2  # one pair of 4 in place of 2, one of the length of (2, 2)
    assert effective_dilation(y[..., None, None], x[..., None, None]).item() == pytest.approx(
        (10 * 2 + 4 + 8**0.5) / 12
    )
    assert effective_dilation(y[:1, :2, None, None], x[1:2, :2, None, None]).item() == 2
    assert effective_dilation(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)).isnan()


def test_objects_are_told_apart_by_size():
    boxes = torch.tensor([[0.0, 0, 200, 100], [10, 10, 20, 20], [0, 0, 60, 60]])
    y, x = torch.tensor([[9.0, 9.0], [10.0, 10.0], [50.0, 50.0], [99.0, 199.0], [100.0, 0.0]]).T
    found = [SIZES[k] for k in size_of_objects(boxes, y, x)]
    assert found == ["medium", "small", "medium", "large", "background"]
    assert (size_of_objects(torch.zeros(0, 4), y, x) == SIZES.index("background")).all()


def test_table():
    net = nn.Sequential(
        deform(1, 1, 3, 2, 1, offset=(3.0, 4.0)), deform(1, 1, 3, padding=1, kind=ModulatedDeformConv2dPack)
    )
    table = Table()
    boxes = torch.tensor([[0.0, 0, 20, 30]])
    for _ in range(2):  # the image has twice the pixels of what the model got
        table.add(record(net, torch.rand(1, 1, 16, 16)), boxes, (2.0, 2.0), lambda y, x: (2 * y + 0.5, 2 * x + 0.5))
    _, header, first, second = str(table).splitlines()
    assert header.split()[:3] == ["layer", "mean", "max"]
    rows = sum(-1 < 2 * i - 1 + k + 3 < 16 for i in range(8) for k in range(3))
    columns = sum(-1 < 2 * i - 1 + k + 4 < 16 for i in range(8) for k in range(3))
    outside = f"{1 - rows * columns / 24**2:.2f}"
    assert first.split() == ["0", "5.00", "5.00", "10.00", "10.00", outside, "-", "1.00", "-", "-", "1.00"]
    outside = f"{1 - (22 / 24) ** 2:.2f}"
    assert second.split() == ["1", *["0.00"] * 4, outside, "0.50", "1.00", "-", "-", "1.00"]
