"""The RoI extractor types in MMDetection's MODELS: 'DeformRoIExtractor', 'DeformGenericRoIExtractor' and
'DeformPSRoIExtractor'."""

import torch
from mmdet.models.roi_heads.roi_extractors import GenericRoIExtractor, SingleRoIExtractor
from mmdet.registry import MODELS
from torch import Tensor, nn

from dcn_plugin import layers


class _BuildsOurLayers:
    """Mixin: ``roi_layer.type`` names a layer of ours, or is a class.

    mmdet's extractors resolve the name in ``mmcv.ops``.
    """

    roi_layer_types = ("DeformRoIAlign", "DeformRoIAlignPack", "ModulatedDeformRoIAlignPack")

    def build_roi_layers(self, layer_cfg: dict, featmap_strides: list[int]) -> nn.ModuleList:
        cfg = dict(layer_cfg)
        kind = cfg.pop("type")
        if isinstance(kind, str):
            if kind not in self.roi_layer_types:
                raise ValueError(
                    f"roi_layer.type of a {type(self).__name__} must be one of {', '.join(self.roi_layer_types)}, "
                    f"got {kind!r}; mmcv's RoI layers belong in a SingleRoIExtractor"
                )
            kind = getattr(layers, kind)
        return nn.ModuleList(kind(spatial_scale=1 / stride, **cfg) for stride in featmap_strides)


class DeformRoIExtractor(_BuildsOurLayers, SingleRoIExtractor):
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


class DeformGenericRoIExtractor(_BuildsOurLayers, GenericRoIExtractor):
    """Pools each RoI, deformably, from every pyramid level and aggregates them.

    The aggregation is that of `A novel Region of Interest Extraction Layer for Instance Segmentation
    <https://arxiv.org/abs/2004.13665>`_, as in mmdet's GenericRoIExtractor, and so are the arguments. Unlike there,
    ``pre_cfg``, ``post_cfg`` and ``roi_scale_factor`` count for a single map too.

    Args:
        aggregation: 'sum' or 'concat'.
        pre_cfg: config of the plugin layer that each level's pooled features pass before they are aggregated.
        post_cfg: the same, after.
        roi_layer, out_channels, featmap_strides, init_cfg: as of :class:`DeformRoIExtractor`; ``out_channels`` counts
            the channels of all levels where they are concatenated.

    Raises:
        ValueError: ``roi_layer.type`` is another string, or the concatenated channels are not ``out_channels``.
    """

    def forward(self, feats: tuple[Tensor, ...], rois: Tensor, roi_scale_factor: float | None = None) -> Tensor:
        """Pools RoIs: arguments and result as of :class:`DeformRoIExtractor`."""
        if roi_scale_factor is not None:
            rois = self.roi_rescale(rois, roi_scale_factor)
        pooled = [self.roi_layers[level](feat, rois) for level, feat in enumerate(feats)]
        if self.with_pre:
            pooled = [self.pre_module(one) for one in pooled]
        output = sum(pooled) if self.aggregation == "sum" else torch.cat(pooled, 1)
        if output.shape[1] != self.out_channels:
            raise ValueError(f"out_channels is {self.out_channels}, but the levels together have {output.shape[1]}")
        return self.post_module(output) if self.with_post else output


class DeformPSRoIExtractor(DeformRoIExtractor):
    """Pools each RoI position-sensitively, its bins deformed: the extractor of Deformable R-FCN.

    Usually there is one map. With several, a RoI is pooled from the level that its size is assigned to, as by
    :class:`DeformRoIExtractor`, and the arguments are the same but for:

    Args:
        roi_layer: config of the RoI layer; ``type`` is 'DeformRFCNPool', which predicts score maps and offsets
            from features, 'DeformPSRoIPoolPack' or 'DeformPSRoIPool', for which the maps given are score maps, or a
            class.
        out_channels: channels of the output: the layer's ``output_dim``.
    """

    roi_layer_types = ("DeformRFCNPool", "DeformPSRoIPool", "DeformPSRoIPoolPack")


def register_roi_extractors() -> None:
    for extractor in (DeformRoIExtractor, DeformGenericRoIExtractor, DeformPSRoIExtractor):
        MODELS.register_module(module=extractor, force=True)
