"""Deformable R-FCN on a slim ResNet-50 up to c4, DCN in that stage, from scratch, on the digits of projects/digits."""

_base_ = "../../../configs/digits/fcos_r50-dcnv2-c3-c5_digits.py"
custom_imports = dict(imports=["dcn_plugin.mmdet", "projects.deformable_rfcn.rfcn"], allow_failed_imports=False)

num_classes = 10
channels = 64  # of the neck and the RPN
stride = 8  # the digits are small; 16 in the paper
norm = dict(type="GN", num_groups=8, requires_grad=True)


def extractor(output_dim, offset_classes):
    """Score maps and offset fields of 7x7 bins; each class of offsets moves its share of the output channels."""
    return dict(
        type="DeformPSRoIExtractor",
        roi_layer=dict(
            type="DeformRFCNPool",
            output_size=7,
            in_channels=channels,
            output_dim=output_dim,
            offset_classes=offset_classes,
            sample_per_part=4,
            trans_std=0.1,
        ),
        out_channels=output_dim,
        featmap_strides=[stride],
    )


model = dict(
    _delete_=True,
    type="FasterRCNN",
    data_preprocessor=dict(
        type="DetDataPreprocessor", mean=[127.5] * 3, std=[60.0] * 3, bgr_to_rgb=True, pad_size_divisor=32
    ),
    backbone=dict(
        type="ResNet",
        depth=50,
        base_channels=16,  # a quarter of the usual width, for two CPU cores
        stem_channels=16,
        num_stages=3,
        strides=(1, 2, 1),  # as R-FCN's, the last stage keeps the resolution and is dilated instead
        dilations=(1, 1, 2),
        out_indices=(2,),
        frozen_stages=-1,
        norm_cfg=norm,
        norm_eval=False,
        dcn=dict(type="DCN", deform_groups=1, fallback_on_stride=False),
        stage_with_dcn=(False, False, True),
    ),
    neck=dict(type="ChannelMapper", in_channels=[256], out_channels=channels, kernel_size=1, norm_cfg=norm),
    rpn_head=dict(
        type="RPNHead",
        in_channels=channels,
        feat_channels=channels,
        anchor_generator=dict(type="AnchorGenerator", scales=[3, 4.5, 7], ratios=[0.7, 1.4], strides=[stride]),
        bbox_coder=dict(type="DeltaXYWHBBoxCoder"),
        loss_cls=dict(type="CrossEntropyLoss", use_sigmoid=True, loss_weight=1.0),
        loss_bbox=dict(type="L1Loss", loss_weight=1.0),
    ),
    roi_head=dict(
        type="RFCNRoIHead",
        bbox_roi_extractor=extractor(num_classes + 1, offset_classes=num_classes + 1),
        reg_roi_extractor=extractor(4, offset_classes=1),
        bbox_head=dict(
            type="RFCNBBoxHead",
            num_classes=num_classes,
            reg_class_agnostic=True,
            bbox_coder=dict(type="DeltaXYWHBBoxCoder", target_stds=[0.1, 0.1, 0.2, 0.2]),
            loss_cls=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
            loss_bbox=dict(type="SmoothL1Loss", beta=1.0, loss_weight=1.0),
        ),
    ),
    train_cfg=dict(
        rpn=dict(
            assigner=dict(type="MaxIoUAssigner", pos_iou_thr=0.7, neg_iou_thr=0.3, min_pos_iou=0.3),
            sampler=dict(type="RandomSampler", num=128, pos_fraction=0.5, add_gt_as_proposals=False),
            allowed_border=-1,
            pos_weight=-1,
        ),
        rpn_proposal=dict(nms_pre=600, max_per_img=200, nms=dict(type="nms", iou_threshold=0.7), min_bbox_size=0),
        rcnn=dict(
            assigner=dict(type="MaxIoUAssigner", pos_iou_thr=0.5, neg_iou_thr=0.5, match_low_quality=False),
            sampler=dict(type="RandomSampler", num=64, pos_fraction=0.5, add_gt_as_proposals=True),
            pos_weight=-1,
        ),
    ),
    test_cfg=dict(
        rpn=dict(nms_pre=600, max_per_img=100, nms=dict(type="nms", iou_threshold=0.7), min_bbox_size=0),
        rcnn=dict(score_thr=0.05, nms=dict(type="nms", iou_threshold=0.5), max_per_img=50),
    ),
)

# AdamW's steps do not shrink with the offsets' small gradients: at full speed these would run ahead of the maps.
slow = dict(lr_mult=0.1)
optim_wrapper = dict(paramwise_cfg=dict(custom_keys=dict(offset_fields=slow, conv_offset=slow)))
max_epochs = 4
train_cfg = dict(max_epochs=max_epochs, val_interval=max_epochs)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(type="CosineAnnealingLR", eta_min=2e-5, begin=0, end=max_epochs, T_max=max_epochs, convert_to_iter_based=True),
]
default_hooks = dict(checkpoint=dict(interval=max_epochs))
