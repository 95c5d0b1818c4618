"""Deformable convolution layers: given their offsets (DeformConv2d, ModulatedDeformConv2d) or predicting them (the
packs).

All are ``nn.Conv2d``, and name it among their direct bases, since mmengine's init rules look no further up than that:
they are initialised and folded with a batch norm like the convolution they stand for.
"""

import logging
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.common_types import _size_2_t
from torch.nn.modules.utils import _pair

from dcn_plugin.ops import deform_conv2d

from .max_offset import bounded, checked_bound
from .scripting import refuse_scripting
from .zero_init import ZeroInitConv2d

logger = logging.getLogger("dcn_plugin")

_loading: tuple[list, set[str]] = ([], set())  # what was said of the state dict that was loaded last


def _explicit_padding(
    padding: str | _size_2_t, kernel_size: _size_2_t, stride: _size_2_t, dilation: _size_2_t
) -> _size_2_t:
    """'same' and 'valid' as the numbers they stand for; numbers as they are."""
    if not isinstance(padding, str):
        return padding
    if padding == "valid":
        return 0
    span = [d * (k - 1) for d, k in zip(_pair(dilation), _pair(kernel_size), strict=True)]
    if padding != "same" or _pair(stride) != (1, 1) or any(s % 2 for s in span):
        raise ValueError(
            f"padding must be an integer, two integers, 'valid', or, with stride 1 and an even dilation * (kernel - 1),"
            f" 'same'; got {padding!r} with kernel_size={kernel_size}, stride={stride}, dilation={dilation}"
        )
    return span[0] // 2, span[1] // 2


class _DeformConv(nn.Conv2d):
    """What a deformable convolution's constructor adds to that of ``nn.Conv2d``, in mmcv's positional order."""

    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    # If set, called with (input, offset, mask), which the operator is about to get.
    observer: Callable[[Tensor, Tensor, Tensor | None], object] | None = None
    __prepare_scriptable__ = refuse_scripting

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: _size_2_t,
        stride: _size_2_t = 1,
        padding: str | _size_2_t = 0,
        dilation: _size_2_t = 1,
        groups: int = 1,
        deform_groups: int = 1,
        bias: bool | str = False,
        im2col_step: int = 32,
        *,
        padding_mode: str = "zeros",
        deformable_groups: int | None = None,
        max_offset: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        if deformable_groups is not None:
            if deform_groups not in (1, deformable_groups):
                raise ValueError(f"got both deform_groups={deform_groups} and deformable_groups={deformable_groups}")
            warnings.warn("deformable_groups is deprecated, use deform_groups", DeprecationWarning, stacklevel=2)
            deform_groups = deformable_groups
        if not isinstance(deform_groups, int) or deform_groups < 1:
            raise ValueError(f"deform_groups must be a positive integer, got {deform_groups!r}")
        if in_channels % deform_groups:
            raise ValueError(f"in_channels ({in_channels}) must be divisible by deform_groups ({deform_groups})")
        if padding_mode != "zeros":
            raise ValueError(f"a deformable convolution reads zeros outside the map: padding_mode={padding_mode!r}")
        if isinstance(bias, str) and bias != "auto":
            raise ValueError(f"bias must be True, False or 'auto', got {bias!r}")
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            _explicit_padding(padding, kernel_size, stride, dilation),
            dilation,
            groups,
            bool(bias),
            device=device,
            dtype=dtype,
        )
        self.deform_groups = deform_groups
        self.max_offset = checked_bound(max_offset)

    def _deform(
        self, input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None = None
    ) -> Tensor:
        offset = bounded(offset, self.max_offset)
        if self.observer is not None:
            self.observer(input, offset, mask)
        return deform_conv2d(input, offset, weight, bias, self.stride, self.padding, self.dilation, mask=mask)

    def extra_repr(self) -> str:
        bound = "" if self.max_offset is None else f", max_offset={self.max_offset:g}"
        return f"{super().extra_repr()}, deform_groups={self.deform_groups}{bound}"


class DeformConv2d(_DeformConv, nn.Conv2d):
    """Deformable convolution v1, its offsets given: equation 2 of `Deformable Convolutional Networks
    <https://arxiv.org/abs/1703.06211>`_.

    Maps smaller than the kernel need no special care, as long as the padding leaves at least one output position.

    Args:
        in_channels, out_channels, kernel_size, stride, dilation, groups, device, dtype: as in ``nn.Conv2d``.
        padding: zeros on both sides, as in ``nn.Conv2d``; 'same' only where both sides get as many.
        deform_groups: groups of input channels that share their offsets; must divide ``in_channels``.
        bias: adds a learnable bias. 'auto' (for callers that leave it to a norm layer) means True. mmcv's v1 layers
            have none.
        im2col_step: accepted for mmcv's configs and unused: there is no column matrix.
        padding_mode: only 'zeros'.
        deformable_groups: deprecated name of ``deform_groups``.
        max_offset: bound of the displacements in y and in x, each, in pixels of the input map; beyond it their gradient
            is zero. None leaves them as they are.

    Raises:
        ValueError: channels that do not divide, another ``padding_mode`` or string ``padding``, a ``max_offset`` that
            is not positive.
    """

    def forward(self, x: Tensor, offset: Tensor) -> Tensor:
        """Convolves x, each sample displaced.

        Args:
            x: (N, in_channels, H, W).
            offset: (N, 2 * deform_groups * kh * kw, Ho, Wo), in pixels of x: for each deform group and kernel position
                (row-major) the displacement in y, then in x.

        Returns:
            (N, out_channels, Ho, Wo), sizes as of ``nn.Conv2d``.

        Raises:
            RuntimeError: shapes, dtypes or devices that do not fit together.
        """
        return self._deform(x, offset, self.weight, self.bias)


class ModulatedDeformConv2d(_DeformConv, nn.Conv2d):
    """Deformable convolution v2, its offsets and mask given: equation 1 of `Deformable ConvNets v2
    <https://arxiv.org/abs/1811.11168>`_.

    Arguments and errors are those of :class:`DeformConv2d`, but there is a bias by default.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: _size_2_t,
        stride: _size_2_t = 1,
        padding: str | _size_2_t = 0,
        dilation: _size_2_t = 1,
        groups: int = 1,
        deform_groups: int = 1,
        bias: bool | str = True,
        *args: Any,
        **kwargs: Any,
    ):
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            deform_groups,
            bias,
            *args,
            **kwargs,
        )

    def forward(self, x: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        """Convolves x, each sample displaced and weighted.

        Args:
            x, offset: as of :class:`DeformConv2d`.
            mask: (N, deform_groups * kh * kw, Ho, Wo), multiplies the samples as it is, without a sigmoid.
        """
        return self._deform(x, offset, self.weight, self.bias, mask)


class _PredictsOffsets(_DeformConv):
    """``conv_offset``, a zero-initialised convolution of the same geometry, predicts what displaces the samples.

    Subclasses compute in ``_conv_forward``, the function through which torch and mmcv run an ``nn.Conv2d`` with other
    weights than its own (a batch norm folded in on the fly, fake quantisation).
    """

    _version = 2  # of the state dict, as mmcv counts: before 2, the parent held the offset convolution
    _channels_per_tap: int
    _in_metadata: tuple[str, ...] = ("max_offset",)  # attributes that a state dict keeps beside the version
    _warned_of_offsets = False

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        taps = self.kernel_size[0] * self.kernel_size[1]
        self.conv_offset = ZeroInitConv2d(
            self.in_channels,
            self._channels_per_tap * self.deform_groups * taps,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            device=self.weight.device,
            dtype=self.weight.dtype,
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) to (N, out_channels, Ho, Wo), as ``nn.Conv2d``."""
        return self._conv_forward(x, self.weight, self.bias)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if hasattr(destination, "_metadata"):
            destination._metadata[prefix[:-1]].update({name: getattr(self, name) for name in self._in_metadata})
        self._warn_of_dead_offsets(prefix)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, *args):
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, *args)
        for name in self._in_metadata:
            own = getattr(self, name)
            trained = local_metadata.get(name, own)
            if own != trained:
                layer, text = prefix[:-1] or type(self).__name__, f"the checkpoint was trained with {name}={trained}"
                if self._says_once(missing_keys, text):
                    text += f", but this layer has {name}={own} and computes something else; set {name}={trained}"
                logger.warning(f"{layer}: {text}")

    @staticmethod
    def _says_once(loading: list, text: str) -> bool:
        """Whether a text is new to a loading, which all layers know by the list of missing keys that they share."""
        global _loading
        if _loading[0] is not loading:
            _loading = (loading, set())
        new = text not in _loading[1]
        _loading[1].add(text)
        return new

    def _warn_of_dead_offsets(self, prefix):
        """Offsets that are not finite sample nothing: the layer is dead, while the loss stays finite."""
        offsets = [p for p in self.conv_offset.parameters() if type(p) is nn.Parameter and not p.is_meta]
        if not self._warned_of_offsets and not all(p.isfinite().all() for p in offsets):
            self._warned_of_offsets = True
            logger.warning(
                f"{prefix[:-1] or type(self).__name__}: its conv_offset is not finite, so the layer samples nothing; "
                "go on from an earlier checkpoint, with a smaller learning rate of the offsets or with max_offset"
            )


class DeformConv2dPack(_PredictsOffsets, DeformConv2d, nn.Conv2d):  # type: ignore[misc]
    """Deformable convolution v1 that predicts its own offsets; stands wherever an ``nn.Conv2d`` does.

    Until training moves ``conv_offset`` from zero it computes what the plain convolution computes. Arguments and errors
    are those of :class:`DeformConv2d`. State dict: ``weight``, ``bias`` (where there is one), ``conv_offset.weight``,
    ``conv_offset.bias``, as mmcv's.
    """

    _channels_per_tap = 2

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._deform(input, self.conv_offset(input), weight, bias)


class ModulatedDeformConv2dPack(_PredictsOffsets, ModulatedDeformConv2d, nn.Conv2d):  # type: ignore[misc]
    """Deformable convolution v2 that predicts its own offsets and mask; stands wherever an ``nn.Conv2d`` does.

    The mask is ``mask_scale`` times the sigmoid of ``conv_offset``'s last third. With a scale of 1, as in every
    published model, it starts at 0.5: a new layer computes half of what the plain convolution computes (plus the bias).
    With a scale of 2 it starts at 1, exactly, so that a trained convolution may become this layer, as
    :func:`dcn_plugin.convert` makes it. Other arguments and errors are those of :class:`ModulatedDeformConv2d`, the
    state dict's keys those of :class:`DeformConv2dPack`. The scale is a matter of the config, as the stride is; the
    state dict's metadata keeps it, and loading into a layer of another scale is a warning in the log 'dcn_plugin'.
    """

    _channels_per_tap = 3
    _in_metadata = ("max_offset", "mask_scale")

    def __init__(self, *args: Any, mask_scale: float = 1.0, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.mask_scale = float(mask_scale)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        predicted = self.conv_offset(input)
        taps = self.conv_offset.out_channels // 3
        offset, mask = predicted.split([2 * taps, taps], dim=-3)  # so that the operator names an unbatched map
        mask = mask.sigmoid()
        if self.mask_scale != 1:
            mask = mask * self.mask_scale
        return self._deform(input, offset, weight, bias, mask)

    def extra_repr(self) -> str:
        scale = "" if self.mask_scale == 1 else f", mask_scale={self.mask_scale:g}"
        return super().extra_repr() + scale
