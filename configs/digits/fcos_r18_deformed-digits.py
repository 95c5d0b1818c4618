"""FCOS with one map of stride 8 on a slim ResNet-18 of three stages, from scratch, on deformed digits: all plain."""

_base_ = "fcos_r50-dcnv2-c3-c5_digits.py"

norm = dict(type="GN", num_groups=4, requires_grad=True)
model = dict(
    backbone=dict(
        depth=18,
        num_stages=3,
        norm_cfg=norm,
        strides=(1, 2, 1),  # digits of all sizes on one map
        dilations=(1, 1, 1),
        out_indices=(2,),
        dcn=None,
        stage_with_dcn=(False, False, False),
    ),
    neck=None,
    bbox_head=dict(
        norm_cfg=norm,
        in_channels=64,
        feat_channels=64,
        stacked_convs=1,
        strides=[8],
        regress_ranges=((-1, 1e8),),
    ),
    test_cfg=dict(nms_pre=200),
)

data_root = "data/deformed-digits/"
load = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="Resize", scale=(96, 96), keep_ratio=True),  # the scenes' own size; it records the scale tests need
]
pack = dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor"))
train_pipeline = [*load, pack]  # 1600 scenes seen a few times need no augmentation
test_pipeline = [*load, pack]
train_dataloader = dict(dataset=dict(data_root=data_root, pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(data_root=data_root, pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + "val.json")
test_evaluator = val_evaluator

max_epochs = 4
train_cfg = dict(max_epochs=max_epochs, val_interval=max_epochs)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(type="CosineAnnealingLR", eta_min=2e-5, begin=0, end=max_epochs, T_max=max_epochs, convert_to_iter_based=True),
]
