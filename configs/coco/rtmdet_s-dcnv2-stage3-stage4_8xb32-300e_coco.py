_base_ = "mmdet::rtmdet/rtmdet_s_8xb32-300e_coco.py"

custom_imports = dict(imports=["dcn_plugin"])

model = dict(backbone=dict(deformable=dict(type="DCNv2", targets=["stage3", "stage4"])))

# Offsets and masks train at a tenth of the rate: https://arxiv.org/abs/1811.11168, "Modulated Deformable Modules".
optim_wrapper = dict(paramwise_cfg=dict(dcn_offset_lr_mult=0.1))
