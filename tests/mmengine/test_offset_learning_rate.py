"""`dcn_offset_lr_mult` and `custom_keys` reach the offset predictors of our layers, as they reach those of mmcv's."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("mmdet")

from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.optim import DefaultOptimWrapperConstructor, build_optim_wrapper
from mmengine.registry import DefaultScope, init_default_scope
from torch import nn

import dcn_plugin
from dcn_plugin import layers
from dcn_plugin.mmengine import patches

CONFIGS = Path(__file__).parents[2] / "configs" / "coco"
LR, DECAY = 0.02, 0.1


class Nested(nn.Module):
    """Deformable convolutions at three depths, one of them converted, beside what must keep its rate."""

    def __init__(self, dcn=layers.DeformConv2dPack, dcnv2=layers.ModulatedDeformConv2dPack, converted=True):
        super().__init__()
        self.first = dcn(4, 4, 3, padding=1)
        self.block = nn.Sequential(
            nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Sequential(dcnv2(4, 4, 3, deform_groups=2))
        )
        self.converted = nn.Sequential(nn.Conv2d(4, 4, 3))
        self.depthwise = dcnv2(4, 4, 3, groups=4)
        self.conv_offset = nn.Conv2d(4, 4, 3)  # a name alone makes no offset predictor
        if converted:
            dcn_plugin.convert(self.converted, "DCNv2")


def groups(model, **paramwise):
    """Learning rate and weight decay by parameter's name, read from the optimizer."""
    config = dict(optimizer=dict(type="SGD", lr=LR, weight_decay=DECAY), paramwise_cfg=paramwise)
    optimizer = build_optim_wrapper(model, config).optimizer
    of_parameter = {p: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert of_parameter.keys() == set(model.parameters())
    return {name: of_parameter[parameter] for name, parameter in model.named_parameters()}


def predictors(names):
    return {name for name in names if ".conv_offset." in name}


def test_dcn_offset_lr_mult():
    model = Nested()
    found = groups(model, dcn_offset_lr_mult=0.1)
    assert len(predictors(found)) == 8
    for name, (lr, decay) in found.items():
        assert lr == pytest.approx(LR * (0.1 if name in predictors(found) else 1)), name
        assert decay == DECAY


def test_custom_keys():
    found = groups(Nested(), custom_keys={"conv_offset": dict(lr_mult=0.1, decay_mult=0.0)})
    for name, (lr, decay) in found.items():
        chosen = "conv_offset" in name
        assert lr == pytest.approx(LR * (0.1 if chosen else 1)) and decay == (0 if chosen else DECAY), name


def test_custom_keys_come_first():
    found = groups(Nested(), dcn_offset_lr_mult=0.1, custom_keys={"block.2": dict(lr_mult=5.0)})
    assert found["block.2.0.conv_offset.weight"][0] == pytest.approx(LR * 5)
    assert found["first.conv_offset.weight"][0] == pytest.approx(LR * 0.1)


@pytest.mark.parametrize(
    "paramwise",
    [
        dict(bias_lr_mult=2.0),
        dict(bias_lr_mult=2.0, dcn_offset_lr_mult=0.1),
        dict(bias_decay_mult=0.5, dcn_offset_lr_mult=0.1),
        dict(flat_decay_mult=0.25, norm_decay_mult=0.0),
        dict(bias_lr_mult=2.0, bias_decay_mult=0.5, flat_decay_mult=0.25, dcn_offset_lr_mult=0.1),
        dict(bias_lr_mult=2.0, dcn_offset_lr_mult=0.1, custom_keys={"conv_offset": dict(lr_mult=0.3)}),
    ],
    ids=lambda paramwise: "-".join(paramwise),
)
def test_all_rules_give_what_they_give_mmcvs_layers(mmcv_ops, paramwise):
    theirs = Nested(mmcv_ops.DeformConv2dPack, mmcv_ops.ModulatedDeformConv2dPack, converted=False)
    mine, theirs = groups(Nested(converted=False), **paramwise), groups(theirs, **paramwise)
    assert mine.keys() == theirs.keys()
    for name, rates in theirs.items():
        assert mine[name] == pytest.approx(rates), name


def test_depthwise_rule_counts_ours_as_depthwise():
    found = groups(Nested(), dwconv_decay_mult=0.5)
    halved = {name for name, (_, decay) in found.items() if decay == DECAY * 0.5}
    assert halved == {"depthwise.weight", "depthwise.bias"}


def test_root_and_frozen_predictors():
    model = layers.DeformConv2dPack(4, 4, 3)
    model.conv_offset.bias.requires_grad = False
    found = DefaultOptimWrapperConstructor(dict(optimizer=dict(type="SGD", lr=LR)), dict(dcn_offset_lr_mult=0.1))(model)
    rates = {id(p): group["lr"] for group in found.optimizer.param_groups for p in group["params"]}
    assert rates == {id(model.weight): LR, id(model.conv_offset.weight): pytest.approx(LR * 0.1)}


def test_without_mmcvs_operators(monkeypatch):
    monkeypatch.setattr("mmengine.optim.optimizer.default_constructor.mmcv_full_available", lambda: False)
    assert groups(Nested(), dcn_offset_lr_mult=0.1)["first.conv_offset.bias"][0] == pytest.approx(LR * 0.1)


def test_subclasses_of_the_constructor_know_our_layers():
    class Own(DefaultOptimWrapperConstructor):
        def add_params(self, params, module, prefix="", is_dcn_module=None):
            super().add_params(params, module, prefix=prefix, is_dcn_module=is_dcn_module)

    optimizer = Own(dict(optimizer=dict(type="SGD", lr=LR)), dict(dcn_offset_lr_mult=0.1))(
        layers.DeformConv2dPack(4, 4, 3)
    ).optimizer
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([LR, LR * 0.1, LR * 0.1])


def test_offset_fields_are_no_conv_offset():
    found = groups(layers.DeformRFCNPool(2, 4, 2), dcn_offset_lr_mult=0.1, bias_lr_mult=2.0)
    assert found["offset_fields.weight"][0] == LR and found["offset_fields.bias"][0] == LR * 2


def test_registers_once():
    before = DefaultOptimWrapperConstructor.add_params
    patches.apply_offset_learning_rates()
    assert DefaultOptimWrapperConstructor.add_params is before


@pytest.mark.parametrize(
    "name, slow, factor",
    [
        ("faster-rcnn_r50-dcn-c3-c5_fpn_1x_coco.py", ".conv_offset.", 1),
        ("faster-rcnn_r50-dcnv2-c3-c5_fpn_1x_coco.py", ".conv_offset.", 0.1),
        ("faster-rcnn_r50_fpn_deform-roi-align_1x_coco.py", ".offset_fc.", 0.01),
    ],
)
def test_the_configs_train_offsets_at_the_papers_rates(name, slow, factor):
    init_default_scope("mmdet")
    try:
        config = Config.fromfile(CONFIGS / name)
        with torch.device("meta"):
            model = MODELS.build(config.model)
        optimizer = build_optim_wrapper(model, config.optim_wrapper).optimizer
    finally:
        DefaultScope._instance_dict.clear()
    rates = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    chosen = 0
    for parameter_name, parameter in model.named_parameters():
        if parameter.requires_grad:
            chosen += slow in parameter_name
            assert rates[parameter] == pytest.approx(0.02 * (factor if slow in parameter_name else 1)), parameter_name
    assert chosen > 8
