"""Effective receptive fields of layers whose weights are known."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dcn_plugin.layers import DeformConv2dPack, ModulatedDeformConv2dPack
from dcn_plugin.visualize import receptive_fields, record


def box_filter(kind=DeformConv2dPack, offset=(0.0, 0.0)):
    layer = kind(1, 1, 3, padding=1, bias=False)
    nn.init.ones_(layer.weight)
    layer.conv_offset.bias.data[:18] = torch.tensor(offset).repeat(9)
    return layer


def test_fields_with_offsets_off_and_on():
    net = nn.Sequential(box_filter(), nn.ReLU(), box_filter(offset=(0.0, 5.0)), nn.Conv2d(1, 1, 3))
    image = torch.rand(1, 1, 9, 16)
    first, second = record(net, image).convolutions
    places = [(second, (4, 7)), (first, (4, 7)), (second, (0, 0))]
    moved, alone, corner = receptive_fields(net, image, places)
    triangle = torch.tensor([1.0, 2, 3, 2, 1])
    expected = torch.zeros(9, 16)
    expected[2:7, 10:15] = triangle[:, None] * triangle
    torch.testing.assert_close(moved, expected)
    expected = torch.zeros(9, 16)
    expected[3:6, 6:9] = 1
    torch.testing.assert_close(alone, expected)
    assert corner[:3, 3:8].all() and corner.count_nonzero() == 15

    straight = receptive_fields(net, image, places, straight=True)
    expected = torch.zeros(9, 16)
    expected[2:7, 5:10] = triangle[:, None] * triangle
    torch.testing.assert_close(straight[0], expected)
    assert straight[2].count_nonzero() == 9
    assert not image.requires_grad and all(p.grad is None for p in net.parameters())


def test_the_mask_stays():
    net = box_filter(ModulatedDeformConv2dPack, offset=(0.0, 5.0))
    image = torch.rand(1, 1, 9, 16)
    [conv] = record(net, image).convolutions
    [field] = receptive_fields(net, image, [(conv, (4, 7))], straight=True)
    assert field[3:6, 6:9].tolist() == [[0.5] * 3] * 3 and field.count_nonzero() == 9


class NeedsWeight(TorchDispatchMode):
    """Notes of each backward whether it computes the weight's gradient."""

    def __init__(self):
        super().__init__()
        self.needed = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.dcn_plugin.deform_conv2d_backward.default:
            names = [argument.name for argument in func._schema.arguments]
            self.needed.append(args[names.index("need_weight")])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("straight", [False, True])
def test_no_weights_gradient_is_computed(straight):
    net, image = nn.Sequential(box_filter(), box_filter()), torch.rand(1, 1, 9, 16)
    place = record(net, image).convolutions[1], (4, 7)
    with NeedsWeight() as backward:
        receptive_fields(net, image, [place], straight)
    assert backward.needed == [False, False]


def test_what_comes_after_does_not_run():
    after = nn.Conv2d(1, 1, 3)
    image = torch.rand(1, 1, 9, 16)
    net = nn.Sequential(box_filter(), after)
    recording = record(net, image)
    after.forward = None
    assert len(receptive_fields(net, image, [(recording.convolutions[0], (0, 0))])) == 1
    assert receptive_fields(net, image, []) == []


def test_another_model_is_an_error():
    image = torch.rand(1, 1, 9, 16)
    [conv] = record(box_filter(), image).convolutions
    with pytest.raises(ValueError, match="did not run the convolutions"):
        receptive_fields(nn.Conv2d(1, 1, 3), image, [(conv, (0, 0))])
