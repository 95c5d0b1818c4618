"""What only a GPU can show: streams, devices, graphs, absence of synchronisation, repeatability, large tensors."""

import contextlib

import pytest
import torch

from dcn_plugin.ops import deform_conv2d, deform_ps_roi_pool, deform_roi_align, ms_deform_attn

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
LAYOUTS = [torch.contiguous_format, torch.channels_last]


@contextlib.contextmanager
def strict_float32():
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    yield
    matmul.allow_tf32, cudnn.allow_tf32 = before


def conv_case(device="cuda", dtype=torch.float32, memory_format=torch.contiguous_format, n=2, c=64, size=(30, 44)):
    def random(*shape, scale=1.0):
        t = (torch.randn(shape) * scale).to(device=device, dtype=dtype, memory_format=memory_format)
        return t.requires_grad_()

    input, offset, mask = random(n, c, *size), random(n, 18, *size, scale=2), random(n, 9, *size)
    weight = random(96, c, 3, 3, scale=0.05)
    return lambda: deform_conv2d(input, offset, weight, None, 1, 1, 1, mask), [input, offset, weight, mask]


def random_rois(device):
    corners = torch.rand(200, 2, 2).mul(400).sort(1).values.flatten(1)
    return torch.cat([torch.arange(200.0)[:, None] % 2, corners], 1).to(device)


def roi_case(device="cuda", dtype=torch.float32, memory_format=torch.contiguous_format):
    input = torch.randn(2, 64, 50, 60).to(device=device, dtype=dtype, memory_format=memory_format).requires_grad_()
    rois = random_rois(device)
    offset = torch.randn(200, 2, 7, 7).to(device, dtype).requires_grad_()
    mask = torch.rand(200, 1, 7, 7).to(device, dtype).requires_grad_()
    return lambda: deform_roi_align(input, rois, offset, 7, 0.125, 0, 0.1, mask), [input, offset, mask]


def ps_roi_case(device="cuda", dtype=torch.float32, memory_format=torch.contiguous_format):
    input = torch.randn(2, 6 * 9, 50, 60).to(device=device, dtype=dtype, memory_format=memory_format).requires_grad_()
    rois, offset = random_rois(device), torch.randn(200, 4, 3, 3).to(device, dtype).requires_grad_()
    return lambda: deform_ps_roi_pool(input, rois, offset, 3, spatial_scale=0.125), [input, offset]


def attention_tensors(maps, queries, heads, channels, points, device="cuda", dtype=torch.float32):
    """Value, locations of which none is at a pixel's centre, where gradients jump, and weights."""
    maps = torch.tensor(maps)
    compute = torch.float64 if dtype is torch.float64 else torch.float32
    value = torch.randn(2, int(maps.prod(1).sum()), heads, channels)
    size = maps.flip(1)[:, None]
    pixels = torch.rand(2, queries, heads, len(maps), points, 2) * 1.2 * size - 0.1 * size
    locations = ((pixels * 8).floor() + 0.25) / 8 / size
    weights = torch.rand(locations.shape[:-1])
    tensors = value.to(dtype), locations.to(compute), weights.to(dtype)
    return [t.to(device).requires_grad_() for t in tensors]


def attention_case(device="cuda", dtype=torch.float32, memory_format=None):
    maps = (40, 52), (20, 26), (10, 13)
    leaves = attention_tensors(maps, 500, 8, 32, 4, device, dtype)
    value, locations, weights = leaves
    shapes = torch.tensor(maps, device=device) if memory_format is torch.channels_last else maps
    return lambda: ms_deform_attn(value, shapes, locations, weights), leaves


CASES = pytest.mark.parametrize("make", [conv_case, roi_case, ps_roi_case, attention_case])


def gradients(run, leaves):
    output = run()
    weights = torch.linspace(-1, 1, output.numel(), device=output.device).view(output.shape).to(output.dtype)
    return [output.detach(), *torch.autograd.grad(output, leaves, weights)]


def relative_error(actual, expected):
    actual, expected = actual.double().cpu(), expected.double().cpu()
    return float(torch.linalg.vector_norm(actual - expected) / torch.linalg.vector_norm(expected))


@CASES
@pytest.mark.parametrize("memory_format", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 4e-3), (torch.bfloat16, 2e-2)])
def test_equals_the_cpu(make, memory_format, dtype, tolerance):
    with strict_float32():
        torch.manual_seed(0)
        run, leaves = make("cuda", dtype, memory_format)
        actual = gradients(run, leaves)
    with torch.no_grad():
        torch.manual_seed(0)
        run, leaves = make("cpu", torch.float64, memory_format)
        torch.manual_seed(0)
        for leaf, source in zip(leaves, make("cpu", dtype, memory_format)[1], strict=True):
            leaf.copy_(source)
    expected = gradients(run, leaves)
    for a, b in zip(actual, expected, strict=True):
        assert relative_error(a, b) < tolerance


@CASES
@pytest.mark.parametrize("memory_format", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_deterministic_backward_repeats(make, memory_format, dtype):
    run, leaves = make("cuda", dtype, memory_format)
    fast = gradients(run, leaves)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = gradients(run, leaves), gradients(run, leaves)
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b, c in zip(first, second, fast, strict=True):
        assert torch.equal(a, b)
        assert relative_error(a, c) < 1e-2


@CASES
def test_captured_in_a_graph(make):
    run, leaves = make(memory_format=torch.channels_last)
    expected = gradients(run, leaves)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        gradients(run, leaves)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients(run, leaves)
    for t in captured:
        t.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(captured, expected, strict=True):
        assert relative_error(a, b) < 1e-5


@CASES
@pytest.mark.parametrize("memory_format", LAYOUTS, ids=["nchw", "nhwc"])
def test_never_synchronises(make, memory_format):
    run, leaves = make(memory_format=memory_format)
    gradients(run, leaves)
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients(run, leaves)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@CASES
def test_runs_on_the_current_stream(make):
    run, leaves = make()
    expected = gradients(run, leaves)
    held = [leaf.detach().clone() for leaf in leaves]
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream), torch.no_grad():
        for leaf in leaves:
            leaf.zero_()
        torch.cuda._sleep(100_000_000)
        for leaf, value in zip(leaves, held, strict=True):
            leaf.copy_(value)
    with torch.cuda.stream(stream):  # behind the sleep; elsewhere the leaves would still be zero
        actual = gradients(run, leaves)
    torch.cuda.synchronize()
    for a, b in zip(actual, expected, strict=True):
        assert relative_error(a, b) < 1e-5


@CASES
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_second_device(make):
    torch.manual_seed(0)
    first = gradients(*make("cuda:0"))
    torch.manual_seed(0)
    second = gradients(*make("cuda:1"))
    assert torch.cuda.current_device() == 0
    for a, b in zip(second, first, strict=True):
        assert a.device.index == 1
        assert relative_error(a, b) < 1e-5


# batch, channels, out_channels, kernel, size, deform_groups: from 128 * 128 rows on, the large tiles
FUSED_CASES = {
    "small": (2, 64, 128, 3, 13, 1),
    "narrow": (5, 40, 64, 3, 60, 1),
    "square": (5, 64, 128, 3, 60, 2),
    "wide": (5, 128, 264, 3, 60, 1),
    "depthwise": (5, 72, 72, 3, 60, 3),
}


@pytest.mark.parametrize("memory_format", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 4e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("name", FUSED_CASES)
def test_fused_equals_columns(name, dtype, tolerance, memory_format, monkeypatch):
    n, channels, out_channels, kernel, size, deform_groups = FUSED_CASES[name]
    taps, groups = kernel * kernel, channels if name == "depthwise" else 1

    def random(*shape, scale=1.0):
        return (torch.randn(shape, device="cuda") * scale).to(dtype, memory_format=memory_format).requires_grad_()

    offset, mask = (random(n, count * deform_groups * taps, size, size, scale=2) for count in (2, 1))
    input, weight = random(n, channels, size, size), random(out_channels, channels // groups, kernel, kernel, scale=0.1)
    bias = torch.randn(out_channels, device="cuda").to(dtype).requires_grad_()
    results = []
    for fused in ("0", "1"):
        monkeypatch.setenv("DCN_PLUGIN_FUSED", fused)
        leaves = [input, offset, weight, bias, mask]
        results.append(gradients(lambda: deform_conv2d(input, offset, weight, bias, 1, kernel // 2, 1, mask), leaves))
    for a, b in zip(*results, strict=True):
        assert relative_error(a, b) < tolerance
    assert not torch.equal(results[0][0], results[1][0])  # they round differently: both ran


@pytest.mark.parametrize("memory_format", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("out_channels", [64, 128, 256])
def test_tf32(out_channels, memory_format, set_matmul_precision):
    def random(*shape):
        return torch.randn(shape, device="cuda").contiguous(memory_format=memory_format)

    arguments = random(4, 36, 66, 66), random(4, 18, 66, 66), random(out_channels, 36, 3, 3)
    with strict_float32():
        expected = deform_conv2d(*(t.double() for t in arguments), padding=1)
        assert relative_error(deform_conv2d(*arguments, padding=1), expected) < 1e-5  # coordinates are float32
    set_matmul_precision("tf32")
    assert 2e-5 < relative_error(deform_conv2d(*arguments, padding=1), expected) < 5e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_takes_the_pixels_as_queries_in_any_order(dtype):
    """As many queries as pixels are taken in strips of the maps' rows: only the order of the work is another."""
    maps = (37, 52), (20, 26), (3, 2)
    queries = sum(height * width for height, width in maps)
    value, locations, weights = attention_tensors(maps, queries, 8, 32, 4, dtype=dtype)
    output = ms_deform_attn(value, maps, locations, weights)
    for part in torch.arange(queries, device="cuda").chunk(3):
        assert torch.equal(ms_deform_attn(value, maps, locations[:, part], weights[:, part]), output[:, part])


def test_attention_reads_no_level_that_does_not_fit():
    """The kernels themselves cannot raise an error of shapes that are on the device; the public function asserts."""
    maps = (40, 52), (20, 26)
    value, locations, weights = attention_tensors(maps, 100, 8, 32, 4)
    run = torch.ops.dcn_plugin.ms_deform_attn
    first_alone = weights * torch.tensor([1.0, 0.0], device="cuda")[:, None]
    expected = run(value, torch.tensor(maps), locations, first_alone)
    for size in ((200, 26), (-20, 26), (2**40, 2**40)):
        shapes = torch.tensor([maps[0], size], device="cuda")
        assert torch.equal(run(value, shapes, locations, weights), expected)
        assert torch.equal(run(value, shapes.flip(0), locations.flip(3), weights.flip(3)), expected)


@pytest.mark.parametrize("pool", [deform_roi_align, deform_ps_roi_pool])
def test_roi_of_no_image_gives_zeros(pool):
    input = torch.randn(2, 8, 10, 10, device="cuda", requires_grad=True)
    rois = torch.tensor([[5.0, 0, 0, 8, 8], [-1.0, 0, 0, 8, 8], [float("nan"), 0, 0, 8, 8]], device="cuda")
    output = pool(input, rois, output_size=2)
    (grad,) = torch.autograd.grad(output.sum(), input)
    assert not output.any()
    assert not grad.any()


@pytest.mark.parametrize("memory_format", LAYOUTS, ids=["nchw", "nhwc"])
def test_more_than_2_31_elements(memory_format):
    n, c, size = 34, 256, 512
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GiB of free memory")
    input = torch.empty(n, c, size, size, device="cuda", dtype=torch.half, memory_format=memory_format)
    torch.manual_seed(0)
    input.normal_().requires_grad_()
    offset = torch.randn(n, 2, size, size, device="cuda", dtype=torch.half)
    weight = torch.randn(8, c, 1, 1, device="cuda", dtype=torch.half)
    last = input.detach()[-1:].clone(memory_format=memory_format).requires_grad_()
    output, expected = deform_conv2d(input, offset, weight), deform_conv2d(last, offset[-1:], weight)
    assert relative_error(output[-1:], expected) < 1e-3
    output.backward(torch.ones_like(output))
    expected.backward(torch.ones_like(expected))
    assert relative_error(input.grad[-1:], last.grad) < 1e-3


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
def test_out_of_memory(mode):
    """Of an output of 32 TiB. Before 2.13 the stable ABI does not tell a lack of memory from an earlier error."""
    if torch.__version__ >= torch.torch_version.TorchVersion("2.13"):
        error, message = torch.OutOfMemoryError, r"(?s)CUDA out of memory\. Tried to allocate .*1048576\)"
    else:
        error, message = RuntimeError, r"could not allocate, or convert to, 32768 GiB, .*1048576\): the GPU's memory"
    offset = torch.zeros(1, 1, 1, 1, device="cuda").expand(1, 2, 2**20, 2**20)
    tensors = torch.zeros(1, 1, 2, 2, device="cuda"), offset, torch.zeros(8, 1, 1, 1, device="cuda")
    with mode(), pytest.raises(error, match=message) as caught:
        deform_conv2d(*tensors, padding=2**19 - 1)
    assert caught.type is error
    assert torch.ones(1, device="cuda").item() == 1
