"""Deformable R-FCN as the paper has it, on ResNet-50: DCN in the dilated c5, 7x7 bins, hard examples mined."""

_base_ = "mmdet::faster_rcnn/faster-rcnn_r50-caffe-dc5_1x_coco.py"
custom_imports = dict(imports=["dcn_plugin.mmdet", "projects.deformable_rfcn.rfcn"], allow_failed_imports=False)

num_classes = 80
channels = 1024
stride = 16


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
    backbone=dict(
        dcn=dict(type="DCN", deform_groups=4, fallback_on_stride=False),
        stage_with_dcn=(False, False, False, True),
    ),
    neck=dict(type="ChannelMapper", in_channels=[2048], out_channels=channels, kernel_size=1),
    rpn_head=dict(in_channels=channels, feat_channels=512),
    roi_head=dict(
        _delete_=True,
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
        rpn_proposal=dict(nms_pre=6000, max_per_img=300),
        rcnn=dict(sampler=dict(type="OHEMSampler", num=128)),
    ),
    test_cfg=dict(rpn=dict(max_per_img=300)),
)
