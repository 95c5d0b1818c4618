"""The key ``deformable=`` of what MMEngine's registries build, from a config to a run."""

import logging
import re

import pytest
import torch
from torch import nn

pytest.importorskip("mmengine")

from mmengine.config import Config, ConfigDict
from mmengine.model import BaseModel, BaseModule, Sequential
from mmengine.registry import DATASETS, MODELS, RUNNERS, Registry
from mmengine.runner import Runner

from dcn_plugin.layers import DeformConv2dPack, ModulatedDeformConv2dPack
from dcn_plugin.mmengine import Runner as PluginRunner

OWN = Registry("own", parent=MODELS, scope="own")


@OWN.register_module()
class Stages(BaseModule):
    def __init__(self, init_cfg=None):
        super().__init__(init_cfg)
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.stage1 = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())
        self.stage2 = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())

    def forward(self, x):
        return self.stage2(self.stage1(self.stem(x)))


@OWN.register_module()
class Model(BaseModel):
    def __init__(self, backbone, head=None):
        super().__init__()
        self.backbone = MODELS.build(backbone)
        self.head = MODELS.build(head) if head else nn.Conv2d(4, 1, 3)

    def forward(self, inputs, mode="tensor"):
        out = self.head(self.backbone(inputs))
        return dict(loss=out.square().mean()) if mode == "loss" else [out]


@OWN.register_module()
class TakesDeformable(nn.Module):
    def __init__(self, deformable):
        super().__init__()
        self.deformable = deformable


@DATASETS.register_module()
class ImagesOfOnes(torch.utils.data.Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        return dict(inputs=torch.ones(3, 6, 6))


def deformable(module):
    return {
        name: type(child)
        for name, child in module.named_modules()
        if isinstance(child, (DeformConv2dPack, ModulatedDeformConv2dPack))
    }


def test_of_a_part_and_of_the_whole():
    model = OWN.build(
        dict(type="own.Model", backbone=dict(type="own.Stages", deformable=dict(type="DCN", targets="stage1")))
    )
    assert deformable(model) == {"backbone.stage1.0": DeformConv2dPack}
    model = OWN.build(dict(type="own.Model", backbone=dict(type="own.Stages"), deformable=dict(targets="head")))
    assert deformable(model) == {"head": ModulatedDeformConv2dPack}
    both = dict(type="own.Stages", deformable=dict(type="DCN", targets="stage2"))
    model = OWN.build(dict(type="own.Model", backbone=both, deformable=dict(targets="*.stage1", deform_groups=2)))
    assert deformable(model) == {"backbone.stage1.0": ModulatedDeformConv2dPack, "backbone.stage2.0": DeformConv2dPack}
    assert model.backbone.stage1[0].deform_groups == 2


@pytest.mark.parametrize("kind", [dict, ConfigDict, lambda **kwargs: Config(kwargs)])
def test_leaves_the_config_as_it_was(kind):
    config = kind(type="own.Stages", deformable=dict(targets="stage1"))
    for _ in range(2):
        assert deformable(MODELS.build(config)) == {"stage1.0": ModulatedDeformConv2dPack}
    assert config["deformable"] == dict(targets="stage1")


def test_none_and_absent_change_nothing():
    assert deformable(OWN.build(dict(type="own.Stages", deformable=None))) == {}
    assert deformable(OWN.build(dict(type="own.Stages"))) == {}


def test_of_members_of_a_sequence():
    built = MODELS.build([dict(type="own.Stages"), dict(type="own.Stages", deformable=dict(targets="stage2"))])
    assert isinstance(built, Sequential)
    assert deformable(built) == {"1.stage2.0": ModulatedDeformConv2dPack}


@pytest.mark.parametrize("value", [True, dict(targets="*")])
def test_a_class_with_an_argument_of_that_name_gets_it(value):
    assert OWN.build(dict(type="TakesDeformable", deformable=value)).deformable == value
    assert MODELS.build(dict(type=TakesDeformable, deformable=value)).deformable == value
    assert MODELS.build(dict(type="TakesDeformable", _scope_="own", deformable=value)).deformable == value


@pytest.mark.parametrize("value", [True, "DCNv2", ["DCN"]])
def test_other_values_are_an_error(value):
    with pytest.raises(ValueError, match=r"deformable= takes a dict such as .*, or a list; got"):
        OWN.build(dict(type="Stages", deformable=value))


def test_a_list_converts_one_after_the_other():
    keys = [dict(type="DCN", targets="stage1"), dict(type="DCNv2", targets="stage2")]
    assert deformable(OWN.build(dict(type="Stages", deformable=keys))) == {
        "stage1.0": DeformConv2dPack,
        "stage2.0": ModulatedDeformConv2dPack,
    }


@OWN.register_module()
class OwnDCN(DeformConv2dPack):
    pass


@pytest.mark.parametrize("kind", ["own.OwnDCN", OwnDCN, "dcn_plugin.layers.DeformConv2dPack", DeformConv2dPack])
def test_registered_subclasses_and_classes_by_path(kind):
    expected = DeformConv2dPack if kind is DeformConv2dPack or "layers" in str(kind) else OwnDCN
    assert deformable(OWN.build(dict(type="Stages", deformable=dict(type=kind, targets="stage1")))) == {
        "stage1.0": expected
    }


def test_errors_name_the_pattern():
    with pytest.raises(ValueError, match="target 'stage3' matches nothing in Stages; nearest: stage2, stage1"):
        OWN.build(dict(type="own.Stages", deformable=dict(targets="stage3")))


def test_init_rules_leave_the_offsets_at_zero():
    rules = [dict(type="Normal", layer="Conv2d", std=1.0, bias=1.0), dict(type="Constant", layer="_ConvNd", val=7)]
    model = OWN.build(dict(type="own.Stages", init_cfg=rules[0], deformable=dict(targets="stage*")))
    model.init_weights()
    assert model.stage1[0].bias.eq(1).all()  # the rule was applied, to the convolution alone
    assert all(not p.any() for name, p in model.named_parameters() if "conv_offset" in name)


class Log(logging.Handler):
    """What MMEngine's loggers, which propagate nothing, warn about on the keys of checkpoints."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages = []

    def emit(self, record):
        if re.search("offset|missing|unexpected|mismatch|match exactly", record.getMessage()):
            self.messages.append(record.getMessage())


@pytest.fixture
def run(tmp_path):
    """Builds a runner of one training step, and hands out what it warned about while it trained."""

    def run(runner=Runner, **options):
        config = Config(
            dict(
                default_scope="mmengine",
                model=dict(type="own.Model", backbone=dict(type="own.Stages", deformable=dict(targets="stage*"))),
                work_dir=str(tmp_path / "run"),
                experiment_name=f"key{len(list(tmp_path.iterdir()))}",
                train_dataloader=dict(
                    batch_size=1,
                    num_workers=0,
                    dataset=dict(type="ImagesOfOnes"),
                    sampler=dict(type="DefaultSampler"),
                    collate_fn=dict(type="default_collate"),
                ),
                train_cfg=dict(by_epoch=True, max_epochs=1),
                optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.1)),
            )
        )
        config.merge_from_dict(options)
        built = runner.from_cfg(config)
        log = Log()
        built.logger.addHandler(log)
        built.train()
        return built, log.messages

    return run


def test_a_plain_checkpoint_loads_with_one_line(run, tmp_path):
    plain = OWN.build(dict(type="own.Stages"))
    torch.save(plain.state_dict(), tmp_path / "plain.pth")
    pretrained = dict(type="Pretrained", checkpoint=str(tmp_path / "plain.pth"))
    built, messages = run(**{"model.backbone.init_cfg": pretrained, "optim_wrapper.optimizer.lr": 0.0})
    assert torch.equal(built.model.backbone.stem.weight, plain.stem.weight)
    (message,) = messages
    assert "lacks the offsets of 2 layers" in message

    whole = OWN.build(dict(type="own.Model", backbone=dict(type="own.Stages")))
    torch.save(dict(state_dict=whole.state_dict()), tmp_path / "whole.pth")
    built, messages = run(load_from=str(tmp_path / "whole.pth"), **{"optim_wrapper.optimizer.lr": 0.0})
    assert torch.equal(built.model.backbone.stage2[0].weight, whole.backbone.stage2[0].weight)
    assert len(messages) == 1 and "backbone.stage1.0.conv_offset" in messages[0]


def test_trains_and_resumes(run):
    built, _ = run()
    trained = built.model.state_dict()
    assert trained["backbone.stage1.0.conv_offset.weight"].any()
    resumed, messages = run(resume=True, **{"train_cfg.max_epochs": 1})
    assert not messages
    assert all(torch.equal(value, trained[key]) for key, value in resumed.model.state_dict().items())


def test_resuming_a_plain_run_says_load_from(run, tmp_path):
    run(**{"model.backbone.deformable": None})
    with pytest.raises(ValueError, match="parameter group.*start from its weights with load_from="):
        run(resume=True, **{"train_cfg.max_epochs": 2})


@pytest.mark.parametrize("given", [None, dict(imports=["math"]), dict(imports="math", allow_failed_imports=True)])
def test_the_runner_of_the_command_line_imports_and_says_so(run, given):
    assert RUNNERS.get("dcn_plugin.mmengine.Runner") is PluginRunner  # how mmdet's tools look up runner_type
    built, _ = run(PluginRunner, **({"custom_imports": given} if given else {}))
    assert list(built.cfg.custom_imports["imports"])[-1] == "dcn_plugin.mmengine"
    assert not given or "math" in built.cfg.custom_imports["imports"]
    assert deformable(built.model)
