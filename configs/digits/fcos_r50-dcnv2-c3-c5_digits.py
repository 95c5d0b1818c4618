"""FCOS on a slim ResNet-50 with DCNv2 in its last three stages, from scratch, on the digits of projects/digits."""

_base_ = "mmdet::_base_/default_runtime.py"
custom_imports = dict(imports=["dcn_plugin.mmdet"], allow_failed_imports=False)

num_classes = 10
channels = 64  # of the neck and the head
# Small batches and no pretrained statistics: group norm learns from the first step on.
norm = dict(type="GN", num_groups=8, requires_grad=True)

model = dict(
    type="FCOS",
    data_preprocessor=dict(
        type="DetDataPreprocessor", mean=[127.5] * 3, std=[60.0] * 3, bgr_to_rgb=True, pad_size_divisor=32
    ),
    backbone=dict(
        type="ResNet",
        depth=50,
        base_channels=16,  # a quarter of the usual width, for two CPU cores
        stem_channels=16,
        out_indices=(1, 2, 3),
        frozen_stages=-1,
        norm_cfg=norm,
        norm_eval=False,
        # mmdet's own keys; importing dcn_plugin makes 'DCNv2' ours.
        dcn=dict(type="DCNv2", deform_groups=1, fallback_on_stride=False),
        stage_with_dcn=(False, True, True, True),
    ),
    neck=dict(type="FPN", in_channels=[128, 256, 512], out_channels=channels, num_outs=3, norm_cfg=norm),
    bbox_head=dict(
        type="FCOSHead",
        num_classes=num_classes,
        in_channels=channels,
        feat_channels=channels,
        stacked_convs=2,
        strides=[8, 16, 32],
        regress_ranges=((-1, 32), (32, 64), (64, 1e8)),
        norm_on_bbox=True,
        centerness_on_reg=True,
        center_sampling=True,
        norm_cfg=norm,
        loss_cls=dict(type="FocalLoss", use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=1.0),
        loss_bbox=dict(type="GIoULoss", loss_weight=1.0),
        loss_centerness=dict(type="CrossEntropyLoss", use_sigmoid=True, loss_weight=1.0),
    ),
    test_cfg=dict(
        nms_pre=300, min_bbox_size=0, score_thr=0.05, nms=dict(type="nms", iou_threshold=0.5), max_per_img=50
    ),
)

data_root = "data/digits/"
metainfo = dict(classes=tuple(str(digit) for digit in range(num_classes)))
load = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="Resize", scale=(192, 192), keep_ratio=True),  # the scenes' own size; it records the scale tests need
]
pack = dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor"))
# Digits must not be mirrored: photometric changes and shifts are all the augmentation.
train_pipeline = [*load, dict(type="PhotoMetricDistortion"), dict(type="RandomShift", max_shift_px=16), pack]
test_pipeline = [*load, pack]


def split(name, pipeline, **loader):
    return dict(
        num_workers=1,
        persistent_workers=True,
        dataset=dict(
            type="CocoDataset",
            data_root=data_root,
            metainfo=metainfo,
            ann_file=f"{name}.json",
            data_prefix=dict(img=f"{name}/"),
            pipeline=pipeline,
            test_mode=name != "train",
        ),
        **loader,
    )


train_dataloader = split("train", train_pipeline, batch_size=8, sampler=dict(type="DefaultSampler", shuffle=True))
val_dataloader = split("val", test_pipeline, batch_size=16, sampler=dict(type="DefaultSampler", shuffle=False))
test_dataloader = val_dataloader
val_evaluator = dict(type="CocoMetric", ann_file=data_root + "val.json", metric="bbox")
test_evaluator = val_evaluator

max_epochs = 8
train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=max_epochs, val_interval=4)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=2e-3, weight_decay=0.05),
    # Offsets and masks train at a tenth of the rate: https://arxiv.org/abs/1811.11168, "Modulated Deformable Modules".
    paramwise_cfg=dict(dcn_offset_lr_mult=0.1),
    clip_grad=dict(max_norm=10),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(type="CosineAnnealingLR", eta_min=2e-5, begin=0, end=max_epochs, T_max=max_epochs, convert_to_iter_based=True),
]
default_hooks = dict(logger=dict(interval=10), checkpoint=dict(interval=1, max_keep_ckpts=1))
randomness = dict(seed=0)
