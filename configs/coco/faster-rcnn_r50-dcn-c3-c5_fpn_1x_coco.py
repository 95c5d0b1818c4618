_base_ = "mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py"

custom_imports = dict(imports=["dcn_plugin.mmdet"])

model = dict(
    backbone=dict(
        dcn=dict(type="DCN", deform_groups=1, fallback_on_stride=False),
        stage_with_dcn=(False, True, True, True),
    )
)
# Offsets train at the rate of all else: beta = 1 in the paper, https://arxiv.org/abs/1703.06211, section 2.
