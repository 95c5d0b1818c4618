"""The affine map between the pixels of a feature map and those of the image that it was computed from."""

from collections.abc import Sequence
from dataclasses import dataclass

Pair = tuple[float, float]


@dataclass(frozen=True)
class Grid:
    """Where the pixels of a map lie in the image: the centre of pixel p is at ``scale * p + shift``, in y and in x.

    Whole coordinates are centres of pixels, of the map as of the image. A window's centre is the middle of what it
    covers, padding included: a 3x3 convolution of stride 2 and padding 1 puts its output pixel i at 2i of its input,
    whereas the ratio of the sizes alone would put it at 2i + 0.5.
    """

    scale: Pair = (1.0, 1.0)
    shift: Pair = (0.0, 0.0)

    def to_image(self, y, x):
        return y * self.scale[0] + self.shift[0], x * self.scale[1] + self.shift[1]

    def to_map(self, y, x):
        return (y - self.shift[0]) / self.scale[0], (x - self.shift[1]) / self.scale[1]

    def then(self, step: Sequence[float], start: Sequence[float]) -> "Grid":
        """The grid of a map whose pixel p is at ``step * p + start`` of this one."""
        (scale_y, scale_x), shift = self.scale, self.to_image(*start)
        return Grid((scale_y * step[0], scale_x * step[1]), shift)

    def window(self, kernel, stride, padding, dilation) -> "Grid":
        """The grid of what a convolution or pooling makes of this one; arguments are pairs, as of ``nn.Conv2d``."""
        reach = zip(kernel, padding, dilation, strict=True)
        return self.then(tuple(stride), tuple(d * (k - 1) / 2 - p for k, p, d in reach))

    def transposed(self, kernel, stride, padding, dilation) -> "Grid":
        """As :meth:`window`, of a transposed convolution; on average, where output pixels cover different windows."""
        reach = zip(kernel, stride, padding, dilation, strict=True)
        return self.then(tuple(1 / s for s in stride), tuple((p - d * (k - 1) / 2) / s for k, s, p, d in reach))

    def resized(self, size: tuple[int, int], new: tuple[int, int], align_corners: bool = False) -> "Grid":
        """The grid after a resampling from one size (H, W) to another: by the ratio of the sizes."""
        if align_corners:
            return self.then(tuple((a - 1) / max(b - 1, 1) for a, b in zip(size, new, strict=True)), (0.0, 0.0))
        step = tuple(a / b for a, b in zip(size, new, strict=True))
        return self.then(step, tuple((s - 1) / 2 for s in step))
