_base_ = "mmdet::rtmdet/rtmdet_s_8xb32-300e_coco.py"

custom_imports = dict(imports=["dcn_plugin.mmdet"])

# To predict the offsets of the depthwise 5x5 convolutions too would cost five times as much as it does without them.
model = dict(backbone=dict(deformable=dict(type="DCNv2", targets=["stage3", "stage4"], depthwise=False)))

# Offsets and masks train at a tenth of the rate: https://arxiv.org/abs/1811.11168, "Modulated Deformable Modules".
optim_wrapper = dict(paramwise_cfg=dict(dcn_offset_lr_mult=0.1))
