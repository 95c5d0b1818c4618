"""``max_offset``: the layers' bound of their offsets."""

import pytest
import torch
from torch import nn

from dcn_plugin import convert
from dcn_plugin.layers import (
    DeformConv2d,
    DeformConv2dPack,
    DeformPSRoIPool,
    DeformPSRoIPoolPack,
    DeformRFCNPool,
    DeformRoIAlign,
    DeformRoIAlignPack,
    ModulatedDeformConv2d,
    ModulatedDeformConv2dPack,
    ModulatedDeformRoIAlignPack,
)
from dcn_plugin.layers.max_offset import bounded
from dcn_plugin.ops import deform_conv2d, deform_ps_roi_pool, deform_roi_align

ROIS = torch.tensor([[0, 4.0, 4.0, 40.0, 56.0], [0, 10.0, 0.0, 30.0, 20.0]])
EVERY_LAYER = pytest.mark.parametrize(
    "layer",
    [
        lambda **bound: DeformConv2d(4, 4, 3, **bound),
        lambda **bound: ModulatedDeformConv2d(4, 4, 3, **bound),
        lambda **bound: DeformConv2dPack(4, 4, 3, **bound),
        lambda **bound: ModulatedDeformConv2dPack(4, 4, 3, **bound),
        lambda **bound: DeformRoIAlign(2, **bound),
        lambda **bound: DeformRoIAlignPack(2, 4, 8, **bound),
        lambda **bound: ModulatedDeformRoIAlignPack(2, 4, 8, **bound),
        lambda **bound: DeformPSRoIPool(2, **bound),
        lambda **bound: DeformPSRoIPoolPack(2, 1, deform_fc_channels=8, **bound),
        lambda **bound: DeformRFCNPool(2, 4, 1, **bound),
    ],
)


def offsets(*shape, beyond):
    """Offsets of which about half are beyond a bound, none near it or near a whole pixel."""
    offset = torch.rand(shape, dtype=torch.float64) * 0.4 + 0.3
    return torch.where(torch.rand(shape) < 0.5, offset, offset + beyond) * torch.randn(shape).sign()


@EVERY_LAYER
def test_every_layer_takes_it_shows_it_and_refuses_nonsense(layer):
    assert "max_offset=2.5" in repr(layer(max_offset=2.5))
    assert layer().max_offset is None and "max_offset" not in repr(layer())
    for nonsense in (0, -1, float("nan"), "2"):
        with pytest.raises(ValueError, match="max_offset must be a positive number"):
            layer(max_offset=nonsense)


@pytest.mark.parametrize("layer", [DeformConv2d, ModulatedDeformConv2d])
def test_convolution(layer):
    conv = layer(4, 6, 3, padding=1, max_offset=0.75, dtype=torch.float64)
    x = torch.randn(2, 4, 6, 7, dtype=torch.float64)
    offset = offsets(2, 18, 6, 7, beyond=1).requires_grad_()
    mask = (torch.rand(2, 9, 6, 7, dtype=torch.float64),) if layer is ModulatedDeformConv2d else ()
    out = conv(x, offset, *mask)
    bounded = offset.detach().clamp(-0.75, 0.75).requires_grad_()
    expected = deform_conv2d(x, bounded, conv.weight, conv.bias, padding=1, mask=mask[0] if mask else None)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)

    out.square().sum().backward()
    expected.square().sum().backward()
    beyond = offset.abs() > 0.75
    assert beyond.any() and not beyond.all()
    assert not offset.grad[beyond].any()
    torch.testing.assert_close(offset.grad[~beyond], bounded.grad[~beyond], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_gradient_at_the_bound_itself_is_1(dtype):
    """On every torch: that of torch.clamp is 1 before version 2.14 and 0 from then on."""
    offset = torch.tensor([-3.0, -2.0, -1.0, 0.0, 2.0, 3.0], dtype=dtype, requires_grad=True)
    out = bounded(offset, 2.0)
    assert out.dtype is dtype
    assert out.tolist() == [-2, -2, -1, 0, 2, 2]
    out.sum().backward()
    assert offset.grad.tolist() == [0, 1, 1, 1, 1, 0]


@pytest.mark.parametrize("pack", [DeformConv2dPack, ModulatedDeformConv2dPack])
def test_a_pack_bounds_its_offsets_and_not_its_mask(pack):
    conv = pack(4, 4, 3, padding=1, max_offset=2)
    with torch.no_grad():
        conv.conv_offset.bias.fill_(5.0)
    x = torch.randn(1, 4, 6, 6)
    mask = torch.full((1, 9, 6, 6), 5.0).sigmoid() if pack is ModulatedDeformConv2dPack else None
    expected = deform_conv2d(x, torch.full((1, 18, 6, 6), 2.0), conv.weight, conv.bias, padding=1, mask=mask)
    out = conv(x)
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    gradient = conv.conv_offset.bias.grad
    assert not gradient[:18].any()
    assert pack is DeformConv2dPack or gradient[18:].all()


def test_an_offset_that_is_not_a_number_samples_nothing_still():
    conv = DeformConv2d(1, 1, 1, max_offset=1)
    assert not conv(torch.ones(1, 1, 3, 3), torch.full((1, 2, 3, 3), float("nan"))).any()


def test_roi_align_bounds_the_share_of_the_roi():
    layer = DeformRoIAlign(2, spatial_scale=0.25, sampling_ratio=2, gamma=0.1, max_offset=0.05)
    x, offset = torch.randn(1, 4, 16, 16, dtype=torch.float64), offsets(2, 2, 2, 2, beyond=1).requires_grad_()
    rois = ROIS.double()
    out = layer(x, rois, offset)
    bounded = offset.detach().clamp(-0.5, 0.5)
    torch.testing.assert_close(out, deform_roi_align(x, rois, bounded, 2, 0.25, 2, 0.1), rtol=0, atol=1e-12)
    out.square().sum().backward()
    beyond = offset.abs() > 0.5
    assert not offset.grad[beyond].any() and offset.grad[~beyond].any()
    torch.testing.assert_close(layer(x, rois), deform_roi_align(x, rois, None, 2, 0.25, 2))


def test_ps_roi_pool_bounds_the_share_of_the_roi():
    layer = DeformPSRoIPool(2, spatial_scale=0.25, trans_std=0.1, max_offset=0.05)
    x, offset = torch.randn(1, 8, 16, 16, dtype=torch.float64), offsets(2, 2, 2, 2, beyond=1).requires_grad_()
    rois = ROIS.double()
    out = layer(x, rois, offset)
    expected = deform_ps_roi_pool(x, rois, offset.detach().clamp(-0.5, 0.5), 2, spatial_scale=0.25)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    out.square().sum().backward()
    beyond = offset.abs() > 0.5
    assert not offset.grad[beyond].any() and offset.grad[~beyond].any()


def test_roi_packs_pass_it_on():
    x = torch.randn(1, 4, 16, 16)
    for pack in (DeformRoIAlignPack(2, 4, 8, 0.25, max_offset=0.2), DeformPSRoIPoolPack(2, 1, max_offset=0.2)):
        with torch.no_grad():
            pack.offset_fc[-1].bias.fill_(50.0)
        wild = pack(x, ROIS)
        with torch.no_grad():
            pack.offset_fc[-1].bias.fill_(2.0)  # 0.1 of which is the bound
        torch.testing.assert_close(wild, pack(x, ROIS))


def test_no_scale_needs_no_bound():
    layer = DeformRoIAlign(2, gamma=0, max_offset=0.5)
    x = torch.randn(1, 4, 64, 64)
    torch.testing.assert_close(layer(x, ROIS, torch.randn(2, 2, 2, 2)), layer(x, ROIS))


def test_conversion_passes_it_on():
    conv = convert(nn.Conv2d(4, 4, 3), max_offset=3)
    assert conv.max_offset == 3.0
    with pytest.raises(ValueError, match="max_offset must be a positive number"):
        convert(nn.Conv2d(4, 4, 3), max_offset=-3)


@pytest.mark.parametrize("pack", [DeformConv2dPack, ModulatedDeformConv2dPack])
def test_compiles_to_one_graph(pack):
    conv, x = pack(4, 4, 3, padding=1, max_offset=0.5), torch.randn(1, 4, 6, 6)
    with torch.no_grad():
        conv.conv_offset.bias.uniform_(-1, 1)
    torch.testing.assert_close(torch.compile(conv, backend="aot_eager", fullgraph=True)(x), conv(x))
