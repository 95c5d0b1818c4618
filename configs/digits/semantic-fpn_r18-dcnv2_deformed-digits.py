"""Panoptic FPN's semantic head on the backbone of the demo's detector, on the deformed digits' masks."""

_base_ = "fcos_r18-dcnv2_deformed-digits.py"
custom_imports = dict(imports=["dcn_plugin.mmdet", "projects.digits.semantic"], allow_failed_imports=False)

model = dict(
    _delete_=True,
    type="SemanticSegmentor",
    data_preprocessor=dict(
        type="DetDataPreprocessor",
        mean=[127.5] * 3,
        std=[60.0] * 3,
        bgr_to_rgb=True,
        pad_size_divisor=32,
        pad_seg=True,
    ),
    backbone={{_base_.model.backbone}},
    semantic_head=dict(
        type="PanopticFPNHead",
        num_things_classes=0,
        num_stuff_classes=10,  # the digits; what else there is comes as the last class
        in_channels=64,
        inner_channels=64,
        start_level=0,
        end_level=1,
        norm_cfg=dict(type="GN", num_groups=4, requires_grad=True),
    ),
)

load = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True, with_seg=True),
    dict(type="Resize", scale=(96, 96), keep_ratio=True),
]
pack = dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor"))
train_pipeline = [*load, pack]
test_pipeline = [*load, pack]
metainfo = dict(classes=(*map(str, range(10)), "background"))


def split(name, pipeline):
    prefix = dict(img=f"{name}/", seg=f"{name}/")
    return dict(dataset=dict(metainfo=metainfo, data_prefix=prefix, pipeline=pipeline))


train_dataloader = split("train", train_pipeline)
val_dataloader = split("val", test_pipeline)
test_dataloader = val_dataloader
val_evaluator = dict(_delete_=True, type="SemSegMetric", iou_metrics=["mIoU"])
test_evaluator = val_evaluator

load_from = None
max_epochs = 12
train_cfg = dict(max_epochs=max_epochs, val_interval=max_epochs)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(type="CosineAnnealingLR", eta_min=2e-5, begin=0, end=max_epochs, T_max=max_epochs, convert_to_iter_based=True),
]
optim_wrapper = dict(paramwise_cfg=dict(dcn_offset_lr_mult=0.1))  # from scratch, full rates run away
