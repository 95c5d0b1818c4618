"""Measures dcn_plugin's operators beside the dense convolution and every installed peer, and a detector with them.

All contenders of a case take turns. Writes RESULTS/NAME.json, after each run, and in the end makes from it tables
(NAME.md) and plots (NAME-*.svg), as `python -m benchmarks.report` does. What a contender raises is in the record; the
exit status is 1 where that was not a peer's.
"""

import argparse
import json
import math
import re
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

import torch

from . import machine, peers, report, torchvision_wheel
from .cases import cases
from .detector import detector_cases
from .measure import measure
from .records import milliseconds, title


def parse_args():
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__)
    add = parser.add_argument
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--only", metavar="PATTERN", help="run what matches this regular expression; --list shows the names")
    add("--list", action="store_true", help="print the names of all runs and end")
    add("--quick", action="store_true", help="a few runs with a small budget: about a minute")
    add("--budget", type=float, help="seconds for each contender in each run (1; quick: 0.2)")
    add("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (%(default)s)")
    add("--seconds", type=float, default=math.inf, help="start no run after so many seconds")
    add(
        "--torchvision-from", metavar="FOLDER", type=Path, help="CPU: time the torchvision that FOLDER holds, elsewhere"
    )
    add("--results", type=Path, default=report.RESULTS, help="folder to write into (benchmarks/results)")
    add("--json-only", action="store_true", help="make no tables and plots in the end")
    args = parser.parse_args()
    if args.torchvision_from and args.device != "cpu":
        parser.error("--torchvision-from is for the CPU: install torchvision to time it on CUDA")
    args.budget = args.budget or (0.2 if args.quick else 1.0)
    args.name = args.device + "-quick" * args.quick + "-partial" * bool(args.only)
    return args


def summary(row):
    """Of a run, in one line: ratios to the floor, or milliseconds; who did not take part."""
    parts = [
        f"{name} " + (f"{found['ratio'][1]:.2f}" if "ratio" in found else f"{milliseconds(found)} ms")
        for name, found in row["contenders"].items()
    ]
    parts += [f"{name} FAILED: {why}" for name, why in row["failed"].items()]
    return ", ".join([*parts, *(f"{name} left out: {why}" for name, why in row["skipped"].items())])


def save(results, path):
    """At every moment the file is whole."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(results, indent=1) + "\n")
    partial.replace(path)


def start_torchvision(folder):
    try:
        peers.elsewhere["torchvision"] = torchvision_wheel.start(folder)
    except Exception as error:
        raise SystemExit(f"--torchvision-from {folder}: {error}") from error
    module, why = peers.load("torchvision")
    if module is None:
        raise SystemExit(f"--torchvision-from {folder}: {why}")


def device_answers(device):
    """Not after a kernel has failed: then nothing runs in this process any more."""
    try:
        return device == "cpu" or torch.cuda.synchronize() is None
    except RuntimeError:
        return False


def main():
    args = parse_args()
    everything = [*cases(args.device, args.threads), *detector_cases(args.device)]
    todo = [(case, way) for case in everything for way in case.directions if case.quick or not args.quick]
    titles = [title(case.operator, case.name, way) for case, way in todo]
    chosen = [i for i, name in enumerate(titles) if not args.only or re.search(args.only, name)]
    todo, titles = [todo[i] for i in chosen], [titles[i] for i in chosen]
    if args.list:
        print("\n".join(titles))
        return 0
    if not todo:
        raise SystemExit(f"nothing matches {args.only!r}: --list shows the names")
    if args.torchvision_from:
        start_torchvision(args.torchvision_from)
    torch.set_num_threads(args.threads)
    torch.backends.cudnn.benchmark = True  # the floor is the best that cuDNN has
    results = dict(
        name=args.name,
        device=args.device,
        command=machine.command(),
        began=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        machine=machine.describe(args.device, args.threads),
        times=[],
    )
    for name, why in results["machine"]["absent"].items():
        print(f"without {name}: {why}")
    args.results.mkdir(parents=True, exist_ok=True)
    path = args.results / f"{args.name}.json"
    began = time.monotonic()
    for number, (case, direction) in enumerate(todo):
        start = time.monotonic()
        if start - began > args.seconds or not device_answers(args.device):
            break
        row = measure(case, direction, args.device, args.threads, args.budget)
        results["times"].append(row)
        results |= dict(seconds=round(time.monotonic() - began), not_run=titles[number + 1 :])
        save(results, path)
        took = time.monotonic() - start
        print(f"[{number + 1}/{len(todo)}] {titles[number]}: {summary(row)} ({took:.1f} s)", flush=True)
        if args.device == "cuda" and device_answers("cuda"):
            torch.cuda.empty_cache()
    if results.get("not_run"):
        print(f"not run: {len(results['not_run'])} of {len(todo)}")
    print()
    for written in [path, *([] if args.json_only else report.write(path))]:
        print(f"wrote {written}")
    return int(any(row["failed"] for row in results["times"]))


if __name__ == "__main__":
    sys.exit(main())
