import itertools
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from dcn_plugin.ops import deform_conv2d, reference

from .cases import BASE, CONV_CASES, STRIDED, check_against, random_gradient, relative_error, run

CASES = pytest.mark.parametrize("case", [pytest.param(c, id=name) for name, c in CONV_CASES.items()])
LAYOUTS = pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])

# Relative to the largest value. float32: positions of up to 2^5 pixels and sums of some hundred products, a few units
# of 2^-24 each. Half types: inputs are the reference's exactly, so what remains is the rounding of the result (2^-11 in
# float16, 2^-8 in bfloat16) and, where they are multiplied natively, as much for each rounded sample: four times that.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2**-9, torch.bfloat16: 2**-6}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


@CASES
@LAYOUTS
@DTYPES
def test_equals_reference(case, memory_format, dtype, device):
    tensors = case.make(dtype, device, memory_format)
    output = check_against(deform_conv2d, reference.deform_conv2d, tensors, TOLERANCE[dtype], **case.options)
    assert output.dtype == dtype
    assert output.is_contiguous(memory_format=memory_format) or case.channels == 1 or case.size == (1, 1)


@DTYPES
@pytest.mark.parametrize("strided", STRIDED.values(), ids=STRIDED)
def test_strided_tensors(strided, dtype, device):
    tensors = {name: strided(t) for name, t in BASE.make(dtype, device).items()}
    assert not tensors["input"].is_contiguous()
    check_against(deform_conv2d, reference.deform_conv2d, tensors, TOLERANCE[dtype], **BASE.options)


@LAYOUTS
def test_any_layout_of_the_output_gradient(memory_format, device):
    tensors = BASE.make(torch.float32, device, memory_format)
    _, expected = run(deform_conv2d, tensors, **BASE.options)
    leaves = {name: t.requires_grad_() for name, t in tensors.items()}
    output = deform_conv2d(**leaves, **BASE.options)
    gradient = random_gradient(output)
    for layout in (lambda t: t.contiguous(memory_format=torch.channels_last), *STRIDED.values()):
        actual = torch.autograd.grad(output, leaves.values(), layout(gradient), retain_graph=True)
        for name, value in zip(leaves, actual, strict=True):
            assert relative_error(value, expected[name]) < 1e-6, name
    ones = torch.ones((), device=device).expand_as(output)  # what sum() sends back
    actual = torch.autograd.grad(output, leaves["input"], ones, retain_graph=True)[0]
    torch.testing.assert_close(actual, torch.autograd.grad(output, leaves["input"], ones.contiguous())[0])


def test_channels_last_weight_keeps_its_layout(device):
    tensors = replace(BASE, channels=20, out_channels=18).make(torch.float64, device, torch.channels_last)
    tensors["weight"] = tensors["weight"].contiguous(memory_format=torch.channels_last)
    check_against(deform_conv2d, reference.deform_conv2d, tensors, 1e-12, **BASE.options)
    _, gradients = run(deform_conv2d, tensors, **BASE.options)
    assert gradients["weight"].is_contiguous(memory_format=torch.channels_last)


def test_zero_offsets_are_the_plain_convolution(device):
    case = replace(BASE, channels=8, groups=2, stride=2)
    tensors = case.make(torch.float64, device)
    tensors["offset"].zero_()
    expected = F.conv2d(tensors["input"], tensors["weight"], tensors["bias"], 2, 1, 1, 2)
    assert relative_error(deform_conv2d(**{**tensors, "mask": None}, **case.options), expected) < 1e-12
    half = torch.full_like(tensors["mask"], 0.5)
    expected = F.conv2d(tensors["input"], tensors["weight"] / 2, tensors["bias"], 2, 1, 1, 2)
    assert relative_error(deform_conv2d(**{**tensors, "mask": half}, **case.options), expected) < 1e-12


def test_empty_batch(device):
    case = replace(BASE, batch=0)
    tensors = case.make(torch.float32, device)
    output = check_against(deform_conv2d, reference.deform_conv2d, tensors, 0, **case.options)
    assert output.shape == (0, case.out_channels, *case.out_size)


@pytest.mark.parametrize("wild", [1e9, -1e9, 1e30, float("inf"), -float("inf"), float("nan")], ids=str)
@DTYPES
def test_wild_offsets_sample_nothing(wild, dtype, device):
    tensors = BASE.make(dtype, device)
    wild = torch.tensor(wild, dtype=dtype)  # in float16, 1e9 and more are infinite
    tensors["offset"][:, ::4] = wild  # y of every other tap
    output = check_against(deform_conv2d, reference.deform_conv2d, tensors, TOLERANCE[dtype], **BASE.options)
    assert output.isfinite().all()
    tensors["offset"].fill_(wild)
    output, gradients = run(deform_conv2d, tensors, **BASE.options)
    assert torch.equal(output, tensors["bias"][:, None, None].expand_as(output))
    assert not any(gradients[name].any() for name in ("input", "offset", "weight", "mask"))


@pytest.mark.parametrize("y", [-1.0, -1 + 1e-6, -0.5, 0.0, 3.0, 3.5, 4 - 1e-6, 4.0])
@pytest.mark.parametrize("x", [-1.0, -0.25, 2.0, 4.75, 5.0])
def test_at_the_border(y, x, device):
    """One sample of a (4, 5) map, on and about its edges: value and gradients, zero at -1 and at the size exactly."""
    case = replace(BASE, batch=1, channels=2, size=(4, 5), out_channels=1, kernel=1, padding=0)
    tensors = case.make(torch.float64, device)
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(5.0), indexing="ij")
    tensors["offset"] = torch.stack([y - rows, x - columns])[None].to(tensors["input"])
    check_against(deform_conv2d, reference.deform_conv2d, tensors, 1e-12, **case.options)
    _, gradients = run(deform_conv2d, tensors, **case.options)
    if y in (-1, 4) or x in (-1, 5):
        assert not any(gradients[name].any() for name in ("input", "offset", "weight", "mask"))


@DTYPES
@pytest.mark.parametrize("groups", [1, 20])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_pixels_that_nothing_samples_may_hold_anything(value, groups, dtype, device):
    case = replace(BASE, channels=20, out_channels=20, kernel=1, padding=0, groups=groups)
    tensors = case.make(dtype, device)
    tensors["offset"].fill_(0.25)
    tensors["offset"][:, 0, 0] = 3.0  # the first row samples the fourth,
    tensors["input"][:, :, 0] = value  # so nobody needs the first,
    tensors["offset"][:, :, -1, -1] = -1e4  # and nothing at all is needed here
    check_against(deform_conv2d, reference.deform_conv2d, tensors, TOLERANCE[dtype], **case.options)


@pytest.mark.parametrize(
    "case",
    [
        replace(BASE, batch=1, channels=2, size=(4, 5), out_channels=2),
        replace(BASE, batch=1, channels=2, size=(4, 5), out_channels=2, mask=False, stride=2, deform_groups=2),
        replace(BASE, batch=1, channels=4, size=(3, 4), out_channels=4, groups=4, kernel=(1, 2), padding=0),
    ],
    ids=["v2", "v1-deform-groups", "depthwise"],
)
def test_gradcheck(case, device):
    tensors = {k: t for k, t in case.make(torch.float64, device, away_from_lattice=True).items() if t is not None}
    names = list(tensors)

    def function(*values):
        return deform_conv2d(**dict(zip(names, values, strict=True)), **case.options)

    assert torch.autograd.gradcheck(function, [t.requires_grad_() for t in tensors.values()])


@pytest.mark.parametrize("needed", ["input", "offset", "mask", "weight", "bias"])
def test_gradients_only_where_required(needed, device):
    tensors = BASE.make(torch.float64, device)
    _, expected = run(deform_conv2d, tensors, **BASE.options)
    tensors[needed].requires_grad_()
    output = deform_conv2d(**tensors, **BASE.options)
    output.backward(random_gradient(output))
    torch.testing.assert_close(tensors[needed].grad, expected[needed])
    assert all(t.grad is None for name, t in tensors.items() if name != needed)


@pytest.mark.parametrize("mask", [True, False], ids=["v2", "v1"])
def test_backward_leaves_empty_what_is_not_needed(mask, device):
    case = replace(BASE, mask=mask)
    t = case.make(torch.float32, device)
    gradient = torch.randn(case.batch, case.out_channels, *case.out_size, device=device)
    for needs in itertools.product([True, False], repeat=3):
        gradients = torch.ops.dcn_plugin.deform_conv2d_backward(
            gradient, t["input"], t["offset"], t["weight"], t["mask"], [1, 1], [1, 1], [1, 1], *needs
        )
        needed = needs[0], needs[1], needs[1] and mask, needs[2]
        for g, name, need in zip(gradients, ("input", "offset", "mask", "weight"), needed, strict=True):
            assert g.shape == (t[name].shape if need else (0,))


@pytest.mark.parametrize(
    "case", [replace(BASE, channels=130, batch=3), replace(BASE, channels=40, groups=40, out_channels=40)]
)
def test_backward_repeats_bit_for_bit_with_any_number_of_threads(case):
    tensors = case.make(torch.float32)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            results.append(run(deform_conv2d, tensors, **case.options))
    finally:
        torch.set_num_threads(threads)
    for output, gradients in results[1:]:
        assert torch.equal(output, results[0][0])
        assert all(torch.equal(gradients[name], results[0][1][name]) for name in gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_both_memory_formats_give_the_same_bits(dtype):
    """On a map that fills blocks of every vector length, and leaves a rest in both directions."""
    case = replace(BASE, channels=70, out_channels=35, size=(9, 23))
    tensors = case.make(dtype)
    last = tensors | dict(input=tensors["input"].contiguous(memory_format=torch.channels_last))
    output, gradients = run(deform_conv2d, tensors, **case.options)
    other, other_gradients = run(deform_conv2d, last, **case.options)
    assert torch.equal(output, other)
    assert all(torch.equal(gradients[name], other_gradients[name]) for name in gradients)


def test_opcheck(device):
    for case, layout in ((BASE, torch.channels_last), (replace(BASE, mask=False, bias=False), torch.contiguous_format)):
        t = case.make(torch.float32, device, layout)
        geometry = [1, 1], [1, 1], [1, 1]
        leaves = [None if v is None else v.requires_grad_() for v in t.values()]
        args = (leaves[0], leaves[1], leaves[2], leaves[3], leaves[4], *geometry)
        torch.library.opcheck(torch.ops.dcn_plugin.deform_conv2d, args)
        t = {k: None if v is None else v.detach() for k, v in t.items()}
        grad = torch.randn(case.batch, case.out_channels, *case.out_size, device=device)
        for need in ((True, True, True), (True, False, False), (False, True, False), (False, False, True)):
            args = (grad, t["input"], t["offset"], t["weight"], t["mask"], *geometry, *need)
            torch.library.opcheck(torch.ops.dcn_plugin.deform_conv2d_backward, args)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype, device):
    tensors = {name: t.requires_grad_() for name, t in BASE.make(torch.float32, device).items()}
    with torch.autocast(device.type, dtype=dtype):
        output = deform_conv2d(**tensors, **BASE.options)
        mixed = deform_conv2d(**{**tensors, "offset": tensors["offset"].to(dtype)}, **BASE.options)
    assert output.dtype == mixed.dtype == dtype
    output.float().sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in tensors.values())
    rounded = {name: t.detach().to(dtype) for name, t in tensors.items()}
    assert torch.equal(output, deform_conv2d(**rounded, **BASE.options))
    with torch.autocast(device.type, dtype=dtype):
        assert deform_conv2d(**BASE.make(torch.float64, device), **BASE.options).dtype == torch.float64


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend, device):
    case = replace(BASE, size=(5, 6))
    tensors = case.make(torch.float32, device, torch.channels_last)

    def function(**t):
        return deform_conv2d(**{**t, "mask": t["mask"].sigmoid()}, **case.options).relu()

    torch._dynamo.reset()
    output, gradients = run(torch.compile(function, fullgraph=True, backend=backend), tensors)
    expected, expected_gradients = run(function, tensors)
    assert relative_error(output, expected) < 1e-6
    assert all(relative_error(g, expected_gradients[name]) < 1e-6 for name, g in gradients.items())


def test_export(device):
    class Layer(torch.nn.Module):
        def forward(self, input, offset, weight):
            return deform_conv2d(input, offset, weight, padding=1)

    t = BASE.make(torch.float32, device)
    args = t["input"], t["offset"], t["weight"]
    exported = torch.export.export(Layer(), args)
    assert torch.equal(exported.module()(*args), Layer()(*args))


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
@pytest.mark.parametrize("precision", ["tf32", "ieee"])
def test_tf32_on_cuda_where_matrix_products_may(precision, kind, set_matmul_precision):
    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "deform_conv2d" in str(func):
                allowed.append(args[8:] == (True,))  # False is the default, and left out
            return func(*args, **(kwargs or {}))

    set_matmul_precision(precision)
    allowed = []
    with FakeTensorMode():  # it knows CUDA without a GPU
        tensors = {name: torch.empty_like(t, device=kind) for name, t in BASE.make(torch.float32, "cpu").items()}
        with Spy():
            deform_conv2d(**tensors, **BASE.options)
    assert allowed == [precision == "tf32" and kind == "cuda"]


MMCV_CASES = ["base", "v1", "no-bias", "v1-no-bias", "groups", "deform-groups", "stride", "dilation"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", MMCV_CASES)
@pytest.mark.parametrize("whole", [False, True], ids=["", "whole-offsets"])
def test_equals_mmcv(mmcv_ops, name, whole, dtype):
    case = replace(CONV_CASES[name], channels=12)

    def mmcv_deform_conv2d(input, offset, weight, bias=None, mask=None, stride=1, padding=0, dilation=1):
        geometry = stride, padding, dilation, case.groups, case.deform_groups
        if mask is not None:
            return mmcv_ops.modulated_deform_conv2d(input, offset, mask, weight, bias, *geometry)
        output = mmcv_ops.deform_conv2d(input, offset, weight, *geometry)
        return output if bias is None else output + bias[:, None, None]

    tensors = case.make(dtype)
    if whole:  # samples on pixels' centres, and at -1 and the map's size exactly: where derivatives are a convention
        tensors["offset"] = tensors["offset"].round()
    output, gradients = run(deform_conv2d, tensors, **case.options)
    expected, expected_gradients = run(mmcv_deform_conv2d, tensors, **case.options)
    assert relative_error(output, expected) < 1e-5
    assert all(relative_error(g, expected_gradients[name]) < 1e-5 for name, g in gradients.items())


def _change(**changes):
    return lambda t: {**t, **{name: change(t[name]) for name, change in changes.items()}}


ERRORS = {
    "input-rank": (_change(input=lambda t: t[0]), {}, r"input must have shape \(N, C, H, W\), got \(6, 7, 9\)"),
    "offset-rank": (_change(offset=lambda t: t[0]), {}, r"offset must have shape .* got \(18, 7, 9\)"),
    "weight-rank": (_change(weight=lambda t: t[0]), {}, r"weight must have shape .* got \(6, 3, 3\)"),
    "input-dtype": (_change(input=lambda t: t.long()), {}, r"input must be float32.* got Long"),
    "input-channels": (
        _change(input=lambda t: t[:, :5]),
        {},
        r"input channels must be a multiple of .* \(2, 5, 7, 9\), weight \(4, 6, 3, 3\)",
    ),
    "out-channels": (
        _change(weight=lambda t: t[:3, :3]),
        {},
        r"output channels must be divisible by groups = 2.* \(3, 3, 3, 3\)",
    ),
    "offset-channels": (_change(offset=lambda t: t[:, :17]), {}, r"offset's channels .* = 18.* \(2, 17, 7, 9\)"),
    "deform-groups": (
        _change(offset=lambda t: t.repeat(1, 4, 1, 1)),
        {},
        r"divisible by deform_groups = 4.* \(2, 6, 7, 9\), offset \(2, 72, 7, 9\)",
    ),
    "offset-size": (_change(offset=lambda t: t[..., 1:]), {}, r"offset .* \(2, 18, 7, 9\), got \(2, 18, 7, 8\)"),
    "offset-batch": (_change(offset=lambda t: t[:1]), {}, r"offset .* \(2, 18, 7, 9\), got \(1, 18, 7, 9\)"),
    "input-empty": (_change(input=lambda t: t[:, :, :0]), {}, r"at least one channel and one pixel, .* \(2, 6, 0, 9\)"),
    "weight-empty": (_change(weight=lambda t: t[:0]), {}, r"weight must not be empty, got shape \(0, 6, 3, 3\)"),
    "mask-size": (_change(mask=lambda t: t[:, :8]), {}, r"mask .* \(2, 9, 7, 9\), got \(2, 8, 7, 9\)"),
    "bias-size": (_change(bias=lambda t: t[:3]), {}, r"bias .* \(4,\), got \(3,\)"),
    "offset-dtype": (_change(offset=lambda t: t.half()), {}, r"offset must have input's dtype Float, got Half"),
    "mask-dtype": (_change(mask=lambda t: t.double()), {}, r"mask must have input's dtype Float, got Double"),
    "bias-dtype": (_change(bias=lambda t: t.bfloat16()), {}, r"bias must have input's dtype Float, got BFloat16"),
    "weight-dtype": (_change(weight=lambda t: t.double()), {}, r"weight must have input's dtype Float, got Double"),
    "stride": (_change(), dict(stride=0), "stride must be two integers of at least 1"),
    "stride-three": (_change(), dict(stride=(1, 1, 1)), "stride must be an integer or two integers"),
    "stride-float": (_change(), dict(stride=1.5), "stride must be an integer or two integers"),
    "padding": (_change(), dict(padding=-1), "padding must be two integers of at least 0"),
    "too-large": (_change(), dict(padding=2**62, dilation=2**62), "padding must be two integers .* less than 2.31"),
    "dilation": (_change(), dict(dilation=(1, 0)), "dilation must be two integers of at least 1"),
    "kernel-too-large": (_change(), dict(dilation=5), r"kernel is larger than the padded input.* \(2, 6, 7, 9\)"),
}


@pytest.mark.parametrize(("change", "options", "message"), ERRORS.values(), ids=ERRORS)
def test_errors_name_the_argument_and_the_shapes(change, options, message, device):
    tensors = change(BASE.make(torch.float32, device))
    with pytest.raises((RuntimeError, ValueError), match=message):
        deform_conv2d(**tensors, **{**BASE.options, **options})


@pytest.mark.parametrize("name", ["offset", "weight", "mask", "bias"])
def test_mixed_devices(name, device):
    tensors = BASE.make(torch.float32, device)
    tensors[name] = tensors[name].to("meta")
    with pytest.raises(RuntimeError, match=rf"{name} must be on input's device.*\(2, 6, 7, 9\)"):
        deform_conv2d(**tensors, **BASE.options)


@pytest.mark.parametrize("name", ["input", "offset", "weight"])
def test_what_is_no_tensor_is_named(name):
    arguments = dict(input=torch.rand(1, 4, 5, 5), offset=torch.rand(1, 2, 5, 5), weight=torch.rand(4, 4, 1, 1))
    with pytest.raises(TypeError, match=f"{name} must be a tensor, got None"):
        deform_conv2d(**{**arguments, name: None})
