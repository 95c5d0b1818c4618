"""mmdet's RoI heads with our extractors in place of its own: they build, train and predict."""

import pytest
import torch

pytest.importorskip("mmdet")

import numpy as np
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.config import ConfigDict
from mmengine.hub import get_config
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData, PixelData

from dcn_plugin.layers import DeformRoIAlignPack, ModulatedDeformRoIAlignPack
from dcn_plugin.mmdet import DeformGenericRoIExtractor, DeformRoIExtractor

HEIGHT, WIDTH = 64, 96
HEADS = {  # config: (its RoI extractors, the keys of its losses)
    "faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py": (1, {"loss_cls", "loss_bbox"}),
    "mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py": (2, {"loss_cls", "loss_bbox", "loss_mask"}),
    "cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py": (6, {"s0.loss_cls", "s2.loss_mask"}),
    "htc/htc_r50_fpn_1x_coco.py": (7, {"s0.loss_cls", "s2.loss_mask", "loss_semantic_seg"}),
    "double_heads/dh-faster-rcnn_r50_fpn_1x_coco.py": (1, {"loss_cls", "loss_bbox"}),
}


@pytest.fixture(autouse=True)
def mmdet_scope():
    init_default_scope("mmdet")


def small(node, extractor, pack):
    """A config's copy with a sixteenth of the channels and our RoI extractors."""
    if isinstance(node, (list, tuple)):
        return type(node)(small(item, extractor, pack) for item in node)
    if not isinstance(node, dict):
        return node
    node = {key: small(value, extractor, pack) for key, value in node.items() if key != "init_cfg"}
    for key, value in node.items():
        if key.endswith("channels"):
            node[key] = [v // 16 for v in value] if isinstance(value, list) else value // 16
    if node.get("type") == "ResNet":
        node.update(base_channels=4, stem_channels=4)
    if node.get("type") == "SingleRoIExtractor":
        node["type"] = extractor
        size = node["roi_layer"]["output_size"]
        node["roi_layer"] = dict(type=pack, output_size=size, output_channels=16, deform_fc_channels=8)
    return node


def build(path, extractor=DeformRoIExtractor, pack=DeformRoIAlignPack):
    config = get_config(f"mmdet::{path}").model.to_dict()
    config["test_cfg"]["rcnn"].update(score_thr=0.0, max_per_img=5)
    config["train_cfg"]["rpn_proposal"]["max_per_img"] = config["test_cfg"]["rpn"]["max_per_img"] = 20
    torch.manual_seed(0)
    model = MODELS.build(ConfigDict(small(config, extractor.__name__, pack.__name__)))
    model.init_weights()
    return model


def sample(boxes=((10.0, 10, 60, 50), (30, 5, 90, 60))):
    size = dict(img_shape=(HEIGHT, WIDTH), pad_shape=(HEIGHT, WIDTH), ori_shape=(HEIGHT, WIDTH))
    data = DetDataSample(metainfo=dict(**size, batch_input_shape=(HEIGHT, WIDTH), scale_factor=(1.0, 1.0)))
    boxes = torch.tensor(boxes).reshape(-1, 4)
    masks = np.zeros((len(boxes), HEIGHT, WIDTH), np.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
        mask[y1:y2, x1:x2] = 1
    labels = torch.arange(len(boxes))
    data.gt_instances = InstanceData(bboxes=boxes, labels=labels, masks=BitmapMasks(masks, HEIGHT, WIDTH))
    data.gt_sem_seg = PixelData(sem_seg=torch.zeros(1, HEIGHT, WIDTH, dtype=torch.long))
    return data


def extractors_of(model):
    return [m for m in model.modules() if isinstance(m, (DeformRoIExtractor, DeformGenericRoIExtractor))]


def train_once(model, samples):
    model.train()
    losses = model(torch.randn(len(samples), 3, HEIGHT, WIDTH), samples, mode="loss")
    total, _ = model.parse_losses(losses)
    assert total.isfinite()
    total.backward()
    return losses


@pytest.mark.parametrize(
    ("extractor", "pack"),
    [(DeformRoIExtractor, DeformRoIAlignPack), (DeformGenericRoIExtractor, ModulatedDeformRoIAlignPack)],
    ids=["single", "generic"],
)
@pytest.mark.parametrize("path", HEADS, ids=lambda path: path.split("/")[0])
def test_trains_and_predicts(path, extractor, pack):
    model = build(path, extractor, pack)
    count, losses = HEADS[path]
    extractors = extractors_of(model)
    assert len(extractors) == count
    assert all(isinstance(one, extractor) for one in extractors)

    assert losses <= set(train_once(model, [sample(), sample()]))
    for one in extractors:
        assert any(layer.offset_fc[-1].bias.grad.any() for layer in one.roi_layers), "the offsets learn"
        assert all(parameter.grad is not None for parameter in one.parameters())

    model.eval()
    with torch.no_grad():
        predictions = model(torch.randn(2, 3, HEIGHT, WIDTH), [sample(), sample()], mode="predict")
    for prediction in predictions:
        found = prediction.pred_instances
        assert 0 < len(found) <= 5
        assert found.bboxes.isfinite().all()
        if "loss_mask" in str(losses):
            assert found.masks.shape == (len(found), HEIGHT, WIDTH)


@pytest.mark.parametrize("extractor", [DeformRoIExtractor, DeformGenericRoIExtractor])
@pytest.mark.parametrize(
    "path", ["mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py", "htc/htc_r50_fpn_1x_coco.py"], ids=["mask", "htc"]
)
def test_trains_on_images_without_objects(path, extractor):
    """There the mask branch has no RoI, but data-parallel training wants a gradient of each of its parameters."""
    model = build(path, extractor)
    train_once(model, [sample(boxes=())])
    for one in extractors_of(model):
        assert all(parameter.grad is not None for parameter in one.parameters())


@pytest.mark.parametrize("factor", [None, 1.3])
def test_double_head_enlarges_the_rois_it_regresses_from(factor):
    extractor = build("double_heads/dh-faster-rcnn_r50_fpn_1x_coco.py").roi_head.bbox_roi_extractor
    feats = [torch.arange(float(WIDTH // s)).expand(1, 16, HEIGHT // s, WIDTH // s) for s in (4, 8, 16, 32)]
    rois = torch.tensor([[0, 32.0, 20.0, 64.0, 44.0]])
    pooled = extractor(feats, rois, factor)[0, 0, 0]
    span = 32 * (factor or 1)
    torch.testing.assert_close(pooled.diff(), torch.full((6,), span / 4 / 7), rtol=0.05, atol=0)
