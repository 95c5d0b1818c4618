"""A detector's FLOPs: they rise where it becomes deformable, and all counters agree on the convolutions."""

import pytest
import torch

pytest.importorskip("mmdet")

from mmdet.registry import MODELS
from mmengine.analysis import FlopAnalyzer, get_model_complexity_info
from mmengine.hub import get_config
from mmengine.registry import init_default_scope
from torch.utils.flop_counter import FlopCounterMode

import dcn_plugin.mmdet  # noqa: F401
from dcn_plugin.describe import _trace

HEIGHT, WIDTH = 64, 96


def detector(**backbone):
    init_default_scope("mmdet")
    config = get_config("mmdet::retinanet/retinanet_r18_fpn_1x_coco.py").model
    config.backbone.update(init_cfg=None, **backbone)
    return MODELS.build(config).eval()


@pytest.fixture(params=["DCN", "DCNv2"])
def deformable(request):
    return detector(deformable=dict(type=request.param, targets=["layer3", "layer4"]))


def test_flops_rise(deformable):
    def flops(model):
        found = get_model_complexity_info(model, (3, HEIGHT, WIDTH), show_table=False, show_arch=False)
        return found["flops"]

    assert flops(deformable) > flops(detector())


def test_counters_agree(deformable):
    images = torch.rand(1, 3, HEIGHT, WIDTH)
    by_mmengine = FlopAnalyzer(deformable, images).by_operator()
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        deformable(images)
    by_torch = {str(operator): flops for operator, flops in counter.get_flop_counts()["Global"].items()}
    by_inspect = _trace(deformable, (HEIGHT, WIDTH))
    assert by_torch.keys() == {"aten.convolution", "dcn_plugin.deform_conv2d"}
    assert by_torch["dcn_plugin.deform_conv2d"] == 2 * by_mmengine["deform_conv2d"]
    assert by_torch["aten.convolution"] == 2 * by_mmengine["conv"]
    assert sum(by_inspect.values()) == by_mmengine["conv"] + by_mmengine["deform_conv2d"]
