"""Many threads, many calls, much memory."""

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


def resident():
    """Bytes of memory that this process holds."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def test_memory_does_not_grow():
    """Over 10 000 calls: a leak of one output of a call, a kilobyte, would be 10 MB."""
    case = replace(BASE, batch=1, channels=4, size=(8, 8))
    tensors = case.make(torch.float32)
    rois = ROIS[:1].clone()

    def calls(number):
        for _ in range(number):
            with torch.no_grad():
                deform_conv2d(**tensors, **case.options)
                deform_roi_align(tensors["input"], rois, None, 8)
        for _ in range(number // 10):
            run(deform_conv2d, tensors, **case.options)

    calls(500)
    before = resident()
    calls(10_000)
    assert resident() - before < 5e6


@pytest.mark.slow
def test_more_elements_than_32_bits_count():
    """Only what is sampled of the input is ever touched, so that its 4 GiB are hardly more than an address."""
    images, size, step = 33, 8192, 1024
    input = torch.empty(images, 1, size, size, dtype=torch.bfloat16)
    assert input.numel() > 2**31
    values = torch.rand(images, 1, size // step, size // step).bfloat16()
    input[:, :, ::step, ::step] = values
    output = deform_conv2d(
        input, torch.zeros(images, 2, *values.shape[2:]).bfloat16(), torch.ones(1, 1, 1, 1).bfloat16(), stride=step
    )
    assert torch.equal(output, values)


def test_out_of_memory_says_how_much():
    input = torch.zeros(1, 1, 2, 2)
    offset = torch.zeros(1, 1, 1, 1).expand(1, 2, 2**20, 2**20)
    with pytest.raises(RuntimeError, match=r"out of memory: cannot allocate 32768 GiB, .* \(1, 8, 1048576, 1048576\)"):
        deform_conv2d(input, offset, torch.zeros(8, 1, 1, 1), padding=2**19 - 1)
