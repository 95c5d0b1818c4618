"""Layers that predict offsets: they start at zero, and the rules that initialise a model leave them there."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.common_types import _size_2_t
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.utils import _pair


class _ZeroInit(nn.Module):
    """Mixin: parameters start at zero, so that an untrained deformable layer samples its regular grid."""

    weight: Tensor
    bias: Any

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def apply(self, fn):
        # mmengine's initialisers walk a model with apply; every other use of it goes ahead.
        if getattr(fn, "__module__", None) == "mmengine.model.weight_init":
            return self
        return super().apply(fn)


class ZeroInitConv2d(_ZeroInit, _ConvNd):
    """A zero-initialised 2D convolution, dense and with bias.

    It is not an ``nn.Conv2d``: many detectors initialise in ``init_weights`` whatever is one, and would send the
    offsets astray. Arguments and state dict are those of ``nn.Conv2d``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: _size_2_t,
        stride: _size_2_t = 1,
        padding: str | _size_2_t = 0,
        dilation: _size_2_t = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(
            in_channels,
            out_channels,
            _pair(kernel_size),
            _pair(stride),
            _pair(padding),
            _pair(dilation),
            transposed=False,
            output_padding=_pair(0),
            groups=1,
            bias=True,
            padding_mode="zeros",
            device=device,
            dtype=dtype,
        )

    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(input, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class ZeroInitLinear(_ZeroInit, nn.Linear):
    """An ``nn.Linear`` that starts at zero."""
