"""MMEngine's complexity analysis counts our operators, and so do mmdet's tools that use it."""

import pytest
import torch

pytest.importorskip("mmengine")

from mmengine.analysis import ActivationAnalyzer, FlopAnalyzer, get_model_complexity_info
from torch import nn

import dcn_plugin.mmengine  # noqa: F401
from dcn_plugin import convert
from dcn_plugin.layers import DeformPSRoIPool, ModulatedDeformRoIAlignPack

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
