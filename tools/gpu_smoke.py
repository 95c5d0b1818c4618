"""Every kernel once on small tensors: what compute-sanitizer runs (tools/gpu_check.py)."""

import torch

from dcn_plugin.ops import deform_conv2d, deform_ps_roi_pool, deform_roi_align

# channels, out_channels, groups, kernel, size: columns of vectors and of single channels, depthwise convolutions, and,
# from 128 * 128 positions on, the large tiles of the fused kernels.
CONVOLUTIONS = (
    *((64, 64, 1, 3, 11), (6, 5, 1, 3, 11), (16, 16, 16, 3, 11), (16, 256, 1, 3, 9)),
    *((16, 64, 1, 1, 92), (16, 128, 1, 1, 92), (16, 256, 1, 1, 92)),
)
ROIS = [[0, 1.0, 2.0, 60.0, 70.0], [1, -9.0, 5.0, 30.0, 99.0], [7, 0.0, 0.0, 9.0, 9.0]]


def main() -> None:
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        for memory_format in (torch.contiguous_format, torch.channels_last):

            def random(*size, dtype=dtype, memory_format=memory_format):
                return torch.randn(size).to("cuda", dtype, memory_format=memory_format).requires_grad_()

            for deterministic in (False, True):
                torch.use_deterministic_algorithms(deterministic)
                for channels, out_channels, groups, kernel, size in CONVOLUTIONS:
                    if size > 64 and (deterministic or dtype is torch.float32):
                        continue  # large for the fused kernels' sake
                    input = random(2, channels, size, size)
                    weight = random(out_channels, channels // groups, kernel, kernel)
                    offset, mask = (random(2, count * kernel**2, size, size) for count in (2, 1))
                    deform_conv2d(input, offset, weight, None, 1, kernel // 2, 1, mask).sum().backward()
                rois = torch.tensor(ROIS, device="cuda")
                input, offset, mask = random(2, 24, 9, 11), random(3, 2, 5, 7), random(3, 1, 5, 7)
                deform_roi_align(input, rois, offset, (5, 7), 0.125, 0, 0.1, mask).sum().backward()
                deform_ps_roi_pool(input, rois, random(3, 4, 2, 3), (2, 3), spatial_scale=0.125).sum().backward()
    torch.cuda.synchronize()
    print("ran every kernel")


if __name__ == "__main__":
    main()
