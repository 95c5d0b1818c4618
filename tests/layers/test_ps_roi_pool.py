"""The position-sensitive RoI layers: what they compute, and the offsets and score maps they predict."""

import copy
import pickle

import pytest
import torch

from dcn_plugin.layers import DeformPSRoIPool, DeformPSRoIPoolPack, DeformRFCNPool
from dcn_plugin.layers.zero_init import ZeroInitConv2d, ZeroInitLinear
from dcn_plugin.ops import deform_ps_roi_pool

ROIS = torch.tensor([[0, 2.0, 3.0, 20.0, 17.0], [1, -4.0, 0.0, 9.0, 40.0], [0, 8.0, 8.0, 8.0, 8.0]])
SIZES = dict(output_size=(3, 2), group_size=(3, 2), part_size=(2, 2), sample_per_part=2, spatial_scale=0.5)


def fc_pack(classes=2):
    return DeformPSRoIPoolPack(**SIZES, output_dim=4, offset_classes=classes, deform_fc_channels=16)


def conv_pack(classes=2):
    return DeformRFCNPool(**SIZES, in_channels=24, output_dim=4, offset_classes=classes)


PACKS = pytest.mark.parametrize("pack", [fc_pack, conv_pack])


def randomised(layer):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return layer


def test_given_offsets():
    x, offset = torch.randn(2, 24, 12, 10), torch.randn(3, 4, 2, 2)
    layer = DeformPSRoIPool(**SIZES, trans_std=0.2)
    expected = deform_ps_roi_pool(x, ROIS, offset, (3, 2), (3, 2), (2, 2), 2, 0.5, 0.2)
    torch.testing.assert_close(layer(x, ROIS, offset), expected)
    assert (layer(x, ROIS) - expected).abs().max() > 0.01


def test_sizes_default_to_the_bins():
    layer = DeformPSRoIPool(output_size=(3, 2))
    assert layer.group_size == layer.part_size == (3, 2)
    x, offset = torch.randn(1, 12, 12, 10), torch.randn(1, 2, 3, 2)
    torch.testing.assert_close(layer(x, ROIS[:1], offset), deform_ps_roi_pool(x, ROIS[:1], offset, (3, 2)))


@PACKS
def test_new_pack_pools_straight(pack):
    pack, x = pack(), torch.randn(2, 24, 12, 10)
    maps = pack.score_maps(x) if isinstance(pack, DeformRFCNPool) else x
    torch.testing.assert_close(pack(x, ROIS), DeformPSRoIPool(**SIZES)(maps, ROIS))


def test_fc_pack_predicts_from_the_straight_bins():
    pack, x = randomised(fc_pack()), torch.randn(2, 24, 12, 10)
    straight = DeformPSRoIPool(**SIZES)(x, ROIS)
    offset = pack.offset_fc(straight.flatten(1)).reshape(3, 4, 2, 2)
    torch.testing.assert_close(pack(x, ROIS), DeformPSRoIPool(**SIZES)(x, ROIS, offset))
    assert (pack(x, ROIS) - straight).abs().max() > 0.01


@pytest.mark.parametrize("classes", [1, 2, 4])
def test_conv_pack_pools_its_offset_fields(classes):
    pack, x = randomised(conv_pack(classes)), torch.randn(2, 24, 12, 10)
    fields = pack.offset_fields(x)
    assert fields.shape == (2, 2 * classes * 2 * 2, 12, 10)
    offset = deform_ps_roi_pool(fields, ROIS, None, 2, sample_per_part=2, spatial_scale=0.5)
    expected = DeformPSRoIPool(**SIZES)(pack.score_maps(x), ROIS, offset)
    torch.testing.assert_close(pack(x, ROIS), expected)
    assert (expected - DeformPSRoIPool(**SIZES)(pack.score_maps(x), ROIS)).abs().max() > 0.01


def test_predicted_offsets_are_x_first():
    pack = conv_pack()
    with torch.no_grad():
        pack.score_maps.weight.fill_(1 / 24)
        pack.offset_fields.bias[8:12] = 1.5  # the second class's x: its four parts
    x = torch.arange(32.0).expand(2, 24, 32, 32)  # a ramp in x
    rois = torch.tensor([[0, 10.0, 10.0, 29.0, 29.0]])
    moved = pack(x, rois) - DeformPSRoIPool(**SIZES)(pack.score_maps(x), rois)
    expected = torch.zeros(1, 4, 3, 2)
    expected[:, 2:] = 0.1 * 1.5 * 10  # half of the channels, by a share of the RoI's 10 pixels
    torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-4)


def test_without_offsets_the_conv_pack_is_r_fcns():
    pack, x = conv_pack(classes=0), torch.randn(2, 24, 12, 10)
    assert sorted(pack.state_dict()) == ["score_maps.bias", "score_maps.weight"]
    torch.testing.assert_close(pack(x, ROIS), DeformPSRoIPool(**SIZES)(pack.score_maps(x), ROIS))


@PACKS
def test_no_rois(pack):
    pack, x = pack(), torch.randn(2, 24, 12, 10, requires_grad=True)
    output = pack(x, torch.zeros(0, 5))
    assert output.shape == (0, 4, 3, 2)
    output.sum().backward()
    assert all(parameter.grad is not None for parameter in pack.parameters())


@PACKS
def test_gradients_reach_every_parameter(pack):
    pack, x = randomised(pack()), torch.randn(2, 24, 12, 10, requires_grad=True)
    pack(x, ROIS).square().sum().backward()
    for name, tensor in [("x", x), *pack.named_parameters()]:
        assert tensor.grad.abs().sum() > 0, name


@PACKS
def test_offsets_stay_zero_whatever_rule_initialises_the_model(pack):
    initialize = pytest.importorskip("mmengine.model").initialize
    pack = pack()
    initialize(pack, dict(type="Constant", layer=["Conv2d", "Linear"], val=3))
    predictors = [m for m in pack.modules() if isinstance(m, (ZeroInitConv2d, ZeroInitLinear))]
    assert len(predictors) == 1
    assert not any(parameter.any() for parameter in predictors[0].parameters())


@PACKS
def test_autocast_and_compile(pack):
    pack, x = randomised(pack()), torch.randn(2, 24, 12, 10)
    expected = pack(x, ROIS)
    with torch.autocast("cpu", torch.bfloat16):
        assert pack(x, ROIS).dtype is torch.bfloat16
    compiled = torch.compile(pack, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, ROIS), expected)


@PACKS
def test_copies_pickles_and_shows_itself(pack):
    pack, x = randomised(pack()), torch.randn(2, 24, 12, 10)
    for twin in (copy.deepcopy(pack), pickle.loads(pickle.dumps(pack))):
        assert torch.equal(twin(x, ROIS), pack(x, ROIS))
    assert "output_size=(3, 2), group_size=(3, 2), part_size=(2, 2), sample_per_part=2" in repr(pack)
