"""Multiply-adds counted by hand, and that torch's counter, in training too, and fvcore's find them."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dcn_plugin import convert
from dcn_plugin.ops import deform_conv2d, deform_ps_roi_pool, deform_roi_align, flops, ms_deform_attn

# Two images of 6 channels, 5 x 7; 4 output channels in 2 groups, kernel 3 x 2; 5 x 8 output positions with padding 1.
OUTPUT = 2 * 5 * 8
PRODUCT = OUTPUT * 4 * 3 * 6
SAMPLING = OUTPUT * 6 * 6 * 4


def conv_tensors(mask=True):
    tensors = dict(
        input=torch.rand(2, 6, 5, 7),
        offset=torch.rand(2, 2 * 6, 5, 8),
        weight=torch.rand(4, 3, 3, 2),
        bias=torch.rand(4),
        mask=torch.rand(2, 6, 5, 8) if mask else None,
    )
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def counted(function):
    """FLOPs by operator, as torch's counter reports them."""
    counter = FlopCounterMode(display=False)
    with counter:
        function()
    return {str(operator): count for operator, count in counter.get_flop_counts().get("Global", {}).items()}


@pytest.mark.parametrize("where", ["cpu", "meta"])
@pytest.mark.parametrize("mask", [False, True])
def test_convolution(mask, where):
    tensors = {name: tensor.to(where) for name, tensor in conv_tensors(mask).items()}
    found = counted(lambda: deform_conv2d(**tensors, padding=1))
    assert found == {"dcn_plugin.deform_conv2d": 2 * (PRODUCT + SAMPLING)}


def test_product_is_what_torch_counts_for_the_plain_convolution():
    tensors = conv_tensors()
    plain = counted(lambda: nn.functional.conv2d(tensors["input"], tensors["weight"], padding=1, groups=2))
    assert plain == {"aten.convolution": 2 * PRODUCT}


@pytest.mark.parametrize(
    ("needed", "products", "passes"),
    [
        (["input"], 1, 1),
        (["offset"], 1, 3),  # y, x, and the mask's beside them
        (["weight"], 1, 1),
        (["input", "offset", "weight", "bias", "mask"], 2, 5),
    ],
)
def test_backward_of_the_convolution(needed, products, passes):
    tensors = conv_tensors()
    for name in needed:
        tensors[name].requires_grad_()
    found = counted(deform_conv2d(**tensors, padding=1).sum().backward)
    assert found == {"dcn_plugin.deform_conv2d_backward": 2 * (products * PRODUCT + passes * SAMPLING)}


def test_backward_without_a_mask():
    tensors = conv_tensors(mask=False)
    tensors["offset"].requires_grad_()
    found = counted(deform_conv2d(**tensors, padding=1).sum().backward)
    assert found == {"dcn_plugin.deform_conv2d_backward": 2 * (PRODUCT + 2 * SAMPLING)}


@pytest.mark.parametrize(("sampling_ratio", "samples"), [(3, 9), (0, 4)])
def test_roi_align(sampling_ratio, samples):
    input, rois = torch.rand(1, 8, 9, 9, requires_grad=True), torch.tensor([[0, 1.0, 1, 7, 7], [0, 0.0, 0, 5, 5]])
    offset, mask = torch.zeros(2, 2, 4, 3, requires_grad=True), torch.ones(2, 1, 4, 3)
    sampling = 2 * 8 * 4 * 3 * samples * 4

    def pool():
        return deform_roi_align(input, rois, offset, (4, 3), sampling_ratio=sampling_ratio, mask=mask)

    assert counted(pool) == {"dcn_plugin.deform_roi_align": 2 * sampling}
    assert counted(pool().sum().backward) == {"dcn_plugin.deform_roi_align_backward": 2 * 4 * sampling}


def test_ps_roi_pool():
    input, rois = torch.rand(1, 8, 9, 9, requires_grad=True), torch.tensor([[0, 1.0, 1, 7, 7]])
    sampling = 2 * 2 * 2 * 9 * 4

    def pool(offset=None):
        return deform_ps_roi_pool(input, rois, offset, 2, sample_per_part=3)

    assert counted(pool) == {"dcn_plugin.deform_ps_roi_pool": 2 * sampling}
    assert counted(pool().sum().backward) == {"dcn_plugin.deform_ps_roi_pool_backward": 2 * sampling}
    offset = torch.zeros(1, 2, 2, 2, requires_grad=True)
    assert counted(pool(offset).sum().backward) == {"dcn_plugin.deform_ps_roi_pool_backward": 2 * 3 * sampling}


@pytest.mark.parametrize(("needed", "passes"), [((0,), 1), ((1,), 3), ((2,), 3), ((0, 1, 2), 4)])
def test_attention(needed, passes):
    tensors = torch.rand(1, 15, 2, 8), torch.rand(1, 7, 2, 2, 3, 2), torch.rand(1, 7, 2, 2, 3)
    for index in needed:
        tensors[index].requires_grad_()
    sampling = 7 * 2 * 2 * 3 * 8 * 4

    def attend():
        return ms_deform_attn(tensors[0], [(3, 4), (1, 3)], *tensors[1:])

    assert counted(attend) == {"dcn_plugin.ms_deform_attn": 2 * sampling}
    assert counted(attend().sum().backward) == {"dcn_plugin.ms_deform_attn_backward": 2 * passes * sampling}


def test_fvcore():
    fvcore = pytest.importorskip("fvcore.nn", reason="counts with fvcore where it is installed")
    net, images = convert(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1)), targets="0"), torch.rand(1, 3, 8, 8)
    found = fvcore.FlopCountAnalysis(net, images).set_op_handle(**flops.JIT_HANDLES)
    product, sampling, offsets = 64 * 4 * 27, 64 * 27 * 4, 64 * 27 * 27
    assert found.by_operator()["deform_conv2d"] == product + sampling
    assert found.by_operator()["conv"] == offsets
    assert counted(lambda: net(images))["dcn_plugin.deform_conv2d"] == 2 * (product + sampling)
