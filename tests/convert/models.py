"""Small configs of mmdet's backbones, necks and heads: (config, targets, builder of the inputs)."""

from importlib.util import find_spec

import torch

CHANNELS = [8, 16, 24, 32]
BN = dict(type="BN", requires_grad=True)


def image(size=64):
    return lambda: torch.randn(1, 3, size, size)


def maps(channels=CHANNELS, size=32):
    return lambda: [torch.randn(1, c, size >> i, size >> i) for i, c in enumerate(channels)]


def levels(count, channels=8, size=16):
    return maps([channels] * count, size)


def rois(channels=8, size=7):
    return lambda: torch.randn(3, channels, size, size)


RESNET = dict(base_channels=8, stem_channels=8, zero_init_residual=False)  # so that gradients reach every branch
TRIDENT = dict(num_branch=3, test_branch_idx=1, trident_dilations=(1, 2, 3), num_stages=3)
STAGES = dict(
    stage1=dict(num_modules=1, num_branches=1, block="BOTTLENECK", num_blocks=(1,), num_channels=(4,)),
    stage2=dict(num_modules=1, num_branches=2, block="BASIC", num_blocks=(1, 1), num_channels=(4, 8)),
    stage3=dict(num_modules=1, num_branches=3, block="BASIC", num_blocks=(1,) * 3, num_channels=(4, 8, 16)),
    stage4=dict(num_modules=1, num_branches=4, block="BASIC", num_blocks=(1,) * 4, num_channels=(4, 8, 16, 32)),
)
REGNET = dict(w0=8, wa=8, wm=2.0, group_w=8, depth=6, bot_mul=1.0)
PVT = dict(embed_dims=8, num_layers=[1] * 4, num_heads=[1] * 4, drop_path_rate=0.0, pretrain_img_size=64)
HOURGLASS = dict(downsample_times=2, num_stacks=1, stage_channels=(8, 8, 16), stage_blocks=(1, 1, 1), feat_channel=8)

BACKBONES = {
    "CSPDarknet": (dict(widen_factor=0.125, deepen_factor=0.33), "stage4", image()),
    "CSPNeXt": (dict(widen_factor=0.125, deepen_factor=0.33), ["stage3", "stage4"], image()),
    "Darknet": (dict(depth=53, out_indices=(3, 4)), "conv_res_block4.res0", image(32)),
    "ResNet": (dict(depth=18, **RESNET), ["layer3", "layer4"], image()),
    "ResNetV1d": (dict(depth=50, **RESNET), "layer4", image()),
    "DetectoRS_ResNet": (dict(depth=50, **RESNET), "layer4", image()),
    "DetectoRS_ResNeXt": (dict(depth=50, groups=4, base_width=16, **RESNET), "layer4", image()),
    "EfficientNet": (dict(arch="b0", out_indices=(3, 4, 5)), ["layers.3", "layers.4"], image(65)),
    "HourglassNet": (HOURGLASS, "hourglass_modules", image()),
    "HRNet": (dict(extra=STAGES), "stage4", image()),
    "MobileNetV2": (dict(widen_factor=0.25), "layer7", image()),
    # Of these two and Swin, only embeddings, spatial reductions and depthwise convolutions are spatial at all.
    "PyramidVisionTransformer": (PVT, ["layers.0.0.projection", "layers.*.attn.sr"], image()),
    "PyramidVisionTransformerV2": (PVT, ["layers.0.0.projection", "layers.*.ffn.layers"], image()),
    "ResNeXt": (dict(depth=50, groups=4, base_width=16, **RESNET), "layer4", image()),
    "RegNet": (dict(arch=REGNET, zero_init_residual=False), ["layer3", "layer4"], image()),
    "Res2Net": (dict(depth=50, scales=4, base_width=26, **RESNET), "layer4", image()),
    "ResNeSt": (dict(depth=50, **RESNET), "layer4", image()),
    "SSDVGG": (
        dict(depth=11, ceil_mode=True, out_indices=(3, 4), out_feature_indices=(10, 18)),
        "features.16",
        image(),
    ),
    "SwinTransformer": (
        dict(embed_dims=8, depths=(1,) * 4, num_heads=(1,) * 4, drop_path_rate=0.0),
        "patch_embed.projection",
        image(),
    ),
    "TridentResNet": (
        dict(depth=50, strides=(1, 2, 2), dilations=(1, 1, 1), out_indices=(2,), **TRIDENT, **RESNET),
        "layer2",
        image(),
    ),
}

RFP = dict(
    in_channels=[32, 64, 128, 256],
    out_channels=8,
    num_outs=5,
    rfp_steps=2,
    aspp_out_channels=2,
    rfp_backbone=dict(type="DetectoRS_ResNet", rfp_inplanes=8, depth=50, **RESNET),
)
FPN = dict(in_channels=CHANNELS, out_channels=8)

NECKS = {
    "BFP": (dict(in_channels=8, num_levels=4, refine_type="conv"), "refine", levels(4)),
    "ChannelMapper": (FPN, "convs", maps()),
    "CSPNeXtPAFPN": (dict(**FPN, num_csp_blocks=1), "bottom_up_blocks", maps()),
    "CTResNetNeck": (
        dict(in_channels=8, num_deconv_filters=(8, 8), num_deconv_kernels=(4, 4), use_dcn=False),
        "deconv_layers",
        maps([8], 8),
    ),
    "DilatedEncoder": (
        dict(in_channels=8, out_channels=8, block_mid_channels=4, num_residual_blocks=2, block_dilations=[2, 4]),
        "dilated_encoder_blocks",
        maps([8]),
    ),
    "FPG": (
        dict(
            **FPN,
            inter_channels=8,
            num_outs=4,
            stack_times=1,
            paths=["bu"],
            skip_inds=[(0,)] * 4,
            across_skip_trans=dict(type="conv", kernel_size=1),
        ),
        "*",
        maps(),
    ),
    "FPN": (dict(**FPN, num_outs=5, add_extra_convs="on_output"), "fpn_convs", maps()),
    "FPN_CARAFE": (dict(**FPN, num_outs=4, upsample_cfg=dict(type="nearest")), "fpn_convs", maps()),
    "FPN_DropBlock": (dict(**FPN, num_outs=4), "fpn_convs", maps()),
    "HRFPN": (dict(**FPN, num_outs=4), "fpn_convs", maps()),
    "NASFPN": (dict(**FPN, num_outs=5, stack_times=1), "fpn_stages", maps()),
    "NASFCOS_FPN": (dict(**FPN, num_outs=3), "fpn", maps()),
    "PAFPN": (dict(**FPN, num_outs=4), ["downsample_convs", "pafpn_convs"], maps()),
    "RFP": (RFP, ["fpn_convs", "rfp_modules.0.layer4"], lambda: [image()(), *maps(RFP["in_channels"], 16)()]),
    "SSDNeck": (
        dict(in_channels=(16, 32), out_channels=(16, 32, 16), level_strides=(2,), level_paddings=(1,)),
        "extra_layers",
        maps([16, 32]),
    ),
    "SSH": (dict(num_scales=2, in_channels=[8, 16], out_channels=[16, 16]), "ssh_module*", maps([8, 16])),
    "YOLOV3Neck": (dict(num_scales=2, in_channels=[32, 16], out_channels=[16, 8]), "detect2", maps([16, 32])),
    "YOLOXPAFPN": (dict(**FPN, num_csp_blocks=1), "bottom_up_blocks", maps()),
}
if find_spec("mmdet.models.necks.clrnet_fpn"):  # onedl-mmdetection's
    NECKS["CLRFPN"] = (dict(**FPN, num_outs=4), "fpn_convs", maps())

ANCHORS = dict(type="AnchorGenerator", ratios=[1.0], octave_base_scale=8, scales_per_octave=1, strides=[8, 16])
HEAD = dict(num_classes=3, in_channels=8, feat_channels=8)
TOWER = dict(**HEAD, stacked_convs=2)
FCOS = dict(**TOWER, strides=(8, 16), regress_ranges=((-1, 64), (64, 1e8)))
GN = dict(norm_cfg=dict(type="GN", num_groups=2))
SSD_ANCHORS = dict(
    type="SSDAnchorGenerator",
    input_size=300,
    basesize_ratio_range=(0.2, 0.9),
    strides=[8, 16, 32],
    ratios=[[2], [2, 3], [2]],
    scale_major=False,
)
CENTER = dict(
    loss_center_heatmap=dict(type="GaussianFocalLoss"), loss_wh=dict(type="L1Loss"), loss_offset=dict(type="L1Loss")
)
BOX = dict(in_channels=8, fc_out_channels=16, conv_out_channels=8, num_classes=3)

HEADS = {
    "RetinaHead": (dict(**TOWER, anchor_generator=ANCHORS), ["cls_convs", "reg_convs"], levels(2)),
    "RetinaSepBNHead": (dict(**TOWER, num_ins=2, norm_cfg=BN, anchor_generator=ANCHORS), "cls_convs.1", levels(2)),
    "RPNHead": (dict(in_channels=8, feat_channels=8, num_convs=2, anchor_generator=ANCHORS), "rpn_conv", levels(2)),
    "FCOSHead": (dict(**FCOS, **GN), "*_convs", levels(2)),
    "ATSSHead": (dict(**TOWER, **GN, anchor_generator=ANCHORS), "reg_convs", levels(2)),
    "GFLHead": (dict(**TOWER, **GN, anchor_generator=ANCHORS), "cls_convs", levels(2)),
    "PAAHead": (dict(**TOWER, **GN, anchor_generator=ANCHORS), "cls_convs", levels(2)),
    "YOLOXHead": (dict(**TOWER, strides=(8, 16)), "multi_level_reg_convs", levels(2)),
    "RTMDetSepBNHead": (
        dict(**TOWER, share_conv=True, norm_cfg=BN, anchor_generator=dict(type="MlvlPointGenerator", strides=[8, 16])),
        ["cls_convs", "reg_convs"],
        levels(2),
    ),
    "SSDHead": (dict(num_classes=3, in_channels=(8, 8, 8), anchor_generator=SSD_ANCHORS), "reg_convs", levels(3)),
    "CenterNetHead": (dict(**HEAD, **CENTER), "heatmap_head", levels(1)),
    "SOLOHead": (dict(**TOWER, pos_scale=0.2, strides=(4, 8), scale_ranges=((1, 32), (16, 64)), num_grids=(4, 4),
                      cls_down_index=0, **GN), "cls_convs", levels(2)),
    "FCNMaskHead": (dict(in_channels=8, conv_out_channels=8, num_classes=3), "convs", rois()),
    "HTCMaskHead": (dict(in_channels=8, conv_out_channels=8, num_classes=3), "convs", rois()),
    "Shared4Conv1FCBBoxHead": (BOX, "shared_convs", rois()),
    "FusedSemanticHead": (
        dict(num_ins=2, fusion_level=0, num_convs=2, in_channels=8, conv_out_channels=8, num_classes=3),
        "convs",
        levels(2),
    ),
}  # fmt: skip
