"""Many threads, many calls, much memory."""

import resource
import threading
from dataclasses import replace

import pytest
import torch

from dcn_plugin.ops import deform_conv2d, deform_ps_roi_pool, deform_roi_align, ms_deform_attn
from tests.ops.cases import BASE, run

ROIS = torch.tensor([[0, 0.0, 1, 30, 25], [1, 5, 5, 60, 40], [0, -9, 3, 12, 80]])


def results(case, seed):
    """Outputs and gradients of all operators for inputs drawn from a seed."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {n: torch.randn(t.shape, generator=generator) for n, t in case.make(torch.float32).items()}
    conv, conv_gradients = run(deform_conv2d, tensors, **case.options)
    maps = dict(
        input=torch.randn(2, 8, 9, 11, generator=generator), offset=torch.randn(3, 2, 2, 2, generator=generator)
    )
    align = run(lambda **t: deform_roi_align(rois=ROIS, output_size=2, spatial_scale=0.125, **t), maps)
    pool = run(lambda **t: deform_ps_roi_pool(rois=ROIS, output_size=2, spatial_scale=0.125, **t), maps)
    sampled = dict(
        value=torch.randn(2, 99, 2, 8, generator=generator),
        sampling_locations=torch.rand(2, 40, 2, 1, 4, 2, generator=generator),
        attention_weights=torch.rand(2, 40, 2, 1, 4, generator=generator),
    )
    attention = run(lambda **t: ms_deform_attn(spatial_shapes=[(9, 11)], **t), sampled)
    others = [t for output, gradients in (align, pool, attention) for t in (output, *gradients.values())]
    return [conv, *conv_gradients.values(), *others]


def test_eight_threads_at_once():
    case = replace(BASE, channels=36, size=(17, 19))
    expected = [results(case, seed) for seed in range(8)]
    wrong, start = [], threading.Barrier(8)

    def work(seed):
        start.wait()
        for _ in range(20):
            if not all(map(torch.equal, results(case, seed), expected[seed])):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def held(kind):
    """Bytes of memory that this process holds: of addresses (0) or resident (1)."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[kind]) * resource.getpagesize()


@pytest.fixture
def one_thread():
    """Of a busy processor's, two wait for each other in each short call."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_memory_does_not_grow(one_thread):
    """Over 10 000 calls: a leak of the outputs of one operator, four kilobytes each, would be 10 MB."""
    case = replace(BASE, batch=1, channels=4, size=(16, 16))
    tensors = case.make(torch.float32)
    rois, offset = ROIS[:1].clone(), torch.zeros(1, 2, 16, 16)
    sampled = dict(
        value=torch.rand(1, 64, 2, 8),
        sampling_locations=torch.rand(1, 64, 2, 1, 2, 2),
        attention_weights=torch.rand(1, 64, 2, 1, 2),
    )
    operators = (
        (lambda **t: deform_conv2d(**t, **case.options), tensors),
        (lambda **t: deform_roi_align(**t, rois=rois, output_size=16), dict(input=tensors["input"], offset=offset)),
        (
            lambda **t: deform_ps_roi_pool(**t, rois=rois, output_size=16, group_size=1),
            dict(input=tensors["input"], offset=offset),
        ),
        (lambda **t: ms_deform_attn(**t, spatial_shapes=[(8, 8)]), sampled),
    )

    def calls(number):
        for operator, arguments in operators:
            for i in range(number // len(operators)):
                with torch.no_grad():
                    operator(**arguments)
                if i % 5 == 0:
                    run(operator, arguments)

    calls(1000)
    before = held(1)
    calls(10_000)
    assert held(1) - before < 5e6


# Inputs of more elements than 32 bits count are hardly more than addresses: only what is sampled of them is touched.
# The samples lie in their last corner, and give what a map of that corner alone gives.
CORNER = 16
SIZES = {"many images": (17, 2, 2**13, 2**13), "one image": (1, 33, 2**13 + CORNER, 2**13 + CORNER)}
sizes = pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
LAYOUT_READ = {
    deform_conv2d: torch.channels_last,
    deform_roi_align: torch.channels_last,
    deform_ps_roi_pool: torch.contiguous_format,
}  # in another, the input would be copied
operators = pytest.mark.parametrize("operator", LAYOUT_READ, ids=lambda f: f.__name__)


def with_corner(operator, size):
    """An uninitialised input with values in its last corner, and these."""
    input = torch.empty(size, memory_format=LAYOUT_READ[operator])
    assert input.numel() > 2**31
    corner = torch.rand(1, size[1], CORNER, CORNER)
    input[-1:, :, -CORNER:, -CORNER:] = corner
    return input, corner


def sampling_the_corner(operator, size):
    """An operator as a function of the input and as one of its last corner, of equal results."""
    images, channels, height, width = size
    if operator is deform_conv2d:
        weight, offset = torch.rand(1, channels, 3, 3), torch.rand(1, 18, 1, 1).mul(32).floor() / 16
        # Two outputs a side, of which the last one samples the corner; the others sample nothing.
        offsets = torch.full((images, 18, 2, 2), -1e9)
        offsets[-1:, :, -1:, -1:] = offset
        step = height - CORNER, width - CORNER
        return (
            lambda x: operator(x, offsets, weight, stride=step)[-1:, :, -1:, -1:],
            lambda x: operator(x, offset, weight, stride=CORNER),
        )
    rois, offset = torch.tensor([[0.0, 3, 2, 11, 10], [0, 5, 6, 13, 14]]), torch.rand(2, 2, 2, 2).mul(16).floor() / 16
    moved = rois + torch.tensor([images - 1, width - CORNER, height - CORNER, width - CORNER, height - CORNER])
    # All positions are multiples of 1/64.
    align = operator is deform_roi_align
    options = dict(gamma=0.125, sampling_ratio=2) if align else dict(trans_std=0.125, group_size=1)
    options |= dict(offset=offset, output_size=2)
    return (lambda x: operator(x, moved, **options)), (lambda x: operator(x, rois, **options))


@sizes
@operators
def test_more_elements_than_32_bits_count(operator, size):
    input, corner = with_corner(operator, size)
    of_input, of_corner = sampling_the_corner(operator, size)
    assert of_corner(corner).all()
    assert torch.equal(of_input(input), of_corner(corner))


ATTENDED = {"many images": (129, 2**10, 16), "one image": (1, 2**15, 2)}  # images, side of the large level, channels
attended = pytest.mark.parametrize("size", ATTENDED.values(), ids=ATTENDED)


def attending_to_the_corner(size):
    """Attention's value of a large and a small level and that of the corner alone, and functions of equal results."""
    images, side, channels = size
    value = torch.empty(images, side**2 + CORNER**2, 1, channels)
    assert value.numel() > 2**31
    corner = torch.rand(1, 2 * CORNER**2, 1, channels)
    of_large, of_small = corners(value, side)
    of_large[:] = corner[:, : CORNER**2].view_as(of_large)
    of_small[:] = corner[:, CORNER**2 :]

    # All positions are multiples of 1/16, and those of the other images are on no map.
    positions, weights = (
        (torch.rand(1, 5, 1, 2, 3, 2) * 16 * (CORNER - 2)).floor() / 16 + 1.5,
        torch.rand(1, 5, 1, 2, 3),
    )
    locations, all_locations = positions / CORNER, torch.full((images, 5, 1, 2, 3, 2), -9.0)
    shifts, sides = (torch.tensor(of_levels)[:, None, None] for of_levels in ([side - CORNER, 0], [side, CORNER]))
    all_locations[-1:] = (positions + shifts) / sides
    return (
        (
            value,
            lambda v: ms_deform_attn(
                v, [(side,) * 2, (CORNER,) * 2], all_locations, weights.expand(images, 5, 1, 2, 3)
            )[-1:],
        ),
        (corner, lambda v: ms_deform_attn(v, [(CORNER,) * 2] * 2, locations, weights)),
    )


def corners(value, side):
    """Of the last image, the last corner of the large level, and the small level."""
    large, small = value[-1:].split([side**2, CORNER**2], 1)
    return large.view(1, side, side, 1, -1)[:, -CORNER:, -CORNER:], small


@attended
def test_attention_to_more_elements_than_32_bits_count(size):
    (value, of_value), (corner, of_corner) = attending_to_the_corner(size)
    assert of_corner(corner).all()
    assert torch.equal(of_value(value), of_corner(corner))


def gradient(function, x):
    (gradient,) = torch.autograd.grad(function(x.requires_grad_()).square().sum(), x)
    return gradient


@pytest.fixture
def much_memory():
    """A gradient is written whole."""
    with open("/proc/meminfo") as file:
        available = next(int(line.split()[1]) for line in file if line.startswith("MemAvailable"))
    if available < 11 * 2**20:
        pytest.skip(f"needs 11 GiB of memory, {available >> 20} are available")


@pytest.mark.slow
@operators
def test_gradient_of_more_elements_than_32_bits_count(operator, much_memory):
    # RoI align's is summed in scratch memory, for some channels of a whole map in each thread.
    size = (129, 16, 2**10, 2**10) if operator is deform_roi_align else SIZES["one image"]
    input, corner = with_corner(operator, size)
    of_input, of_corner = sampling_the_corner(operator, size)
    expected = gradient(of_corner, corner)
    assert expected.any()
    assert torch.equal(gradient(of_input, input)[-1:, :, -CORNER:, -CORNER:], expected)


@pytest.mark.slow
def test_gradient_of_attention_to_more_elements_than_32_bits_count(much_memory):
    size = ATTENDED["many images"]
    (value, of_value), (corner, of_corner) = attending_to_the_corner(size)
    expected = gradient(of_corner, corner).split(CORNER**2, 1)
    for actual, its_expected in zip(corners(gradient(of_value, value), size[1]), expected, strict=True):
        assert its_expected.any()
        assert torch.equal(actual, its_expected.view_as(actual))


def test_maps_of_more_pixels_than_32_bits_count_are_refused():
    map = torch.zeros(1).expand(1, 1, 2**16, 2**15)
    rois, zeros = torch.zeros(1, 5), torch.zeros(1, 2, 1, 1)
    for call in (
        lambda: deform_conv2d(map, zeros, torch.zeros(1, 1, 1, 1), stride=2**16),
        lambda: deform_roi_align(map, rois),
        lambda: deform_ps_roi_pool(map, rois, None, 1, 1),
        lambda: ms_deform_attn(
            map.view(1, -1, 1, 1), [map.shape[2:]], torch.zeros(1, 1, 1, 1, 1, 2), torch.zeros(1, 1, 1, 1, 1)
        ),
    ):
        with pytest.raises((RuntimeError, ValueError), match=r"2\^31"):
            call()


IMAGES = torch.zeros(1).expand(2**12, 2, 2**14, 2**14)
LACKING = {
    "output": (
        lambda: deform_conv2d(
            torch.zeros(1, 1, 2, 2),
            torch.zeros(1).expand(1, 2, 2**20, 2**20),
            torch.zeros(8, 1, 1, 1),
            padding=2**19 - 1,
        ),
        r"32768 GiB, .* \(1, 8, 1048576, 1048576\)",
    ),
    "layout": (
        lambda: deform_conv2d(IMAGES, torch.zeros(2**12, 2, 1, 1), torch.zeros(1, 2, 1, 1), stride=2**14),
        r"8192 GiB, .* \(4096, 2, 16384, 16384\)",
    ),
    "type": (
        lambda: deform_roi_align(torch.zeros(1).half().expand_as(IMAGES), torch.zeros(1, 5).half()),
        r"8192 GiB, .* \(4096, 2, 16384, 16384\)",
    ),
}


@pytest.mark.parametrize(("call", "message"), LACKING.values(), ids=LACKING)
def test_out_of_memory_says_how_much(call, message):
    with pytest.raises(RuntimeError, match=f"out of memory: cannot allocate {message}"):
        call()


def test_out_of_memory_of_threads_says_how_much():
    value, locations = torch.zeros(1, 2**24, 1, 1).requires_grad_(), torch.full((1, 1, 1, 1, 1, 2), 0.5)
    output = ms_deform_attn(value, [(2**12, 2**12)], locations, torch.ones(1, 1, 1, 1, 1))
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (held(0) + 2**29, limits[1]))
    try:
        with pytest.raises(RuntimeError, match=r"out of memory: cannot allocate 1\.\d* GiB for each thread"):
            output.sum().backward()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
