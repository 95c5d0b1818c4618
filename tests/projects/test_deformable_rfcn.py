"""Deformable R-FCN: its config builds, learns and predicts, and its head lets bins vote."""

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("mmdet", reason="Deformable R-FCN is a detector of MMDetection")

from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData

from dcn_plugin.layers import DeformConv2dPack, DeformRFCNPool

ROOT = Path(__file__).parents[2]
PROJECT = ROOT / "projects/deformable_rfcn"
CONFIG = PROJECT / "configs/deformable-rfcn_r50-dcn-c4_digits.py"


@pytest.fixture
def config(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))  # as PYTHONPATH=. of the README's commands
    init_default_scope("mmdet")
    return Config.fromfile(CONFIG)


def batch():
    """Two images, a bright box in each."""
    images, samples = torch.randint(0, 60, (2, 3, 96, 128), dtype=torch.uint8), []
    for image, (x1, y1, x2, y2) in zip(images, ([20, 20, 60, 70], [50, 10, 110, 60]), strict=True):
        image[:, y1:y2, x1:x2] += 150
        sample = DetDataSample(metainfo=dict(img_shape=(96, 128), ori_shape=(96, 128), scale_factor=(1.0, 1.0)))
        sample.gt_instances = InstanceData(bboxes=torch.tensor([[x1, y1, x2, y2]]).float(), labels=torch.tensor([3]))
        samples.append(sample)
    return dict(inputs=list(images), data_samples=samples)


def test_trains_and_predicts(config):
    config.model.test_cfg.rcnn.score_thr = 0.0  # two iterations make no confident detector
    model = MODELS.build(config.model)
    model.init_weights()
    pools = [m for m in model.modules() if isinstance(m, DeformRFCNPool)]
    assert [pool.offset_fields.out_channels for pool in pools] == [2 * 11 * 49, 2 * 49]
    assert sum(isinstance(m, DeformConv2dPack) for m in model.modules()) == 6
    assert not any(pool.offset_fields.weight.any() for pool in pools)

    optimiser = build_optim_wrapper(model, config.optim_wrapper)
    model.train()
    for _ in range(2):
        losses = model.train_step(batch(), optimiser)
        assert losses["loss"].isfinite()
    assert {"loss_rpn_cls", "loss_rpn_bbox", "loss_cls", "loss_bbox"} <= set(losses)
    assert all(pool.offset_fields.weight.any() for pool in pools), "the offsets learn from the first step on"

    model.eval()
    for prediction in model.test_step(batch()):
        found = prediction.pred_instances
        assert len(found) > 0
        assert found.bboxes.isfinite().all()
        assert found.labels.max() < 10


def test_coco_config_mines_hard_examples(config):
    config = Config.fromfile(CONFIG.parent / "deformable-rfcn_r50-dcn-c5_1x_coco.py")
    with torch.device("meta"):
        model = MODELS.build(config.model)
    assert sum(isinstance(m, DeformConv2dPack) for m in model.modules()) == 3
    small = dict(in_channels=8, output_size=3)
    tiny = dict(
        backbone=dict(base_channels=4, stem_channels=4, init_cfg=None),
        neck=dict(in_channels=[128], out_channels=8),
        rpn_head=dict(in_channels=8, feat_channels=8),
        roi_head=dict(bbox_roi_extractor=dict(roi_layer=small), reg_roi_extractor=dict(roi_layer=small)),
        train_cfg=dict(rpn_proposal=dict(max_per_img=50), rcnn=dict(sampler=dict(num=8))),
    )
    config.merge_from_dict(dict(model=tiny))
    model = MODELS.build(config.model)
    model.train()
    data = model.data_preprocessor(batch(), training=True)
    pooled = []
    model.roi_head.bbox_head.register_forward_hook(lambda head, inputs, outputs: pooled.append(len(outputs[0])))
    total, _ = model.parse_losses(model(**data, mode="loss"))
    assert total.isfinite()
    assert len(pooled) > 1, "candidates are scored before the hard ones are chosen"
    assert pooled[-1] == 16
    total.backward()


@pytest.mark.parametrize("agnostic", [True, False])
def test_bins_vote(config, agnostic):
    head = MODELS.build(dict(type="RFCNBBoxHead", num_classes=10, reg_class_agnostic=agnostic))
    assert not list(head.parameters())
    cls_feats, reg_feats = torch.randn(5, 11, 7, 7), torch.randn(5, 4 if agnostic else 40, 7, 7)
    cls_score, bbox_pred = head(cls_feats, reg_feats)
    torch.testing.assert_close(cls_score, cls_feats.flatten(2).mean(2))
    torch.testing.assert_close(bbox_pred, reg_feats.flatten(2).mean(2))
    no_scores, no_boxes = head(cls_feats[:0], reg_feats[:0])
    assert no_scores.shape == (0, 11)
    assert no_boxes.shape == (0, reg_feats.shape[1])


def test_readme_names_what_is_there():
    text = (PROJECT / "README.md").read_text()
    paths = re.findall(r"[\w/.-]*projects/[\w/.-]+", text)
    assert str(CONFIG.relative_to(ROOT)) in paths
    assert all((ROOT / path).exists() for path in paths)
