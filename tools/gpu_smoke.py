"""Every kernel once on small tensors: what compute-sanitizer runs (tools/gpu_check.py)."""

import torch

from dcn_plugin.ops import deform_conv2d, deform_roi_align


def random(*size, dtype, memory_format=torch.contiguous_format):
    return torch.randn(size).to("cuda", dtype, memory_format=memory_format).requires_grad_()


def main() -> None:
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            for deterministic in (False, True):
                torch.use_deterministic_algorithms(deterministic)
                for channels, out_channels, groups in ((64, 64, 1), (6, 5, 1), (16, 16, 16)):
                    input = random(2, channels, 9, 11, dtype=dtype, memory_format=memory_format)
                    weight = random(out_channels, channels // groups, 3, 3, dtype=dtype, memory_format=memory_format)
                    offset, mask = random(2, 18, 9, 11, dtype=dtype), random(2, 9, 9, 11, dtype=dtype)
                    deform_conv2d(input, offset, weight, None, 1, 1, 1, mask).sum().backward()
                rois = torch.tensor([[0, 1.0, 2.0, 60.0, 70.0], [1, -9.0, 5.0, 30.0, 99.0], [7, 0.0, 0.0, 9.0, 9.0]])
                offset, mask = random(3, 2, 5, 7, dtype=dtype), random(3, 1, 5, 7, dtype=dtype)
                input = random(2, 24, 9, 11, dtype=dtype, memory_format=memory_format)
                deform_roi_align(input, rois.cuda(), offset, (5, 7), 0.125, 0, 0.1, mask).sum().backward()
    torch.cuda.synchronize()
    print("ran every kernel")


if __name__ == "__main__":
    main()
