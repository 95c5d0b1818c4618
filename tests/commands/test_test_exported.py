"""``python -m dcn_plugin test-exported``: mmdet's evaluation of exported networks, on a data set of two images."""

import json
from importlib.util import find_spec

import pytest
import torch

pytest.importorskip("mmdet", reason="evaluates mmdet's detectors")
pytest.importorskip("onnxruntime", reason="runs what is exported")
pytest.importorskip("onnxscript", reason="exports to ONNX")

import cv2
import numpy as np
from mmengine.evaluator import BaseMetric
from mmengine.registry import METRICS
from torch import nn

from dcn_plugin.__main__ import main
from dcn_plugin.commands import _config
from dcn_plugin.commands.export import export

CONFIG = """
_base_ = 'mmdet::{base}'
model = {model}
data = dict(
    type='CocoDataset', data_root={root!r}, ann_file='test.json', data_prefix=dict(img=''), test_mode=True,
    _delete_=True,
    pipeline=[
        dict(type='LoadImageFromFile'),
        dict(type='Resize', scale=(96, 64), keep_ratio=True),
        dict(type='PackDetInputs', meta_keys=('img_id', 'ori_shape', 'img_shape', 'scale_factor')),
    ],
)
test_dataloader = dict(batch_size=3, num_workers=0, persistent_workers=False, dataset=data)
test_evaluator = dict(_delete_=True, type='SumsOfBoxes')
"""
BACKBONE = (
    "backbone=dict(depth=18, base_channels=8, stem_channels=8, frozen_stages=-1, init_cfg=None,"
    " deformable=dict(targets='layer4')), neck=dict(in_channels=[8, 16, 32, 64], out_channels=16)"
)
DETECTORS = dict(
    retinanet=(
        "retinanet/retinanet_r50_fpn_1x_coco.py",
        f"dict({BACKBONE}, bbox_head=dict(num_classes=3, in_channels=16, feat_channels=16, stacked_convs=1),"
        " test_cfg=dict(score_thr=0.0))",
    ),
    faster_rcnn=(
        "faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py",
        f"dict({BACKBONE}, rpn_head=dict(in_channels=16, feat_channels=16), test_cfg=dict(rcnn=dict(score_thr=0.0)),"
        " roi_head=dict(bbox_roi_extractor=dict(out_channels=16),"
        " bbox_head=dict(in_channels=16, fc_out_channels=16, num_classes=3)))",
    ),
)


@METRICS.register_module(force=True)
class SumsOfBoxes(BaseMetric):
    """Numbers that any change of the boxes or scores changes, where an untrained detector's AP is 0."""

    def process(self, data_batch, data_samples):
        for sample in data_samples:
            found = sample["pred_instances"]
            self.results.append((found["bboxes"].sum().item(), found["scores"].sum().item(), len(found["scores"])))

    def compute_metrics(self, results):
        boxes, scores, number = map(sum, zip(*results, strict=True))
        return dict(boxes=boxes, scores=scores, number=number)


@pytest.fixture
def detector(tmp_path):
    """The config and checkpoint of a small detector whose test set are five images of two shapes."""
    images = []
    for i, shape in enumerate([(64, 96), (60, 80), (64, 96), (60, 80), (64, 64)]):
        pixels = np.random.default_rng(i).integers(0, 256, (*shape, 3), dtype=np.uint8)
        cv2.imwrite(str(tmp_path / f"{i}.png"), cv2.GaussianBlur(pixels, (0, 0), 3))
        images.append(dict(id=i, file_name=f"{i}.png", height=shape[0], width=shape[1]))
    (tmp_path / "test.json").write_text(json.dumps(dict(images=images, annotations=[], categories=[])))

    def make(name):
        base, model = DETECTORS[name]
        config, checkpoint = tmp_path / f"{name}.py", tmp_path / f"{name}.pth"
        config.write_text(CONFIG.format(base=base, model=model, root=str(tmp_path)))
        built = _config.build(_config.load(str(config)))
        for module in built.modules():
            if hasattr(module, "conv_offset"):
                nn.init.normal_(module.conv_offset.weight, std=0.3)
        torch.save(dict(state_dict=built.state_dict()), checkpoint)
        return str(config), str(checkpoint)

    return make


def rows(table):
    """The table's rows: {network: {column: number}}."""
    lines = [line.split("  ") for line in table.splitlines()]
    columns = [name.strip() for name in lines[0][1:] if name.strip()]
    return {
        line[0].strip(): dict(zip(columns, map(float, " ".join(line[1:]).split()), strict=True)) for line in lines[1:]
    }


@pytest.mark.parametrize("name", DETECTORS)
def test_evaluates_as_pytorch_does(name, detector, tmp_path, capsys):
    config, checkpoint = detector(name)
    out = [str(tmp_path / "model.onnx"), str(tmp_path / "normal.onnx")]
    export(config, checkpoint, out[0], shape=(64, 96), batch=2)  # batches of 3 and 2 images, some of them smaller
    export(config, checkpoint, out[1], shape=(64, 96), normalize=True)
    if name == "retinanet" and find_spec("openvino"):
        out.append(str(tmp_path / "model.xml"))
        export(config, checkpoint, out[2], shape=(64, 96))
    capsys.readouterr()
    main(["test-exported", config, *out])
    table = capsys.readouterr().out
    table = rows(table[table.index("network ") :])
    plain = table.pop("PyTorch")
    assert len(table) == len(out) and plain["number"] > 0 and plain["images/s"] > 0
    for network in table.values():
        assert network["images/s"] > 0
        for column in ("boxes", "scores", "number"):
            assert network[column] == pytest.approx(plain[column], rel=1e-3), column


def test_errors(detector, tmp_path):
    config, checkpoint = detector("retinanet")
    with pytest.raises(
        SystemExit, match="error: .*nowhere.onnx is not there: `python -m dcn_plugin export` writes both"
    ):
        main(["test-exported", config, str(tmp_path / "nowhere.onnx")])
    path = tmp_path / "model.onnx"
    export(config, checkpoint, str(path), shape=(32, 32))
    with pytest.raises(
        SystemExit, match=r"takes images of 32x32, and the test set has one of 64x96: export with --dyn"
    ):
        main(["test-exported", config, str(path)])
    (tmp_path / "retinanet.pth").unlink()
    with pytest.raises(SystemExit, match="no such checkpoint; --checkpoint FILE says where it is"):
        main(["test-exported", config, str(path)])
