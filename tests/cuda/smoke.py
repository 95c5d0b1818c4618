"""Every kernel once on small tensors, compared with the reference: what compute-sanitizer runs (tools/gpu_check.py).

python tests/cuda/smoke.py [cuda | cpu]
"""

import sys

import torch

from dcn_plugin.ops import deform_conv2d, deform_ps_roi_pool, deform_roi_align, ms_deform_attn, reference

# channels, out_channels, groups, kernel, size: columns of vectors and of single channels, depthwise convolutions, and,
# from 128 * 128 positions on, the large tiles of the fused kernels.
CONVOLUTIONS = (
    *((64, 64, 1, 3, 11), (6, 5, 1, 3, 11), (16, 16, 16, 3, 11), (16, 256, 1, 3, 9)),
    *((16, 64, 1, 1, 92), (16, 128, 1, 1, 92), (16, 256, 1, 1, 92)),
)
ROIS = [[0, 1.0, 2.0, 60.0, 70.0], [1, -9.0, 5.0, 30.0, 99.0]]
NO_IMAGE = [7, 0.0, 0.0, 9.0, 9.0]
# Of attention: maps, and (queries, channels of a head), the pixels' queries among them.
MAPS = [(9, 11), (3, 4)]
ATTENTIONS = (111, 32), (5, 64), (5, 16), (3, 8), (2, 5), (2, 264)
# dtype, how matrix products treat float32, tolerance of the norm
KINDS = ((torch.float32, "ieee", 1e-5), (torch.float32, "tf32", 2e-3), (torch.bfloat16, "ieee", 2e-2))


def compare(function, truth, tensors, tolerance):
    """`function` of tensors on the GPU and `truth` of the same in float64 on the CPU: outputs and all gradients."""
    leaves = [t.detach().double().cpu().requires_grad_() for t in tensors]
    output, expected = function(*tensors), truth(*leaves)
    grad_output = torch.randn(output.shape).to(output.dtype)
    grads = torch.autograd.grad(output, tensors, grad_output.to(output.device))
    grads_expected = torch.autograd.grad(expected, leaves, grad_output.double())
    for actual, right in zip((output, *grads), (expected, *grads_expected), strict=True):
        difference = torch.linalg.vector_norm(actual.detach().double().cpu() - right.detach())
        assert difference <= tolerance * torch.linalg.vector_norm(right), (function, difference)


def main(device: str) -> None:
    torch.manual_seed(0)

    def check_all(dtype, tolerance, memory_format, large):
        def random(*size):
            return torch.randn(size).to(device, dtype, memory_format=memory_format).requires_grad_()

        def offsets(*size):
            """Held exactly by every dtype, and never on a pixel's centre, where gradients jump."""
            t = (torch.randint(-24, 24, size) + 0.5) / 8
            return t.to(device, dtype, memory_format=memory_format).requires_grad_()

        for channels, out_channels, groups, kernel, size in CONVOLUTIONS:
            if size > 64 and not large:
                continue
            tensors = [
                random(2, channels, size, size),
                offsets(2, 2 * kernel**2, size, size),
                random(out_channels, channels // groups, kernel, kernel),
                random(2, kernel**2, size, size),
            ]
            options = None, 1, kernel // 2, 1
            compare(
                lambda input, offset, weight, mask, o=options: deform_conv2d(input, offset, weight, *o, mask),
                lambda input, offset, weight, mask, o=options: reference.deform_conv2d(input, offset, weight, *o, mask),
                tensors,
                tolerance,
            )

        rois = torch.tensor([*ROIS, NO_IMAGE] if device == "cuda" else ROIS, device=device)
        count = len(ROIS)

        def padded(t):  # an offset or a mask for the RoI of no image
            return torch.cat([t, t[:1]])[: len(rois)]

        align = (5, 7), 0.125, 0, 0.1
        compare(
            lambda input, offset, mask: deform_roi_align(input, rois, padded(offset), *align, padded(mask))[:count],
            lambda input, offset, mask: reference.deform_roi_align(
                input, rois[:count].double().cpu(), offset, *align, mask
            ),
            [random(2, 24, 9, 11), random(count, 2, 5, 7), random(count, 1, 5, 7)],
            tolerance,
        )
        pool = dict(output_size=(2, 3), sample_per_part=4, spatial_scale=0.125, trans_std=0.1)
        compare(
            lambda input, offset: deform_ps_roi_pool(input, rois, padded(offset), **pool)[:count],
            lambda input, offset: reference.deform_ps_roi_pool(input, rois[:count].double().cpu(), offset, **pool),
            [random(2, 24, 9, 11), random(count, 4, 2, 3)],
            tolerance,
        )

        sizes = torch.tensor(MAPS).flip(1)[:, None]
        for queries, channels in ATTENTIONS:
            pixels = torch.rand(2, queries, 2, len(MAPS), 4, 2) * (sizes + 4) - 2
            locations = ((pixels * 8).floor() + 0.25) / 8 / sizes  # never on a pixel's centre
            weights = torch.rand(locations.shape[:-1]).to(device, dtype).requires_grad_()
            compare(
                lambda *tensors: ms_deform_attn(tensors[0], MAPS, *tensors[1:]),
                lambda *tensors: reference.ms_deform_attn(tensors[0], MAPS, *tensors[1:]),
                [random(2, 111, 2, channels), locations.to(device).requires_grad_(), weights],
                tolerance,
            )

    for dtype, precision, tolerance in KINDS:
        torch.backends.cuda.matmul.fp32_precision = precision
        fused = dtype is torch.bfloat16 or precision == "tf32"
        for memory_format in (torch.contiguous_format, torch.channels_last):
            for deterministic in (False, True):
                torch.use_deterministic_algorithms(deterministic)
                print(dtype, precision, memory_format, "deterministic" * deterministic, flush=True)
                check_all(dtype, tolerance, memory_format, large=fused and not deterministic)
    if device == "cuda":
        torch.cuda.synchronize()
    print("every kernel gave the reference's results")


if __name__ == "__main__":
    main(*(sys.argv[1:] or ["cuda"]))
