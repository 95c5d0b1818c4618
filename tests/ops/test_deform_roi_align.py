import itertools
import math

import pytest
import torch

from dcn_plugin.ops import deform_roi_align, reference

from .cases import STRIDED, as_float64, assert_repeats, check_against, random_gradient, relative_error, run

# As for the convolution, but all sums are of float32: of the half types only the result is rounded.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
ROIS = torch.tensor(
    [
        [0, 4.3, 6.1, 60.7, 40.2],
        [1, -30.0, -20.0, 200.0, 160.0],  # over every edge
        [1, 50.2, 50.4, 60.1, 57.9],
        [0, 20.0, 20.0, 20.0, 20.0],  # empty
        [0, 30.0, 30.0, 10.0, 10.0],  # inside out
        [1, 500.0, 500.0, 600.0, 600.0],  # off the map
    ]
)
OPTIONS = dict(output_size=(3, 4), spatial_scale=0.125, sampling_ratio=0, gamma=0.1)


def make(dtype=torch.float64, device="cpu", channels=5, size=(11, 13), rois=ROIS, offset=True, mask=True, **layout):
    bins = OPTIONS["output_size"]
    tensors = dict(
        input=torch.randn(2, channels, *size).contiguous(**layout),
        offset=torch.randn(len(rois), 2, *bins) if offset else None,
        mask=torch.rand(len(rois), 1, *bins) if mask else None,
    )
    return {name: None if t is None else t.to(device, dtype) for name, t in tensors.items()}


def with_rois(function, rois):
    return lambda input, **kwargs: function(input, rois.to(input.device, input.dtype), **kwargs)


WHOLE_ROIS = ROIS.round()  # every dtype holds them exactly
OURS, TRUTH = (with_rois(function, WHOLE_ROIS) for function in (deform_roi_align, reference.deform_roi_align))


@DTYPES
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("channels", [1, 5, 64, 130])
@pytest.mark.parametrize("sampling_ratio", [0, 1, 3])
@pytest.mark.parametrize(("offset", "mask"), [(False, False), (True, False), (True, True)], ids=["plain", "v1", "v2"])
def test_equals_reference(dtype, memory_format, channels, sampling_ratio, offset, mask, device):
    tensors = make(dtype, device, channels, offset=offset, mask=mask, memory_format=memory_format)
    options = {**OPTIONS, "sampling_ratio": sampling_ratio}
    output = check_against(OURS, TRUTH, tensors, TOLERANCE[dtype], **options)
    assert output.dtype == dtype
    assert output.is_contiguous(memory_format=memory_format) or channels == 1


@DTYPES
@pytest.mark.parametrize("strided", STRIDED.values(), ids=STRIDED)
def test_strided_tensors(strided, dtype, device):
    tensors = {name: strided(t) for name, t in make(dtype, device).items()}
    assert not tensors["input"].is_contiguous()
    ours = with_rois(deform_roi_align, strided(WHOLE_ROIS))
    check_against(ours, TRUTH, tensors, TOLERANCE[dtype], **OPTIONS)


def test_any_layout_of_the_output_gradient(device):
    tensors = make(torch.float32, device)
    _, expected = run(OURS, tensors, **OPTIONS)
    leaves = {name: t.requires_grad_() for name, t in tensors.items()}
    output = OURS(**leaves, **OPTIONS)
    for layout in (lambda t: t.contiguous(memory_format=torch.channels_last), *STRIDED.values()):
        actual = torch.autograd.grad(output, leaves.values(), layout(random_gradient(output)), retain_graph=True)
        for name, value in zip(leaves, actual, strict=True):
            assert relative_error(value, expected[name]) < 1e-6, name


def test_float32_rois_beside_half_features(device):
    tensors = make(torch.float16, device)
    rois = ROIS.to(device)
    output = deform_roi_align(tensors["input"], rois, tensors["offset"], mask=tensors["mask"], **OPTIONS)
    t = as_float64(tensors)
    expected = reference.deform_roi_align(t["input"], rois.double().cpu(), t["offset"], mask=t["mask"], **OPTIONS)
    assert relative_error(output.cpu(), expected) < TOLERANCE[torch.float16]


@pytest.mark.parametrize("sampling_ratio", [0, 2])
def test_equals_mmcv_roi_align_without_offsets(mmcv_ops, sampling_ratio):
    rois = ROIS[:3]  # mmcv's RoI align clamps the size of empty RoIs

    def mmcv_roi_align(input):
        return mmcv_ops.roi_align(input, rois, OPTIONS["output_size"], 0.125, sampling_ratio, "avg", True)

    tensors = {"input": make(torch.float32)["input"]}
    ours = with_rois(deform_roi_align, rois)
    output, gradients = run(ours, tensors, **{**OPTIONS, "sampling_ratio": sampling_ratio})
    expected, expected_gradients = run(mmcv_roi_align, tensors)
    assert relative_error(output, expected) < 1e-5
    assert relative_error(gradients["input"], expected_gradients["input"]) < 1e-5


def test_no_rois(device):
    tensors = make(torch.float32, device, rois=ROIS[:0])
    output, gradients = run(with_rois(deform_roi_align, ROIS[:0]), tensors, **OPTIONS)
    assert output.shape == (0, 5, 3, 4)
    assert gradients["input"].shape == tensors["input"].shape
    assert not gradients["input"].any()


def test_no_images(device):
    input = torch.randn(0, 5, 11, 13, device=device, requires_grad=True)
    output = deform_roi_align(input, ROIS[:0].to(device), **OPTIONS)
    assert output.shape == (0, 5, 3, 4)
    output.sum().backward()
    assert input.grad.shape == input.shape


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_pixels_that_nothing_samples_may_hold_anything(value, device):
    tensors = make(torch.float32, device, channels=20)
    tensors["input"][:, :, 0] = tensors["input"][:, :, :, 0] = value
    tensors["offset"][:, :, 0, 0] = -1e4  # this bin lies outside
    rois = torch.tensor([[0, 36.0, 36.0, 70.0, 60.0], [1, 40.0, 32.0, 64.0, 64.0]])  # far from the first row and column
    tensors = {name: t if name == "input" else t[:2] for name, t in tensors.items()}
    options = {**OPTIONS, "gamma": 0.01}
    functions = (with_rois(function, rois) for function in (deform_roi_align, reference.deform_roi_align))
    check_against(*functions, tensors, TOLERANCE[torch.float32], **options)


@pytest.mark.parametrize("wild", [1e9, -1e9, 1e30, float("inf"), -float("inf"), float("nan")], ids=str)
def test_wild_offsets_and_rois_give_zeros(wild, device):
    tensors = make(torch.float32, device)
    tensors["offset"][:, 0, 1] = wild
    output, gradients = run(with_rois(deform_roi_align, ROIS[:3]), {n: t[:3] for n, t in tensors.items()}, **OPTIONS)
    assert not output[:, :, 1].any()
    assert output.isfinite().all()
    assert all(g.isfinite().all() for g in gradients.values())


def test_a_negative_sampling_ratio_is_that_of_torchvision(device):
    input, rois = torch.randn(1, 4, 9, 8, device=device), torch.tensor([[0, 5.0, 4, 50, 61]], device=device)
    adaptive, negative = (deform_roi_align(input, rois, sampling_ratio=ratio, spatial_scale=0.125) for ratio in (0, -1))
    assert torch.equal(adaptive, negative)


@pytest.mark.parametrize("wild", [1e9, -1e9, 1e30, float("inf"), -float("inf"), float("nan")], ids=str)
@pytest.mark.parametrize("sampling_ratio", [0, 2])
def test_wild_rois(wild, sampling_ratio, device):
    rois = ROIS[:3].repeat(2, 1)
    for k, edge in enumerate((1, 2, 3, 4)):
        rois[k, edge] = wild
    tensors = make(torch.float32, device, rois=rois)
    output, gradients = run(with_rois(deform_roi_align, rois), tensors, **{**OPTIONS, "sampling_ratio": sampling_ratio})
    assert output[4:].any()
    for value in (output, *gradients.values()):
        assert value.isfinite().all()
    if not math.isfinite(wild):
        for value in (output, gradients["offset"], gradients["mask"]):
            assert not value[:4].any()


def test_huge_roi_is_mostly_zeros_and_does_not_hang(device):
    input = torch.ones(1, 3, 8, 8, device=device)
    output = deform_roi_align(input, torch.tensor([[0, -1e7, -1e7, 1e7, 1e7]], device=device), output_size=2)
    assert output.isfinite().all()
    assert output.abs().max() < 1e-9


@pytest.mark.parametrize("position", [-1.2, -1.0, -0.5, 0.0, 0.5, 4.0, 4.5, 5.0, 5.2])
def test_at_the_border(position, device):
    """One sample about the edges of a (5, 5) map; what is clamped to the border has no gradient along that axis."""
    input = torch.randn(1, 2, 5, 5, device=device, dtype=torch.float64)
    # A RoI of one bin and one sample whose centre is where we want it.
    rois = torch.tensor([[0, 2.0, position, 3.0, position + 1]], device=device, dtype=torch.float64)
    tensors = dict(input=input, offset=torch.zeros(1, 2, 1, 1, device=device, dtype=torch.float64))
    options = dict(output_size=1, sampling_ratio=1)
    ours, truth = with_rois(deform_roi_align, rois), with_rois(reference.deform_roi_align, rois.cpu())
    check_against(ours, truth, tensors, 1e-12, **options)
    output, gradients = run(ours, tensors, **options)
    if position < -1 or position > 5:
        assert not output.any()
    if position < 0 or position > 4:
        assert not gradients["offset"][0, 1].any()


@pytest.mark.parametrize("sampling_ratio", [0, 2])
def test_gradcheck(sampling_ratio, device):
    tensors = make(torch.float64, device, channels=2, size=(6, 7), rois=ROIS[:2])
    rois = ROIS[:2].to(device, torch.float64) / 2

    def function(input, offset, mask):
        return deform_roi_align(input, rois, offset, mask=mask, **{**OPTIONS, "sampling_ratio": sampling_ratio})

    assert torch.autograd.gradcheck(function, [t.requires_grad_() for t in tensors.values()])


@pytest.mark.parametrize("needed", ["input", "offset", "mask"])
def test_gradients_only_where_required(needed, device):
    tensors = make(torch.float64, device)
    _, expected = run(OURS, tensors, **OPTIONS)
    tensors[needed].requires_grad_()
    output = OURS(**tensors, **OPTIONS)
    output.backward(random_gradient(output))
    torch.testing.assert_close(tensors[needed].grad, expected[needed])
    assert all(t.grad is None for name, t in tensors.items() if name != needed)


def test_backward_leaves_empty_what_is_not_needed(device):
    t = make(torch.float32, device)
    rois, gradient = WHOLE_ROIS.to(device), torch.randn(len(ROIS), 5, 3, 4, device=device)
    for need_input, need_sampling in ((True, False), (False, True)):
        for offset, mask in itertools.product((t["offset"], None), (t["mask"], None)):
            gradients = torch.ops.dcn_plugin.deform_roi_align_backward(
                gradient, t["input"], rois, offset, mask, [3, 4], 0.125, 0, 0.1, need_input, need_sampling
            )
            assert gradients[0].shape == (t["input"].shape if need_input else (0,))
            for g, moved in zip(gradients[1:], (offset, mask), strict=True):
                assert g.shape == (moved.shape if need_sampling and moved is not None else (0,))


def test_backward_repeats_bit_for_bit_with_any_number_of_threads():
    tensors = make(torch.float32, channels=150)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            results.append(run(with_rois(deform_roi_align, ROIS), tensors, **OPTIONS))
    finally:
        torch.set_num_threads(threads)
    for output, gradients in results[1:]:
        assert torch.equal(output, results[0][0])
        assert all(torch.equal(gradients[name], results[0][1][name]) for name in gradients)


def test_opcheck(device):
    t = {n: v.requires_grad_() for n, v in make(torch.float32, device, memory_format=torch.channels_last).items()}
    options = [3, 4], 0.125, 0, 0.1
    rois = ROIS.to(device)
    torch.library.opcheck(torch.ops.dcn_plugin.deform_roi_align, (t["input"], rois, t["offset"], t["mask"], *options))
    torch.library.opcheck(torch.ops.dcn_plugin.deform_roi_align, (t["input"], rois, None, None, *options))
    t = {n: v.detach() for n, v in t.items()}
    grad = torch.randn(len(ROIS), 5, 3, 4, device=device)
    for offset, mask in ((t["offset"], t["mask"]), (None, None)):
        args = (grad, t["input"], rois, offset, mask, *options, True, True)
        torch.library.opcheck(torch.ops.dcn_plugin.deform_roi_align_backward, args)


def test_autocast_keeps_the_rois(device):
    tensors = {n: t.requires_grad_() for n, t in make(torch.float32, device).items()}
    rois = ROIS.to(device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        output = deform_roi_align(tensors["input"], rois, tensors["offset"], mask=tensors["mask"], **OPTIONS)
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in tensors.values())
    rounded = {n: t.detach().bfloat16() for n, t in tensors.items()}
    expected = deform_roi_align(rounded["input"], rois, rounded["offset"], mask=rounded["mask"], **OPTIONS)
    assert torch.equal(output, expected)


def test_compile(device):
    tensors = make(torch.float32, device)
    function = with_rois(deform_roi_align, ROIS)
    torch._dynamo.reset()
    output, gradients = run(torch.compile(function, fullgraph=True, backend="aot_eager"), tensors, **OPTIONS)
    expected, expected_gradients = run(function, tensors, **OPTIONS)
    assert torch.equal(output, expected)
    for name, gradient in gradients.items():
        assert_repeats(gradient, expected_gradients[name])


def _change(**changes):
    return lambda t: {**t, **{name: change(t[name]) for name, change in changes.items()}}


ERRORS = {
    "input-rank": (_change(input=lambda t: t[0]), {}, r"input must have shape \(N, C, H, W\), got \(5, 11, 13\)"),
    "rois-rank": (_change(rois=lambda t: t[0]), {}, r"rois must have shape \(K, 5\), got \(5,\)"),
    "input-empty": (_change(input=lambda t: t[:, :0]), {}, r"at least one channel and one pixel, .* \(2, 0, 11, 13\)"),
    "rois-columns": (_change(rois=lambda t: t[:, :4]), {}, r"rois must have shape \(K, 5\).* got \(6, 4\)"),
    "rois-dtype": (_change(rois=lambda t: t.long()), {}, "rois must be float32.* got Long"),
    "offset-size": (_change(offset=lambda t: t[..., 1:]), {}, r"offset .* \(6, 2, 3, 4\), got \(6, 2, 3, 3\)"),
    "offset-rois": (_change(offset=lambda t: t[1:]), {}, r"offset .* \(6, 2, 3, 4\), got \(5, 2, 3, 4\)"),
    "mask-size": (_change(mask=lambda t: t[:, 0]), {}, r"mask .* \(6, 1, 3, 4\), got \(6, 3, 4\)"),
    "offset-dtype": (_change(offset=lambda t: t.double()), {}, "offset must have input's dtype Float, got Double"),
    "mask-dtype": (_change(mask=lambda t: t.half()), {}, "mask must have input's dtype Float, got Half"),
    "output-size": (_change(), dict(output_size=0), "output_size must be two positive integers"),
    "output-size-type": (_change(), dict(output_size=(1, 2, 3)), "output_size must be an integer or two integers"),
}


@pytest.mark.parametrize(("change", "options", "message"), ERRORS.values(), ids=ERRORS)
def test_errors_name_the_argument_and_the_shapes(change, options, message, device):
    tensors = change({**make(torch.float32, device), "rois": ROIS.to(device)})
    with pytest.raises((RuntimeError, ValueError), match=message):
        deform_roi_align(**tensors, **{**OPTIONS, **options})


@pytest.mark.parametrize("index", [-1.0, 2.0, float("nan")], ids=str)
def test_batch_index_out_of_range(index, device):
    rois = ROIS.clone().to(device)
    rois[2, 0] = index
    tensors = make(torch.float32, device)
    if device.type == "cpu":
        with pytest.raises(RuntimeError, match=r"rois\[2, 0\] = .* is not an index into a batch of 2 images"):
            deform_roi_align(rois=rois, **tensors, **OPTIONS)
    else:  # looking would stall the stream
        assert not deform_roi_align(rois=rois, **tensors, **OPTIONS)[2].any()


@pytest.mark.parametrize("name", ["rois", "offset", "mask"])
def test_mixed_devices(name, device):
    tensors = {**make(torch.float32, device), "rois": ROIS.to(device)}
    tensors[name] = tensors[name].to("meta")
    with pytest.raises(RuntimeError, match=f"{name} must be on input's device"):
        deform_roi_align(**tensors, **OPTIONS)
