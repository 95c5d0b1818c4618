"""ms_deform_attn's CUDA kernels on the host, compared with the reference in float64."""

import math

import pytest
import torch

from dcn_plugin.ops import reference

from .test_deform_conv2d import TOLERANCE, assert_close, assert_gradients_close, in_double

MAPS = ((5, 7), (3, 4), (1, 2))
PIXELS = sum(height * width for height, width in MAPS)
# batch, queries, heads, D, maps, points. Together: every width of a group of lanes, vectors and single channels, rows
# in part of a warp, of a block and of several, tables filled in part and several times.
CASES = {
    "D 32": (2, 9, 2, 32, MAPS, 4),
    "D 64": (1, 5, 3, 64, MAPS, 4),
    "D 16": (2, 11, 1, 16, MAPS, 2),
    "D 8": (1, 35, 2, 8, MAPS, 3),
    "D 3": (1, 4, 2, 3, MAPS, 4),
    "D 1": (2, 3, 5, 1, MAPS, 1),
    "D 100": (1, 3, 2, 100, MAPS, 4),
    "D 128": (1, 3, 2, 128, MAPS, 4),
    "D 264": (1, 2, 1, 264, MAPS[:1], 5),
    "pixels' queries": (1, PIXELS, 2, 32, MAPS, 4),
    "pixels' queries of several strips": (1, 150 + 27 + 2, 1, 32, ((10, 15), (9, 3), (1, 2)), 2),
    "one sample": (1, 1, 1, 32, MAPS[:1], 1),
    "many points": (1, 2, 2, 32, MAPS[:2], 11),
    "many levels": (1, 3, 1, 32, ((2, 1),) * 18, 1),  # more than a kernel has as parameters
    "empty levels": (1, 4, 2, 8, ((0, 3), (3, 4), (2, 0), (2, 2), (0, 0)), 2),
}


def make(case, dtype, weight_dtype=None):
    batch, queries, heads, channels, maps, points = case
    generator = torch.Generator().manual_seed(queries)
    compute = torch.float64 if dtype is torch.float64 else torch.float32
    maps = torch.tensor(maps)
    samples = batch, queries, heads, len(maps), points
    value = torch.randn(batch, int(maps.prod(1).sum()), heads, channels, generator=generator).to(dtype)
    # Of a pixel's centre, where gradients jump, no float32 is near enough to fall on the other side.
    locations = torch.rand(*samples, 2, generator=generator, dtype=torch.float64) * 1.4 - 0.2
    size = maps.flip(1)[:, None].clamp(min=1)
    locations = ((locations * size * 8).floor() + 0.5) / 8 / size
    weights = torch.rand(samples, generator=generator).to(weight_dtype or dtype)
    grad_output = torch.randn(batch, queries, heads * channels, generator=generator).to(dtype)
    return value, maps, locations.to(compute), weights, grad_output


def truth(value, maps, locations, weights, grad_output):
    return in_double(
        lambda value, locations, weights: reference.ms_deform_attn(value, maps, locations, weights),
        (value, locations, weights),
        grad_output,
    )


def check_gradients(actual, expected, tensors):
    """Each in its tensor's dtype, to value's precision."""
    value = tensors[0]
    for got, want, tensor in zip(actual, expected, tensors, strict=True):
        assert got.dtype == tensor.dtype
        assert_gradients_close([got.to(value.dtype)], [want], value.dtype)


def check(cuda_host, case, deterministic=False, **how):
    value, maps, locations, weights, grad_output = case
    output, grads = truth(*case)
    actual = cuda_host("ms_deform_attn", value, maps, locations, weights, **how)
    assert_close(actual, output, value.dtype, "output")
    arguments = grad_output, value, maps, locations, weights, True, True, deterministic
    actual_grads = cuda_host("ms_deform_attn_backward", *arguments, **how)
    check_gradients(actual_grads, grads, (value, locations, weights))
    return actual, *actual_grads


@pytest.mark.parametrize("name", CASES)
def test_cases(cuda_host, name):
    check(cuda_host, make(CASES[name], torch.float32))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", ["D 3", "D 8", "D 16", "D 32", "D 64", "D 100", "D 128", "D 264"])
def test_dtypes(cuda_host, name, dtype):
    check(cuda_host, make(CASES[name], dtype), order=11)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_weights_of_float32_beside_halves(cuda_host, dtype):
    check(cuda_host, make(CASES["D 32"], dtype, torch.float32))


@pytest.mark.parametrize("name", ["D 32", "D 16", "pixels' queries", "empty levels"])
def test_shapes_on_the_device(cuda_host, name):
    check(cuda_host, make(CASES[name], torch.float32), on_host=False)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("D 32", torch.float32), ("D 100", torch.bfloat16), ("D 3", torch.float64), ("pixels' queries", torch.float16)]
    + [("empty levels", torch.float32), ("many points", torch.float32)],
)
def test_deterministic(cuda_host, name, dtype):
    case = make(CASES[name], dtype)
    first, second = (check(cuda_host, case, deterministic=True, order=order) for order in (1, 5))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("deterministic", [False, True])
def test_wild_locations_sample_nothing(cuda_host, deterministic):
    """And read nothing: a value that is not finite shows only where it is sampled."""
    value, maps, locations, weights, grad_output = make(CASES["D 32"], torch.float32)
    wild = locations.clone()
    far = [math.nan, math.inf, -math.inf, 1e30, -1e30, 3e9, -5.0]
    for i, place in enumerate(far):
        wild[0, i, :, :, 1, i % 2] = place
    inside = locations.clone()
    inside[0, : len(far), :, :, 1] = -5.0
    expected = check(cuda_host, (value, maps, inside, weights, grad_output), deterministic=deterministic)
    actual = cuda_host("ms_deform_attn", value, maps, wild, weights)
    arguments = grad_output, value, maps, wild, weights, True, True, deterministic
    for got, want in zip((actual, *cuda_host("ms_deform_attn_backward", *arguments)), expected, strict=True):
        torch.testing.assert_close(got, want)
    poisoned = torch.full_like(value, math.nan)
    nowhere = torch.full_like(locations, math.nan)
    assert not cuda_host("ms_deform_attn", poisoned, maps, nowhere, weights).any()
    arguments = grad_output, poisoned, maps, nowhere, weights, True, True, deterministic
    assert not any(grad.any() for grad in cuda_host("ms_deform_attn_backward", *arguments))


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(
    "maps", [[(5, 7), (3, 4), (2, 2)], [(-1, 7), (2**40, 2**40), (5, 7)], [(5, 9), (1, 5), (9, 9)]]
)
def test_shapes_that_do_not_fit_read_nothing_outside(cuda_host, maps, deterministic):
    """On the device they cannot be checked: levels that do not fit into value are empty."""
    value, _, locations, weights, grad_output = make(CASES["pixels' queries"], torch.float32)
    kept, left = [], PIXELS
    for height, width in maps:
        fits = height > 0 and width > 0 and height * width <= left
        kept.append((height, width) if fits else (0, 0))
        left -= height * width if fits else 0
    maps = torch.tensor(maps)
    # The reference samples the rows behind the last level as a level of their own, with no weight.
    rest = torch.zeros(*weights.shape[:3], 1, weights.shape[4])
    padded = torch.cat([locations, locations[:, :, :, :1]], 3), torch.cat([weights, rest], 3)
    output, grads = truth(value, torch.tensor([*kept, (1, left)]), *padded, grad_output)
    assert_close(cuda_host("ms_deform_attn", value, maps, locations, weights, on_host=False), output, value.dtype, "")
    arguments = grad_output, value, maps, locations, weights, True, True, deterministic
    actual = cuda_host("ms_deform_attn_backward", *arguments, on_host=False)
    check_gradients(actual, [grads[0], *(g[:, :, :, :3] for g in grads[1:])], (value, locations, weights))


def test_shapes_on_the_host_are_checked(cuda_host):
    value, maps, locations, weights, _ = make(CASES["D 32"], torch.float32)
    with pytest.raises(RuntimeError, match="spatial_shapes must have as many pixels as value has keys"):
        cuda_host("ms_deform_attn", value, maps + 1, locations, weights)


@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("deterministic", [False, True])
def test_single_gradients(cuda_host, needs, deterministic):
    value, maps, locations, weights, grad_output = case = make(CASES["D 32"], torch.float16)
    _, grads = truth(*case)
    arguments = grad_output, value, maps, locations, weights, *needs, deterministic
    actual = cuda_host("ms_deform_attn_backward", *arguments)
    for got, want, needed in zip(actual, grads, (needs[0], needs[1], needs[1]), strict=True):
        if needed:
            assert_close(got.half(), want, torch.float16, "")
        else:
            assert got.numel() == 0


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("empty", ["batch", "queries", "points", "levels", "pixels"])
def test_empty(cuda_host, empty, deterministic):
    batch, queries, heads, channels, maps, points = CASES["D 32"]
    case = dict(batch=batch, queries=queries, heads=heads, channels=channels, maps=maps, points=points)
    case |= dict(levels=dict(maps=()), pixels=dict(maps=((0, 4), (3, 0)))).get(empty, {empty: 0})
    maps = torch.tensor(case["maps"], dtype=torch.int64).reshape(-1, 2)
    samples = case["batch"], case["queries"], heads, len(maps), case["points"]
    keys = int(maps.prod(1).sum()) if empty != "levels" else 0
    value = torch.randn(case["batch"], keys, heads, channels)
    locations, weights = torch.rand(*samples, 2), torch.rand(samples)
    output = cuda_host("ms_deform_attn", value, maps, locations, weights)
    assert output.shape == (case["batch"], case["queries"], heads * channels)
    assert not output.any()
    arguments = torch.ones_like(output), value, maps, locations, weights, True, True, deterministic
    grads = cuda_host("ms_deform_attn_backward", *arguments)
    assert [g.shape for g in grads] == [value.shape, locations.shape, weights.shape]
    assert not any(grad.any() for grad in grads)


def test_strided_and_misaligned(cuda_host):
    value, maps, locations, weights, grad_output = make(CASES["D 32"], torch.float32)

    def moved(t):
        """Contiguous, and aligned to an element only."""
        return torch.empty(t.numel() + 1)[1:].copy_(t.flatten()).view(t.shape)

    check(cuda_host, (moved(value), maps, moved(locations), moved(weights), moved(grad_output)))
    strided = value.transpose(1, 2).contiguous().transpose(1, 2), maps, locations, weights, grad_output.expand(2, 9, 64)
    check(cuda_host, strided)
