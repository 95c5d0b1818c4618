"""Which kernels run on GPUs with less shared memory than a Hopper's 227 KiB a block, and what they compute there."""

from functools import partial

import pytest
import torch

from .test_deform_conv2d import SHAPES, check, make
from .test_deform_conv2d_fused import SHAPES as FUSED_SHAPES
from .test_deform_conv2d_fused import took_fused

TURING, CONSUMER, AMPERE = 64, 99, 163  # KiB: compute capability 7.5; 8.6, 8.9, 12.0; 8.0


def backward_took_fused(cuda_host, shape):
    """Columns round the columns' gradient to the dtype, so only what they made has their bits."""
    (input, offset, weight, _, mask), geometry, grad_output = make(shape, torch.bfloat16, True)
    arguments = ("deform_conv2d_backward", grad_output, input, offset, weight, mask, *geometry, True, True, True, False)
    by_rule, by_columns = cuda_host(*arguments), cuda_host(*arguments, fused=False)
    return not torch.equal(by_rule[1], by_columns[1])


def shape_of(channels, out_channels, kernel=(3, 3), size=3):
    return (1, channels, size, size, out_channels, kernel, 1, 1, 1, 1, 1, True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_turing_takes_columns(cuda_host, dtype):
    """Compute capability 7.5 lacks the instructions of the fused kernels, however small the shape."""
    turing = partial(cuda_host, shared_kib=TURING)
    assert not took_fused(turing, dtype)
    assert took_fused(partial(cuda_host, shared_kib=CONSUMER), dtype)
    for name in ("v1", "depthwise"):
        check(turing, *make(FUSED_SHAPES[name], dtype, True))


def test_turing_takes_columns_backward(cuda_host):
    for name in ("one vector", "depthwise"):
        assert not backward_took_fused(partial(cuda_host, shared_kib=TURING), FUSED_SHAPES[name])
        assert backward_took_fused(partial(cuda_host, shared_kib=CONSUMER), FUSED_SHAPES[name])


def test_turing_rounds_nothing_to_tf32(cuda_host):
    input, offset = torch.full((1, 8, 4, 4), 1 + 2.0**-12), torch.zeros(1, 2, 4, 4)
    arguments = ("deform_conv2d", input, offset, torch.ones(8, 8, 1, 1), None, None, [1, 1], [0, 0], [1, 1], True)
    assert (cuda_host(*arguments, shared_kib=CONSUMER) == 8).all()
    assert (cuda_host(*arguments, shared_kib=TURING) > 8).all()


@pytest.mark.parametrize("stage", [128, 256, 512])
@pytest.mark.parametrize("shared_kib", [CONSUMER, AMPERE])
def test_stages_of_resnet_take_the_fused_backward(cuda_host, shared_kib, stage):
    """All of a stage's output channels, on a map that is as small as the shim is slow."""
    assert backward_took_fused(partial(cuda_host, shared_kib=shared_kib), shape_of(8, stage, size=2))


@pytest.mark.parametrize("shared_kib", [CONSUMER, AMPERE])
@pytest.mark.parametrize(
    "shape",
    [
        shape_of(8, 264, kernel=(1, 1), size=9),  # the forward's and grad_weight's widest tiles, twice
        shape_of(72, 136, kernel=(2, 2)),  # chunks and slices in turn, and a rest of each
        (1, 32, 5, 5, 272, (1, 2), 1, 1, 1, 2, 2, True),  # slices of each group
        (1, 8, 3, 3, 520, (3, 3), 1, 1, 1, 1, 1, True),  # few rows
    ],
)
def test_large_tiles(cuda_host, shape, shared_kib):
    device = partial(cuda_host, shared_kib=shared_kib)
    dtype, order = {"address": (torch.bfloat16, 0), "race": (torch.float16, 3)}[cuda_host.checker]
    assert backward_took_fused(device, shape)
    check(device, *make(shape, dtype, True), order=order)


def test_columns_do_not_ask_for_more(cuda_host):
    check(partial(cuda_host, shared_kib=48), *make(SHAPES["plain"], torch.float16, True))
