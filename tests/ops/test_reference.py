"""The references by hand: small maps whose samples and slopes a reader can check."""

import math

import pytest
import torch
from torch.nn import functional as F

from dcn_plugin.ops.reference import deform_conv2d, deform_roi_align

from .cases import BASE, as_float64, relative_error, run

NAN, INF = math.nan, math.inf
COLUMN = [10.0, 20.0, 40.0]  # a map of one column

# Where the column is sampled: the sample's value, its slope along the column.
ZERO_PADDED = {
    -1.5: (0, 0),
    -1.0: (0, 0),  # just excluded
    -0.75: (2.5, 10),  # between the 0 above the map and 10
    -0.5: (5, 10),
    0.0: (10, 10),  # on a pixel: the slope towards the next
    0.25: (12.5, 10),
    1.0: (20, 20),
    1.5: (30, 20),
    2.0: (40, -40),  # towards the 0 below the map
    2.5: (20, -40),
    3.0: (0, 0),  # just excluded
    3.5: (0, 0),
    1e30: (0, 0),
    INF: (0, 0),
    -INF: (0, 0),
    NAN: (0, 0),
}
CLAMPED = {
    -1.5: (0, 0),
    -1.0: (10, 0),  # just counts, with the border's value
    -0.5: (10, 0),
    0.0: (10, 10),
    0.25: (12.5, 10),
    1.0: (20, 20),
    1.5: (30, 20),
    2.0: (40, 0),
    2.5: (40, 0),
    3.0: (40, 0),  # just counts
    3.5: (0, 0),
    1e30: (0, 0),
    INF: (0, 0),
    -INF: (0, 0),
    NAN: (0, 0),
}


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(("y", "value", "slope"), [(y, *expected) for y, expected in ZERO_PADDED.items()])
def test_conv_samples_a_column(y, value, slope):
    offset = tensor([y, 0, 0, 0, 0, 0]).reshape(1, 2, 3, 1)  # the first output samples at y, the others at themselves
    offset[0, 0, 1:] = NAN  # ... or nowhere
    tensors = dict(
        input=tensor(COLUMN).reshape(1, 1, 3, 1),
        offset=offset,
        weight=torch.full((1, 1, 1, 1), 2.0, dtype=torch.float64),
        mask=torch.full((1, 1, 3, 1), 0.5, dtype=torch.float64),
    )
    leaves = [t.requires_grad_() for t in tensors.values()]
    output = deform_conv2d(**tensors)
    assert output.flatten().tolist() == [value, 0, 0]  # weight * mask = 1
    _, grad_offset, grad_weight, grad_mask = torch.autograd.grad(output.sum(), leaves)
    # Sideways the map falls from the value to the 0 right of it.
    assert grad_offset.flatten().tolist() == [slope, 0, 0, -value, 0, 0]
    assert grad_weight.item() == 0.5 * value
    assert grad_mask.flatten().tolist() == [2 * value, 0, 0]


def test_conv_samples_between_four_pixels():
    image, weight = tensor([[1, 2], [3, 4]])[None, None], torch.ones(1, 1, 1, 1, dtype=torch.float64)
    offset = tensor([[[0.5, 0.0], [-0.75, 5.0]], [[0.25, 0.5], [1.0, 0.0]]])[None]
    output = deform_conv2d(image, offset, weight)
    # (0.5, 0.25): between all four. (0, 1.5): half of pixel (0, 1). (0.25, 1): pixel (0, 1) to (1, 1). (6, 1): outside.
    expected = [[1 * 0.375 + 2 * 0.125 + 3 * 0.375 + 4 * 0.125, 1.0], [2 * 0.75 + 4 * 0.25, 0.0]]
    torch.testing.assert_close(output[0, 0], tensor(expected))


def test_conv_without_offsets_is_the_plain_convolution():
    tensors = as_float64(BASE.make())
    expected = F.conv2d(tensors["input"], tensors["weight"], tensors["bias"], 1, 1)
    tensors["offset"].zero_()
    tensors["mask"].fill_(1)
    assert relative_error(deform_conv2d(**tensors, **BASE.options), expected) < 1e-12


@pytest.mark.parametrize(("y", "x"), [(1, 0), (0, -2), (-1, 3)])
def test_conv_with_whole_offsets_is_a_shifted_convolution(y, x):
    t = as_float64(BASE.make())
    t["offset"][:, 0::2], t["offset"][:, 1::2] = y, x
    # Far enough from the map for every shift: both continue it with zeros.
    expected = F.conv2d(F.pad(t["input"], [4] * 4), t["weight"], t["bias"])[:, :, 3 + y :, 3 + x :][:, :, :7, :9]
    assert relative_error(deform_conv2d(t["input"], t["offset"], t["weight"], t["bias"], padding=1), expected) < 1e-12


def test_conv_displaces_each_tap_and_deform_group_by_itself():
    """Four 1x1 groups of one channel each: every output is one sample of its channel."""
    image = torch.arange(4.0, dtype=torch.float64).reshape(1, 4, 1, 1) + torch.arange(100.0).reshape(1, 1, 10, 10)
    offset = torch.zeros(1, 2 * 2 * 2, 10, 9, dtype=torch.float64)  # 2 deform groups, taps (0, 0) and (0, 1)
    offset[0, :, 0, 0] = tensor([1, 2, 3, 4, 5, 6, 7, 8])
    weight = tensor([1, 1000]).reshape(1, 1, 1, 2).repeat(4, 1, 1, 1)
    output = deform_conv2d(image, offset, weight)[0, :, 0, 0]
    first, second = (12 + 35 * 1000), (56 + 79 * 1000)  # pixels (1, 2), (3, 4 + 1); (5, 6), (7, 8 + 1)
    assert output.tolist() == [first, first + 1001, second + 2002, second + 3003]


def sample_roi(y, image, **options):
    """deform_roi_align of one RoI of one bin and one sample, a pixel in size, whose centre is at (0, 0)."""
    offset = tensor([0, y]).reshape(1, 2, 1, 1).requires_grad_()
    roi = tensor([[0, 0, 0, 1, 1]])
    return deform_roi_align(image, roi, offset, 1, 1.0, 1, 1.0, **options), offset


@pytest.mark.parametrize(("y", "value", "slope"), [(y, *expected) for y, expected in CLAMPED.items()])
def test_roi_samples_a_column(y, value, slope):
    mask = torch.full((1, 1, 1, 1), 0.5, dtype=torch.float64, requires_grad=True)
    output, offset = sample_roi(y, tensor(COLUMN).reshape(1, 1, 3, 1), mask=mask)
    assert output.item() == 0.5 * value
    grad_offset, grad_mask = torch.autograd.grad(output, [offset, mask])
    assert grad_offset.flatten().tolist() == [0, 0.5 * slope]  # x first; a map of one column is flat sideways
    assert grad_mask.item() == value


@pytest.mark.parametrize("y", [-0.5, 1.0, 1.5])
def test_roi_keeps_the_slope_along_a_border(y):
    output, offset = sample_roi(y, tensor([[1, 3], [2, 7]])[None, None])
    slope = {-0.5: 2, 1.0: 5, 1.5: 5}[y]
    assert torch.autograd.grad(output, offset)[0].flatten().tolist() == [slope, 0]


@pytest.mark.parametrize("sampling_ratio", [0, 1, 3])
def test_roi_of_a_slope_is_the_value_at_its_bins_centres(sampling_ratio):
    y, x = torch.meshgrid(torch.arange(8.0), torch.arange(9.0), indexing="ij")
    image = (100 * y + x).double()[None, None]
    roi = tensor([[0, 16, 8, 48, 40]])  # on the map: x 1.5 to 5.5, y 0.5 to 4.5
    offset = torch.zeros(1, 2, 2, 2, dtype=torch.float64)
    offset[0, :, 0, 1] = tensor([0.5, -0.25])  # of gamma times the RoI's size: 0.2 to the right, 0.1 up
    tensors = dict(input=image, offset=offset, mask=tensor([[[[1, 1], [0.5, 1]]]]))
    options = dict(output_size=2, spatial_scale=0.125, sampling_ratio=sampling_ratio, gamma=0.1)
    leaves = [t.requires_grad_() for t in tensors.values()]
    output = deform_roi_align(rois=roi, **tensors, **options)
    torch.testing.assert_close(output[0, 0], tensor([[152.5, 144.7], [0.5 * 352.5, 354.5]]))
    grad_input, grad_offset, grad_mask = torch.autograd.grad(output.sum(), leaves)
    assert grad_input.sum().item() == pytest.approx(3.5)
    torch.testing.assert_close(grad_offset[0], tensor([[[0.4, 0.4], [0.2, 0.4]], [[40, 40], [20, 40]]]))
    torch.testing.assert_close(grad_mask[0, 0], tensor([[152.5, 144.7], [352.5, 354.5]]))


def test_roi_takes_as_many_samples_as_its_bins_have_pixels_begun():
    image = torch.zeros(1, 1, 5, 5, dtype=torch.float64)
    image[0, 0, 2, 2] = 1
    roi = tensor([[0, 2.0, 2.0, 4.5, 3.0]])  # x 1.5 to 4, y 1.5 to 2.5: 3 samples by 1
    near = [1 - (2 - 2.5 / 6 - 1.5), 1 - (1.5 + 2.5 / 2 - 2)]  # weights of the samples at 1.92 and 2.75
    output = deform_roi_align(image, roi, output_size=1)
    assert output.item() == pytest.approx(sum(near) / 3)


def test_roi_counts_the_samples_outside_the_map():
    image = torch.ones(1, 1, 9, 9, dtype=torch.float64)
    roi = tensor([[0, -3.5, 2.5, 4.5, 3.5]])  # samples at x = -3.5, -2.5, -1.5 (outside), -0.5, 0.5 ... 3.5
    assert deform_roi_align(image, roi, output_size=1).item() == pytest.approx(5 / 8)


def test_roi_that_is_empty_inverted_or_not_finite():
    image = torch.ones(1, 1, 5, 5, dtype=torch.float64)
    rois = tensor(
        [[0, 2, 2, 2, 2], [0, 3, 3, 1, 1], [0, 3, 1, 1, 3], [0, NAN, 1, 2, 2], [0, 1, 1, INF, 2], [0, 1, 1, 2, 2]]
    )
    offset = torch.zeros(6, 2, 1, 1, dtype=torch.float64)
    for sampling_ratio, expected in ((0, [0, 0, 0, 0, 0, 1]), (2, [1, 1, 1, 0, 0, 1])):
        tensors = dict(input=image, offset=offset)
        options = dict(rois=rois, output_size=1, sampling_ratio=sampling_ratio)
        output, gradients = run(deform_roi_align, tensors, **options)
        assert output.flatten().tolist() == expected
        assert not gradients["offset"].any()


def test_no_rois():
    image = torch.ones(1, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    assert deform_roi_align(image, torch.zeros(0, 5).double(), output_size=(2, 4)).shape == (0, 3, 2, 4)
