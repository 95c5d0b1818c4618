"""deform_conv2d's fused kernels (float16, bfloat16, channels last) on the host, compared with the reference in float64.

The operator's rule chooses them; build.py has the rule want two blocks a launch, so that an output of more than a
tile of rows takes the large tiles, and a smaller one the small.

Tolerances, of the norm, are test_deform_conv2d's: a sample is rounded to the dtype before it is multiplied, which errs
by half a unit in the last place, 2^-11 for float16 and 2^-8 for bfloat16, at random; sums are float32. TF32 has
float16's bits behind the point.
"""

import math

import pytest
import torch

from .test_deform_conv2d import assert_close, check, check_some_gradients, make, truth

# As in test_deform_conv2d: batch, channels, height, width, out_channels, kernel, stride, padding, dilation, groups,
# deform_groups, v2.
SHAPES = {
    "one vector": (2, 8, 5, 6, 8, (3, 3), 1, 1, 1, 1, 1, True),
    "v1": (1, 16, 5, 9, 16, (3, 3), 1, 1, 1, 1, 1, False),
    "ragged slab": (2, 40, 3, 5, 24, (3, 3), 1, 1, 1, 1, 1, True),
    "whole slab": (1, 64, 4, 5, 8, (3, 3), 1, 1, 1, 1, 1, True),
    "slabs and a rest": (1, 136, 3, 4, 8, (2, 2), 1, 1, 1, 1, 1, True),
    "small tile": (1, 8, 4, 4, 72, (3, 3), 1, 1, 1, 1, 1, True),
    "square tile": (1, 8, 13, 12, 72, (1, 2), 1, 0, 1, 1, 1, True),
    "wide tile": (1, 8, 12, 12, 136, (1, 1), 1, 0, 1, 1, 1, True),
    "low wide tile": (1, 8, 9, 9, 136, (1, 1), 1, 0, 1, 1, 1, True),
    "two wide tiles": (1, 8, 9, 9, 264, (1, 1), 1, 0, 1, 1, 1, False),
    "groups": (2, 16, 5, 5, 16, (3, 3), 1, 1, 1, 2, 1, True),
    "deform groups": (1, 32, 5, 5, 8, (3, 3), 1, 1, 1, 1, 4, True),
    "both, indivisible": (1, 48, 5, 7, 24, (3, 3), 1, 1, 1, 3, 2, True),
    "deform groups of whole slabs": (1, 128, 3, 3, 8, (1, 2), 1, 1, 1, 1, 2, True),
    "stride and dilation": (1, 8, 11, 9, 8, (3, 2), (2, 3), (1, 0), (1, 2), 1, 1, True),
    "big kernel": (1, 8, 4, 5, 8, (5, 7), 1, 3, 1, 1, 1, False),
    "several strips, tiles and launches": (2, 16, 19, 11, 8, (2, 2), 1, 0, 1, 1, 1, True),
    "several parts of rows": (2, 8, 23, 23, 8, (1, 1), 1, 0, 1, 1, 1, True),
    "depthwise": (2, 24, 6, 5, 24, (3, 3), 1, 1, 1, 24, 1, True),
    "depthwise, slabs and tiles": (2, 72, 10, 10, 72, (2, 2), 1, 1, 1, 72, 3, False),
    "depthwise, whole slab": (1, 64, 5, 5, 64, (3, 3), 2, 1, 1, 64, 1, True),
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes(cuda_host, name):
    # One dtype and order of threads for each checker.
    dtype, order = {"address": (torch.bfloat16, 0), "race": (torch.float16, 3)}[cuda_host.checker]
    check(cuda_host, *make(SHAPES[name], dtype, True), order=order)


def test_depthwise_slabs_in_turn(cuda_host):
    """Tiles of rows are so many that each block of the forward takes all slabs of channels."""
    check(cuda_host, *make((2, 136, 17, 17, 136, (2, 2), 1, 0, 1, 136, 1, True), torch.bfloat16, True))


@pytest.mark.parametrize("name", ["both, indivisible", "depthwise"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_wild_offsets(cuda_host, name, dtype):
    tensors, geometry, grad_output = make(SHAPES[name], dtype, True, spread=6.0)
    offset = tensors[1]
    wild = torch.tensor([math.nan, math.inf, -math.inf, 6e4, -6e4, 3e9, -3e9, 1e4]).to(dtype)
    picked = torch.rand(offset.shape, generator=torch.Generator().manual_seed(0)) < 0.3
    offset[picked] = wild.repeat(offset.numel() // len(wild) + 1)[: int(picked.sum())]
    output, grads = check(cuda_host, tensors, geometry, grad_output)
    assert all(t.isfinite().all() for t in (output, *grads))


@pytest.mark.parametrize("name", ["ragged slab", "depthwise"])
def test_lattice_offsets(cuda_host, name):
    # Samples exactly on pixels, and with padding exactly one outside of the map, where gradients are zero.
    tensors, geometry, grad_output = make(SHAPES[name], torch.float16, True)
    tensors[1] = tensors[1].round()
    check(cuda_host, tensors, geometry, grad_output)


def test_outside_is_zero_whatever_the_map_holds(cuda_host):
    # An infinite pixel must not leak, as 0 * inf, into samples that do not touch it.
    tensors, geometry, _ = make(SHAPES["one vector"], torch.float16, True)
    tensors[1].fill_(100.0)
    tensors[0].fill_(math.inf)
    output = cuda_host("deform_conv2d", *tensors, *geometry)
    assert torch.equal(output, tensors[3].view(1, -1, 1, 1).expand_as(output))


def test_mixed_layouts(cuda_host):
    tensors, geometry, grad_output = make(SHAPES["deform groups"], torch.bfloat16, True, bias=False)
    tensors[1] = tensors[1].contiguous()
    tensors[2] = tensors[2].contiguous()
    check(cuda_host, tensors, geometry, grad_output.contiguous())


NEEDS = [(True, False, False), (False, True, False), (False, False, True), (True, True, False), (False, True, True)]


@pytest.mark.parametrize("needs", NEEDS)
@pytest.mark.parametrize("name", ["groups", "depthwise", "depthwise, slabs and tiles"])
def test_some_gradients(cuda_host, name, needs):
    tensors, geometry, grad_output = make(SHAPES[name], torch.float16, True)
    check_some_gradients(cuda_host, tensors, geometry, grad_output, needs)


@pytest.mark.parametrize("name", ["several parts of rows", "depthwise"])
def test_repeatable_without_grad_input(cuda_host, name):
    # Only grad_input is summed by atomics: deterministic or not, the fused kernels make the others.
    tensors, geometry, grad_output = make(SHAPES[name], torch.float16, True)
    input, offset, weight, _, mask = tensors
    results = [
        cuda_host(
            *("deform_conv2d_backward", grad_output, input, offset, weight, mask, *geometry, False, True, True, True),
            order=order,
        )
        for order in (0, 1, 5)
    ]
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize(
    "name",
    ["one vector", "ragged slab", "square tile", "wide tile", "low wide tile", "both, indivisible"]
    + ["stride and dilation", "v1"],
)
def test_tf32(cuda_host, name, channels_last):
    tensors, geometry, grad_output = make(SHAPES[name], torch.float32, channels_last)
    expected, _ = truth(tensors, geometry, grad_output)
    output = cuda_host("deform_conv2d", *tensors, *geometry, True, order=3)
    error = torch.linalg.vector_norm(output - expected) / torch.linalg.vector_norm(expected)
    assert output.dtype == torch.float32
    assert 2e-5 < error < 5e-4  # operands are rounded: by 2^-12 on average, one of them and then the other
    strict = cuda_host("deform_conv2d", *tensors, *geometry)
    assert_close(strict, expected, torch.float32, name)


def test_tf32_rule(cuda_host):
    """A sample of 1 + 2^-12 is 1 in TF32."""

    def rounds(allow_tf32, channels=4, out_channels=4, groups=1, dtype=torch.float32, fused=True):
        input = torch.full((1, channels, 4, 4), 1 + 2.0**-12, dtype=dtype)
        weight = torch.ones(out_channels, channels // groups, 1, 1, dtype=dtype)
        offset = torch.zeros(1, 2, 4, 4, dtype=dtype)
        geometry = [1, 1], [0, 0], [1, 1]
        output = cuda_host("deform_conv2d", input, offset, weight, None, None, *geometry, allow_tf32, fused=fused)
        assert output.unique().numel() == 1
        return bool(output[0, 0, 0, 0] == channels // groups)

    assert rounds(True)
    assert rounds(True, channels=24, out_channels=16, groups=2)
    assert not rounds(False)
    assert not rounds(True, channels=6)
    assert not rounds(True, out_channels=6)
    assert not rounds(True, channels=8, out_channels=8, groups=8)
    assert not rounds(True, dtype=torch.float64)
    assert not rounds(True, fused=False)


def took_fused(cuda_host, dtype=torch.bfloat16, channels=8, out_channels=8, groups=1, deform_groups=1, **options):
    """Whether the fused kernels ran: they round once, columns round the product, then the product plus bias."""
    ulp = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}[dtype]
    memory_format = options.pop("memory_format", torch.channels_last)
    input = torch.zeros(1, channels, 4, 4, dtype=dtype)
    step = channels // groups
    input[:, ::step], input[:, 1::step] = 1.0, ulp / 2
    input = input.contiguous(memory_format=memory_format)
    weight = torch.ones(out_channels, step, 1, 1, dtype=dtype)
    offset = torch.zeros(1, 2 * deform_groups, 4, 4, dtype=dtype)
    bias = torch.full((out_channels,), ulp / 2, dtype=dtype)
    output = cuda_host("deform_conv2d", input, offset, weight, bias, None, [1, 1], [0, 0], [1, 1], **options)
    rounded_once = bool((output == 1 + ulp).all())
    assert rounded_once or (output == 1).all()
    return rounded_once


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rule(cuda_host, dtype):
    assert took_fused(cuda_host, dtype)
    assert took_fused(cuda_host, dtype, memory_format=torch.contiguous_format)
    assert took_fused(cuda_host, dtype, channels=48, out_channels=24, groups=3, deform_groups=2)
    # Vectors of eight channels do not fit ...
    assert not took_fused(cuda_host, dtype, channels=12)
    assert not took_fused(cuda_host, dtype, out_channels=12)
    assert not took_fused(cuda_host, dtype, channels=24, out_channels=24, groups=2)
    assert not took_fused(cuda_host, dtype, channels=24, deform_groups=2)
    # ... and here the table of samples does not fit in shared memory, or columns are asked for.
    assert not took_fused(cuda_host, dtype, channels=2048, deform_groups=256)
    assert not took_fused(cuda_host, dtype, fused=False)


@pytest.mark.parametrize(("out_channels", "deterministic", "fused"), [(8, False, True), (8, True, False), (4096, 0, 0)])
def test_backward_rule(cuda_host, out_channels, deterministic, fused):
    """Columns round the columns' gradient to the dtype, so only what they made has their bits."""
    shape = (1, 8, 3, 3, out_channels, (2, 2), 1, 0, 1, 1, 1, True)
    (input, offset, weight, _, mask), geometry, grad_output = make(shape, torch.bfloat16, True)
    arguments = (grad_output, input, offset, weight, mask, *geometry, True, True, True, bool(deterministic))
    by_rule, by_columns = (cuda_host("deform_conv2d_backward", *arguments, fused=allowed) for allowed in (True, False))
    assert torch.equal(by_rule[1], by_columns[1]) == (not fused)
