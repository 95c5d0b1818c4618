"""The functions put in the place of mmcv's compute what mmcv's compute, and are in place wherever mmcv's were."""

import itertools
import sys

import pytest
import torch

pytest.importorskip("mmdet")
from dcn_plugin.mmdet.mmcv_ext import provide_mmcv_ext

if provide_mmcv_ext():
    pytest.skip("mmcv-lite: no compiled operators to compare with", allow_module_level=True)

import mmcv.cnn.bricks.transformer
import mmcv.ops
from mmcv.ops import deform_conv, modulated_deform_conv, multi_scale_deform_attn
from mmdet.models.dense_heads import tood_head
from mmdet.models.layers.transformer import deformable_detr_layers
from mmdet.models.necks.dyhead import DyHeadBlock
from mmengine.registry import MODELS

from dcn_plugin import layers
from dcn_plugin.mmdet import mmcv_ops as ours
from dcn_plugin.ops import reference


class Theirs:  # a namespace: names of this module's own would be replaced too
    v1 = ours.DeformConv2dFunction.apply
    v2 = ours.ModulatedDeformConv2dFunction.apply
    roi = ours.DeformRoIPoolFunction.apply
    attention = ours._their_attention
    attention_function = ours._TheirAttention


@pytest.fixture(autouse=True)
def mmcvs_own(mmcv_ops):
    """Every test begins with the operators of mmcv in their places."""


@pytest.fixture
def replaced():
    ours.replace()
    yield
    ours.restore()


class Calls(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the calls of our operators."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.namespace == "dcn_plugin"
        return func(*args, **(kwargs or {}))


def geometries():
    """stride, padding, dilation, groups, deform_groups, kernel."""
    yield from itertools.product([1, (2, 1)], [1, (0, 2)], [1, (2, 1)], [1, 2], [1, 4], [(3, 3), (1, 2)])
    yield 1, 0, 1, 4, 4, (1, 1)  # TOOD's bilinear reading of each channel
    yield [2, 2], [1, 1], [1, 1], 4, 1, (3, 3)


def conv_inputs(stride, padding, dilation, groups, deform_groups, kernel, dtype=torch.float64, batch=2):
    x = torch.randn(batch, 4, 7, 8, dtype=dtype)
    weight = torch.randn(4, 4 // groups, *kernel, dtype=dtype)
    plain = torch.nn.functional.conv2d(
        x.to(torch.float64), weight.to(torch.float64), None, stride, padding, dilation, groups
    )
    taps = deform_groups * kernel[0] * kernel[1]
    offset = 2 * torch.randn(batch, 2 * taps, *plain.shape[2:], dtype=dtype)
    mask = torch.rand(batch, taps, *plain.shape[2:], dtype=dtype)
    return x, offset, mask, weight


def assert_same(function, theirs, tensors, rest, **tolerance):
    """Equal outputs and equal gradients, whichever of the tensors require them."""
    results = []
    for one in (function, theirs):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        output = one(*leaves, *rest)
        weights = torch.arange(output.numel(), dtype=output.dtype).view_as(output).sin()
        results.append([output, *torch.autograd.grad((output * weights).sum(), leaves)])
    for mine, their in zip(*results, strict=True):
        assert mine.dtype == their.dtype
        torch.testing.assert_close(mine, their, **tolerance)


@pytest.mark.parametrize("stride, padding, dilation, groups, deform_groups, kernel", list(geometries()))
def test_convolutions_equal_mmcvs(stride, padding, dilation, groups, deform_groups, kernel):
    geometry = stride, padding, dilation, groups, deform_groups
    x, offset, mask, weight = conv_inputs(*geometry, kernel)
    assert_same(ours.deform_conv2d, Theirs.v1, (x, offset, weight), geometry)
    assert_same(ours.deform_conv2d, Theirs.v1, (x, offset, weight), (*geometry, False, 1))
    bias = torch.randn(4, dtype=x.dtype)
    assert_same(ours.modulated_deform_conv2d, Theirs.v2, (x, offset, mask, weight, bias), geometry)
    assert_same(ours.modulated_deform_conv2d, Theirs.v2, (x, offset, mask, weight), (None, *geometry))


def test_defaults_are_mmcvs():
    x, offset, mask, weight = conv_inputs(1, 0, 1, 1, 1, (3, 3))
    assert_same(ours.deform_conv2d, Theirs.v1, (x, offset, weight), ())
    assert_same(ours.modulated_deform_conv2d, Theirs.v2, (x, offset, mask, weight), ())


def test_offset_gives_the_dtype():
    x, offset, mask, weight = conv_inputs(1, 1, 1, 1, 1, (3, 3), torch.float32)
    for dtype in (torch.float32, torch.float64):
        with torch.autocast("cpu", torch.bfloat16):  # which touches neither mmcv's functions nor ours
            assert_same(ours.deform_conv2d, Theirs.v1, (x, offset.to(dtype), weight), (1, 1))
            assert_same(ours.modulated_deform_conv2d, Theirs.v2, (x, offset.to(dtype), mask, weight), (None, 1, 1))
    half = ours.modulated_deform_conv2d(x, offset.half(), mask, weight, None, 1, 1)
    assert half.dtype == torch.half  # mmcv's have no half on the CPU
    torch.testing.assert_close(half.float(), Theirs.v2(x, offset, mask, weight, None, 1, 1), atol=5e-2, rtol=1e-2)


def test_offsets_of_another_level_are_read_as_by_mmcv():
    x, offset, mask, weight = conv_inputs(1, 1, 1, 1, 1, (3, 3))
    for smaller in (x[..., :4, :5], x[..., :4, :8], x[..., :1, :1]):
        assert_same(ours.modulated_deform_conv2d, Theirs.v2, (smaller, offset, mask, weight), (None, 1, 1))
    with pytest.raises(RuntimeError, match="offset"):  # mmcv would read past the end
        ours.modulated_deform_conv2d(x, offset[..., :4, :5], mask[..., :4, :5], weight, None, 1, 1)
    with pytest.raises(RuntimeError, match="offset"):  # as in mmcv
        ours.deform_conv2d(x[..., :4, :5], offset, weight, 1, 1)


def test_what_is_told_must_fit_the_shapes():
    x, offset, mask, weight = conv_inputs(1, 1, 1, 2, 2, (3, 3))
    with pytest.raises(ValueError, match=r"groups=1 and deform_groups=2 do not fit input \(2, 4, 7, 8\)"):
        ours.deform_conv2d(x, offset, weight, 1, 1, 1, 1, 2)
    with pytest.raises(ValueError, match="groups=2 and deform_groups=1 do not fit"):
        ours.modulated_deform_conv2d(x, offset, mask, weight, None, 1, 1, 1, 2, 1)
    with pytest.raises(ValueError, match="has no bias"):
        ours.deform_conv2d(x, offset, weight, 1, 1, 1, 2, 2, True)


def test_more_than_mmcv_takes():
    x, offset, mask, weight = conv_inputs(1, 1, 1, 1, 1, (3, 3), batch=3)
    by_name = ours.deform_conv2d(input=x, offset=offset, weight=weight, padding=1, im2col_step=2)  # 3 % 2
    torch.testing.assert_close(by_name, Theirs.v1(x, offset, weight, 1, 1))
    assert ours.modulated_deform_conv2d(x[:0], offset[:0], mask[:0], weight, padding=1).shape == (0, 4, 7, 8)


@pytest.mark.parametrize("size, ratio, gamma", [(3, 0, 0.1), ((2, 3), 2, 0.5), ([1, 1], 0, 0.1)])
@pytest.mark.parametrize("deformed", [True, False])
def test_roi_pool_equals_mmcvs(device, size, ratio, gamma, deformed):
    height, width = (size, size) if isinstance(size, int) else size
    x = torch.randn(2, 4, 8, 9, dtype=torch.float64, device=device)
    rois = x.new_tensor([[0, 2, 3, 20, 17], [1, 0, 0, 31, 35], [1, 9.5, 4, 9.5, 3]])
    offset = torch.randn(3, 2, height, width, dtype=x.dtype, device=device) if deformed else None

    def theirs(x, offset=None):
        if device.type == "cuda":
            return Theirs.roi(x, rois, offset, size, 0.25, ratio, gamma)
        return reference.deform_roi_align(x, rois, offset, (height, width), 0.25, ratio, gamma)  # mmcv has none here

    def mine(x, offset=None):
        return ours.deform_roi_pool(x, rois, offset, size, 0.25, ratio, gamma)

    assert_same(mine, theirs, (x, offset) if deformed else (x,), ())
    if not deformed:
        torch.testing.assert_close(mine(x, x.new_empty(0)), theirs(x))


def test_roi_pool_gives_the_maps_dtype():
    x, rois, offset = torch.randn(1, 4, 8, 8), torch.tensor([[0.0, 2, 3, 20, 17]]), torch.randn(1, 2, 2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        pooled = ours.deform_roi_pool(x, rois, offset.bfloat16(), 2, 0.25)
    assert pooled.dtype == torch.float32
    torch.testing.assert_close(pooled, reference.deform_roi_align(x, rois, offset.bfloat16().float(), (2, 2), 0.25))


def attention_inputs(dtype=torch.float64, batch=2):
    """value, locations, weights, and the rest of mmcv's arguments in their order."""
    shapes = torch.tensor([(4, 5), (2, 3)])
    value, locations = torch.randn(batch, 26, 3, 4), 1.4 * torch.rand(batch, 5, 3, 2, 2, 2) - 0.2
    weights = torch.rand(batch, 5, 3, 2, 2)
    return [one.to(dtype) for one in (value, locations, weights)], shapes, torch.tensor([0, 20])


def test_attention_equals_mmcvs():
    tensors, shapes, start = attention_inputs()

    def function(value, locations, weights):
        return ours.MultiScaleDeformableAttnFunction.apply(value, shapes, start, locations, weights, 64)

    def alone(value, locations, weights):
        return ours.multi_scale_deformable_attn_pytorch(value, shapes, locations, weights)

    def theirs(value, locations, weights):
        return Theirs.attention(value, shapes, locations, weights)

    assert_same(function, theirs, tensors, ())
    assert_same(alone, theirs, tensors, ())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_attention_gives_the_values_dtype(dtype):
    tensors, shapes, start = attention_inputs(torch.float32)
    expected = Theirs.attention(tensors[0], shapes, *tensors[1:])
    with torch.autocast("cpu", torch.bfloat16):  # which touches neither
        one = ours.multi_scale_deformable_attn_pytorch(tensors[0], shapes, *tensors[1:])
        half = ours.MultiScaleDeformableAttnFunction.apply(tensors[0].to(dtype), shapes, start, *tensors[1:])
    torch.testing.assert_close(one, expected)
    assert half.dtype is dtype
    torch.testing.assert_close(half.float(), expected, rtol=2e-2, atol=2e-2)  # 8 bits of bfloat16


PLACES = [
    (deform_conv, "deform_conv2d", Theirs.v1),
    (modulated_deform_conv, "modulated_deform_conv2d", Theirs.v2),
    (sys.modules["mmcv.ops.deform_roi_pool"], "deform_roi_pool", Theirs.roi),
    (mmcv.ops, "deform_conv2d", Theirs.v1),
    (mmcv.ops, "modulated_deform_conv2d", Theirs.v2),
    (mmcv.ops, "deform_roi_pool", Theirs.roi),
    (mmcv.ops.saconv, "deform_conv2d", Theirs.v1),
    (tood_head, "deform_conv2d", Theirs.v1),
    (multi_scale_deform_attn, "multi_scale_deformable_attn_pytorch", Theirs.attention),
    (multi_scale_deform_attn, "MultiScaleDeformableAttnFunction", Theirs.attention_function),
]


def test_replaces_and_restores_every_name():
    assert mmcv.ops.DeformConv2dPack is not layers.DeformConv2dPack
    assert all(getattr(module, name) == theirs for module, name, theirs in PLACES)
    changed = ours.replace()
    try:
        assert {f"{module.__name__}.{name}" for module, name, _ in PLACES} <= set(changed)
        assert all(getattr(module, name) is getattr(ours, name) for module, name, _ in PLACES)
        assert ours.replace() == []
        # What mmdet's own tests ask of a ResNet, and users' code.
        for kind, pack in (("DCN", mmcv.ops.DeformConv2dPack), ("DCNv2", mmcv.ops.ModulatedDeformConv2dPack)):
            layer = MODELS.build(dict(type=kind, in_channels=1, out_channels=1, kernel_size=1))
            assert isinstance(layer, pack) and pack is vars(layers)[pack.__name__]
        for module in (mmcv.ops, multi_scale_deform_attn, deformable_detr_layers, mmcv.cnn.bricks.transformer):
            assert module.MultiScaleDeformableAttention is layers.MultiScaleDeformableAttention
        assert type(MODELS.build(dict(type="MultiScaleDeformableAttention"))) is layers.MultiScaleDeformableAttention
    finally:
        assert set(ours.restore()) == set(changed)
    assert all(getattr(module, name) == theirs for module, name, theirs in PLACES)
    assert ours.restore() == []


LAYERS = {
    "DeformConv2d": (lambda: mmcv.ops.DeformConv2d(4, 4, 3, padding=1), lambda x: (x, random(2, 18, 8, 8))),
    # The layer pads a map that is smaller than its kernel, and the offset, and cuts the output.
    "DeformConv2d, small map": (
        lambda: mmcv.ops.DeformConv2d(4, 6, 3, padding=1, groups=2),
        lambda x: (x[..., :2, :2], random(2, 18, 2, 2)),
    ),
    "DeformConv2dPack": (lambda: mmcv.ops.DeformConv2dPack(4, 4, 3, padding=1, deform_groups=2), lambda x: (x,)),
    "ModulatedDeformConv2dPack": (
        lambda: mmcv.ops.ModulatedDeformConv2dPack(4, 4, 3, padding=1, stride=2),
        lambda x: (x,),
    ),
    "MultiScaleDeformableAttention": (
        lambda: mmcv.ops.MultiScaleDeformableAttention(8, 2, 2, 3, dropout=0.0),
        lambda x: (
            *(random(count, 2, 8) for count in (5, 26, 26, 5, 5)),
            None,
            torch.rand(2, 5, 2, 4, dtype=torch.float64),
            torch.tensor([(4, 5), (2, 3)]),
        ),
    ),
    "SAConv2d": (lambda: mmcv.ops.SAConv2d(4, 4, 3, padding=1, use_deform=True), lambda x: (x,)),
    "DyHeadBlock": (
        lambda: DyHeadBlock(16, 16, zero_init_offset=False),
        lambda x: ([x.repeat(1, 4, 1, 1), x.repeat(1, 4, 1, 1)[..., ::2, ::2]],),
    ),
}


def random(*size):
    return torch.randn(*size, dtype=torch.float64)


@pytest.mark.parametrize("name", LAYERS)
def test_mmcvs_layers_run_on_ours_and_compute_the_same(name):
    make, inputs = LAYERS[name]
    layer, args = make().double(), inputs(random(2, 4, 8, 8))
    with torch.no_grad():
        for parameter in layer.parameters():  # zeros would leave offsets, and the attention's ReLU, at their kinks
            parameter.add_(torch.randn_like(parameter), alpha=0.1)

    def run():
        layer.zero_grad()
        with Calls() as calls:
            outputs = layer(*args)
            outputs = outputs if isinstance(outputs, list) else [outputs]
            sum(output.square().sum() for output in outputs).backward()
        return outputs + [p.grad for p in layer.parameters() if p.grad is not None], calls.count

    theirs, none = run()
    ours.replace()
    try:
        mine, some = run()
    finally:
        ours.restore()
    assert none == 0 and some >= 2  # forward and backward
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("kind", ["DeformRoIPoolPack", "ModulatedDeformRoIPoolPack"])
def test_mmcvs_roi_layers_run_on_ours(replaced, kind):
    layer = getattr(mmcv.ops, kind)((2, 2), 4, deform_fc_channels=8, spatial_scale=0.25)
    x, rois = torch.randn(1, 4, 8, 8), torch.tensor([[0.0, 2, 3, 20, 17]])
    with Calls() as calls:
        pooled = layer(x, rois)
    assert calls.count == 2
    expected = reference.deform_roi_align(x, rois, None, (2, 2), 0.25)
    torch.testing.assert_close(pooled, expected * (0.5 if kind.startswith("Modulated") else 1))


@pytest.mark.parametrize("autocast", [False, True])
def test_compiles_without_a_break(replaced, autocast):
    x, offset, mask, weight = conv_inputs(1, 1, 1, 1, 1, (3, 3), torch.float32)

    def run():
        pooled = mmcv.ops.deform_roi_pool(x, x.new_tensor([[0.0, 0, 0, 4, 4]]), None, 2)
        return pooled, mmcv.ops.modulated_deform_conv2d(x, offset, mask, weight, None, 1, 1)

    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        torch.testing.assert_close(torch.compile(run, backend="aot_eager", fullgraph=True)(), run())
