"""convert() itself: what it keeps, what it chooses, what it refuses."""

import copy
import logging
import pickle

import pytest
import torch
from torch import nn

from dcn_plugin import convert
from dcn_plugin.layers import DeformConv2dPack, ModulatedDeformConv2dPack

KINDS = pytest.mark.parametrize("kind", [DeformConv2dPack, ModulatedDeformConv2dPack])


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 7, stride=2, padding=3)
        self.layer1 = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding="same"))
        self.layer2 = nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1, groups=8), nn.Conv2d(16, 16, (1, 5), padding=(0, 2)))
        self.stem = nn.Conv2d(16, 16, 3, padding=1)
        self.up = nn.ConvTranspose2d(16, 16, 2, stride=2)

    def forward(self, x):
        return self.up(self.stem(self.layer2(self.layer1(self.conv1(x)))))


def deformable(module):
    return [
        name
        for name, child in module.named_modules()
        if isinstance(child, (DeformConv2dPack, ModulatedDeformConv2dPack))
    ]


@KINDS
def test_computes_what_it_computed(kind):
    net, x = Net().eval(), torch.randn(2, 3, 32, 40)
    expected = net(x)
    assert convert(net, kind) is net
    assert deformable(net) == ["layer1.2", "layer2.0", "layer2.1"]
    torch.testing.assert_close(net(x), expected, rtol=1e-5, atol=1e-5)


def test_the_mask_is_one_exactly_and_natively_a_half():
    x = torch.randn(1, 4, 6, 6, dtype=torch.float64)
    conv = nn.Conv2d(4, 4, 1, bias=False, dtype=torch.float64)
    native = ModulatedDeformConv2dPack(4, 4, 1, bias=False, dtype=torch.float64)
    native.load_state_dict(conv.state_dict(), strict=False)
    expected = conv(x)
    torch.testing.assert_close(native(x), expected / 2, rtol=1e-15, atol=1e-15)
    assert convert(conv, targets="*", kernel_size=1).mask_scale == 2
    torch.testing.assert_close(conv(x), expected, rtol=1e-15, atol=1e-15)
    assert "mask_scale=2" in repr(conv) and "mask_scale" not in repr(native)


def test_the_mask_scale_may_be_that_of_published_models():
    conv, x = nn.Conv2d(4, 4, 3, bias=False), torch.randn(1, 4, 6, 6)
    expected = conv(x) / 2
    torch.testing.assert_close(convert(conv, mask_scale=1)(x), expected)


@KINDS
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_keeps_the_parameters_their_kind_and_the_mode(kind, dtype):
    conv = nn.Conv2d(4, 6, 3, padding=1, dilation=2, groups=2).to(dtype).to(memory_format=torch.channels_last)
    conv.weight.requires_grad_(False)
    conv.eval()
    weight, bias, text = conv.weight, conv.bias, repr(conv)
    convert(conv, kind)
    assert conv.weight is weight and conv.bias is bias
    assert not weight.requires_grad and bias.requires_grad and not conv.conv_offset.weight.requires_grad
    assert conv.conv_offset.weight.dtype is dtype and not conv.training and not conv.conv_offset.training
    assert conv.conv_offset.weight.is_contiguous(memory_format=torch.channels_last)
    assert not conv.conv_offset.weight.any() and not conv.conv_offset.bias.any()
    assert text.split("(")[1].removesuffix(")") in repr(conv)
    assert conv(torch.zeros(1, 4, 5, 5, dtype=dtype)).dtype is dtype


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_keeps_the_device():
    conv = convert(nn.Conv2d(4, 4, 3).cuda())
    assert conv.conv_offset.weight.is_cuda
    conv(torch.zeros(1, 4, 5, 5, device="cuda"))


def test_a_meta_model_stays_one():
    with torch.device("meta"):
        net = convert(Net())
    assert all(parameter.is_meta for parameter in net.parameters())


def test_keeps_hooks():
    conv, calls = nn.Conv2d(4, 4, 3), []
    conv.register_forward_pre_hook(lambda *_: calls.append("before"))
    conv.register_forward_hook(lambda *_: calls.append("after"))
    conv.weight.register_hook(lambda gradient: calls.append("gradient"))
    convert(conv)(torch.randn(1, 4, 5, 5)).sum().backward()
    assert calls == ["before", "after", "gradient"]


def test_shared_modules_and_references_stay_shared():
    conv = nn.Conv2d(4, 4, 3)
    net = nn.ModuleDict(dict(a=nn.Sequential(conv), b=nn.Sequential(conv, nn.ReLU())))
    convert(net, targets="b")
    assert net["a"][0] is net["b"][0] is conv and type(conv) is ModulatedDeformConv2dPack
    twin = nn.Conv2d(4, 4, 3)
    twin.weight = conv.weight
    convert(twin)
    assert twin.weight is conv.weight and twin.conv_offset is not conv.conv_offset


def test_draws_no_random_numbers():
    net = Net()
    state = torch.get_rng_state()
    convert(net)
    assert torch.equal(torch.get_rng_state(), state)


@KINDS
def test_copies_pickles_and_trains(kind):
    net = convert(Net(), kind, deform_groups=2)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        twin.load_state_dict(net.state_dict())
        x = torch.randn(2, 3, 16, 16)
        expected = twin(x).detach()
        twin(x).square().sum().backward()
        torch.optim.SGD(twin.parameters(), lr=1e-2).step()
        assert all(twin.get_submodule(name).conv_offset.weight.any() for name in deformable(twin))
        assert not torch.equal(twin(x), expected)


def test_once_more_converts_the_rest():
    net = convert(Net(), targets="layer1")
    convert(net, "DCN", targets="layer2")
    assert [type(net.get_submodule(name)) for name in deformable(net)] == [
        ModulatedDeformConv2dPack,
        DeformConv2dPack,
        DeformConv2dPack,
    ]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (dict(targets="layer1"), ["layer1.2"]),
        (dict(targets=["layer2", "layer1"]), ["layer1.2", "layer2.0", "layer2.1"]),
        (dict(targets="layer?.0"), ["layer2.0"]),
        (dict(targets=["layer1.0", "conv1"]), ["conv1", "layer1.0"]),  # in full: even 1x1, even the stem
        (dict(targets=("stem",)), ["stem"]),
        (dict(last=2), ["layer2.0", "layer2.1"]),
        (dict(kernel_size=3), ["layer1.2", "layer2.0"]),
        (dict(kernel_size=[1, 5]), ["layer2.1"]),
        (dict(kernel_size=1), ["layer1.0"]),
        (dict(stride=2), ["layer2.0"]),
        (dict(depthwise=True), ["layer2.0"]),
        (dict(depthwise=False), ["layer1.2", "layer2.1"]),
        (dict(min_channels=16), ["layer2.1"]),
        (dict(targets="layer*", min_channels=8, last=1), ["layer2.1"]),
    ],
)
def test_chooses(options, expected):
    assert deformable(convert(Net(), **options)) == expected


class Own(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * 2


def unusual():
    net = nn.ModuleDict(dict(own=Own(4, 4, 3), reflect=nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")))
    net["even"] = nn.Conv2d(4, 4, 2, padding="same")
    net["volume"] = nn.Conv3d(4, 4, 3)
    net["up"] = nn.ConvTranspose2d(4, 4, 2)
    net["plain"] = nn.Conv2d(4, 4, 3)
    return net


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("own", "Own computes something of its own"),
        ("reflect", "padding_mode='reflect'"),
        ("even", "'same'"),
        ("volume", "3D"),
        ("up", "transposed"),
    ],
)
def test_refuses_what_cannot_be_deformable(target, reason, caplog):
    with pytest.raises(ValueError, match=f"target '{target}' is a convolution .* cannot become deformable: .*{reason}"):
        convert(unusual(), targets=["plain", target])
    with pytest.raises(ValueError, match=rf"target '{target[:-1]}\*' chooses none .*: {target} \(.*{reason}"):
        convert(unusual(), targets=f"{target[:-1]}*")
    with caplog.at_level(logging.INFO, "dcn_plugin"):
        assert deformable(convert(unusual())) == ["plain"]  # a wider pattern leaves it, and says so
    assert f"{target} (" in caplog.messages[-1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(targets="layer3"), "target 'layer3' matches nothing in Net; nearest: layer2, layer1"),
        (dict(targets="layers.2"), "nearest: layer1.2, layer2, layer2.1"),
        (dict(targets="zzz"), "nearest: conv1, layer1"),
        (dict(targets="layer1.1"), r"'layer1.1' matches no convolution of Net, but layer1.1 \(BatchNorm2d\)"),
        (dict(targets=["layer1", "*.0"], min_channels=9), r"'layer1' chooses none .* layer1.2 \(8 channels\)"),
        (dict(targets="layer?.0", kernel_size=5), r"layer1.0 \(kernel 1x1\), layer2.0 \(kernel 3x3\)"),
        (dict(targets=[]), "targets must be patterns"),
        (dict(targets=[3]), "targets must be patterns"),
        (dict(targets=None), "targets must be patterns.*got None"),
        (dict(type="DCNv3"), "must be DCN or DCNv2, or a subclass; got 'DCNv3'"),
        (dict(type=nn.Conv2d), "must be DCN or DCNv2"),
        (dict(last=4), "last=4, but 3 convolutions of Net qualify"),
        (dict(last=0), "last=0"),
        (dict(last="1"), "last='1'"),
        (dict(target="layer1"), "unknown option 'target'; nearest: targets"),
        (dict(deform_group=2), "unknown option 'deform_group'; nearest: deform_groups"),
        (dict(type="DCN", mask_scale=1), "unknown option 'mask_scale'"),
        (dict(modul=1), "unknown option 'modul'; there are deform_groups"),
        (dict(kernel_size="3"), "kernel_size must be an integer or two integers, got '3'"),
        (dict(min_channels="big"), "min_channels must be an integer, got 'big'"),
        (dict(padding=1), "'padding' is no option: a convolution that becomes deformable keeps its own padding"),
        (dict(deform_groups=3), r"layer1.2 \(Conv2d.*divisible by deform_groups \(3\)"),
        (dict(fallback_on_stride=False), "unknown option 'fallback_on_stride'; there are deform_groups, .*max_offset"),
    ],
)
def test_errors_say_what_is_wrong_and_change_nothing(options, message):
    net = Net()
    with pytest.raises(ValueError, match=message):
        convert(net, **options)
    assert deformable(net) == []


def test_already_deformable():
    net = convert(Net())
    with pytest.raises(ValueError, match=r"layer1.2 \(already deformable\)"):
        convert(net, targets="layer1")
    with pytest.raises(ValueError, match="layer1.2.* cannot become deformable: already deformable"):
        convert(net, targets="layer1.2")


class TestLoading:
    def test_of_a_plain_models_state_dict(self, caplog):
        plain, net = Net(), nn.Sequential(convert(Net()))
        net[0].layer1[2].conv_offset.bias.data.fill_(0.25)
        net.load_state_dict({f"0.{key}": value for key, value in plain.state_dict().items()})
        assert torch.equal(net[0].conv1.weight, plain.conv1.weight)
        assert net[0].layer1[2].conv_offset.bias.eq(0.25).all()
        caplog.clear()
        net[0].load_state_dict(plain.state_dict())
        (message,) = caplog.messages
        assert "lacks the offsets of 3 layers" in message and "layer2.0.conv_offset" in message

    def test_of_a_part(self):
        net = convert(Net())
        net.layer2.load_state_dict(Net().layer2.state_dict())

    def test_of_a_converted_layer_alone_or_moved(self, caplog):
        net, plain = convert(Net()), Net()
        caplog.clear()
        net.layer1[2].load_state_dict(plain.layer1[2].state_dict())
        assert len(caplog.messages) == 1 and "lacks the offsets of 1 layers" in caplog.messages[0]
        moved = nn.Sequential(net.layer1[2])
        moved.load_state_dict(nn.Sequential(plain.layer1[2]).state_dict())

    def test_of_a_layer_shared_with_an_unconverted_part(self):
        conv = nn.Conv2d(4, 4, 3)
        net = nn.ModuleDict(dict(a=nn.Sequential(conv), b=nn.Sequential(conv)))
        plain = {key: value.clone() for key, value in net.state_dict().items()}
        convert(net["a"])
        net.load_state_dict(plain)

    def test_twice_converted_says_each_layer_once(self, caplog):
        net = nn.Sequential(convert(Net(), targets="layer1"))
        convert(net, targets="*.layer2")
        caplog.clear()
        net.load_state_dict(nn.Sequential(Net()).state_dict())
        text = " ".join(caplog.messages)
        assert len(caplog.messages) == 2
        assert [text.count(name) for name in ("layer1.2", "layer2.0", "layer2.1")] == [1, 1, 1]

    def test_changes_no_state_dict(self):
        state = Net().state_dict()
        keys = list(state)
        convert(Net()).load_state_dict(state)
        assert list(state) == keys

    def test_round_trip_says_nothing(self, caplog):
        net, twin = convert(Net()), convert(Net())
        net.layer2[0].conv_offset.weight.data.normal_()
        caplog.clear()
        twin.load_state_dict(net.state_dict())
        assert not caplog.messages
        assert all(
            torch.equal(a, b) for a, b in zip(net.state_dict().values(), twin.state_dict().values(), strict=True)
        )

    def test_other_missing_keys_are_missing(self):
        state = Net().state_dict()
        del state["layer2.0.weight"], state["conv1.bias"]
        result = convert(Net()).load_state_dict(state, strict=False)
        assert set(result.missing_keys) == {
            "conv1.bias", *(f"layer2.0.{key}" for key in ("weight", "conv_offset.weight", "conv_offset.bias"))
        }  # fmt: skip

    @pytest.mark.parametrize("prefix", ["", "0."])
    def test_old_names_of_the_offsets(self, prefix, caplog):
        def build():
            block = nn.ModuleDict(dict(conv2=nn.Conv2d(4, 4, 3)))
            return nn.Sequential(block) if prefix else block

        state = {key.replace("conv2.conv_offset", "conv2_offset"): value + 1 for key, value in
                 convert(build()).state_dict().items()}  # fmt: skip
        assert f"{prefix}conv2_offset.weight" in state
        net = convert(build())
        caplog.clear()
        net.load_state_dict(state)
        assert net.get_submodule(f"{prefix}conv2").conv_offset.weight.eq(1).all()
        assert not caplog.messages


def test_says_which_layers_are_frozen(caplog):
    net = Net()
    net.layer1.requires_grad_(False)
    with caplog.at_level(logging.INFO, "dcn_plugin"):
        convert(net)
    assert "frozen, and so their offsets: layer1.2" in caplog.messages[-1]


class TestMmcv:
    @pytest.mark.parametrize("size", [(9, 12), (8, 8)])
    def test_adaptive_padding(self, size):
        bricks = pytest.importorskip("mmcv.cnn.bricks")
        for stride in (1, 2, 3):
            conv = bricks.Conv2dAdaptivePadding(4, 4, (3, 4), stride=stride, dilation=(1, 2), padding=1)
            x = torch.randn(1, 4, *size)
            expected = conv(x)
            torch.testing.assert_close(convert(conv)(x), expected, rtol=1e-5, atol=1e-5)

    def test_mmcvs_own_wrapper(self):
        bricks = pytest.importorskip("mmcv.cnn.bricks")
        assert type(convert(bricks.Conv2d(4, 4, 3))) is ModulatedDeformConv2dPack

    @pytest.mark.parametrize("name", ["ConvWS2d", "ConvAWS2d"])
    def test_standardised_weights_are_refused(self, name):
        conv_ws = pytest.importorskip("mmcv.cnn.bricks.conv_ws")
        net = nn.ModuleDict(dict(conv=getattr(conv_ws, name)(4, 4, 3)))
        with pytest.raises(ValueError, match=f"{name} computes something of its own"):
            convert(net)

    def test_the_offsets_of_mmcvs_layers_are_left_alone(self, mmcv_ops):
        net = nn.ModuleDict(dict(theirs=mmcv_ops.ModulatedDeformConv2dPack(4, 4, 3), plain=nn.Conv2d(4, 4, 3)))
        convert(net)
        assert deformable(net) == ["plain"]
