"""R-FCN's second stage: scores and boxes pooled position-sensitively, each the mean of its bins."""

from mmdet.models.roi_heads import BBoxHead, StandardRoIHead
from mmdet.registry import MODELS
from torch import Tensor, nn


@MODELS.register_module()
class RFCNBBoxHead(BBoxHead):
    """Lets the bins of a RoI vote: `R-FCN <https://arxiv.org/abs/1605.06409>`_, section 2. It has no parameters.

    Args:
        kwargs: as of mmdet's BBoxHead: ``num_classes``, ``reg_class_agnostic``, ``bbox_coder`` and the losses.
    """

    def __init__(self, **kwargs) -> None:
        predictor = dict(type=nn.Identity)
        super().__init__(
            with_avg_pool=True, cls_predictor_cfg=predictor, reg_predictor_cfg=predictor, init_cfg=[], **kwargs
        )

    def forward(self, cls_feats: Tensor, reg_feats: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled scores (K, num_classes + 1, h, w) and boxes (K, 4 or 4 * num_classes, h, w) to the means of their
        bins."""
        return cls_feats.mean((2, 3)), reg_feats.mean((2, 3))


@MODELS.register_module()
class RFCNRoIHead(StandardRoIHead):
    """Pools scores and boxes by extractors of their own, whose outputs :class:`RFCNBBoxHead` averages.

    Args:
        bbox_roi_extractor: config of the scores' extractor, with ``num_classes + 1`` output channels.
        reg_roi_extractor: config of the boxes' extractor, with 4 output channels, or 4 a class.
        kwargs: as of mmdet's StandardRoIHead.
    """

    def __init__(self, reg_roi_extractor: dict, **kwargs) -> None:
        super().__init__(**kwargs)
        self.reg_roi_extractor = MODELS.build(reg_roi_extractor)

    def _bbox_forward(self, x: tuple[Tensor, ...], rois: Tensor) -> dict:
        cls_feats = self.bbox_roi_extractor(x[: self.bbox_roi_extractor.num_inputs], rois)
        reg_feats = self.reg_roi_extractor(x[: self.reg_roi_extractor.num_inputs], rois)
        cls_score, bbox_pred = self.bbox_head(cls_feats, reg_feats)
        return dict(cls_score=cls_score, bbox_pred=bbox_pred, bbox_feats=cls_feats)
