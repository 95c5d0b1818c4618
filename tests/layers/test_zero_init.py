"""Predicted offsets start at zero, and no rule that initialises a model sends them astray."""

import pytest
import torch
from torch import nn

from dcn_plugin.layers import (
    DeformConv2dPack,
    DeformRoIAlignPack,
    ModulatedDeformConv2dPack,
    ModulatedDeformRoIAlignPack,
)

mmengine_model = pytest.importorskip("mmengine.model")
CONVS = pytest.mark.parametrize("pack", [DeformConv2dPack, ModulatedDeformConv2dPack])
RULES = [
    dict(type="Kaiming", layer="Conv2d"),
    dict(type="Normal", layer=["Conv2d", "Linear"], std=0.01, bias=3.0),
    dict(type="Xavier", layer="Conv2d", distribution="uniform"),
    dict(type="Constant", layer="Conv2d", val=1.0),
    dict(type="Normal", std=0.01, override=dict(type="Normal", name="conv", std=0.01, bias_prob=0.01)),
]


def is_zero(layer):
    return not any(parameter.any() for parameter in layer.parameters())


class Head(mmengine_model.BaseModule):
    def __init__(self, conv, init_cfg):
        super().__init__(init_cfg)
        self.conv = conv
        self.tower = nn.Sequential(nn.Conv2d(4, 4, 3), type(conv)(4, 4, 3))


@CONVS
@pytest.mark.parametrize("rule", RULES)
def test_mmengines_rules(pack, rule):
    head = Head(pack(4, 4, 3), rule)
    before = head.conv.weight.clone()
    head.init_weights()
    assert not torch.equal(head.conv.weight, before)  # the rule treats the layer itself as the convolution it is
    assert is_zero(head.conv.conv_offset)
    assert is_zero(head.tower[1].conv_offset)


@CONVS
def test_rules_given_to_initialize_alone(pack):
    head = Head(pack(4, 4, 3), None)
    for rule in RULES:
        mmengine_model.initialize(head, rule)
    assert is_zero(head.conv.conv_offset)


@CONVS
def test_loops_over_convolutions(pack):
    model = nn.Sequential(pack(4, 4, 3))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            mmengine_model.normal_init(module, std=0.01, bias=1.0)
            module.reset_parameters()
    model.apply(lambda m: nn.init.normal_(m.weight) if isinstance(m, nn.Conv2d) else None)
    assert is_zero(model[0].conv_offset)


@CONVS
def test_other_uses_of_apply_reach_the_offsets(pack):
    model = nn.Sequential(pack(4, 4, 3))
    seen = []
    model.apply(seen.append)
    assert model[0].conv_offset in seen


@pytest.mark.parametrize("pack", [DeformRoIAlignPack, ModulatedDeformRoIAlignPack])
def test_rois_packs(pack):
    pack = pack(2, output_channels=4, deform_fc_channels=8)
    mmengine_model.initialize(pack, dict(type="Normal", layer="Linear", std=1.0, bias=3.0))
    assert pack.offset_fc[0].bias.eq(3).all()
    assert is_zero(pack.offset_fc[-1])
    if hasattr(pack, "mask_fc"):
        assert is_zero(pack.mask_fc[2])


@CONVS
@pytest.mark.parametrize("depth", [50, 101])
def test_resnet_from_scratch(pack, depth):
    pytest.importorskip("mmdet")
    from mmdet.models.backbones import ResNet

    import dcn_plugin.mmdet  # noqa: F401 (registers DCN and DCNv2)

    backbone = ResNet(
        depth,
        base_channels=2,
        stem_channels=2,
        dcn=dict(type="DCN" if pack is DeformConv2dPack else "DCNv2", deform_groups=1),
        stage_with_dcn=(False, True, True, True),
    )
    backbone.init_weights()
    convs = [module for module in backbone.modules() if isinstance(module, pack)]
    assert len(convs) == {50: 13, 101: 30}[depth]
    assert all(is_zero(conv.conv_offset) for conv in convs)
    weights = torch.cat([conv.weight.flatten() for conv in convs if conv.out_channels == 16])
    assert abs(weights.std() / (2 / (9 * 16)) ** 0.5 - 1) < 0.1  # Kaiming's rule reached them
