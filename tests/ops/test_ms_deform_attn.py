import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from dcn_plugin.ops import ms_deform_attn, reference
from dcn_plugin.ops.ms_deform_attn import _are_maps_of

from .cases import STRIDED, assert_repeats, check_against, random_gradient, relative_error, run

# Positions and sums are of float32: of the half types only the results are rounded.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
SHAPES = [(6, 9), (3, 5), (1, 2)]
NAMES = ("value", "sampling_locations", "attention_weights")


def make(dtype=torch.float64, device="cpu", channels=8, heads=2, queries=7, points=4, shapes=SHAPES, batch=2, **kwargs):
    """Locations are in the maps and a little beyond; with ``away_from_lattice``, where all is smooth."""
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    samples = batch, queries, heads, len(shapes), points
    locations = torch.rand(*samples, 2) * 1.4 - 0.2
    if kwargs.get("away_from_lattice"):
        sizes = torch.tensor(shapes).flip(1)[:, None]
        pixels = (locations * sizes).floor() + 0.2 + 0.6 * torch.rand_like(locations)
        locations = (pixels.double() + 0.5) / sizes
    tensors = dict(
        value=torch.randn(batch, sum(h * w for h, w in shapes), heads, channels).to(dtype),
        sampling_locations=locations.to(compute),
        attention_weights=torch.rand(samples).to(kwargs.get("weights_dtype", dtype)),
    )
    return {name: t.to(device) for name, t in tensors.items()}


def with_shapes(function, shapes=SHAPES):
    return lambda **tensors: function(spatial_shapes=shapes, **tensors)


OURS, TRUTH = with_shapes(ms_deform_attn), with_shapes(reference.ms_deform_attn)


@DTYPES
@pytest.mark.parametrize("channels", [1, 8, 16, 32, 37, 64, 130])
def test_equals_reference(dtype, channels, device):
    output = check_against(OURS, TRUTH, make(dtype, device, channels), TOLERANCE[dtype])
    assert output.dtype == dtype
    assert output.is_contiguous()


SIZES = {
    "one-head": dict(heads=1),
    "many-heads": dict(heads=13, channels=3),
    "one-point": dict(points=1),
    "seven-points": dict(points=7),
    "one-query": dict(queries=1),
    "many-queries": dict(queries=67),
    "one-level": dict(shapes=[(5, 4)]),
    "five-levels": dict(shapes=[(9, 7), (5, 4), (3, 2), (2, 1), (1, 1)]),
    "one-pixel": dict(shapes=[(1, 1)]),
    "an-empty-level": dict(shapes=[(0, 0), (3, 4), (0, 5), (2, 2), (4, 0)]),
    "five-images": dict(batch=5),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_sizes_equal_reference(sizes, dtype, device):
    shapes = sizes.get("shapes", SHAPES)
    functions = with_shapes(ms_deform_attn, shapes), with_shapes(reference.ms_deform_attn, shapes)
    check_against(*functions, make(dtype, device, **sizes), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_float32_weights_beside_half_values(dtype, device):
    tensors = make(dtype, device, channels=33, weights_dtype=torch.float32)
    check_against(OURS, TRUTH, tensors, TOLERANCE[dtype])
    gradients = run(OURS, tensors)[1]
    assert {name: g.dtype for name, g in gradients.items()} == {name: t.dtype for name, t in tensors.items()}


def test_half_locations_are_converted(device):
    tensors = make(torch.float16, device)
    halved = {**tensors, "sampling_locations": tensors["sampling_locations"].half()}
    assert torch.equal(OURS(**halved), OURS(**{**halved, "sampling_locations": halved["sampling_locations"].float()}))


@pytest.mark.parametrize("channels", [8, 32])
def test_equals_mmcv(mmcv_ops, channels):
    from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch

    def mmcvs(**tensors):
        return multi_scale_deformable_attn_pytorch(value_spatial_shapes=torch.tensor(SHAPES), **tensors)

    tensors = make(channels=channels)
    output, gradients = run(OURS, tensors)
    expected, expected_gradients = run(mmcvs, tensors)
    assert relative_error(output, expected) < 1e-9
    for name in NAMES:
        assert relative_error(gradients[name], expected_gradients[name]) < 1e-9, name


@DTYPES
@pytest.mark.parametrize("strided", STRIDED.values(), ids=STRIDED)
def test_strided_tensors(strided, dtype, device):
    tensors = {name: strided(t) for name, t in make(dtype, device).items()}
    assert not any(t.is_contiguous() for t in tensors.values())
    check_against(OURS, TRUTH, tensors, TOLERANCE[dtype])


def test_any_layout_of_the_output_gradient(device):
    tensors = make(torch.float32, device)
    _, expected = run(OURS, tensors)
    leaves = {name: t.requires_grad_() for name, t in tensors.items()}
    output = OURS(**leaves)
    for layout in STRIDED.values():
        actual = torch.autograd.grad(output, leaves.values(), layout(random_gradient(output)), retain_graph=True)
        for name, value in zip(leaves, actual, strict=True):
            assert relative_error(value, expected[name]) < 1e-6, name


def test_spatial_shapes_as_a_tensor_anywhere(device):
    tensors, shapes = make(torch.float32, device), torch.tensor(SHAPES)
    expected = OURS(**tensors)
    lists = [list(s) for s in SHAPES], tuple(SHAPES), [tuple(s) for s in shapes.numpy()], [tuple(s) for s in shapes]
    for given in (shapes, shapes.to(device), shapes.repeat(1, 2)[:, :2], shapes.int(), shapes.int().to(device), *lists):
        assert torch.equal(ms_deform_attn(spatial_shapes=given, **tensors), expected)


class AttentionToMaps(torch.nn.Module):
    """With the sizes that the maps have, as models know them; those of another are constants."""

    def forward(self, maps, more, sampling_locations, attention_weights):
        shapes = [maps.shape[2:], (more.shape[2], more.shape[3]), (1, 2)]
        value = torch.cat([maps.flatten(2), more.flatten(2), maps.new_ones(*maps.shape[:2], 2)], 2)
        value = value.transpose(1, 2).unflatten(-1, (2, 8))
        return ms_deform_attn(value, shapes, sampling_locations, attention_weights)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_traces_with_the_sizes_of_its_maps(device):
    tensors = make(torch.float32, device)
    sampling = [tensors[name].requires_grad_() for name in NAMES[1:]]

    def maps(*size):
        return torch.randn(2, 16, *size, device=device)

    traced = torch.jit.trace(AttentionToMaps(), (maps(6, 9), maps(3, 5), *sampling))
    others = maps(4, 7), maps(2, 6), *sampling
    assert torch.equal(traced(*others), AttentionToMaps()(*others))


EMPTY = {
    "no-images": dict(batch=0),
    "no-queries": dict(queries=0),
    "no-points": dict(points=0),
    "no-levels": dict(shapes=[]),
    "no-keys": dict(shapes=[(0, 3), (2, 0)]),
}


@pytest.mark.parametrize("sizes", EMPTY.values(), ids=EMPTY)
def test_empty(sizes, device):
    tensors = make(torch.float32, device, **sizes)
    output, gradients = run(with_shapes(ms_deform_attn, sizes.get("shapes", SHAPES)), tensors)
    assert output.shape == (sizes.get("batch", 2), sizes.get("queries", 7), 16)
    assert not output.any()
    for name in NAMES:
        assert gradients[name].shape == tensors[name].shape
        assert not gradients[name].any()


@pytest.mark.parametrize("sizes", EMPTY.values(), ids=EMPTY)
def test_second_derivatives_of_empty(sizes, device):
    tensors = make(device=device, **sizes)
    shapes = torch.tensor(sizes.get("shapes", SHAPES), dtype=torch.int64).view(-1, 2)
    leaves = [t.requires_grad_() for t in tensors.values()]
    for function in (ms_deform_attn, reference.ms_deform_attn):
        output = function(spatial_shapes=shapes, **tensors)
        first = torch.autograd.grad(output.sin().sum(), leaves, create_graph=True, materialize_grads=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves, materialize_grads=True)
        for leaf, *gradients in zip(leaves, first, second, strict=True):
            assert all(g.shape == leaf.shape and not g.any() for g in gradients)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_pixels_that_nothing_samples_may_hold_anything(value, device):
    tensors = make(torch.float32, device, channels=20, shapes=[(5, 6), (4, 4)])
    tensors["value"][:, :6] = tensors["value"][:, 30:34] = value  # the first row of each level
    y = tensors["sampling_locations"][..., 1]
    y.copy_(0.45 + 0.7 * torch.rand_like(y))
    functions = (with_shapes(f, [(5, 6), (4, 4)]) for f in (ms_deform_attn, reference.ms_deform_attn))
    check_against(*functions, tensors, TOLERANCE[torch.float32])


@pytest.mark.parametrize("wild", [1e9, -1e9, 1e30, float("inf"), -float("inf"), float("nan")], ids=str)
@DTYPES
def test_wild_locations_sample_nothing(wild, dtype, device):
    tensors = make(dtype, device, channels=20)
    tensors["sampling_locations"][:, 1, ..., 0] = wild
    tensors["sampling_locations"][:, 2, ..., 1] = wild
    tensors["sampling_locations"][:, 3, :, :, ::2] = wild
    check_against(OURS, TRUTH, tensors, TOLERANCE[dtype])
    output, gradients = run(OURS, tensors)
    for value in (output, gradients["sampling_locations"], gradients["attention_weights"]):
        assert not value[:, 1:3].any()
        assert value[:, 3:].any()


@pytest.mark.parametrize("pixel", [-1.2, -1.0, -0.5, 0.0, 0.5, 4.0, 4.5, 5.0, 5.2])
def test_at_the_border(pixel, device):
    """One sample about the edges of a (5, 8) map: zeros continue it, and a pixel's width beyond nothing counts."""
    for axis, size in ((1, 5), (0, 8)):
        position = pixel if size == 5 or pixel < 2 else pixel + 3
        location = torch.full((1, 1, 1, 1, 1, 2), 0.5, dtype=torch.float64)
        location[..., axis] = (position + 0.5) / size
        tensors = dict(
            value=torch.randn(1, 40, 1, 3, dtype=torch.float64),
            sampling_locations=location,
            attention_weights=torch.ones(1, 1, 1, 1, 1, dtype=torch.float64),
        )
        tensors = {name: t.to(device) for name, t in tensors.items()}
        functions = with_shapes(ms_deform_attn, [(5, 8)]), with_shapes(reference.ms_deform_attn, [(5, 8)])
        check_against(*functions, tensors, 1e-12)
        output, _ = run(functions[0], tensors)
        assert output.any() == (-1 < pixel < 5)


def test_gradcheck(device):
    tensors = make(device=device, channels=3, queries=2, points=2, away_from_lattice=True)

    def function(*values):
        return OURS(**dict(zip(NAMES, values, strict=True)))

    assert torch.autograd.gradcheck(function, [tensors[name].requires_grad_() for name in NAMES])


@pytest.mark.parametrize("needed", NAMES)
def test_gradients_only_where_required(needed, device):
    tensors = make(device=device)
    _, expected = run(OURS, tensors)
    tensors[needed].requires_grad_()
    output = OURS(**tensors)
    output.backward(random_gradient(output))
    torch.testing.assert_close(tensors[needed].grad, expected[needed])
    assert all(t.grad is None for name, t in tensors.items() if name != needed)


@DTYPES
def test_backward_leaves_empty_what_is_not_needed(dtype, device):
    tensors = make(dtype, device)
    gradient = torch.randn(2, 7, 16, device=device).to(dtype)
    arguments = gradient, tensors["value"], torch.tensor(SHAPES), *(tensors[name] for name in NAMES[1:])
    complete = torch.ops.dcn_plugin.ms_deform_attn_backward(*arguments, True, True)
    for needs in itertools.product([True, False], repeat=2):
        gradients = torch.ops.dcn_plugin.ms_deform_attn_backward(*arguments, *needs)
        for one, expected, need in zip(gradients, complete, (needs[0], needs[1], needs[1]), strict=True):
            assert one.dtype == expected.dtype
            assert_repeats(one, expected if need else expected.new_empty(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [dict(queries=150), dict(batch=1, heads=1, queries=200)], ids=["", "one-task"])
def test_backward_repeats_bit_for_bit_with_any_number_of_threads(sizes, dtype):
    tensors = make(dtype, channels=37, **sizes)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 7, 2):
            torch.set_num_threads(count)
            results.append(run(OURS, tensors))
    finally:
        torch.set_num_threads(threads)
    for output, gradients in results[1:]:
        assert torch.equal(output, results[0][0])
        assert all(torch.equal(gradients[name], results[0][1][name]) for name in gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype, device):
    tensors, shapes = make(dtype, device), torch.tensor(SHAPES, device=device)
    value, *sampling = (tensors[name].requires_grad_() for name in NAMES)
    torch.library.opcheck(torch.ops.dcn_plugin.ms_deform_attn, (value, shapes, *sampling))
    value, *sampling = (tensors[name].detach() for name in NAMES)
    gradient = torch.randn(2, 7, 16, device=device).to(dtype)
    for needs in ((True, True), (True, False), (False, True)):
        arguments = gradient, value, shapes, *sampling, *needs
        torch.library.opcheck(torch.ops.dcn_plugin.ms_deform_attn_backward, arguments)


@pytest.mark.parametrize("weights_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_keeps_the_locations(weights_dtype, device):
    tensors = {n: t.requires_grad_() for n, t in make(torch.float32, device, weights_dtype=weights_dtype).items()}
    with torch.autocast(device.type, dtype=torch.bfloat16):
        output = OURS(**tensors)
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert all(t.grad.dtype == t.dtype for t in tensors.values())
    assert torch.equal(output, OURS(**{**tensors, "value": tensors["value"].bfloat16()}))


@pytest.mark.parametrize("shapes", [SHAPES, torch.tensor(SHAPES)], ids=["list", "tensor"])
def test_compile(shapes, device):
    tensors = make(torch.float32, device)
    if isinstance(shapes, torch.Tensor):
        tensors["spatial_shapes"] = shapes.to(device)
        function = ms_deform_attn
    else:
        function = OURS
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    leaves = [tensors[name].requires_grad_() for name in NAMES]
    output, expected = compiled(**tensors), function(**tensors)
    assert torch.equal(output, expected)
    gradients = (torch.autograd.grad(o, leaves, random_gradient(o)) for o in (output, expected))
    for gradient, its_expected in zip(*gradients, strict=True):
        assert_repeats(gradient, its_expected)


class Attention(torch.nn.Module):
    def forward(self, value, spatial_shapes, sampling_locations, attention_weights):
        return ms_deform_attn(value, spatial_shapes, sampling_locations, attention_weights)


def test_export_with_any_number_of_images_and_queries(device):
    tensors = make(torch.float32, device)
    arguments = tensors["value"], torch.tensor(SHAPES, device=device), *(tensors[name] for name in NAMES[1:])
    batch, queries = torch.export.Dim("batch"), torch.export.Dim("queries")
    dynamic = ({0: batch}, {}, {0: batch, 1: queries}, {0: batch, 1: queries})
    program = torch.export.export(Attention(), arguments, dynamic_shapes=dynamic)
    others = make(torch.float32, device, batch=3, queries=11)
    others = others["value"], arguments[1], *(others[name] for name in NAMES[1:])
    assert torch.equal(program.module()(*others), ms_deform_attn(*others))


def _change(**changes):
    return lambda t: {**t, **{name: change(t[name]) for name, change in changes.items()}}


def _shapes(value):
    return _change(spatial_shapes=lambda t: value)


LOCATIONS, WEIGHTS = (r"sampling_locations .* \(N, Q, heads, L, P, 2\)", r"attention_weights .* \(N, Q, heads, L, P\)")
ERRORS = {
    "value-rank": (_change(value=lambda t: t[0]), r"value must have shape \(N, .*, heads, D\), got \(71, 2, 8\)"),
    "value-dtype": (_change(value=lambda t: t.long()), "value must be float32.* got Long"),
    "no-channels": (_change(value=lambda t: t[..., :0]), r"at least one head and one channel, .* \(2, 71, 2, 0\)"),
    "shapes-rank": (_change(spatial_shapes=lambda t: t[0]), r"spatial_shapes must have shape \(L, 2\), got \(2,\)"),
    "shapes-columns": (_change(spatial_shapes=lambda t: t[:, :1]), r"spatial_shapes .* \(L, 2\), got \(3, 1\)"),
    "shapes-dtype": (_change(spatial_shapes=lambda t: t.float()), "spatial_shapes must be int64, got Float"),
    "shapes-tensors": (_shapes([torch.ones(2)]), r"spatial_shapes must be .* pairs of integers \(H, W\), got \[tensor"),
    "shapes-fractions": (_shapes([tuple(torch.ones(2))]), "spatial_shapes must be .* pairs of integers"),
    "shapes-number": (_shapes(3), r"spatial_shapes must be a tensor of shape \(L, 2\) or pairs of integers"),
    "shapes-flat": (_shapes([3, 4]), r"spatial_shapes must be a tensor of shape \(L, 2\) or pairs of integers"),
    "shapes-triples": (_shapes([(3, 4, 5)]), r"spatial_shapes must .* pairs of integers \(H, W\), got \[\(3, 4, 5\)\]"),
    "shapes-floats": (_shapes([(3, 4.5)]), r"spatial_shapes must .* pairs of integers \(H, W\), got \[\(3, 4.5\)\]"),
    "levels": (_shapes([(7, 10), (1, 1)]), LOCATIONS + r" = \(2, 7, 2, 2, 4, 2\), got \(2, 7, 2, 3, 4, 2\)"),
    "locations-rank": (_change(sampling_locations=lambda t: t[0]), LOCATIONS + r", got \(7, 2, 3, 4, 2\)"),
    "locations-batch": (_change(sampling_locations=lambda t: t[:1]), LOCATIONS + r".*got \(1, 7, 2, 3, 4, 2\)"),
    "locations-heads": (_change(sampling_locations=lambda t: t[:, :, :1]), LOCATIONS + r".*got \(2, 7, 1, 3, 4, 2\)"),
    "locations-xyz": (_change(sampling_locations=lambda t: t[..., :1]), LOCATIONS + r".*got \(2, 7, 2, 3, 4, 1\)"),
    "weights-points": (_change(attention_weights=lambda t: t[..., 1:]), WEIGHTS + r" = .*, got \(2, 7, 2, 3, 3\)"),
    "weights-queries": (_change(attention_weights=lambda t: t[:, 1:]), WEIGHTS + r" = .*, got \(2, 6, 2, 3, 4\)"),
    "locations-dtype": (
        _change(sampling_locations=lambda t: t.double()),
        "sampling_locations must be Float beside a value of Float, got Double",
    ),
    "weights-dtype": (
        _change(attention_weights=lambda t: t.half()),
        "attention_weights must be Float beside a value of Float, got Half",
    ),
}
PIXELS = {
    "too-many": [(6, 9), (3, 5), (2, 2)],
    "too-few": [(6, 9), (3, 5), (1, 1)],
    "huge": [(6, 9), (2**62, 2**62), (1, 2)],
    "huge-and-empty": [(6, 9), (2**62, 1), (1, 2)],
    "negative": [(6, 9), (-3, -5), (1, 2)],
}


@pytest.mark.parametrize(("change", "message"), ERRORS.values(), ids=ERRORS)
def test_errors_name_the_argument_and_the_shapes(change, message, device):
    tensors = change({**make(torch.float32, device), "spatial_shapes": torch.tensor(SHAPES)})
    with pytest.raises((RuntimeError, ValueError), match=message):
        ms_deform_attn(**tensors)


@pytest.mark.parametrize("shapes", PIXELS.values(), ids=PIXELS)
def test_what_is_asserted_on_cuda(shapes):
    assert not _are_maps_of(torch.tensor(shapes), 71)
    assert not _are_maps_of(torch.tensor([(6, 9), (-1, -17), (0, 5)]), 71)
    assert _are_maps_of(torch.tensor([*SHAPES, (0, 5)]), 71)


class Assertions(TorchDispatchMode):
    """Counts assertions on the device, after which, if they fail, a process can use the GPU no more."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket is torch.ops.aten._assert_async
        return func(*args, **(kwargs or {}))


def fakes_on_cuda(tensors):
    """In FakeTensorMode, which knows CUDA without a GPU."""
    return {name: torch.empty(t.shape, dtype=t.dtype, device="cuda") for name, t in tensors.items()}


OF_SHAPES = [
    *("value-rank", "no-channels", "shapes-rank", "shapes-columns", "levels"),
    *("locations-rank", "locations-batch", "locations-heads", "locations-xyz", "weights-points", "weights-queries"),
]


@pytest.mark.parametrize("name", OF_SHAPES)
def test_cuda_checks_shapes_before_it_asserts(name):
    change, message = ERRORS[name]
    tensors = change({**make(torch.float32), "spatial_shapes": torch.tensor(SHAPES)})
    if not isinstance(tensors["spatial_shapes"], torch.Tensor):
        tensors["spatial_shapes"] = torch.tensor(tensors["spatial_shapes"])
    with FakeTensorMode(), Assertions() as assertions, pytest.raises(RuntimeError, match=message):
        ms_deform_attn(**fakes_on_cuda(tensors))
    assert assertions.count == 0


def test_cuda_asserts_the_pixels():
    tensors = {**make(torch.float32), "spatial_shapes": torch.tensor(SHAPES)}
    with FakeTensorMode(), Assertions() as assertions:
        assert ms_deform_attn(**fakes_on_cuda(tensors)).is_cuda
    assert assertions.count == 1


@pytest.mark.parametrize("shapes", PIXELS.values(), ids=PIXELS)
def test_maps_that_value_does_not_hold(shapes, device):
    message = "negative" if shapes[1][0] < 0 else "have as many pixels as value has keys"
    maps = ", ".join(f"{h} x {w}" for h, w in shapes)
    with pytest.raises(RuntimeError, match=rf"spatial_shapes must .*{message}, got {maps} and .* \(2, 71, 2, 8\)"):
        ms_deform_attn(spatial_shapes=shapes, **make(torch.float32, device))


@pytest.mark.parametrize("name", ["value", "sampling_locations", "attention_weights"])
def test_arguments_that_are_no_tensors(name):
    with pytest.raises(TypeError, match=f"{name} must be a tensor, got None"):
        OURS(**{**make(), name: None})


@pytest.mark.parametrize("name", NAMES[1:])
def test_mixed_devices(name, device):
    tensors = make(torch.float32, device)
    tensors[name] = tensors[name].to("meta")
    with pytest.raises(RuntimeError, match=f"{name} must be on value's device"):
        OURS(**tensors)


def test_sizes_on_the_meta_device_serve_tensors_there_alone(device):
    tensors, shapes = make(torch.float32, device), torch.tensor(SHAPES, device="meta")
    with pytest.raises(RuntimeError, match="spatial_shapes must be on value's device .* got meta"):
        ms_deform_attn(spatial_shapes=shapes, **tensors)
    output = ms_deform_attn(spatial_shapes=shapes, **{name: t.to("meta") for name, t in tensors.items()})
    assert output.is_meta


@pytest.mark.parametrize("name", OF_SHAPES)
def test_meta_tensors_of_wrong_shapes(name):
    change, message = ERRORS[name]
    tensors = change({**make(torch.float32), "spatial_shapes": torch.tensor(SHAPES)})
    tensors = {name: t.to("meta") if name in NAMES else t for name, t in tensors.items()}
    with pytest.raises(RuntimeError, match=message):
        ms_deform_attn(**tensors)
    tensors["spatial_shapes"] = torch.as_tensor(tensors["spatial_shapes"])
    gradient = torch.empty(2, 7, 16, device="meta")
    with pytest.raises(RuntimeError, match=message):
        torch.ops.dcn_plugin.ms_deform_attn_backward(
            gradient, tensors["value"], tensors["spatial_shapes"], *(tensors[name] for name in NAMES[1:]), True, True
        )


def test_meta_tensors_have_shapes_alone():
    tensors = {name: t.to("meta") for name, t in make(torch.bfloat16, channels=5).items()}
    output = OURS(**tensors)
    assert (output.shape, output.dtype, output.device.type) == ((2, 7, 10), torch.bfloat16, "meta")
