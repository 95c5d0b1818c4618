"""Measures dcn_plugin's operators beside the dense convolution and every installed peer, and a detector with them.

All contenders of a case take turns in one process. Writes RESULTS/NAME.json, after each run, and makes from it tables
(NAME.md) and plots (NAME-*.svg), as `python -m benchmarks.report` does.
"""

import argparse
import json
import re
import time
from datetime import datetime, timezone
from pathlib import Path

import torch

from . import machine, report
from .cases import cases
from .detector import detector_cases
from .measure import measure


def parse_args():
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__)
    add = parser.add_argument
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--only", metavar="PATTERN", help="run what matches this regular expression; --list shows the names")
    add("--list", action="store_true", help="print the names of all runs and end")
    add("--quick", action="store_true", help="a few runs with a small budget: about a minute")
    add("--budget", type=float, help="seconds for each contender in each run (1; quick: 0.2)")
    add("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (%(default)s)")
    add("--results", type=Path, default=report.RESULTS, help="folder to write into (benchmarks/results)")
    args = parser.parse_args()
    args.budget = args.budget or (0.2 if args.quick else 1.0)
    args.name = args.device + "-quick" * args.quick + "-partial" * bool(args.only)
    return args


def title(case, direction):
    return f"{case.operator} {case.name} {direction}"


def summary(row):
    """Of a run, in one line: ratios to the floor, or milliseconds; who did not take part."""
    parts = [
        f"{name} " + (f"{found['ratio'][1]:.2f}" if "ratio" in found else f"{report.milliseconds(found)} ms")
        for name, found in row["contenders"].items()
    ]
    return ", ".join([*parts, *(f"{name} left out: {reason}" for name, reason in row["skipped"].items())])


def main():
    args = parse_args()
    everything = [*cases(args.device, args.threads), *detector_cases(args.device)]
    todo = [(case, way) for case in everything for way in case.directions if case.quick or not args.quick]
    todo = [run for run in todo if not args.only or re.search(args.only, title(*run))]
    if args.list:
        print("\n".join(title(*run) for run in todo))
        return
    if not todo:
        raise SystemExit(f"nothing matches {args.only!r}: --list shows the names")
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
    for name, reason in results["machine"]["absent"].items():
        print(f"without {name}: {reason}")
    args.results.mkdir(parents=True, exist_ok=True)
    path = args.results / f"{args.name}.json"
    began = time.monotonic()
    for number, (case, direction) in enumerate(todo, 1):
        start = time.monotonic()
        row = measure(case, direction, args.device, args.threads, args.budget)
        results["times"].append(row)
        results["seconds"] = round(time.monotonic() - began)
        took = time.monotonic() - start
        print(f"[{number}/{len(todo)}] {title(case, direction)}: {summary(row)} ({took:.1f} s)", flush=True)
        path.write_text(json.dumps(results, indent=1) + "\n")
    print()
    for written in [path, *report.write(path)]:
        print(f"wrote {written}")


if __name__ == "__main__":
    main()
