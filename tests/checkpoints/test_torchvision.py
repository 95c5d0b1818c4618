"""Models in torchvision's names: ResNets, and users' modules around its DeformConv2d."""

import pytest
import torch
from mmdet.registry import MODELS
from mmengine.registry import init_default_scope
from torch import nn
from torch.nn import functional as F

import dcn_plugin.mmdet  # noqa: F401
from dcn_plugin.layers import DeformConv2dPack, ModulatedDeformConv2dPack
from dcn_plugin.ops import reference

from .conftest import assert_loads, assert_same, convert, randomised


class Block(nn.Module):
    def __init__(self, channels, middle, out, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, middle, 1, bias=False), nn.BatchNorm2d(middle)
        self.conv2, self.bn2 = nn.Conv2d(middle, middle, 3, stride, 1, bias=False), nn.BatchNorm2d(middle)
        self.conv3, self.bn3 = nn.Conv2d(middle, out, 1, bias=False), nn.BatchNorm2d(out)
        self.downsample = None
        if channels != out:
            self.downsample = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x):
        out = self.bn1(self.conv1(x)).relu()
        out = self.bn3(self.conv3(self.bn2(self.conv2(out)).relu()))
        return (out + (x if self.downsample is None else self.downsample(x))).relu()


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8)
        channels = 8
        for i, count in enumerate((3, 4, 6, 3)):
            blocks = []
            for j in range(count):
                blocks.append(Block(channels, 8 << i, 32 << i, 2 if i and not j else 1))
                channels = 32 << i
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))
        self.fc = nn.Linear(channels, 10)

    def forward(self, x):
        outs = [F.max_pool2d(self.bn1(self.conv1(x)).relu(), 3, 2, 1)]
        for i in range(4):
            outs.append(getattr(self, f"layer{i + 1}")(outs[-1]))
        return outs[1:]


BACKBONE = dict(type="ResNet", depth=50, base_channels=8, stem_channels=8)


def built(config):
    init_default_scope("mmdet")
    return MODELS.build(config)


@pytest.mark.parametrize("deformable", [None, dict(type="DCNv2", targets=["layer3", "layer4"])])
def test_resnet(deformable, tmp_path):
    source = randomised(ResNet())
    state, text = convert(source, tmp_path)
    target = assert_loads(built(BACKBONE | dict(deformable=deformable)), state)
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    assert_same(target(x), source(x))
    assert "left out, 2: fc.weight, fc.bias" in text and "offsets start at zero" in text


@pytest.mark.parametrize("wrapper", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_into_a_detector_from_within_wrappers(wrapper, tmp_path):
    source = ResNet().state_dict()
    state, text = convert(
        None, tmp_path, state={wrapper + name: tensor for name, tensor in source.items()}, prefix="backbone."
    )
    names = {f"backbone.{name}" for name in source if not name.startswith("fc.")}
    assert set(state) == names
    assert (f"prefix taken away, 1: {wrapper}" in text) == bool(wrapper)


def plain(channels, out, stride=1, bias=True):
    return nn.Conv2d(channels, out, 3, stride, 1, bias=bias)


def deformed(conv, x, offset, mask=None):
    return reference.deform_conv2d(x, offset, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, mask)


class Siblings(nn.Module):
    """A block whose first convolution is ordinary and whose second is deformable."""

    def __init__(self, groups=1, modulated=True):
        super().__init__()
        self.conv1 = plain(4, 6)
        self.conv2 = plain(6, 5, 2)
        self.conv2_offset = plain(6, 18 * groups, 2)
        self.conv2_mask = plain(6, 9 * groups, 2, bias=False) if modulated else None

    def forward(self, x):
        x = self.conv1(x)
        return deformed(self.conv2, x, self.conv2_offset(x), self.conv2_mask and self.conv2_mask(x).sigmoid())


class Wrapper(nn.Module):
    """As in a popular gist: the mask is twice the sigmoid."""

    def __init__(self):
        super().__init__()
        self.offset_conv, self.modulator_conv, self.regular_conv = plain(4, 18), plain(4, 9), plain(4, 6, bias=False)

    def forward(self, x):
        return deformed(self.regular_conv, x, self.offset_conv(x), 2 * self.modulator_conv(x).sigmoid())


class Holder(nn.Conv2d):
    """A subclass of the deformable convolution that holds what predicts its offsets."""

    def __init__(self):
        super().__init__(4, 6, 3, 1, 1)
        self.predictor = nn.Sequential(plain(4, 18))

    def forward(self, x):
        return deformed(self, x, self.predictor(x))


class Joint(nn.Module):
    """One convolution predicts offsets and mask."""

    def __init__(self):
        super().__init__()
        self.deform, self.p_conv = plain(4, 6), plain(4, 27)

    def forward(self, x):
        first, second, mask = self.p_conv(x).chunk(3, 1)
        return deformed(self.deform, x, torch.cat([first, second], 1), mask.sigmoid())


def assert_converted(source, target, tmp_path, **options):
    randomised(source)
    state, text = convert(source, tmp_path, **options)
    x = torch.randn(2, 4, 9, 8, dtype=torch.float64)
    assert_same([assert_loads(target, state)(x)], [source(x)])
    return text


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("modulated", [True, False])
def test_siblings(groups, modulated, tmp_path):
    target = nn.Sequential()
    target.conv1 = plain(4, 6)
    target.conv2 = (ModulatedDeformConv2dPack if modulated else DeformConv2dPack)(
        6, 5, 3, 2, 1, deform_groups=groups, bias=True
    )
    options = dict(offset_name="{}_offset", mask_name="{}_mask" if modulated else None)
    text = assert_converted(Siblings(groups, modulated), target, tmp_path, **options)
    assert "merged into conv_offset, 1: conv2" in text
    assert_converted(
        Siblings(groups, modulated),
        target,
        tmp_path,
        offset_name="conv2_offset",
        mask_name="conv2_mask" if modulated else None,
        conv_name="conv2",
    )


def test_a_wrapper_becomes_the_layer(tmp_path):
    layer = ModulatedDeformConv2dPack(4, 6, 3, 1, 1, bias=False, mask_scale=2)
    source, target = nn.Sequential(), nn.Sequential()
    source.layer, target.layer = Wrapper(), layer
    options = dict(offset_name="offset_conv", mask_name="modulator_conv", rename=[r"\.regular_conv\.=."])
    text = assert_converted(source, target, tmp_path, **options)
    assert "mask_scale=2" in text


def test_the_holder_is_the_convolution(tmp_path):
    assert_converted(Holder(), DeformConv2dPack(4, 6, 3, 1, 1, bias=True), tmp_path, offset_name="predictor.0")
    source, target = nn.Sequential(), nn.Sequential()
    source.one, target.one = Holder(), DeformConv2dPack(4, 6, 3, 1, 1, bias=True)
    assert_converted(source, target, tmp_path, offset_name="predictor.0")


def test_offsets_and_mask_of_one_convolution(tmp_path):
    target = nn.Module()
    target.deform = ModulatedDeformConv2dPack(4, 6, 3, 1, 1)
    target.forward = target.deform.forward
    assert_converted(Joint(), target, tmp_path, offset_name="p_conv")


def state_of(**shapes):
    return {f"{name}.weight": torch.zeros(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    "state, options, message",
    [
        (state_of(conv=(4, 4, 3, 3), offset=(18, 4, 3, 3)), dict(offset_name="offsets"), "no module.*nearest: offset"),
        (
            state_of(a=(4, 4, 3, 3), b=(4, 4, 3, 3), offset=(18, 4, 3, 3)),
            dict(offset_name="offset"),
            "offset may deform a or b: say which by --conv-name",
        ),
        (state_of(offset=(18, 4, 3, 3)), dict(offset_name="offset"), "may deform nothing beside it"),
        (
            state_of(conv=(4, 4, 3, 3), offset=(18, 4, 3, 3)),
            dict(offset_name="offset", mask_name="mask"),
            "offset predicts offsets of conv, but there is no mask",
        ),
        (
            state_of(conv=(4, 4, 5, 5), offset=(50, 4, 3, 3)),
            dict(offset_name="offset"),
            r"offset of \(50, 4, 3, 3\) cannot deform conv of \(4, 4, 5, 5\)",
        ),
        (state_of(conv=(4, 4, 3, 3), offset=(20, 4, 3, 3)), dict(offset_name="offset"), "cannot deform conv"),
        (state_of(conv=(4, 4, 3, 3), offset=(18, 5, 3, 3)), dict(offset_name="offset"), "cannot deform conv"),
        (
            state_of(conv=(4, 4, 3, 3), offset=(9, 4, 3, 3), mask=(18, 4, 3, 3)),
            dict(offset_name="offset", mask_name="mask"),
            "cannot deform conv",
        ),
        (state_of(conv=(4, 4, 3, 3)), dict(format="deform_conv2d"), "needs --offset-name"),
    ],
)
def test_what_cannot_be_merged(state, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        convert(None, tmp_path, state=state, **options)
    assert not (tmp_path / "out.pth").exists()
