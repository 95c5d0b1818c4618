"""Multi-scale deformable attention as a layer, which predicts its sampling locations and attention weights."""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dcn_plugin.ops import ms_deform_attn
from dcn_plugin.ops.ms_deform_attn import shapes_tensor

from .scripting import refuse_scripting


class MultiScaleDeformableAttention(nn.Module):
    """Multi-scale deformable attention: equation 3 of `Deformable DETR <https://arxiv.org/abs/2010.04159>`_.

    From each query, linear layers predict ``num_points`` offsets and attention weights for each head and each level of
    a feature pyramid. The values, the maps' pixels through a linear layer, are sampled at the reference point plus the
    offsets, and the samples are summed with the softmax of the weights.

    Arguments and state dict are those of mmcv's: ``sampling_offsets``, ``attention_weights``, ``value_proj`` and
    ``output_proj``, each with ``weight`` and ``bias``. Like the operator, positions are float32 (float64 for float64
    values) whatever dtype the linear layers have, under autocast too.

    Args:
        embed_dims: width of queries, keys and outputs.
        num_heads: attention heads; they divide ``embed_dims``.
        num_levels: maps of the pyramid.
        num_points: samples of a query, head and level.
        im2col_step: accepted and unused.
        dropout: probability, of the output before ``identity`` is added.
        batch_first: tensors are (N, Q, C) rather than (Q, N, C).
        norm_cfg, init_cfg: accepted and unused, as in mmcv's.
        value_proj_ratio: width of the values over ``embed_dims``.

    Raises:
        ValueError: no heads, or heads that do not divide the width of queries or values.
    """

    # If set, called with (spatial_shapes, reference_points, sampling_locations, None): the operator is about to get the
    # locations, and None stands where other layers have a mask.
    observer: Callable[[Tensor, Tensor, Tensor, None], object] | None = None
    __prepare_scriptable__ = refuse_scripting
    is_init = True  # mmengine's init_weights of the modules around it leaves it alone

    def __init__(
        self,
        embed_dims: int = 256,
        num_heads: int = 8,
        num_levels: int = 4,
        num_points: int = 4,
        im2col_step: int = 64,
        dropout: float = 0.1,
        batch_first: bool = False,
        norm_cfg: dict | None = None,
        init_cfg: Any = None,
        value_proj_ratio: float = 1.0,
    ):
        super().__init__()
        if num_heads < 1:
            raise ValueError(f"num_heads must be positive, got {num_heads}")
        value_dims = int(embed_dims * value_proj_ratio)
        for name, width in (("embed_dims", embed_dims), ("embed_dims * value_proj_ratio", value_dims)):
            if width % num_heads:
                raise ValueError(f"{name} ({width}) must be divisible by num_heads ({num_heads})")
        self.embed_dims = embed_dims
        self.num_heads = num_heads
        self.num_levels = num_levels
        self.num_points = num_points
        self.im2col_step = im2col_step
        self.batch_first = batch_first
        self.norm_cfg = norm_cfg
        self.dropout = nn.Dropout(dropout)
        samples = num_heads * num_levels * num_points
        self.sampling_offsets = nn.Linear(embed_dims, 2 * samples)
        self.attention_weights = nn.Linear(embed_dims, samples)
        self.value_proj = nn.Linear(embed_dims, value_dims)
        self.output_proj = nn.Linear(value_dims, embed_dims)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """As in the paper: each head looks in a direction of its own, its points 1, 2, ... pixels away, and all points
        weigh the same."""
        angle = torch.arange(self.num_heads, dtype=torch.float32) * (2 * math.pi / self.num_heads)
        direction = torch.stack([angle.cos(), angle.sin()], -1)
        direction = direction / direction.abs().amax(-1, keepdim=True)  # onto a square
        steps = torch.arange(1, self.num_points + 1)
        offsets = (direction[:, None, None] * steps[:, None]).expand(-1, self.num_levels, -1, -1)
        nn.init.zeros_(self.sampling_offsets.weight)
        self.sampling_offsets.bias.copy_(offsets.flatten())
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        identity: Tensor | None = None,
        query_pos: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        reference_points: Tensor | None = None,
        spatial_shapes: Tensor | Sequence[tuple[int, int]] | None = None,
        level_start_index: Tensor | None = None,
        residual: Tensor | None = None,
        **kwargs,
    ) -> Tensor:
        """Attends to a pyramid of maps. Shapes are those of ``batch_first=True``; without it N is the second axis.

        Args:
            query: (N, Q, embed_dims).
            key: accepted and unused, as any keyword that is not listed here.
            value: (N, S, embed_dims), the levels' pixels one level after the other, row by row; by default ``query``.
            identity: (N, Q, embed_dims), added to the output; by default ``query``.
            query_pos: (N, Q, embed_dims), added to the query, or None.
            key_padding_mask: (N, S), true where a pixel is padding and its value counts as zero, or None.
            reference_points: (N, Q, num_levels, 2) as (x, y), or (N, Q, num_levels, 4) as (x, y, width, height) of
                boxes: shares of each level's width and height, padding included. Offsets are pixels of the level around
                a point, and halves of the box over ``num_points`` around a box's centre.
            spatial_shapes: (num_levels, 2) as (H, W) of each level, as a tensor or a list; S is the sum of H * W.
            level_start_index: accepted and unused; it follows from ``spatial_shapes``.
            residual: deprecated name of ``identity``.

        Returns:
            (N, Q, embed_dims).

        Raises:
            ValueError: no reference points or spatial shapes, or these or the mask of another shape.
            RuntimeError: (the operator) shapes, dtypes or devices that do not fit together.
        """
        if residual is not None:
            warnings.warn("residual is deprecated, use identity", DeprecationWarning, stacklevel=2)
            identity = residual if identity is None else identity
        if reference_points is None or spatial_shapes is None:
            raise ValueError("needs reference_points and spatial_shapes")
        spatial_shapes = shapes_tensor(spatial_shapes)
        if tuple(spatial_shapes.shape) != (self.num_levels, 2):
            raise ValueError(
                f"spatial_shapes must have shape (num_levels, 2) = {(self.num_levels, 2)}, "
                f"got {tuple(spatial_shapes.shape)}"
            )
        value = query if value is None else value
        identity = query if identity is None else identity
        query = query if query_pos is None else query + query_pos
        if not self.batch_first:
            query, value = query.transpose(0, 1), value.transpose(0, 1)

        value = self.value_proj(value)
        if key_padding_mask is not None:
            if key_padding_mask.shape != value.shape[:2]:
                raise ValueError(
                    f"key_padding_mask must have shape (N, S) = {tuple(value.shape[:2])}, "
                    f"got {tuple(key_padding_mask.shape)}"
                )
            value = value.masked_fill(key_padding_mask.bool()[..., None], 0)
        value = value.unflatten(-1, (self.num_heads, -1))
        locations = self._sampling_locations(query, reference_points, spatial_shapes, value.dtype)
        points = self.num_levels, self.num_points
        weights = self.attention_weights(query).unflatten(-1, (self.num_heads, -1)).softmax(-1).unflatten(-1, points)
        output = self.output_proj(ms_deform_attn(value, spatial_shapes, locations, weights))
        if not self.batch_first:
            output = output.transpose(0, 1)
        return self.dropout(output) + identity

    def _sampling_locations(
        self, query: Tensor, reference_points: Tensor, spatial_shapes: Tensor, dtype: torch.dtype
    ) -> Tensor:
        """(N, Q, heads, levels, points, 2)."""
        shape = (*query.shape[:2], self.num_levels)
        fits = reference_points.dim() == 4 and reference_points.shape[-1] in (2, 4)
        if not fits or any(got not in (1, n) for got, n in zip(reference_points.shape, shape, strict=False)):
            raise ValueError(
                f"reference_points must be {(*shape, 2)} or {(*shape, 4)}, got {tuple(reference_points.shape)}"
            )
        # In half precision a position would be off by pixels.
        dtype = torch.float64 if dtype is torch.float64 else torch.float32
        offsets = self.sampling_offsets(query).to(dtype)
        offsets = offsets.unflatten(-1, (self.num_heads, self.num_levels, self.num_points, 2))
        reference = reference_points.to(dtype)[:, :, None, :, None]
        if reference.shape[-1] == 2:
            sizes = spatial_shapes.to(offsets.device, non_blocking=True).flip(-1)  # W, H
            locations = reference + offsets / sizes.clamp(min=1)[:, None]  # an empty level has no pixels to divide by
        else:
            locations = reference[..., :2] + offsets / self.num_points * reference[..., 2:] * 0.5
        if self.observer is not None:
            self.observer(spatial_shapes, reference_points, locations, None)
        return locations

    def extra_repr(self) -> str:
        return (
            f"embed_dims={self.embed_dims}, num_heads={self.num_heads}, num_levels={self.num_levels}, "
            f"num_points={self.num_points}"
        )
