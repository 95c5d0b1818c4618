"""The COCO configs load, build, take a training step and predict."""

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("mmdet")

from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData

from dcn_plugin.layers import DeformConv2dPack, DeformRoIAlignPack, ModulatedDeformConv2dPack

CONFIGS = Path(__file__).parents[2] / "configs" / "coco"
RESNET = dict(base_channels=4, stem_channels=4, init_cfg=None)
FASTER_RCNN = dict(
    backbone=RESNET,
    neck=dict(in_channels=[16, 32, 64, 128], out_channels=8),
    rpn_head=dict(in_channels=8, feat_channels=8),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=8),
        bbox_head=dict(in_channels=8, fc_out_channels=16, num_classes=3),
    ),
    test_cfg=dict(rcnn=dict(score_thr=0.0)),
)
SMALL = {
    "faster": FASTER_RCNN,
    "atss": dict(
        backbone=RESNET,
        neck=dict(in_channels=[16, 32, 64, 128], out_channels=32),
        bbox_head=dict(in_channels=32, feat_channels=32, num_classes=3),
        test_cfg=dict(score_thr=0.0),
    ),
    "rtmdet": dict(backbone=dict(init_cfg=None), test_cfg=dict(score_thr=0.0)),
}


@pytest.fixture(autouse=True)
def mmdet_scope():
    init_default_scope("mmdet")


def load(name):
    return Config.fromfile(CONFIGS / name)


def sample():
    data = DetDataSample(metainfo=dict(img_shape=(96, 128), pad_shape=(96, 128), scale_factor=(1.0, 1.0)))
    data.set_metainfo(dict(ori_shape=(96, 128), batch_input_shape=(96, 128)))
    data.gt_instances = InstanceData(bboxes=torch.tensor([[10.0, 10, 60, 70]]), labels=torch.tensor([1]))
    return data


def test_every_config_is_tested():
    assert {path.name for path in CONFIGS.glob("*.py")} == set(EXPECTED)


EXPECTED = {
    "faster-rcnn_r50-dcn-c3-c5_fpn_1x_coco.py": (DeformConv2dPack, 13),
    "faster-rcnn_r50-dcnv2-c3-c5_fpn_1x_coco.py": (ModulatedDeformConv2dPack, 13),
    "faster-rcnn_r50_fpn_deform-roi-align_1x_coco.py": (DeformRoIAlignPack, 4),
    "atss_r50_fpn_dcnv2-head_1x_coco.py": (ModulatedDeformConv2dPack, 2),
    "rtmdet_s-dcnv2-stage3-stage4_8xb32-300e_coco.py": (
        ModulatedDeformConv2dPack,
        5,
    ),  # the three depthwise ones stay plain
}


@pytest.mark.parametrize("name", EXPECTED)
def test_builds_as_written(name):
    with torch.device("meta"):
        model = MODELS.build(load(name).model)
    kind, count = EXPECTED[name]
    assert sum(type(module) is kind for module in model.modules()) == count


@pytest.mark.parametrize("name", EXPECTED)
def test_trains_and_predicts_when_small(name):
    config = load(name)
    config.merge_from_dict(dict(model=SMALL[re.match("[a-z]+", name)[0]]))
    if "roi-align" in name:
        config.model.roi_head.bbox_roi_extractor.roi_layer.update(output_channels=8, deform_fc_channels=16)
    model = MODELS.build(config.model)
    model.init_weights()
    model.train()
    images, samples = torch.randn(2, 3, 96, 128), [sample(), sample()]
    losses = model(images, samples, mode="loss")
    total, _ = model.parse_losses(losses)
    assert total.isfinite()
    total.backward()
    kind, _ = EXPECTED[name]
    for module in model.modules():
        if isinstance(module, kind):
            predictor = module.offset_fc[-1] if kind is DeformRoIAlignPack else module.conv_offset
            assert predictor.bias.grad is not None
    model.eval()
    with torch.no_grad():
        predictions = model(images, samples, mode="predict")
    assert len(predictions) == 2 and len(predictions[0].pred_instances) > 0
