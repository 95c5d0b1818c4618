import pytest
import torch

from dcn_plugin.ops import deform_ps_roi_pool, reference

from .cases import as_float64, assert_repeats, check_against, relative_error, run

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 8e-3}
ROIS = torch.tensor(
    [
        [0, 5.0, 6.0, 61.0, 40.0],
        [1, -30.0, -20.0, 200.0, 160.0],  # over every edge
        [1, 50.0, 51.0, 60.0, 58.0],
        [0, 20.0, 20.0, 20.0, 20.0],  # one pixel of the image
        [0, 31.0, 30.0, 10.0, 10.0],  # inside out
        [1, 500.0, 500.0, 600.0, 600.0],  # off the map
    ]
)
BINS = (3, 4)
OPTIONS = dict(output_size=BINS, sample_per_part=3, spatial_scale=0.125, trans_std=0.1)
SIZES = {
    "bins": {},
    "one-map": dict(group_size=1),
    "fewer": dict(group_size=(2, 3), part_size=(3, 2)),
    "more": dict(group_size=(4, 5), part_size=(5, 8)),
    "one-offset": dict(part_size=1),
    "one-bin": dict(output_size=1, group_size=(2, 3), part_size=(3, 2)),
    "one-sample": dict(sample_per_part=1),
}


def pair(value):
    return value if isinstance(value, tuple) else (value, value)


def make(dtype=torch.float64, device="cpu", output_dim=4, classes=2, size=(11, 13), rois=ROIS, options=None, **layout):
    options = {**OPTIONS, **(options or {})}
    groups, parts = (pair(options.get(name, options["output_size"])) for name in ("group_size", "part_size"))
    tensors = dict(
        input=torch.randn(2, output_dim * groups[0] * groups[1], *size).contiguous(**layout),
        offset=torch.randn(len(rois), 2 * classes, *parts) if classes else None,
    )
    return {name: None if t is None else t.to(device, dtype) for name, t in tensors.items()}


def with_rois(function, rois=ROIS):
    return lambda input, **kwargs: function(input, rois.to(input.device, input.dtype), **kwargs)


OURS, TRUTH = with_rois(deform_ps_roi_pool), with_rois(reference.deform_ps_roi_pool)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize(("output_dim", "classes"), [(4, 0), (1, 1), (11, 1), (6, 2), (3, 3)])
def test_equals_reference(dtype, memory_format, output_dim, classes, device):
    tensors = make(dtype, device, output_dim, classes, memory_format=memory_format)
    output = check_against(OURS, TRUTH, tensors, TOLERANCE[dtype], **OPTIONS)
    assert output.dtype == dtype
    assert output.shape == (len(ROIS), output_dim, *BINS)
    assert output.is_contiguous(memory_format=memory_format) or output_dim == 1
    assert output[:5].any()


@pytest.mark.parametrize("options", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("classes", [0, 2])
def test_sizes_equal_reference(options, classes, device):
    check_against(OURS, TRUTH, make(device=device, classes=classes, options=options), 1e-12, **{**OPTIONS, **options})


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (20, 24)])
def test_maps_smaller_and_larger_than_the_rois_equal_reference(size, device):
    check_against(OURS, TRUTH, make(device=device, size=size), 1e-12, **OPTIONS)


def test_bins_read_their_own_maps_and_classes_their_own_offsets(device):
    """Maps of constants and a ramp, for which the outcome is known without sampling anything."""
    rois = torch.tensor([[0, 32.0, 32.0, 63.0, 63.0]], device=device)
    constants = torch.arange(2.0 * 4, device=device).reshape(1, 8, 1, 1).expand(1, 8, 16, 16)
    output = deform_ps_roi_pool(constants, rois, output_size=2, spatial_scale=0.125)
    assert torch.equal(output, torch.arange(8.0, device=device).reshape(1, 2, 2, 2))

    ramp = torch.arange(16.0, device=device).expand(1, 2, 16, 16)
    # 4 pixels of the map, from 3.5; two bins of 2 pixels; samples at 0, 0.5, 1 and 1.5 pixels.
    plain = deform_ps_roi_pool(ramp, rois, None, 2, 1, spatial_scale=0.125)
    assert torch.equal(plain[0, 0, 0], torch.tensor([4.25, 6.25], device=device))
    offset = torch.zeros(1, 4, 2, 2, device=device)
    offset[0, 2, :, 1] = 2.5  # the second class's right bins, in x
    offset[0, 3] = -1  # in y, along which the ramp does not change
    moved = deform_ps_roi_pool(ramp, rois, offset, 2, 1, spatial_scale=0.125) - plain
    expected = torch.tensor([[[0.0, 0], [0, 0]], [[0, 1], [0, 1]]], device=device)  # 0.1 * 2.5 * 4 pixels
    torch.testing.assert_close(moved[0], expected)


def test_edges_round_away_from_zero(device):
    input = torch.randn(1, 1, 9, 9, device=device)

    def pool(*box):
        return deform_ps_roi_pool(input, torch.tensor([[0.0, *box]], device=device), None, 2, 1)

    assert torch.equal(pool(2.5, 3.4, 4.5, 5.6), pool(3.0, 3.0, 5.0, 6.0))
    assert torch.equal(pool(-0.5, -1.5, 4.0, 5.0), pool(-1.0, -2.0, 4.0, 5.0))


@pytest.mark.parametrize("edge", [-2, -1, 0, 4, 5])
def test_at_the_border(edge, device):
    """One sample half a pixel before ``edge`` on a (5, 5) map: inside it counts, clamped it has no gradient."""
    rois = torch.tensor([[0, 2.0, edge, 2.0, edge]], dtype=torch.float64)
    tensors = dict(
        input=torch.randn(1, 1, 5, 5, device=device, dtype=torch.float64),
        offset=torch.zeros(1, 2, 1, 1, device=device, dtype=torch.float64),
    )
    options = dict(output_size=1, sample_per_part=1)
    ours, truth = with_rois(deform_ps_roi_pool, rois), with_rois(reference.deform_ps_roi_pool, rois)
    check_against(ours, truth, tensors, 1e-12, **options)
    output, gradients = run(ours, tensors, **options)
    assert bool(output.any()) == (0 <= edge <= 5)
    assert bool(gradients["offset"][0, 1].any()) == (0 < edge < 5)


def test_float32_rois_beside_half_features(device):
    tensors, rois = make(torch.float16, device), ROIS + 0.4
    rois[0, 1] = 4097.4  # in float16: 4096
    output = deform_ps_roi_pool(**tensors, rois=rois.to(device), **OPTIONS)
    expected = reference.deform_ps_roi_pool(**as_float64(tensors), rois=rois.double(), **OPTIONS)
    assert relative_error(output.cpu(), expected) < TOLERANCE[torch.float16]


def test_no_rois(device):
    tensors = make(torch.float32, device, rois=ROIS[:0])
    output, gradients = run(with_rois(deform_ps_roi_pool, ROIS[:0]), tensors, **OPTIONS)
    assert output.shape == (0, 4, *BINS)
    assert gradients["offset"].shape == (0, 4, *BINS)
    assert gradients["input"].shape == tensors["input"].shape
    assert not gradients["input"].any()


def test_no_images(device):
    input = torch.randn(0, 24, 11, 13, device=device)
    assert deform_ps_roi_pool(input, ROIS[:0].to(device), **OPTIONS).shape == (0, 2, *BINS)


@pytest.mark.parametrize("wild", [1e9, -1e9, 1e30, float("inf"), -float("inf"), float("nan")], ids=str)
def test_wild_offsets_and_rois_give_zeros(wild, device):
    tensors = make(torch.float32, device)
    tensors["offset"][:, 0, 1] = wild  # the first class's second row, in x
    output, gradients = run(OURS, tensors, **OPTIONS)
    assert not output[:, :2, 1].any()
    assert output[:, 2:, 1].any()
    assert not gradients["offset"][:, :2, 1].any()
    assert output.isfinite().all()
    assert all(g.isfinite().all() for g in gradients.values())
    rois = torch.tensor([[0, wild, 3.0, 5.0, 9.0], [0, 3.0, 3.0, wild, 9.0]])
    tensors = make(torch.float32, device, rois=rois)
    output, gradients = run(with_rois(deform_ps_roi_pool, rois), tensors, **OPTIONS)
    assert output.isfinite().all()
    assert all(g.isfinite().all() for g in gradients.values())
    if not torch.tensor(wild).isfinite():
        assert not output.any()


@pytest.mark.parametrize("classes", [1, 2])
def test_gradcheck(classes, device):
    tensors = make(torch.float64, device, 2, classes, size=(6, 7), rois=ROIS[:3], options=dict(part_size=2))
    # Away from the lattice, where the derivative jumps, and from the border, where samples leave the mean.
    tensors["offset"] = (torch.rand_like(tensors["offset"]) - 0.5) * 0.5
    rois = torch.tensor([[0, 9.0, 9.0, 31.0, 28.0], [1, 11.0, 12.0, 43.0, 36.0], [1, 14.0, 11.0, 30.0, 38.0]])

    def function(input, offset):
        return deform_ps_roi_pool(input, rois.to(device), offset, part_size=2, **OPTIONS)

    # Of 48 channels: entry by entry it would take half a minute.
    assert torch.autograd.gradcheck(function, [t.requires_grad_() for t in tensors.values()], fast_mode=True)


def test_backward_repeats_bit_for_bit_with_any_number_of_threads():
    tensors = make(torch.float32, output_dim=50, options=dict(part_size=2))
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            results.append(run(OURS, tensors, **OPTIONS, part_size=2))
    finally:
        torch.set_num_threads(threads)
    for output, gradients in results[1:]:
        assert torch.equal(output, results[0][0])
        assert all(torch.equal(gradients[name], results[0][1][name]) for name in gradients)


def test_opcheck(device):
    t = {n: v.requires_grad_() for n, v in make(torch.float32, device, memory_format=torch.channels_last).items()}
    options = [3, 4], [3, 4], [3, 4], 3, 0.125, 0.1
    rois = ROIS.to(device)
    torch.library.opcheck(torch.ops.dcn_plugin.deform_ps_roi_pool, (t["input"], rois, t["offset"], *options))
    torch.library.opcheck(torch.ops.dcn_plugin.deform_ps_roi_pool, (t["input"], rois, None, *options))
    t = {n: v.detach() for n, v in t.items()}
    grad = torch.randn(len(ROIS), 4, 3, 4, device=device)
    for offset, need_input, need_offset in ((t["offset"], True, True), (t["offset"], False, True), (None, True, True)):
        args = (grad, t["input"], rois, offset, *options, need_input, need_offset)
        torch.library.opcheck(torch.ops.dcn_plugin.deform_ps_roi_pool_backward, args)


@pytest.mark.parametrize("needed", ["input", "offset"])
def test_only_the_gradients_that_are_needed(needed, device):
    tensors = make(device=device)
    expected = run(OURS, tensors, **OPTIONS)[1][needed]
    given = {name: t for name, t in tensors.items() if name != needed}
    _, alone = run(lambda **leaf: OURS(**leaf, **given, **OPTIONS), {needed: tensors[needed]})
    assert_repeats(alone[needed], expected)


def test_autocast_keeps_the_rois(device):
    tensors = {n: t.requires_grad_() for n, t in make(torch.float32, device).items()}
    rois = ROIS.to(device)
    rois[:, 1:] += 257  # bfloat16 knows even numbers only there
    with torch.autocast(device.type, dtype=torch.bfloat16):
        output = deform_ps_roi_pool(rois=rois, **tensors, **{**OPTIONS, "spatial_scale": 0.02})
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in tensors.values())
    rounded = {n: t.detach().bfloat16() for n, t in tensors.items()}
    expected = deform_ps_roi_pool(rois=rois, **rounded, **{**OPTIONS, "spatial_scale": 0.02})
    assert torch.equal(output, expected)


def test_compile(device):
    tensors = make(torch.float32, device)
    torch._dynamo.reset()
    output, gradients = run(torch.compile(OURS, fullgraph=True, backend="aot_eager"), tensors, **OPTIONS)
    expected, expected_gradients = run(OURS, tensors, **OPTIONS)
    assert torch.equal(output, expected)
    for name, gradient in gradients.items():
        assert_repeats(gradient, expected_gradients[name])


def _change(**changes):
    return lambda t: {**t, **{name: change(t[name]) for name, change in changes.items()}}


ERRORS = {
    "input-rank": (_change(input=lambda t: t[0]), {}, r"input must have shape .*, got \(48, 11, 13\)"),
    "input-channels": (
        _change(input=lambda t: t[:, 1:]),
        {},
        r"output_dim \* 3 \* 4 channels for group_size \(3, 4\), got shape \(2, 47, 11, 13\)",
    ),
    "rois-rank": (_change(rois=lambda t: t[0]), {}, r"rois must have shape \(K, 5\), got \(5,\)"),
    "rois-columns": (_change(rois=lambda t: t[:, :4]), {}, r"rois must have shape \(K, 5\).* got \(6, 4\)"),
    "rois-dtype": (_change(rois=lambda t: t.long()), {}, "rois must be float32.* got Long"),
    "offset-rank": (_change(offset=lambda t: t[0]), {}, r"offset must have shape .*, got \(4, 3, 4\)"),
    "offset-size": (_change(offset=lambda t: t[..., 1:]), {}, r"offset .* \(6, 4, 3, 4\), got \(6, 4, 3, 3\)"),
    "offset-rois": (_change(offset=lambda t: t[1:]), {}, r"offset .* \(6, 4, 3, 4\), got \(5, 4, 3, 4\)"),
    "offset-odd": (_change(offset=lambda t: t[:, 1:]), {}, r"offset must have 2 \* classes .* got \(6, 3, 3, 4\)"),
    "offset-classes": (
        _change(offset=lambda t: torch.cat([t, t[:, :2]], 1)),
        {},
        r"classes that divides the 4 output channels, got \(6, 6, 3, 4\) for input \(2, 48, 11, 13\)",
    ),
    "offset-none": (_change(offset=lambda t: t[:, :0]), {}, r"offset must have 2 \* classes .* got \(6, 0, 3, 4\)"),
    "offset-dtype": (_change(offset=lambda t: t.double()), {}, "offset must have input's dtype Float, got Double"),
    "output-size": (_change(), dict(output_size=0), "output_size must be two positive integers"),
    "group-size": (_change(), dict(group_size=(0, 1)), "group_size must be two positive integers"),
    "part-size": (_change(), dict(part_size=-1), "part_size must be two positive integers"),
    "group-size-type": (_change(), dict(group_size=(1, 2, 3)), "group_size must be an integer or two integers"),
    "samples": (_change(), dict(sample_per_part=0), "sample_per_part must be positive, got 0"),
}


@pytest.mark.parametrize(("change", "options", "message"), ERRORS.values(), ids=ERRORS)
def test_errors_name_the_argument_and_the_shapes(change, options, message, device):
    tensors = change({**make(torch.float32, device), "rois": ROIS.to(device)})
    with pytest.raises((RuntimeError, ValueError), match=message):
        deform_ps_roi_pool(**tensors, **{**OPTIONS, **options})


@pytest.mark.parametrize("index", [-1.0, 2.0, float("nan")], ids=str)
def test_batch_index_out_of_range(index):
    rois = ROIS.clone()
    rois[2, 0] = index
    with pytest.raises(RuntimeError, match=r"rois\[2, 0\] = .* is not an index into a batch of 2 images"):
        deform_ps_roi_pool(rois=rois, **make(torch.float32), **OPTIONS)


@pytest.mark.parametrize("name", ["rois", "offset"])
def test_mixed_devices(name, device):
    tensors = {**make(torch.float32, device), "rois": ROIS.to(device)}
    tensors[name] = tensors[name].to("meta")
    with pytest.raises(RuntimeError, match=f"{name} must be on input's device"):
        deform_ps_roi_pool(**tensors, **OPTIONS)
