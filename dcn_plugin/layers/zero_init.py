"""Layers that predict offsets: they start at zero, and the rules that initialise a model leave them there."""

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.utils import _pair


class _ZeroInit:
    """Mixin: parameters start at zero, so that an untrained deformable layer samples its regular grid."""

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
        self, in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1, device=None, dtype=None
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
