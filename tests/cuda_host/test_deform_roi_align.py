"""deform_roi_align's CUDA kernels on the host, compared with the reference in float64."""

import math

import pytest
import torch

from dcn_plugin.ops import reference

from .test_deform_conv2d import DTYPES, assert_close, assert_gradients_close, in_double, layout

ROIS = torch.tensor(
    [
        [0, 1.0, 2.0, 20.0, 17.0],
        [1, -8.0, -9.0, 6.0, 5.0],  # over the edge
        [1, 3.0, 3.0, 3.0, 3.0],  # empty
        [0, 10.0, 12.0, 4.0, 6.0],  # backwards
        [1, 2.5, 0.5, 300.0, 19.0],  # far over the edge
        [0, 500.0, 500.0, 600.0, 600.0],  # outside
        [1, 0.0, 0.0, 27.0, 21.0],
    ],
    dtype=torch.float64,
)
# batch, channels, height, width, (oh, ow), sampling_ratio, offset?, mask?
CASES = {
    "v2": (2, 8, 11, 14, (3, 2), 2, True, True),
    "v1": (2, 8, 11, 14, (3, 2), 2, True, False),
    "adaptive": (2, 16, 11, 14, (2, 3), 0, True, True),
    "plain": (2, 5, 11, 14, (7, 7), 2, False, False),
    "many channels": (2, 70, 5, 6, (1, 2), 1, False, True),
}


def make(case, dtype, channels_last):
    n, c, h, w, (oh, ow), sampling_ratio, has_offset, has_mask = case
    generator = torch.Generator().manual_seed(c)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format

    def random(*size):
        t = torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)
        return t.contiguous(memory_format=memory_format)

    k = len(ROIS)
    input, grad_output = random(n, c, h, w), random(k, c, oh, ow)
    offset = random(k, 2, oh, ow) if has_offset else None
    mask = random(k, 1, oh, ow) if has_mask else None
    return input, ROIS.clone(), offset, mask, [[oh, ow], 0.5, sampling_ratio, 0.3], grad_output


def truth(input, rois, offset, mask, options, grad_output):
    def function(input, offset, mask):
        return reference.deform_roi_align(input, rois, offset, *options, mask)

    return in_double(function, (input, offset, mask), grad_output)


def check_operator(cuda_host, name, expected, tensors, options, grad_output, deterministic=False, order=0):
    """Of either RoI operator; tensors are input, rois and those that may be absent."""
    input, (output, grads) = tensors[0], expected
    actual = cuda_host(name, *tensors, *options, order=order)
    assert_close(actual, output, input.dtype, "output")
    actual_grads = cuda_host(
        f"{name}_backward", grad_output, *tensors, *options, True, True, deterministic, order=order
    )
    assert_gradients_close(actual_grads, grads, input.dtype)
    assert actual.is_contiguous(memory_format=layout(input))
    assert actual_grads[0].is_contiguous(memory_format=layout(input))
    return actual_grads


def check(cuda_host, *case, **how):
    *tensors, options, grad_output = case
    return check_operator(cuda_host, "deform_roi_align", truth(*case), tensors, options, grad_output, **how)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_cases(cuda_host, name, channels_last):
    check(cuda_host, *make(CASES[name], torch.float32, channels_last))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(cuda_host, dtype, channels_last):
    check(cuda_host, *make(CASES["v2"], dtype, channels_last), order=11)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", ["adaptive", "many channels"])
def test_deterministic(cuda_host, name, channels_last):
    case = make(CASES[name], torch.float32, channels_last)
    results = [check(cuda_host, *case, deterministic=True, order=order) for order in (1, 5)]
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("channels_last", [False, True])
def test_batch_index_out_of_range_gives_zeros(cuda_host, channels_last):
    input, rois, offset, mask, options, grad_output = make(CASES["v2"], torch.float32, channels_last)
    bad = [1, 3, 4]
    strange = rois.clone()
    strange[bad, 0] = torch.tensor([2.0, -1.0, math.nan], dtype=rois.dtype)
    kept = grad_output.clone()
    kept[bad] = 0
    output, grads = truth(input, rois, offset, mask, options, kept)
    output[bad] = 0
    assert_close(cuda_host("deform_roi_align", input, strange, offset, mask, *options), output, input.dtype, "output")
    for deterministic in (False, True):
        actual = cuda_host(
            *("deform_roi_align_backward", grad_output, input, strange, offset, mask),
            *(*options, True, True, deterministic),
        )
        assert_gradients_close(actual, grads, input.dtype)


@pytest.mark.parametrize("channels_last", [False, True])
def test_wild_values(cuda_host, channels_last):
    input, rois, offset, mask, options, grad_output = make(CASES["adaptive"], torch.float32, channels_last)
    rois[0, 2], rois[1, 3], rois[2, 1], rois[3, 4] = math.nan, math.inf, -1e30, 1e30
    offset[4, 0], offset[5, 1], offset[6, :, 0], offset[6, :, 1] = math.nan, math.inf, -math.inf, 1e30
    actual = cuda_host("deform_roi_align", input, rois, offset, mask, *options)
    grads = cuda_host("deform_roi_align_backward", grad_output, input, rois, offset, mask, *options, True, True)
    assert actual.isfinite().all()
    assert grads[0].isfinite().all()


def test_no_rois(cuda_host):
    input, rois, offset, mask, options, grad_output = make(CASES["v2"], torch.bfloat16, True)
    none = (rois[:0], offset[:0], mask[:0])
    output = cuda_host("deform_roi_align", input, *none, *options)
    assert output.shape == (0, *grad_output.shape[1:])
    grads = cuda_host("deform_roi_align_backward", grad_output[:0], input, *none, *options, True, True)
    assert [g.shape for g in grads] == [input.shape, none[1].shape, none[2].shape]
    assert not grads[0].any()


def test_empty_batch(cuda_host):
    input, rois, offset, mask, options, grad_output = make(CASES["v2"], torch.float32, False)
    assert not cuda_host("deform_roi_align", input[:0], rois, offset, mask, *options).any()
    grads = cuda_host("deform_roi_align_backward", grad_output, input[:0], rois, offset, mask, *options, True, True)
    assert [g.shape for g in grads] == [input[:0].shape, offset.shape, mask.shape]


@pytest.mark.parametrize("needs", [(True, False), (False, True)])
@pytest.mark.parametrize("deterministic", [False, True])
def test_single_gradients(cuda_host, needs, deterministic):
    input, rois, offset, mask, options, grad_output = make(CASES["v2"], torch.float16, True)
    _, grads = truth(input, rois, offset, mask, options, grad_output)
    actual = cuda_host(
        *("deform_roi_align_backward", grad_output, input, rois, offset, mask, *options, *needs, deterministic)
    )
    needed = (needs[0], needs[1], needs[1])
    expected = [grad if need else None for grad, need in zip(grads, needed, strict=True)]
    assert_gradients_close(actual, expected, torch.float16)
