"""Tiny deformable detectors of mmdet's, and images with their config."""

import cv2
import numpy as np
import pytest
import torch

CONFIG = """
custom_imports = dict(imports=["dcn_plugin.mmdet"])
default_scope = "mmdet"
data_preprocessor = dict(
    type="DetDataPreprocessor", mean=[127.5] * 3, std=[60.0] * 3, bgr_to_rgb=True, pad_size_divisor=32)
backbone = dict(
    type="ResNet", depth=18, base_channels=8, stem_channels=8, out_indices=(1, 2, 3), frozen_stages=-1,
    norm_cfg=dict(type="GN", num_groups=2), norm_eval=False,
    deformable=dict(type="DCNv2", targets=["layer2", "layer3", "layer4"], kernel_size=3))
neck = dict(type="FPN", in_channels=[16, 32, 64], out_channels=8, num_outs=3)
pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(96, 64), keep_ratio=True),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]
metainfo = dict(classes=("cat", "dog"))
val_dataloader = dict(
    batch_size=1, num_workers=0, sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(type="CocoDataset", metainfo=metainfo, ann_file="{folder}/val.json", data_prefix=dict(img="{folder}"),
                 pipeline=pipeline, test_mode=True))
test_dataloader = val_dataloader
"""
DENSE = """
model = dict(
    type="FCOS", data_preprocessor=data_preprocessor, backbone=backbone, neck=neck,
    bbox_head=dict(type="FCOSHead", num_classes=2, in_channels=8, feat_channels=8, stacked_convs=1, strides=[8, 16, 32],
                   norm_cfg=None, norm_on_bbox=True),
    test_cfg=dict(nms_pre=20, min_bbox_size=8, score_thr=0.0, nms=dict(type="nms", iou_threshold=0.5), max_per_img=6))
"""
TWO_STAGE = """
model = dict(
    type="FasterRCNN", data_preprocessor=data_preprocessor, backbone=backbone, neck=neck,
    rpn_head=dict(type="RPNHead", in_channels=8, feat_channels=8,
                  anchor_generator=dict(type="AnchorGenerator", scales=[2], ratios=[1.0], strides=[8, 16, 32])),
    roi_head=dict(
        type="StandardRoIHead",
        bbox_roi_extractor=dict(
            type="DeformRoIExtractor", out_channels=8, featmap_strides=[8, 16, 32],
            roi_layer=dict(type="ModulatedDeformRoIAlignPack", output_size=3, output_channels=8, deform_fc_channels=8)),
        bbox_head=dict(type="Shared2FCBBoxHead", in_channels=8, fc_out_channels=8, roi_feat_size=3, num_classes=2)),
    train_cfg=None,
    test_cfg=dict(rpn=dict(nms_pre=50, max_per_img=20, nms=dict(type="nms", iou_threshold=0.7), min_bbox_size=4),
                  rcnn=dict(score_thr=0.0, nms=dict(type="nms", iou_threshold=0.5), max_per_img=5)))
"""
DETR = """
attention = dict(embed_dims=32, num_heads=8, num_levels=3, num_points=4, batch_first=True)
ffn = dict(embed_dims=32, feedforward_channels=32)
backbone.pop("deformable")
model = dict(
    type="DeformableDETR", data_preprocessor=data_preprocessor, backbone=backbone, num_queries=12, num_feature_levels=3,
    neck=dict(type="ChannelMapper", in_channels=[16, 32, 64], kernel_size=1, out_channels=32, num_outs=3),
    encoder=dict(num_layers=2, layer_cfg=dict(self_attn_cfg=attention, ffn_cfg=ffn)),
    decoder=dict(
        num_layers=2, return_intermediate=True, post_norm_cfg=None,
        layer_cfg=dict(self_attn_cfg=dict(embed_dims=32, num_heads=8, batch_first=True), cross_attn_cfg=attention,
                       ffn_cfg=ffn)),
    positional_encoding=dict(num_feats=16, normalize=True, offset=-0.5),
    bbox_head=dict(type="DeformableDETRHead", num_classes=2, embed_dims=32, loss_cls=dict(type="FocalLoss")),
    test_cfg=dict(max_per_img=6))
"""


@pytest.fixture
def image(tmp_path):
    """A file of 50 x 60 pixels, which the pipeline makes 64 x 77, the data preprocessor 64 x 96."""
    path = tmp_path / "scene.png"
    cv2.imwrite(str(path), np.random.default_rng(0).integers(0, 255, (50, 60, 3), dtype=np.uint8))
    return str(path)


@pytest.fixture
def write_config(tmp_path, image):
    """Writes the config of a tiny detector, one image in its validation set, and returns its path."""
    (tmp_path / "val.json").write_text(
        '{"images": [{"id": 1, "file_name": "scene.png", "width": 60, "height": 50}], "annotations": [],'
        ' "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]}'
    )

    def write(kind=DENSE, extra=""):
        path = tmp_path / "config.py"
        path.write_text(CONFIG.replace("{folder}", str(tmp_path)) + kind + extra)
        return str(path)

    return write


PREDICTING = "conv_offset", "offset_fc.4", "sampling_offsets.weight", "attention_weights.weight"


@pytest.fixture
def write_checkpoint(tmp_path):
    """Writes a checkpoint of a config's model, its offsets random, and returns its path."""

    def write(config, name="epoch_1.pth", seed=0):
        from dcn_plugin.commands import _config

        torch.manual_seed(seed)
        model = _config.build(_config.load(config))
        if hasattr(model, "level_embed"):
            model.init_weights()  # else it is what was in memory
        for parameter_name, parameter in model.named_parameters():
            if any(part in parameter_name for part in PREDICTING):
                torch.nn.init.normal_(parameter, std=0.2)
        path = tmp_path / name
        torch.save(dict(state_dict=model.state_dict(), meta=dict(dataset_meta=dict(classes=("cat", "dog")))), path)
        return str(path)

    return write
