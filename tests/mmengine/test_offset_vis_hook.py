"""'DeformOffsetVisHook' in training runs of MMEngine's Runner."""

import logging

import pytest
import torch
from mmengine.evaluator import Evaluator
from mmengine.model import BaseModel
from mmengine.runner import Runner
from mmengine.structures import BaseDataElement
from torch import nn

from dcn_plugin.layers import ModulatedDeformConv2dPack
from dcn_plugin.mmengine import DeformOffsetVisHook


class Net(BaseModel):
    def __init__(self, deformable=True):
        super().__init__(data_preprocessor=dict(type="ImgDataPreprocessor"))
        self.norm = nn.BatchNorm2d(3)
        self.conv = (ModulatedDeformConv2dPack if deformable else nn.Conv2d)(3, 4, 3, stride=4, padding=1)
        self.modes = []

    def forward(self, inputs, data_samples=None, mode="loss"):
        self.modes.append((mode, self.training))
        output = self.conv(self.norm(inputs))
        return dict(loss=output.square().mean()) if mode == "loss" else list(output)


def items(count):
    generator = torch.Generator().manual_seed(0)
    return [
        dict(
            inputs=torch.randint(0, 255, (3, 40, 60), generator=generator, dtype=torch.uint8),
            data_samples=BaseDataElement(metainfo=dict(img_path=f"folder/{index}.jpg")),
        )
        for index in range(count)
    ]


def loader(count):
    return dict(
        dataset=items(count),
        batch_size=1,
        sampler=dict(type="DefaultSampler", shuffle=False),
        collate_fn=dict(type="pseudo_collate"),
    )


def run(model, tmp_path, validate=True, **hook):
    val = dict(val_dataloader=loader(3), val_cfg={}, val_evaluator=Evaluator([])) if validate else {}
    runner = Runner(
        model,
        str(tmp_path),
        train_dataloader=loader(5),
        train_cfg=dict(by_epoch=True, max_epochs=1, val_interval=10),
        optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.01)),
        default_hooks=dict(checkpoint=None),
        custom_hooks=[dict(type="DeformOffsetVisHook", **hook)],
        experiment_name=tmp_path.name,
        default_scope="mmengine",
        **val,
    )
    runner.train()
    return runner


def test_draws_into_the_backends(tmp_path):
    model = Net()
    run(model, tmp_path, interval=2, images=[0, 2])
    names = sorted(path.name for path in tmp_path.glob("*/vis_data/vis_image/*"))
    kinds = "offsets_conv", "points"
    assert names == [f"{image}_{kind}_{step}.png" for image in (0, 2) for kind in kinds for step in (2, 4)]
    loss, predict = ("loss", True), ("predict", False)
    assert model.modes[:9] == [loss, loss, predict, predict, loss, loss, predict, predict, loss]  # then validation
    assert model.norm.num_batches_tracked == 5


def test_a_plain_model_is_a_warning(tmp_path, caplog):
    logging.getLogger("mmengine").propagate = True
    run(Net(deformable=False), tmp_path, interval=2)
    [log] = tmp_path.glob("*/*.log")
    assert log.read_text().count("DeformOffsetVisHook: the model runs no deformable layers") == 1
    assert not list(tmp_path.glob("*/vis_data/vis_image/*"))


def test_errors(tmp_path):
    with pytest.raises(ValueError, match="interval must be at least 1"):
        DeformOffsetVisHook(interval=0)
    with pytest.raises(ValueError, match="needs val_dataloader"):
        run(Net(), tmp_path / "a", validate=False)
    with pytest.raises(ValueError, match="'nothing' matches none"):
        run(Net(), tmp_path / "b", interval=1, layers="nothing")
