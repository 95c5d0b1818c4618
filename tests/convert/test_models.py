"""Whatever mmdet's registry builds can be made deformable, computes the same at first, and trains."""

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("mmdet")

from mmdet.registry import MODELS
from mmengine.registry import init_default_scope

import dcn_plugin.mmdet  # noqa: F401
from dcn_plugin.layers import DeformConv2dPack, ModulatedDeformConv2dPack

from .models import BACKBONES, HEADS, NECKS

WITHOUT_SPATIAL_CONVOLUTION = {"DyHead"}  # all of DyHead's are deformable already, or predict offsets


@pytest.fixture(autouse=True)
def mmdet_scope():
    init_default_scope("mmdet")


def tensors(output):
    if isinstance(output, torch.Tensor):
        return [output] if output.is_floating_point() else []
    return [tensor for part in output for tensor in tensors(part)] if isinstance(output, (tuple, list)) else []


def registered(package):
    MODELS.import_from_location()
    return {name for name, kind in MODELS.module_dict.items() if kind.__module__.startswith(package)}


def test_every_backbone_and_neck_is_tested():
    assert registered("mmdet.models.backbones") == set(BACKBONES)
    assert registered("mmdet.models.necks") - WITHOUT_SPATIAL_CONVOLUTION == set(NECKS)


@pytest.mark.parametrize("kind", [DeformConv2dPack, ModulatedDeformConv2dPack])
@pytest.mark.parametrize(("name", "case"), [*BACKBONES.items(), *NECKS.items(), *HEADS.items()])
def test_becomes_deformable(name, case, kind):
    config, targets, inputs = case
    plain = MODELS.build(dict(type=name, **config))
    for module in plain.modules():
        if type(module).__name__ == "TridentConv":
            nn.init.kaiming_normal_(module.weight)  # mmdet leaves this one uninitialised
    model = MODELS.build(dict(type=name, **config, deformable=dict(type=kind, targets=targets)))
    model.load_state_dict(plain.state_dict())  # strict: nothing but offsets may be missing
    new = model.state_dict().keys() - plain.state_dict().keys()
    assert new and all(".conv_offset." in key for key in new)
    plain.eval()
    model.eval()

    x = inputs()
    expected, actual = tensors(plain(x)), tensors(model(x))
    assert len(expected) == len(actual) > 0
    for one, other in zip(expected, actual, strict=True):
        assert (one - other).abs().max() <= 1e-5 * max(1, one.abs().max())

    layers = [module for module in model.modules() if type(module) is kind]
    initialised = copy.deepcopy(model)
    if hasattr(initialised, "init_weights"):  # CLRFPN is a plain nn.Module
        initialised.init_weights()
    offsets = [parameter for name, parameter in initialised.named_parameters() if ".conv_offset." in name]
    assert len(offsets) >= 2 * len(layers) and not any(parameter.any() for parameter in offsets)
    sum(tensor.square().sum() for tensor in actual).backward()
    gradients = [layer.conv_offset.weight.grad for layer in layers]
    assert all(gradient is not None and gradient.isfinite().all() and gradient.any() for gradient in gradients)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert all(layer.conv_offset.weight.any() for layer in layers)


@pytest.mark.parametrize("name", ["RetinaSepBNHead", "RTMDetSepBNHead"])
def test_shared_convolutions_stay_shared(name):
    config, targets, _ = HEADS[name]
    head = MODELS.build(dict(type=name, **config, deformable=dict(type="DCN", targets=targets)))
    first, second = (head.cls_convs[level][1].conv for level in range(2))
    assert first is second and type(first) is DeformConv2dPack
    assert isinstance(head.cls_convs[0][1].bn, nn.BatchNorm2d)
