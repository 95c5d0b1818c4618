"""The convolution layers: constructors, equality with mmcv's, state dicts old and new, and what nn.Conv2d promises."""

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn
from torch.ao.quantization import get_default_qconfig_mapping, quantize_fx
from torch.fx.experimental.optimization import fuse

from dcn_plugin.layers import DeformConv2d, DeformConv2dPack, ModulatedDeformConv2d, ModulatedDeformConv2dPack
from dcn_plugin.ops import deform_conv2d

PACKS = pytest.mark.parametrize("pack", [DeformConv2dPack, ModulatedDeformConv2dPack])


def randomised(layer, scale=0.5):
    """The layer with all parameters random, offsets of about a pixel among them."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return layer


def assert_close(actual, expected, rtol=1e-5):
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=rtol * expected.abs().max().item())


@pytest.mark.parametrize("layer", [DeformConv2d, ModulatedDeformConv2d])
def test_constructor_begins_as_mmcvs(mmcv_ops, layer):
    theirs = list(inspect.signature(getattr(mmcv_ops, layer.__name__).__init__).parameters.values())
    ours = list(inspect.signature(layer.__init__).parameters.values())
    for mine, other in zip(ours, theirs, strict=False):
        assert (mine.name, mine.default) == (other.name, other.default)
    # im2col_step, where it is not spelt out, is the next positional argument.
    assert layer(4, 4, 3, 1, 1, 1, 1, 1, True, 16).bias is not None


@PACKS
@pytest.mark.parametrize("deform_groups", [1, 2])
@pytest.mark.parametrize("kernel", [3, (1, 5)])
def test_loads_mmcvs_state_dict_and_computes_the_same(mmcv_ops, pack, deform_groups, kernel):
    arguments = dict(stride=2, padding=(1, 2), dilation=1, groups=2, deform_groups=deform_groups)
    theirs = randomised(getattr(mmcv_ops, pack.__name__)(4, 6, kernel, **arguments))
    ours = pack(4, 6, kernel, **arguments)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 4, 9, 8)
    assert_close(ours(x), theirs(x))
    theirs.load_state_dict(ours.state_dict())


@PACKS
def test_bias_is_a_choice_and_adds(pack):
    assert (pack(4, 4, 3).bias is None) == (pack is DeformConv2dPack)
    assert pack(4, 4, 3, bias=False).bias is None
    layer = randomised(pack(4, 6, 3, bias="auto"))
    x = torch.randn(1, 4, 7, 7)
    with_bias = layer(x)
    bias, layer.bias = layer.bias, None
    assert_close(with_bias, layer(x) + bias.view(1, -1, 1, 1))


@PACKS
def test_new_layer_samples_the_regular_grid(pack):
    layer = pack(4, 6, 3, stride=2, padding=1, groups=2)
    plain = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2, bias=layer.bias is not None)
    plain.load_state_dict(layer.state_dict(), strict=False)
    x = torch.randn(2, 4, 9, 9)
    expected = plain(x)
    if pack is ModulatedDeformConv2dPack:  # the mask starts at 0.5 and leaves the bias alone
        bias = plain.bias.view(1, -1, 1, 1)
        expected = (expected - bias) / 2 + bias
    assert_close(layer(x), expected)


@PACKS
def test_offsets_displace_the_samples(pack):
    layer = pack(2, 3, 3, padding=1, bias=False)
    taps = 9
    with torch.no_grad():
        layer.conv_offset.bias[: 2 * taps : 2] = 1.0  # every y by one pixel
        layer.conv_offset.bias[2 * taps :] = 100.0  # mask of 1
    x = torch.randn(1, 2, 8, 8)
    shifted = nn.functional.conv2d(torch.cat([x[:, :, 1:], torch.zeros(1, 2, 1, 8)], 2), layer.weight, padding=1)
    assert_close(layer(x)[:, :, 1:], shifted[:, :, 1:])


@PACKS
def test_is_an_nn_conv2d_that_folds_with_a_batch_norm(pack):
    fuse_conv_bn = pytest.importorskip("mmcv.cnn").fuse_conv_bn
    model = randomised(nn.Sequential(pack(4, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6))).eval()
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.5, 2)
    x = torch.randn(2, 4, 8, 8)
    expected = model(x)
    fused = fuse_conv_bn(model)
    assert isinstance(fused[0], nn.Conv2d) and isinstance(fused[1], nn.Identity)
    assert_close(fused(x), expected, 1e-4)


@PACKS
def test_batch_norm_folded_on_the_fly_keeps_the_offsets(pack):
    ConvModule = pytest.importorskip("mmcv.cnn").ConvModule
    arguments = dict(conv_cfg=dict(type=pack), norm_cfg=dict(type="BN"), padding=1)
    plain = randomised(ConvModule(4, 6, 3, **arguments)).eval()
    on_the_fly = ConvModule(4, 6, 3, **arguments, efficient_conv_bn_eval=True).eval()
    on_the_fly.load_state_dict(plain.state_dict())
    x = torch.randn(2, 4, 8, 8)
    assert_close(on_the_fly(x), plain(x), 1e-4)


@PACKS
def test_gradients_reach_every_parameter(pack):
    layer = pack(4, 6, 3, padding=1, bias=True)  # at its start, offsets zero
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    layer(x).square().sum().backward()
    for name, tensor in [("x", x), *layer.named_parameters()]:
        assert tensor.grad.abs().sum() > 0, name


@PACKS
def test_compiles_into_one_graph(pack):
    layer = randomised(pack(4, 6, 3, padding=1, deform_groups=2))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    grads = []
    for run in (layer, compiled):
        output = run(x)
        grads.append((output, *torch.autograd.grad(output.square().sum(), [x, *layer.parameters()])))
    for expected, actual in zip(*grads, strict=True):
        assert_close(actual, expected)


@PACKS
def test_autocast(pack):
    layer = randomised(pack(4, 6, 3, padding=1), scale=0.1)
    x = torch.randn(2, 4, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x)
        output.float().sum().backward()
    assert output.dtype is torch.bfloat16
    assert_close(output.float(), layer(x), 0.05)
    assert layer.conv_offset.weight.grad.dtype is torch.float32


@PACKS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(pack, dtype):
    layer = pack(4, 6, 3, padding=1, dtype=dtype)
    assert {parameter.dtype for parameter in layer.parameters()} == {dtype}
    assert layer(torch.randn(2, 4, 8, 8, dtype=dtype)).dtype is dtype


@PACKS
def test_copies_pickles_and_shows_itself(pack):
    layer = randomised(nn.Sequential(pack(4, 4, 3, padding=1, deform_groups=2)))
    x = torch.randn(1, 4, 6, 6)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))
    assert "deform_groups=2" in repr(layer)


@PACKS
def test_map_smaller_than_the_kernel_and_empty_batch(pack):
    layer = pack(4, 6, 5, padding=2)
    assert layer(torch.randn(1, 4, 2, 3)).shape == (1, 6, 2, 3)
    assert layer(torch.randn(0, 4, 7, 7)).shape == (0, 6, 7, 7)


def test_layers_given_their_offsets():
    x, offset, mask = torch.randn(2, 4, 8, 8), torch.randn(2, 18, 4, 4), torch.rand(2, 9, 4, 4)
    v1 = DeformConv2d(4, 6, 3, stride=2, padding=1, groups=2)
    assert_close(v1(x, offset), deform_conv2d(x, offset, v1.weight, None, 2, 1))
    v2 = ModulatedDeformConv2d(4, 6, 3, stride=2, padding=1)
    assert_close(v2(x, offset, mask), deform_conv2d(x, offset, v2.weight, v2.bias, 2, 1, mask=mask))
    assert not isinstance(v2, DeformConv2d)


def test_deprecated_name_of_deform_groups():
    with pytest.warns(DeprecationWarning, match="use deform_groups"):
        assert DeformConv2dPack(4, 4, 3, deformable_groups=2).deform_groups == 2
    with pytest.raises(ValueError, match="deform_groups=2 and deformable_groups=4"):
        DeformConv2dPack(4, 4, 3, deform_groups=2, deformable_groups=4)


def test_string_padding():
    x = torch.randn(1, 4, 9, 9)
    assert DeformConv2dPack(4, 4, 3, padding="valid")(x).shape == (1, 4, 7, 7)
    assert DeformConv2dPack(4, 4, (3, 5), padding="same", dilation=(1, 2))(x).shape == (1, 4, 9, 9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(deform_groups=3), r"in_channels \(4\) must be divisible by deform_groups \(3\)"),
        (dict(deform_groups=0), r"deform_groups must be a positive integer, got 0"),
        (dict(groups=3), "divisible by groups"),
        (dict(padding_mode="reflect"), "padding_mode='reflect'"),
        (dict(padding="same", stride=2), "'same'.*stride=2"),
        (dict(padding="full"), "'full'"),
        (dict(bias="never"), "'never'"),
    ],
)
@PACKS
def test_wrong_arguments_are_named(pack, arguments, message):
    with pytest.raises(ValueError, match=message):
        pack(4, 6, 3, **arguments)


class TestMetadata:
    """``mask_scale`` and ``max_offset`` travel in a state dict's metadata, which MMEngine saves and loads."""

    def warned(self, caplog, saved, layer):
        caplog.clear()
        layer.load_state_dict(saved)
        return caplog.messages

    def test_another_mask_scale_is_a_warning(self, caplog):
        native, converted = ModulatedDeformConv2dPack(4, 4, 3), ModulatedDeformConv2dPack(4, 4, 3, mask_scale=2)
        net, other = nn.Sequential(native), nn.Sequential(converted)
        (message,) = self.warned(caplog, net.state_dict(), other)
        assert message.startswith("0: ") and "mask_scale=1.0, but this layer has mask_scale=2.0" in message
        assert "set mask_scale=1.0" in message
        assert not self.warned(caplog, net.state_dict(), nn.Sequential(ModulatedDeformConv2dPack(4, 4, 3)))

    def test_many_layers_say_it_at_length_once(self, caplog):
        native = nn.Sequential(*(ModulatedDeformConv2dPack(4, 4, 3) for _ in range(3)))
        converted = nn.Sequential(*(ModulatedDeformConv2dPack(4, 4, 3, mask_scale=2) for _ in range(3)))
        for _ in range(2):
            first, *others = self.warned(caplog, native.state_dict(), converted)
            assert "set mask_scale=1.0" in first
            assert others == [f"{i}: the checkpoint was trained with mask_scale=1.0" for i in (1, 2)]

    @PACKS
    def test_another_max_offset_is_a_warning(self, pack, caplog):
        (message,) = self.warned(caplog, pack(4, 4, 3, max_offset=2).state_dict(), pack(4, 4, 3))
        assert message.startswith(pack.__name__) and "max_offset=2.0, but this layer has max_offset=None" in message

    def test_checkpoints_without_it_load_silently(self, caplog):
        saved = ModulatedDeformConv2dPack(4, 4, 3).state_dict()
        plain = dict(saved)
        assert not hasattr(plain, "_metadata")
        assert not self.warned(caplog, plain, ModulatedDeformConv2dPack(4, 4, 3, mask_scale=2))
        saved._metadata[""] = dict(version=2)  # as mmcv writes it
        assert not self.warned(caplog, saved, ModulatedDeformConv2dPack(4, 4, 3, mask_scale=2))

    def test_through_mmengines_checkpoints(self, caplog, tmp_path):
        checkpoint = pytest.importorskip("mmengine.runner.checkpoint")
        net = nn.Sequential(ModulatedDeformConv2dPack(4, 4, 3))
        state = checkpoint.weights_to_cpu(checkpoint.get_state_dict(net))
        checkpoint.save_checkpoint(dict(state_dict=state), str(tmp_path / "a.pth"))
        other = nn.Sequential(ModulatedDeformConv2dPack(4, 4, 3, mask_scale=2))
        caplog.clear()
        checkpoint.load_checkpoint(other, str(tmp_path / "a.pth"))
        assert len([m for m in caplog.messages if "trained with mask_scale=1.0" in m]) == 1


def test_offsets_that_are_not_finite_are_a_warning_once_when_saved(caplog):
    net = nn.Sequential(DeformConv2dPack(4, 4, 3))
    net.state_dict()
    assert not caplog.messages
    net[0].conv_offset.weight.data[3] = float("nan")
    assert net(torch.rand(1, 4, 8, 8)).isfinite().all()  # which is why nothing else says so
    net.state_dict()
    net.state_dict()
    (message,) = caplog.messages
    assert message.startswith("0: its conv_offset is not finite, so the layer samples nothing")


@PACKS
def test_symbolic_trace(pack):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), randomised(pack(4, 4, 3, padding=1)), nn.BatchNorm2d(4), nn.ReLU()).eval()
    traced = torch.fx.symbolic_trace(net)
    assert sum(node.target is deform_conv2d for node in traced.graph.nodes) == 1
    x = torch.randn(2, 3, 9, 8)
    assert torch.equal(traced(x), net(x))
    assert_close(fuse(net)(x), net(x))
    body = torch.fx.GraphModule(net, traced.graph)
    assert torch.equal(body(x), net(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_fx_quantisation_leaves_the_operator_in_float():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), ModulatedDeformConv2dPack(4, 4, 3, padding=1))
    x = torch.randn(2, 3, 9, 8)
    prepared = quantize_fx.prepare_fx(net.eval(), get_default_qconfig_mapping("x86"), (x,))
    prepared(x)
    quantised = quantize_fx.convert_fx(prepared)
    assert any("quantized.conv2d" in str(node.target) for node in quantised.graph.nodes)
    assert sum(node.target is deform_conv2d for node in quantised.graph.nodes) == 1
    error = (quantised(x) - net(x)).abs().max()
    assert 0 < error < 0.03 * net(x).abs().max()  # two layers of eight bits


@pytest.mark.parametrize("value", [2.0, 0, "2", None])
def test_deform_groups_that_are_no_count(value):
    with pytest.raises(ValueError, match="deform_groups must be a positive integer, got"):
        DeformConv2dPack(4, 4, 3, deform_groups=value)


@PACKS
@pytest.mark.parametrize("size", [(4, 5, 5), (4, 8, 8), (4, 27, 27)])
def test_an_unbatched_map_is_refused_by_name(pack, size):
    with pytest.raises(
        RuntimeError, match=rf"input must have shape \(N, C, H, W\), got \({', '.join(map(str, size))}\)"
    ):
        pack(4, 4, 3, padding=1)(torch.rand(size))
