"""The RoI layers: constructors, equality with mmcv's, and predicted offsets and masks."""

import copy
import inspect
import pickle

import pytest
import torch

from dcn_plugin.layers import DeformRoIAlign, DeformRoIAlignPack, ModulatedDeformRoIAlignPack
from dcn_plugin.ops import deform_roi_align

PACKS = pytest.mark.parametrize("pack", [DeformRoIAlignPack, ModulatedDeformRoIAlignPack])
LAYERS = pytest.mark.parametrize("layer", [DeformRoIAlign, DeformRoIAlignPack, ModulatedDeformRoIAlignPack])
ROIS = torch.tensor([[0, 2.0, 3.0, 20.0, 17.0], [1, -4.0, 0.0, 9.0, 40.0], [0, 8.0, 8.0, 8.0, 8.0]])


def small(pack):
    return pack(output_size=(3, 2), output_channels=4, deform_fc_channels=16, spatial_scale=0.5)


def randomised(layer):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return layer


def mmcvs(layer, mmcv_ops):
    return getattr(mmcv_ops, layer.__name__.replace("Align", "Pool"))


@LAYERS
def test_constructor_is_mmcvs(mmcv_ops, layer):
    ours, theirs = (inspect.signature(cls).parameters.values() for cls in (layer, mmcvs(layer, mmcv_ops)))
    assert [(p.name, p.default) for p in ours if p.kind is not p.KEYWORD_ONLY] == [(p.name, p.default) for p in theirs]


@PACKS
def test_loads_mmcvs_state_dict_and_computes_with_it(mmcv_ops, pack):
    theirs, ours = randomised(small(mmcvs(pack, mmcv_ops))), small(pack)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 4, 12, 10)
    # mmcv pools on CUDA alone; its linear layers run here, with our operator.
    straight = deform_roi_align(x, ROIS, None, (3, 2), 0.5)
    offset = theirs.offset_fc(straight.flatten(1)).view(3, 2, 3, 2)
    expected = deform_roi_align(x, ROIS, offset, (3, 2), 0.5)
    if pack is ModulatedDeformRoIAlignPack:
        expected = expected * theirs.mask_fc(straight.flatten(1)).view(3, 1, 3, 2)
    torch.testing.assert_close(ours(x, ROIS), expected)
    assert (expected - straight).abs().max() > 0.1


@PACKS
def test_new_pack_pools_straight(pack):
    x = torch.randn(2, 4, 12, 10)
    straight = DeformRoIAlign((3, 2), spatial_scale=0.5)(x, ROIS)
    share = 0.5 if pack is ModulatedDeformRoIAlignPack else 1.0
    torch.testing.assert_close(small(pack)(x, ROIS), share * straight)


def test_given_offset_and_mask():
    x, offset, mask = torch.randn(2, 4, 12, 10), torch.randn(3, 2, 3, 3), torch.rand(3, 1, 3, 3)
    layer = DeformRoIAlign(3, spatial_scale=0.5, sampling_ratio=2, gamma=0.2)
    expected = deform_roi_align(x, ROIS, offset, 3, 0.5, 2, 0.2, mask)
    torch.testing.assert_close(layer(x, ROIS, offset, mask), expected)
    assert (layer(x, ROIS, offset) - expected).abs().max() > 0.01


@PACKS
def test_predicted_offsets_are_x_first(pack):
    pack = small(pack)
    bins = 3 * 2
    with torch.no_grad():
        pack.offset_fc[-1].bias[:bins] = 1.5  # the first half moves the bins in x, by gamma * 1.5 of the width
    x = torch.arange(32.0).expand(2, 4, 32, 32)  # a ramp in x
    rois = torch.tensor([[0, 10.0, 10.0, 30.0, 30.0]])
    moved = pack(x, rois) - small(type(pack))(x, rois)
    share = 0.5 if isinstance(pack, ModulatedDeformRoIAlignPack) else 1.0
    torch.testing.assert_close(moved, torch.full_like(moved, share * 0.1 * 1.5 * 10))


@PACKS
def test_no_rois(pack):
    pack, x = small(pack), torch.randn(2, 4, 12, 10, requires_grad=True)
    output = pack(x, torch.zeros(0, 5))
    assert output.shape == (0, 4, 3, 2)
    output.sum().backward()
    assert all(parameter.grad is not None for parameter in pack.parameters())


@PACKS
def test_gradients_reach_every_parameter(pack):
    pack, x = randomised(small(pack)), torch.randn(2, 4, 12, 10, requires_grad=True)
    pack(x, ROIS).square().sum().backward()
    for name, tensor in [("x", x), *pack.named_parameters()]:
        assert tensor.grad.abs().sum() > 0, name


@PACKS
def test_autocast_and_compile(pack):
    pack, x = randomised(small(pack)), torch.randn(2, 4, 12, 10)
    expected = pack(x, ROIS)
    with torch.autocast("cpu", torch.bfloat16):
        assert pack(x, ROIS).dtype is torch.bfloat16
    compiled = torch.compile(pack, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, ROIS), expected)


@PACKS
def test_copies_pickles_and_shows_itself(pack):
    pack, x = randomised(small(pack)), torch.randn(2, 4, 12, 10)
    for twin in (copy.deepcopy(pack), pickle.loads(pickle.dumps(pack))):
        assert torch.equal(twin(x, ROIS), pack(x, ROIS))
    assert "output_size=(3, 2), spatial_scale=0.5, sampling_ratio=0, gamma=0.1" in repr(pack)


@PACKS
def test_wrong_channels_are_named(pack):
    with pytest.raises(ValueError, match=r"output_channels is 4, but input has shape \(2, 5, 12, 10\)"):
        small(pack)(torch.randn(2, 5, 12, 10), ROIS)


@PACKS
def test_symbolic_trace(pack):
    layer, x = randomised(small(pack)), torch.randn(2, 4, 12, 10)
    traced = torch.fx.symbolic_trace(layer)
    assert torch.equal(traced(x, ROIS), layer(x, ROIS))
    with pytest.raises(ValueError, match="output_channels is 4"):
        traced(x[:, :3], ROIS)
