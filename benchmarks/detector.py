"""Detectors of MMDetection, randomly initialised: Faster R-CNN R50-FPN, plain and with DCNv2 in c3-c5, ours and mmcv's,
and Deformable DETR with our attention and mmcv's.
"""

from copy import deepcopy
from dataclasses import dataclass
from functools import partial

import torch

from . import peers
from .cases import Case, Contender

CONFIG = "mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py"
ATTENTION_CONFIG = "mmdet::deformable_detr/deformable-detr_r50_16xb2-50e_coco.py"
OFFSET_PIXELS = 1.0  # standard deviation of the offsets, one for each tap, which an untrained layer would leave at 0
OBJECTS, CLASSES = 8, 80


@dataclass(frozen=True)
class Detector(Case):
    """A training iteration (forward, losses, backward, SGD step) or the inference of a batch."""

    images: int = 2
    size: tuple = ()  # height, width
    training: bool = True

    operator = "detector"
    host_time_counts = True

    @property
    def directions(self):
        return ("training iteration" if self.training else "inference",)

    def contenders(self, device, threads):
        for name, model, floor in self.models():
            model.to(device)
            run = partial(infer, model.eval(), *self.batch(device))
            if self.training:
                optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=1e-6, momentum=0.9)
                run = partial(train, optimizer, model.train(), *self.batch(device))
            yield Contender(name, run, floor=floor, optional=name == "mmcv" and floor is not None)

    def models(self):
        """(name, model, name of the floor)"""
        import dcn_plugin.mmengine  # not dcn_plugin.mmdet, which runs mmcv's operators on ours

        kinds = dict(plain=None, dcn_plugin=dcn_plugin.layers.ModulatedDeformConv2dPack)
        if mmcv := peers.load("mmcv")[0]:
            kinds["mmcv"] = mmcv.ModulatedDeformConv2dPack
        plain = None
        for name, kind in kinds.items():
            model = build(kind)
            if plain is None:
                plain = model
            else:
                model.load_state_dict(plain.state_dict(), strict=False)  # all but conv_offset is the same
            yield name, model, None if model is plain else "plain"

    def batch(self, device):
        """Random images with random boxes, as MMDetection's data preprocessor leaves them."""
        from mmdet.structures import DetDataSample
        from mmengine.structures import InstanceData

        generator = torch.Generator().manual_seed(0)
        height, width = self.size
        samples = []
        for _ in range(self.images):
            corners = torch.rand(OBJECTS, 2, 2, generator=generator).sort(1).values.flatten(1)
            boxes = corners * torch.tensor([width, height] * 2)
            labels = torch.randint(CLASSES, (OBJECTS,), generator=generator)
            shapes = dict.fromkeys(("img_shape", "ori_shape", "pad_shape", "batch_input_shape"), self.size)
            sample = DetDataSample(metainfo=dict(**shapes, scale_factor=(1.0, 1.0)))
            sample.gt_instances = InstanceData(bboxes=boxes.to(device), labels=labels.to(device))
            samples.append(sample)
        return torch.randn(self.images, 3, height, width, generator=generator).to(device), samples


@dataclass(frozen=True)
class AttentionDetector(Detector):
    """With Deformable DETR; the floor is mmcv's attention."""

    def models(self):
        from dcn_plugin.layers import MultiScaleDeformableAttention

        theirs = build_from(ATTENTION_CONFIG, lambda model: None)
        yield "mmcv", theirs, None
        ours = deepcopy(theirs)
        for path, module in theirs.named_modules():
            if isinstance(module, peers.load("mmcv")[0].MultiScaleDeformableAttention):
                sizes = module.embed_dims, module.num_heads, module.num_levels, module.num_points
                layer = MultiScaleDeformableAttention(*sizes, batch_first=module.batch_first)
                layer.load_state_dict(module.state_dict())
                ours.set_submodule(path, layer)
        yield "dcn_plugin", ours, "mmcv"


def train(optimizer, model, images, samples):
    loss, _ = model.parse_losses(model(images, samples, mode="loss"))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


@torch.no_grad()
def infer(model, images, samples):
    return model(images, samples, mode="predict")


def build_from(path, change):
    """mmdet's detector of a config, randomly initialised after ``change(model's config)``."""
    from mmdet.registry import MODELS
    from mmengine.hub import get_config
    from mmengine.logging import MMLogger
    from mmengine.registry import init_default_scope

    if not MMLogger.check_instance_created("benchmarks"):  # initialising would say a line or two about every weight
        MMLogger.get_instance("benchmarks", log_level="ERROR")
    init_default_scope("mmdet")
    config = get_config(path).model
    config.backbone.init_cfg = None
    change(config)
    torch.manual_seed(0)
    model = MODELS.build(config)
    model.init_weights()
    return model


def build(kind):
    """Faster R-CNN with the layer class ``kind``, None for none, as the 3x3 convolutions of c3-c5."""

    def change(config):
        config.test_cfg.rcnn.score_thr = 1.0  # no detections: how many random weights make would decide the time
        if kind is not None:
            dcn = dict(type=kind, deform_groups=1, fallback_on_stride=False)
            config.backbone.update(dcn=dcn, stage_with_dcn=(False, True, True, True))

    model = build_from(CONFIG, change)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("conv_offset.bias"):  # of the offsets, then of the masks
                parameter[: len(parameter) * 2 // 3].normal_(std=OFFSET_PIXELS)
            elif name.endswith("bn3.weight"):  # zero as initialised, which would cut the deformable layers off
                parameter.fill_(0.2)
    return model


def detector_cases(device):
    """Two images: 320 x 320, so that a CPU ends; on CUDA as COCO's."""
    size = (320, 320) if device == "cpu" else (800, 1216)
    if peers.load("mmdet")[0]:
        for training in (True, False):
            yield Detector(f"Faster R-CNN R50-FPN, 2 images {size[0]}x{size[1]}", size=size, training=training)
        if peers.load("mmcv")[0]:
            yield AttentionDetector(f"Deformable DETR R50, 2 images {size[0]}x{size[1]}", size=size)
