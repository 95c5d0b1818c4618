"""Draws what a scene holds, with matplotlib. Every function returns a figure of its own, outside pyplot's registry."""

import functools
from collections.abc import Collection, Iterator, Sequence

import numpy as np
import torch
from matplotlib import colors, rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle
from torch import Tensor

from dcn_plugin.sampling import ps_roi_pool_edges, roi_align_edges

from .attention import Attention, AttentionPoints
from .points import Points
from .recording import Convolution, Pooling
from .scene import Scene, apart, overlap

DPI = 150
PANEL = 2.4  # inches, the longer side of a picture
POSITION, SAMPLE, STRAIGHT = "#2ee62e", "#ff2a2a", "#ffd21f"
STYLE = {"font.size": 7, "axes.titlesize": 7, "figure.dpi": DPI, "svg.fonttype": "none", "image.origin": "upper"}
ARROWS = 24  # at most, along the longer side

Place = tuple[float, float]


def _styled(draw):
    @functools.wraps(draw)
    def in_style(*args, **kwargs):
        with rc_context(STYLE):
            return draw(*args, **kwargs)

    return in_style


def figures(
    scene: Scene,
    layers: Sequence[str] = (),
    last: int = 3,
    places: Sequence[Place] = (),
    what: Collection[str] = ("points", "attention", "rois", "offsets"),
) -> Iterator[tuple[str, Figure]]:
    """The figures of a scene, with their names.

    Args:
        scene: what to draw.
        layers: globs on the names of layers, by default the last convolution of each stride, and the last attention of
            an encoder and of a decoder.
        last: compose the points over so many layers.
        places: (x, y) in the image, by default the centres of a small, a middling and a large detection.
        what: of 'points', 'attention', 'receptive_field', 'rois' and 'offsets'.
    """
    convolutions, attentions = scene.recording.chosen(layers), scene.recording.chosen_attentions(layers)
    places = places or scene.default_places(3)
    if "points" in what and convolutions:
        yield f"{scene.name}_points", sampling_points_figure(scene, places, convolutions, last)
    if "attention" in what and attentions:
        yield f"{scene.name}_attention", attention_figure(scene, places, attentions)
    if "receptive_field" in what and convolutions:
        yield f"{scene.name}_receptive_field", receptive_fields_figure(scene, places, convolutions)
    if "rois" in what and (figure := rois_figure(scene)):
        yield f"{scene.name}_rois", figure
    if "offsets" in what:
        names = [convolution.name for convolution in convolutions]
        for conv in convolutions:
            suffix = f"_stride{conv.output_grid.scale[0]:g}" if names.count(conv.name) > 1 else ""  # of a shared head
            yield f"{scene.name}_offsets_{conv.name}{suffix}", offsets_figure(scene, conv)


@_styled
def sampling_points_figure(
    scene: Scene, places: Sequence[Place], convolutions: Sequence[Convolution], layers: int = 3
) -> Figure:
    """A row for each place, a column for each last layer: green the output position, red its samples.

    A sample's size and opacity grow with its weight; one outside the map is not drawn. The places of a single layer
    are side by side.
    """
    if len(convolutions) == 1:
        figure, axes = _panels(scene.image.shape[:2], 1, len(places))
        axes = axes.T
    else:
        figure, axes = _panels(scene.image.shape[:2], len(places), len(convolutions))
    for row, place in zip(axes, places, strict=True):
        for ax, convolution in zip(row, convolutions, strict=True):
            _show(ax, scene)
            draw_points(ax, scene.points(convolution, place, layers), scene.centre(convolution, place))
    for ax, convolution in zip(axes[0], convolutions, strict=True):
        count = len(convolution.chain(layers))
        ax.set_title(f"{_title(convolution)}\n{count} deformable layer{'s' * (count > 1)} composed")
    return figure


def draw_points(ax: Axes, points: Points, centre: Place) -> None:
    order = points.weight.argsort()  # the heaviest on top
    order = order[points.counts[order]]
    weight = points.weight[order].numpy()
    rgba = np.tile(colors.to_rgba(SAMPLE), (len(order), 1))
    rgba[:, 3] = 0.15 + 0.85 * weight
    few = 1 + 2 / (1 + len(order) / 81)  # larger where there are few
    ax.scatter(points.x[order], points.y[order], s=few * (0.8 + 6 * weight), c=rgba, linewidths=0)
    ax.scatter(*centre, s=22, c=POSITION, edgecolors="black", linewidths=0.6, zorder=3)


@_styled
def attention_figure(scene: Scene, places: Sequence[Place], attentions: Sequence[Attention]) -> Figure:
    """A row for each place, a column for each attention: white the query's reference, in a colour a head its samples.

    Samples of all levels are drawn, their size and opacity growing with their weight; those outside a map are not.
    """
    figure, axes = _panels(scene.image.shape[:2], len(places), len(attentions))
    grey = _grey(scene.image)
    for row, place in zip(axes, places, strict=True):
        for ax, attention in zip(row, attentions, strict=True):
            ax.imshow(grey, cmap="gray", vmin=0, vmax=400)  # darker than the image, for the colours to be told apart
            _frame(ax, scene)
            draw_attention(ax, *scene.attended(attention, place), heads=attention.locations.shape[1])
    for ax, attention in zip(axes[0], attentions, strict=True):
        heads, levels, points = attention.locations.shape[1:4]
        ax.set_title(f"{attention.name}\n{heads} heads, {levels} levels, {points} points")
    return figure


def draw_attention(ax: Axes, points: AttentionPoints, centre: Place, heads: int) -> None:
    order = points.weight.argsort()  # the heaviest on top
    order = order[points.counts[order]]
    weight = points.weight[order].numpy()
    hue = points.head[order].numpy() / heads
    rgb = colors.hsv_to_rgb(np.stack([hue, np.full_like(hue, 0.85), np.ones_like(hue)], -1))
    rgba = np.concatenate([rgb, 0.4 + 0.6 * weight[:, None]], -1)
    ax.scatter(points.x[order], points.y[order], s=3 + 15 * weight, c=rgba, linewidths=0)
    ax.scatter(*centre, s=26, c="white", marker="s", edgecolors="black", linewidths=0.8, zorder=3)


@_styled
def receptive_fields_figure(scene: Scene, places: Sequence[Place], convolutions: Sequence[Convolution]) -> Figure:
    """For each place and layer the effective receptive field, offsets off on the left and on on the right.

    Brightness is the square root of the gradient, over nearly the largest of the field.
    """
    wanted = [(conv, scene.position(conv, place)) for place in places for conv in convolutions]
    pairs = list(zip(*(scene.receptive_fields(wanted, straight) for straight in (True, False)), strict=True))
    figure, axes = _panels(scene.image.shape[:2], len(places), 2 * len(convolutions))
    grey = _grey(scene.image)
    for number, (convolution, _) in enumerate(wanted):
        row, column = divmod(number, len(convolutions))
        place = places[row]
        for side, field in enumerate(pairs[number]):
            ax = axes[row][2 * column + side]
            ax.imshow(grey, cmap="gray", vmin=0, vmax=400)  # darker than the image, for the field to shine
            largest = max(float(np.quantile(field, 0.9995)), 1e-12)
            strength = (field / largest).clamp(0, 1).sqrt().numpy()
            opacity = np.minimum(1.5 * strength, 1)
            ax.imshow(strength, cmap="inferno", vmin=0, vmax=1, alpha=opacity, extent=scene.extent(field.shape))
            _frame(ax, scene)
            ax.scatter(*scene.centre(convolution, place), s=14, c=POSITION, edgecolors="black", linewidths=0.6)
            if row == 0:
                ax.set_title(f"{_title(convolution)}\n{'offsets as learned' if side else 'offsets off'}")
    return figure


@_styled
def rois_figure(scene: Scene, count: int = 3) -> Figure | None:
    """For each of the first detections its RoI's straight bins, and beside them the bins as they moved.

    The opacity of a moved bin is its mask. Of a layer that moves bins class by class, those of the detection's class.
    None where no RoI was pooled deformably.
    """
    chosen = [(k, found) for k in apart(scene.boxes) if (found := _roi_of(scene, scene.boxes[k]))][:count]
    if not chosen:
        return None
    figure, axes = _panels((1, 1), len(chosen), 2)
    for row, (k, (pooling, index)) in zip(axes, chosen, strict=True):
        bins, straight = _bins(scene, pooling, index, int(scene.labels[k]))
        mask = torch.ones(bins.shape[:2]) if pooling.mask is None else pooling.mask[index, 0]
        mask = mask / mask.max().clamp_min(1e-12)
        for ax, boxes, colour, opacity in (
            (row[0], straight, STRAIGHT, torch.ones_like(mask)),
            (row[1], bins, SAMPLE, mask),
        ):
            ax.imshow(_faded(scene.image), interpolation="bicubic")
            ax.set_facecolor("0.92")
            for (x1, y1, x2, y2), alpha in zip(boxes.flatten(0, 1).tolist(), opacity.flatten().tolist(), strict=True):
                face, edge = colors.to_rgba(colour, 0.12 * alpha), colors.to_rgba(colour, 0.25 + 0.75 * alpha)
                ax.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, facecolor=face, edgecolor=edge, linewidth=0.7))
            (x1, y1), (x2, y2) = straight[0, 0, :2].tolist(), straight[-1, -1, 2:].tolist()
            ax.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=POSITION, linewidth=1.0))
            _zoom(ax, torch.cat([straight.flatten(0, 1), bins.flatten(0, 1)]))
        label = int(scene.labels[k])
        name = scene.classes[label] if label < len(scene.classes) else str(label)
        row[0].set_title(f"{name}, {float(scene.scores[k]):.2f}\nstraight bins")
        row[1].set_title(f"{pooling.name}\nmoved bins")
    return figure


@_styled
def offsets_figure(scene: Scene, convolution: Convolution) -> Figure:
    """A layer's offset field: arrows of the mean displacement, every tap's by the colour wheel, and the mask.

    Hue is the direction in which a sample moves, saturation how far, white not at all; the wheel's rim is the largest
    displacement. Deform groups are averaged.
    """
    kernel_h, kernel_w = convolution.kernel_size
    offset = convolution.offset.unflatten(0, (-1, kernel_h, kernel_w, 2)).mean(0)  # (kh, kw, 2, Ho, Wo)
    offset = offset.nan_to_num(0, 0, 0)
    largest = float(offset.norm(dim=2).max())
    panels = 2 if convolution.mask is None else 3
    figure, axes = _panels(scene.image.shape[:2], 1, panels)
    arrows, taps = axes[0][:2]

    arrows.imshow(255 - (255 - _grey(scene.image)) * 0.6, cmap="gray", vmin=0, vmax=255)
    _frame(arrows, scene)
    times = _draw_arrows(arrows, scene, convolution, offset.mean((0, 1)))
    arrows.set_title(f"{_title(convolution)}\nmean displacement, {times:g} times as long")

    taps.set_title(f"displacement of the {kernel_h}x{kernel_w} taps,\nup to {largest:.2f} pixels of the map")
    taps.set_axis_off()
    taps.set_box_aspect(scene.image.shape[0] / scene.image.shape[1])
    share, gap = 0.88, 0.025  # of the panel, the rest being the wheel's
    width, height = (share * (1 + gap) / n - gap for n in (kernel_w, kernel_h))
    for i in range(kernel_h):
        for j in range(kernel_w):
            place = j * (width + gap), 1 - height - i * (height + gap), width, height
            inset = taps.inset_axes(place, xticks=[], yticks=[])
            inset.imshow(_wheel(offset[i, j], largest), aspect="auto", interpolation="nearest")
            inset.spines[:].set_linewidth(0.4)
    wheel = taps.inset_axes([share - 0.02, -0.02, 0.16, 0.16], xticks=[], yticks=[])
    _draw_wheel(wheel)

    if convolution.mask is not None:
        mask = convolution.mask.mean(0).numpy()
        ax = axes[0][2]
        ax.imshow(_grey(scene.image), cmap="gray", vmin=0, vmax=255)
        extent = scene.extent(mask.shape, convolution.output_grid)
        drawn = ax.imshow(mask, cmap="viridis", alpha=0.8, extent=extent, interpolation="nearest")
        _frame(ax, scene)
        ax.set_title("mask, mean of the taps")
        bar = figure.colorbar(ScalarMappable(drawn.norm, drawn.cmap), ax=ax, fraction=0.046, pad=0.03)
        bar.outline.set_linewidth(0.4)
        bar.ax.tick_params(width=0.4, length=2)
    return figure


@_styled
def rendered(figure: Figure, dpi: int = DPI) -> np.ndarray:
    """A figure's pixels, (H, W, 3) uint8."""
    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


@_styled
def save(figure: Figure, path, **options) -> None:
    """Writes a figure in the format that the path's suffix names."""
    figure.savefig(path, dpi=DPI, bbox_inches="tight", pad_inches=0.02, **options)


def _panels(shape: tuple[int, int], rows: int, columns: int) -> tuple[Figure, np.ndarray]:
    """A figure and its axes, each for a picture of this shape (height, width)."""
    height, width = shape
    panel_w, panel_h = PANEL * width / max(height, width), PANEL * height / max(height, width)
    size = columns * (panel_w + 0.06), rows * (panel_h + 0.06) + 0.5
    layout = ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.03, wspace=0.01, hspace=0.01)
    figure = Figure(figsize=size, layout=layout)
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    return figure, axes


def _show(ax: Axes, scene: Scene) -> None:
    ax.imshow(_faded(scene.image))
    _frame(ax, scene)


def _frame(ax: Axes, scene: Scene) -> None:
    height, width = scene.image.shape[:2]
    ax.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))


def _zoom(ax: Axes, boxes: Tensor) -> None:
    """Looks at boxes and a little around them, within a square."""
    low, high = boxes[:, :2].amin(0), boxes[:, 2:].amax(0)
    (x, y), half = ((low + high) / 2).tolist(), 0.55 * float((high - low).max())
    ax.set(xlim=(x - half, x + half), ylim=(y + half, y - half))


def _title(convolution: Convolution) -> str:
    stride = convolution.output_grid.scale[0]
    return f"{convolution.name}, stride {stride:g}"


def _grey(image: np.ndarray) -> np.ndarray:
    return image @ np.array([0.299, 0.587, 0.114])


def _faded(image: np.ndarray) -> np.ndarray:
    """An image with little colour, for that of what is drawn on it to be told apart."""
    return (0.35 * image + 0.65 * _grey(image)[..., None]).round().astype(np.uint8)


def _draw_arrows(ax: Axes, scene: Scene, convolution: Convolution, displacement: Tensor) -> float:
    """Draws at most so many arrows that they keep apart; returns how many times as long as they are."""
    out_h, out_w = convolution.output_size
    step = max(-(-max(out_h, out_w) // ARROWS), 1)
    rows, columns = (torch.arange((n - 1) % step // 2, n, step) for n in (out_h, out_w))
    i, j = torch.meshgrid(rows, columns, indexing="ij")
    y, x = scene.frame.to_image(*convolution.output_grid.to_image(i, j))
    scales = zip(displacement[:, i, j], convolution.input_grid.scale, scene.frame.scale, strict=True)
    dy, dx = (one * of_map * of_image for one, of_map, of_image in scales)
    reach = torch.hypot(dy, dx)
    apart = step * convolution.output_grid.scale[1] * scene.frame.scale[1]
    times = max(round(1.5 * apart / max(float(reach.max()), 0.01 * apart)), 1)
    ax.quiver(
        *(one.numpy() for one in (x, y, dx * times, dy * times, reach)),
        angles="xy",
        scale_units="xy",
        scale=1,
        cmap="plasma",
        width=0.005,
        headwidth=3.5,
        headlength=4,
        headaxislength=3.5,
        minlength=0,
    )
    return times


def _wheel(offset: Tensor, largest: float) -> np.ndarray:
    """Colours (H, W, 3) of displacements (2, H, W), y first: hue the direction, saturation the length."""
    dy, dx = offset.numpy()
    hue = (np.arctan2(-dy, dx) / (2 * np.pi)) % 1
    saturation = np.clip(np.hypot(dy, dx) / max(largest, 1e-12), 0, 1)
    return colors.hsv_to_rgb(np.stack([hue, saturation, np.ones_like(hue)], -1))


def _draw_wheel(ax: Axes) -> None:
    y, x = np.mgrid[-1:1:81j, -1:1:81j]
    picture = np.ones((81, 81, 4))
    picture[..., :3] = _wheel(torch.tensor(np.stack([y, x])), 1.0)
    picture[..., 3] = np.hypot(y, x) <= 1
    ax.imshow(picture)
    ax.set_axis_off()


def _roi_of(scene: Scene, box: Tensor) -> tuple[Pooling, int] | None:
    """The RoI, of all that were pooled, that overlaps a detection most."""
    best, found = 0.0, None
    for pooling in scene.recording.poolings:
        if len(pooling.rois):
            share, index = overlap(box, _to_image(scene, pooling.rois[:, 1:])).max(0)
            if share > best:
                best, found = float(share), (pooling, int(index))
    return found


def _bins(scene: Scene, pooling: Pooling, index: int, label: int) -> tuple[Tensor, Tensor]:
    """A RoI's moved and straight bins, (h, w, 4) each, as edges in mmdet's sense less half a pixel, for drawing."""
    samples = pooling.samples()
    label = label if label < samples.y.shape[1] else 0
    dy, dx, y, x = (one[index, label] for one in samples[:4])
    edges = roi_align_edges if pooling.operator == "deform_roi_align" else ps_roi_pool_edges
    _, size = edges(pooling.rois[index : index + 1], pooling.scale)
    half_w, half_h = size[0, 0] / y.shape[1] / 2, size[0, 1] / y.shape[0] / 2

    def placed(y, x):
        boxes = torch.stack([x - half_w, y - half_h, x + half_w, y + half_h], -1)
        return _to_image(scene, (boxes + 0.5) / pooling.scale) - 0.5

    return placed(y, x), placed(y - dy, x - dx)


def _to_image(scene: Scene, boxes: Tensor) -> Tensor:
    """Boxes (..., 4) by their edges, from what the model got to the image."""
    y, x = scene.frame.to_image(boxes[..., 1::2] - 0.5, boxes[..., 0::2] - 0.5)
    return torch.stack([x[..., 0], y[..., 0], x[..., 1], y[..., 1]], -1) + 0.5
