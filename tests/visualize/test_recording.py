"""Which calls a recording holds, and where their maps lie in the image."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dcn_plugin import ops
from dcn_plugin.layers import DeformConv2dPack, DeformRoIAlignPack, ModulatedDeformConv2dPack
from dcn_plugin.visualize import record
from dcn_plugin.visualize.grid import Grid

SIZE = 97, 130


class Apply(nn.Module):
    def __init__(self, function, **modules):
        super().__init__()
        self.function = function
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.function(self, x)


def convolution(*args, **kwargs):
    return nn.Conv2d(1, 1, *args, **kwargs)


def bilinear(align_corners):
    return Apply(lambda _, x: F.interpolate(x, size=(31, 44), mode="bilinear", align_corners=align_corners))


PATHS = {
    "nothing": [],
    "stem": [convolution(7, 2, 3), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)],
    "valid": [convolution(3, 2), convolution(3)],
    "even": [convolution(4, 4)],
    "one sided": [nn.ZeroPad2d((0, 1, 0, 1)), convolution(3, 2)],
    "two sided": [nn.ZeroPad2d((4, 1, 2, 0)), convolution(3, 2)],
    "dilated": [convolution((3, 5), (2, 1), (2, 1), (2, 3))],
    "poolings": [nn.AvgPool2d(3, 2, 1, ceil_mode=True), nn.MaxPool2d(2)],
    "adaptive": [nn.AdaptiveAvgPool2d((97, 65))],
    "transposed": [convolution(3, 2, 1), nn.ConvTranspose2d(1, 1, 3, 2, 1)],
    "bilinear": [convolution(3, 2, 1), bilinear(False)],
    "corners": [convolution(3, 2, 1), bilinear(True)],
    "cropped": [Apply(lambda _, x: x[..., 3:-1, 2::2]), convolution(3, 2, 1)],
}


def evenly(module):
    """A module whose gradient reaches all that an output covers, alike: weights of 1, means in place of maxima."""
    if isinstance(module, nn.MaxPool2d):
        return nn.AvgPool2d(module.kernel_size, module.stride, module.padding)
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.ones_(module.weight)
    return module


@pytest.mark.parametrize("path", PATHS)
def test_a_map_lies_where_its_gradient_does(path):
    """What reaches an output position is centred, by autograd, where the grid says that the position is."""
    image = torch.rand(1, 1, *SIZE)
    [conv] = record(nn.Sequential(*PATHS[path], DeformConv2dPack(1, 1, 3, stride=2, padding=1)), image).convolutions
    image.requires_grad_()
    maps = nn.Sequential(*map(evenly, PATHS[path]))(image)
    assert maps.shape[-2:] == conv.size
    for i, j in ((conv.size[0] // 2, conv.size[1] // 2), (conv.size[0] // 2 - 1, conv.size[1] // 2 + 2)):
        gradient = torch.autograd.grad(maps[0, 0, i, j], image, retain_graph=True)[0][0, 0]
        centre = [float((gradient.sum(1 - a) * torch.arange(n)).sum() / gradient.sum()) for a, n in enumerate(SIZE)]
        assert conv.grid.to_image(i, j) == pytest.approx(centre, abs=1e-3)  # sums of float32
    y, x = conv.grid.to_image(2 * 3, 2 * 4)
    assert conv.output_grid.to_image(3, 4) == pytest.approx((y, x))  # stride 2, padding 1
    assert conv.output_grid.to_map(y, x) == pytest.approx((3, 4))
    assert conv.position_at(y + 0.4, x - 0.4) == (3, 4)


@pytest.mark.parametrize(
    "change",
    [
        lambda _, x: F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2]).permute(0, 3, 1, 2),  # as ConvNeXt
        lambda _, x: x.flatten(2).transpose(1, 2).softmax(-1).transpose(1, 2).reshape(x.shape),  # as Swin
        lambda _, x: x * torch.sigmoid(x.mean((2, 3), keepdim=True)),  # as squeeze and excitation
        lambda _, x: F.adaptive_avg_pool2d(x, 1) + x,
        lambda _, x: torch.cat([F.interpolate(F.max_pool2d(x, 3, 2, 1), x.shape[2:]), x], 1)[:, 1:],  # as a pyramid
    ],
)
def test_what_changes_no_pixels_place(change):
    net = nn.Sequential(nn.Conv2d(3, 1, 3, 2, 1), Apply(change), DeformConv2dPack(1, 1, 1))
    [conv] = record(net, torch.rand(1, 3, *SIZE)).convolutions
    assert conv.grid == Grid((2.0, 2.0), (0.0, 0.0))


def test_unknown_changes_of_size_count_by_the_ratio():
    net = nn.Sequential(Apply(lambda _, x: F.pixel_unshuffle(x, 2)), DeformConv2dPack(4, 1, 1))
    [conv] = record(net, torch.rand(1, 1, 8, 12)).convolutions
    assert conv.grid == Grid((2.0, 2.0), (0.5, 0.5))  # the middle of each block of 2x2


def test_nearest_upsampling():
    net = nn.Sequential(nn.MaxPool2d(2), nn.Upsample(scale_factor=4), DeformConv2dPack(1, 1, 1))
    [conv] = record(net, torch.rand(1, 1, 8, 8)).convolutions
    assert conv.grid.to_image(0, 15) == (-0.25, 7.25)  # quarters of the pooled pixels at 0.5 and 6.5


def test_calls_are_noted_as_the_operator_gets_them():
    torch.manual_seed(0)
    first, second = DeformConv2dPack(2, 4, 3, stride=2, padding=1), ModulatedDeformConv2dPack(4, 4, (1, 3), dilation=2)
    first.max_offset = 0.5
    nn.init.constant_(first.conv_offset.bias, 3.0)
    net = nn.Sequential(first, nn.Sequential(nn.ReLU(inplace=True), second))
    recording = record(net, torch.rand(1, 2, 12, 20))
    one, two = recording.convolutions
    assert (one.name, two.name) == ("0", "1.1")
    assert one.previous is None and two.previous is one
    assert one.size == (12, 20) and two.size == one.output_size == (6, 10)
    assert one.mask is None and (two.mask == 0.5).all() and two.mask.shape == (3, 6, 6)
    assert (one.offset == 0.5).all() and one.offset.shape == (18, 6, 10)
    assert one.stride == (2, 2) and one.padding == (1, 1) and two.dilation == (2, 2)
    torch.testing.assert_close(two.taps, second.weight.detach().norm(dim=(0, 1)))
    assert recording.output.shape == (1, 4, 6, 6)
    assert recording.chosen() == [two] and recording.chosen(["?"]) == [one]
    with pytest.raises(ValueError, match="'2' matches none of the deformable layers that ran: 0, 1.1"):
        recording.chosen(["*", "2"])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_the_layer_before_is_on_the_way_and_not_beside_it():
    """In a residual block it is the block's own, whichever way round the sum; a coarser side path does not count."""
    block = Apply(lambda self, x: x + self.conv(x), conv=DeformConv2dPack(2, 2, 3, padding=1))
    side = Apply(
        lambda self, x: F.interpolate(self.conv(x), x.shape[2:]) + x,
        conv=DeformConv2dPack(2, 2, 3, stride=2, padding=1),
    )
    last = DeformConv2dPack(2, 2, 3, padding=1)
    in_block, beside, end = record(nn.Sequential(block, side, last), torch.rand(1, 2, 8, 8)).convolutions
    assert (in_block.name, beside.name, end.name) == ("0.conv", "1.conv", "2")
    assert beside.previous is in_block and end.previous is in_block
    assert end.grid == Grid()


def test_rois():
    def pooled(self, x):
        return self.after(self.pool(self.conv(x), torch.tensor([[0, 8.0, 8.0, 24.0, 40.0]])))

    modules = dict(
        conv=nn.Conv2d(1, 4, 8, 8),
        pool=DeformRoIAlignPack(2, 4, 8, spatial_scale=1 / 8),
        after=DeformConv2dPack(4, 4, 1),
    )
    recording = record(Apply(pooled, **modules), torch.rand(1, 1, 64, 64))
    [pooling] = recording.poolings
    assert pooling.name == "pool" and pooling.size == (8, 8) and pooling.offset.shape == (1, 2, 2, 2)
    y, x = pooling.samples()[2:4]
    assert x[0, 0].tolist() == [[1.0, 2.0]] * 2 and y[0, 0].tolist() == [[1.5] * 2, [3.5] * 2]
    [conv] = recording.convolutions  # of a RoI's features, which have no place in the image
    assert conv.name == "after" and conv.grid is None and recording.chosen() == []


def test_functions_are_seen_too():
    def deform(_, x):
        return ops.deform_conv2d(x, torch.zeros(1, 2, *x.shape[2:]), torch.ones(1, 1, 1, 1))

    [conv] = record(nn.Sequential(nn.Identity(), Apply(deform)), torch.rand(1, 1, 4, 4)).convolutions
    assert conv.name == "1" and conv.grid == Grid()


def test_an_error_leaves_no_hooks_behind():
    net = nn.Sequential(nn.Conv2d(1, 1, 3), Apply(lambda _, x: 1 / 0))
    with pytest.raises(ZeroDivisionError):
        record(net, torch.rand(1, 1, 4, 4))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    with pytest.raises(ValueError, match=r"one image \(1, C, H, W\), got \(2, 1, 4, 4\)"):
        record(net, torch.rand(2, 1, 4, 4))
