"""deform_conv2d's CUDA kernels on the host, compared with the reference in float64."""

import math

import pytest
import torch

from dcn_plugin.ops import reference

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
DTYPES = list(TOLERANCE)

# name: batch, channels, height, width, out_channels, kernel, stride, padding, dilation, groups, deform_groups, v2
# Together: partial tiles of rows and slots, partial warps, vectors and single channels, chunks of several images, of
# one and of parts of one.
SHAPES = {
    "plain": (2, 8, 7, 6, 5, (3, 3), 1, 1, 1, 1, 1, True),
    "v1": (3, 16, 5, 4, 8, (3, 3), 1, 1, 1, 1, 1, False),
    "odd channels": (1, 5, 6, 9, 3, (3, 3), 1, 1, 1, 1, 1, True),
    "groups": (2, 16, 5, 5, 6, (3, 3), 1, 1, 1, 2, 1, True),
    "deform groups": (2, 16, 5, 5, 4, (3, 3), 1, 1, 1, 1, 2, True),
    "both, indivisible": (1, 12, 5, 7, 6, (3, 3), 1, 1, 1, 3, 2, True),
    "depthwise": (2, 6, 6, 5, 6, (3, 3), 1, 1, 1, 6, 1, True),
    "depthwise, two each": (2, 8, 6, 5, 16, (3, 3), 1, 1, 1, 8, 2, True),
    "stride": (1, 4, 11, 9, 4, (3, 2), (2, 3), (1, 0), (1, 2), 1, 1, True),
    "pointwise": (3, 40, 3, 4, 2, (1, 1), 1, 0, 1, 1, 1, True),
    "big kernel": (1, 4, 4, 5, 2, (5, 7), 1, 3, 1, 1, 1, False),
    "many positions": (1, 8, 13, 17, 2, (3, 3), 1, 1, 1, 1, 1, True),
}


def make(shape, dtype, channels_last, spread=2.0, bias=True):
    n, c, h, w, co, (kh, kw), stride, padding, dilation, groups, dg, v2 = shape
    stride, padding, dilation = (v if isinstance(v, tuple) else (v, v) for v in (stride, padding, dilation))
    ho = (h + 2 * padding[0] - dilation[0] * (kh - 1) - 1) // stride[0] + 1
    wo = (w + 2 * padding[1] - dilation[1] * (kw - 1) - 1) // stride[1] + 1
    generator = torch.Generator().manual_seed(hash(shape) % 1000)

    def random(*size):
        t = torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)
        return t.contiguous(memory_format=torch.channels_last) if channels_last and len(size) == 4 else t

    tensors = [
        random(n, c, h, w),
        random(n, 2 * dg * kh * kw, ho, wo) * spread,
        random(co, c // groups, kh, kw),
        random(co) if bias else None,
        random(n, dg * kh * kw, ho, wo) if v2 else None,
    ]
    return tensors, [list(stride), list(padding), list(dilation)], random(n, co, ho, wo)


def in_double(function, tensors, grad_output):
    """The function's value and its gradients in float64; None for an absent tensor's."""
    leaves = [t.detach().double().requires_grad_() if t is not None else None for t in tensors]
    output = function(*leaves)
    output.backward(grad_output.double())
    return output.detach(), [leaf.grad if leaf is not None else None for leaf in leaves]


def truth(tensors, geometry, grad_output):
    output, (input, offset, weight, _, mask) = in_double(
        lambda input, offset, weight, bias, mask: reference.deform_conv2d(input, offset, weight, bias, *geometry, mask),
        tensors,
        grad_output,
    )
    return output, [input, offset, mask, weight]


def assert_close(actual, expected, dtype, name):
    assert actual.dtype == dtype and actual.shape == expected.shape, name
    difference = torch.linalg.vector_norm(actual.double() - expected)
    assert difference <= TOLERANCE[dtype] * torch.linalg.vector_norm(expected), (
        name,
        difference / torch.linalg.vector_norm(expected),
    )


def assert_gradients_close(actual, expected, dtype):
    """None is expected of what is not needed."""
    for i, (got, want) in enumerate(zip(actual, expected, strict=True)):
        if want is None:
            assert got.numel() == 0
        else:
            assert_close(got, want, dtype, f"gradient {i}")


def check(cuda_host, tensors, geometry, grad_output, deterministic=False, order=0):
    dtype = tensors[0].dtype
    output, grads = truth(tensors, geometry, grad_output)
    actual = cuda_host("deform_conv2d", *tensors, *geometry, order=order)
    assert_close(actual, output, dtype, "output")
    input, offset, weight, _, mask = tensors
    actual_grads = cuda_host(
        "deform_conv2d_backward",
        *(grad_output, input, offset, weight, mask, *geometry, True, True, True, deterministic),
        order=order,
    )
    assert_gradients_close(actual_grads, grads, dtype)
    for got, like in ((actual, input), (actual_grads[0], input), (actual_grads[3], weight)):
        assert got.is_contiguous(memory_format=layout(like))
    return actual, actual_grads


def check_some_gradients(cuda_host, tensors, geometry, grad_output, needs, deterministic=False):
    input, offset, weight, _, mask = tensors
    _, grads = truth(tensors, geometry, grad_output)
    actual = cuda_host(
        "deform_conv2d_backward", grad_output, input, offset, weight, mask, *geometry, *needs, deterministic
    )
    needed = (needs[0], needs[1], needs[1], needs[2])
    expected = [grad if need else None for grad, need in zip(grads, needed, strict=True)]
    assert_gradients_close(actual, expected, input.dtype)


def layout(t):
    last = t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_shapes(cuda_host, name, channels_last):
    check(cuda_host, *make(SHAPES[name], torch.float32, channels_last))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(cuda_host, dtype, channels_last):
    check(cuda_host, *make(SHAPES["deform groups"], dtype, channels_last), order=11)


@pytest.mark.parametrize("name", ["both, indivisible", "many positions", "depthwise"])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_deterministic(cuda_host, name, dtype, channels_last):
    case = make(SHAPES[name], dtype, channels_last)
    results = [check(cuda_host, *case, deterministic=True, order=order)[1] for order in (1, 5)]
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("channels_last", [False, True])
def test_wild_offsets(cuda_host, channels_last):
    tensors, geometry, grad_output = make(SHAPES["deform groups"], torch.float32, channels_last)
    offset = tensors[1]
    wild = torch.tensor([math.nan, math.inf, -math.inf, 1e30, -1e30, 3e9, -3e9, 1e4])
    picked = torch.rand(offset.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    offset[picked] = wild.repeat(offset.numel() // len(wild) + 1)[: int(picked.sum())]
    output, grads = check(cuda_host, tensors, geometry, grad_output)
    check(cuda_host, tensors, geometry, grad_output, deterministic=True)
    assert all(t.isfinite().all() for t in (output, *grads))


@pytest.mark.parametrize("channels_last", [False, True])
def test_lattice_offsets(cuda_host, channels_last):
    # Samples exactly on pixels, and with padding exactly one outside of the map, where gradients are zero.
    tensors, geometry, grad_output = make(SHAPES["plain"], torch.float64, channels_last)
    tensors[1] = tensors[1].round()
    check(cuda_host, tensors, geometry, grad_output)


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("deterministic", [False, True])
def test_single_gradients(cuda_host, needs, channels_last, deterministic):
    tensors, geometry, grad_output = make(SHAPES["groups"], torch.float16, channels_last)
    check_some_gradients(cuda_host, tensors, geometry, grad_output, needs, deterministic)


def test_empty_batch(cuda_host):
    tensors, geometry, grad_output = make((0, *SHAPES["plain"][1:]), torch.float32, False)
    input, offset, weight, _, mask = tensors
    assert cuda_host("deform_conv2d", *tensors, *geometry).shape == grad_output.shape
    grads = cuda_host("deform_conv2d_backward", grad_output, input, offset, weight, mask, *geometry, True, True, True)
    assert [g.shape for g in grads] == [input.shape, offset.shape, mask.shape, weight.shape]
    assert not grads[3].any()


def test_mixed_layouts(cuda_host):
    """Each tensor may come in its own layout, and in none."""
    tensors, geometry, grad_output = make(SHAPES["plain"], torch.float32, True, bias=False)
    tensors[1] = tensors[1].contiguous()
    tensors[2] = tensors[2].contiguous()
    check(cuda_host, tensors, geometry, grad_output.contiguous())
    tensors[0] = tensors[0].repeat(1, 1, 1, 2)[..., ::2]
    check(cuda_host, tensors, geometry, grad_output)


def test_misaligned_input(cuda_host):
    tensors, geometry, grad_output = make(SHAPES["plain"], torch.float32, True)
    input = tensors[0]
    memory = torch.empty(input.numel() + 1)[1:]
    tensors[0] = memory.as_strided(input.shape, input.stride()).copy_(input)
    check(cuda_host, tensors, geometry, grad_output)


def test_errors_name_the_argument(cuda_host):
    tensors, geometry, _ = make(SHAPES["plain"], torch.float32, False)
    tensors[4] = tensors[4][:, 1:]
    with pytest.raises(RuntimeError, match=r"mask must have shape .* got \(2, 8, 7, 6\)"):
        cuda_host("deform_conv2d", *tensors, *geometry)
