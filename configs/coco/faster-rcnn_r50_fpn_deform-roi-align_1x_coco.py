_base_ = "mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py"

custom_imports = dict(imports=["dcn_plugin.mmdet"])

model = dict(
    roi_head=dict(
        bbox_roi_extractor=dict(
            type="DeformRoIExtractor",
            roi_layer=dict(_delete_=True, type="DeformRoIAlignPack", output_size=7, output_channels=256),
        )
    )
)

# What predicts the bins' offsets trains at a hundredth of the rate: beta = 0.01 for Faster R-CNN in the paper,
# https://arxiv.org/abs/1703.06211, section 2.
optim_wrapper = dict(paramwise_cfg=dict(custom_keys=dict(offset_fc=dict(lr_mult=0.01))))
