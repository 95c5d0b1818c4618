"""Deformable layers as ``nn.Module``; needs torch alone.

The packs predict their own offsets: ``DeformConv2dPack`` ('DCN' in MMDetection's configs) and
``ModulatedDeformConv2dPack`` ('DCNv2') stand where an ``nn.Conv2d`` stood, the RoI packs and ``DeformRFCNPool`` where a
RoI layer stood. ``DeformConv2d``, ``ModulatedDeformConv2d``, ``DeformRoIAlign`` and ``DeformPSRoIPool`` are given
offsets. ``MultiScaleDeformableAttention`` is the attention of Deformable DETR and its successors.
"""

from .deform_conv2d import DeformConv2d, DeformConv2dPack, ModulatedDeformConv2d, ModulatedDeformConv2dPack
from .deform_ps_roi_pool import DeformPSRoIPool, DeformPSRoIPoolPack, DeformRFCNPool
from .deform_roi_align import DeformRoIAlign, DeformRoIAlignPack, ModulatedDeformRoIAlignPack
from .ms_deform_attn import MultiScaleDeformableAttention

__all__ = [
    "DeformConv2d",
    "DeformConv2dPack",
    "DeformPSRoIPool",
    "DeformPSRoIPoolPack",
    "DeformRFCNPool",
    "DeformRoIAlign",
    "DeformRoIAlignPack",
    "ModulatedDeformConv2d",
    "ModulatedDeformConv2dPack",
    "ModulatedDeformRoIAlignPack",
    "MultiScaleDeformableAttention",
]
