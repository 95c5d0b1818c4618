"""Semantic segmentation: a backbone under the semantic head of Panoptic FPN, which mmdet has only beside others."""

from mmdet.models.detectors.base import BaseDetector
from mmdet.registry import MODELS
from mmengine.structures import PixelData


@MODELS.register_module()
class SemanticSegmentor(BaseDetector):
    """Scores each pixel's class.

    Args:
        backbone: config of what makes maps of images.
        semantic_head: config of a head such as 'PanopticFPNHead', on the backbone's maps.
        data_preprocessor, init_cfg: as of every detector.
    """

    def __init__(self, backbone, semantic_head, data_preprocessor=None, init_cfg=None):
        super().__init__(data_preprocessor=data_preprocessor, init_cfg=init_cfg)
        self.backbone = MODELS.build(backbone)
        self.semantic_head = MODELS.build(semantic_head)

    def extract_feat(self, batch_inputs):
        return self.backbone(batch_inputs)

    def _forward(self, batch_inputs, batch_data_samples=None):
        return self.semantic_head(self.extract_feat(batch_inputs))["seg_preds"]

    def loss(self, batch_inputs, batch_data_samples):
        return self.semantic_head.loss(self.extract_feat(batch_inputs), batch_data_samples)

    def predict(self, batch_inputs, batch_data_samples, rescale=True):
        metas = [sample.metainfo for sample in batch_data_samples]
        scores = self.semantic_head.predict(self.extract_feat(batch_inputs), metas, rescale)
        for sample, of in zip(batch_data_samples, scores, strict=True):
            sample.pred_sem_seg = PixelData(sem_seg=of.argmax(0, keepdim=True))
        return batch_data_samples
