"""Compares the operators with the references on random cases, new ones each time, until the time is up.

    python -m tests.fuzz --minutes 10            new cases
    python -m tests.fuzz --repeat "deform_conv2d(...)"    one case, as a failure prints it

A failure is shrunk: every choice becomes as simple as it can be with the case still failing. Exits with 1 after a
failure. In float32 and below, all positions are such that float32 holds them exactly; else a sample beside a pixel's
centre or the border would fall on one side here and on the other in the reference.
"""

import argparse
import math
import random
import sys
import time

import torch

from dcn_plugin import ops
from dcn_plugin.ops import reference

from .ops.cases import STRIDED, as_float64, relative_error, run

TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in TOLERANCE}
LAYOUTS = {
    "contiguous": lambda t: t,
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t,
    **STRIDED,
}
SIZES = (1, 2, 3, 4, 5, 7, 8, 11, 16, 17, 33)
POWERS = (1, 2, 4)

# Each choice of a case, the simplest first: shrinking goes to the front.
CHOICES: dict[str, dict[str, tuple]] = {
    "deform_conv2d": dict(
        seed=(0,),
        dtype=tuple(DTYPES),
        layout=tuple(LAYOUTS),
        threads=(1, 2, 3),
        batch=(1, 0, 2, 3, 7),
        groups=(1, 2, 3, 8, 32),
        group_channels=(1, 2, 3, 4, 8, 16, 17, 40),
        group_outputs=(1, 2, 3, 8, 16, 33),
        deform_groups=(1, 2, 3, 4),
        height=SIZES,
        width=SIZES,
        kernel_h=(1, 2, 3, 5),
        kernel_w=(1, 2, 3, 5),
        stride_h=(1, 2, 3),
        stride_w=(1, 2, 3),
        pad_h=(0, 1, 2, 5),
        pad_w=(0, 1, 2, 5),
        dilation_h=(1, 2, 3),
        dilation_w=(1, 2, 3),
        mask=(False, True),
        bias=(False, True),
        reach=(0, 1, 4, 40),
        wild=(0.0, 0.1),
    ),
    "deform_roi_align": dict(
        seed=(0,),
        dtype=tuple(DTYPES),
        layout=tuple(LAYOUTS),
        threads=(1, 2, 3),
        batch=(1, 2, 3),
        channels=SIZES,
        height=SIZES,
        width=SIZES,
        rois=(1, 0, 2, 5, 17),
        bins_h=POWERS,
        bins_w=POWERS,
        spatial_scale=(1.0, 0.25, 0.0625),
        sampling_ratio=(1, 2, 4, 0),
        offset=(False, True),
        mask=(False, True),
        reach=(0, 1, 4),
    ),
    "deform_ps_roi_pool": dict(
        seed=(0,),
        dtype=tuple(DTYPES),
        layout=tuple(LAYOUTS),
        threads=(1, 2, 3),
        batch=(1, 2, 3),
        classes=(1, 0, 2, 3),
        class_outputs=(1, 2, 5, 16),
        height=SIZES,
        width=SIZES,
        rois=(1, 0, 2, 5, 17),
        bins_h=POWERS,
        bins_w=POWERS,
        group_h=(1, 2, 3),
        group_w=(1, 2, 3),
        part_h=(1, 2, 3),
        part_w=(1, 2, 3),
        spatial_scale=(1.0, 0.25, 0.0625),
        sample_per_part=POWERS,
        reach=(0, 1, 4),
    ),
    "ms_deform_attn": dict(
        seed=(0,),
        dtype=tuple(DTYPES),
        layout=tuple(LAYOUTS),
        threads=(1, 2, 3),
        batch=(1, 0, 2, 3),
        heads=(1, 2, 3, 8),
        channels=(*SIZES, 32, 64, 130),
        queries=(1, 0, 2, 5, 17, 40),
        levels=(1, 2, 3, 4),
        points=(1, 2, 3, 4, 9),
        height=SIZES,
        width=SIZES,
        float32_weights=(False, True),
        reach=(0, 1, 4, 40),
        wild=(0.0, 0.1),
    ),
}


WILD = float("nan"), float("inf"), -float("inf"), 1e30, -3e9


def on_grid(shape, reach):
    """Random multiples of 1/16 within +-reach, which bfloat16 holds exactly up to 16."""
    return torch.randint(-16 * reach, 16 * reach + 1, shape).double() / 16


def make_wild(positions, share):
    wild = torch.rand(positions.shape) < share
    positions[wild] = torch.tensor(WILD)[torch.randint(len(WILD), (int(wild.sum()),))].double()


def make_conv(c):
    channels = math.lcm(c["groups"] * c["group_channels"], c["deform_groups"])
    kernel, pads = (c["kernel_h"], c["kernel_w"]), (c["pad_h"], c["pad_w"])
    strides, dilations = (c["stride_h"], c["stride_w"]), (c["dilation_h"], c["dilation_w"])
    spans = [d * (k - 1) + 1 for d, k in zip(dilations, kernel, strict=True)]
    pads = tuple(max(p, (s - n + 1) // 2) for p, s, n in zip(pads, spans, (c["height"], c["width"]), strict=True))
    size = [
        (n + 2 * p - s) // t + 1 for n, p, s, t in zip((c["height"], c["width"]), pads, spans, strides, strict=True)
    ]
    taps = kernel[0] * kernel[1] * c["deform_groups"]
    offset = on_grid((c["batch"], 2 * taps, *size), c["reach"])
    make_wild(offset, c["wild"])
    tensors = dict(
        input=torch.randn(c["batch"], channels, c["height"], c["width"]),
        offset=offset,
        weight=torch.randn(c["groups"] * c["group_outputs"], channels // c["groups"], *kernel),
    )
    if c["mask"]:
        tensors["mask"] = torch.rand(c["batch"], taps, *size)
    if c["bias"]:
        tensors["bias"] = torch.randn(c["groups"] * c["group_outputs"])
    return tensors, dict(stride=strides, padding=pads, dilation=dilations)


def make_rois(c, whole):
    """Some over the edges; in the grid of the map's pixels or, in float64, anywhere."""
    size = torch.tensor([c["width"], c["height"]]) / c["spatial_scale"]
    low, extent = torch.rand(c["rois"], 2) * 1.4 - 0.2, torch.rand(c["rois"], 2) * 0.8 + 0.05
    rois = torch.cat([torch.randint(c["batch"], (c["rois"], 1)), low * size, (low + extent) * size], 1).double()
    return rois.round() if whole or c["dtype"] != "float64" else rois


def make_roi_align(c):
    tensors = dict(input=torch.randn(c["batch"], c["channels"], c["height"], c["width"]))
    bins = c["bins_h"], c["bins_w"]
    if c["offset"]:
        tensors["offset"] = on_grid((c["rois"], 2, *bins), c["reach"])
    if c["mask"]:
        tensors["mask"] = torch.rand(c["rois"], 1, *bins)
    # How many samples ceil(size / bins) makes must not hang on rounding either.
    ratio = c["sampling_ratio"] or (0 if c["dtype"] == "float64" else 2)
    options = dict(output_size=bins, spatial_scale=c["spatial_scale"], sampling_ratio=ratio, gamma=0.125)
    return tensors, options | dict(rois=make_rois(c, whole=False))


def make_ps_roi_pool(c):
    groups, parts = (c["group_h"], c["group_w"]), (c["part_h"], c["part_w"])
    channels = max(c["classes"], 1) * c["class_outputs"] * groups[0] * groups[1]
    tensors = dict(input=torch.randn(c["batch"], channels, c["height"], c["width"]))
    if c["classes"]:
        tensors["offset"] = on_grid((c["rois"], 2 * c["classes"], *parts), c["reach"])
        if (
            c["dtype"] == "float64"
        ):  # the steps of 1/16 would put samples on pixels' centres, reached by other roundings
            tensors["offset"] += torch.rand(tensors["offset"].shape) / 32
    sizes = dict(output_size=(c["bins_h"], c["bins_w"]), group_size=groups, part_size=parts)
    options = sizes | dict(
        sample_per_part=c["sample_per_part"], spatial_scale=c["spatial_scale"], trans_std=0.125, rois=make_rois(c, True)
    )
    return tensors, options


def make_attention(c):
    shapes = [(max(c["height"] >> level, 1), max(c["width"] >> level, 1)) for level in range(c["levels"])]
    samples = c["batch"], c["queries"], c["heads"], c["levels"], c["points"]
    sizes = torch.tensor(shapes).flip(1)[:, None].double()
    # Of pixels, at least 1/32 from any pixel's centre.
    positions = (torch.rand(*samples, 2) * sizes).floor() + on_grid((*samples, 2), c["reach"]) + 1 / 32
    locations = (positions + 0.5) / sizes
    make_wild(locations, c["wild"])
    tensors = dict(
        value=torch.randn(c["batch"], sum(h * w for h, w in shapes), c["heads"], c["channels"]),
        sampling_locations=locations,
        attention_weights=torch.rand(samples),
    )
    return tensors, dict(spatial_shapes=shapes)


MAKE = dict(
    deform_conv2d=make_conv,
    deform_roi_align=make_roi_align,
    deform_ps_roi_pool=make_ps_roi_pool,
    ms_deform_attn=make_attention,
)


def dtype_of(name, case):
    """A tensor's: locations are never of half types, attention weights need not be."""
    dtype = DTYPES[case["dtype"]]
    wide = name == "sampling_locations" or name == "attention_weights" and case["float32_weights"]
    return torch.float32 if wide and dtype != torch.float64 else dtype


def _with_gradients(operator):
    """Without RoIs, or with none on the map, a reference reads nothing that has gradients."""

    def function(**tensors):
        output = operator(**tensors)
        return output if output.requires_grad else output + 0 * tensors["input"].sum()

    return function


def problem(operator, case):
    """What is wrong with a case, in a few words; None where nothing is."""
    torch.manual_seed(case["seed"])
    dtype = DTYPES[case["dtype"]]
    tensors, options = MAKE[operator](case)
    tensors = {name: LAYOUTS[case["layout"]](t.to(dtype_of(name, case))) for name, t in tensors.items()}
    threads = torch.get_num_threads()
    torch.set_num_threads(case["threads"])
    try:
        output, gradients = run(getattr(ops, operator), tensors, **options)
    except Exception as error:  # any is a finding: all cases are valid
        return f"{type(error).__name__}: {error}"
    finally:
        torch.set_num_threads(threads)
    expected, expected_gradients = run(_with_gradients(getattr(reference, operator)), as_float64(tensors), **options)
    if not relative_error(output, expected) <= TOLERANCE[dtype]:
        return f"output differs by {relative_error(output, expected):.2g} of its largest"
    for name, gradient in gradients.items():
        its_expected = expected_gradients[name]
        its_expected = torch.zeros_like(tensors[name]) if its_expected is None else its_expected
        error = relative_error(gradient, its_expected)
        # A gradient that is 0 but for rounding has no scale of its own.
        if not (error <= TOLERANCE[dtype] or float(gradient.double().abs().max()) < 1e-9):
            return f"gradient of {name} differs by {error:.2g} of its largest"
    return None


def shrink(operator, case):
    """A case that fails and of which no single choice can be simpler."""
    again = True
    while again:
        again = False
        for name, choices in CHOICES[operator].items():
            if name == "seed":
                continue
            for value in choices[: choices.index(case[name])]:
                simpler = dict(case, **{name: value})
                if problem(operator, simpler):
                    case, again = simpler, True
                    break
    return case


def spelled(operator, case):
    return f"{operator}({', '.join(f'{name}={value!r}' for name, value in case.items())})"


def parsed(text):
    """The operator and the case that :func:`spelled` wrote."""
    operator, _, rest = text.partition("(")
    return operator, eval(f"dict({rest}")


def main(arguments=None):
    parser = argparse.ArgumentParser(description="Compares the operators with the references on random cases.")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, help="start from this one, to repeat a run; by default a new one")
    parser.add_argument("--repeat", metavar="CASE", help="run this case alone, as a failure printed it")
    args = parser.parse_args(arguments)
    if args.repeat:
        found = problem(*parsed(args.repeat))
        print(found or "equal")
        return bool(found)
    seed = random.SystemRandom().randrange(2**31) if args.seed is None else args.seed
    print(f"seed {seed}", flush=True)
    draw, end, cases, failures = random.Random(seed), time.monotonic() + 60 * args.minutes, 0, 0
    while time.monotonic() < end and failures < 5:
        operator = draw.choices(list(CHOICES), (3, 1, 1, 1))[0]
        case = {name: draw.choice(choices) for name, choices in CHOICES[operator].items()}
        case["seed"] = draw.randrange(2**31)
        cases += 1
        found = problem(operator, case)
        if found:
            failures += 1
            small = shrink(operator, case)
            print(f"FAILED: {found}\n  {spelled(operator, case)}")
            print(f"  smallest: {problem(operator, small)}\n  --repeat {spelled(operator, small)!r}", flush=True)
    print(f"{cases} cases, {failures} failures")
    return failures > 0


if __name__ == "__main__":
    sys.exit(main())
