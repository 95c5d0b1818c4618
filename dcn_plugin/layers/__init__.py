"""Deformable layers as ``nn.Module``; needs torch alone.

``DCN`` and ``DCNv2`` stand where an ``nn.Conv2d`` stood and predict their own offsets, the RoI packs
where a RoI layer stood; ``DeformConv2d``, ``ModulatedDeformConv2d``, ``DeformRoIAlign`` and
``DeformPSRoIPool`` are given theirs.
"""

from .deform_conv2d import DCN, DCNv2, DeformConv2d, ModulatedDeformConv2d
from .deform_ps_roi_pool import DeformPSRoIConvPack, DeformPSRoIPool, DeformPSRoIPoolPack
from .deform_roi_align import DeformRoIAlign, DeformRoIAlignPack, ModulatedDeformRoIAlignPack

__all__ = [
    "DCN",
    "DCNv2",
    "DeformConv2d",
    "DeformPSRoIConvPack",
    "DeformPSRoIPool",
    "DeformPSRoIPoolPack",
    "DeformRoIAlign",
    "DeformRoIAlignPack",
    "ModulatedDeformConv2d",
    "ModulatedDeformRoIAlignPack",
]
