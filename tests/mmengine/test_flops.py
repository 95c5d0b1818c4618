"""MMEngine's complexity analysis counts our operators, and so do mmdet's tools that use it."""

import pytest
import torch

pytest.importorskip("mmengine")

from mmengine.analysis import ActivationAnalyzer, FlopAnalyzer, get_model_complexity_info
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import dcn_plugin.mmengine  # noqa: F401
from dcn_plugin import convert
from dcn_plugin.layers import DeformPSRoIPool, ModulatedDeformRoIAlignPack, MultiScaleDeformableAttention

IMAGES = torch.rand(1, 3, 8, 8)
PRODUCT, SAMPLING, OFFSETS = 64 * 4 * 27, 64 * 27 * 4, 64 * 27 * 27


def net():
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1))


def test_convolution():
    found = FlopAnalyzer(convert(net(), targets="0").eval(), IMAGES).by_operator()
    assert found["deform_conv2d"] == PRODUCT + SAMPLING
    assert found["conv"] == OFFSETS


def test_complexity_info_rises_where_a_convolution_becomes_deformable():
    plain = get_model_complexity_info(net().eval(), inputs=(IMAGES,), show_table=False, show_arch=False)
    deformable = convert(net(), targets="0").eval()
    found = get_model_complexity_info(deformable, inputs=(IMAGES,), show_table=False, show_arch=False)
    assert plain["flops"] == PRODUCT
    assert found["flops"] >= PRODUCT + SAMPLING + OFFSETS
    assert found["activations"] == plain["activations"] + 27 * 64


def test_outputs_of_convolutions_are_activations():
    found = ActivationAnalyzer(convert(net(), targets="0").eval(), IMAGES).by_operator()
    assert found["conv"] == (4 + 27) * 64


@pytest.mark.parametrize(
    ("layer", "operator", "channels", "samples"),
    [
        (ModulatedDeformRoIAlignPack(2, 8, 16, sampling_ratio=3), "deform_roi_align", 8, 9),
        (DeformPSRoIPool(2, sample_per_part=3), "deform_ps_roi_pool", 2, 9),
    ],
)
def test_rois(layer, operator, channels, samples):
    rois = torch.tensor([[0, 1.0, 1, 7, 7], [0, 0.0, 0, 5, 5]])
    found = FlopAnalyzer(layer.eval(), (torch.rand(1, 8, 9, 9), rois)).by_operator()
    calls = 2 if isinstance(layer, ModulatedDeformRoIAlignPack) else 1  # the pack pools once to predict the offsets
    assert found[operator] == calls * 2 * channels * 2 * 2 * samples * 4


def test_attention():
    layer = MultiScaleDeformableAttention(16, 4, 2, 3).eval()
    shapes = torch.tensor([(4, 5), (2, 3)])
    query, value, reference = torch.rand(7, 2, 16), torch.rand(26, 2, 16), torch.rand(2, 7, 2, 2)
    inputs = query, None, value, None, None, None, reference, shapes
    found = FlopAnalyzer(layer, inputs).by_operator()
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        layer(*inputs)
    by_torch = {str(operator): flops for operator, flops in counter.get_flop_counts()["Global"].items()}
    assert found["ms_deform_attn"] == 2 * 7 * 16 * 2 * 3 * 4
    assert by_torch.pop("dcn_plugin.ms_deform_attn") == 2 * found["ms_deform_attn"]
    assert by_torch.keys() <= {"aten.addmm", "aten.mm"} and sum(by_torch.values()) == 2 * found["linear"]
