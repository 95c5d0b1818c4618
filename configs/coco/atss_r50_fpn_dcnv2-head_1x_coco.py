_base_ = "mmdet::atss/atss_r50_fpn_1x_coco.py"

custom_imports = dict(imports=["dcn_plugin.mmdet"])

model = dict(bbox_head=dict(deformable=dict(type="DCNv2", targets=["cls_convs.3", "reg_convs.3"])))

# Offsets and masks train at a tenth of the rate: https://arxiv.org/abs/1811.11168, "Modulated Deformable Modules".
optim_wrapper = dict(paramwise_cfg=dict(dcn_offset_lr_mult=0.1))
