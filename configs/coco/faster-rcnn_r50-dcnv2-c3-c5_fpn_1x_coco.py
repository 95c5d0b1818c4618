_base_ = "mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py"

custom_imports = dict(imports=["dcn_plugin.mmdet"])

model = dict(
    backbone=dict(
        dcn=dict(type="DCNv2", deform_groups=1, fallback_on_stride=False),
        stage_with_dcn=(False, True, True, True),
    )
)

# Offsets and masks train at a tenth of the rate: https://arxiv.org/abs/1811.11168, "Modulated Deformable Modules".
optim_wrapper = dict(paramwise_cfg=dict(dcn_offset_lr_mult=0.1))
