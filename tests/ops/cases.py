"""Inputs that the operators' tests share."""

from dataclasses import dataclass, replace

import torch
from torch.nn import functional as F


def pair(value):
    return value if isinstance(value, tuple) else (value, value)


@dataclass(frozen=True)
class ConvCase:
    """Sizes of one deformable convolution; ``make`` draws its tensors."""

    batch: int = 2
    channels: int = 6
    size: tuple = (7, 9)
    out_channels: int = 4
    kernel: int | tuple = 3
    stride: int | tuple = 1
    padding: int | tuple = 1
    dilation: int | tuple = 1
    groups: int = 1
    deform_groups: int = 1
    mask: bool = True
    bias: bool = True

    @property
    def out_size(self):
        return tuple(
            (s + 2 * p - d * (k - 1) - 1) // st + 1
            for s, p, d, k, st in zip(
                self.size, *(pair(v) for v in (self.padding, self.dilation, self.kernel, self.stride)), strict=True
            )
        )

    @property
    def options(self):
        return dict(stride=self.stride, padding=self.padding, dilation=self.dilation)

    def make(self, dtype=torch.float64, device="cpu", memory_format=torch.contiguous_format, away_from_lattice=False):
        """input, offset, weight, bias, mask as a dict of tensors; absent ones are None.

        Offsets are a few pixels; with ``away_from_lattice`` their fractions lie in [0.2, 0.8], where all is smooth.
        """
        taps = pair(self.kernel)[0] * pair(self.kernel)[1]
        per_tap = (self.batch, self.deform_groups * taps, *self.out_size)
        offset = torch.randn(self.batch, 2 * per_tap[1], *self.out_size) * 2
        if away_from_lattice:
            offset = offset.floor() + 0.2 + 0.6 * torch.rand_like(offset)
        tensors = dict(
            input=torch.randn(self.batch, self.channels, *self.size).contiguous(memory_format=memory_format),
            offset=offset,
            weight=torch.randn(self.out_channels, self.channels // self.groups, *pair(self.kernel)),
            bias=torch.randn(self.out_channels) if self.bias else None,
            mask=torch.rand(per_tap) if self.mask else None,
        )
        return {name: None if t is None else t.to(device, dtype) for name, t in tensors.items()}


BASE = ConvCase()

CONV_CASES = {
    "base": BASE,
    "v1": replace(BASE, mask=False),
    "no-bias": replace(BASE, bias=False),
    "v1-no-bias": replace(BASE, mask=False, bias=False),
    "1x1": replace(BASE, kernel=1, padding=0),
    "1x5": replace(BASE, kernel=(1, 5), padding=(0, 2)),
    "5x1": replace(BASE, kernel=(5, 1), padding=(2, 0), stride=(2, 1)),
    "stride": replace(BASE, stride=2),
    "stride-asymmetric": replace(BASE, stride=(1, 2), padding=(2, 0)),
    "dilation": replace(BASE, dilation=2, padding=2),
    "dilation-asymmetric": replace(BASE, dilation=(1, 3), padding=(0, 3)),
    "no-padding": replace(BASE, padding=0),
    "smaller-than-kernel": replace(BASE, size=(2, 1), padding=1),
    "one-pixel": replace(BASE, size=(1, 1), padding=1),
    "groups": replace(BASE, groups=2),
    "deform-groups": replace(BASE, deform_groups=3),
    "groups-do-not-divide": replace(BASE, channels=12, groups=3, deform_groups=2, out_channels=6),
    "groups-do-not-divide-2": replace(BASE, channels=12, groups=4, deform_groups=3, out_channels=8),
    "groups-of-whole-vectors": replace(BASE, channels=64, groups=2, deform_groups=4, out_channels=34),
    "depthwise": replace(BASE, channels=40, groups=40, out_channels=40),
    "depthwise-deform-groups": replace(BASE, channels=36, groups=36, out_channels=36, deform_groups=3),
    "depthwise-multiplier": replace(BASE, channels=10, groups=10, out_channels=20),
    "one-channel": replace(BASE, channels=1, out_channels=1),
    "16-channels": replace(BASE, channels=16, out_channels=16),
    "17-channels": replace(BASE, channels=17, out_channels=19),
    "130-channels": replace(BASE, channels=130, out_channels=33, size=(5, 6)),
    "300-channels-tiles": replace(BASE, batch=1, channels=300, out_channels=7, size=(11, 13)),
    "many-positions": replace(BASE, channels=3, out_channels=2, size=(23, 31)),
    "batch-7": replace(BASE, batch=7),
    "batch-33": replace(BASE, batch=33, size=(3, 4)),
}


def _inside_nan(t):
    """A slice, on every axis, of a larger tensor of NaN."""
    padded = F.pad(t, [1] * 2 * t.dim(), value=float("nan"))
    return padded[(slice(1, -1),) * t.dim()]


def _inside_nan_channels_last(t):
    if t.dim() != 4:
        return _inside_nan(t)
    padded = F.pad(t, [1] * 8, value=float("nan")).contiguous(memory_format=torch.channels_last)
    return padded[1:-1, 1:-1, 1:-1, 1:-1]


# Ways to hold a tensor's values that are neither contiguous nor channels_last, next to NaN where there is room.
STRIDED = {
    "slice": _inside_nan,
    "slice-channels-last": _inside_nan_channels_last,
    "every-other": lambda t: torch.stack([t, torch.full_like(t, float("nan"))], -1)[..., 0],
    "reversed-axes": lambda t: t.permute(*range(t.dim())[::-1]).contiguous().permute(*range(t.dim())[::-1]),
}


def relative_error(value, expected):
    """Largest difference over the largest expected magnitude; NaN or a wrong shape never pass."""
    assert value.shape == expected.shape
    scale = expected.double().abs().max().clamp_min(1e-30) if expected.numel() else 1
    difference = (value.double() - expected.double()).abs()
    return float(difference.max() / scale) if value.numel() else 0.0


def random_gradient(output):
    """In the output's memory format."""
    generator = torch.Generator().manual_seed(1)
    return torch.empty_like(output).copy_(torch.randint(-32, 33, output.shape, generator=generator)) / 16


def run(function, tensors, **options):
    """Output and gradients of ``function`` by name of the tensor, for one random gradient of the output.

    The random gradient is the same for every function and dtype that gives an output of the same shape: multiples of
    1/16, which every dtype holds exactly.
    """
    # Not cloned: a clone of a strided tensor is contiguous.
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items() if t is not None}
    output = function(**leaves, **options)
    gradients = torch.autograd.grad(output, list(leaves.values()), random_gradient(output), allow_unused=True)
    return output.detach(), dict(zip(leaves, gradients, strict=True))


def as_float64(tensors):
    """The same values on the CPU in float64: for a kernel's reference, whatever rounding made them."""
    return {name: None if t is None else t.detach().double().cpu() for name, t in tensors.items()}


def assert_repeats(gradient, expected):
    """Equal bits; on CUDA, where atomics may add up a gradient in any order, equal but for that."""
    if gradient.is_cuda:
        assert relative_error(gradient, expected) < (1e-12 if gradient.dtype == torch.float64 else 1e-5)
    else:
        assert torch.equal(gradient, expected)


def check_against(function, reference, tensors, tolerance, **options):
    """Compares output and every gradient with the reference in float64 on the same values."""
    output, gradients = run(function, tensors, **options)
    expected, expected_gradients = run(reference, as_float64(tensors), **options)
    assert relative_error(output.cpu(), expected) <= tolerance, "output"
    for name, gradient in gradients.items():
        assert relative_error(gradient.cpu(), expected_gradients[name]) <= tolerance, f"gradient of {name}"
    return output
