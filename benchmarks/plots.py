"""The plots of `report.py`."""

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

from .records import ordered, select

plt.rcParams.update(
    {
        "svg.fonttype": "none",  # text stays text: small files, the reader's own font
        "svg.hashsalt": "dcn_plugin",  # the same JSON makes the same file
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "legend.frameon": False,
    }
)
# The peers' differ in lightness too.
COLOURS = dict(dcn_plugin="#0072b2", mmcv="#e69f00", torchvision="#cc79a7", openvino="#888888", onnxruntime="#bbbbbb")
STAGES = "c3", "c4", "c5"
TITLES = {"forward": "forward", "forward+backward": "forward and backward"}
WHISKER = dict(color="#333333", linewidth=0.8)


def colour(name):
    return COLOURS.get(name, "#999999")


def around(low, middle, high):
    """Error bars from the quartiles."""
    return [[middle - low], [high - middle]]


def save(figure, results, path):
    machine = results["machine"]
    where = machine.get("gpu") or f"{machine['processor']}, {machine['threads']} threads, {machine['instruction_set']}"
    text = f"{results['command']}\n{where}, torch {machine['torch']}, commit {machine['commit']}"
    figure.tight_layout()
    figure.text(0.01, -0.15 / figure.get_figheight(), text, fontsize=7, color="#555555", va="top")
    figure.savefig(path, facecolor="white", bbox_inches="tight", metadata=dict(Date=None))
    plt.close(figure)
    return path


def ratio_plot(results, path):
    """Everyone's ratio to the dense convolution on ResNet-50's stages, in float32."""
    rows = {direction: select(results, "deform_conv2d", direction) for direction in TITLES}
    rows = {direction: [row for row in found if row["case"] in STAGES] for direction, found in rows.items()}
    rows = {direction: found for direction, found in rows.items() if found}
    if not rows:
        return None
    figure, axes = plt.subplots(1, len(rows), figsize=(5 * len(rows), 3.4), squeeze=False, sharey=True)
    for axis, (direction, found) in zip(axes[0], rows.items(), strict=True):
        ratios = [{n: c["ratio"] for n, c in row["contenders"].items() if "ratio" in c} for row in found]
        names = ordered({name for ratio in ratios for name in ratio})
        width = 0.84 / len(names)
        for i, name in enumerate(names):
            at = [(j, ratio[name]) for j, ratio in enumerate(ratios) if name in ratio]
            for x, (low, middle, high) in at:
                x += (i - (len(names) - 1) / 2) * width
                axis.bar(x, middle - 1, width * 0.92, bottom=1, color=colour(name))
                axis.errorbar(x, middle, around(low, middle, high), **WHISKER)
                text = f"{middle:.2f}" if middle < 10 else f"{middle:.0f}"
                axis.annotate(text, (x, max(high, 1)), (0, 2), textcoords="offset points", ha="center", fontsize=7.5)
        axis.axhline(1, color="#333333", linewidth=1, linestyle="--")
        axis.set_yscale("log")
        ticks = [1, 2, 5, 10, 20, 50, 100]
        axis.set_yticks(ticks, map(str, ticks))
        axis.minorticks_off()
        axis.grid(axis="y", color="#e5e5e5", linewidth=0.7)
        axis.set_xticks(range(len(found)), [f"{row['case']}\n{'×'.join(map(str, row['shape']))}" for row in found])
        axis.tick_params(length=0)
        axis.set_title(TITLES[direction], fontsize=11)
        axis.legend([plt.Rectangle((0, 0), 1, 1, color=colour(name)) for name in names], names, fontsize=8)
    axes[0][0].set_ylabel("time / dense convolution's")
    axes[0][0].set_ylim(bottom=0.8)
    figure.suptitle("DCNv2 3×3, float32: times the dense convolution (1, dashed)", x=0.02, ha="left", weight="bold")
    return save(figure, results, path)


def detector_plot(results, path):
    rows = [row for row in results["times"] if row["operator"] == "detector" and row["contenders"]]
    if not rows:
        return None
    figure, axes = plt.subplots(1, len(rows), figsize=(4 * len(rows), 2.2), squeeze=False)
    for axis, row in zip(axes[0], rows, strict=True):
        names = ordered(row["contenders"])
        for y, name in enumerate(names):
            found = row["contenders"][name]
            low, middle, high = (seconds / row["images"] for seconds in found["seconds"])
            axis.barh(y, middle, 0.7, color=colour(name))
            axis.errorbar(middle, y, xerr=around(low, middle, high), **WHISKER)
            text = f"{middle:.2f} s" + (f"  ×{found['ratio'][1]:.2f}" if "ratio" in found else "")
            axis.annotate(text, (high, y), (4, 0), textcoords="offset points", va="center", fontsize=8)
        axis.set_yticks(range(len(names)), names)
        axis.invert_yaxis()
        axis.margins(x=0.3)
        axis.set_title(f"{row['case']}\n{row['direction']}", fontsize=9)
    figure.suptitle("Detectors, seconds an image", x=0.02, ha="left", weight="bold", fontsize=11)
    return save(figure, results, path)


def write(results, path):
    """Writes the plots whose runs the results hold; returns the paths."""
    plots = dict(ratio=ratio_plot, detector=detector_plot)
    made = [plot(results, path.with_name(f"{path.stem}-{name}.svg")) for name, plot in plots.items()]
    return [plot for plot in made if plot]
