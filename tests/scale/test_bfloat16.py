"""bfloat16 on the CPU: a detector of ours trains and is evaluated under autocast, as MMEngine's test loops do with
``fp16=True``."""

import pytest
import torch

pytest.importorskip("mmdet", reason="compares detectors of MMDetection")

from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import ConfigDict
from mmengine.runner import autocast
from mmengine.structures import InstanceData

import dcn_plugin.mmdet  # noqa: F401

BACKBONE = dict(
    type="ResNet",
    depth=18,
    base_channels=8,
    stem_channels=8,
    out_indices=(1, 2),
    deformable=dict(type="DCNv2", targets="layer3.*.conv2"),
    norm_cfg=dict(type="GN", num_groups=2),
    norm_eval=False,
    frozen_stages=-1,
)
FCOS = dict(
    type="FCOS",
    data_preprocessor=dict(type="DetDataPreprocessor"),
    backbone=BACKBONE,
    neck=dict(type="FPN", in_channels=[16, 32], out_channels=16, num_outs=2),
    bbox_head=dict(
        type="FCOSHead",
        num_classes=2,
        in_channels=16,
        feat_channels=16,
        stacked_convs=1,
        norm_cfg=dict(type="GN", num_groups=2),
        strides=[8, 16],
        regress_ranges=((-1, 32), (32, 1e8)),
    ),
    test_cfg=dict(nms_pre=100, min_bbox_size=0, score_thr=0.0, nms=dict(type="nms", iou_threshold=0.5), max_per_img=9),
)


@pytest.fixture
def batch():
    sample = DetDataSample(metainfo=dict(img_shape=(64, 64), ori_shape=(64, 64), scale_factor=(1.0, 1.0)))
    boxes = torch.tensor([[4.0, 6, 30, 28], [20, 30, 60, 62]])
    sample.gt_instances = InstanceData(bboxes=boxes, labels=torch.tensor([0, 1]))
    return dict(inputs=[torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)], data_samples=[sample])


def detector():
    model = MODELS.build(ConfigDict(FCOS, _scope_="mmdet"))
    for name, parameter in model.named_parameters():
        if "conv_offset" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def test_trains(batch):
    model = detector()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    data = model.data_preprocessor(batch, training=True)

    def losses(bfloat16):
        with autocast(device_type="cpu", enabled=bfloat16):
            return model.parse_losses(model(**data, mode="loss"))[0]

    before, rounded = losses(False), losses(True)
    assert abs(rounded - before) < 0.05 * before
    for _ in range(5):
        optimizer.zero_grad()
        losses(True).backward()
        optimizer.step()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    offsets = [p.grad for n, p in model.named_parameters() if "conv_offset" in n]
    assert offsets and all(gradient.any() for gradient in offsets)
    assert losses(False) < before


def test_evaluates(batch):
    """Scores within bfloat16's rounding of float32's."""
    model = detector().eval()
    with torch.no_grad():
        (exact,) = model.test_step(batch)
        with autocast(device_type="cpu", enabled=True):
            (rounded,) = model.test_step(batch)
    exact, rounded = exact.pred_instances, rounded.pred_instances
    assert len(exact) and len(rounded) == len(exact)
    assert abs(rounded.scores.float().max() - exact.scores.max()) < 0.02 * exact.scores.max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_suppression_casts_and_answers_as_before(dtype):
    from mmcv.ops import nms

    corners = torch.randint(0, 50, (40, 2))
    boxes = torch.cat([corners, corners + torch.randint(5, 40, (40, 2))], 1).to(dtype)  # whole: every dtype holds them
    scores = torch.randperm(40).to(dtype) / 64
    kept, indices = nms(boxes, scores, 0.4)
    expected, expected_indices = nms(boxes.float(), scores.float(), 0.4)
    assert torch.equal(indices, expected_indices) and 1 < len(indices) < 40
    assert kept.dtype == dtype and torch.equal(kept.float(), expected)
