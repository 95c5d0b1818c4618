"""`fallback_on_stride=True` leaves the convolutions of stride 2, and no others, plain."""

import pytest
import torch

pytest.importorskip("mmdet")

from mmdet.models import backbones
from mmdet.registry import MODELS
from mmengine.registry import DefaultScope, init_default_scope
from torch import nn

from dcn_plugin.layers import DeformConv2dPack, ModulatedDeformConv2dPack

SLIM = dict(base_channels=4, stem_channels=4)
FAMILIES = {
    "ResNet": dict(depth=50, **SLIM),
    "ResNet, stride in conv1": dict(type="ResNet", depth=50, style="caffe", **SLIM),
    "ResNet, dilated": dict(type="ResNet", depth=50, strides=(1, 2, 2, 1), dilations=(1, 1, 1, 2), **SLIM),
    "ResNetV1d": dict(depth=50, **SLIM),
    "ResNeXt": dict(depth=50, groups=2, base_width=4, **SLIM),
    "Res2Net": dict(depth=50, scales=4, base_width=26, **SLIM),
    "ResNeSt": dict(depth=50, radix=2, reduction_factor=4, **SLIM),
    "ResNeSt, stride in conv2": dict(type="ResNeSt", depth=50, radix=2, avg_down_stride=False, **SLIM),
    "RegNet": dict(arch="regnetx_400mf"),
    "DetectoRS_ResNet": dict(depth=50, **SLIM),
    "DetectoRS_ResNeXt": dict(depth=50, groups=2, base_width=4, **SLIM),
}


@pytest.fixture(autouse=True)
def mmdet_scope():
    init_default_scope("mmdet")
    yield
    DefaultScope._instance_dict.clear()


def build(family, stages=(False, True, True, True), **dcn):
    config = {"type": family, **FAMILIES[family]}
    model = MODELS.build(dict(config, dcn=dict(type="DCNv2", **dcn), stage_with_dcn=stages))
    model.eval()
    return model


def spatial_convs(model):
    """Name, stride and class of the convolutions of the stages that take part, in all blocks."""
    for name, module in model.named_modules():
        if name.startswith("layer") and isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
            yield name, module.stride, type(module)


@pytest.mark.parametrize("family", FAMILIES)
def test_strided_convolutions_stay_plain(family):
    model = build(family, fallback_on_stride=True, deform_groups=2)
    convs = list(spatial_convs(model))
    for name, stride, kind in convs:
        deformable = stride == (1, 1) and not name.startswith("layer1")
        assert kind is (ModulatedDeformConv2dPack if deformable else nn.Conv2d), (name, stride, kind)
    strides_in_conv2 = family not in ("ResNet, stride in conv1", "ResNeSt")
    assert any(stride == (2, 2) for _, stride, _ in convs) == strides_in_conv2
    assert any(kind is ModulatedDeformConv2dPack for *_, kind in convs)
    assert all(module.deform_groups == 2 for module in model.modules() if isinstance(module, ModulatedDeformConv2dPack))
    if not family.startswith("DetectoRS"):  # whose forward wants more than an image
        assert model(torch.randn(1, 3, 64, 64))[-1].shape[2] in (2, 4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dcn", [dict(fallback_on_stride=False), {}], ids=["False", "unsaid"])
def test_otherwise_all_are_deformable(family, dcn):
    for name, _, kind in spatial_convs(build(family, **dcn)):
        assert kind is (nn.Conv2d if name.startswith("layer1") else ModulatedDeformConv2dPack), name


def test_a_first_block_of_stride_1_is_deformable():
    model = build("ResNet", stages=(True, True, False, True), fallback_on_stride=True)
    for name, stride, kind in spatial_convs(model):
        assert (kind is ModulatedDeformConv2dPack) == (stride == (1, 1) and not name.startswith("layer3")), name


def test_the_config_stays_as_it_was():
    dcn = dict(type="DCN", fallback_on_stride=True)
    for _ in range(2):
        model = backbones.ResNet(50, dcn=dcn, stage_with_dcn=(False, True, True, True), **SLIM)
        assert sum(type(module) is DeformConv2dPack for module in model.modules()) == 13 - 3
    assert dcn == dict(type="DCN", fallback_on_stride=True)


def test_offsets_start_at_zero():
    model = build("ResNet", fallback_on_stride=True)
    model.init_weights()
    for module in model.modules():
        if isinstance(module, ModulatedDeformConv2dPack):
            assert not module.conv_offset.weight.any() and module.weight.any()


def test_conv_cfg_beside_dcn_is_still_refused():
    with pytest.raises(AssertionError, match="conv_cfg must be None for DCN"):
        backbones.ResNet(
            50,
            conv_cfg=dict(type="Conv2d"),
            dcn=dict(type="DCN", fallback_on_stride=True),
            stage_with_dcn=(False, False, False, True),
            **SLIM,
        )
