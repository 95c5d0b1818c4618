"""A table of how far deformable layers reach, by layer and by the size of the objects."""

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from .attention import Attention
from .recording import Convolution, Pooling, Recording

SIZES = "small", "medium", "large", "background"
AREAS = 32**2, 96**2  # COCO's bounds between them, in pixels of the image
HEADINGS = "layer", "mean", "max", "mean", "max", "outside", "mask", *SIZES
GROUPS = {1: "of the map", 3: "of the image", 7: "effective dilation, by object"}  # above the headings, by column


def effective_dilation(y: Tensor, x: Tensor) -> Tensor:
    """The mean distance of adjacent samples of a filter, as table 2 of `Deformable Convolutional Networks
    <https://arxiv.org/abs/1703.06211>`_ measures it.

    Adjacent are the samples of kernel positions next to each other in a row or in a column: 12 pairs of a 3x3 kernel.
    A plain convolution has its dilation.

    Args:
        y, x: positions (..., kh, kw, Ho, Wo).

    Returns:
        (..., Ho, Wo); not a number for a 1x1 kernel.
    """
    distances = [torch.hypot(y.diff(dim=axis), x.diff(dim=axis)).flatten(-4, -3) for axis in (-4, -3)]
    return torch.cat(distances, dim=-3).mean(-3)


def size_of_objects(boxes: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """The index in ``SIZES`` of the smallest of the boxes (K, 4) that points are in, in pixels' edges as mmdet's."""
    found = torch.full_like(y, SIZES.index("background"), dtype=torch.long)
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    for k in areas.argsort(descending=True).tolist():
        x1, y1, x2, y2 = boxes[k].tolist()
        inside = (x + 0.5 >= x1) & (x + 0.5 < x2) & (y + 0.5 >= y1) & (y + 0.5 < y2)
        found[inside] = sum(float(areas[k]) >= bound for bound in AREAS)
    return found


class Table:
    """Statistics of the deformable layers over several images.

    ``mean`` and ``max`` are lengths of displacements, in pixels of the layer's input map and in pixels of the image; of
    RoI layers, of the bins; of attention, from the pixel that is the query, or from the mean of the query's samples, in
    pixels of each level. ``outside`` is the share of samples that fall outside the map and so count as 0, padding
    included (of bins, by their centres). ``mask`` is the mask's mean. The last columns are the effective dilation
    (:func:`effective_dilation`), in pixels of the input map, of the filters whose centre is in a small, medium or large
    object (COCO's bounds: 32 and 96 pixels of the image, squared) or in none.
    """

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, list[Tensor]]] = {}

    def add(self, recording: Recording, boxes: Tensor, scale: tuple[float, float] = (1.0, 1.0), at=lambda y, x: (y, x)):
        """Adds an image.

        Args:
            recording: of the model on it.
            boxes: (K, 4) of the objects in it, as x1, y1, x2, y2 in pixels of the image that ``at`` leads to.
            scale: pixels of that image for one of what the model got, in y and in x.
            at: from coordinates (y, x) of what the model got to those of that image.
        """
        calls: list[Convolution | Pooling | Attention] = [
            *recording.convolutions,
            *recording.poolings,
            *recording.attentions,
        ]
        for call in calls:
            row = self.rows.setdefault(call.name or "(the model)", defaultdict(list))
            dy, dx, y, x, counts = call.samples()
            row["reach"].append(torch.hypot(dy, dx).flatten())
            row["counts"].append(counts.flatten())
            if not isinstance(call, Attention) and call.mask is not None:
                row["mask"].append(call.mask.flatten())
            step: Sequence[float | Tensor]
            if isinstance(call, Attention):
                step = (torch.tensor(call.image) / call.sizes)[:, None].unbind(-1)  # a level's pixel
            elif isinstance(call, Pooling):
                step = 1 / call.scale, 1 / call.scale
            elif call.grid is None:
                continue
            else:
                step = call.grid.scale
                self._add_dilation(row, call, y, x, boxes, at)
            row["reach px"].append(torch.hypot(dy * step[0] * scale[0], dx * step[1] * scale[1]).flatten())

    def _add_dilation(self, row, call: Convolution, y: Tensor, x: Tensor, boxes: Tensor, at) -> None:
        if call.kernel_size == (1, 1):
            return
        dilation = effective_dilation(y, x)  # (1, deform groups, Ho, Wo)
        i, j = torch.meshgrid(*(torch.arange(n).float() for n in call.output_size), indexing="ij")
        sizes = size_of_objects(boxes, *at(*call.output_grid.to_image(i, j)))
        for index, name in enumerate(SIZES):
            row[name].append(dilation[..., sizes == index].flatten())

    def __str__(self) -> str:
        lines: list[tuple[str, ...]] = [HEADINGS]
        for name, row in self.rows.items():
            values = {key: torch.cat(parts) for key, parts in row.items()}
            cells = [
                f"{value(values[key]):.2f}" if key in values and values[key].numel() else "-"
                for key, value in (
                    *[(key, value) for key in ("reach", "reach px") for value in (_finite_mean, _finite_max)],
                    ("counts", lambda counts: 1 - counts.float().mean()),
                    *[(key, _finite_mean) for key in ("mask", *SIZES)],
                )
            ]
            lines.append((name, *cells))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        above = ""
        for column, text in GROUPS.items():
            above = above.ljust(sum(widths[:column]) + 2 * column) + text + "  "
        return "\n".join(
            [above.rstrip()]
            + [
                "  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
                for line in lines
            ]
        )


def _finite_mean(values: Tensor) -> Tensor:
    return values[values.isfinite()].mean()


def _finite_max(values: Tensor) -> Tensor:
    finite = values[values.isfinite()]
    return finite.max() if finite.numel() else finite.new_tensor(float("nan"))
