"""Deformable position-sensitive RoI pooling layers: given offsets and score maps (DeformPSRoIPool), or predicting the
offsets from the straight bins (the pack), or both by convolutions (DeformRFCNPool)."""

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn.common_types import _size_2_t
from torch.nn.modules.utils import _pair

from dcn_plugin.ops import deform_ps_roi_pool

from .max_offset import bounded_share, checked_bound
from .scripting import refuse_scripting
from .zero_init import ZeroInitConv2d, ZeroInitLinear


class DeformPSRoIPool(nn.Module):
    """Position-sensitive RoI pooling whose bins are displaced by given offsets: equation 6 of `Deformable Convolutional
    Networks <https://arxiv.org/abs/1703.06211>`_ as its authors implemented it for Deformable R-FCN.

    Args:
        output_size: bins as int or (oh, ow).
        group_size: score maps of an output channel as int or (gh, gw); None for output_size, 1 for ordinary features.
        part_size: offsets of a class as int or (ph, pw); None for output_size.
        sample_per_part: samples a bin and axis.
        spatial_scale: pixels of the map per pixel of the image, e.g. 1/16.
        trans_std: scale of the offsets.
        max_offset: bound of the bins' displacements in x and in y, each, as a share of the RoI's width and height
            (0.5: half the RoI); beyond it the offsets' gradient is zero. None leaves them as they are.

    Raises:
        ValueError: a ``max_offset`` that is not positive.
    """

    # If set, called with (input, rois, offset, None), which the operator is about to get.
    observer: Callable[[Tensor, Tensor, Tensor, Tensor | None], object] | None = None
    __prepare_scriptable__ = refuse_scripting

    def __init__(
        self,
        output_size: _size_2_t,
        group_size: _size_2_t | None = None,
        part_size: _size_2_t | None = None,
        sample_per_part: int = 4,
        spatial_scale: float = 1.0,
        trans_std: float = 0.1,
        max_offset: float | None = None,
    ):
        super().__init__()
        self.output_size = _pair(output_size)
        self.group_size = self.output_size if group_size is None else _pair(group_size)
        self.part_size = self.output_size if part_size is None else _pair(part_size)
        self.sample_per_part = int(sample_per_part)
        self.spatial_scale = float(spatial_scale)
        self.trans_std = float(trans_std)
        self.max_offset = checked_bound(max_offset)

    def forward(self, input: Tensor, rois: Tensor, offset: Tensor | None = None) -> Tensor:
        """Pools every RoI from the score maps.

        Args:
            input: (N, output_dim * gh * gw, H, W).
            rois: (K, 5) as (batch index, x1, y1, x2, y2) in pixels of the image; K may be 0.
            offset: (K, 2 * classes, ph, pw) or None: displacement of each class's parts in x, then in y, as a share of
                trans_std times the RoI's width and height.

        Returns:
            (K, output_dim, oh, ow).

        Raises:
            RuntimeError: shapes, dtypes or devices that do not fit together.
        """
        if offset is not None:
            offset = bounded_share(offset, self.trans_std, self.max_offset)
            if self.observer is not None:
                self.observer(input, rois, offset, None)
        return deform_ps_roi_pool(
            input,
            rois,
            offset,
            self.output_size,
            self.group_size,
            self.part_size,
            self.sample_per_part,
            self.spatial_scale,
            self.trans_std,
        )

    def extra_repr(self) -> str:
        bound = "" if self.max_offset is None else f", max_offset={self.max_offset:g}"
        return (
            f"output_size={self.output_size}, group_size={self.group_size}, part_size={self.part_size}, "
            f"sample_per_part={self.sample_per_part}, spatial_scale={self.spatial_scale}, "
            f"trans_std={self.trans_std}{bound}"
        )


class DeformPSRoIPoolPack(DeformPSRoIPool):
    """Deformable position-sensitive RoI pooling that predicts its own offsets from the straight bins.

    The RoIs are pooled with straight bins, ``offset_fc`` (three linear layers, the last zero-initialised) predicts the
    offsets from that, and the RoIs are pooled again: the paper's figure 3. State dict:
    ``offset_fc.{0,2,4}.{weight,bias}``.

    Args:
        output_size, group_size, part_size, sample_per_part, spatial_scale, trans_std, max_offset: as of
            :class:`DeformPSRoIPool`.
        output_dim: channels of the output; the map has output_dim * gh * gw.
        offset_classes: of offsets, each moving its share of the output channels.
        deform_fc_channels: width of the hidden linear layers.
    """

    def __init__(
        self,
        output_size: _size_2_t,
        output_dim: int,
        group_size: _size_2_t | None = None,
        part_size: _size_2_t | None = None,
        sample_per_part: int = 4,
        offset_classes: int = 1,
        deform_fc_channels: int = 1024,
        spatial_scale: float = 1.0,
        trans_std: float = 0.1,
        max_offset: float | None = None,
    ):
        super().__init__(output_size, group_size, part_size, sample_per_part, spatial_scale, trans_std, max_offset)
        self.output_dim = output_dim
        self.offset_classes = offset_classes
        (out_h, out_w), (part_h, part_w) = self.output_size, self.part_size
        self.offset_fc = nn.Sequential(
            nn.Linear(output_dim * out_h * out_w, deform_fc_channels),
            nn.ReLU(inplace=True),
            nn.Linear(deform_fc_channels, deform_fc_channels),
            nn.ReLU(inplace=True),
            ZeroInitLinear(deform_fc_channels, 2 * offset_classes * part_h * part_w),
        )

    def forward(self, input: Tensor, rois: Tensor) -> Tensor:
        """(N, output_dim * gh * gw, H, W) and rois (K, 5) to (K, output_dim, oh, ow)."""
        straight = super().forward(input, rois).flatten(1)
        offset = self.offset_fc(straight).unflatten(1, (2 * self.offset_classes, *self.part_size))
        return super().forward(input, rois, offset)


class DeformRFCNPool(DeformPSRoIPool):
    """Deformable position-sensitive RoI pooling of ordinary features: the branch of Deformable R-FCN, the paper's
    figure 4.

    1x1 convolutions turn the features into score maps (``score_maps``) and into offset fields (``offset_fields``,
    zero-initialised). The fields are pooled position-sensitively with straight bins, which gives each RoI its offsets,
    and the score maps deformably with these. The score maps start small (standard deviation 0.01), as R-FCN's. State
    dict: ``{score_maps,offset_fields}.{weight,bias}``.

    Args:
        output_size, group_size, part_size, sample_per_part, spatial_scale, trans_std, max_offset: as of
            :class:`DeformPSRoIPool`.
        in_channels: of the features.
        output_dim: channels of the output.
        offset_classes: of offsets, each moving its share of the output channels; 0 for no offsets, R-FCN's own pooling.
    """

    def __init__(
        self,
        output_size: _size_2_t,
        in_channels: int,
        output_dim: int,
        offset_classes: int = 1,
        group_size: _size_2_t | None = None,
        part_size: _size_2_t | None = None,
        sample_per_part: int = 4,
        spatial_scale: float = 1.0,
        trans_std: float = 0.1,
        max_offset: float | None = None,
    ):
        super().__init__(output_size, group_size, part_size, sample_per_part, spatial_scale, trans_std, max_offset)
        (group_h, group_w), (part_h, part_w) = self.group_size, self.part_size
        self.score_maps = nn.Conv2d(in_channels, output_dim * group_h * group_w, 1)
        nn.init.normal_(self.score_maps.weight, std=0.01)
        nn.init.zeros_(self.score_maps.bias)  # type: ignore[arg-type]
        self.offset_fields = None
        if offset_classes:
            self.offset_fields = ZeroInitConv2d(in_channels, 2 * offset_classes * part_h * part_w, 1)

    def forward(self, input: Tensor, rois: Tensor) -> Tensor:
        """Features (N, in_channels, H, W) and rois (K, 5) to (K, output_dim, oh, ow)."""
        offset = None
        if self.offset_fields is not None:
            offset = deform_ps_roi_pool(
                self.offset_fields(input),
                rois,
                output_size=self.part_size,
                sample_per_part=self.sample_per_part,
                spatial_scale=self.spatial_scale,
            )
        return super().forward(self.score_maps(input), rois, offset)
