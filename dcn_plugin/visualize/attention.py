"""Where in the image multi-scale deformable attention samples."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dcn_plugin.sampling import Samples, attention_samples


class AttentionPoints(NamedTuple):
    """Samples of a query, (heads * levels * points,) each."""

    y: Tensor  # in pixels of the image
    x: Tensor
    weight: Tensor  # of the sample in its head's output, 1 for the heaviest; 0 where it does not count
    counts: Tensor  # whether the operator reads it, rather than a zero outside the map
    head: Tensor


@dataclass(eq=False)
class Attention:
    """A call of ``ms_deform_attn`` for one image; tensors are on the CPU.

    Locations are shares of each level's width and height. The levels are taken to cover what the model got, as they do
    where reference points and boxes are shares of that: the location (x, y) is at its pixel (x * W - 0.5, y * H - 0.5).
    """

    name: str  # of the innermost module that ran
    image: tuple[int, int]  # (H, W) of what the model got
    sizes: Tensor  # (levels, 2): (H, W) of each level
    locations: Tensor  # (Q, heads, levels, points, 2), x first
    weights: Tensor  # (Q, heads, levels, points)

    @property
    def of_pixels(self) -> bool:
        """Whether there is a query for each pixel of the levels, as in an encoder."""
        return len(self.locations) == int(self.sizes.prod(1).sum())

    def references(self) -> Tensor:
        """(Q, 2), x first: the pixels that are the queries, or else the weighted means of the queries' samples."""
        if self.of_pixels:
            axes = [[(torch.arange(n) + 0.5) / n for n in size] for size in self.sizes.tolist()]
            return torch.cat([torch.cartesian_prod(y, x).view(-1, 2).flip(-1) for y, x in axes])
        weights = self.weights.where(self.locations.isfinite().all(-1), 0)[..., None]
        summed = (weights * self.locations.nan_to_num(0, 0, 0)).sum((1, 2, 3))
        return summed / weights.sum((1, 2, 3)).clamp_min(1e-12)

    def query_at(self, y: float, x: float) -> int:
        """The query whose reference is nearest to a point of the image; of pixels, those of the largest level."""
        references = torch.stack(self.to_image(self.references()))
        distance = torch.hypot(*(references - torch.tensor([[float(y)], [float(x)]])))
        if self.of_pixels:
            pixels = self.sizes.prod(1)
            level = int(pixels.argmax())
            first = int(pixels[:level].sum())
            distance[:first] = distance[first + int(pixels[level]) :] = torch.inf
        return int(distance.argmin())

    def points(self, query: int) -> AttentionPoints:
        """Where a query samples."""
        y, x = self.to_image(self.locations[query])
        counts = self.samples().counts[0, query]
        weight = self.weights[query].where(counts, 0)
        head = torch.arange(len(weight))[:, None, None].expand_as(weight)
        found = AttentionPoints(y, x, weight / weight.max().clamp_min(1e-12), counts, head)
        return AttentionPoints(*(one.flatten() for one in found))

    def samples(self) -> Samples:
        """Its samples, (1, Q, heads, levels, points) each; displacements are from the references."""
        reference = self.references()[None, :, None].expand(-1, -1, len(self.sizes), -1)
        return attention_samples(self.sizes, reference, self.locations[None])

    def to_image(self, shares: Tensor) -> tuple[Tensor, Tensor]:
        """y and x in pixels of the image of locations (..., 2)."""
        height, width = self.image
        return shares[..., 1] * height - 0.5, shares[..., 0] * width - 0.5
