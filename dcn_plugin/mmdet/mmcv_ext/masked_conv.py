"""The two steps of mmcv's ``masked_conv2d``, between which mmcv multiplies by the weight. It has no gradients."""

from torch import Tensor
from torch.nn import functional as F

__all__ = ["masked_col2im_forward", "masked_im2col_forward"]


def masked_im2col_forward(
    im: Tensor,
    mask_h_idx: Tensor,
    mask_w_idx: Tensor,
    col: Tensor,
    kernel_h: int,
    kernel_w: int,
    pad_h: int,
    pad_w: int,
) -> None:
    """Fills ``col`` (C * kernel_h * kernel_w, M) with what the kernel sees at M positions of ``im`` (1, C, H, W)."""
    padded = F.pad(im[0], (pad_w, pad_w, pad_h, pad_h))
    columns = col.view(-1, kernel_h, kernel_w, len(mask_h_idx))
    for i in range(kernel_h):
        for j in range(kernel_w):
            columns[:, i, j] = padded[:, mask_h_idx + i, mask_w_idx + j]


def masked_col2im_forward(
    col: Tensor, mask_h_idx: Tensor, mask_w_idx: Tensor, im: Tensor, height: int, width: int, channels: int
) -> None:
    """Puts the columns of ``col`` (C, M) to their positions in ``im`` (1, C, height, width)."""
    im[0, :, mask_h_idx, mask_w_idx] = col
