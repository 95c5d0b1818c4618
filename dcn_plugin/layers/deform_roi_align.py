"""Deformable RoI align layers: given their offsets (DeformRoIAlign) or predicting them (the packs)."""

from collections.abc import Callable

import torch.fx
from torch import Tensor, nn
from torch.nn.common_types import _size_2_t
from torch.nn.modules.utils import _pair

from dcn_plugin.ops import deform_roi_align

from .max_offset import bounded_share, checked_bound
from .scripting import refuse_scripting
from .zero_init import ZeroInitLinear


@torch.fx.wrap
def _check_channels(input: Tensor, channels: int) -> None:
    if input.shape[1] != channels:
        raise ValueError(f"output_channels is {channels}, but input has shape {tuple(input.shape)}")


class DeformRoIAlign(nn.Module):
    """RoI align whose bins are displaced by given offsets: equations 5 and 6 of `Deformable Convolutional Networks
    <https://arxiv.org/abs/1703.06211>`_, sampled bilinearly; the semantics of mmcv's DeformRoIPool.

    Args:
        output_size: bins as int or (oh, ow).
        spatial_scale: pixels of the map per pixel of the image, e.g. 1/16.
        sampling_ratio: samples a bin and axis; 0 takes ceil(RoI's size / bins).
        gamma: scale of the offsets.
        max_offset: bound of the bins' displacements in x and in y, each, as a share of the RoI's width and height
            (0.5: half the RoI); beyond it the offsets' gradient is zero. None leaves them as they are.

    Raises:
        ValueError: a ``max_offset`` that is not positive.
    """

    # If set, called with (input, rois, offset, mask), which the operator is about to get.
    observer: Callable[[Tensor, Tensor, Tensor, Tensor | None], object] | None = None
    __prepare_scriptable__ = refuse_scripting

    def __init__(
        self,
        output_size: _size_2_t,
        spatial_scale: float = 1.0,
        sampling_ratio: int = 0,
        gamma: float = 0.1,
        *,
        max_offset: float | None = None,
    ):
        super().__init__()
        self.output_size = _pair(output_size)
        self.spatial_scale = float(spatial_scale)
        self.sampling_ratio = int(sampling_ratio)
        self.gamma = float(gamma)
        self.max_offset = checked_bound(max_offset)

    def forward(self, input: Tensor, rois: Tensor, offset: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Pools every RoI from the map.

        Args:
            input: (N, C, H, W).
            rois: (K, 5) as (batch index, x1, y1, x2, y2) in pixels of the image; K may be 0.
            offset: (K, 2, oh, ow) or None: displacement of each bin in x, then in y, as a share of gamma times the
                RoI's width and height.
            mask: (K, 1, oh, ow) or None, multiplies the bins (v2).

        Returns:
            (K, C, oh, ow).

        Raises:
            RuntimeError: shapes, dtypes or devices that do not fit together.
        """
        if offset is not None:
            offset = bounded_share(offset, self.gamma, self.max_offset)
            if self.observer is not None:
                self.observer(input, rois, offset, mask)
        return deform_roi_align(
            input, rois, offset, self.output_size, self.spatial_scale, self.sampling_ratio, self.gamma, mask
        )

    def extra_repr(self) -> str:
        bound = "" if self.max_offset is None else f", max_offset={self.max_offset:g}"
        return (
            f"output_size={self.output_size}, spatial_scale={self.spatial_scale}, "
            f"sampling_ratio={self.sampling_ratio}, gamma={self.gamma}{bound}"
        )


class DeformRoIAlignPack(DeformRoIAlign):
    """Deformable RoI align v1 that predicts its own offsets; stands wherever a RoI align does.

    The RoIs are pooled with straight bins, ``offset_fc`` (three linear layers, the last zero-initialised) predicts the
    bins' offsets from that, and the RoIs are pooled again. State dict: ``offset_fc.{0,2,4}.{weight,bias}``, as mmcv's
    DeformRoIPoolPack.

    Args:
        output_size, spatial_scale, sampling_ratio, gamma, max_offset: as of :class:`DeformRoIAlign`.
        output_channels: C, the channels of the map and of the output.
        deform_fc_channels: width of the hidden linear layers.

    Raises:
        ValueError: the map given to forward does not have ``output_channels`` channels.
    """

    def __init__(
        self,
        output_size: _size_2_t,
        output_channels: int,
        deform_fc_channels: int = 1024,
        spatial_scale: float = 1.0,
        sampling_ratio: int = 0,
        gamma: float = 0.1,
        *,
        max_offset: float | None = None,
    ):
        super().__init__(output_size, spatial_scale, sampling_ratio, gamma, max_offset=max_offset)
        self.output_channels = output_channels
        self.deform_fc_channels = deform_fc_channels
        bins = self.output_size[0] * self.output_size[1]
        self.offset_fc = nn.Sequential(
            nn.Linear(output_channels * bins, deform_fc_channels),
            nn.ReLU(inplace=True),
            nn.Linear(deform_fc_channels, deform_fc_channels),
            nn.ReLU(inplace=True),
            ZeroInitLinear(deform_fc_channels, 2 * bins),
        )

    def forward(self, input: Tensor, rois: Tensor) -> Tensor:
        """(N, output_channels, H, W) and rois (K, 5) to (K, output_channels, oh, ow)."""
        _check_channels(input, self.output_channels)
        straight = super().forward(input, rois).flatten(1)
        offset = self.offset_fc(straight).unflatten(1, (2, *self.output_size))
        return super().forward(input, rois, offset, self._predict_mask(straight))

    def _predict_mask(self, straight: Tensor) -> Tensor | None:
        return None


class ModulatedDeformRoIAlignPack(DeformRoIAlignPack):
    """Deformable RoI align v2 that predicts its own offsets and mask: equation 2 of `Deformable ConvNets v2
    <https://arxiv.org/abs/1811.11168>`_.

    As :class:`DeformRoIAlignPack`; beside it ``mask_fc`` (two linear layers, the last zero-initialised, and a sigmoid)
    predicts a factor for each bin, 0.5 at first. State dict: also ``mask_fc.{0,2}.{weight,bias}``, as mmcv's
    ModulatedDeformRoIPoolPack.
    """

    def __init__(
        self,
        output_size: _size_2_t,
        output_channels: int,
        deform_fc_channels: int = 1024,
        spatial_scale: float = 1.0,
        sampling_ratio: int = 0,
        gamma: float = 0.1,
        *,
        max_offset: float | None = None,
    ):
        super().__init__(
            output_size,
            output_channels,
            deform_fc_channels,
            spatial_scale,
            sampling_ratio,
            gamma,
            max_offset=max_offset,
        )
        bins = self.output_size[0] * self.output_size[1]
        self.mask_fc = nn.Sequential(
            nn.Linear(output_channels * bins, deform_fc_channels),
            nn.ReLU(inplace=True),
            ZeroInitLinear(deform_fc_channels, bins),
            nn.Sigmoid(),
        )

    def _predict_mask(self, straight: Tensor) -> Tensor:
        return self.mask_fc(straight).unflatten(1, (1, *self.output_size))
