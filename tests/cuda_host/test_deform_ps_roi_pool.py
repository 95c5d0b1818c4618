"""deform_ps_roi_pool's CUDA kernels on the host, compared with the reference in float64."""

import math

import pytest
import torch

from dcn_plugin.ops import reference

from .test_deform_conv2d import DTYPES, assert_close, assert_gradients_close, in_double
from .test_deform_roi_align import check_operator

ROIS = torch.tensor(
    [
        [0, 5.0, 6.0, 31.0, 20.0],
        [1, -20.0, -10.0, 60.0, 50.0],  # over every edge
        [1, 9.0, 9.0, 9.0, 9.0],  # one pixel of the image
        [0, 21.0, 20.0, 7.0, 9.0],  # inside out
        [0, 500.0, 500.0, 600.0, 600.0],  # outside
    ],
    dtype=torch.float64,
)
# output_dim, classes (0: no offset), output_size, group_size, part_size, samples
CASES = {
    "a map for each bin": (4, 1, (2, 3), (2, 3), (2, 3), 2),
    "no offset": (3, 0, (2, 3), (2, 3), (2, 3), 3),
    "one map": (40, 1, (2, 2), (1, 1), (2, 2), 1),  # more than a warp of channels
    "a class a channel": (3, 3, (2, 3), (2, 3), (2, 3), 4),
    "fewer maps and offsets than bins": (6, 2, (5, 7), (2, 3), (3, 2), 2),
    "more maps and offsets than bins": (2, 2, (2, 2), (3, 4), (5, 3), 2),
}


def make(case, dtype, channels_last):
    output_dim, classes, output_size, group_size, part_size, samples = case
    generator = torch.Generator().manual_seed(output_dim)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format

    def random(*size):
        t = torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)
        return t.contiguous(memory_format=memory_format)

    input = random(2, output_dim * group_size[0] * group_size[1], 9, 11)
    offset = random(len(ROIS), 2 * classes, *part_size) if classes else None
    options = [list(output_size), list(group_size), list(part_size), samples, 0.25, 0.1]
    return input, ROIS.clone(), offset, options, random(len(ROIS), output_dim, *output_size)


def truth(input, rois, offset, options, grad_output):
    def function(input, offset):
        return reference.deform_ps_roi_pool(input, rois, offset, *options)

    return in_double(function, (input, offset), grad_output)


def check(cuda_host, *case, **how):
    *tensors, options, grad_output = case
    return check_operator(cuda_host, "deform_ps_roi_pool", truth(*case), tensors, options, grad_output, **how)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_cases(cuda_host, name, channels_last):
    check(cuda_host, *make(CASES[name], torch.float32, channels_last))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(cuda_host, dtype, channels_last):
    check(cuda_host, *make(CASES["a map for each bin"], dtype, channels_last), order=11)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", ["one map", "fewer maps and offsets than bins", "more maps and offsets than bins"])
def test_deterministic(cuda_host, name, channels_last):
    case = make(CASES[name], torch.float32, channels_last)
    first, second = (check(cuda_host, *case, deterministic=True, order=order) for order in (1, 5))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("channels_last", [False, True])
def test_batch_index_out_of_range_gives_zeros(cuda_host, channels_last):
    input, rois, offset, options, grad_output = make(CASES["a map for each bin"], torch.float32, channels_last)
    bad = [0, 1, 3]
    strange = rois.clone()
    strange[bad, 0] = torch.tensor([2.0, -1.0, math.nan], dtype=rois.dtype)
    kept = grad_output.clone()
    kept[bad] = 0
    output, grads = truth(input, rois, offset, options, kept)
    output[bad] = 0
    assert_close(cuda_host("deform_ps_roi_pool", input, strange, offset, *options), output, input.dtype, "output")
    for deterministic in (False, True):
        actual = cuda_host(
            *("deform_ps_roi_pool_backward", grad_output, input, strange, offset, *options, True, True, deterministic)
        )
        assert_gradients_close(actual, grads, input.dtype)


@pytest.mark.parametrize("deterministic", [False, True])
def test_wild_values(cuda_host, deterministic):
    input, rois, offset, options, grad_output = make(CASES["a map for each bin"], torch.float32, False)
    rois[0, 2], rois[1, 3], rois[2, 1] = math.nan, math.inf, -1e30
    offset[3, 0, 0], offset[3, 1, 1, 0], offset[4, 0], offset[4, 1] = math.nan, 1e30, math.inf, -math.inf
    output = cuda_host("deform_ps_roi_pool", input, rois, offset, *options)
    grads = cuda_host(
        *("deform_ps_roi_pool_backward", grad_output, input, rois, offset, *options, True, True, deterministic)
    )
    assert output.isfinite().all()
    assert not output[:3].any()
    assert all(g.isfinite().all() for g in grads)


def test_no_rois(cuda_host):
    input, rois, offset, options, grad_output = make(CASES["a map for each bin"], torch.bfloat16, True)
    output = cuda_host("deform_ps_roi_pool", input, rois[:0], offset[:0], *options)
    assert output.shape == (0, *grad_output.shape[1:])
    grads = cuda_host("deform_ps_roi_pool_backward", grad_output[:0], input, rois[:0], offset[:0], *options, True, True)
    assert [g.shape for g in grads] == [input.shape, offset[:0].shape]
    assert not grads[0].any()


def test_empty_batch(cuda_host):
    input, rois, offset, options, grad_output = make(CASES["a map for each bin"], torch.float32, False)
    assert not cuda_host("deform_ps_roi_pool", input[:0], rois, offset, *options).any()
    grads = cuda_host("deform_ps_roi_pool_backward", grad_output, input[:0], rois, offset, *options, True, True)
    assert [g.shape for g in grads] == [input[:0].shape, offset.shape]
    assert not grads[1].any()


@pytest.mark.parametrize("needs", [(True, False), (False, True)])
@pytest.mark.parametrize("deterministic", [False, True])
def test_single_gradients(cuda_host, needs, deterministic):
    input, rois, offset, options, grad_output = make(CASES["a map for each bin"], torch.float16, True)
    _, grads = truth(input, rois, offset, options, grad_output)
    actual = cuda_host("deform_ps_roi_pool_backward", grad_output, input, rois, offset, *options, *needs, deterministic)
    expected = [grad if need else None for grad, need in zip(grads, needs, strict=True)]
    assert_gradients_close(actual, expected, torch.float16)


def test_errors_name_the_argument(cuda_host):
    input, rois, offset, options, _ = make(CASES["a map for each bin"], torch.float32, False)
    with pytest.raises(RuntimeError, match=r"offset must have shape .* got \(5, 2, 1, 3\)"):
        cuda_host("deform_ps_roi_pool", input, rois, offset[:, :, 1:], *options)
    with pytest.raises(RuntimeError, match="sample_per_part is too large for CUDA, got 100000"):
        cuda_host("deform_ps_roi_pool", input, rois, offset, *options[:3], 100000, *options[4:])
