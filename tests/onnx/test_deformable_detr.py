"""A whole Deformable DETR of MMDetection's, whose code the TorchScript exporter alone can follow."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("mmdet")
pytest.importorskip("onnxscript", reason="exports to ONNX")
pytest.importorskip("onnxruntime", reason="runs what is exported")

import onnx
from mmengine.registry import init_default_scope

from ..ops.cases import relative_error
from ..zoo.test_attention_configs import build, small
from .exporting import export, onnxruntime


class Network(torch.nn.Module):
    """Images to the scores and boxes of the queries of each decoder layer."""

    def __init__(self, detector):
        super().__init__()
        self.detector = detector

    def forward(self, images):
        size = tuple(images.shape[-2:])
        metainfo = dict(batch_input_shape=size, img_shape=size)
        sample = SimpleNamespace(metainfo=metainfo, **metainfo)
        maps = self.detector.extract_feat(images)
        return self.detector.bbox_head(**self.detector.forward_transformer(maps, [sample]))[:2]


@pytest.mark.parametrize("kind", ["deformable-detr", "deformable-detr-refine"])
def test_deformable_detr(kind, tmp_path):
    init_default_scope("mmdet")
    model = Network(build(small(f"deformable_detr/{kind}_r50_16xb2-50e_coco.py"))).eval()
    images = torch.randn(1, 3, 128, 160)
    # Large enough for maps of two rows: of torch.linspace(0.5, 0.5, 1), for a map of one, the exporter makes 0 / 0.
    options = dict(dynamo=False, custom_translation_table=None, opset_version=20)
    path = export(model, (images,), tmp_path / "model.onnx", **options)
    assert [node.op_type for node in onnx.load(path).graph.node].count("GridSample") == 4 * 4  # layers, levels
    images = torch.randn(1, 3, 128, 160)
    with torch.no_grad():
        for output, expected in zip(onnxruntime(path, [images]), model(images), strict=True):
            assert relative_error(output, expected) < 1e-5
