"""The plain detector of fcos_r18_deformed-digits.py, trained, made deformable in its last two stages and fine-tuned."""

_base_ = "fcos_r18_deformed-digits.py"

model = dict(backbone=dict(deformable=dict(type="DCNv2", targets=["layer2", "layer3"])))
load_from = "work_dirs/digits/plain/epoch_4.pth"
optim_wrapper = dict(paramwise_cfg=dict(dcn_offset_lr_mult=1.0))  # a tenth moves them too little in four epochs
