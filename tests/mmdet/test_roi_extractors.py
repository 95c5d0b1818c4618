"""The RoI extractors: level assignment and aggregation, types of RoI layers, precision and gradients."""

import pytest
import torch
from torch import nn

pytest.importorskip("mmdet")

from mmdet.models.roi_heads.roi_extractors import GenericRoIExtractor, SingleRoIExtractor
from mmdet.registry import MODELS

from dcn_plugin import layers
from dcn_plugin.ops import deform_ps_roi_pool, deform_roi_align

PACKS = pytest.mark.parametrize("pack", ["DeformRoIAlignPack", "ModulatedDeformRoIAlignPack"])
FEATS = tuple(torch.randn(2, 4, 256 // stride, 256 // stride) for stride in (4, 8, 16, 32))
ROIS = torch.tensor(
    [
        [0, 10.0, 20.0, 40.0, 60.0],  # level 0
        [1, 0.0, 0.0, 250.0, 240.0],  # level 2
        [1, 5.0, 5.0, 130.0, 140.0],  # level 1
        [0, 30.0, 30.0, 60.0, 50.0],  # level 0
    ]
)
LEVELS = [0, 2, 1, 0]


def extractor(kind="DeformRoIAlign", strides=(4, 8, 16, 32), **roi_layer):
    if "Pack" in str(kind):
        roi_layer = dict(output_channels=4, deform_fc_channels=8) | roi_layer
    return MODELS.build(
        dict(
            type="DeformRoIExtractor",
            roi_layer=dict(type=kind, output_size=3, sampling_ratio=2) | roi_layer,
            out_channels=4,
            featmap_strides=list(strides),
        )
    )


def pooled_from(levels, rois=ROIS):
    """The plain pooling of each RoI from the named level."""
    rows = [
        deform_roi_align(FEATS[level], roi[None], None, 3, 1 / (4 * 2**level), 2)
        for level, roi in zip(levels, rois, strict=True)
    ]
    return torch.cat(rows)


@pytest.mark.parametrize("kind", ["DeformRoIAlign", "DeformRoIAlignPack"])
def test_each_roi_is_pooled_from_its_level(kind):
    built = extractor(kind)
    assert isinstance(built, SingleRoIExtractor) and built.num_inputs == 4
    torch.testing.assert_close(built(FEATS, ROIS), pooled_from(LEVELS))


def test_assigns_levels_and_rescales_as_single_roi_extractor():
    rois = torch.rand(200, 5, generator=torch.Generator().manual_seed(0)) * 128
    rois[:, 0] = torch.arange(200) % 2
    rois[:, 3:] += rois[:, 1:3]
    # With ratio 2, aligned RoI align samples where deformable RoI align does, inside the map.
    single = SingleRoIExtractor(dict(type="RoIAlign", output_size=3, sampling_ratio=2, aligned=True), 4, [4, 8, 16, 32])
    for factor in (None, 0.7):
        torch.testing.assert_close(extractor()(FEATS, rois, factor), single(FEATS, rois, factor), rtol=1e-4, atol=1e-4)


@PACKS
def test_one_map(pack):
    built = extractor(pack, strides=(16,))
    share = 0.5 if pack.startswith("Modulated") else 1.0
    torch.testing.assert_close(built(FEATS[2:3], ROIS), share * pooled_from([2] * 4))


@PACKS
@pytest.mark.parametrize("count", [0, 1])
def test_every_parameter_has_a_gradient_however_few_the_rois(pack, count):
    built = extractor(pack)
    feats = [feat.clone().requires_grad_() for feat in FEATS]
    output = built(feats, ROIS[:count])
    assert output.shape == (count, 4, 3, 3)
    output.sum().backward()
    for tensor in [*feats, *built.parameters()]:
        assert tensor.grad is not None


def test_a_roi_that_is_not_a_number_gives_zeros_and_leaves_the_others():
    rois = ROIS.clone()
    rois[1, 3] = float("nan")
    expected = pooled_from(LEVELS)
    expected[1] = 0
    torch.testing.assert_close(extractor()(FEATS, rois), expected)


def test_rois_keep_their_precision_beside_half_precision_maps():
    feat = torch.randn(1, 4, 8, 320)
    far = torch.tensor([[0, 1001.3, 3.1, 1005.9, 20.7]])  # in bfloat16: from 1000 to 1008
    expected = deform_roi_align(feat, far, None, 3, 1 / 4, 2)
    with torch.autocast("cpu", torch.bfloat16):
        output = extractor(strides=(4,))((feat.bfloat16(),), far)
    assert output.dtype is torch.bfloat16
    torch.testing.assert_close(output.float(), expected, rtol=0, atol=0.03)


class ForeignLayer(nn.Module):
    def __init__(self, spatial_scale, output_size, **others):
        super().__init__()
        self.spatial_scale = spatial_scale


@pytest.mark.parametrize("layer", [layers.DeformRoIAlignPack, ForeignLayer])
def test_a_class_may_be_given(layer):
    built = extractor(layer)
    assert [type(level) for level in built.roi_layers] == [layer] * 4
    assert [level.spatial_scale for level in built.roi_layers] == [1 / 4, 1 / 8, 1 / 16, 1 / 32]


def test_unknown_types_are_told_the_choices():
    with pytest.raises(ValueError, match="one of DeformRoIAlign, DeformRoIAlignPack, Modulated.*got 'RoIAlign'"):
        extractor("RoIAlign")


def test_more_maps_than_strides_is_an_error():
    with pytest.raises(IndexError):
        extractor(strides=(4, 8))(FEATS, ROIS)


def generic(kind="DeformRoIAlign", out_channels=4, strides=(4, 8, 16, 32), **options):
    roi_layer = dict(type=kind, output_size=3, sampling_ratio=2)
    if "Pack" in kind:
        roi_layer |= dict(output_channels=4, deform_fc_channels=8)
    return MODELS.build(
        dict(
            type="DeformGenericRoIExtractor",
            roi_layer=roi_layer,
            out_channels=out_channels,
            featmap_strides=list(strides),
            **options,
        )
    )


@pytest.mark.parametrize("factor", [None, 0.7])
@pytest.mark.parametrize(("aggregation", "out_channels"), [("sum", 4), ("concat", 16)])
def test_aggregates_as_generic_roi_extractor(aggregation, out_channels, factor):
    plugin = dict(type="ConvModule", in_channels=4, out_channels=4, kernel_size=3, padding=1)
    last = plugin | dict(in_channels=out_channels, out_channels=out_channels)
    ours = generic("DeformRoIAlign", out_channels, aggregation=aggregation, pre_cfg=plugin, post_cfg=last)
    theirs = GenericRoIExtractor(
        roi_layer=dict(type="RoIAlign", output_size=3, sampling_ratio=2, aligned=True),
        out_channels=out_channels,
        featmap_strides=[4, 8, 16, 32],
        aggregation=aggregation,
        pre_cfg=plugin,
        post_cfg=last,
    )
    assert isinstance(ours, GenericRoIExtractor)
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(FEATS, ROIS, factor), theirs(FEATS, ROIS, factor), rtol=1e-4, atol=1e-4)


@PACKS
@pytest.mark.parametrize("count", [0, 2])
def test_generic_gives_every_parameter_a_gradient(pack, count):
    built = generic(pack)
    output = built(FEATS, ROIS[:count])
    assert output.shape == (count, 4, 3, 3)
    output.sum().backward()
    assert all(parameter.grad is not None for parameter in built.parameters())


def test_generic_scales_the_rois_of_a_single_map():
    built = generic(strides=(16,))
    half = torch.tensor([[1, 62.5, 60.0, 187.5, 180.0]])
    torch.testing.assert_close(built(FEATS[2:3], ROIS[1:2], 0.5), pooled_from([2], half))


def test_concatenated_channels_are_checked():
    with pytest.raises(ValueError, match="out_channels is 4, but the levels together have 16"):
        generic(aggregation="concat")(FEATS, ROIS)


def ps_extractor(kind, strides=(8,), **roi_layer):
    roi_layer = dict(type=kind, output_size=2, sample_per_part=2) | roi_layer
    return MODELS.build(
        dict(type="DeformPSRoIExtractor", roi_layer=roi_layer, out_channels=3, featmap_strides=list(strides))
    )


PS_LAYERS = {
    "DeformPSRoIPool": (12, {}),
    "DeformPSRoIPoolPack": (12, dict(output_dim=3, deform_fc_channels=8)),
    "DeformRFCNPool": (5, dict(in_channels=5, output_dim=3, offset_classes=3)),
}


@pytest.mark.parametrize("kind", PS_LAYERS)
def test_position_sensitive(kind):
    channels, options = PS_LAYERS[kind]
    built, feat = ps_extractor(kind, **options), torch.randn(2, channels, 32, 32)
    maps = built.roi_layers[0].score_maps(feat) if kind == "DeformRFCNPool" else feat
    expected = deform_ps_roi_pool(maps, ROIS, None, 2, sample_per_part=2, spatial_scale=1 / 8)
    torch.testing.assert_close(built((feat,), ROIS), expected)  # untrained: straight bins
    half = torch.tensor([[1, 62.5, 60.0, 187.5, 180.0]])
    torch.testing.assert_close(built((feat,), ROIS[1:2], 0.5), built((feat,), half))
    for count in (0, 2):
        built.zero_grad()
        output = built((feat,), ROIS[:count])
        assert output.shape == (count, 3, 2, 2)
        if list(built.parameters()):
            output.sum().backward()
        assert all(parameter.grad is not None for parameter in built.parameters())


def test_position_sensitive_on_a_pyramid():
    built = ps_extractor("DeformPSRoIPool", (4, 8, 16, 32), group_size=1)
    rows = [
        deform_ps_roi_pool(FEATS[level], roi[None], None, 2, 1, sample_per_part=2, spatial_scale=1 / (4 * 2**level))
        for level, roi in zip(LEVELS, ROIS, strict=True)
    ]
    torch.testing.assert_close(built(FEATS, ROIS), torch.cat(rows))


def test_position_sensitive_layers_are_named():
    with pytest.raises(ValueError, match="DeformPSRoIExtractor must be one of DeformRFCNPool, .*got 'DeformRoIAlign'"):
        ps_extractor("DeformRoIAlign")
