"""Second derivatives, forward mode, vmap and the transforms of torch.func, of every operator and layer."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch.autograd import forward_ad

from dcn_plugin import layers
from dcn_plugin.ops import (
    _compositions,
    deform_conv2d,
    deform_ps_roi_pool,
    deform_roi_align,
    ms_deform_attn,
    reference,
)

from .cases import BASE, CONV_CASES, relative_error

ROIS = torch.tensor(
    [
        [0, 9.2, 9.1, 31.4, 28.3],
        [1, -11.0, 12.3, 43.0, 36.0],
        [1, 14.0, 11.0, 30.0, 70.0],
        [0, 20.0, 20.0, 20.0, 20.0],
        [1, float("nan"), 0, 9, 9],
    ],
    dtype=torch.float64,
)
SMALL = replace(BASE, channels=4, size=(4, 5), kernel=2, padding=0)


def conv(case):
    tensors = {name: t for name, t in case.make(away_from_lattice=True).items() if t is not None}
    return (lambda module: module.deform_conv2d), tensors, case.options


def align(offset=True, mask=True, sampling_ratio=2):
    tensors = dict(input=torch.randn(2, 3, 6, 7), offset=torch.randn(5, 2, 2, 3), mask=torch.rand(5, 1, 2, 3))
    tensors = {n: t.double() for n, t in tensors.items() if {"offset": offset, "mask": mask}.get(n, True)}
    options = dict(output_size=(2, 3), spatial_scale=0.125, sampling_ratio=sampling_ratio)
    return (lambda module: module.deform_roi_align), tensors, options


def ps_pool(classes=2, **sizes):
    options = dict(output_size=(2, 3), group_size=(2, 1), sample_per_part=2, spatial_scale=0.125) | sizes
    tensors = dict(input=torch.randn(2, 8, 5, 4).double())
    if classes:
        tensors["offset"] = torch.randn(5, 2 * classes, 2, 3).double()
    return (lambda module: module.deform_ps_roi_pool), tensors, options


def attention(shapes=((3, 4), (2, 1)), channels=3):
    samples = 2, 3, 2, len(shapes), 2
    sizes = torch.tensor(shapes, dtype=torch.float64).flip(1)[:, None]
    locations = torch.rand(*samples, 2, dtype=torch.float64) * 1.6 - 0.3
    tensors = dict(
        value=torch.randn(2, sum(h * w for h, w in shapes), 2, channels).double(),
        sampling_locations=((locations * sizes).floor() + 0.7 + 0.6 * torch.rand_like(locations)) / sizes,
        attention_weights=torch.rand(samples).double(),
    )
    return (lambda module: module.ms_deform_attn), tensors, dict(spatial_shapes=torch.tensor(shapes))


CASES = {
    "v2": lambda: conv(SMALL),
    "v1": lambda: conv(replace(SMALL, mask=False, bias=False, stride=2)),
    "groups": lambda: conv(replace(SMALL, groups=2, deform_groups=4, dilation=2, padding=1)),
    "depthwise": lambda: conv(replace(SMALL, groups=4, kernel=(1, 2))),
    "roi-align": align,
    "roi-align-v1": lambda: align(mask=False, sampling_ratio=0),
    "roi-align-plain": lambda: align(offset=False, mask=False),
    "ps-roi-pool": ps_pool,
    "ps-roi-pool-plain": lambda: ps_pool(classes=0),
    "attention": attention,
    "attention-one-level": lambda: attention(shapes=((4, 5),), channels=1),
}
operators = pytest.mark.parametrize("make", CASES.values(), ids=CASES)


class Ours:
    """The public functions, as :mod:`dcn_plugin.ops.reference` has them."""

    deform_conv2d = staticmethod(deform_conv2d)
    deform_roi_align = staticmethod(deform_roi_align)
    deform_ps_roi_pool = staticmethod(deform_ps_roi_pool)
    ms_deform_attn = staticmethod(ms_deform_attn)


def function_of(made, module=Ours, device="cpu"):
    """An operator as a function of its differentiable tensors alone, and these."""
    choose, tensors, options = made
    names, operator = list(tensors), choose(module)
    if "roi" in operator.__name__:
        options = dict(options, rois=ROIS.to(device))

    def function(*values):
        return operator(**dict(zip(names, values, strict=True)), **options)

    return function, [t.to(device) for t in tensors.values()]


def both(make, device):
    made = make()
    ours, tensors = function_of(made, device=device)
    return ours, function_of(made, reference, device)[0], tensors


def smooth(function):
    """A scalar whose second derivatives have all terms, of the function and of what follows it."""
    return lambda *values: function(*values).sin().sum()


def gradients(function, tensors, **options):
    leaves = [t.detach().requires_grad_() for t in tensors]
    return leaves, torch.autograd.grad(function(*leaves), leaves, **options)


def penalty(function, tensors):
    """A penalty of the gradients, and its own."""
    leaves, first = gradients(smooth(function), tensors, create_graph=True)
    value = sum(g.square().sum() for g in first)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def assert_close(values, expected, tolerance=1e-11):
    for value, its_expected in zip(values, expected, strict=True):
        assert relative_error(value.detach(), its_expected.detach()) < tolerance


@operators
def test_gradgradcheck(make, device):
    function, tensors = function_of(make(), device=device)
    leaves = [t.requires_grad_() for t in tensors]
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)
    assert torch.autograd.gradcheck(
        function,
        leaves,
        fast_mode=True,
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
    )


@operators
def test_gradient_penalty_equals_the_references(make, device):
    ours, its_reference, tensors = both(make, device)
    assert_close(penalty(ours, tensors), penalty(its_reference, tensors))


@operators
def test_third_derivatives(make, device):
    ours, its_reference, (x, *others) = both(make, device)

    def third(function):
        first = torch.func.grad(smooth(lambda x: function(x, *others)))
        second = torch.func.grad(lambda x: first(x).square().sum())
        return torch.func.grad(lambda x: second(x).square().sum())(x)

    assert_close([third(ours)], [third(its_reference)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@operators
def test_gradient_penalty_in_other_dtypes(make, dtype, device):
    """In float32's precision; the half types' results are rounded after the first gradients and after the second."""
    ours, its_reference, tensors = both(make, device)
    rounded = [t.to(dtype) for t in tensors]
    values = penalty(ours, rounded)
    assert all(value.dtype == dtype for value in values)
    expected = penalty(its_reference, [t.double() for t in rounded])
    assert_close(values[1:], expected[1:], {torch.float32: 2e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}[dtype])


@pytest.mark.parametrize("name", CONV_CASES)
def test_composition_equals_the_convolution(name, device):
    case = CONV_CASES[name]
    tensors = case.make(torch.float64, device)
    geometry = [[v, v] if isinstance(v, int) else list(v) for v in (case.stride, case.padding, case.dilation)]
    arguments = [tensors[n] for n in ("input", "offset", "weight", "bias", "mask")] + geometry
    assert_close([_compositions.deform_conv2d(*arguments)], [deform_conv2d(**tensors, **case.options)], 1e-12)


@pytest.mark.parametrize("rois", [ROIS, ROIS[:0], ROIS[3:]], ids=["rois", "none", "empty"])
@pytest.mark.parametrize("ratio", [0, 2])
def test_compositions_equal_the_roi_operators(rois, ratio, device):
    input, rois = torch.randn(2, 8, 6, 7, dtype=torch.float64, device=device), rois.to(device)
    offset, mask = (torch.rand(len(rois), n, 2, 3, dtype=torch.float64, device=device) for n in (2, 1))
    rois = torch.cat([rois, rois + torch.tensor([0, -300, 0, 0, 0])]).to(device)  # some of them off the map
    offset, mask = offset.repeat(2, 1, 1, 1), mask.repeat(2, 1, 1, 1)
    for moved in (offset, None):
        for weighted in (mask, None):
            arguments = [2, 3], 0.125, ratio, 0.1
            value = _compositions.deform_roi_align(input, rois, moved, weighted, *arguments)
            assert_close([value], [deform_roi_align(input, rois, moved, *arguments, weighted)], 1e-12)
        value = _compositions.deform_ps_roi_pool(input, rois, moved, [4, 5], [4, 2], [2, 3], 3, 0.125, 0.1)
        assert_close([value], [deform_ps_roi_pool(input, rois, moved, (4, 5), (4, 2), (2, 3), 3, 0.125, 0.1)], 1e-12)


@operators
def test_transforms(make, device):
    """grad, jacrev, jacfwd and Hessian-vector products, with respect to each tensor."""
    ours, its_reference, tensors = both(make, device)
    for index in range(len(tensors)):

        def results(function, index=index):
            before, own, after = tensors[:index], tensors[index], tensors[index + 1 :]

            def of_own(t):
                return function(*before, t, *after)

            scalar = smooth(of_own)
            return [
                torch.func.grad(scalar)(own),
                torch.func.jacrev(of_own)(own),
                torch.func.jacfwd(of_own)(own),
                torch.func.jvp(torch.func.grad(scalar), (own,), (own.cos(),))[1],  # forward over reverse
                torch.autograd.functional.hvp(scalar, own, own.cos())[1],
            ]

        assert_close(results(ours), results(its_reference))


def test_hessian(device):
    ours, its_reference, (*others, mask) = both(CASES["v2"], device)

    def hessian(function):
        return torch.func.hessian(smooth(lambda mask: function(*others, mask)))(mask)

    assert_close([hessian(ours)], [hessian(its_reference)])


@operators
def test_vmap_over_any_of_the_tensors(make, device):
    """Values and per-sample gradients, with respect to the first tensor or to all, against a loop."""
    function, tensors = function_of(make(), device=device)
    every = tuple(range(len(tensors)))

    def results(*values):
        scalar = smooth(function)
        return function(*values), torch.func.grad(scalar)(*values), *torch.func.grad(scalar, argnums=every)(*values)

    for mapped in itertools.product([True, False], repeat=len(tensors)):
        if any(mapped):
            dims = tuple(1 if m else None for m in mapped)  # not the first, which a rule would find by chance
            values = [torch.stack([t, t * 0.9, t * 1.1], 1) if m else t for t, m in zip(tensors, mapped, strict=True)]
            each = [[v.select(1, i) if m else v for v, m in zip(values, mapped, strict=True)] for i in range(3)]
            loop = [torch.stack(one) for one in zip(*(results(*one) for one in each), strict=True)]
            assert_close(torch.vmap(results, dims)(*values), loop)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("map_input", [True, False], ids=["", "one-input"])
def test_vmap_over_rois(map_input, dtype, device):
    """Their numbers of images count within each; a number out of range stays an error."""
    input = torch.randn(3, 2, 4, 6, 7, device=device) if map_input else torch.randn(2, 4, 6, 7, device=device)
    rois = torch.stack([ROIS, ROIS.flip(0), ROIS * 1.1], 1).to(device, dtype)
    rois[:, :, 0] = rois[:, :, 0].nan_to_num().floor()

    def both_operators(input, rois):
        return deform_roi_align(input, rois, None, 2, 0.125), deform_ps_roi_pool(input, rois, None, 2, 1, 1, 2, 0.125)

    input = input.to(dtype)
    values = torch.vmap(both_operators, (0 if map_input else None, 1))(input, rois)
    loop = [both_operators(input[i] if map_input else input, rois[:, i]) for i in range(3)]
    for value, expected in zip(values, zip(*loop, strict=True), strict=True):
        torch.testing.assert_close(value, torch.stack(expected))
    if map_input and device.type == "cpu":
        rois[0, 0, 0] = 2
        with pytest.raises(RuntimeError, match="not an index"):
            torch.vmap(both_operators, (0, 1))(input, rois)


def test_forward_mode_over_mapped_rois(device):
    input, rois = torch.randn(2, 3, 6, 7, device=device).double(), torch.stack([ROIS[:3], ROIS[:3] * 1.1])
    rois[:, :, 0] = ROIS[:3, 0]

    def tangent(rois):
        return torch.func.jvp(lambda x: deform_roi_align(x, rois, None, 2, 0.125, 2), (input,), (input,))[1]

    rois = rois.to(device)
    assert_close([torch.vmap(tangent)(rois)], [torch.stack([tangent(one) for one in rois])])


def test_vmap_of_vmap(device):
    function, (x, offset, weight, *others) = function_of(CASES["groups"](), device=device)
    inputs, weights = torch.stack([x, x + 1]), torch.stack([weight, weight - 1, weight * 2])
    nested = torch.vmap(lambda x: torch.vmap(lambda w: function(x, offset, w, *others))(weights))(inputs)
    loop = torch.stack([torch.stack([function(x, offset, w, *others) for w in weights]) for x in inputs])
    assert_close([nested], [loop])


class SelfAttention(layers.MultiScaleDeformableAttention):
    """Of eight queries, which are the pixels of two maps too."""

    def forward(self, query):
        points = (torch.arange(16).view(1, 8, 1, 2).to(query) * 0.37) % 1
        return super().forward(query, reference_points=points, spatial_shapes=[(2, 3), (1, 2)])


LAYERS = {
    "DCN": lambda: (layers.DeformConv2dPack(4, 6, 3, padding=1), (torch.rand(2, 4, 5, 6),)),
    "DCNv2": lambda: (layers.ModulatedDeformConv2dPack(4, 6, 3, padding=1), (torch.rand(2, 4, 5, 6),)),
    "RoI align v1": lambda: (layers.DeformRoIAlignPack(2, 3, 8, spatial_scale=0.125), (torch.rand(2, 3, 6, 7), ROIS)),
    "RoI align v2": lambda: (
        layers.ModulatedDeformRoIAlignPack(2, 3, 8, spatial_scale=0.125),
        (torch.rand(2, 3, 6, 7), ROIS),
    ),
    "PS RoI pool": lambda: (
        layers.DeformPSRoIPoolPack(2, 2, deform_fc_channels=16, spatial_scale=0.125, sample_per_part=2),
        (torch.rand(2, 8, 6, 7), ROIS),
    ),
    "attention": lambda: (SelfAttention(6, 2, 2, 2, dropout=0.0, batch_first=True), (torch.rand(2, 8, 6),)),
}
any_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)


def built(make, device):
    layer, arguments = make()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return layer.to(device, torch.float64), tuple(a.to(device, torch.float64) for a in arguments)


@any_layer
def test_forward_mode_of_layers(make, device):
    """With respect to the input and all parameters, against finite differences."""
    layer, (x, *rest) = built(make, device)
    parameters = dict(layer.named_parameters())

    def function(x, parameters):
        return torch.func.functional_call(layer, parameters, (x, *rest))

    direction = torch.randn_like(x), {name: torch.randn_like(p) for name, p in parameters.items()}
    value, tangent = torch.func.jvp(function, (x, parameters), direction)
    assert_close([value], [layer(x, *rest)])

    def moved(step):
        return function(x + step * direction[0], {n: p + step * direction[1][n] for n, p in parameters.items()})

    assert relative_error(tangent.detach(), ((moved(1e-6) - moved(-1e-6)) / 2e-6).detach()) < 1e-6
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, direction[0]), *rest)).tangent
    still = {name: torch.zeros_like(p) for name, p in parameters.items()}
    assert_close([dual], [torch.func.jvp(function, (x, parameters), (direction[0], still))[1]])


@any_layer
def test_per_sample_gradients_of_layers(make, device):
    layer, (x, *rest) = built(make, device)
    parameters = dict(layer.named_parameters())
    inputs = torch.stack([x, x.flip(0), x.cos()])

    def loss(parameters, x):
        return torch.func.functional_call(layer, parameters, (x, *rest)).sin().sum()

    mapped = torch.vmap(torch.func.grad(loss), (None, 0))(parameters, inputs)
    for i, x in enumerate(inputs):
        expected = torch.func.grad(loss)(parameters, x)
        assert_close([mapped[name][i] for name in parameters], [expected[name] for name in parameters])


def test_forward_mode_over_a_pass_that_ran_before(device):
    function, (x, *others) = function_of(CASES["v2"](), device=device)
    value, pull_back = torch.func.vjp(lambda x: function(x, *others), x)
    cotangent = value.cos()
    gradient, tangent = torch.func.jvp(pull_back, (cotangent,), (cotangent,))
    assert_close(tangent, gradient)  # it is linear
    output = function(x.requires_grad_(), *others)
    with forward_ad.dual_level():
        (dual,) = torch.autograd.grad(output, x, forward_ad.make_dual(cotangent, cotangent))
        assert_close([forward_ad.unpack_dual(dual).tangent], gradient)


def test_forward_mode_over_the_inputs_of_a_backward_pass_is_refused(device):
    tensors = BASE.make(device=device)
    x, offset, weight, mask = (tensors[name] for name in ("input", "offset", "weight", "mask"))
    gradient = torch.rand(BASE.batch, BASE.out_channels, *BASE.out_size, dtype=torch.float64, device=device)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="backward pass of deform_conv2d, whose"):
        torch.ops.dcn_plugin.deform_conv2d_backward(
            gradient, forward_ad.make_dual(x, x), offset, weight, mask, [1, 1], [1, 1], [1, 1], True, True, True
        )


def test_forward_mode_checks_the_arguments_too(device):
    tensors = BASE.make(device=device)
    with pytest.raises(RuntimeError, match="offset must have input's dtype"):
        torch.func.jvp(
            lambda x: deform_conv2d(x, tensors["offset"].float(), tensors["weight"], padding=1),
            (tensors["input"],),
            (tensors["input"],),
        )


def test_transforms_in_one_graph(device):
    function, tensors = function_of(CASES["v2"](), device=device)
    torch._dynamo.reset()
    mapped = torch.vmap(lambda x: function(x, *tensors[1:]))
    for transform, arguments in (
        (torch.func.grad(smooth(function)), tensors),
        (mapped, [tensors[0].repeat(2, 1, 1, 1, 1)]),
    ):
        compiled = torch.compile(transform, fullgraph=True, backend="aot_eager")
        assert_close([compiled(*arguments)], [transform(*arguments)])


@any_layer
def test_jit_trace(make, device, tmp_path):
    layer, arguments = built(make, device)
    traced = torch.jit.trace(layer.eval(), arguments)
    traced.save(str(tmp_path / "layer.pt"))
    loaded, (x, *rest) = torch.jit.load(str(tmp_path / "layer.pt")), arguments
    for images in (x, torch.cat([x, x.cos()])):
        assert_close([loaded(images, *rest)], [layer(images, *rest)])


@any_layer
def test_jit_script_says_what_to_use(make, device):
    with pytest.raises(NotImplementedError, match="use torch.jit.trace, or torch.export"):
        torch.jit.script(torch.nn.Sequential(built(make, device)[0]))
