"""The plot of accuracy over scale, and the moving picture of where a digit's network looks as its scale changes."""

import copy
import statistics
from pathlib import Path

import torch
from digit_sets import SIZE, rescale
from torch import Tensor, nn

from dcn_plugin import convert, visualize

# Differ in lightness too.
COLOURS = ["#777777", "#0072b2", "#56b4e9", "#e69f00", "#cc79a7", "#333333"]
POINT, OUTPUT = (255, 80, 48), (48, 255, 48)
ZOOM, PAD, CAPTION = 7, 4, 16  # pixels of the picture: a digit's pixel, around a panel, the line of text below


def accuracy_by_scale(results: dict, path: Path) -> None:
    """A line for each network, its mean over the seeds, in a band of their standard deviation."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    style = {"svg.fonttype": "none", "svg.hashsalt": "dcn_plugin", "axes.spines.top": False, "axes.spines.right": False}
    seeds = list(results["seeds"].values())
    with plt.rc_context(style):
        figure, axis = plt.subplots(figsize=(9, 3.6))
        for name, colour in zip(seeds[0], COLOURS, strict=True):
            scales = [float(scale) for scale in seeds[0][name]["accuracy"]]
            found = list(zip(*(rows[name]["accuracy"].values() for rows in seeds), strict=True))
            means = [statistics.mean(values) for values in found]
            spread = [statistics.stdev(values) if len(seeds) > 1 else 0 for values in found]
            band = [[m + sign * s for m, s in zip(means, spread, strict=True)] for sign in (-1, 1)]
            axis.plot(scales, means, color=colour, label=name, linestyle="--" if colour == COLOURS[-1] else "-")
            axis.fill_between(scales, *band, color=colour, alpha=0.2, linewidth=0)
        axis.set(xlabel="scale of the test digits", ylabel="right (%)", ylim=(0, 101))
        axis.grid(color="#e5e5e5", linewidth=0.7)
        axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
        figure.tight_layout()
        figure.savefig(path, facecolor="white", metadata=dict(Date=None))
        plt.close(figure)


def image_points(net: nn.Sequential, image: Tensor, position: tuple[int, int]) -> Tensor:
    """Where the convolutions after the stem sample for one output position of the last, composed.

    Args:
        net: of :func:`experiment.cnn`; of a plain one, the points of offsets 0.
        image: (1, 1, 28, 28).
        position: (y, x) on the last convolution's output.

    Returns:
        (P, 2), y and x in pixels of the stem's output, which are the image's: of the 729 points those in its map.
    """
    if not hasattr(net.conv4[0], "conv_offset"):
        net = convert(copy.deepcopy(net), "DCN")
    points = visualize.sampling_points(visualize.record(net, image).convolutions[-1], position)
    return torch.stack([points.y, points.x], 1)[points.counts]


@torch.no_grad()
def sampling_points(nets: dict[str, nn.Module], images: Tensor, labels: Tensor, path: Path) -> None:
    """A GIF of one digit from full size to the smallest and back: a panel for each network with its points and answer.

    The digit is the first that all networks get right at full size and the deformable ones at the smallest too.
    """
    from PIL import Image

    scales = torch.linspace(1, 0.4, 16)

    def right(scale):
        return {
            name: net(rescale(images, torch.full((len(images),), scale))).argmax(1) == labels
            for name, net in nets.items()
        }

    full, small = right(1.0), right(0.4)
    plain = next(iter(nets))
    good = torch.stack([*full.values(), *(found for name, found in small.items() if name != plain)]).all(0)
    chosen = int(good.int().argmax())
    palette = Image.new("P", (1, 1))
    palette.putpalette([value for grey in range(0, 256, 15) for value in [grey] * 3] + [*POINT, *OUTPUT])
    frames = []
    for scale in scales:
        image = rescale(images[chosen : chosen + 1], scale[None])
        panels = [_panel(net, name, image) for name, net in nets.items()]
        width = sum(panel.width for panel in panels)
        frame = Image.new("RGB", (width, panels[0].height), "white")
        for i, panel in enumerate(panels):
            frame.paste(panel, (i * panel.width, 0))
        frames.append(frame.quantize(palette=palette, dither=Image.Dither.NONE))
    frames += frames[-2:0:-1]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=120, loop=0, optimize=True)


def _panel(net: nn.Sequential, name: str, image: Tensor):
    from PIL import Image, ImageDraw

    side = SIZE * ZOOM
    digit = Image.fromarray((image[0, 0] * 150).byte().numpy()).resize((side, side), Image.Resampling.NEAREST)
    panel = Image.new("RGB", (side + 2 * PAD, side + 2 * PAD + CAPTION), "white")
    panel.paste(digit, (PAD, PAD))
    draw = ImageDraw.Draw(panel)

    def dot(y, x, radius, colour):
        y, x = PAD + (y + 0.5) * ZOOM, PAD + (x + 0.5) * ZOOM
        if min(y, x) >= PAD and max(y, x) < PAD + side:
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)

    for y, x in image_points(net, image, (3, 3)).tolist():
        dot(y, x, 1.2, POINT)
    dot(12, 12, 3.5, OUTPUT)  # the output position (3, 3), by the strides alone
    answer = net(image).softmax(1)[0]
    draw.text((PAD, side + PAD + 3), f"{name}: {int(answer.argmax())} ({float(answer.max()):.0%})", fill="black")
    return panel
