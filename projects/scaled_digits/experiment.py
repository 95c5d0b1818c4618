"""What learning nothing but offsets does for a CNN that never saw digits of other sizes. See README.md."""

import argparse
import copy
import ctypes
import itertools
import json
import logging
import multiprocessing
import os
import statistics
import time
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import pictures
import torch
from digit_sets import Digits, Split, mnist, rescale, sklearn_digits
from torch import Tensor, nn
from torch.nn import functional as F

from dcn_plugin import convert

ROOT = Path(__file__).parents[2]
BATCH = 64
RATE = 3e-3
OFFSET_RATE = 5e-3
SCALES = [0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]  # of the test digits; training draws evenly from the first to the last
UNTOUCHED, CEILING = "trained on regular digits", "trained on scaled digits"
TUNED = "{} tuned on scaled digits"
DEFORMABLE = {TUNED.format(f"offsets of {kind}"): kind for kind in ("DCN", "DCNv2")}
CONTROLS = {
    TUNED.format("norms and last layer"): lambda net: [
        *(p for norm in net.modules() if isinstance(norm, nn.BatchNorm2d) for p in norm.parameters()),
        *net.classifier.parameters(),
    ],
    TUNED.format("third convolution"): lambda net: [net.conv3[0].weight],
}
# Accuracies of https://medium.com/@phelixlau/notes-on-deformable-convolutional-networks-baaabbc11cf3 and its program.
PUBLISHED = [("Keras, MNIST: regular CNN", 98.74, 57.01), ("Keras, MNIST: offsets tuned", 97.27, 92.55)]


def cnn(width: int) -> nn.Sequential:
    """Four convolutions 3x3, the second and last of stride 2, with norm and ReLU; the map's mean; a classifier."""

    def block(in_channels, out_channels, stride=1):
        conv = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU())

    return nn.Sequential(
        OrderedDict(
            stem=block(1, width),
            conv2=block(width, 2 * width, stride=2),
            conv3=block(2 * width, 4 * width),
            conv4=block(4 * width, 4 * width, stride=2),
            pool=nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
            classifier=nn.Linear(4 * width, 10),
        )
    )


def train(net: nn.Module, parameters: list[nn.Parameter], split: Split, *, scaled: bool, rate: float, steps: int):
    """Trains these parameters, all others and, unless they are all there are, the norms' statistics staying."""
    net.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    net.train(len(parameters) == len(list(net.parameters())))
    optimizer = torch.optim.AdamW(parameters, rate, weight_decay=1e-2 if net.training else 0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.2)
    count = len(split.labels)
    epochs = (torch.randperm(count)[: count // BATCH * BATCH or count].split(BATCH) for _ in itertools.count())
    for chosen in itertools.islice(itertools.chain.from_iterable(epochs), steps):
        images = split.images[chosen]
        if scaled:
            images = rescale(images, torch.empty(len(images)).uniform_(SCALES[0], SCALES[-1]))
        loss = F.cross_entropy(net(images), split.labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    net.eval()


@torch.no_grad()
def accuracy(net: nn.Module, split: Split) -> dict[str, float]:
    """Percent right of the digits at each scale."""

    def right(images: Tensor, labels: Tensor, scale: float) -> int:
        return int((net(rescale(images, torch.full((len(images),), scale))).argmax(1) == labels).sum())

    batches = list(zip(split.images.split(256), split.labels.split(256), strict=True))
    return {
        str(scale): 100 * sum(right(images, labels, scale) for images, labels in batches) / len(split.labels)
        for scale in SCALES
    }


def networks(split: Split, width: int, steps: int) -> Iterator[tuple[str, nn.Module, int]]:
    """Each network by its name, trained, and how many of its parameters saw scaled digits.

    All but the untouched one are trained for 2 * steps: half of them on regular digits, or all on scaled ones.
    """

    def tuned(net, parameters, rate=RATE, scaled=True, steps=steps):
        train(net, parameters, split, scaled=scaled, rate=rate, steps=steps)
        return net, sum(parameter.numel() for parameter in parameters) if scaled else 0

    plain = cnn(width)
    yield UNTOUCHED, *tuned(plain, list(plain.parameters()), scaled=False)
    for name, kind in DEFORMABLE.items():
        net = convert(copy.deepcopy(plain), kind)  # all but the stem, which reads the image
        offsets = [parameter for name, parameter in net.named_parameters() if "conv_offset" in name]
        yield name, *tuned(net, offsets, OFFSET_RATE)
    for name, chosen in CONTROLS.items():
        net = copy.deepcopy(plain)
        yield name, *tuned(net, chosen(net))
    net = cnn(width)
    yield CEILING, *tuned(net, list(net.parameters()), steps=2 * steps)


def run_seed(seed: int, digits: Digits, width: int, steps: int, out: Path) -> dict:
    """Parameters, accuracies and seconds of each network of one seed; the networks themselves go to a file."""
    logging.getLogger("dcn_plugin").setLevel(logging.WARNING)
    torch.set_num_threads(1)  # seeds run side by side
    torch.manual_seed(seed)
    rows, states, start = {}, {}, time.perf_counter()
    for name, net, parameters in networks(digits.train, width, steps):
        found = accuracy(net, digits.test)
        seconds, start = time.perf_counter() - start, time.perf_counter()
        rows[name] = dict(parameters=parameters, accuracy=found, seconds=round(seconds, 1))
        states[name] = net.state_dict()
        print(
            f"seed {seed}: {name}: regular {found['1.0']:.2f}, scaled {mean(found):.2f} ({seconds:.0f} s)", flush=True
        )
    torch.save(states, out / f"seed{seed}.pth")
    return rows


def load(out: Path, seed: int, name: str, width: int) -> nn.Module:
    net = cnn(width)
    if name in DEFORMABLE:
        convert(net, DEFORMABLE[name])
    net.load_state_dict(torch.load(out / f"seed{seed}.pth")[name])
    return net.eval()


def keep_freed_memory() -> None:
    """Lets glibc keep what a pass frees for the next one.

    Otherwise it returns some of it to the system now and then, and getting it anew can take one of the networks, any of
    them, longer than its convolutions.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-1, 2**30)  # M_TRIM_THRESHOLD, in bytes
        libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD


@torch.no_grad()
def forward_times(width: int, rounds: int = 60) -> dict:
    """Median milliseconds of a forward pass, and median of its ratio to the plain network's in the same round."""
    keep_freed_memory()
    nets = {"plain": cnn(width).eval()}
    for kind in DEFORMABLE.values():
        nets[kind] = convert(copy.deepcopy(nets["plain"]), kind)
        for name, parameter in nets[kind].named_parameters():
            if "conv_offset" in name:
                nn.init.normal_(parameter, std=0.05)
    images, seconds = torch.rand(BATCH, 1, 28, 28), {name: [] for name in nets}
    for _ in range(rounds):
        for name, net in nets.items():
            net(images)  # untimed, to fill the caches with what is this network's
            start = time.perf_counter()
            net(images)
            seconds[name].append(time.perf_counter() - start)
    seconds = {name: found[rounds // 10 :] for name, found in seconds.items()}  # the first are slower
    return {
        name: dict(
            milliseconds=round(1e3 * statistics.median(found), 2),
            ratio=round(statistics.median(own / plain for own, plain in zip(found, seconds["plain"], strict=True)), 2),
        )
        for name, found in seconds.items()
    }


def mean(by_scale: dict[str, float]) -> float:
    return statistics.mean(by_scale.values())


def table(results: dict) -> str:
    """Mean and standard deviation over the seeds, in Markdown."""
    seeds = list(results["seeds"].values())

    def cell(values):
        return f"{statistics.mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")

    def scaled(rows, name):
        return mean(rows[name]["accuracy"])

    def share(rows, name):
        gap = scaled(rows, CEILING) - scaled(rows, UNTOUCHED)
        return 100 * (scaled(rows, name) - scaled(rows, UNTOUCHED)) / gap if gap else 0.0

    lines = ["| | tuned parameters | regular digits | scaled digits | of the gap |", "|---|---|---|---|---|"]
    for name in seeds[0]:
        regular = cell([rows[name]["accuracy"]["1.0"] for rows in seeds])
        gap = "" if name in (UNTOUCHED, CEILING) else cell([share(rows, name) for rows in seeds])
        numbers = [f"{seeds[0][name]['parameters']:,}", regular, cell([scaled(rows, name) for rows in seeds]), gap]
        lines.append(f"| {name} | {' | '.join(numbers)} |")
    lines += [f"| {name} | | {regular} | {scaled} | |" for name, regular, scaled in PUBLISHED]
    lines += ["", "| forward pass of 64 digits | milliseconds | of plain |", "|---|---|---|"]
    for width, rows in results["forward"].items():
        for name, row in rows.items():
            lines.append(f"| {name}, {width} channels in the first layer | {row['milliseconds']} | {row['ratio']} |")
    return "\n".join([*lines, "| Keras, deformable | 260 | 26 |"])


def main() -> None:
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "--mnist", type=Path, metavar="FOLDER", help="MNIST's IDX files, in place of scikit-learn's digits"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "work_dirs/scaled_digits", help="folder of the results")
    parser.add_argument("--seeds", type=int, default=5, help="how many")
    parser.add_argument("--steps", type=int, default=200, help=f"of each training, {BATCH} digits each")
    parser.add_argument("--width", type=int, default=16, help="channels of the first convolution")
    parser.add_argument("--workers", type=int, default=cores, help="seeds that run side by side, a thread each")
    parser.add_argument("--force", action="store_true", help="run seeds again whose results are there")
    args = parser.parse_args()

    digits = mnist(args.mnist) if args.mnist else sklearn_digits()
    source = f"MNIST of {args.mnist}" if args.mnist else "scikit-learn"
    print(f"{len(digits.train.labels)} digits to train, {len(digits.test.labels)} to test ({source})", flush=True)
    settings = dict(source=source, steps=args.steps, width=args.width)
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "results.json"
    results = json.loads(file.read_text()) if file.exists() and not args.force else {}
    if results.get("settings") != settings:
        results = dict(settings=settings, seeds={})

    missing = [seed for seed in range(args.seeds) if str(seed) not in results["seeds"]]
    with ProcessPoolExecutor(args.workers, multiprocessing.get_context("spawn")) as pool:
        running = {pool.submit(run_seed, seed, digits, args.width, args.steps, args.out): seed for seed in missing}
        for done in as_completed(running):
            results["seeds"][str(running[done])] = done.result()
            results["seeds"] = dict(sorted(results["seeds"].items()))
            file.write_text(json.dumps(results, indent=1) + "\n")

    print("timing forward passes", flush=True)
    results["forward"] = {str(width): forward_times(width) for width in (args.width, 2 * args.width)}
    results["machine"] = dict(torch=torch.__version__, cores=cores)
    file.write_text(json.dumps(results, indent=1) + "\n")
    (args.out / "table.md").write_text(table(results) + "\n")
    pictures.accuracy_by_scale(results, args.out / "accuracy.svg")
    nets = {kind: load(args.out, 0, name, args.width) for name, kind in ((UNTOUCHED, "plain"), *DEFORMABLE.items())}
    pictures.sampling_points(nets, *digits.test, args.out / "sampling.gif")
    print(table(results))
    print(f"in {args.out}: results.json, table.md, accuracy.svg, sampling.gif")


if __name__ == "__main__":
    main()
