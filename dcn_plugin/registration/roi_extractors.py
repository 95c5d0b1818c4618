"""The RoI extractor type 'DeformRoIExtractor' in MMDetection's MODELS."""

import torch
from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor
from mmdet.registry import MODELS
from torch import Tensor, nn

from dcn_plugin.layers import DeformRoIAlign, DeformRoIAlignPack, ModulatedDeformRoIAlignPack

ROI_LAYERS = {layer.__name__: layer for layer in (DeformRoIAlign, DeformRoIAlignPack, ModulatedDeformRoIAlignPack)}


@MODELS.register_module(force=True)
class DeformRoIExtractor(SingleRoIExtractor):
    """Pools each RoI, deformably, from the pyramid level that its size is assigned to.

    The assignment is that of `Feature Pyramid Networks <https://arxiv.org/abs/1612.03144>`_, as in mmdet's
    SingleRoIExtractor, and so are the arguments. Each level has a RoI layer, and offset predictor, of its own.

    Args:
        roi_layer: config of the RoI layer; ``type`` is 'DeformRoIAlign', 'DeformRoIAlignPack',
            'ModulatedDeformRoIAlignPack' or a class that is called with ``spatial_scale`` and the other keys.
        out_channels: channels of the maps.
        featmap_strides: pixels of the image per pixel of each map.
        finest_scale: RoIs of less than twice this size, in pixels of the image, go to the first map.
        init_cfg: as in every mmengine module.

    Raises:
        ValueError: ``roi_layer.type`` is another string.
    """

    def build_roi_layers(self, layer_cfg: dict, featmap_strides: list[int]) -> nn.ModuleList:
        cfg = dict(layer_cfg)
        kind = cfg.pop("type")
        if isinstance(kind, str):
            if kind not in ROI_LAYERS:
                raise ValueError(
                    f"roi_layer.type of a DeformRoIExtractor must be one of {', '.join(ROI_LAYERS)}, got {kind!r}; "
                    "mmcv's RoI layers belong in a SingleRoIExtractor"
                )
            kind = ROI_LAYERS[kind]
        return nn.ModuleList(kind(spatial_scale=1 / stride, **cfg) for stride in featmap_strides)

    def forward(self, feats: tuple[Tensor, ...], rois: Tensor, roi_scale_factor: float | None = None) -> Tensor:
        """Pools RoIs.

        Args:
            feats: maps (N, out_channels, H, W), finest first; fewer than ``featmap_strides`` are allowed.
            rois: (K, 5) as (batch index, x1, y1, x2, y2) in pixels of the image; K may be 0.
            roi_scale_factor: enlarges the RoIs about their centres, after they are assigned to levels.

        Returns:
            (K, out_channels, oh, ow); zeros for a RoI whose size is not a number.
        """
        levels = self.map_roi_levels(rois, len(feats))
        if roi_scale_factor is not None:
            rois = self.roi_rescale(rois, roi_scale_factor)
        # Levels without RoIs are pooled too: every parameter then has a gradient, as data-parallel training requires.
        # The RoIs keep float32 under AMP, where half precision would move them by pixels.
        members = [(levels == level).nonzero().squeeze(1) for level in range(len(feats))]
        pooled = torch.cat([self.roi_layers[level](feat, rois[members[level]]) for level, feat in enumerate(feats)])
        return pooled.new_zeros(len(rois), *pooled.shape[1:]).index_copy(0, torch.cat(members), pooled)
