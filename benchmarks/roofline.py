"""The least time a case can take on this processor: that of its bytes in a copy, or of its operations in a product.

Bytes are those of every input and output, each moved once; with the backward, inputs are read again, the gradient of
the output is read and the gradients of the inputs are written. Operations are multiplications and additions of the
product and of interpolating the samples; the backward has twice as many as the forward. What fits in a cache may be
faster.

Where an operator does little else than gather pixels, the least time is also that of their bytes from the second-level
cache: those of the values once in the forward, and in the backward once more, beside their gradients, read and written.
"""

from functools import cache

import torch
from torch.nn import functional as F

from .timing import wall_clock

SAMPLE = 8  # operations to interpolate one value from four
ROUNDS = 5


@cache
def copy_rate(device, threads):
    """Bytes a second, read and written, in a copy of what no cache holds."""
    torch.set_num_threads(threads)
    source = torch.zeros(1 << (28 if device == "cpu" else 30), dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    return 2 * source.nbytes / min(wall_clock(lambda: target.copy_(source), 1) for _ in range(ROUNDS))


@cache
def cache_rate(threads):
    """Bytes a second that each thread's core reads from its second-level cache, together: a sum over 256 KiB, again and
    again."""
    torch.set_num_threads(threads)
    repeated = torch.zeros(1 << 16).expand(1024, -1)
    return repeated.numel() * 4 / min(wall_clock(lambda: repeated.sum(), 1) for _ in range(ROUNDS))


@cache
def product_rate(device, dtype, threads, tf32):
    """Operations a second in the product of two square matrices: oneDNN's (as a 1x1 convolution) on the CPU, or
    cuBLAS's. ``tf32`` is what torch is set to do: it is here to tell the cached rates apart.
    """
    torch.set_num_threads(threads)
    if device == "cpu":
        size = 1024
        rows = torch.ones(1, size, 32, size // 32, dtype=dtype).contiguous(memory_format=torch.channels_last)
        weight = torch.ones(size, size, 1, 1, dtype=dtype)

        def product():
            return F.conv2d(rows, weight)
    else:
        size = 8192
        left, right = torch.ones(2, size, size, dtype=dtype, device=device)

        def product():
            return left @ right

    with torch.no_grad():
        product()
        return 2 * size**3 / min(wall_clock(product, 2) for _ in range(ROUNDS))


def gathering(threads, gathered, backward):
    """What the record holds of gathering so many bytes in the forward."""
    gathered *= 4 if backward else 1
    rate = cache_rate(threads)
    return dict(gathered=gathered, cache_bytes_per_second=round(rate), gathering_seconds=gathered / rate)


def roofline(device, dtype, threads, tf32, inputs, outputs, operations, backward):
    """What the record holds of it. ``inputs`` and ``outputs`` are bytes, ``operations`` those of the forward."""
    moved = 3 * inputs + 2 * outputs if backward else inputs + outputs
    operations *= 3 if backward else 1
    copy, product = copy_rate(device, threads), product_rate(device, dtype, threads, tf32)
    return dict(
        bytes=moved,
        operations=operations,
        copy_bytes_per_second=round(copy),
        product_operations_per_second=round(product),
        seconds=max(moved / copy, operations / product),
    )
